"""What the toy world contains and how its scenes are sampled: names and layouts, no pixels.

A scene holds one or two *things*. A thing is an object with exactly one attribute, so a statement
about it is simply true or false. Sampling is keyed: scene i of a purpose depends on (version, seed,
purpose, i) and on nothing else, so drawing more scenes never changes the ones before.
"""

import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np

WORLD_VERSION = 1
"""Raise on any change that alters a sampled scene or a rendered byte."""

ATTRS: dict[str, tuple[str, ...]] = {
    "colour": ("red", "orange", "yellow", "green", "blue", "purple"),
    "texture": ("striped", "dotted", "checkered"),
    "size": ("tiny", "huge"),
    "count": ("double", "triple"),
    "state": ("broken", "bent", "melted", "sliced"),
}
"""Kind → attributes. Whatever is not coloured gets a neutral hue that no colour word names."""

OBJS = (
    *("circle", "square", "triangle", "star", "ring", "cross", "heart", "moon"),
    *("arrow", "house", "tree", "fish", "cup", "key", "leaf"),
)
RELATIONS = {"left of": "right of", "above": "below"}
"""Relation → its converse. A scene stores the first of the two; a caption may say either."""

BACKGROUNDS = ("tint", "gradient", "noise", "blotches")
PAIR_ATTRS = tuple(attr for attrs in ATTRS.values() for attr in attrs)
Pair = tuple[str, str]
Rgb = tuple[int, int, int]

_COLOURS: dict[str, Rgb] = {
    "red": (214, 38, 40),
    "orange": (245, 138, 24),
    "yellow": (240, 218, 44),
    "green": (46, 158, 62),
    "blue": (42, 88, 214),
    "purple": (138, 56, 172),
}
_NEUTRALS: tuple[Rgb, ...] = (
    (58, 60, 66),
    (96, 92, 88),
    (134, 134, 132),
    (178, 174, 166),
    (222, 220, 214),
)
_HELD_PER_ATTR = 4
_SPLIT_SEED = 20


@dataclass(frozen=True, slots=True)
class Thing:
    """One object of a scene with its attribute and its place; lengths are fractions of the picture's side.

    Attributes:
        x, y: centre, from the left and from the top.
        radius: half the extent of one copy.
        angle: rotation in degrees; `flip` mirrors first.
        wobble: in [0, 1); varies how an attribute is drawn (phase of stripes, depth of a cut).
    """

    attr: str
    obj: str
    x: float
    y: float
    radius: float
    angle: float
    flip: bool
    hue: Rgb
    wobble: float

    @property
    def pair(self) -> Pair:
        """(attr, obj)."""
        return self.attr, self.obj


@dataclass(frozen=True, slots=True)
class Scene:
    """All that the renderer needs. With two things, the first is `relation` the second.

    Attributes:
        marks: distractors as (x, y, size, angle, shade): small, faint and nameless.
        grain: seed of the background's own randomness.
    """

    things: tuple[Thing, ...]
    relation: str | None
    background: str
    ground: tuple[Rgb, Rgb]
    marks: tuple[tuple[float, float, float, float, int], ...]
    grain: int

    @property
    def graph(self) -> tuple[tuple[Pair, ...], str | None]:
        """What is there, without where exactly: equal graphs deserve equal captions."""
        return tuple(thing.pair for thing in self.things), self.relation


@cache
def pairs_of(part: str) -> tuple[Pair, ...]:
    """Pairs of a part: "train", "val" or "test" (the latter two occur in no training scene), or "all".

    The partition belongs to the world's version, not to a seed: one pretrained backbone serves every seed's data sets.
    Every attribute keeps 11 of its 15 objects for training, and every object at least 12 of its 17 attributes.
    """
    every = tuple((attr, obj) for attr in PAIR_ATTRS for obj in OBJS)
    if part == "all":
        return every
    held = {"val": set[Pair](), "test": set[Pair]()}
    rng = np.random.default_rng(_SPLIT_SEED)
    taken = dict.fromkeys(OBJS, 0)
    for attr in PAIR_ATTRS:
        # The least-taken objects first, ties at random: the rows stay random and the columns even.
        order = sorted(OBJS, key=lambda obj: (taken[obj], rng.random()))[:_HELD_PER_ATTR]
        for position, i in enumerate(rng.permutation(_HELD_PER_ATTR)):
            held["val" if position % 2 else "test"].add((attr, order[i]))
            taken[order[i]] += 1
    if part == "train":
        return tuple(pair for pair in every if pair not in held["val"] | held["test"])
    return tuple(pair for pair in every if pair in held[part])


def key_rng(seed: int, purpose: str, index: int) -> np.random.Generator:
    """The generator of item `index` of a purpose; a stream of its own, whatever else is drawn."""
    return np.random.default_rng([WORLD_VERSION, seed, zlib.crc32(purpose.encode()), index])


def sample_scene(
    rng: np.random.Generator, pairs: tuple[Pair, ...], relation: str | None = None
) -> Scene:
    """Place the given pairs: one anywhere near the middle, or two that stand in `relation` (first to second).

    Nothing but the pairs and the relation is shared with any other call, so two scenes of one
    caption differ in layout, hues, background and distractors.
    """
    if (len(pairs), relation is None) not in {(1, True), (2, False)} or relation not in {
        None,
        *RELATIONS,
    }:
        raise ValueError(
            f"asked for {len(pairs)} things with relation {relation!r}; give 1 and None, or 2 and one of {[*RELATIONS]}"
        )
    ground = _sample_ground(rng)
    room = 0.44 if relation is None else 0.25
    things = tuple(
        _sample_thing(rng, pair, centre, room, ground)
        for pair, centre in zip(pairs, _sample_centres(rng, relation), strict=True)
    )
    marks = tuple(
        (
            *rng.random(2),
            rng.uniform(0.02, 0.05),
            rng.uniform(0, 180),
            int(rng.integers(14, 34)) * int(rng.choice((-1, 1))),
        )
        for _ in range(rng.integers(0, 7))
    )
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    return Scene(things, relation, background, ground, marks, int(rng.integers(2**31)))


def sample_two(rng: np.random.Generator, pool: tuple[Pair, ...]) -> tuple[Pair, Pair]:
    """Two pairs that share neither attribute nor object, so that exchanging either changes what is said."""
    while True:
        first, second = (pool[i] for i in rng.integers(len(pool), size=2))
        if first[0] != second[0] and first[1] != second[1]:
            return first, second


def _sample_centres(rng: np.random.Generator, relation: str | None) -> list[tuple[float, float]]:
    if relation is None:
        x, y = rng.uniform(-0.06, 0.06, size=2)
        return [(0.5 + x, 0.5 + y)]
    near, far = rng.uniform(0.24, 0.27), rng.uniform(0.73, 0.76)
    # The other axis is loose, but never by so much that a second relation would hold as well.
    across = np.clip(0.5 + rng.uniform(-0.12, 0.12) + rng.uniform(-0.06, 0.06, size=2), 0.32, 0.68)
    if relation == "left of":
        return [(near, float(across[0])), (far, float(across[1]))]
    return [(float(across[0]), near), (float(across[1]), far)]


def _sample_ground(rng: np.random.Generator) -> tuple[Rgb, Rgb]:
    """Two near shades for the background: pale or dark, never a colour that has a name here."""
    level = rng.uniform(196, 244) if rng.random() < 0.65 else rng.uniform(14, 52)
    shades = (
        np.clip(level + rng.uniform(-11, 11, size=3) + step, 0, 255)
        for step in (0, rng.uniform(-22, 22))
    )
    first, second = (tuple(int(v) for v in shade) for shade in shades)
    return (first[0], first[1], first[2]), (second[0], second[1], second[2])


def _sample_hue(rng: np.random.Generator, attr: str, ground: tuple[Rgb, Rgb]) -> Rgb:
    jitter = rng.uniform(-12, 12, size=3)
    if attr in _COLOURS:
        hue = np.asarray(_COLOURS[attr]) + jitter
        if max(ground[0]) < 80 and attr in {"blue", "purple"}:
            hue += 26  # dark on dark would be a different task
    else:
        level = np.mean(ground)
        usable = [neutral for neutral in _NEUTRALS if abs(np.mean(neutral) - level) > 70]
        if (
            attr in ATTRS["texture"]
        ):  # its second shade lies between hue and ground, and must differ from both
            usable = [max(usable, key=lambda neutral: abs(np.mean(neutral) - level))]
        hue = np.asarray(usable[rng.integers(len(usable))]) + jitter / 2
    red, green, blue = (int(v) for v in np.clip(hue, 0, 255))
    return red, green, blue


def _sample_thing(
    rng: np.random.Generator,
    pair: Pair,
    centre: tuple[float, float],
    room: float,
    ground: tuple[Rgb, Rgb],
) -> Thing:
    attr, obj = pair
    # One copy of an ordinary thing fills about two thirds of its room; only size words leave that band.
    low, high = {"tiny": (0.3, 0.36), "huge": (0.93, 1.0)}.get(attr, (0.62, 0.74))
    return Thing(
        attr,
        obj,
        *centre,
        radius=room * rng.uniform(low, high),
        angle=rng.uniform(-14, 14),
        flip=bool(rng.random() < 0.5),
        hue=_sample_hue(rng, attr, ground),
        wobble=float(rng.random()),
    )
