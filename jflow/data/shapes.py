"""The embedded `shapes` world: pictures with captions, questions and answers, in GenEval's terms.

Everything follows from (seed, split, index) alone.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from jflow.data.scenes import (
    MORE_COLORS,
    RELATIONS,
    SHAPES,
    SIDE,
    SPLITS,
    Object,
    Pair,
    Scene,
    pairs,
    place,
    relative_position,
)

PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
NUMBERS = ("zero", "one", "two", "three", "four")
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
FREE_SHARE = 1 / 4  # of scenes that belong to none of the categories
SHORT_SHARE = 1 / 4  # of captions that are the category's prompt
COLORED_SHARE = 1 / 2  # of the other captions that name colors
RELATIONS_SHARE = 1.0  # of the questions of relation that conversations put
CORNER_MARGIN = 2.0  # from the middle lines, to be said to lie in a corner
OPPOSITE = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
RELATION_PHRASES = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}


@dataclass(frozen=True)
class Question:
    """`kind` is one of existence_positive, existence_random and existence_adversarial (the three of
    POPE), color, shape, count, where and relation; the answer is one to two lower-case words."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Example:
    """A scene with one caption and every kind of question that is well-posed for it.

    `record` is what the scene was made for, in GenEval's format; None for a free scene.
    """

    scene: Scene
    record: dict | None
    caption: str
    questions: tuple[Question, ...]


def scene_for(record: dict, split: str, rng: np.random.Generator) -> Scene:
    """A scene with what the record asks for and nothing else; colors it leaves open are drawn."""
    wanted, starts = [], []
    for want in record["include"]:
        starts.append(len(wanted))
        colors = [c for s, c in pairs(split) if s == want["class"]]
        for _ in range(want["count"]):
            wanted.append((want["class"], want.get("color") or colors[rng.integers(len(colors))]))

    def holds(objects: list[Object]) -> bool:
        return all(
            relative_position(objects[i].box, objects[starts[want["position"][1]]].box)
            == {want["position"][0]}
            for i, want in zip(starts, record["include"], strict=True)
            if "position" in want
        )

    return place(wanted, rng, holds)


def make_record(category: str, split: str, rng: np.random.Generator) -> dict:
    """A prompt with what its picture must hold, in GenEval's format and wording.

    {"tag", "include": [{"class", "count", "color"?, "position"?: [relation, index of the other]}],
    "exclude"?: [{"class", "count"}], "prompt"}.
    """
    a, b = (SHAPES[i] for i in rng.permutation(len(SHAPES))[:2])
    want_a, want_b = {"class": a, "count": 1}, {"class": b, "count": 1}
    record: dict = {"tag": category, "include": [want_a, want_b]}
    if category == "single_object":
        return record | {"include": [want_a], "prompt": f"a photo of a {a}"}
    if category == "two_object":
        return record | {"prompt": f"a photo of a {a} and a {b}"}
    if category == "counting":
        n = int(rng.integers(2, 5))
        include, exclude = [{"class": a, "count": n}], [{"class": a, "count": n + 1}]
        prompt = f"a photo of {NUMBERS[n]} {PLURALS[a]}"
        return record | {"include": include, "exclude": exclude, "prompt": prompt}
    if category == "position":
        relation = RELATIONS[rng.integers(len(RELATIONS))]
        include = [want_b, want_a | {"position": [relation, 0]}]
        return record | {"include": include, "prompt": f"a photo of a {a} {relation} a {b}"}
    allowed = pairs(split)
    first = allowed[rng.integers(len(allowed))]
    want_a = {"class": first[0], "count": 1, "color": first[1]}
    prompt = f"a photo of {_phrase(first)}"
    if category == "colors":
        return record | {"include": [want_a], "prompt": prompt}
    others = [p for p in allowed if p[0] != first[0] and p[1] != first[1]]
    second = others[rng.integers(len(others))]
    want_b = {"class": second[0], "count": 1, "color": second[1]}
    return record | {"include": [want_a, want_b], "prompt": f"{prompt} and {_phrase(second)}"}


def generator(seed: int, split: str, index: int, purpose: int) -> np.random.Generator:
    pairs(split)  # Refuses an unknown split.
    return np.random.default_rng((seed, SPLITS.index(split), index, purpose))


def prompt(seed: int, split: str, index: int) -> dict:
    """The index-th record to generate a picture for; the categories take turns."""
    rng = generator(seed, split, index, 0)
    return make_record(CATEGORIES[index % len(CATEGORIES)], split, rng)


def example(
    seed: int,
    split: str,
    index: int,
    colored: float = COLORED_SHARE,
    of: str | None = None,
    counting: int = 1,
) -> Example:
    """The index-th example of a split: draw its picture with `render`.

    colored: see `describe`. of: whose `pairs` it is made of; None for the split's own. counting:
    how many times as often as for another category it is made for that one.
    """
    rng, of = generator(seed, split, index, 1), of or split
    if rng.random() < FREE_SHARE:
        allowed, record = pairs(of), None
        wanted = [allowed[i] for i in rng.integers(len(allowed), size=rng.integers(1, 5))]
        scene = place(wanted, rng, lambda objects: True)
    else:
        categories = CATEGORIES + ("counting",) * (counting - 1)
        record = make_record(categories[rng.integers(len(categories))], of, rng)
        scene = scene_for(record, of, rng)
    return Example(scene, record, caption_of(scene, record, rng, colored), ask(scene, of, rng))


def caption_of(
    scene: Scene, record: dict | None, rng: np.random.Generator, colored: float = COLORED_SHARE
) -> str:
    """A caption: the record's prompt so often that over all scenes SHORT_SHARE of them are.

    MORE_COLORS are always named, or what is asked for without a color would be drawn in one.
    """
    if any(o.color in MORE_COLORS for o in scene.objects):
        return describe(scene, rng, colored=1)
    short = record is not None and rng.random() < SHORT_SHARE / (1 - FREE_SHARE)
    return record["prompt"] if short else describe(scene, rng, colored)


def conversation(
    scene: Scene,
    split: str,
    rounds: int,
    rng: np.random.Generator,
    relations: float = RELATIONS_SHARE,
) -> tuple[Question, ...]:
    """Different questions of `rounds` times `ask`, in random order, to be put one after another.

    Of the two existence questions of a round a random one is left out: known that one is answered
    with yes and one with no, the first answer would tell the second. relations: the share of the
    questions of relation that are put; instead of another one stands a further one of color or
    shape, where there is one.
    """
    found: list[Question] = []
    for _ in range(rounds):
        positive, negative, *others = ask(scene, split, rng)
        found += [negative if rng.random() < 0.5 else positive, *others]
        if found[-1].kind == "relation" and rng.random() >= relations:
            further = [q for kind in _attributes(scene) for q in kind if q not in found]
            found[-1:] = [further[rng.integers(len(further))]] if further else []
    different = list({q.question: q for q in found}.values())
    return tuple(different[i] for i in rng.permutation(len(different)))


def _phrase(pair: Pair, count: int = 1) -> str:
    """ "a red circle", "an orange cross", "two red circles"; without a color where it is empty."""
    shape, color = pair
    noun = f"{color} {shape if count == 1 else PLURALS[shape]}".strip()
    article = "an" if noun[0] in "aeiou" else "a"
    return f"{article if count == 1 else NUMBERS[count]} {noun}"


def _list(phrases: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))


def _corner(o: Object) -> str | None:
    """ "top left", ...; None for what lies too near to a middle line to be said so."""
    dx, dy = o.x - SIDE / 2, o.y - SIDE / 2
    if min(abs(dx), abs(dy)) < CORNER_MARGIN:
        return None
    return f"{'top' if dy < 0 else 'bottom'} {'left' if dx < 0 else 'right'}"


def _relation(a: Object, b: Object) -> str | None:
    """The one relation of a to b; None where there are two or none."""
    found = relative_position(a.box, b.box)
    return found.pop() if len(found) == 1 else None


def describe(scene: Scene, rng: np.random.Generator, colored: float) -> str:
    """A caption that names every object: as a list, by relation or by corner, with colors in a
    share `colored` of cases, in several wordings."""

    def pick(options):
        return options[rng.integers(len(options))]

    with_colors = rng.random() < colored
    shown = [(o.shape, o.color if with_colors else "") for o in scene.objects]
    counts = list(Counter(shown).items())
    listed = _list([_phrase(*counts[i]) for i in rng.permutation(len(counts))])
    bodies = [listed]
    if len(counts) > 1:
        bodies.append(f"{NUMBERS[len(shown)]} objects: {listed}")
    if len(shown) == 1 and (corner := _corner(scene.objects[0])):
        bodies.append(f"{listed} in the {corner}")
    if len(shown) == 2:
        i, j = rng.permutation(2)
        if relation := _relation(scene.objects[i], scene.objects[j]):
            a, b = _phrase(shown[i]), _phrase(shown[j])
            bodies += 2 * [f"{a} {pick(RELATION_PHRASES[relation])} {b}"]
    opening = pick(("a photo of", "a picture of", "an image of", "a drawing of"))
    return f"{opening} {pick(bodies)}{pick(('', '', ' on a grey background'))}"


def _attributes(scene: Scene) -> tuple[list[Question], list[Question]]:
    """The questions of color, and those of shape, that have one right answer."""
    by_shape = Counter(o.shape for o in scene.objects)
    by_color = Counter(o.color for o in scene.objects)
    return (
        [
            Question("color", f"What color is the {o.shape}?", o.color)
            for o in scene.objects
            if by_shape[o.shape] == 1
        ],
        [
            Question("shape", f"What shape is the {o.color} object?", o.shape)
            for o in scene.objects
            if by_color[o.color] == 1
        ],
    )


def ask(scene: Scene, split: str, rng: np.random.Generator) -> tuple[Question, ...]:
    """One question of every kind that has one right answer in this scene.

    Each scene gets one existence question with yes and one with no, in the same form, so neither
    the form nor the frequency of an object tells the answer; relations hold in half of the cases.
    Only pairs of the split are named.
    """

    def pick(options):
        return options[rng.integers(len(options))]

    objects = scene.objects
    by_pair = Counter((o.shape, o.color) for o in objects)
    by_shape, by_color = Counter(o.shape for o in objects), Counter(o.color for o in objects)
    questions = []

    def add(kind: str, question: str, answer: str) -> None:
        questions.append(Question(kind, question, answer))

    kind = pick(("random", "adversarial"))
    absent = [p for p in pairs(split) if p not in by_pair]
    near = [p for p in absent if p[0] in by_shape and p[1] in by_color]
    near = near or [p for p in absent if p[0] in by_shape or p[1] in by_color] or absent
    yes, no = pick(list(by_pair)), pick(near if kind == "adversarial" else absent)
    no_shape = [s for s in SHAPES if s not in by_shape]
    if kind == "random" and no_shape and rng.random() < 0.5:
        yes, no = (pick(list(by_shape)), ""), (pick(no_shape), "")
    add("existence_positive", f"Is there {_phrase(yes)}?", "yes")
    add(f"existence_{kind}", f"Is there {_phrase(no)}?", "no")

    questions += [pick(kind) for kind in _attributes(scene) if kind]

    shape, color = pick([*by_shape, *([pick(no_shape)] if no_shape else [])]), pick(list(by_color))
    number, things = pick(
        (
            (by_shape[shape], PLURALS[shape]),
            (by_color[color], f"{color} objects"),
            (len(objects), "objects"),
        )
    )
    add("count", f"How many {things} are there?", NUMBERS[number])

    named = [
        (o, f"{o.color} {o.shape}" if by_shape[o.shape] > 1 or rng.random() < 0.5 else o.shape)
        for o in objects
        if by_pair[o.shape, o.color] == 1
    ]
    if in_corner := [(name, corner) for o, name in named if (corner := _corner(o))]:
        name, corner = pick(in_corner)
        add("where", f"Where is the {name}?", corner)
    related = [
        (name_a, relation, name_b)
        for a, name_a in named
        for b, name_b in named
        if a is not b and (relation := _relation(a, b))
    ]
    if related:
        a, relation, b = pick(related)
        holds = rng.random() < 0.5
        asked = relation if holds else OPPOSITE[relation]
        add("relation", f"Is the {a} {asked} the {b}?", "yes" if holds else "no")
    return tuple(questions)
