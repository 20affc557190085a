"""sample.py --plan: the programs that draw a batch of images, compiled for a slice or a host."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jflow.inference.image import decode_latents, sample_latents
from jflow.inference.parts import drawn_shape
from jflow.inference.pipeline import PROMPT_BUCKET, VAE_BATCH, ImageOptions
from jflow.models.janusflow import JanusFlow, JanusFlowConfig
from jflow.models.layers import Precision
from jflow.models.vae import AutoencoderKL, VAEConfig
from jflow.plan import abstract, topology
from jflow.plan.compiling import (
    Compiled,
    attention,
    chip_bytes,
    compile_for,
    estimate,
    fits,
    gib,
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


@dataclass(frozen=True)
class Part:
    """One of the programs that draw a batch, compiled.

    images: that one run of it makes; formula: its operations by the closed form; memory: bytes of a
    chip by kind.
    """

    title: str
    images: int
    formula: float
    memory: dict[str, int]
    compiled: Compiled


def compile_parts(
    place: Topology, model: JanusFlow, vae: AutoencoderKL | None, params: dict,
    options: ImageOptions, mesh: Mesh, batch_size: int,
) -> Iterator[Part]:  # fmt: skip
    """Latents, then pixels where there is a VAE.

    Raises ValueError for a checkpoint that cannot draw, and for a mesh that does not divide it.
    """
    params, multiple = place_params(params, mesh), row_multiple(mesh)
    rows = -(-batch_size // multiple) * multiple
    side = drawn_shape(model.config, vae and vae.config)[0]

    def part(title, lowered, used, formula, images):
        compiled = compile_for(lowered, place, chip_bytes(used))
        # All parameters lie there, also those that this program does not use.
        rest = compiled.needed - compiled.arguments
        memory = {"parameters": chip_bytes(params), "all else": rest}
        compiled = replace(compiled, needed=sum(memory.values()))
        return Part(f"{title} of {images} images", images, formula, memory, compiled)

    lowered = lower_latents(model, params["janusflow"], side, rows, options, mesh)
    formula = rows * latents_flops(model.config, side, PROMPT_BUCKET, options)
    yield part("latents", lowered, params["janusflow"], formula, rows)
    if vae is not None:
        some = min(VAE_BATCH * multiple, rows)
        shape = (some, side, side, vae.config.latent_channels)
        latents = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=abstract.placed_rows(mesh))
        with jax.set_mesh(mesh):
            lowered = decode_latents.lower(vae, params["vae"], latents)
        formula = some * flops.vae_decode_flops(vae.config, side * vae.config.downscale)
        yield part("pixels", lowered, params["vae"], formula, some)


def part_lines(part: Part, place: Topology) -> Iterator[str]:
    """As `program_lines`, and how much of the closed form was counted."""
    yield from program_lines(part.compiled, place, part.memory)
    if part.compiled.figures is not None:
        counted = part.compiled.figures.flops * place.count / part.formula
        yield f"{part.formula / 1e12:.1f} TFLOP by the closed form, {counted:.3f} of them counted"


def lighter(mesh: Mesh, batch_size: int) -> Iterator[tuple[str, Mesh, int]]:
    """(arguments of sample.py, mesh, batch size) that need less memory: half the batch again and
    again, down to one image a row of the mesh, then the parameters split over all chips too."""
    while batch_size > row_multiple(mesh):
        batch_size //= 2
        yield f"--batch-size {batch_size}", mesh, batch_size
    if mesh.shape["data"] > 1:
        split = make_mesh(MeshConfig(1, mesh.size, 1), mesh.devices.flat)
        yield f"--batch-size {batch_size} --mesh fsdp={mesh.size}", split, batch_size


def tell(
    ckpt: str,
    name: str,
    mesh_config: MeshConfig,
    options: ImageOptions,
    batch_size: int,
    dtype: jnp.dtype,
) -> bool:
    """Prints what drawing a batch of images needs on a topology; where it does not fit, also the
    nearest settings that do.

    Args: as of sample.py; for a checkpoint that is not there the released model is taken.

    Returns: does it fit as it is? Raises ValueError in one sentence for an unknown topology, for a
    compiler that is not installed, for a mesh that does not fit, for a checkpoint that cannot draw
    and for a guidance interval.
    """
    if options.guidance_interval is not None:
        raise ValueError("A plan counts guidance at every step: leave --guidance-interval out.")
    place = topology.parse(name)
    mesh = make_mesh(mesh_config, topology.devices(place))
    models, params, found = abstract.begin(ckpt)
    config = JanusFlowConfig.from_hf(models["janusflow"], models.get("siglip"))
    check_heads(config.language.num_attention_heads, config.language.kv_heads, mesh)
    vae_config = VAEConfig.from_hf(models["vae"]) if models.get("vae") else None
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)
    model = JanusFlow(config, Precision(param=dtype, compute=dtype), attention=attention(place))
    vae = AutoencoderKL(vae_config, dtype=dtype, param_dtype=dtype) if vae_config else None
    print(f"{place.name}: {place.count} {place.chip}, mesh {dict(mesh.shape)}, {dtype.name}")
    if not found:
        print(f"There is no {ckpt} here: the sizes are the released model's.")
    for line in estimate(place):
        print(line)

    compile_on = partial(compile_parts, place, model, vae, params, options)
    parts = []
    for part in compile_on(mesh, batch_size):
        print(f"\n{part.title}", *part_lines(part, place), sep="\n  ", flush=True)
        parts.append(part)
    if all(fits(part.compiled, place) for part in parts):
        time = sum(seconds(part.compiled.figures, place) / part.images for part in parts)
        print(f"\nAn image: {1e3 * time:.1f} ms at best, {1 / time:.1f} a second.")
        return True
    print("\nIt does not fit. Settings that need less, tried in turn:", flush=True)
    for change, *setting in lighter(mesh, batch_size):
        try:
            parts = list(compile_on(*setting))
        except ValueError:  # So many chips do not divide the parameters.
            continue
        print(f"  {change}: {gib(max(part.compiled.needed for part in parts))}", flush=True)
        if all(fits(part.compiled, place) for part in parts):
            return False
    print("None of these fits: take more chips, or chips with more memory.", flush=True)
    return False
