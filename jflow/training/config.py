"""What one stage of training is: where it begins, what is trained, on what, for how long."""

import typing
from dataclasses import dataclass, field
from typing import Literal

from jflow.data.mixture import DataConfig
from jflow.models.layers import Remat
from jflow.rng import require_seed
from jflow.sharding import MeshConfig
from jflow.training.lora import LoraConfig
from jflow.training.objectives import ObjectiveConfig
from jflow.training.optimizer import OptimizerConfig
from jflow.training.state import EMAConfig


@dataclass(frozen=True)
class SamplesConfig:
    """Fixed prompts and seeds, fixed questions, asked again every so many steps.

    every: 0 for never; otherwise also before the first step, so that what cannot be drawn or
    answered is known before anything is paid for. questions: pairs (image file, question).
    steps, guidance_scale, seed: see ImageOptions.
    """

    prompts: tuple[str, ...] = ()
    questions: tuple[tuple[str, str], ...] = ()
    every: int = 0
    steps: int = 30
    guidance_scale: float = 2.0
    seed: int = 0
    max_new_tokens: int = 64

    def __post_init__(self):
        if self.every < 0:
            raise ValueError(f"samples.every must be at least 0, not {self.every}.")


@dataclass(frozen=True)
class TrainConfig:
    """A stage. Its model and tokenizer are those of the checkpoint that it begins from.

    init_from: checkpoint folder of jflow.convert, or run folder of the stage before (its EMA).
    trainable: patterns, see optimizer.split. batch size and mixture: in `data`. repa_hidden_size:
    of the REPA head. dtype: of matrix products; parameters, moments and averages are float32.
    remat: what the backward pass computes again, for memory: none, dots or full (layers.remat).
    unroll: so many layers a trip of the compiled loop over them (models.llama.Llama).
    mesh: how the devices share the work, see jflow.sharding; a run may continue on another one.

    save_every: steps between checkpoints. keep: how many of the last ones to leave; keep_best: and
    the one of the lowest smoothed training loss. rewind_after: so many skipped steps in a row lead
    back to the checkpoint before them; max_rewinds: the run gives up when so many did not lead to
    another one. wandb: project to log to beside RUN/metrics.jsonl and RUN/tensorboard; "" for none.
    """

    name: str
    init_from: str
    steps: int
    trainable: tuple[str, ...]
    data: DataConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    lora: LoraConfig | None = None
    repa_hidden_size: int = 2048
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: Remat = "full"
    unroll: int = 1
    mesh: MeshConfig = field(default_factory=MeshConfig)
    seed: int = 0
    log_every: int = 20
    save_every: int = 1000
    keep: int = 3
    keep_best: bool = True
    rewind_after: int = 5
    max_rewinds: int = 3
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    wandb: str = ""

    def __post_init__(self):
        counts = ("steps", "unroll", "log_every", "save_every", "keep")
        for name in (*counts, "rewind_after", "max_rewinds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        require_seed(self.seed)
        if self.remat not in typing.get_args(Remat):
            raise ValueError(f"remat must be none, dots or full, not {self.remat!r}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, not {self.dtype!r}.")
