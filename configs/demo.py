"""configs/shapes.py in ten minutes on 2 cores: `make demo` builds its data and runs it.

The frozen encoders of the pictures to draw are run once, by python -m jflow.data cache.
"""

from jflow.data.mixture import DataConfig, MixtureConfig, SourceConfig, WindowConfig
from jflow.training.config import TrainConfig
from jflow.training.objectives import ObjectiveConfig
from jflow.training.optimizer import PRETRAINING, OptimizerConfig
from jflow.training.state import EMAConfig

STEPS = 2_400
FOLDER = "runs/demo"
FIELDS = (("caption", "captions"),)


def get_config() -> TrainConfig:
    return TrainConfig(
        name="demo",
        init_from=f"{FOLDER}/init",
        steps=STEPS,
        trainable=PRETRAINING,
        data=DataConfig(
            sources=(
                SourceConfig("understanding", "tfds", f"{FOLDER}/data", fields=FIELDS),
                SourceConfig("generation", "tfds", f"{FOLDER}/data", fields=FIELDS),
            ),
            mixture=(MixtureConfig(0, understanding=3, generation=5, text=0),),
            batch_rows=8,
            max_seq_len=128,
            understanding=WindowConfig(samples=16, rows=16),
            generation=WindowConfig(samples=62, rows=16),
            images_per_row=1,
            crops_per_row=4,
            cache=f"{FOLDER}/cache",
        ),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, warmup_steps=100, decay=(STEPS * 7 // 10, STEPS)
        ),
        objective=ObjectiveConfig(
            repa_layer=2, ar_chunk=128, time_mean=-0.4, sample_posterior=False
        ),
        ema=EMAConfig(decay=0.998, every=1),
        repa_hidden_size=256,
        dtype="float32",
        remat="none",
        log_every=50,
        save_every=1000,
        keep=1,
        keep_best=False,
    )
