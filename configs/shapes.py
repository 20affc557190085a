"""A small JanusFlow that learns to draw and to read coloured shapes, on any machine.

    python -m jflow.data build shapes --out runs/shapes/data --train 40000 --rounds 1
    python -m jflow.scratch --out runs/shapes/init
    python train.py --config configs/shapes.py
    python -m jflow.evals --ckpt runs/shapes --untrained runs/shapes/init --out runs/shapes/evals

At most 90 minutes on 2 cores; `make demo` is the same in 10. docs/shapes.md says what was tried.
"""

from jflow.data.mixture import DataConfig, MixtureConfig, SourceConfig, WindowConfig
from jflow.training.config import SamplesConfig, TrainConfig
from jflow.training.objectives import ObjectiveConfig
from jflow.training.optimizer import PRETRAINING, OptimizerConfig
from jflow.training.state import EMAConfig

STEPS = 20_000
DATA = "runs/shapes/data"
FIELDS = (("caption", "captions"),)


def get_config() -> TrainConfig:
    return TrainConfig(
        name="shapes",
        init_from="runs/shapes/init",
        steps=STEPS,
        trainable=PRETRAINING,
        data=DataConfig(
            sources=(
                SourceConfig("understanding", "tfds", DATA, fields=FIELDS),
                SourceConfig("generation", "tfds", DATA, fields=FIELDS),
            ),
            mixture=(MixtureConfig(0, understanding=3, generation=5, text=0),),
            batch_rows=8,
            max_seq_len=128,
            understanding=WindowConfig(samples=16, rows=16),
            generation=WindowConfig(samples=62, rows=16),
            images_per_row=1,
            crops_per_row=4,
        ),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, warmup_steps=100, decay=(STEPS * 7 // 10, STEPS)
        ),
        objective=ObjectiveConfig(
            repa_layer=2, ar_chunk=128, time_mean=-0.4, sample_posterior=False
        ),
        ema=EMAConfig(decay=0.999, every=1),
        repa_hidden_size=256,
        dtype="float32",
        remat="none",
        save_every=2000,
        samples=SamplesConfig(
            prompts=("a photo of a red circle", "a photo of two squares"), every=2000
        ),
    )
