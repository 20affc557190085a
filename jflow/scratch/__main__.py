"""A small JanusFlow from nothing, to train on the embedded datasets: `init_from` of configs/shapes.

    python -m jflow.scratch --out runs/shapes/init [field=value ...]

The same modules as the released model in small: Llama, ConvNeXt encoder and decoder, SigLIP, VAE,
causal attention throughout. As the released one began from a trained SigLIP and the SDXL-VAE, this
one begins from parts trained on the same pictures, by `jflow.scratch.siglip` and
`jflow.scratch.vae`; all else is random.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import jax

from jflow import checkpoints, folders
from jflow.config import override, to_dict
from jflow.data.scenes import MORE_COLORS
from jflow.images import ImageProcessor
from jflow.models.janusflow import JanusFlow, JanusFlowConfig, init_params
from jflow.models.llama import LlamaConfig
from jflow.models.siglip import SiglipConfig
from jflow.models.uvit import GenDecoderConfig, GenEncoderConfig
from jflow.models.vae import VAEConfig
from jflow.prompts import Tokenizer
from jflow.scratch.parts import ASSETS, read
from jflow.scratch.tokenizer import tokenizer_files


@dataclass(frozen=True)
class ScratchConfig:
    """Dimensions of what is random. channels: of the generation encoder and decoder, in which
    encoder_blocks and decoder_blocks count ConvNeXt blocks. wide: with words for the colors of
    `jflow.data build shapes --wide 50`."""

    hidden_size: int = 128
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 4
    channels: int = 96
    encoder_blocks: int = 1
    decoder_blocks: int = 3
    wide: bool = False
    seed: int = 0


def model_config(
    scratch: ScratchConfig, siglip: SiglipConfig, vae: VAEConfig, vocab_size: int
) -> JanusFlowConfig:
    """As the released model, with one token for 2 x 2 latents."""
    shared = dict(block_out_channels=(scratch.channels,), hidden_size=scratch.hidden_size)
    return JanusFlowConfig(
        language=LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=scratch.hidden_size,
            intermediate_size=scratch.intermediate_size,
            num_hidden_layers=scratch.num_layers,
            num_attention_heads=scratch.num_heads,
        ),
        siglip=siglip,
        gen_encoder=GenEncoderConfig(
            input_channels=vae.latent_channels,
            kernel_size=2,
            stride=2,
            layers_in_middle=scratch.encoder_blocks,
            **shared,
        ),
        gen_decoder=GenDecoderConfig(
            in_channels=scratch.channels,
            out_channels=vae.latent_channels,
            upsamples=1,
            layers_in_middle=scratch.decoder_blocks,
            **shared,
        ),
    )


def create(scratch: ScratchConfig, out: Path) -> None:
    """Writes the checkpoint; raises FileExistsError where `out` is taken."""
    sizes, siglip_params = read(ASSETS / "siglip_shapes")
    vae, vae_params = read(ASSETS / "vae_shapes")
    siglip = SiglipConfig(**sizes)
    files = tokenizer_files(siglip.num_tokens, tuple(MORE_COLORS) if scratch.wide else ())
    vocab_size = Tokenizer.from_files(files).vocab_size
    model = model_config(scratch, siglip, VAEConfig.from_hf(vae), vocab_size)
    params = jax.jit(lambda key: init_params(JanusFlow(model), key))(jax.random.key(scratch.seed))
    params = params | {"vision_und_enc_model": siglip_params}
    hf, side = model.to_hf()
    files |= {"preprocessor_config.json": json.dumps(vars(ImageProcessor(siglip.image_size)))}
    described = {"janusflow": hf, "siglip": side, "vae": vae, "scratch": to_dict(scratch)}
    checkpoints.save_checkpoint(out, {"janusflow": params, "vae": vae_params}, described, files)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path, help="checkpoint folder to make")
    parser.add_argument("overrides", nargs="*", metavar="field=value")
    args = parser.parse_intermixed_args(argv)
    try:
        folders.require_new(args.out)
        create(reduce(override, args.overrides, ScratchConfig()), args.out)
    except (ValueError, OSError) as error:
        print(f"jflow.scratch: {error}", file=sys.stderr)
        return 2
    print(f"{args.out} is ready: python train.py --config configs/shapes.py init_from={args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
