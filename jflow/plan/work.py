"""How much a step of a stage computes, in closed form: as a model, and as the program runs it."""

import math
from collections.abc import Set

from jflow.data.mixture import DataConfig, batch_rows, part_sizes
from jflow.models.attention import BLOCK, DENSE
from jflow.models.janusflow import JanusFlowConfig
from jflow.models.layers import Remat
from jflow.training import flops


def samples(data: DataConfig, step: int) -> dict[str, float]:
    """Samples of each task in a batch, where every window fits into its rows."""
    tasks = [row.task for row in batch_rows(data, step)]
    per_row = {
        task: window.samples / window.rows
        for task, window in (
            ("generation", data.generation),
            ("understanding", data.understanding),
            ("text", data.text),
        )
    }
    return {task: tasks.count(task) * per_row[task] for task in set(tasks)}


def model_work(data: DataConfig, step: int, model: JanusFlowConfig) -> flops.Work:
    """Of rows that are full, each of as many samples of equal length as a window packs in it."""
    rows = [row.task for row in batch_rows(data, step)]
    found, length = samples(data, step), data.max_seq_len
    pairs = 0.0
    for task, count in found.items():
        each = rows.count(task) * length / count
        pairs += count * each * (each + 1) / 2
    understood = found.get("understanding", 0)
    targets = (rows.count("understanding") + rows.count("text")) * length
    return flops.Work(
        tokens=len(rows) * length,
        pairs=int(pairs),
        targets=int(targets - understood * (1 + model.siglip.num_tokens)),
        understood=round(understood),
        generated=round(found.get("generation", 0)),
    )


def program_flops(
    data: DataConfig,
    step: int,
    row_multiple: int,
    model: JanusFlowConfig,
    cost: flops.Cost,
    trained: Set[str],
    remat: Remat,
    splash: bool,
) -> float:
    """What the compiled step of all chips computes, empty rows and places included.

    On top of `cost`: what `remat` computes again - all of a block but the product that
    ends it -, logits and scores, which always are, and what a causal mask hides.

    Args: cost: flops.step_cost of the stage. splash: attention by that kernel, otherwise in plain
      XLA.
    """
    texts, images = part_sizes(data, step, row_multiple)
    rows, length = texts + images, data.max_seq_len
    language = model.language
    again = {"full": flops.token_flops(language), "dots": 0.0, "none": 0.0}[remat]
    last = language.num_hidden_layers * 2 * language.hidden_size * language.intermediate_size
    tokens = rows * length
    total = cost.tokens * tokens + max(again - last, 0) * tokens
    # In units of one product of queries with keys.
    product = flops.pair_flops(language) / 2
    if splash:
        side = math.ceil(length / 128) * 128
        block = max(b for b in range(128, BLOCK + 1, 128) if side % b == 0)
        blocks = side // block
        pairs, products = block**2 * blocks * (blocks + 1) / 2, 9 + 2 * (remat == "full")
    else:
        blocked = length > DENSE
        side = math.ceil(length / BLOCK) * BLOCK if blocked else length
        pairs = side * length
        products = 6 + 2 * (remat != "none") + blocked
    total += rows * pairs * products * product
    total += cost.targets / _passes(trained) * (_passes(trained) + 1) * texts * length
    seen = cost.understood
    if remat == "full" and "vision_und_enc_model" in trained:
        siglip = model.siglip
        last = siglip.layers * 2 * siglip.num_tokens * siglip.width * siglip.mlp_width
        seen += flops.siglip_flops(siglip) - last
    return total + seen * texts * data.images_per_row + cost.generated * images * data.crops_per_row


def _passes(trained: Set[str]) -> int:
    return 2 + ("language_model" in trained)
