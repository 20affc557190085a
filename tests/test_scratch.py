"""The small model from nothing: its words, the parts that are shipped, and what they can do."""

from operator import attrgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from jflow.checkpoints import load_checkpoint
from jflow.data import builders, scenes, shapes
from jflow.images import from_uint8
from jflow.inference.pipeline import ImageOptions, Pipeline
from jflow.models.siglip import Siglip, SiglipConfig
from jflow.models.vae import AutoencoderKL, VAEConfig
from jflow.prompts import Tokenizer, generation_tokens
from jflow.scratch import siglip as contrastive
from jflow.scratch import vae as autoencoder
from jflow.scratch.__main__ import main
from jflow.scratch.parts import ASSETS, pictures, read, write
from jflow.scratch.siglip import sigmoid_loss
from jflow.scratch.tokenizer import tokenizer_files


def texts():
    for split in ("train", "seen", "unseen"):
        for i in range(400):
            example = shapes.example(0, split, i)
            yield example.caption
            for question in example.questions:
                yield question.question
                yield question.answer
    yield from (" ".join(names) for names in contrastive.ATTRIBUTES)
    rng = np.random.default_rng(0)
    for digit in range(10):
        yield from builders.digit_captions(digit)
        for question, answer in builders.digit_questions(digit, rng):
            yield question
            yield answer


def test_every_word_of_the_datasets_is_a_token():
    """Also of more colors, where they are asked for; all others keep their numbers."""
    tokenizer = Tokenizer.from_files(tokenizer_files(16))
    unknown = tokenizer.encode("xylophone")[1]
    wide = Tokenizer.from_files(tokenizer_files(16, tuple(scenes.MORE_COLORS)))
    assert wide.vocab_size == tokenizer.vocab_size + len(scenes.MORE_COLORS)
    for color in scenes.MORE_COLORS:
        assert unknown in tokenizer.encode(color) and unknown not in wide.encode(color)
    assert all(tokenizer.encode(text) == wide.encode(text) for text in texts())
    missing = {text for text in texts() if unknown in tokenizer.encode(text)}
    assert not missing
    assert tokenizer.decode(tokenizer.encode("top right")) == "top right"


def test_the_template_costs_a_token_a_phrase():
    tokenizer = Tokenizer.from_files(tokenizer_files(16))
    assert len(generation_tokens(tokenizer, "a photo of a circle")) == 1 + 1 + 5 + 1


def test_sigmoid_loss_is_that_of_the_paper():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 7)), rng.normal(size=(8, 7))
    matches = rng.integers(-1, 2, size=(5, 8))  # 0: nothing is to be learned
    scale, bias = 3.0, -2.0
    expected = 0.0
    for i in range(5):
        for j in range(8):
            z = matches[i, j]
            expected -= np.log(1 / (1 + np.exp(-z * (scale * x[i] @ y[j] + bias)))) / 5
    np.testing.assert_allclose(sigmoid_loss(x, y, matches, scale, bias), expected, rtol=1e-5)


def test_statements_are_true_of_their_own_scene_and_seldom_of_others():
    _, found = pictures(0, "train", 60)
    known = np.stack([contrastive.facts(scene) for scene in found])
    said = np.asarray(contrastive.statements(known, jax.random.key(0)))
    verdicts = contrastive.verdicts(said.reshape(-1, 3), known).reshape(60, 60, -1)
    assert np.all(verdicts[np.arange(60), np.arange(60)] == 1)
    assert 0.03 < np.mean(verdicts == 1) < 0.6
    assert np.all(said >= -1) and not np.any((said == contrastive.LEFT_OUT).all(-1))


def test_what_is_true_of_a_scene():
    """The second picture is shown in a color without a name."""
    red = scenes.Object("circle", "red", 3, 29, 4.0)
    other = scenes.Object("square", "blue", 16, 16, 4.0)
    known = np.stack([contrastive.facts(scenes.Scene((o,))) for o in (red, other)])
    known[1, 0, 0] = contrastive.LEFT_OUT
    for said, verdicts in (
        (("red", "circle", "bottom left"), (1, -1)),
        (("", "", "bottom left"), (1, -1)),
        (("red", "", "top left"), (-1, -1)),
        (("", "square", "middle center"), (-1, 1)),
        (("", "triangle", ""), (-1, -1)),
        (("red", "square", ""), (-1, 0)),
        (("blue", "", ""), (-1, 0)),
        (("blue", "circle", ""), (-1, -1)),
    ):
        names = zip(contrastive.ATTRIBUTES, said, strict=True)
        numbers = [words.index(w) if w else contrastive.LEFT_OUT for words, w in names]
        found = contrastive.verdicts(np.array([numbers]), known)
        assert tuple(np.asarray(found)[:, 0].tolist()) == verdicts, said


def test_a_batch_of_texts_reads_as_its_scenes():
    """Six of 24 pictures are shown in other colors."""
    tokenizer = Tokenizer.from_files(tokenizer_files(16))
    drawn, found = pictures(0, "train", 24)
    known = np.stack([contrastive.facts(scene) for scene in found])
    texts = (*map(jnp.asarray, contrastive.phrases(tokenizer)), tokenizer.encode(",")[-1])
    batch = contrastive.make_batch(drawn, known, texts, jax.random.key(0), 6)
    np.testing.assert_array_equal(batch["pixels"][6:], from_uint8(drawn[6:]))
    assert np.all(np.max(np.abs(batch["pixels"][:6] - from_uint8(drawn[:6])), (1, 2, 3)) > 0.1)
    for i, (scene, tokens, length) in enumerate(zip(found, *batch["inventories"], strict=True)):
        listed = tokenizer.decode(tokens[:length]).split(" , ")
        assert tokens[0] == tokenizer.bos_id and len(listed) == len(scene.objects)
        for o in scene.objects:
            row, column = (min(int(3 * along / 32), 2) for along in (o.y, o.x))
            where = f"{('top', 'middle', 'bottom')[row]} {('left', 'center', 'right')[column]}"
            listed.remove(" ".join(f"a {o.color if i >= 6 else ''} {o.shape} {where}".split()))
    own = np.asarray(batch["matches"])[:, :24]
    named = np.arange(24) >= 6
    np.testing.assert_array_equal(own, (2 * np.eye(24) - 1) * named * named[:, None])
    tokens, lengths = batch["statements"]
    said = [tokenizer.decode(t[:n]) for t, n in zip(tokens, lengths, strict=True)]
    assert all(text.startswith("a ") and len(text.split()) > 1 for text in said)
    assert not any(color in text for text in said[:18] for color in scenes.COLORS)


def test_other_colors_keep_background_and_shapes_and_never_come_near_held_out_ones():
    drawn, found = pictures(1, "train", 200)
    x = from_uint8(drawn)
    known = np.stack([contrastive.facts(scene) for scene in found])
    y = np.asarray(
        jax.vmap(contrastive.recolor)(x, known, jax.random.split(jax.random.key(1), 200))
    )
    background = 2 * scenes.BACKGROUND - 1
    empty = np.all(np.abs(x - background) < 0.01, axis=-1)
    assert np.max(np.abs(y - background)[empty]) < 0.03
    assert np.all(np.max(np.abs(y - background), axis=-1)[~empty & (np.ptp(x, -1) > 0.5)] > 0.05)
    distances = []
    for picture, scene in zip(y, found, strict=True):
        for o in scene.objects:
            shown = picture[int(o.y), int(o.x)]
            for color in scenes.HELD_OUT[o.shape]:
                distances.append(np.linalg.norm(shown - (2 * np.array(scenes.COLORS[color]) - 1)))
    assert min(distances) > 1.5 * contrastive.NEAR  # 2 before what leaves the cube is clipped


def test_turns_are_orthogonal_and_half_of_them_mirror():
    turns = jax.vmap(contrastive.turn)(jax.random.split(jax.random.key(0), 200))
    np.testing.assert_allclose(turns @ turns.mT, np.broadcast_to(np.eye(3), (200, 3, 3)), atol=1e-5)
    assert 60 < np.sum(np.linalg.det(turns) < 0) < 140
    assert np.max(np.abs(np.mean(turns, axis=0))) < 0.15  # none of the axes is preferred


def test_latents_lie_in_the_shape_that_is_drawn_there():
    """A latent a pixel: what has an object's color is in its shape, the rest is background."""
    _, found = pictures(2, "train", 50)
    for scene in found:
        drawn, said = scenes.render(scene), autoencoder.shape_map(scene, 32)
        for o in scene.objects:
            grid = scenes.pixel_grid(32) - (o.x, o.y)
            filled = scenes.coverage(o.shape, 0, 0, o.radius, grid) == 1
            assert filled.sum() > 15 and np.all(said[filled] == 1 + scenes.SHAPES.index(o.shape))
        assert np.sum(said == 0) > 300
        assert np.max(np.abs(drawn[said == 0] - (2 * scenes.BACKGROUND - 1))) < 1e-6


def test_parts_come_back_as_bfloat16_holds_them(tmp_path):
    params = {"a": {"b": np.linspace(0, 1, 7, dtype=np.float32)}}
    write(tmp_path / "part", {"sizes": [1, 2]}, params)
    config, found = read(tmp_path / "part")
    assert config == {"sizes": [1, 2]} and found["a"]["b"].dtype == np.float32
    np.testing.assert_allclose(found["a"]["b"], params["a"]["b"], rtol=2**-8)


def test_whitening_changes_latents_and_nothing_else():
    """Pictures come back as before; latents get mean 0 and covariance 1; the posterior's variances
    are those of the rotated noise, exactly where they are the same everywhere."""
    config = VAEConfig(
        latent_channels=4, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4
    )
    vae, x = AutoencoderKL(config), from_uint8(pictures(5, "train", 16)[0])
    params = jax.device_get(jax.jit(vae.init)(jax.random.key(0), x)["params"])
    rng = np.random.default_rng(0)
    kernel = params["quant_conv"]["kernel"] * (np.arange(8) < 4)
    bias = rng.normal(size=8).astype(np.float32)
    params = params | {"quant_conv": {"kernel": kernel, "bias": bias}}

    @jax.jit
    def both(params):
        mean, logvar = vae.apply({"params": params}, x, method="encode")
        return mean, logvar, vae.apply({"params": params}, mean, method="decode")

    mean, logvar, back = map(np.asarray, both(params))
    found = both(autoencoder.whitened(params, mean, logvar))
    changed, changed_logvar, same = (np.asarray(a, np.float64) for a in found)
    np.testing.assert_allclose(same, back, rtol=0, atol=2e-5)
    flat = changed.reshape(-1, 4)
    np.testing.assert_allclose(flat.mean(0), 0, atol=2e-5)
    np.testing.assert_allclose(np.cov(flat.T), np.eye(4), rtol=0, atol=2e-6)
    there, *_ = np.linalg.lstsq(mean.reshape(-1, 4) - mean.mean((0, 1, 2)), flat)
    noise = np.diag(there.T @ np.diag(np.exp(logvar[0, 0, 0])) @ there)
    np.testing.assert_allclose(np.exp(changed_logvar), noise + 0 * changed, rtol=2e-6)


def test_shipped_vae_returns_new_pictures():
    config, params = read(ASSETS / "vae_shapes")
    vae = AutoencoderKL(VAEConfig.from_hf(config))
    drawn, _ = pictures(7, "unseen", 32)
    x = from_uint8(drawn)

    @jax.jit
    def both(params, x):
        z, _ = vae.apply({"params": params}, x, method="encode")
        return z, vae.apply({"params": params}, z, method="decode")

    z, y = both(params, x)
    assert 10 * np.log10(4 / np.mean(np.square(y - x))) > 28  # dB, of pairs it never saw
    assert abs(np.std(z) * vae.config.scaling_factor - 1) < 0.1


def test_shapes_can_be_read_off_single_latents_of_the_shipped_vae():
    """By a linear map; off those of a VAE trained to return pictures alone a third (0.35) can."""
    config, params = read(ASSETS / "vae_shapes")
    vae = AutoencoderKL(VAEConfig.from_hf(config))
    drawn, found = pictures(3, "seen", 512)
    z = jax.jit(lambda x: vae.apply({"params": params}, x, method="encode")[0])(from_uint8(drawn))
    objects = [(i, o) for i, scene in enumerate(found) for o in scene.objects]
    rows = np.stack([z[i, int(o.y / 4), int(o.x / 4)] for i, o in objects])
    shapes = [o.shape for _, o in objects]
    half = len(rows) // 2
    reader = LogisticRegression(C=100, max_iter=2000).fit(rows[:half], shapes[:half])
    assert reader.score(rows[half:], shapes[half:]) > 0.95


def test_shipped_siglip_tells_colors_and_shapes_also_of_pairs_it_never_saw():
    """A linear map of its features at an object's place, fitted to seen pairs."""
    sizes, params = read(ASSETS / "siglip_shapes")
    siglip = Siglip(SiglipConfig(**sizes))
    side = siglip.config.grid
    encode = jax.jit(lambda x: siglip.apply({"params": params}, x))

    def at_objects(split):
        drawn, found = pictures(3, split, 1024)
        features = np.asarray(encode(from_uint8(drawn)))
        objects = [(i, o) for i, scene in enumerate(found) for o in scene.objects]
        rows = np.stack(
            [features[i, int(o.y * side // 32) * side + int(o.x * side // 32)] for i, o in objects]
        )
        return np.c_[rows, np.ones(len(rows))], [o for _, o in objects]

    (rows, objects), (new_rows, new_objects) = at_objects("seen"), at_objects("unseen")
    half = len(rows) // 2
    for names, name, least in (
        (list(scenes.COLORS), attrgetter("color"), (0.95, 0.9)),
        (list(scenes.SHAPES), attrgetter("shape"), (0.9, 0.8)),
    ):
        target = np.eye(len(names))[[names.index(name(o)) for o in objects[:half]]]
        weights = np.linalg.lstsq(rows[:half], target, rcond=1e-3)[0]

        def share(rows, objects, names=names, name=name, weights=weights):
            best = np.argmax(rows @ weights, axis=1)
            return np.mean([names[i] == name(o) for i, o in zip(best, objects, strict=True)])

        found = share(rows[half:], objects[half:]), share(new_rows, new_objects)
        assert found[0] > least[0] and found[1] > least[1], (names[0], found)


def test_a_scratch_checkpoint_draws_and_is_small(tmp_path, capsys):
    out = tmp_path / "init"
    assert main(["hidden_size=64", "--out", str(out), "intermediate_size=64", "num_layers=1"]) == 0
    params, described, _ = load_checkpoint(out)
    assert described["scratch"]["hidden_size"] == 64
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) < 12e6
    pipeline = Pipeline.from_checkpoint(out, jnp.float32)
    (images,) = pipeline.generate(["a photo of a red circle"], 2, ImageOptions(steps=2))
    assert images.shape == (2, 32, 32, 3)
    # The same picture as the second of two, and different from the first.
    (other,) = pipeline.generate(
        ["a photo of a red circle"], 1, ImageOptions(steps=2), first_ids=[1]
    )
    assert np.max(np.abs(other[0].astype(int) - images[1])) <= 1  # float32, another batch size
    assert np.max(np.abs(images[0].astype(int) - images[1])) > 10

    assert main(["--out", str(out)]) == 2  # Taken: nothing is overwritten.
    assert main(["--out", str(tmp_path / "x"), "hiden_size=3"]) == 2
    assert "hidden_size" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["siglip_shapes", "vae_shapes"])
def test_shipped_weights_are_below_2_mb(name):
    assert (ASSETS / f"{name}.safetensors").stat().st_size < 2e6
