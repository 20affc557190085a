"""JanusFlow (arXiv 2411.07975): one language model that reads images and draws them.

Understanding: text and SigLIP features in, logits out. Generation: text, a time token and noisy
latents in, the velocity at the latents out. The parts are methods, so that training and sampling
compose the same ones; none of them knows about devices.
"""

from dataclasses import dataclass

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange

from jflow.models.attention import Implementation
from jflow.models.layers import KVCache, Linear, Precision, Prefix, Remat, RMSNorm, put
from jflow.models.llama import Llama, LlamaConfig, LlamaOutput
from jflow.models.siglip import SIGLIP_BY_NAME, Siglip, SiglipConfig
from jflow.models.uvit import GenDecoder, GenDecoderConfig, GenEncoder, GenEncoderConfig


@dataclass(frozen=True)
class JanusFlowConfig:
    """All dimensions of the model; `from_hf` and `to_hf` read and write the released config."""

    language: LlamaConfig
    siglip: SiglipConfig
    gen_encoder: GenEncoderConfig
    gen_decoder: GenDecoderConfig

    def __post_init__(self):
        hidden, encoder, decoder = self.language.hidden_size, self.gen_encoder, self.gen_decoder
        if not hidden == encoder.hidden_size == decoder.hidden_size:
            raise ValueError(
                f"The time embedding is a token of the language model, so hidden_size must be the "
                f"same in language_config ({hidden}), vision_gen_enc_config "
                f"({encoder.hidden_size}) and vision_gen_dec_config ({decoder.hidden_size})."
            )
        if encoder.channels != decoder.block_out_channels[-1]:
            raise ValueError(
                f"The decoder expects a skip of {decoder.block_out_channels[-1]} channels, but "
                f"the encoder gives {encoder.channels}."
            )

    @classmethod
    def from_hf(cls, config: dict, siglip_sizes: dict | None = None) -> "JanusFlowConfig":
        """Reads the fields of a released config.json as they are.

        Args:
          config: the parsed config.json.
          siglip_sizes: the parsed siglip_model_config.json, for a SigLIP not known by name.

        Raises ValueError in one sentence for a config that is not JanusFlow's.
        """
        parts = {
            "vision_und_enc_config": "CLIPVisionTower",
            "vision_gen_enc_config": "ShallowUViTEncoder",
            "vision_gen_dec_config": "ShallowUViTDecoder",
        }
        params = {}
        for part, name in parts.items():
            fields = config.get(part)
            found = fields.get("cls") if isinstance(fields, dict) else None
            # The released config leaves `cls`, or all, out where its own defaults hold.
            if not isinstance(fields, dict) or found not in (name, None, ""):
                raise ValueError(
                    f"This config.json is not a JanusFlow: {part}.cls is {found!r}, not {name!r}."
                )
            params[part] = fields.get("params") or {}
        return cls(
            language=LlamaConfig.from_hf(config.get("language_config", {})),
            siglip=SiglipConfig.from_hf(params["vision_und_enc_config"], siglip_sizes),
            gen_encoder=GenEncoderConfig.from_hf(params["vision_gen_enc_config"]),
            gen_decoder=GenDecoderConfig.from_hf(params["vision_gen_dec_config"]),
        )

    def to_hf(self) -> tuple[dict, dict]:
        """(config.json, siglip_model_config.json) that `from_hf` reads back to this config."""
        vit, text = self.siglip, self.language
        sizes = dict(
            patch_size=vit.patch_size,
            width=vit.width,
            layers=vit.layers,
            heads=vit.heads,
            mlp_ratio=vit.mlp_ratio,
        )
        known = {name for name, entry in SIGLIP_BY_NAME.items() if entry == sizes}
        name = f"siglip_large_patch{vit.patch_size}_{vit.image_size}"
        if name not in known:
            name = f"siglip_{vit.width}x{vit.layers}_patch{vit.patch_size}_{vit.image_size}"
        language = {name: value for name, value in vars(text).items() if value is not None}
        config = {
            "architectures": ["MultiModalityCausalLM"],
            "model_type": "multi_modality",
            "language_config": language | {"model_type": "llama"},
            "vision_und_enc_config": {
                "cls": "CLIPVisionTower",
                "model_type": "vision_und_enc",
                "params": {
                    "image_size": vit.image_size,
                    "model_name": name,
                    "select_feature": "same",
                    "select_layer": -1,
                },
            },
            "vision_gen_enc_config": {
                "cls": "ShallowUViTEncoder",
                "model_type": "vision_gen_enc",
                "params": vars(self.gen_encoder)
                | {"block_out_channels": list(self.gen_encoder.block_out_channels)},
            },
            "vision_gen_dec_config": {
                "cls": "ShallowUViTDecoder",
                "model_type": "vision_gen_dec",
                "params": vars(self.gen_decoder)
                | {"block_out_channels": list(self.gen_decoder.block_out_channels)},
            },
        }
        side = {
            "model_name": name,
            "image_size": vit.image_size,
            "global_pool": "map",
            "use_checkpoint": False,
        }
        return config, side | sizes


@flax.struct.dataclass
class GenTokens:
    """What the generation encoder hands on.

    embeddings: [B, 1 + N, D] the time token, then the latent tokens in raster order.
    skip: [B, h, w, C] for the decoder.
    t_emb: [B, D] the time embedding, which also conditions the decoder.
    """

    embeddings: jax.Array
    skip: jax.Array
    t_emb: jax.Array


class JanusFlow(nn.Module):
    """The model as methods over `model.apply({"params": params}, ..., method="...")`."""

    config: JanusFlowConfig
    precision: Precision = Precision()
    scan_layers: bool = True  # False: see Llama
    remat: Remat = "none"
    attention: Implementation = "auto"  # of the language model and SigLIP
    segments: int | None = None  # see attention.attention
    unroll: int = 1  # see Llama

    def setup(self):
        config, precision = self.config, self.precision
        hidden = config.language.hidden_size
        self.language_model = Llama(
            config.language,
            precision,
            self.scan_layers,
            self.remat,
            self.attention,
            self.segments,
            self.unroll,
        )
        self.vision_und_enc_model = Siglip(config.siglip, precision, self.remat, self.attention)
        self.vision_und_enc_aligner = Linear(hidden, precision)
        self.beg_of_und_embed = self.param(
            "beg_of_und_embed", nn.initializers.zeros, (1, hidden), precision.param
        )
        self.vision_gen_enc_model = GenEncoder(config.gen_encoder, precision)
        self.vision_gen_enc_aligner = Linear(hidden, precision)
        self.vision_gen_dec_aligner_norm = RMSNorm(config.language.rms_norm_eps, precision)
        self.vision_gen_dec_aligner = Linear(config.gen_decoder.in_channels, precision)
        self.vision_gen_dec_model = GenDecoder(config.gen_decoder, precision)

    def embed_text(self, tokens: jax.Array) -> jax.Array:
        """[B, T] token ids -> [B, T, D]."""
        return self.language_model.embed(tokens)

    def image_features(self, pixels: jax.Array) -> jax.Array:
        """[M, S, S, 3] pixels in [-1, 1] -> [M, N, C] SigLIP features, before the aligner."""
        return self.vision_und_enc_model(pixels)

    def embed_images(self, pixels: jax.Array) -> jax.Array:
        """[M, S, S, 3] pixels in [-1, 1] -> [M, 1 + N, D]: begin-of-understanding, then patches.

        The first vector is learned and takes the place of the begin-of-image word embedding;
        unlike the released forward, it is not detached here, so it trains.
        """
        patches = self.vision_und_enc_aligner(self.image_features(pixels))
        begin = self.beg_of_und_embed.astype(patches.dtype)[None]
        begin = jnp.broadcast_to(begin, (patches.shape[0], 1, patches.shape[2]))
        return jnp.concatenate([begin, patches], axis=1)

    def embed_understanding(
        self, tokens: jax.Array, pixels: jax.Array, slots: jax.Array
    ) -> jax.Array:
        """Word embeddings with images in their places (prepare_inputs_embeds).

        Args:
          tokens: [B, T] token ids; what stands at the slots does not matter.
          pixels: [B, I, S, S, 3] the images of each row in [-1, 1], I may be 0.
          slots: [B, I, 1 + N] where each image's vectors go in the row; T or more to drop them
            (rows with fewer images than I).

        Returns: [B, T, D].
        """
        x = self.embed_text(tokens)
        batch, images = pixels.shape[:2]
        if images == 0:
            return x
        embeds = self.embed_images(rearrange(pixels, "B I h w c -> (B I) h w c"))
        embeds = rearrange(embeds, "(B I) N D -> B (I N) D", B=batch)
        slots = rearrange(slots, "B I N -> B (I N)")
        return put(x, slots, embeds)

    def encode_latents(self, z: jax.Array, timesteps: jax.Array) -> GenTokens:
        """Noisy latents [B, H, W, c] and 1000 t [B] -> the tokens the language model reads.

        The time embedding itself stands where a begin-of-generation tag would.
        """
        grid, t_emb = self.vision_gen_enc_model(z, timesteps)
        latents = self.vision_gen_enc_aligner(rearrange(grid, "B h w C -> B (h w) C"))
        embeddings = jnp.concatenate([t_emb[:, None].astype(latents.dtype), latents], axis=1)
        return GenTokens(embeddings=embeddings, skip=grid, t_emb=t_emb)

    def decode_velocity(self, hidden: jax.Array, skip: jax.Array, t_emb: jax.Array) -> jax.Array:
        """Hidden states at the latent positions [B, N, D] -> float32 velocity [B, H, W, c].

        `hidden` already went through the language model's final norm; the aligner's norm comes on
        top, as in the released forward.
        """
        x = self.vision_gen_dec_aligner(self.vision_gen_dec_aligner_norm(hidden))
        x = rearrange(x, "B (h w) C -> B h w C", h=skip.shape[1])
        return self.vision_gen_dec_model(x, skip, t_emb).astype(jnp.float32)

    def language(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        cache: KVCache | Prefix | None = None,
        tap_layer: int | None = None,
    ) -> LlamaOutput:
        """The decoder over embeddings; see `Llama.__call__`."""
        return self.language_model(x, positions, segment_ids, cache, tap_layer)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] hidden states -> [..., vocab] float32."""
        return self.language_model.logits(hidden)

    def __call__(self, tokens, pixels, slots, z, timesteps):
        """Touches every parameter once, to initialise them."""
        x = self.embed_understanding(tokens, pixels, slots)
        gen = self.encode_latents(z, timesteps)
        x = jnp.concatenate([x, gen.embeddings], axis=1)
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        hidden = self.language(x, positions, jnp.ones_like(positions)).hidden
        latents = hidden[:, -gen.embeddings.shape[1] + 1 :]
        pooled = self.vision_und_enc_model.pool(self.image_features(pixels[:, 0]))
        return self.logits(hidden), self.decode_velocity(latents, gen.skip, gen.t_emb), pooled


def init_params(model: JanusFlow, key: jax.Array) -> dict:
    """Fresh parameters as a plain nested dict; run it under jit to initialise sharded."""
    config = model.config
    size, tokens = config.siglip.image_size, config.siglip.num_tokens + 1
    side = config.gen_encoder.kernel_size
    variables = model.init(
        key,
        tokens=jnp.zeros((1, tokens), jnp.int32),
        pixels=jnp.zeros((1, 1, size, size, 3)),
        slots=jnp.arange(tokens)[None, None],
        z=jnp.zeros((1, side, side, config.gen_encoder.input_channels)),
        timesteps=jnp.zeros((1,)),
    )
    return variables["params"]


def abstract_params(config: JanusFlowConfig) -> dict:
    """The parameter tree as jax.ShapeDtypeStruct, nothing allocated."""
    return jax.eval_shape(lambda: init_params(JanusFlow(config), jax.random.key(0)))
