"""A small JanusFlow that learns to draw and to read coloured shapes, on any machine.

    python -m jflow.data build shapes --out runs/shapes/data --train 40000 --rounds 1 \\
        --wide 50 --counting 3
    python -m jflow.scratch --out runs/shapes/init wide=true
    python -m jflow.data cache --config configs/shapes.py --out runs/shapes/cache --batch 64
    python train.py --config configs/shapes.py --run runs/shapes/train
    python -m jflow.evals --ckpt runs/shapes/train --untrained runs/shapes/init --out runs/shapes

An hour and a half on 2 cores; `make demo` is the same in 10 minutes. It learns to draw first, then
to draw and to answer: the two hinder each other's beginnings. Half of the scenes have eight more
colors (--wide 50, and wide=true for their words), of which none is asked for: so it learns that a
color goes with any shape, also where it never sees both together. docs/shapes.md says what was
tried.
"""

from jflow.data.mixture import DataConfig, MixtureConfig, SourceConfig, WindowConfig
from jflow.sharding import MeshConfig
from jflow.training.config import TrainConfig
from jflow.training.objectives import ObjectiveConfig
from jflow.training.optimizer import PRETRAINING, OptimizerConfig
from jflow.training.state import EMAConfig

FIELDS = (("caption", "captions"),)


def get_config(
    name: str = "shapes", steps: int = 30_000, alone: int = 10_000, reading: int = 4
) -> TrainConfig:
    """alone: the step up to which it draws and does not read. reading: of eight rows behind it."""
    folder = f"runs/{name}"
    return TrainConfig(
        name=name,
        init_from=f"{folder}/init",
        steps=steps,
        trainable=PRETRAINING,
        data=DataConfig(
            sources=(
                SourceConfig("understanding", "tfds", f"{folder}/data", fields=FIELDS),
                SourceConfig("generation", "tfds", f"{folder}/data", fields=FIELDS),
            ),
            mixture=(
                MixtureConfig(0, understanding=0, generation=1, text=0),
                MixtureConfig(alone, understanding=reading, generation=8 - reading, text=0),
            ),
            # A window of a task is about what one batch takes of it: none is made twice.
            batch_rows=8,
            max_seq_len=160,
            understanding=WindowConfig(samples=8, rows=4),
            generation=WindowConfig(samples=38, rows=8),
            images_per_row=3,
            crops_per_row=5,
            # More would wait for each other, and for the cores that train.
            threads=1,
            cache=f"{folder}/cache",
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, warmup_steps=100, decay=(steps * 7 // 10, steps)
        ),
        objective=ObjectiveConfig(
            repa_layer=2, ar_chunk=160, time_mean=-0.5, sample_posterior=False
        ),
        # Of 100 steps: a longer average would lag behind the falling rate.
        ema=EMAConfig(decay=0.99, every=1),
        repa_hidden_size=256,
        # Every device has all parameters: they are small.
        mesh=MeshConfig(data=-1, fsdp=1),
        dtype="float32",
        remat="none",
        unroll=4,
        log_every=50,
        save_every=1000,
        keep=1,
        keep_best=False,
    )
