"""A tokenizer whose tokens are the words of the embedded datasets."""

import json
from collections.abc import Sequence

import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers

from jflow.prompts import BOS, DEFAULT_SYSTEM_PROMPT, EOS, PAD, TAGS

# "center" and "middle" are only in what SigLIP learns from.
_WORDS = """
, : ? . Generate How Is What Where Which a above an and are background below black blue bottom by
caption center circle circles color cross crosses digit drawing eight even five four green grey hand
handwritten image in is left many middle nine no number object objects odd of on one or orange over
photo picture purple red right seven shape six square squares the there this three to top triangle
triangles two under white written yellow yes zero 0 1 2 3 4 5 6 7 8 9
"""
_SPECIAL = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": "<unk>"}


def tokenizer_files(num_image_tokens: int, more: Sequence[str] = ()) -> dict[str, str]:
    """The files that `prompts.Tokenizer.from_files` reads.

    more: further words. What the chat template repeats is one token each: the system prompt and
    the names of the roles.
    """
    phrases = (DEFAULT_SYSTEM_PROMPT, "User:", "Assistant:")
    special = [*_SPECIAL.values(), *TAGS.values()]
    vocabulary = {word: i for i, word in enumerate([*special, *phrases, *_WORDS.split(), *more])}
    words = models.WordLevel(vocabulary, unk_token=_SPECIAL["unk_token"])
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": json.dumps(_SPECIAL | {"add_bos_token": True}),
        "processor_config.json": json.dumps(TAGS | {"num_image_tokens": num_image_tokens}),
    }
