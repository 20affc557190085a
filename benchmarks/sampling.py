"""Drawing and answering, ours against PyTorch: seconds an Euler step, tokens a second.

    python benchmarks/sampling.py                          # CPU, 2 of the 24 layers, 3 minutes
    python benchmarks/sampling.py --device gpu --vae       # full size in bfloat16

Both sides read the same weights and inputs and must agree before anything is timed. Each lives in a
process of its own (in one process PyTorch was 5 times slower), and they are asked in turn, so that
a drift of the machine meets both; ratios are taken round by round. design.md section 3 has the
floors.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from report import origin, write_json
from tqdm import tqdm
from workload import (
    Workload,
    answer_flops,
    image_flops,
    released_config,
    weight_bytes,
)

PRESETS = {
    "cpu": {"layers": 2, "vocab_size": 4096, "batch": [1], "steps": 2, "rounds": 7},
    "gpu": {"layers": 24, "vocab_size": 102400, "batch": [1, 8], "steps": 30, "rounds": 5},
}
# Largest difference allowed before timing, relative to the root mean square: float32 differs by the
# order of its sums; bfloat16 by the rounding of every layer, which guidance amplifies.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5}
TOKEN = "Token"  # The table of answering begins so.


def serve_ours(connection, workload: Workload) -> None:
    from ours import jobs

    serve(connection, jobs(workload))


def serve_torch(connection, workload: Workload, device: str) -> None:
    from torch_reference import jobs

    serve(connection, jobs(workload, device))


def serve(connection, jobs: dict[str, Callable]) -> None:
    """Runs (name, arguments) after (name, arguments) until None comes."""
    connection.send("ready")
    while (request := connection.recv()) is not None:
        name, arguments = request
        connection.send(jobs[name](*arguments))


class Worker:
    """A process that holds one side's model and answers one request at a time."""

    def __init__(self, target: Callable, *arguments):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()  # so that a process that died ends our waiting

    def wait(self) -> None:
        """Until the model is there: called once, before the first job."""
        self.connection.recv()

    def __call__(self, name: str, *arguments) -> tuple:
        """(seconds, arrays...) of a job."""
        self.connection.send((name, arguments))
        return self.connection.recv()

    def stop(self) -> None:
        self.connection.send(None)
        self.process.join()


@dataclass(frozen=True)
class Contender:
    """One row of a table. flops: operations of one run; units: steps or tokens in it."""

    name: str
    worker: Worker
    job: tuple
    flops: float
    units: int


@dataclass(frozen=True)
class Row:
    """Of the unit's median seconds; ratio: how many times as long as ours, median of rounds."""

    name: str
    seconds: float
    ratio: float
    ratios: list[float]
    gflops: float
    peak_share: float


def agree(title: str, contenders: list[Contender], dtype: str) -> float:
    """Runs every contender once, which also warms it up; the largest difference from ours.

    Numbers are compared relative to their root mean square. Tokens must be equal in float32; in
    bfloat16 rounding decides between close ones. Ends the run where they disagree.
    """
    results = [contender.worker(*contender.job)[1:] for contender in contenders]
    largest = 0.0
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            if np.issubdtype(theirs.dtype, np.integer):
                if dtype == "float32" and not np.array_equal(ours, theirs):
                    raise SystemExit(f"{title}: ours wrote {ours}, PyTorch {theirs}.")
                continue
            error = np.max(np.abs(ours - theirs)) / np.sqrt(np.mean(np.square(theirs)))
            if not error <= TOLERANCE[dtype]:
                raise SystemExit(f"{title}: ours and PyTorch's differ by {error:.1e} of the size.")
            largest = max(largest, float(error))
    print(f"{title}: equal up to {largest:.1e} of the size", flush=True)
    return largest


def time_in_turn(
    title: str, contenders: list[Contender], products: list[Contender], rounds: int
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of a unit, A B C A B C, and of the products before each round: [rounds, each]."""
    seconds, of_products = [], []
    with tqdm(total=rounds * (len(contenders) + len(products)), desc=title) as bar:
        for _ in range(rounds):
            for turn, found in ((products, of_products), (contenders, seconds)):
                row = []
                for contender in turn:
                    row.append(contender.worker(*contender.job)[0] / contender.units)
                    bar.update()
                found.append(row)
    return np.array(seconds), np.array(of_products)


def rows_of(contenders: list[Contender], seconds: np.ndarray, peak: float) -> list[Row]:
    """The table of one kind of work; contenders[0] is ours, peak in FLOP/s."""
    rows = []
    for i, contender in enumerate(contenders):
        median = float(np.median(seconds[:, i]))
        ratios = seconds[:, i] / seconds[:, 0]
        rate = contender.flops / contender.units / median
        rows.append(
            Row(
                contender.name, median, float(np.median(ratios)), ratios.tolist(),
                rate / 1e9, rate / peak,
            )
        )  # fmt: skip
    return rows


def print_rows(title: str, rows: list[Row]) -> None:
    print(f"\n{title}\n{'':28}{'ms':>10}{'/ ours':>9}{'range':>14}{'GFLOP/s':>12}{'of peak':>9}")
    for row in rows:
        spread = f"{min(row.ratios):.2f} to {max(row.ratios):.2f}"
        print(
            f"  {row.name:26}{1000 * row.seconds:>10.2f}{row.ratio:>9.2f}{spread:>14}"
            f"{row.gflops:>12,.0f}{row.peak_share:>9.1%}"
        )


def works_of(
    args: argparse.Namespace, workload: Workload, ours: Worker, torch: Worker
) -> dict[str, list[Contender]]:
    """What is timed, by the title of its table; ours comes first."""
    cached, as_released = (
        image_flops(workload.config, workload.prompt_tokens, workload.steps, released)
        for released in (False, True)
    )
    answer = answer_flops(workload.config, workload.prefix_tokens, workload.new_tokens)
    steps, tokens = workload.steps, workload.new_tokens
    works = {
        f"Euler step with guidance, batch {n}": [
            Contender("ours", ours, ("sample", n), n * cached, steps),
            Contender("PyTorch, prompt cached", torch, ("sample cached", n), n * cached, steps),
            Contender(
                "PyTorch, as released", torch, ("sample as released", n), n * as_released, steps
            ),
        ]
        for n in args.batch
    }
    works[f"{TOKEN} behind {workload.prefix_tokens}, batch 1"] = [
        Contender("ours", ours, ("answer",), answer, tokens),
        Contender("PyTorch, StaticCache", torch, ("answer static",), answer, tokens),
        Contender("PyTorch, DynamicCache", torch, ("answer dynamic",), answer, tokens),
    ]
    return works


def products_of(
    args: argparse.Namespace, workload: Workload, ours: Worker, torch: Worker
) -> list[Contender]:
    """The square products that stand for the machine's peak, of both frameworks."""
    repeats, flops = 20 if args.device == "gpu" else 3, 2.0 * workload.matmul_size**3
    return [
        Contender("JAX", ours, ("matmul", repeats), flops, 1),
        Contender("PyTorch", torch, ("matmul", repeats), flops, 1),
    ]


def image_latency(
    ours: Worker, batch: int, step_seconds: float, steps: int, rounds: int
) -> dict[str, float]:
    """Our seconds an image from prompt to pixels, and the VAE's among them."""
    ours("vae", batch)
    vae = float(np.median([ours("vae", batch)[0] for _ in range(rounds)]))
    image = (step_seconds * steps + vae) / batch
    print(
        f"ours, batch {batch}: {1000 * image:.0f} ms an image of {steps} steps, "
        f"{1000 * vae / batch:.0f} of them the VAE's"
    )
    return {"image": image, "vae": vae / batch}


def run(args: argparse.Namespace, workload: Workload) -> None:
    """Compares, times and prints, and writes the figures each time there are more."""
    from ours import write_weights

    write_weights(workload)
    platform_name = "cuda" if args.device == "gpu" else "cpu"
    os.environ["JAX_PLATFORMS"] = platform_name
    began = time.perf_counter()
    ours = Worker(serve_ours, workload)
    torch = Worker(serve_torch, workload, platform_name)
    ours.wait()
    torch.wait()
    print(f"both have loaded after {time.perf_counter() - began:.0f} s", flush=True)
    works = works_of(args, workload, ours, torch)
    products = products_of(args, workload, ours, torch)
    versions = ("jax", "jaxlib", "flax", "torch", "transformers")
    sizes = ("device", "dtype", "layers", "vocab_size", "batch", "steps", "rounds")
    errors, latency = {}, {}
    figures = origin(args.device, *versions) | {
        "workload": {name: getattr(args, name) for name in sizes},
        "largest_relative_difference": errors,
        "image_latency_s": latency,
    }

    def write():
        if args.json:
            write_json(args.json, figures)

    times, of_products = {}, []
    for title, contenders in works.items():
        errors[title] = agree(title, contenders, args.dtype)
        times[title], more = time_in_turn(title, contenders, products, args.rounds)
        of_products.extend(more)
        # The fastest so far, also for the tables before.
        peaks = products[0].flops / np.min(of_products, axis=0)
        tables = {t: rows_of(works[t], seconds, float(peaks.max())) for t, seconds in times.items()}
        print_rows(title, tables[title])
        figures["matmul_gflops"] = {"jax": peaks[0] / 1e9, "torch": peaks[1] / 1e9}
        figures["tables"] = {t: [asdict(row) for row in rows] for t, rows in tables.items()}
        if title.startswith(TOKEN):
            token = tables[title][0].seconds
            bandwidth = weight_bytes(workload.config, args.dtype) / token / 1e9
            print(f"  ours: {1 / token:.1f} tokens/s, reading weights at {bandwidth:,.1f} GB/s")
            figures["decode_weights_gb_per_s"] = bandwidth
        write()
    print(
        f"\nmatmul peak ({workload.matmul_size} squared, {args.dtype}): JAX {peaks[0] / 1e9:,.0f}, "
        f"PyTorch {peaks[1] / 1e9:,.0f} GFLOP/s; 'of peak' is of the fastest until then"
    )
    for n, rows in zip(args.batch if args.vae else [], tables.values(), strict=False):
        latency[n] = image_latency(ours, n, rows[0].seconds, args.steps, args.rounds)
        write()
    ours.stop()
    torch.stop()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=list(PRESETS), default="cpu")
    parser.add_argument("--dtype", choices=list(TOLERANCE), help="float32 on a CPU, else bfloat16")
    parser.add_argument("--layers", type=int, help="of the language model: 2 on a CPU, else 24")
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--batch", type=int, nargs="+", help="images at a time")
    parser.add_argument("--steps", type=int, help="Euler steps an image")
    parser.add_argument("--rounds", type=int, help="how often each is timed")
    parser.add_argument("--vae", action="store_true", help="also our whole images, pixels included")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    args = parser.parse_args()
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    for name, value in PRESETS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main() -> None:
    args = parse()
    # This process only makes the weights; on a GPU its memory belongs to the two workers.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        workload = Workload(
            weights=Path(folder) / "weights",
            config=released_config(args.layers, args.vocab_size),
            dtype=args.dtype,
            steps=args.steps,
            prompt_tokens=24,
            prefix_tokens=600,
            new_tokens=32,
            matmul_size=2048 if args.device == "cpu" else 8192,
        )
        run(args, workload)


if __name__ == "__main__":
    main()
