"""The objective on packed rows against single samples, and REPA against torch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats

from jflow.batch import Batch
from jflow.training import objectives
from jflow.training.objectives import ObjectiveConfig
from tests.tiny_training import (
    FAST,
    TOKENS,
    image_row,
    modules,
    params,
    stack,
    text_row,
)

PARTS, PARAMS, SEED, STEP = modules(), params(), 5, 7
CONFIG = ObjectiveConfig(repa_layer=1, ar_chunk=5, ar_weight=0.9, rf_weight=1.1, repa_weight=0.7)
# (id, prompt length, dropped) in rows of unequal fill; (id, words, has an image) likewise.
IMAGES = [[(3, 4, False), (11, 4, True), (4, 6, False)], [(8, 6, True)]]
TEXTS = [[(20, 5, True), (21, 7, False), (22, 5, True)], [(23, 7, False)]]
BATCH = Batch(
    text=stack([text_row(row, 33, 3) for row in TEXTS]),
    images=stack([image_row(row, 34, 4) for row in IMAGES]),
)
OBJECTIVE = partial(objectives.janusflow, seed=SEED, modules=PARTS, config=CONFIG)


@partial(jax.jit, compiler_options=FAST)
def loss_and_gradient(params, batch, whole, step):
    return jax.value_and_grad(OBJECTIVE, has_aux=True)(params, batch, whole, step)


def close(got, want, atol=1e-5):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=atol), got, want)


def single(image=None, text=None) -> Batch:
    """One sample of each kind, or a row without targets, padded to a shape that all share."""
    return Batch(
        text=stack([text_row([text] if text else [], 11, 1)]),
        images=stack([image_row([image] if image else [], 11, 1)]),
    )


def test_packed_rows_equal_their_samples_one_by_one():
    """Loss, means and gradient; noise and time come with the sample, wherever it lies."""
    (loss, sums), gradient = loss_and_gradient(PARAMS, BATCH, BATCH, STEP)
    parts = [single(text=sample) for row in TEXTS for sample in row]
    parts += [single(image=sample) for row in IMAGES for sample in row]
    assert len(parts) == 8
    results = [loss_and_gradient(PARAMS, part, BATCH, STEP) for part in parts]
    close(loss, sum(one for (one, _), _ in results))
    close(gradient, jax.tree.map(lambda *leaves: sum(leaves), *(g for _, g in results)))
    means, by_rows = {}, [sums.pop("ar_understanding"), sums.pop("ar_text")]
    close(sums["ar"], tuple(map(sum, zip(*by_rows, strict=True))))
    close(by_rows[1], results[3][0][1]["ar"])  # the row without images
    for name, (total, count) in sums.items():
        pairs = [one[name] for (_, one), _ in results]
        close(count, sum(pair[1] for pair in pairs), atol=0)
        means[name] = total / np.maximum(count, 1)
        close(means[name], sum(pair[0] for pair in pairs) / np.maximum(count, 1))
    assert (sums["ar"][1], sums["rf"][1], sums["repa_cosine"][1]) == (20, 4, 4)
    want = 0.9 * means["ar"] + 1.1 * means["rf"] - 0.7 * means["repa_cosine"]
    close(loss, want, atol=1e-6)


def test_dropped_prompt_equals_a_hidden_one():
    """All but BOS left out, or there and masked, as in the sampler's unconditional half."""
    dropped, whole = single(image=(11, 6, True)), single(image=(11, 6, False))
    segments = whole.images.segment_ids.copy()
    segments[0, 1:6] = 0

    def loss(rows):
        (loss, _), gradient = loss_and_gradient(PARAMS, Batch(None, rows), BATCH, STEP)
        return loss, gradient["janusflow"]["language_model"]["layers"]

    hidden = whole.images.replace(segment_ids=segments)
    for got, want in zip(loss(dropped.images), loss(hidden), strict=True):
        close(got, want)
    assert abs(loss(whole.images)[0] - loss(hidden)[0]) > 1e-6


def test_gradients_end_where_they_should():
    """None in the VAE; in SigLIP by the AR path alone, in REPA's head by the image rows alone."""

    def largest(batch):
        gradient = loss_and_gradient(PARAMS, batch, BATCH, STEP)[1]
        siglip = gradient["janusflow"]["vision_und_enc_model"]
        parts = {"vae": gradient["vae"], "siglip": siglip, "repa": gradient["repa"]}
        return {
            name: max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(part))
            for name, part in parts.items()
        }

    image, text = largest(single(image=(3, 4, False))), largest(single(text=(20, 5, True)))
    assert image["vae"] == 0 and image["siglip"] == 0 and image["repa"] > 1e-4
    assert text["vae"] == 0 and text["siglip"] > 1e-4 and text["repa"] == 0


latents = jax.jit(objectives.clean_latents, static_argnames=("vae", "sample_posterior"))


def test_repa_equals_torch_on_a_sample_computed_by_hand():
    """Tap after block 1 at the latents, Linear-SiLU three times, cosine to SigLIP's features."""
    sample, prompt = 3, 4
    batch = single(image=(sample, prompt, False))
    row = batch.images
    (_, sums), _ = loss_and_gradient(PARAMS, batch, BATCH, STEP)
    ids = jnp.array([sample])

    def apply(method, *args):
        call = partial(PARTS.model.apply, method=method)
        return jax.jit(call, static_argnums=5)({"params": PARAMS["janusflow"]}, *args)

    pixels = row.pixels[0]
    x = latents(PARAMS, pixels, ids, SEED, STEP, vae=PARTS.vae, sample_posterior=True)
    z0 = objectives.draw_normal(ids, SEED, "noise", STEP, x.shape[1:])
    t = objectives.draw_times(ids, SEED, STEP, CONFIG)
    gen = apply("encode_latents", t * x + (1 - t) * z0, 1000 * t)
    sequence = jnp.concatenate([apply("embed_text", row.tokens[:, :prompt]), gen.embeddings], 1)
    positions = jnp.arange(sequence.shape[1])[None]
    out = apply("language", sequence, positions, jnp.ones_like(positions), None, 1)

    h = torch.tensor(np.asarray(out.tap[:, -TOKENS:]))
    for i, layer in enumerate(("linear_1", "linear_2", "linear_3")):
        weights = {name: torch.tensor(np.asarray(a)) for name, a in PARAMS["repa"][layer].items()}
        h = h @ weights["kernel"] + weights["bias"]
        h = torch.nn.functional.silu(h) if i < 2 else h
    features = torch.tensor(np.asarray(apply("image_features", pixels)))
    want = torch.nn.functional.cosine_similarity(h, features, dim=-1).mean()
    close(sums["repa_cosine"], (want.item(), 1.0), atol=1e-6)

    v = apply("decode_velocity", out.hidden[:, -TOKENS:], gen.skip, gen.t_emb)
    error = np.mean(np.square(v - (x - z0)))
    close(sums["rf"], (error, 1.0))
    bin_of_t = int(t[0] * 10)
    close(sums["rf_by_time"], (error * np.eye(10)[bin_of_t], np.eye(10)[bin_of_t]))


@pytest.mark.parametrize("density, cdf", [("uniform", "uniform"), ("logit_normal", None)])
def test_times_follow_the_density(density, cdf):
    config = ObjectiveConfig(time_density=density, time_mean=0.3, time_std=0.8)
    t = np.float64(objectives.draw_times(jnp.arange(20_000), SEED, STEP, config))
    cdf = cdf or (lambda t: stats.norm.cdf((np.log(t / (1 - t)) - 0.3) / 0.8))
    assert stats.kstest(t, cdf).statistic < 1.63 / np.sqrt(len(t))


def test_draws_depend_on_seed_purpose_step_and_sample():
    ids = jnp.array([4, 9])
    draw = partial(objectives.draw_normal, shape=(3,))
    a = draw(ids, 0, "noise", 1)
    np.testing.assert_array_equal(a[::-1], draw(ids[::-1], 0, "noise", 1))
    others = (draw(ids, 1, "noise", 1), draw(ids, 0, "vae", 1), draw(ids, 0, "noise", 2))
    for other in (*others, a[::-1]):
        assert (np.abs(a - other) > 1e-3).any(axis=1).all()


def test_latents_are_the_posterior_scaled():
    """Over many draws mean and standard deviation are those of the VAE's posterior."""
    pixels = np.tile(image_row([(3, 1, False)], 6, 1).pixels, (256, 1, 1, 1))
    ids = jnp.arange(256)
    encode = jax.jit(partial(PARTS.vae.apply, method="encode"))
    mean, logvar = encode({"params": PARAMS["vae"]}, pixels[:1])
    scale = PARTS.vae.config.scaling_factor
    args = (PARAMS, pixels, ids, SEED, STEP)
    fixed = latents(*args, vae=PARTS.vae, sample_posterior=False)
    close(fixed[:1], scale * mean, atol=1e-6)
    sampled = np.asarray(latents(*args, vae=PARTS.vae, sample_posterior=True))
    std = scale * np.exp(0.5 * logvar[0])
    z = (sampled - fixed) / std
    assert np.abs(z.mean(0)).max() < 5 / 16 and abs(z.std() - 1) < 0.02
    np.testing.assert_array_equal(latents(*args, vae=None, sample_posterior=True), pixels)


def test_without_repa_neither_its_parameters_nor_siglip_are_read():
    bare = {
        "vae": PARAMS["vae"],
        "janusflow": {
            name: part
            for name, part in PARAMS["janusflow"].items()
            if not name.startswith("vision_und")
        },
    }
    config = ObjectiveConfig(repa_weight=0.0)
    parts = objectives.Modules(PARTS.model, PARTS.vae, None)
    batch = Batch(None, BATCH.images)
    loss, sums = jax.jit(
        lambda p: objectives.janusflow(
            p, batch, batch, STEP, seed=SEED, modules=parts, config=config
        )
    )(bare)
    assert "repa_cosine" not in sums
    close(loss, sums["rf"][0] / 4, atol=1e-6)


def test_bfloat16_stays_near_float32():
    (want, _), _ = loss_and_gradient(PARAMS, BATCH, BATCH, STEP)
    parts = modules(jnp.bfloat16)
    objective = partial(objectives.janusflow, seed=SEED, modules=parts, config=CONFIG)
    got = jax.jit(lambda p: objective(p, BATCH, BATCH, STEP)[0], compiler_options=FAST)(PARAMS)
    assert got.dtype == jnp.float32 and 0 < abs(got - want) < 2e-2 * want


def test_either_kind_of_rows_may_be_missing():
    for batch, names in (
        (Batch(BATCH.text, None), {"ar", "ar_understanding", "ar_text"}),
        (Batch(None, BATCH.images), {"rf", "rf_by_time", "repa_cosine"}),
    ):
        loss, sums = jax.eval_shape(lambda p, batch=batch: OBJECTIVE(p, batch, batch, STEP), PARAMS)
        assert loss.shape == () and set(sums) == names


def test_errors():
    with pytest.raises(ValueError, match="time_density must be"):
        ObjectiveConfig(time_density="cosine")
    rows = BATCH.images
    x = jnp.zeros((rows.sample_ids.size, 8, 8, 4))
    narrow = rows.replace(slots=np.zeros((*rows.slots.shape[:2], 17), np.int32))
    with pytest.raises(ValueError, match="SigLIP has 4 tokens and the latents 16"):
        t = jnp.zeros(len(x))
        jax.eval_shape(lambda p: objectives.image_sums(p, narrow, x, x, t, PARTS, CONFIG), PARAMS)
