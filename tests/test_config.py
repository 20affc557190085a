"""Configs: files, overrides, JSON, and messages that help."""

import json
from dataclasses import asdict, dataclass, field

import pytest

from jflow import config


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0


@dataclass(frozen=True)
class Stage:
    name: str = "one"
    steps: int = 10
    remat: bool = False
    optimizer: Optimizer = field(default_factory=Optimizer)


@dataclass(frozen=True)
class Run:
    stages: tuple[Stage, ...] = (Stage(), Stage("two"))
    folder: str | None = None


@pytest.mark.parametrize(
    "assignment, read",
    [
        ("stages.1.optimizer.learning_rate=2e-5", lambda c: c.stages[1].optimizer.learning_rate),
        ("stages.0.optimizer.learning_rate=1", lambda c: c.stages[0].optimizer.learning_rate),
        ("stages.0.optimizer.betas=(0.8,0.9)", lambda c: c.stages[0].optimizer.betas),
        ("stages.0.optimizer.betas=[0.8, 0.9]", lambda c: c.stages[0].optimizer.betas),
        ("stages.0.optimizer.betas.1=0.99", lambda c: c.stages[0].optimizer.betas[1]),
        ("stages.0.optimizer.clip=None", lambda c: c.stages[0].optimizer.clip),
        ("stages.0.steps=7", lambda c: c.stages[0].steps),
        ("stages.0.remat=true", lambda c: c.stages[0].remat),
        ("stages.0.name=12", lambda c: c.stages[0].name),
        ("folder=runs/a=b", lambda c: c.folder),
    ],
)
def test_overrides(assignment, read):
    want = {
        "stages.1.optimizer.learning_rate": 2e-5,
        "stages.0.optimizer.learning_rate": 1.0,
        "stages.0.optimizer.betas": (0.8, 0.9),
        "stages.0.optimizer.betas.1": 0.99,
        "stages.0.optimizer.clip": None,
        "stages.0.steps": 7,
        "stages.0.remat": True,
        "stages.0.name": "12",
        "folder": "runs/a=b",
    }[assignment.split("=")[0]]
    got = read(config.override(Run(), assignment))
    assert got == want and type(got) is type(want)
    assert Run() == Run()  # the original is untouched


@pytest.mark.parametrize(
    "assignment, message",
    [
        ("stages.0.stepz=3", "no field 'stepz'; did you mean 'steps'?"),
        ("stages.0.optimizer.learning_rat=3", "did you mean 'learning_rate'?"),
        ("qqq=3", "no field 'qqq' among stages, folder"),
        ("stages.2.steps=3", "none of the entries 0..1"),
        ("stages.0.steps=many", "cannot be read as int"),
        ("stages.0.steps=1.5", "not of type int"),
        ("stages.0.steps.x=1", "has no fields"),
        ("stages.0.optimizer.betas=(0.9,)", "betas is of type tuple[float, float]"),
        ("stages=(1, 2)", "stages is of type tuple["),
        ("stages.0.steps=None", "steps is of type int."),
        ("stages.0.steps", "write field=value"),
    ],
)
def test_bad_overrides_are_one_sentence(assignment, message):
    with pytest.raises(ValueError) as error:
        config.override(Run(), assignment)
    assert message in str(error.value)


def test_json_keeps_every_field():
    run = config.override(Run(), "stages.1.optimizer.clip=None")
    assert json.dumps(config.to_dict(run)) == json.dumps(asdict(run))


def test_files(tmp_path):
    file = tmp_path / "run.py"
    file.write_text("def get_config():\n    return 3\n")
    assert config.load(file) == 3
    file.write_text("def get_config(hardware: str = ''):\n    return hardware\n")
    assert config.load(file, ["hardware=v5e-64"]) == "v5e-64"
    with pytest.raises(ValueError, match="'hardware' is no override: write field=value."):
        config.load(file, ["hardware"])
    file.write_text(
        "from tests.test_config import Run\ndef get_config(hardware: str = ''):\n    return Run()\n"
    )
    with pytest.raises(ValueError, match="no field 'hardwar'; did you mean 'hardware'?"):
        config.load(file, ["hardwar=v5e-64"])
    file.write_text("x = 3\n")
    with pytest.raises(ValueError, match="must define get_config"):
        config.load(file)
    with pytest.raises(FileNotFoundError, match="no config file"):
        config.load(tmp_path / "other.py")
