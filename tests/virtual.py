"""Checks on 8 virtual CPU devices, which need a process of their own: python -m tests.virtual NAME.

The model is tiny_training's with 8 heads and a vocabulary of 56, so that all of its dimensions
divide by 8; without a mesh it is what one device computes.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np

import sample as sample_py
from jflow import checkpoints, flow, images, sharding
from jflow.batch import Batch
from jflow.convert.__main__ import main as convert
from jflow.inference import image, text
from jflow.inference.pipeline import Pipeline
from jflow.models.janusflow import JanusFlow
from jflow.models.layers import by_rows
from jflow.models.llama import unstack_layers
from jflow.training import lora, objectives, optimizer
from jflow.training import state as states
from jflow.training.lora import FACTORS, LoraConfig
from jflow.training.objectives import Modules, ObjectiveConfig
from jflow.training.optimizer import OptimizerConfig
from jflow.training.state import EMAConfig, TrainState
from jflow.training.step import train_step
from tests.goldens import GOLDEN, REPO
from tests.tiny_training import CONFIG, FAST, VOCAB, image_row, modules, params, stack, text_row

HEADS, WORDS = 8, 56
# Every combination of (data, fsdp, tensor) on 1, 2, 4 and 8 devices.
ALL = [
    (data, fsdp, devices // data // fsdp)
    for devices in (1, 2, 4, 8)
    for data in (1, 2, 4, 8)
    for fsdp in (1, 2, 4, 8)
    if devices % (data * fsdp) == 0
]
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=1)


def run(check: str, *meshes: tuple[int, int, int]) -> None:
    """Runs `check` of this module on each mesh, elsewhere; fails with what it printed."""
    flags = [
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",  # Compiling takes most of the time.
        # Eight devices share two busy cores: none of them is to be given up as lost.
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        "--xla_cpu_collective_timeout_seconds=600",
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    arguments = [",".join(map(str, mesh)) for mesh in meshes]
    command = [sys.executable, "-m", "tests.virtual", check, *arguments]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-8000:]
    assert done.stdout.count("equal on") == len(meshes), done.stdout
    # What the partitioner could only do by copying whole arrays to every device.
    assert "Involuntary full rematerialization" not in done.stderr, done.stderr[-8000:]


def make_mesh(sizes: tuple[int, int, int]) -> jax.sharding.Mesh:
    return sharding.make_mesh(sharding.MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])


def networks(**fields) -> Modules:
    parts = modules()
    language = replace(CONFIG.language, vocab_size=WORDS, num_attention_heads=HEADS)
    model = JanusFlow(replace(CONFIG, language=language), **fields)
    return replace(parts, model=model)


def parameters() -> dict:
    """tiny_training's, with more rows of the vocabulary; numpy arrays."""
    tree = jax.tree.map(np.asarray, params())
    language = tree["janusflow"]["language_model"]
    more = np.random.default_rng(1).standard_normal((WORDS - VOCAB, 32), np.float32)
    language["embed_tokens"] = np.concatenate([language["embed_tokens"], 0.2 * more])
    head = language["lm_head"]["kernel"]
    language["lm_head"]["kernel"] = np.concatenate([head, 0.2 * more.T], axis=1)
    return tree


def batch() -> Batch:
    """8 rows of each kind, of unequal numbers of targets and images."""
    written = [text_row([(i, 3 + i % 4, i % 3 > 0), (20 + i, 5, False)], 20, 2) for i in range(8)]
    drawn = [image_row([(i, 2 + i % 4, i % 3 == 0)] * (1 + i % 2), 22, 2) for i in range(8)]
    return Batch(text=stack(written), images=stack(drawn))


def check_logits(program: str, mesh: jax.sharding.Mesh, rows: int) -> None:
    """A chunk of 8 positions has logits of this device's rows and words, and no others."""
    rows, words = rows // sharding.row_multiple(mesh), WORDS // mesh.shape["tensor"]
    shapes = set(re.findall(rf"f32\[(?:{rows},8|{8 * rows}),(\d+)\]", program))
    assert str(words) in shapes, shapes
    assert words == WORDS or str(WORDS) not in shapes, shapes


def check_rows(program: str, mesh: jax.sharding.Mesh, rows: int) -> None:
    """No device is sent the hidden vectors, [rows, positions, 32], of other devices' rows, and none
    meets the others for every tap of a depthwise kernel."""
    kinds = "all-gather|all-reduce|all-to-all|reduce-scatter"
    found = re.findall(rf"= (.*?) (?:{kinds})(?:-start)?\(", program)
    assert found or mesh.size == 1
    if sharding.row_multiple(mesh) > 1:
        assert not re.findall(rf"\[(?:8|{rows}),\d+,32\]", " ".join(found))
        assert not re.findall(rf" (?:{kinds})(?:-start)?\(.*res_blocks_\d+/while", program)


def restored(tree: dict, mesh: jax.sharding.Mesh) -> dict:
    """Written and read back, each device its own part."""
    places = sharding.shardings(tree, mesh)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.save_checkpoint(f"{folder}/ckpt", tree, {}, {})
        found, _, _ = checkpoints.load_checkpoint(f"{folder}/ckpt", sharding=places)
    for leaf, place in zip(jax.tree.leaves(found), jax.tree.leaves(places), strict=True):
        assert leaf.sharding == place
    return found


def train(
    mesh: jax.sharding.Mesh | None, factors: LoraConfig | None = None, parts: int = 1
) -> tuple[list[dict], TrainState]:
    """Two steps: what each reports, and the state behind the first.

    factors: train them alone. parts: of the batch, of which each has its rows on all devices.
    """
    objective = partial(
        objectives.janusflow,
        seed=5,
        modules=replace(networks(remat="full"), lora=factors),
        config=ObjectiveConfig(repa_layer=1, ar_chunk=8),
    )
    config = replace(OPTIMIZER, accumulate=parts)
    step = partial(train_step, objective=objective, optimizer=config, ema=EMAConfig(0.9, 1))
    trainable = optimizer.SFT if factors is None else (FACTORS,)

    def begin(tree):
        tree = lora.init(tree, factors, trainable, seed=5)
        if factors is not None:  # At first the second ones are zero, and so the first's gradients.
            tree = jax.tree_util.tree_map_with_path(
                lambda path, leaf: leaf + 0.1 if path[-1].key == "lora_b" else leaf, tree
            )
        return states.init(tree, trainable, optimizer.adamw(OPTIMIZER))

    given, rows = parameters(), batch()
    if mesh is None:
        state = begin(given)
        step = jax.jit(step)
    else:
        given = restored(given, mesh)
        places = sharding.shardings(jax.eval_shape(begin, given), mesh)
        state = jax.jit(begin, out_shardings=places)(given)
        rows = sharding.place_batch(rows, mesh)
        everywhere = jax.NamedSharding(mesh, jax.P())
        step = jax.jit(step, out_shardings=(places, everywhere), donate_argnums=0)
    before = state
    step = step.lower(state, rows).compile(FAST)
    state, first = step(state, rows)
    if mesh is not None:
        check_logits(step.as_text(), mesh, 8 // parts)
        check_rows(step.as_text(), mesh, 8 // parts)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params | before.ema))
        for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    after = jax.device_get(state)
    _, second = step(state, rows)
    return jax.device_get([first, second]), after


def training(
    meshes: list[tuple[int, int, int]], factors: LoraConfig | None = None, parts: int = 1
) -> None:
    """Losses, gradients (AdamW's first moment is a tenth of them) and averages, within 1e-5."""
    (first, second), alone = train(None, factors)
    assert first["gradient_norm"][0] > (1 if factors is None else 0.1)
    assert first["ar"][1] > 10 and first["rf"][1] == 12
    for sizes in meshes:
        mesh = make_mesh(sizes)
        with jax.set_mesh(mesh):
            (got_first, got_second), state = train(mesh, factors, parts)
        for got, want in ((got_first, first), (got_second, second)):
            for name, (total, _) in want.items():
                np.testing.assert_allclose(got[name][0], total, rtol=1e-5, atol=1e-6, err_msg=name)
        largest = 0.0
        for path, want in alone.opt_state[1][0].mu.items():
            error = np.linalg.norm(state.opt_state[1][0].mu[path] - want)
            # A gradient that is nought but for rounding (of key biases) is measured by all others'.
            size = max(np.linalg.norm(want), 1e-3 * 0.1)
            largest = max(largest, error / size)
            assert error <= 1e-5 * size, (sizes, path, error / size)
        for path, leaf in alone.ema.items():
            np.testing.assert_allclose(state.ema[path], leaf, atol=3e-4, err_msg=path)
        print(f"equal on {sizes}: gradients within {largest:.1e}", flush=True)


def training_factors(meshes: list[tuple[int, int, int]]) -> None:
    """`training` of LoRA's factors alone, at changes that leave the kernels what they are."""
    training(meshes, LoraConfig(rank=3, alpha=3.0))


def sample(
    mesh: jax.sharding.Mesh | None, apart: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Guided latents of 8 prompts, their pixels, and answers of 4 tokens about 8 images.

    apart: layers apart and by rows, as a GPU has them.
    """
    parts, given, rng = networks(), parameters(), np.random.default_rng(0)
    tokens = rng.integers(1, VOCAB, (8, 6)).astype(np.int32)
    lengths = rng.integers(2, 7, 8).astype(np.int32)
    z = rng.standard_normal((8, 4, 4, 4)).astype(np.float32)
    question = rng.integers(1, VOCAB, (8, 11)).astype(np.int32)
    slots = np.tile(np.arange(1, 6, dtype=np.int32), (8, 1, 1))
    pixels = rng.uniform(-1, 1, (8, 1, 32, 32, 3)).astype(np.float32)
    keys = jax.random.split(jax.random.key(3), 8)
    rows = (tokens, lengths, z, question, lengths + 5, slots, pixels, keys)
    if mesh is not None:
        given = jax.device_put(given, sharding.shardings(given, mesh))
        rows = jax.device_put(rows, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
    tokens, lengths, z, question, asked, slots, pixels, keys = rows
    grid = flow.time_grid(2)
    model, weights = parts.model, given["janusflow"]
    if apart:
        model = replace(model, scan_layers=False)
        language = unstack_layers(dict(weights["language_model"]))
        weights = weights | {"language_model": by_rows(jax.tree.map(jnp.asarray, language))}
    latents = image.sample_latents(
        model, weights, tokens, lengths, z, grid.timesteps, grid.dt, jnp.float32(2.0)
    )
    drawn = image.decode_latents(parts.vae, given["vae"], latents)
    state = text.prefill(model, weights, question, asked, pixels, slots, 4)
    _, answers = text.decode(model, weights, state, keys, None, jnp.float32(1), jnp.int32(0), 4)
    return tuple(jax.device_get((latents, drawn, answers)))


def sampling(meshes: list[tuple[int, int, int]]) -> None:
    """Images within 1e-5 of their range, answers token by token."""
    latents, drawn, answers = sample(None)
    assert np.std(latents) > 0.3 and np.std(drawn) > 0.01 and len(np.unique(answers)) > 4
    for sizes in meshes:
        mesh = make_mesh(sizes)
        for apart in (False, True):
            with jax.set_mesh(mesh):
                got = sample(mesh, apart)
            for ours, want in zip(got[:2], (latents, drawn), strict=True):
                np.testing.assert_allclose(ours, want, rtol=0, atol=1e-5 * np.abs(want).max())
            np.testing.assert_array_equal(got[2], answers)
        print(f"equal on {sizes}", flush=True)


def sample_files(ckpt: Path, mesh: str | None) -> tuple[np.ndarray, str]:
    """What sample.py draws, its PNGs as floats, and the JSONL file of what it answers; 3 rows each,
    drawn by 2, answered at once. mesh: None for one device alone."""
    drawn, loaded = [], []
    original = Pipeline.from_checkpoint
    out = ckpt.parent / "answers.jsonl"

    def load(*args, **kwargs):
        loaded.append(original(*args, **kwargs))
        return loaded[-1]

    spies = [
        patch.object(images, "to_uint8", np.asarray),
        patch.object(images, "save_png", lambda image, *_: drawn.append(image)),
        patch.object(Pipeline, "from_checkpoint", load),
    ]
    if mesh is None:
        spies.append(patch.object(sample_py, "mesh_of", lambda _: None))
    with ExitStack() as stack:
        for spy in spies:
            stack.enter_context(spy)
        common = ["--ckpt", str(ckpt), "--mesh", mesh or ""]
        draw = ["--prompt", "a red cat", "--num", "3", "--steps", "2", "--batch-size", "2"]
        assert sample_py.main([*common, *draw, "--out", str(ckpt.parent / "drawn")]) == 0
        questions = ["--questions", str(ckpt.parent / "q.jsonl"), "--max-new-tokens", "8"]
        assert sample_py.main([*common, *questions, "--out", str(out)]) == 0
    for pipeline in loaded if mesh else ():
        places = sharding.shardings(pipeline.params, pipeline.mesh)
        for leaf, place in zip(
            jax.tree.leaves(pipeline.params), jax.tree.leaves(places), strict=True
        ):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim), (leaf.sharding, place)
    return np.stack(drawn[:3]), out.read_text("utf-8")


def sample_command(meshes: list[tuple[int, int, int]]) -> None:
    """sample.py --mesh on the golden checkpoint: images within 1e-5, answers word by word."""
    with tempfile.TemporaryDirectory() as folder:
        ckpt = Path(folder) / "ckpt"
        source, vae = str(GOLDEN / "tiny"), str(GOLDEN / "vae_tiny")
        assert convert(["from-hf", source, "--vae", vae, "--out", str(ckpt)]) == 0
        cat = str(REPO / "docs" / "cat.jpg")
        asked = [{"question": f"What is this{'?' * n}", "image": cat} for n in (1, 2, 5)]
        (Path(folder) / "q.jsonl").write_text("\n".join(map(json.dumps, asked)), "utf-8")
        pictures, answers = sample_files(ckpt, None)
        assert np.std(pictures) > 0.1 and len(set(answers.splitlines())) == 3
        for sizes in meshes:
            names = ("data", "fsdp", "tensor")
            mesh = ",".join(f"{n}={s}" for n, s in zip(names, sizes, strict=True))
            got, text = sample_files(ckpt, mesh)
            error = np.abs(got - pictures).max() / np.abs(pictures).max()
            assert error < 1e-5 and text == answers, (sizes, error)
            print(f"equal on {sizes}: images within {error:.1e}", flush=True)


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    checks = {
        "training": training,
        "LoRA": training_factors,
        "parts": partial(training, parts=2),
        "sampling": sampling,
        "sample.py": sample_command,
    }
    checks[sys.argv[1]]([tuple(map(int, sizes.split(","))) for sizes in sys.argv[2:]])
