"""Preprocessing against the released processor, files of every kind, and writing."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from jflow import images
from jflow.images import ImageProcessor
from tests.goldens import GOLDEN, golden

PRE = golden("golden_preprocess")
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (40, 30, 3), np.uint8)


def hwc(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, 0, -1)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def loaded(path) -> np.ndarray:
    image = images.load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


# Preprocessing.


@pytest.mark.parametrize("name", sorted(n for n in PRE if n.startswith(("resized", "pixel_val"))))
def test_preprocessing_is_exactly_the_released_one(name):
    kind, size, picture = name.split(".")
    processor = ImageProcessor(image_size=int(size))
    image = Image.fromarray(PRE[f"in.{picture}"])
    got = processor.resize_and_pad(image) if kind == "resized" else processor.preprocess(image)
    assert got.dtype == PRE[name].dtype
    np.testing.assert_array_equal(got, hwc(PRE[name]))


def test_every_level_is_exactly_the_released_one():
    grey = np.arange(256, dtype=np.uint8).repeat(256).reshape(256, 256)
    image = Image.fromarray(np.stack([grey] * 3, -1))
    pixels = ImageProcessor(image_size=256).preprocess(image)
    for channel in range(3):
        np.testing.assert_array_equal(pixels[:, 0, channel], PRE["levels"])


def test_processor_of_the_checkpoint():
    name = "preprocessor_config.json"
    processor = ImageProcessor.from_files({name: (GOLDEN / "tiny" / name).read_text()})
    assert processor.image_mean == processor.image_std == (0.5, 0.5, 0.5)
    text = '{"image_size": 32, "image_mean": [0.1, 0.5, 0.9], "image_std": [1, 2, 4]}'
    processor = ImageProcessor.from_files({name: text})
    white = Image.new("RGB", (4, 2), "white")
    padded = processor.resize_and_pad(white)
    assert padded.shape == (32, 32, 3)
    assert padded[0, 0].tolist() == [25, 127, 229]  # int(mean * 255), truncated
    np.testing.assert_allclose(processor.preprocess(white)[16, 16], [0.9, 0.25, 0.025], rtol=1e-6)
    text = text.replace("{", '{"do_normalize": false, ')
    np.testing.assert_array_equal(
        ImageProcessor.from_files({name: text}).preprocess(white)[16, 16], [1, 1, 1]
    )


def test_what_the_file_of_a_processor_leaves_open():
    """The released defaults, which are CLIP's; without a file, what JanusFlow's file says."""
    name = "preprocessor_config.json"
    bare = ImageProcessor.from_files({name: "{}"}, image_size=32)
    assert bare.image_size == 32 and not bare.is_centered
    assert list(bare.image_mean) == OPENAI_CLIP_MEAN and list(bare.image_std) == OPENAI_CLIP_STD
    assert ImageProcessor.from_files({}, 32) == ImageProcessor(32)
    assert ImageProcessor(32).is_centered
    with pytest.raises(ValueError, match="image_std in preprocessor_config.json is None"):
        ImageProcessor.from_files({name: '{"image_std": null}'})


@pytest.mark.parametrize("size", [(1, 50), (50, 1), (1, 1), (3, 2000)])
def test_strips_of_a_pixel_keep_the_minimal_size(size):
    processor = ImageProcessor(image_size=64)
    got = processor.resize_and_pad(Image.new("RGB", size, "white"))
    assert got.shape == (64, 64, 3)
    width, height = (np.any(np.all(got == 255, -1), axis).sum() for axis in (0, 1))
    assert (width, height) == tuple(64 if n == max(size) else 14 for n in size)


# Pixels.


def test_uint8_pixels():
    levels = np.arange(256, dtype=np.uint8)
    pixels = images.from_uint8(levels)
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, PRE["levels"], rtol=0, atol=1e-7)
    assert images.to_uint8(np.float32([-7, -1, 0, 1, 7])).tolist() == [0, 0, 127, 255, 255]
    # Truncating may lose one level to rounding, no more.
    back = images.to_uint8(pixels).astype(int)
    assert np.all((levels - back >= 0) & (levels - back <= 1))


@pytest.mark.parametrize("size", [(96, 64), (64, 96), (64, 64), (200, 32)])
def test_center_crop_square(size):
    """Against resizing the whole image and cropping then."""
    width, height = size
    image = Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))
    scaled = (32 * width // min(size), 32 * height // min(size))
    whole = np.asarray(image.resize(scaled, Image.Resampling.BICUBIC))
    left, top = (scaled[0] - 32) // 2, (scaled[1] - 32) // 2
    got = images.center_crop_square(image, 32)
    assert got.shape == (32, 32, 3) and got.dtype == np.uint8
    # Between the two passes uint8 may be rounded at other places.
    want = whole[top : top + 32, left : left + 32].astype(int)
    assert np.abs(got - want).max() <= 1


# Reading.


@pytest.mark.parametrize(
    "form, tag, value",
    [("PNG", 1, 0), ("JPEG", 6, 3), ("JPEG", 3, 2), ("JPEG", 8, 1), ("JPEG", 2, None)],
)
def test_exif_rotation_is_applied(tmp_path, form, tag, value):
    """A red upper left corner, stored as the camera would at that orientation."""
    upright = np.full((32, 48, 3), 255, np.uint8)
    upright[:16, :16] = (255, 0, 0)
    stored = upright[:, ::-1] if tag == 2 else np.rot90(upright, {1: 0, 6: 1, 3: 2, 8: 3}[tag])
    exif = Image.Exif()
    exif[0x0112] = tag
    (tmp_path / "a").write_bytes(
        encoded(Image.fromarray(np.ascontiguousarray(stored)), form, exif=exif)
    )
    got = loaded(tmp_path / "a").astype(int)
    assert got.shape == upright.shape
    assert np.abs(got[4:12, 4:12] - (255, 0, 0)).max() < 16
    assert np.abs(got[4:28, 24:44] - 255).max() < 16


def test_all_orientations_are_those_of_pil():
    for tag in range(10):
        exif = Image.Exif()
        exif[0x0112] = tag
        file = io.BytesIO(encoded(Image.fromarray(NOISE), "PNG", exif=exif))
        want = ImageOps.exif_transpose(Image.open(file))
        np.testing.assert_array_equal(images.decode(file), want)


def tiff(*entries: tuple[int, int, int]) -> bytes:
    """EXIF data of (tag, type, value)."""
    packed = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4)


@pytest.mark.parametrize(
    "exif, size",
    [
        (b"Exif\0\0II*\0", (8, 4)),
        (b"Exif\0\0garbage!", (8, 4)),
        # On its side; PIL cannot write back the unit of its resolution, which is too large.
        (tiff((0x0112, 3, 6), (0x0128, 4, 70_000)), (4, 8)),
    ],
)
def test_broken_exif_costs_no_picture(tmp_path, exif, size):
    Image.new("RGB", (8, 4), "red").save(tmp_path / "a.png", exif=exif)
    picture = images.load_image(tmp_path / "a.png")
    assert picture.size == size and np.all(np.asarray(picture) == (255, 0, 0))


def test_cmyk_is_converted(tmp_path):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    (tmp_path / "a.jpg").write_bytes(encoded(image, "JPEG", quality=100))
    assert np.abs(loaded(tmp_path / "a.jpg").astype(int) - (255, 0, 0)).max() < 4


def test_transparency_lies_on_white(tmp_path):
    rgba = RNG.integers(0, 256, (9, 7, 4), np.uint8)
    rgba[0, 0, 3], rgba[0, 1, 3] = 0, 255
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    alpha = rgba[..., 3:] / 255
    want = rgba[..., :3] * alpha + 255 * (1 - alpha)
    got = loaded(tmp_path / "rgba.png")
    assert np.abs(got - want).max() <= 1
    assert got[0, 0].tolist() == [255] * 3 and got[0, 1].tolist() == rgba[0, 1, :3].tolist()

    Image.fromarray(rgba).convert("LA").save(tmp_path / "la.png")
    grey, alpha = np.moveaxis(np.asarray(Image.fromarray(rgba).convert("LA")) / 255, -1, 0)
    want = 255 * (grey * alpha + 1 - alpha)
    assert np.abs(loaded(tmp_path / "la.png") - want[..., None]).max() <= 1

    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    for form in ("png", "gif"):
        palette.save(tmp_path / f"p.{form}", transparency=0)
        assert loaded(tmp_path / f"p.{form}").tolist() == [[[255, 255, 255], [0, 255, 0]]]


def test_sixteen_bits_are_scaled(tmp_path):
    levels = np.arange(0, 65536, 64, dtype=np.uint16).reshape(16, 64)
    Image.fromarray(levels).save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "I;16"
    Image.fromarray(levels.astype(np.int32)).save(tmp_path / "a.tif")
    assert Image.open(tmp_path / "a.tif").mode == "I"
    for name in ("a.png", "a.tif"):
        got = loaded(tmp_path / name)
        assert np.abs(got[..., 0] - levels / 257).max() <= 0.5 + 1e-9
        assert np.all(got == got[..., :1])


def test_whole_numbers_of_32_bits_may_be_of_8(tmp_path):
    levels = np.arange(256, dtype=np.int32)[None]
    Image.fromarray(levels).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(loaded(tmp_path / "a.tif")[..., 0], levels)


@pytest.mark.parametrize("highest, top", [(1, 1), (1.2, 1), (255, 255), (256, 255), (65535, 65535)])
def test_float_files_are_scaled_by_their_range(tmp_path, highest, top):
    """Of which a filter may have gone beyond a little."""
    levels = np.linspace(0, highest, 64, dtype=np.float32)
    Image.fromarray(np.append(levels, np.nan)[None].astype(np.float32)).save(tmp_path / "a.tif")
    got = loaded(tmp_path / "a.tif")[0, :, 0]
    assert np.abs(got[:-1] - np.minimum(levels / top, 1) * 255).max() <= 0.5 + 1e-3
    assert got[-1] == 0


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bare_png(width: int, height: int) -> bytes:
    """A PNG of one bit a pixel, whose pixels are missing."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


PNG = encoded(Image.fromarray(NOISE), "PNG")


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "is empty"),
        (b"Not a picture, but a sentence.", "is not an image"),
        (PNG[: len(PNG) // 2], "damaged or truncated"),
        (encoded(Image.fromarray(NOISE), "JPEG")[:700], "damaged or truncated"),
        (PNG[:200] + bytes([PNG[200] ^ 255]) + PNG[201:], "damaged or truncated"),
        (bare_png(0, 0), "is not an image"),
        (b"P6\n0 5\n255\n", "is not an image"),
        (bare_png(20000, 20000), "too many pixels"),
    ],
    ids=["empty", "text", "half PNG", "half JPEG", "bit error", "0 x 0", "0 x 5", "huge"],
)
def test_bad_files_are_named_in_one_sentence(tmp_path, data, message):
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as raised:
        images.load_image(path)
    text = str(raised.value)
    assert text.startswith(str(path)) and "\n" not in text and text.endswith(".")


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none.png"))):
        images.load_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))} is a folder"):
        images.load_image(tmp_path)


# Writing.


def test_metadata_and_pixels_come_back(tmp_path):
    path = tmp_path / "new" / "folder" / "a.png"
    metadata = {"prompt": "a red circle\n红色的圆 🦊", "seed": "7", "empty": ""}
    images.save_png(NOISE, path, metadata)
    with Image.open(path) as image:
        assert image.text == metadata
        np.testing.assert_array_equal(np.asarray(image), NOISE)
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_a_failing_save_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    images.save_png(NOISE, path, {})
    before = path.read_bytes()

    def fill_the_disk(self, file, *_, **__):
        with open(file, "wb") as out:
            out.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill_the_disk)
    with pytest.raises(OSError, match="No space"):
        images.save_png(NOISE[::-1], path, {})
    with pytest.raises(OSError, match="No space"):
        images.save_png(NOISE, tmp_path / "b.png", {})
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("count, columns, gap, shape", [(4, 2, 2, (82, 62)), (5, 3, 1, (81, 92))])
def test_grid(count, columns, gap, shape):
    tiles = RNG.integers(0, 255, (count, 40, 30, 3), np.uint8)  # never 255, the background
    grid = images.make_grid(tiles, columns, gap)
    assert grid.shape == (*shape, 3) and grid.dtype == np.uint8
    for i, tile in enumerate(tiles):
        top, left = i // columns * (40 + gap), i % columns * (30 + gap)
        np.testing.assert_array_equal(grid[top : top + 40, left : left + 30], tile)
    assert np.sum(grid != 255) == tiles.size
