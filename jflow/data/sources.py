"""Where records come from: TFDS, JSON, parquet and webdataset files behind one small interface.

Every source gives random access to records of the same few fields:

  images: a list of encoded images (bytes) or decoded ones (uint8 [H, W, C]); absent without any.
  caption: a text, or a list of texts to choose one from.
  question, answer: one question about the images, and what to reply.
  conversations: a list of {"from": "human" or "gpt", "value": text} as LLaVA writes them, with
    "<image>" where an image stands; "role"/"content" with "user" and "assistant" are read too.
  text: a document without images.

In a file, `image` (one) and `images` (several) both name the images. A field map renames:
{"caption": "captions/text"} reads the caption from there; "/" steps into what is nested.
Only content is judged here: a record that cannot be used raises ValueError or FileNotFoundError,
the same on every machine; failing storage raises OSError, which is nobody's broken record.
"""

import difflib
import functools
import json
import re
import tarfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import fsspec
import numpy as np
from etils import epath

from jflow.data.records import FIELDS, decode, json_object, to_record

_BLANK = re.compile(r"[ \t\r\n]*")
_MARK = "\xef\xbb\xbf"  # that some editors put before UTF-8
_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


class Source(Protocol):
    """Random access to records; holds no open file that could not be pickled."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def name(self, index: int) -> str:
        """Where a person finds this record."""


def open_source(
    kind: str,
    path: str,
    split: str = "train",
    fields: Mapping[str, str] | None = None,
    image_folder: str = "",
) -> Source:
    """Opens one source; its files are listed and indexed here, its records read on demand.

    Args:
      kind: "tfds", "jsonl", "parquet" or "webdataset".
      path: a file, a folder or a pattern with "*", local or gs://; for TFDS the folder of a
        prepared dataset, or the name of one ("coco_captions:1.1.0").
      split: of TFDS only, with slices as in "train[:90%]".
      fields: field map, from the names of `FIELDS` to those in the files.
      image_folder: what image paths in JSONL and parquet are relative to; "" is the file's folder.

    Raises FileNotFoundError or ValueError in one sentence.
    """
    fields = dict(fields or {})
    for name in fields:
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, 1) or [", ".join(FIELDS)]
            raise ValueError(f"There is no field {name!r} to map to: did you mean {near[0]}?")
    match kind:
        case "tfds":
            return TfdsSource(path, split, fields)
        case "jsonl":
            return JsonlSource(path, fields, image_folder)
        case "parquet":
            return ParquetSource(path, fields, image_folder)
        case "webdataset":
            return WebdatasetSource(path, fields)
    raise ValueError(
        f"There is no format {kind!r}: use tfds, jsonl, parquet or webdataset for {path}."
    )


@contextmanager
def _opened(file: epath.Path) -> Iterator[Any]:
    """The file of records, open; that it is gone is failing storage, and no broken record."""
    try:
        opened = file.open("rb")
    except FileNotFoundError as error:
        raise _gone(file) from error
    with opened:
        yield opened


def _read(file: epath.Path, places: Sequence[tuple[int, int]]) -> list[bytes]:
    """What stands at (first byte, size) of the file of records. Of a bucket's nothing else is
    fetched: what is opened there reads megabytes ahead, for a record of some kilobytes."""
    if "://" not in str(file):
        found = []
        with _opened(file) as opened:
            for start, size in places:
                opened.seek(start)
                found.append(opened.read(size))
        return found
    bucket, path = fsspec.url_to_fs(str(file))
    try:
        # Of no bytes there is no range to ask for.
        return [bucket.cat_file(path, at, at + size) if size else b"" for at, size in places]
    except FileNotFoundError as error:
        raise _gone(file) from error


def _gone(file: epath.Path) -> OSError:
    return OSError(f"{file} was there and is gone: bring it back.")


class TfdsSource:
    """A prepared TFDS dataset (file format array_record), read without TensorFlow."""

    def __init__(self, path: str, split: str, fields: Mapping[str, str]):
        import tensorflow_datasets as tfds  # Half a second that other sources need not pay.

        try:
            prepared = (epath.Path(path) / "dataset_info.json").exists()
            builder = tfds.builder_from_directory(path) if prepared else tfds.builder(path)
        except ImportError as error:
            raise ValueError(f"{path} needs a package that is missing: {error}.") from error
        except (tfds.core.DatasetNotFoundError, ValueError) as error:
            raise FileNotFoundError(
                f"{path} is neither the folder of a prepared dataset (the one that holds "
                f"dataset_info.json) nor a name that TFDS knows."
            ) from error
        features = builder.info.features
        _check_columns(path, fields, features.keys())
        # Encoded images go through our own decoder: it names broken ones, and applies EXIF.
        encoded = {
            name: tfds.decode.SkipDecoding()
            for name, feature in features.items()
            if isinstance(feature, tfds.features.Image)
        }
        try:
            self._records = builder.as_data_source(split, decoders=encoded)
        except NotImplementedError as error:
            raise ValueError(
                f"{path} is stored as {builder.info.file_format.value}, which allows no random "
                f"access: prepare it again with file_format='array_record'."
            ) from error
        except (ValueError, AssertionError) as error:
            raise ValueError(f"{path} cannot be read as split {split!r}: {error}.") from error
        if not len(self._records):
            raise ValueError(f"{path} is empty: split {split!r} holds no record.")
        self._label, self._fields = f"{path} {split}", fields

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return to_record(self._records[index], self._fields, None)

    def name(self, index: int) -> str:
        return f"{self._label}[{index}]"


class JsonlSource:
    """One JSON object a line; a file *.json is one array of them, as LLaVA's own files are.

    {"image": "a.jpg", "caption": "..."}, {"text": "..."}, or {"image": ["a.jpg", "b.jpg"],
    "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", ...}]}.
    """

    def __init__(self, path: str, fields: Mapping[str, str], image_folder: str):
        self._fields, self._image_folder = fields, image_folder
        self._files = _find_files(path, ".jsonl")
        parts = []
        for number, file in enumerate(self._files):
            with file.open("rb") as opened:
                found = _array_entries(opened, file) if _is_array(file) else _lines(opened)
                places = np.array(list(found), np.int64).reshape(-1, 3)
            parts.append(np.insert(places, 0, number, axis=1))
        # [records, 4]: file, line or entry, and its first byte and the one behind it.
        self._places = np.concatenate(parts)
        if not len(self._places):
            raise ValueError(f"{path} is empty: write one JSON object a line.")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, _, start, stop = self._places[index]
        (data,) = _read(self._files[file], [(int(start), int(stop - start))])
        raw = json_object(data, "the entry" if _is_array(self._files[file]) else "the line")
        folder = self._image_folder or self._files[file].parent
        return to_record(raw, self._fields, epath.Path(folder))

    def name(self, index: int) -> str:
        file, number, _, _ = self._places[index]
        what = "entry" if _is_array(self._files[file]) else "line"
        return f"{self._files[file]} {what} {number}"


class ParquetSource:
    """Parquet columns by name; images as bytes, or as the Hub's struct of `bytes` and `path`.

    A random record costs its whole row group: write small ones (100 rows) where images are in it.
    """

    def __init__(self, path: str, fields: Mapping[str, str], image_folder: str):
        self._fields, self._image_folder = fields, image_folder
        self._files = _find_files(path, ".parquet")
        self._groups = []
        ends = [0]
        for number, file in enumerate(self._files):
            with file.open("rb") as opened:
                parquet = _parquet_file(opened, file)
                _check_columns(path, fields, parquet.schema_arrow.names)
                for group in range(parquet.num_row_groups):
                    self._groups.append((number, group))
                    ends.append(ends[-1] + parquet.metadata.row_group(group).num_rows)
        self._ends = np.array(ends)
        if not len(self):
            raise ValueError(f"{path} is empty: it holds no row.")
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._rows = functools.lru_cache(maxsize=4)(self._read_group)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_lock", "_rows")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def _read_group(self, number: int) -> Any:
        number, group = self._groups[number]
        file = self._files[number]
        with _opened(file) as opened:
            try:
                return _parquet_file(opened, file).read_row_group(group)
            except OSError as error:
                if error.errno is not None:
                    raise
                # So pyarrow says that what it has read makes no sense.
                raise ValueError(f"group {group} of {file} is damaged ({error})") from error

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = int(np.searchsorted(self._ends, index, side="right")) - 1
        with self._lock:  # Or every thread would read the same group for itself.
            rows = self._rows(number)
        raw = rows.slice(index - int(self._ends[number]), 1).to_pylist()[0]
        folder = self._image_folder or self._files[self._groups[number][0]].parent
        return to_record(raw, self._fields, epath.Path(folder))

    def name(self, index: int) -> str:
        number = int(np.searchsorted(self._ends, index, side="right")) - 1
        file, group = self._groups[number]
        return f"{self._files[file]} row {index - int(self._ends[number])} of group {group}"


class WebdatasetSource:
    """Tar files whose members belong together by their name up to the first dot.

    a.jpg (or .jpeg, .png, .webp) is the image, a.txt the caption, a.json any other fields.
    """

    def __init__(self, path: str, fields: Mapping[str, str]):
        self._fields = fields
        self._files = _find_files(path, ".tar")
        found: dict[tuple[int, str], dict[str, tuple[int, int]]] = {}
        for number, file in enumerate(self._files):
            try:
                with file.open("rb") as opened, tarfile.open(fileobj=opened, mode="r:") as tar:
                    for member in tar:
                        folder, _, last = member.name.rpartition("/")
                        key, _, suffix = last.partition(".")
                        if member.isfile():
                            place = (member.offset_data, member.size)
                            record = found.setdefault((number, f"{folder}/{key}".strip("/")), {})
                            record[suffix.lower()] = place
            except tarfile.TarError as error:
                raise ValueError(f"{file} is not an uncompressed tar file: {error}.") from error
        if not found:
            raise ValueError(f"{path} is empty: it holds no file.")
        self._members = list(found.items())

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: int) -> dict[str, Any]:
        (number, _), places = self._members[index]
        raw: dict[str, Any] = {}
        # The .json first: names of images in it are of those that lie beside it.
        members = dict(sorted(places.items(), key=lambda x: (x[0] != "json", x)))
        found = _read(self._files[number], list(members.values()))
        for (suffix, (_, size)), data in zip(members.items(), found, strict=True):
            if len(data) < size:
                raise ValueError(f"its .{suffix} is cut off")
            if suffix in _IMAGE_SUFFIXES:
                raw |= {"image": data, "images": None}
            elif suffix == "txt":
                raw["caption"] = decode(data)
            elif suffix == "json":
                raw |= json_object(data, "its .json")
        return to_record(raw, self._fields, None)

    def name(self, index: int) -> str:
        (number, key), _ = self._members[index]
        return f"{self._files[number]} {key}"


def _find_files(path: str, suffix: str) -> list[epath.Path]:
    """The files of a path, folder or pattern, sorted; one that is empty or missing is refused."""
    try:
        place = epath.Path(path)
        if "**" in path:
            raise ValueError(f"{path} has a **: name the folders one by one, with * in each.")
        if "*" in path:
            files = _glob(place.parent, place.name)
        elif place.is_dir():
            files = _glob(place, f"*{suffix}")
        else:
            files = [place] if place.exists() else []
        if not files:
            raise FileNotFoundError(f"There is no {suffix} file at {path}.")
        for file in files:
            if file.stat().length == 0:
                raise ValueError(f"{file} is empty: remove it, or write it again.")
    except ImportError as error:
        raise ValueError(f"{path} needs a package that is missing: {error}.") from error
    return files


def _glob(folder: epath.Path, pattern: str) -> list[epath.Path]:
    """A folder's files of a pattern, sorted; brackets in the name of one that is there are no
    pattern."""
    if folder.exists():
        folder = epath.Path(str(folder).replace("[", "[[]"))
    return sorted(folder.glob(pattern))


def _is_array(file: epath.Path) -> bool:
    return file.suffix == ".json"


def _lines(opened: Any) -> Iterator[tuple[int, int, int]]:
    """Number from 1, first byte and the one behind it, of every line that is not blank."""
    start = 0
    for number, line in enumerate(opened, 1):
        if line.strip():
            yield number, start, start + len(line)
        start += len(line)


def _array_entries(opened: Any, file: epath.Path) -> Iterator[tuple[int, int, int]]:
    """The same of the entries of one JSON array; the file is read whole, this once."""
    # As Latin-1 a character is a byte, and JSON's own signs are what they are in UTF-8.
    text, decode = opened.read().decode("latin-1"), json.JSONDecoder().raw_decode
    number, place = 0, _BLANK.match(text, len(_MARK) if text.startswith(_MARK) else 0).end()
    try:
        while text[place : place + 1] == ("," if number else "["):
            start = _BLANK.match(text, place + 1).end()
            if text[start : start + 1] == "]" and not number:
                place = start
                break
            number, (_, stop) = number + 1, decode(text, start)
            yield number, start, stop
            place = _BLANK.match(text, stop).end()
        if text[place:].rstrip(" \t\r\n") != "]":
            raise ValueError(f"something else stands at byte {place}")
    except ValueError as error:
        raise ValueError(
            f"{file} is not one JSON array ({error}): name it .jsonl if it holds lines."
        ) from error


def _parquet_file(opened: Any, file: epath.Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(opened)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file} is not a parquet file: {error}.") from error


def _check_columns(path: str, fields: Mapping[str, str], columns: Any) -> None:
    for wanted in fields.values():
        if wanted.split("/")[0] not in columns:
            has = ", ".join(sorted(columns))
            raise ValueError(f"{path} has no field {wanted!r}: it has {has}.")
