"""Scores of other code → tables: every layout, against the table made by hand; nothing is guessed or unpickled."""

import contextlib
import io
import json
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import cli, czsl, importers, matching, retrieval, score_io
from eval.composition import CompositionScores
from eval.errors import ScoreTableError, ScoreTableNotFound
from eval.matching import MatchingScores
from eval.npz import read_npy, read_npz
from eval.remarks import remarks
from eval.retrieval import RetrievalScores

ROOT = Path(__file__).parent.parent
PAIRS = [("red", "mug"), ("blue", "mug"), ("red", "plum"), ("blue", "plum"), ("wet", "dog")]
TRAIN = PAIRS[:2]
TARGET = np.array([0, 1, 2, 3, 2, 3, 0])
SCORES = np.random.default_rng(5).normal(size=(7, 5)).astype(np.float32)
FACTS = {"split": "test", "space": "logit", "world": "closed"}
SHORT = {"split": "test", "space": "cosine"}


def load(path, **told) -> Any:
    return importers.load(path, **told)


def by_hand(columns=slice(None)) -> CompositionScores:
    seen = np.array([p in TRAIN for p in PAIRS])
    return CompositionScores(
        SCORES[:, columns], TARGET, PAIRS[columns], seen[columns], "test", "logit"
    )


def words(path: Path, pairs, joint=" ") -> Path:
    path.write_text("".join(f"{a}{joint}{o}\n" for a, o in pairs), encoding="utf-8")
    return path


@pytest.fixture
def lists(tmp_path: Path) -> dict[str, Path]:
    return {
        "pairs": words(tmp_path / "pairs.txt", PAIRS),
        "train_pairs": words(tmp_path / "train_pairs.txt", TRAIN),
        "targets": words(tmp_path / "targets.txt", [PAIRS[i] for i in TARGET]),
    }


def same(found, expected) -> None:
    assert type(found) is type(expected)
    for name in ("scores", "target", "pairs", "seen", "category", "positives", "ids"):
        if hasattr(expected, name):
            assert np.array_equal(np.asarray(getattr(found, name)), np.asarray(getattr(expected, name)))  # fmt: skip
    for name in ("split", "space", "world"):
        assert getattr(found, name, None) == getattr(expected, name, None)


# ── arrays ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def npz(path: Path, **arrays) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_czsl_arrays_with_their_facts_need_nothing_else(save, tmp_path):
    t = by_hand()
    path = tmp_path / "scores.npz"
    save(path, scores=t.scores, target=t.target, pairs=np.array(PAIRS), seen=t.seen, **FACTS)
    found = load(path)
    same(found, t)
    assert found.meta["imported"] == "scores.npz"
    assert czsl.evaluate(found) == czsl.evaluate(t)


def test_facts_may_be_given_and_numbers_name_pairs_too(tmp_path):
    path = npz(
        tmp_path / "s.npz",
        scores=np.asfortranarray(SCORES),
        target=TARGET,
        pairs=np.array([[0, 0], [1, 0], [0, 1], [1, 1], [2, 2]]),
        seen=np.array([1, 1, 0, 0, 0]),
        ids=np.array([f"i{i}" for i in range(7)]),
    )
    found = load(path, **FACTS)
    assert found.ids[1] == "i1"
    assert czsl.evaluate(found) == czsl.evaluate(by_hand())


def test_matching_and_retrieval_arrays(tmp_path):
    rng = np.random.default_rng(0)
    for shape in ((6, 2), (6, 2, 2)):
        t = MatchingScores(rng.normal(size=shape), ["swap", "add"] * 3, "cosine", "test")
        path = npz(tmp_path / "m.npz", scores=t.scores, category=t.category, **SHORT)
        same(load(path), t)
    t = RetrievalScores(rng.normal(size=(3, 5)), np.eye(3, 5, dtype=bool), "cosine", "test")
    facts = {"direction": "t2i", "rerank": 4}
    path = npz(tmp_path / "r.npz", scores=t.scores, positives=t.positives, **SHORT, **facts)
    found = load(path)
    same(found, t)
    assert found.meta["direction"] == "t2i"
    assert "reranked" in remarks(found)[0]


def test_logits_and_a_pair_list_are_a_table(lists, tmp_path):
    np.save(tmp_path / "logits.npy", SCORES)
    for joint in (" ", "\t", "+", " + "):
        words(lists["pairs"], PAIRS, joint)
        same(load(tmp_path / "logits.npy", **lists, **FACTS), by_hand())
    lists["targets"].write_text("".join(f"{i}\n" for i in TARGET))
    same(load(tmp_path / "logits.npy", **lists, **FACTS), by_hand())
    np.save(tmp_path / "targets.npy", TARGET)
    lists["targets"] = tmp_path / "targets.npy"
    same(load(str(tmp_path / "logits.npy"), **lists, **FACTS), by_hand())


def test_names_of_several_words_are_cut_at_the_plus(lists, tmp_path):
    """VAW-CZSL: cut at blanks, "light blue+car" would be the pair (light, blue+car)."""
    pairs = [("light blue", "car"), ("blue", "sports car"), *PAIRS[2:]]
    words(lists["pairs"], pairs, "+")
    words(lists["train_pairs"], pairs[:2], "+")
    words(lists["targets"], [pairs[i] for i in TARGET], "+")
    np.save(tmp_path / "s.npy", SCORES)
    assert load(tmp_path / "s.npy", **lists, **FACTS).pairs.tolist() == [list(p) for p in pairs]


def test_a_plus_inside_some_names_cuts_nothing(lists, tmp_path):
    pairs = [("red", "c++"), ("18+", "mug"), *PAIRS[2:]]
    words(lists["pairs"], pairs)
    words(lists["train_pairs"], pairs[:2])
    words(lists["targets"], [pairs[i] for i in TARGET])
    np.save(tmp_path / "s.npy", SCORES)
    assert load(tmp_path / "s.npy", **lists, **FACTS).pairs.tolist() == [list(p) for p in pairs]


def test_pairs_of_another_split_do_not_compete(lists, tmp_path):
    """CSP scores the pairs of all splits; (wet, dog) is of val, and no candidate of test."""
    np.save(tmp_path / "s.npy", SCORES)
    path = words(tmp_path / "test_pairs.txt", [PAIRS[i] for i in (3, 0, 2)])
    found = load(tmp_path / "s.npy", **lists, **FACTS, split_pairs=path)
    same(found, by_hand(slice(4)))
    assert remarks(found) == []
    assert czsl.evaluate(found) != czsl.evaluate(by_hand())
    (note,) = remarks(load(tmp_path / "s.npy", **lists, **FACTS))
    assert "1 of 3 unseen candidates are no image's true pair" in note
    assert "--split-pairs" in note
    with pytest.raises(ScoreTableError, match="in the open world every column"):
        load(tmp_path / "s.npy", **lists, **FACTS | {"world": "open"}, split_pairs=path)
    words(path, PAIRS[3:4])
    with pytest.raises(ScoreTableError, match=r"row 2, \('red', 'plum'\), is neither.*2 rows"):
        load(tmp_path / "s.npy", **lists, **FACTS, split_pairs=path)


def test_columns_left_out_move_the_targets(lists, tmp_path):
    """The pair left out stands before others, so that a forgotten shift would show."""
    order = [4, 3, 0, 1, 2]
    words(lists["pairs"], [PAIRS[i] for i in order])
    np.save(tmp_path / "s.npy", SCORES[:, order])
    path = words(tmp_path / "test_pairs.txt", PAIRS[2:4])
    found = load(tmp_path / "s.npy", **lists, **FACTS, split_pairs=path)
    assert [tuple(found.pairs[i]) for i in found.target] == [PAIRS[i] for i in TARGET]
    assert czsl.evaluate(found) == czsl.evaluate(by_hand(slice(4)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": "red mug\nred\n"}, r"pairs\.txt line 2 must hold an attr and an obj.*'red'"),
        ({"pairs": ""}, r"pairs\.txt is empty"),
        ({"pairs": "red mug\n\nred mug\n"}, r"lists the pair \('red', 'mug'\) twice"),
        ({"pairs": "red mug\nblue mug\n"}, r"shape \(7, 5\), but 2 pairs name the columns"),
        ({"targets": "red mug\n"}, "has 7 rows, but there are 1 targets"),
        ({"targets": "red mgu\n" * 7}, "row 0, .* is no column.*did you mean 'red mug'"),
        ({"targets": "9\n" * 7}, "must be places 0 to 4 .* reach from 9 to 9"),
        ({"targets": "0\nred\n"}, "line 2 is 'red', but line 1 is a number"),
        ({"train_pairs": "old hat\nred mug\n"}, r"1 training pairs, the first \('old', 'hat'\)"),
        ({"pairs": b"r\xe9d mug\n"}, "is not UTF-8 after line 0"),
    ],
)
def test_a_list_that_does_not_fit_is_named(change, message, lists, tmp_path):
    np.save(tmp_path / "s.npy", SCORES)
    for name, content in change.items():
        raw = content if isinstance(content, bytes) else content.encode()
        lists[name].write_bytes(raw)
    with pytest.raises(ScoreTableError, match=message):
        load(tmp_path / "s.npy", **lists, **FACTS)


@pytest.mark.parametrize(
    ("target", "found"),
    [(TARGET.astype(np.float32), r"float32 of shape \(7,\)"), (TARGET[:, None], r"int64 of shape \(7, 1\)")],
)  # fmt: skip
def test_targets_that_are_no_places_are_named(target, found, lists, tmp_path):
    np.save(tmp_path / "s.npy", SCORES)
    np.save(tmp_path / "targets.npy", target)
    lists["targets"] = tmp_path / "targets.npy"
    with pytest.raises(ScoreTableError, match=f"7 whole numbers, but are {found}"):
        load(tmp_path / "s.npy", **lists, **FACTS)


@pytest.mark.parametrize("name", ["pairs", "train_pairs", "targets", "split", "space", "world"])
def test_what_nobody_says_is_asked_for(name, lists, tmp_path):
    np.save(tmp_path / "s.npy", SCORES)
    told = {**lists, **FACTS}
    del told[name]
    with pytest.raises(ScoreTableError, match=f"--{name.replace('_', '-')}"):
        load(tmp_path / "s.npy", **told)


@pytest.mark.parametrize(("name", "what"), [("pairs", "file of pairs"), ("targets", "array")])
def test_a_list_that_is_not_there_is_named(name, what, lists, tmp_path):
    np.save(tmp_path / "s.npy", SCORES)
    lists[name] = tmp_path / "none.npy"
    with pytest.raises(ScoreTableNotFound, match=rf"no {what} at .*none\.npy, or no regular file"):
        load(tmp_path / "s.npy", **lists, **FACTS)


def test_a_list_too_large_to_be_one_is_refused_before_it_is_read(lists, tmp_path, monkeypatch):
    np.save(tmp_path / "s.npy", SCORES)
    monkeypatch.setattr("eval.pair_files.BYTES", 20)
    with pytest.raises(ScoreTableError, match=r"pairs\.txt has 44 bytes, more than the 20"):
        load(tmp_path / "s.npy", **lists, **FACTS)
    monkeypatch.undo()
    monkeypatch.setattr("eval.given.LINE_LIMIT", 8)
    with pytest.raises(ScoreTableError, match=r"pairs\.txt line 2 has more than 8 characters"):
        load(tmp_path / "s.npy", **lists, **FACTS)


def test_what_is_said_twice_must_agree_and_what_is_useless_is_refused(lists, tmp_path):
    t = by_hand()
    arrays = {"scores": SCORES, "target": TARGET, "pairs": np.array(PAIRS), "seen": t.seen}
    path = npz(tmp_path / "s.npz", **arrays, **FACTS)
    same(load(path, split="test"), t)
    with pytest.raises(ScoreTableError, match=r"--split val was given, but .* says test"):
        load(path, split="val")
    with pytest.raises(ScoreTableError, match="holds its pairs itself, but --pairs was given too"):
        load(path, pairs=lists["pairs"])
    with pytest.raises(ScoreTableError, match=r"--qrels was given, but .* has no use for it"):
        load(path, qrels=lists["pairs"])
    with pytest.raises(ScoreTableError, match="world 'shut' is unknown"):
        load(npz(tmp_path / "t.npz", **arrays), **FACTS | {"world": "shut"})


def test_our_own_tables_come_through_and_are_held_to_what_is_given(tmp_path):
    path = score_io.save(by_hand(), tmp_path / "s.zarr")
    same(load(path, world="closed"), by_hand())
    with pytest.raises(ScoreTableError, match=r"--world open was given, but .* says closed"):
        load(path, world="open")
    with pytest.raises(ScoreTableError, match="--pairs was given"):
        load(path, pairs="pairs.txt")
    run = RetrievalScores(SCORES, SCORES > 0, "cosine", "test")
    path = score_io.save(run, tmp_path / "r.zarr")
    with pytest.raises(
        ScoreTableError, match=r"--world was given, but .*r\.zarr is a table without one"
    ):
        load(path, world="closed")
    with pytest.raises(ScoreTableNotFound, match="no score table at"):
        load(tmp_path / "none.zarr")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"target": TARGET}, "has no array 'scores', only target"),
        ({"scores": SCORES}, "arrays and lists of no task"),
        ({"scores": SCORES, "target": TARGET, "category": TARGET}, "of matching and czsl"),
        ({"scores": SCORES, "positves": TARGET}, "'positves'.*did you mean 'positives'"),
        ({"scores": SCORES, "category": TARGET, "pairs": TARGET}, "of matching and czsl"),
        ({"scores": SCORES[:, :2], "category": TARGET, "space": np.array(["a", "b"])}, "space .* one word"),
        ({"scores": SCORES, "positives": TARGET, **SHORT}, "positives .* must be bool, or 0 and 1"),
        ({"scores": SCORES.astype(np.float16), "positives": SCORES > 0, **SHORT}, "float16"),
        ({"scores": SCORES, "pairs": TARGET}, r"must be \(C, 2\)"),
        ({"scores": SCORES, "pairs": np.array([*PAIRS[:4], PAIRS[1]]), **FACTS}, "two columns of the pair .*blue"),
    ],
)  # fmt: skip
def test_arrays_that_are_no_table_are_named(arrays, message, tmp_path):
    with pytest.raises(ScoreTableError, match=message):
        load(npz(tmp_path / "s.npz", **arrays))


def test_nan_is_named_by_query_and_candidate(lists, tmp_path):
    scores = SCORES.copy()
    scores[3, 1] = np.nan
    np.save(tmp_path / "s.npy", scores)
    with pytest.raises(ScoreTableError, match=r"query 3 with column 1 \(pair \('blue', 'mug'\)\)"):
        load(tmp_path / "s.npy", **lists, **FACTS)


class Trap:
    """Pickled, it would write a file when loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_pickle_is_loaded_and_the_message_says_how_to_convert(tmp_path):
    sprung = tmp_path / "sprung"
    bad = np.array([Trap(sprung)], dtype=object)
    np.save(tmp_path / "s.npy", bad, allow_pickle=True)
    np.savez(tmp_path / "s.npz", scores=SCORES, pairs=bad)
    for name in ("s.npy", "s.npz"):
        with pytest.raises(ScoreTableError, match=r"Python objects.*np\.savez\("):
            load(tmp_path / name, **FACTS)
    (tmp_path / "raw.npy").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(ScoreTableError, match="no array of numpy"):
        load(tmp_path / "raw.npy", **FACTS)
    for suffix in ("pt", "pkl", "t7", "pth"):
        (tmp_path / f"s.{suffix}").write_bytes(pickle.dumps(Trap(sprung)))
        with pytest.raises(ScoreTableError, match=r"is a pickle.*never read.*np\.save\("):
            load(tmp_path / f"s.{suffix}")
    assert not sprung.exists()
    np.load(tmp_path / "s.npy", allow_pickle=True)
    assert sprung.exists()  # the trap works


def header(shape, dtype="<f4", body=b"") -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": dtype, "fortran_order": False, "shape": shape})  # fmt: skip
    return out.getvalue() + body


@pytest.mark.parametrize(
    ("shape", "dtype", "body"),
    [
        ((10**12, 10**3), "<f4", bytes(40)),
        ((3, 5), "<f4", bytes(59)),
        ((3, 5), "<f4", bytes(64)),
        ((10**12,), "<U0", b""),
        ((-1, 5), "<f4", b""),
    ],
)
def test_a_header_that_claims_other_than_what_is_there_is_refused(shape, dtype, body, tmp_path):
    (tmp_path / "s.npy").write_bytes(header(shape, dtype, body))
    with pytest.raises(ScoreTableError, match=r"claims|no array of numpy"):
        read_npy(tmp_path / "s.npy")
    with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive:
        archive.writestr("scores.npy", header(shape, dtype, body))
    with pytest.raises(ScoreTableError, match=r"claims|no array of numpy"):
        read_npz(tmp_path / "s.npz")


def test_a_structured_array_whose_names_need_unicode_is_refused(tmp_path):
    """numpy writes it in a version of its own, which no table has."""
    with pytest.warns(UserWarning, match="format 3.0"):
        np.save(tmp_path / "s.npy", np.zeros(3, [("größe", "<f4"), ("名", "<f4")]))
    with pytest.raises(ScoreTableError, match=r"has version \(3, 0\): a structured array"):
        read_npy(tmp_path / "s.npy")


def test_a_zip_of_other_things_is_refused(tmp_path):
    path = tmp_path / "s.npz"
    path.write_bytes(b"PK no zip")
    with pytest.raises(ScoreTableError, match=r"damaged or no \.npz"):
        load(path)
    for name, method, message in (
        ("readme.txt", zipfile.ZIP_STORED, "'readme.txt', which is no array"),
        ("scores.npy", zipfile.ZIP_BZIP2, "packs them as numpy does not"),
    ):
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr(name, header((1,), body=bytes(4)))
        with pytest.raises(ScoreTableError, match=message):
            load(path)
    with pytest.raises(ScoreTableNotFound, match="no scores at"):
        load(tmp_path / "none.npz")
    with pytest.raises(
        ScoreTableError, match=r"suffix '\.json'; scores are read from \.zarr, \.npz"
    ):
        load(tmp_path / "s.json")


@settings(max_examples=150, deadline=None)
@given(place=st.floats(0, 1), byte=st.integers(0, 255), cut=st.booleans())
def test_any_damaged_byte_gives_a_sentence_or_arrays(place, byte, cut, tmp_path_factory):
    raw = io.BytesIO()
    np.savez_compressed(raw, scores=SCORES, pairs=np.array(PAIRS), split="test")
    content = bytearray(raw.getvalue())
    at = min(int(place * len(content)), len(content) - 1)
    content = content[:at] if cut else content[:at] + bytes([byte]) + content[at + 1 :]
    path = tmp_path_factory.getbasetemp() / "fuzzed.npz"
    path.write_bytes(content)
    with contextlib.suppress(ScoreTableError):
        read_npz(path)


# ── text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def text(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def wide(path: Path, joint=" ") -> Path:
    head = ",".join(["id", "attr", "obj", *(f"{a}{joint}{o}" for a, o in PAIRS)])
    rows = [
        ",".join([f"i{n}", *PAIRS[t], *(repr(float(v)) for v in SCORES[n])])
        for n, t in enumerate(TARGET)
    ]
    return text(path, head, *rows)


@pytest.mark.parametrize("joint", [" ", "+"])
def test_czsl_as_csv(joint, lists, tmp_path):
    path = wide(tmp_path / "s.csv", joint)
    found = load(path, train_pairs=lists["train_pairs"], **FACTS)
    assert isinstance(found, CompositionScores)
    assert (found.scores.dtype, found.ids[2]) == (np.float64, "i2")
    assert czsl.evaluate(found) == pytest.approx(czsl.evaluate(by_hand()))


def test_matching_as_csv(tmp_path):
    path = text(
        tmp_path / "m.csv", "category,positive,negative", "swap_att,0.5,0.25", "add_obj,1,2"
    )
    found = load(path, **SHORT)
    same(found, MatchingScores(np.array([[0.5, 0.25], [1, 2]]), ["swap_att", "add_obj"], "cosine"))
    path = text(
        tmp_path / "w.csv", "\ufeffid,s00,s01,s10,s11,category", '"a, b",4,3,2,5,x', "c,1,2,3,4,y"
    )
    found = load(path, **SHORT)
    cells = np.array([[[4, 3], [2, 5]], [[1, 2], [3, 4.0]]])
    same(found, MatchingScores(cells, ["x", "y"], "cosine", ids=["a, b", "c"]))
    assert matching.evaluate(found)["group_score"] == 0.5


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a,b"], "has the header 'a,b', which is none of the layouts"),
        ([], "has the header ''"),
        (["category,positive,negative", "x,1"], "line 2 has 2 cells, but the header 3"),
        (["category,positive,negative", "", "x,1,nan"], "line 3: the score of query 0 with column negative is 'nan'"),
        (["category,positive,negative", "x,1,inf"], "is 'inf'"),
        (["id,category,positive,negative", "q\x07,x,,1"], r"query q\\x07 with column positive is ''"),
        (["category,positive", "x,1"], "neither positive,negative nor s00"),
        (["category,positive,negative,note", "x,1,2,3"], "the column 'note'"),
        (["category,positive,positive", "x,1,2"], "two columns 'positive'"),
        (["category,positive,negative"], r"shape \(0, 2\)"),
        (["category,positive,negative", '"x,1,2'], "is not CSV"),
    ],
)  # fmt: skip
def test_csv_that_is_no_table_is_named(lines, message, tmp_path):
    with pytest.raises(ScoreTableError, match=message):
        load(text(tmp_path / "s.csv", *lines), **SHORT)


def test_a_bad_cell_of_czsl_names_image_and_pair(lists, tmp_path):
    path = wide(tmp_path / "s.csv")
    content = path.read_text().replace(repr(float(SCORES[2, 3])), "NaN")
    path.write_text(content)
    with pytest.raises(ScoreTableError, match=r"line 4: .* query i2 with pair \('blue', 'plum'\)"):
        load(path, train_pairs=lists["train_pairs"], **FACTS)


QRELS = ("q1 0 d1 1", "q1 0 d2 0", "q2 0 d3 2", "q2 0 d1 -1", "q3 0 d4 1", "q4 0 d1 0")
RUN = (
    *("q1 Q0 d1 1 9.5 mine", "q1 Q0 d2 2 9 mine", "q2 Q0 d1 1 4 mine", "q2 Q0 d3 2 4 mine"),
    *("q4 Q0 d1 1 1 mine",),
)


def test_a_run_of_trec_and_its_qrels(tmp_path):
    qrels = text(tmp_path / "qrels.txt", *QRELS)
    for suffix in ("trec", "run", "txt"):
        found = load(text(tmp_path / f"r.{suffix}", *RUN), qrels=qrels, **SHORT)
        assert isinstance(found, RetrievalScores)
        gone = -np.inf
        expected = np.array([[9.5, 9, gone, gone], [4, gone, 4, gone], [gone] * 4, [1, gone, gone, gone]])  # fmt: skip
        assert np.array_equal(found.scores, expected)
        assert np.argwhere(found.positives).tolist() == [[0, 0], [1, 2], [2, 3]]
        assert found.ids == ("q1", "q2", "q3", "q4")
        # q2's tie counts against it, q3 has no list, q4 no right document.
        assert retrieval.evaluate(found, ks=[1, 2]) == {
            "recall@1": 0.25, "recall@2": 0.5, "map@1": 0.25, "map@2": 0.375,
        }  # fmt: skip
        assert [note.split(" (")[0] for note in remarks(found)][:2] == [
            "1 of 4 queries have no list and are misses",
            "1 of 4 queries have no right document and are misses",
        ]
        assert "1.667 of 4 documents" in remarks(found)[2]
    rows = ["candidate,query,score", *(f"{d},{q},{s}" for q, _, d, _, s, _ in map(str.split, RUN))]
    again = load(text(tmp_path / "r.csv", *rows), qrels=qrels, **SHORT)
    same(again, found)
    assert remarks(again) == remarks(found)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_run_gives_what_trec_s_definitions_give(data, tmp_path_factory):
    """Against a loop over the lists: distinct scores, so that no tie rule has a say."""
    folder = tmp_path_factory.mktemp("trec")
    documents = [f"d{i}" for i in range(7)]
    lists, right = {}, {}
    for q in ("a", "b", "c"):
        lists[q] = data.draw(st.lists(st.sampled_from(documents), unique=True, min_size=2))
        right[q] = data.draw(st.sets(st.sampled_from(documents), min_size=1))
    lines = [f"{q} Q0 {d} {i} {-i} x" for q, ds in lists.items() for i, d in enumerate(ds)]
    lines = data.draw(st.permutations(lines))
    judged = [f"{q} 0 {d} {int(d in right[q])}" for q in right for d in documents]
    qrels = text(folder / "q", *judged)
    found = retrieval.evaluate(
        load(text(folder / "r.run", *lines), qrels=qrels, **SHORT), ks=[1, 2]
    )
    hits, precisions = [], []
    for q, ds in lists.items():
        hits.append(any(d in right[q] for d in ds[:2]))
        at = [i for i, d in enumerate(ds[:2], 1) if d in right[q]]
        precisions.append(sum(n / i for n, i in enumerate(at, 1)) / min(len(right[q]), 2))
    assert found["recall@2"] == pytest.approx(np.mean(hits))
    assert found["map@2"] == pytest.approx(np.mean(precisions))


def test_ranks_that_contradict_the_scores_are_noted(tmp_path):
    qrels = text(tmp_path / "q", "a 0 x 1", "b 0 x 1")
    lines = ("a Q0 x 2 1 m", "a Q0 y 1 3 m", "a Q0 z 3 1 m", "b Q0 x 0 1 m", "b Q0 y 0 2 m")
    found = load(text(tmp_path / "r.run", *lines), qrels=qrels, **SHORT)
    assert not [n for n in remarks(found) if "contradict" in n]
    found = load(text(tmp_path / "r.run", *lines, "b Q0 z 1 1.5 m"), qrels=qrels, **SHORT)
    assert "in 1 of 2 lists the ranks contradict the scores (b): the scores decide" in remarks(
        found
    )
    assert retrieval.evaluate(found, ks=[1])["recall@1"] == 0


@pytest.mark.parametrize(
    ("run", "qrels", "message"),
    [
        (("q1 Q0 d1 1 1",), QRELS, "line 1 must be 'query Q0 document rank score name'"),
        (("q1 Q0 d1 one 1 m",), QRELS, "line 1 must be"),
        (("q1 Q0 d1 1 nan m",), QRELS, "query q1 with document d1 is 'nan'"),
        (("q1 Q0 d1 1 1 m", "q1 Q0 d1 2 0 m"), QRELS, "lists document d1 twice for query q1"),
        (("z1 Q0 d1 1 1 m", "z2 Q0 d1 1 1 m"), QRELS, r"2 queries of .* are not in .* \(z1, z2\)"),
        ((), QRELS, "is empty: it lists no document"),
        (RUN, ("q1 0 d1",), "line 1 must be 'query 0 document relevance'"),
        (RUN, ("q1 0 d1 yes",), "line 1 must be 'query 0 document relevance'"),
        (RUN, ("q1 0 d1 1", "q1 0 d1 0"), "line 2 judges document d1 of query q1 a second time"),
        (RUN, (), "is empty: it judges no document"),
    ],
)
def test_runs_and_qrels_that_do_not_fit_are_named(run, qrels, message, tmp_path):
    told = {"qrels": text(tmp_path / "qrels.txt", *qrels), **SHORT}
    with pytest.raises(ScoreTableError, match=message):
        load(text(tmp_path / "r.run", *run), **told)


def test_a_run_too_large_to_be_dense_is_refused_before_it_is_made(tmp_path):
    n = 20_000
    qrels = text(tmp_path / "q", *(f"q{i} 0 d{i} 1" for i in range(n)))
    run = text(tmp_path / "r.run", *(f"q{i} Q0 d{i} 1 1 m" for i in range(n)))
    with pytest.raises(ScoreTableError, match="20,000 queries × 20,000 documents are more"):
        load(run, qrels=qrels, **SHORT)


# ── from the shell, without torch ────────────────────────────────────────────────────────────────────────────────────


def test_the_shell_reads_what_python_reads(lists, tmp_path, capsys):
    np.save(tmp_path / "s.npy", SCORES)
    told = [f"--{n.replace('_', '-')}={v}" for n, v in {**lists, **FACTS}.items()]
    assert cli.main(["metrics", "--json", str(tmp_path / "s.npy"), *told]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["metrics"] == czsl.evaluate(by_hand())
    assert "true pair" in entry["notes"][0]
    assert cli.main(["metrics", str(tmp_path / "s.npy"), *told[:-1]]) == 1
    assert capsys.readouterr().err.startswith("python -m eval metrics: ")


def test_the_shell_without_torch(tmp_path):
    """Both commands, with torch barred: neither imports it, nor the other rooms."""
    t = by_hand()
    arrays = {"scores": SCORES, "target": TARGET, "pairs": np.array(PAIRS), "seen": t.seen}
    path = npz(tmp_path / "s.npz", **arrays, **FACTS)
    for module in ("eval.cli", "heads.cli"):
        code = (
            "import sys; sys.modules['torch'] = None\n"
            f"from {module} import main; from eval.czsl import evaluate\n"
            f"sys.exit(main(['metrics', {str(path)!r}]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        assert re.search(r"auc +\d+\.\d +\[", done.stdout)
    command = [sys.executable, "-m", "eval.cli", "metrics", str(path)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == done.stdout


def test_importers_wait_with_zarr_until_a_table_is_one():
    code = "import sys, eval.importers; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert not {"torch", "zarr", "matplotlib", "sklearn"} & set(done.stdout.split())


def test_the_bar_against_torch_can_fail():
    code = "import sys; sys.modules['torch'] = None; import heads.score"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "ModuleNotFoundError" in done.stderr
