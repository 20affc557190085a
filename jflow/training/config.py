"""What one stage of training is: where it begins, what is trained, on what, for how long."""

from dataclasses import dataclass, field
from typing import Literal

from jflow.data.mixture import DataConfig
from jflow.training.objectives import ObjectiveConfig
from jflow.training.optimizer import OptimizerConfig
from jflow.training.state import EMAConfig


@dataclass(frozen=True)
class TrainConfig:
    """A stage. Its model and tokenizer are those of the checkpoint that it begins from.

    init_from: checkpoint folder of jflow.convert, or run folder of the stage before (its EMA).
    trainable: patterns, see optimizer.split. batch size and mixture: in `data`. repa_hidden_size:
    of the REPA head. dtype: of matrix products; parameters, moments and averages are float32.
    remat: compute blocks again in the backward pass, for memory. keep: checkpoints to leave.
    """

    name: str
    init_from: str
    steps: int
    trainable: tuple[str, ...]
    data: DataConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    repa_hidden_size: int = 2048
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    remat: bool = True
    seed: int = 0
    log_every: int = 20
    save_every: int = 1000
    keep: int = 3

    def __post_init__(self):
        for name in ("steps", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, not {self.dtype!r}.")
