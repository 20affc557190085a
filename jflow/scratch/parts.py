"""What training a part (SigLIP, the VAE) shares: the pictures, and a file of its weights."""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save
from tqdm import tqdm

from jflow.config import override
from jflow.data import shapes
from jflow.data.scenes import Scene, render
from jflow.data.workers import in_processes
from jflow.images import to_uint8

ASSETS = Path(__file__).parent / "assets"


def pictures(seed: int, split: str, count: int) -> tuple[np.ndarray, list[Scene]]:
    """Of the shapes world: uint8 [count, 32, 32, 3], and what is in them."""
    made = in_processes(partial(_picture, seed, split), range(count))
    drawn, scenes = zip(*tqdm(made, f"drawing {split}", count), strict=True)
    return np.stack(drawn), list(scenes)


def _picture(seed: int, split: str, index: int) -> tuple[np.ndarray, Scene]:
    scene = shapes.example(seed, split, index).scene
    return to_uint8(render(scene)), scene


def write(path: Path, config: dict, params: dict) -> None:
    """Writes PATH.json and PATH.safetensors, in bfloat16: half the size, and what is lost is far
    below the noise of training."""
    leaves = jax.tree.map(lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16), params)
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in (
        (".safetensors", save(flatten_dict(leaves, sep="/"))),
        (".json", json.dumps(config, indent=1).encode() + b"\n"),
    ):
        partial = path.with_suffix(suffix + ".tmp")
        partial.write_bytes(content)
        partial.replace(path.with_suffix(suffix))


def read(path: Path) -> tuple[dict, dict]:
    """(config, float32 parameters) that `write` wrote."""
    config = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    leaves = load_file(path.with_suffix(".safetensors"))
    params = {name: leaf.astype(np.float32) for name, leaf in leaves.items()}
    return config, unflatten_dict(params, sep="/")


def command(name: str, doc: str, config: Any, make: Callable[[Any], tuple[dict, dict, str]]) -> int:
    """`python -m NAME --out OUT [field=value ...]`: makes a part and writes it; the exit status.

    Args:
      doc: the help's text. config: the defaults, a frozen dataclass.
      make: a config to (what describes the part, its parameters, how good it is).
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path, help="writes OUT.safetensors, OUT.json")
    parser.add_argument("overrides", nargs="*", metavar="field=value")
    args = parser.parse_intermixed_args()
    try:
        described, params, said = make(reduce(override, args.overrides, config))
        write(args.out, described, params)
    except (ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {said}")
    return 0
