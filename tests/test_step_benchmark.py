"""The training step's benchmark: what its batches hold and what it leaves out; what the sampling
one leaves when it is stopped; and the tables of the figures."""

import json
from argparse import Namespace
from dataclasses import asdict, replace

import numpy as np
import pytest

from jflow.training import flops
from tests.goldens import REPO


@pytest.fixture(autouse=True)
def scripts_folder(monkeypatch):
    monkeypatch.syspath_prepend(REPO / "benchmarks")


@pytest.mark.parametrize("rows", [1, 3])
def test_batches_hold_full_samples(rows):
    """The work of `packed` samples of 643 positions, as flops.count_work finds it by segments."""
    import step

    size = replace(step.SIZES["tiny"], packed=2, length=1300)
    samples, tokens = 2 * rows, 2 * rows * 643
    pairs = samples * 643 * 644 // 2
    for task in (step.DRAW_CACHED, step.DRAW_FEATURES):
        batch = step.make_batch(size, task, rows)
        assert flops.count_work(batch) == (tokens, pairs, 0, 0, samples)
        assert (batch.images.pixels is None) == (task == step.DRAW_FEATURES)
        # Time token and latents end each sample.
        np.testing.assert_array_equal(batch.images.slots[:, :, -1], [[642, 1285]] * rows)
    batch = step.make_batch(size, step.UNDERSTAND, rows)
    assert flops.count_work(batch) == (tokens, pairs, samples * (643 - 577 - 1), samples, 0)
    row = batch.text
    asked = row.targets >= 0
    np.testing.assert_array_equal(row.targets[asked], np.roll(row.tokens, -1, 1)[asked])


def test_full_size_costs_what_the_floors_say():
    """design.md, section 3: 5.47 TFLOP for a sample with cached latents, 6.09 without, 6.03 to
    understand if all 643 positions had logits, which in ours only the 65 of the answer have."""
    import step

    size, vae = step.SIZES["full"], step.VAEConfig()
    understand = 6.03 - 3 * 2 * 2048 * 102400 * (643 - 65) / 1e12
    trained = {
        "language_model", "vision_und_enc_aligner", "vision_gen_enc_aligner", "repa",
        "vision_gen_dec_aligner", "vision_gen_enc_model", "vision_gen_dec_model",
    }  # fmt: skip
    floors = {step.DRAW_CACHED: 5.47, step.DRAW: 6.09, step.UNDERSTAND: understand}
    for task, teraflops in floors.items():
        cost = flops.step_cost(size.model, vae, 2048, trained, step.CACHED[task])
        one = cost.of(flops.count_work(step.make_batch(size, task, 1))) / size.packed
        assert one == pytest.approx(1e12 * teraflops, rel=0.05)


def test_what_certainly_does_not_fit_is_shown_without_being_compiled():
    """On an H100, whose limit is 78.7 GB."""
    import report
    import step

    size = step.SIZES["full"]
    left_out = [each for each in size.settings if not step.may_fit(each, 78.7e9)]
    assert {(each.rows, each.remat) for each in left_out} == {(12, "dots"), (4, "none")}
    assert all(step.may_fit(each, float("inf")) for each in size.settings)
    rows = [asdict(step.row_left_out(each, size.packed)) for each in left_out]
    shown = report.step_table({"rows": rows, "peak": 1e15})
    assert "| generation, latents cached | 72 in 12 | dots | does not fit | | | | 106.5 |" in shown


def test_sampling_that_is_stopped_leaves_the_tables_before(tmp_path, monkeypatch):
    """One side ends when it is asked for its first answer."""
    import ours
    import report
    import sampling

    def job(name, *arguments):
        if name == "answer":
            raise EOFError
        return 0.1, np.ones(2)

    monkeypatch.setattr(ours, "write_weights", lambda workload: None)
    monkeypatch.setattr(sampling, "Worker", lambda *_: job)
    job.wait = lambda: None
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    file = tmp_path / "sampling.json"
    args = Namespace(
        device="cpu", dtype="float32", layers=1, vocab_size=64, batch=[1, 2], steps=2, rounds=3,
        vae=True, json=file,
    )  # fmt: skip
    config = sampling.released_config(args.layers, args.vocab_size)
    workload = sampling.Workload(tmp_path, config, args.dtype, args.steps, 24, 600, 32, 64)
    with pytest.raises(EOFError):
        sampling.run(args, workload)
    figures = json.loads(file.read_text())
    first, second = figures["tables"]
    assert "batch 1" in first and "batch 2" in second
    assert len(figures["tables"][first][0]["ratios"]) == 3 and figures["image_latency_s"] == {}
    assert f"| **{second}: jflow** | 50 | 1 |" in report.tables(figures)


def test_parts_are_joined_and_made_into_tables(tmp_path, monkeypatch, capsys):
    import report

    origin = {"date": "2026-11-23T00:00:00", "hardware": "a GPU", "versions": {"jax": "1"}}
    row = {"task": "generation", "rows": 1, "samples": 6, "remat": "full", "flops": 5e11}
    rows = [row | {"seconds": s, "needed_bytes": 2e9} for s in (0.5, None)]
    checks = {"goldens": {"status": 124, "seconds": 90}, "step": {"status": 0, "seconds": 7}}
    for name, part in {"step": origin | {"rows": rows, "peak": 2e12}, "checks": checks}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    out = tmp_path / "out" / "gpu.json"
    monkeypatch.setattr("sys.argv", ["report.py", str(tmp_path), "--out", str(out)])
    report.main()
    assert json.loads(out.read_text())["hardware"] == "a GPU"
    shown = capsys.readouterr().out
    assert shown.startswith("a GPU; jax 1; 2026-11-23")
    assert "| generation | 6 in 1 | full | 500 | 12.0 | 1 | 50% | 2.0 |" in shown
    assert "| generation | 6 in 1 | full | does not fit |" in shown
    assert "| goldens | out of time | 90 |" in shown


def test_readme_shows_the_tables_of_the_gpu(tmp_path):
    """Those of the latest results of benchmarks/gpu.sh, as it wrote them."""
    import report

    latest = max((REPO / "benchmarks" / "results").glob("*_gpu.json"))
    text = (REPO / "README.md").read_text(encoding="utf-8")
    copy = tmp_path / "README.md"
    copy.write_text(text.replace("|", "/"), encoding="utf-8")
    report.put_tables(copy, latest)
    shown = text.split(report.BEGIN)[1].split(report.END)[0]
    assert shown in copy.read_text(encoding="utf-8") and shown.count("|") > 100
    assert latest.name in text
    copy.write_text("nothing", encoding="utf-8")
    with pytest.raises(SystemExit, match="has no lines"):
        report.put_tables(copy, latest)
