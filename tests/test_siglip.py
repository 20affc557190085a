"""The vision tower against transformers' SiglipVisionModel at random configs."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from einops import rearrange

from jflow.models.siglip import SIGLIP_BY_NAME, Siglip, SiglipConfig


def random_config(seed: int) -> SiglipConfig:
    rng = np.random.default_rng(seed)
    heads, patch = int(rng.integers(1, 5)), int(rng.integers(3, 9))
    # A side that is no multiple of the patch size: the rest is ignored, as a convolution does.
    size = patch * int(rng.integers(2, 6)) + int(rng.integers(0, 3))
    return SiglipConfig(
        image_size=size,
        patch_size=patch,
        width=4 * heads * int(rng.integers(1, 4)),
        layers=int(rng.integers(1, 4)),
        heads=heads,
        mlp_ratio=float(rng.choice([4, 3.7362, 2])),
    )


def reference(config: SiglipConfig, seed: int):
    torch.manual_seed(seed)
    model = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_act="gelu",  # the released model's exact GELU
            layer_norm_eps=config.norm_eps,
        )
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn_like(p)
            if p.ndim == 1:
                norm = "norm" in name and name.endswith("weight")
                p.copy_(1 + 0.1 * noise if norm else 0.1 * noise)
            else:
                p.copy_(noise / np.prod(p.shape[1:]) ** 0.5)
    return model


def our_params(model, layers: int) -> dict:
    state = {
        n.removeprefix("vision_model."): p.detach().numpy() for n, p in model.named_parameters()
    }

    def linear(names):
        weight = np.concatenate([state[f"{n}.weight"] for n in names]).T
        return {"kernel": weight, "bias": np.concatenate([state[f"{n}.bias"] for n in names])}

    def norm(name):
        return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

    def block(i):
        at, mlp = f"encoder.layers.{i}.self_attn", f"encoder.layers.{i}.mlp"
        return {
            "norm1": norm(f"encoder.layers.{i}.layer_norm1"),
            "norm2": norm(f"encoder.layers.{i}.layer_norm2"),
            "attn": {
                "qkv": linear([f"{at}.{n}_proj" for n in "qkv"]),
                "proj": linear([f"{at}.out_proj"]),
            },
            "mlp": {"fc1": linear([f"{mlp}.fc1"]), "fc2": linear([f"{mlp}.fc2"])},
        }

    def stack(trees):
        first = trees[0]
        if isinstance(first, dict):
            return {name: stack([tree[name] for tree in trees]) for name in first}
        return np.stack(trees)

    weight, bias = state["head.attention.in_proj_weight"], state["head.attention.in_proj_bias"]
    width = weight.shape[1]
    return {
        "patch_embed_kernel": rearrange(
            state["embeddings.patch_embedding.weight"], "o i h w -> h w i o"
        ),
        "patch_embed_bias": state["embeddings.patch_embedding.bias"],
        "pos_embed": state["embeddings.position_embedding.weight"][None],
        "blocks": stack([block(i) for i in range(layers)]),
        "norm": norm("post_layernorm"),
        "attn_pool": {
            "latent": state["head.probe"],
            "q": {"kernel": weight[:width].T, "bias": bias[:width]},
            "kv": {"kernel": weight[width:].T, "bias": bias[width:]},
            "proj": linear(["head.attention.out_proj"]),
            "norm": norm("head.layernorm"),
            "mlp": {"fc1": linear(["head.mlp.fc1"]), "fc2": linear(["head.mlp.fc2"])},
        },
    }


@pytest.mark.parametrize("seed", range(8))
def test_equals_transformers(seed):
    """Features after the final LayerNorm, and the pooled head, within float32 rounding."""
    config = random_config(seed)
    torch_model = reference(config, seed)
    variables = {"params": our_params(torch_model, config.layers)}
    rng = np.random.default_rng(seed)
    pixels = rng.uniform(-1, 1, (2, config.image_size, config.image_size, 3)).astype(np.float32)
    with torch.no_grad():
        want = torch_model(torch.tensor(rearrange(pixels, "b h w c -> b c h w")))
    model = Siglip(config)
    features = model.apply(variables, pixels)
    np.testing.assert_allclose(features, want.last_hidden_state.numpy(), rtol=0, atol=2e-5)
    pooled = model.apply(variables, jnp.asarray(features), method="pool")
    np.testing.assert_allclose(pooled, want.pooler_output.numpy(), rtol=0, atol=2e-5)


def test_the_released_name_keeps_all_24_blocks():
    params = {"model_name": "siglip_large_patch16_384", "image_size": 384, "select_layer": -1}
    assert SiglipConfig.from_hf(params) == SiglipConfig()
    assert SiglipConfig.from_hf(params | {"select_layer": -2}).layers == 23
    assert SiglipConfig.from_hf(params | {"select_layer": 20}).layers == 20


def test_an_image_size_may_have_two_sides():
    assert SiglipConfig.from_hf({"image_size": [384, 384]}).image_size == 384
    with pytest.raises(ValueError, match="images are square"):
        SiglipConfig.from_hf({"image_size": [384, 256]})


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="siglip_model_config.json.*" + list(SIGLIP_BY_NAME)[0]):
        SiglipConfig.from_hf({"model_name": "siglip_huge"})


def test_a_side_file_of_another_siglip_is_refused():
    sizes = SIGLIP_BY_NAME["siglip_large_patch16_384"] | {"model_name": "siglip_a"}
    assert SiglipConfig.from_hf({"model_name": "siglip_a"}, sizes).width == 1024
    with pytest.raises(ValueError, match="describes 'siglip_a', but .* is 'siglip_b'"):
        SiglipConfig.from_hf({"model_name": "siglip_b"}, sizes)


def test_wrong_image_size_is_an_error():
    config = random_config(0)
    variables = {"params": our_params(reference(config, 0), config.layers)}
    with pytest.raises(ValueError, match="SigLIP takes"):
        Siglip(config).apply(variables, np.zeros((1, config.image_size + 1, config.image_size, 3)))
