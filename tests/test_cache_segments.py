"""Parts of captions: what they are, that templates are cut exactly, and where a build puts them."""

from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_builder import load_dataset
from cache_builder.datasets.base import Dataset, Tasks
from cache_builder.demo.statements import Statement, caption, phrase
from cache_builder.demo.world import PAIR_ATTRS, RELATIONS, pairs_of
from cache_builder.errors import UnknownName
from cache_builder.segments import segments, with_segments

PAIRS = st.sampled_from(pairs_of("all"))
EVERY_RELATION = [*RELATIONS, *RELATIONS.values()]


@cache
def toy() -> Dataset:
    return load_dataset("toy_world", scale=0.01)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two cows in a grassy field.", ("two cows", "a grassy field", "two cows in a grassy field")),
        ("A dog runs on grass", ("a dog", "grass", "a dog runs on grass")),
        ("the old fluffy dog", ("the old fluffy dog",)),
        ("a blorp on a stop sign", ("a blorp", "a stop sign", "a blorp on a stop sign")),
        ("a cup and a cup", ("a cup", "a cup and a cup")),
        ("Running  fast", ("running fast",)),
        ("?", ("?",)),
        ("dogs, cats", ("dogs", "cats", "dogs, cats")),
    ],
)  # fmt: skip
def test_a_caption_is_cut_into_noun_phrases_and_what_joins_two(text: str, expected: tuple) -> None:
    assert segments(text) == expected


@given(one=PAIRS, other=PAIRS, relation=st.sampled_from(EVERY_RELATION), prefix=st.booleans())
def test_captions_of_two_things_are_cut_exactly(
    one: tuple[str, str], other: tuple[str, str], relation: str, prefix: bool
) -> None:
    said = caption(Statement((one, other), relation))
    parts = (phrase(one), phrase(other), said)
    assert segments(f"there is {said}" if prefix else said) == tuple(dict.fromkeys(parts))


def test_every_caption_of_toy_world_is_cut_into_the_things_it_names() -> None:
    strings = {t.id: t.text for t in toy().texts}
    examples = (*toy().tasks.retrieval, *toy().tasks.matching, *toy().tasks.two_by_two)
    for name in {c for e in examples for c in e.captions}:
        text = strings[name].removeprefix("there is ")
        first, *rest = next(
            text.split(f" {r} ", 1) for r in [*EVERY_RELATION, "and", "\n"] if f" {r} " in text or r == "\n"
        )  # fmt: skip
        things = [first, *(thing for piece in rest for thing in piece.split(" and "))]
        assert segments(strings[name])[: len(things)] == tuple(dict.fromkeys(things))[: len(things)]


@given(st.text(max_size=30))
def test_parts_are_pieces_of_the_text_and_every_text_has_one(text: str) -> None:
    found = segments(text)
    assert found
    assert len(set(found)) == len(found)
    assert all(part in " ".join(text.lower().split()) for part in found)


def test_parts_of_val_and_test_become_texts_once_each() -> None:
    dataset = with_segments(toy(), "rules")
    strings = {t.id: t.text for t in dataset.texts}
    added = dataset.texts[len(toy().texts) :]
    assert dataset.texts[: len(toy().texts)] == toy().texts
    assert dataset.tasks == toy().tasks
    assert len({t.id for t in added}) == len(added)
    assert all(t.id == f"segment:{t.text}" for t in added)
    tasks = toy().tasks
    wanted = {
        part
        for e in (*tasks.retrieval, *tasks.matching, *tasks.two_by_two)
        if e.split != "train"
        for c in e.captions
        for part in segments(strings[c])
    }
    assert {t.text for t in added} == wanted
    assert dataset.counts["segments"].startswith(f"{len(wanted):,} parts of ")


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(UnknownName, match="there is one way to cut captions, segments=rules"):
        with_segments(toy(), "spacy")
    bare = replace(toy(), tasks=Tasks(czsl=toy().tasks.czsl))
    with pytest.raises(UnknownName, match="toy_world has none there; leave it out"):
        with_segments(bare, "rules")


def test_a_data_set_takes_it_as_an_option_after_its_false_captions() -> None:
    dataset = load_dataset("toy_world", scale=0.01, segments="rules")
    assert dataset.options == {"scale": 0.01, "segments": "rules"}
    assert any(t.id.startswith("segment:") for t in dataset.texts)
    assert {
        attr for attr in PAIR_ATTRS if f"segment:a {attr} circle" in {t.id for t in dataset.texts}
    }
