"""Attention behind one function, computed by what the hardware has for it.

xla     any backend: the scores of all queries at once, or of one block of queries after another
        where there are many, so that [B, H, T, T] never exists. Reads a cache in place.
splash  TPU: the Pallas kernel that comes with JAX; scores and masks stay on the chip. Trains and
        reads prompts, has no cache. On another platform it runs in Pallas' interpreter, for tests.
cudnn   GPU: cuDNN's flash attention, 16-bit numbers only. It can be told where the samples of a
        packed row begin, and computes no more than each of them (from Hopper on); else segments
        reach it as a mask over one block of queries at a time, made again in the backward pass.

New tokens are the last ones of the keys; T = S where nothing lies before them.

Axes: B batch, T new tokens, S tokens seen, H query heads, K key/value heads, D head width.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange

# What jax.nn.dot_product_attention calls; it has no word for where samples begin.
from jax._src.cudnn import fused_attention_stablehlo as fused
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jax.sharding import PartitionSpec

from jflow.models.layers import FLASH_RESIDUALS, KVCache, Precision, Prefix, platform
from jflow.sharding import constrain, spec

Implementation = Literal["auto", "xla", "splash", "cudnn"]

# Queries behind each other in one block, and how many may be computed at once without blocks.
BLOCK, DENSE = 512, 1024
# Compute capabilities: cuDNN has kernels for packed rows from Hopper on, and none before Ampere.
AMPERE, HOPPER = 8, 9
# A segment that no token has: of padding.
NOBODY = -1


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    precision: Precision,
    segment_ids: jax.Array | None = None,
    cache: KVCache | Prefix | None = None,
    implementation: Implementation = "auto",
    segments: int | None = None,
) -> jax.Array:
    """softmax(q k' / sqrt(D)) v over the cached tokens and the new ones together.

    Args:
      q: [B, T, H, D]; k, v: [B, S, K, D] with H a multiple of K (grouped queries).
      segment_ids: [B, T] with T = S: a token sees the earlier ones of its own segment and itself.
        None: every query sees every key.
      cache: one layer's, for tokens with segment_ids; they also see the cached tokens of their
        segment. Behind a KVCache T = 1, and the token's slot is free.
      implementation: see the module; "auto" is by platform and shape, and what the chosen one
        cannot compute falls to xla.
      segments: of how many at most a row is made, with what is before it in a Prefix and padding
        counted, each one run of tokens (as batch.py has them); None where that is not known.

    Returns: [B, T, H, D]. Raises ValueError for heads that do not divide.
    """
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads do not divide over {kv_heads} key/value heads.")
    chosen = choose(q, k, segment_ids, cache, implementation)
    if isinstance(cache, Prefix):
        k, v = (jnp.concatenate(pair, axis=1) for pair in ((cache.k, k), (cache.v, v)))
        segment_ids = jnp.concatenate([cache.segment_ids, segment_ids], axis=1)
    if chosen == "splash":
        return _splash(q, k, v, segment_ids)
    if chosen == "cudnn":
        if segment_ids is not None and segments and gpu_generation() >= HOPPER:
            return _cudnn_packed(q, k, v, segment_ids, segments)
        return _cudnn(q, k, v, segment_ids)
    if segment_ids is None:
        return _xla(q, k, v, None, precision)
    if isinstance(cache, KVCache):
        return _behind_cache(q, k, v, segment_ids, cache, precision)
    if k.shape[1] <= DENSE:
        return _xla(q, k, v, causal_mask(segment_ids)[:, -q.shape[1] :], precision)
    return _xla_in_blocks(q, k, v, segment_ids, precision)


def choose(
    q: jax.Array,
    k: jax.Array,
    segment_ids: jax.Array | None,
    cache: KVCache | Prefix | None,
    implementation: Implementation,
) -> Literal["xla", "splash", "cudnn"]:
    """What computes these shapes; see `attention`."""
    queries, width = q.shape[1], q.shape[3]
    if implementation == "auto":
        implementation = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(platform(), "xla")
        # Below this a kernel's blocks are mostly padding, and its heads less than half a lane.
        if implementation == "splash" and (queries < 128 or width % 64):
            return "xla"
    if implementation == "splash" and segment_ids is not None and cache is None:
        return "splash"
    if implementation != "cudnn" or queries == 1 or isinstance(cache, KVCache):
        return "xla"
    # cuDNN: 16 bits, D a multiple of 8 up to some width; its backward pass wants even T and S.
    generation = gpu_generation()
    widest = 256 if generation >= HOPPER else 128 if generation >= AMPERE else 0
    sixteen = q.dtype in (jnp.bfloat16, jnp.float16) and width % 8 == 0 and width <= widest
    even = segment_ids is not None or (queries % 2 == 0 and k.shape[1] % 2 == 0)
    return "cudnn" if sixteen and even else "xla"


def gpu_generation() -> float:
    """The compute capability of this machine's GPUs."""
    return float(jax.local_devices(backend="gpu")[0].compute_capability)


def causal_mask(segment_ids: jax.Array) -> jax.Array:
    """[B, T] segment ids -> [B, T, T]: may query t see key s? Same segment and s <= t.

    >>> causal_mask(jnp.array([[1, 1, 2]]))[0].astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    """
    length = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return same & jnp.tril(jnp.ones((length, length), bool))


def _xla(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, precision: Precision
) -> jax.Array:
    """Attention under a mask [B, T, S]."""
    kv_heads, width = k.shape[2], q.shape[3]
    group = q.shape[2] // kv_heads
    # The queries of a group behind each other, so that both products and their derivatives sum
    # over one axis: over two, a CPU takes five times as long for the gradient of short rows.
    q = rearrange(q, "B T (K G) D -> B K (G T) D", K=kv_heads)
    score_type = precision.softmax
    s = jnp.einsum("BKQD,BSKD->BKQS", q, k, preferred_element_type=score_type)
    s = s * jnp.asarray(width**-0.5, score_type)
    if mask is not None:
        s = jnp.where(jnp.tile(mask, (1, group, 1))[:, None], s, jnp.finfo(score_type).min)
    weights = jax.nn.softmax(s, axis=-1).astype(v.dtype)
    out = jnp.einsum("BKQS,BSKD->BKQD", weights, v)
    return rearrange(out, "B K (G T) D -> B T (K G) D", G=group)


def _behind_cache(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    cache: KVCache,
    precision: Precision,
) -> jax.Array:
    """Attention of one token as if it stood in its slot of the cache, which is only read.

    Its score takes the slot's place. Joined behind the others, it would have a GPU compute them
    over and over; so softmax and the product behind it become one kernel.
    """
    score_type = precision.softmax
    q = rearrange(q, "B 1 (K G) D -> B K G D", K=k.shape[2])
    k, v = (rearrange(a, "B 1 K D -> B K 1 D").astype(score_type) for a in (k, v))
    past = jnp.einsum("BKGD,BKDS->BKGS", q, cache.k, preferred_element_type=score_type)
    now = jnp.sum(q.astype(score_type) * k, axis=-1, keepdims=True)
    seen = (segment_ids == cache.segment_ids)[:, None, None]
    here = jnp.arange(seen.shape[-1]) == cache.slot
    s = jnp.where(seen, past, jnp.finfo(score_type).min)
    s = jnp.where(here, now, s) * jnp.asarray(q.shape[3] ** -0.5, score_type)
    weights = jax.nn.softmax(s, axis=-1).astype(cache.v.dtype)
    now = jnp.sum(jnp.where(here, weights, 0), axis=-1, keepdims=True, dtype=score_type)
    past = jnp.where(here, 0, weights)
    out = jnp.einsum("BKGS,BKSD->BKGD", past, cache.v, preferred_element_type=score_type) + now * v
    return rearrange(out.astype(q.dtype), "B K G D -> B 1 (K G) D")


def _keep_flash(primitive, *_, **__) -> bool:
    """A policy of jax.checkpoint: cuDNN's results are kept, everything else is made again."""
    return "dot_product_attention_fwd" in primitive.name


def _rows_of_mask(query_ids: jax.Array, key_ids: jax.Array, start: jax.Array) -> jax.Array:
    """[B, t] and [B, T] segment ids -> the rows of `causal_mask` from `start` on, [B, t, T]."""
    earlier = jnp.arange(key_ids.shape[1]) <= start + jnp.arange(query_ids.shape[1])[:, None]
    return (query_ids[:, :, None] == key_ids[:, None, :]) & earlier


def _xla_in_blocks(q, k, v, segment_ids, precision) -> jax.Array:
    """One block of queries after another over all keys; no more than [B, H, BLOCK, T] scores exist.

    A loop, because a compiler may well compute parts that do not depend on each other at once.
    """
    new, before = q.shape[1], k.shape[1] - q.shape[1]
    q, k, v, segment_ids = _padded(q, k, v, segment_ids, BLOCK)

    @jax.checkpoint
    def block(_, part):
        queries, ids, start = part
        mask = _rows_of_mask(ids, segment_ids, start)
        return None, _xla(queries, k, v, mask, precision)

    parts = (
        rearrange(q, "B (n t) H D -> n B t H D", t=BLOCK),
        rearrange(segment_ids[:, before:], "B (n t) -> n B t", t=BLOCK),
        jnp.arange(before, k.shape[1], BLOCK),
    )
    _, out = jax.lax.scan(block, None, parts)
    return rearrange(out, "n B t H D -> B (n t) H D")[:, :new]


def _cudnn(q, k, v, segment_ids) -> jax.Array:
    """cuDNN's flash attention; JAX splits it over a mesh by itself, as its queries lie.

    With segments it is computed in blocks of queries, each over the keys up to its end, so that
    half of the products fall away and no whole mask exists.
    """
    if segment_ids is None:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    new, before = q.shape[1], k.shape[1] - q.shape[1]
    q, k, v, segment_ids = _padded(q, k, v, segment_ids, 2)

    @partial(jax.checkpoint, policy=_keep_flash)
    def block(q, k, v, query_ids, key_ids):
        mask = _rows_of_mask(query_ids, key_ids, k.shape[1] - q.shape[1])[:, None]
        mask = constrain(mask, "batch", None, None, None)
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")

    out = []
    for start in range(before, k.shape[1], BLOCK):
        stop = min(start + BLOCK, k.shape[1])
        queries = slice(start - before, stop - before)
        ids = segment_ids[:, start:stop], segment_ids[:, :stop]
        out.append(block(q[:, queries], k[:, :stop], v[:, :stop], *ids))
    return jnp.concatenate(out, axis=1)[:, :new]


def runs(segment_ids: jax.Array, segments: int) -> tuple[jax.Array, jax.Array]:
    """[B, T] segment ids -> where each run of one id begins, and its length; [B, segments] int32.

    -1 behind the last run.

    >>> [a.tolist() for a in runs(jnp.array([[7, 7, 8, 0]]), 4)]
    [[[0, 2, 3, -1]], [[2, 1, 1, -1]]]
    """
    length = segment_ids.shape[1]

    def one(ids):
        first = jnp.append(True, ids[1:] != ids[:-1])
        edges = jnp.nonzero(first, size=segments + 1, fill_value=length)[0].astype(jnp.int32)
        there = edges[:-1] < length
        return jnp.where(there, edges[:-1], -1), jnp.where(there, jnp.diff(edges), -1)

    return jax.vmap(one)(segment_ids)


def _cudnn_packed(q, k, v, segment_ids, segments: int) -> jax.Array:
    """cuDNN's flash attention over each run of a row alone; tokens of a prefix ask nothing."""
    length, before = k.shape[1], k.shape[1] - q.shape[1]
    q = jnp.pad(q, ((0, 0), (before, 0), (0, 0), (0, 0)))
    # JAX has no derivative for odd lengths. What is behind the last run is not computed.
    q, k, v, segment_ids = _padded(q, k, v, segment_ids, 2)
    starts, lengths = runs(segment_ids, segments)
    starts = jnp.pad(starts, ((0, 0), (0, 1)), constant_values=-1)
    # JAX takes these as they happen to lie: to be those of a device's own rows they are told to.
    starts, lengths = constrain(starts, "batch", None), constrain(lengths, "batch", None)
    out = fused.dot_product_attention(
        q, k, v,
        q_seqlen=lengths, kv_seqlen=lengths, q_offsets=starts, kv_offsets=starts,
        scale=q.shape[3] ** -0.5, mask_type=fused.MaskType.PADDING_CAUSAL,
    )  # fmt: skip
    return out[:, before:length]


def _padded(q, k, v, segment_ids, multiple: int) -> tuple:
    """All four, padded behind their last tokens until the queries are a multiple; the padding is a
    segment of its own."""
    missing = -q.shape[1] % multiple
    q, k, v = (jnp.pad(a, ((0, 0), (0, missing), (0, 0), (0, 0))) for a in (q, k, v))
    return q, k, v, jnp.pad(segment_ids, ((0, 0), (0, missing)), constant_values=NOBODY)


def _splash(q, k, v, segment_ids) -> jax.Array:
    """Splash attention on each device's own rows and heads."""
    mesh, here = jax.sharding.get_abstract_mesh(), platform()
    length = q.shape[1]
    q, k, v, segment_ids = _padded(q, k, v, segment_ids, 128)
    block = max(b for b in range(128, BLOCK + 1, 128) if q.shape[1] % b == 0)
    names = (
        "block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv",
        "block_kv_dkv_compute", "block_q_dq", "block_kv_dq",
    )  # fmt: skip

    def attend(q, k, v, segment_ids):
        one = splash_attention_mask.CausalMask((q.shape[1], q.shape[1]))
        kernel = splash.make_splash_mha(
            splash_attention_mask.MultiHeadMask([one] * q.shape[2]),
            block_sizes=splash.BlockSizes(**dict.fromkeys(names, block)),
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=FLASH_RESIDUALS,
            interpret=here != "tpu",
        )
        # The kernel does not scale the scores, and has heads before tokens.
        q = (q * q.shape[3] ** -0.5).astype(q.dtype)
        q, k, v = (rearrange(a, "B T H D -> B H T D") for a in (q, k, v))
        out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segment_ids, segment_ids))
        return rearrange(out, "B H T D -> B T H D")

    if not mesh.empty:
        # All heads are split or none: each device needs the keys of its own queries.
        heads = spec(k.shape, ("batch", None, "heads", None), mesh)
        rows = PartitionSpec(heads[0])
        attend = jax.shard_map(
            attend, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
        )
    return attend(q, k, v, segment_ids)[:, :length]
