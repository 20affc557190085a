"""Where each parameter of transformers' SiglipVisionModel lies in jflow's (see engine.Rule).

transformers keeps queries, keys and values of a block apart and those of the pooling head together;
the released JanusFlow has it the other way round. So the rules lead to a tree of our own names with
transformers' parts, and `fuse` makes ours of it.
"""

import re

import numpy as np

from jflow.convert.engine import Rule, Tensor, linear_rules, norm_rules
from jflow.models.siglip import SiglipConfig

_BLOCK = "encoder.layers.{l}"
# The text tower and what belongs to both towers' loss; position_ids is a buffer of older files.
_NOT_VISION = re.compile(
    r"text_model\.|logit_scale|logit_bias|(vision_model\.)?embeddings\.position_ids"
)


# From keys without their "vision_model.".
HF_SIGLIP_RULES = (
    Rule("embeddings.position_embedding.weight", "pos_embed", "n c -> 1 n c"),
    Rule("embeddings.patch_embedding.weight", "patch_embed_kernel", "o i h w -> h w i o"),
    Rule("embeddings.patch_embedding.bias", "patch_embed_bias", "c -> c"),
    *norm_rules(f"{_BLOCK}.layer_norm1", "blocks/norm1"),
    *(
        rule
        for name in "qkv"
        for rule in linear_rules(f"{_BLOCK}.self_attn.{name}_proj", f"blocks/attn/{name}")
    ),
    *linear_rules(f"{_BLOCK}.self_attn.out_proj", "blocks/attn/proj"),
    *norm_rules(f"{_BLOCK}.layer_norm2", "blocks/norm2"),
    *linear_rules(f"{_BLOCK}.mlp.fc1", "blocks/mlp/fc1"),
    *linear_rules(f"{_BLOCK}.mlp.fc2", "blocks/mlp/fc2"),
    *norm_rules("post_layernorm", "norm"),
    Rule("head.probe", "attn_pool/latent", "1 1 c -> 1 1 c"),
    Rule("head.attention.in_proj_weight", "attn_pool/qkv/kernel", "o i -> i o"),
    Rule("head.attention.in_proj_bias", "attn_pool/qkv/bias", "o -> o"),
    *linear_rules("head.attention.out_proj", "attn_pool/proj"),
    *norm_rules("head.layernorm", "attn_pool/norm"),
    *linear_rules("head.mlp.fc1", "attn_pool/mlp/fc1"),
    *linear_rules("head.mlp.fc2", "attn_pool/mlp/fc2"),
)


def vision_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the vision tower, of a SiglipModel or a SiglipVisionModel, by the rules' keys."""
    return {
        key.removeprefix("vision_model."): tensor
        for key, tensor in tensors.items()
        if not _NOT_VISION.match(key)
    }


def separate(params: dict) -> dict:
    """Parameters of jflow's Siglip -> the tree that the rules lead to; `fuse` undoes it."""
    attn, pool = dict(params["blocks"]["attn"]), dict(params["attn_pool"])
    qkv, q, kv = attn.pop("qkv"), pool.pop("q"), pool.pop("kv")
    parts = {name: np.split(array, 3, axis=-1) for name, array in qkv.items()}
    attn |= {part: {name: parts[name][i] for name in qkv} for i, part in enumerate("qkv")}
    pool["qkv"] = {name: np.concatenate([q[name], kv[name]], axis=-1) for name in q}
    return params | {"blocks": params["blocks"] | {"attn": attn}, "attn_pool": pool}


def fuse(params: dict) -> dict:
    """The tree that the rules lead to -> parameters of jflow's Siglip, in the same dtypes."""
    attn, pool = dict(params["blocks"]["attn"]), dict(params["attn_pool"])
    q, k, v = (attn.pop(part) for part in "qkv")
    attn["qkv"] = {name: np.concatenate([q[name], k[name], v[name]], axis=-1) for name in q}
    qkv = pool.pop("qkv")
    width = pool["latent"].shape[-1]
    pool["q"] = {name: array[..., :width] for name, array in qkv.items()}
    pool["kv"] = {name: array[..., width:] for name, array in qkv.items()}
    return params | {"blocks": params["blocks"] | {"attn": attn}, "attn_pool": pool}


def config_from_transformers(config: dict) -> SiglipConfig:
    """Reads the config.json of a SiglipModel or SiglipVisionModel.

    Their GELU is the tanh one, JanusFlow's the exact one: both are accepted, and the features of
    the former then differ by about a thousandth.

    Raises ValueError in one sentence for what our Siglip cannot express.
    """
    if config.get("model_type") not in ("siglip", "siglip_vision_model"):
        raise ValueError(
            f"This config.json is that of a {config.get('model_type')!r}, not of a SigLIP: take "
            f"google/siglip-large-patch16-384 or a checkpoint like it."
        )
    # What a file leaves out has SiglipVisionConfig's default.
    defaults = {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "image_size": 224, "patch_size": 16, "num_channels": 3,
        "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
    }  # fmt: skip
    found = defaults | config.get("vision_config", config)
    for name, allowed in (
        ("num_channels", (3,)),
        ("hidden_act", ("gelu", "gelu_pytorch_tanh")),
        ("layer_norm_eps", (SiglipConfig.norm_eps,)),
    ):
        if found[name] not in allowed:
            raise ValueError(f"SigLIP's {name} = {found[name]!r} is not supported: {allowed[0]!r}.")
    width, mlp_width = found["hidden_size"], found["intermediate_size"]
    ratio = mlp_width / width
    if int(width * ratio) != mlp_width:  # rounded below it
        ratio = float(np.nextafter(ratio, np.inf))
    return SiglipConfig(
        image_size=found["image_size"],
        patch_size=found["patch_size"],
        width=width,
        layers=found["num_hidden_layers"],
        heads=found["num_attention_heads"],
        mlp_ratio=int(ratio) if ratio == int(ratio) else ratio,
    )
