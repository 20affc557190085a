"""Low-rank factors beside frozen kernels (LoRA, arXiv 2106.09685), as a function of the parameters.

The kernel W of a chosen linear layer gets two neighbours, lora_a [..., in, rank] and lora_b
[..., rank, out], which are trained in its place; what the model computes with is W + alpha / rank
A B, made anew by `merge` in every step. So no module knows of this, layers stacked on a first axis
have factors stacked alike, and a merged tree is an ordinary one, for samples and checkpoints.
"""

import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jflow import rng

# For TrainConfig.trainable.
FACTORS = r".*/lora_[ab]$"


@dataclass(frozen=True)
class LoraConfig:
    """targets: patterns for the beginning of the kernels' paths, as in `optimizer.split`; by
    default all matrices of the language model's blocks. alpha: of the factor alpha / rank."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = (r"janusflow/language_model/layers/",)

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"lora.rank must be at least 1, not {self.rank}.")


def init(params: dict, config: LoraConfig | None, trainable: tuple[str, ...], seed: int) -> dict:
    """The tree with factors: A from N(0, 1 / in), B zero, so that at first nothing is changed.

    Args:
      params: nested, of `merge`'s kind.
      config: None for the tree as it is.
      trainable: patterns of `optimizer.split`, which the factors and the kernels are held against.

    Raises ValueError in one sentence for a target that matches no matrix, and for factors that
    would not be trained or kernels that would.
    """
    if config is None:
        return params
    leaves = flatten_dict(params, sep="/")
    kernels = [path for path in leaves if path.endswith("/kernel")]
    idle = [p for p in config.targets if not any(re.match(p, path) for path in kernels)]
    if idle:
        raise ValueError(
            f"No kernel matches {', '.join(map(repr, idle))} of lora.targets; the patterns are "
            f"held against the beginning of paths such as {kernels[0]!r}."
        )
    for path in kernels:
        if not any(re.match(p, path) for p in config.targets):
            continue
        *layers, rows, columns = leaves[path].shape
        if len(layers) > 1:
            raise ValueError(f"lora.targets match {path}, which is a convolution: leave it out.")
        a, b = _factors(path)
        if not all(any(re.match(p, name) for p in trainable) for name in (a, b)):
            raise ValueError(f"{a} is not trainable: add {FACTORS!r} to trainable.")
        if any(re.match(p, path) for p in trainable):
            raise ValueError(f"{path} is both trainable and one of lora.targets: take one away.")
        noise = jax.random.normal(rng.fold(seed, f"lora {path}"), (*layers, rows, config.rank))
        leaves[a] = noise * rows**-0.5
        leaves[b] = jnp.zeros((*layers, config.rank, columns))
    return unflatten_dict(leaves, sep="/")


def merge(params: dict, config: LoraConfig | None, dtype: jnp.dtype = jnp.float32) -> dict:
    """The tree without factors, each of their kernels W + alpha / rank A B.

    Args:
      params: nested, with factors; unchanged if `config` is None.
      dtype: of the changed kernels. In a step, that of the matrix products: they would be rounded
        to it anyway, and kernels and their gradients take half the memory.
    """
    if config is None:
        return params
    leaves = flatten_dict(params, sep="/")
    for path in list(leaves):
        a, b = _factors(path)
        if path.endswith("/kernel") and a in leaves:
            a, b = leaves.pop(a), leaves.pop(b)
            change = config.alpha / config.rank * jnp.matmul(a, b, precision="highest")
            leaves[path] = (leaves[path].astype(jnp.float32) + change).astype(dtype)
    return unflatten_dict(leaves, sep="/")


def unmerged(leaves: dict) -> dict:
    """Of flat {path: leaf}: the factors and the kernels below them, which `merge` cannot undo."""
    return {
        path: leaf
        for path, leaf in leaves.items()
        if re.match(FACTORS, path) or _factors(path)[0] in leaves
    }


def _factors(path: str) -> tuple[str, str]:
    """Paths of the two factors beside a kernel."""
    module, _, _ = path.rpartition("/")
    return f"{module}/lora_a", f"{module}/lora_b"
