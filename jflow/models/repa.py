"""h_phi: from the language model's hidden states to SigLIP's features, in training only (eq. 8)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow.models.layers import Linear, Precision


class RepaHead(nn.Module):
    """Three linear layers with SiLU between them; [..., D] -> [..., features].

    features: width of the target, SigLIP's. hidden_size: of both inner layers; the paper prints
    neither it nor the activation, these are the ones of REPA's own code (arXiv 2410.06940).
    """

    features: int
    hidden_size: int = 2048
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.silu(Linear(self.hidden_size, self.precision, name="linear_1")(x))
        x = nn.silu(Linear(self.hidden_size, self.precision, name="linear_2")(x))
        return Linear(self.features, self.precision, name="linear_3")(x)


def init_params(head: RepaHead, width: int, key: jax.Array) -> dict:
    """Fresh parameters of a head over hidden states of `width`, a plain nested dict."""
    return head.init(key, jnp.zeros((1, width)))["params"]
