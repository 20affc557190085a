"""The understanding encoder: a SigLIP vision transformer without class token.

Parameter names are timm's VisionTransformer, as in the released checkpoint (siglip_vit.py); the
blocks are stacked on axis 0.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from jflow.models.attention import Implementation, attention
from jflow.models.layers import LayerNorm, Linear, Precision, Remat, fan_in_init, remat
from jflow.sharding import constrain

# What the released code keeps in a table (siglip_vit.py: SigLIP_MODEL_CONFIG) and its config.json
# refers to by `model_name`: patch size, width, layers, heads, mlp_ratio.
SIGLIP_BY_NAME = {
    "siglip_large_patch16_256": dict(patch_size=16, width=1024, layers=24, heads=16, mlp_ratio=4),
    "siglip_large_patch16_384": dict(patch_size=16, width=1024, layers=24, heads=16, mlp_ratio=4),
    "siglip_so400m_patch14_224": dict(
        patch_size=14, width=1152, layers=27, heads=16, mlp_ratio=3.7362
    ),
    "siglip_so400m_patch14_384": dict(
        patch_size=14, width=1152, layers=27, heads=16, mlp_ratio=3.7362
    ),
}


@dataclass(frozen=True)
class SiglipConfig:
    """Dimensions of the vision tower; `layers` counts the blocks that are kept."""

    image_size: int = 384
    patch_size: int = 16
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_ratio: float = 4
    norm_eps: float = 1e-6

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        return self.grid**2

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)

    @classmethod
    def from_hf(cls, params: dict, sizes: dict | None = None) -> "SiglipConfig":
        """Reads `vision_und_enc_config.params` of the released config.json.

        Args:
          params: model_name, image_size, select_layer, ...
          sizes: the entry that model_name stands for; None to look it up by name.

        Raises ValueError for an unknown name, for the sizes of another one, and for images that are
        not square.
        """
        name = params.get("model_name", "siglip_large_patch16_384")
        described = (sizes or {}).get("model_name", name)
        if params.get("model_name", described) != described:
            raise ValueError(
                f"siglip_model_config.json describes {described!r}, but the SigLIP of config.json "
                f"is {name!r}: put the sizes of that one there."
            )
        sizes = sizes or SIGLIP_BY_NAME.get(name)
        if sizes is None:
            raise ValueError(
                f"Unknown SigLIP {name!r}: put its sizes into siglip_model_config.json beside "
                f"config.json, or use one of {', '.join(SIGLIP_BY_NAME)}."
            )
        # SigLIPVisionCfg's own defaults are this one's.
        sizes = SIGLIP_BY_NAME["siglip_so400m_patch14_384"] | sizes
        for side in ("pixel_mean", "pixel_std"):
            if params.get(side) is not None:
                raise ValueError(f"vision_und_enc_config.params.{side} is not supported.")
        given = params.get("image_size", 336)
        size, *others = given if isinstance(given, list | tuple) else (given,)
        if any(other != size for other in others):
            raise ValueError(
                f"vision_und_enc_config.params.image_size is {given}: jflow's images are square."
            )
        # select_layer -1 keeps every block, -2 drops the last one (create_siglip_vit).
        select, layers = params.get("select_layer", -2), sizes["layers"]
        kept = min(layers, layers + select + 1 if select <= 0 else select)
        return cls(
            image_size=size,
            patch_size=sizes["patch_size"],
            width=sizes["width"],
            layers=kept,
            heads=sizes["heads"],
            mlp_ratio=sizes["mlp_ratio"],
        )


class SiglipMlp(nn.Module):
    config: SiglipConfig
    precision: Precision

    @nn.compact
    def __call__(self, x):
        x = Linear(self.config.mlp_width, self.precision, name="fc1")(x)
        x = nn.gelu(x, approximate=False)
        return Linear(self.config.width, self.precision, name="fc2")(x)


class SiglipAttention(nn.Module):
    config: SiglipConfig
    precision: Precision
    attention: Implementation

    @nn.compact
    def __call__(self, x):
        qkv = Linear(3 * self.config.width, self.precision, name="qkv")(x)
        q, k, v = rearrange(qkv, "B T (three H D) -> three B T H D", three=3, H=self.config.heads)
        out = attention(q, k, v, self.precision, implementation=self.attention)
        out = rearrange(out, "B T H D -> B T (H D)")
        return Linear(self.config.width, self.precision, name="proj")(out)


class SiglipBlock(nn.Module):
    config: SiglipConfig
    precision: Precision
    attention: Implementation

    @nn.compact
    def __call__(self, x, _):
        eps = self.config.norm_eps
        y = LayerNorm(eps, self.precision, name="norm1")(x)
        x = x + SiglipAttention(self.config, self.precision, self.attention, name="attn")(y)
        y = LayerNorm(eps, self.precision, name="norm2")(x)
        x = x + SiglipMlp(self.config, self.precision, name="mlp")(y)
        return constrain(x, "batch", None, None), None


class AttentionPool(nn.Module):
    """One learned query attends to all patches, then an MLP (timm's AttentionPoolLatent).

    The released model stores it and never uses it; SigLIP's own image-text loss needs it.
    """

    config: SiglipConfig
    precision: Precision

    @nn.compact
    def __call__(self, x):
        config, precision = self.config, self.precision
        latent = self.param(
            "latent",
            nn.initializers.normal(config.width**-0.5),
            (1, 1, config.width),
            precision.param,
        )
        latent = jnp.broadcast_to(latent.astype(x.dtype), (x.shape[0], 1, config.width))
        q = Linear(config.width, precision, name="q")(latent)
        kv = Linear(2 * config.width, precision, name="kv")(x)
        q = rearrange(q, "B T (H D) -> B T H D", H=config.heads)
        k, v = rearrange(kv, "B T (two H D) -> two B T H D", two=2, H=config.heads)
        out = rearrange(attention(q, k, v, precision), "B T H D -> B T (H D)")
        x = Linear(config.width, precision, name="proj")(out)
        y = LayerNorm(config.norm_eps, precision, name="norm")(x)
        return (x + SiglipMlp(config, precision, name="mlp")(y))[:, 0]


class Siglip(nn.Module):
    """Pixels to patch features; `pool` turns those into one vector an image."""

    config: SiglipConfig
    precision: Precision = Precision()
    remat: Remat = "none"
    attention: Implementation = "auto"

    def setup(self):
        config, precision = self.config, self.precision
        patch = (config.patch_size, config.patch_size, 3, config.width)
        self.patch_kernel = self.param("patch_embed_kernel", fan_in_init, patch, precision.param)
        self.patch_bias = self.param(
            "patch_embed_bias", nn.initializers.zeros, (config.width,), precision.param
        )
        self.pos_embed = self.param(
            "pos_embed",
            nn.initializers.normal(0.02),
            (1, config.num_tokens, config.width),
            precision.param,
        )
        self.blocks = nn.scan(
            remat(SiglipBlock, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.layers,
        )(config, precision, self.attention)
        self.norm = LayerNorm(config.norm_eps, precision)
        self.attn_pool = AttentionPool(config, precision)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """[B, S, S, 3] pixels in [-1, 1] -> [B, N, C] features after the final LayerNorm.

        Raises ValueError for another image size than the config's.
        """
        size, p = self.config.image_size, self.config.patch_size
        if pixels.shape[1:] != (size, size, 3):
            raise ValueError(
                f"SigLIP takes [B, {size}, {size}, 3] images, not {list(pixels.shape)}."
            )
        # A patch convolution is one matrix product over the pixels of each patch.
        used = self.config.grid * p
        patches = rearrange(
            pixels[:, :used, :used].astype(self.precision.compute),
            "B (h p) (w q) c -> B (h w) (p q c)",
            p=p,
            q=p,
        )
        kernel = rearrange(self.patch_kernel, "p q c d -> (p q c) d").astype(patches.dtype)
        x = patches @ kernel + self.patch_bias.astype(patches.dtype)
        x = x + self.pos_embed.astype(x.dtype)
        x, _ = self.blocks(x, None)
        return self.norm(x)

    def pool(self, features: jax.Array) -> jax.Array:
        """[B, N, C] features -> [B, C]."""
        return self.attn_pool(features)
