"""Stage 3 of the paper (Table 1): supervised fine-tuning in the chat format, SigLIP included.

python train.py --config configs/sft.py
"""

from configs.meshes import on
from configs.prompts import PROMPTS
from jflow.data.mixture import DataConfig, MixtureConfig, SourceConfig
from jflow.training.config import SamplesConfig, TrainConfig
from jflow.training.optimizer import SFT, OptimizerConfig

SOURCES = (
    SourceConfig("understanding", "jsonl", "data/instructions/*.jsonl"),
    SourceConfig("generation", "jsonl", "data/captions/*.jsonl"),
    SourceConfig("text", "jsonl", "data/chat/*.jsonl"),
)


def get_config(hardware: str = "") -> TrainConfig:
    config = TrainConfig(
        name="sft",
        init_from="runs/pretrain",
        steps=26_000,
        trainable=SFT,
        data=DataConfig(
            sources=SOURCES,
            mixture=(MixtureConfig(0, understanding=21, generation=70, text=9),),
            batch_rows=256,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=1000),
        samples=SamplesConfig(prompts=PROMPTS, every=2000),
    )
    return on(hardware, config)
