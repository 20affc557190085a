"""Every array of the goldens within their tolerance: understanding, generation, gradients.

The reference is the released PyTorch code; `ATOL` is absolute.
"""

import json
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from jflow import checkpoints, flow, images
from jflow.batch import ImageRows, TextRows
from jflow.convert.engine import flatten, inverse, plan
from jflow.convert.janusflow_rules import JANUSFLOW_RULES
from jflow.inference.image import (
    decode_latents,
    encode_prefix,
    guided_velocity,
    sample_latents,
    velocity,
)
from jflow.inference.text import decode, prefill
from jflow.models.janusflow import JanusFlow, JanusFlowConfig
from jflow.models.layers import sinusoidal_embedding
from jflow.models.vae import AutoencoderKL, VAEConfig
from jflow.training.objectives import Modules, ObjectiveConfig, image_sums, text_sums
from tests.goldens import ATOL, GOLDEN, golden, nhwc

UND, GEN, GRAD = (golden(f"golden_tiny_{name}") for name in ("und", "gen", "grad"))
RUNS = sorted({name.split(".")[0] for name in GEN if name.startswith("run")})


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=ATOL)


class Tiny(NamedTuple):
    """A Pipeline's without its tokenizer, which goldens need not have: they hold token ids."""

    model: JanusFlow
    vae: AutoencoderKL
    params: dict


@pytest.fixture(scope="module")
def tiny(tiny_ckpt):
    params, config, _ = checkpoints.load_checkpoint(tiny_ckpt, jnp.float32)
    model = JanusFlow(JanusFlowConfig.from_hf(config["janusflow"], config["siglip"]), segments=2)
    return Tiny(model, AutoencoderKL(VAEConfig.from_hf(config["vae"])), params)


@pytest.fixture
def apply(tiny):
    def call(method, *args):
        return tiny.model.apply({"params": tiny.params["janusflow"]}, *args, method=method)

    return call


def guidance_and_steps(name: str) -> tuple[float, int]:
    """Of the sampler that the array's description in the manifest tells of."""
    manifest = json.loads((GOLDEN / "manifest.json").read_text())
    what = manifest["golden_tiny_gen.safetensors"]["arrays"][name]["what"]
    scale, steps = (re.search(p, what)[1] for p in (r"cfg ([\d.]+)", r"(\d+) (?:Euler )?steps"))
    return float(scale), int(steps)


# Understanding.


def slots(sequence_mask: np.ndarray, embedding_mask: np.ndarray) -> np.ndarray:
    """The released code's two masks -> where each image's vectors go, [B, I, 1 + N]."""
    out = np.full(embedding_mask.shape, sequence_mask.shape[1])
    for row, mask, used in zip(out, sequence_mask, embedding_mask, strict=True):
        row[used] = np.flatnonzero(mask)
    return out


def embed(apply, batch: str):
    return apply(
        "embed_understanding",
        UND[f"in.{batch}.input_ids"],
        nhwc(UND[f"in.{batch}.pixel_values"]),
        slots(UND[f"in.{batch}.images_seq_mask"], UND[f"in.{batch}.images_emb_mask"]),
    )


def logits(apply, x, positions, mask):
    out = apply("language", x, positions, mask)
    return apply("logits", out.hidden) * mask[..., None]


def test_siglip_and_aligner(apply):
    pixels = nhwc(UND["in.A.pixel_values"])[:, 0]
    close(apply("image_features", pixels), UND["siglip_out"])
    close(apply("embed_images", pixels)[:, 1:], UND["und_aligner_out"])


@pytest.mark.parametrize("batch, prefix", [("A", ""), ("B", "B.")])
def test_understanding_logits(apply, batch, prefix):
    x = embed(apply, batch)
    close(x, UND[f"{prefix}inputs_embeds"])
    mask = UND[f"in.{batch}.attention_mask"]
    positions = np.where(mask, np.cumsum(mask, 1) - 1, 1)
    close(logits(apply, x, positions, mask), UND[f"{prefix}logits"])


def test_understanding_logits_at_plain_positions(apply):
    mask = UND["in.A.attention_mask"]
    positions = np.broadcast_to(np.arange(mask.shape[1]), mask.shape)
    close(logits(apply, embed(apply, "A"), positions, mask), UND["logits_default_pos"])


def test_greedy_tokens(tiny):
    """Padded at the right where the reference pads at the left; tokens are exact."""
    mask, ids = UND["in.A.attention_mask"].astype(bool), UND["in.A.input_ids"]
    special = json.loads((GOLDEN / "tiny" / "token_ids.json").read_text())
    lengths, width = mask.sum(1).astype(np.int32), mask.shape[1] + 5
    tokens = np.full((len(ids), width), special["pad"], np.int32)
    sequence_mask = np.zeros((len(ids), width), bool)
    for b, length in enumerate(lengths):
        tokens[b, :length] = ids[b, mask[b]]
        sequence_mask[b, :length] = UND["in.A.images_seq_mask"][b, mask[b]]
    want = UND["generated_ids"]
    params = tiny.params["janusflow"]
    state = prefill(
        tiny.model, params, tokens, lengths, nhwc(UND["in.A.pixel_values"]),
        slots(sequence_mask, UND["in.A.images_emb_mask"]), want.shape[1],
    )  # fmt: skip
    keys = jax.random.split(jax.random.key(0), len(ids))
    got = []
    for i in range(want.shape[1]):
        close(state.logits, UND["generated_logits"][:, i])
        state, new = decode(
            tiny.model, params, state, keys, None, np.float32(1),
            np.int32(special["eos"]), 1,
        )  # fmt: skip
        got.append(new[:, 0])
    np.testing.assert_array_equal(np.stack(got, 1), want)


# Generation.


def test_encoder(tiny, apply):
    z, t = nhwc(GEN["in.static.z"]), GEN["in.static.t"]
    n = len(z)
    features = sinusoidal_embedding(t, tiny.model.config.gen_encoder.channels)
    np.testing.assert_allclose(features, GEN["static.time_proj"][:n], rtol=0, atol=1e-6)
    gen = apply("encode_latents", z, t)
    close(gen.skip, nhwc(GEN["static.z_emb"])[:n])
    close(gen.t_emb, GEN["static.t_emb"][:n])
    close(gen.embeddings[:, 0], GEN["static.t_emb"][:n])
    close(gen.embeddings[:, 1:], GEN["static.z_tokens"][:n])
    gen = apply("encode_latents", z, jnp.zeros(n))
    close(gen.skip, nhwc(GEN["static.t0.z_emb"]))
    close(gen.t_emb, GEN["static.t0.t_emb"])


def static_sequence(apply):
    z, t = nhwc(GEN["in.static.z"]), GEN["in.static.t"]
    gen = apply("encode_latents", np.concatenate([z, z]), np.concatenate([t, t]))
    x = jnp.concatenate([GEN["static.prompt_embeds"], gen.embeddings], axis=1)
    positions = np.broadcast_to(GEN["static.position_ids"], x.shape[:2])
    return gen, x, positions, GEN["in.static.attention_mask"]


def test_hidden_states_after_every_block(apply):
    """The tap that REPA uses, at each block in turn."""
    _, x, positions, mask = static_sequence(apply)
    close(x, GEN["static.llm_embeds"])
    layers = [int(name.removeprefix("static.hidden_layer")) for name in GEN if "hidden_l" in name]
    assert layers
    for layer in layers:
        tap = apply("language", x, positions, mask, None, layer).tap
        close(tap * mask[..., None], GEN[f"static.hidden_layer{layer}"] * mask[..., None])


def test_velocity(apply):
    gen, x, positions, mask = static_sequence(apply)
    hidden = apply("language", x, positions, mask).hidden
    close(hidden * mask[..., None], GEN["static.hidden_final"] * mask[..., None])
    latents = hidden[:, -gen.embeddings.shape[1] + 1 :]
    aligned = apply(
        lambda model, x: model.vision_gen_dec_aligner(model.vision_gen_dec_aligner_norm(x)), latents
    )
    close(aligned, rearrange(GEN["static.dec_in"], "B C h w -> B (h w) C"))
    v = apply("decode_velocity", latents, gen.skip, gen.t_emb)
    close(v, nhwc(GEN["static.velocity"]))
    v_cond, v_uncond = jnp.split(v, 2)
    close(flow.guide(v_cond, v_uncond, 2.0), nhwc(GEN["static.v_cfg2"]))
    close(flow.guide(v_cond, v_uncond, 5.0), nhwc(GEN["static.v_cfg5"]))


def prompts(count: int, tag: str = "demo", padding: int = 3):
    ids = GEN[f"in.prompt_ids_{tag}"][:-1]
    tokens = np.tile(np.pad(ids, (0, padding)), (count, 1)).astype(np.int32)
    return tokens, np.full(count, len(ids), np.int32)


def test_velocity_behind_the_cache(tiny):
    """Prompt encoded once, encoder run once, unconditional half out of the same cache."""
    params, z = tiny.params["janusflow"], nhwc(GEN["in.static.z"])
    tokens, lengths = prompts(1)
    prefix = encode_prefix(tiny.model, params, tokens, lengths)
    for row, t in enumerate(GEN["in.static.t"]):
        args = (tiny.model, params, prefix, lengths)
        one = z[row : row + 1]
        want = nhwc(GEN["static.velocity"])[row]
        close(velocity(*args, one, t)[0], want)
        guided = guided_velocity(*args, jnp.float32(5))
        close(guided(one, t)[0], nhwc(GEN["static.v_cfg5"])[row])


@pytest.mark.parametrize("run", RUNS)
def test_guided_euler_runs(tiny, run):
    """Latents on the way and at the end, the first velocity, and the decoded pictures."""
    scale, steps = guidance_and_steps(f"{run}.z_final")
    grid, z0 = flow.time_grid(steps), nhwc(GEN["in.z0"])
    tokens, lengths = prompts(len(z0))
    params = tiny.params["janusflow"]

    def latents(n):
        return sample_latents(
            tiny.model, params, tokens, lengths, z0, grid.timesteps[:n], grid.dt[:n],
            np.float32(scale),
        )  # fmt: skip

    prefix = encode_prefix(tiny.model, params, tokens, lengths)
    guided = guided_velocity(tiny.model, params, prefix, lengths, jnp.float32(scale))
    close(guided(z0, grid.timesteps[0]), nhwc(GEN[f"{run}.v_step0"]))
    ways = [name for name in GEN if name.startswith(f"{run}.z_after_")]
    assert ways
    for name in ways:
        close(latents(int(name[-2:])), nhwc(GEN[name]))
    z = latents(steps)
    close(z, nhwc(GEN[f"{run}.z_final"]))
    decoded = nhwc(GEN[f"{run}.decoded"])
    pixels = decode_latents(tiny.vae, tiny.params["vae"], z[: len(decoded)])
    close(pixels, decoded)
    # Truncation to uint8 is exact on the reference's own pixels; on ours a value within rounding
    # of a step may fall on its other side.
    np.testing.assert_array_equal(images.to_uint8(decoded), GEN[f"{run}.demo_uint8"])
    apart = images.to_uint8(np.asarray(pixels)).astype(int) - GEN[f"{run}.demo_uint8"]
    assert np.abs(apart).max() <= 1 and np.mean(apart != 0) < 1e-3


def test_readme_loop(tiny):
    """The other published sampler: another tag at the end of the prompt, the same latents."""
    want = nhwc(GEN["readme.z_over_scale"]) * tiny.vae.config.scaling_factor
    scale, steps = guidance_and_steps("readme.z_over_scale")
    grid, z0 = flow.time_grid(steps), nhwc(GEN["in.z0"])[: len(want)]
    tokens, lengths = prompts(len(z0), "readme")
    z = sample_latents(
        tiny.model, tiny.params["janusflow"], tokens, lengths, z0, grid.timesteps, grid.dt,
        np.float32(scale),
    )  # fmt: skip
    close(z, want)
    pixels = decode_latents(tiny.vae, tiny.params["vae"], z)
    close(jnp.clip(pixels, -1, 1) * 0.5 + 0.5, nhwc(GEN["readme.save_image_input"]))


# Losses and gradients.


def by_key(tree: dict) -> dict[str, np.ndarray]:
    """A tree of parameters, or gradients, under the reference's names and in its layout."""
    arrays, out = dict(flatten(tree)), {}
    for leaf in plan(JANUSFLOW_RULES, tree):
        layers = arrays[leaf.path] if leaf.stacked else arrays[leaf.path][None]
        for key, layer in zip(leaf.keys, layers, strict=True):
            out[key] = rearrange(np.asarray(layer), inverse(leaf.pattern))
    return out


def check_loss_and_gradients(objective, params, name: str):
    loss, gradients = jax.jit(jax.value_and_grad(objective))(params)
    want = json.loads((GOLDEN / "golden_tiny_grad.json").read_text())[name]
    close(loss, GRAD[f"{name}.loss"][0])
    gradients = by_key(gradients)
    stored = [key for key in GRAD if key.startswith(f"{name}.grad.")]
    assert stored
    for key in stored:
        close(gradients[key.removeprefix(f"{name}.grad.")], GRAD[key])
    norms = want["grad_norm_per_parameter (null: no gradient)"]
    assert set(norms) == set(gradients)
    for key, norm in norms.items():
        if key == "beg_of_und_embed":
            continue  # trap 5 below
        assert np.linalg.norm(gradients[key]) == pytest.approx(norm or 0, rel=1e-5, abs=1e-7), key
    return gradients


def pack(array: np.ndarray) -> np.ndarray:
    """[B, T] of B samples -> [1, B * T], one row with all of them behind each other."""
    return array.reshape(1, -1)


def segments(mask: np.ndarray) -> np.ndarray:
    """[B, T] masks -> packed segment ids, 0 where the mask is."""
    return pack(mask * np.arange(1, len(mask) + 1)[:, None])


def test_velocity_of_the_training_batch(apply):
    """Each sample in its own row; packed, their losses are compared below."""
    z_t, t, ids = nhwc(GRAD["rf.in.z_t"]), GRAD["rf.in.t"], GRAD["rf.in.prompt_ids"]
    gen = apply("encode_latents", z_t, 1000 * t)
    x = jnp.concatenate([apply("embed_text", ids), gen.embeddings], axis=1)
    positions = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
    hidden = apply("language", x, positions, GRAD["rf.in.attention_mask"]).hidden
    v = apply("decode_velocity", hidden[:, ids.shape[1] + 1 :], gen.skip, gen.t_emb)
    close(v, nhwc(GRAD["rf.velocity"]))


def test_rectified_flow_loss_and_gradients(tiny):
    """All samples packed into one row of the training batch."""
    x, z0, z_t = (nhwc(GRAD[f"rf.in.{name}"]) for name in ("x", "z0", "z_t"))
    t, mask, ids = GRAD["rf.in.t"], GRAD["rf.in.attention_mask"], GRAD["rf.in.prompt_ids"]
    close(flow.interpolate(x, z0, t), z_t)
    samples, length = mask.shape
    rows = ImageRows(
        tokens=pack(np.pad(ids, ((0, 0), (0, length - ids.shape[1])))),
        positions=np.tile(np.arange(length), (1, samples)),
        segment_ids=segments(mask),
        pixels=np.zeros((1, samples, 64, 64, 3), np.float32),
        slots=np.arange(samples)[None, :, None] * length + np.arange(ids.shape[1], length),
        sample_ids=np.arange(samples)[None],
    )
    modules = Modules(tiny.model, tiny.vae, None)
    config = ObjectiveConfig(repa_weight=0.0)

    def objective(params):
        total, count = image_sums({"janusflow": params}, rows, x, z0, t, modules, config)["rf"]
        return total / count

    check_loss_and_gradients(objective, tiny.params["janusflow"], "rf")


def test_trap_5_autoregressive_loss_and_gradients(tiny):
    """All samples packed into one row, logits in chunks that do not divide it.

    The released forward detaches beg_of_und_embed; here it has a gradient.
    """
    mask, labels = GRAD["ar.in.attention_mask"], GRAD["ar.in.labels"]
    samples, length = mask.shape
    where = slots(GRAD["ar.in.images_seq_mask"], GRAD["ar.in.images_emb_mask"])
    assert where.max() < length
    rows = TextRows(
        tokens=pack(GRAD["ar.in.input_ids"]),
        targets=pack(np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=-1)),
        positions=np.tile(np.arange(length), (1, samples)),
        segment_ids=segments(mask),
        pixels=nhwc(GRAD["ar.in.pixel_values"]).swapaxes(0, 1),
        slots=(where + np.arange(samples)[:, None, None] * length).swapaxes(0, 1),
    )
    modules, config = Modules(tiny.model, tiny.vae, None), ObjectiveConfig(ar_chunk=13)

    def objective(params):
        total, count = text_sums({"janusflow": params}, rows, modules, config)["ar"]
        return total / count

    gradients = check_loss_and_gradients(objective, tiny.params["janusflow"], "ar")
    assert np.linalg.norm(gradients["beg_of_und_embed"]) > 1e-3
