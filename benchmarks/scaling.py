"""What one chip does when there are more of them, each with the same work: operations and bytes.

    PYTHONPATH=. python benchmarks/scaling.py --small               # v5e, 16 to 256 chips
    PYTHONPATH=. python benchmarks/scaling.py --small --fsdp 16     # mesh.fsdp=16, the rest of data

The step of stage 2, compiled for each number of chips with `rows` rows a chip, its state split over
all of them or over `fsdp`. Each mesh takes its place in benchmarks/results/scaling_CHIP.json, which
the table and the plot beside it are made of. No chip is needed, but ten minutes of one core a mesh.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from plans import later
from report import write_json

from jflow.config import load
from jflow.models.janusflow import JanusFlowConfig
from jflow.plan.abstract import RELEASED
from jflow.plan.compiling import roofline
from jflow.plan.training import make_plan
from jflow.sharding import MeshConfig
from jflow.training.config import TrainConfig
from train import abstract_step

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results"
CHIPS = (16, 32, 64, 128, 256)
# What has to stay flat: operations, bytes to and from memory, bytes from other chips.
FIGURES = ("flops", "memory", "received")
COLORS = dict(zip(FIGURES, ("#1f77b4", "#2ca02c", "#d62728"), strict=True))


def step_of(chips: int, fsdp: int, rows: int, layers: int) -> TrainConfig:
    """Stage 2's later mixture, with `rows` rows for each of so many chips; layers: of the model."""
    config = load(REPO / "configs" / "pretrain.py")
    data = replace(config.data, batch_rows=rows * chips)
    objective = replace(config.objective, repa_layer=min(config.objective.repa_layer, layers))
    mesh = MeshConfig(chips // fsdp, fsdp, 1)
    return later(replace(config, data=data, objective=objective, mesh=mesh))


def smaller(config: JanusFlowConfig) -> JanusFlowConfig:
    """Two layers of each stack: what a chip does per layer is the same."""
    return replace(
        config,
        language=replace(config.language, num_hidden_layers=2),
        siglip=replace(config.siglip, layers=2),
    )


def measure(chip: str, chips: int, fsdp: int, rows: int, model: JanusFlowConfig) -> dict:
    """Figures of one chip among `chips`, of which `fsdp` have one copy of the state together."""
    name = f"{chip}-{2 * chips if chip == 'v5p' else chips}"
    config = step_of(chips, fsdp, rows, model.language.num_hidden_layers)
    plan = make_plan(config, name, abstract_step, model)
    figures = plan.main.compiled.figures
    if figures is None:
        raise SystemExit(f"{rows} rows a chip do not fit into {name}.")
    return {
        "chips": chips,
        "fsdp": fsdp,
        "flops": figures.flops,
        "memory": figures.memory,
        "received": figures.received,
        "received_by_kind": {kind: each.bytes for kind, each in figures.collectives.items()},
        "needed": plan.main.compiled.needed,
        "roofline_seconds": roofline(figures, plan.topology),
    }


def table(rows: list[dict]) -> str:
    """Markdown: every figure, and how it compares with the fewest chips."""
    lines = [
        "| chips | mesh | TFLOP a chip | memory GB a chip | received GB a chip "
        "| roofline: products, memory, links |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [str(row["chips"]), f"data={row['chips'] // row['fsdp']} fsdp={row['fsdp']}"]
        for name, unit in zip(FIGURES, (1e12, 1e9, 1e9), strict=True):
            more = row[name] / rows[0][name] - 1
            cells.append(f"{row[name] / unit:.2f} ({more:+.1%})")
        times = (f"{1e3 * seconds:.0f}" for seconds in row["roofline_seconds"].values())
        lines.append(f"| {' | '.join([*cells, ', '.join(times)])} ms |")
    return "\n".join(lines)


def ways(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """How to grow from the fewest chips on: the state over as many as there, or over all."""
    return (
        [row for row in rows if row["fsdp"] == rows[0]["fsdp"]],
        [row for row in rows if row["fsdp"] == row["chips"]],
    )


def plot(rows: list[dict]) -> str:
    """SVG: each figure relative to the fewest chips, and the band of 5%.

    Lines: the state over as many chips as there; dashes: over all.
    """
    width, height, left, top = 480, 260, 60, 20
    across, down = width - left - 150, height - top - 40
    chips = sorted({row["chips"] for row in rows})

    def x(count: int) -> float:
        return left + across * chips.index(count) / max(len(chips) - 1, 1)

    def y(value: float) -> float:
        return top + down * (1.3 - value) / 0.6

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<rect x="{left}" y="{y(1.05):.1f}" width="{across}" '
        f'height="{y(0.95) - y(1.05):.1f}" fill="#eeeeee"/>',
    ]
    for value in (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3):
        parts.append(f'<text x="{left - 34}" y="{y(value) + 4:.1f}">{value:.1f}</text>')
    for count in chips:
        parts.append(f'<text x="{x(count) - 10:.1f}" y="{height - 22}">{count}</text>')
    parts.append(f'<text x="{left + across / 2 - 16:.0f}" y="{height - 6}">chips</text>')
    beside = left + across + 16
    for number, name in enumerate(FIGURES):
        for some, dashes in zip(ways(rows), ("", ' stroke-dasharray="4 3"'), strict=True):
            points = [(x(row["chips"]), y(row[name] / rows[0][name])) for row in some]
            line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{COLORS[name]}"{dashes}/>')
            parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{COLORS[name]}"/>'
                      for a, b in points]  # fmt: skip
        at = top + 20 * (number + 1)
        parts.append(f'<text x="{beside}" y="{at}" fill="{COLORS[name]}">{name}</text>')
    for number, text in enumerate((f"line: fsdp={rows[0]['fsdp']}", "dashes: fsdp=chips")):
        parts.append(f'<text x="{beside}" y="{top + 20 * (number + 5)}">{text}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", choices=["v5e", "v5p", "v6e"], default="v5e")
    parser.add_argument("--chips", type=int, nargs="+", default=CHIPS)
    parser.add_argument("--fsdp", type=int, help="chips of one copy of the state; default: all")
    parser.add_argument("--rows", type=int, default=8, help="of 4,096 tokens, for each chip")
    parser.add_argument("--small", action="store_true", help="two layers of each stack")
    args = parser.parse_args()
    model = smaller(RELEASED) if args.small else RELEASED
    target = RESULTS / f"scaling_{args.chip}{'_small' if args.small else ''}.json"
    stored = json.loads(target.read_text("utf-8")) if target.exists() else {}
    # Chips with more rows each are another table.
    rows = stored["rows"] if stored.get("rows_a_chip") == args.rows else []
    for chips in args.chips:
        found = measure(args.chip, chips, args.fsdp or chips, args.rows, model)
        print(json.dumps(found), file=sys.stderr, flush=True)
        same = (found["chips"], found["fsdp"])
        rows = [row for row in rows if (row["chips"], row["fsdp"]) != same] + [found]
        rows.sort(key=lambda row: (row["chips"], row["fsdp"]))
        write_json(target, {"chip": args.chip, "rows_a_chip": args.rows, "rows": rows})
        target.with_suffix(".svg").write_text(plot(rows), "utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
