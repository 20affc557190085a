"""What the model draws and answers while it is trained: RUN/samples/STEP.png and STEP.txt."""

import os
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from jflow import images
from jflow.distributed import is_first
from jflow.images import ImageProcessor
from jflow.inference.pipeline import AnswerOptions, ImageOptions, Pipeline, Question
from jflow.prompts import Message, Template, Tokenizer, user_question
from jflow.training.config import SamplesConfig
from jflow.training.lora import merge
from jflow.training.objectives import Modules
from jflow.training.state import TrainState, parameters


class Sampler:
    """Draws and asks with the parameters of a state, raw and averaged.

    template: see `Pipeline`. mesh: that the states lie on, None for one device. All processes draw
    and ask together, the first one writes.

    Raises FileNotFoundError or ValueError in one sentence where there is nothing to draw or ask,
    and for images that cannot be read.
    """

    def __init__(
        self,
        config: SamplesConfig,
        modules: Modules,
        tokenizer: Tokenizer,
        processor: ImageProcessor,
        mesh: Mesh | None = None,
        template: Template = "chat",
    ):
        if config.every and not (config.prompts or config.questions):
            raise ValueError("samples.every asks for samples: give samples.prompts or .questions.")
        self._config, self._lora = config, modules.lora
        self._drawing = ImageOptions(config.steps, config.guidance_scale, config.seed)
        self._drawing.grid()  # Refuses steps that are none.
        self._answering = AnswerOptions(config.max_new_tokens)
        self._parts = dict(
            # Nothing is differentiated here.
            model=modules.model.clone(remat="none"),
            vae=modules.vae,
            tokenizer=tokenizer,
            processor=processor,
            mesh=mesh,
            template=template,
        )
        self._questions = [
            Question(
                (Message("User", user_question(text, 1)), Message("Assistant", "")),
                (images.load_image(file),),
            )
            for file, text in config.questions
        ]

    def draw(self, state: TrainState) -> np.ndarray | None:
        """uint8 [H, W, 3], a column for each prompt: the raw parameters above their average."""
        config = self._config
        if not config.prompts:
            return None
        rows = []
        for ema in (False, True):
            for batch in self._pipeline(state, ema).generate(config.prompts, 1, self._drawing):
                rows += list(batch)
        return images.make_grid(rows, columns=len(config.prompts))

    def answer(self, state: TrainState) -> list[tuple[str, str]]:
        """(raw, averaged) answers to each of the questions."""
        if not self._questions:
            return []
        found = []
        for ema in (False, True):
            *_, answers = self._pipeline(state, ema).answer(self._questions, self._answering)
            found.append(answers)
        return list(zip(*found, strict=True))

    def write(self, run: Path, step: int, state: TrainState) -> tuple[np.ndarray | None, str]:
        """Writes RUN/samples/STEP.png and .txt; returns the picture and the text."""
        config, path = self._config, run / "samples" / f"{step:08d}"
        picture, answers, text = self.draw(state), self.answer(state), ""
        if picture is not None:
            prompts = "\n".join(config.prompts)
            text += f"{path.name}.png: raw parameters above, EMA below; the prompts:\n{prompts}\n"
        for (file, question), (raw, averaged) in zip(config.questions, answers, strict=True):
            text += f"\n{file}: {question}\n  raw: {raw}\n  EMA: {averaged}\n"
        if is_first():
            self._save(path, step, picture, text)
        return picture, text

    def _save(self, path: Path, step: int, picture: np.ndarray | None, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if picture is not None:
            prompts = "\n".join(self._config.prompts)
            about = {"prompts": prompts, "step": str(step), "seed": str(self._config.seed)}
            images.save_png(picture, path.with_suffix(".png"), about)
        partial = path.with_name(f".{path.name}.txt.tmp")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path.with_suffix(".txt"))

    def _pipeline(self, state: TrainState, ema: bool) -> Pipeline:
        return Pipeline(params=merge(parameters(state, ema), self._lora), **self._parts)
