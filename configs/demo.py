"""configs/shapes.py in ten minutes on 2 cores: `make demo` builds its data and runs it.

It learns to draw first, then to draw and to answer: in so short a run that leaves three times as
much of the shapes' names in the pictures as both from the start (docs/shapes.md).
"""

from dataclasses import replace

from configs import shapes
from jflow.data.mixture import MixtureConfig
from jflow.training.config import TrainConfig


def get_config(steps: int = 3_300) -> TrainConfig:
    config = shapes.get_config("demo", steps)
    mixture = (
        MixtureConfig(0, understanding=0, generation=1, text=0),
        MixtureConfig(steps * 11 // 20, understanding=3, generation=1, text=0),
    )
    return replace(config, data=replace(config.data, batch_rows=8, mixture=mixture))
