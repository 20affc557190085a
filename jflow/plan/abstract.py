"""What is compiled for a plan: models, parameters and batches as shapes, nothing allocated."""

import functools
from collections.abc import Set

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jflow import checkpoints
from jflow.batch import Batch, ImageRows, TextRows
from jflow.data.mixture import DataConfig, part_sizes
from jflow.models.janusflow import JanusFlowConfig, abstract_params
from jflow.models.llama import LlamaConfig
from jflow.models.siglip import SiglipConfig
from jflow.models.uvit import GenDecoderConfig, GenEncoderConfig
from jflow.models.vae import AutoencoderKL, VAEConfig, latent_side
from jflow.sharding import MESH_AXES

# deepseek-ai/JanusFlow-1.3B's config.json, and the SDXL VAE.
RELEASED = JanusFlowConfig(
    language=LlamaConfig(
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=16384,
    ),
    siglip=SiglipConfig(),
    gen_encoder=GenEncoderConfig(
        input_channels=4,
        kernel_size=2,
        stride=2,
        padding=0,
        block_out_channels=(768,),
        layers_in_middle=2,
        hidden_size=2048,
    ),
    gen_decoder=GenDecoderConfig(
        in_channels=768,
        out_channels=4,
        block_out_channels=(768,),
        upsamples=1,
        layers_in_middle=2,
        hidden_size=2048,
    ),
)
RELEASED_VAE = VAEConfig()


def begin(path: str, released: JanusFlowConfig = RELEASED) -> tuple[dict, dict, bool]:
    """(models, parameters, found) of a checkpoint, or of `released` where there is none.

    Returns: models: as a checkpoint's config has them; parameters: jax.ShapeDtypeStruct in the
      dtypes of the file, those of the released files are bfloat16 and the VAE's float32.
    """
    try:
        models, _ = checkpoints.read_metadata(path)
        return models, checkpoints.load_shapes(path), True
    except FileNotFoundError:  # No folder, or one of a run that has saved nothing.
        pass
    model, siglip = released.to_hf()
    models = {"janusflow": model, "siglip": siglip, "vae": RELEASED_VAE.to_hf()}
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), abstract_params(released)
    )
    return models, {"janusflow": params, "vae": vae_params(RELEASED_VAE)}, False


def vae_params(config: VAEConfig) -> dict:
    """float32 jax.ShapeDtypeStruct."""
    side = 2 * config.downscale
    image = jax.ShapeDtypeStruct((1, side, side, config.in_channels), jnp.float32)
    key = jax.eval_shape(functools.partial(jax.random.key, 0))
    return jax.eval_shape(AutoencoderKL(config).init, key, image)["params"]


def placed_rows(mesh: Mesh) -> NamedSharding:
    """Where the rows of a batch lie."""
    return NamedSharding(mesh, PartitionSpec(MESH_AXES["batch"]))


def batch(
    data: DataConfig, step: int, row_multiple: int, model: JanusFlowConfig, vae: VAEConfig | None,
    mesh: Mesh, cached: Set[str] = frozenset(),
) -> Batch:  # fmt: skip
    """What the loader gives the step, as jax.ShapeDtypeStruct on the mesh.

    Args: row_multiple: as the loader is given it. vae: None where the model works on pixels.
    cached: what comes from data.cache, "vae" the moments and "siglip" the features; "crop" where
    the crops themselves stay at home.
    """
    texts, images = part_sizes(data, step, row_multiple)
    place, length = placed_rows(mesh), data.max_seq_len
    size, seen = model.siglip.image_size, 1 + model.siglip.num_tokens
    side = latent_side(size, vae)
    drawn = 1 + model.gen_encoder.tokens_along(side) ** 2

    def of(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def ids(rows, *shape):
        return of(jnp.int32, rows, *shape)

    text = image = None
    if texts:
        pictures = data.images_per_row
        text = TextRows(
            **{name: ids(texts, length) for name in
               ("tokens", "targets", "positions", "segment_ids")},
            pixels=of(jnp.float32, texts, pictures, size, size, 3),
            slots=ids(texts, pictures, seen),
        )  # fmt: skip
    if images:
        crops, channels = data.crops_per_row, model.gen_encoder.input_channels
        moments, features = (2, side, side, channels), (model.siglip.num_tokens, model.siglip.width)
        image = ImageRows(
            **{name: ids(images, length) for name in ("tokens", "positions", "segment_ids")},
            pixels=None if "crop" in cached else of(jnp.float32, images, crops, size, size, 3),
            slots=ids(images, crops, drawn),
            sample_ids=ids(images, crops),
            moments=of(jnp.float32, images, crops, *moments) if "vae" in cached else None,
            features=of(jnp.float32, images, crops, *features) if "siglip" in cached else None,
        )
    return Batch(text=text, images=image)
