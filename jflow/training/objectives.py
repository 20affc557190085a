"""What a batch costs: (parameters, batch, seed and step) to a loss and what to report.

An objective is a function, so one training step serves every family of models.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange

from jflow import flow, losses, rng
from jflow.batch import Batch, ImageRows, TextRows
from jflow.models.janusflow import JanusFlow
from jflow.models.layers import put, take
from jflow.models.repa import RepaHead
from jflow.models.vae import AutoencoderKL
from jflow.training.lora import LoraConfig, merge

# name -> (sum, count); arrays of the same shape, a mean is their quotient.
Sums = dict[str, tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class ObjectiveConfig:
    """Numbers of the losses; where the paper prints none, reference.md section 9's.

    Raises ValueError for an unknown time_density, and for an ar_chunk below 1.
    """

    # The paper's sum of the three has no coefficients.
    ar_weight: float = 1.0
    rf_weight: float = 1.0  # of the mean over latent elements; their number gives eq. 7's sum
    repa_weight: float = 1.0  # 0 leaves REPA out, and the SigLIP pass that it needs
    repa_layer: int = 6  # after which block of the language model, from 1 (section 3.3)
    time_density: str = "logit_normal"  # as SD3; or "uniform"
    time_mean: float = 0.0  # of logit t; not printed, SD3's best
    time_std: float = 1.0  # of logit t; not printed, SD3's best
    time_bins: int = 10  # equal parts of [0, 1] in which the RF loss is reported
    sample_posterior: bool = True  # not printed; False takes the mean of the VAE's posterior
    ar_chunk: int = 512  # positions of a row whose logits exist at a time

    def __post_init__(self):
        if self.time_density not in ("logit_normal", "uniform"):
            raise ValueError(
                f"time_density must be logit_normal or uniform, not {self.time_density!r}."
            )
        if self.ar_chunk < 1:
            raise ValueError(f"ar_chunk must be at least 1, not {self.ar_chunk}.")


@dataclass(frozen=True)
class Modules:
    """The networks behind params["janusflow"], ["vae"] and ["repa"].

    vae: None where the model works on pixels; they are the latents then. repa: None without REPA.
    lora: what the factors in params["janusflow"] stand for; None without.
    """

    model: JanusFlow
    vae: AutoencoderKL | None
    repa: RepaHead | None
    lora: LoraConfig | None = None


def draw_times(ids: jax.Array, seed: int, step: jax.Array, config: ObjectiveConfig) -> jax.Array:
    """t [M] of images with sample ids [M]; each depends on (seed, step, id) alone."""

    def draw(i):
        key = rng.fold(seed, "time", step, i)
        if config.time_density == "uniform":
            return jax.random.uniform(key)
        return flow.sample_time(key, config.time_mean, config.time_std)

    return jax.vmap(draw)(ids)


def draw_normal(
    ids: jax.Array, seed: int, purpose: str, step: jax.Array, shape: tuple[int, ...]
) -> jax.Array:
    """Normal noise [M, *shape]; each image's depends on (seed, purpose, step, id) alone."""
    return jax.vmap(lambda i: jax.random.normal(rng.fold(seed, purpose, step, i), shape))(ids)


def clean_latents(
    params: dict,
    pixels: jax.Array,
    ids: jax.Array,
    seed: int,
    step: jax.Array,
    vae: AutoencoderKL | None,
    sample_posterior: bool,
    moments: jax.Array | None = None,
) -> jax.Array:
    """Crops [M, H, W, 3] -> latents [M, h, w, c] times the scaling factor; no gradient.

    moments: [M, 2, h, w, c], where the VAE has encoded the crops before (`data.cache`); they are
    not read then.
    """
    if vae is None:
        return pixels
    if moments is not None:
        mean, logvar = moments[:, 0], moments[:, 1]
    else:
        frozen = jax.lax.stop_gradient(params["vae"])
        mean, logvar = vae.apply({"params": frozen}, pixels, method="encode")
        mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
    if sample_posterior:
        noise = draw_normal(ids, seed, "vae", step, mean.shape[1:])
        mean = mean + jnp.exp(logvar / 2) * noise
    return mean * vae.config.scaling_factor


def _images(a: jax.Array | None) -> jax.Array | None:
    """[B, G, ...] -> [B * G, ...]; None stays None."""
    return None if a is None else rearrange(a, "B G ... -> (B G) ...")


def text_sums(params: dict, rows: TextRows, modules: Modules, config: ObjectiveConfig) -> Sums:
    """ "ar": -log p over all targets; "ar_understanding" and "ar_text": of rows with and without
    images."""
    model, variables = modules.model, {"params": params["janusflow"]}
    x = model.apply(variables, rows.tokens, rows.pixels, rows.slots, method="embed_understanding")
    out = model.apply(variables, x, rows.positions, rows.segment_ids, method="language")
    lm_head = params["janusflow"]["language_model"]["lm_head"]["kernel"]
    each = losses.autoregressive(out.hidden, lm_head, rows.targets, config.ar_chunk)
    seeing = jnp.any(rows.slots[..., 0] < rows.tokens.shape[1], axis=1)

    def over(chosen):
        return tuple(jnp.sum(jnp.where(chosen, values, 0)) for values in each)

    return {"ar": over(True), "ar_understanding": over(seeing), "ar_text": over(~seeing)}


def image_sums(
    params: dict,
    rows: ImageRows,
    x: jax.Array,
    z0: jax.Array,
    t: jax.Array,
    modules: Modules,
    config: ObjectiveConfig,
) -> Sums:
    """ "rf", the same by bins of t as "rf_by_time" [time_bins], and REPA's "repa_cosine".

    Args:
      rows: B rows of G images; images with sample_id -1 count for nothing.
      x, z0: [B * G, h, w, c] latents and noise, the images of a row behind each other.
      t: [B * G].

    Raises ValueError where SigLIP's grid is not the grid of latent tokens, unless repa_weight is 0.
    """
    images, variables = rows.slots.shape[1], {"params": params["janusflow"]}
    # Each sample has an image.
    model = modules.model.clone(segments=images + 1)

    def at(hidden):
        """[B, L, D] -> [B * G, N, D] at the latent tokens, the time token left out."""
        slots = rearrange(rows.slots[..., 1:], "B G N -> B (G N)")
        return rearrange(take(hidden, slots), "B (G N) D -> (B G) N D", G=images)

    gen = model.apply(variables, flow.interpolate(x, z0, t), 1000 * t, method="encode_latents")
    embeddings = rearrange(gen.embeddings, "(B G) N D -> B (G N) D", G=images)
    sequence = model.apply(variables, rows.tokens, method="embed_text")
    slots = rearrange(rows.slots, "B G N -> B (G N)")
    sequence = put(sequence, slots, embeddings)
    tap_layer = config.repa_layer if config.repa_weight else None
    out = model.apply(
        variables, sequence, rows.positions, rows.segment_ids, None, tap_layer, method="language"
    )
    v = model.apply(variables, at(out.hidden), gen.skip, gen.t_emb, method="decode_velocity")

    valid = rows.sample_ids.reshape(-1) >= 0
    count = jnp.sum(valid).astype(jnp.float32)
    error = jnp.where(valid, losses.rectified_flow(v, x, z0), 0)
    bins = jnp.minimum(t * config.time_bins, config.time_bins - 1).astype(jnp.int32)
    bins = jax.nn.one_hot(bins, config.time_bins) * valid[:, None]
    sums = {
        "rf": (jnp.sum(error), count),
        "rf_by_time": (jnp.sum(error[:, None] * bins, axis=0), jnp.sum(bins, axis=0)),
    }
    if config.repa_weight:
        if rows.features is not None:
            target = _images(rows.features)
        else:
            frozen = {"params": jax.lax.stop_gradient(params["janusflow"])}
            target = model.apply(frozen, _images(rows.pixels), method="image_features")
        if target.shape[1] != gen.embeddings.shape[1] - 1:
            raise ValueError(
                f"REPA compares position by position, but SigLIP has {target.shape[1]} tokens and "
                f"the latents {gen.embeddings.shape[1] - 1}; set repa_weight to 0 to do without."
            )
        prediction = modules.repa.apply({"params": params["repa"]}, at(out.tap))
        similarity = jnp.where(valid, losses.cosine(prediction, target), 0)
        sums["repa_cosine"] = (jnp.sum(similarity), count)
    return sums


def janusflow(
    params: dict,
    batch: Batch,
    whole: Batch,
    step: jax.Array,
    *,
    seed: int,
    modules: Modules,
    config: ObjectiveConfig,
) -> tuple[jax.Array, Sums]:
    """L_AR on text rows, L_RF + L_REPA on image rows (section 3.4), and what they are made of.

    Each task is a mean over its own targets: tokens for AR, images for RF and REPA. No gradient
    enters the VAE, and SigLIP has one through the AR path alone.

    Args:
      params: {"janusflow", "vae", "repa"}; "vae" only with a VAE, "repa" only with REPA.
      batch: the rows to compute, all of the step's or a part of them.
      whole: all of the step's rows, what the means are over: the losses of the parts add up to
        that of the whole.
      step, seed: what noise and time are drawn from, together with the sample ids.

    Returns: the loss, and the sums and counts of `text_sums` and `image_sums` over `batch`.
    """
    params = merge(params, modules.lora, modules.model.precision.compute)
    loss, sums = jnp.zeros(()), {}
    if batch.text is not None:
        sums |= text_sums(params, batch.text, modules, config)
        count = jnp.maximum(jnp.sum(whole.text.targets >= 0), 1)
        loss += config.ar_weight * sums["ar"][0] / count
    if batch.images is not None:
        rows = batch.images
        ids = rows.sample_ids.reshape(-1)
        pixels, posterior = _images(rows.pixels), config.sample_posterior
        moments = _images(rows.moments)
        x = clean_latents(params, pixels, ids, seed, step, modules.vae, posterior, moments)
        z0 = draw_normal(ids, seed, "noise", step, x.shape[1:])
        t = draw_times(ids, seed, step, config)
        sums |= image_sums(params, rows, x, z0, t, modules, config)
        count = jnp.maximum(jnp.sum(whole.images.sample_ids >= 0), 1)
        loss += config.rf_weight * sums["rf"][0] / count
        if config.repa_weight:
            loss -= config.repa_weight * sums["repa_cosine"][0] / count
    return loss, sums
