"""Attention's implementations against each other, its memory, and what remat keeps."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow.models import attention as module
from jflow.models.attention import attention, choose
from jflow.models.layers import Precision, Prefix, remat
from jflow.models.llama import Llama, LlamaConfig
from tests.tiny_training import FAST

EXACT, HALF = Precision(), Precision(compute=jnp.bfloat16)


def draw(seed, batch, length, heads, kv_heads, width, dtype=jnp.float32):
    """q, k, v and segment ids of packed rows: samples of random lengths, hidden tokens, padding."""
    rng = np.random.default_rng(seed)
    q, k, v = (
        jnp.asarray(rng.standard_normal((batch, length, h, width)), dtype)
        for h in (heads, kv_heads, kv_heads)
    )
    cuts = np.sort(rng.integers(1, length, (batch, 3)), axis=1)
    ids = 1 + (np.arange(length)[:, None] >= cuts[:, None]).sum(-1)
    ids[:, 2:5] = 0  # as a dropped prompt: its sample goes on behind it
    ids[:, -7:] = 0
    return q, k, v, jnp.asarray(ids, jnp.int32)


def value_and_gradients(compute, q, k, v):
    """The result, and gradients of a loss that weighs each element differently."""
    weights = jnp.asarray(np.random.default_rng(9).standard_normal(q.shape), jnp.float32)

    def loss(q, k, v):
        out = compute(q, k, v)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    both = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    options = FAST if jax.default_backend() == "cpu" else None
    (_, out), gradients = jax.jit(both, compiler_options=options)(q, k, v)
    return out, *gradients


def close(got, want, tolerance):
    """Of each array's largest number."""
    for ours, theirs in zip(got, want, strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize("seed", range(2))
def test_blocks_equal_the_whole(seed, monkeypatch):
    """Forward and backward, also where the last block is not full."""
    rng = np.random.default_rng(seed)
    heads = int(rng.choice([2, 4]))
    length = int(rng.integers(30, 60))
    q, k, v, ids = draw(seed, 2, length, heads, 2, 8)
    compute = partial(attention, precision=EXACT, segment_ids=ids, implementation="xla")
    whole = value_and_gradients(compute, q, k, v)
    monkeypatch.setattr(module, "DENSE", 16)
    monkeypatch.setattr(module, "BLOCK", int(rng.integers(5, 16)))
    close(value_and_gradients(compute, q, k, v), whole, 2e-6)


@pytest.mark.parametrize(
    "length, heads, kv_heads, dtype, tolerance",
    [
        (140, 2, 2, jnp.float32, 1e-5),
        (256, 4, 2, jnp.float32, 1e-5),
        (128, 1, 1, jnp.bfloat16, 2e-2),
    ],
)
def test_splash_equals_xla(length, heads, kv_heads, dtype, tolerance):
    """Pallas' interpreter runs the TPU's kernel here, forward and backward."""
    q, k, v, ids = draw(length, 2, length, heads, kv_heads, 64, dtype)
    got, want = (
        value_and_gradients(
            partial(attention, precision=EXACT, segment_ids=ids, implementation=name), q, k, v
        )
        for name in ("splash", "xla")
    )
    assert got[0].dtype == dtype
    close(got, want, tolerance)


@pytest.fixture
def cudnn_calls(monkeypatch):
    """Stands in for cuDNN, which is not here, with the same function of XLA; gives its calls."""
    calls, real = [], jax.nn.dot_product_attention

    def stand_in(q, k, v, implementation, mask=None):
        calls.append((q.shape[1], k.shape[1], mask is not None))
        assert implementation == "cudnn"
        # What it wants of a mask (fused_attention_stablehlo.py): all of T and S.
        assert mask is None or mask.shape == (q.shape[0], 1, q.shape[1], k.shape[1])
        return real(q, k, v, mask=mask, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    monkeypatch.setattr(module, "gpu_generation", lambda: 8.0)
    return calls


def test_what_cudnn_is_asked_equals_xla(cudnn_calls, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 32)
    q, k, v, ids = draw(3, 2, 75, 4, 2, 16, jnp.bfloat16)
    both = [partial(attention, precision=HALF, implementation=name) for name in ("cudnn", "xla")]
    packed = [value_and_gradients(partial(f, segment_ids=ids), q, k, v) for f in both]
    close(*packed, 3e-2)
    assert set(cudnn_calls) == {(32, 32, True), (32, 64, True), (12, 76, True)}  # 75, made even
    cudnn_calls.clear()
    close(*([f(q[:, :74], k[:, :74], v[:, :74])] for f in both), 2e-2)
    assert cudnn_calls == [(74, 74, False)]
    cudnn_calls.clear()
    prefix = Prefix(k[:, :60], v[:, :60], ids[:, :60])
    behind = q[:, 60:], k[:, 60:], v[:, 60:]
    close(*([f(*behind, segment_ids=ids[:, 60:], cache=prefix)] for f in both), 2e-2)
    assert cudnn_calls == [(16, 76, True)]


def test_behind_a_prefix_equals_the_end_of_the_whole(monkeypatch):
    """All at once and in blocks; what the prefix's own queries find is not asked for."""
    q, k, v, ids = draw(5, 2, 61, 4, 2, 8)
    compute = partial(attention, precision=EXACT, implementation="xla")
    want = compute(q, k, v, segment_ids=ids)[:, 20:]
    prefix = Prefix(k[:, :20], v[:, :20], ids[:, :20])
    behind = dict(segment_ids=ids[:, 20:], cache=prefix)
    close([compute(q[:, 20:], k[:, 20:], v[:, 20:], **behind)], [want], 2e-6)
    monkeypatch.setattr(module, "DENSE", 16)
    monkeypatch.setattr(module, "BLOCK", 12)
    close([compute(q[:, 20:], k[:, 20:], v[:, 20:], **behind)], [want], 2e-6)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("length, kv_heads", [(643, 4), (1280, 2)])
def test_gpu_cudnn_equals_xla(length, kv_heads):
    """Packed rows, forward and gradients, against float32 on the same rounded numbers."""
    q, k, v, ids = draw(length, 2, length, 4, kv_heads, 128, jnp.bfloat16)
    want = value_and_gradients(
        partial(attention, precision=EXACT, segment_ids=ids, implementation="xla"),
        *(a.astype(jnp.float32) for a in (q, k, v)),
    )
    compute = partial(attention, precision=HALF, segment_ids=ids, implementation="cudnn")
    close(value_and_gradients(compute, q, k, v), want, 3e-2)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("length, kv_heads, segments", [(643, 4, 5), (4096, 2, 13)])
def test_gpu_cudnn_over_runs_equals_xla(length, kv_heads, segments):
    """Rows as the data packs them: nothing hidden, one without padding, one that is padding."""
    q, k, v, ids = draw(length, 4, length, 4, kv_heads, 128, jnp.bfloat16)
    ids = jnp.asarray(np.sort(ids, axis=1)[:, ::-1])  # Runs, padding last.
    ids = ids.at[2].set(jnp.maximum(ids[2], 1)).at[3].set(0)
    names = dict(segment_ids=ids, segments=segments)
    want = value_and_gradients(
        partial(attention, precision=EXACT, implementation="xla", **names),
        *(a.astype(jnp.float32) for a in (q, k, v)),
    )
    compute = partial(attention, precision=HALF, implementation="cudnn", **names)
    close(value_and_gradients(compute, q, k, v), want, 3e-2)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
def test_gpu_cudnn_behind_a_prefix_and_without_mask_equals_xla():
    """As the sampler has it: prompts of 40 and 1 tokens at the end of 64 places."""
    q, k, v, _ = draw(7, 2, 640, 4, 4, 128, jnp.bfloat16)
    ids = jnp.asarray(np.arange(640) >= np.array([[24], [63]]), jnp.int32)
    prefix = Prefix(k[:, :64], v[:, :64], ids[:, :64])
    behind = dict(segment_ids=ids[:, 64:], cache=prefix)
    for rows in (behind, behind | {"segments": 2}, {}):
        got, want = (
            jax.jit(partial(attention, precision=HALF, implementation=name, **rows))(
                q[:, 64:], k[:, 64:], v[:, 64:]
            )
            for name in ("cudnn", "xla")
        )
        close([got], [want], 2e-2)


def test_choice_follows_platform_and_shape(monkeypatch):
    def chosen(
        platform, length=512, width=128, dtype=jnp.bfloat16, ids=True, cached=False, gpu=8.0
    ):
        monkeypatch.setattr(module, "platform", lambda: platform)
        monkeypatch.setattr(module, "gpu_generation", lambda: gpu)
        q = jax.ShapeDtypeStruct((1, length, 2, width), dtype)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32) if ids else None
        return choose(q, q, ids, "a cache" if cached else None, "auto")

    assert chosen("cpu") == chosen("cpu", length=4096) == "xla"
    assert chosen("tpu") == chosen("tpu", dtype=jnp.float32) == chosen("tpu", width=64) == "splash"
    for odd in (dict(length=100), dict(width=32), dict(ids=False), dict(cached=True)):
        assert chosen("tpu", **odd) == "xla", odd
    for platform in ("gpu", "cuda"):
        for fits in ({}, dict(length=643), dict(ids=False), dict(cached=True)):
            assert chosen(platform, **fits) == "cudnn", fits
        for odd in (dict(dtype=jnp.float32), dict(width=512), dict(width=36), dict(length=1),
                    dict(length=577, ids=False)):  # fmt: skip
            assert chosen(platform, **odd) == "xla", odd
        # A wide head is for Hopper, and nothing for a T4.
        assert chosen(platform, width=256, gpu=9.0) == "cudnn"
        assert chosen(platform, width=256, gpu=8.9) == chosen(platform, gpu=7.5) == "xla"


def test_platform_is_that_of_the_mesh_in_use():
    assert module.platform() == "cpu"
    device = jax.sharding.AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu")
    axes = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("data",), axes, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert module.platform() == "tpu"


def test_long_rows_never_hold_a_square():
    """Neither scores nor mask of [T, T], forward or backward, in the compiled program."""
    length = 2048
    q = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def largest(dense):
        def loss(q, k, v, ids):
            if dense:
                mask = module.causal_mask(ids)
                return jnp.sum(module._xla(q, k, v, mask, EXACT))
            return jnp.sum(attention(q, k, v, EXACT, ids))

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, q, q, ids).compile()
        shapes = re.findall(r"\w+\[([\d,]+)\]", compiled.as_text())
        squares = [s for s in shapes if s.split(",").count(str(length)) > 1]
        return len(squares), compiled.memory_analysis().temp_size_in_bytes

    squares, memory = largest(False)
    dense_squares, dense_memory = largest(True)
    assert squares == 0 and dense_squares > 0
    assert memory < dense_memory / 2


def test_remat_policies_trade_memory_and_nothing_else():
    config = LlamaConfig(64, 64, 256, 4, 4, max_position_embeddings=256)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 256, 64)), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(256), (2, 256))
    rows = (x, positions, positions // 100)
    shapes = jax.eval_shape(partial(Llama(config).init, jax.random.key(0)), *rows)["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda a: jnp.asarray(rng.standard_normal(a.shape) * 0.1, jnp.float32), shapes
    )
    memory, gradients = {}, {}
    for policy in ("none", "dots", "full"):
        model = Llama(config, remat=policy)

        def loss(params, model=model):
            return jnp.mean(jnp.square(model.apply({"params": params}, *rows).hidden[..., :9]))

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        memory[policy] = compiled.memory_analysis().temp_size_in_bytes
        gradients[policy] = compiled(params)
    assert memory["dots"] < 0.6 * memory["none"] and memory["full"] < 0.8 * memory["dots"]
    for policy in ("dots", "full"):
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
            gradients[policy],
            gradients["none"],
        )


def test_unknown_remat_is_refused():
    with pytest.raises(ValueError, match="remat must be none, dots or full, not True"):
        remat(Llama, True)


@pytest.mark.parametrize("seed", range(3))
def test_runs_cover_each_row_once(seed):
    """Where each begins and ends, against numpy; a row of one, and -1 behind the last."""
    rng = np.random.default_rng(seed)
    ids = np.repeat(rng.permutation(6)[None] + 1, rng.integers(1, 9, 6), axis=1)
    ids = np.concatenate([ids, np.zeros_like(ids)])
    starts, lengths = module.runs(jnp.asarray(ids), 8)
    edges = np.flatnonzero(np.diff(ids[0], prepend=-1))
    np.testing.assert_array_equal(starts[0], [*edges, -1, -1])
    np.testing.assert_array_equal(lengths[0], [*np.diff([*edges, ids.shape[1]]), -1, -1])
    np.testing.assert_array_equal(starts[1], [0] + [-1] * 7)
    np.testing.assert_array_equal(lengths[1], [ids.shape[1]] + [-1] * 7)
