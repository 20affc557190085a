"""A checkpoint, ready to draw and to answer."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from jflow import checkpoints, flow, images, prompts, rng
from jflow.distributed import fetch
from jflow.inference.image import decode_latents, encode_pixels, initial_noise, sample_latents
from jflow.inference.parts import check_parts, drawn_shape, read_processors
from jflow.inference.text import decode, prefill
from jflow.models.janusflow import JanusFlow, JanusFlowConfig
from jflow.models.layers import Precision, by_rows
from jflow.models.llama import unstack_layers
from jflow.models.vae import AutoencoderKL, VAEConfig
from jflow.samplers import SOLVERS
from jflow.sharding import MESH_AXES, check_heads, row_multiple, shardings

# Prompts are padded to a multiple of this, so that most runs share their compiled programs.
PROMPT_BUCKET = 64
# Answers are decoded this many tokens at a time, between two looks at the terminal.
DECODE_CHUNK = 8
# The VAE's activations are the largest of all: it decodes this many images at a time.
VAE_BATCH = 4


@dataclass(frozen=True)
class ImageOptions:
    """How to sample images.

    steps: solver steps. guidance_scale: w; 1 leaves the unconditional half out. seed: the noise of
    image i of any prompt is drawn from (seed, i); 0 to 2^32 - 1. solver: a name in
    samplers.SOLVERS. shift, official_rounding: see flow.time_grid. guidance_interval: t in
    [low, high] with guidance, None for always. strength: in (0, 1], how much of the way from an
    initial image to noise to go back.
    """

    steps: int = 30
    guidance_scale: float = 2.0
    seed: int = 0
    solver: str = "euler"
    shift: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    official_rounding: bool = False
    strength: float = 1.0

    def __post_init__(self):
        _require_finite(self, "guidance_scale", "shift")
        rng.require_seed(self.seed)
        if self.solver not in SOLVERS:
            raise ValueError(f"Unknown solver {self.solver!r}: choose from {', '.join(SOLVERS)}.")
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength must be in (0, 1], not {self.strength}.")
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if not 0 <= low <= high <= 1:
                raise ValueError(
                    f"The guidance interval must be 0 <= low <= high <= 1, not {low} to {high}."
                )

    def grid(self) -> flow.TimeGrid:
        steps = max(1, round(self.steps * self.strength)) if self.steps > 0 else self.steps
        return flow.time_grid(steps, 1 - self.strength, self.shift, self.official_rounding)


@dataclass(frozen=True)
class AnswerOptions:
    """How to answer. temperature 0 takes the likeliest token; otherwise tokens are drawn from the
    nucleus of probability top_p, with keys folded from (seed, the question's id, token).

    An answer ends after max_new_tokens, or where the model has no more positions."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        _require_finite(self, "temperature")
        rng.require_seed(self.seed)
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}.")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, and is {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}.")


def _require_finite(options: ImageOptions | AnswerOptions, *names: str) -> None:
    for name in names:
        if not math.isfinite(value := getattr(options, name)):
            raise ValueError(f"{name} must be a number, not {value}.")


@dataclass(frozen=True)
class Question:
    """A conversation that ends with an open turn of the assistant.

    images stand in the order of their placeholders; id is what sampling folds into its keys.
    """

    messages: tuple[prompts.Message, ...]
    images: tuple[Image.Image, ...] = ()
    id: int = 0


def pad_rows(rows: Sequence[np.ndarray], multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """Token rows of different length -> [B, T] with zeros at the right, T a multiple, and [B]."""
    lengths = np.array([len(row) for row in rows], np.int32)
    # Nothing sees them; but unlike the tokenizer's padding, 0 has an embedding in every model.
    tokens = np.zeros((len(rows), -(-lengths.max() // multiple) * multiple), np.int32)
    for row, target in zip(rows, tokens, strict=True):
        target[: len(row)] = row
    return tokens, lengths


@dataclass(frozen=True)
class Pipeline:
    """Model, parameters and tokenizer of one checkpoint; `from_checkpoint` makes it.

    mesh: the devices that share the work, the rows of a batch filled up with copies to what they
    divide; where they belong to several processes, all of these call together. None: one device.
    template: what prompts and questions become; from_checkpoint takes the one it was trained with.
    """

    model: JanusFlow
    vae: AutoencoderKL | None
    params: dict  # {"janusflow": ..., "vae": ...}
    tokenizer: prompts.Tokenizer
    processor: images.ImageProcessor
    mesh: Mesh | None = None
    template: prompts.Template = "chat"

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        dtype: jnp.dtype = jnp.float32,
        scan_layers: bool = True,
        mesh: Mesh | None = None,
        load: Callable[..., tuple[dict, dict, dict[str, str]]] = checkpoints.load_checkpoint,
    ) -> "Pipeline":
        """Loads a checkpoint folder that jflow.convert or train.py wrote.

        Args:
          dtype: of parameters and matrix products; norms, softmax and the ODE stay float32.
          scan_layers: True compiles faster, False decodes answers faster (see Llama).
          mesh: each device reads its part of the parameters alone.
          load: reads the folder; training.runs.load_raw takes what is trained as it is, not its
            average.

        Raises FileNotFoundError or ValueError in one sentence for what is no such checkpoint, and
        for a model that does not divide over the mesh.
        """
        places = None if mesh is None else partial(shardings, mesh=mesh)
        params, config, files = load(path, dtype=dtype, sharding=places)
        precision = Precision(param=dtype, compute=dtype)
        model_config = JanusFlowConfig.from_hf(config["janusflow"], config.get("siglip"))
        if mesh is not None:
            language = model_config.language
            check_heads(language.num_attention_heads, language.kv_heads, mesh)
        vae = None
        if config.get("vae") is not None:
            vae = AutoencoderKL(VAEConfig.from_hf(config["vae"]), dtype=dtype, param_dtype=dtype)
        if not scan_layers:
            language = params["janusflow"].pop("language_model")
            language = unstack_layers(language)
            # With kernels as they are, a CPU multiplies up to 9 times as fast.
            on_gpu = jax.default_backend() == "gpu"
            params["janusflow"]["language_model"] = by_rows(language) if on_gpu else language
        tokenizer, processor = read_processors(files, model_config.siglip)
        check_parts(model_config, vae, tokenizer, processor)
        return cls(
            # A row is padding and what continues a prompt, or is one with padding behind.
            model=JanusFlow(model_config, precision, scan_layers, segments=2),
            vae=vae,
            params=params,
            tokenizer=tokenizer,
            processor=processor,
            mesh=mesh,
            template=prompts.trained_template(config.get("train")),
        )

    def rows(self, count: int) -> int:
        """The rows of a batch of `count`: what the mesh divides."""
        multiple = 1 if self.mesh is None else row_multiple(self.mesh)
        return -(-count // multiple) * multiple

    def _place(self, rows: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
        """The rows of a batch [B, ...] where their devices are."""
        if self.mesh is None:
            return rows
        return jax.device_put(rows, NamedSharding(self.mesh, PartitionSpec(MESH_AXES["batch"])))

    def _on_mesh(self) -> AbstractContextManager:
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """`drawn_shape` of this checkpoint."""
        return drawn_shape(self.model.config, self.vae.config if self.vae else None)

    def _check(self, row: np.ndarray, more: int, what: str):
        language = self.model.config.language
        prompts.check_length(len(row) + more, language.max_position_embeddings, what)
        if row.max() >= language.vocab_size:
            raise ValueError(
                f"The text becomes the token id {row.max()}, but the model has only "
                f"{language.vocab_size} embeddings: leave out such special tokens, or convert "
                f"again with the tokenizer that belongs to the model."
            )

    def generate(
        self,
        texts: Sequence[str],
        num: int,
        options: ImageOptions = ImageOptions(),
        batch_size: int = 8,
        init_image: Image.Image | None = None,
        first_ids: Sequence[int] | None = None,
    ) -> Iterator[np.ndarray]:
        """Draws images 0 .. num - 1 of every prompt, batch by batch.

        Each image depends on its (prompt, seed, index) alone: neither on the other prompts nor on
        the batch size. `init_image` makes it image-to-image, see `ImageOptions.strength`.
        first_ids: where the images of each prompt are counted from, instead of 0.

        Yields: uint8 [b, H, W, 3], in order, prompts outermost. Raises ValueError in one sentence
        for an empty or overlong prompt and for a checkpoint without VAE.
        """
        if num < 1 or batch_size < 1:
            raise ValueError(f"num ({num}) and batch size ({batch_size}) must be at least 1.")
        shape, grid = self.latent_shape, options.grid()
        rows = [prompts.generation_tokens(self.tokenizer, text, self.template) for text in texts]
        side = self.model.config.gen_encoder.tokens_along(shape[0])
        for row in rows:
            self._check(row, 1 + side**2, "prompt and image")
        tokens, lengths = pad_rows(rows, PROMPT_BUCKET)
        start = None
        if init_image is not None:
            size = shape[0] * (self.vae.config.downscale if self.vae else 1)
            pixels = images.from_uint8(images.center_crop_square(init_image, size))
            start = pixels[None]
            if self.vae is not None:
                start = encode_pixels(self.vae, self.params["vae"], start)

        prompt_ids = np.repeat(np.arange(len(rows)), num)
        image_ids = np.tile(np.arange(num), len(rows))
        if first_ids is not None:
            image_ids += np.repeat(np.asarray(first_ids), num)
        batch_size = self.rows(min(batch_size, len(prompt_ids)))
        for first in range(0, len(prompt_ids), batch_size):
            # The last batch is filled up with copies, so that it runs the same program.
            ids = np.minimum(np.arange(first, first + batch_size), len(prompt_ids) - 1)
            z = self._place(initial_noise(options.seed, image_ids[ids], shape))
            if start is not None:
                z = flow.interpolate(start, z, grid.timesteps[0] / 1000)
            with self._on_mesh():
                latents = sample_latents(
                    self.model,
                    self.params["janusflow"],
                    self._place(tokens[prompt_ids[ids]]),
                    self._place(lengths[prompt_ids[ids]]),
                    z,
                    grid.timesteps,
                    grid.dt,
                    np.float32(options.guidance_scale),
                    solver=options.solver,
                    guided=options.guidance_scale != 1,
                    interval=options.guidance_interval,
                )
            yield self.decode(latents)[: len(prompt_ids) - first]

    def decode(self, latents: jax.Array) -> np.ndarray:
        """[B, h, w, c] latents -> uint8 [B, H, W, 3], a few at a time."""
        if self.vae is None:
            return images.to_uint8(fetch(latents))
        chunk = min(self.rows(1) * VAE_BATCH, len(latents))
        pixels = []
        for first in range(0, len(latents), chunk):
            ids = np.minimum(np.arange(first, first + chunk), len(latents) - 1)
            part = self._place(latents[ids])
            with self._on_mesh():
                decoded = decode_latents(self.vae, self.params["vae"], part)
            pixels.append(images.to_uint8(fetch(decoded)))
        return np.concatenate(pixels)[: len(latents)]

    def answer(
        self, questions: Sequence[Question], options: AnswerOptions = AnswerOptions()
    ) -> Iterator[list[str]]:
        """Answers a batch of questions, greedily or by sampling.

        An answer does not depend on the other questions. Yields what has been written so far of
        every answer, every few tokens; the last one is the result. Raises ValueError in one
        sentence for an empty or overlong question and for images without a placeholder.
        """
        tokenizer, count = self.tokenizer, len(questions)
        questions = [*questions, *questions[-1:] * (self.rows(count) - count)]
        rows = [
            self.question_tokens(question.messages, len(question.images)) for question in questions
        ]
        positions = self.model.config.language.max_position_embeddings
        limits = [min(options.max_new_tokens, positions - len(row)) for row in rows]
        most = max(limits)
        tokens, lengths = pad_rows(rows, PROMPT_BUCKET)
        pixels, slots = self._place_images(questions, rows, tokens.shape[1])
        ids = np.array([question.id for question in questions])
        ids, *given = map(self._place, (ids, tokens, lengths, pixels, slots))
        with self._on_mesh():
            keys = jax.vmap(lambda i: rng.fold(options.seed, "answer", i))(ids)
            reserve = -(-most // DECODE_CHUNK) * DECODE_CHUNK
            state = prefill(self.model, self.params["janusflow"], *given, reserve)
        written = np.zeros((len(rows), 0), np.int32)
        while written.shape[1] < most:
            with self._on_mesh():
                state, new = decode(
                    self.model,
                    self.params["janusflow"],
                    state,
                    keys,
                    np.float32(options.temperature) if options.temperature else None,
                    np.float32(options.top_p),
                    np.int32(tokenizer.eos_id),
                    DECODE_CHUNK,
                )
            written = np.concatenate([written, fetch(new)], axis=1)
            shown = [row[:n] for row, n in zip(written, limits, strict=True)][:count]
            yield [tokenizer.decode(until(row, tokenizer.eos_id)).strip() for row in shown]
            if np.all(fetch(state.done)):
                return

    def question_tokens(self, messages: Sequence[prompts.Message], num_images: int) -> np.ndarray:
        """[L] a conversation's tokens, which the images are not needed for.

        Raises ValueError in one sentence for what `answer` refuses.
        """
        if self.template == "chat":
            row = prompts.understanding_tokens(self.tokenizer, messages, num_images)
        else:
            row, _ = prompts.plain_tokens(self.tokenizer, messages, num_images)
        self._check(row, 1, "question and its answer")
        return row

    def _place_images(
        self, questions: Sequence[Question], rows: Sequence[np.ndarray], length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """pixels [B, I, S, S, 3] and slots [B, I, 1 + N] of `embed_understanding`."""
        size, count = self.processor.image_size, self.tokenizer.num_image_tokens + 1
        most = max(len(question.images) for question in questions)
        pixels = np.zeros((len(rows), most, size, size, 3), np.float32)
        slots = np.full((len(rows), most, count), length, np.int32)
        for b, (question, row) in enumerate(zip(questions, rows, strict=True)):
            if question.images:
                slots[b, : len(question.images)] = prompts.image_slots(row, self.tokenizer)
            for i, image in enumerate(question.images):
                pixels[b, i] = self.processor.preprocess(image)
        return pixels, slots


def until(tokens: np.ndarray, stop: int) -> np.ndarray:
    """The tokens before the first `stop`."""
    ends = np.flatnonzero(tokens == stop)
    return tokens[: ends[0]] if len(ends) else tokens
