"""A finished model learns from your own pictures: to draw what they show, and to talk about them.

    python train.py --config configs/finetune.py folder=photos init_from=janusflow

FOLDER holds captions.jsonl, lines of {"image": "a.jpg", "caption": "..."}, which both halves of the
model learn from; or conversations.jsonl, lines of LLaVA's {"image": "a.jpg", "conversations":
[...]}, for understanding; or both. Either may be a .json instead, one array. Images are found
relative to their file. SigLIP and the VAE stay as they are.

lora=true trains low-rank factors beside the language model's matrices, and the aligners;
lora=false all of the language model and the generation layers: 20 bytes a parameter instead of 2,
at a lower learning rate. Begins from a checkpoint of jflow.convert or from a run.
"""

from etils import epath

from jflow.data.mixture import DataConfig, MixtureConfig, SourceConfig
from jflow.training.config import TrainConfig
from jflow.training.lora import FACTORS, LoraConfig
from jflow.training.objectives import ObjectiveConfig
from jflow.training.optimizer import PRETRAINING, OptimizerConfig
from jflow.training.state import EMAConfig

ALIGNERS = (
    r"janusflow/vision_(und_enc|gen_enc|gen_dec)_aligner",
    r"janusflow/beg_of_und_embed",
)


def _file(folder: str, name: str) -> str:
    """FOLDER/NAME.jsonl, or the .json where there is one."""
    array = f"{folder}/{name}.json"
    return array if epath.Path(array).exists() else f"{array}l"


def get_config(folder: str = "data/mine", lora: bool = True) -> TrainConfig:
    captions, conversations = (_file(folder, name) for name in ("captions", "conversations"))
    talks = epath.Path(conversations).exists()
    draws = epath.Path(captions).exists() or not talks  # Of neither, captions are named as missing.
    sources = ()
    if draws:
        sources += (
            SourceConfig("understanding", "jsonl", captions),
            SourceConfig("generation", "jsonl", captions),
        )
    if talks:
        sources += (SourceConfig("understanding", "jsonl", conversations),)
    return TrainConfig(
        name="finetune",
        init_from="janusflow",
        steps=1000,
        trainable=(*ALIGNERS, FACTORS) if lora else PRETRAINING,
        lora=LoraConfig() if lora else None,
        data=DataConfig(
            sources=sources,
            mixture=(MixtureConfig(0, understanding=1, generation=int(draws), text=0),),
            batch_rows=4,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4 if lora else 2e-5, warmup_steps=50),
        # A finished model has no REPA head, and a new one would disturb what it knows.
        objective=ObjectiveConfig(repa_weight=0),
        # Over the last 70 steps or so: the paper's average is for runs of many thousand.
        ema=EMAConfig(decay=0.99, every=1),
        save_every=200,
    )
