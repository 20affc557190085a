"""Answering: batches, turns, sampling, and where it stops."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from jflow.inference.pipeline import AnswerOptions, Pipeline, Question, until
from jflow.inference.text import choose_token
from jflow.prompts import Message, user_question

CAT = Image.open("docs/cat.jpg").convert("RGB")
COFFEE = Image.open("docs/coffee.jpg").convert("RGB")
BRIEF = AnswerOptions(max_new_tokens=12)


def ask(text, *images, id=0):
    messages = (Message("User", user_question(text, len(images))), Message("Assistant", ""))
    return Question(messages, images, id)


def final(answers) -> list[str]:
    *_, last = answers
    return last


@pytest.fixture(scope="module")
def unrolled(tiny_ckpt):
    return Pipeline.from_checkpoint(tiny_ckpt, scan_layers=False)


@pytest.mark.parametrize("options", [BRIEF, AnswerOptions(12, temperature=1.5, top_p=0.95, seed=3)])
def test_an_answer_does_not_depend_on_its_batch(tiny, options):
    """Different lengths, no image, one image, two; greedy and drawn."""
    questions = [
        ask("What is this?", CAT, id=0),
        ask("Which of the two pictures is the brighter one, and why?", CAT, COFFEE, id=1),
        ask("Hello!", id=2),
    ]
    together = final(tiny.answer(questions, options))
    assert len(set(together)) == 3 and all(together)
    alone = [final(tiny.answer([question], options))[0] for question in questions]
    assert together == alone


def test_an_answer_ends_where_the_positions_do(tiny):
    """Beside one that has more room, and with the tokens that it would have begun with anyway."""
    questions = [ask("What is this?", CAT, id=0), ask("Hello!", id=1)]
    lengths = [len(tiny.question_tokens(q.messages, len(q.images))) for q in questions]
    config = tiny.model.config
    short = replace(config.language, max_position_embeddings=lengths[0] + 5)
    cramped = replace(tiny, model=tiny.model.clone(config=replace(config, language=short)))
    five = final(tiny.answer(questions[:1], AnswerOptions(max_new_tokens=5)))
    assert final(cramped.answer(questions, BRIEF)) == [
        *five,
        *final(tiny.answer(questions, BRIEF))[1:],
    ]
    none = replace(config.language, max_position_embeddings=lengths[0])
    full = replace(tiny, model=tiny.model.clone(config=replace(config, language=none)))
    with pytest.raises(ValueError, match=f"the model has {lengths[0]} positions"):
        final(full.answer(questions, BRIEF))


def test_layers_apart_answer_the_same(tiny, unrolled, tiny_ckpt, monkeypatch):
    """Also with the parameters as a GPU holds them."""
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        by_rows = Pipeline.from_checkpoint(tiny_ckpt, scan_layers=False)
    assert set(by_rows.params["janusflow"]["language_model"]["lm_head"]) == {"rows"}
    questions = [ask("What is this?", CAT)]
    want = final(tiny.answer(questions, BRIEF))
    for pipeline in (unrolled, by_rows):
        assert final(pipeline.answer(questions, BRIEF)) == want


def test_images_and_their_order_matter(tiny):
    answers = [
        final(tiny.answer([ask("Compare.", *images)], BRIEF))[0]
        for images in ((CAT, COFFEE), (COFFEE, CAT), (CAT, CAT))
    ]
    assert len(set(answers)) == 3


def test_streaming_grows_to_the_final_answer(tiny):
    seen = [answers[0] for answers in tiny.answer([ask("What?", CAT)], AnswerOptions(20))]
    assert len(seen) == 3  # chunks of 8 tokens
    assert seen[0]
    for piece, later in zip(seen[:-1], seen[1:], strict=True):
        assert later.startswith(piece.rstrip("\N{REPLACEMENT CHARACTER}"))


def test_stops_at_the_end_token_and_at_the_limit(tiny):
    """With the first greedy token as end token there is nothing to say."""
    question = ask("What is this?", CAT)
    assert np.array_equal(until(np.array([5, 6, 2, 7, 2]), 2), [5, 6])
    rows = tiny.tokenizer.encode(final(tiny.answer([question], AnswerOptions(1)))[0])
    assert len(rows) <= 3  # BOS, and one token, which may decode to a piece of a character
    eos = tiny.tokenizer.eos_id
    try:
        first = greedy_ids(tiny, question)[0]
        tiny.tokenizer.eos_id = first
        assert final(tiny.answer([question], BRIEF)) == [""]
    finally:
        tiny.tokenizer.eos_id = eos


def greedy_ids(pipeline, question) -> list[int]:
    written = []
    decode = pipeline.tokenizer.decode
    try:
        pipeline.tokenizer.decode = lambda ids: written.append(list(map(int, ids))) or ""
        final(pipeline.answer([question], BRIEF))
    finally:
        pipeline.tokenizer.decode = decode
    return written[-1]


@pytest.mark.parametrize("temperature, top_p", [(0.7, 0.9), (1.3, 0.5), (1.0, 1.0), (2.0, 0.05)])
def test_nucleus_equals_transformers(temperature, top_p):
    """The tokens that can be drawn are those that transformers' warpers keep, as often."""
    logits = np.random.default_rng(0).standard_normal((1, 12)).astype(np.float32) * 2
    scores = TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    want = torch.softmax(scores, -1)[0].numpy()
    draws = 20000
    keys = jax.random.split(jax.random.key(0), draws)
    tokens = choose_token(
        jnp.broadcast_to(logits, (draws, 12)), keys, jnp.float32(temperature), jnp.float32(top_p)
    )
    got = np.bincount(tokens, minlength=12) / draws
    assert set(np.flatnonzero(got)) <= set(np.flatnonzero(want))
    np.testing.assert_allclose(got, want, rtol=0, atol=4 * np.sqrt(0.25 / draws))


def test_temperature_zero_is_greedy():
    logits = np.random.default_rng(1).standard_normal((5, 9)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 5)
    tokens = choose_token(logits, keys, None, jnp.float32(0.1))
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_bad_questions_are_one_sentence(tiny):
    with pytest.raises(ValueError, match="question is empty"):
        ask("   ", CAT)
    mismatch = Question((Message("User", "What?"), Message("Assistant", "")), (CAT,))
    with pytest.raises(ValueError, match="has 0 <image_placeholder> but 1 images"):
        next(tiny.answer([mismatch], BRIEF))
    with pytest.raises(ValueError, match="16384 positions"):
        next(tiny.answer([ask("word " * 20000)], BRIEF))


@pytest.mark.parametrize("bad", [dict(temperature=-1), dict(top_p=0), dict(max_new_tokens=0)])
def test_bad_options_are_refused(bad):
    with pytest.raises(ValueError):
        AnswerOptions(**bad)
