"""The traps of the released code (design.md, section 2), one test each.

Each repeats the mistake on purpose and finds the change of the velocity that the reference's own
manifest records for it. Elsewhere: 5 in test_goldens.py, 6 in test_flow.py and test_drawing.py,
7 in test_vae.py, 10 in test_prompts.py.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow.inference.image import encode_prefix, velocity, with_unconditional
from jflow.models.layers import RMSNorm
from tests.goldens import ATOL, GOLDEN, golden, nhwc

GEN = golden("golden_tiny_gen")
MISTAKES = json.loads((GOLDEN / "manifest.json").read_text())[
    "sensitivity_to_mistakes (max abs change of static.velocity and of valid logits)"
]["tiny"]


def static_velocity(tiny, params=None, mask=None, method="decode_velocity"):
    """The velocities of the goldens' four rows, without a cache."""
    params = params or tiny.params["janusflow"]
    mask = GEN["in.static.attention_mask"] if mask is None else mask

    def apply(method, *args):
        return tiny.model.apply({"params": params}, *args, method=method)

    z, t = nhwc(GEN["in.static.z"]), GEN["in.static.t"]
    gen = apply("encode_latents", np.concatenate([z, z]), np.concatenate([t, t]))
    x = jnp.concatenate([GEN["static.prompt_embeds"], gen.embeddings], axis=1)
    positions = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
    hidden = apply("language", x, positions, mask).hidden
    latents = hidden[:, -gen.embeddings.shape[1] + 1 :]
    return np.asarray(apply(method, latents, gen.skip, gen.t_emb))


def moves(tiny, mistake: str, **changes):
    """The velocity moves as far as the reference's did with the same mistake."""
    right = nhwc(GEN["static.velocity"])
    np.testing.assert_allclose(static_velocity(tiny), right, rtol=0, atol=ATOL)
    moved = np.abs(static_velocity(tiny, **changes) - right).max()
    assert moved == pytest.approx(MISTAKES[mistake]["velocity"], rel=1e-3)


def edit(params: dict, change) -> dict:
    """params with `change(path, leaf)` applied to every leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: change("/".join(key.key for key in path), leaf), params
    )


def test_trap_1_the_prompt_cache_is_read_and_changes_nothing(tiny):
    """A cached prefix gives the velocity of the whole sequence; another cache another one."""
    ids = GEN["in.prompt_ids_demo"][None, :-1]
    params, z = tiny.params["janusflow"], nhwc(GEN["in.static.z"])[:1]
    lengths = np.array([ids.shape[1]])
    prefix = encode_prefix(tiny.model, params, ids, lengths)
    t = GEN["in.static.t"][0]
    args = (lengths, z, t)
    v = velocity(tiny.model, params, with_unconditional(prefix), *args)
    want = nhwc(GEN["static.velocity"])
    np.testing.assert_allclose(v, np.stack([want[0], want[2]]), rtol=0, atol=ATOL)
    scaled = prefix.replace(v=1.01 * prefix.v)
    assert np.abs(velocity(tiny.model, params, scaled, *args)[0] - want[0]).max() > 1e-3


def test_trap_2_either_tag_is_cut_off(tiny):
    """Begin-of-image or begin-of-generation: both are one token, and leave the same prefix."""
    demo, readme = GEN["in.prompt_ids_demo"], GEN["in.prompt_ids_readme"]
    assert demo[-1] != readme[-1]
    np.testing.assert_array_equal(demo[:-1], readme[:-1])
    encode = tiny.tokenizer.encode
    text = "User: a cat\n\nAssistant:"
    start, gen = "<begin_of_image>", "<｜begin▁of▁generation｜>"
    assert encode(text + start) == [*encode(text), tiny.tokenizer.image_start_id]
    assert encode(text + gen) == [*encode(text), tiny.tokenizer.image_gen_id]


def test_trap_3_the_unconditional_half_hides_its_pads(tiny):
    mask = np.ones_like(GEN["in.static.attention_mask"])
    moves(tiny, "unconditional mask all ones", mask=mask)


def test_trap_3_the_unconditional_half_keeps_its_first_token(tiny):
    mask = GEN["in.static.attention_mask"].copy()
    mask[len(mask) // 2 :, 0] = 0
    moves(tiny, "bos masked as well in the unconditional rows", mask=mask)


def test_trap_4_two_norms_follow_each_other(tiny):
    """The aligner's norm on the normed hidden states; without either, another velocity."""
    params = tiny.params["janusflow"]
    right = static_velocity(tiny)
    for name in ("language_model/norm/scale", "vision_gen_dec_aligner_norm/scale"):

        def without(path, leaf, name=name):
            return jnp.ones_like(leaf) if path == name else leaf

        assert np.abs(static_velocity(tiny, edit(params, without)) - right).max() > 1e-2
    # With both scales at one the second norm is idle: it is a norm, not a mere scale.
    norm = RMSNorm(1e-6, tiny.model.precision)
    x = 3 * np.random.default_rng(0).standard_normal((2, 8), np.float32)
    ones = {"params": {"scale": np.ones(8, np.float32)}}
    once = norm.apply(ones, x)
    np.testing.assert_allclose(norm.apply(ones, once), once, rtol=0, atol=1e-5)


def test_trap_8_film_is_scale_then_shift(tiny):
    def swap(path, leaf):
        if "cond_embeds_mapper" not in path:
            return leaf
        scale, shift = jnp.split(leaf, 2, axis=-1)
        return jnp.concatenate([shift, scale], axis=-1)

    moves(tiny, "FiLM scale/shift swapped", params=edit(tiny.params["janusflow"], swap))


def test_trap_8_grn_is_there(tiny):
    def without(path, leaf):
        return jnp.zeros_like(leaf) if "channelwise_norm" in path else leaf

    moves(tiny, "no GRN (weight=bias=0)", params=edit(tiny.params["janusflow"], without))


def test_trap_9_the_attention_pool_is_stored_and_unused(tiny):
    def poison(path, leaf):
        return jnp.full_like(leaf, jnp.nan) if "attn_pool" in path else leaf

    und = golden("golden_tiny_und")
    params = edit(tiny.params["janusflow"], poison)
    pixels = nhwc(und["in.A.pixel_values"])[:, 0]
    features = tiny.model.apply({"params": params}, pixels, method="image_features")
    np.testing.assert_allclose(features, und["siglip_out"], rtol=0, atol=ATOL)
