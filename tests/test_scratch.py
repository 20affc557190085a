"""The small model from nothing: its words, the parts that are shipped, and what they can do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow.checkpoints import load_checkpoint
from jflow.data import builders, shapes
from jflow.images import from_uint8
from jflow.inference.pipeline import ImageOptions, Pipeline
from jflow.models.siglip import Siglip, SiglipConfig
from jflow.models.vae import AutoencoderKL, VAEConfig
from jflow.prompts import Tokenizer, generation_tokens
from jflow.scratch.__main__ import main
from jflow.scratch.parts import ASSETS, pictures, read, write
from jflow.scratch.siglip import holds, inventory, sigmoid_loss, statement
from jflow.scratch.tokenizer import tokenizer_files


def texts():
    for split in ("train", "seen", "unseen"):
        for i in range(400):
            example = shapes.example(0, split, i)
            yield example.caption
            yield inventory(example.scene, np.random.default_rng(i))
            for question in example.questions:
                yield question.question
                yield question.answer
    rng = np.random.default_rng(0)
    for digit in range(10):
        yield from builders.digit_captions(digit)
        for question, answer in builders.digit_questions(digit, rng):
            yield question
            yield answer


def test_every_word_of_the_datasets_is_a_token():
    tokenizer = Tokenizer.from_files(tokenizer_files(16))
    unknown = tokenizer.encode("xylophone")[1]
    missing = {text for text in texts() if unknown in tokenizer.encode(text)}
    assert not missing
    assert tokenizer.decode(tokenizer.encode("top right")) == "top right"


def test_the_template_costs_a_token_a_phrase():
    tokenizer = Tokenizer.from_files(tokenizer_files(16))
    assert len(generation_tokens(tokenizer, "a photo of a circle")) == 1 + 1 + 5 + 1


def test_sigmoid_loss_is_that_of_the_paper():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 7)), rng.normal(size=(8, 7))
    matches = rng.random((5, 8)) < 0.3
    scale, bias = 3.0, -2.0
    expected = 0.0
    for i in range(5):
        for j in range(8):
            z = 1 if matches[i, j] else -1
            expected -= np.log(1 / (1 + np.exp(-z * (scale * x[i] @ y[j] + bias)))) / 5
    np.testing.assert_allclose(sigmoid_loss(x, y, matches, scale, bias), expected, rtol=1e-5)


def test_statements_are_true_of_their_own_scene_and_seldom_of_others():
    rng = np.random.default_rng(0)
    scenes = [shapes.example(0, "train", i).scene for i in range(60)]
    said = [statement(scene, rng) for scene in scenes]
    assert all(holds(words, scene) for words, scene in zip(said, scenes, strict=True))
    assert 0.05 < np.mean([holds(words, scene) for words in said for scene in scenes]) < 0.6
    red = shapes.Scene((shapes.Object("circle", "red", 3, 29, 4.0),))
    assert holds(("red", "circle", "bottom left"), red) and holds(("", "", "bottom left"), red)
    assert not holds(("blue", "circle", ""), red) and not holds(("red", "", "top left"), red)


def test_parts_come_back_as_bfloat16_holds_them(tmp_path):
    params = {"a": {"b": np.linspace(0, 1, 7, dtype=np.float32)}}
    write(tmp_path / "part", {"sizes": [1, 2]}, params)
    config, found = read(tmp_path / "part")
    assert config == {"sizes": [1, 2]} and found["a"]["b"].dtype == np.float32
    np.testing.assert_allclose(found["a"]["b"], params["a"]["b"], rtol=2**-8)


def test_shipped_vae_returns_new_pictures():
    config, params = read(ASSETS / "vae_shapes")
    vae = AutoencoderKL(VAEConfig.from_hf(config))
    drawn, _ = pictures(7, "unseen", 32)
    x = from_uint8(drawn)

    @jax.jit
    def both(params, x):
        z, _ = vae.apply({"params": params}, x, method="encode")
        return z, vae.apply({"params": params}, z, method="decode")

    z, y = both(params, x)
    assert 10 * np.log10(4 / np.mean(np.square(y - x))) > 28  # dB, of pairs it never saw
    assert abs(np.std(z) * vae.config.scaling_factor - 1) < 0.1


def test_shipped_siglip_tells_colors_and_places_apart():
    """A linear map of its features, fitted to half of the pictures, names the color of others."""
    sizes, params = read(ASSETS / "siglip_shapes")
    siglip = Siglip(SiglipConfig(**sizes))
    drawn, scenes = pictures(3, "seen", 512)
    features = jax.jit(lambda x: siglip.apply({"params": params}, x))(from_uint8(drawn))
    side = siglip.config.grid
    rows, colors = [], []
    for feature, scene in zip(np.asarray(features), scenes, strict=True):
        for o in scene.objects:
            place = int(o.y * side // 32) * side + int(o.x * side // 32)
            rows.append(feature[place])
            colors.append(o.color)
    names = sorted(set(colors))
    target = np.array([[c == n for n in names] for c in colors], float)
    rows = np.c_[np.array(rows), np.ones(len(rows))]
    half = len(rows) // 2
    weights = np.linalg.lstsq(rows[:half], target[:half], rcond=1e-3)[0]
    right = np.argmax(rows[half:] @ weights, 1) == np.argmax(target[half:], 1)
    assert right.mean() > 0.9  # chance: 0.125


def test_a_scratch_checkpoint_draws_and_is_small(tmp_path, capsys):
    out = tmp_path / "init"
    assert main(["--out", str(out), "hidden_size=64", "intermediate_size=64", "num_layers=1"]) == 0
    params, described, _ = load_checkpoint(out)
    assert described["scratch"]["hidden_size"] == 64
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) < 12e6
    pipeline = Pipeline.from_checkpoint(out, jnp.float32)
    (images,) = pipeline.generate(["a photo of a red circle"], 2, ImageOptions(steps=2))
    assert images.shape == (2, 32, 32, 3)
    # The same picture as the second of two, and different from the first.
    (other,) = pipeline.generate(
        ["a photo of a red circle"], 1, ImageOptions(steps=2), first_ids=[1]
    )
    assert np.max(np.abs(other[0].astype(int) - images[1])) <= 1  # float32, another batch size
    assert np.max(np.abs(images[0].astype(int) - images[1])) > 10

    assert main(["--out", str(out)]) == 2  # Taken: nothing is overwritten.
    assert main(["--out", str(tmp_path / "x"), "hiden_size=3"]) == 2
    assert "hidden_size" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["siglip_shapes", "vae_shapes"])
def test_shipped_weights_are_below_2_mb(name):
    assert (ASSETS / f"{name}.safetensors").stat().st_size < 2e6
