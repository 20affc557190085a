"""The decoder against transformers' LlamaForCausalLM at random configs, and its own promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from einops import rearrange

from jflow.models.layers import KVCache, by_rows
from jflow.models.llama import Llama, LlamaConfig, unstack_layers


def random_config(seed: int) -> dict:
    """A small config; some with grouped queries, some with a head width of their own."""
    rng = np.random.default_rng(seed)
    kv_heads, groups, width = rng.integers(1, 4), rng.integers(1, 4), 2 * rng.integers(2, 9)
    heads = int(kv_heads * groups)
    return dict(
        vocab_size=int(rng.integers(20, 90)),
        hidden_size=int(heads * (width if seed % 2 else rng.integers(5, 15))),
        intermediate_size=int(rng.integers(10, 80)),
        num_hidden_layers=int(rng.integers(1, 5)),
        num_attention_heads=heads,
        num_key_value_heads=int(kv_heads),
        head_dim=int(width),
        rms_norm_eps=float(rng.choice([1e-6, 1e-5])),
        rope_theta=float(rng.choice([10000.0, 500.0])),
        max_position_embeddings=256,
    )


def reference(fields: dict, seed: int) -> transformers.LlamaForCausalLM:
    fields = dict(fields)
    rope = {"rope_theta": fields.pop("rope_theta"), "rope_type": "default"}
    config = transformers.LlamaConfig(**fields, rope_parameters=rope, attn_implementation="eager")
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn_like(p)
            p.copy_(1 + 0.1 * noise if "norm" in name else noise / p.shape[-1] ** 0.5)
    return model


def our_params(model: transformers.LlamaForCausalLM, layers: int) -> dict:
    """Copies the weights by hand, so that the conversion table is not its own judge."""
    state = {name: p.detach().numpy() for name, p in model.named_parameters()}

    def stack(name):
        return np.stack([state[f"model.layers.{i}.{name}.weight"] for i in range(layers)])

    def kernels(part, names):
        return {n: {"kernel": rearrange(stack(f"{part}.{n}"), "l o i -> l i o")} for n in names}

    block = {
        "self_attn": kernels("self_attn", ["q_proj", "k_proj", "v_proj", "o_proj"]),
        "mlp": kernels("mlp", ["gate_proj", "up_proj", "down_proj"]),
        "input_layernorm": {"scale": stack("input_layernorm")},
        "post_attention_layernorm": {"scale": stack("post_attention_layernorm")},
    }
    return {
        "embed_tokens": state["model.embed_tokens.weight"],
        "layers": {"block": block},
        "norm": {"scale": state["model.norm.weight"]},
        "lm_head": {"kernel": state["lm_head.weight"].T},
    }


def setup(seed: int):
    fields = random_config(seed)
    torch_model = reference(fields, seed)
    params = our_params(torch_model, fields["num_hidden_layers"])
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, fields["vocab_size"], (2, 13))
    return torch_model, Llama(LlamaConfig.from_hf(fields)), {"params": params}, tokens


def positions_like(tokens):
    return np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)


@pytest.mark.parametrize("seed", range(8))
def test_equals_transformers(seed):
    """Logits, and the hidden state after every block, within float32 rounding."""
    torch_model, model, variables, tokens = setup(seed)
    with torch.no_grad():
        want = torch_model(torch.tensor(tokens), output_hidden_states=True)
    x = model.apply(variables, tokens, method="embed")
    positions, ones = positions_like(tokens), np.ones_like(tokens)
    for layer in range(1, model.config.num_hidden_layers):
        tap = model.apply(variables, x, positions, ones, None, layer).tap
        np.testing.assert_allclose(tap, want.hidden_states[layer].numpy(), rtol=0, atol=2e-5)
    out = model.apply(variables, x, positions, ones)
    logits = model.apply(variables, out.hidden, method="logits")
    np.testing.assert_allclose(logits, want.logits.numpy(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("seed", range(4))
def test_cache_and_layers_apart_equal_the_full_forward(seed):
    """Prefill, then one by one behind the cache; scanned, unrolled, apart, by rows as on a GPU."""
    _, model, variables, tokens = setup(seed)
    x = model.apply(variables, tokens, method="embed")
    positions, ones = positions_like(tokens), np.ones_like(tokens)
    want = model.apply(variables, x, positions, ones).hidden
    apart = Llama(model.config, scan_layers=False)
    apart_variables = {"params": unstack_layers(dict(variables["params"]))}
    rows_variables = by_rows(jax.tree.map(jnp.asarray, apart_variables))
    unrolled = Llama(model.config, unroll=2)
    for m, v in (
        (model, variables), (apart, apart_variables), (apart, rows_variables), (unrolled, variables)
    ):  # fmt: skip
        apply = jax.jit(m.apply)
        for rows in (slice(2), slice(1)):  # of one row a token is a single vector
            given = [a[rows] for a in (x, positions, ones)]
            head = apply(v, *(a[:, :10] for a in given))
            # Two padded slots between, and the cache written in two parts.
            k, v_ = (jnp.pad(a, ((0, 0), (0, 0), (0, 2), (0, 0), (0, 0))) for a in (head.k, head.v))
            ids = np.pad(given[2][:, :10], ((0, 0), (0, 2)))
            cache = KVCache.of(k[:, :, :4], v_[:, :, :4], ids[:, :4], reserve=12)
            # What is in an empty slot does not matter.
            cache = cache.replace(k=cache.k.at[..., 4:].set(9.0), v=cache.v.at[..., 4:, :].set(9.0))
            cache = cache.write(k[:, :, 4:], v_[:, :, 4:], ids[:, 4:])
            got = [head.hidden]
            for t in range(10, 13):
                out = apply(v, *(a[:, t : t + 1] for a in given), cache)
                cache = cache.write(out.k, out.v, given[2][:, t : t + 1])
                got.append(out.hidden)
            np.testing.assert_allclose(jnp.concatenate(got, 1), want[rows], rtol=0, atol=1e-5)
            assert cache.slot == 15
            np.testing.assert_array_equal(cache.segment_ids[0], [1] * 10 + [0] * 2 + [1] * 3 + [0])


def test_logits_by_rows_are_the_same():
    _, model, variables, tokens = setup(0)
    hidden = model.apply(variables, tokens, method="embed")
    want = model.apply(variables, hidden, method="logits")
    turned = by_rows(jax.tree.map(jnp.asarray, variables["params"]))
    for given in (hidden, hidden[0], hidden[0, 0]):
        got = model.apply({"params": turned}, given, method="logits")
        np.testing.assert_allclose(got, want[(0,) * (3 - given.ndim)], rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_segments_do_not_see_each_other(seed):
    """Two samples packed into one row equal the two computed alone."""
    _, model, variables, tokens = setup(seed)
    x = model.apply(variables, tokens, method="embed")
    packed = rearrange(x, "(one two) t d -> one (two t) d", two=2)
    positions = np.tile(np.arange(13), 2)[None]
    segments = np.repeat([1, 2], 13)[None]
    got = model.apply(variables, packed, positions, segments).hidden
    want = model.apply(variables, x, positions_like(tokens), np.ones_like(tokens)).hidden
    got = rearrange(got, "one (two t) d -> (one two) t d", two=2)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_a_token_sees_nothing_later():
    _, model, variables, tokens = setup(1)
    x = model.apply(variables, tokens, method="embed")
    changed = x.at[:, -1].add(1.0)
    args = positions_like(tokens), np.ones_like(tokens)
    before, after = (model.apply(variables, a, *args).hidden for a in (x, changed))
    np.testing.assert_array_equal(before[:, :-1], after[:, :-1])
    assert np.abs(before[:, -1] - after[:, -1]).max() > 1e-3


def test_remat_changes_nothing():
    _, model, variables, tokens = setup(2)
    x = model.apply(variables, tokens, method="embed")

    def loss(params, model):
        out = model.apply({"params": params}, x, positions_like(tokens), np.ones_like(tokens))
        return jnp.sum(jnp.square(out.hidden))

    plain = jax.grad(loss)(variables["params"], model)
    remat = jax.grad(loss)(variables["params"], Llama(model.config, remat="full"))
    assert np.abs(plain["layers"]["block"]["self_attn"]["q_proj"]["kernel"]).max() > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), plain, remat)


@pytest.mark.parametrize(
    "field, value", [("rope_scaling", {"type": "linear", "factor": 2.0}), ("attention_bias", True)]
)
def test_refuses_what_it_cannot_express(field, value):
    with pytest.raises(ValueError, match=f"language_config.{field}"):
        LlamaConfig.from_hf({field: value})


def test_no_scaling_of_rope_has_many_names():
    for none in (
        {"rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default"}},
    ):
        assert LlamaConfig.from_hf(none) == LlamaConfig.from_hf({"rope_scaling": None})


def test_tap_outside_the_model_is_an_error():
    _, model, variables, tokens = setup(0)
    x = model.apply(variables, tokens, method="embed")
    with pytest.raises(ValueError, match="outside the model's blocks"):
        model.apply(variables, x, positions_like(tokens), np.ones_like(tokens), None, 9)
