"""A page in the browser to draw and to ask.

pip install -e ".[demo]"
python demo.py --ckpt DIR
"""

import argparse
import sys
from collections.abc import Iterator

import gradio as gr
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jflow.compilation import enable_cache
from jflow.images import to_rgb
from jflow.inference.pipeline import AnswerOptions, ImageOptions, Pipeline, Question
from jflow.prompts import Message, user_question


def page(pipeline: Pipeline) -> gr.Blocks:
    """Two tabs, Draw and Ask, over one pipeline; bad input is shown as its own sentence."""

    def draw(prompt: str, steps: int, guidance: float, seed: int) -> list[np.ndarray]:
        try:
            options = ImageOptions(steps=int(steps), guidance_scale=guidance, seed=int(seed or 0))
            return list(np.concatenate(list(pipeline.generate([prompt], 4, options))))
        except ValueError as error:
            raise gr.Error(str(error)) from error

    def ask(image: Image.Image | None, question: str) -> Iterator[str]:
        images = () if image is None else (to_rgb(image),)
        try:
            messages = (
                Message("User", user_question(question, len(images))),
                Message("Assistant", ""),
            )
            for (answer,) in pipeline.answer([Question(messages, images)], AnswerOptions()):
                yield answer
        except ValueError as error:
            raise gr.Error(str(error)) from error

    with gr.Blocks(title="jflow") as blocks:
        with gr.Tab("Draw"):
            prompt = gr.Textbox(label="Prompt")
            steps = gr.Slider(1, 100, 30, step=1, label="Steps")
            guidance = gr.Slider(1, 10, 2, label="Guidance")
            seed = gr.Number(0, precision=0, label="Seed")
            gallery = gr.Gallery(columns=4, label="Images")
            gr.Button("Draw").click(draw, [prompt, steps, guidance, seed], gallery)
        with gr.Tab("Ask"):
            # As it is in the file: transparency and 16 bits are for `to_rgb`.
            image = gr.Image(type="pil", image_mode=None, label="Image")
            question = gr.Textbox(label="Question")
            answer = gr.Textbox(label="Answer")
            gr.Button("Ask").click(ask, [image, question], answer)
    return blocks


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args()
    enable_cache()
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    try:
        pipeline = Pipeline.from_checkpoint(args.ckpt, dtype, scan_layers=False)
        page(pipeline).launch(server_port=args.port)
    except (ValueError, OSError) as error:
        print(f"demo.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
