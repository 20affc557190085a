"""Settings that were planned for known hardware, each with the paper's batch of a stage.

    python train.py --config configs/pretrain.py hardware=v5e-64

docs/plans.md has what each needs. The mesh gives all chips to `fsdp`: parameters and rows are split
over all of them. Where memory is left, less is computed again (`remat`).
"""

from dataclasses import dataclass, replace

from jflow.models.layers import Remat
from jflow.sharding import MeshConfig
from jflow.training.config import TrainConfig


@dataclass(frozen=True)
class Hardware:
    """What of a TrainConfig depends on the machines; accumulate: for 512 rows of 4,096 tokens."""

    mesh: MeshConfig
    remat: Remat
    accumulate: int = 1


# TPU slices by Google's names: v5p-64 has 64 cores, 32 chips.
HARDWARE = {
    "v5e-64": Hardware(MeshConfig(1, 64, 1), "full"),
    "v5p-64": Hardware(MeshConfig(1, 32, 1), "full"),
    "v6e-64": Hardware(MeshConfig(1, 64, 1), "full"),
    "8xA100-40G": Hardware(MeshConfig(1, 8, 1), "full", accumulate=8),
    "8xH100": Hardware(MeshConfig(1, 8, 1), "dots", accumulate=8),
    "1xH200": Hardware(MeshConfig(1, 1, 1), "dots", accumulate=64),
}


def on(hardware: str, config: TrainConfig) -> TrainConfig:
    """The config for one of HARDWARE; as it is for "".

    Raises ValueError in one sentence for hardware that is not listed.
    """
    if not hardware:
        return config
    if hardware not in HARDWARE:
        raise ValueError(f"There is no hardware {hardware!r} among {', '.join(HARDWARE)}.")
    chosen = HARDWARE[hardware]
    parts = max(1, chosen.accumulate * config.data.batch_rows // 512)
    optimizer = replace(config.optimizer, accumulate=parts)
    return replace(config, mesh=chosen.mesh, remat=chosen.remat, optimizer=optimizer)
