"""The objectives of the paper as arrays in, one number out (section 3.3)."""

import jax
import jax.numpy as jnp


def rectified_flow_loss(v: jax.Array, x: jax.Array, z0: jax.Array) -> jax.Array:
    """Mean over all latent elements of ||v - (x - z0)||^2 (eq. 7).

    Args: predicted velocity v, image latents x, noise z0, each [B, h, w, c].
    """
    return jnp.mean(jnp.square(v.astype(jnp.float32) - (x - z0)))


def autoregressive_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean of -log p(label) over the labelled tokens (eq. 6).

    Args:
      logits: [B, T, vocab]; position i predicts labels[:, i + 1].
      labels: [B, T], negative where there is no target.
    """
    labels = labels[:, 1:]
    log_p = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32), axis=-1)
    picked = jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    targets = labels >= 0
    return -jnp.sum(picked * targets) / jnp.maximum(jnp.sum(targets), 1)
