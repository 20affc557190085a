"""Scores of generated pictures of the embedded `shapes` world, in GenEval's terms.

The rule is that of GenEval's evaluate_images.py (arXiv 2310.11513), on exact detections.
"""

from collections.abc import Sequence

import numpy as np

from jflow.data.scenes import relative_position
from jflow.data.shapes import CATEGORIES
from jflow.evals.detector import Detection, detect


def judge(detections: Sequence[Detection], record: dict) -> tuple[bool, bool]:
    """Whether a picture is (plain, strict) what a record asks for, from its detections, best first.

    Plain is GenEval's: of each wanted class the best `count` objects exist, are of the wanted color
    and lie as wanted from those of the clause that `position` names, and no class reaches the count
    of an `exclude` clause.  Strict: and nothing else was detected.
    """
    matched: list[list[Detection] | None] = []
    for want in record["include"]:
        found = [d for d in detections if d.shape == want["class"]][: want["count"]]
        holds = len(found) == want["count"]
        if "color" in want:
            holds = holds and all(d.color == want["color"] for d in found)
        if "position" in want:
            relation, target = want["position"]
            others = matched[target]
            holds = holds and others is not None
            holds = holds and all(
                relation in relative_position(d.box, other.box) for d in found for other in others
            )
        matched.append(found if holds else None)
    plain = None not in matched and not any(
        sum(d.shape == other["class"] for d in detections) >= other["count"]
        for other in record.get("exclude", ())
    )
    used = {id(d) for found in matched if found for d in found}
    return plain, plain and len(used) == len(detections)


def score(images: np.ndarray, records: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Shares of pictures that are right, {"plain": {category: share, ..., "overall": their mean},
    "strict": the same} (see `judge`).  images [N, S, S, 3] in [-1, 1], one for each record.

    Raises ValueError where pictures and records differ in number or a category has no record.
    """
    if len(images) != len(records):
        raise ValueError(f"{len(images)} pictures cannot be scored against {len(records)} records.")
    if missing := [c for c in CATEGORIES if all(r["tag"] != c for r in records)]:
        raise ValueError(f"The overall score needs records of every category; add {missing[0]}.")
    tags = np.array([r["tag"] for r in records])
    verdicts = np.array([judge(detect(i), r) for i, r in zip(images, records, strict=True)])
    scores = {}
    for kind, right in zip(("plain", "strict"), verdicts.T, strict=True):
        shares = {c: float(right[tags == c].mean()) for c in CATEGORIES}
        scores[kind] = shares | {"overall": float(np.mean(list(shares.values())))}
    return scores


def shuffled(records: Sequence[dict], seed: int) -> list[dict]:
    """The records in an order in which none keeps its place: `score` gives the level of chance.

    Raises ValueError for fewer than two.
    """
    if len(records) < 2:
        raise ValueError("Chance needs at least two records to be exchanged.")
    order = np.random.default_rng(seed).permutation(len(records))
    others: list[dict] = list(records)
    for place, source in zip(order, np.roll(order, 1), strict=True):
        others[place] = records[source]
    return others
