"""The paper's three stages: Table 1, and what reference.md's section 9 says where it is silent."""

import pytest

from jflow.config import load
from tests.goldens import REPO

# learning rate, warm-up, steps, batch, (from step, understanding, generation, text).
TABLE_1 = {
    "adaptation": (1e-4, 2_000, 10_000, 512, [(0, 50, 50, 0)]),
    "pretrain": (1e-4, 2_000, 390_000, 512, [(0, 30, 50, 20), (10_000, 14, 80, 6)]),
    "sft": (2e-5, 1_000, 26_000, 256, [(0, 21, 70, 9)]),
}


@pytest.fixture(params=TABLE_1)
def stage(request):
    return request.param, load(REPO / "configs" / f"{request.param}.py")


def test_table_1(stage):
    name, config = stage
    rate, warmup, steps, batch, mixture = TABLE_1[name]
    assert (config.optimizer.learning_rate, config.optimizer.warmup_steps) == (rate, warmup)
    assert (config.steps, config.data.batch_rows, config.data.max_seq_len) == (steps, batch, 4096)
    shares = [(m.from_step, m.understanding, m.generation, m.text) for m in config.data.mixture]
    assert shares == mixture
    optimizer = config.optimizer
    assert (optimizer.betas, optimizer.weight_decay, optimizer.clip_norm) == ((0.9, 0.95), 0, 1)
    assert optimizer.decay is None and config.data.drop_prompt == 0.1
    assert (config.objective.repa_layer, config.ema.decay) == (6, 0.99)


def test_what_the_paper_does_not_print(stage):
    config = stage[1]
    objective, optimizer = config.objective, config.optimizer
    assert (objective.ar_weight, objective.rf_weight, objective.repa_weight) == (1, 1, 1)
    assert objective.time_density == "logit_normal"
    assert (objective.time_mean, objective.time_std) == (0, 1)
    assert objective.sample_posterior and config.ema.every == 100
    assert (config.repa_hidden_size, optimizer.eps, config.dtype) == (2048, 1e-8, "bfloat16")


def test_each_stage_begins_where_the_one_before_ended_and_draws_on_the_way():
    stages = {name: load(REPO / "configs" / f"{name}.py") for name in TABLE_1}
    starts = [config.init_from for config in stages.values()]
    assert starts == ["parts", *(f"runs/{config.name}" for config in list(stages.values())[:-1])]
    for config in stages.values():
        assert config.samples.every and config.samples.prompts
