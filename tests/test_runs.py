"""The checkpoints of a run: which are kept, which one a run goes back to."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jflow import checkpoints
from jflow.data.mixture import DataConfig, MixtureConfig, SourceConfig
from jflow.training import runs
from jflow.training import state as states
from jflow.training.config import TrainConfig
from jflow.training.objectives import ObjectiveConfig
from jflow.training.optimizer import OptimizerConfig
from jflow.training.state import Guard

CONFIG = TrainConfig(
    name="test",
    init_from="nowhere",
    steps=100,
    trainable=("janusflow/a",),
    data=DataConfig(
        sources=(SourceConfig("text", "jsonl", "text.jsonl"),),
        mixture=(MixtureConfig(0, understanding=0, generation=0, text=1),),
    ),
    keep=2,
)
FILES = {"tokenizer.json": "{}"}


def state(step: int, loss: float = 1.0) -> states.TrainState:
    params = {"janusflow": {"a": jnp.full(4, float(step)), "frozen": jnp.ones(2, jnp.bfloat16)}}
    fresh = states.init(params, CONFIG.trainable, optax.adam(1e-3))
    return fresh.replace(
        step=jnp.int32(step),
        data_offset=jnp.int32(3),
        guard=Guard(jnp.int32(0), jnp.int32(step), jnp.array([loss, 0.0]), jnp.zeros(2)),
    )


@pytest.fixture
def opened(tmp_path):
    """Opens the run folder, as often as it is asked to, with some fields changed."""
    made = []

    def open_run(records=10, **changes):
        config = dataclasses.replace(CONFIG, **changes)
        counts = {"text: text.jsonl (train)": records}
        made.append(runs.Checkpoints(tmp_path / "run", {"janusflow": {}}, FILES, config, counts))
        return made[-1]

    yield open_run
    for one in made:
        one.close()


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_state_comes_back_whole(opened):
    saved = opened()
    path = saved.save(state(7))
    equal(saved.restore(jax.eval_shape(lambda: state(0))), state(7))
    got = opened().restore(state(0))
    equal(got, state(7))
    assert got.frozen["janusflow/frozen"].dtype == jnp.bfloat16
    assert path.name == "00000007" and checkpoints.read_metadata(path)[1] == FILES


@pytest.mark.parametrize("keep_best, kept", [(True, [5, 4, 2]), (False, [5, 4])])
def test_the_last_ones_and_the_best_are_kept(opened, tmp_path, keep_best, kept):
    """Also by a run that was started anew, which reads the losses of what it finds."""
    losses = {1: 3.0, 2: 0.5, 3: 2.0, 4: 0.9, 5: 1.5}
    for step, loss in losses.items():
        saved = opened(keep_best=keep_best)
        saved.save(state(step, loss))
        saved.close()
        assert runs.steps(tmp_path / "run")[0] == step  # The newest is never the one to go.
    assert runs.steps(tmp_path / "run") == kept


def test_the_best_is_one_of_the_present_mixture(opened, tmp_path):
    """Before the answers joined in, the loss was lower, and they were not known."""
    losses = {1: (0, 0.1), 2: (1, 0.8), 3: (1, 0.9), 4: (1, 0.85)}
    for step, (mixture, loss) in losses.items():
        saved, one = opened(keep=1), state(step, loss)
        saved.save(one.replace(guard=one.guard.replace(mixture=jnp.int32(mixture))))
        saved.close()
    assert runs.steps(tmp_path / "run") == [4, 2]


def test_a_step_before_the_first_good_one_is_never_the_best(opened, tmp_path):
    """No loss was seen yet: its level is 0, not low."""
    saved = opened(keep=1)
    unseen = state(0).replace(guard=Guard.new(jnp.int32(0)))
    for one in (unseen, state(1, 5.0), state(2, 7.0)):
        saved.save(one)
    saved.close()
    assert runs.steps(tmp_path / "run") == [2, 1]


def test_going_back_is_to_a_checkpoint_up_to_a_step(opened):
    saved = opened(keep=5)
    for step in (2, 4, 6):
        saved.save(state(step))
    equal(saved.restore(state(0), 5), state(4))
    equal(saved.restore(state(0), 4), state(4))
    assert saved.restore(state(0), 1) is None


def test_what_a_rewind_left_behind_is_written_anew(opened):
    """The second course of training comes by the same steps with other numbers."""
    saved = opened(keep=5)
    for step in (2, 4):
        saved.save(state(step, 1.0))
    saved.restore(state(0), 2)
    saved.save(state(2, 9.0))  # This one is the very state that was restored.
    saved.save(state(4, 8.0))
    saved.close()
    again = opened()
    assert again.restore(state(0), 2).guard.mean[0] == 1
    assert again.restore(state(0), 4).guard.mean[0] == 8


def test_a_damaged_one_is_named_passed_and_written_anew(opened, tmp_path, capsys):
    saved = opened()
    for step in (2, 4):
        saved.save(state(step))
    saved.close()
    for victim in ("config/metadata", "params/manifest.ocdbt"):
        (tmp_path / "run" / "00000004" / victim).write_bytes(b"")
        saved = opened()
        equal(saved.restore(state(0)), state(2))
        assert "00000004 is damaged or incomplete" in capsys.readouterr().err
    saved.save(state(4))
    equal(saved.restore(state(0)), state(4))


def test_where_all_are_damaged_nothing_is_begun_anew(opened, tmp_path):
    saved = opened()
    saved.save(state(2))
    saved.close()
    (tmp_path / "run" / "00000002" / "params" / "manifest.ocdbt").write_bytes(b"")
    with pytest.raises(ValueError, match="00000002 is damaged .* has no other: try again, or rem"):
        opened().restore(state(0))
    assert runs.steps(tmp_path / "run") == [2]


def test_a_changed_digit_in_the_config_is_damage(opened, tmp_path):
    """It is still JSON, and would be another config."""
    saved = opened()
    for step in (2, 4):
        saved.save(state(step))
    saved.close()
    file = tmp_path / "run" / "00000004" / "config" / "metadata"
    changed = file.read_bytes().replace(b'"seed": 0', b'"seed": 1')
    assert changed != file.read_bytes()
    file.write_bytes(changed)
    equal(opened().restore(state(0)), state(2))


def test_other_numbers_of_records_are_refused(opened):
    """They would be shuffled into another order, and some trained on twice."""
    saved = opened(records=10)
    saved.save(state(2))
    saved.close()
    equal(opened(records=10).restore(state(0)), state(2))
    with pytest.raises(ValueError, match=r"text\.jsonl \(train\) has 9 records, and had 10 when"):
        opened(records=9).restore(state(0))


def test_processes_with_other_files_are_refused(opened, monkeypatch):
    """Each would shuffle by its own number, and their parts would be of different batches."""
    other = '{"text: text.jsonl (train)": 12}'
    monkeypatch.setattr(runs.distributed, "gather_texts", lambda text: [text, other])
    with pytest.raises(ValueError, match=r"text\.jsonl \(train\) has from 10 to 12 records"):
        opened(records=10)


def test_what_lies_ahead_of_this_course_does_not_push_its_checkpoints_out(opened, tmp_path):
    """A damaged one that was passed, and what a rewind left behind."""
    saved = opened(keep=3, keep_best=False)
    for step in (2, 4, 6):
        saved.save(state(step))
    saved.close()
    (tmp_path / "run" / "00000006" / "params" / "manifest.ocdbt").write_bytes(b"")
    saved = opened(keep=1, keep_best=False)
    equal(saved.restore(state(0), 6), state(4))
    saved.save(state(5))
    saved.close()
    assert runs.steps(tmp_path / "run") == [5]


def test_what_a_rewind_may_go_back_to_is_kept(opened, tmp_path):
    """The run was told to stop amid skipped steps."""
    saved = opened(keep=1, keep_best=False)
    saved.save(state(2))
    saved.save(state(5).replace(skipped_in_row=jnp.int32(2)))
    saved.close()
    assert runs.steps(tmp_path / "run") == [5, 2]


def test_copies_and_other_folders_are_left_alone(opened, tmp_path):
    saved = opened(keep=1)
    saved.save(state(2))
    saved.close()
    shutil.copytree(tmp_path / "run" / "00000002", tmp_path / "run" / "00000002.bak")
    saved = opened(keep=1)
    saved.save(state(4))
    saved.close()
    assert (tmp_path / "run" / "00000002.bak").is_dir() and runs.steps(tmp_path / "run")[0] == 4


def test_an_address_is_no_run_folder():
    with pytest.raises(ValueError, match="gs:/bucket/run is an address: mount it as a folder"):
        runs.Checkpoints(Path("gs://bucket/run"), {}, FILES, CONFIG, {})


@pytest.mark.parametrize("part", ["params", "ema", "opt_state"])
def test_a_state_that_is_not_finite_is_never_saved(opened, tmp_path, part):
    saved = opened()
    saved.save(state(2))
    poisoned = jax.tree.map(
        lambda leaf: leaf.at[..., -1:].set(jnp.nan) if leaf.ndim else leaf,
        getattr(state(3), part),
    )
    with pytest.raises(ValueError, match="not finite at step 3, which is not saved"):
        saved.save(state(3).replace(**{part: poisoned}))
    saved.close()
    assert runs.steps(tmp_path / "run") == [2]


def test_another_config_is_refused_but_for_what_does_not_matter(opened):
    saved = opened()
    saved.save(state(2))
    saved.close()
    data = dataclasses.replace(CONFIG.data, threads=3, workers=2, max_broken_share=0.5)
    for free in (
        {"steps": 200},
        {"save_every": 3, "keep": 9},
        {"wandb": "x", "rewind_after": 2},
        {"data": data, "remat": "none", "unroll": 2},
        {"optimizer": OptimizerConfig(accumulate=4), "objective": ObjectiveConfig(ar_chunk=64)},
    ):
        equal(opened(**free).restore(state(0)), state(2))
    with pytest.raises(
        ValueError, match="trained with another repa_hidden_size, seed: use another"
    ):
        opened(seed=1, repa_hidden_size=3).restore(state(0))
    with pytest.raises(
        ValueError, match=r"another data.batch_rows, optimizer.learning_rate: use another"
    ):
        data = dataclasses.replace(CONFIG.data, batch_rows=3)
        opened(data=data, optimizer=OptimizerConfig(learning_rate=1.0)).restore(state(0))


def test_half_written_ones_are_swept_away(opened, tmp_path):
    saved = opened()
    saved.save(state(2))
    saved.save(state(4))
    saved.close()
    (tmp_path / "run" / "00000004" / checkpoints.CHECKSUMS).unlink()
    saved = opened()
    assert not (tmp_path / "run" / "00000004").exists()
    equal(saved.restore(state(0)), state(2))
