"""Answers about images: one prefill, then tokens one by one out of a cache of fixed size."""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

from jflow.compilation import WEIGHTS_STAY
from jflow.models.janusflow import JanusFlow
from jflow.models.layers import KVCache


@flax.struct.dataclass
class DecodeState:
    """cache: the prompt's slots, then one a new token; positions: [B] of the next token; logits:
    [B, vocab] of the next token; done: [B] rows that ended; step: tokens written so far."""

    cache: KVCache
    positions: jax.Array
    logits: jax.Array
    done: jax.Array
    step: jax.Array


@partial(jax.jit, static_argnames=("model", "max_new_tokens"))
def prefill(
    model: JanusFlow,
    params: dict,
    tokens: jax.Array,
    lengths: jax.Array,
    pixels: jax.Array,
    slots: jax.Array,
    max_new_tokens: int,
) -> DecodeState:
    """Reads the prompts, images included.

    Args:
      tokens: [B, T] padded at the right; lengths: [B].
      pixels: [B, I, S, S, 3] in [-1, 1]; slots: [B, I, 1 + N], see `embed_understanding`.
      max_new_tokens: slots to reserve in the cache.
    """
    variables = {"params": params}
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
    x = model.apply(variables, tokens, pixels, slots, method="embed_understanding")
    out = model.apply(variables, x, positions, segment_ids, method="language")
    last = jnp.take_along_axis(out.hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return DecodeState(
        cache=KVCache.of(out.k, out.v, segment_ids, reserve=max_new_tokens),
        positions=lengths,
        logits=model.apply(variables, last, method="logits"),
        done=jnp.zeros(lengths.shape, bool),
        step=jnp.zeros((), jnp.int32),
    )


def choose_token(
    logits: jax.Array, keys: jax.Array, temperature: jax.Array | None, top_p: jax.Array
) -> jax.Array:
    """The next token of each row: drawn from the nucleus, or the likeliest.

    Args:
      logits: [B, vocab]; keys: [B].
      temperature: above 0; None for the likeliest, which a GPU would have to ask for in the midst
        of every step were it a number.
      top_p: in (0, 1]: the smallest set of tokens that holds this much of the probability is kept
        (Holtzman et al. 2019, as transformers does it).

    Returns: [B] int32.
    """
    if temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = logits / temperature
    ordered = jnp.sort(scaled, axis=-1)[:, ::-1]
    probability = jax.nn.softmax(ordered, axis=-1)
    kept = jnp.cumsum(probability, axis=-1) - probability < top_p
    threshold = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    nucleus = jnp.where(scaled >= threshold, scaled, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, nucleus).astype(jnp.int32)


@partial(
    jax.jit,
    static_argnames=("model", "num_tokens"),
    donate_argnames=("state",),
    compiler_options=WEIGHTS_STAY,
)
def decode(
    model: JanusFlow,
    params: dict,
    state: DecodeState,
    keys: jax.Array,
    temperature: jax.Array | None,
    top_p: jax.Array,
    eos_id: jax.Array,
    num_tokens: int,
) -> tuple[DecodeState, jax.Array]:
    """Up to `num_tokens` more tokens; stops early when every row has ended.

    Args: keys [B], one a row; each draw folds in the number of its token. See `choose_token`.

    Returns: the state and [B, num_tokens] tokens, eos_id from each row's end on.
    """
    variables = {"params": params}
    batch = state.positions.shape[0]
    ones = jnp.ones((batch, 1), jnp.int32)

    def unfinished(carry):
        state, _, i = carry
        return (i < num_tokens) & ~jnp.all(state.done)

    def step(carry):
        state, tokens, i = carry
        cache = state.cache
        row_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, state.step)
        token = choose_token(state.logits, row_keys, temperature, top_p)
        token = jnp.where(state.done, eos_id, token)
        x = model.apply(variables, token[:, None], method="embed_text")
        out = model.apply(variables, x, state.positions[:, None], ones, cache, method="language")
        state = state.replace(
            cache=cache.write(out.k, out.v, ones),
            positions=state.positions + 1,
            logits=model.apply(variables, out.hidden[:, 0], method="logits"),
            done=state.done | (token == eos_id),
            step=state.step + 1,
        )
        return state, tokens.at[:, i].set(token), i + 1

    tokens = jnp.full((batch, num_tokens), eos_id, jnp.int32)
    state, tokens, _ = jax.lax.while_loop(unfinished, step, (state, tokens, 0))
    return state, tokens
