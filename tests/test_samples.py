"""Samples on the way: the same pictures and answers as from a checkpoint of that step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jflow import images
from jflow.inference.pipeline import AnswerOptions, ImageOptions, Pipeline, Question
from jflow.prompts import Message, user_question
from jflow.training import optimizer
from jflow.training import state as states
from jflow.training.config import SamplesConfig
from jflow.training.objectives import Modules
from jflow.training.samples import Sampler
from tests.goldens import REPO

CAT = str(REPO / "docs" / "cat.jpg")
CONFIG = SamplesConfig(
    prompts=("a cat", "two dogs"), questions=((CAT, "What is it?"),),
    every=5, steps=2, guidance_scale=3.0, seed=4, max_new_tokens=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def state(tiny):
    """Raw parameters and averages that differ."""
    stage = optimizer.OptimizerConfig()
    fresh = states.init(tiny.params, (r"janusflow/",), optimizer.adamw(stage))
    return fresh.replace(ema=jax.tree.map(lambda a: 0.9 * a, fresh.params))


def sampler(tiny: Pipeline, config: SamplesConfig = CONFIG) -> Sampler:
    modules = Modules(model=tiny.model.clone(remat="full"), vae=tiny.vae, repa=None)
    return Sampler(config, modules, tiny.tokenizer, tiny.processor)


def test_pictures_and_answers_are_those_of_inference(tiny, state, tmp_path):
    """Raw above averaged, a column for each prompt; the files say what is what."""
    picture, text = sampler(tiny).write(tmp_path, 35, state)
    options = ImageOptions(steps=2, guidance_scale=3.0, seed=4)
    messages = (Message("User", user_question("What is it?", 1)), Message("Assistant", ""))
    question = Question(messages, (images.load_image(CAT),))
    rows, answers = [], []
    for ema in (False, True):
        pipeline = dataclasses.replace(tiny, params=states.parameters(state, ema))
        (row,) = pipeline.generate(CONFIG.prompts, 1, options)
        rows += list(row)
        *_, (answer,) = pipeline.answer([question], AnswerOptions(6))
        answers.append(answer)
    assert not np.array_equal(rows[0], rows[2])
    np.testing.assert_array_equal(picture, images.make_grid(rows, columns=2))
    with Image.open(tmp_path / "samples" / "00000035.png") as written:
        np.testing.assert_array_equal(np.asarray(written), picture)
        assert written.info["prompts"] == "a cat\ntwo dogs" and written.info["step"] == "35"
    assert (tmp_path / "samples" / "00000035.txt").read_text(encoding="utf-8") == text
    for line in ("a cat", "two dogs", f"{CAT}: What is it?",
                 f"  raw: {answers[0]}", f"  EMA: {answers[1]}"):  # fmt: skip
        assert line.rstrip() in [found.rstrip() for found in text.split("\n")]


def test_only_questions_or_only_prompts(tiny, state, tmp_path):
    asked = sampler(tiny, dataclasses.replace(CONFIG, prompts=()))
    picture, text = asked.write(tmp_path, 1, state)
    assert picture is None and "What is it?" in text
    assert [file.name for file in (tmp_path / "samples").iterdir()] == ["00000001.txt"]
    drawn = sampler(tiny, dataclasses.replace(CONFIG, questions=()))
    picture, text = drawn.write(tmp_path, 2, state)
    assert picture is not None and "raw:" not in text


def test_what_cannot_be_sampled_is_known_at_once(tiny):
    with pytest.raises(ValueError, match="give samples.prompts or .questions"):
        sampler(tiny, SamplesConfig(every=3))
    with pytest.raises(FileNotFoundError, match="no image file nowhere.png"):
        sampler(tiny, SamplesConfig(questions=(("nowhere.png", "What?"),), every=3))


def test_a_model_of_pixels_needs_no_vae(tiny):
    """Its latents are the picture: encoder and decoder of 3 channels and patches of 16 pixels."""
    config = tiny.model.config
    config = dataclasses.replace(
        config,
        gen_encoder=dataclasses.replace(
            config.gen_encoder, input_channels=3, kernel_size=16, stride=16
        ),
        gen_decoder=dataclasses.replace(config.gen_decoder, out_channels=3, upsamples=4),
    )
    model = tiny.model.clone(config=config)
    from jflow.models.janusflow import init_params

    params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
    pipeline = Pipeline(model, None, {"janusflow": params}, tiny.tokenizer, tiny.processor)
    assert pipeline.latent_shape == (64, 64, 3)
    (picture,) = pipeline.generate(["a cat"], 1, ImageOptions(steps=1))
    assert picture.shape == (1, 64, 64, 3) and picture.dtype == np.uint8
    latents = jnp.linspace(-1.2, 1.2, 64 * 64 * 3).reshape(1, 64, 64, 3)
    np.testing.assert_array_equal(pipeline.decode(latents), images.to_uint8(np.asarray(latents)))
