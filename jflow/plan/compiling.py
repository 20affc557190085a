"""One program, compiled for a topology: the memory it needs, what it does, and how fast at best."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jflow.compilation import out_of_memory
from jflow.models.attention import Implementation
from jflow.plan import hlo, program
from jflow.plan.topology import Topology

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Compiled:
    """needed: bytes of each chip's memory; arguments: those of what the program is given, as far as
    it uses it. figures: of one run; text: what they were counted in. Both are None where the
    compiler found no room."""

    needed: int
    arguments: int
    figures: program.Figures | None
    text: hlo.Program | None


def fits(compiled: Compiled, place: Topology) -> bool:
    """On each chip. Where the compiler found no room, what it names may be less than all."""
    return compiled.figures is not None and compiled.needed <= place.hardware.memory


def compile_for(lowered: jax.stages.Lowered, place: Topology, given: int) -> Compiled:
    """Compiles what was lowered for topology.devices(place).

    Args: given: bytes of its arguments on each chip, which not every compiler names that finds no
    room.

    Where the attention that will run is another than the compiled one (`attention`), this one's
    memory traffic is left out: it takes apart what a kernel computes on the chip.
    """
    # Autotuning needs the GPU, and without it Triton's products have no tiles that fit.
    gpu = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
    try:
        compiled = lowered.compile(gpu if place.hardware.platform == "cuda" else None)
    except jax.errors.JaxRuntimeError as error:
        wanted = _wanted(str(error), given) if out_of_memory(error) else None
        if wanted is None:
            raise
        return Compiled(*wanted, None, None)
    found = compiled.memory_analysis()
    needed = (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
        + found.generated_code_size_in_bytes
    )
    text = hlo.parse(compiled.as_text())
    replaced = attention(place) == "xla"
    figures = program.measure(text, lambda each: replaced and _is_attention(each))
    return Compiled(needed, found.argument_size_in_bytes, figures, text)


def _wanted(message: str, given: int) -> tuple[int, int] | None:
    """Bytes that a compiler says it needs and has not, and of them the arguments'; or None.

    A TPU's speaks of the whole chip, or of the temporaries alone, which come on top of `given`.
    """

    def size(pattern: str) -> int | None:
        found = re.search(pattern.replace("SIZE", r"([\d.]+)([KMGT])"), message)
        return found and int(float(found[1]) * _UNITS[found[2]])

    # It also has memories other than hbm, of which it may have too little.
    temporaries = size(r"temporaries \(SIZE")
    if temporaries is not None:
        return temporaries + given, given
    used, arguments = size(r"Used SIZE of \S+ hbm"), size(r"\barguments +SIZE")
    return used and (used, given if arguments is None else arguments)


def _is_attention(instruction: hlo.Instruction) -> bool:
    """Of the language model, between its projections."""
    return re.search(r'op_name="[^"]*/self_attn/(?!\w+_proj)', instruction.attributes) is not None


def roofline(figures: program.Figures, place: Topology) -> dict[str, float]:
    """Seconds that each limit alone would take: "products", "memory", "links"."""
    chip = place.hardware
    return {
        "products": figures.flops / chip.flops,
        "memory": figures.memory / chip.bandwidth,
        "links": figures.received / place.incoming,
    }


def seconds(figures: program.Figures, place: Topology) -> float:
    """Of a run in which products, memory and links all work at once."""
    return max(roofline(figures, place).values())


def compiler_seconds(figures: program.Figures, place: Topology) -> float | None:
    """The compiler's own estimate, its kernels left out, which it knows nothing of; or None."""
    clock = place.hardware.clock
    if not clock or not figures.cycles:
        return None
    found = figures.cycles / clock
    # On v6e some instructions are given cycles without end.
    return found if found < 100 * seconds(figures, place) else None


def attention(place: Topology) -> Implementation:
    """What a plan compiles. Without the libraries of a GPU's machine, cuDNN's cannot be."""
    return "auto" if place.hardware.platform == "tpu" else "xla"


def chip_bytes(tree: Any) -> int:
    """Of a tree of jax.ShapeDtypeStruct with shardings, what one device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def estimate(place: Topology) -> list[str]:
    """What has to be said of a GPU's figures."""
    if place.hardware.platform == "tpu":
        return []
    return [
        "Attention is compiled as XLA's in blocks, its memory traffic not counted: on the GPU "
        "itself it is cuDNN's. Times are estimates, by the roofline alone."
    ]


def program_lines(compiled: Compiled, place: Topology, memory: dict[str, int]) -> Iterator[str]:
    """About one program on one chip: its memory, and of what fits what it does, and how fast.

    Args: memory: bytes by kind.
    """
    verdict = "fits" if fits(compiled, place) else "does NOT fit"
    yield f"memory of a chip {gib(compiled.needed)} of {gib(place.hardware.memory)}: {verdict}"
    yield from (f"  {name:24}{gib(size)}" for name, size in memory.items())
    figures = compiled.figures
    if figures is None:
        return
    yield f"operations of a chip {figures.flops / 1e12:.1f} TFLOP"
    yield f"to and from its memory {figures.memory / 1e9:.1f} GB"
    for kind, each in sorted(figures.collectives.items()):
        yield f"{kind} {each.count} times, {each.bytes / 1e9:.2f} GB to each chip"
    shown = ", ".join(f"{name} {1e3 * t:.0f} ms" for name, t in roofline(figures, place).items())
    yield f"roofline: {shown}"
    if (by_compiler := compiler_seconds(figures, place)) is not None:
        yield f"the compiler's estimate, its kernels left out: {1e3 * by_compiler:.0f} ms"


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
