"""Hugging Face checkpoints to jflow's and back, bit for bit.

python -m jflow.convert from-hf SRC --vae VAE --out DIR
python -m jflow.convert to-hf DIR --out HF

Or the three models that JanusFlow was made of to a checkpoint that configs/adaptation.py begins
from; the layers between them are new:

python -m jflow.convert from-parts --language LLM --siglip SIGLIP --vae VAE --out DIR
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jflow import checkpoints, folders
from jflow.convert import parts, siglip_rules
from jflow.convert.engine import (
    Leaf,
    Tensor,
    find_tensors,
    flatten,
    open_params,
    plan,
    write_params,
)
from jflow.convert.janusflow_rules import JANUSFLOW_RULES, LANGUAGE_RULES
from jflow.convert.vae_rules import LEGACY_VAE_NAMES, VAE_RULES
from jflow.inference.parts import check_parts, drawn_shape, read_processors
from jflow.models.janusflow import JanusFlowConfig, abstract_params
from jflow.models.llama import LlamaConfig
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


def part_leaves(config: JanusFlowConfig, vocab_size: int) -> tuple[list[Leaf], list[Leaf]]:
    """The same of a LlamaForCausalLM with `vocab_size` tokens, and of transformers' SigLIP.

    The second's are those of `siglip_rules.separate`.
    """
    language = dataclasses.replace(config.language, vocab_size=vocab_size)
    abstract = abstract_params(dataclasses.replace(config, language=language))
    prefix = f"{parts.LANGUAGE}."
    rules = [rule._replace(hf=rule.hf.removeprefix(prefix)) for rule in LANGUAGE_RULES]
    siglip = jax.tree.map(lambda a: np.broadcast_to(np.uint8(0), a.shape), abstract[parts.SIGLIP])
    return (
        plan(rules, {parts.LANGUAGE: abstract[parts.LANGUAGE]}),
        plan(siglip_rules.HF_SIGLIP_RULES, siglip_rules.separate(siglip)),
    )


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
    files = sorted(folder.glob("*.json"))
    return {file.name: read_json(file) for file in files if not file.name.endswith(".index.json")}


def read_json(file: Path) -> str:
    """The text of a file of valid JSON, with its line ends."""
    try:
        text = file.read_bytes().decode("utf-8")
        json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}.") from error
    return text


def read_config(folder: Path) -> tuple[dict, dict[str, str]]:
    """The parsed config.json of a folder, and the text of all of its *.json."""
    files = read_json_files(folder)
    if CONFIG not in files:
        raise FileNotFoundError(f"There is no {CONFIG} in {folder}.")
    return json.loads(files[CONFIG]), files


@contextmanager
def open_models(sources: list[tuple[str, dict[str, Tensor], list[Leaf]]]) -> Iterator[dict]:
    """{name: params} of (name, tensors, leaves), to be read in the block, under a progress bar.

    Raises one ValueError with all that is wrong in any of them.
    """
    params, problems = {}, []
    opened = {tensor.file for _, tensors, _ in sources for tensor in tensors.values()}
    total = sum(file.stat().st_size for file in opened)
    with tqdm(total=total, desc="converting", unit="B", unit_scale=True) as bar:
        for name, found, leaves in sources:
            try:
                params[name] = open_params(leaves, found, bar.update)
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))
        yield params


def open_vae(source: str) -> tuple[dict, str, tuple[str, dict[str, Tensor], list[Leaf]]]:
    """(config, its text, what `open_models` takes) of diffusers' AutoencoderKL."""
    folder = fetch(source, [CONFIG, "diffusion_pytorch_model*.safetensors*"])
    config, files = read_config(folder)
    leaves = vae_leaves(VAEConfig.from_hf(config))
    return config, files[CONFIG], ("vae", find_tensors(folder, LEGACY_VAE_NAMES), leaves)


def from_hf(source: str, vae_source: str | None, out: str) -> None:
    """Converts the released format to a checkpoint folder `out`.

    Args:
      source, vae_source: folders or hub names of JanusFlow and of diffusers' AutoencoderKL; None
        for the one in source/vae, where `to_hf` puts it, or for none.

    Raises ValueError or OSError for sources that are not that; then nothing is written.
    """
    folders.require_new(out)
    folder = fetch(source, ["*.json", "*.safetensors"])
    if vae_source is None and (folder / "vae" / CONFIG).is_file():
        vae_source = str(folder / "vae")
    released, files = read_config(folder)
    siglip = json.loads(files[SIGLIP]) if SIGLIP in files else None
    config = {"janusflow": released, "siglip": siglip}
    model, vae_module = JanusFlowConfig.from_hf(released, siglip), None
    sources = [("janusflow", find_tensors(folder), janusflow_leaves(model))]
    if vae_source is not None:
        config["vae"], files[VAE_CONFIG], vae = open_vae(vae_source)
        vae_module = AutoencoderKL(VAEConfig.from_hf(config["vae"]))
        sources.append(vae)
    effect = f"nothing will run with {out}"
    try:
        check_parts(model, vae_module, *read_processors(files, model.siglip))
        effect = f"{out} will not draw"
        drawn_shape(model, vae_module and vae_module.config)
    except ValueError as error:
        # Weights alone are worth having, too.
        print(f"jflow.convert: {effect}. {error}", file=sys.stderr)
    with open_models(sources) as params:
        checkpoints.save_checkpoint(out, params, config, files)


def from_parts(
    language: str, siglip: str, vae_source: str, config_file: str | None, out: str
) -> None:
    """Joins a DeepSeek-LLM, a SigLIP and a VAE to a checkpoint folder `out` to begin stage 1 from.

    Their tensors keep every bit; what JanusFlow adds to them is drawn anew, always the same.

    Args:
      language, siglip, vae_source: folders or hub names of a LlamaForCausalLM, of a SiglipModel or
        SiglipVisionModel and of diffusers' AutoencoderKL.
      config_file: config.json of a JanusFlow to build, its siglip_model_config.json beside it;
        None for the released generation layers around the parts as they are.

    Raises ValueError or OSError for sources that are not that; then nothing is written.
    """
    folders.require_new(out)
    folder = fetch(language, ["*.json", "*.safetensors"])
    found, language_files = read_config(folder)
    language_config = LlamaConfig.from_hf(found)
    siglip_folder = fetch(siglip, ["*.json", "*.safetensors"])
    siglip_config = siglip_rules.config_from_transformers(read_config(siglip_folder)[0])
    files = parts.tokenizer_files(language_files, siglip_config)
    tokenizer, processor = read_processors(files, siglip_config)

    wanted = None
    if config_file is not None:
        side = Path(config_file).with_name(SIGLIP)
        sizes = json.loads(read_json(side)) if side.is_file() else None
        wanted = JanusFlowConfig.from_hf(json.loads(read_json(Path(config_file))), sizes)
    model = parts.join_configs(language_config, siglip_config, wanted, tokenizer.vocab_size)
    config = dict(zip(("janusflow", "siglip"), model.to_hf(), strict=True))
    files |= {CONFIG: json.dumps(config["janusflow"], indent=2)}
    files |= {SIGLIP: json.dumps(config["siglip"], indent=2)}
    config["vae"], files[VAE_CONFIG], vae = open_vae(vae_source)
    vae_module = AutoencoderKL(VAEConfig.from_hf(config["vae"]))
    check_parts(model, vae_module, tokenizer, processor)

    language_leaves, siglip_leaves = part_leaves(model, language_config.vocab_size)
    vision = siglip_rules.vision_tensors(find_tensors(siglip_folder))
    sources = [
        ("language", parts.language_tensors(find_tensors(folder)), language_leaves),
        ("siglip", vision, siglip_leaves),
        vae,
    ]
    with open_models(sources) as read:
        enlarged = parts.enlarge(read["language"][parts.LANGUAGE], model.language.vocab_size)
        siglip_params = siglip_rules.fuse(jax.tree.map(np.asarray, read["siglip"]))
        params = parts.fresh_params(model)
        params |= {parts.LANGUAGE: enlarged, parts.SIGLIP: siglip_params}
        checkpoints.save_checkpoint(out, {"janusflow": params, "vae": read["vae"]}, config, files)


def to_hf(source: str, out: str) -> None:
    """Converts a checkpoint folder to the released format, with the VAE in `out`/vae.

    Raises ValueError or OSError for a folder that is no checkpoint; then nothing is written.
    """
    folders.require_new(out)
    params, config, files = checkpoints.open_checkpoint(source)
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
        folders.new_folder(out) as folder,
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
    joiner = commands.add_parser(
        "from-parts",
        help="a DeepSeek-LLM, a SigLIP and a VAE to a checkpoint to begin stage 1 from",
    )
    joiner.add_argument("--language", required=True, metavar="LLM", help="LlamaForCausalLM")
    joiner.add_argument("--siglip", required=True, help="such as google/siglip-large-patch16-384")
    joiner.add_argument("--vae", required=True, help="such as stabilityai/sdxl-vae")
    joiner.add_argument(
        "--config", metavar="FILE", help="config.json of a JanusFlow, for other generation layers"
    )
    joiner.add_argument("--out", required=True, metavar="DIR")
    args = parser.parse_args(argv)
    # An accelerator has no part in this, and may be too small for the parameters.
    jax.config.update("jax_platforms", "cpu")
    try:
        if args.command == "from-hf":
            from_hf(args.source, args.vae, args.out)
        elif args.command == "from-parts":
            from_parts(args.language, args.siglip, args.vae, args.config, args.out)
        else:
            to_hf(args.source, args.out)
    except (ValueError, OSError) as error:
        print(f"jflow.convert: {error}", file=sys.stderr)
        return 2
    print(f"{args.out} is written.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
