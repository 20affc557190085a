"""configs/shapes.py on one GPU, about nine minutes: scripts/shapes_gpu.sh has its commands.

A larger model sees four times as many pictures. They are made by processes: one Python makes a
thousand samples a second, and an H200 takes twelve times as many.
"""

from dataclasses import replace

from configs import shapes
from jflow.data.mixture import WindowConfig
from jflow.training.config import TrainConfig
from jflow.training.optimizer import OptimizerConfig


def get_config(steps: int = 10_000, workers: int = 14) -> TrainConfig:
    config = shapes.get_config("shapes-gpu", steps, alone=steps * 2 // 5, reading=5)
    data = replace(
        config.data,
        batch_rows=64,
        understanding=WindowConfig(samples=32, rows=16),
        generation=WindowConfig(samples=152, rows=32),
        workers=workers,
        prefetch=4 * workers,
    )
    return replace(
        config,
        data=data,
        optimizer=OptimizerConfig(
            learning_rate=1.5e-3, warmup_steps=500, decay=(steps * 6 // 10, steps)
        ),
        # All layers: no slices of stacks are copied.
        unroll=6,
        log_every=250,
        save_every=steps // 4 + 1,
    )
