"""Token ids against transformers 4.46.3, the chat template and its layout against the goldens.

The pinned ids came from LlamaTokenizerFast of transformers 4.46.3 with tokenizers 0.20.3 on
tests/golden/tiny: newer versions of it read the same files differently.
"""

import json

import numpy as np
import pytest

from jflow import prompts
from jflow.prompts import Message, Tokenizer
from tests.goldens import GOLDEN, REPO, golden

NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "processor_config.json",
)
TINY = {name: (REPO / "tests" / "golden" / "tiny" / name).read_text("utf-8") for name in NAMES}
SFT = json.loads((GOLDEN / "golden_sft.json").read_text("utf-8"))
FOX = "User: A cute baby fox.\n\nAssistant:"
FOX_IDS = [1, 375, 35, 443, 291, 478, 78, 314, 349, 98, 316, 88, 97, 23, 208, 208, 376, 35]
# fmt: off
PINNED = {
    "": [1],
    "Hello world": [1, 49, 282, 85, 88, 347, 318, 85, 77],
    " leading space": [1, 230, 276, 432, 357, 278, 89, 483, 78],
    "  two  spaces ": [1, 230, 295, 96, 88, 230, 278, 89, 483, 296, 230],
    "line\nnew\n\nend": [1, 85, 277, 78, 208, 87, 78, 96, 208, 208, 271, 77],
    "tab\tand\u00a0nbsp\r\n": [
        1, 93, 349, 207, 268, 77, 136, 264, 87, 75, 92, 89, 211, 208,
    ],
    "中文提示，带标点。": [
        1, 170, 126, 265, 172, 254, 239, 172, 247, 248, 173, 107, 128, 181, 130, 244, 171, 126,
        109, 172, 264, 239, 173, 234, 127, 169, 232, 234,
    ],
    "a 🦊 fox 👩\u200d🚀": [
        1, 74, 230, 182, 263, 109, 242, 316, 88, 97, 230, 182, 263, 249, 112, 168, 232, 245, 182,
        263, 258, 232,
    ],
    "12345 héllo ÀÉ": [
        1, 482, 28, 29, 30, 322, 137, 112, 85, 85, 88, 230, 137, 232, 137, 241,
    ],
    "<s>": [1, 37, 92, 39],
    "<unk>": [1, 512],
    "<|unused4|>z": [1, 4, 99],
    "<｜▁pad▁｜>": [1, 3],
    "<｜begin▁of▁sentence｜>x<｜end▁of▁sentence｜>y": [1, 1, 97, 2, 98],
    "a<image_placeholder>\nb <begin_of_image> c<end_of_image>": [
        1, 74, 500, 208, 75, 230, 501, 291, 502,
    ],
    "Hi! This is Tony.<｜end▁of▁sentence｜>User: Who are you?": [
        1, 49, 82, 10, 230, 61, 81, 269, 339, 230, 61, 272, 98, 23, 2, 375, 35, 230, 64, 81, 88,
        312, 230, 98, 297, 40,
    ],
    FOX: FOX_IDS,
    FOX + "<begin_of_image>": [*FOX_IDS, 501],
    FOX + "<｜begin▁of▁generation｜>": [*FOX_IDS, 503],
}
# fmt: on


def edited(**changes) -> dict[str, str]:
    """The tiny files with fields of some JSON files replaced; None as value removes the file."""
    files = dict(TINY)
    for name, change in changes.items():
        if change is None:
            del files[f"{name}.json"]
        else:
            files[f"{name}.json"] = json.dumps(json.loads(files[f"{name}.json"]) | change)
    return files


def without_tags(**changes) -> dict[str, str]:
    """The tiny files, with a vocabulary that ends at id 499: before all tags."""
    tokenizer = json.loads(TINY["tokenizer.json"])
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["id"] < 500]
    vocab = {text: i for text, i in tokenizer["model"]["vocab"].items() if i < 500}
    tokenizer["model"]["vocab"] = vocab
    special = {"additional_special_tokens": []} | changes.pop("special_tokens_map", {})
    files = edited(special_tokens_map=special, **changes)
    return files | {"tokenizer.json": json.dumps(tokenizer)}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_files(TINY)


# Tokenizer.


@pytest.mark.parametrize("text", PINNED)
def test_ids_of_transformers_4_46(tokenizer, text):
    assert tokenizer.encode(text) == PINNED[text]


def test_decoding_leaves_special_tokens_out(tokenizer):
    for text in ("  two  spaces ", "中文提示，带标点。", "a 🦊 fox 👩\u200d🚀", "line\n\n end"):
        assert tokenizer.decode(np.array([*tokenizer.encode(text), tokenizer.eos_id])) == text
    assert tokenizer.decode(tokenizer.encode("a<image_placeholder>\nb<end_of_image> c")) == "a\nb c"


def test_ids_by_name(tokenizer):
    ids = json.loads((REPO / "tests" / "golden" / "tiny" / "token_ids.json").read_text())
    found = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "pad": tokenizer.pad_id,
        "image": tokenizer.image_id,
        "boi": tokenizer.image_start_id,
        "eoi": tokenizer.image_end_id,
        "bog": tokenizer.image_gen_id,
    }
    assert found == {name: ids[name] for name in found}
    assert tokenizer.num_image_tokens == 16
    assert tokenizer.vocab_size == 513  # len(tokenizer) of 4.46.3: with its own <unk>


def test_bos_is_never_doubled_and_can_be_switched_off(tokenizer):
    post_processor = json.loads(TINY["tokenizer.json"])["post_processor"]
    assert post_processor["single"][0]["SpecialToken"]["id"] == "<｜begin▁of▁sentence｜>"
    assert tokenizer.encode("Hello").count(tokenizer.bos_id) == 1
    off = Tokenizer.from_files(edited(tokenizer_config={"add_bos_token": False}))
    assert off.encode("Hello") == tokenizer.encode("Hello")[1:]


def test_truncation_and_padding_of_the_file_are_ignored(tokenizer):
    truncation = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    padding = {
        "strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 3,
        "pad_type_id": 0, "pad_token": "<｜▁pad▁｜>",
    }  # fmt: skip
    files = edited(tokenizer={"truncation": truncation, "padding": padding})
    assert Tokenizer.from_files(files).encode(FOX) == FOX_IDS


def test_special_tokens_as_objects(tokenizer):
    flags = {"lstrip": False, "rstrip": False, "normalized": True, "single_word": False}
    tokens = {
        name: {"__type": "AddedToken", "content": json.loads(TINY["tokenizer_config.json"])[name]}
        | flags
        for name in ("bos_token", "eos_token")
    }
    files = edited(tokenizer_config=tokens, special_tokens_map=tokens)
    other = Tokenizer.from_files(files)
    assert (other.bos_id, other.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert other.encode(FOX) == FOX_IDS


def tag_ids(tokenizer: Tokenizer) -> list[int]:
    t = tokenizer
    return [t.image_id, t.image_gen_id, t.image_start_id, t.image_end_id]


GEN_TAG = {"additional_special_tokens": ["<｜begin▁of▁generation｜>"]}
ADDED = {str(t["id"]): t for t in json.loads(TINY["tokenizer.json"])["added_tokens"]}
ADDED = {i: {k: v for k, v in t.items() if k != "id"} for i, t in ADDED.items() if int(i) < 500}
EXTRA = {"777": ADDED["4"] | {"content": "<extra>"}}


@pytest.mark.parametrize(
    "changes, want",
    [
        ({}, [501, 502, 503, 504]),
        ({"tokenizer_config": {"unk_token": None}}, [500, 501, 502, 503]),
        ({"special_tokens_map": GEN_TAG}, [502, 501, 503, 504]),
        # With this field, the older transformers did not open special_tokens_map.json.
        (
            {"tokenizer_config": {"added_tokens_decoder": ADDED}, "special_tokens_map": GEN_TAG},
            [501, 502, 503, 504],
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": ADDED | EXTRA}},
            [502, 503, 504, 505],
        ),
    ],
    ids=["default", "no unk", "tag in map", "declared", "declared extra"],
)
def test_missing_tags_are_numbered_as_transformers_4_46_did(changes, want):
    tokenizer = Tokenizer.from_files(without_tags(**changes))
    assert tag_ids(tokenizer) == want
    assert tokenizer.encode("a<image_placeholder>b") == [1, 74, want[0], 75]


def test_tags_are_taken_from_processor_config():
    tags = {"image_start_tag": "<image_beg>", "num_image_tokens": 9}
    tokenizer = Tokenizer.from_files(edited(processor_config=tags))
    assert tag_ids(tokenizer) == [500, 503, 513, 502]
    assert tokenizer.num_image_tokens == 9


def test_released_defaults_without_the_optional_files(tokenizer):
    bare = Tokenizer.from_files({"tokenizer.json": TINY["tokenizer.json"]})
    assert tag_ids(bare) == tag_ids(tokenizer)
    assert (bare.bos_id, bare.eos_id, bare.pad_id) == (1, 2, 3)
    assert bare.num_image_tokens == 576
    assert bare.encode(FOX) == FOX_IDS


def test_pad_is_eos_where_the_vocabulary_has_none():
    files = dict(TINY) | {
        "tokenizer.json": TINY["tokenizer.json"].replace("<｜▁pad▁｜>", "<other>")
    }
    files["special_tokens_map.json"] = files["tokenizer_config.json"] = "{}"
    tokenizer = Tokenizer.from_files(files)
    assert tokenizer.pad_id == tokenizer.eos_id == 2


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "no tokenizer.json"),
        ({"tokenizer.json": "{}"}, "tokenizer.json cannot be read"),
        (TINY | {"processor_config.json": "{"}, "processor_config.json is not valid JSON"),
        (edited(special_tokens_map={"bos_token": "<none>"}), "'<none>'"),
        (edited(processor_config={"sft_format": "plain"}), "sft_format 'plain', but the only"),
    ],
)
def test_broken_files_are_named(files, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_files(files)


# Chat template.


@pytest.mark.parametrize("case", SFT["cases"], ids=lambda case: case["output"][-40:])
def test_chat_template(case):
    messages = [Message(**message) for message in case["conversation"]]
    assert case["sft_format"] in prompts.SFT_FORMATS
    assert prompts.chat_text(messages, case["system_prompt"]) == case["output"]


def test_default_system_prompt():
    assert SFT["default_system_prompt"] == prompts.DEFAULT_SYSTEM_PROMPT


@pytest.mark.parametrize("name", ["deepseek", "deepseek_old"])
def test_trap_10_the_old_template_whatever_the_processor_file_calls_it(name):
    tokenizer = Tokenizer.from_files(edited(processor_config={"sft_format": name}))
    assert prompts.generation_tokens(tokenizer, "A cute baby fox.").tolist() == FOX_IDS
    turns = [Message("User", "Hello!"), Message("Assistant", "Hi."), Message("User", "Who?")]
    text = "User: Hello!\n\nAssistant: Hi.<｜end▁of▁sentence｜>User: Who?"
    assert prompts.chat_text(turns, "") == text
    ids = prompts.understanding_tokens(tokenizer, turns, 0, system_prompt="")
    assert ids.tolist() == tokenizer.encode(text)


# Layouts.


def test_trap_2_both_published_tags_give_one_prefix(tokenizer):
    tokens = prompts.generation_tokens(tokenizer, "A cute baby fox.")
    assert tokens.dtype == np.int32
    for name, tag in (("demo", tokenizer.image_start_id), ("readme", tokenizer.image_gen_id)):
        # Holds only while the tag is a single token, since one token is cut off.
        ids = tokenizer.encode(SFT[f"t2i_prompt_{name}"])
        assert ids[-1] == tag
        np.testing.assert_array_equal(tokens, ids[:-1])


def test_image_layout_is_the_released_one(tokenizer):
    """[begin][N placeholders][end]; begin and placeholders are the slots, as in golden batches."""
    und = golden("golden_tiny_und")
    ids, mask = und["in.A.input_ids"], und["in.A.images_seq_mask"].astype(bool)
    files = {name: (GOLDEN / "tiny" / name).read_text("utf-8") for name in NAMES}
    tokenizer = Tokenizer.from_files(files)
    messages = [Message("User", prompts.user_question("What?", 1)), Message("Assistant", "")]
    tokens = prompts.understanding_tokens(tokenizer, messages, 1)
    slots = prompts.image_slots(tokens, tokenizer)
    assert slots.shape == (1, tokenizer.num_image_tokens + 1)
    for row, row_mask in zip(ids, mask, strict=True):
        (want,) = prompts.image_slots(row, tokenizer)
        np.testing.assert_array_equal(want, np.flatnonzero(row_mask))
        image = slice(want[0], want[-1] + 2)
        np.testing.assert_array_equal(tokens[slots[0, 0] : slots[0, -1] + 2], row[image])


def test_another_image_tag_means_the_same():
    """Our texts say <image_placeholder>, as the released ones do, whatever a tokenizer calls it."""
    files = {name: (GOLDEN / "tiny" / name).read_text("utf-8") for name in NAMES}
    processor = json.loads(files["processor_config.json"])
    renamed = Tokenizer.from_files(
        {name: text.replace(processor["image_tag"], "<picture>") for name, text in files.items()}
    )
    messages = [Message("User", prompts.user_question("What?", 2)), Message("Assistant", "")]
    released = Tokenizer.from_files(files)
    want = prompts.understanding_tokens(released, messages, 2)
    np.testing.assert_array_equal(prompts.understanding_tokens(renamed, messages, 2), want)
    assert renamed.vocab_size == released.vocab_size and renamed.image_tag == "<picture>"


def test_a_question_may_say_where_its_images_stand():
    """In the words of LLaVA's files, as training reads them."""
    asked = prompts.user_question("Is <image> older than <image>?", 2)
    assert asked == "Is <image_placeholder> older than <image_placeholder>?"


@pytest.mark.parametrize("num_images", [0, 1, 2, 3])
def test_understanding_tokens(tokenizer, num_images):
    n = tokenizer.num_image_tokens
    question = prompts.user_question("Which is brighter?", num_images)
    assert question == "<image_placeholder>\n" * num_images + "Which is brighter?"
    messages = [Message("User", question), Message("Assistant", "")]
    tokens = prompts.understanding_tokens(tokenizer, messages, num_images)
    assert tokens.dtype == np.int32 and tokens[0] == tokenizer.bos_id
    image = [tokenizer.image_start_id, *[tokenizer.image_id] * n, tokenizer.image_end_id]
    plain = []
    for i in tokenizer.encode(prompts.chat_text(messages, prompts.DEFAULT_SYSTEM_PROMPT)):
        plain += image if i == tokenizer.image_id else [i]
    assert tokens.tolist() == plain
    slots = prompts.image_slots(tokens, tokenizer)
    assert slots.shape == (num_images, n + 1)
    for row in slots:
        assert tokens[row].tolist() == image[:-1]
        assert tokens[row[-1] + 1] == tokenizer.image_end_id
    assert len(np.unique(slots)) == slots.size


def test_a_begin_tag_that_the_user_wrote_is_no_slot(tokenizer):
    question = "<begin_of_image> <image_placeholder>?"
    tokens = prompts.understanding_tokens(tokenizer, [Message("User", question)], 1)
    (slots,) = prompts.image_slots(tokens, tokenizer)
    assert slots[0] == np.flatnonzero(tokens == tokenizer.image_start_id)[1]


def test_placeholders_of_the_question_are_kept():
    question = "<image_placeholder> is Figure 1.\n<image_placeholder> is Figure 2."
    assert prompts.user_question(question, 2) == question


@pytest.mark.parametrize("written, given", [(0, 1), (2, 1), (1, 0)])
def test_placeholders_must_match_the_images(tokenizer, written, given):
    messages = [Message("User", "<image_placeholder>" * written + "What?")]
    wrong = f"{written} <image_placeholder> but {given} images .* or <image>, for each image"
    with pytest.raises(ValueError, match=wrong):
        prompts.understanding_tokens(tokenizer, messages, given)


@pytest.mark.parametrize("text", ["", " \n"])
def test_empty_texts_are_refused(tokenizer, text):
    with pytest.raises(ValueError, match="prompt is empty"):
        prompts.generation_tokens(tokenizer, text)
    with pytest.raises(ValueError, match="prompt is empty"):
        prompts.require_prompt(text)
    with pytest.raises(ValueError, match="question is empty"):
        prompts.user_question(text, 1)
    turns = [Message("User", "What?"), Message("Assistant", ""), Message("User", text)]
    prompts.understanding_tokens(tokenizer, turns[:2], 0)
    with pytest.raises(ValueError, match="question is empty"):
        prompts.understanding_tokens(tokenizer, turns, 0)


def test_check_length():
    prompts.check_length(16, 16, "prompt and image")
    with pytest.raises(ValueError, match="prompt and image need 17 tokens.* 16 positions"):
        prompts.check_length(17, 16, "prompt and image")
