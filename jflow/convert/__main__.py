"""Hugging Face checkpoints to jflow's and back, bit for bit.

python -m jflow.convert from-hf SRC --vae VAE --out DIR
python -m jflow.convert to-hf DIR --out HF
"""

import argparse
import json
import sys
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
from tqdm import tqdm

from jflow import checkpoints
from jflow.convert.engine import Leaf, find_tensors, flatten, plan, read_params, write_params
from jflow.convert.janusflow_rules import JANUSFLOW_RULES
from jflow.convert.vae_rules import LEGACY_VAE_NAMES, VAE_RULES
from jflow.models.janusflow import JanusFlowConfig, abstract_params
from jflow.models.vae import AutoencoderKL, VAEConfig

CONFIG, SIGLIP, VAE_CONFIG = "config.json", "siglip_model_config.json", "vae/config.json"


def janusflow_leaves(config: JanusFlowConfig) -> list[Leaf]:
    """Every parameter of the model and its keys in a released checkpoint."""
    return plan(JANUSFLOW_RULES, abstract_params(config))


def vae_leaves(config: VAEConfig) -> list[Leaf]:
    """Every parameter of the VAE and its keys in diffusers' file."""
    side = 2 * config.downscale
    pixels = jnp.zeros((1, side, side, config.in_channels))
    variables = jax.eval_shape(lambda: AutoencoderKL(config).init(jax.random.key(0), pixels))
    return plan(VAE_RULES, variables["params"])


def fetch(source: str, patterns: list[str]) -> Path:
    """The folder `source`, or the files of the hub's repository of that name.

    Raises FileNotFoundError if it is neither.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=patterns))
    # httpx, huggingface_hub and the file system each raise their own kinds.
    except Exception as error:
        reason = str(error).strip().splitlines()[:1]
        raise FileNotFoundError(
            f"{source} is not a folder, and could not be downloaded from the Hugging Face hub: "
            f"{''.join(reason) or type(error).__name__}"
        ) from error


def read_json_files(folder: Path) -> dict[str, str]:
    """The text of every *.json of a folder but the shards' index, with its line ends."""
    files = {}
    for file in sorted(folder.glob("*.json")):
        if file.name.endswith(".index.json"):
            continue
        try:
            text = file.read_bytes().decode("utf-8")
            json.loads(text)
        except ValueError as error:
            raise ValueError(f"{file} is not valid JSON: {error}.") from error
        files[file.name] = text
    return files


def read_models(sources: list[tuple[str, Path, list[Leaf]]]) -> dict:
    """{name: params} of (name, folder, leaves), under one progress bar."""
    found = {name: find_tensors(path, LEGACY_VAE_NAMES) for name, path, _ in sources}
    opened = {tensor.file for tensors in found.values() for tensor in tensors.values()}
    total = sum(file.stat().st_size for file in opened)
    with tqdm(total=total, desc="reading", unit="B", unit_scale=True) as bar:
        return {name: read_params(leaves, found[name], bar.update) for name, _, leaves in sources}


def from_hf(source: str, vae_source: str | None, out: str) -> None:
    """Converts the released format to a checkpoint folder `out`.

    Args:
      source, vae_source: folders or hub names of JanusFlow and of diffusers' AutoencoderKL.

    Raises ValueError or OSError for sources that are not that; then nothing is written.
    """
    checkpoints.require_new(out)
    folder = fetch(source, ["*.json", "*.safetensors"])
    files = read_json_files(folder)
    if CONFIG not in files:
        raise FileNotFoundError(f"There is no {CONFIG} in {folder}.")
    config = {"janusflow": json.loads(files[CONFIG])}
    config["siglip"] = json.loads(files[SIGLIP]) if SIGLIP in files else None
    model_config = JanusFlowConfig.from_hf(config["janusflow"], config["siglip"])
    sources = [("janusflow", folder, janusflow_leaves(model_config))]
    if vae_source is not None:
        folder = fetch(vae_source, [CONFIG, "diffusion_pytorch_model.safetensors"])
        vae_files = read_json_files(folder)
        if CONFIG not in vae_files:
            raise FileNotFoundError(f"There is no {CONFIG} in {folder}.")
        files[VAE_CONFIG] = vae_files[CONFIG]
        config["vae"] = json.loads(files[VAE_CONFIG])
        sources.append(("vae", folder, vae_leaves(VAEConfig.from_hf(config["vae"]))))
    params = read_models(sources)
    checkpoints.save_checkpoint(out, params, config, files)


def to_hf(source: str, out: str) -> None:
    """Converts a checkpoint folder to the released format, with the VAE in `out`/vae.

    Raises ValueError or OSError for a folder that is no checkpoint; then nothing is written.
    """
    checkpoints.require_new(out)
    params, config, files = checkpoints.load_checkpoint(source)
    model_config = JanusFlowConfig.from_hf(config["janusflow"], config.get("siglip"))
    if CONFIG not in files:
        model, siglip = model_config.to_hf()
        files |= {CONFIG: json.dumps(model, indent=2), SIGLIP: json.dumps(siglip, indent=2)}
    models = [("janusflow", "model.safetensors", janusflow_leaves(model_config))]
    if "vae" in params:
        files.setdefault(VAE_CONFIG, json.dumps(config["vae"], indent=2))
        leaves = vae_leaves(VAEConfig.from_hf(config["vae"]))
        models.append(("vae", "vae/diffusion_pytorch_model.safetensors", leaves))
    total = sum(array.nbytes for _, array in flatten(params))
    with (
        checkpoints.new_folder(out) as folder,
        tqdm(total=total, desc="writing", unit="B", unit_scale=True) as bar,
    ):
        folder.mkdir()
        for name, text in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(text.encode("utf-8"))
        for model, name, leaves in models:
            write_params(leaves, params[model], folder / name, bar.update)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jflow.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    reader = commands.add_parser("from-hf", help="released format to a checkpoint of jflow")
    reader.add_argument("source", metavar="SRC", help="folder, or name on the Hugging Face hub")
    reader.add_argument("--vae", help="the same of the SDXL VAE in diffusers' format")
    reader.add_argument("--out", required=True, metavar="DIR")
    writer = commands.add_parser("to-hf", help="a checkpoint of jflow to the released format")
    writer.add_argument("source", metavar="DIR")
    writer.add_argument("--out", required=True, metavar="HF")
    args = parser.parse_args(argv)
    # An accelerator has no part in this, and may be too small for the parameters.
    jax.config.update("jax_platforms", "cpu")
    try:
        if args.command == "from-hf":
            from_hf(args.source, args.vae, args.out)
        else:
            to_hf(args.source, args.out)
    except (ValueError, OSError) as error:
        print(f"jflow.convert: {error}", file=sys.stderr)
        return 2
    print(f"{args.out} is written.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
