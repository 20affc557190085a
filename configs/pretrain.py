"""Stage 2 of the paper (Table 1): unified pre-training of all but SigLIP and the VAE.

    python train.py --config configs/pretrain.py [hardware=v5e-64]   # configs/meshes.py

Begins from the averaged parameters of stage 1's run. 30:50:20 of understanding, generation and
text for the first 10,000 steps, then 14:80:6; 390,000 steps of 512 rows of 4,096 tokens are about
1,600 A100 days.
"""

from configs.meshes import on
from configs.prompts import PROMPTS
from jflow.data.mixture import DataConfig, MixtureConfig, SourceConfig
from jflow.training.config import SamplesConfig, TrainConfig
from jflow.training.optimizer import PRETRAINING, OptimizerConfig

SOURCES = (
    SourceConfig("understanding", "jsonl", "data/captions/*.jsonl", template="pretrain"),
    SourceConfig("generation", "jsonl", "data/captions/*.jsonl", template="pretrain"),
    SourceConfig("text", "jsonl", "data/text/*.jsonl", template="pretrain"),
)


def get_config(hardware: str = "") -> TrainConfig:
    config = TrainConfig(
        name="pretrain",
        init_from="runs/adaptation",
        steps=390_000,
        trainable=PRETRAINING,
        data=DataConfig(
            sources=SOURCES,
            mixture=(
                MixtureConfig(0, understanding=30, generation=50, text=20),
                MixtureConfig(10_000, understanding=14, generation=80, text=6),
            ),
            batch_rows=512,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=2000),
        samples=SamplesConfig(prompts=PROMPTS, every=5000),
    )
    return on(hardware, config)
