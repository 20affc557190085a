"""configs/shapes.py in ten minutes on 2 cores: `make demo` builds its data and runs it.

Most of its second half are conversations, or it would draw better than it answers. Their rows, and
those to draw, are even numbers: two devices share them.
"""

from configs import shapes
from jflow.training.config import TrainConfig


def get_config(steps: int = 2_800) -> TrainConfig:
    return shapes.get_config("demo", steps, alone=steps // 2, reading=6)
