"""Train one stage of JanusFlow; the same command again continues where it stopped.

python train.py --config configs/pretrain.py [--run runs/NAME] [field=value ...]
"""

import argparse
import signal
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from tqdm import tqdm

from jflow import checkpoints
from jflow.compilation import enable_cache
from jflow.config import load
from jflow.data.pipeline import Loader
from jflow.images import ImageProcessor
from jflow.models import repa
from jflow.models.janusflow import JanusFlow, JanusFlowConfig
from jflow.models.layers import Precision
from jflow.models.vae import AutoencoderKL, VAEConfig
from jflow.prompts import Tokenizer
from jflow.training import runs, state
from jflow.training.config import TrainConfig
from jflow.training.metrics import Log, means
from jflow.training.objectives import Modules, janusflow
from jflow.training.optimizer import adamw
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
    )


def first_state(params: dict, modules: Modules, config: TrainConfig) -> state.TrainState:
    """The state before the first step; the REPA head is new unless the checkpoint has one."""
    if "repa" not in params:
        width = modules.model.config.language.hidden_size
        key = jax.random.key(config.seed)
        params = params | {"repa": repa.init_params(modules.repa, width, key)}
    return state.init(params, config.trainable, adamw(config.optimizer))


def data_loader(models: dict, files: dict, modules: Modules, config: TrainConfig) -> Loader:
    model = modules.model.config
    size = model.siglip.image_size
    downscale = modules.vae.config.downscale if modules.vae else 1
    return Loader(
        config.data,
        Tokenizer.from_files(files),
        ImageProcessor.from_files(files),
        image_size=size,
        latent_tokens=model.gen_encoder.tokens_along(size // downscale) ** 2,
    )


def run(config: TrainConfig, folder: Path) -> None:
    # 1. The checkpoint that the stage begins from: its models, tokenizer and parameters.
    params, models, files = checkpoints.load_checkpoint(config.init_from)
    models = {name: models.get(name) for name in ("janusflow", "siglip", "vae")}
    modules = build(models, config)
    loader = data_loader(models, files, modules, config)

    # 2. The state: the run's own last checkpoint, else a fresh one.
    now = runs.restore(folder, first_state(params, modules, config), config)
    del params
    # All of it placed alike, or the second step, given the first one's results, compiles anew.
    now = jax.device_put(now, jax.devices()[0])
    first = int(now.step)
    print(f"{config.name}: step {first} of {config.steps}, in {folder}")

    # 3. The step.
    objective = partial(janusflow, seed=config.seed, modules=modules, config=config.objective)
    step_fn = jax.jit(
        partial(train_step, objective=objective, optimizer=config.optimizer, ema=config.ema),
        donate_argnums=0,
    )

    # 4. The loop. SIGTERM (a preempted machine) ends it after the step at hand.
    asked_to_stop = []
    signal.signal(signal.SIGTERM, lambda *_: asked_to_stop.append(True))
    log, recent, padding, waited, began = Log(folder, first), [], [], 0.0, time.perf_counter()
    batches = loader.batches(first)
    bar = tqdm(range(first, config.steps), initial=first, total=config.steps, unit="step")
    for number in bar:
        waiting = time.perf_counter()
        batch, stats = next(batches)
        waited += time.perf_counter() - waiting
        for record in stats.broken:
            tqdm.write(f"skipped {record}")
        now, sums = step_fn(now, batch)
        recent.append(sums)
        padding.append(stats.padding)

        done = number + 1
        last = done == config.steps or bool(asked_to_stop)
        if done % config.log_every == 0 or last:
            values = means(recent)
            seconds = time.perf_counter() - began
            values |= {
                "padding": sum(padding) / len(padding),
                "seconds_per_step": seconds / len(recent),
                "share_waiting_for_data": waited / seconds,
            }
            log.write(done, values)
            shown = {name: f"{values[name]:.3f}" for name in ("ar", "rf", "repa_cosine")
                     if name in values}  # fmt: skip
            bar.set_postfix(shown)
            recent, padding, waited, began = [], [], 0.0, time.perf_counter()
        if done % config.save_every == 0 or last:
            runs.save(folder, now, models, files, config)
            began = time.perf_counter()
        if last:
            break
    bar.close()
    stopped = int(now.step)
    print(f"{config.name}: step {stopped} is saved in {runs.folder(folder, stopped)}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a file of configs/")
    parser.add_argument("--run", help="run folder; default: runs/NAME of the config")
    parser.add_argument("overrides", nargs="*", metavar="field=value")
    args = parser.parse_args(argv)
    try:
        enable_cache()
        config = load(args.config, args.overrides)
        run(config, Path(args.run or f"runs/{config.name}"))
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
