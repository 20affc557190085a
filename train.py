"""Train one stage of JanusFlow; the same command again continues where it stopped.

python train.py --config configs/pretrain.py [--run runs/NAME] [field=value ...]
"""

import argparse
import signal
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from tqdm import tqdm

from jflow import checkpoints
from jflow.compilation import enable_cache
from jflow.config import load, to_dict
from jflow.data.cache import ImageCache
from jflow.data.encode import open_cache
from jflow.data.pipeline import checkpoint_loader
from jflow.images import ImageProcessor
from jflow.inference.pipeline import check_parts
from jflow.models import repa
from jflow.models.janusflow import JanusFlow, JanusFlowConfig
from jflow.models.layers import Precision
from jflow.models.vae import AutoencoderKL, VAEConfig
from jflow.prompts import Tokenizer
from jflow.sharding import make_mesh, place_batch, row_multiple, shardings
from jflow.training import flops, lora, runs, state
from jflow.training.config import TrainConfig
from jflow.training.metrics import Meter
from jflow.training.monitor import Log, Trace
from jflow.training.objectives import Modules, janusflow
from jflow.training.optimizer import adamw
from jflow.training.samples import Sampler
from jflow.training.step import train_step


def build(models: dict, config: TrainConfig) -> Modules:
    """The networks that a checkpoint's config describes, in the run's precision."""
    dtype = jnp.dtype(config.dtype)
    precision = Precision(compute=dtype)
    model = JanusFlowConfig.from_hf(models["janusflow"], models.get("siglip"))
    vae = models.get("vae")
    return Modules(
        model=JanusFlow(model, precision, remat=config.remat),
        vae=AutoencoderKL(VAEConfig.from_hf(vae), dtype=dtype) if vae else None,
        repa=repa.RepaHead(model.siglip.width, config.repa_hidden_size, precision),
        lora=config.lora,
    )


def first_state(params: dict, modules: Modules, config: TrainConfig) -> state.TrainState:
    """The state before the first step; the REPA head is new unless the checkpoint has one."""
    if "repa" not in params:
        width = modules.model.config.language.hidden_size
        key = jax.random.key(config.seed)
        params = params | {"repa": repa.init_params(modules.repa, width, key)}
    params = lora.init(params, config.lora, config.trainable, config.seed)
    return state.init(params, config.trainable, adamw(config.optimizer))


def make_meter(
    like: state.TrainState, modules: Modules, config: TrainConfig, cache: ImageCache | None
) -> Meter:
    """What counts the tokens, images and operations of the steps."""
    cached = set() if cache is None else {"vae"}
    if cache is not None and cache.blank.features is not None:
        cached.add("siglip")
    cost = flops.step_cost(
        modules.model.config,
        modules.vae.config if modules.vae else None,
        config.repa_hidden_size if config.objective.repa_weight else None,
        trained={name for path in like.params for name in path.split("/")[:2]},
        cached=cached,
    )
    return Meter(cost, flops.peak_flops(jax.devices()[0], config.dtype) * jax.device_count())


def run(config: TrainConfig, folder: Path, profile: int = 0) -> None:
    # 1. The checkpoint that the stage begins from: its models, tokenizer and parameters.
    params, models, files = checkpoints.load_checkpoint(config.init_from)
    models = {name: models.get(name) for name in ("janusflow", "siglip", "vae")}
    modules = build(models, config)
    tokenizer, processor = Tokenizer.from_files(files), ImageProcessor.from_files(files)
    check_parts(modules.model.config, modules.vae, tokenizer, processor)
    cache, mesh = open_cache(config, params, models), make_mesh(config.mesh)
    loader = checkpoint_loader(
        config.data,
        models,
        files,
        cache,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        row_multiple=row_multiple(mesh),
    )
    sampler = Sampler(config.samples, modules, tokenizer, processor)

    # 2. The state: the run's own last checkpoint, else a fresh one.
    saved = runs.Checkpoints(folder, models, files, config)
    like = jax.eval_shape(partial(first_state, modules=modules, config=config), params)

    def place(now: state.TrainState) -> state.TrainState:
        return jax.device_put(now, shardings(now, mesh))

    now = place(saved.restore(like) or first_state(params, modules, config))
    del params
    step = int(now.step)
    print(f"{config.name}: step {step} of {config.steps}, in {folder}")

    # 3. The step.
    objective = partial(janusflow, seed=config.seed, modules=modules, config=config.objective)
    step_fn = jax.jit(
        partial(train_step, objective=objective, optimizer=config.optimizer, ema=config.ema),
        donate_argnums=0,
        out_shardings=(shardings(like, mesh), None),
    )

    # 4. The loop. SIGTERM (a preempted machine) ends it after the step at hand.
    asked_to_stop = []
    signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.append(True))
    meter = make_meter(like, modules, config, cache)
    trace = Trace(folder / "profile", step, profile)
    log = Log(folder, step, config.wandb, to_dict(config))
    bar = tqdm(initial=step, total=config.steps, unit="step")
    position = step + int(now.data_offset)  # in the data, of the next batch
    batches = loader.batches(position)
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
                bar.write(f"skipped {record}")
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
                now = saved.restore(like, good)
                if now is None:
                    params, _, _ = checkpoints.load_checkpoint(config.init_from)
                    now = first_state(params, modules, config)
                back = int(now.step)
                bar.write(
                    f"steps {good + 1} to {step} were skipped: back to step {back}, and past the "
                    f"data up to batch {position}"
                )
                now = place(now.replace(data_offset=jnp.int32(position - back)))
                step, skipped_in_row = back, 0
                log.go_back(step)
                bar.n = step
                continue
            skipped_in_row, _ = sums.pop("skipped_in_row")

            step += 1
            last = step == config.steps or bool(asked_to_stop)
            meter.add(sums, batch, stats.padding)
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
    print(f"{config.name}: step {step} is saved in {runs.folder(folder, step)}")


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
    add("overrides", nargs="*", metavar="field=value")
    args = parser.parse_args(argv)
    try:
        enable_cache()
        config = load(args.config, args.overrides)
        run(config, Path(args.run or f"runs/{config.name}"), args.profile)
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
