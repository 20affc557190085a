"""Losses and their gradients against torch in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jflow import losses


def close(got, want, atol=1e-6):
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("seed", [0, 1])
def test_chunked_cross_entropy_equals_torch(chunk, seed):
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((2, 7, 16), np.float32)
    kernel = rng.standard_normal((16, 37), np.float32) / 4
    targets = rng.integers(0, 37, (2, 7)).astype(np.int32)
    targets[0, :4] = targets[1, 2] = -1

    def mean(hidden, kernel):
        total, count = losses.autoregressive(hidden, kernel, targets, chunk)
        return jnp.sum(total) / jnp.sum(count), (total, count)

    (loss, (totals, counts)), gradients = jax.jit(jax.value_and_grad(mean, (0, 1), has_aux=True))(
        hidden, kernel
    )
    x, k = (torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (hidden, kernel))
    each = torch.nn.functional.cross_entropy(
        (x @ k).mT, torch.tensor(targets).long(), ignore_index=-1, reduction="none"
    )
    want = each.sum() / 9
    want.backward()
    assert counts.tolist() == [3, 6]
    close(totals / counts, each.sum(1).detach() / torch.tensor([3, 6]))
    close(loss, want.item())
    close(gradients[0], x.grad)
    close(gradients[1], k.grad)


def test_only_as_many_chunks_as_targets_fill_have_logits():
    """What is not a number at positions without targets would reach the head's gradient."""
    rng, length, chunk = np.random.default_rng(3), 24, 4
    targets = np.full((2, length), -1, np.int32)
    for row in targets:
        row[rng.choice(length, 2 * chunk, replace=False)] = rng.integers(0, 5, 2 * chunk)
    hidden = rng.standard_normal((2, length, 8), np.float32)
    kernel = rng.standard_normal((8, 5), np.float32)

    def loss(hidden, kernel):
        return jnp.sum(losses.autoregressive(hidden, kernel, targets, chunk)[0])

    want = jax.value_and_grad(loss, (0, 1))(hidden, kernel)
    hidden[targets < 0] = np.nan
    got = jax.value_and_grad(loss, (0, 1))(hidden, kernel)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_cross_entropy_without_targets_is_zero_with_zero_gradient():
    hidden, kernel = jnp.ones((1, 4, 8)), jnp.ones((8, 5))
    total, gradient = jax.value_and_grad(
        lambda h: losses.autoregressive(h, kernel, jnp.full((1, 4), -1), 2)[0][0]
    )(hidden)
    assert total == 0
    np.testing.assert_array_equal(gradient, 0)


def test_logits_of_all_tokens_never_exist_at_once():
    """Forward and backward of 2048 tokens and 8192 words stay below a quarter of the logits."""
    hidden, kernel = jnp.zeros((1, 2048, 16)), jnp.zeros((16, 8192))
    targets = jnp.zeros((1, 2048), jnp.int32)

    def temporary(chunk):
        gradient = jax.grad(lambda h, k: losses.autoregressive(h, k, targets, chunk)[0][0], (0, 1))
        compiled = jax.jit(gradient).lower(hidden, kernel).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * 2048 * 8192
    assert temporary(64) < logits / 4
    assert temporary(2048) >= logits


def test_cross_entropy_of_bfloat16_hidden_states():
    """Products of bfloat16 numbers, sums, logits and the head's gradient in float32."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((2, 64, 32)), jnp.bfloat16)
    kernel = jnp.asarray(rng.standard_normal((32, 50)) / 4, jnp.bfloat16).astype(jnp.float32)
    targets = jnp.asarray(rng.integers(0, 50, (2, 64)))

    def loss(hidden, kernel):
        return jnp.sum(losses.autoregressive(hidden, kernel, targets, 16)[0]) / targets.size

    got, got_grad = jax.value_and_grad(loss, 1)(hidden, kernel)
    want, want_grad = jax.value_and_grad(loss, 1)(hidden.astype(jnp.float32), kernel)
    close(got, want)  # rounded logits would be off by 1e-3
    assert got_grad.dtype == jnp.float32
    assert jnp.linalg.norm(got_grad - want_grad) < 3e-3 * jnp.linalg.norm(want_grad)


def test_rectified_flow_of_each_image_equals_torch():
    rng = np.random.default_rng(0)
    v, x, z0 = (rng.standard_normal((3, 4, 5, 4), np.float32) for _ in range(3))
    got, gradient = jax.vjp(lambda v: losses.rectified_flow(v, x, z0), v)
    v_torch = torch.tensor(v, requires_grad=True)
    want = torch.nn.functional.mse_loss(v_torch, torch.tensor(x - z0), reduction="none")
    want = want.mean((1, 2, 3))
    weights = np.float32([1, 2, 3])
    want.backward(torch.tensor(weights))
    close(got, want.detach())
    close(gradient(weights)[0], v_torch.grad)


def test_cosine_equals_torch():
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((3, 6, 8), np.float32) for _ in range(2))
    got, gradient = jax.vjp(lambda a: losses.cosine(a, b), a)
    a_torch = torch.tensor(a, requires_grad=True)
    want = torch.nn.functional.cosine_similarity(a_torch, torch.tensor(b), dim=-1).mean(1)
    want.sum().backward()
    close(got, want.detach())
    close(gradient(np.ones(3, np.float32))[0], a_torch.grad)


def test_cosine_closed_form():
    a = jnp.float32([[[1, 0], [0, 2]], [[3, 4], [0, 0]]])
    b = jnp.float32([[[5, 0], [0, -1]], [[4, 3], [1, 1]]])
    close(losses.cosine(a, b), [(1 - 1) / 2, (24 / 25 + 0) / 2])
    assert jnp.isfinite(jax.grad(lambda a: losses.cosine(a, b).sum())(a)).all()
