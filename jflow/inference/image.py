"""Text to image: prompts are read once into a cache, then a solver follows the velocity.

Attention is causal, so the begin-of-sentence token, all that the unconditional half of the guidance
may see of a prompt, has the same keys and values in both halves.
"""

from functools import partial

import jax
import jax.numpy as jnp

from jflow import flow, rng
from jflow.compilation import WEIGHTS_STAY
from jflow.models.janusflow import JanusFlow
from jflow.models.layers import Prefix
from jflow.models.vae import AutoencoderKL
from jflow.samplers import SOLVERS, Velocity


def initial_noise(seed: int, indices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise [B, h, w, c]; image i depends on (seed, indices[i]) alone."""
    return jax.vmap(lambda index: jax.random.normal(rng.fold(seed, "noise", index), shape))(indices)


def encode_prefix(model: JanusFlow, params: dict, tokens: jax.Array, lengths: jax.Array) -> Prefix:
    """Prompts [B, P] with `lengths` [B] valid tokens at the left -> their keys and values, at the
    right: an image continues its prompt without a gap."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
    variables = {"params": params}
    x = model.apply(variables, tokens, method="embed_text")
    out = model.apply(variables, x, positions, segment_ids, method="language")
    gap = tokens.shape[1] - lengths
    k, v = (jax.vmap(partial(jnp.roll, axis=1), (1, 0), 1)(a, gap) for a in (out.k, out.v))
    return Prefix.of(k, v, jax.vmap(jnp.roll)(segment_ids, gap))


def with_unconditional(prefix: Prefix) -> Prefix:
    """[B] prompts -> [2 B]: the prompts, then rows in which only their first tokens can be seen.

    The released sampler has pad tokens there that attention may not see.
    """
    first = jnp.argmax(prefix.segment_ids, axis=1)

    def join(a):
        alone = jnp.take_along_axis(a, first[None, :, None, None, None], axis=2)
        return jnp.concatenate([a, jnp.broadcast_to(alone, a.shape)], axis=1)

    last = jnp.zeros_like(prefix.segment_ids).at[:, -1].set(1)
    segment_ids = jnp.concatenate([prefix.segment_ids, last])
    return Prefix.of(join(prefix.k), join(prefix.v), segment_ids)


def velocity(
    model: JanusFlow,
    params: dict,
    prefix: Prefix,
    lengths: jax.Array,
    z: jax.Array,
    timestep: jax.Array,
) -> jax.Array:
    """The model's velocity behind cached prompts.

    Args:
      prefix: G * B cached prompts for B latents (G = 2: conditional rows, then unconditional).
      lengths: [B] prompt lengths; the time token stands right behind its prompt, also where the
        prompt is hidden.
      z: [B, H, W, c] latents; they are encoded once for all G.
      timestep: scalar 1000 t.

    Returns: [G * B, H, W, c] float32.
    """
    variables = {"params": params}
    copies = prefix.segment_ids.shape[0] // z.shape[0]
    tile = partial(jnp.tile, reps=(copies, 1, 1))
    gen = model.apply(variables, z, jnp.full(z.shape[:1], timestep), method="encode_latents")
    x = tile(gen.embeddings)
    positions = jnp.tile(lengths, copies)[:, None] + jnp.arange(x.shape[1])
    hidden = model.apply(
        variables, x, positions, jnp.ones_like(positions), prefix, method="language"
    ).hidden
    return model.apply(
        variables,
        hidden[:, 1:],
        jnp.tile(gen.skip, (copies, 1, 1, 1)),
        jnp.tile(gen.t_emb, (copies, 1)),
        method="decode_velocity",
    )


def guided_velocity(
    model: JanusFlow,
    params: dict,
    prefix: Prefix,
    lengths: jax.Array,
    guidance_scale: jax.Array,
    guided: bool = True,
    interval: tuple[float, float] | None = None,
) -> Velocity:
    """velocity(z, timestep) with classifier-free guidance.

    Args:
      guidance_scale: w; ignored where `guided` is False, which leaves the second half out.
      interval: t in [low, high] where guidance applies; outside, only the first half is computed.
    """

    def plain(z, timestep):
        return velocity(model, params, prefix, lengths, z, timestep)

    if not guided:
        return plain
    both = with_unconditional(prefix)

    def guide(z, timestep):
        v_cond, v_uncond = jnp.split(velocity(model, params, both, lengths, z, timestep), 2)
        return flow.guide(v_cond, v_uncond, guidance_scale)

    if interval is None:
        return guide
    low, high = interval

    def guide_inside(z, timestep):
        inside = (timestep >= 1000 * low) & (timestep <= 1000 * high)
        return jax.lax.cond(inside, guide, plain, z, timestep)

    return guide_inside


@partial(
    jax.jit,
    static_argnames=("model", "solver", "guided", "interval"),
    compiler_options=WEIGHTS_STAY,
)
def sample_latents(
    model: JanusFlow,
    params: dict,
    tokens: jax.Array,
    lengths: jax.Array,
    z: jax.Array,
    timesteps: jax.Array,
    dt: jax.Array,
    guidance_scale: jax.Array,
    *,
    solver: str = "euler",
    guided: bool = True,
    interval: tuple[float, float] | None = None,
) -> jax.Array:
    """Integrates z from its first time to t = 1.

    Args:
      tokens, lengths: [B, P] prompts as `prompts.generation_tokens` builds them, padded at the
        right, and [B] their lengths.
      z: [B, H, W, c] float32, noise or what image-to-image begins with.
      timesteps, dt: a flow.TimeGrid, [N] each.
      guidance_scale: w, a scalar.
      solver: a name in samplers.SOLVERS.
      guided, interval: see `guided_velocity`.

    Returns: [B, H, W, c] float32 latents, times the VAE's scaling factor.
    """
    prefix = encode_prefix(model, params, tokens, lengths)
    v = guided_velocity(model, params, prefix, lengths, guidance_scale, guided, interval)
    return SOLVERS[solver](v, z, timesteps, dt)


@partial(jax.jit, static_argnames=("vae",))
def decode_latents(vae: AutoencoderKL, params: dict, latents: jax.Array) -> jax.Array:
    """[B, h, w, c] latents -> [B, 8h, 8w, 3] float32 pixels, not clipped."""
    z = latents / vae.config.scaling_factor
    return vae.apply({"params": params}, z, method="decode").astype(jnp.float32)


@partial(jax.jit, static_argnames=("vae",))
def encode_pixels(vae: AutoencoderKL, params: dict, pixels: jax.Array) -> jax.Array:
    """[B, H, W, 3] pixels in [-1, 1] -> [B, H/8, W/8, c] latents, the posterior's mean."""
    mean, _ = vae.apply({"params": params}, pixels, method="encode")
    return mean.astype(jnp.float32) * vae.config.scaling_factor
