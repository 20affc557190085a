"""A Llama and a SigLIP of transformers, saved and joined, compute in our model what they did."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from einops import rearrange
from safetensors.numpy import load_file, save_file

import train
from jflow import checkpoints
from jflow.convert import parts
from jflow.convert.__main__ import CONFIG, SIGLIP, main
from jflow.inference.pipeline import Pipeline
from jflow.models.janusflow import JanusFlow, JanusFlowConfig
from jflow.models.siglip import Siglip
from tests.goldens import GOLDEN, REPO
from tests.test_convert_engine import equal_bits, flatten

pytestmark = pytest.mark.usefixtures("quick_compiling")
VAE = GOLDEN / "vae_tiny"
FILE = "model.safetensors"


def randomise(model: torch.nn.Module) -> None:
    """No parameter at its initialisation's zero or one."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn_like(p)
            if p.ndim == 1:
                p.copy_(1 + 0.1 * noise if "norm" in name and "bias" not in name else 0.1 * noise)
            else:
                p.copy_(noise / np.prod(p.shape[1:]) ** 0.5)


def save_language(folder, vocab_size: int, dtype=torch.float32) -> transformers.LlamaForCausalLM:
    """A LlamaForCausalLM with the tokenizer of the goldens, all that is JanusFlow's cut off it."""
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=44, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager",
        max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    randomise(model)
    model.to(dtype).save_pretrained(folder)
    tokenizer = json.loads((GOLDEN / "tiny" / "tokenizer.json").read_text("utf-8"))
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["id"] < 500]
    vocab = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: i for token, i in vocab.items() if i < 500}
    text = json.dumps(tokenizer, ensure_ascii=False).replace(parts.PAD, "<|unused3|>")
    (folder / "tokenizer.json").write_text(text, "utf-8")
    bos, eos = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    ours = {"add_bos_token": True, "bos_token": bos, "eos_token": eos, "pad_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(ours), "utf-8")
    return model


def save_siglip(folder, whole: bool) -> torch.nn.Module:
    """A SiglipModel, or its vision tower alone; returns the latter."""
    fields = dict(
        hidden_size=24, intermediate_size=60, num_hidden_layers=2, num_attention_heads=3,
        image_size=64, patch_size=16, hidden_act="gelu", attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(1)
    if whole:
        words = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=9)
        model = transformers.SiglipModel(
            transformers.SiglipConfig(
                text_config=words | {"num_attention_heads": 1}, vision_config=fields
            )
        )
    else:
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**fields))
    model.eval()
    randomise(model)
    model.save_pretrained(folder)
    return model.vision_model if whole else model


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders and models of the parts, and of a second pair of them."""
    folder = tmp_path_factory.mktemp("parts")
    llama = save_language(folder / "llm", 502)
    vision = save_siglip(folder / "siglip", whole=True)
    other_llama = save_language(folder / "llm16", 520, torch.bfloat16)
    other_vision = save_siglip(folder / "tower", whole=False)
    return folder, (llama, vision), (other_llama, other_vision)


def arguments(folder, out, **replaced) -> list[str]:
    given = {"language": folder / "llm", "siglip": folder / "siglip", "vae": VAE, "out": out}
    return ["from-parts", *(str(x) for k, v in (given | replaced).items() for x in (f"--{k}", v))]


@pytest.fixture(scope="module")
def joined(sources, tmp_path_factory):
    """A float32 language model and a whole SiglipModel."""
    out = tmp_path_factory.mktemp("joined") / "ckpt"
    assert main(arguments(sources[0], out)) == 0
    return out


@pytest.fixture(scope="module")
def other(sources, tmp_path_factory):
    """A bfloat16 language model with room for all tokens, and SigLIP's vision tower alone."""
    folder, out = sources[0], tmp_path_factory.mktemp("other") / "ckpt"
    given = {"language": folder / "llm16", "siglip": folder / "tower"}
    assert main(arguments(folder, out, **given)) == 0
    return out


@pytest.fixture(scope="module")
def configured(sources, joined, tmp_path_factory):
    """The first parts in a JanusFlow of other generation layers and more words; its config too."""
    folder = tmp_path_factory.mktemp("configured")
    _, _, files = load(joined)
    config = json.loads(files[CONFIG])
    config["language_config"]["vocab_size"] = 600
    for part in ("enc", "dec"):
        config[f"vision_gen_{part}_config"]["params"] |= {
            "block_out_channels": [16],
            "layers_in_middle": 1,
        }
    config["vision_gen_dec_config"]["params"]["in_channels"] = 16
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / SIGLIP).write_text(files[SIGLIP])
    assert main(arguments(sources[0], folder / "ckpt", config=folder / CONFIG)) == 0
    return folder / "ckpt", config


def load(ckpt):
    params, config, files = checkpoints.load_checkpoint(ckpt)
    model = JanusFlow(JanusFlowConfig.from_hf(config["janusflow"], config["siglip"]))
    return model, params, files


def test_the_language_model_computes_what_it_did(sources, joined):
    """Logits of the tokens that it knew, within float32 rounding."""
    model, params, _ = load(joined)
    tokens = np.random.default_rng(0).integers(0, 502, (2, 17))
    with torch.no_grad():
        want = sources[1][0](torch.tensor(tokens)).logits.numpy()
    variables = {"params": params["janusflow"]}
    x = model.apply(variables, tokens, method="embed_text")
    positions = np.tile(np.arange(17), (2, 1))
    hidden = model.apply(variables, x, positions, np.ones_like(tokens), method="language").hidden
    logits = model.apply(variables, hidden, method="logits")
    assert logits.shape[-1] > 502
    np.testing.assert_allclose(logits[..., :502], want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("which", [1, 2])
def test_siglip_computes_what_it_did(sources, joined, other, which):
    """Features and pooled head, from a SiglipModel and from a SiglipVisionModel."""
    vision = sources[which][1]
    model, params, _ = load((joined, other)[which - 1])
    pixels = np.random.default_rng(1).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        want = vision(torch.tensor(rearrange(pixels, "b h w c -> b c h w")))
    variables = {"params": params["janusflow"][parts.SIGLIP]}
    siglip = Siglip(model.config.siglip)
    features = siglip.apply(variables, pixels)
    np.testing.assert_allclose(features, want.last_hidden_state.numpy(), rtol=0, atol=2e-5)
    pooled = siglip.apply(variables, features, method="pool")
    np.testing.assert_allclose(pooled, want.pooler_output.numpy(), rtol=0, atol=2e-5)


def test_new_words_are_the_mean_of_the_old(sources, joined):
    """The old rows keep every bit; a new word's logit is the mean of the others'."""
    _, params, _ = load(joined)
    language = params["janusflow"][parts.LANGUAGE]
    table = sources[1][0].model.embed_tokens.weight.detach().numpy()
    head = sources[1][0].lm_head.weight.detach().numpy().T
    rows, columns = language["embed_tokens"], language["lm_head"]["kernel"]
    np.testing.assert_array_equal(rows[:502], table)
    np.testing.assert_array_equal(columns[:, :502], head)
    np.testing.assert_allclose(rows[502:], np.tile(table.mean(0), (len(rows) - 502, 1)), atol=1e-7)
    hidden = np.random.default_rng(2).standard_normal((4, 32)).astype(np.float32)
    logits = hidden @ np.asarray(columns)
    np.testing.assert_allclose(logits[:, 502:].T, [logits[:, :502].mean(1)] * 4, atol=1e-5)


def test_the_special_tokens_are_appended_and_found(sources, joined):
    _, params, files = load(joined)
    pipeline = Pipeline.from_checkpoint(joined)
    tokenizer = pipeline.tokenizer
    # It had 500 words: five tokens follow, then the <unk> that transformers 4.46 adds.
    names = ("pad", "image", "image_gen", "image_start", "image_end")
    assert [getattr(tokenizer, f"{name}_id") for name in names] == [500, 501, 502, 503, 504]
    assert len(params["janusflow"][parts.LANGUAGE]["embed_tokens"]) == tokenizer.vocab_size == 506
    assert tokenizer.encode("a<begin_of_image>")[-1] == 503
    assert tokenizer.num_image_tokens == 16 and pipeline.processor.image_size == 64
    before = json.loads((sources[0] / "llm" / "tokenizer.json").read_text("utf-8"))
    after = json.loads(files["tokenizer.json"])
    assert after["model"]["vocab"] == before["model"]["vocab"]


def test_the_rest_is_new_and_always_the_same(joined, other):
    (_, first, _), (_, second, _) = load(joined), load(other)
    old = (parts.LANGUAGE, parts.SIGLIP)
    first, second = ({n: p for n, p in tree["janusflow"].items() if n not in old}
                     for tree in (first, second))  # fmt: skip
    equal_bits(dict(flatten(first)), dict(flatten(second)))
    kernel = np.asarray(first["vision_und_enc_aligner"]["kernel"])
    # N(0, 1 / fan_in): 24 x 32 draws.
    assert abs(kernel.std() * 24**0.5 - 1) < 0.1
    assert not first["beg_of_und_embed"].any()


def test_parts_keep_their_bits_also_in_the_released_format(sources, other, tmp_path):
    model, hf = sources[2][0], tmp_path / "hf"
    assert main(["to-hf", str(other), "--out", str(hf)]) == 0
    got = load_file(hf / FILE)
    for name, p in model.state_dict().items():
        array = got[f"language_model.{name}"]
        assert str(array.dtype) == "bfloat16"
        np.testing.assert_array_equal(array.astype(np.float32), p.float().numpy())
    assert len(got["language_model.lm_head.weight"]) == 520  # it has room for all tokens
    tower = load_file(sources[0] / "tower" / FILE)
    qkv = [tower[f"encoder.layers.1.self_attn.{n}_proj.weight"] for n in "qkv"]
    blocks = "vision_und_enc_model.vision_tower.blocks.1.attn.qkv.weight"
    np.testing.assert_array_equal(got[blocks], np.concatenate(qkv))
    assert main(["from-hf", str(hf), "--vae", str(hf / "vae"), "--out", str(tmp_path / "b")]) == 0


def test_another_janusflow_around_the_parts(sources, configured, tmp_path, capsys):
    """--config: what it says is built; what does not fit is listed."""
    ckpt, config = configured
    _, params, _ = load(ckpt)
    assert params["janusflow"][parts.LANGUAGE]["embed_tokens"].shape == (600, 32)
    assert params["janusflow"]["vision_gen_enc_aligner"]["kernel"].shape == (16, 32)
    file = tmp_path / CONFIG
    shutil.copy(ckpt.parent / SIGLIP, tmp_path)
    for change, message in (
        ({"rope_theta": 5.0}, "language_config.rope_theta is 5.0, the part's is 10000.0"),
        ({"vocab_size": 505}, "vocabulary has 505 tokens, but the language model has 502"),
    ):
        wrong = config | {"language_config": config["language_config"] | change}
        file.write_text(json.dumps(wrong))
        assert main(arguments(sources[0], tmp_path / "no", config=file)) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "no").exists()


def broken_parts():
    def tensors(folder, part, remove=None, **add):
        arrays = load_file(folder / part / FILE)
        arrays.pop(remove, None)
        save_file(arrays | add, folder / part / FILE)

    def edited(folder, part, **fields):
        file = folder / part / CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    def without_key(folder):
        stray = {"stray": np.zeros(1, np.float32)}
        tensors(folder, "llm", "model.layers.1.mlp.up_proj.weight", **stray)

    def without_head(folder):
        tensors(folder, "siglip", "vision_model.head.probe")

    def with_more(folder):
        tensors(folder, "siglip", **{"vision_model.other": np.zeros(1, np.float32)})

    def swapped(folder):
        shutil.rmtree(folder / "siglip")
        shutil.copytree(folder / "llm", folder / "siglip")

    def tied(folder):
        edited(folder, "llm", tie_word_embeddings=True)

    def activation(folder):
        edited(folder, "siglip", vision_config={"hidden_act": "relu"})

    def tokenizer_of_another(folder):
        file = folder / "llm" / "tokenizer.json"
        file.write_text(file.read_text("utf-8").replace("end▁of▁sentence", "x"), "utf-8")

    def without_tokenizer(folder):
        (folder / "llm" / "tokenizer.json").unlink()

    return {
        without_key: ("missing: model.layers.1.mlp.up_proj.weight", "unexpected: stray"),
        without_head: ("missing: head.probe",),
        with_more: ("unexpected: other",),
        swapped: ("is that of a 'llama', not of a SigLIP",),
        tied: ("tie_word_embeddings",),
        activation: ("hidden_act = 'relu' is not supported",),
        tokenizer_of_another: ("has no <｜end▁of▁sentence｜>",),
        without_tokenizer: ("no tokenizer.json",),
    }


@pytest.mark.parametrize(
    "damage, messages",
    [pytest.param(*case, id=case[0].__name__) for case in broken_parts().items()],
)
def test_broken_parts_leave_nothing(sources, tmp_path, capsys, damage, messages):
    folder = shutil.copytree(sources[0], tmp_path / "parts")
    damage(folder)
    assert main(arguments(folder, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert all(message in error for message in messages) and "Traceback" not in error, error
    assert [file.name for file in tmp_path.iterdir()] == ["parts"]


def test_stage_1_begins_from_it(configured, tmp_path):
    """A step of configs/adaptation.py on a photograph: the parts stay, the rest moves."""
    ckpt, run, photos = configured[0], tmp_path / "run", tmp_path / "photos.jsonl"
    photos.write_text(json.dumps({"image": str(REPO / "docs" / "cat.jpg"), "caption": "a cat"}))
    small = ["steps=1", f"init_from={ckpt}", "dtype=float32", "remat=none",
             "ema.every=1", "ema.decay=0", "optimizer.warmup_steps=1", "repa_hidden_size=8",
             "objective.repa_layer=1", "data.batch_rows=2",
             "data.max_seq_len=128", "data.images_per_row=1", "data.crops_per_row=1",
             *(f"data.{task}.{name}=1" for task in ("understanding", "generation")
               for name in ("samples", "rows")),
             *(f"data.sources.{i}.path={photos}" for i in range(2))]  # fmt: skip
    config = str(REPO / "configs" / "adaptation.py")
    assert train.main(["--config", config, "--run", str(run), *small]) == 0
    before, after = (dict(flatten(load(path)[1]["janusflow"])) for path in (ckpt, run))
    still = {path for path in before if np.array_equal(before[path], after[path])}
    assert still == {path for path in before if path.startswith((parts.LANGUAGE, parts.SIGLIP))}
    assert main(["to-hf", str(run), "--out", str(tmp_path / "hf")]) == 0
