"""From records to examples: tokens, targets and images of one sample, as training sees it.

Layouts and templates come from `prompts`, so that training and inference cannot differ. Sources:
paper sections 3.3 and 3.4 and supplement B; shared/reference.md 1.6, 1.7 and 2. What a record
holds: `sources`. Everything random depends on (seed, purpose, sample id) alone.
"""

import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from jflow import prompts
from jflow.images import ImageProcessor, decode, from_uint8, to_rgb
from jflow.prompts import DEFAULT_SYSTEM_PROMPT, IMAGE_TAG, Message, Template, Tokenizer

CAPTION_QUESTION = "Generate the caption of this picture."
_ROLES = {"human": "User", "user": "User", "gpt": "Assistant", "assistant": "Assistant"}


@dataclass(frozen=True)
class Format:
    """What turns records into examples.

    image_size: side of the square crops to generate, in pixels. latent_tokens: of such a crop.
    drop_prompt: share of generation samples without prompt. template: see `prompts.Template`.
    """

    tokenizer: Tokenizer
    processor: ImageProcessor
    image_size: int
    latent_tokens: int
    max_seq_len: int
    drop_prompt: float = 0.1
    template: Template = "chat"
    seed: int = 0


@dataclass(frozen=True)
class CachedImage:
    """What a network made of the crop of record `index` before training, see `cache`.

    moments: [2, h, w, c] float32, mean and log variance of the VAE's posterior. features: [N, D]
    float32 of SigLIP, or None. with_crop: whether the crop itself is read, too.
    """

    index: int
    moments: np.ndarray
    features: np.ndarray | None
    with_crop: bool


@dataclass(frozen=True)
class Example:
    """One sample. n tokens, k images.

    tokens: [n] int32. targets: [n] int32, the token that position i must predict, -1 for none.
    positions: [n] int32, 0 to n - 1 but behind a dropped prompt. pixels: [k, S, S, 3] float32 in
    [-1, 1], for SigLIP, or the one crop to generate (none where nothing reads it: the cache holds
    all that is made of it). slots: [k, 1 + N] int32, where their vectors go. cached: of the crop.
    """

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    pixels: np.ndarray
    slots: np.ndarray
    cached: CachedImage | None = None


def generator(seed: int, purpose: str, sample_id: int) -> np.random.Generator:
    """The random numbers of one purpose for one sample."""
    return np.random.default_rng((seed, zlib.crc32(purpose.encode()), sample_id))


def understanding_example(record: dict[str, Any], fmt: Format, sample_id: int) -> Example:
    """Conversations, questions or captions about images: targets on the replies and their EOS.

    Conversations without images are welcome too. Raises ValueError for what cannot be used.
    """
    messages = _messages(record, generator(fmt.seed, "caption", sample_id))
    images = record.get("images", [])
    if fmt.template == "chat":
        tokens, spans = _chat(messages, len(images), fmt.tokenizer)
    else:
        tokens, spans = prompts.plain_tokens(fmt.tokenizer, messages, len(images))
    _check_length(len(tokens), fmt)
    targets = np.full(len(tokens), -1, np.int32)
    for start, end in spans:
        targets[start - 1 : end - 1] = tokens[start:end]
    size = fmt.processor.image_size
    pixels = [fmt.processor.preprocess(open_image(image)) for image in images]
    return Example(
        tokens=tokens,
        targets=targets,
        positions=np.arange(len(tokens), dtype=np.int32),
        pixels=np.array(pixels, np.float32).reshape(-1, size, size, 3),
        slots=prompts.image_slots(tokens, fmt.tokenizer).astype(np.int32),
    )


def text_example(record: dict[str, Any], fmt: Format, sample_id: int) -> Example:
    """A document, every token a target, EOS included; a conversation as in understanding.

    Of a document beyond max_seq_len, a random piece of that length is taken.
    """
    if "conversations" in record:
        return understanding_example(record, fmt, sample_id)
    text = _text(record, "text")
    tokens = np.array([*fmt.tokenizer.encode(text), fmt.tokenizer.eos_id], np.int32)
    room = max(len(tokens) - fmt.max_seq_len, 0)
    start = int(generator(fmt.seed, "piece", sample_id).integers(room + 1))
    tokens = tokens[start : start + fmt.max_seq_len]
    return Example(
        tokens=tokens,
        targets=np.append(tokens[1:], np.int32(-1)),
        positions=np.arange(len(tokens), dtype=np.int32),
        pixels=np.zeros((0, fmt.processor.image_size, fmt.processor.image_size, 3), np.float32),
        slots=np.zeros((0, 1 + fmt.tokenizer.num_image_tokens), np.int32),
    )


def generation_example(
    record: dict[str, Any], fmt: Format, sample_id: int, cached: CachedImage | None = None
) -> Example:
    """A prompt, then one time token and the latents of the image: no token is a target.

    Of a dropped prompt BOS is left, and what follows keeps its positions: what the sampler's
    unconditional half computes, which hides the prompt instead. With `cached`, the crop is the one
    that was cached, in every epoch.
    """
    caption = _choose(record, generator(fmt.seed, "caption", sample_id))
    prompt = prompts.generation_tokens(fmt.tokenizer, caption, fmt.template)
    # Vectors take their places: any id would do.
    places = np.full(1 + fmt.latent_tokens, fmt.tokenizer.pad_id, np.int32)
    tokens = np.concatenate([prompt, places])
    _check_length(len(tokens), fmt)
    positions = np.arange(len(tokens), dtype=np.int32)
    if generator(fmt.seed, "drop", sample_id).random() < fmt.drop_prompt:
        kept = np.append(0, positions[len(prompt) :])
        tokens, positions = tokens[kept], positions[kept]
    if cached is None:
        pixels = _crop(record, fmt.image_size, generator(fmt.seed, "crop", sample_id))
    elif cached.with_crop:
        pixels = cached_crop(record, fmt.image_size, fmt.seed, cached.index)
    else:
        pixels = np.zeros((0, fmt.image_size, fmt.image_size, 3), np.float32)
    return Example(
        tokens=tokens,
        targets=np.full(len(tokens), -1, np.int32),
        positions=positions,
        pixels=pixels,
        slots=np.arange(len(tokens) - len(places), len(tokens), dtype=np.int32)[None],
        cached=cached,
    )


def cached_crop(record: dict[str, Any], size: int, seed: int, index: int) -> np.ndarray:
    """The one crop of record `index` that a cache holds, [1, S, S, 3] as in `Example.pixels`."""
    return _crop(record, size, generator(seed, "cached crop", index))


def _crop(record: dict[str, Any], size: int, rng: np.random.Generator) -> np.ndarray:
    images = record.get("images", [])
    if len(images) != 1:
        raise ValueError(f"it has {len(images)} images where one is to be generated")
    return from_uint8(random_crop_square(open_image(images[0]), size, rng))[None]


def random_crop_square(image: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
    """RGB image -> uint8 [size, size, 3]: short side to `size`, a random part of the long one.

    Cropped in the same step, as `center_crop_square` does: a strip never becomes a giant.
    """
    side = min(image.size)
    left, top = (float(rng.random() * (n - side)) for n in image.size)
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def open_image(data: bytes | np.ndarray) -> Image.Image:
    """An encoded image, or uint8 [H, W, C], as upright RGB; ValueError if it is broken."""
    if isinstance(data, np.ndarray):
        if data.ndim != 3 or data.shape[-1] not in (1, 3, 4) or not data.size:
            raise ValueError(f"its image has shape {data.shape} instead of [H, W, 3]")
        return to_rgb(Image.fromarray(data[..., 0] if data.shape[-1] == 1 else data))
    if not data:
        raise ValueError("its image is empty")
    try:
        return decode(io.BytesIO(data))
    except UnidentifiedImageError as error:  # Its text is the address of a buffer.
        raise ValueError("its image cannot be read (no known format)") from error
    except MemoryError:
        raise  # no fault of the image
    except Exception as error:  # Decoders raise whatever they like at damaged data.
        raise ValueError(f"its image cannot be read ({error})") from error


def _messages(record: dict[str, Any], rng: np.random.Generator) -> list[Message]:
    """Turns of user and assistant, with the model's own placeholders for images.

    Without conversations: a question with its answer, or what the picture shows.
    """
    if "conversations" in record:
        turns = record["conversations"]
        messages = [_message(turn) for turn in (turns if isinstance(turns, list) else [turns])]
    elif "question" in record or "answer" in record:
        question = prompts.with_placeholders(_text(record, "question"))
        messages = [Message("User", question), Message("Assistant", _text(record, "answer"))]
    else:
        caption = _choose(record, rng)
        if not record.get("images"):
            raise ValueError("it has a caption, but no image")
        messages = [Message("User", CAPTION_QUESTION), Message("Assistant", caption)]
    roles = [message.role for message in messages]
    if not messages or roles != ["User", "Assistant"] * (len(messages) // 2):
        raise ValueError("its conversation is not made of pairs of a user's turn and a reply")
    if any(not message.content.strip() for message in messages):
        raise ValueError("a turn of its conversation is empty")
    if any(IMAGE_TAG in message.content for message in messages[1::2]):
        raise ValueError(f"a reply holds {prompts.LLAVA_TAG}")
    if not any(IMAGE_TAG in message.content for message in messages):
        first = prompts.user_question(messages[0].content, len(record.get("images", [])))
        messages[0] = Message("User", first)
    return messages


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"a turn of its conversation is {type(turn).__name__}, not an object")
    role, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(content, str) or not isinstance(role, str) or role not in _ROLES:
        raise ValueError("a turn of its conversation lacks from (human or gpt) or value (a text)")
    return Message(_ROLES[role], prompts.with_placeholders(content))


def _chat(
    messages: Sequence[Message], num_images: int, tokenizer: Tokenizer
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Tokens of the released template, and first and end of every reply with its EOS."""
    tokens, ends = prompts.understanding_tokens_with_ends(
        tokenizer, messages, num_images, DEFAULT_SYSTEM_PROMPT
    )
    spans = []
    for turn in range(1, len(messages), 2):
        # What inference reads before it replies must be what training saw there.
        asked = [*messages[:turn], Message("Assistant", "")]
        texts = [prompts.chat_text(m, DEFAULT_SYSTEM_PROMPT) for m in (asked, messages[: turn + 1])]
        span = np.searchsorted(ends, [len(text) for text in texts], side="right")
        if any(ends[n - 1] != len(text) for n, text in zip(span, texts, strict=True)):
            raise ValueError(prompts.JOINED)
        spans.append((int(span[0]), int(span[1])))
    return tokens, spans


def _check_length(num_tokens: int, fmt: Format) -> None:
    if num_tokens > fmt.max_seq_len:
        raise ValueError(f"it needs {num_tokens} tokens, more than max_seq_len {fmt.max_seq_len}")


def _text(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"it has no {name}, or an empty one")
    return value


def _choose(record: dict[str, Any], rng: np.random.Generator) -> str:
    """The caption; of several, a random one."""
    captions = record.get("caption")
    if isinstance(captions, list) and captions:
        record = {"caption": captions[int(rng.integers(len(captions)))]}
    return _text(record, "caption")
