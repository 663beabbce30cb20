"""Files of triplets: what is read, what is refused before anything is built, and what becomes of a model's answers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_builder import FeatureCache, load_dataset
from cache_builder.cli import main
from cache_builder.datasets import folder
from cache_builder.datasets.base import Dataset
from cache_builder.records import DatasetError, DatasetNotFound
from cache_builder.testing import check_dataset
from cache_builder.triplet_answers import prompt, read_answers, write_prompts
from cache_builder.triplet_files import (
    MOST_WORDS,
    Caption,
    Triplet,
    fault,
    read_captions,
    read_triplets,
    write_triplets,
)

ROW = {
    "id": "7",
    "image": "mugs/blue.jpg",
    "reference_caption": "a blue mug",
    "modification": "make the mug red",
    "target_caption": "a red mug",
}
CAPTIONS = [
    Caption("a.jpg#0", "a.jpg", "a red cup", "train"),
    Caption("a.jpg#1", "a.jpg", "one cup", "train"),
    Caption("b.jpg#0", "b.jpg", "a dog", "val"),
]
NAMES = [c.name for c in CAPTIONS]
ANSWER = {"modification": "make it blue", "target_caption": "a blue cup"}


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def mugs(tmp_path: Path) -> Path:
    """Six pictures with captions; those of mugs/red 1.png and mugs/blue.jpg are of train."""
    return folder.miniature(tmp_path / "mugs", kind="captions")


# --- files of triplets ---


def test_what_is_written_is_read_and_nothing_is_overwritten(tmp_path: Path) -> None:
    triplets = (
        Triplet("1", "ü.jpg", "a \u2028 mug", "make it “red”", "a red mug", "val", "substitute"),
        Triplet("2", "b.jpg", "a mug", "remove it", "a table"),
    )
    path = tmp_path / "t.jsonl"
    write_triplets(triplets, path)
    assert read_triplets(path).triplets == triplets
    before = path.read_bytes()
    with pytest.raises(DatasetError, match=r"t\.jsonl is there already and is not overwritten"):
        write_triplets(triplets[:1], path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.jsonl"], "no half-written file is left"
    with pytest.raises(DatasetError, match="there is no folder"):
        write_triplets(triplets, tmp_path / "none/t.jsonl")


def test_a_published_file_is_read_with_its_own_key_and_numbers_for_ids(tmp_path: Path) -> None:
    rtd = {k: v for k, v in ROW.items() if k != "modification"} | {"id": 12}
    rtd |= {"conditioning_caption": " make the mug red ", "score": 0.7}
    both = {**ROW, "conditioning_caption": ROW["modification"]}
    found = read_triplets(lines(tmp_path / "t.jsonl", rtd, both))
    assert [t.id for t in found.triplets] == ["12", "7"]
    assert {t.modification for t in found.triplets} == {"make the mug red"}
    assert {(t.split, t.category) for t in found.triplets} == {("train", "")}
    assert found.ignored == ("score",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": None}, r"line 2: id is None, not an integer"),
        ({"id": " "}, r"line 2: id is ' '; it must be a text that is not blank"),
        ({"id": True}, r"line 2: id is True, not an integer"),
        ({"image": 3}, r"line 2: image is 3"),
        ({"reference_caption": ""}, r"line 2: reference_caption is ''"),
        ({"modification": "\n"}, r"line 2: modification is '\\n'"),
        ({"target_caption": ["a"]}, r"line 2: target_caption is \['a'\]"),
        ({"target_caption": "A blue  mug."}, "target_caption says what reference_caption says"),
        ({"conditioning_caption": "other"}, "modification and conditioning_caption differ"),
        ({"split": "test"}, "split is 'test'; triplets are trained on, so it is one of train, val"),
        ({"split": 1}, "split is 1"),
        ({"category": "swap"}, "category is 'swap', not one of substitute, remove, add"),
        ({"category": ["add"]}, r"category is \['add'\]"),
        ({"id": "1"}, "line 2: id '1' was there before"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(tmp_path: Path, change: dict, message: str) -> None:
    path = lines(tmp_path / "t.jsonl", {**ROW, "id": "1"}, {**ROW, "id": "2", **change})
    with pytest.raises(DatasetError, match=message) as caught:
        read_triplets(path)
    assert "has 1 bad rows" in str(caught.value)


def test_all_bad_rows_are_counted_and_the_first_three_shown(tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", ROW, *[{**ROW, "target_caption": ""}] * 5)
    with pytest.raises(DatasetError, match=r"has 5 bad rows: line 2.*; line 3.*; line 4") as caught:
        read_triplets(path)
    assert "line 5" not in str(caught.value)
    with pytest.raises(DatasetError, match="has no rows"):
        read_triplets(lines(tmp_path / "empty.jsonl", "\n"))
    with pytest.raises(DatasetNotFound, match=r"there is no file .*none\.jsonl of triplets"):
        read_triplets(tmp_path / "none.jsonl")


def test_a_file_adds_its_triplets_to_a_data_set(tmp_path: Path, mugs: Path) -> None:
    more = {**ROW, "id": "8", "split": "val", "category": "remove", "extra": 1}
    more |= {"image": "fruit/orange.png", "modification": "make the mug red"}
    path = lines(tmp_path / "t.jsonl", ROW, more)
    dataset = load_dataset("folder", mugs, triplets=str(path))
    check_dataset(dataset)
    strings = {t.id: t.text for t in dataset.texts}
    first, second = dataset.tasks.triplets
    assert (first.id, first.image, first.split, first.category) == ("7", ROW["image"], "train", "")
    assert first.reference == "mugs/blue.jpg#0", "a caption that is there already is no new text"
    assert strings[first.modification] == ROW["modification"]
    assert strings[first.target] == ROW["target_caption"]
    assert (second.split, second.category) == ("val", "remove")
    assert first.modification == second.modification, "one text a string"
    assert dataset.counts["triplets"] == "2 of t.jsonl"
    assert (
        dataset.counts["triplets, remove"] == dataset.counts["triplets, without a category"] == "1"
    )
    assert dataset.counts["triplets, keys ignored"] == "'extra'"


def test_images_that_the_data_set_does_not_have_are_named(tmp_path: Path, mugs: Path) -> None:
    rows = [{**ROW, "id": f"n{i}", "image": f"{i % 5}.jpg"} for i in range(10)]
    path = lines(tmp_path / "t.jsonl", ROW, *rows)
    with pytest.raises(DatasetError, match=r"5: '0\.jpg', '1\.jpg', '2\.jpg', …"):
        load_dataset("folder", mugs, triplets=str(path))


# --- captions ---


def test_captions_of_a_file_have_the_ids_that_a_folder_gives_them(mugs: Path) -> None:
    plain: Dataset = load_dataset("folder", mugs)
    strings = {t.id: t.text for t in plain.texts}
    expected = [
        Caption(c, e.image, strings[c], e.split) for e in plain.tasks.retrieval for c in e.captions
    ]
    assert read_captions(mugs / "data.jsonl") == expected


def test_captions_are_collected_over_rows_and_are_of_train_without_a_split(tmp_path: Path) -> None:
    table = tmp_path / "c.csv"
    table.write_text('image,caption\na.jpg,"a cup, red"\nb.jpg,a dog\na.jpg,a mug\na.jpg,a mug\n')
    found = read_captions(table)
    assert [(c.id, c.text, c.split) for c in found] == [
        ("a.jpg#0", "a cup, red", "train"),
        ("a.jpg#1", "a mug", "train"),
        ("b.jpg#0", "a dog", "train"),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"caption": "a cup"}, "line 2: image is None"),
        ({"image": "../a.jpg", "caption": "a cup"}, r"line 2: image: .*\.\."),
        ({"image": "b.jpg"}, "line 2: needs either caption or captions; has image"),
        ({"image": "b.jpg", "caption": "a", "captions": ["b"]}, "needs either caption or captions"),
        ({"image": "b.jpg", "caption": " "}, "line 2: caption is ' '"),
        ({"image": "b.jpg", "captions": []}, "line 2: captions is \\[\\], not a list of texts"),
        ({"image": "b.jpg", "captions": ["a", ""]}, "line 2: caption is ''"),
        ({"image": "b.jpg", "caption": "a", "split": "dev"}, "split 'dev' is not one of"),
        ({"image": "a.jpg", "caption": "a", "split": "val"}, "'a.jpg' is of val, and was of train"),
    ],
)
def test_bad_captions_are_refused(tmp_path: Path, row: dict, message: str) -> None:
    path = lines(tmp_path / "c.jsonl", {"image": "a.jpg", "caption": "a cup"}, row)
    with pytest.raises(DatasetError, match=message):
        read_captions(path)


# --- prompts and answers ---


def test_prompts_ask_about_every_caption(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    assert write_prompts(CAPTIONS, path) == 3
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["id"] for r in rows] == NAMES
    assert rows[0] == {
        "id": "a.jpg/a.jpg#0",
        "image": "a.jpg",
        "reference_caption": "a red cup",
        "prompt": prompt("a red cup"),
    }
    assert all(f'"{word}"' in rows[0]["prompt"] for word in ANSWER)
    assert '"a red cup"' in rows[0]["prompt"]


@pytest.mark.parametrize(
    "answer",
    [
        ANSWER,
        json.dumps(ANSWER),
        f"```json\n{json.dumps(ANSWER, indent=2)}\n```",
        f"Sure! Here it is: {json.dumps(ANSWER)} {{I hope}} it helps.",
        f"{json.dumps(ANSWER)} Again: {json.dumps(ANSWER)}",
        {**ANSWER, "modification": "  make\n it  blue "},
    ],
)
def test_an_answer_is_found_in_what_surrounds_it(tmp_path: Path, answer: object) -> None:
    found = read_answers(lines(tmp_path / "a.jsonl", {"id": NAMES[0], "answer": answer}), CAPTIONS)
    assert found.triplets == (
        Triplet(NAMES[0], "a.jpg", "a red cup", "make it blue", "a blue cup", "train"),
    )
    assert not found.rejected
    assert found.unanswered == 2


def said(modification: object, target: object) -> dict:
    return {"modification": modification, "target_caption": target}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{]\n", "row is not JSON"),
        ('"text"\n', "row is no JSON object"),
        ('{"id": "\\ud800"}\n', "row is not JSON"),
        ({"answer": ANSWER}, "unknown id"),
        ({"id": "c.jpg/c.jpg#0", "answer": ANSWER}, "unknown id"),
        ({"id": [1], "answer": ANSWER}, "unknown id"),
        ({"id": NAMES[2], "answer": said("add a cat", "a dog and a cat")}, "answered before"),
        ({"id": NAMES[0], "reference_caption": "x", "answer": ANSWER}, "asked about another caption"),
        ({"id": NAMES[0]}, "no answer"),
        ({"id": NAMES[0], "answer": ""}, "no answer"),
        ({"id": NAMES[0], "answer": "I cannot {do} that"}, "no JSON object in the answer"),
        ({"id": NAMES[0], "answer": '{"a": 1, "a": 2}'}, "no JSON object in the answer"),
        ({"id": NAMES[0], "answer": '{"a": "\\ud800"}'}, "no JSON object in the answer"),
        ({"id": NAMES[0], "answer": "[" * 5000 + "{" * 5000}, "no JSON object in the answer"),
        ({"id": NAMES[0], "answer": '{"a":' * 2000}, "no JSON object in the answer"),
        ({"id": NAMES[0], "answer": "x" * 10_001}, "answer longer than 10,000 characters"),
        ({"id": NAMES[0], "answer": '{"a": 1} {"b": 2}'}, "several JSON objects in the answer"),
        ({"id": NAMES[0], "answer": [ANSWER]}, "answer is neither a text nor an object"),
        ({"id": NAMES[0], "answer": {"modification": "x"}}, "no text under modification or target_caption"),
        ({"id": NAMES[0], "answer": said("x", 3)}, "no text under modification or target_caption"),
        ({"id": NAMES[0], "answer": said(" ", "a cup")}, "empty modification"),
        ({"id": NAMES[0], "answer": said("x", "\n")}, "empty target caption"),
        ({"id": NAMES[0], "answer": said("x", "A red, cup!")}, "target equals reference"),
        ({"id": NAMES[0], "answer": said("a blue cup.", "A blue cup")}, "modification repeats a caption"),
        ({"id": NAMES[0], "answer": said("a red cup", "A blue cup")}, "modification repeats a caption"),
        ({"id": NAMES[0], "answer": said("x", "y " * 41)}, "too long: more than 40 words"),
        ({"id": NAMES[0], "answer": said("y " * 41, "x")}, "too long: more than 40 words"),
    ],
)  # fmt: skip
def test_every_row_that_is_not_taken_has_one_reason(
    tmp_path: Path, row: object, reason: str
) -> None:
    good = {"id": NAMES[2], "answer": said("make it a cat", "a cat")}
    found = read_answers(lines(tmp_path / "a.jsonl", good, row), CAPTIONS)
    assert dict(found.rejected) == {reason: 1}
    assert [(t.id, t.split) for t in found.triplets] == [(NAMES[2], "val")]


def test_a_second_try_counts_after_one_that_was_rejected(tmp_path: Path) -> None:
    rows = [{"id": NAMES[0], "answer": a} for a in ("sorry", ANSWER, ANSWER)]
    found = read_answers(lines(tmp_path / "a.jsonl", *rows), CAPTIONS)
    assert len(found.triplets) == 1
    assert dict(found.rejected) == {"no JSON object in the answer": 1, "answered before": 1}


def test_answers_of_which_none_can_be_used_are_an_error_with_every_reason(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", "x\n", "y\n", {"id": NAMES[0]})
    with pytest.raises(DatasetError, match=r"in 3 rows: row is not JSON \(2\); no answer \(1\)"):
        read_answers(path, CAPTIONS)
    with pytest.raises(DatasetNotFound, match=r"none\.jsonl of answers"):
        read_answers(tmp_path / "none.jsonl", CAPTIONS)


@given(
    texts=st.lists(
        st.one_of(
            st.text(alphabet='{}[]":,\\ab \u00e9', max_size=30),
            st.fixed_dictionaries({}, optional={k: st.text(max_size=9) for k in ANSWER}).map(
                json.dumps
            ),
        ),
        max_size=8,
    )
)
def test_rows_in_are_triplets_and_rejections_out(
    texts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    captions = [Caption(str(i), "a.jpg", "a red cup", "train") for i in range(9)]
    rows: list[object] = [
        {"id": c.name, "answer": text} for c, text in zip(captions, texts, strict=False)
    ]
    rows.append({"id": captions[8].name, "answer": ANSWER})
    path = lines(tmp_path_factory.mktemp("answers") / "a.jsonl", *rows)
    found = read_answers(path, captions)
    assert len(found.triplets) + found.rejected.total() == len(rows)
    assert all(
        fault(t.reference_caption, t.modification, t.target_caption) is None for t in found.triplets
    )


def test_a_length_is_counted_in_words() -> None:
    assert fault("a", "b " * MOST_WORDS, "c " * MOST_WORDS) is None
    assert fault("a", "b", "c " * (MOST_WORDS + 1)) == "too long: more than 40 words"


# --- the command ---


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*words: object) -> tuple[int, str]:
        status = main([str(w) for w in words])
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


def test_rules_from_a_data_set_are_those_of_the_option(
    tmp_path: Path, run: Callable[..., tuple[int, str]]
) -> None:
    out = tmp_path / "t.jsonl"
    toy = ("triplets", "--dataset", "toy_world", "--set", "scale=0.01", "--rules")
    status, text = run(*toy, "--seed", 4, "--out", out)
    assert status == 0
    rows = read_triplets(out).triplets
    by_rule = load_dataset("toy_world", scale=0.01, triplets="rules:4")
    by_file = load_dataset("toy_world", scale=0.01, triplets=str(out))
    assert by_file.tasks == by_rule.tasks
    assert by_file.digest() == by_rule.digest()
    train = sum(t.split == "train" and t.category == "add" for t in rows)
    assert f"train {train:9,}  add\n" in text
    assert "gave nothing" in text
    assert f"--dataset toy_world --set scale=0.01 --set triplets={out}\n" in text
    status, text = run(*toy, "--out", out)
    assert (status, text.count("\n")) == (1, 1)
    assert "is there already and is not overwritten" in text


def test_captions_go_out_as_prompts_and_come_back_as_triplets(
    tmp_path: Path, mugs: Path, run: Callable[..., tuple[int, str]]
) -> None:
    prompts, answers, out = (tmp_path / f"{n}.jsonl" for n in ("prompts", "answers", "t"))
    source = ("triplets", "--captions", mugs / "data.jsonl")
    status, text = run(*source, "--prompts", prompts)
    assert status == 0
    assert "left out 4 captions of test" in text
    assert f"wrote 8 prompts to {prompts}" in text
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    for i, row in enumerate(rows):
        row["answer"] = "no" if i < 2 else said(f"make it {i}", f"a thing {i}")
    status, text = run(*source, "--answers", lines(answers, *rows), "--out", out)
    assert status == 0
    assert "rejected         2  no JSON object in the answer" in text
    assert "2 of 8 captions have no triplet" in text
    assert "--dataset DATASET --root ROOT --set triplets=" in text
    dataset = load_dataset("folder", mugs, triplets=str(out))
    assert len(dataset.tasks.triplets) == 6
    check_dataset(dataset)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rules",), "name the file to write (--out)"),
        (("--rules", "--out", "t.jsonl", "--root", "x"), "--root and --set belong to --dataset"),
        (("--rules", "--out", "t.jsonl", "--seed", "-1"), "--seed -1: it is a whole number"),
        (("--prompts", "p.jsonl", "--out", "t.jsonl"), "--prompts names the file to write"),
        (("--answers", "none.jsonl", "--out", "t.jsonl"), "there is no file none.jsonl of answers"),
        (("--rules", "--out", "none/t.jsonl"), "there is no folder none"),
    ],
)
def test_a_user_s_error_is_one_sentence(
    tmp_path: Path, run: Callable[..., tuple[int, str]], words: tuple, message: str
) -> None:
    captions = lines(tmp_path / "c.jsonl", {"image": "a.jpg", "caption": "a red cup on a box"})
    status, text = run("triplets", "--captions", captions, *words)
    assert status == 1
    assert text.startswith("python -m cache_builder triplets: ")
    assert message in text
    assert text.count("\n") == 1


def test_captions_that_no_rule_reads_or_that_are_of_test_are_an_error(
    tmp_path: Path, run: Callable[..., tuple[int, str]]
) -> None:
    out = tmp_path / "t.jsonl"
    hm = lines(tmp_path / "hm.jsonl", {"image": "a.jpg", "caption": "hm"})
    status, text = run("triplets", "--captions", hm, "--rules", "--out", out)
    assert (status, "no rule applies to any of the 1 captions" in text) == (1, True)
    test = lines(tmp_path / "c.jsonl", {"image": "a.jpg", "caption": "a cup", "split": "test"})
    status, text = run("triplets", "--captions", test, "--rules", "--out", out)
    assert (status, "has no captions of train or val" in text) == (1, True)
    assert not out.exists()


def test_a_cache_holds_the_triplets_of_its_data_set(
    tmp_path: Path, run: Callable[..., tuple[int, str]]
) -> None:
    out = tmp_path / "toy.zarr"
    build = ("build", "--backbone", "clip:demo", "--dataset", "toy_world", "--out", out)
    options = ("--set", "scale=0.01", "--set", "triplets=rules")
    status, text = run(*build, *options, "--streams", "image/pooled", "text/pooled")
    assert status == 0, text
    assert "triplets, substitute" in text
    dataset = load_dataset("toy_world", scale=0.01, triplets="rules")
    cache = FeatureCache.open(out)
    assert cache.tasks == dataset.tasks
    assert "triplets" in cache.tasks.kinds
    first = cache.tasks.triplets[0]
    rows = cache.rows("text", [first.reference, first.modification, first.target])
    strings = {t.id: t.text for t in dataset.texts}
    assert [cache.texts[row] for row in rows] == [
        strings[i] for i in (first.reference, first.modification, first.target)
    ]
    labels = cache.labels("train", task="triplets")
    of_train = [e for e in cache.tasks.triplets if e.split == "train"]
    assert labels["id"].tolist() == [e.image for e in of_train]
    assert labels["category"].tolist() == [e.category for e in of_train]
