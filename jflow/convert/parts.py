"""A language model and a SigLIP become the beginning of a JanusFlow (stage 1, section 3.4).

What is joined here: their configs, the tokenizer with JanusFlow's special tokens, a vocabulary with
room for them, and fresh parameters for all that neither of them has.
"""

import json
from collections.abc import Mapping
from dataclasses import replace

import jax
import numpy as np
import tokenizers

from jflow.convert.engine import Tensor
from jflow.images import ImageProcessor
from jflow.models.janusflow import JanusFlow, JanusFlowConfig, init_params
from jflow.models.llama import LlamaConfig
from jflow.models.siglip import SiglipConfig
from jflow.models.uvit import GenDecoderConfig, GenEncoderConfig
from jflow.prompts import BOS, EOS, PAD, TAGS

LANGUAGE, SIGLIP = "language_model", "vision_und_enc_model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def join_configs(
    language: LlamaConfig, siglip: SiglipConfig, wanted: JanusFlowConfig | None, vocab_size: int
) -> JanusFlowConfig:
    """The model around the two parts.

    Args:
      wanted: the whole model, to agree with the parts in all but the vocabulary's size and the
        number of positions; None for the released generation encoder and decoder (config.json of
        JanusFlow-1.3B) at the language model's width.
      vocab_size: of the tokenizer with all its tokens.

    Raises ValueError in one sentence for parts that do not fit.
    """
    rows = max(vocab_size, language.vocab_size)
    if wanted is None:
        hidden = language.hidden_size
        encoder = GenEncoderConfig(
            input_channels=4, kernel_size=2, stride=2, padding=0, hidden_size=hidden
        )
        decoder = GenDecoderConfig(out_channels=4, upsamples=1, hidden_size=hidden)
        return JanusFlowConfig(replace(language, vocab_size=rows), siglip, encoder, decoder)
    if wanted.language.vocab_size < rows:
        raise ValueError(
            f"The config's vocabulary has {wanted.language.vocab_size} tokens, but the language "
            f"model has {language.vocab_size} and its tokenizer, with JanusFlow's special tokens, "
            f"{vocab_size}: raise language_config.vocab_size."
        )
    pairs = [
        (f"language_config.{name}", getattr(wanted.language, name), getattr(language, name))
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads", "kv_heads", "head_width", "rms_norm_eps", "rope_theta")
    ] + [
        (f"SigLIP's {name}", getattr(wanted.siglip, name), getattr(siglip, name))
        for name in ("image_size", "patch_size", "width", "layers", "heads", "mlp_width")
    ]  # fmt: skip
    wrong = [f"{name} is {there}, the part's is {ours}" for name, there, ours in pairs
             if there != ours]  # fmt: skip
    if wrong:
        raise ValueError(f"The config does not fit the parts: {'; '.join(wrong)}.")
    return wanted


def language_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All but the rotary frequencies that older files carry: they follow from rope_theta."""
    return {
        key: tensor for key, tensor in tensors.items() if not key.endswith("rotary_emb.inv_freq")
    }


def tokenizer_files(files: Mapping[str, str], siglip: SiglipConfig) -> dict[str, str]:
    """The tokenizer of a DeepSeek-LLM with JanusFlow's special tokens, and its processors' files.

    Tokens that it lacks are appended to tokenizer.json behind all others: padding, then the tags.

    Args:
      files: TOKENIZER_FILES of the language model, by name; the last two may be absent.

    Raises ValueError in one sentence for what is no such tokenizer.
    """
    if "tokenizer.json" not in files:
        raise ValueError("There is no tokenizer.json beside the language model: copy it there.")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"The language model's tokenizer.json is damaged: {error}.") from error
    # The chat template ends a reply with this very token.
    for token in (BOS, EOS):
        if tokenizer.token_to_id(token) is None:
            raise ValueError(
                f"The language model's tokenizer has no {token}, which JanusFlow's template is "
                f"made of: take a DeepSeek-LLM."
            )
    added = [PAD, *TAGS.values()]
    missing = [token for token in added if tokenizer.token_to_id(token) is None]
    tokenizer.add_special_tokens(missing)
    config, special = (json.loads(files.get(name, "{}")) for name in TOKENIZER_FILES[1:])
    # Its list of tokens would lack ours; tokenizer.json has them all.
    config.pop("added_tokens_decoder", None)
    special |= {"pad_token": PAD, "additional_special_tokens": list(TAGS.values())}
    processor = TAGS | {
        "add_special_token": False,
        "ignore_id": -100,
        "mask_prompt": True,
        "num_image_tokens": siglip.num_tokens,
        "processor_class": "VLChatProcessor",
        "sft_format": "deepseek",
    }
    values = ImageProcessor(image_size=siglip.image_size)
    image = vars(values) | {
        "background_color": [int(255 * mean) for mean in values.image_mean],
        "image_processor_type": "VLMImageProcessor",
        "processor_class": "VLChatProcessor",
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": _text(config | {"pad_token": PAD}),
        "special_tokens_map.json": _text(special),
        "processor_config.json": _text(processor),
        "preprocessor_config.json": _text(image),
    }


def _text(data: dict) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False)


def enlarge(language: dict, vocab_size: int) -> dict:
    """Rows for new tokens, in the word embedding and the output matrix, behind the existing ones.

    Each is the mean of the existing ones. A new word then lies where the words do, so a frozen
    model is not thrown off by it, and its logit is the mean of the others' logits, so the
    probability it takes from them is about 1 / vocab_size; random rows may take most of it.

    Args:
      language: parameters of a Llama, {"embed_tokens": [V, D], "lm_head": {"kernel": [D, V]}, ...};
        all others may stay Later.
    """

    def extend(array, axis):
        new = vocab_size - array.shape[axis]
        if not new:
            return array
        array = np.asarray(array)
        mean = array.mean(axis, dtype=np.float32, keepdims=True).astype(array.dtype)
        return np.concatenate([array, np.repeat(mean, new, axis)], axis)

    return language | {
        "embed_tokens": extend(language["embed_tokens"], 0),
        "lm_head": {"kernel": extend(language["lm_head"]["kernel"], 1)},
    }


def fresh_params(config: JanusFlowConfig) -> dict:
    """All parameters but the two parts', always the same ones, float32 numpy arrays."""

    def init():
        # What is left out here is never computed: it would be 6 GB at full size.
        params = init_params(JanusFlow(config), jax.random.key(0))
        return {name: part for name, part in params.items() if name not in (LANGUAGE, SIGLIP)}

    return jax.tree.map(np.asarray, jax.jit(init)())
