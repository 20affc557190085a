"""What one chip does when there are more of them, each with the same work: operations and bytes.

    PYTHONPATH=. python benchmarks/scaling.py                       # v5e, 16 to 256 chips
    PYTHONPATH=. python benchmarks/scaling.py --chip v6e --chips 16 64 --small

The step of stage 2, compiled for each number of chips with `rows` rows a chip, its state split over
all of them. Writes benchmarks/results/scaling_CHIP.json and .svg beside it. No chip is needed.
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


def step_of(chips: int, rows: int, layers: int) -> TrainConfig:
    """Stage 2's later mixture, with `rows` rows for each of so many chips; layers: of the model."""
    config = load(REPO / "configs" / "pretrain.py")
    data = replace(config.data, batch_rows=rows * chips)
    objective = replace(config.objective, repa_layer=min(config.objective.repa_layer, layers))
    mesh = MeshConfig(1, chips, 1)
    return later(replace(config, data=data, objective=objective, mesh=mesh))


def smaller(config: JanusFlowConfig) -> JanusFlowConfig:
    """Two layers of each stack: what a chip does per layer is the same."""
    return replace(
        config,
        language=replace(config.language, num_hidden_layers=2),
        siglip=replace(config.siglip, layers=2),
    )


def measure(chip: str, chips: int, rows: int, model: JanusFlowConfig) -> dict:
    """Figures of one chip among `chips`."""
    name = f"{chip}-{2 * chips if chip == 'v5p' else chips}"
    config = step_of(chips, rows, model.language.num_hidden_layers)
    plan = make_plan(config, name, abstract_step, model)
    figures = plan.main.compiled.figures
    if figures is None:
        raise SystemExit(f"{rows} rows a chip do not fit into {name}.")
    return {
        "chips": chips,
        "flops": figures.flops,
        "memory": figures.memory,
        "received": figures.received,
        "needed": plan.main.compiled.needed,
        "roofline_seconds": roofline(figures, plan.topology),
    }


def table(rows: list[dict]) -> str:
    """Markdown: every figure, and how it compares with the fewest chips."""
    lines = [
        "| chips | TFLOP a chip | memory GB a chip | received GB a chip |",
        "|---|---|---|---|",
    ]
    for row in rows:
        cells = []
        for name, unit in zip(FIGURES, (1e12, 1e9, 1e9), strict=True):
            more = row[name] / rows[0][name] - 1
            cells.append(f"{row[name] / unit:.2f} ({more:+.1%})")
        lines.append(f"| {row['chips']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[dict]) -> str:
    """SVG: each figure relative to the fewest chips, and the band of 5%."""
    width, height, left, top = 480, 260, 60, 20
    across, down = width - left - 120, height - top - 40

    def x(index: int) -> float:
        return left + across * index / max(len(rows) - 1, 1)

    def y(value: float) -> float:
        return top + down * (1.3 - value) / 0.5

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<rect x="{left}" y="{y(1.05):.1f}" width="{across}" '
        f'height="{y(0.95) - y(1.05):.1f}" fill="#eeeeee"/>',
    ]
    for value in (0.8, 0.9, 1.0, 1.1, 1.2, 1.3):
        parts.append(f'<text x="{left - 34}" y="{y(value) + 4:.1f}">{value:.1f}</text>')
    for index, row in enumerate(rows):
        parts.append(f'<text x="{x(index) - 10:.1f}" y="{height - 22}">{row["chips"]}</text>')
    parts.append(f'<text x="{left + across / 2 - 16:.0f}" y="{height - 6}">chips</text>')
    for number, name in enumerate(FIGURES):
        points = [(x(i), y(row[name] / rows[0][name])) for i, row in enumerate(rows)]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{COLORS[name]}"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{COLORS[name]}"/>'
                  for a, b in points]  # fmt: skip
        at = left + across + 16, top + 20 * (number + 1)
        parts.append(f'<text x="{at[0]}" y="{at[1]}" fill="{COLORS[name]}">{name}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", choices=["v5e", "v5p", "v6e"], default="v5e")
    parser.add_argument("--chips", type=int, nargs="+", default=CHIPS)
    parser.add_argument("--rows", type=int, default=8, help="of 4,096 tokens, for each chip")
    parser.add_argument("--small", action="store_true", help="two layers of each stack")
    args = parser.parse_args()
    model = smaller(RELEASED) if args.small else RELEASED
    target = RESULTS / f"scaling_{args.chip}{'_small' if args.small else ''}.json"
    rows = []
    for chips in args.chips:
        rows.append(measure(args.chip, chips, args.rows, model))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        write_json(target, {"chip": args.chip, "rows_a_chip": args.rows, "rows": rows})
        target.with_suffix(".svg").write_text(plot(rows), "utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
