"""A checkpoint's scores on the shapes benchmark: what it draws and what it answers.

Prompts, pictures and questions are those of the splits "seen" (new scenes of the pairs of shape
and color that were trained on) and "unseen" (pairs that never occurred).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from jflow.data import shapes
from jflow.data.scenes import render
from jflow.images import from_uint8, to_uint8
from jflow.inference.pipeline import AnswerOptions, ImageOptions, Pipeline, Question
from jflow.prompts import Message, user_question


@dataclass(frozen=True)
class BenchmarkConfig:
    """prompts: drawn of each split, a sixth for each category. pictures: asked about, of each
    split, all that is well-posed. steps, guidance_scale, guidance_interval: of the sampler."""

    prompts: int = 600
    pictures: int = 200
    steps: int = 30
    guidance_scale: float = 3.0
    # From the start on it adds objects, or leaves none.
    guidance_interval: tuple[float, float] | None = (0.1, 1.0)
    batch_size: int = 64
    seed: int = 1

    def __post_init__(self):
        if self.prompts < len(shapes.CATEGORIES) or self.pictures < 2:
            raise ValueError("The benchmark needs 6 prompts, one a category, and 2 pictures.")


@dataclass(frozen=True)
class Drawn:
    """Records in GenEval's format, and the picture of each, [N, H, W, 3] float32 in [-1, 1]."""

    records: Sequence[dict]
    pictures: np.ndarray


@dataclass(frozen=True)
class Answered:
    """Questions with the picture of each, uint8 [H, W, 3], and the model's answer."""

    questions: Sequence[shapes.Question]
    pictures: Sequence[np.ndarray]
    answers: Sequence[str]


def draw(pipeline: Pipeline, split: str, config: BenchmarkConfig) -> Drawn:
    """A picture of every prompt of a split, each from noise of its own."""
    records = [shapes.prompt(config.seed, split, i) for i in range(config.prompts)]
    options = ImageOptions(
        steps=config.steps,
        guidance_scale=config.guidance_scale,
        seed=config.seed,
        guidance_interval=config.guidance_interval,
    )
    texts = [record["prompt"] for record in records]
    batches = pipeline.generate(texts, 1, options, config.batch_size, first_ids=range(len(texts)))
    return Drawn(records, from_uint8(np.concatenate(list(batches))))


def ask(pipeline: Pipeline, split: str, config: BenchmarkConfig, shift: int = 0) -> Answered:
    """Answers to every question about the pictures of a split.

    shift: each question is asked about the picture so many further on; 0 for the right one.
    """
    examples = [shapes.example(config.seed, split, i) for i in range(config.pictures)]
    size = pipeline.processor.image_size
    pictures = [to_uint8(render(example.scene, size)) for example in examples]
    asked = [(q, i) for i, example in enumerate(examples) for q in example.questions]
    shown = [pictures[(i + shift) % len(pictures)] for _, i in asked]
    answers: list[str] = []
    for first in range(0, len(asked), config.batch_size):
        # The last batch is filled up with copies, so that it runs the same program.
        ids = np.minimum(np.arange(first, first + config.batch_size), len(asked) - 1)
        questions = [
            Question(
                (
                    Message("User", user_question(asked[i][0].question, 1)),
                    Message("Assistant", ""),
                ),
                (Image.fromarray(shown[i]),),
            )
            for i in ids
        ]
        *_, found = pipeline.answer(questions, AnswerOptions(max_new_tokens=4))
        answers += found
    return Answered([question for question, _ in asked], shown, answers[: len(asked)])


def answer_scores(answered: Answered) -> dict[str, float]:
    """Share of right answers, "all" and by kind of question."""
    right = np.array(
        [a == q.answer for q, a in zip(answered.questions, answered.answers, strict=True)]
    )
    kinds = np.array([question.kind for question in answered.questions])
    by_kind = {str(kind): float(right[kinds == kind].mean()) for kind in np.unique(kinds)}
    return {"all": float(right.mean())} | by_kind
