"""What training sees of a record, checked by decoding it and against what inference builds."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from jflow import prompts
from jflow.data import examples
from jflow.data.examples import Format, generation_example, text_example, understanding_example
from jflow.images import ImageProcessor, center_crop_square, from_uint8
from jflow.prompts import IMAGE_TAG, Message, Tokenizer, user_question
from tests.goldens import REPO

FILES = {p.name: p.read_text("utf-8") for p in (REPO / "tests/golden/tiny").glob("*.json")}
TOKENIZER = Tokenizer.from_files(FILES)
PROCESSOR = ImageProcessor.from_files(FILES)
N = TOKENIZER.num_image_tokens
CHAT = Format(TOKENIZER, PROCESSOR, image_size=32, latent_tokens=4, max_seq_len=2048)
PLAIN = Format(TOKENIZER, PROCESSOR, 32, 4, max_seq_len=2048, template="pretrain")


def encoded(size=(40, 24), seed=0, kind="PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def turns(*texts) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def replies(example) -> list[str]:
    """The labelled spans, decoded; each must end with EOS."""
    spans, current = [], []
    for i, target in enumerate(example.targets):
        if target < 0:
            continue
        assert target == example.tokens[i + 1]
        current.append(target)
        if target == TOKENIZER.eos_id:
            spans.append(TOKENIZER.decode(current))
            current = []
    assert not current
    return spans


# Understanding.


@pytest.mark.parametrize(
    "texts",
    [
        ("<image>\nWhat is this?", "A fox."),
        ("What is this?", "(It is) a fox: 'quick'!", "Sure?", "Yes,\n\nI am.  "),
        ("Look: <image>\n是什么？", "狐狸 🦊", "and\tnow", "...", "third", "3"),
    ],
)
def test_targets_are_the_replies_and_prompts_are_those_of_inference(texts):
    record = {"images": [encoded()], "conversations": turns(*texts)}
    example = understanding_example(record, CHAT, 0)
    assert replies(example) == [f" {text.strip()}" for text in texts[1::2]]
    labelled = np.flatnonzero(example.targets >= 0)
    first = prompts.user_question(texts[0].replace("<image>", IMAGE_TAG), 1)
    said = [first, *texts[1:]]
    for turn in range(1, len(texts), 2):
        messages = [Message(("User", "Assistant")[i % 2], t) for i, t in enumerate(said[:turn])]
        asked = prompts.understanding_tokens(TOKENIZER, [*messages, Message("Assistant", "")], 1)
        np.testing.assert_array_equal(example.tokens[: len(asked)], asked)
        # The last token of the prompt predicts the first of the reply.
        assert len(asked) - 1 in labelled and len(asked) - 2 not in labelled
    assert example.tokens[-1] == TOKENIZER.eos_id


def test_images_and_slots():
    images = [encoded(seed=1), encoded((24, 40), seed=2)]
    record = {"images": images, "conversations": turns("<image>one, <image>two", "differ")}
    example = understanding_example(record, CHAT, 0)
    assert example.slots.shape == (2, 1 + N) and example.pixels.shape == (2, 64, 64, 3)
    for image, slots, pixels in zip(images, example.slots, example.pixels, strict=True):
        ids = example.tokens[slots]
        assert ids[0] == TOKENIZER.image_start_id and (ids[1:] == TOKENIZER.image_id).all()
        assert example.tokens[slots[-1] + 1] == TOKENIZER.image_end_id
        assert (example.targets[slots] == -1).all()
        opened = Image.open(io.BytesIO(image))
        np.testing.assert_array_equal(pixels, PROCESSOR.preprocess(opened))


def test_captions_and_questions_as_understanding():
    image = [encoded()]
    asked = understanding_example(
        {"images": image, "question": "How many?", "answer": "2"}, CHAT, 0
    )
    assert replies(asked) == [" 2"]
    caption = understanding_example({"images": image, "caption": "a red fox"}, CHAT, 0)
    assert replies(caption) == [" a red fox"]
    text = TOKENIZER.decode(caption.tokens)
    assert text.endswith("User: \nGenerate the caption of this picture.\n\nAssistant: a red fox")


def test_plain_format_of_pretraining():
    record = {
        "images": [encoded()],
        "conversations": turns("<image>\nWhat?", "This.", "So?", "Yes"),
    }
    example = understanding_example(record, PLAIN, 0)
    assert replies(example) == [" This.", " Yes"]
    np.testing.assert_array_equal(example.slots[0], np.arange(1, 2 + N))
    assert TOKENIZER.decode(example.tokens) == "What? This.So? Yes"
    assert example.tokens[0] == TOKENIZER.bos_id
    kept = replace(PLAIN, drop_prompt=0)
    prompt = generation_example({"images": [encoded()], "caption": " a fox "}, kept, 0).tokens
    assert TOKENIZER.decode(prompt) == "a fox"
    assert list(prompt).count(TOKENIZER.bos_id) == 1


@pytest.mark.parametrize("fmt", [CHAT, PLAIN])
@pytest.mark.parametrize(
    "count, question", [(0, "<image>\nWhat?"), (2, "<image>\nWhat?"), (1, "<image><image>What?")]
)
def test_other_placeholders_than_images_are_refused(fmt, count, question):
    record = {"images": [encoded()] * count, "conversations": turns(question, "This.")}
    with pytest.raises(ValueError, match=f"but {count} images came with it"):
        understanding_example(record, fmt, 0)


@pytest.mark.parametrize("fmt", [CHAT, PLAIN])
def test_inference_reads_what_training_saw(fmt, tiny):
    """Up to the reply, and up to the latents; the template is the one of the run's pictures."""
    sources = [{"task": "text", "template": "chat"}]
    sources += [
        {"task": task, "template": fmt.template} for task in ("generation", "understanding")
    ]
    template = prompts.trained_template({"data": {"sources": sources}})
    pipeline = replace(tiny, tokenizer=TOKENIZER, template=template)
    record = {"images": [encoded()], "question": "<image>\nHow many?", "answer": "Two"}
    example = understanding_example(record, fmt, 0)
    messages = Message("User", user_question("How many?", 1)), Message("Assistant", "")
    asked = pipeline.question_tokens(messages, 1)
    first = np.flatnonzero(example.targets >= 0)[0]
    np.testing.assert_array_equal(asked, example.tokens[: first + 1])
    kept = replace(fmt, drop_prompt=0)
    example = generation_example({"images": [encoded()], "caption": " a fox "}, kept, 0)
    prompt = prompts.generation_tokens(TOKENIZER, "a fox", pipeline.template)
    np.testing.assert_array_equal(prompt, example.tokens[: len(prompt)])
    assert len(prompt) + 1 + fmt.latent_tokens == len(example.tokens)
    assert prompts.trained_template(None) == "chat"


def test_a_caption_is_chosen_by_sample():
    record = {"images": [encoded()], "caption": ["one", "two", "three"]}
    chosen = [replies(understanding_example(record, CHAT, i))[0].strip() for i in range(90)]
    assert min(chosen.count(text) for text in record["caption"]) > 15
    again = [replies(understanding_example(record, CHAT, i))[0].strip() for i in range(10)]
    assert again == chosen[:10]


# Text.


def test_every_token_of_a_document_is_a_target():
    example = text_example({"text": "Once upon a time."}, CHAT, 0)
    expected = [*TOKENIZER.encode("Once upon a time."), TOKENIZER.eos_id]
    assert example.tokens.tolist() == expected
    assert example.targets.tolist() == [*expected[1:], -1]
    assert example.pixels.shape == (0, 64, 64, 3) and example.slots.shape == (0, 1 + N)


def test_text_conversations_have_targets_on_replies_only():
    example = text_example({"conversations": turns("Hi", "Hello")}, CHAT, 0)
    assert replies(example) == [" Hello"] and example.slots.shape == (0, 1 + N)


def test_pieces_of_long_documents():
    short = Format(TOKENIZER, PROCESSOR, 32, 4, max_seq_len=16)
    text = " ".join(map(str, range(100)))
    whole = text_example({"text": text}, CHAT, 0).tokens
    starts = set()
    for i in range(20):
        piece = text_example({"text": text}, short, i).tokens
        assert len(piece) == 16
        windows = np.lib.stride_tricks.sliding_window_view(whole, 16)
        starts.add(int(np.flatnonzero((windows == piece).all(1))[0]))
    assert len(starts) > 10


# Generation.


def test_a_prompt_its_time_token_and_its_latents():
    record = {"images": [encoded()], "caption": "A cute baby fox."}
    example = generation_example(record, CHAT, 3)
    prompt = prompts.generation_tokens(TOKENIZER, "A cute baby fox.")
    np.testing.assert_array_equal(example.tokens[: len(prompt)], prompt)
    assert len(example.tokens) == len(prompt) + 1 + 4
    np.testing.assert_array_equal(example.slots, [len(prompt) + np.arange(5)])
    assert (example.targets == -1).all()


def test_a_tenth_of_the_prompts_is_left_out_but_for_bos():
    record = {"images": [encoded((8, 8))], "caption": "fox"}
    prompt = prompts.generation_tokens(TOKENIZER, "fox")
    behind = len(prompt) + np.arange(5)
    dropped = 0
    for i in range(2000):
        example = generation_example(record, CHAT, i)
        before = np.arange(len(prompt))
        if len(example.tokens) == 6:
            dropped, before = dropped + 1, [0]
        np.testing.assert_array_equal(example.tokens[:-5], prompt[before])
        np.testing.assert_array_equal(example.positions, [*before, *behind])
        np.testing.assert_array_equal(example.slots, [len(before) + np.arange(5)])
    assert 150 < dropped < 250  # 200 +- 3.7 standard deviations


def test_random_crops_lie_along_the_long_side():
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (16, 64, 3))
    left = [
        int(
            examples.random_crop_square(Image.fromarray(ramp), 16, np.random.default_rng(i))[
                8, 0, 0
            ]
        )
        for i in range(200)
    ]
    assert min(left) < 12 and max(left) > 180 and len(set(left)) > 60
    upright = Image.fromarray(np.swapaxes(ramp, 0, 1))
    crop = examples.random_crop_square(upright, 8, np.random.default_rng(0))
    assert crop.shape == (8, 8, 3) and (np.ptp(crop, axis=1) == 0).all()


def test_crops_of_squares_are_those_of_inference():
    image = Image.open(io.BytesIO(encoded((48, 48))))
    crop = examples.random_crop_square(image, 32, np.random.default_rng(0))
    np.testing.assert_array_equal(crop, center_crop_square(image, 32))
    same = generation_example({"images": [encoded((32, 32))], "caption": "x"}, CHAT, 0)
    exact = np.asarray(Image.open(io.BytesIO(encoded((32, 32)))))
    np.testing.assert_array_equal(same.pixels[0], from_uint8(exact))


def test_a_strip_costs_no_memory():
    image = encoded((4000, 1), kind="PNG")
    assert generation_example({"images": [image], "caption": "x"}, CHAT, 0).pixels.shape[1] == 32


def test_randomness_is_that_of_the_sample():
    record = {"images": [encoded((64, 16))], "caption": ["a", "b"]}
    first, again = (generation_example(record, CHAT, 5) for _ in range(2))
    np.testing.assert_array_equal(first.pixels, again.pixels)
    other = generation_example(record, CHAT, 6)
    assert not np.array_equal(first.pixels, other.pixels)
    reseeded = Format(TOKENIZER, PROCESSOR, 32, 4, max_seq_len=2048, seed=1)
    assert not np.array_equal(first.pixels, generation_example(record, reseeded, 5).pixels)


# Images.


def test_decoded_images_pass():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    np.testing.assert_array_equal(np.asarray(examples.open_image(pixels)), pixels)
    grey = np.asarray(examples.open_image(pixels[..., :1]))
    np.testing.assert_array_equal(grey, np.repeat(pixels[..., :1], 3, -1))


def test_photographs_are_turned_upright():
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(out, "JPEG", exif=exif)
    assert examples.open_image(out.getvalue()).size == (10, 20)


# What cannot be used.

BROKEN_IMAGES = {
    "empty": b"",
    "not an image": b"hello",
    "truncated": encoded()[:-900],
    "truncated jpeg": encoded(kind="JPEG")[:300],
}


@pytest.mark.parametrize("name", BROKEN_IMAGES)
def test_broken_images(name):
    record = {"images": [BROKEN_IMAGES[name]], "caption": "a fox"}
    for make in (understanding_example, generation_example):
        with pytest.raises(ValueError, match="its image (is empty|cannot be read)"):
            make(record, CHAT, 0)


def test_arrays_that_are_no_image():
    for shape in ((4, 4), (4, 4, 2), (0, 4, 3)):
        with pytest.raises(ValueError, match="instead of"):
            examples.open_image(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("caption", [None, "", " \n", [], [""], 7, [3]])
def test_missing_captions(caption):
    record = {"images": [encoded()], "caption": caption}
    for make in (understanding_example, generation_example):
        with pytest.raises(ValueError, match="it has no caption, or an empty one"):
            make(record, CHAT, 0)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"conversations": turns("<image>a")}, "not made of pairs"),
        ({"conversations": []}, "not made of pairs"),
        ({"conversations": turns("a", "b")[::-1]}, "not made of pairs"),
        ({"conversations": turns("<image>a", " ")}, "a turn of its conversation is empty"),
        ({"conversations": turns("a", "<image>")}, "a reply holds <image>"),
        ({"conversations": turns("<image><image>a", "b")}, "has 2 .* but 1 images came"),
        ({"conversations": "hello"}, "is str, not an object"),
        ({"conversations": [{"from": "cat", "value": "meow"}]}, "lacks from .* or value"),
        ({"conversations": [{"from": ["human"], "value": "a"}]}, "lacks from .* or value"),
        ({"conversations": [{"from": "human", "value": 3}]}, "lacks from .* or value"),
        ({"question": "a?"}, "it has no answer"),
        ({"answer": "a"}, "it has no question"),
        ({"caption": "word " * 3000}, "tokens, more than max_seq_len 2048"),
    ],
)
def test_records_that_cannot_be_understood(change, reason):
    with pytest.raises(ValueError, match=reason):
        understanding_example({"images": [encoded()]} | change, CHAT, 0)


def test_a_caption_needs_its_picture():
    """Text alone would teach to describe what is not seen."""
    for record in ({"caption": "a cat"}, {"caption": "a cat", "images": []}):
        with pytest.raises(ValueError, match="it has a caption, but no image"):
            understanding_example(record, CHAT, 0)


def test_records_that_cannot_be_generated():
    for images in ([], [encoded()] * 2):
        with pytest.raises(ValueError, match="images where one is to be generated"):
            generation_example({"images": images, "caption": "a"}, CHAT, 0)
    with pytest.raises(ValueError, match="tokens, more than max_seq_len 2048"):
        generation_example({"images": [encoded()], "caption": "word " * 3000}, CHAT, 0)
    with pytest.raises(ValueError, match="it has no text"):
        text_example({"text": ""}, CHAT, 0)
