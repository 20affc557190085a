"""Plans as a person reads them, and as JSON."""

from collections.abc import Iterator

from jflow.plan.compiling import (
    compiler_seconds,
    estimate,
    gib,
    program_lines,
    roofline,
    seconds,
)
from jflow.plan.topology import Topology
from jflow.plan.training import Plan, Program, Step, make_plan, nearest
from jflow.training.config import TrainConfig

DAY = 86400


def step_seconds(step: Step, place: Topology) -> float:
    """Of one step, at best."""
    return seconds(step.compiled.figures, place)


def stage_days(plan: Plan) -> float:
    """All steps of all phases, without checkpoints, samples and waiting for data."""
    return sum(step.steps * step_seconds(step, plan.topology) for step in plan.phases) / DAY


def mfu(step: Step, place: Topology) -> float:
    """The most that the time allows: of the model's operations, without padding and remat."""
    possible = place.count * place.hardware.flops * step_seconds(step, place)
    return step.model_flops / possible


def facts(plan: Plan) -> dict:
    """What a plan has found, as JSON can hold it; bytes and seconds of one chip and one step."""
    step, place = plan.main, plan.topology
    found = {
        "topology": place.name,
        "chip": place.chip,
        "chips": place.count,
        "mesh": plan.mesh,
        "remat": plan.config.remat,
        "accumulate": plan.config.optimizer.accumulate,
        "rows": step.given,
        "rows_with_empty_ones": sum(step.rows),
        "fits": plan.fits,
        "hbm": place.hardware.memory,
        "needed": [each.compiled.needed for each in plan.phases],
        "memory": step.memory,
        "model_flops": step.model_flops,
    }
    if any(each.compiled.figures is None for each in plan.phases):
        return found
    figures, days = step.compiled.figures, stage_days(plan)
    return found | {
        "flops": figures.flops,
        "flops_by_formula": step.program_flops / place.count,
        "memory_bytes": figures.memory,
        "collectives": {
            kind: {"count": each.count, "bytes": each.bytes}
            for kind, each in sorted(figures.collectives.items())
        },
        "roofline_seconds": roofline(figures, place),
        "compiler_seconds": compiler_seconds(figures, place),
        "step_seconds": step_seconds(step, place),
        "samples_per_second": step.samples / step_seconds(step, place),
        "mfu": mfu(step, place),
        "days": days,
        "chip_days": days * place.count,
    }


def page(plan: Plan) -> str:
    """Everything about a plan, for the terminal."""
    place, step, config = plan.topology, plan.main, plan.config
    mesh = " ".join(f"{name}={size}" for name, size in plan.mesh.items())
    empty = sum(step.rows) - step.given
    lines = [
        f"{config.name} on {place.name}: {place.count} {place.chip}, mesh {mesh}, "
        f"remat {config.remat}, accumulate {config.optimizer.accumulate}",
        f"A batch: {step.given} rows, {step.samples:.0f} samples"
        + (f"; {empty} empty rows more, for the mesh to divide" if empty else ""),
    ]
    if not plan.found:
        lines.append(f"There is no {config.init_from} here: the sizes are the released model's.")
    lines += estimate(place)
    for phase in plan.phases:
        texts, images = phase.rows
        lines += ["", f"{phase.steps:,} steps of {texts} rows of text and {images} of images"]
        lines += [f"  {line}" for line in _phase(phase, place)]
    if all(each.compiled.figures is not None for each in plan.phases):
        days = stage_days(plan)
        lines.append(
            f"\nThe stage, {config.steps:,} steps: {days:.1f} days, {days * place.count:,.0f} "
            f"chip-days, if nothing ever waits."
        )
    return "\n".join(lines)


def _phase(step: Step, place: Topology) -> Iterator[str]:
    yield from program_lines(step.compiled, place, step.memory)
    if step.compiled.figures is None:
        return
    counted = step.compiled.figures.flops * place.count
    yield (
        f"operations by the closed form {step.program_flops / place.count / 1e12:.1f} TFLOP "
        f"(counted {counted / step.program_flops:.3f} of it), of the model alone "
        f"{step.model_flops / place.count / 1e12:.1f}"
    )
    time = step_seconds(step, place)
    yield (
        f"a step {1e3 * time:.0f} ms at best: {step.samples / time:.1f} samples/s, "
        f"MFU at most {mfu(step, place):.0%}"
    )


def tell(config: TrainConfig, name: str, make: Program) -> bool:
    """Prints the plan of a stage; where it does not fit, also the nearest settings that do.

    Returns: does it fit as it is? Raises ValueError as `training.make_plan` does.
    """
    wanted = make_plan(config, name, make)
    print(page(wanted), flush=True)
    if wanted.fits:
        return True
    print("\nIt does not fit. Settings that need less, tried in turn:", flush=True)
    for change, found in nearest(wanted, make):
        most = max(step.compiled.needed for step in found.phases)
        print(f"  {change}: {gib(most)}", flush=True)
        if found.fits:
            print(f"\n{page(found)}", flush=True)
            return False
    print("None of these fits: take more chips, or chips with more memory.", flush=True)
    return False
