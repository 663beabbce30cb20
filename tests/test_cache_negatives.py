"""False captions by rule: what a caption is read as, what each rule says, and what no rule may ever say."""

import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cache_builder import load_dataset
from cache_builder.cli_build import options_of
from cache_builder.datasets.base import Dataset, RetrievalExample, Tasks, TextRecord
from cache_builder.demo.world import ATTRS, OBJS
from cache_builder.errors import UnknownName
from cache_builder.lexicon import COVERS, RELATIONS, lexicon, near
from cache_builder.negative_rules import (
    RULES,
    Refusal,
    Told,
    Vocabulary,
    edited,
    false_caption,
    plainly,
)
from cache_builder.negatives import with_negatives
from cache_builder.reading import read

CATEGORIES = [f"{family}_{name}" for family, rules in RULES.items() for name in rules]
WORDS = ("car", "bus", "truck", "dog", "cat", "horse", "table", "chair", "couch", "bench", "fence")
COLOURS = ("red", "blue", "green", "white")
VOCABULARY = Vocabulary(
    [read(f"a {c} {w}") for c in (*COLOURS, "striped", "dotted") for w in WORDS]
    + [read("a man"), read("a woman"), read("a boy"), read("an orange cup")]
)


def rule(category: str, text: str, *others: str, seed: int = 0) -> str:
    """What one rule makes of a caption, or why it makes nothing."""
    reading = read(text)
    told = Told.by([reading, *(read(o) for o in others)])
    family, name = category.split("_")
    edits = RULES[family][name](reading, told, VOCABULARY, np.random.default_rng(seed))
    return edits.reason if isinstance(edits, Refusal) else edited(text, edits)


def captioned(images: dict[str, list[str]], split: str = "train") -> Dataset:
    texts = [TextRecord(f"{i}#{k}", c) for i, cs in images.items() for k, c in enumerate(cs)]
    examples = tuple(
        RetrievalExample(i, tuple(f"{i}#{k}" for k in range(len(cs))), split)
        for i, cs in images.items()
    )
    return Dataset("folder", (), tuple(texts), Tasks(retrieval=examples), decode="none")


# --- reading ---


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("a red cup left of two wooden chairs", [("cup", ["red"]), ("chairs", ["wooden"])]),
        ("A man skis down a snowy hill", [("man", []), ("hill", ["snowy"])]),
        ("people watch a game on a tv", [("people", []), ("tv", [])]),
        ("an orange and an orange cup", [("orange", []), ("cup", ["orange"])]),
        ("a stop sign, a dog bowl", [("stop sign", []), ("bowl", [])]),
        ("the man will watch it", [("man", [])]),
    ],
)
def test_a_caption_is_read_by_the_lexicon(text: str, phrases: list) -> None:
    found = [(p.noun.text, [a.text for a in p.adjectives]) for p in read(text).phrases]
    assert found == phrases


def test_the_longest_relation_is_read_and_pieces_cover_the_text_in_order() -> None:
    reading = read("A cup on the left of a box, on top of it.")
    assert [p.text for p in reading.pieces if p.of("relation")] == ["on the left of", "on top of"]
    ends = [(p.start, p.stop) for p in reading.pieces]
    assert all(a[1] <= b[0] for a, b in pairwise(ends))
    assert all(reading.text[p.start : p.stop] == p.text for p in reading.pieces)


def test_the_lexicon_is_consistent() -> None:
    """No word of a role stands in two groups; what covers what names groups that exist; false relations are known."""
    for word, entries in lexicon().items():
        assert len({e.role for e in entries}) == len(entries), word
        assert re.fullmatch(r"[a-z][a-z' -]*", word), word
    groups = {e.group for entries in lexicon().values() for e in entries}
    assert set(COVERS) | {g for some in COVERS.values() for g in some} <= groups
    assert all(false in lexicon() for false in RELATIONS.values())
    assert all(g in near(other) for g in groups for other in near(g)), "near is symmetric"


def test_the_lexicon_knows_every_word_of_toy_world() -> None:
    for attrs in ATTRS.values():
        assert all(any(e.role == "adjective" for e in lexicon()[a]) for a in attrs)
    assert all(any(e.role == "noun" for e in lexicon()[obj]) for obj in OBJS)


# --- the rules ---


@pytest.mark.parametrize(
    ("category", "text", "others", "expected"),
    [
        ("swap_att", "a red car left of a blue bus", (), "a blue car left of a red bus"),
        ("swap_obj", "a red car left of a blue bus", (), "a red bus left of a blue car"),
        ("replace_rel", "a car on the left of a bus", (), "a car on the right of a bus"),
        ("replace_rel", "A dog on top of a car.", (), "A dog under a car."),
        ("swap_obj", "A dog chasing an apple", (), "An apple chasing a dog"),
        ("swap_obj", "Dogs under tables", (), "Tables under dogs"),
        ("swap_att", "an orange cup on a red box", (), "a red cup on an orange box"),
        ("swap_obj", "a dog and a cat", (), "true in either order"),
        ("swap_obj", "a red dog and a cat", (), "a red cat and a dog"),
        ("swap_obj", "a dog under tables", (), "one thing against several"),
        ("swap_obj", "a man near a guy", (), "no two things of different names"),
        ("swap_att", "a red cup", (), "no two described things"),
        ("swap_att", "a red cup, a red box", (), "described alike"),
        ("swap_att", "a young man on a red box", (), "described by different kinds of words"),
        ("swap_att", "a red cup and a blue mug", (), "true in either order"),
        ("replace_rel", "a dog on top", (), "no relation between two things"),
        ("replace_obj", "two people", (), "no thing known by name"),
        ("replace_att", "a cup", (), "nothing described"),
        ("add_att", "a red cup", (), "no bare thing"),
        ("add_obj", "a man", (), "no thing known by name"),
        ("replace_obj", "a dog", ("a cat", "a horse"), "no other thing that no caption names"),
    ],
)
def test_what_a_rule_says(category: str, text: str, others: tuple, expected: str) -> None:
    if category == "replace_obj" and others:
        small = Vocabulary([read("a dog"), read("a cat"), read("a horse"), read("a man")])
        reading = read(text)
        told = Told.by([reading, *map(read, others)])
        edits = RULES["replace"]["obj"](reading, told, small, np.random.default_rng(0))
        assert isinstance(edits, Refusal)
        assert edits.reason == expected
    else:
        assert rule(category, text, *others) == expected


@pytest.mark.parametrize("seed", range(8))
def test_a_replaced_word_is_of_its_kind_and_number_and_nothing_else_changes(seed: int) -> None:
    made = rule("replace_obj", "two trucks", seed=seed)
    assert made in {"two cars", "two buses"} | {f"two {w}s" for w in WORDS if w not in ("truck", "bus", "bench")} | {
        "two benches", "two cups"
    }  # fmt: skip
    assert rule("replace_obj", "a dog", "a cat", seed=seed) not in {"a dog", "a cat", "a man"}
    painted = rule("replace_att", "a red car", "it is green", "a blue car", seed=seed)
    assert painted in {"a white car", "an orange car"}
    colours = {"red", "blue", "white", "orange", "striped", "dotted"}
    assert rule("add_att", "a car", "it is green", seed=seed) in {
        f"{'an' if c == 'orange' else 'a'} {c} car" for c in colours
    }
    added = rule("add_obj", "a dog.", "a cat", seed=seed)
    assert re.fullmatch(r"a dog and an? \w+\.", added)
    assert "cat" not in added


def test_a_kind_that_is_used_up_gives_way_to_others_but_never_to_what_is_named() -> None:
    few = Vocabulary([read(f"a {word} car") for word in ("red", "striped", "dotted", "young")])
    reading = read("a red car")
    told = Told.by([reading, read("it is striped")])
    for seed in range(8):
        edits = RULES["replace"]["att"](reading, told, few, np.random.default_rng(seed))
        assert not isinstance(edits, Refusal)
        assert edited(reading.text, edits) == "a dotted car"


def test_words_are_drawn_as_often_as_captions_say_them() -> None:
    often = Vocabulary(
        [read("a dog"), *[read("a cat")] * 3, *[read("a horse")] * 3, read("a goat"), read("a cow")]
    )
    reading, rng = read("a dog"), np.random.default_rng(0)
    drawn = Counter(
        often.noun(reading.phrases[0].entry, Told.by([reading]), rng) for _ in range(800)
    )
    assert set(drawn) == {"cat", "horse", "goat", "cow"}
    assert 250 < drawn["cat"] < 350  # 3 of 8
    assert 70 < drawn["cow"] < 130  # 1 of 8


# --- laws ---

PHRASES = st.builds(
    lambda attr, obj: f"a {attr} {obj}" if attr else f"a {obj}",
    st.sampled_from(["", *COLOURS, "striped", "young"]),
    st.sampled_from(["man", *WORDS, "orange", "scissors", "person", "stop sign"]),
)
CAPTIONS = st.one_of(
    st.text(alphabet="ab ',.-éß1\n", max_size=12),
    st.builds(
        lambda parts, joins, end: "".join(p + j for p, j in zip(parts, [*joins, end], strict=True)),
        st.lists(PHRASES, min_size=3, max_size=3),
        st.lists(
            st.sampled_from([" and ", " on ", " left of ", ", ", " riding ", " is with "]),
            min_size=2,
            max_size=2,
        ),
        st.sampled_from(["", ".", " here"]),
    ),
)


@given(captions=st.lists(CAPTIONS, min_size=1, max_size=4), seed=st.integers(0, 99))
def test_a_false_caption_is_no_caption_of_the_image_and_brings_nothing_that_is_named(
    captions: list[str], seed: int
) -> None:
    readings = [read(c) for c in captions]
    told = Told.by(readings)
    for reading in readings:
        refused: Counter[str] = Counter()
        found = false_caption(reading, told, VOCABULARY, np.random.default_rng(seed), refused)
        again = false_caption(reading, told, VOCABULARY, np.random.default_rng(seed))
        assert found == again, "the same seed, the same false caption"
        if found is None:
            assert refused.total() == len(CATEGORIES), "every rule says why not"
            continue
        category, text = found
        assert category in CATEGORIES
        assert plainly(text) not in {plainly(c) for c in captions}
        old, new = (Counter(re.findall(r"\w+", t.lower())) for t in (reading.text, text))
        articles = {"a": 0, "an": 0}
        changed = (new - old) | (old - new)
        if category.startswith("swap"):
            assert not set(changed) - set(articles), "swapping words keeps them all"
        if category.startswith("add"):
            assert not set(old - new) - set(articles), "adding takes nothing away"
        if not category.startswith("swap") and category != "replace_rel":
            brought = read(text).groups() - reading.groups()
            assert not brought & told.barred or category == "replace_obj"


def test_the_same_captions_give_the_same_in_any_order_and_another_seed_gives_others() -> None:
    images = {f"{i}.jpg": [f"a {c} {w} on a {'white ' if i % 2 else ''}{v}"] for i, (c, w, v) in enumerate(
        (c, w, v) for c in COLOURS for w in WORDS[:5] for v in WORDS[6:9]
    )}  # fmt: skip
    one = with_negatives(captioned(images), "rules")
    turned = with_negatives(captioned(dict(reversed(images.items()))), "rules:0")
    other = with_negatives(captioned(images), "rules:1")

    def false(dataset: Dataset) -> dict[str, str]:
        return {t.id: t.text for t in dataset.texts if t.id.startswith("rules/")}

    assert false(one) == false(turned)
    assert false(one) != false(other)
    assert {e.category for e in one.tasks.matching} == set(CATEGORIES)


# --- the data set ---


def test_every_caption_is_counted_and_test_stays_as_it_is() -> None:
    images = {"a.jpg": ["a red car left of a blue bus", "two people", "hm"], "b.jpg": ["a dog"]}
    dataset = captioned(images)
    tests = (RetrievalExample("c.jpg", ("a.jpg#0",), "test"),)
    dataset = replace(dataset, tasks=Tasks(retrieval=(*dataset.tasks.retrieval, *tests)))
    made = with_negatives(dataset, "rules")
    assert made.tasks.retrieval == dataset.tasks.retrieval
    assert {e.split for e in made.tasks.matching} == {"train"}
    strings = {t.id: t.text for t in made.texts}
    assert len(strings) == len(made.texts)
    for e in made.tasks.matching:
        assert e.images == (e.captions[0].split("#")[0],)
        assert strings[e.captions[1]] != strings[e.captions[0]]
    counts = {
        k: int(v.replace(",", "")) for k, v in made.counts.items() if k.startswith("negatives, ")
    }
    assert sum(counts[f"negatives, {c}"] for c in CATEGORIES) == len(made.tasks.matching)
    assert len(made.tasks.matching) + counts["negatives, captions without"] == 4
    assert counts["negatives, captions without"] == 2  # "two people" and "hm"
    assert counts["negatives, not swap_obj: no two things of different names"] >= 1


def test_a_false_caption_that_another_caption_says_is_counted_and_not_used() -> None:
    images = {"a.jpg": ["a dog chasing a cat", "a cat chasing a dog"]}
    counted = 0
    for seed in range(6):
        made = with_negatives(
            captioned({**images, "b.jpg": ["a red car on a blue bus"]}), f"rules:{seed}"
        )
        counted += "negatives, not swap_obj: a caption of the image says it" in made.counts
        of_a = [e.category for e in made.tasks.matching if e.images == ("a.jpg",)]
        assert not {"swap_obj", "swap_att"} & set(of_a)
    assert counted >= 2


@pytest.mark.parametrize(
    ("source", "images", "split", "message"),
    [
        ("words", {"a.jpg": ["a dog"]}, "train", "write negatives=rules, or negatives=rules:SEED"),
        ("rules:x", {"a.jpg": ["a dog"]}, "train", "with a whole number"),
        ("rules", {"a.jpg": ["a dog"]}, "test", "folder has none there"),
        ("rules", {"a.jpg": ["hm"]}, "val", "no rule applies to any of the 1 captions of folder"),
    ],
)
def test_what_cannot_be_done_is_refused(
    source: str, images: dict, split: str, message: str
) -> None:
    with pytest.raises(UnknownName, match=message):
        with_negatives(captioned(images, split), source)


def test_hard_negatives_of_its_own_are_not_mixed_with_others() -> None:
    with pytest.raises(UnknownName, match="toy_world has hard negatives of its own; leave it out"):
        load_dataset("toy_world", scale=0.01, negatives="rules")


def test_the_option_belongs_to_every_reader_and_stands_in_the_record(tmp_path: Path) -> None:
    assert options_of("coco", ["negatives=rules"]) == {"negatives": "rules"}
    (tmp_path / "data.csv").write_text('image,caption,split\na.jpg,"a red car on a bus",train\n')
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images/a.jpg")
    dataset = load_dataset("folder", tmp_path, negatives="rules:5")
    assert dataset.options == {"negatives": "rules:5"}
    assert dataset.tasks.kinds == ("matching", "retrieval")
    assert dataset.counts["negatives"] == "by rule, seed 5"
    other = load_dataset("folder", tmp_path)
    assert dataset.digest() != other.digest()
