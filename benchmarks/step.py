"""What a training step costs: milliseconds, FLOP/s as a share of the matmul peak, and memory.

    PYTHONPATH=. python benchmarks/step.py                   # CPU, small but wide, float32
    PYTHONPATH=. python benchmarks/step.py --size full       # 1.3B in bfloat16, on a GPU

The step is train.py's own of configs/pretrain.py, on random weights and one batch that lies on the
device already: the data pipeline is not in it. Operations are those of training/flops.py, which
counts neither padding nor what remat computes again. The first task is measured at every batch and
remat policy that fits, the others at the best of these.
"""

import argparse
import itertools
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from report import origin, step_table, write_json

from jflow.batch import Batch, ImageRows, TextRows
from jflow.config import load
from jflow.models.janusflow import JanusFlow, JanusFlowConfig, abstract_params
from jflow.models.layers import Precision
from jflow.models.llama import LlamaConfig
from jflow.models.repa import RepaHead
from jflow.models.siglip import SiglipConfig
from jflow.models.uvit import GenDecoderConfig, GenEncoderConfig
from jflow.models.vae import AutoencoderKL, VAEConfig
from jflow.sharding import MeshConfig, abstract, make_mesh, place_batch
from jflow.training import flops
from jflow.training.objectives import Modules
from jflow.training.state import TrainState
from train import first_state, make_step

PRETRAIN = Path(__file__).resolve().parent.parent / "configs" / "pretrain.py"
# Positions of one sample, as the floors of design.md have it: image, time token or tag, and text.
SAMPLE = 643
# Tasks, and what of a sample to draw is encoded beforehand; None: a sample to understand.
DRAW, DRAW_CACHED = "generation", "generation, latents cached"
DRAW_FEATURES, UNDERSTAND = "generation, latents and features cached", "understanding"
CACHED = {DRAW: set(), DRAW_CACHED: {"vae"}, DRAW_FEATURES: {"vae", "siglip"}, UNDERSTAND: set()}

# What seconds are: of the clock, or of the processor in all threads of this process. The second
# gives the rates of one core, and means the same on a machine that others use too.
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Size:
    """A model and what is measured of it.

    packed: samples in a row; length: positions of a row; rows, remats: what is tried; tasks: the
    first one is tried with all of these. matmul: of the square product that gives the peak.
    """

    model: JanusFlowConfig
    dtype: str
    packed: int
    length: int
    rows: tuple[int, ...]
    remats: tuple[str, ...]
    tasks: tuple[str, ...]
    matmul: int
    repa_layer: int = 6


def janusflow(language: LlamaConfig, siglip: SiglipConfig, channels: int) -> JanusFlowConfig:
    hidden = language.hidden_size
    return JanusFlowConfig(
        language=language,
        siglip=siglip,
        gen_encoder=GenEncoderConfig(
            input_channels=4, kernel_size=2, stride=2, padding=0,
            block_out_channels=(channels,), hidden_size=hidden,
        ),
        gen_decoder=GenDecoderConfig(
            in_channels=channels, out_channels=4, block_out_channels=(channels,), upsamples=1,
            hidden_size=hidden,
        ),
    )  # fmt: skip


SIZES = {
    "tiny": Size(
        janusflow(LlamaConfig(64, 32, 48, 2, 2), SiglipConfig(384, 16, 16, 1, 2), 16),
        "float32", 1, 648, (1,), ("none", "full"), (DRAW_FEATURES, UNDERSTAND), 256, 1,
    ),
    # The released proportions at 3/8 of the width: the matrix products have to dominate.
    "small": Size(
        janusflow(LlamaConfig(8192, 768, 2112, 4, 6), SiglipConfig(384, 16, 384, 4, 6), 288),
        "float32", 1, SAMPLE, (4,), ("none",), (DRAW_FEATURES, UNDERSTAND), 2048, 2,
    ),
    "full": Size(
        janusflow(LlamaConfig(102400, 2048, 5632, 24, 16, 16), SiglipConfig(), 768),
        "bfloat16", 6, 4096, (4, 16), ("dots", "none", "full"), (DRAW_CACHED, DRAW, UNDERSTAND),
        8192,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One setting. seconds: the median step, None where it does not fit; flops: of one step.

    state_bytes: of parameters, moments and average; needed_bytes: those, the batch and what the
    compiler wants beside them; seen_bytes: the most that this process has used so far.
    """

    task: str
    rows: int
    samples: int
    remat: str
    seconds: float | None
    flops: float
    state_bytes: int
    needed_bytes: int
    seen_bytes: int


def packing(size: Size, rows: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Random tokens, positions and segments [rows, length] of packed samples; where these begin
    [rows, packed]; and the place of each position in its sample, -1 for padding, [length]."""
    rng, index = np.random.default_rng(0), np.arange(size.length)
    inside = index < size.packed * SAMPLE
    place = np.where(inside, index % SAMPLE, -1)
    arrays = {
        "tokens": rng.integers(1, size.model.language.vocab_size, (rows, size.length)),
        "positions": np.tile(np.maximum(place, 0), (rows, 1)),
        "segment_ids": np.tile(np.where(inside, index // SAMPLE + 1, 0), (rows, 1)),
    }
    starts = np.tile(SAMPLE * np.arange(size.packed), (rows, 1))
    return {name: a.astype(np.int32) for name, a in arrays.items()}, starts, place


def make_batch(size: Size, task: str, rows: int) -> Batch:
    """`packed` samples a row: an image of the model's size, and text up to SAMPLE positions."""
    siglip, rng = size.model.siglip, np.random.default_rng(1)
    arrays, starts, place = packing(size, rows)
    shape = (rows, size.packed, siglip.image_size, siglip.image_size, 3)
    pixels = rng.uniform(-1, 1, shape).astype(np.float32)
    if task == UNDERSTAND:
        first = 1 + siglip.num_tokens
        answer = (place >= first) & (place < SAMPLE - 1)
        targets = np.where(answer, np.roll(arrays["tokens"], -1, axis=1), -1).astype(np.int32)
        slots = starts[..., None] + np.arange(first)
        return Batch(TextRows(**arrays, targets=targets, pixels=pixels, slots=slots), None)
    side = siglip.image_size // VAEConfig().downscale
    tokens = 1 + size.model.gen_encoder.tokens_along(side) ** 2
    moments = features = None
    if "vae" in CACHED[task]:
        moments = rng.standard_normal((rows, size.packed, 2, side, side, 4), np.float32)
    if "siglip" in CACHED[task]:
        features = rng.standard_normal((*shape[:2], siglip.num_tokens, siglip.width), np.float32)
    images = ImageRows(
        **arrays,
        pixels=None if moments is not None and features is not None else pixels,
        slots=starts[..., None] + SAMPLE - tokens + np.arange(tokens),
        sample_ids=np.arange(rows * size.packed, dtype=np.int32).reshape(rows, -1),
        moments=moments,
        features=features,
    )
    return Batch(None, images)


def random_params(shapes: dict) -> dict:
    """Made leaf by leaf: compiling the model's own initialisation would take longer than a step."""
    numbers = itertools.count()

    def draw(path, leaf):
        if path[-1].key == "scale":
            return jnp.ones(leaf.shape)
        key = jax.random.fold_in(jax.random.key(0), next(numbers))
        return 0.02 * jax.random.normal(key, leaf.shape)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def matmul_rate(side: int, dtype: str, clock: Clock, repeats: int = 3) -> float:
    """FLOP/s of square products in a row."""
    a = jnp.full((side, side), 1 / side, dtype)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, a))
    began = clock()
    for _ in range(repeats):
        result = product(a, a)
    jax.block_until_ready(result)
    return 2 * side**3 * repeats / (clock() - began)


def memory_limit() -> float:
    """Bytes that the device has for us; no end where it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit", float("inf"))


def memory_seen() -> int:
    """The most bytes that were in use: on the device, or on a CPU in the whole process."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def measure(
    size: Size, task: str, rows: int, remat: str, rounds: int, clock: Clock
) -> tuple[Row, list[float]]:
    """One setting, and the rates of the products between its steps."""
    overrides = [f"dtype={size.dtype}", f"remat={remat}", f"objective.repa_layer={size.repa_layer}"]
    config = load(PRETRAIN, overrides)
    dtype = jnp.dtype(size.dtype)
    precision = Precision(compute=dtype)
    modules = Modules(
        model=JanusFlow(size.model, precision, remat=remat, segments=config.data.segments),
        vae=AutoencoderKL(VAEConfig(), dtype=dtype),
        repa=RepaHead(size.model.siglip.width, config.repa_hidden_size, precision),
    )
    shapes = {"janusflow": abstract_params(size.model)}
    if task != UNDERSTAND and "vae" not in CACHED[task]:
        pixels, key = jnp.zeros((1, 32, 32, 3)), jax.random.key(0)
        shapes["vae"] = jax.eval_shape(modules.vae.init, key, pixels)["params"]

    def begin() -> TrainState:
        return first_state(random_params(shapes), modules, config)

    batch = make_batch(size, task, rows)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    like = abstract(jax.eval_shape(begin), mesh)
    cost = flops.step_cost(
        size.model,
        modules.vae.config,
        config.repa_hidden_size,
        trained={name for path in like.params for name in path.split("/")[:2]},
        cached=CACHED[task],
    )
    work = flops.count_work(batch)
    with jax.set_mesh(mesh):
        placed = place_batch(batch, mesh)
        step = make_step(modules, config, like, mesh).lower(like, placed).compile()
        memory = step.memory_analysis()
        needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
        seconds, rates = [], []
        if needed < memory_limit():
            now = jax.device_put(begin(), jax.tree.map(lambda a: a.sharding, like))
            for _ in range(rounds + 1):
                rates.append(matmul_rate(size.matmul, size.dtype, clock))
                began = clock()
                now, sums = jax.block_until_ready(step(now, placed))
                seconds.append(clock() - began)
            if sums["skipped"][0] or not np.isfinite(sums["loss"][0]):
                raise SystemExit(f"{task}: a step was skipped, its loss {sums['loss'][0]}.")
    row = Row(
        task=task,
        rows=rows,
        samples=rows * size.packed,
        remat=remat,
        seconds=float(np.median(seconds[1:])) if seconds else None,
        flops=cost.of(work),
        state_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like)),
        needed_bytes=needed,
        seen_bytes=memory_seen(),
    )
    return row, rates


def attempt(size: Size, *setting) -> tuple[Row | None, list[float]]:
    """`measure`; None where the compiler or the device itself ran out of memory."""
    try:
        return measure(size, *setting)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"{setting[:3]}: out of memory", flush=True)
        return None, []


def sweep(size: Size, how: tuple[int, Clock], seconds: float) -> Iterator[tuple[Row, list[float]]]:
    """The first task at all settings, for half of the seconds, then the others at the fastest.

    A setting that has begun is ended. how: rounds and clock of `measure`.
    """
    first, *others = size.tasks
    began, fitting = time.monotonic(), []
    for remat, rows in itertools.product(size.remats, size.rows):
        if time.monotonic() < began + seconds / 2:
            row, rates = attempt(size, first, rows, remat, *how)
            if row is not None:
                yield row, rates
                fitting += [row] if row.seconds else []
    for task in others if fitting else ():
        best = max(fitting, key=lambda row: row.samples / row.seconds)
        if time.monotonic() < began + seconds:
            row, rates = attempt(size, task, best.rows, best.remat, *how)
            if row is not None:
                yield row, rates


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--size", choices=list(SIZES), default="small")
    add("--rows", type=int, nargs="+", help="of a batch")
    add("--packed", type=int, help="samples in a row, instead of the size's own")
    add("--remat", nargs="+", choices=["none", "dots", "full"])
    add("--rounds", type=int, default=5, help="steps that are timed, after a first one")
    add("--clock", choices=list(CLOCKS), default="wall", help="cpu: see CLOCKS")
    add("--seconds", type=float, default=3600.0, help="no setting begins later")
    add("--json", type=Path, metavar="FILE", help="where to write the figures")
    args = parser.parse_args()
    size = SIZES[args.size]
    size = replace(
        size, rows=tuple(args.rows or size.rows), remats=tuple(args.remat or size.remats)
    )
    if args.packed:
        # Attention looks at whole rows, so how many samples share one has its price.
        size = replace(size, packed=args.packed, length=-(-args.packed * SAMPLE // 64) * 64)
    device = jax.devices()[0]
    kind = "gpu" if device.platform == "gpu" else "cpu"
    figures = origin(kind, "jax", "jaxlib", "flax")
    figures |= {"size": args.size, "dtype": size.dtype, "clock": args.clock}
    rates, rows = [], []
    how = (args.rounds, CLOCKS[args.clock])
    for row, more in sweep(size, how, args.seconds):
        rates += more
        rows.append(asdict(row))
        # On a CPU nobody knows the peak but the products themselves.
        measured = max(rates) if rates else float("nan")
        peak = measured if kind == "cpu" else flops.peak_flops(device, size.dtype)
        figures |= {"matmul_flops": measured, "peak": peak, "rows": rows}
        print(step_table(figures | {"rows": rows[-1:]}).splitlines()[-1], flush=True)
        if args.json:
            write_json(args.json, figures)
    print(f"\nof peak: of {peak / 1e12:.3g} TFLOP/s; products reached {measured / 1e12:.3g}\n")
    print(step_table(figures))


if __name__ == "__main__":
    main()
