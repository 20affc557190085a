"""jflow's side of benchmarks/sampling.py, as sample.py runs it: prompts padded, layers apart for
answers and on GPUs, tokens in chunks."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from full_size import write_shards
from workload import GUIDANCE_SCALE, SIGLIP_SIZES, Workload, random_params

from jflow import flow
from jflow.convert.engine import find_tensors, open_params, plan
from jflow.convert.janusflow_rules import JANUSFLOW_RULES
from jflow.inference.image import decode_latents, sample_latents
from jflow.inference.pipeline import DECODE_CHUNK, PROMPT_BUCKET, VAE_BATCH, pad_rows
from jflow.inference.text import decode, prefill
from jflow.models.janusflow import JanusFlow, JanusFlowConfig, abstract_params
from jflow.models.layers import Precision, by_rows
from jflow.models.llama import unstack_layers
from jflow.models.vae import AutoencoderKL, VAEConfig


def leaves_of(config: dict):
    return plan(JANUSFLOW_RULES, abstract_params(JanusFlowConfig.from_hf(config, SIGLIP_SIZES)))


def write_weights(workload: Workload) -> None:
    """Makes the weights of the golden README's rule, in the released names."""
    keys = {key: list(leaf.hf_shape) for leaf in leaves_of(workload.config) for key in leaf.keys}
    write_shards(keys, {}, jnp.dtype(workload.dtype), workload.weights, "model")


def jobs(workload: Workload) -> dict[str, Callable]:
    """{name: job}; every job returns (seconds, arrays...); `sample` and `vae` take a batch size."""
    dtype = jnp.dtype(workload.dtype)
    precision = Precision(param=dtype, compute=dtype)
    config = JanusFlowConfig.from_hf(workload.config, SIGLIP_SIZES)
    leaves = leaves_of(workload.config)
    params = jax.tree.map(jnp.asarray, open_params(leaves, find_tensors(workload.weights)))
    answering = JanusFlow(config, precision, scan_layers=False, segments=2)
    unstacked = params | {"language_model": unstack_layers(dict(params["language_model"]))}
    drawing = JanusFlow(config, precision, segments=2)
    if jax.default_backend() == "gpu":
        by_rows(unstacked["language_model"])
        drawing, params = answering, unstacked
    grid = flow.time_grid(workload.steps)
    vae = AutoencoderKL(VAEConfig(), dtype=dtype, param_dtype=dtype)
    shapes = jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    decoder = jax.tree.map(lambda leaf: leaf.astype(dtype), random_params(shapes))

    def sample(batch):
        tokens, lengths = pad_rows(workload.prompts(batch), PROMPT_BUCKET)
        z = workload.noise(batch)
        began = time.perf_counter()
        latents = sample_latents(
            drawing, params, tokens, lengths, z, grid.timesteps, grid.dt, np.float32(GUIDANCE_SCALE)
        )
        latents = np.asarray(latents)
        return time.perf_counter() - began, latents

    def answer():
        """Seconds of the decoding alone; the prompt's last logits and all new tokens."""
        tokens, lengths = pad_rows(workload.question(), PROMPT_BUCKET)
        pixels = np.zeros((1, 0, 1, 1, 3), np.float32)
        slots = np.zeros((1, 0, 1), np.int32)
        state = prefill(answering, unstacked, tokens, lengths, pixels, slots, workload.new_tokens)
        logits, written = np.asarray(jax.block_until_ready(state).logits), []
        keys = jax.random.split(jax.random.key(0), 1)
        began = time.perf_counter()
        while len(written) * DECODE_CHUNK < workload.new_tokens:
            state, new = decode(
                answering, unstacked, state, keys, None, np.float32(1), np.int32(-1),
                DECODE_CHUNK,
            )  # fmt: skip
            written.append(np.asarray(new))
        seconds = time.perf_counter() - began
        return seconds, logits, np.concatenate(written, axis=1)

    def decode_vae(batch):
        latents = jax.block_until_ready(jnp.asarray(workload.noise(batch)))
        began = time.perf_counter()
        pixels = [
            decode_latents(vae, decoder, latents[first : first + VAE_BATCH])
            for first in range(0, batch, VAE_BATCH)
        ]
        pixels = [np.asarray(part) for part in pixels]
        return time.perf_counter() - began, np.concatenate(pixels)

    square = (workload.matmul_size,) * 2
    factor = jax.random.normal(jax.random.key(1), square, dtype)
    product = jax.jit(jnp.matmul)

    def matmul(repeats):
        began = time.perf_counter()
        for _ in range(repeats):
            result = product(factor, factor)
        jax.block_until_ready(result)
        return ((time.perf_counter() - began) / repeats,)

    return {"sample": sample, "answer": answer, "vae": decode_vae, "matmul": matmul}
