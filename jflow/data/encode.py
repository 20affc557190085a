"""Writes the cache of VAE moments and SigLIP features, and opens it for a run; see `cache`."""

import dataclasses
import itertools
import json
import math
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from tqdm import tqdm

from jflow import checkpoints, folders
from jflow.data import workers
from jflow.data.cache import INFO, Encoders, Fingerprint, ImageCache, image_checksum
from jflow.data.examples import cached_crop
from jflow.data.mixture import DataConfig
from jflow.data.pipeline import check_broken
from jflow.data.sources import Source, open_source
from jflow.distributed import fetch
from jflow.models.janusflow import JanusFlow, JanusFlowConfig
from jflow.models.layers import Precision
from jflow.models.vae import AutoencoderKL, VAEConfig
from jflow.training.config import TrainConfig

_SIGLIP = "vision_und_enc_model"


def cached_encoders(params: dict, config: TrainConfig) -> set[str]:
    """What a cache stands in for: "vae", "siglip" where REPA needs it untrained, and "crop" where
    nothing else reads the crops.

    Args: params: that the run begins with; their shapes are enough.

    Raises ValueError for a checkpoint without a VAE: there is nothing to cache.
    """
    if "vae" not in params:
        raise ValueError(
            f"{config.init_from} has no VAE, its latents are the pixels: set data.cache to ''."
        )
    # The kernels that LoRA's factors stand for count: its targets are patterns of the same kind.
    patterns = (*config.trainable, *(config.lora.targets if config.lora else ()))
    paths = flatten_dict(_siglip(params), sep="/")
    trained = any(re.match(pattern, path) for pattern in patterns for path in paths)
    if not config.objective.repa_weight:
        return {"vae", "crop"}
    return {"vae"} if trained else {"vae", "siglip", "crop"}


def encoders_of(params: dict, config: TrainConfig) -> Encoders:
    """What identifies a run's encoders; arguments and errors of `cached_encoders`."""
    cached = cached_encoders(params, config)
    return Encoders(
        vae=_checksum(params["vae"]),
        siglip=_checksum(_siglip(params)) if "siglip" in cached else None,
        dtype=config.dtype,
    )


def _siglip(params: dict) -> dict:
    """Under the paths that the whole tree has."""
    return {"janusflow": {_SIGLIP: params["janusflow"][_SIGLIP]}}


def open_cache(config: TrainConfig, params: dict, models: dict) -> ImageCache | None:
    """The cache that a run is to use, None without one; see `ImageCache` for what is refused.

    Args: params, models: of the checkpoint that the run begins with, as `load_checkpoint` has them.
    """
    if not config.data.cache:
        return None
    size = JanusFlowConfig.from_hf(models["janusflow"], models.get("siglip")).siglip.image_size
    fingerprint = Fingerprint(encoders_of(params, config), size, config.data.seed)
    return ImageCache(config.data.cache, fingerprint, repa=config.objective.repa_weight != 0)


def _checksum(params: dict) -> int:
    """Of paths and values, whatever the dtype they are stored in."""
    checksum = 0
    for path, leaf in sorted(flatten_dict(params, sep="/").items()):
        checksum = zlib.crc32(path.encode(), checksum)
        values = np.ascontiguousarray(fetch(leaf).astype(np.float32))
        checksum = zlib.crc32(values.reshape(-1).view(np.uint8), checksum)
    return checksum


def write_cache(config: TrainConfig, out: str, batch: int) -> Fingerprint:
    """Encodes one crop of every record of the generation sources, `batch` at a time, into `out`.

    Broken records are named, and kept with their reasons, so that training skips the same ones.

    Raises ValueError or OSError in one sentence, also for more of them than max_broken_share
    allows; then nothing is written.
    """
    folders.require_new(out)
    chosen = [s for s in config.data.sources if s.task == "generation"]
    if not chosen:
        raise ValueError(f"{config.name} has no source of generation samples: nothing to cache.")
    sources = [open_source(s.kind, s.path, s.split, dict(s.fields), s.image_folder) for s in chosen]
    params, models, _ = checkpoints.load_checkpoint(config.init_from)
    encoders = encoders_of(params, config)
    dtype = jnp.dtype(config.dtype)
    vae = AutoencoderKL(VAEConfig.from_hf(models["vae"]), dtype=dtype)
    model_config = JanusFlowConfig.from_hf(models["janusflow"], models.get("siglip"))
    model = JanusFlow(model_config, Precision(compute=dtype))
    size = model_config.siglip.image_size

    @jax.jit
    def encode(params: dict, pixels: jax.Array) -> dict[str, jax.Array]:
        moments = vae.apply({"params": params["vae"]}, pixels, method="encode")
        found = {"moments": jnp.stack(moments, axis=1)}
        if encoders.siglip is not None:
            variables = {"params": params["janusflow"]}
            found["features"] = model.apply(variables, pixels, method="image_features")
        return {name: values.astype(jnp.float32) for name, values in found.items()}

    crops, one = sum(map(len, sources)), jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    found = jax.eval_shape(encode, params, one).values()
    needed = crops * sum(math.prod(each.shape) * each.dtype.itemsize for each in found)
    print(f"{crops} crops of {size} pixels, {needed / 1e9:.2f} GB, into {out}")
    _require_room(out, needed, encoders)
    with folders.new_folder(out) as folder:
        folder.mkdir()
        broken = [
            _write_source(
                partial(encode, params),
                source,
                {
                    name: folder / f"{name}-{number}.npy"
                    for name in ("images", "moments", "features")
                },
                size,
                config.data,
                batch,
            )
            for number, source in enumerate(sources)
        ]
        fingerprint = Fingerprint(encoders, size, config.data.seed)
        named = [
            f"{source.name(i)}: {reason}"
            for source, reasons in zip(sources, broken, strict=True)
            for i, reason in reasons.items()
        ]
        check_broken(named, sum(map(len, sources)), config.data.max_broken_share)
        for line in named:
            print(f"skipped {line}")
        info = {"fingerprint": dataclasses.asdict(fingerprint), "broken": broken}
        (folder / INFO).write_text(json.dumps(info, indent=1), encoding="utf-8")
    return fingerprint


def _require_room(out: str, needed: int, encoders: Encoders) -> None:
    """Raises OSError in one sentence where a folder will not hold so many bytes."""
    there = next(path for path in Path(out).resolve().parents if path.exists())
    if needed < (free := shutil.disk_usage(there).free):
        return
    smaller = (
        "; objective.repa_weight=0 leaves out SigLIP's features, the larger part, which training "
        "then makes of the crops"
    )
    raise OSError(
        f"The cache needs {needed / 1e9:.2f} GB, but {there} has room for {free / 1e9:.2f}: make "
        f"room{smaller if encoders.siglip is not None else ''}."
    )


def _write_source(
    encode: Callable[[np.ndarray], dict[str, jax.Array]],
    source: Source,
    paths: dict[str, Path],
    size: int,
    data: DataConfig,
    batch: int,
) -> dict[int, str]:
    """Writes the arrays of one source, each to its path; {index: why} of its broken records."""
    broken, files = {}, {}
    # Written and not mapped: where a map finds no space left the program is killed by a signal.
    with ExitStack() as opened, tqdm(total=len(source), unit="crop") as bar:
        for start, crops in _crop_batches(source, size, data, batch):
            pixels = np.zeros((batch, size, size, 3), np.float32)
            checksums = np.zeros(batch, np.uint32)
            for i, crop in enumerate(crops):
                if isinstance(crop, str):
                    broken[start + i] = crop
                else:
                    pixels[i], checksums[i] = crop
            for name, values in (encode(pixels) | {"images": checksums}).items():
                values = np.asarray(values)
                if name not in files:
                    files[name] = opened.enter_context(paths[name].open("wb"))
                    header = {
                        "descr": np.lib.format.dtype_to_descr(values.dtype),
                        "fortran_order": False,
                        "shape": (len(source), *values.shape[1:]),
                    }
                    np.lib.format.write_array_header_1_0(files[name], header)
                files[name].write(values[: len(crops)].tobytes())
            bar.update(len(crops))
    return broken


def _crop_batches(
    source: Source, size: int, data: DataConfig, batch: int
) -> Iterator[tuple[int, list[tuple[np.ndarray, int] | str]]]:
    """(first record, what `_crops` makes of a batch), the next batch made meanwhile."""
    if data.workers:  # Each of them is given the source once: its index may be large.
        pool, make = workers.pool(data.workers, _begin_worker, source), _crops_of_worker
    else:
        pool, make = ThreadPoolExecutor(data.pool_size), partial(_crops, source)
    share = -(-batch // (data.workers or data.pool_size))
    batches = [range(len(source))[i : i + batch] for i in range(0, len(source), batch)]
    parts = [[rows[i : i + share] for i in range(0, len(rows), share)] for rows in batches]
    with pool:
        made = workers.ahead(
            lambda part: pool.submit(make, size, data.seed, part),
            itertools.chain.from_iterable(parts),
            -(-batch // share),
        )
        for rows, asked in zip(batches, parts, strict=True):
            yield rows.start, [crop for _ in asked for crop in next(made)]


def _begin_worker(source: Source) -> None:
    global _source
    _source = source


def _crops_of_worker(*args: Any) -> list[tuple[np.ndarray, int] | str]:
    return _crops(_source, *args)


def _crops(
    source: Source, size: int, seed: int, indices: range
) -> list[tuple[np.ndarray, int] | str]:
    """Of each record the crop [S, S, 3] and its images' checksum, or why there is none."""

    def crop(index: int) -> tuple[np.ndarray, int] | str:
        try:
            record = source[index]
            return cached_crop(record, size, seed, index)[0], image_checksum(record)
        except (ValueError, FileNotFoundError) as error:
            return str(error)

    return [crop(index) for index in indices]
