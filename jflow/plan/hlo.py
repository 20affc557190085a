"""A compiled program's text, read: computations, their instructions, and how often each runs."""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "c64": 8, "c128": 16, "token": 0}
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(
    r"(calls|to_apply|body|condition|branch_computations|called_computations|true_computation|"
    r"false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclass(frozen=True)
class Array:
    """One array of a type: dtype as XLA writes it; space: 0 for the main memory, 1 for a TPU's
    vector memory, and so on."""

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        total = 1
        for side in self.shape:
            total *= side
        return total

    @property
    def bytes(self) -> float:
        width = _BYTES.get(self.dtype)
        if width is None:
            width = int(re.search(r"\d+", self.dtype)[0]) / 8
        return self.size * width


@dataclass(frozen=True)
class Instruction:
    """One line. type: what it gives, as text; operands: names; attributes: all behind them."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """What it gives; several of a tuple."""
        return arrays(self.type)

    def called(self) -> Iterator[tuple[str, str]]:
        """(how, computation) of every computation that it names."""
        for how, names in _CALLED.findall(self.attributes):
            for name in names.strip("{}").split(","):
                yield how, name.strip().lstrip("%")

    def attribute(self, name: str) -> str | None:
        """The text of name=..., up to the next comma or space, or None."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^\s,]+)", self.attributes)
        return found[1] if found else None


def arrays(type_text: str) -> tuple[Array, ...]:
    """The arrays of a type: "(bf16[8,128]{1,0:T(8,128)S(1)}, f32[])"."""
    found = []
    for dtype, sides, layout in _ARRAY.findall(type_text):
        space = re.search(r"S\((\d+)\)", layout)
        shape = tuple(int(side) for side in sides.split(",")) if sides else ()
        found.append(Array(dtype, shape, int(space[1]) if space else 0))
    return tuple(found)


@dataclass(frozen=True)
class Program:
    """computations: name -> its instructions by name. entry: the name of the first."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    @functools.cached_property
    def runs(self) -> dict[str, int]:
        """How often each computation runs in one step: loops with all their trips.

        Of a condition's branches each counts once. Raises ValueError for a loop without a known
        number of trips.
        """

        @functools.cache
        def count(name: str) -> int:
            if name == self.entry:
                return 1
            return sum(count(caller) * trips for caller, trips in self._callers[name])

        return {name: count(name) for name in self.computations}

    @functools.cached_property
    def inner(self) -> frozenset[str]:
        """The computations whose values never reach memory: bodies of fusions, and of reductions
        and the like."""
        found, names = set(), list(self.computations)
        for name in names:
            for instruction in self.computations[name].values():
                for how, called in instruction.called():
                    fused = instruction.opcode == "fusion" or how == "to_apply"
                    if fused and instruction.opcode != "call":
                        found.add(called)
        # What a fusion's body calls is inside of it too.
        while True:
            more = {
                called
                for name in found & set(self.computations)
                for instruction in self.computations[name].values()
                for _, called in instruction.called()
            }
            if more <= found:
                return frozenset(found)
            found |= more

    def owner(self, name: str) -> str:
        """The computation that an inner one is fused into; itself of any other."""
        while name in self.inner:
            name = self._callers[name][0][0]
        return name

    @functools.cached_property
    def _callers(self) -> dict[str, list[tuple[str, int]]]:
        """Of each computation those that name it, and how often each of their runs runs it."""
        found: dict[str, list[tuple[str, int]]] = {name: [] for name in self.computations}
        for name, instructions in self.computations.items():
            for instruction in instructions.values():
                for how, called in instruction.called():
                    if called in found:
                        trips = self.trips(instruction) if how in ("body", "condition") else 1
                        found[called].append((name, trips))
        return found

    def trips(self, loop: Instruction) -> int:
        """How often a while loop goes around."""
        known = re.search(r'known_trip_count["=:{\s]+n["=:\s]+(\d+)', loop.attributes)
        if known:
            return int(known[1])
        called = dict(loop.called())
        condition, body = (self.computations[called[how]] for how in ("condition", "body"))
        counter = next((each for each in condition.values() if each.opcode == "compare"), None)
        read = [condition[name] for name in counter.operands] if counter else []
        index = [each.attribute("index") for each in read if each.opcode == "get-tuple-element"]
        limit = [value for each in read if (value := _constant(each)) is not None]
        if len(index) != 1 or len(limit) != 1:
            raise ValueError(f"The trips of the loop {loop.name} cannot be told from the program.")
        # A loop that XLA has unrolled takes several steps at once.
        result = next(each for each in body.values() if each.root)
        step = _increment(body[result.operands[int(index[0])]], body)
        return -(-limit[0] // max(step, 1))

    def instructions(self) -> Iterator[tuple[str, Instruction, int]]:
        """(computation, instruction, how often it runs) of everything that runs."""
        for name, instructions in self.computations.items():
            if self.runs[name]:
                for instruction in instructions.values():
                    yield name, instruction, self.runs[name]


def _constant(instruction: Instruction) -> int | None:
    """The value of a constant that is a whole number."""
    found = re.match(r"(\d+)\)", instruction.attributes)
    return int(found[1]) if instruction.opcode == "constant" and found else None


def _increment(instruction: Instruction, body: dict[str, Instruction]) -> int:
    """What a chain of additions and copies adds to a loop's counter."""
    total = 0
    for name in instruction.operands:
        if instruction.opcode in ("add", "copy", "bitcast") and name in body:
            total += _constant(body[name]) or _increment(body[name], body)
    return total


def parse(text: str) -> Program:
    """What jax.stages.Compiled.as_text() gives -> Program.

    Raises ValueError where it has no entry.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, now = None, None
    for line in _whole_lines(text):
        if line.rstrip() == "}":
            now = None
        elif now is None:
            if head := _HEAD.match(line):
                now = computations.setdefault(head[2], {})
                entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            instruction = _instruction(line[found.end() :], found[2], bool(found[1]))
            now[instruction.name] = instruction
    if entry is None:
        raise ValueError("This is no compiled program: it has no ENTRY computation.")
    return Program(computations, entry)


def _whole_lines(text: str) -> Iterator[str]:
    """Lines, with what kernels write about themselves over several joined to the first."""
    held = ""
    for line in text.splitlines():
        if line.startswith((" ", "%", "ENTRY ", "HloModule ")) or line.rstrip() in ("", "}"):
            yield held
            held = line
        else:
            held += line
    yield held


def _instruction(rest: str, name: str, root: bool) -> Instruction:
    """The line behind "name = ": type opcode(operands), attributes."""
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest, 0) - 1
    inside, attributes = rest[: end - 1], rest[end:]
    if opcode in ("constant", "parameter", "iota"):
        return Instruction(name, kind, opcode, (), inside + ")" + attributes, root)
    operands = tuple(found.lstrip("%") for found in _names(inside))
    return Instruction(name, kind, opcode, operands, attributes, root)


def _names(inside: str) -> Iterator[str]:
    """The operands' names, whether or not their types stand before them."""
    depth, start = 0, 0
    inside = re.sub(r"/\*.*?\*/", "", inside) + ","
    for i, character in enumerate(inside):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and not depth:
            words = inside[start:i].split()
            if words:
                yield words[-1]
            start = i + 1


def _closing(text: str, start: int) -> int:
    """The place behind the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i + 1
    return len(text)
