"""Several bad batches in a row: back to the checkpoint before them, and past their data.

The model is replaced by a quadratic whose minimum moves with the sample ids of the batch, so that
the parameters tell which data they have seen, and whose loss is no number for the bad ones. Batch n
of the config has the generation samples 4 n to 4 n + 3.
"""

import json
from functools import partial
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from jflow import checkpoints
from jflow.config import load
from jflow.data.pipeline import checkpoint_loader
from jflow.training import runs
from jflow.training.objectives import Modules
from jflow.training.step import train_step
from tests.goldens import REPO
from tests.test_train import CONFIG, contents, equal, log


def quadratic(params, batch, whole, step, *, seed, modules, config, bad=()):
    ids = whole.images.sample_ids.ravel()
    numbers = ids // 4
    minimum = jnp.mean(ids) / 100
    loss = sum(jnp.mean(jnp.square(x - minimum)) for x in jax.tree.leaves(params["janusflow"]))
    loss = jnp.where(jnp.any(jnp.isin(numbers, jnp.array(bad, jnp.int32))), jnp.nan, loss)
    return loss, {"rf": (loss, jnp.ones(()))}


@pytest.fixture
def command(tiny_ckpt, tmp_path):
    caption = {"image": str(REPO / "docs" / "cat.jpg"), "caption": "a cat"}
    for name, record in (("captions", caption), ("text", {"text": "A line."})):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(record) + "\n") * 5, encoding="utf-8")
    config = CONFIG.replace("FOLDER", str(tmp_path)).replace("CKPT", str(tiny_ckpt))
    (tmp_path / "config.py").write_text(config, encoding="utf-8")
    more = ["steps=8", "rewind_after=3", "trainable=('janusflow/language_model/norm',)"]
    return ["--config", str(tmp_path / "config.py"), *more]


@pytest.fixture
def bad(monkeypatch):
    """Which batches are bad from now on."""

    def set_bad(*numbers):
        monkeypatch.setattr(train, "janusflow", partial(quadratic, bad=numbers))

    return set_bad


def by_hand(command, numbers):
    """The trained parameters after a step on each of these batches."""
    config = load(command[1], command[2:])
    params, models, files = checkpoints.load_checkpoint(config.init_from)
    loader = checkpoint_loader(config.data, models, files)
    batches = [batch for batch, _ in islice(loader.batches(), max(numbers) + 1)]
    now = train.first_state(params, train.build(models, config), config)
    step = jax.jit(
        partial(
            train_step,
            objective=partial(quadratic, seed=0, modules=Modules(None, None, None), config=None),
            optimizer=config.optimizer,
            ema=config.ema,
        )
    )
    for number in numbers:
        now, _ = step(now, batches[number])
    return now


def test_a_bad_stretch_is_passed_by(command, bad, tmp_path, capsys):
    """Batches 4 to 6 are bad; the one that was computed while that was noticed goes with them."""
    bad(4, 5, 6)
    run = tmp_path / "run"
    assert train.main([*command, "--run", str(run)]) == 0
    assert "steps 5 to 7 were skipped: back to step 4" in capsys.readouterr().out
    lines = log(run)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["data_offset"] for line in lines] == [0] * 4 + [4] * 4
    want = by_hand(command, [0, 1, 2, 3, 8, 9, 10, 11])
    params, _, _ = checkpoints.load_checkpoint(run)
    _, state = contents(run, 8)
    np.testing.assert_allclose(
        params["janusflow"]["language_model"]["norm"]["scale"],
        want.ema["janusflow/language_model/norm/scale"],
        rtol=1e-6,
    )
    counters = {"data_offset": 4, "skipped": 0, "skipped_in_row": 0, "step": 8}
    assert {name: int(state[name]) for name in counters} == counters
    assert runs.steps(run)[0] == 8

    # Interrupted in the middle of the bad stretch, and behind it, the same comes out.
    for stops in (6, 3), (7, 5):
        other = tmp_path / f"run{stops[0]}"
        bad(4, 5, 6)
        for stop in (*sorted(stops), 8):
            assert train.main([*command, f"steps={stop}", "--run", str(other)]) == 0
        equal(run, other, step=8)


def test_before_the_first_checkpoint_it_begins_again(command, bad, tmp_path):
    bad(0, 1, 2)
    run = tmp_path / "run"
    assert train.main([*command, "steps=4", "--run", str(run)]) == 0
    want = by_hand(command, [4, 5, 6, 7])
    params, _, _ = checkpoints.load_checkpoint(run)
    np.testing.assert_allclose(
        params["janusflow"]["language_model"]["norm"]["scale"],
        want.ema["janusflow/language_model/norm/scale"],
        rtol=1e-6,
    )


def test_single_bad_batches_are_only_skipped(command, bad, tmp_path, capsys):
    bad(2, 3, 5)
    run = tmp_path / "run"
    assert train.main([*command, "--run", str(run)]) == 0
    assert "back to step" not in capsys.readouterr().out
    assert [line["skipped"] for line in log(run)] == [0, 0, 1, 1, 0, 1, 0, 0]
    assert log(run)[-1]["data_offset"] == 0
    # Nothing was changed at step 4: there is no checkpoint of it.
    assert runs.steps(run) == [8, 2]


def test_it_gives_up_where_no_data_helps(command, bad, tmp_path, capsys):
    bad(*range(4, 99))
    run = tmp_path / "run"
    assert train.main([*command, "max_rewinds=2", "--run", str(run)]) == 2
    said = capsys.readouterr()
    assert said.out.count("back to step 4") == 2
    last = said.err.strip().splitlines()[-1]
    assert last.startswith(
        "train.py: Steps 5 to 7 were skipped, though 2 rewinds passed other data"
    )
    assert runs.steps(run) == [4, 2]
    checkpoints.load_checkpoint(run)
