"""Sums of many steps to the numbers that a person reads."""

import json
from pathlib import Path

import jax
import numpy as np

from jflow.training.objectives import Sums


def means(steps: list[Sums]) -> dict[str, float]:
    """name -> mean over all steps; arrays (bins) become name/0, name/1, ...; what counted nothing
    is left out."""
    total = jax.tree.map(lambda *values: np.sum(np.stack(values), axis=0), *jax.device_get(steps))
    found = {}
    for name, (value, count) in total.items():
        for i, (v, n) in enumerate(zip(np.ravel(value), np.ravel(count), strict=True)):
            if n:
                found[name if np.ndim(value) == 0 else f"{name}/{i}"] = float(v / n)
    return found


class Log:
    """RUN/metrics.jsonl, one object a line; a continued run drops the lines that it will repeat."""

    def __init__(self, run: Path, step: int):
        run.mkdir(parents=True, exist_ok=True)
        self._file = run / "metrics.jsonl"
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        partial = self._file.with_suffix(".tmp")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        partial.replace(self._file)

    def write(self, step: int, values: dict[str, float]) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | values) + "\n")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # cut off in the middle of a write
