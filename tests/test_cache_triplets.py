"""Triplets by rule: what an edit says, what the edited caption is, and what no rule may ever say."""

import json
import os
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_builder import load_dataset
from cache_builder.datasets.base import Dataset, RetrievalExample, Tasks, TextRecord
from cache_builder.errors import UnknownName
from cache_builder.grammar import Clause
from cache_builder.reading import read
from cache_builder.rewriting import Refusal, Vocabulary, plainly
from cache_builder.testing import check_dataset
from cache_builder.triplet_files import Caption, Triplet
from cache_builder.triplet_rules import RULES, Draw, Shown, changes
from cache_builder.triplets import by_rules, captions_of, with_triplets

OFFICIAL = Path(os.environ.get("HEADSTART_OFFICIAL_DATA", "")) / "karpathy/coco_test.json"
TOY_001 = "1e98226deeef163759e7bb69f8e25e1c5f544b2908f8a3ebcb7426e755bd4024"
"""Digest of toy_world at scale 0.01, measured before there were triplets."""

SMALL = Vocabulary([read("a red cup"), read("a blue vase"), *map(read, ("a bowl", "a tray"))])
"""Two colours, and four groups of one kind: of each caption below, little can be drawn."""
WORDS = ("car", "bus", "truck", "dog", "cat", "horse", "table", "chair", "couch", "hat", "coat")
MANY = Vocabulary(
    [read(f"a {c} {w}") for c in ("red", "blue", "striped") for w in WORDS]
    + [read(f"a {p}") for p in ("man", "woman", "boy", "girl")]
)


def said(
    rule: str, text: str, *others: str, words: Vocabulary = MANY, n: int = 60
) -> set[tuple[str, str]]:
    """All that one rule makes of a caption over many seeds: (modification, target); a refusal as ("", why)."""
    family, name = rule.split("_")
    readings = [read(text), *map(read, others)]
    clause, shown = Clause(readings[0]), Shown.by(readings)
    found = set()
    for seed in range(n):
        change = RULES[family][name](clause, Draw(shown, words, np.random.default_rng(seed)))
        found.add(("", change.reason) if isinstance(change, Refusal) else tuple(change))
    return found


def named(images: dict[str, list[str]], split: str = "train") -> list[Caption]:
    return [Caption(f"{i}#{k}", i, c, split) for i, cs in images.items() for k, c in enumerate(cs)]


def captioned(images: dict[str, list[str]], split: str = "train") -> Dataset:
    listed = named(images, split)
    examples = tuple(
        RetrievalExample(i, tuple(c.id for c in listed if c.image == i), split) for i in images
    )
    texts = tuple(TextRecord(c.id, c.text) for c in listed)
    return Dataset("folder", (), texts, Tasks(retrieval=examples), decode="none")


# --- what the rules say, by hand ---


def test_a_thing_is_substituted_in_every_wording() -> None:
    new = ("a blue vase", "a blue bowl", "a blue tray")
    assert said("substitute_obj", "A blue cup left of a street", words=SMALL, n=300) == {
        (wording.format(new=n, old="blue cup"), f"A {n[2:]} left of a street")
        for n in new
        for wording in (
            "change the {old} to {new}",
            "replace the {old} with {new}",
            "turn the {old} into {new}",
            "{new} instead of the {old}",
            "has {new} instead of the {old}",
        )
    } | {("", "no other thing that no caption names")}  # SMALL has no other ground


def test_an_attribute_is_substituted_in_every_wording() -> None:
    target = "an orange cup left of a ring"
    words = Vocabulary([read("a red cup"), read("an orange cup")])
    assert said("substitute_att", "a red cup left of a ring", words=words) == {
        (wording, target)
        for wording in (
            "change the red cup to an orange one",
            "replace the red cup with an orange one",
            "make the red cup orange",
            "the red cup should be orange",
            "has an orange cup instead of the red one",
        )
    }
    many = said("substitute_att", "two red cups", words=words)
    assert ("change the red cups to orange ones", "two orange cups") in many
    assert ("has orange cups instead of the red ones", "two orange cups") in many
    people = said("substitute_att", "a young man", words=Vocabulary([read("an old man")]))
    assert ("change the young man to an old man", "an old man") in people
    assert not any("one" in said.split() for said, _ in people)


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("a red cup left of a blue ring", {"blue ring": "a red cup", "red cup": "a blue ring"}),
        ("there is a cup on a box", {"cup": "there is a box", "box": "there is a cup"}),
        ("A man riding a horse on a beach.", {"horse": "A man on a beach."}),
        ("A bowl of soup", {"soup": "A bowl"}),
        ("A dog is sitting on the side of a couch.", {"couch": "A dog."}),
        ("a hill with a bench and a dog", {"dog": "a hill with a bench"}),
        ("A cat and a dog sitting on a couch", {"dog": "A cat sitting on a couch", "couch": "A cat and a dog"}
         | {"cat": "A dog sitting on a couch"}),
        ("a cup on a large fluffy rug", {"large fluffy rug": None}),  # two unknown or more
        ("a cup on a fluffy rug", {"fluffy rug": "a cup", "cup": "a fluffy rug"}),
    ],
)  # fmt: skip
def test_what_is_left_when_a_thing_goes(text: str, targets: dict) -> None:
    found = {
        re.sub(r"^(remove|take away|without) the |^there (is|are) no ", "", modification): target
        for modification, target in said("remove_obj", text)
        if modification
    }
    assert found == {name: target for name, target in targets.items() if target is not None}


@pytest.mark.parametrize(
    "text",
    [
        "between a cup and a box",
        "a dog and a cat are on a couch",  # "a dog are"; the couch stands behind the verb
        "a bus stop",
        "A person holding a cell phone in their hand",
        "A bus that has bikes mounted on the front of it",
        "A wall with clocks mounted to it",
        "a man rests a cup near a plate that is hot",
        "a cup of coffee, a plate is here",
    ],
)
def test_what_hangs_together_is_not_cut(text: str) -> None:
    cut = {target for modification, target in said("remove_obj", text) if modification}
    assert cut <= {"a dog and a cat"}, cut


@pytest.mark.parametrize(
    ("rule", "text", "others", "expected"),
    [
        ("remove_att", "A red cup on a box", (), ("the cup is no longer red", "A cup on a box")),
        ("remove_att", "red cups", (), ("the cups are not red", "cups")),
        ("remove_att", "a dotted cup", (), ("remove the dotted pattern from the cup", "a cup")),
        ("remove_att", "an old apple", (), ("the apple is no longer old", "an apple")),
        ("remove_att", "a red cup and a blue cup", (), ("", "nothing that is named by itself")),
        ("remove_att", "a black and white cat", (), ("", "described in more words than are known")),
        ("remove_att", "a very small cat", (), ("", "described in more words than are known")),
        ("remove_att", "a red bus stop", (), ("", "nothing described")),
        ("substitute_att", "a black man", (), ("", "nothing described")),
        ("remove_att", "a white child", (), ("", "nothing described")),
        ("add_att", "Sheep on a road", (), ("", "no bare thing")),
        ("remove_obj", "a dog next to sheep", (), ("take away the dog", "sheep")),
        ("substitute_obj", "two people", (), ("", "no thing known by name")),
        ("substitute_obj", "two sheep", (), ("", "no thing that another may stand for")),
        ("substitute_obj", "a cup of tea", (), ("turn the tea into bread", "a cup of bread")),
        ("substitute_obj", "a man as he eats", (), ("", "no thing that another may stand for")),
        ("substitute_obj", "a dog and a dog", (), ("", "nothing that is named by itself")),
        ("add_att", "a cup on a street", (), ("make the cup red", "a red cup on a street")),
        ("add_att", "Cup on a street", (), ("the cup is red", "Red cup on a street")),
        ("add_att", "a cup", ("a red cup", "a blue cup", "a striped cup"),
         ("", "no other adjective that no caption says of it")),
        ("add_att", "a red cup", (), ("", "no bare thing")),
        ("add_obj", "a car.", (), ("add a bus next to the car", "a car next to a bus.")),
        ("add_obj", "a car parked near a chair", (), ("has a bus", "a car parked near a chair with a bus")),
        ("add_obj", "there is a red car", (), ("add a red bus", "there is a red car and a red bus")),
        ("add_obj", "a man", (), ("", "no thing known by name")),
        ("add_obj", "a car is going", (), ("", "it does not end in a thing")),
        ("add_worn", "a man rides a horse", (), ("the man is wearing a hat", "a man wearing a hat rides a horse")),
        ("add_worn", "a man in a suit", (), ("", "no person whose clothes are not told")),
        ("add_worn", "a man", ("he has a hat and a coat",), ("", "no clothing that no caption names")),
    ],
)  # fmt: skip
def test_what_a_rule_says(rule: str, text: str, others: tuple, expected: tuple) -> None:
    words = {"tea": ("bread", "tea", "rice", "soup"), "car": ("a car", "a red bus")}
    few = next((Vocabulary([*map(read, w)]) for key, w in words.items() if key in text), MANY)
    found = said(rule, text, *others, words=few)
    assert expected in found
    if not expected[0]:
        assert found == {expected}


def test_nothing_is_put_in_that_a_caption_says_of_the_same_thing() -> None:
    blue = said("substitute_att", "a red cup on a blue box", "a blue cup", words=SMALL)
    assert ("", "no other adjective that no caption says of it") in blue
    assert {target for modification, target in blue if modification} == {"a red cup on a red box"}
    things = said("substitute_obj", "a car", "a bus and a truck", "dogs, cats and horses")
    assert {target for _, target in things} <= {
        f"a {w}" for w in ("table", "chair", "couch", "hat", "coat")
    }


def test_what_a_caption_of_the_image_says_already_is_no_edit() -> None:
    image = ["A red cup left of a blue ring", "a red cup.", "a blue ring"]
    image += ["a cup left of a blue ring", "a red cup left of a ring"]
    readings = [*map(read, image)]
    refused: Counter[str] = Counter()
    rng = np.random.default_rng(0)
    found = changes(readings[0], Shown.by(readings), MANY, rng, refused)
    assert not [change for name, change in found if name.startswith("remove")]
    reasons = {f"remove_{name}: a caption of the image says it" for name in ("obj", "att")}
    assert reasons <= set(refused)


def test_words_are_put_in_as_often_as_captions_say_them() -> None:
    often = Vocabulary([read("a red cup"), *[read("a blue cup")] * 3, read("a green cup")])
    reading = read("a red cup")
    clause, shown, rng = Clause(reading), Shown.by([reading]), np.random.default_rng(0)
    drawn: Counter[str] = Counter()
    for _ in range(800):
        change = RULES["substitute"]["att"](clause, Draw(shown, often, rng))
        assert not isinstance(change, Refusal)
        drawn[change.target] += 1
    assert set(drawn) == {"a blue cup", "a green cup"}
    assert 560 < drawn["a blue cup"] < 640  # 3 of 4


# --- laws ---


def changed_words(triplet: Triplet) -> tuple[Counter, Counter]:
    """Words that went, and words that came, without articles."""
    old, new = (
        Counter(re.findall(r"\w+", text.lower()))
        for text in (triplet.reference_caption, triplet.target_caption)
    )
    articles = Counter({"a": 99, "an": 99})
    return old - new - articles, new - old - articles


def hold_to_the_laws(triplet: Triplet, said_of_image: set[str]) -> None:
    gone, come = changed_words(triplet)
    spoken = set(re.findall(r"\w+", triplet.modification.lower()))
    assert plainly(triplet.target_caption) not in said_of_image
    assert triplet.target_caption.strip()
    assert triplet.modification == triplet.modification.strip() != ""
    if triplet.category == "substitute":
        assert gone
        assert come
        assert set(come) <= spoken | {"one", "ones"}, "the edit says what comes"
    elif triplet.category == "remove":
        assert gone
        assert not come
    else:
        assert come
        assert not gone
        assert set(come) <= spoken | {"next", "to", "with", "and", "wearing"}
    for word in triplet.modification.split():
        assert (word in ("a", "an")) <= (word != triplet.modification.split()[-1])
    for article, word in re.findall(r"\b(an?) (\w+)", triplet.modification):
        vowel = bool(re.match(r"(?!uni|one|us|eu)[aeiou]|hour", word))
        assert (article == "an") == vowel, triplet.modification


def test_laws_hold_on_toy_world() -> None:
    made = by_rules(captions := captions_of(load_dataset("toy_world", scale=0.03)), 0)
    assert made.without == 0
    assert len(made.triplets) == 3 * len(captions)
    said_of = {c.image: set[str]() for c in captions}
    for c in captions:
        said_of[c.image].add(plainly(c.text))
    for triplet in made.triplets:
        hold_to_the_laws(triplet, said_of[triplet.image])
    removed = [t for t in made.triplets if t.category == "remove"]
    whole = r"(there is )?an? (\w+ )?\w+( (left of|right of|above|below) an? (\w+ )?\w+)?"
    assert all(re.fullmatch(whole, t.target_caption) for t in removed)


@pytest.mark.skipif(
    not OFFICIAL.is_file(),
    reason="set HEADSTART_OFFICIAL_DATA to a folder with karpathy/coco_test.json (data/coco_test.json of "
    "data-ming-and-application/CVLR-RD)",
)
def test_laws_hold_on_captions_of_photographs() -> None:
    rows = json.loads(OFFICIAL.read_text())[:250]
    captions = [
        Caption(f"{row['image']}#{k}", row["image"], caption.strip(), "train")
        for row in rows
        for k, caption in enumerate(row["caption"])
    ]
    made = by_rules(captions, 3)
    said_of = {row["image"]: {plainly(c) for c in row["caption"]} for row in rows}
    for triplet in made.triplets:
        hold_to_the_laws(triplet, said_of[triplet.image])
    kinds = Counter(t.category for t in made.triplets)
    assert kinds["substitute"] > 0.8 * len(captions)
    assert kinds["add"] > 0.8 * len(captions)
    assert kinds["remove"] > 0.35 * len(captions)


PARTS = (
    "a red dog",
    "two men",
    "on",
    "and",
    ",",
    "fluffy",
    "a bus",
    "of",
    "riding",
    "is",
    "é",
    "-",
    "their",
    ".",
    "",
)
TEXTS = st.one_of(st.text(max_size=25), st.lists(st.sampled_from(PARTS), max_size=9).map(" ".join))  # fmt: skip


@given(captions=st.lists(TEXTS, min_size=1, max_size=4), seed=st.integers(0, 99))
def test_any_captions_are_edited_or_refused_with_a_reason(captions: list[str], seed: int) -> None:
    readings = [read(c) for c in captions]
    shown = Shown.by(readings)
    for reading in readings:
        refused: Counter[str] = Counter()
        found = changes(reading, shown, MANY, np.random.default_rng(seed), refused)
        assert found == changes(reading, shown, MANY, np.random.default_rng(seed))
        families = [name.partition("_")[0] for name, _ in found]
        assert len(set(families)) == len(families)
        for family in set(RULES) - set(families):
            reasons = {reason.partition(":")[0] for reason in refused}
            assert {f"{family}_{name}" for name in RULES[family]} <= reasons, "every rule says why"
        for name, change in found:
            assert plainly(change.target) not in {plainly(c) for c in captions}
            triplet = Triplet("", "", reading.text, *change, category=name.partition("_")[0])
            gone, come = changed_words(triplet)
            assert bool(gone) == (triplet.category != "add")
            assert bool(come) == (triplet.category != "remove")


def test_a_seed_decides_and_the_order_of_captions_does_not() -> None:
    captions = captions_of(load_dataset("toy_world", scale=0.02))
    shuffled = random.Random(0).sample(captions, len(captions))
    one, turned, other = by_rules(captions, 0), by_rules(shuffled, 0), by_rules(captions, 1)

    def by_id(triplets: tuple[Triplet, ...]) -> dict[str, Triplet]:
        return {t.id: t for t in triplets}

    assert by_id(one.triplets) == by_id(turned.triplets)
    assert (one.by_rule, one.refused) == (turned.by_rule, turned.refused)
    assert by_id(one.triplets) != by_id(other.triplets)


# --- the data set ---


def test_a_data_set_without_triplets_is_what_it_was() -> None:
    dataset = load_dataset("toy_world", scale=0.01)
    assert dataset.digest() == TOY_001
    assert '"triplets"' not in dataset.tasks.to_json()
    assert Tasks.from_json(dataset.tasks.to_json()).triplets == ()


def test_triplets_join_texts_by_string_and_pass_the_contract_of_data_sets() -> None:
    plain = load_dataset("toy_world", scale=0.01)
    dataset = load_dataset("toy_world", scale=0.01, triplets="rules:5")
    assert dataset.options == {"scale": 0.01, "triplets": "rules:5"}
    assert dataset.tasks.kinds == (*plain.tasks.kinds, "triplets")
    assert dataset.digest() != plain.digest()
    check_dataset(dataset)
    assert dataset.texts[: len(plain.texts)] == plain.texts
    added = dataset.texts[len(plain.texts) :]
    assert all(t.id == f"triplet:{t.text}" for t in added)
    strings = [t.text for t in dataset.texts]
    assert len(set(strings)) == len(strings), "one text a string"
    captions = {(c.image, c.text): c.split for c in captions_of(plain)}
    by_id = {t.id: t.text for t in dataset.texts}
    for e in dataset.tasks.triplets:
        assert captions[e.image, by_id[e.reference]] == e.split
        assert by_id[e.modification] != by_id[e.target] != by_id[e.reference]
    assert {e.split for e in dataset.tasks.triplets} == {"train", "val"}


def test_every_caption_and_rule_is_counted() -> None:
    images = {"a.jpg": ["a red car left of a blue bus", "hm"], "b.jpg": ["a dog", "a dog"]}
    made = with_triplets(captioned(images), "rules")
    counts = {k.removeprefix("triplets, "): v for k, v in made.counts.items()}
    assert counts["triplets"] == f"{len(made.tasks.triplets)} by rule, seed 0"
    rules = [f"{family}_{name}" for family, names in RULES.items() for name in names]
    assert sum(int(counts[r]) for r in rules) == len(made.tasks.triplets)
    assert sum(int(counts[c]) for c in RULES) == len(made.tasks.triplets)
    assert counts["captions without"] == "1"
    assert counts["not remove_obj: no thing known by name that could go"] == "1"
    texts = len(captioned(images).texts)
    assert counts["texts added"] == str(len(made.texts) - texts)


@pytest.mark.parametrize(
    ("source", "images", "split", "message"),
    [
        ("rules:x", {"a.jpg": ["a dog"]}, "train", "triplets=rules:SEED with a whole number"),
        ("rules:", {"a.jpg": ["a dog"]}, "train", "triplets=rules:SEED with a whole number"),
        ("rules", {"a.jpg": ["a dog"]}, "test", "folder has none there"),
        ("rules", {"a.jpg": ["hm"]}, "val", "no rule applies to any of the 1 captions of folder"),
    ],
)
def test_what_cannot_be_done_is_refused(
    source: str, images: dict, split: str, message: str
) -> None:
    with pytest.raises(UnknownName, match=message):
        with_triplets(captioned(images, split), source)
