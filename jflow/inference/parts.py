"""Do the parts of a checkpoint fit each other?"""

from jflow.images import ImageProcessor
from jflow.models.janusflow import JanusFlowConfig
from jflow.models.vae import AutoencoderKL
from jflow.prompts import Tokenizer

# A model without VAE that reads so many channels works on pixels: they are its latents.
PIXEL_CHANNELS = 3
# Tags that the released processor appends to a vocabulary, whether or not they have embeddings.
ADDED_TAGS = 4


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
        side = siglip.image_size // (vae.config.downscale if vae else 1)
        back = encoder.tokens_along(side) * 2**config.gen_decoder.upsamples
        channels = vae.config.latent_channels if vae else PIXEL_CHANNELS
        what = "the VAE's latent_channels" if vae else "the channels of a pixel"
        pairs += [
            (what, channels, "vision_gen_enc's", encoder.input_channels),
            (what, channels, "vision_gen_dec's", config.gen_decoder.out_channels),
            ("latents along a side", side, "what the decoder gives back", back),
        ]  # fmt: skip
    wrong = [f"{a} ({x}) and {b} ({y})" for a, x, b, y in pairs if x != y]
    if tokenizer.vocab_size > config.language.vocab_size + ADDED_TAGS:
        wrong.append(
            f"the tokenizer's vocabulary ({tokenizer.vocab_size}) and the model's embeddings "
            f"({config.language.vocab_size})"
        )
    if wrong:
        raise ValueError(f"The parts of the checkpoint do not fit: {'; '.join(wrong)}.")
