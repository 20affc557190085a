"""How many samples a second the data pipeline makes, alone, by number of threads.

    python benchmarks/data.py [--threads 1 2 4 8] [--seconds 5] [--pictures 64]

Two workloads, both generation and understanding half and half, packed as for training: `shapes`
(TFDS, 32 pixels) and pictures of 512 x 384 as JSONL with JPEG files, for 384 pixels and rows of
4,096 tokens as in the full recipe. Both are made on the fly; the tokenizer is that of the small
golden checkpoint. Samples are counted as they come out in batches.
"""

import argparse
import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from jflow.data import builders
from jflow.data.mixture import DataConfig, MixtureConfig, SourceConfig, WindowConfig
from jflow.data.pipeline import Loader
from jflow.images import ImageProcessor
from jflow.prompts import Tokenizer

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "tiny"
HALVES = (MixtureConfig(0, understanding=1, generation=1, text=0),)


def shapes(folder: Path) -> tuple[DataConfig, int, int]:
    """(config, side of the pictures, tokens of one); 32 pixels in patches of 4."""
    options = builders.ShapesOptions(train=1000, seen=1, unseen=1)
    builders.build("shapes", options, folder / "shapes")
    fields = (("caption", "captions"),)
    sources = tuple(
        SourceConfig(task, "tfds", str(folder / "shapes"), fields=fields, template="pretrain")
        for task in ("understanding", "generation")
    )
    config = DataConfig(
        sources=sources,
        mixture=HALVES,
        batch_rows=16,
        max_seq_len=512,
        understanding=WindowConfig(20, 8),
        generation=WindowConfig(32, 8),
        images_per_row=4,
        crops_per_row=6,
    )
    return config, 32, 64


def jpeg(folder: Path, pictures: int) -> tuple[DataConfig, int, int]:
    """Photographs, or what costs a decoder as much: smooth noise, about 60 kB each."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(pictures):
        coarse = Image.fromarray(rng.integers(0, 256, (96, 128, 3), np.uint8))
        coarse.resize((512, 384), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
        caption = " ".join(rng.choice(["a", "red", "fox", "in", "the", "snow"], 40))
        lines.append(json.dumps({"image": f"{i}.jpg", "caption": caption}))
    (folder / "pictures.jsonl").write_text("\n".join(lines), encoding="utf-8")
    path = str(folder / "pictures.jsonl")
    config = DataConfig(
        sources=(
            SourceConfig("understanding", "jsonl", path),
            SourceConfig("generation", "jsonl", path),
        ),
        mixture=HALVES,
        batch_rows=4,
        understanding=WindowConfig(12, 2),
        generation=WindowConfig(12, 2),
    )
    return config, 384, 576


def samples_per_second(config: DataConfig, side: int, tokens: int, seconds: float) -> float:
    """Of batches that follow each other for that long, once the first three have been made."""
    files = {file.name: file.read_text(encoding="utf-8") for file in GOLDEN.glob("*.json")}
    processor = json.loads(files["processor_config.json"]) | {"num_image_tokens": tokens}
    tokenizer = Tokenizer.from_files(files | {"processor_config.json": json.dumps(processor)})
    batches = Loader(config, tokenizer, ImageProcessor(side), side, tokens).batches()
    for _ in range(3):
        next(batches)
    made, begin = 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < seconds:
        batch, _ = next(batches)
        made += int((batch.images.sample_ids >= 0).sum())
        # A picture each, and their first slot lies in the row.
        made += int((batch.text.slots[..., 0] < config.max_seq_len).sum())
    return made / spent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each measurement")
    parser.add_argument("--pictures", type=int, default=64, help="JPEG files to make")
    args = parser.parse_args()
    tfds.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        workloads = {
            "shapes, 32 px": shapes(Path(scratch)),
            "JPEG, 384 px": jpeg(Path(scratch), args.pictures),
        }
        print(f"samples a second, {os.cpu_count()} cores")
        print("threads".ljust(16), *(f"{n:>8}" for n in args.threads))
        for name, (config, side, tokens) in workloads.items():
            rates = [
                samples_per_second(
                    dataclasses.replace(config, threads=n, prefetch=2 * n),
                    side,
                    tokens,
                    args.seconds,
                )
                for n in args.threads
            ]
            print(name.ljust(16), *(f"{rate:8.1f}" for rate in rates))


if __name__ == "__main__":
    main()
