"""Train one stage of JanusFlow; the same command again continues where it stopped.

python train.py --config configs/pretrain.py [--run runs/NAME] [field=value ...]

Exit status: 0 after the last step, 75 when it was told to stop before (SIGTERM), 2 for an error.
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from jflow import checkpoints, distributed, sharding
from jflow.batch import Batch
from jflow.compilation import enable_cache, out_of_memory
from jflow.config import load, to_dict
from jflow.data.cache import ImageCache
from jflow.data.encode import open_cache
from jflow.data.pipeline import checkpoint_loader
from jflow.images import ImageProcessor
from jflow.inference.parts import check_parts, latent_shape, read_processors
from jflow.models import repa
from jflow.models.attention import Implementation
from jflow.models.janusflow import JanusFlow, JanusFlowConfig
from jflow.models.layers import Precision
from jflow.models.vae import AutoencoderKL, VAEConfig
from jflow.plan import report
from jflow.prompts import Tokenizer, image_tokens, trained_template
from jflow.sharding import abstract, check_heads, make_mesh, place_batch, shardings
from jflow.training import flops, lora, runs, state
from jflow.training.config import TrainConfig
from jflow.training.metrics import Meter
from jflow.training.monitor import Log, NoLog, Trace
from jflow.training.objectives import Modules, Sums, janusflow
from jflow.training.optimizer import adamw
from jflow.training.samples import Sampler
from jflow.training.step import train_step

# The exit status of a run that was told to stop and has saved: EX_TEMPFAIL, try again.
STOPPED = 75


def build(models: dict, config: TrainConfig, attention: Implementation = "auto") -> Modules:
    """The networks that a checkpoint's config describes, in the run's precision."""
    dtype = jnp.dtype(config.dtype)
    precision = Precision(compute=dtype)
    model = JanusFlowConfig.from_hf(models["janusflow"], models.get("siglip"))
    vae = models.get("vae")
    return Modules(
        model=JanusFlow(
            model,
            precision,
            remat=config.remat,
            attention=attention,
            segments=config.data.segments,
            unroll=config.unroll,
        ),
        vae=AutoencoderKL(VAEConfig.from_hf(vae), dtype=dtype) if vae else None,
        repa=repa.RepaHead(model.siglip.width, config.repa_hidden_size, precision)
        if config.objective.repa_weight
        else None,
        lora=config.lora,
    )


def repa_head(params: dict, modules: Modules, config: TrainConfig) -> dict:
    """{"repa": the checkpoint's head, a new one where it has none}; {} without REPA.

    Raises ValueError in one sentence for a head of another width than the config's.
    """
    if modules.repa is None:
        return {}
    if "repa" not in params:
        width = modules.model.config.language.hidden_size
        return {"repa": repa.init_params(modules.repa, width, jax.random.key(config.seed))}
    there, wanted = params["repa"]["linear_1"]["kernel"].shape[-1], modules.repa.hidden_size
    if there != wanted:
        raise ValueError(
            f"The REPA head in {config.init_from} has hidden size {there}: set repa_hidden_size to "
            f"it, not {wanted}."
        )
    return {"repa": params["repa"]}


def first_state(params: dict, modules: Modules, config: TrainConfig) -> state.TrainState:
    """The state before the first step; errors of `repa_head`."""
    kept = {name: tree for name, tree in params.items() if name != "repa"}
    params = kept | repa_head(params, modules, config)
    params = lora.init(params, config.lora, config.trainable, config.seed)
    return state.init(params, config.trainable, adamw(config.optimizer))


def first_params(source: Path, mesh: Mesh) -> dict:
    """The parameters that the stage begins from; each device reads its own part alone."""
    return checkpoints.load_checkpoint(source, sharding=partial(shardings, mesh=mesh))[0]


def begin(
    source: Path, modules: Modules, config: TrainConfig, like: state.TrainState, mesh: Mesh
) -> state.TrainState:
    """`first_state` from the checkpoint on disk; each device makes its own part alone.

    Args: source: its folder; like: the abstract state, which knows where it lies.
    """
    make = jax.jit(
        partial(first_state, modules=modules, config=config),
        donate_argnums=0,
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, like),
    )
    with warnings.catch_warnings():
        # What is trained becomes float32: stored in bfloat16, it needs other buffers.
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        return make(first_params(source, mesh))


def make_step(
    modules: Modules, config: TrainConfig, like: state.TrainState, mesh: Mesh
) -> Callable[[state.TrainState, Batch], tuple[state.TrainState, Sums]]:
    """`train_step` as a program of the mesh, which is given the state's buffers; sums everywhere.

    Args: like: a state, arrays or jax.ShapeDtypeStruct.
    """
    step = partial(
        train_step,
        objective=partial(janusflow, seed=config.seed, modules=modules, config=config.objective),
        optimizer=config.optimizer,
        ema=config.ema,
        mixtures=tuple(phase.from_step for phase in config.data.mixture),
    )
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(shardings(like, mesh), NamedSharding(mesh, PartitionSpec())),
        compiler_options=sharding.compiler_options(mesh),
    )


def abstract_step(
    config: TrainConfig, models: dict, params: dict, mesh: Mesh, attention: Implementation = "auto"
) -> tuple[Modules, state.TrainState, Callable]:
    """(networks, state, step) that `run` trains with, the state as shapes on the mesh.

    Args: models, params: of the checkpoint to begin from, parameters as jax.ShapeDtypeStruct.

    Raises ValueError in one sentence for a mesh that does not divide the model, and for a REPA head
    of another width.
    """
    modules = build(models, config, attention)
    language = modules.model.config.language
    check_heads(language.num_attention_heads, language.kv_heads, mesh)
    like = jax.eval_shape(partial(first_state, modules=modules, config=config), params)
    like = abstract(like, mesh)
    return modules, like, make_step(modules, config, like, mesh)


def make_meter(
    like: state.TrainState,
    modules: Modules,
    config: TrainConfig,
    cache: ImageCache | None,
    shares: int,
) -> Meter:
    """What counts the tokens, images and operations of the steps."""
    cached = set() if cache is None else {"vae"}
    if cache is not None and cache.blank.features is not None:
        cached.add("siglip")
    cost = flops.stage_cost(config, modules, like.params, cached)
    peak = flops.peak_flops(jax.devices()[0], config.dtype) * jax.device_count()
    return Meter(cost, peak, shares)


def check_run(
    config: TrainConfig, modules: Modules, tokenizer: Tokenizer, processor: ImageProcessor
) -> None:
    """Raises ValueError in one sentence where the checkpoint cannot be trained as it is to be."""
    model = modules.model.config
    check_parts(model, modules.vae, tokenizer, processor)
    tasks = {source.task for source in config.data.sources}
    words, last = model.language.vocab_size, max(image_tokens(tokenizer))
    if "understanding" in tasks and last >= words:
        raise ValueError(
            f"The tags around an image have token ids up to {last}, but the model in "
            f"{config.init_from} has only {words} embeddings: begin from one that has been "
            f"converted with all its special tokens."
        )
    if "generation" not in tasks:
        return
    latent_shape(model, modules.vae and modules.vae.config)
    if modules.repa is not None and not processor.is_centered:
        raise ValueError(
            f"REPA shows SigLIP the crops in [-1, 1], but the one in {config.init_from} expects "
            f"another mean or deviation (preprocessor_config.json): set objective.repa_weight=0."
        )


def say(text: str) -> None:
    """Prints a line beside the progress bar, once for all processes."""
    if distributed.is_first():
        tqdm.write(text)


def run(config: TrainConfig, folder: Path, profile: int = 0) -> int:
    """Trains up to the last step, or to where it is told to stop; returns that step, saved."""
    # 1. What the stage begins from, and the step that it takes.
    source = checkpoints.agreed_on(config.init_from)
    models, files = checkpoints.read_metadata(source)
    models = {name: models.get(name) for name in ("janusflow", "siglip", "vae")}
    mesh = make_mesh(config.mesh)
    shapes = checkpoints.load_shapes(source)
    modules, like, step_fn = abstract_step(config, models, shapes, mesh)
    tokenizer, processor = read_processors(files, modules.model.config.siglip)
    check_run(config, modules, tokenizer, processor)
    cache = None
    if config.data.cache:  # Its checksums need the parameters.
        cache = open_cache(config, first_params(source, mesh), models)
    share, shares = sharding.row_share(mesh)
    loader = checkpoint_loader(
        config.data,
        models,
        files,
        cache,
        process_index=share,
        process_count=shares,
        row_multiple=sharding.row_multiple(mesh) * config.optimizer.accumulate,
    )
    template = trained_template(to_dict(config))
    sampler = Sampler(config.samples, modules, tokenizer, processor, mesh, template)

    # 2. The state: the run's own last checkpoint, else a fresh one.
    saved = runs.Checkpoints(folder, models, files, config, loader.records())
    now = saved.restore(like) or begin(source, modules, config, like, mesh)
    step = int(now.step)
    say(f"{config.name}: step {step} of {config.steps}, in {folder}")

    # 3. The loop. SIGTERM (a preempted machine) ends it after the step at hand.
    told_to_stop = distributed.StopNotice()
    meter = make_meter(like, modules, config, cache, shares)
    first = distributed.is_first()
    trace = Trace(folder / "profile", step, profile if first else 0)
    log = Log(folder, step, config.wandb, to_dict(config)) if first else NoLog()
    bar = tqdm(initial=step, total=config.steps, unit="step", disable=not first)
    position = step + int(now.data_offset)  # in the data, of the next batch
    batches = loader.batches(position, last=config.steps - 1 + int(now.data_offset))
    skipped_in_row, rewinds, last = int(now.skipped_in_row), 0, step >= config.steps
    with jax.set_mesh(mesh), closing(saved), closing(log), bar:
        if config.samples.every and step == 0:
            with meter.waiting("samples"):
                log.write_samples(step, *sampler.write(folder, step, now))
        while not last:
            trace.before(step)
            with meter.waiting("data"):
                batch, stats = next(batches)
            position += 1
            for record in stats.broken:
                say(f"skipped {record}")
            now, sums = step_fn(now, place_batch(batch, mesh))

            # While the device is at this step, a look at the one before it: too many skipped ones
            # in a row lead back to the checkpoint before them, and on with the data behind them.
            if skipped_in_row >= config.rewind_after:
                rewinds += 1
                good = step - int(skipped_in_row)
                if rewinds > config.max_rewinds:
                    raise ValueError(
                        f"Steps {good + 1} to {step} were skipped, though {config.max_rewinds} "
                        f"rewinds passed other data by: lower the learning rate, or begin from "
                        f"an earlier checkpoint."
                    )
                del now  # Two states may be too many for the devices.
                now = saved.restore(like, good) or begin(source, modules, config, like, mesh)
                back = int(now.step)
                say(
                    f"steps {good + 1} to {step} were skipped: back to step {back}, and past the "
                    f"data up to batch {position}"
                )
                offset = jax.device_put(np.int32(position - back), like.data_offset.sharding)
                now = now.replace(data_offset=offset)
                step, skipped_in_row = back, 0
                log.go_back(step)
                meter.clear()
                bar.n = step
                continue
            skipped_in_row, _ = sums.pop("skipped_in_row")

            step += 1
            last = step == config.steps or told_to_stop()
            meter.add(sums, batch, stats)
            trace.after(step, sums, last)
            if step % config.log_every == 0 or last:
                values = meter.read() | {"data_offset": position - step}
                log.write(step, values)
                shown = ("ar", "rf", "repa_cosine", "mfu")
                bar.set_postfix({name: f"{values[name]:.3f}" for name in shown if name in values})
            if last or step % config.save_every == 0 and not skipped_in_row:
                with meter.waiting("saving"):
                    saved.save(now)
                rewinds = 0
            if config.samples.every and step % config.samples.every == 0:
                with meter.waiting("samples"):
                    log.write_samples(step, *sampler.write(folder, step, now))
            saved.check()
            bar.update()
    say(f"{config.name}: step {step} is saved in {runs.folder(folder, step)}")
    return step


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", required=True, help="a file of configs/")
    add("--run", help="run folder; default: runs/NAME of the config")
    add(
        "--profile",
        metavar="STEPS",
        nargs="?",
        type=int,
        const=5,
        default=0,
        help="trace so many steps (5) into RUN/profile",
    )
    add(
        "--plan",
        metavar="TOPOLOGY",
        help="train nothing, but compile the step for these machines (v5e-64, v5p-64, v6e-64, "
        "8xH100, ...) and say what the stage will need there",
    )
    distributed.add_arguments(parser)
    add("overrides", nargs="*", metavar="field=value")
    args = parser.parse_intermixed_args(argv)
    try:
        config = load(args.config, args.overrides)
        if args.plan:
            return 0 if report.tell(config, args.plan, abstract_step) else 1
        distributed.start(args.coordinator, args.processes, args.process)
        enable_cache()
        with distributed.failing_together():
            step = run(config, Path(args.run or f"runs/{config.name}"), args.profile)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(
            "train.py: out of memory; raise optimizer.accumulate, lower objective.ar_chunk or set "
            "remat=full, and give the same command again, or lower data.batch_rows in a new --run.",
            file=sys.stderr,
        )
        return 2
    if step >= config.steps:
        return 0
    if distributed.is_first():
        print(
            f"train.py: stopped at step {step} of {config.steps}: the same command continues.",
            file=sys.stderr,
        )
    return STOPPED


if __name__ == "__main__":
    sys.exit(main())
