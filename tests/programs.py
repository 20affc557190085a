"""What the text of a compiled step must not hold, at any size; test_plan_programs.py shows that it
is seen where it is there."""

from collections.abc import Callable

from jflow.plan.hlo import Array, Program
from jflow.plan.program import collective_kind, group_size


def dense_masks(program: Program, length: int) -> list[str]:
    """Arrays with two axes of `length`, as [L, L] scores or masks have: "pred[8, L, L] name"."""
    return _shown(program, lambda array: array.shape.count(length) > 1)


def full_logits(program: Program, positions: int, words: int) -> list[str]:
    """Arrays with `words` for as many `positions` or more.

    Args: both as one chip has them, its own rows and its part of the vocabulary.
    """
    return _shown(program, lambda array: words in array.shape and array.size >= positions * words)


def _shown(program: Program, wrong: Callable[[Array], bool]) -> list[str]:
    found = {
        f"{a.dtype}{list(a.shape)} {each.name}"
        for _, each, _ in program.instructions()
        for a in each.arrays
        if wrong(a)
    }
    return sorted(found)


def largest_gather(program: Program) -> float:
    """Numbers in the largest result of one all-gather, all its parts together."""
    sizes = [0.0]
    for name, each, _ in program.instructions():
        if collective_kind(name, each) == "all-gather":
            given = [a for o in each.operands for a in program.computations[name][o].arrays]
            sizes.append(group_size(each) * sum(a.size for a in given))
    return max(sizes)
