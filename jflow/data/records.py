"""One stored record, of whatever format, as a record of the fields that `sources` describes."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

FIELDS = ("image", "images", "caption", "question", "answer", "conversations", "text")


def to_record(raw: Any, fields: Mapping[str, str], folder: epath.Path | None) -> dict[str, Any]:
    """A record as `sources` promises it, from one as it is stored.

    folder: what image paths are relative to; None where no path can be meant.
    """
    found = {name: _lookup(raw, fields.get(name, name)) for name in FIELDS}
    found = {name: value for name, value in found.items() if value is not None}
    images = []
    for name in ("image", "images"):
        value = found.pop(name, None)
        images += value if isinstance(value, list | tuple) else [value]
    record = {name: _plain(value) for name, value in found.items()}
    turns = record.get("conversations")
    if isinstance(turns, Mapping):  # TFDS turns a list of turns into turns of lists.
        if not all(isinstance(values, list) for values in turns.values()):
            raise ValueError("its conversations are no list of turns")
        pairs = zip(*turns.values(), strict=True)
        record["conversations"] = [dict(zip(turns, turn, strict=True)) for turn in pairs]
    images = [_image(value, folder) for value in images if value is not None and value != ""]
    return record | ({"images": images} if images else {})


def _lookup(raw: Any, key: str) -> Any:
    """The value at a "/"-separated key, None where there is none; of lists, that of each item."""
    name, _, rest = key.partition("/")
    if isinstance(raw, list | tuple):
        return [_lookup(item, key) for item in raw]
    value = raw.get(name) if isinstance(raw, Mapping) else None
    return _lookup(value, rest) if rest and value is not None else value


def _plain(value: Any) -> Any:
    """Text from bytes, lists from arrays: TFDS has the former of each."""
    if isinstance(value, bytes):
        return decode(value)
    if isinstance(value, str):
        return decode(value.encode("utf-8", "surrogatepass"))  # JSON lets half a character pass.
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"its text is not UTF-8 ({error})") from error


def _image(value: Any, folder: epath.Path | None) -> bytes | np.ndarray:
    if isinstance(value, Mapping):  # The Hub's struct.
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and folder is not None:
        file = folder / value
        if not file.exists() or file.is_dir():
            if not folder.exists():
                raise OSError(f"The folder of images {folder} is not there: bring it back.")
            raise FileNotFoundError(f"there is no image file {file}")
        return file.read_bytes()
    if isinstance(value, bytes) or (isinstance(value, np.ndarray) and value.dtype == np.uint8):
        return value
    raise ValueError(f"its image is {type(value).__name__}, neither a path nor bytes")


def json_object(data: bytes, what: str) -> dict[str, Any]:
    try:
        raw = json.loads(data)
    except ValueError as error:
        raise ValueError(f"{what} is not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{what} is valid JSON but not an object")
    return raw
