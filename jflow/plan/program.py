"""What a compiled program does in one step on each chip: operations, bytes, exchanges.

Loops count with all their trips, which Compiled.cost_analysis() does not do. What Pallas kernels
compute is not in the text: that of splash attention is known by its shapes.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jflow.models.attention import BLOCK
from jflow.plan.hlo import Array, Instruction, Program

# What moves between chips, as XLA names it; the starts of asynchronous ones count, not their ends.
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
# What neither computes nor moves anything.
_FREE = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "opt-barrier", "async-start", "async-update",
    "async-done", "copy-done",
}  # fmt: skip


@dataclass(frozen=True)
class Collective:
    """How often one chip takes part in exchanges of a kind, and the bytes that reach it in all."""

    count: int
    bytes: float


@dataclass(frozen=True)
class Figures:
    """One step of one chip. flops: of products and convolutions; memory: bytes to and from HBM;
    cycles: the compiler's own estimate, 0 where it has none; collectives: by kind."""

    flops: float
    memory: float
    cycles: float
    collectives: dict[str, Collective]

    @property
    def received(self) -> float:
        """Bytes that reach a chip from others."""
        return sum(each.bytes for each in self.collectives.values())


def measure(
    program: Program, on_chip: Callable[[Instruction], bool] = lambda instruction: False
) -> Figures:
    """Counts everything that a parsed program runs.

    Args: on_chip: what would not use the memory if another kernel computed it.
    """
    flops = memory = cycles = 0.0
    collectives: dict[str, list[float]] = {}
    seen = set()
    for name, instruction, runs in program.instructions():
        inside = program.computations[name]
        flops += runs * instruction_flops(instruction, inside)
        kind = collective_kind(name, instruction)
        # An exchange in the background of several fusions stands in each of them, as one chain.
        chain = re.search(r'chain_id="(\d+)"', instruction.attributes)
        once = (program.owner(name), chain and chain[1])
        if kind and (chain is None or once not in seen):
            seen.add(once)
            total = collectives.setdefault(kind, [0, 0.0])
            total[0] += runs
            total[1] += runs * received(kind, instruction, inside)
        if name not in program.inner:
            if not on_chip(instruction):
                memory += runs * memory_bytes(instruction, inside, program)
            found = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
            cycles += runs * int(found[1]) if found else 0
    found = {kind: Collective(int(count), size) for kind, (count, size) in collectives.items()}
    return Figures(flops, memory, cycles, found)


def instruction_flops(instruction: Instruction, inside: dict[str, Instruction]) -> float:
    """Operations of a product, a convolution or a splash-attention kernel; 0 of anything else.

    Args: inside: the computation that the instruction is in.
    """
    if instruction.opcode == "dot":
        left = _operand(instruction, 0, inside)
        contracted = re.findall(r"\d+", instruction.attribute("lhs_contracting_dims") or "")
        depth = math.prod(left.shape[int(axis)] for axis in contracted)
        return 2.0 * instruction.arrays[0].size * depth
    if instruction.opcode == "convolution":
        return _convolution(instruction, inside)
    if instruction.opcode == "custom-call":
        target = instruction.attribute("custom_call_target") or ""
        if "gemm" in target or "matmul" in target:
            return _gemm(instruction, inside)
        if "conv" in target:
            return _convolution(instruction, inside)
        if "tpu_custom_call" in target:
            return _splash(instruction, inside)
    return 0.0


def _operand(instruction: Instruction, number: int, inside: dict[str, Instruction]) -> Array:
    return inside[instruction.operands[number]].arrays[0]


def _gemm(instruction: Instruction, inside: dict[str, Instruction]) -> float:
    found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
    left = _operand(instruction, 0, inside)
    axes = re.findall(r"\d+", found[1]) if found else [len(left.shape) - 1]
    depth = math.prod(left.shape[int(axis)] for axis in axes)
    return 2.0 * instruction.arrays[0].size * depth


def _convolution(instruction: Instruction, inside: dict[str, Instruction]) -> float:
    """Two operations for each product of two numbers neither of which is padding.

    TPU compilers write every product of matrices as a convolution, batches as padded windows.
    """
    image, kernel = _operand(instruction, 0, inside), _operand(instruction, 1, inside)
    result = instruction.arrays[0]
    labels = instruction.attribute("dim_labels")
    ins, rest = labels.split("_")
    weights, outs = rest.split("->")
    window = dict(re.findall(r"(\w+)=([^\s}]+)", instruction.attribute("window") or ""))
    spatial = sorted(label for label in ins if label.isdigit())

    def sides(name, default):
        values = window[name].split("x") if name in window else [default] * len(spatial)
        return dict(zip(spatial, values, strict=True))

    strides, dilations = sides("stride", "1"), sides("rhs_dilate", "1")
    lhs_dilations, pads = sides("lhs_dilate", "1"), sides("pad", "0_0")
    valid = 1
    for label in spatial:
        low = int(pads[label].split("_")[0])
        positions = np.arange(result.shape[outs.index(label)])[:, None] * int(strides[label])
        taps = np.arange(kernel.shape[weights.index(label)]) * int(dilations[label])
        place, apart = positions + taps - low, int(lhs_dilations[label])
        real = (place >= 0) & (place <= (image.shape[ins.index(label)] - 1) * apart)
        valid *= int(np.sum(real & (place % apart == 0)))
    depth = kernel.shape[weights.index("i")]
    batch, features = result.shape[outs.index("b")], result.shape[outs.index("f")]
    groups = int(instruction.attribute("batch_group_count") or 1)
    return 2.0 * valid * depth * batch * features / groups


# Products of one block of queries with one of keys that each kernel of splash attention makes.
_SPLASH = {"dkv": 4, "dq": 3, "fwd": 2}


def _splash(instruction: Instruction, inside: dict[str, Instruction]) -> float:
    """Of the blocks on and below the diagonal; attention.BLOCK is their side."""
    found = re.search(r"splash_m[hq]a_(dkv|dq|fwd)", instruction.attributes)
    if not found:
        return 0.0
    shapes = [_operand(instruction, i, inside).shape for i in range(len(instruction.operands))]
    heads = max((shape for shape in shapes if len(shape) >= 3), key=math.prod)
    *many, tokens, width = heads
    block = max(b for b in range(128, BLOCK + 1, 128) if tokens % b == 0)
    blocks = tokens // block
    return 2.0 * _SPLASH[found[1]] * math.prod(many) * width * block**2 * blocks * (blocks + 1) / 2


def collective_kind(computation: str, instruction: Instruction) -> str | None:
    """Which of COLLECTIVES an instruction starts, if any."""
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    # On TPU a sum of which each chip keeps its part is a fusion of this name.
    if kind == "all-reduce" and "all-reduce-scatter" in computation:
        return "reduce-scatter"
    return kind


def received(kind: str, instruction: Instruction, inside: dict[str, Instruction]) -> float:
    """Bytes that reach a chip in one exchange, at best."""
    given = [a for name in instruction.operands for a in inside[name].arrays]
    size = sum(a.bytes for a in given)
    others = group_size(instruction) - 1
    share = others / (others + 1)
    return {
        "all-gather": others * size,
        "all-reduce": 2 * share * size,
        "collective-permute": size,
    }.get(kind, share * size)


def group_size(instruction: Instruction) -> int:
    """How many chips exchange with each other.

    XLA writes their groups as mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, with or without
    the order of the devices, as [groups,chips]<=[...] or one by one. Raises ValueError for others.
    """
    if "source_target_pairs" in instruction.attributes:
        return 2
    found = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? \{([^}:]*)\}", instruction.attributes
    )
    if found:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", found[2]))
    found = re.search(r"replica_groups=\[(\d+),(\d+)\]", instruction.attributes)
    if found:
        return int(found[2])
    found = re.search(r"replica_groups=\{\{([\d,]*)\}", instruction.attributes)
    if not found:
        raise ValueError(f"The groups of {instruction.name} cannot be told from the program.")
    return len(found[1].split(","))


def memory_bytes(
    instruction: Instruction, inside: dict[str, Instruction], program: Program
) -> float:
    """Bytes that one instruction reads from HBM and writes there."""
    if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
        return 0.0
    given = [inside[name].arrays if name in inside else () for name in instruction.operands]
    written = sum(a.bytes for a in instruction.arrays if a.space == 0)
    whole = [sum(a.bytes for a in each if a.space == 0) for each in given]
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        part = sum(a.bytes for a in instruction.arrays)
        return written + (part if whole[0] else 0.0)
    if instruction.opcode == "dynamic-update-slice":
        return whole[1] + (sum(a.bytes for a in given[1]) if written else 0.0)
    if instruction.opcode == "fusion":
        body = program.computations[next(name for _, name in instruction.called())]
        return _fused(body, whole, written)
    # The type of a start names its operands too: what it reads is in `written`. Not so of a sum.
    if instruction.opcode.endswith("-start") and instruction.opcode != "all-reduce-start":
        return written
    return written + sum(whole)


def _fused(body: dict[str, Instruction], whole: list[float], written: float) -> float:
    """Of a fusion, which may take a slice of an operand, or write into one in place."""
    users: dict[str, list[Instruction]] = {}
    for each in body.values():
        for name in each.operands:
            users.setdefault(name, []).append(each)
    total = written
    for each in body.values():
        if each.opcode != "parameter":
            continue
        number = int(re.match(r"\d+", each.attributes)[0])
        size, used = whole[number], users.get(each.name, [])
        if used and all(u.opcode in ("dynamic-slice", "slice", "gather") for u in used):
            size = min(size, sum(a.bytes for u in used for a in u.arrays))
        elif used and all(
            u.opcode == "dynamic-update-slice" and u.operands[0] == each.name for u in used
        ):
            update = sum(body[u.operands[1]].arrays[0].bytes for u in used)
            total -= max(0.0, size - update)
            size = 0.0
        total += size
    return max(total, 0.0)
