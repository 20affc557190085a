"""sample.py --plan: the programs that draw a batch of images, compiled for a slice or a host."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jflow.inference.image import decode_latents, sample_latents
from jflow.inference.parts import latent_shape
from jflow.inference.pipeline import PROMPT_BUCKET, VAE_BATCH, ImageOptions
from jflow.models.janusflow import JanusFlow, JanusFlowConfig
from jflow.models.layers import Precision
from jflow.models.vae import AutoencoderKL, VAEConfig
from jflow.plan import abstract, topology
from jflow.plan.compiling import (
    attention,
    chip_bytes,
    compile_for,
    estimate,
    program_lines,
    seconds,
)
from jflow.plan.topology import Topology
from jflow.sharding import MeshConfig, check_heads, make_mesh, row_multiple
from jflow.sharding import abstract as place_params
from jflow.training import flops


def latents_flops(model: JanusFlowConfig, side: int, prompt: int, options: ImageOptions) -> float:
    """Of one image's latents behind a prompt read once, by the closed forms of training.flops.

    As the program runs it: all pairs of tokens, also those that a causal mask hides.

    Args: side: of the latents. prompt: its tokens, padding included.
    """
    language, width = model.language, model.language.hidden_size
    grid = model.gen_encoder.tokens_along(side) ** 2
    new, halves = 1 + grid, 1 + (options.guidance_scale != 1)

    def read(tokens, seen):
        return flops.token_flops(language) * tokens + flops.pair_flops(language) * tokens * seen

    encoder = flops.encoder_flops(model.gen_encoder, grid)
    encoder += 2 * grid * model.gen_encoder.channels * width
    decoder = flops.decoder_flops(model.gen_decoder, model.gen_encoder, grid)
    decoder += 2 * grid * width * model.gen_decoder.in_channels
    steps = len(options.grid().dt)
    evaluations = 2 * steps - 1 if options.solver == "heun" else steps
    return read(prompt, prompt) + evaluations * (
        encoder + halves * (read(new, prompt + new) + decoder)
    )


def lower_latents(
    model: JanusFlow, params: dict, side: int, rows: int, options: ImageOptions, mesh: Mesh
) -> jax.stages.Lowered:
    """sample_latents for `rows` prompts of up to PROMPT_BUCKET tokens.

    Args: params: jax.ShapeDtypeStruct on the mesh. side: of the latents.
    """
    lies = abstract.placed_rows(mesh)

    def row(dtype, *shape):
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=lies)

    grid = jax.ShapeDtypeStruct(options.grid().dt.shape, jnp.float32)
    with jax.set_mesh(mesh):
        return sample_latents.lower(
            model,
            params,
            row(jnp.int32, PROMPT_BUCKET),
            row(jnp.int32),
            row(jnp.float32, side, side, model.config.gen_encoder.input_channels),
            grid,
            grid,
            jax.ShapeDtypeStruct((), jnp.float32),
            solver=options.solver,
            guided=options.guidance_scale != 1,
            interval=options.guidance_interval,
        )


def tell(
    ckpt: str,
    name: str,
    mesh_config: MeshConfig,
    options: ImageOptions,
    batch_size: int,
    dtype: jnp.dtype,
) -> bool:
    """Prints what drawing a batch of images needs on a topology; returns whether it fits.

    Args: as of sample.py; for a checkpoint that is not there the released model is taken.

    Raises ValueError in one sentence for an unknown topology, for a compiler that is not installed,
    for a mesh that does not fit, for a checkpoint that cannot draw and for a guidance interval.
    """
    if options.guidance_interval is not None:
        raise ValueError("A plan counts guidance at every step: leave --guidance-interval out.")
    place = topology.parse(name)
    mesh = make_mesh(mesh_config, topology.devices(place))
    models, params, found = abstract.begin(ckpt)
    config = JanusFlowConfig.from_hf(models["janusflow"], models.get("siglip"))
    check_heads(config.language.num_attention_heads, config.language.kv_heads, mesh)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)
    params = place_params(params, mesh)
    print(f"{place.name}: {place.count} {place.chip}, mesh {dict(mesh.shape)}, {dtype.name}")
    if not found:
        print(f"There is no {ckpt} here: the sizes are the released model's.")
    for line in estimate(place):
        print(line)

    vae = VAEConfig.from_hf(models["vae"]) if models.get("vae") else None
    side = latent_shape(config, vae)[0]
    multiple = row_multiple(mesh)
    rows = -(-batch_size // multiple) * multiple
    model = JanusFlow(config, Precision(param=dtype, compute=dtype), attention=attention(place))
    lowered = lower_latents(model, params["janusflow"], side, rows, options, mesh)
    formula = rows * latents_flops(config, side, PROMPT_BUCKET, options)
    time = _part(f"latents of {rows} images", lowered, formula, rows, params, place)
    if vae is not None:
        some = min(VAE_BATCH * multiple, rows)
        shape = (some, side, side, vae.latent_channels)
        latents = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=abstract.placed_rows(mesh))
        decoder = AutoencoderKL(vae, dtype=dtype, param_dtype=dtype)
        with jax.set_mesh(mesh):
            lowered = decode_latents.lower(decoder, params["vae"], latents)
        formula = some * flops.vae_decode_flops(vae, config.siglip.image_size)
        time += _part(f"pixels of {some} images", lowered, formula, some, params, place)
    if time == float("inf"):
        print(
            "\nIt does not fit: take a smaller batch, or split it and the parameters with --mesh."
        )
        return False
    print(f"\nAn image: {1e3 * time:.1f} ms at best, {1 / time:.1f} a second.")
    return True


def _part(
    title: str,
    lowered: jax.stages.Lowered,
    formula: float,
    images: int,
    params: dict,
    place: Topology,
) -> float:
    """Prints what one program needs; returns seconds an image, infinite where it does not fit."""
    compiled = compile_for(lowered, place)
    # All parameters lie there, also those that this program does not use.
    memory = {"parameters": chip_bytes(params), "all else": compiled.needed - compiled.arguments}
    compiled = replace(compiled, needed=sum(memory.values()))
    print(f"\n{title}", *program_lines(compiled, place, memory), sep="\n  ", flush=True)
    if compiled.figures is None or compiled.needed > place.hardware.memory:
        return float("inf")
    counted = compiled.figures.flops * place.count / formula
    print(f"  {formula / 1e12:.1f} TFLOP by the closed form, {counted:.3f} of them counted")
    return seconds(compiled.figures, place) / images
