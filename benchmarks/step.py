"""What a training step costs: milliseconds, FLOP/s as a share of the matmul peak, and memory.

    PYTHONPATH=. python benchmarks/step.py                   # CPU, small but wide, float32
    PYTHONPATH=. python benchmarks/step.py --size full       # 1.3B in bfloat16, on a GPU

The step is train.py's own of configs/pretrain.py, on random weights and one batch that lies on the
device already: the data pipeline is not in it. Steps are queued behind each other, as train.py's
loop does. Operations are those of training/flops.py, which counts neither padding nor what remat
computes again. All settings are compiled at the same time, then run one after another; those that
certainly do not fit are not compiled.
"""

import argparse
import resource
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from report import origin, step_table, write_json
from workload import random_params

from jflow.batch import Batch, ImageRows, TextRows
from jflow.compilation import out_of_memory
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


class Setting(NamedTuple):
    """rows: of a batch; needs: bytes that an H200 needed for it (2026-11-27), 0 where unknown."""

    task: str
    rows: int
    remat: str
    needs: float = 0


@dataclass(frozen=True)
class Size:
    """A model and what is measured of it.

    packed: samples in a row; length: positions of a row. matmul: of the square product that gives
    the peak.
    """

    model: JanusFlowConfig
    dtype: str
    packed: int
    length: int
    settings: tuple[Setting, ...]
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
        "float32", 1, 648,
        (Setting(DRAW_FEATURES, 1, "none"), Setting(UNDERSTAND, 1, "full")), 256, 1,
    ),
    # The released proportions at 3/8 of the width: the matrix products have to dominate.
    "small": Size(
        janusflow(LlamaConfig(8192, 768, 2112, 4, 6), SiglipConfig(384, 16, 384, 4, 6), 288),
        "float32", 1, SAMPLE,
        (Setting(DRAW_FEATURES, 4, "none"), Setting(UNDERSTAND, 4, "none")), 2048, 2,
    ),
    "full": Size(
        janusflow(LlamaConfig(102400, 2048, 5632, 24, 16, 16), SiglipConfig(), 768),
        "bfloat16", 6, 4096,
        (
            Setting(DRAW_CACHED, 4, "dots"), Setting(DRAW_CACHED, 8, "dots", 82.3e9),
            Setting(DRAW_CACHED, 12, "dots", 106.5e9), Setting(DRAW_CACHED, 4, "none", 99.4e9),
            Setting(DRAW_CACHED, 16, "full", 63.8e9), Setting(DRAW, 8, "dots", 82.6e9),
            Setting(UNDERSTAND, 4, "dots"), Setting(UNDERSTAND, 8, "dots", 78.8e9),
        ),
        8192,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One setting. seconds: the median step, None where it does not fit; flops: of one step.

    state_bytes: of parameters, moments and average; needed_bytes: those, the batch and what the
    compiler wants beside them; seen_bytes: the most that this process has used so far. Where
    nothing was compiled, needed_bytes are those of Setting and the other numbers None.
    """

    task: str
    rows: int
    samples: int
    remat: str
    seconds: float | None
    flops: float | None
    state_bytes: int | None
    needed_bytes: int
    seen_bytes: int | None


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


def may_fit(setting: Setting, limit: float) -> bool:
    """Is it worth compiling? A compiler that finds less room than an H200's saves some of it."""
    return setting.needs < 1.2 * limit


def memory_seen() -> int:
    """The most bytes that were in use: on the device, or on a CPU in the whole process."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


@dataclass(frozen=True)
class Program:
    """A setting's compiled step and all that it needs. begin: makes the first state; kind: what
    states are alike by. flops, needed: of one step, operations and bytes."""

    setting: Setting
    step: Callable
    begin: Callable[[], TrainState]
    like: TrainState
    batch: Batch
    flops: float
    needed: int

    @property
    def kind(self) -> str:
        return str(jax.tree.structure(self.like))


def prepare(size: Size, setting: Setting) -> Program | None:
    """Compiles; None where the compiler finds no room."""
    task = setting.task
    config = load(
        PRETRAIN,
        [
            f"dtype={size.dtype}",
            f"remat={setting.remat}",
            f"objective.repa_layer={size.repa_layer}",
        ],
    )
    dtype = jnp.dtype(size.dtype)
    precision = Precision(compute=dtype)
    segments = config.data.segments
    modules = Modules(
        model=JanusFlow(size.model, precision, remat=setting.remat, segments=segments),
        vae=AutoencoderKL(VAEConfig(), dtype=dtype),
        repa=RepaHead(size.model.siglip.width, config.repa_hidden_size, precision),
    )
    shapes = {"janusflow": abstract_params(size.model)}
    if task != UNDERSTAND and "vae" not in CACHED[task]:
        pixels, key = jnp.zeros((1, 32, 32, 3)), jax.random.key(0)
        shapes["vae"] = jax.eval_shape(modules.vae.init, key, pixels)["params"]
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    make = partial(first_state, modules=modules, config=config)
    like = abstract(jax.eval_shape(make, shapes), mesh)
    cost = flops.stage_cost(config, modules, like.params, CACHED[task])
    batch = make_batch(size, task, setting.rows)
    with jax.set_mesh(mesh):
        placed = place_batch(batch, mesh)
        try:
            step = make_step(modules, config, like, mesh).lower(like, placed).compile()
        except jax.errors.JaxRuntimeError as error:
            if not out_of_memory(error):
                raise
            print(f"{setting}: out of memory", flush=True)
            return None
    memory = step.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Program(
        setting=setting,
        step=step,
        begin=lambda: jax.device_put(
            make(random_params(shapes)), jax.tree.map(lambda a: a.sharding, like)
        ),
        like=like,
        batch=batch,
        flops=cost.of(flops.count_work(batch)),
        needed=needed,
    )


def run(program: Program, state: TrainState, rounds: int, clock: Clock) -> tuple[float, TrainState]:
    """Seconds of a step, the median of three queues of `rounds`, and the state behind them."""
    mesh, seconds = make_mesh(MeshConfig(), jax.devices()[:1]), []
    with jax.set_mesh(mesh):
        placed = place_batch(program.batch, mesh)
        state, sums = jax.block_until_ready(program.step(state, placed))
        for _ in range(3):
            began = clock()
            for _ in range(rounds):
                state, sums = program.step(state, placed)
            jax.block_until_ready(sums)
            seconds.append((clock() - began) / rounds)
    if sums["skipped"][0] or not np.isfinite(sums["loss"][0]):
        raise SystemExit(f"{program.setting}: a step was skipped, its loss {sums['loss'][0]}.")
    return float(np.median(seconds)), state


def row_left_out(setting: Setting, packed: int) -> Row:
    task, rows, remat, needs = setting
    return Row(task, rows, rows * packed, remat, None, None, None, int(needs), None)


def row_of(program: Program, seconds: float | None, packed: int) -> Row:
    leaves = jax.tree.leaves(program.like)
    task, rows, remat, _ = program.setting
    return Row(
        task=task,
        rows=rows,
        samples=rows * packed,
        remat=remat,
        seconds=seconds,
        flops=program.flops,
        state_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
        needed_bytes=program.needed,
        seen_bytes=memory_seen(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--size", choices=list(SIZES), default="small")
    add("--only", metavar="TASK", help="of the size's settings those whose task begins so")
    add("--rounds", type=int, default=4, help="steps in a queue; three queues are timed")
    add("--clock", choices=list(CLOCKS), default="wall", help="cpu: see CLOCKS")
    add("--json", type=Path, metavar="FILE", help="where to write the figures")
    args = parser.parse_args()
    size = SIZES[args.size]
    settings = tuple(each for each in size.settings if each.task.startswith(args.only or ""))
    left_out = [each for each in settings if not may_fit(each, memory_limit())]
    settings = [each for each in settings if each not in left_out]
    device = jax.devices()[0]
    kind = "gpu" if device.platform == "gpu" else "cpu"
    figures = origin(kind, "jax", "jaxlib", "flax")
    figures |= {"size": args.size, "dtype": size.dtype, "clock": args.clock}
    clock = CLOCKS[args.clock]
    began = time.perf_counter()
    # On a CPU a compiler has all cores already.
    with ThreadPoolExecutor(max(1, len(settings)) if kind == "gpu" else 1) as pool:
        programs = [each for each in pool.map(partial(prepare, size), settings) if each]
    if not programs:
        parser.error("no setting of this size and task compiles here")
    print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)
    rates, state, last = [], None, None
    rows = [asdict(row_left_out(each, size.packed)) for each in left_out]
    for program in programs:
        rates.append(matmul_rate(size.matmul, size.dtype, clock))
        seconds = None
        if program.needed < memory_limit():
            if program.kind != last:
                del state  # Two may be too many for the device.
                state, last = jax.block_until_ready(program.begin()), program.kind
            seconds, state = run(program, state, args.rounds, clock)
        rows.append(asdict(row_of(program, seconds, size.packed)))
        # On a CPU nobody knows the peak but the products themselves.
        peak = max(rates) if kind == "cpu" else flops.peak_flops(device, size.dtype)
        figures |= {"matmul_flops": max(rates), "peak": peak, "rows": rows}
        print(step_table(figures | {"rows": rows[-1:]}).splitlines()[-1], flush=True)
        if args.json:
            write_json(args.json, figures)
    print(f"\nof peak: of {peak / 1e12:.3g} TFLOP/s; products reached {max(rates) / 1e12:.3g}\n")
    print(step_table(figures))


if __name__ == "__main__":
    main()
