"""The small VAE of the embedded datasets: the architecture of SDXL's, 32 x 32 pixels to 8 x 8 x 4.

python -m jflow.scratch.vae --out jflow/scratch/assets/vae_shapes [field=value ...]
"""

import sys
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from jflow.images import from_uint8
from jflow.models.vae import AutoencoderKL, VAEConfig
from jflow.scratch.parts import command, pictures


@dataclass(frozen=True)
class VAETrainConfig:
    """examples: pictures of the training split, gone through at random. kl_weight: of the
    posterior's divergence from the standard normal, in nats, beside the sum of squared errors."""

    channels: tuple[int, ...] = (16, 32, 32)
    latent_channels: int = 4
    examples: int = 40_000
    batch_size: int = 32
    steps: int = 1_500
    learning_rate: float = 2e-3
    kl_weight: float = 0.01
    seed: int = 0


def train(config: VAETrainConfig) -> tuple[VAEConfig, dict, float]:
    """The VAE, its scaling factor set to make latents of unit variance, its parameters, and the
    PSNR of new pictures in dB."""
    vae_config = VAEConfig(
        latent_channels=config.latent_channels,
        block_out_channels=config.channels,
        layers_per_block=1,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(vae_config)
    data, _ = pictures(config.seed, "train", config.examples)
    tests, _ = pictures(config.seed, "seen", 256)

    def both_ways(module, x):
        return module.decode(module.encode(x)[0])

    key = jax.random.key(config.seed)
    params = vae.init(key, from_uint8(tests[:1]), method=both_ways)["params"]
    rate = optax.warmup_cosine_decay_schedule(
        0, config.learning_rate, config.steps // 15, config.steps, config.learning_rate / 200
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))

    def loss(params, x, key):
        mean, logvar = vae.apply({"params": params}, x, method="encode")
        z = mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape)
        y = vae.apply({"params": params}, z, method="decode")
        kl = jnp.mean(jnp.sum(mean**2 + jnp.exp(logvar) - 1 - logvar, axis=(1, 2, 3))) / 2
        error = jnp.mean(jnp.sum(jnp.square(y - x), axis=(1, 2, 3)))
        return error + config.kl_weight * kl

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, moments, x, key):
        value, gradient = jax.value_and_grad(loss)(params, x, key)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, value

    moments, rng = optimizer.init(params), np.random.default_rng(config.seed)
    bar = tqdm(range(config.steps), "training")
    for number in bar:
        x = from_uint8(data[rng.integers(len(data), size=config.batch_size)])
        params, moments, value = step(params, moments, x, jax.random.fold_in(key, number))
        if number % 20 == 0:
            bar.set_postfix(loss=f"{value:.1f}")

    x = from_uint8(tests)
    z, _ = vae.apply({"params": params}, x, method="encode")
    error = jnp.mean(jnp.square(vae.apply({"params": params}, z, method="decode") - x))
    scaled = VAEConfig(**vars(vae_config) | {"scaling_factor": round(float(1 / jnp.std(z)), 4)})
    return scaled, jax.device_get(params), float(10 * jnp.log10(4 / error))


def _make(config: VAETrainConfig) -> tuple[dict, dict, str]:
    vae, params, psnr = train(config)
    return vae.to_hf(), params, f"new pictures come back with a PSNR of {psnr:.1f} dB"


if __name__ == "__main__":
    sys.exit(command("jflow.scratch.vae", __doc__, VAETrainConfig(), _make))
