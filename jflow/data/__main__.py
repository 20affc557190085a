"""The embedded datasets, a check of a config's data, and a cache of encoded images.

python -m jflow.data build shapes --out data/shapes [--size 32 --train 20000]
python -m jflow.data build digits --out data/digits
python -m jflow.data check --config configs/NAME.py [--out runs/NAME] [field=value ...]
python -m jflow.data cache --config configs/NAME.py --out DIR [field=value ...]
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import tensorflow_datasets as tfds

from jflow.config import load
from jflow.data import builders, check, encode

_OPTIONS = {"shapes": builders.ShapesOptions, "digits": builders.DigitsOptions}


def _build(args: argparse.Namespace) -> int:
    tfds.disable_progress_bar()
    kind = _OPTIONS[args.dataset]
    names = [field.name for field in dataclasses.fields(kind)]
    options = kind(**{name: getattr(args, name) for name in names})
    made = builders.build(args.dataset, options, args.out)
    print(f"{args.dataset} is in {args.out}" + ("." if made else ", as it was."))
    return 0


def _check(args: argparse.Namespace) -> int:
    config = load(args.config, args.overrides)
    out = args.out or Path("runs") / config.name
    report = check.check(config, out, args.records, args.windows, args.batches)
    print(check.describe(report))
    print(f"{out / check.SHEET} shows what the model sees, {out / check.REPORT} has all of this.")
    for error in report.errors:
        print(f"python -m jflow.data check: {error}", file=sys.stderr)
    return 1 if report.errors else 0


def _cache(args: argparse.Namespace) -> int:
    config = load(args.config, args.overrides)
    encode.write_cache(config, args.out, args.batch)
    print(f"{args.out} is written: train with data.cache={args.out}.")
    return 0


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jflow.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    build = commands.add_parser("build", help="write an embedded dataset as a TFDS folder")
    datasets = build.add_subparsers(dest="dataset", required=True)
    for name, kind in _OPTIONS.items():
        one = datasets.add_parser(name, help=f"the {name} dataset", description=kind.__doc__)
        one.add_argument("--out", type=Path, required=True, help="folder to make")
        for field in dataclasses.fields(kind):
            option = f"--{field.name}"
            one.add_argument(option, type=int, default=field.default, help="default %(default)s")
    build.set_defaults(run=_build)

    checker = commands.add_parser("check", help="what a config will train on, before it does")
    checker.add_argument("--out", type=Path, help="folder to write; default: the run folder")
    count = checker.add_argument
    count("--records", type=_positive, default=1000, help="to read of each source")
    count("--windows", type=_positive, default=8, help="to pack of each task")
    count("--batches", type=_positive, default=1000, help="to count the mixture over")
    checker.set_defaults(run=_check)

    writer = commands.add_parser("cache", help="encode the images to generate once for all epochs")
    writer.add_argument("--out", required=True, help="folder to make")
    writer.add_argument("--batch", type=_positive, default=16, help="crops to encode at a time")
    writer.set_defaults(run=_cache)

    for command in (checker, writer):
        command.add_argument("--config", required=True, help="a file of configs/")
        command.add_argument("overrides", nargs="*", metavar="field=value")
    args, more = parser.parse_known_args(argv)
    # Fields may stand on both sides of an option, which argparse does not know of subcommands.
    if more and ("overrides" not in args or any(one.startswith("-") for one in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        args.overrides += more
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"python -m jflow.data: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
