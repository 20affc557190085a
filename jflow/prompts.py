"""What the model reads: tokenizer, chat template, token layout, for training and inference alike.

Sources: processing_vlm.py and conversation.py of the released code (paper section 3.3).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tokenizers

DEFAULT_SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
IMAGE_TAG = "<image_placeholder>"
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
# What the released processor calls each tag, in the order in which it adds those that are missing.
TAGS = {
    "image_tag": IMAGE_TAG,
    "image_gen_tag": "<｜begin▁of▁generation｜>",
    "image_start_tag": "<begin_of_image>",
    "image_end_tag": "<end_of_image>",
}
LLAVA_TAG = "<image>"  # what LLaVA's files, and people, write for it
# What processor_config.json calls the template of `chat_text`, depending on its date.
SFT_FORMATS = ("deepseek", "deepseek_old")
# "chat" is the released one; "pretrain" is the paper's for stages 1 and 2: captions and questions
# without roles, questions behind their images.
Template = Literal["chat", "pretrain"]
JOINED = "The tokenizer joins a question and its reply in one token: end it with a space or a mark."


@dataclass(frozen=True)
class Message:
    """One turn: role "User" or "Assistant"; an empty content leaves the turn open."""

    role: str
    content: str


# What transformers calls them, in the order in which it appends those that are missing.
_SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def _parse(files: Mapping[str, str], name: str) -> dict:
    try:
        return json.loads(files.get(name, "{}"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not valid JSON: {error}.") from error


def _special_tokens(config: dict, special_map: dict) -> dict:
    """Both files' special tokens; special_tokens_map.json counts unless the first declares all."""
    if "added_tokens_decoder" in config:
        return config
    name = "additional_special_tokens"
    both = [*(config.get(name) or []), *(special_map.get(name) or [])]
    return config | special_map | {name: both}


def _append_missing(tokenizer: tokenizers.Tokenizer, special: dict) -> None:
    """Appends the declared tokens that tokenizer.json lacks, numbered as transformers 4.46 did.

    That includes LlamaTokenizerFast's own default "<unk>", unless the files say there is none.
    """
    declared = special.get("added_tokens_decoder", {})
    tokens = [declared[number] for number in sorted(declared, key=int)]
    named = {"unk_token": "<unk>"} | special
    tokens += [{"content": _text(named.get(f"{name}_token"), "")} for name in _SPECIAL_TOKENS]
    tokens += [{"content": _text(t, "")} for t in special.get("additional_special_tokens") or []]
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for token in tokens:
        fields = {"special": True} | {k: v for k, v in token.items() if k != "__type"}
        if fields["content"] and fields["content"] not in known:
            tokenizer.add_tokens([tokenizers.AddedToken(**fields)])
            known.add(fields["content"])


def _text(token: str | dict | None, default: str) -> str:
    """Special tokens are stored as strings, or as objects with a `content`."""
    return (token["content"] if isinstance(token, dict) else token) or default


class Tokenizer:
    """The checkpoint's own BPE with the special tokens found by name.

    transformers 5 reads the released tokenizer files differently from the version that the model
    was released with; `tokenizers` alone reads them as that one did, and BOS is added here.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, special: dict, processor: dict, add_bos: bool
    ):
        self._tokenizer = tokenizer
        self._add_bos = add_bos
        # Before anything is appended: without embeddings, these two would be of no use.
        self.bos_id = self._id(_text(special.get("bos_token"), BOS))
        self.eos_id = self._id(_text(special.get("eos_token"), EOS))
        _append_missing(tokenizer, special)
        tags = {name: _text(processor.get(name), tag) for name, tag in TAGS.items()}
        for tag in tags.values():
            if tokenizer.token_to_id(tag) is None:
                tokenizer.add_special_tokens([tag])
        self.image_id = tokenizer.token_to_id(tags["image_tag"])
        self.image_gen_id = tokenizer.token_to_id(tags["image_gen_tag"])
        self.image_start_id = tokenizer.token_to_id(tags["image_start_tag"])
        self.image_end_id = tokenizer.token_to_id(tags["image_end_tag"])
        self.image_tag = tags["image_tag"]
        pad = tokenizer.token_to_id(PAD)
        self.pad_id = self.eos_id if pad is None else pad
        self.num_image_tokens = processor["num_image_tokens"]
        self.vocab_size = tokenizer.get_vocab_size()
        # Our texts have the released tag for an image, whatever this tokenizer calls it.
        tokenizer.add_special_tokens([IMAGE_TAG])
        self._released_image_id = tokenizer.token_to_id(IMAGE_TAG)

    @classmethod
    def from_files(cls, files: Mapping[str, str], num_image_tokens: int = 576) -> "Tokenizer":
        """Reads the text of tokenizer.json and, where there, of the files beside it.

        Args: num_image_tokens: where processor_config.json says nothing.

        Raises ValueError in one sentence if tokenizer.json is missing or is none, and for a chat
        template that is not `chat_text`'s.
        """
        if "tokenizer.json" not in files:
            raise ValueError(
                "The checkpoint holds no tokenizer.json: convert it again from a folder that does."
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(f"tokenizer.json cannot be read: {error}.") from error
        config = _parse(files, "tokenizer_config.json")
        special = _special_tokens(config, _parse(files, "special_tokens_map.json"))
        # Neither is for us: what is too long is refused, not cut.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        processor = {"num_image_tokens": num_image_tokens}
        processor |= _parse(files, "processor_config.json")
        template = processor.get("sft_format", SFT_FORMATS[0])
        if template not in SFT_FORMATS:
            raise ValueError(
                f"processor_config.json has the sft_format {template!r}, but the only chat "
                f"template here is JanusFlow's, {' or '.join(SFT_FORMATS)}."
            )
        return cls(tokenizer, special, processor, config.get("add_bos_token", True))

    def _id(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise ValueError(f"The tokenizer does not know its own special token {token!r}.")
        return found

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, BOS first; special tokens in the text become their single ids."""
        return self.encode_with_ends(text)[0]

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """`encode`, and behind which character of the text each token ends.

        Raises ValueError for half of a surrogate pair, which is no character.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            part = text[error.start : error.end]
            raise ValueError(f"The text holds {part!r}, which is no character.") from error
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids = [self.image_id if i == self._released_image_id else i for i in encoding.ids]
        ends = [end for _, end in encoding.offsets]
        return ([self.bos_id, *ids], [0, *ends]) if self._add_bos else (ids, ends)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


def chat_text(messages: Sequence[Message], system_prompt: str) -> str:
    """The released chat template: "User: ...\\n\\nAssistant: ...<end of sentence>".

    The separator alternates by the number of the turn, not by its role. The model knows only this
    template, whichever of SFT_FORMATS its files call it.
    """
    text = f"{system_prompt}\n\n" if system_prompt else ""
    for turn, message in enumerate(messages):
        content = message.content.strip()
        if content:
            text += f"{message.role}: {content}" + ("\n\n", EOS)[turn % 2]
        else:
            text += f"{message.role}:"
    return text.strip()


def with_placeholders(text: str) -> str:
    """The text with the model's own placeholder for each <image>."""
    return text.replace(LLAVA_TAG, IMAGE_TAG)


def _require_question(text: str) -> None:
    """Raises ValueError for an empty question."""
    if not text.strip():
        raise ValueError("The question is empty: write what you want to know.")


def require_prompt(text: str) -> None:
    """Raises ValueError for an empty prompt."""
    if not text.strip():
        raise ValueError("The prompt is empty: write what the image should show.")


def user_question(question: str, num_images: int) -> str:
    """The user's turn about images: their placeholders, a line each, unless it says where they go
    (<image> or the model's own).

    Raises ValueError for an empty question.
    """
    _require_question(question)
    question = with_placeholders(question)
    if IMAGE_TAG in question:
        return question
    return f"{IMAGE_TAG}\n" * num_images + question


def image_tokens(tokenizer: Tokenizer) -> list[int]:
    """What stands for an image in a row: [begin][N x image][end]."""
    placeholders = [tokenizer.image_id] * tokenizer.num_image_tokens
    return [tokenizer.image_start_id, *placeholders, tokenizer.image_end_id]


def understanding_tokens(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    num_images: int,
    system_prompt: str = DEFAULT_SYSTEM_PROMPT,
) -> np.ndarray:
    """[L] int32: BOS, the chat, each placeholder as [begin][N x image][end].

    What stands at begin and at the N image tokens is overwritten by the image's embeddings, see
    `image_slots`. Raises ValueError if a user's turn is empty, or if placeholders and images
    differ in number.
    """
    return understanding_tokens_with_ends(tokenizer, messages, num_images, system_prompt)[0]


def understanding_tokens_with_ends(
    tokenizer: Tokenizer, messages: Sequence[Message], num_images: int, system_prompt: str
) -> tuple[np.ndarray, np.ndarray]:
    """`understanding_tokens`, and [L] behind which character of `chat_text` each of them ends."""
    ids, ends = tokenizer.encode_with_ends(chat_text(messages, system_prompt))
    _check_questions(messages, ids.count(tokenizer.image_id), num_images, tokenizer.image_tag)
    image, found = image_tokens(tokenizer), []
    for token, end in zip(ids, ends, strict=True):
        found += [(t, end) for t in (image if token == tokenizer.image_id else [token])]
    tokens, ends = np.array(found, np.int32).T
    return tokens, ends


def _check_questions(messages: Sequence[Message], tags: int, num_images: int, tag: str) -> None:
    """Raises ValueError for an empty turn of the user, and for other placeholders than images."""
    for message in messages:
        if message.role == "User":
            _require_question(message.content)
    if tags != num_images:
        raise ValueError(
            f"The conversation has {tags} {tag} but {num_images} images came with it: write one, "
            f"or {LLAVA_TAG}, for each image."
        )


def image_slots(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """[L] understanding tokens -> [I, 1 + N] where each image's embeddings go."""
    places = np.flatnonzero(tokens == tokenizer.image_id).reshape(-1, tokenizer.num_image_tokens)
    return np.concatenate([places[:, :1] - 1, places], axis=1)


def generation_tokens(tokenizer: Tokenizer, prompt: str, template: Template = "chat") -> np.ndarray:
    """[P] int32: BOS and "User: prompt\\n\\nAssistant:", without system prompt.

    With template "pretrain" BOS and the prompt alone. The released samplers append a tag and cut it
    off again; the time token takes its place.
    Raises ValueError for an empty prompt.
    """
    require_prompt(prompt)
    text = prompt.strip()
    if template == "chat":
        text = chat_text([Message("User", prompt), Message("Assistant", "")], "")
    return np.array(tokenizer.encode(text), np.int32)


def plain_tokens(
    tokenizer: Tokenizer, messages: Sequence[Message], num_images: int
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """[L] int32 tokens of `<image><question><answer>` (supplement B): the template "pretrain".

    The images come first, then the texts with spaces between, EOS after each answer; nothing stands
    for an empty one. Gives also the first and the end of every answer with its EOS. Raises
    ValueError as `understanding_tokens`, and where a question and its answer meet in one token.
    """
    tags = sum(message.content.count(IMAGE_TAG) for message in messages)
    _check_questions(messages, tags, num_images, IMAGE_TAG)
    bos = tokenizer.encode("")
    tokens, spans = [*bos, *image_tokens(tokenizer) * num_images], []
    for user, assistant in zip(messages[::2], messages[1::2], strict=True):
        question, reply = user.content.replace(IMAGE_TAG, "").strip(), assistant.content.strip()
        asked = tokenizer.encode(question)
        answered = [*tokenizer.encode(f"{question} {reply}"), tokenizer.eos_id] if reply else asked
        # What inference reads before it replies must be what training saw there.
        if asked != answered[: len(asked)]:
            raise ValueError(JOINED)
        start = len(tokens) + len(asked) - len(bos)
        tokens += answered[len(bos) :]
        spans.append((start, len(tokens)))
    return np.array(tokens, np.int32), spans


def trained_template(train: Mapping[str, Any] | None) -> Template:
    """What a run's pictures came with, from its config as checkpoints hold it ("train"); where
    there is none, the released one."""
    sources = train["data"]["sources"] if train else []
    found = {source["template"] for source in sources if source["task"] != "text"}
    return "pretrain" if found == {"pretrain"} else "chat"


def check_length(num_tokens: int, limit: int, what: str) -> None:
    """Raises ValueError if `what` needs more than the model's positions."""
    if num_tokens > limit:
        raise ValueError(
            f"The {what} need {num_tokens} tokens, but the model has {limit} positions: shorten "
            f"the text."
        )
