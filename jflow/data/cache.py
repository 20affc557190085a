"""A cache on disk of what frozen networks make of the images to generate, read while training.

One crop of every record is encoded once, so the crop depends on the record alone and is the same in
every epoch; without a cache every epoch crops anew. The VAE's noise is still drawn anew each time.
`encode` writes it:

  cache.json: what it was made with, see `Fingerprint`, and the broken records with their reasons.
  images-N.npy: [records] uint32, `image_checksum` of each of the N-th source of generation samples.
  moments-N.npy: [records, 2, h, w, c] float32 of them.
  features-N.npy: [records, tokens, D] float32 of SigLIP, where they are cached.
"""

import contextlib
import dataclasses
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jflow.data.examples import CachedImage
from jflow.data.sources import Source

INFO = "cache.json"
_PROBES = 16  # records of a source whose images are looked at before the first step


@dataclass(frozen=True)
class Encoders:
    """Checksums of the parameters of the networks, and the dtype they compute in.

    siglip: None where its features are not to be cached: it is trained, or REPA is off.
    """

    vae: int
    siglip: int | None
    dtype: str


@dataclass(frozen=True)
class Fingerprint:
    """What a cache depends on beside the images. image_size: of the crops in pixels; seed: what
    they are drawn from."""

    encoders: Encoders
    image_size: int
    seed: int


def image_checksum(record: dict[str, Any]) -> int:
    """The crc32 of a record's images."""
    checksum = 0
    for image in record.get("images", []):
        checksum = zlib.crc32(image, checksum)
    return checksum


class ImageCache:
    """Opened for a run; raises ValueError in one sentence where it was made for another.

    Args:
      folder: where `encode` wrote it.
      fingerprint: the run's own. Without encoders.siglip, cached features are left unread.
      repa: whether SigLIP's features of the crops are needed, from here or made of the crops.
    """

    def __init__(self, folder: str, fingerprint: Fingerprint, repa: bool):
        self._folder, self._fingerprint, self._repa = Path(folder), fingerprint, repa
        if not (self._folder / INFO).is_file():
            raise FileNotFoundError(
                f"There is no cache in {folder}: write one with python -m jflow.data cache."
            )
        info = json.loads((self._folder / INFO).read_text(encoding="utf-8"))
        made, wanted = info["fingerprint"], dataclasses.asdict(fingerprint)
        made, wanted = made | made.pop("encoders"), wanted | wanted.pop("encoders")
        with_features = made["siglip"] is not None and wanted["siglip"] is not None
        for name in ("vae", "dtype", "image_size", "seed", *(["siglip"] * with_features)):
            self._compare(name, made[name], wanted[name])
        self._broken = [{int(i): why for i, why in one.items()} for one in info["broken"]]
        count = len(self._broken)
        self._images = [self._open(f"images-{n}.npy") for n in range(count)]
        self._moments = [self._open(f"moments-{n}.npy") for n in range(count)]
        self._features = [self._open(f"features-{n}.npy") for n in range(count) if with_features]
        self.blank = CachedImage(
            index=-1,
            moments=np.zeros(self._moments[0].shape[1:], np.float32),
            features=np.zeros(self._features[0].shape[1:], np.float32) if with_features else None,
            with_crop=repa and not with_features,
        )

    def __reduce__(self):
        """Another process opens the files for itself."""
        return ImageCache, (str(self._folder), self._fingerprint, self._repa)

    def _open(self, name: str) -> np.ndarray:
        try:
            return np.load(self._folder / name, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self._folder / name} cannot be read ({error}): write the cache again with "
                f"python -m jflow.data cache."
            ) from error

    def _compare(self, name: str, made: object, wanted: object) -> None:
        if made != wanted:
            raise ValueError(
                f"The cache {self._folder} was made with another {name} ({made}, here {wanted}): "
                f"write it again with python -m jflow.data cache, or set data.cache to ''."
            )

    def check_sources(self, sources: Sequence[Source]) -> None:
        """Raises ValueError or OSError unless these are the sources, in their order, that were
        cached, as far as their numbers and some of their records tell."""
        self._compare("number of sources", len(self._images), len(sources))
        for which, source in enumerate(sources):
            count = len(source)
            named = f"number of records, behind {source.name(0)}"
            self._compare(named, len(self._images[which]), count)
            for index in np.linspace(0, count - 1, min(_PROBES, count)).astype(int):
                # A broken record is counted where it is read to be trained on.
                with contextlib.suppress(ValueError, FileNotFoundError):
                    self.image(which, int(index), source[int(index)], source.name(int(index)))

    def image(self, which: int, index: int, record: dict[str, Any], name: str) -> CachedImage:
        """Of record `index` of source `which`; name: what to call it.

        Raises ValueError if it is broken, and OSError, since all others may be wrong as well, where
        its images are not those that were cached.
        """
        if index in self._broken[which]:
            raise ValueError(self._broken[which][index])
        if image_checksum(record) != self._images[which][index]:
            raise OSError(
                f"The cache {self._folder} was made when {name} had other images: write it again "
                f"with python -m jflow.data cache, or set data.cache to ''."
            )
        features = np.array(self._features[which][index]) if self._features else None
        moments = np.array(self._moments[which][index])
        return CachedImage(index, moments, features, self.blank.with_crop)
