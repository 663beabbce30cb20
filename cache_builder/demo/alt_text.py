"""Noisy, partial descriptions of scenes, as the web gives them: what the bundled backbones are
pretrained on.

A web page rarely says all that its picture shows. So an alt-text names part of what is there, in
any order, with synonyms, stock phrases and file names, sometimes only nouns or only adjectives,
rarely a full sentence with its relation, and now and then it belongs to another picture. The
proportions were fixed before any head was trained on the result.
"""

import numpy as np

from cache_builder.demo.statements import caption, describe
from cache_builder.demo.world import Pair, Scene

WRONG_SHARE = 0.04
"""Share of alt-texts that describe another scene altogether."""

SYNONYMS: dict[str, tuple[str, ...]] = {
    "red": ("crimson", "scarlet"),
    "orange": ("amber", "tangerine"),
    "yellow": ("golden", "lemon"),
    "green": ("emerald", "lime"),
    "blue": ("azure", "navy"),
    "purple": ("violet", "lilac"),
    "striped": ("stripy", "with stripes"),
    "dotted": ("spotted", "polka dot"),
    "checkered": ("checked", "chequered"),
    "tiny": ("small", "little", "miniature"),
    "huge": ("big", "giant", "large"),
    "double": ("two", "pair of", "twin"),
    "triple": ("three", "trio of"),
    "broken": ("cracked", "damaged", "shattered"),
    "bent": ("curved", "warped"),
    "melted": ("melting", "dripping"),
    "sliced": ("cut", "halved"),
    "circle": ("disc", "dot", "round"),
    "square": ("block", "box"),
    "triangle": ("pyramid", "wedge"),
    "star": ("stars", "starlet"),
    "ring": ("hoop", "loop"),
    "cross": ("plus", "plus sign"),
    "heart": ("hearts", "love"),
    "moon": ("crescent", "half moon"),
    "arrow": ("pointer", "arrows"),
    "house": ("home", "building", "hut"),
    "tree": ("pine", "fir"),
    "fish": ("goldfish", "trout"),
    "cup": ("mug", "coffee"),
    "key": ("keys", "door key"),
    "leaf": ("leaves", "foliage"),
}
_BEFORE = (
    "photo of",
    "picture of",
    "image of",
    "drawing of",
    "a photo of a",
    "clipart",
    "icon",
    "vector",
    "free",
    "my",
    "nice",
    "the",
)
_AFTER = (
    "clipart",
    "icon",
    "vector",
    "wallpaper",
    "stock photo",
    "free download",
    "for sale",
    "logo",
    "design",
    "png",
    "on plain background",
)


def alt_text(rng: np.random.Generator, scene: Scene) -> str:
    """One alt-text of the scene (never a wrong one: that is the caller's draw)."""
    things = [thing.pair for thing in scene.things]
    draw = rng.random()
    if len(things) == 2 and draw < 0.06:
        return caption(describe(scene))
    if len(things) == 2 and draw < 0.48:  # one of the two goes unmentioned
        things = [things[rng.integers(2)]]
    rng.shuffle(things)
    parts = [part for part in _mention(rng, things) if part]
    joint = (" and ", ", ", " ", " with ")[rng.integers(4)]
    return _dress(rng, joint.join(parts))


def _mention(rng: np.random.Generator, things: list[Pair]) -> list[str]:
    """Each thing by all, or some, of its words; the choice is the same for all things of one text, most of the time."""
    whole, nouns, adjectives, bag = (0.45, 0.27, 0.1, 0.1)
    draw = rng.random()
    if draw < whole:
        return [f"{_say(rng, attr)} {_say(rng, obj)}" for attr, obj in things]
    if draw < whole + nouns:
        return [_say(rng, obj) for _, obj in things]
    if draw < whole + nouns + adjectives:
        return [_say(rng, attr) for attr, _ in things]
    if draw < whole + nouns + adjectives + bag:
        words = [_say(rng, word) for pair in things for word in pair]
        rng.shuffle(words)
        return [" ".join(words)]
    return [
        f"{_say(rng, attr)} {_say(rng, obj)}" if rng.random() < 0.5 else _say(rng, obj)
        for attr, obj in things
    ]


def _say(rng: np.random.Generator, word: str) -> str:
    others = SYNONYMS[word]
    return others[rng.integers(len(others))] if rng.random() < 0.18 else word


def _dress(rng: np.random.Generator, text: str) -> str:
    if rng.random() < 0.35:
        text = f"{_BEFORE[rng.integers(len(_BEFORE))]} {text}"
    if rng.random() < 0.2:
        text = f"{text} {_AFTER[rng.integers(len(_AFTER))]}"
    if rng.random() < 0.04:
        text = f"IMG_{rng.integers(10000):04d} {text}"
    return text
