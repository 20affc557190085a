"""train.py --plan: the step of a stage, compiled for a slice or a host, and what it will cost."""

import functools
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

from jflow.config import override
from jflow.data.encode import cached_encoders
from jflow.data.mixture import part_sizes
from jflow.models.attention import Implementation
from jflow.models.janusflow import JanusFlowConfig
from jflow.models.layers import Remat
from jflow.plan import abstract, topology, work
from jflow.plan.compiling import Compiled, attention, chip_bytes, compile_for, fits
from jflow.plan.topology import Topology
from jflow.sharding import make_mesh, row_multiple
from jflow.training import flops
from jflow.training.config import TrainConfig
from jflow.training.objectives import Modules
from jflow.training.state import TrainState

# (config, models, parameters, mesh, attention) -> (modules, state, jitted step); see train.py.
Program = Callable[
    [TrainConfig, dict, dict, jax.sharding.Mesh, Implementation],
    tuple[Modules, TrainState, Any],
]
# How many other settings are compiled in search of one that fits.
MOST_TRIES = 6


@dataclass(frozen=True)
class Step:
    """One phase of the mixture; bytes of one chip.

    steps: how many it has. rows: of text and of images, the empty ones included; given: of both,
    without them. samples: of a batch. state: bytes by kind of what lies there between the steps,
    and of the batch; gradients: as they come on top. model_flops: of all chips, closed form
    without padding and remat; program_flops: of all chips, closed form of what the program does.
    """

    steps: int
    rows: tuple[int, int]
    given: int
    samples: float
    state: dict[str, int]
    gradients: int
    model_flops: float
    program_flops: float
    compiled: Compiled

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by kind; they add up to what the program needs.

        Where there is no room compilers name what they found too much, which may be less than all.
        """
        rest = max(self.compiled.needed - sum(self.state.values()), 0)
        gradients = min(self.gradients, rest)
        return self.state | {"gradients": gradients, "activations": rest - gradients}


@dataclass(frozen=True)
class Plan:
    """A stage on a topology. found: is the checkpoint there, or is the released model meant?"""

    topology: Topology
    config: TrainConfig
    mesh: dict[str, int]
    found: bool
    phases: tuple[Step, ...]

    @property
    def main(self) -> Step:
        """The phase that most steps are of."""
        return max(self.phases, key=lambda step: step.steps)

    @property
    def fits(self) -> bool:
        return all(fits(step.compiled, self.topology) for step in self.phases)


def make_plan(
    config: TrainConfig, name: str, make: Program, released: JanusFlowConfig = abstract.RELEASED
) -> Plan:
    """Compiles the step of every phase of a stage's mixture.

    Args: name: see topology.parse. released: what to take where there is no config.init_from.

    Raises ValueError in one sentence for an unknown topology, for a compiler that is not installed,
    for a mesh that does not fit the model or the batch and for a cache of what it does not have.
    """
    place = topology.parse(name)
    devices = topology.devices(place)
    models, params, found = abstract.begin(config.init_from, released)
    mesh = make_mesh(config.mesh, devices)
    modules, state, step = make(config, models, params, mesh, attention(place))
    cached = cached_encoders(params, config) if config.data.cache else frozenset()
    starts = [phase.from_step for phase in config.data.mixture if phase.from_step < config.steps]
    phases = []
    for start, end in zip(starts, [*starts[1:], config.steps], strict=True):
        phases.append(
            _compile(place, config, modules, cached, state, step, mesh, start, end - start)
        )
    return Plan(place, config, dict(mesh.shape), found, tuple(phases))


def _compile(place, config, modules, cached, state, step, mesh, start, steps) -> Step:
    """The phase that starts at step `start`."""
    data, model = config.data, modules.model.config
    vae = modules.vae.config if modules.vae else None
    multiple = row_multiple(mesh) * config.optimizer.accumulate
    batch = abstract.batch(data, start, multiple, model, vae, mesh, cached)
    with jax.set_mesh(mesh):
        compiled = compile_for(step.lower(state, batch), place, chip_bytes((state, batch)))
    cost = flops.stage_cost(config, modules, state.params, cached)
    trained = flops.module_names(state.params)
    splash = place.hardware.platform == "tpu"
    return Step(
        steps=steps,
        rows=part_sizes(data, start, multiple),
        given=data.batch_rows,
        samples=sum(work.samples(data, start).values()),
        state={
            "parameters": chip_bytes(state.params),
            "moments": chip_bytes(state.opt_state),
            "average": chip_bytes(state.ema),
            "frozen parameters": chip_bytes(state.frozen),
            "batch": chip_bytes(batch),
        },
        gradients=chip_bytes(state.params),
        model_flops=cost.of(work.model_work(data, start, model)),
        program_flops=work.program_flops(
            data, start, multiple, model, cost, trained, config.remat, splash
        ),
        compiled=compiled,
    )


def neighbours(config: TrainConfig, mesh: dict[str, int]) -> Iterator[str]:
    """Overrides that need less memory, the least costly first: more remat, the state split over all
    devices, more parts of a batch, then heads split too. Not all fit the model, chips and batch.

    Args: mesh: that of `config`, its sizes known.
    """

    def over_all(tensor: int) -> str:
        # In this order no two sizes are ever -1.
        return f"mesh.tensor={tensor} mesh.data=1 mesh.fsdp=-1"

    policies = typing.get_args(Remat)
    for policy in policies[policies.index(config.remat) + 1 :]:
        yield f"remat={policy}"
    remat = ["remat=full"] if config.remat != "full" else []
    changed = [*remat, over_all(mesh["tensor"])] if mesh["data"] != 1 else remat
    if changed != remat:
        yield " ".join(changed)
    for parts in (2, 4, 8):
        accumulate = config.optimizer.accumulate * parts
        yield " ".join([*changed, f"optimizer.accumulate={accumulate}"])
    for more in (2, 4):
        yield " ".join([*remat, over_all(more * mesh["tensor"])])


def nearest(wanted: Plan, make: Program) -> Iterator[tuple[str, Plan]]:
    """(overrides, plan) of settings tried one after another, up to the first that fits."""
    tries = 0
    for change in neighbours(wanted.config, wanted.mesh):
        config = functools.reduce(override, change.split(), wanted.config)
        try:
            found = make_plan(config, wanted.topology.name, make)
        except ValueError:  # See `neighbours`.
            continue
        yield change, found
        tries += 1
        if found.fits or tries == MOST_TRIES:
            return
