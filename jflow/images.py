"""Pictures in and out: files, the released preprocessing, grids.

Inside jflow an image is NHWC float32 in [-1, 1].
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

# How to turn a picture upright, by EXIF's number of how it lies.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(path: str | Path) -> Image.Image:
    """An RGB image from a file, upright, transparency on white, 16 bits scaled to 8.

    Raises FileNotFoundError or ValueError in one sentence that names the file.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the image file in it.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no image file {path}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: it is no image.")
    try:
        return decode(path)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is not an image that can be read.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} has too many pixels: scale it down first.") from error
    except MemoryError:
        raise
    except Exception as error:  # Decoders raise whatever they like at damaged data.
        raise ValueError(f"{path} is damaged or truncated: {error}.") from error


def decode(file: str | Path | BinaryIO) -> Image.Image:
    """Upright RGB of an encoded image; raises whatever PIL raises at what is none."""
    with Image.open(file) as opened:
        opened.load()
        return to_rgb(_upright(opened))


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data say. Whatever else stands there may be broken: PIL's exif_transpose
    would parse and write back all of it."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # of many types; the pixels are as good as before
        turn = None
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of PIL -> RGB of 8 bits."""
    if image.mode.startswith("I") or image.mode == "F":
        # PIL would cut 16 bits off at 255 instead of scaling them.
        values = np.nan_to_num(np.asarray(image, np.float64), nan=0, posinf=0, neginf=0)
        top = 65535
        if image.mode in ("I", "F"):  # Of any range, of which some exceed it a little.
            highest = values.max()
            top = 1 if image.mode == "F" and highest <= 2 else 255 if highest <= 512 else top
        image = Image.fromarray(np.clip(np.round(values * (255 / top)), 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


_CLIP = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}


@dataclass(frozen=True)
class ImageProcessor:
    """What the understanding encoder sees (VLMImageProcessor), as preprocessor_config.json says."""

    image_size: int = 384
    min_size: int = 14
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    rescale_factor: float = 1 / 255
    do_normalize: bool = True

    @classmethod
    def from_files(cls, files: Mapping[str, str], image_size: int = 384) -> "ImageProcessor":
        """Reads preprocessor_config.json, in which the released defaults for mean and std are
        CLIP's; without one, JanusFlow's values hold.

        Args: image_size: where the file says nothing.

        Raises ValueError for a mean or a deviation that is not one number for each color.
        """
        file = "preprocessor_config.json"
        if file not in files:
            return cls(image_size)
        config = {"image_size": image_size} | _CLIP | json.loads(files[file])
        for name in _CLIP:
            if not isinstance(config[name], list | tuple) or len(config[name]) != 3:
                raise ValueError(f"{name} in {file} is {config[name]}, not three numbers.")
            config[name] = tuple(config[name])
        return cls(**{name: config[name] for name in cls.__dataclass_fields__ if name in config})

    @property
    def is_centered(self) -> bool:
        """Whether what it makes of pixels is theirs in [-1, 1]."""
        return self.do_normalize and {*self.image_mean, *self.image_std} == {0.5}

    def resize_and_pad(self, image: Image.Image) -> np.ndarray:
        """RGB image -> uint8 [S, S, 3]: long side to S, centred on the colour of the mean."""
        scale = max(image.size)
        # Truncated, in this order of operations, as the released code does.
        width, height = (max(int(n / scale * self.image_size), self.min_size) for n in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        side = max(width, height)
        background = tuple(int(mean * 255) for mean in self.image_mean)
        square = Image.new("RGB", (side, side), background)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        return np.asarray(square)

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """RGB image -> float32 [S, S, 3], in [-1, 1] for mean and std 0.5."""
        # The product is float64, the rest float32: that is how the reference rounds.
        x = (self.resize_and_pad(image) * np.float64(self.rescale_factor)).astype(np.float32)
        if self.do_normalize:
            x = (x - np.float32(self.image_mean)) / np.float32(self.image_std)
        return x


def center_crop_square(image: Image.Image, size: int) -> np.ndarray:
    """RGB image -> uint8 [size, size, 3]: short side to `size`, the middle of the long one."""
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC))


def from_uint8(pixels: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1]."""
    return pixels.astype(np.float32) / np.float32(127.5) - 1


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """float32, clipped to [-1, 1] -> uint8, truncated as the released demo does."""
    return ((np.clip(pixels, -1, 1) + 1) / 2 * 255).astype(np.uint8)


def make_grid(images: Sequence[np.ndarray], columns: int, gap: int = 2) -> np.ndarray:
    """uint8 images [H, W, 3], row by row -> one image on white, `gap` pixels apart."""
    height, width = images[0].shape[:2]
    rows = -(-len(images) // columns)
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid


def save_png(image: np.ndarray, path: str | Path, metadata: Mapping[str, str]) -> None:
    """Writes uint8 [H, W, 3] as PNG with text metadata; a temporary file is moved into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngImagePlugin.PngInfo()
    for name, text in metadata.items():
        info.add_itxt(name, text)
    partial = path.with_name(f".{path.name}.tmp")
    try:
        Image.fromarray(image).save(partial, "PNG", pnginfo=info)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
