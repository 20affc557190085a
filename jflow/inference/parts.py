"""Do the parts of a checkpoint fit each other?"""

from collections.abc import Mapping

from jflow.images import ImageProcessor
from jflow.models.janusflow import JanusFlowConfig
from jflow.models.siglip import SiglipConfig
from jflow.models.vae import AutoencoderKL, VAEConfig, latent_side
from jflow.prompts import TAGS, Tokenizer

# A model without VAE that reads so many channels works on pixels: they are its latents.
PIXEL_CHANNELS = 3
# Tokens that the released code appends to a vocabulary, whether or not they have embeddings: <unk>
# and the tags.
ADDED_TOKENS = 1 + len(TAGS)


def read_processors(
    files: Mapping[str, str], siglip: SiglipConfig
) -> tuple[Tokenizer, ImageProcessor]:
    """What turns text and images into inputs, from the files of a checkpoint; what they leave open
    is as SigLIP needs it. Raises ValueError as their `from_files`."""
    tokenizer = Tokenizer.from_files(files, siglip.num_tokens)
    return tokenizer, ImageProcessor.from_files(files, siglip.image_size)


def check_parts(
    config: JanusFlowConfig,
    vae: AutoencoderKL | None,
    tokenizer: Tokenizer,
    processor: ImageProcessor,
) -> None:
    """Raises one ValueError with everything in which the parts of a checkpoint disagree."""
    siglip, encoder = config.siglip, config.gen_encoder
    pairs = [
        ("num_image_tokens of processor_config.json", tokenizer.num_image_tokens,
         "SigLIP's patches", siglip.num_tokens),
        ("image_size of preprocessor_config.json", processor.image_size,
         "SigLIP's image_size", siglip.image_size),
    ]  # fmt: skip
    if vae is not None or encoder.input_channels == PIXEL_CHANNELS:
        channels = vae.config.latent_channels if vae else PIXEL_CHANNELS
        what = "the VAE's latent_channels" if vae else "the channels of a pixel"
        pairs += [
            (what, channels, "vision_gen_enc's", encoder.input_channels),
            (what, channels, "vision_gen_dec's", config.gen_decoder.out_channels),
        ]  # fmt: skip
    wrong = [f"{a} ({x}) and {b} ({y})" for a, x, b, y in pairs if x != y]
    if tokenizer.vocab_size > config.language.vocab_size + ADDED_TOKENS:
        wrong.append(
            f"the tokenizer's vocabulary ({tokenizer.vocab_size}) and the model's embeddings "
            f"({config.language.vocab_size})"
        )
    if wrong:
        raise ValueError(f"The parts of the checkpoint do not fit: {'; '.join(wrong)}.")


def latent_shape(config: JanusFlowConfig, vae: VAEConfig | None) -> tuple[int, int, int]:
    """(h, w, c) of the latents of an image of the model's resolution, which is SigLIP's; training
    learns these.

    Raises ValueError in one sentence where they need a VAE and there is none, and where the decoder
    would give back another number than the encoder has read.
    """
    height, width, channels = drawn_shape(config, vae)
    side = latent_side(config.siglip.image_size, vae)
    if side != height:
        raise ValueError(
            f"{_mismatch(config, side)}: this checkpoint draws with {height}, but cannot be "
            f"trained to."
        )
    return height, width, channels


def drawn_shape(config: JanusFlowConfig, vae: VAEConfig | None) -> tuple[int, int, int]:
    """(h, w, c) of the latents that are drawn.

    Those of an image of SigLIP's resolution; where the decoder does not give these back, as many as
    it makes of SigLIP's tokens. The released samplers begin from so many whatever the resolution.

    Raises ValueError in one sentence where they need a VAE and there is none, and where the decoder
    gives back neither.
    """
    channels = config.gen_encoder.input_channels
    if vae is None and channels != PIXEL_CHANNELS:
        raise ValueError(
            "This checkpoint has no VAE, which generation needs: convert it again with "
            "python -m jflow.convert from-hf SRC --vae VAE --out DIR."
        )
    resolution = latent_side(config.siglip.image_size, vae)
    for side in (resolution, config.siglip.grid * 2**config.gen_decoder.upsamples):
        if _given_back(config, side) == side:
            return side, side, channels
    raise ValueError(
        f"{_mismatch(config, resolution)}: this checkpoint can answer, but not draw them."
    )


def _given_back(config: JanusFlowConfig, side: int) -> int:
    """Along a side, how many latents the decoder makes of what the encoder makes of `side`."""
    return config.gen_encoder.tokens_along(side) * 2**config.gen_decoder.upsamples


def _mismatch(config: JanusFlowConfig, side: int) -> str:
    return (
        f"Images of {config.siglip.image_size} pixels have {side} latents along a side, but the "
        f"decoder gives back {_given_back(config, side)}"
    )
