"""AdamW, warm-up and clipping against torch; the choice of trainable parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from jflow.training import optimizer
from jflow.training.optimizer import OptimizerConfig
from tests.tiny_training import params

SHAPES = {
    name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    for name, leaf in optimizer.split(params(), (r".",))[0].items()
}
TREE = optimizer.merge(SHAPES, {})


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_five_steps_equal_torch(weight_decay):
    """Gradients whose norm lies on both sides of clip_norm, a warm-up that ends on the way."""
    config = OptimizerConfig(
        learning_rate=3e-2, warmup_steps=3, weight_decay=weight_decay, clip_norm=2.0
    )
    rng = np.random.default_rng(0)
    start = {"a": rng.standard_normal((4, 3)), "b": rng.standard_normal(5)}
    steps = [
        {name: scale * rng.standard_normal(leaf.shape) for name, leaf in start.items()}
        for scale in (3.0, 0.1, 10.0, 0.3, 1.0)
    ]
    ours = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in start.items()}
    transform = optimizer.adamw(config)
    state = transform.init(ours)
    theirs = {name: torch.tensor(leaf, requires_grad=True) for name, leaf in start.items()}
    reference = torch.optim.AdamW(
        theirs.values(), lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay
    )
    for i, gradient in enumerate(steps):
        for name, leaf in theirs.items():
            leaf.grad = torch.tensor(gradient[name])
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 2.0)
        assert (norm > 2) == (i in (0, 2, 4))
        reference.param_groups[0]["lr"] = 3e-2 * min(i + 1, 3) / 3
        reference.step()
        gradient = {name: jnp.asarray(leaf, jnp.float32) for name, leaf in gradient.items()}
        updates, state = transform.update(gradient, state, ours)
        ours = optax.apply_updates(ours, updates)
        for name, leaf in theirs.items():
            np.testing.assert_allclose(ours[name], leaf.detach(), rtol=0, atol=1e-6)


def test_learning_rate_warms_up_and_stays():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4)
    rates = [float(optimizer.learning_rate(config, i)) for i in range(6)]
    assert rates == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert optimizer.learning_rate(OptimizerConfig(learning_rate=2.0, warmup_steps=0), 0) == 2.0


def test_learning_rate_falls_linearly_to_zero():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=2, decay=(4, 8))
    rates = [float(optimizer.learning_rate(config, i)) for i in (0, 1, 4, 5, 6, 7, 8, 20)]
    np.testing.assert_allclose(rates, [1, 2, 2, 1.5, 1, 0.5, 0, 0], rtol=1e-6)
    with pytest.raises(ValueError, match="decay must be"):
        OptimizerConfig(decay=(8, 4))


def test_split_and_merge():
    trainable, frozen = optimizer.split(TREE, (r"janusflow/vision_gen_", r"repa/"))
    assert set(trainable) | set(frozen) == set(SHAPES) and not set(trainable) & set(frozen)
    assert "repa/linear_1/kernel" in trainable
    # Patterns are held against the beginning of a path.
    assert optimizer.split(TREE, (r"janusflow/vision_gen_", r"re"))[0].keys() == trainable.keys()
    assert optimizer.merge(trainable, frozen) == TREE
    state = jax.eval_shape(optimizer.adamw(OptimizerConfig()).init, trainable)
    sizes = sum(leaf.size for leaf in trainable.values())
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * sizes + 2  # and two counters


def test_patterns_that_match_nothing_are_named():
    with pytest.raises(ValueError, match="matches 'linear_1', 'vae/x'; .* 'janusflow/"):
        optimizer.split(TREE, (r"repa/", r"linear_1", r"vae/x"))


def test_stages_train_what_table_1_says():
    """Stage 1: linear layers, g_enc, g_dec; 2: all but SigLIP; 3: SigLIP too; never the VAE."""

    def parts(stage):
        paths = (path.split("/") for path in optimizer.split(TREE, stage)[0])
        return {path[0] if path[0] != "janusflow" else path[1] for path in paths}

    first = {
        "vision_und_enc_aligner",
        "beg_of_und_embed",
        "vision_gen_enc_model",
        "vision_gen_enc_aligner",
        "vision_gen_dec_aligner_norm",
        "vision_gen_dec_aligner",
        "vision_gen_dec_model",
        "repa",
    }
    assert parts(optimizer.ADAPTATION) == first
    assert parts(optimizer.PRETRAINING) == first | {"language_model"}
    assert parts(optimizer.SFT) == first | {"language_model", "vision_und_enc_model"}
    frozen = optimizer.split(TREE, optimizer.SFT)[1]
    assert {path.split("/")[0] for path in frozen} == {"vae", "janusflow"}
    assert all("attn_pool" in path for path in frozen if path.startswith("janusflow"))
