"""The three objectives of the paper, arrays in, numbers out (sections 3.3 and 3.4)."""

import jax
import jax.numpy as jnp
from einops import rearrange

from jflow.flow import velocity
from jflow.sharding import by_rows


@jax.custom_vjp
def _logits(x: jax.Array, lm_head: jax.Array) -> jax.Array:
    """[..., D] and [D, vocab] to float32 logits, not rounded to the dtype of x.

    Left to itself, the backward pass of such a product would run in float32, many times slower
    than in bfloat16; here its operands have the dtype of x, and only the sums are float32.
    """
    return jnp.matmul(x, lm_head.astype(x.dtype), preferred_element_type=jnp.float32)


def _logits_forward(x, lm_head):
    return _logits(x, lm_head), (x, lm_head)


def _logits_backward(saved, gradient):
    x, lm_head = saved
    gradient = gradient.astype(x.dtype)
    to_head = jnp.einsum("...D,...V->DV", x, gradient, preferred_element_type=jnp.float32)
    return gradient @ lm_head.T.astype(x.dtype), to_head.astype(lm_head.dtype)


_logits.defvjp(_logits_forward, _logits_backward)


def _chunk_loss(lm_head: jax.Array, x: jax.Array, target: jax.Array) -> jax.Array:
    """[B] the sum of -log p(target) over each row of x [B, c, D] and target [B, c]."""
    logits = _logits(x, lm_head)
    # A comparison and a sum, not a gather: they stay local where the vocabulary is split.
    chosen = jnp.arange(logits.shape[-1]) == target[..., None]
    picked = jnp.sum(jnp.where(chosen, logits, 0), axis=-1)
    nll = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.sum(jnp.where(target >= 0, nll, 0), axis=-1)


@jax.custom_vjp
def _chunk_loss_if_any(lm_head: jax.Array, x: jax.Array, target: jax.Array) -> jax.Array:
    """`_chunk_loss`, not computed where there is no target.

    Its derivative is written out: left to itself, all that it needs of the logits would have to
    leave the branch that has them.
    """
    arguments, nothing = (lm_head, x, target), jnp.zeros(len(x), jnp.float32)
    return jax.lax.cond(jnp.any(target >= 0), _chunk_loss, lambda *_: nothing, *arguments)


def _chunk_loss_forward(lm_head, x, target):
    return _chunk_loss_if_any(lm_head, x, target), (lm_head, x, target)


def _chunk_loss_backward(saved, gradient):
    lm_head, x, target = saved

    def compute(*given):
        return jax.vjp(lambda *parts: _chunk_loss(*parts, target), *given)[1](gradient)

    def zeros(*given):
        return tuple(map(jnp.zeros_like, given))

    return *jax.lax.cond(jnp.any(target >= 0), compute, zeros, lm_head, x), None


_chunk_loss_if_any.defvjp(_chunk_loss_forward, _chunk_loss_backward)


def autoregressive(
    hidden: jax.Array, lm_head: jax.Array, targets: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Sum of -log p(target) and how many targets there are, of each row, float32 [B] (eq. 6).

    Args:
      hidden: [B, L, D] after the final norm; products are computed in its dtype.
      lm_head: [D, vocab].
      targets: [B, L], the token that each position must predict, negative for none.
      chunk: positions of each row whose logits exist at a time; those of a chunk are computed
        again in the backward pass, so [B, L, vocab] never exists. Positions with a target come
        first, and chunks without any are left out: most of a row of images needs no logits.
    """
    length = targets.shape[1]
    chunk = min(chunk, length)
    missing = -length % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, missing), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, missing)), constant_values=-1)

    def negative_log_likelihood(lm_head, hidden, targets):
        @jax.checkpoint
        def add(total, part):
            return total + _chunk_loss_if_any(lm_head, *part), None

        order = jnp.argsort(targets < 0, axis=1, stable=True)
        hidden = jnp.take_along_axis(hidden, order[..., None], axis=1)
        targets = jnp.take_along_axis(targets, order, axis=1)
        parts = (
            rearrange(hidden, "B (n c) D -> n B c D", c=chunk),
            rearrange(targets, "B (n c) -> n B c", c=chunk),
        )
        return jax.lax.scan(add, jnp.zeros(len(hidden), jnp.float32), parts)[0]

    total = by_rows(negative_log_likelihood, lm_head, hidden, targets)
    return total, jnp.sum(targets >= 0, axis=1).astype(jnp.float32)


def rectified_flow(v: jax.Array, x: jax.Array, z0: jax.Array) -> jax.Array:
    """||v - (x - z0)||^2 of each image, the mean over its latent elements, float32 [B] (eq. 7).

    Args: predicted velocity v, image latents x, noise z0, each [B, h, w, c].
    """
    error = v.astype(jnp.float32) - velocity(x, z0).astype(jnp.float32)
    return jnp.mean(jnp.square(error), axis=(1, 2, 3))


def cosine(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Cosine similarity of each image, the mean over its positions, float32 [B] in [-1, 1].

    REPA's loss is the negative of it (eq. 8). Args: two [B, N, C].
    """

    def unit(x):
        x = x.astype(jnp.float32)
        square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.maximum(square, 1e-16))  # no NaN for a vector of zeros

    return jnp.mean(jnp.sum(unit(prediction) * unit(target), axis=-1), axis=-1)
