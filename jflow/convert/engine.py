"""Safetensors files to parameter trees and back, driven by a table of names.

A table (janusflow_rules, vae_rules) holds only names and patterns: which keys a file must have, and
of which shapes, follows from our abstract parameters. Arrays are read and written one at a time, so
that memory stays at the size of the largest, and they keep their dtype and their bits.
"""

import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
from einops import rearrange
from safetensors import SafetensorError, safe_open

from jflow.checkpoints import Later

# The name of a dtype in a safetensors header, and numpy's.
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Tensors are written in parts of at most about this many bytes.
WRITE_BYTES = 32 * 2**20


class Rule(NamedTuple):
    """Where one kind of tensor lies in a Hugging Face file and in our tree.

    hf: "model.layers.{l}.mlp.up_proj.weight"; {l} runs over axis 0 of our array and is absent from
      `path`; {i} and {j} stand for the same integers on both sides.
    path: "layers/mlp/up_proj/kernel".
    pattern: einops, from the file's layout to ours, without the layer axis: "o i -> i o".
    """

    hf: str
    path: str
    pattern: str


def linear_rules(hf: str, ours: str) -> tuple[Rule, Rule]:
    """Of a linear layer with a bias, by the names before ".weight" and "/kernel"."""
    return (
        Rule(f"{hf}.weight", f"{ours}/kernel", "o i -> i o"),
        Rule(f"{hf}.bias", f"{ours}/bias", "o -> o"),
    )


def norm_rules(hf: str, ours: str) -> tuple[Rule, Rule]:
    """Of a norm with a bias, by the names before ".weight" and "/scale"."""
    return (
        Rule(f"{hf}.weight", f"{ours}/scale", "c -> c"),
        Rule(f"{hf}.bias", f"{ours}/bias", "c -> c"),
    )


class Leaf(NamedTuple):
    """One array of our tree and the tensors it is made of.

    keys: in order of the layers if `stacked`, else a single one. hf_shape: of each of them.
    """

    path: str
    shape: tuple[int, ...]
    pattern: str
    stacked: bool
    keys: tuple[str, ...]
    hf_shape: tuple[int, ...]


class Tensor(NamedTuple):
    """Where a tensor is stored. file: which safetensors file; name: its key there."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]


def flatten(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """("a/b/c", leaf) of a nested dict, in its order."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def unflatten(leaves: Iterable[tuple[str, object]]) -> dict:
    """The nested dict that `flatten` took apart."""
    tree: dict = {}
    for path, leaf in leaves:
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def inverse(pattern: str) -> str:
    """ "o i -> i o" to "i o -> o i"."""
    left, right = pattern.split("->")
    return f"{right.strip()} -> {left.strip()}"


def plan(rules: Sequence[Rule], abstract_params: dict) -> list[Leaf]:
    """Finds the one rule of every array of the tree.

    Args:
      abstract_params: nested dict of anything with a shape, such as jax.eval_shape gives.

    Raises ValueError, naming all of them, for arrays without a rule or with several.
    """
    regexes = [
        re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(rule.path)))
        for rule in rules
    ]
    leaves, problems = [], []
    for path, array in flatten(abstract_params):
        matches = [
            (rule, match)
            for rule, regex in zip(rules, regexes, strict=True)
            if (match := regex.fullmatch(path))
        ]
        if len(matches) != 1:
            problems.append(f"{path} has {len(matches)} rules")
            continue
        ((rule, match),) = matches
        stacked = "{l}" in rule.hf
        shape = tuple(array.shape)
        layer_shape = shape[1:] if stacked else shape
        # A view of one byte: einops says what the shape is, nothing is allocated.
        there = rearrange(np.broadcast_to(np.uint8(0), layer_shape), inverse(rule.pattern))
        keys = tuple(
            rule.hf.format(l=layer, **match.groupdict())
            for layer in range(shape[0] if stacked else 1)
        )
        leaves.append(Leaf(path, shape, rule.pattern, stacked, keys, there.shape))
    if problems:
        raise ValueError(
            f"Each parameter needs exactly one conversion rule: {', '.join(problems)}."
        )
    return leaves


def find_tensors(folder: Path, renames: Sequence[tuple[str, str]] = ()) -> dict[str, Tensor]:
    """Every tensor of a folder by key, from the headers alone.

    Reads the file of the usual name, else the shards of the one *.safetensors.index.json (of
    several, that of the usual name), else all *.safetensors. `renames` are (older part of a key,
    newer part).

    Raises FileNotFoundError or ValueError for a folder without tensors, a shard that is missing,
    a damaged file, several indices, and a key that occurs twice.
    """
    tensors: dict[str, Tensor] = {}
    for file in _tensor_files(folder):
        try:
            with safe_open(file, "np") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a dict)
                    key = name
                    for old, new in renames:
                        key = key.replace(old, new)
                    if key in tensors:
                        raise ValueError(
                            f"{key} is in {tensors[key].file} and again in {file}: leave one copy."
                        )
                    part = opened.get_slice(name)
                    shape = tuple(part.get_shape())
                    tensors[key] = Tensor(file, name, part.get_dtype(), shape)
        except SafetensorError as error:
            raise ValueError(
                f"{file} is truncated or damaged ({error}): download or copy it again."
            ) from error
    return tensors


def _tensor_files(folder: Path) -> list[Path]:
    # stabilityai/sdxl-vae keeps the same weights under other names in a second file.
    usual = [folder / "model.safetensors", folder / "diffusion_pytorch_model.safetensors"]
    files = [file for file in usual if file.is_file()][:1]
    indices = sorted(folder.glob("*.safetensors.index.json"))
    indices = [i for i in indices if i.with_suffix("").with_suffix("") in usual] or indices
    if indices and not files:
        if len(indices) > 1:
            names = ", ".join(index.name for index in indices)
            raise ValueError(f"{folder} has several indices, {names}: leave one of them.")
        try:
            shards = set(json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{indices[0]} has no weight_map: download it again.") from error
        files = [folder / name for name in sorted(shards)]
    files = files or sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"There are no *.safetensors files in {folder}: where there are others (*.bin), load "
            f"the model with the library it came from (transformers, diffusers) and save it again."
        )
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}, named in {indices[0].name}, does not exist.")
    return files


def check(leaves: Sequence[Leaf], tensors: dict[str, Tensor]) -> None:
    """Raises one ValueError with everything that is missing, unexpected, or of another shape."""
    problems, expected = [], set()
    for leaf in leaves:
        expected.update(leaf.keys)
        found = [tensors[key] for key in leaf.keys if key in tensors]
        problems += [f"missing: {key}" for key in leaf.keys if key not in tensors]
        problems += [
            f"wrong shape: {key} is {list(tensors[key].shape)}, expected {list(leaf.hf_shape)}"
            for key in leaf.keys
            if key in tensors and tensors[key].shape != leaf.hf_shape
        ]
        dtypes = sorted({tensor.dtype for tensor in found})
        if len(dtypes) > 1:
            problems.append(f"several dtypes: {leaf.keys[0]} to {leaf.keys[-1]} are {dtypes}")
        problems += [
            f"unsupported dtype: {leaf.keys[0]} is {dtype}"
            for dtype in dtypes
            if dtype not in DTYPES
        ]
    problems += [f"unexpected: {key}" for key in sorted(tensors.keys() - expected)]
    if problems:
        raise ValueError(
            "The weights do not fit the model that the config describes:\n  "
            + "\n  ".join(problems)
        )


def open_params(
    leaves: Sequence[Leaf],
    tensors: dict[str, Tensor],
    on_bytes: Callable[[int], object] = lambda count: None,
) -> dict:
    """The tree of arrays in the dtypes of the files, each of them Later.

    Args:
      leaves, tensors: of `plan` and `find_tensors`; `check` runs at once.
      on_bytes: called with the size of every tensor that has been read.
    """
    check(leaves, tensors)

    def later(leaf: Leaf) -> Later:
        dtype = DTYPES[tensors[leaf.keys[0]].dtype]
        return Later(leaf.shape, dtype, lambda: _read_leaf(leaf, tensors, on_bytes))

    return unflatten((leaf.path, later(leaf)) for leaf in leaves)


def _read_leaf(leaf: Leaf, tensors: dict[str, Tensor], on_bytes) -> np.ndarray:
    array = np.empty(leaf.shape, DTYPES[tensors[leaf.keys[0]].dtype])
    for layer, key in zip(_layers(array, leaf), leaf.keys, strict=True):
        # Opened anew for each tensor: pages of a mapped file count as ours until it is closed.
        with safe_open(tensors[key].file, "np") as opened:
            source = opened.get_tensor(tensors[key].name)
        layer[...] = rearrange(source, leaf.pattern)
        on_bytes(layer.nbytes)
    return array


def _layers(array: np.ndarray, leaf: Leaf) -> np.ndarray:
    return array if leaf.stacked else array[None]


def write_params(
    leaves: Sequence[Leaf],
    params: dict,
    file: Path,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> None:
    """Writes the tree as one safetensors file, through a temporary file beside it.

    Args:
      params: nested dict of arrays, or of what is Later; each is read once, in the leaves' order.
      on_bytes: called with the size of every tensor that has been written.

    Raises ValueError, naming all, for arrays that are missing, unexpected or wrongly shaped.
    """
    arrays = dict(flatten(params))
    problems = [f"unexpected {path}" for path in arrays.keys() - {leaf.path for leaf in leaves}]
    for leaf in leaves:
        found = arrays[leaf.path].shape if leaf.path in arrays else None
        if found != leaf.shape:
            problems.append(f"{leaf.path} has shape {found}, expected {leaf.shape}")
    if problems:
        raise ValueError(
            "The parameters do not fit the model that the config describes: "
            f"{'; '.join(sorted(problems))}."
        )
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for leaf in leaves:
        dtype = arrays[leaf.path].dtype
        (name,) = [name for name, known in DTYPES.items() if known == dtype]
        size = int(np.prod(leaf.hf_shape)) * dtype.itemsize
        for key in leaf.keys:
            offsets = [end, end + size]
            header[key] = {"dtype": name, "shape": list(leaf.hf_shape), "data_offsets": offsets}
            end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned to 8 bytes
    partial = file.with_name(file.name + ".tmp")
    try:
        with partial.open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for leaf in leaves:
                _write_leaf(leaf, np.asarray(arrays[leaf.path]), out, on_bytes)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _write_leaf(leaf: Leaf, array: np.ndarray, out: BinaryIO, on_bytes) -> None:
    for layer in _layers(array, leaf):
        tensor = np.atleast_1d(rearrange(layer, inverse(leaf.pattern)))
        # In parts, since a transposed word embedding is copied to be written.
        for rows in np.array_split(tensor, -(-tensor.nbytes // WRITE_BYTES)):
            # As bytes, since bfloat16 has no buffer of its own.
            out.write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8))
        on_bytes(tensor.nbytes)
