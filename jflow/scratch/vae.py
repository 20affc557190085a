"""The small VAE of the embedded datasets: the architecture of SDXL's, 32 x 32 pixels to 8 x 8 x 4.

    python -m jflow.scratch.vae --out jflow/scratch/assets/vae_shapes [field=value ...]

Beside coming back, a picture has to tell its shapes: a linear map of each latent, thrown away
afterwards, names the one that it lies in. Shapes of equal area differ in few pixels, so without it
they differ little in their latents, and a model that learns to draw these hears of shapes last.
(With features of a trained encoder instead of names: VA-VAE, arXiv 2501.01423.)

Trained, it is written down in other coordinates, in which the channels are uncorrelated and of
equal variance: else what lies in the small ones, colors above all, drowns in the noise of drawing.
"""

import sys
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from jflow.data.scenes import SHAPES, SIDE, Scene, signed_distance
from jflow.images import from_uint8
from jflow.models.vae import AutoencoderKL, VAEConfig
from jflow.scratch.parts import command, pictures

REACH = 1.0  # a latent lies in a shape if its centre is at most so far outside, in pixels


@dataclass(frozen=True)
class VAETrainConfig:
    """examples: pictures of the training split, gone through at random. Weights, beside the sum of
    squared errors: kl_weight of the posterior's divergence from the standard normal, shape_weight
    of the names' cross-entropy over all latents, both in nats."""

    channels: tuple[int, ...] = (16, 32, 32)
    latent_channels: int = 4
    examples: int = 12_000
    batch_size: int = 32
    steps: int = 1_300
    learning_rate: float = 2e-3
    kl_weight: float = 0.01
    shape_weight: float = 5.0
    seed: int = 0


def shape_map(scene: Scene, side: int) -> np.ndarray:
    """[side, side] int8: which of SHAPES each latent lies in, from 1, and 0 where in none."""
    along = (np.arange(side) + 0.5) * SIDE / side
    centres = np.stack(np.meshgrid(along, along), axis=-1)
    found = np.zeros((side, side), np.int8)
    for o in scene.objects:
        inside = signed_distance(o.shape, o.radius, centres - (o.x, o.y)) <= REACH
        found[inside] = 1 + SHAPES.index(o.shape)
    return found


def whitened(params: dict, mean: np.ndarray, logvar: np.ndarray) -> dict:
    """A VAE's parameters, changed so that over some pictures the channels of its latents are
    uncorrelated, of mean 0 and variance 1. Pictures come back from the means as before.

    mean, logvar: [n, h, w, c], what it says of these pictures. Log-variances are those of the
    rotated posterior to the first order around their means, since they stay linear in the features.
    """
    c = mean.shape[-1]
    center, typical = mean.mean((0, 1, 2)), logvar.mean((0, 1, 2))
    variances, axes = np.linalg.eigh(np.cov(mean.reshape(-1, c).T))
    there, back = ((axes * variances**power) @ axes.T for power in (-0.5, 0.5))
    parts = there**2 * np.exp(typical)
    shares = parts / parts.sum(1, keepdims=True)

    quant, post = params["quant_conv"], params["post_quant_conv"]
    kernels, biases = (np.split(quant[name], 2, axis=-1) for name in ("kernel", "bias"))
    bias = (biases[0] - center) @ there, (biases[1] - typical) @ shares.T + np.log(parts.sum(1))
    kernel = kernels[0] @ there, kernels[1] @ shares.T
    return params | {
        "quant_conv": {"kernel": np.concatenate(kernel, -1), "bias": np.concatenate(bias)},
        "post_quant_conv": {
            "kernel": back @ post["kernel"],
            "bias": post["bias"] + center @ post["kernel"][0, 0],
        },
    }


def train(config: VAETrainConfig) -> tuple[VAEConfig, dict, dict[str, float]]:
    """The VAE, its latents of unit variance, its parameters, and the PSNR of new pictures in dB, of
    the pairs "seen" and "unseen"."""
    vae_config = VAEConfig(
        latent_channels=config.latent_channels,
        block_out_channels=config.channels,
        layers_per_block=1,
        norm_num_groups=8,
        scaling_factor=1.0,
    )
    vae, side = AutoencoderKL(vae_config), SIDE // vae_config.downscale
    data, scenes = pictures(config.seed, "train", config.examples)
    shapes = np.stack([shape_map(scene, side) for scene in scenes])
    new = {split: from_uint8(pictures(config.seed, split, 256)[0]) for split in ("seen", "unseen")}

    key = jax.random.key(config.seed)
    params = {
        "vae": vae.init(key, new["seen"][:1])["params"],
        "names": jnp.zeros((1 + config.latent_channels, 1 + len(SHAPES))),  # first the bias
    }
    rate = optax.warmup_cosine_decay_schedule(
        0, config.learning_rate, config.steps // 15, config.steps, config.learning_rate / 200
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))

    def loss(params, x, shapes, key):
        variables, names = {"params": params["vae"]}, params["names"]
        mean, logvar = vae.apply(variables, x, method="encode")
        z = mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape)
        y = vae.apply(variables, z, method="decode")
        kl = jnp.mean(jnp.sum(mean**2 + jnp.exp(logvar) - 1 - logvar, axis=(1, 2, 3))) / 2
        error = jnp.mean(jnp.sum(jnp.square(y - x), axis=(1, 2, 3)))
        costs = optax.softmax_cross_entropy_with_integer_labels(z @ names[1:] + names[0], shapes)
        naming = jnp.mean(jnp.sum(costs, axis=(1, 2)))
        total = error + config.kl_weight * kl + config.shape_weight * naming
        return total, {"error": error, "kl": kl, "naming": naming}

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, moments, x, shapes, key):
        (_, shown), gradient = jax.value_and_grad(loss, has_aux=True)(params, x, shapes, key)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, shown

    moments, rng = optimizer.init(params), np.random.default_rng(config.seed)
    bar = tqdm(range(config.steps), "training")
    for number in bar:
        rows = rng.integers(len(data), size=config.batch_size)
        x, here = from_uint8(data[rows]), jax.random.fold_in(key, number)
        params, moments, shown = step(params, moments, x, shapes[rows], here)
        if number % 20 == 0:
            bar.set_postfix({name: f"{value:.1f}" for name, value in shown.items()})

    encode = jax.jit(partial(vae.apply, method="encode"))
    mean, logvar = map(np.asarray, encode({"params": params["vae"]}, from_uint8(data[:1000])))
    params = whitened(jax.device_get(params["vae"]), mean, logvar)

    @jax.jit
    def psnr(x):
        return 10 * jnp.log10(4 / jnp.mean(jnp.square(vae.apply({"params": params}, x) - x)))

    return vae_config, params, {split: float(psnr(x)) for split, x in new.items()}


def _make(config: VAETrainConfig) -> tuple[dict, dict, str]:
    vae, params, psnr = train(config)
    said = f"{psnr['seen']:.1f} dB, those of pairs never seen with {psnr['unseen']:.1f}"
    return vae.to_hf(), params, f"new pictures come back with a PSNR of {said}"


if __name__ == "__main__":
    sys.exit(command("jflow.scratch.vae", __doc__, VAETrainConfig(), _make))
