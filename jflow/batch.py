"""The one contract between data and training: what a batch holds.

Rows of both kinds are packed: several samples behind each other, each its own segment with
positions from 0; segment 0 is the padding behind them. Understanding and text share rows that need
vocabulary logits; generation rows need none and are kept apart.
"""

import flax.struct
import jax


@flax.struct.dataclass
class TextRows:
    """Packed understanding and text-only samples.

    tokens: [B, L] int32. targets: [B, L] int32, the token that position i must predict, -1 for
    none. positions, segment_ids: [B, L] int32. pixels: [B, I, S, S, 3] float32 in [-1, 1], what
    SigLIP sees. slots: [B, I, 1 + N] int32 where each image's vectors go in its row; L drops them
    (rows with fewer than I images).
    """

    tokens: jax.Array
    targets: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    pixels: jax.Array
    slots: jax.Array


@flax.struct.dataclass
class ImageRows:
    """Packed generation samples: prompts, each followed by its time token and latents.

    tokens, positions, segment_ids: [B, L] int32; of a dropped prompt the first token alone is
    there, and positions jump behind it. pixels: [B, G, H, W, 3] float32 in [-1, 1], the clean
    square crops, for the VAE and for REPA's SigLIP. slots: [B, G, 1 + N] int32
    where the time token and the latent tokens go; L drops them. sample_ids: [B, G] int32, what
    noise and time are drawn from; -1 where a row has fewer than G images.

    With a cache (`data.cache`) moments are [B, G, 2, h, w, c] float32, mean and log variance of the
    VAE's posterior, and features, where cached, [B, G, N, D] float32 of SigLIP; pixels are None
    with both.
    """

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    pixels: jax.Array | None
    slots: jax.Array
    sample_ids: jax.Array
    moments: jax.Array | None = None
    features: jax.Array | None = None


@flax.struct.dataclass
class Batch:
    """What one optimizer step sees; either part may be None where a stage's mixture has none."""

    text: TextRows | None
    images: ImageRows | None
