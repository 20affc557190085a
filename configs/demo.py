"""configs/shapes.py in ten minutes on 2 cores: `make demo` builds its data and runs it.

Most of its second half are conversations, or it would draw better than it answers.
"""

from dataclasses import replace

from configs import shapes
from jflow.data.mixture import MixtureConfig
from jflow.training.config import TrainConfig


def get_config(steps: int = 2_800) -> TrainConfig:
    config = shapes.get_config("demo", steps)
    mixture = (
        MixtureConfig(0, understanding=0, generation=1, text=0),
        MixtureConfig(steps // 2, understanding=3, generation=1, text=0),
    )
    return replace(config, data=replace(config.data, mixture=mixture))
