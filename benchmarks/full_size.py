"""A full-size checkpoint without the released weights: made by rule, converted, run, with figures.

    python benchmarks/full_size.py make DIR [--dtype bfloat16]   # 4.1 GB, or 8.2 GB in float32
    python benchmarks/full_size.py convert DIR                   # DIR/ckpt, DIR/back, peak memory
    python benchmarks/full_size.py run DIR                       # one velocity, one prefill

The weight rule and the crc32 of every tensor are those of tests/golden/README.md.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
SHARD_BYTES = 2**30
SMALL = (".bias", "channelwise_norm.weight", "pos_embed", "beg_of_und_embed", "embed_tokens.weight")


def tensor(key: str, shape: list[int]) -> np.ndarray:
    """The float32 tensor that the weight rule gives a key."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    x = generator.standard_normal(shape, np.float32)
    if key.endswith(SMALL):
        return np.float32(0.1) * x
    if len(shape) == 1:
        return 1 + np.float32(0.1) * x
    return x / np.float32(np.sqrt(np.prod(shape[1:])))


def write_shards(keys: dict[str, list[int]], checks: dict, dtype, folder: Path, stem: str):
    """Writes every key of the rule in shards of about SHARD_BYTES, with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map, shard, size = {}, {}, 0

    def flush():
        name = f"{stem}-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    def make(key):
        array = tensor(key, keys[key])
        check = checks.get(key, {}).get("crc32_of_float32_le_bytes")
        if check is not None and zlib.crc32(array.tobytes()) != check:
            raise SystemExit(f"{key} is not what the weight rule gives.")
        return array.astype(dtype)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = tqdm(pool.map(make, keys), desc=f"making {folder.name}", total=len(keys))
        for key, shard[key] in zip(keys, made, strict=True):
            size += shard[key].nbytes
            if size > SHARD_BYTES:
                flush()
                size = 0
    flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def make(out: Path, dtype) -> None:
    checks = json.loads((GOLDEN / "full_weight_checks.json").read_text())
    for name, stem, folder in (
        ("keys_janusflow_1p3b", "model", out / "hf"),
        ("keys_sdxl_vae", "diffusion_pytorch_model", out / "hf_vae"),
    ):
        described = json.loads((GOLDEN / f"{name}.json").read_text())
        write_shards(described["keys"], checks, dtype, folder, stem)
        (folder / "config.json").write_text(json.dumps(described["config"], indent=1))
    for file in (GOLDEN / "tiny").glob("*token*.json"):
        (out / "hf" / file.name).write_text(file.read_text())
    processor = json.loads((GOLDEN / "tiny" / "processor_config.json").read_text())
    preprocessor = json.loads((GOLDEN / "tiny" / "preprocessor_config.json").read_text())
    for name, content in (
        ("processor_config.json", processor | {"num_image_tokens": 576}),
        ("preprocessor_config.json", preprocessor | {"image_size": 384}),
    ):
        (out / "hf" / name).write_text(json.dumps(content, indent=1))


def convert(out: Path) -> None:
    """Both directions, each in a process of its own for its peak memory."""
    size = sum(file.stat().st_size for file in out.glob("hf*/*.safetensors"))
    for args in (
        ["from-hf", f"{out}/hf", "--vae", f"{out}/hf_vae", "--out", f"{out}/ckpt"],
        ["to-hf", f"{out}/ckpt", "--out", f"{out}/back"],
    ):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "jflow.convert", *args], check=True)
        seconds = time.perf_counter() - began
        # The largest child so far; the second is reported only if it is larger.
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        print(
            f"{args[0]}: {size / 1e9:.2f} GB in {seconds:.0f} s, largest peak so far "
            f"{peak / 1e9:.2f} GB = {peak / size:.2f} times the checkpoint"
        )


def run(out: Path) -> None:
    """One guided velocity and one prefill with an image at full size, in float32."""
    import jax
    import jax.numpy as jnp

    from jflow.compilation import enable_cache
    from jflow.inference.image import encode_prefix, guided_velocity
    from jflow.inference.pipeline import Pipeline, Question
    from jflow.inference.text import prefill
    from jflow.prompts import Message, generation_tokens, understanding_tokens, user_question

    stats = enable_cache()
    pipeline = Pipeline.from_checkpoint(out / "ckpt", jnp.float32)
    params = pipeline.params["janusflow"]

    def timed(name, function, *args):
        function(*args)
        began = time.perf_counter()
        result = jax.block_until_ready(function(*args))
        print(f"{name}: {time.perf_counter() - began:.1f} s")
        return np.asarray(result, np.float32)

    tokens = generation_tokens(pipeline.tokenizer, "a red circle")[None]
    lengths = np.array([tokens.shape[1]])
    z = np.random.default_rng(0).standard_normal((1, *pipeline.latent_shape), np.float32)

    @jax.jit
    def velocity(params, z):
        prefix = encode_prefix(pipeline.model, params, tokens, lengths)
        guided = guided_velocity(pipeline.model, params, prefix, lengths, jnp.float32(2))
        return guided(z, jnp.float32(500))

    v = timed("velocity with guidance, prompt included", velocity, params, z)
    print(f"  rms {np.sqrt(np.mean(v**2)):.6f}, first values {v.reshape(-1)[:4]}")

    image = np.zeros((1, 1, 384, 384, 3), np.float32)
    messages = (Message("User", user_question("What is this?", 1)), Message("Assistant", ""))
    question = Question(messages)
    row = understanding_tokens(pipeline.tokenizer, question.messages, 1)
    slots = np.flatnonzero(
        (row == pipeline.tokenizer.image_id) | (row == pipeline.tokenizer.image_start_id)
    )

    def logits(params):
        return prefill(
            pipeline.model, params, row[None], np.array([len(row)]), image, slots[None, None], 8
        ).logits

    got = timed(f"prefill of {len(row)} tokens with an image", logits, params)
    print(f"  rms {np.sqrt(np.mean(got**2)):.6f}, likeliest token {got.argmax()}")
    print(f"compiled {stats.compiled}, from the cache {stats.cached}, {stats.seconds:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["make", "convert", "run"])
    parser.add_argument("dir", type=Path)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    args = parser.parse_args()
    if args.command == "make":
        make(args.dir, np.float32 if args.dtype == "float32" else ml_dtypes.bfloat16)
    elif args.command == "convert":
        convert(args.dir)
    else:
        run(args.dir)


if __name__ == "__main__":
    main()
