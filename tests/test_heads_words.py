"""Words: which vector each one gets, who adds what is missing, and auxiliary attributes from answers or nearest."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import PAIRS, drawn, make_drawn

from cache_builder import FeatureCache, build, load_dataset
from cache_builder.auxiliary import (
    prompt,
    read_answers,
    read_auxiliary,
    write_auxiliary,
)
from cache_builder.backbones import llava
from cache_builder.datasets.base import CompositionExample, CompositionTask, Dataset, Tasks
from cache_builder.errors import CacheError, UnknownName
from cache_builder.records import DatasetError
from cache_builder.words import with_words
from heads import checkpoint, cli
from heads.errors import ConfigError, MissingStream
from heads.runs import score_run, train_run
from heads.source import context_of
from heads.words import nearest, word_tables, word_vectors

TRAIN = PAIRS[:11]
SMALL: dict[str, Any] = {
    "head": {"n_local": 2, "n_global": 2},
    "train": {"steps": 3, "batch_size": 8, "device": "cpu"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("words")


@pytest.fixture(scope="module")
def spoken(folder: Path) -> FeatureCache:
    """Under the tiny LLaVA: words of the data set, and no auxiliary ones."""
    return build(drawn(), llava.tiny(), folder / "llava.zarr", progress=False)


@pytest.fixture(scope="module")
def named(folder: Path) -> FeatureCache:
    """Under the tiny CLIP, with bare words among the texts and two auxiliary ones."""
    from cache_builder.backbones import clip

    return build(
        with_words(drawn(), str(written(folder))), clip.tiny(), folder / "clip.zarr", progress=False
    )


def written(folder: Path) -> Path:
    """Three words for one pair, one of them an attr and one an obj's name; one word for another pair."""
    path = folder / "auxiliary.jsonl"
    if not path.exists():
        found = {("blue", "bag"): ("green", "fan", "shiny"), ("red", "bag"): ("shiny",)}
        write_auxiliary(found, "answers", path)
    return path


# Vectors.


def test_a_word_of_llava_is_its_normed_states_mean(spoken: FeatureCache) -> None:
    found = word_vectors(spoken, "llava", [("obj", "hat"), ("attr", "red")])
    scale = spoken.readout()["text/norm.weight"]
    for vector, name in zip(found, ("obj:hat", "attr:red"), strict=True):
        word = list(spoken.word_ids).index(name)
        (part,) = range(*spoken.word_parts[word : word + 2])
        states, _ = spoken.read_ragged("word/states", np.array([part]))
        states = states.astype(np.float64)
        eps = float(spoken.readout()["text/eps"])
        normed = scale * states / np.sqrt((states**2).mean(1, keepdims=True) + eps)
        assert np.allclose(vector.numpy(), normed.mean(0), atol=1e-5)


def test_a_word_of_clip_is_the_pooled_embedding_of_the_bare_word(named: FeatureCache) -> None:
    found = word_vectors(named, "clip_text", [("aux", "shiny"), ("attr", "red"), ("aux", "fan")])
    texts = dict(zip(named.text_ids, named.texts, strict=True))
    assert [texts[i] for i in ("aux:shiny", "attr:red", "aux:fan")] == ["shiny", "red", "fan"]
    stored = named.read("text/pooled", named.rows("text", ["aux:shiny", "attr:red", "aux:fan"]))
    assert torch.equal(found, torch.from_numpy(stored).float())


def test_a_word_of_glove_is_the_mean_of_its_parts(named: FeatureCache, tmp_path: Path) -> None:
    path = tmp_path / "glove.txt"
    path.write_text("chain 1 2\nlink 3 6\nother 9 9\nred 0 0.5\n")
    found = word_vectors(named, "glove", [("attr", "chain-link"), ("attr", "Red")], str(path))
    assert found.tolist() == [[2, 4], [0, 0.5]]
    with pytest.raises(ConfigError, match=r"no vector for 1 of 2 words: cup.*head\.glove"):
        word_vectors(named, "glove", [("attr", "red"), ("obj", "cup")], str(path))
    with pytest.raises(ConfigError, match=r"head\.glove"):
        word_vectors(named, "glove", [("attr", "red")])


def test_glove_is_read_by_the_rules_of_feasibility(named: FeatureCache, tmp_path: Path) -> None:
    """The first line of a word counts; dots part a name; what is no vector is refused in one sentence."""
    path = tmp_path / "glove.txt"
    path.write_text("faux 1 3\nfur 3 5\nfur 9 9\n. . 7 7\n")
    found = word_vectors(named, "glove", [("attr", "Faux.Fur"), ("obj", "fur")], str(path))
    assert found.tolist() == [[2, 4], [3, 5]]
    assert found.dtype == torch.float32
    for line, message in (("fur 1 x", "'x'"), ("fur 1 nan", "not finite"), ("fur 1", "1 numbers")):
        path.write_text(f"faux 1 3\n{line}\n")
        with pytest.raises(ConfigError, match=f"line 2 .*{message}"):
            word_vectors(named, "glove", [("obj", "fur")], str(path))
    with pytest.raises(ConfigError, match=r"nowhere\.txt: No such file"):
        word_vectors(named, "glove", [("obj", "fur")], str(tmp_path / "nowhere.txt"))


def test_the_table_has_a_row_by_role_and_word(named: FeatureCache, folder: Path) -> None:
    """An auxiliary word that is an attr is that attr; one that is an obj's name is not that obj."""
    path = str(written(folder))
    tables = word_tables(context_of(named), named, words="clip_text", auxiliary=path).tables
    order = [("attr", a) for a in ("blue", "green", "red")]
    order += [("obj", o) for o in ("bag", "cup", "fan", "hat", "toy")]
    order += [("aux", "fan"), ("aux", "shiny")]
    assert torch.equal(tables["words"], word_vectors(named, "clip_text", order))
    assert tables["auxiliary"].tolist() == [[0, 0, 1, 8, 9], [2, 0, 9, -1, -1]]
    none = word_tables(context_of(named), named, words="clip_text", auxiliary="none").tables
    assert none["auxiliary"].shape == (0, 5)
    assert len(none["words"]) == 8


def test_homographs_are_two_words(tmp_path: Path) -> None:
    pairs = (("orange", "orange"), ("dry", "orange"))
    task = CompositionTask((CompositionExample("a", *pairs[0], "train"),), {"train": pairs}, {})
    data = Dataset("two", (), (), Tasks(czsl=task), "nothing")
    ids = {t.id: t.text for t in with_words(data, "vocabulary").texts}
    assert ids == {"attr:dry": "dry", "attr:orange": "orange", "obj:orange": "orange"}
    path = tmp_path / "glove.txt"
    path.write_text("dry 1 0\norange 0 1\n")
    cache = build(
        data, llava.tiny(), tmp_path / "two.zarr", streams=["word/states"], progress=False
    )
    tables = word_tables(
        context_of(cache), cache, words="glove", glove=str(path), auxiliary="nearest"
    ).tables
    assert tables["words"].tolist() == [[1, 0], [0, 1], [0, 1]]
    assert tables["auxiliary"].tolist() == [[1, 0, 0, -1, -1], [0, 0, 1, -1, -1]]


def test_the_nearest_attributes_are_those_of_largest_cosine() -> None:
    attrs = ("a", "b", "c", "d", "e")
    vectors = torch.tensor([[1.0, 0], [2, 0.1], [0, 3], [1, 1], [-1, 0]])
    found = nearest(vectors, attrs, [("a", "x"), ("c", "y"), ("a", "y")])
    assert found == {
        ("a", "x"): ("b", "d", "c"),
        ("c", "y"): ("d", "b", "a"),
        ("a", "y"): ("b", "d", "c"),
    }
    assert nearest(vectors[:2], attrs[:2], [("a", "x")]) == {("a", "x"): ("b",)}
    assert nearest(vectors[:1], attrs[:1], [("a", "x")]) == {}


# What a cache lacks, and the command that adds it.


def test_words_a_cache_lacks_are_added_by_the_command_that_the_refusal_names(
    tmp_path: Path,
) -> None:
    options = {"scale": 0.003}
    path, auxiliary = tmp_path / "toy.zarr", tmp_path / "auxiliary.jsonl"
    kept = ("image/patches", "image/prefix", "word/states")
    data = load_dataset("toy_world", None, **options)
    tiny = llava.tiny(tmp_path / "tiny")
    cache = build(
        data, tiny, path, streams=kept, progress=False, backbone_name=f"llava:{tmp_path / 'tiny'}"
    )
    assert cache.tasks.czsl is not None
    attr, obj = cache.tasks.czsl.pairs["train"][0]
    write_auxiliary({(attr, obj): ("glossy", "very-soft")}, "answers", auxiliary)

    def tables() -> Any:
        held = FeatureCache.open(path)
        return word_tables(context_of(held), held, words="llava", auxiliary=str(auxiliary)).tables

    with pytest.raises(
        MissingStream, match=r"lacks 2 of the 34 words .* first: aux:glossy"
    ) as told:
        tables()
    words = shlex.split(str(told.value).partition("add them: headstart ")[2])
    assert words[-1] == "--append"
    before = FeatureCache.open(path)
    patches, states = before.read("image/patches"), before.read_ragged("word/states")[0]
    assert cli.main(words) == 0
    after = FeatureCache.open(path)
    assert [w for w in after.word_ids if w.startswith("aux:")] == ["aux:glossy", "aux:very-soft"]
    assert np.array_equal(after.read("image/patches"), patches)
    assert np.array_equal(after.read_ragged("word/states")[0][: len(states)], states)
    assert after.header.options == {**options, "words": str(auxiliary)}
    found = tables()
    n = len(cache.tasks.czsl.attrs) + len(cache.tasks.czsl.objs)
    assert found["auxiliary"].tolist() == [[*found["auxiliary"][0, :2].tolist(), n, n + 1, -1]]
    # The words of a cache are those of a fresh build with the same option, whatever the order of adding.
    fresh = build(
        load_dataset("toy_world", None, **options, words=str(auxiliary)),
        tiny,
        tmp_path / "fresh.zarr",
        streams=kept,
        progress=False,
    )
    one, two = (word_vectors(c, "llava", [("aux", "very-soft")]) for c in (after, fresh))
    assert torch.allclose(one, two, atol=1e-3)
    with pytest.raises(CacheError, match=r"2 of the \d+ texts .* first is .aux:glossy"):
        build(
            load_dataset("toy_world", None, **options, words="vocabulary"),
            tiny,
            path,
            streams=kept,
            append=True,
            progress=False,
        )


def test_a_source_of_words_that_the_cache_has_not_is_refused(
    spoken: FeatureCache, named: FeatureCache, tmp_path: Path
) -> None:
    with pytest.raises(MissingStream, match=r"words=llava reads word/states.*clip_text"):
        word_vectors(named, "llava", [("attr", "red")])
    with pytest.raises(
        MissingStream, match=r"words=clip_text reads text/pooled.*head\.words=llava"
    ):
        word_vectors(spoken, "clip_text", [("attr", "red")])
    plain = make_drawn(tmp_path / "plain.zarr")
    with pytest.raises(MissingStream, match=r"first: attr:red; add them: .*words=.*vocabulary"):
        word_vectors(plain, "clip_text", [("attr", "red")])


def test_pairs_of_another_data_set_are_refused(named: FeatureCache, tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    write_auxiliary({("blue", "bag"): ("shiny",), ("mashed", "potato"): ("hot",)}, "nearest", path)
    with pytest.raises(ConfigError, match=r"1 of the 2 pairs .* mashed potato"):
        word_tables(context_of(named), named, words="clip_text", auxiliary=str(path))


def test_bare_words_need_a_czsl_task() -> None:
    data = Dataset("none", (), (), Tasks(), "nothing")
    with pytest.raises(UnknownName, match="none has none"):
        with_words(data, "vocabulary")


def test_words_are_part_of_what_a_data_set_is(folder: Path) -> None:
    plain = drawn()
    assert (
        plain.digest()
        == Dataset(plain.name, plain.images, plain.texts, plain.tasks, plain.decode).digest()
    )
    vocabulary, all_of_them = (
        with_words(plain, source) for source in ("vocabulary", str(written(folder)))
    )
    assert all_of_them.words == ("fan", "shiny")
    digests = {data.digest() for data in (plain, vocabulary, all_of_them)}
    digests.add(replace(plain, words=all_of_them.words).digest())
    assert len(digests) == 4


# Auxiliary attributes.


def test_answers_are_filtered_and_every_rejection_is_counted(tmp_path: Path) -> None:
    pairs = [("ripe", "apple"), ("old", "tea_pot"), ("wet", "dog"), ("dry", "dog"), ("big", "cat")]
    answers = [
        {"attr": "ripe", "obj": "apple", "answer": "1. Red\n2. juicy\n3. ripe\n4. sweet\n5. round"},
        {
            "attr": "old",
            "obj": "tea_pot",
            "answer": ["Rusty", "pot", "very old", "rusty", "chipped."],
        },
        {"attr": "ripe", "obj": "apple", "answer": "green, sour, hard"},
        {"attr": "wet", "obj": "dog", "answer": 3},
        {"attr": "wet", "obj": "stone", "answer": "a, b, c"},
        {"attr": "dry", "obj": "dog", "answer": "- **well-groomed**; soft; brown"},
        {"attr": "big", "obj": "cat", "answer": "100%, cat"},
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in answers))
    found = read_answers(path, pairs)
    assert found.found == {
        ("ripe", "apple"): ("red", "juicy", "sweet"),
        ("old", "tea_pot"): ("rusty", "chipped"),
        ("dry", "dog"): ("well-groomed", "soft", "brown"),
    }
    assert found.rejected == {
        "row: no train pair": 1,
        "row: pair answered before": 1,
        "row: no answer": 1,
        "word: repeats the pair": 3,
        "word: not one word of letters": 2,
        "word: said twice": 1,
        "word: beyond the first 3": 1,
    }
    assert found.short == (("old", "tea_pot"), ("wet", "dog"), ("big", "cat"))
    out = tmp_path / "auxiliary.jsonl"
    write_auxiliary(found.found, "answers", out)
    assert read_auxiliary(out) == found.found
    with pytest.raises(FileExistsError):
        write_auxiliary(found.found, "answers", out)


def test_answers_of_which_none_can_be_used_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"attr": "ripe", "obj": "apple", "prompt": "…"}\n')
    with pytest.raises(
        DatasetError, match=r"no answer that can be used in 1 rows: row: no answer \(1\)"
    ):
        read_answers(path, [("ripe", "apple")])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"attr": "a", "obj": "b", "auxiliary": "c"}, "not of the form"),
        ({"attr": "a", "obj": "b", "auxiliary": [1]}, "not of the form"),
        ({"attr": "a", "auxiliary": ["c"]}, "not of the form"),
        ({"attr": "a", "obj": "b", "auxiliary": ["c"], "source": "guess"}, "not of the form"),
        ({"attr": "a", "obj": "b", "auxiliary": ["c"], "more": 1}, "not of the form"),
        ({"attr": "a", "obj": "b", "auxiliary": []}, "1 to 3 different"),
        ({"attr": "a", "obj": "b", "auxiliary": ["c", "c"]}, "1 to 3 different"),
        ({"attr": "a", "obj": "b", "auxiliary": ["c", "d", "e", "f"]}, "1 to 3 different"),
        ({"attr": "x", "obj": "y", "auxiliary": ["c"]}, "was there before"),
    ],
)
def test_a_damaged_file_of_auxiliary_attributes_is_refused_by_line(
    row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "auxiliary.jsonl"
    good = {"attr": "x", "obj": "y", "auxiliary": ["z"], "source": "nearest"}
    path.write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
    with pytest.raises(DatasetError, match=f"line 2: .*{re.escape(message)}"):
        read_auxiliary(path)


def test_a_prompt_asks_for_five_words_about_the_pair() -> None:
    text = prompt("Faux.Leather", "tea_pot")
    assert "five adjectives" in text
    assert '"faux leather"' in text
    assert "tea pot" in text


# The verb, and a run.


def test_the_verb_asks_reads_and_stands_in(
    spoken: FeatureCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = str(spoken.place)
    asked, answered, out, near = (tmp_path / f"{name}.jsonl" for name in "qanx")
    assert cli.main(["words", cache, "--prompts", str(asked)]) == 0
    rows = [json.loads(line) for line in asked.read_text().splitlines()]
    assert [(row["attr"], row["obj"]) for row in rows] == list(TRAIN)
    answered.write_text(
        "".join(json.dumps({**row, "answer": "shiny, soft, 5"}) + "\n" for row in rows[1:])
    )
    assert cli.main(["words", cache, "--answers", str(answered), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"rejected +10  word: not one word of letters", said)
    assert "11 train pairs have fewer than 3 words" in said
    assert "blue bag: none" in said
    assert "10 of 11 train pairs" in said
    assert f"--set words={out} --append" in said
    assert set(read_auxiliary(out)) == set(TRAIN[1:])
    assert cli.main(["words", cache, "--nearest", "--out", str(near)]) == 0
    assert "no language model was asked" in capsys.readouterr().out
    assert {json.loads(line)["source"] for line in near.read_text().splitlines()} == {"nearest"}
    assert cli.main(["words", cache, "--nearest"]) == 1
    assert "--out" in capsys.readouterr().err


def test_a_run_trains_saves_and_scores_the_same_after_loading(
    spoken: FeatureCache, tmp_path: Path
) -> None:
    run = train_run(
        spoken, "trident", tmp_path / "run", task="czsl", settings=SMALL, progress=False
    )
    steps = [record for record in run.result.history if "comp_loss" in record]
    assert len(steps) == 3
    assert {"comp_loss", "ortho_loss", "dis_loss", "with_partner"} <= set(steps[0])
    assert run.record["head"]["auxiliary"] == "nearest"
    loaded = checkpoint.load(tmp_path / "run")
    state, again = run.head.state_dict(), loaded.state_dict()
    assert all(torch.equal(state[name], again[name]) for name in state)
    # What its tables held at first is in the trained weights; a loaded context knows their shapes.
    shapes = {name: table.shape for name, table in run.head.context.tables.items()}
    assert {name: table.shape for name, table in loaded.context.tables.items()} == shapes
    assert bool((again["auxiliary"] >= -1).all())
    assert bool(again["auxiliary"].any())
    (table,) = score_run(tmp_path / "run", split="test")
    assert table.is_dir()


def test_a_run_on_another_family_takes_bare_words_and_its_pooled_embedding(
    named: FeatureCache, folder: Path, tmp_path: Path
) -> None:
    head = {**SMALL["head"], "words": "clip_text", "global_stream": "pooled"}
    settings = {**SMALL, "head": {**head, "auxiliary": str(written(folder))}}
    run = train_run(
        named, "trident", tmp_path / "run", task="czsl", settings=settings, progress=False
    )
    assert run.head.get_buffer("auxiliary").shape == (2, 5)
    assert run.head.get_parameter("words.table").shape == (3 + 5 + 2, 24)
    assert run.head.get_parameter("image.weight").shape == (24, 48)  # as wide as what is pooled


def test_the_word_vectors_of_a_run_move_less_than_all_else(
    spoken: FeatureCache, tmp_path: Path
) -> None:
    train = {**SMALL["train"], "steps": 1, "warmup_steps": 0, "optimizer": "adam", "eps": 1e-12}
    settings = {**SMALL, "train": {**train, "lr": 1e-3, "weight_decay": 0.0, "clip": 1e9}}
    run = train_run(
        spoken, "trident", tmp_path / "run", task="czsl", settings=settings, progress=False
    )
    moved = run.head.get_parameter("words.table").detach() - run.head.context.tables["words"]
    assert float(moved.abs().max()) == pytest.approx(0.0075 * 1e-3, rel=0.05)
