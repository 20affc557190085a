"""Low-rank factors: against closed forms, and what they leave as it was."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from jflow.training import lora
from jflow.training.lora import FACTORS, LoraConfig
from jflow.training.objectives import ObjectiveConfig, text_sums
from jflow.training.optimizer import OptimizerConfig, adamw, merge
from jflow.training.state import EMAConfig, init
from jflow.training.step import train_step
from tests import tiny_training as tiny

BLOCKS = "janusflow/language_model/layers/block"
ALIGNER = "janusflow/vision_und_enc_aligner"
CONFIG = LoraConfig(rank=3, alpha=5.0, targets=(f"{BLOCKS}/", ALIGNER))
SCALE = 5.0 / 3


def flat(tree) -> dict:
    return flatten_dict(tree, sep="/")


def with_random_factors(seed: int = 0) -> dict:
    """Parameters of the tiny model with factors, B not zero."""
    rng = np.random.default_rng(seed)
    tree = lora.init(tiny.params(), CONFIG, (FACTORS,), seed)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * 0.1)
            if path[-1].key == "lora_b"
            else leaf
        ),
        tree,
    )


def test_factors_lie_beside_the_chosen_kernels_and_change_nothing_at_first():
    before = flat(tiny.params())
    tree = lora.init(tiny.params(), CONFIG, (FACTORS,), seed=0)
    added = {path: leaf.shape for path, leaf in flat(tree).items() if path not in before}
    # Two layers of 32 channels, two heads, MLP of 48; SigLIP of 16.
    sizes = {f"self_attn/{n}_proj": (32, 32) for n in "qkvo"} | {
        "mlp/gate_proj": (32, 48), "mlp/up_proj": (32, 48), "mlp/down_proj": (48, 32)
    }  # fmt: skip
    want = {f"{BLOCKS}/{name}/lora_a": (2, rows, 3) for name, (rows, _) in sizes.items()}
    want |= {f"{BLOCKS}/{name}/lora_b": (2, 3, columns) for name, (_, columns) in sizes.items()}
    assert added == want | {f"{ALIGNER}/lora_a": (16, 3), f"{ALIGNER}/lora_b": (3, 32)}
    a = np.asarray(flat(tree)[f"{BLOCKS}/mlp/down_proj/lora_a"])
    assert abs(a.std() * 48**0.5 - 1) < 0.15 and not np.array_equal(a[0], a[1])
    merged = flat(lora.merge(tree, CONFIG))
    assert merged.keys() == before.keys()
    for path, leaf in before.items():
        np.testing.assert_array_equal(merged[path], leaf)


def test_merged_kernels_are_the_sums():
    tree = with_random_factors()
    leaves, merged = flat(tree), flat(lora.merge(tree, CONFIG))
    for layer in range(2):
        at = {name: np.float64(leaves[f"{BLOCKS}/mlp/up_proj/{name}"][layer])
              for name in ("kernel", "lora_a", "lora_b")}  # fmt: skip
        np.testing.assert_allclose(
            merged[f"{BLOCKS}/mlp/up_proj/kernel"][layer],
            at["kernel"] + SCALE * at["lora_a"] @ at["lora_b"],
            rtol=0,
            atol=1e-6,
        )
    kept = lora.unmerged(leaves)
    assert {path for path in kept if path.endswith("/kernel")} == {
        path for path in merged if np.any(merged[path] != leaves.get(path, 0))
    }
    # What a checkpoint holds: the merged tree, and beside it what leads back.
    again = merged | kept
    assert again.keys() == leaves.keys() and all(again[path] is leaves[path] for path in kept)


def test_gradients_are_those_of_the_kernel_through_the_product():
    """dA = s dW B^T and dB = s A^T dW, with dW from the dense model at the merged parameters."""
    tree, parts = with_random_factors(), tiny.modules()
    rows = tiny.stack([tiny.text_row([(1, 5, True), (2, 4, False)], 20, 1)])

    def loss(params):
        total, count = text_sums(params, rows, parts, ObjectiveConfig())["ar"]
        return total / count

    dense = jax.jit(jax.grad(loss), compiler_options=tiny.FAST)
    gradient = dense(lora.merge(tree, CONFIG))
    _, back = jax.vjp(partial(lora.merge, config=CONFIG), tree)
    (got,) = back(gradient)
    got, gradient, leaves = flat(got), flat(gradient), flat(tree)
    for module in (f"{BLOCKS}/self_attn/k_proj", f"{BLOCKS}/mlp/down_proj", ALIGNER):
        dw, a, b = (
            np.float64(x)
            for x in (
                gradient[f"{module}/kernel"],
                leaves[f"{module}/lora_a"],
                leaves[f"{module}/lora_b"],
            )
        )
        assert np.abs(dw).max() > 1e-4
        np.testing.assert_allclose(
            got[f"{module}/lora_a"], SCALE * dw @ b.swapaxes(-1, -2), rtol=1e-4, atol=1e-8
        )
        np.testing.assert_allclose(
            got[f"{module}/lora_b"], SCALE * a.swapaxes(-1, -2) @ dw, rtol=1e-4, atol=1e-8
        )


def test_full_rank_can_be_any_update():
    rng = np.random.default_rng(3)
    params = {"m": {"kernel": rng.standard_normal((2, 6, 4))}}
    config = LoraConfig(rank=6, alpha=2.0, targets=("m",))
    tree = lora.init(params, config, (FACTORS,), seed=0)
    wanted = rng.standard_normal((2, 6, 4))
    change = 6 / 2.0 * (wanted - params["m"]["kernel"])
    tree["m"]["lora_b"] = jnp.asarray(np.linalg.solve(np.float64(tree["m"]["lora_a"]), change))
    np.testing.assert_allclose(lora.merge(tree, config)["m"]["kernel"], wanted, rtol=0, atol=1e-4)


def test_training_finds_the_best_update_of_its_rank_and_nothing_else_moves():
    """Least squares: what is left are the singular values beyond the rank (Eckart-Young)."""
    rng = np.random.default_rng(4)
    params = {"m": {"kernel": jnp.asarray(rng.standard_normal((7, 5)), jnp.bfloat16)},
              "n": {"kernel": jnp.ones((3, 3))}}  # fmt: skip
    wanted = rng.standard_normal((7, 5))
    config = LoraConfig(rank=2, alpha=2.0, targets=("m/",))

    def objective(tree, batch, whole, step):
        tree = lora.merge(tree, config)
        return jnp.sum(jnp.square(tree["m"]["kernel"] - wanted)) + 0 * tree["n"]["kernel"][0, 0], {}

    options = OptimizerConfig(learning_rate=0.02, warmup_steps=1, clip_norm=1e9)
    state = init(lora.init(params, config, (FACTORS,), 0), (FACTORS,), adamw(options))
    assert set(state.params) == {"m/lora_a", "m/lora_b"}
    assert optax.tree.size(state.opt_state) < 3 * (14 + 10)
    step = jax.jit(
        partial(train_step, objective=objective, optimizer=options, ema=EMAConfig(0.9, 1))
    )
    end, _ = jax.lax.scan(lambda s, _: (step(s, ())[0], None), state, None, length=1500)
    jax.tree.map(np.testing.assert_array_equal, end.frozen, state.frozen)
    left = np.linalg.svd(wanted - np.float64(params["m"]["kernel"]), compute_uv=False)[2:]
    merged = lora.merge(merge(end.ema, end.frozen), config)
    found = float(np.sum(np.square(np.float64(merged["m"]["kernel"]) - wanted)))
    np.testing.assert_allclose(found, np.sum(left**2), rtol=1e-3)


def test_bfloat16_kernels_are_merged_before_they_are_rounded():
    params = {"m": {"kernel": jnp.ones((4, 4), jnp.bfloat16)}}
    config = LoraConfig(rank=1, alpha=1.0, targets=("m",))
    tree = lora.init(params, config, (FACTORS,), 0)
    tree["m"] |= {"lora_a": jnp.full((4, 1), 1e-2), "lora_b": jnp.full((1, 4), 1e-1)}
    exact = lora.merge(tree, config)["m"]["kernel"]
    np.testing.assert_array_equal(exact, np.full((4, 4), np.float32(1) + np.float32(1e-3)))
    rounded = lora.merge(tree, config, jnp.bfloat16)["m"]["kernel"]
    np.testing.assert_array_equal(rounded, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "targets, trainable, message",
    [
        (("janusflow/languag_model/",), (FACTORS,), "No kernel matches 'janusflow/languag_model/'"),
        (("vae/encoder/conv_in",), (FACTORS,), "vae/encoder/conv_in/kernel, which is a convol"),
        ((ALIGNER,), (ALIGNER,), "kernel is both trainable and one of lora.targets"),
        ((ALIGNER,), ("repa/",), "lora_a is not trainable: add "),
    ],
)
def test_bad_targets_are_one_sentence(targets, trainable, message):
    with pytest.raises(ValueError, match=message):
        lora.init(tiny.params(), LoraConfig(targets=targets), trainable, 0)
    with pytest.raises(ValueError, match="lora.rank must be at least 1"):
        LoraConfig(rank=0)


def test_without_a_config_nothing_happens():
    params = tiny.params()
    assert lora.init(params, None, (), 0) is params and lora.merge(params, None) is params
    assert lora.unmerged(flat(params)) == {}
