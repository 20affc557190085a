"""Plans: topologies by name, closed forms, the page, and real compiles for TPUs and GPUs.

The compiles need libtpu (pip install -e ".[plan]") and are skipped without it.
"""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sample
import train
from configs.meshes import HARDWARE
from jflow.batch import Batch
from jflow.config import load
from jflow.data import packing
from jflow.data.cache import CachedImage
from jflow.data.mixture import part_sizes
from jflow.inference.pipeline import PROMPT_BUCKET, ImageOptions
from jflow.models.janusflow import JanusFlow, JanusFlowConfig, abstract_params
from jflow.models.layers import Precision
from jflow.models.llama import Llama, LlamaConfig
from jflow.models.vae import VAEConfig
from jflow.plan import abstract, compiling, hlo, program, report, sampling, topology, training, work
from jflow.sharding import MeshConfig, check_heads, make_mesh, shardings
from jflow.sharding import abstract as placed
from jflow.training import flops
from tests import programs, tiny_training

REPO = Path(__file__).resolve().parent.parent
GOLDEN = REPO / "tests" / "golden"


def described(name: str) -> dict:
    return json.loads((GOLDEN / f"keys_{name}.json").read_text("utf-8"))


@pytest.mark.parametrize(
    "name, count, shape",
    [
        ("v5e-64", 64, "8x8"),
        ("v5p-64", 32, "2x4x4"),  # Google counts its cores, two a chip.
        ("v6e-256", 256, "16x16"),
        ("v5e:4x4", 16, "4x4"),
        ("v5p:4x4x8", 128, "4x4x8"),
        ("1xH200", 1, "1x1x1"),
        ("8xA100-40G", 8, "1x1x8"),
        ("32xH100", 32, "1x4x8"),
    ],
)
def test_names_of_topologies(name, count, shape):
    found = topology.parse(name)
    assert (found.count, found.shape) == (count, shape)
    assert math.prod(map(int, shape.split("x"))) == count


@pytest.mark.parametrize("name", ["v5e-63", "v9-8", "0xH100", "12xH100", "8xH100-40G", "v5p-63"])
def test_names_of_none(name):
    with pytest.raises(ValueError, match=f"{name}.*[.]$"):
        topology.parse(name)


def test_every_listed_hardware_is_a_topology_that_its_mesh_fills():
    for name, hardware in HARDWARE.items():
        sizes = vars(hardware.mesh).values()
        assert math.prod(sizes) == topology.parse(name).count
        for stage, rows in (("adaptation", 512), ("pretrain", 512), ("sft", 256)):
            config = load(REPO / "configs" / f"{stage}.py", [f"hardware={name}"])
            assert config.data.batch_rows == rows and config.mesh == hardware.mesh


def test_every_listed_hardware_is_planned_as_it_is_listed():
    """The figures of docs/plans.md are those of the settings that a run would have."""
    planned = json.loads((REPO / "benchmarks" / "results" / "plans.json").read_text("utf-8"))
    for name, hardware in HARDWARE.items():
        found = planned[name]["mesh"], planned[name]["remat"], planned[name]["accumulate"]
        assert found == (vars(hardware.mesh), hardware.remat, hardware.accumulate), name


@pytest.mark.parametrize(
    "name, missing, extra", [("v5e-4", "libtpu", "plan"), ("1xH200", "jax_cuda", "plan-cuda")]
)
def test_a_missing_compiler_is_named(monkeypatch, capsys, name, missing, extra):
    """By train.py and by sample.py, in one line, exit status 2."""
    found = topology.importlib.util.find_spec
    monkeypatch.setattr(
        topology.importlib.util, "find_spec", lambda n: None if n.startswith(missing) else found(n)
    )
    config = str(REPO / "configs" / "pretrain.py")
    assert train.main(["--config", config, "--plan", name]) == 2
    assert sample.main(["--ckpt", "nowhere", "--plan", name]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(f".[{extra}]" in line for line in lines)


def test_the_released_model_is_known(tmp_path):
    """The sizes of the released config, and its parameters to the last one."""
    released = described("janusflow_1p3b")
    assert JanusFlowConfig.from_hf(released["config"]) == abstract.RELEASED
    assert VAEConfig.from_hf(described("sdxl_vae")["config"]) == abstract.RELEASED_VAE
    (tmp_path / "check.json").write_text("{}")  # What `jflow.data check` leaves in a run's folder.
    for path in (tmp_path, "no/such/checkpoint"):
        _, params, found = abstract.begin(str(path))
        assert not found
    sizes = [leaf.size for leaf in jax.tree.leaves(params["janusflow"])]
    assert sum(sizes) == released["n_params"]


def test_the_decoder_of_the_vae_costs_what_design_md_says():
    """1.41 TFLOP for 384 x 384 pixels, less 5/9 of the convolutions behind repeated pixels; its
    digits are the tolerance."""
    repeated = [(512, 96), (512, 192), (256, 384)]
    saved = sum(5 / 9 * 2 * 9 * c**2 * side**2 for c, side in repeated)
    assert flops.vae_decode_flops(VAEConfig(), 384) == pytest.approx(1.41e12 - saved, abs=0.005e12)


def test_the_work_of_a_batch():
    """Stage 2's later mixture: 80% of 512 rows of 6 images, 14% of 5, 6% of text, in whole rows."""
    data = load(REPO / "configs" / "pretrain.py").data
    found = work.model_work(data, 10_000, abstract.RELEASED)
    assert found.tokens == 512 * 4096
    assert found.generated == pytest.approx(0.8 * 512 * 6, abs=6)
    assert found.understood == pytest.approx(0.14 * 512 * 5, abs=5)
    # A generation sample, floors of design.md: 6.09 TFLOP for 643 tokens; here it has 682.
    cost = flops.step_cost(
        abstract.RELEASED, VAEConfig(), 2048,
        {"language_model", "repa", "vision_gen_enc_model", "vision_gen_dec_model",
         "vision_gen_enc_aligner", "vision_gen_dec_aligner"},
    )  # fmt: skip
    one = flops.Work(tokens=643, pairs=643 * 644 // 2, generated=1)
    assert cost.of(one) == pytest.approx(6.09e12, rel=1e-3)


def test_the_sampler_computes_what_the_closed_form_says():
    """Within 2%, compiled for this CPU: the prompt once, the encoder once a step, two halves.

    Depthwise filters are no products in the program, and small beside those.
    """
    language = LlamaConfig(64, 128, 256, 2, 2)
    encoder = replace(tiny_training.CONFIG.gen_encoder, block_out_channels=(128,), hidden_size=128)
    decoder = replace(
        tiny_training.CONFIG.gen_decoder,
        block_out_channels=(128,),
        in_channels=128,
        hidden_size=128,
    )
    config = replace(
        tiny_training.CONFIG, language=language, gen_encoder=encoder, gen_decoder=decoder
    )
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    params = placed({"janusflow": abstract_params(config)}, mesh)["janusflow"]
    options = ImageOptions(steps=3)
    lowered = sampling.lower_latents(JanusFlow(config), params, 16, 2, options, mesh)
    figures = program.measure(hlo.parse(lowered.compile().as_text()))
    assert figures.flops == pytest.approx(
        2 * sampling.latents_flops(config, 16, PROMPT_BUCKET, options), rel=0.02
    )
    # 92.1 TFLOP in design.md, which leaves out the pairs that a mask hides, and takes 30 steps.
    full = sampling.latents_flops(abstract.RELEASED, 48, 16, ImageOptions())
    assert full == pytest.approx(92.1e12, rel=0.05)


@pytest.mark.parametrize("cached", [set(), {"vae"}, {"vae", "crop"}, {"vae", "siglip", "crop"}])
def test_the_batch_of_a_plan_is_that_of_a_loader(cached):
    """Shapes and dtypes: rows as `packing` makes them, moments and features as the networks do."""
    data = load(REPO / "configs" / "pretrain.py", ["data.batch_rows=5"]).data
    parts, params = tiny_training.modules(), tiny_training.params()
    model, vae, pixels = parts.model.config, parts.vae.config, jnp.zeros((1, 32, 32, 3))

    def encoded(network, name, method):
        apply = partial(network.apply, method=method)
        shapes = jax.eval_shape(apply, {"params": params[name]}, pixels)
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape[1:], leaf.dtype), shapes)

    moments = np.stack(encoded(parts.vae, "vae", "encode"))
    features = encoded(parts.model, "janusflow", "image_features")
    features = features if "siglip" in cached else None
    blank = CachedImage(-1, moments, features, with_crop="crop" not in cached)
    tokens = tiny_training.TOKENS
    sizes = 32, tokens, blank if cached else None
    text = packing.text_row([], data.max_seq_len, data.images_per_row, 32, tokens)
    images = packing.image_row([], [], data.max_seq_len, data.crops_per_row, *sizes)
    texts, drawn = part_sizes(data, 0, 2)
    want = Batch(tiny_training.stack([text] * texts), tiny_training.stack([images] * drawn))
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    got = abstract.batch(data, 0, 2, model, vae, mesh, cached)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


# --- The page -------------------------------------------------------------------------------------


class Unrun:
    """A step that lowers to its own number of parts."""

    def __init__(self, parts: int):
        self.parts = parts

    def lower(self, *_):
        return self.parts


def small_step(config, models, params, mesh, attention):
    """What train.abstract_step gives, and refuses."""
    parts = tiny_training.modules()
    language = parts.model.config.language
    check_heads(language.num_attention_heads, language.kv_heads, mesh)
    state = jax.eval_shape(partial(train.first_state, modules=parts, config=config), params)
    return parts, placed(state, mesh), Unrun(config.optimizer.accumulate)


@pytest.fixture
def without_compiler(monkeypatch):
    """Steps of 300 GiB, less the more parts a batch has, and 50 GiB for each image that is drawn;
    this machine's one device stands for as many as are asked for."""
    figures = program.Figures(4e15, 1e12, 0, {"all-gather": program.Collective(48, 3e9)})

    def compile_step(parts, place, given):
        return compiling.Compiled(300 * 2**30 // parts, 0, figures, None)

    def compile_drawing(lowered, place, given):
        return compiling.Compiled(50 * 2**30 * lowered.out_info.shape[0], 0, figures, None)

    tree = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tiny_training.params())
    model, siglip = tiny_training.CONFIG.to_hf()
    vae = tiny_training.modules().vae.config.to_hf()
    models = {"janusflow": model, "siglip": siglip, "vae": vae}
    monkeypatch.setattr(topology, "devices", lambda place: jax.devices()[:1] * place.count)
    monkeypatch.setattr(abstract, "begin", lambda *_: (models, tree, False))
    monkeypatch.setattr(training, "compile_for", compile_step)
    monkeypatch.setattr(sampling, "compile_for", compile_drawing)


def test_the_page_says_what_fits(without_compiler, capsys):
    """128 GiB of an H200: not at once, and not in 2 parts, but in 4."""
    config = load(REPO / "configs" / "pretrain.py")
    assert not report.tell(config, "1xH200", small_step)
    shown = capsys.readouterr().out
    assert "300.00 GiB of 128.62 GiB: does NOT fit" in shown
    assert "  optimizer.accumulate=2: 150.00 GiB\n  optimizer.accumulate=4: 75.00 GiB\n" in shown
    last = shown[shown.index("accumulate 4") :]
    assert "75.00 GiB of 128.62 GiB: fits" in last
    # 4e15 operations at 790e12 a second; 390,000 steps.
    assert "a step 5063 ms" in last and "390,000 steps: 22.9 days, 23 chip-days" in last
    assert "all-gather 48 times, 3.00 GB to each chip" in last
    assert "the sizes are the released model's" in last


class NoRoom:
    """A program that a compiler finds no room for."""

    def __init__(self, message: str):
        self.message = message

    def compile(self, _):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {self.message}")


@pytest.mark.parametrize(
    "message, needed",
    [
        (
            "Ran out of memory in memory space hbm. Used 35.50G of 31.25G hbm. Exceeded hbm "
            "capacity by 4.25G.\n  program    30.00G\n  arguments   5.00G",
            (35.5, 5),
        ),
        ("Ran out of memory in memory space hbm. Used 35.50G of 31.25G hbm.", (35.5, 5.5)),
        ("Size of HLO temporaries (20.00G) exceeds available HBM.", (25.5, 5.5)),
    ],
)
def test_where_there_is_no_room_arguments_count_once(message, needed):
    """Compilers name the whole, or what comes on top of the arguments (5.5 GiB here, of which a
    program may leave some unused)."""
    found = compiling.compile_for(NoRoom(message), topology.parse("v6e-4"), int(5.5 * 2**30))
    assert (found.needed / 2**30, found.arguments / 2**30) == needed
    assert not compiling.fits(found, topology.parse("v6e-4"))


def test_another_memory_of_the_chip_is_no_plan():
    full = NoRoom("Ran out of memory in memory space vmem. Used 32.42M of 16.00M vmem.")
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        compiling.compile_for(full, topology.parse("v6e-4"), 0)


NONE_FITS = "None of these fits: take more chips, or chips with more memory."


def tried(capsys) -> list[str]:
    """What a page says of the settings that it tried."""
    shown = capsys.readouterr().out
    return shown.split("tried in turn:\n")[1].splitlines()


@pytest.mark.parametrize(
    "mesh, rows, split",
    [
        # Two heads: over two devices, but not over four or eight.
        ((2, 2, 1), 4, ["  mesh.tensor=1 mesh.data=1 mesh.fsdp=-1: 300.00 GiB",
                        "  mesh.tensor=2 mesh.data=1 mesh.fsdp=-1: 300.00 GiB"]),
        ((2, 1, -1), 2, ["  mesh.tensor=2 mesh.data=1 mesh.fsdp=-1: 300.00 GiB"]),
        ((1, 2, -1), 2, []),
        ((-1, 4, 1), 4, ["  mesh.tensor=2 mesh.data=1 mesh.fsdp=-1: 300.00 GiB"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_not_tried(without_compiler, capsys, mesh, rows, split):
    """Meshes of too many chips or for too few heads; parts of a batch with a row for each chip."""
    config = load(REPO / "configs" / "pretrain.py", [f"data.batch_rows={rows}"])
    assert not report.tell(replace(config, mesh=MeshConfig(*mesh)), "4xH100", small_step)
    assert tried(capsys) == [*split, NONE_FITS]


def test_what_a_cache_holds_costs_nothing(without_compiler):
    """Neither the VAE's encoder nor, where it is not trained, REPA's SigLIP."""
    parts = tiny_training.modules()
    vae, siglip = parts.vae.config, parts.model.config.siglip

    def planned(stage, *overrides):
        config = load(REPO / "configs" / f"{stage}.py", ["steps=1", *overrides])
        step = report.make_plan(config, "1xH200", small_step).main
        drawn = work.model_work(config.data, 0, parts.model.config).generated
        return step.model_flops / drawn, step.program_flops

    moments, features = flops.vae_encode_flops(vae, 32), flops.siglip_flops(siglip)
    for stage, saved in (("pretrain", moments + features), ("sft", moments)):
        (encoding, more), (cached, less) = planned(stage), planned(stage, "data.cache=somewhere")
        assert encoding - cached == pytest.approx(saved, rel=1e-6)
        assert less < more


def test_the_page_of_sampling_says_what_fits(without_compiler, capsys):
    """128 GiB of an H200 have room for two images, the largest part of eight that fits."""
    options, dtype = ImageOptions(), jnp.dtype("bfloat16")
    assert sampling.tell("nowhere", "1xH200", MeshConfig(), options, 2, dtype)
    shown = capsys.readouterr().out
    assert "latents of 2 images\n  memory of a chip 100.00 GiB of 128.62 GiB: fits" in shown
    assert "pixels of 2 images" in shown and "NOT" not in shown
    # Latents and pixels take 4e15 operations each, at 790e12 a second.
    assert "An image: 5063.3 ms at best, 0.2 a second." in shown
    assert not sampling.tell("nowhere", "1xH200", MeshConfig(), options, 8, dtype)
    assert tried(capsys) == ["  --batch-size 4: 200.00 GiB", "  --batch-size 2: 100.00 GiB"]
    assert not sampling.tell("nowhere", "1xA100-40G", MeshConfig(), options, 2, dtype)
    assert tried(capsys) == ["  --batch-size 1: 50.00 GiB", NONE_FITS]


def test_a_batch_of_one_image_a_chip_is_helped_by_splitting_parameters():
    mesh = make_mesh(MeshConfig(4, 1, 1), jax.devices()[:1] * 4)
    found = [(change, dict(mesh.shape), rows) for change, mesh, rows in sampling.lighter(mesh, 8)]
    before, after = ({"data": d, "fsdp": f, "tensor": 1} for d, f in ((4, 1), (1, 4)))
    assert found == [("--batch-size 4", before, 4), ("--batch-size 4 --mesh fsdp=4", after, 4)]


def test_memory_by_kind_adds_up(without_compiler):
    config = load(REPO / "configs" / "pretrain.py", ["optimizer.accumulate=4"])
    plan = report.make_plan(config, "1xH200", small_step)
    found = report.facts(plan)
    assert json.loads(json.dumps(found)) == found
    memory = found["memory"]
    assert sum(memory.values()) == 75 * 2**30
    # Two moments, one average and one gradient of the same float32 numbers; three counters.
    assert memory["average"] == memory["gradients"] == memory["parameters"]
    assert 0 <= memory["moments"] - 2 * memory["parameters"] < 64


# --- Real compiles --------------------------------------------------------------------------------


@pytest.fixture
def as_trained():
    """Products as a run has them; conftest's exact ones are none for kernels in bfloat16."""
    with jax.default_matmul_precision("default"):
        yield


def llama_step(name: str, layers: int, chips: MeshConfig, rows: int, length: int):
    """The gradient of a small Llama on a topology: (compiled, closed form of a chip)."""
    place = topology.parse(name)
    mesh = make_mesh(chips, topology.devices(place))
    config = LlamaConfig(2048, 256, 768, layers, 2, 2)
    model = Llama(config, Precision(compute=jnp.bfloat16), remat="full")
    lies = abstract.placed_rows(mesh)

    def init():
        ids = jnp.zeros((1, 128), jnp.int32)
        return model.init(jax.random.key(0), jnp.zeros((1, 128, 256)), ids, ids)["params"]

    def loss(params, x, ids):
        variables = {"params": params["janusflow"]["language_model"]}
        return jnp.sum(model.apply(variables, x, ids, ids).hidden.astype(jnp.float32) ** 2)

    params = placed({"janusflow": {"language_model": jax.eval_shape(init)}}, mesh)
    x = jax.ShapeDtypeStruct((rows, length, 256), jnp.bfloat16, sharding=lies)
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=lies)
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss), out_shardings=shardings(params, mesh))
        compiled = compiling.compile_for(step.lower(params, x, ids), place, 0)
    # Forward, again, and twice backward, but for the product that ends a layer.
    products = rows * length * (4 * flops.token_flops(config) - layers * 2 * 256 * 768)
    blocks = length // 512
    pairs = rows * 512**2 * blocks * (blocks + 1) / 2
    return compiled, (products + 11 * pairs * flops.pair_flops(config) / 2) / mesh.size


def test_a_step_compiled_for_tpus(as_trained):
    """Its operations to 1e-6 of the closed form; no [L, L] scores, no gather of all layers."""
    pytest.importorskip("libtpu")
    length, layers = 1024, 3
    compiled, closed = llama_step("v5e:2x2", layers, MeshConfig(1, 4, 1), 8, length)
    assert compiled.figures.flops == pytest.approx(closed, rel=1e-6)
    assert not programs.dense_masks(compiled.text, length)
    assert 0 < programs.largest_gather(compiled.text) <= 256 * 768
    # The weights of a layer, from three other chips, when it is computed and when it is again.
    weights = layers * (4 * 256**2 + 3 * 256 * 768) * 2
    assert compiled.figures.received >= 2 * 0.75 * weights
    assert compiled.figures.cycles > 0 and compiled.needed > 0


@pytest.mark.parametrize("name", ["v5e-64", "v6e-64", "v5p-128"])
def test_meshes_may_split_a_side_of_a_slice(name):
    """16 of 8 x 8 chips, where jax.make_mesh takes only whole sides."""
    pytest.importorskip("libtpu")
    chips = topology.devices(topology.parse(name))
    found = make_mesh(MeshConfig(4, 16, 1), chips)
    assert dict(found.shape) == {"data": 4, "fsdp": 16, "tensor": 1}
    assert set(found.devices.flat) == set(chips)


@pytest.mark.slow
def test_a_chip_does_the_same_among_more_of_them(as_trained):
    """2 rows a chip on 16 and on 256: operations to 1e-6, and no more bytes to and from memory.

    What it receives is no measure here: a chip has one column of these small weights.
    """
    pytest.importorskip("libtpu")
    few, closed = llama_step("v5e-16", 2, MeshConfig(1, 16, 1), 32, 1024)
    many, same = llama_step("v5e-256", 2, MeshConfig(1, 256, 1), 512, 1024)
    assert few.figures.flops == pytest.approx(closed, rel=1e-6) and same == closed
    assert many.figures.flops == pytest.approx(closed, rel=1e-6)
    assert many.figures.memory <= 1.05 * few.figures.memory


def check_plan(found: training.Plan) -> None:
    """What every plan of the real step must show (issue 4)."""
    assert found.fits
    language = abstract.RELEASED.language
    rows = found.mesh["data"] * found.mesh["fsdp"] * found.config.optimizer.accumulate
    for step in found.phases:
        text, figures = step.compiled.text, step.compiled.figures
        counted = figures.flops * found.topology.count
        assert counted == pytest.approx(step.program_flops, rel=0.05)
        length = found.config.data.max_seq_len
        assert not programs.dense_masks(text, length)
        words = language.vocab_size // found.mesh["tensor"]
        assert not programs.full_logits(text, step.rows[0] // rows * length, words)
        assert programs.largest_gather(text) <= language.vocab_size * language.hidden_size
        # Weights are gathered whole, not sent around in pieces (sharding.compiler_options).
        pieces = figures.collectives.get("collective-permute")
        assert pieces is None or pieces.count < language.num_hidden_layers


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in HARDWARE if name.startswith("v")])
def test_the_step_of_stage_2_fits(as_trained, name):
    """At full size, minutes of CPU each."""
    pytest.importorskip("libtpu")
    config = load(REPO / "configs" / "pretrain.py", [f"hardware={name}"])
    check_plan(training.make_plan(config, name, train.abstract_step))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in HARDWARE if not name.startswith("v")])
def test_the_step_of_stage_2_fits_gpus(as_trained, name):
    pytest.importorskip("jax_cuda12_plugin")
    config = load(REPO / "configs" / "pretrain.py", [f"hardware={name}"])
    check_plan(training.make_plan(config, name, train.abstract_step))
