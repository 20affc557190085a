"""The language model: a Llama decoder (DeepSeek-LLM) with hidden-state tap and explicit cache.

Parameter names are those of Hugging Face's LlamaForCausalLM, the layers stacked on axis 0.
"""

from dataclasses import dataclass, fields
from operator import itemgetter

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange

from jflow.models.attention import Implementation, attention
from jflow.models.layers import (
    KVCache,
    Linear,
    Precision,
    Prefix,
    Remat,
    RMSNorm,
    remat,
    rotary_angles,
    rotary_embedding,
)
from jflow.sharding import constrain, look_up


@dataclass(frozen=True)
class LlamaConfig:
    """Fields and defaults of transformers' LlamaConfig, as far as the model uses them."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as attention heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @classmethod
    def from_hf(cls, config: dict) -> "LlamaConfig":
        """Reads a Hugging Face config; raises ValueError for what this decoder cannot express."""
        config = dict(config) | (config.get("rope_parameters") or {})
        unsupported = {
            "hidden_act": ("silu", None),
            "attention_bias": (False, None),
            "mlp_bias": (False, None),
            "tie_word_embeddings": (False, None),
            "rope_scaling": (None, {"rope_type": "default"}, {"type": "default"}),
            "rope_type": ("default", None),
        }
        for name, allowed in unsupported.items():
            if config.get(name) not in allowed:
                raise ValueError(
                    f"language_config.{name} = {config[name]!r} is not supported; jflow's decoder "
                    f"needs {allowed[0]!r}."
                )
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in config.items() if name in names})


@flax.struct.dataclass
class LlamaOutput:
    """hidden: [B, T, C] after the final norm; tap: [B, T, C] after the tapped block, before any
    norm (zeros without a tap); k, v: [layers, B, T, K, D] of the new tokens, to cache."""

    hidden: jax.Array
    tap: jax.Array
    k: jax.Array
    v: jax.Array


class Attention(nn.Module):
    config: LlamaConfig
    precision: Precision
    attention: Implementation
    segments: int | None

    @nn.compact
    def __call__(self, x, angles, segment_ids, cache):
        config, D = self.config, self.config.head_width

        def project(heads, name):
            y = Linear(heads * D, self.precision, use_bias=False, name=name)(x)
            return rearrange(y, "B T (H D) -> B T H D", D=D)

        q = rotary_embedding(project(config.num_attention_heads, "q_proj"), *angles)
        k = rotary_embedding(project(config.kv_heads, "k_proj"), *angles)
        v = project(config.kv_heads, "v_proj")
        out = attention(q, k, v, self.precision, segment_ids, cache, self.attention, self.segments)
        out = rearrange(out, "B T H D -> B T (H D)")
        return Linear(config.hidden_size, self.precision, use_bias=False, name="o_proj")(out), k, v


class Mlp(nn.Module):
    """SwiGLU."""

    config: LlamaConfig
    precision: Precision

    @nn.compact
    def __call__(self, x):
        def linear(features, name):
            return Linear(features, self.precision, use_bias=False, name=name)

        gate = linear(self.config.intermediate_size, "gate_proj")(x)
        up = linear(self.config.intermediate_size, "up_proj")(x)
        return linear(self.config.hidden_size, "down_proj")(nn.silu(gate) * up)


class Block(nn.Module):
    config: LlamaConfig
    precision: Precision
    attention: Implementation
    segments: int | None

    @nn.compact
    def __call__(self, x, angles, segment_ids, cache):
        eps = self.config.rms_norm_eps
        y = RMSNorm(eps, self.precision, name="input_layernorm")(x)
        y, k, v = Attention(
            self.config, self.precision, self.attention, self.segments, name="self_attn"
        )(y, angles, segment_ids, cache)
        x = x + y
        y = RMSNorm(eps, self.precision, name="post_attention_layernorm")(x)
        x = x + Mlp(self.config, self.precision, name="mlp")(y)
        return constrain(x, "batch", None, None), k, v


class TappedBlock(nn.Module):
    """One step of the scan over layers: keeps a copy of the stream after block `tap_layer`.

    The copy is chosen outside the rematerialised block, so a tap costs one [B, T, C] buffer and
    not one per layer.
    """

    config: LlamaConfig
    precision: Precision
    remat: Remat
    attention: Implementation
    segments: int | None

    @nn.compact
    def __call__(self, carry, layer, past, cache, angles, segment_ids, tap_layer):
        x, tap = carry
        if cache is not None:
            cache = cache.replace(k=past[0], v=past[1])
        block = remat(Block, self.remat)
        x, k, v = block(self.config, self.precision, self.attention, self.segments, name="block")(
            x, angles, segment_ids, cache
        )
        if tap_layer is not None:
            tap = jnp.where(layer + 1 == tap_layer, x, tap)
        return (x, tap), (k, v)


class Llama(nn.Module):
    """Decoder-only transformer over embeddings; `embed` and `logits` are its two ends.

    scan_layers: one compiled block scanned over stacked weights, or (False, with parameters from
      `unstack_layers`, for a GPU also `layers.by_rows`) each layer on its own. Scanning compiles
      fast, but slices each layer's weights out of the stack: nothing beside 577 tokens, 2.5 times
      the time of a step of one.
    unroll: so many blocks a trip of the scan; more compile longer and need fewer copies in and out
      of the stack, and fewer meetings of the devices for gradients.
    remat: what each block computes again in the backward pass, see `layers.remat`.
    attention, segments: see attention.attention.
    """

    config: LlamaConfig
    precision: Precision = Precision()
    scan_layers: bool = True
    remat: Remat = "none"
    attention: Implementation = "auto"
    segments: int | None = None
    unroll: int = 1

    def setup(self):
        config, precision = self.config, self.precision
        # As large as what every block adds: beside 0.02, blocks drown which word a token is, and a
        # small model begins to compare words with pictures 4 times later (docs/shapes.md).
        self.embed_tokens = self.param(
            "embed_tokens",
            nn.initializers.normal(1.0),
            (config.vocab_size, config.hidden_size),
            precision.param,
        )
        block = (config, precision, self.remat, self.attention, self.segments)
        if self.scan_layers:
            self.layers = nn.scan(
                TappedBlock,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
                length=config.num_hidden_layers,
                unroll=self.unroll,
            )(*block)
        else:
            self.layers = [TappedBlock(*block) for _ in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.rms_norm_eps, precision)
        self.lm_head = Linear(config.vocab_size, precision, use_bias=False)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """[B, T] token ids -> [B, T, C] word embeddings."""
        return look_up(self.embed_tokens, tokens).astype(self.precision.compute)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., C] hidden states after the final norm -> [..., vocab] float32 logits."""
        return self.lm_head(hidden).astype(jnp.float32)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        cache: KVCache | Prefix | None = None,
        tap_layer: int | None = None,
    ) -> LlamaOutput:
        """Runs the blocks over new tokens, behind those of `cache` if there is one.

        Args:
          x: [B, T, C] embeddings.
          positions: [B, T] rotary positions, the cached tokens not counted.
          segment_ids: [B, T]; a token sees the earlier tokens of its own segment.
          cache: what lies before; read only.
          tap_layer: 1-based block whose output becomes `tap` (REPA uses 6), None for no tap.
        """
        layers = self.config.num_hidden_layers
        if tap_layer is not None and not 1 <= tap_layer <= layers:
            raise ValueError(f"tap_layer {tap_layer} is outside the model's blocks 1..{layers}.")
        past = None
        if cache is not None:
            # Only keys and values are each layer's own; the rest stays outside the scan.
            past, cache = (cache.k, cache.v), cache.replace(k=None, v=None)
        x = constrain(x.astype(self.precision.compute), "batch", None, None)
        carry = (x, jnp.zeros_like(x) if tap_layer is not None else jnp.zeros((), x.dtype))
        # Once for all layers and heads: a compiler would compute them again in each.
        angles = rotary_angles(positions, self.config.head_width, self.config.rope_theta)
        shared = (cache, angles, segment_ids, tap_layer)
        if self.scan_layers:
            carry, (k, v) = self.layers(carry, jnp.arange(layers), past, *shared)
        else:
            new = []
            for i, layer in enumerate(self.layers):
                carry, kv = layer(carry, i, jax.tree.map(itemgetter(i), past), *shared)
                new.append(kv)
            k, v = (jnp.stack(values) for values in zip(*new, strict=True))
        x, tap = carry
        return LlamaOutput(hidden=self.norm(x), tap=tap, k=k, v=v)


def unstack_layers(params: dict) -> dict:
    """Parameters of a scanned Llama -> of one with `scan_layers=False`.

    Each stacked array is let go as soon as it is taken apart, so the peak is one array above the
    size of the parameters; the tree passed in must not be used afterwards.
    """
    stacked = params.pop("layers")
    count = len(jax.tree.leaves(stacked)[0])
    leaves, tree = jax.tree.flatten(stacked)
    del stacked
    layers = [[] for _ in range(count)]
    while leaves:
        leaf = leaves.pop(0)
        for i in range(count):
            layers[i].append(leaf[i])
    return params | {
        f"layers_{i}": jax.tree.unflatten(tree, layer) for i, layer in enumerate(layers)
    }
