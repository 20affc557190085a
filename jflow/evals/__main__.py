"""Scores a checkpoint on the shapes benchmark.

python -m jflow.evals --ckpt runs/shapes --out runs/shapes/evals [--untrained DIR] [field=value ...]

Writes scores.json, drawn.png (pictures above their prompts) and answered.png into --out.
"""

import argparse
import json
import sys
import time
from functools import reduce
from pathlib import Path

import jax

from jflow.checkpoints import find_checkpoint
from jflow.compilation import enable_cache, out_of_memory
from jflow.config import override
from jflow.evals.benchmark import BenchmarkConfig, answer_scores, ask, draw
from jflow.evals.geneval import score, shuffled
from jflow.evals.pages import answer_page, drawing_page
from jflow.images import save_png
from jflow.inference.pipeline import Pipeline


def scores(ckpt: str, untrained: str | None, config: BenchmarkConfig, out: Path) -> dict:
    """All scores of one checkpoint; the pages are written on the way.

    "generation": plain GenEval scores, "generation_strict": nothing else may be in the picture;
    "chance": the same pictures against other prompts; "answers_chance": the same questions about
    other pictures; "..._unseen": of pairs never seen.
    """
    if untrained is not None:
        find_checkpoint(untrained)  # Said now, not after an hour's scores.
    pipeline = Pipeline.from_checkpoint(ckpt)
    found = {}
    for split, suffix in (("seen", ""), ("unseen", "_unseen")):
        drawn, answered = draw(pipeline, split, config), ask(pipeline, split, config)
        others = shuffled(drawn.records, config.seed)
        for name, records in (("generation", drawn.records), ("chance", others)):
            result = score(drawn.pictures, records)
            found[f"{name}{suffix}"] = result["plain"]
            found[f"{name}{suffix}_strict"] = result["strict"]
        elsewhere = ask(pipeline, split, config, shift=config.pictures // 2)
        found[f"answers{suffix}"] = answer_scores(answered)
        found[f"answers_chance{suffix}"] = answer_scores(elsewhere)
        if split == "seen":
            about = {"checkpoint": ckpt}
            save_png(drawing_page(drawn), out / "drawn.png", about)
            save_png(answer_page(answered), out / "answered.png", about)
    if untrained is not None:
        before = Pipeline.from_checkpoint(untrained)
        drawn = draw(before, "seen", config)
        result = score(drawn.pictures, drawn.records)
        found["untrained"], found["untrained_strict"] = result["plain"], result["strict"]
        found["answers_untrained"] = answer_scores(ask(before, "seen", config))
    return found


def table(found: dict) -> str:
    """The scores as Markdown, in percent."""
    lines = []
    for start, title in (("generation", "pictures"), ("answers", "answers")):
        rows = {
            name: row
            for name, row in found.items()
            if isinstance(row, dict) and name.startswith("answers") == (start == "answers")
        }
        names = list(next(iter(rows.values())))
        lines += [f"| {title} | " + " | ".join(n.replace("_", " ") for n in names) + " |"]
        lines += ["|---" * (len(names) + 1) + "|"]
        for name, row in rows.items():
            cells = (f"{100 * row[n]:.0f}" if n in row else "" for n in names)
            lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ckpt", required=True, help="checkpoint or run folder")
    parser.add_argument("--out", required=True, type=Path, help="folder for what is written")
    parser.add_argument("--untrained", help="checkpoint to compare with: where training began")
    parser.add_argument(
        "--began", type=float, help="Unix time that scores.json's seconds count from; default: now"
    )
    parser.add_argument("overrides", nargs="*", metavar="field=value")
    args = parser.parse_intermixed_args(argv)
    began = args.began or time.time()
    try:
        enable_cache()
        config = reduce(override, args.overrides, BenchmarkConfig())
        args.out.mkdir(parents=True, exist_ok=True)
        found = scores(args.ckpt, args.untrained, config, args.out)
        found["seconds"] = round(time.time() - began, 1)
        partial = args.out / "scores.json.tmp"
        partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        partial.replace(args.out / "scores.json")
    except (ValueError, OSError) as error:
        print(f"jflow.evals: {error}", file=sys.stderr)
        return 2
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not out_of_memory(error):
            raise
        print("jflow.evals: out of memory; lower batch_size=64.", file=sys.stderr)
        return 2
    print(table(found))
    print(f"{found['seconds']} seconds; pictures and scores are in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
