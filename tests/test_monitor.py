"""What a run reports, read back by those who show it; speeds; the profiler's trace."""

import io
import json
import sys
import time
from functools import reduce
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jflow.batch import Batch
from jflow.data.pipeline import BatchStats
from jflow.training import metrics
from jflow.training.flops import Cost
from jflow.training.metrics import Meter
from jflow.training.monitor import Log, Trace
from tests.tiny_training import image_row, stack


def lines(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(run) -> EventAccumulator:
    """As TensorBoard reads them."""
    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return found


def test_the_same_numbers_in_the_file_and_in_tensorboard(tmp_path):
    log = Log(tmp_path, 0, "", {})
    for step in (1, 2, 3):
        log.write(step, {"loss": 1 / step, "gradient_norm/repa": step})
    picture = np.random.default_rng(0).integers(0, 255, (5, 7, 3), np.uint8)
    log.write_samples(3, picture, "what: a cat\n")
    log.close()
    assert lines(tmp_path)[1] == {"step": 2, "loss": 0.5, "gradient_norm/repa": 2}
    shown = events(tmp_path)
    scalars = [(s.step, s.value) for s in shown.Scalars("loss")]
    np.testing.assert_allclose(scalars, [(1, 1), (2, 0.5), (3, 1 / 3)], rtol=1e-6)
    (image,) = shown.Images("samples/images")
    assert (image.step, image.width, image.height) == (3, 7, 5)
    with Image.open(io.BytesIO(image.encoded_image_string)) as decoded:
        np.testing.assert_array_equal(np.asarray(decoded), picture)
    (text,) = shown.Tensors("samples/text")
    assert text.tensor_proto.string_val == [b"what: a cat\n"]


def test_what_will_be_repeated_is_dropped(tmp_path):
    """By a run that is continued, with a line cut off by a kill; and by one that is rewound."""
    log = Log(tmp_path, 0, "", {})
    for step in (1, 2, 3, 4):
        log.write(step, {"loss": float(step)})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    log = Log(tmp_path, 3, "", {})
    log.write(4, {"loss": 40.0})
    log.go_back(2)
    log.write(3, {"loss": 30.0})
    log.close()
    want = [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == want
    assert [(s.step, s.value) for s in events(tmp_path).Scalars("loss")] == want


def test_weights_and_biases_where_it_is_asked_for(tmp_path, monkeypatch):
    calls = []
    fake = SimpleNamespace(
        id="drawn",
        init=lambda **settings: calls.append(settings) or fake,
        log=calls.append,
        finish=lambda: calls.append("finish"),
        define_metric=lambda *names, **how: calls.append((names, how)),
        Image=lambda picture, caption: (picture.shape, caption),
        Html=lambda text: text,
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    Log(tmp_path / "quiet", 0, "", {}).close()
    assert not calls
    log = Log(tmp_path / "run", 0, "janus", {"seed": 3})
    log.write(1, {"loss": 2.0})
    log.write_samples(1, np.zeros((2, 3, 3), np.uint8), "text")
    log.write_samples(2, None, "1 < 2")
    log.close()
    Log(tmp_path / "run", 1, "janus", {}).close()
    *calls, again, _, _ = calls
    settings, axis, *rest = calls
    assert (settings["project"], settings["resume"]) == ("janus", "allow")
    assert settings["name"] == f"{tmp_path.name}-run"  # runs/demo/train is not runs/shapes/train
    assert settings["id"] is None and again["id"] == "drawn"
    assert axis == (("*",), {"step_metric": "step"})
    assert settings["config"] == {"seed": 3}
    assert rest == [
        {"step": 1, "loss": 2.0},
        {"step": 1, "samples": ((2, 3, 3), "text")},
        {"step": 2, "samples": "<pre>1 &lt; 2</pre>"},
        "finish",
    ]


def test_weights_and_biases_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb is not installed: pip install wandb"):
        Log(tmp_path, 0, "janus", {})


def test_means_are_over_what_was_counted():
    steps = [
        {
            "ar": (jnp.float32(6), jnp.float32(2)),
            "bins": (jnp.array([1.0, 0]), jnp.array([1.0, 0])),
        },
        {
            "ar": (jnp.float32(0), jnp.float32(1)),
            "bins": (jnp.array([3.0, 0]), jnp.array([1.0, 0])),
        },
    ]
    assert metrics.means(reduce(metrics.add_up, steps)) == {"ar": 2.0, "bins/0": 2.0}
    # A task that joins between two lines of the log counts from where it joined.
    drawn = {"rf": (jnp.float32(1), jnp.float32(1))}
    assert metrics.means(reduce(metrics.add_up, [drawn, steps[0]])) == {
        "ar": 3.0,
        "bins/0": 1.0,
        "rf": 1.0,
    }


def test_speeds_are_counts_over_time(monkeypatch):
    """With a clock of our own: two steps in 10 s, 4 s of them waiting for data."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    meter = Meter(Cost(tokens=10, pairs=1, targets=0, understood=0, generated=100), peak=1000)
    # 4 + 5 positions of one image: 9 * 10 / 2 pairs.
    batch = Batch(None, stack([image_row([(1, 4, False)], 22, 1)]))
    for _ in range(2):
        with meter.waiting("data"):
            now[0] += 2
        now[0] += 3
        meter.add({"rf": (np.float32(3), np.float32(2))}, batch, BatchStats(0.25, 6, 3, ("a: b",)))
    values = meter.read()
    flops = 2 * (9 * 10 + 45 + 100) / 10
    assert values == pytest.approx(
        {
            "rf": 1.5,
            "padding": 0.25,
            "left_out": 0.5,
            "broken_records": 2,
            "seconds_per_step": 5,
            "tokens_per_second": 1.8,
            "images_per_second": 0.2,
            "tflops_per_second": flops / 1e12,
            "mfu": flops / 1000,
            "share_waiting_for_data": 0.4,
        }
    )
    now[0] += 1
    meter.add({"rf": (np.float32(1), np.float32(1))}, batch, BatchStats(0, 0, 0, ()))
    assert meter.read()["seconds_per_step"] == 1  # Begun anew.


def test_a_trace_of_some_steps(tmp_path, capsys):
    add = jax.jit(lambda x: x + 1)
    for folder, steps, last in (("some", 2, 9), ("cut", 50, 4), ("none", 0, 4)):
        trace, x = Trace(tmp_path / folder, 0, steps), jnp.zeros(3)
        for step in range(last):
            trace.before(step)
            x = add(x)
            trace.after(step + 1, x, step + 1 == last)
    traced = {file.relative_to(tmp_path).parts[0] for file in tmp_path.rglob("*.xplane.pb")}
    assert traced == {"some", "cut"}
    assert capsys.readouterr().out.count("the trace is in") == 2
