"""Hard negatives and edits of statements: what matching and composed-retrieval items say."""

import numpy as np

from cache_builder.demo.statements import CONVERSE, Said, Statement, phrase
from cache_builder.demo.world import OBJS, PAIR_ATTRS, RELATIONS, Pair, pairs_of, sample_two

SWAP_REPLACE = ("replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
CATEGORIES = (*SWAP_REPLACE, "add_att", "add_obj")
EDITS = ("substitute_attr", "substitute_obj", "add", "remove")


def draw_contrast(
    rng: np.random.Generator, category: str, split: str, novel: bool
) -> tuple[Statement, Statement, Statement]:
    """A scene to draw, a true statement about it and a false one of the given category.

    Both statements run in the same direction and name equally many pairs held out for
    the split: none, or at least one if `novel`. They are parallel sentences that differ by the category's one edit.
    """
    held = frozenset(pairs_of(split)) if novel else frozenset[Pair]()
    pool = (*pairs_of("train"), *(pairs_of(split) if novel else ()))
    known = frozenset(pool)
    while True:
        shown = Statement(sample_two(rng, pool), [*RELATIONS][rng.integers(len(RELATIONS))])
        true, false = _contrast(rng, category, shown)
        pairs = [{(attr, obj) for attr, obj in said.said if attr} for said in (true, false)]
        novelty = {len(named & held) for named in pairs}
        if not pairs[1] <= known or len(novelty) > 1 or (novel and novelty == {0}):
            continue
        if rng.random() < 0.5 and len(false.said) == 2:
            return shown, true.turned(), false.turned()
        return shown, true, false


def _contrast(
    rng: np.random.Generator, category: str, shown: Statement
) -> tuple[Statement, Statement]:
    (attr_a, obj_a), (attr_b, obj_b) = shown.said
    attr = _other(rng, PAIR_ATTRS, attr_a, attr_b)
    obj = _other(rng, OBJS, obj_a, obj_b)
    first = bool(rng.random() < 0.5)

    def with_one(said: Said) -> Statement:
        return Statement((said, shown.said[1]) if first else (shown.said[0], said), shown.relation)

    match category:
        case "replace_att":
            return shown, with_one((attr, obj_a if first else obj_b))
        case "replace_obj":
            return shown, with_one((attr_a if first else attr_b, obj))
        case "replace_rel":
            return shown, Statement(shown.said, _other(rng, tuple(CONVERSE), shown.relation))
        case "swap_att":
            return shown, Statement(((attr_b, obj_a), (attr_a, obj_b)), shown.relation)
        case "swap_obj":
            return shown, Statement(((attr_a, obj_b), (attr_b, obj_a)), shown.relation)
        case "add_att":
            target = obj_a if first else obj_b
            return with_one((None, target)), with_one((attr, target))
        case "add_obj":
            return shown, Statement((*shown.said, (attr, obj)), shown.relation)
        case _:
            raise ValueError(f"no category {category!r}; known: {CATEGORIES}")


def _other(rng: np.random.Generator, words: tuple[str, ...], *taken: str | None) -> str:
    free = [word for word in words if word not in taken]
    return free[rng.integers(len(free))]


def draw_edit(
    rng: np.random.Generator, kind: str, split: str, novel: bool
) -> tuple[Statement, str, Statement]:
    """Reference, modification text and target.

    If `novel`, the pair that the edit makes or leaves is held out of training.
    """
    pool, results = pairs_of("train"), pairs_of(split) if novel else pairs_of("train")
    relation = [*RELATIONS][rng.integers(len(RELATIONS))]
    while True:
        kept, old = sample_two(rng, pool)
        new = results[rng.integers(len(results))]
        if kind == "remove":
            kept = new
        if {kept[0], kept[1]} & {*old} or (kind in EDITS[:3] and {kept[0], kept[1]} & {*new}):
            continue
        if kind == "substitute_attr" and (new[1] != old[1] or new[0] == old[0]):
            continue
        if kind == "substitute_obj" and (new[0] != old[0] or new[1] == old[1]):
            continue
        break
    first = bool(rng.random() < 0.5)

    def beside(pair: Pair) -> Statement:
        return Statement((pair, kept) if first else (kept, pair), relation)

    match kind:
        case "substitute_attr":
            return beside(old), f"make the {old[0]} {old[1]} {new[0]}", beside(new)
        case "substitute_obj":
            return beside(old), f"replace the {old[0]} {old[1]} with {phrase(new)}", beside(new)
        case "remove":
            return beside(old), f"remove the {old[0]} {old[1]}", Statement((kept,))
        case "add":
            where = relation if first else RELATIONS[relation]
            return (
                Statement((kept,)),
                f"add {phrase(new)} {where} the {kept[0]} {kept[1]}",
                beside(new),
            )
        case _:
            raise ValueError(f"no edit {kind!r}; known: {EDITS}")
