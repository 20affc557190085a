"""Training from cached moments and features equals training from the crops that were encoded."""

import dataclasses
import itertools
import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jflow import checkpoints
from jflow.batch import Batch
from jflow.config import load
from jflow.data import cache, encode
from jflow.data.__main__ import main
from jflow.data.examples import cached_crop
from jflow.data.pipeline import checkpoint_loader
from jflow.images import center_crop_square
from jflow.models.janusflow import JanusFlow, JanusFlowConfig
from jflow.models.vae import AutoencoderKL, VAEConfig
from jflow.training import objectives
from jflow.training.lora import FACTORS, LoraConfig
from jflow.training.objectives import ObjectiveConfig
from jflow.training.optimizer import SFT
from tests.test_data_check import BROKEN_IMAGE, GOOD, MISSING_CAPTION, write
from tests.test_data_sources import png, write_lines
from tests.tiny_training import FAST, image_row, modules, params, stack

RECORDS = [GOOD[0], BROKEN_IMAGE, *GOOD[1:], MISSING_CAPTION]


@pytest.fixture(scope="module")
def run(tiny_ckpt, tmp_path_factory):
    """A config that reads its cache, and the checkpoint's parameters and configs."""
    folder = tmp_path_factory.mktemp("cached")
    file, *_ = write(folder, tiny_ckpt, RECORDS)
    cache = folder / "cache"
    assert main(["cache", file, f"--out={cache}", "--batch=4"]) == 0
    config = load(folder / "config.py", [f"data.cache={cache}", "data.max_broken_share=1"])
    params, models, files = checkpoints.load_checkpoint(tiny_ckpt)
    return config, params, models, files


def open_loader(run, **changes):
    config, params, models, files = run
    config = dataclasses.replace(config, **changes)
    cache = encode.open_cache(config, params, models)
    return checkpoint_loader(config.data, models, files, cache)


def same_record(loader, position):
    stream = loader.streams["generation"]
    which, index = stream.record(position)
    return stream.sources[which][index], index


def test_batches_hold_what_the_networks_make_of_the_cached_crops(run):
    """Encoded here once more, one by one; everything but the pictures as without a cache."""
    config, params, models, files = run
    vae = AutoencoderKL(VAEConfig.from_hf(models["vae"]), dtype=jnp.float32)
    model = JanusFlow(JanusFlowConfig.from_hf(models["janusflow"], models["siglip"]))
    moments_of = jax.jit(partial(vae.apply, method="encode"), compiler_options=FAST)
    features_of = jax.jit(partial(model.apply, method="image_features"), compiler_options=FAST)
    loader = open_loader(run)
    plain = checkpoint_loader(dataclasses.replace(config.data, cache=""), models, files)
    images = 0
    pairs = zip(loader.batches(), plain.batches(), strict=True)
    for (batch, stats), (other, other_stats) in itertools.islice(pairs, 2):
        assert batch.images.pixels is None and stats == other_stats
        jax.tree.map(np.testing.assert_array_equal, batch.text, other.text)
        for name in ("tokens", "positions", "segment_ids", "slots", "sample_ids"):
            got, want = (getattr(part.images, name) for part in (batch, other))
            np.testing.assert_array_equal(got, want)
        for row, column in np.argwhere(batch.images.sample_ids >= 0):
            position = int(batch.images.sample_ids[row, column])
            record, index = same_record(loader, position)
            crop = cached_crop(record, 64, config.data.seed, index)
            # float32 against another order of summation (a batch of 4 there).
            close = partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5)
            moments = moments_of({"params": params["vae"]}, crop)
            close(batch.images.moments[row, column], np.concatenate(moments))
            features = features_of({"params": params["janusflow"]}, crop)
            close(batch.images.features[row, column], features[0])
            images += 1
    assert images >= 16


def test_the_crop_is_that_of_its_record_in_every_epoch_and_of_the_seed():
    gradient = np.tile(np.linspace(0, 255, 60).astype(np.uint8)[None, :, None], (20, 1, 3))
    record = {"images": [gradient]}
    crops = [cached_crop(record, 16, 0, index) for index in range(20)]
    assert crops[0].shape == (1, 16, 16, 3) and len({crop.tobytes() for crop in crops}) == 20
    np.testing.assert_array_equal(crops[3], cached_crop(record, 16, 0, 3))
    assert not np.array_equal(crops[3], cached_crop(record, 16, 1, 3))


def test_the_objective_is_the_same_from_moments_and_features():
    """Loss and sums of one batch, of pixels and of what this test encodes itself."""
    parts, tree = modules(), params()
    rows = stack([image_row([(3, 4, False), (11, 4, True)], 34, 3)])
    config = ObjectiveConfig(repa_layer=1)

    @partial(jax.jit, compiler_options=FAST)
    def loss(batch):
        return objectives.janusflow(tree, batch, batch, 7, seed=5, modules=parts, config=config)

    def encoded(network, name, method):
        apply = jax.jit(partial(network.apply, method=method), compiler_options=FAST)
        return apply({"params": tree[name]}, rows.pixels[0])

    mean, logvar = encoded(parts.vae, "vae", "encode")
    features = encoded(parts.model, "janusflow", "image_features")
    moments = np.stack([mean, logvar], axis=1)[None]
    want = loss(Batch(None, rows))
    cached = rows.replace(pixels=None, moments=moments, features=np.asarray(features)[None])
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(close, loss(Batch(None, cached)), want)
    halfway = rows.replace(moments=moments)
    jax.tree.map(close, loss(Batch(None, halfway)), want)

    def without_repa(rows):
        config = ObjectiveConfig(repa_layer=1, repa_weight=0)
        batch, parts = Batch(None, rows), modules()
        return objectives.janusflow(tree, batch, batch, 7, seed=5, modules=parts, config=config)

    alone = cached.replace(features=None)
    jax.tree.map(close, jax.jit(without_repa)(alone), jax.jit(without_repa)(halfway))
    other = cached.replace(moments=moments + 1)
    assert abs(loss(Batch(None, other))[0] - want[0]) > 1e-3


def test_features_are_unused_where_siglip_is_trained_or_repa_is_off(run):
    """Where SigLIP is trained the pictures are there, cropped as the moments were; without REPA
    nothing reads them."""
    config = run[0]
    off = dataclasses.replace(config.objective, repa_weight=0.0)
    images = next(open_loader(run, objective=off).batches())[0].images
    assert images.features is None and images.pixels is None and images.moments is not None
    factors = LoraConfig(targets=("janusflow/vision_und_enc_model/",))
    with_lora = {"trainable": (*config.trainable, FACTORS), "lora": factors}
    for changes in ({"trainable": SFT}, with_lora):
        loader = open_loader(run, **changes)
        images = next(loader.batches())[0].images
        assert images.features is None and images.moments is not None
        position = int(images.sample_ids[0, 0])
        record, index = same_record(loader, position)
        crop = cached_crop(record, 64, config.data.seed, index)
        np.testing.assert_array_equal(images.pixels[0, 0], crop[0])


def test_the_same_broken_records_are_skipped_and_named(run):
    config, _, models, files = run
    plain = checkpoint_loader(dataclasses.replace(config.data, cache=""), models, files)

    def broken(loader):
        stream = loader.streams["generation"]
        made = [stream.make(0, index, 0) for index in range(len(RECORDS))]
        return {i: reason for i, reason in enumerate(made) if isinstance(reason, str)}

    found = broken(open_loader(run))
    assert list(found) == [1, 5] and found == broken(plain)


@pytest.mark.parametrize(
    "name, change",
    [
        ("vae", lambda c, p: (c, p | {"vae": jax.tree.map(lambda a: a + 1e-3, p["vae"])})),
        (
            "siglip",
            lambda c, p: (c, p | {"janusflow": jax.tree.map(lambda a: a * 1.01, p["janusflow"])}),
        ),
        ("dtype", lambda c, p: (dataclasses.replace(c, dtype="bfloat16"), p)),
        (
            "seed",
            lambda c, p: (dataclasses.replace(c, data=dataclasses.replace(c.data, seed=1)), p),
        ),
    ],
)
def test_a_cache_of_other_networks_or_crops_is_refused(run, name, change):
    config, params, models, _ = run
    config, params = change(config, params)
    with pytest.raises(ValueError, match=f"was made with another {name} .*write it again") as error:
        encode.open_cache(config, params, models)
    assert "\n" not in str(error.value)


def test_a_cache_of_another_size_of_crops_is_refused(run, tmp_path):
    config, params, models, _ = run
    shutil.copytree(config.data.cache, tmp_path / "cache")
    info = json.loads((tmp_path / "cache" / "cache.json").read_text())
    info["fingerprint"]["image_size"] = 128
    (tmp_path / "cache" / "cache.json").write_text(json.dumps(info))
    data = dataclasses.replace(config.data, cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="another image_size .128, here 64"):
        encode.open_cache(dataclasses.replace(config, data=data), params, models)


def test_a_cache_of_other_pictures_is_refused(run, tiny_ckpt, tmp_path):
    config, params, models, files = run
    write(tmp_path, tiny_ckpt, RECORDS)
    cache = encode.open_cache(config, params, models)

    def loader():
        data = load(tmp_path / "config.py", [f"data.cache={config.data.cache}"]).data
        return checkpoint_loader(data, models, files, cache)

    loader()  # The same files elsewhere are the same pictures.
    (tmp_path / "2.png").write_bytes(png((1, 1, 1), (48, 32)))
    with pytest.raises(OSError, match="was made when .*pictures.jsonl line 4 had other images"):
        loader()
    write_lines(tmp_path / "pictures.jsonl", RECORDS[:-1])
    with pytest.raises(ValueError, match="was made with another number of records, behind .*line"):
        loader()


def test_one_other_picture_that_is_not_looked_at_first_is_refused_later(
    run, tiny_ckpt, tmp_path, monkeypatch
):
    """Where it is read to be trained on; a broken record does not end the run, this does."""
    config, params, models, files = run
    write(tmp_path, tiny_ckpt, RECORDS)
    (tmp_path / "2.png").write_bytes(png((1, 1, 1), (48, 32)))
    monkeypatch.setattr(cache, "_PROBES", 1)
    opened = encode.open_cache(config, params, models)
    data = load(tmp_path / "config.py", [f"data.cache={config.data.cache}"]).data
    loader = checkpoint_loader(data, models, files, opened)
    with pytest.raises(OSError, match="had other images: write it again"):
        for _ in itertools.islice(loader.batches(), 10):
            pass


def test_a_missing_or_damaged_cache_is_named(run, tmp_path, capsys):
    config, params, models, _ = run

    def opened(folder):
        data = dataclasses.replace(config.data, cache=str(folder))
        return encode.open_cache(dataclasses.replace(config, data=data), params, models)

    with pytest.raises(FileNotFoundError, match="There is no cache in .*nowhere"):
        opened(tmp_path / "nowhere")
    shutil.copytree(config.data.cache, tmp_path / "cache")
    moments = tmp_path / "cache" / "moments-0.npy"
    moments.write_bytes(moments.read_bytes()[:-9])
    with pytest.raises(ValueError, match="moments-0.npy cannot be read"):
        opened(tmp_path / "cache")
    with pytest.raises(ValueError, match="must be opened"):
        checkpoint_loader(config.data, models, run[3])
    assert main(["cache", f"--config={tmp_path / 'no.py'}", f"--out={tmp_path / 'new'}"]) == 2
    assert "no config file" in capsys.readouterr().err


def test_crops_that_no_resizing_changes_are_cached_as_they_are():
    """Square pictures have one crop, that of inference."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    want = center_crop_square(Image.fromarray(noise), 16)
    got = cached_crop({"images": [noise]}, 16, 0, 9)
    np.testing.assert_allclose((got[0] + 1) * 127.5, want, atol=1e-4)


def test_broken_records_of_a_cache_are_named_and_bounded(tiny_ckpt, tmp_path, capsys):
    """Fields may stand on both sides of the options."""
    file, *_ = write(tmp_path, tiny_ckpt, RECORDS)
    before = ["cache", "data.threads=1", file]
    assert main([*before, f"--out={tmp_path / 'a'}", "data.max_broken_share=0.001"]) == 0
    said = capsys.readouterr().out
    assert "skipped" in said and "pictures.jsonl line 2: its image cannot be read" in said
    assert main([*before, f"--out={tmp_path / 'b'}", "data.max_broken_share=0"]) == 2
    assert "1 of 6 samples come from broken records" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    with pytest.raises(SystemExit):
        main([*before, f"--out={tmp_path / 'b'}", "--batchs=2"])
    assert "unrecognized arguments: --batchs=2" in capsys.readouterr().err


def test_a_cache_without_room_is_refused_before_it_begins(tiny_ckpt, tmp_path, capsys, monkeypatch):
    file, *_ = write(tmp_path, tiny_ckpt, GOOD)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    arguments = ["cache", file, f"--out={tmp_path / 'new' / 'cache'}"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "has room for 0.00" in error and "objective.repa_weight=0 leaves out" in error
    assert main([*arguments, "objective.repa_weight=0"]) == 2
    assert "leaves out" not in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
