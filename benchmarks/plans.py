"""docs/plans.md's table: stage 2's later mixture at full size, planned for configs/meshes.py.

    PYTHONPATH=. python benchmarks/plans.py v5e-64 8xH100 ... [--set remat=dots ...]

Each named topology is compiled (minutes of CPU, no accelerator) and takes its place in
benchmarks/results/plans.json, which the table is made of.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from report import write_json

from configs.meshes import HARDWARE
from jflow.config import load
from jflow.plan.report import facts, page
from jflow.plan.training import make_plan
from jflow.training.config import TrainConfig
from train import abstract_step

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results" / "plans.json"
DOCS = REPO / "docs" / "plans.md"
BEGIN, END = "<!-- table by benchmarks/plans.py -->\n", "<!-- end -->\n"


def later(config: TrainConfig) -> TrainConfig:
    """The stage as if its last mixture, which most steps have, held from the start."""
    mixture = (replace(config.data.mixture[-1], from_step=0),)
    return replace(config, data=replace(config.data, mixture=mixture))


def saved() -> dict[str, dict]:
    """What is known by now, in the order of configs/meshes.py, then of the alphabet."""
    found = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    order = [name for name in HARDWARE if name in found]
    return {name: found[name] for name in [*order, *sorted(set(found) - set(order))]}


def table(rows: dict[str, dict]) -> str:
    """Markdown, a row for each topology."""
    lines = [
        "| hardware | chips | mesh | remat | parts | GiB a chip, of | TFLOP a chip | received | "
        "step, at best | samples/s | MFU, at most | days | chip-days |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        mesh = " ".join(f"{axis}={size}" for axis, size in row["mesh"].items() if size > 1) or "1"
        memory = f"{max(row['needed']) / 2**30:.1f}, {row['hbm'] / 2**30:.1f}"
        begin = f"| {name} | {row['chips']} | {mesh} | {row['remat']} | {row['accumulate']} "
        if "flops" not in row:
            lines.append(f"{begin}| {memory}: does not fit | | | | | | | |")
            continue
        received = sum(each["bytes"] for each in row["collectives"].values())
        lines.append(
            f"{begin}| {memory} | {row['flops'] / 1e12:.0f} | {received / 1e9:.1f} GB "
            f"| {row['step_seconds']:.2f} s | {row['samples_per_second']:.0f} | {row['mfu']:.0%} "
            f"| {row['days']:.1f} | {row['chip_days']:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="topologies; none only renews the table")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE")
    args = parser.parse_args()
    for name in args.names:
        chosen = [f"hardware={name}"] if name in HARDWARE else []
        config = later(load(REPO / "configs" / "pretrain.py", [*chosen, *args.set]))
        plan = make_plan(config, name, abstract_step)
        print(page(plan), flush=True)
        write_json(RESULTS, saved() | {name: facts(plan)})
    before, rest = DOCS.read_text("utf-8").split(BEGIN)
    after = rest.split(END)[1]
    DOCS.write_text(before + BEGIN + table(saved()) + END + after, "utf-8")


if __name__ == "__main__":
    main()
