"""Submission files of CIRR and CIRCO: what is written is read again, and what a server would refuse is refused here."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eval import score_io, submissions
from eval.cli import main
from eval.composed_queries import ComposedQueries
from eval.composed_table import ComposedScores
from eval.errors import ScoreTableError, ScoreTableExists, ScoreTableNotFound
from eval.matching import MatchingScores
from eval.submissions import (
    Metric,
    read_circo,
    read_cirr,
    submit_circo,
    submit_cirr,
    write_circo,
    write_cirr,
)

NAMES = [f"test1-{i}-0-img{i % 2}" for i in range(60)]
NUMBERS = [str(7 * i) for i in range(60)]


def cirr(n=3, **meta) -> ComposedScores:
    """Queries of 60 images without targets; few distinct scores, so many ties."""
    rng = np.random.default_rng(0)
    subset = [rng.permutation(NAMES)[:6].tolist() for _ in range(n)]
    asked = ComposedQueries(
        [str(12063 + i) for i in range(n)],
        [s[0] for s in subset],
        (),
        "cirr",
        "test",
        "test1",
        subset=subset,
    )
    scores = rng.integers(0, 5, size=(n, 60)).astype(np.float32)
    return ComposedScores(scores, NAMES, asked, "cosine", meta)


def circo(n=3, **meta) -> ComposedScores:
    rng = np.random.default_rng(1)
    asked = ComposedQueries(
        [str(i) for i in range(n)],
        [NUMBERS[i % 60] for i in range(n)],
        (),
        "circo",
        "test",
        "unlabeled2017",
    )
    scores = rng.integers(0, 5, size=(n, 60)).astype(np.float32)
    return ComposedScores(scores, NUMBERS, asked, "cosine", meta)


def test_both_files_of_cirr_are_what_the_server_takes_and_come_back(tmp_path):
    table = cirr()
    asked = table.queries
    recall, subset = submit_cirr(table, tmp_path / "r.json", tmp_path / "deep/s.json", check="none")
    text = recall.read_bytes().decode("utf-8")
    body = json.loads(text)
    assert text == json.dumps(body, separators=(",", ":"))
    assert list(body) == ["version", "metric", *asked.ids]
    assert (body.pop("version"), body.pop("metric")) == ("rc2", "recall")
    for i, listed in enumerate(body.values()):
        order = sorted(range(60), key=lambda j: (-table.scores[i, j], j))
        assert listed == [NAMES[j] for j in order if NAMES[j] != asked.reference[i]][:50]
    few = json.loads(subset.read_text())
    assert (few.pop("version"), few.pop("metric")) == ("rc2", "recall_subset")
    for i, listed in enumerate(few.values()):
        mine = sorted(
            (NAMES.index(name) for name in asked.others(i)), key=lambda j: (-table.scores[i, j], j)
        )
        assert listed == [NAMES[j] for j in mine[:3]]
    files: list[tuple[Path, Metric, dict]] = [
        (recall, "recall", body),
        (subset, "recall_subset", few),
    ]
    for path, metric, expected in files:
        lists = read_cirr(path, asked, NAMES, metric=metric, check="none")
        assert lists == {query: tuple(listed) for query, listed in expected.items()}
        again = write_cirr(
            lists,
            tmp_path / "again.json",
            asked,
            NAMES,
            metric=metric,
            check="none",
            overwrite=True,
        )
        assert again.read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.json", "deep", "r.json"]


def test_the_file_of_circo_holds_numbers_and_comes_back(tmp_path):
    table = circo()
    path = submit_circo(table, tmp_path / "c.json", check="none")
    body = json.loads(path.read_text())
    assert path.read_text() == json.dumps(body, separators=(",", ":"))
    assert list(body) == ["0", "1", "2"]
    for i, listed in enumerate(body.values()):
        order = sorted(range(60), key=lambda j: (-table.scores[i, j], j))
        assert listed == [7 * j for j in order[:50]]
    lists = read_circo(path, table.queries, NUMBERS, check="none")
    assert lists["1"][:2] == tuple(str(j) for j in body["1"][:2])
    again = write_circo(lists, tmp_path / "d.json", table.queries, NUMBERS, check="none")
    assert again.read_bytes() == path.read_bytes()


def test_a_list_is_held_to_the_gallery_where_one_is_given(tmp_path):
    table = circo()
    path = submit_circo(table, tmp_path / "c.json", check="none")
    fewer = [name for name in NUMBERS if name != "77"]
    with pytest.raises(ScoreTableError, match="'77'"):
        read_circo(path, table.queries, fewer, check="none")
    assert read_circo(path, table.queries, check="none") == read_circo(
        path, table.queries, NUMBERS, check="none"
    )


def test_names_keep_their_letters(tmp_path):
    """UTF-8 as it is, no escapes."""
    table = cirr(1)
    names = [f"ü{name}" for name in NAMES]
    asked = replace(
        table.queries, reference=[f"ü{r}" for r in table.queries.reference],
        subset=[[f"ü{name}" for name in row] for row in table.queries.subset],
    )  # fmt: skip
    other = ComposedScores(table.scores, names, asked, "cosine")
    path, _ = submit_cirr(other, tmp_path / "r.json", tmp_path / "s.json", check="none")
    assert "ü".encode() in path.read_bytes()
    assert read_cirr(path, asked, names, metric="recall", check="none")["12063"][0].startswith("ü")


def test_nothing_is_written_over_and_neither_file_without_the_other(tmp_path):
    (tmp_path / "s.json").write_text("mine")
    with pytest.raises(ScoreTableExists, match=r"s\.json.*already there"):
        submit_cirr(cirr(), tmp_path / "r.json", tmp_path / "s.json", check="none")
    assert [p.name for p in tmp_path.iterdir()] == ["s.json"]
    submit_cirr(cirr(), tmp_path / "r.json", tmp_path / "s.json", check="none", overwrite=True)
    with pytest.raises(ScoreTableExists):
        submit_circo(circo(), tmp_path / "r.json", check="none")
    with pytest.raises(ScoreTableError, match="name two"):
        submit_cirr(cirr(), tmp_path / "x.json", tmp_path / "x.json", check="none")


def test_a_failing_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = submit_circo(circo(), tmp_path / "c.json", check="none")
    before = path.read_bytes()

    def full(self, *_):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        submit_circo(circo(2), path, check="none", overwrite=True)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_partial_tables_and_wrong_numbers_of_queries_are_no_submission(tmp_path):
    r, s = tmp_path / "r.json", tmp_path / "s.json"
    with pytest.raises(ScoreTableError, match=r"partial \(2 examples were left out\)"):
        submit_cirr(cirr(partial=True, dropped=["a", "b"]), r, s, check="none")
    with pytest.raises(ScoreTableError, match=r"partial \(some were left out\)"):
        submit_circo(circo(partial=True), r, check="none")
    with pytest.raises(ScoreTableError, match="cirr test has 4148 queries, but here are 3"):
        submit_cirr(cirr(), r, s)
    with pytest.raises(ScoreTableError, match="circo test has 800 queries, but here are 3"):
        submit_circo(circo(), r)
    with pytest.raises(ScoreTableError, match="queries are of cirr, but the file is of circo"):
        submit_circo(cirr(), r, check="none")
    table = cirr()
    other = replace(table, queries=replace(table.queries, split="val"))
    with pytest.raises(ScoreTableError, match="cirr has no submission for split 'val'"):
        submit_cirr(other, r, s)
    assert not list(tmp_path.iterdir())


def test_too_few_candidates_or_a_subset_too_small_are_no_submission(tmp_path, monkeypatch):
    table = circo()
    few = ComposedScores(table.scores[:, :49], NUMBERS[:49], table.queries, "cosine")
    with pytest.raises(ScoreTableError, match="query '0' holds 49 images, but must hold 50"):
        submit_circo(few, tmp_path / "c.json", check="none")
    table = cirr()
    asked = replace(table.queries, subset=[row[:3] for row in table.queries.subset])
    with pytest.raises(ScoreTableError, match="query '12063' holds 2 images, but must hold 3"):
        submit_cirr(replace(table, queries=asked), tmp_path / "r", tmp_path / "s", check="none")
    asked = replace(table.queries, subset=[row[:5] for row in table.queries.subset])
    monkeypatch.setitem(submissions.QUERIES, ("cirr", "test"), 3)
    with pytest.raises(ScoreTableError, match=r"3 queries, the first is '12063'.*five others"):
        submit_cirr(replace(table, queries=asked), tmp_path / "r", tmp_path / "s")
    submit_cirr(table, tmp_path / "r", tmp_path / "s")
    monkeypatch.setattr(submissions, "LIMIT", 100)
    with pytest.raises(ScoreTableError, match=r"would have \d+ bytes, but at most 100"):
        submit_circo(circo(), tmp_path / "c.json", check="none")


def test_ids_that_are_no_coco_numbers_are_refused(tmp_path):
    table = circo()
    for name in ("a", "007", "-1", "1.0", "١", "1" * 13, "9" * 5000, " 1"):
        names = [name, *NUMBERS[1:]]
        scores = table.scores.copy()
        scores[:, 0] = 9
        other = ComposedScores(scores, names, table.queries, "cosine")
        with pytest.raises(ScoreTableError, match="COCO numbers"):
            submit_circo(other, tmp_path / "c.json", check="none")


def valid_circo() -> dict:
    return {str(i): [int(n) for n in NUMBERS[i : i + 50]] for i in range(3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0": valid_circo()["0"][:49]}, "'0' holds 49 images"),
        ({"0": valid_circo()["0"] + [413]}, "'0' holds 51 images"),
        ({"0": [0, *valid_circo()["0"][:49]]}, "'0' holds '0' twice"),
        ({"0": [True, *valid_circo()["0"][1:]]}, "'0' must be a list of image numbers"),
        ({"0": ["7", *valid_circo()["0"][1:]]}, "'0' must be a list of image numbers"),
        ({"0": [7.0, *valid_circo()["0"][1:]]}, "'0' must be a list of image numbers"),
        ({"0": [-7, *valid_circo()["0"][1:]]}, "'0' must be a list of image numbers"),
        ({"0": [10**12, *valid_circo()["0"][1:]]}, "'0' must be a list of image numbers"),
        ({"0": {}}, "'0' must be a list of image numbers"),
        ({"0": [1, *valid_circo()["0"][1:]]}, "'0' holds '1', which is none of its 60 candidates"),
        ({"3": valid_circo()["0"]}, r"1 are no query \('3'\)"),
        ({"2": None}, "'2' must be a list"),
    ],
)
def test_files_that_circo_s_server_refuses_are_refused(change, message, tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(valid_circo()))
    asked = circo().queries
    assert read_circo(path, asked, NUMBERS, check="none")["0"][1] == "7"
    path.write_text(json.dumps(valid_circo() | change))
    with pytest.raises(ScoreTableError, match=message):
        read_circo(path, asked, NUMBERS, check="none")
    path.write_text(json.dumps(valid_circo()))
    with pytest.raises(ScoreTableError, match="800 queries, but here are 3"):
        read_circo(path, asked, NUMBERS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"0":[1],"0":[2]}', "key '0' is there twice"),
        (b'{"0":[NaN]}', "NaN is no JSON"),
        (b'{"0":[Infinity]}', "Infinity is no JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"0":[' + b"9" * 5000 + b"]}", "not JSON"),
        (b"[]", "must hold a JSON object, but holds a list"),
        (b'{"0": "\xff"}', "not JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS pointer"),
        (b" " * 5_000_001, "at most 5000000 bytes, but has 5000001"),
        (b"{}", r"3 have none \('0', '1', '2'\)"),
    ],
)
def test_what_is_not_such_a_file_says_so(text, message, tmp_path):
    path = tmp_path / "c.json"
    path.write_bytes(text)
    with pytest.raises(ScoreTableError, match=message):
        read_circo(path, circo().queries, check="none")


def test_a_missing_file_and_a_folder_say_so(tmp_path):
    with pytest.raises(ScoreTableNotFound, match=r"no submission file at .*c\.json"):
        read_circo(tmp_path / "c.json", circo().queries, check="none")
    with pytest.raises(ScoreTableError, match="no regular file"):
        read_circo(tmp_path, circo().queries, check="none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "rc1"}, "'rc1'.*must say version 'rc2' and metric 'recall_subset'"),
        ({"metric": "recall"}, "'metric': 'recall'}, but must say"),
        ({"12063": ["x"]}, "'12063' holds 1 images"),
        ({"12063": [1, 2, 3]}, "must be a list of image names"),
        ({"12063": "abc"}, "must be a list of image names"),
        ({"12063": NAMES[57:]}, "none of its 5 candidates"),
    ],
)
def test_files_that_cirr_s_server_refuses_are_refused(change, message, tmp_path):
    table = cirr()
    assert not set(NAMES[57:]) <= set(table.queries.subset[0])
    _, path = submit_cirr(table, tmp_path / "r.json", tmp_path / "s.json", check="none")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ScoreTableError, match=message):
        read_cirr(path, table.queries, NAMES, metric="recall_subset", check="none")


def test_the_reference_is_never_listed(tmp_path):
    table = cirr()
    path, _ = submit_cirr(table, tmp_path / "r.json", tmp_path / "s.json", check="none")
    body = json.loads(path.read_text())
    body["12063"][0] = table.queries.reference[0]
    path.write_text(json.dumps(body))
    with pytest.raises(ScoreTableError, match="holds its own reference"):
        read_cirr(path, table.queries, metric="recall", check="none")


# ── official files ───────────────────────────────────────────────────────────────────────────────────────────────────

OFFICIAL = Path(os.environ.get("HEADSTART_OFFICIAL_DATA", "/nowhere"))
needs = {
    folder: pytest.mark.skipif(
        not (OFFICIAL / folder).is_dir(),
        reason=f"HEADSTART_OFFICIAL_DATA must name a folder with {folder}/ as in {where}",
    )
    for folder, where in {
        "circo": "github.com/miccunifi/CIRCO (commit 267b5c9: annotations/, submission_examples/)",
        "cirr": "github.com/Cuberick-Orion/CIRR, branch cirr_dataset (commit 2276fba: captions/, image_splits/)",
    }.items()
}


@needs["circo"]
@pytest.mark.parametrize("split", ["val", "test"])
def test_circo_s_examples_are_read_and_written_again(split, tmp_path):
    rows = json.loads((OFFICIAL / f"circo/annotations/{split}.json").read_text())
    example = OFFICIAL / f"circo/submission_examples/submission_{split}.json"
    asked = ComposedQueries(
        [str(r["id"]) for r in rows], [str(r["reference_img_id"]) for r in rows],
        [[str(i) for i in r.get("gt_img_ids", ())] for r in rows], "circo", split, "unlabeled2017",
    )  # fmt: skip
    lists = read_circo(example, asked)
    gallery = {image for row in lists.values() for image in row}
    path = write_circo(lists, tmp_path / "mine.json", asked, gallery)
    body = json.loads(example.read_text())
    assert (len(body), path.read_text()) == (len(rows), json.dumps(body, separators=(",", ":")))
    assert read_circo(path, asked, gallery) == lists


@needs["cirr"]
def test_files_of_cirr_test1_have_its_keys_and_stay_below_the_limit(tmp_path):
    rows = json.loads((OFFICIAL / "cirr/captions/cap.rc2.test1.json").read_text())
    gallery = list(json.loads((OFFICIAL / "cirr/image_splits/split.rc2.test1.json").read_text()))
    asked = ComposedQueries(
        [str(r["pairid"]) for r in rows], [r["reference"] for r in rows], (), "cirr", "test", "test1",
        subset=[r["img_set"]["members"] for r in rows],
    )  # fmt: skip
    scores = np.random.default_rng(0).random((len(rows), len(gallery)), dtype=np.float32)
    table = ComposedScores(scores, gallery, asked, "cosine")
    recall, subset = submit_cirr(table, tmp_path / "r.json", tmp_path / "s.json")
    assert 3_500_000 < recall.stat().st_size < 5_000_000
    lists = read_cirr(recall, asked, gallery, metric="recall")
    few = read_cirr(subset, asked, gallery, metric="recall_subset")
    assert (len(lists), len(few)) == (4148, 4148)


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_writes_what_the_functions_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of queries as many as the servers want, so that nothing is left unchecked."""
    sizes = {"cirr": 4148, "circo": 800}
    score_io.save(cirr(sizes["cirr"]), tmp_path / "cirr.zarr")
    score_io.save(circo(sizes["circo"]), tmp_path / "circo.zarr")
    out = tmp_path / "deep" / "sent"
    assert main(["submit", str(tmp_path / "cirr.zarr"), "--out", str(out)]) == 0
    assert main(["submit", str(tmp_path / "circo.zarr"), "--out", str(out)]) == 0
    names = ["recall.json", "recall_subset.json", "circo.json"]
    assert capsys.readouterr().out.splitlines() == [f"wrote {out / name}" for name in names]
    submit_cirr(cirr(sizes["cirr"]), tmp_path / "r.json", tmp_path / "s.json")
    submit_circo(circo(sizes["circo"]), tmp_path / "c.json")
    for mine, theirs in zip(names, ("r.json", "s.json", "c.json"), strict=True):
        assert (out / mine).read_bytes() == (tmp_path / theirs).read_bytes()


def test_the_command_says_which_tables_have_a_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    matching = MatchingScores(np.ones((2, 2, 2)), np.array(["a", "b"]), "cosine", "test")
    score_io.save(matching, tmp_path / "m.zarr")
    own = replace(cirr().queries, protocol="own", subset=(), targets=[[NAMES[1]]] * 3)
    score_io.save(replace(cirr(), queries=own), tmp_path / "own.zarr")
    for name, kind in (("m", "matching"), ("own", "own")):
        assert main(["submit", str(tmp_path / f"{name}.zarr"), "--out", str(tmp_path / "out")]) == 1
        assert f"is a table of {kind}; servers exist for cirr" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
