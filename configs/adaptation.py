"""Stage 1 of the paper (Table 1): new layers learn to speak to a frozen language model.

    python -m jflow.convert from-parts --language DEEPSEEK_LLM --siglip SIGLIP --vae VAE --out parts
    python train.py --config configs/adaptation.py

Begins from what the paper began from, or any other checkpoint (init_from=DIR). Trains the
aligners, the generation encoder and decoder, begin-of-understanding and the REPA head. The folders
of SOURCES are yours to fill; see README, Training.
"""

from configs.meshes import on
from configs.prompts import PROMPTS
from jflow.data.mixture import DataConfig, MixtureConfig, SourceConfig
from jflow.training.config import SamplesConfig, TrainConfig
from jflow.training.optimizer import ADAPTATION, OptimizerConfig

SOURCES = (
    SourceConfig("understanding", "jsonl", "data/captions/*.jsonl", template="pretrain"),
    SourceConfig("generation", "jsonl", "data/captions/*.jsonl", template="pretrain"),
)


def get_config(hardware: str = "") -> TrainConfig:
    config = TrainConfig(
        name="adaptation",
        init_from="parts",
        steps=10_000,
        trainable=ADAPTATION,
        data=DataConfig(
            sources=SOURCES,
            mixture=(MixtureConfig(0, understanding=50, generation=50, text=0),),
            batch_rows=512,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=2000),
        samples=SamplesConfig(prompts=PROMPTS, every=1000),
    )
    return on(hardware, config)
