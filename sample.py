"""Draw images from prompts, or answer questions about images.

python sample.py --ckpt DIR --prompt "a photo of a red circle" --num 4 --out samples
python sample.py --ckpt DIR --image photo.jpg --question "What is in this picture?"

Where there are several hosts, each runs the same command, and the first one writes.
"""

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from PIL import Image
from tqdm import tqdm

from jflow import checkpoints, distributed, images
from jflow.compilation import CompileStats, enable_cache, out_of_memory
from jflow.inference.pipeline import AnswerOptions, ImageOptions, Pipeline, Question
from jflow.plan import sampling
from jflow.prompts import Message, require_prompt, user_question
from jflow.samplers import SOLVERS
from jflow.sharding import MeshConfig, make_mesh
from jflow.training import runs

# The rows and columns of grid.png at most: nobody looks at a picture of thousands.
GRID_PROMPTS, GRID_IMAGES = 64, 16
QUESTION_FORM = '{"question": TEXT, "image": FILE or [FILE, ...]}'


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ckpt", required=True, help="checkpoint folder of jflow.convert or train.py")
    add("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16, float32 on a CPU")
    add("--raw", action="store_true", help="of a run: parameters as they are, not their average")
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=8)
    add(
        "--mesh",
        metavar="AXIS=SIZE,...",
        default="",
        help="how all devices share the work: data and fsdp split the batch, fsdp and tensor the "
        "parameters, as in data=2,tensor=4; data takes the rest (default: all)",
    )

    add(
        "--plan",
        metavar="TOPOLOGY",
        help="draw nothing, but say what a batch of images needs on these machines (v5e-4, 1xH100, "
        "...); --ckpt need not exist",
    )

    draw = parser.add_argument_group("images")
    add = draw.add_argument
    add("--prompt", action="append", default=[], help="may be given several times")
    add("--prompts", metavar="FILE", help="text file, one prompt a line")
    add("--num", type=int, default=4, help="images of each prompt")
    add("--steps", type=int, default=30)
    add("--guidance", type=float, default=2.0, help="1 for none")
    add(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="times in [0, 1], 0 = noise, between which guidance applies",
    )
    add("--solver", choices=list(SOLVERS), default="euler")
    add("--shift", type=float, default=1.0, help="above 1: more steps near the noise")
    add(
        "--official-rounding",
        action="store_true",
        help="round times and step to bfloat16, as the released sampler does",
    )
    add("--init-image", metavar="FILE", help="begin from this image")
    add("--strength", type=float, help="how far back to noise --init-image goes (default 0.6)")
    add("--out", default="samples", help="folder of the PNGs, or the JSONL file of --questions")

    ask = parser.add_argument_group("answers")
    add = ask.add_argument
    add("--image", action="append", default=[], metavar="FILE", help="may be given several times")
    add("--question", action="append", default=[], help="given again: the next turn")
    add(
        "--questions",
        metavar="FILE",
        help=f"JSONL of {QUESTION_FORM}",
    )
    add("--max-new-tokens", type=int, default=512)
    add("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    add("--top-p", type=float, default=1.0)
    distributed.add_arguments(parser)
    args = parser.parse_args(argv)

    drawing = bool(args.prompt or args.prompts)
    asking = bool(args.question or args.questions)
    if drawing == asking and not args.plan:
        parser.error("give --prompt/--prompts to draw, or --question/--questions to ask.")
    if args.image and not args.question:
        parser.error("--image is what a --question is about; a drawing begins from --init-image.")
    if asking and (args.init_image or args.plan):
        given = "--init-image" if args.init_image else "--plan"
        parser.error(f"{given} is for drawing; a --question is about --image.")
    if args.question and args.questions:
        parser.error("give --question or --questions, not both.")
    if args.strength is not None and not args.init_image:
        parser.error("--strength says how much of --init-image is kept: give one.")
    if args.batch_size < 1:
        parser.error("--batch-size must be at least 1.")
    if args.strength is None:
        args.strength = 0.6 if args.init_image else 1.0
    return args


def mesh_config(text: str) -> MeshConfig:
    """What --mesh describes; raises ValueError in one sentence for what is no mesh."""
    sizes = {"data": -1, "fsdp": 1, "tensor": 1}
    for part in text.split(",") if text else ():
        name, _, size = part.partition("=")
        if name not in sizes or not re.fullmatch(r"\d+", size):
            raise ValueError(
                f"--mesh gives data, fsdp and tensor their sizes, as in data=2,tensor=4; it "
                f"cannot be {text!r}."
            )
        sizes[name] = int(size)
    return MeshConfig(**sizes)


def mesh_of(text: str) -> jax.sharding.Mesh | None:
    """The mesh that --mesh describes, over all devices; None where there is but one.

    Raises ValueError in one sentence for what is no mesh of them.
    """
    mesh = make_mesh(mesh_config(text))
    return None if mesh.size == 1 else mesh


def read_lines(path: str) -> dict[int, str]:
    """The non-empty lines of a text file by their numbers; raises ValueError when there is none."""
    # Not splitlines: JSON may hold the other characters that it splits at.
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: save it as such.") from error
    found = {number: line.strip() for number, line in enumerate(lines, 1) if line.strip()}
    if not found:
        raise ValueError(f"{path} is empty.")
    return found


def say(text: str, **how: Any) -> None:
    """`print` on the first of the processes."""
    if distributed.is_first():
        print(text, **how)


def image_options(args: argparse.Namespace) -> ImageOptions:
    return ImageOptions(
        steps=args.steps,
        guidance_scale=args.guidance,
        seed=args.seed,
        solver=args.solver,
        shift=args.shift,
        guidance_interval=tuple(args.guidance_interval) if args.guidance_interval else None,
        official_rounding=args.official_rounding,
        strength=args.strength,
    )


def prepare(args: argparse.Namespace) -> Callable[[Pipeline], int]:
    """What is asked for, as a function that returns how many of it there were.

    Files are read and options checked here, before minutes go by in loading a checkpoint. Raises
    ValueError or OSError in one sentence.
    """
    out = Path(args.out)
    if args.prompt or args.prompts:
        options = image_options(args)
        options.grid()
        if args.num < 1:
            raise ValueError(f"--num must be at least 1, not {args.num}.")
        texts = args.prompt + (list(read_lines(args.prompts).values()) if args.prompts else [])
        for text in texts:
            require_prompt(text)
        init_image = images.load_image(args.init_image) if args.init_image else None
        require_writable(out)
        return partial(draw, args, options, texts, init_image)
    answering = AnswerOptions(args.max_new_tokens, args.temperature, args.top_p, args.seed)
    if args.questions:
        require_writable(out.parent if out.suffix == ".jsonl" else out)
        return partial(answer_file, args, answering, read_lines(args.questions))
    pictures = tuple(map(images.load_image, args.image))
    # Images stand in the first question.
    asked = [user_question(text, 0 if i else len(pictures)) for i, text in enumerate(args.question)]
    return partial(converse, args, answering, asked, pictures)


def require_writable(folder: Path) -> None:
    """Raises ValueError where a folder, which need not be there yet, could not be written into."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--out: {there} is no folder that can be written into, choose another.")


def draw(
    args: argparse.Namespace,
    options: ImageOptions,
    texts: list[str],
    init_image: Image.Image | None,
    pipeline: Pipeline,
) -> int:
    """Writes one PNG an image, and a grid of the first prompts' rows; returns how many images."""
    first = distributed.is_first()
    settings = {name: str(value) for name, value in vars(options).items()}
    settings |= {"dtype": pipeline.model.precision.compute.name, "raw": str(args.raw)}
    settings |= {"ckpt": args.ckpt, "software": "jflow"}
    if args.init_image:
        settings["init_image"] = args.init_image

    out, drawn, shown = Path(args.out), 0, []
    columns, total = min(args.num, GRID_IMAGES), len(texts) * args.num
    with tqdm(total=total, desc="drawing", unit="image", disable=not first) as bar:
        for batch in pipeline.generate(texts, args.num, options, args.batch_size, init_image):
            for image in batch if first else ():
                prompt, index = divmod(drawn, args.num)
                metadata = settings | {"prompt": texts[prompt], "index": str(index)}
                images.save_png(image, out / f"{prompt:04d}_{index:03d}.png", metadata)
                drawn += 1
                if prompt < GRID_PROMPTS and index < columns:
                    shown.append(image)
            bar.update(len(batch))
    if first:
        grid, prompts = images.make_grid(shown, columns), "\n".join(texts[:GRID_PROMPTS])
        images.save_png(grid, out / "grid.png", settings | {"prompts": prompts})
        some = f" ({len(shown)} of them)" if len(shown) < drawn else ""
        print(f"{drawn} images and grid.png{some} in {out}")
    return total


def converse(
    args: argparse.Namespace,
    options: AnswerOptions,
    asked: list[str],
    pictures: tuple[Image.Image, ...],
    pipeline: Pipeline,
) -> int:
    """Asks the questions, in the model's words, one after the other; returns how many."""
    messages: tuple[Message, ...] = ()
    for turn, (text, written) in enumerate(zip(asked, args.question, strict=True)):
        messages += (Message("User", text), Message("Assistant", ""))
        if len(asked) > 1:
            say(f"> {written}")
        shown = ""
        for (answer,) in pipeline.answer([Question(messages, pictures, turn)], options):
            # A character of several tokens shows as a replacement character until it is whole.
            ready = answer.rstrip("\N{REPLACEMENT CHARACTER}")
            say(ready[len(shown) :], end="", flush=True)
            shown = ready
        say(answer[len(shown) :])
        messages = messages[:-1] + (Message("Assistant", answer),)
    return len(asked)


@dataclass(frozen=True)
class Asked:
    """A line of --questions: as it is there, the question in the model's words, image files."""

    record: dict
    messages: tuple[Message, Message]
    files: tuple[Path, ...]


def read_questions(path: str, lines: dict[int, str], pipeline: Pipeline) -> Iterator[Asked]:
    """All lines of a JSONL file, by their numbers; names of image files are relative to it.

    Raises ValueError or OSError in one sentence that names the line, for whatever can be told
    without decoding images.
    """
    for number, line in lines.items():
        try:
            record = json.loads(line)
            text, files = record["question"], record.get("images", record.get("image")) or []
            files = [files] if isinstance(files, str) else files
            files = tuple(Path(path).parent / name for name in files)
            if not isinstance(text, str):
                raise TypeError(type(text))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: expected {QUESTION_FORM}.") from error
        try:
            messages = Message("User", user_question(text, len(files))), Message("Assistant", "")
            pipeline.question_tokens(messages, len(files))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"{path}, line {number}: there is no image file {file}.")
        yield Asked(record, messages, files)


def answer_file(
    args: argparse.Namespace, options: AnswerOptions, lines: dict[int, str], pipeline: Pipeline
) -> int:
    """Answers every line of --questions into a JSONL file; returns how many.

    Where it fails, the answers up to there are in the file's .tmp.
    """
    asked = list(read_questions(args.questions, lines, pipeline))
    out = Path(args.out if args.out.endswith(".jsonl") else f"{args.out}/answers.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    first = distributed.is_first()
    unfinished, written = out.with_name(out.name + ".tmp"), 0
    size = min(args.batch_size, len(asked))
    starts = range(0, len(asked), size)
    try:
        # JSON may hold halves of surrogate pairs, and escapes of them are JSON again.
        place = unfinished if first else os.devnull
        with open(place, "w", encoding="utf-8", errors="backslashreplace") as file:
            for start in tqdm(starts, desc="answering", disable=not first):
                batch = asked[start : start + size]
                questions = [
                    Question(one.messages, tuple(map(images.load_image, one.files)), start + i)
                    for i, one in enumerate(batch)
                ]
                # The last batch is filled up, so that it runs the same program.
                questions += questions[-1:] * (size - len(batch))
                *_, answers = pipeline.answer(questions, options)
                for one, answer in zip(batch, answers[: len(batch)], strict=True):
                    file.write(json.dumps(one.record | {"answer": answer}, ensure_ascii=False))
                    file.write("\n")
                written += len(batch)
    except (ValueError, OSError) as error:
        raise ValueError(f"{error} The {written} answers before it are in {unfinished}.") from error
    if first:
        os.replace(unfinished, out)
    say(f"{written} answers in {out}")
    return written


def run(args: argparse.Namespace, stats: CompileStats) -> None:
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.dtype(args.dtype or ("float32" if on_cpu else "bfloat16"))
    if dtype == jnp.float32:
        # GPUs and TPUs would otherwise multiply float32 in fewer bits.
        jax.config.update("jax_default_matmul_precision", "highest")
    began = time.perf_counter()
    work = prepare(args)
    # The step of a run that is read, and named in the pictures, is one and the same, also where a
    # host sees the latest one later than another.
    args.ckpt = str(checkpoints.agreed_on(args.ckpt))
    mesh = mesh_of(args.mesh)
    # A GPU would copy each layer's weights out of the stack, in every step.
    scan = bool(args.prompt or args.prompts) and jax.default_backend() != "gpu"
    load = runs.load_raw if args.raw else checkpoints.load_checkpoint
    pipeline = Pipeline.from_checkpoint(args.ckpt, dtype, scan_layers=scan, mesh=mesh, load=load)
    loaded, before = time.perf_counter(), replace(stats)
    count = work(pipeline)
    compiling = stats.seconds - before.seconds
    running = time.perf_counter() - loaded - compiling
    say(
        f"loading {loaded - began:.1f} s, compiling {compiling:.1f} s "
        f"({stats.compiled} programs compiled, {stats.cached} from the cache), "
        f"running {running:.1f} s: {running / count:.2f} s each",
        file=sys.stderr,
    )


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        if args.plan:
            dtype, mesh = jnp.dtype(args.dtype or "bfloat16"), mesh_config(args.mesh)
            options = image_options(args)
            fits = sampling.tell(args.ckpt, args.plan, mesh, options, args.batch_size, dtype)
            return 0 if fits else 1
        distributed.start(args.coordinator, args.processes, args.process)
        if jax.process_count() > 1:  # JAX keeps it there for programs that save before they end.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        stats = enable_cache()
        with distributed.failing_together():
            run(args, stats)
    except (ValueError, OSError) as error:
        print(f"sample.py: {error}", file=sys.stderr)
        return 2
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(
            "sample.py: out of memory; lower --batch-size, or use --dtype bfloat16.",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
