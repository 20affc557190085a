"""AdamW with a constant schedule, and which parameters it sees (Table 1 of the paper)."""

import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

# The trainable parameters of Table 1's stages, as patterns for `split`. SigLIP's pooling head has
# no part in the model (design.md, trap 9).
ADAPTATION = (
    r"janusflow/vision_(und_enc|gen_enc|gen_dec)_aligner",
    # With the REPA head, where there is one: a pattern of its own would match nothing without.
    r"janusflow/beg_of_und_embed|repa/",
    r"janusflow/vision_gen_(enc|dec)_model/",
)
PRETRAINING = (*ADAPTATION, r"janusflow/language_model/")
SFT = (*PRETRAINING, r"janusflow/vision_und_enc_model/(?!attn_pool)")


@dataclass(frozen=True)
class OptimizerConfig:
    """Table 1's values of stages 1 and 2 where it has any."""

    learning_rate: float = 1e-4
    warmup_steps: int = 2000
    decay: tuple[int, int] | None = None  # updates over which the rate falls to 0; the paper's none
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8  # not printed
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # of the gradient's norm over all trainable parameters
    accumulate: int = 1  # parts that a batch is computed in, one behind the other

    def __post_init__(self):
        if self.decay is not None and not 0 <= self.decay[0] < self.decay[1]:
            raise ValueError(f"decay must be (first, last) update, not {self.decay}.")
        if not self.clip_norm > 0:
            raise ValueError(
                f"clip_norm must be above 0, not {self.clip_norm}; a large one clips nothing."
            )
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, not {self.accumulate}.")


def learning_rate(config: OptimizerConfig, updates: jax.Array) -> jax.Array:
    """The rate of the update that `updates` others came before: linear, then constant, and linear
    again over `decay`.

    The first one is not lost: it has 1 / warmup_steps of the full rate.
    """
    share = jnp.minimum((updates + 1) / max(config.warmup_steps, 1), 1)
    if config.decay is not None:
        start, end = config.decay
        share *= jnp.clip((end - updates) / (end - start), 0, 1)
    return config.learning_rate * share


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW with `learning_rate`."""
    b1, b2 = config.betas
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            lambda updates: learning_rate(config, updates),
            b1=b1,
            b2=b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        ),
    )


def split(params: dict, trainable: tuple[str, ...]) -> tuple[dict, dict]:
    """A nested tree -> (trainable, frozen), both flat: {"janusflow/norm/scale": array}.

    Differentiating for the first only, frozen parameters cost neither gradient nor moments.

    Args:
      trainable: regular expressions for the beginning of a path.

    Raises ValueError naming every expression that matches nothing.
    """
    leaves = flatten_dict(params, sep="/")
    idle = [p for p in trainable if not any(re.match(p, path) for path in leaves)]
    if idle:
        raise ValueError(
            f"No parameter matches {', '.join(map(repr, idle))}; patterns of trainable parameters "
            f"are held against the beginning of paths such as {next(iter(leaves))!r}."
        )
    chosen = {path for path in leaves if any(re.match(p, path) for p in trainable)}
    return (
        {path: leaf for path, leaf in leaves.items() if path in chosen},
        {path: leaf for path, leaf in leaves.items() if path not in chosen},
    )


def merge(trainable: dict, frozen: dict) -> dict:
    """The nested tree that `split` took apart."""
    return unflatten_dict(trainable | frozen, sep="/")
