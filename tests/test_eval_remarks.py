"""What a table says of itself: sentences, in the shell and in reports; nothing where there is nothing to say."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eval import cli, score_io
from eval.comparison import compare
from eval.composed_queries import ComposedQueries
from eval.composed_table import ComposedScores
from eval.composition import CompositionScores
from eval.errors import ScoreTableError
from eval.formats import markdown
from eval.remarks import is_partial, remarks
from eval.report import report
from eval.retrieval import RetrievalScores
from eval.runs import Run, read_runs


def table(split="test", **meta) -> RetrievalScores:
    scores = np.random.default_rng(0).normal(size=(5, 7))
    return RetrievalScores(scores, np.eye(5, 7, dtype=bool), "cosine", split, meta=meta)


OVERLAP = {"count": 2, "says": "2 of the 9 images scored were trained on"}


@pytest.mark.parametrize(
    ("meta", "sentence"),
    [
        ({"partial": True}, "partial: examples were left out, so this is not the split"),
        ({"partial": True, "dropped": list("abcd")}, "partial: 4 examples were left out (a, b, c, …)"),
        ({"partial": False, "dropped": ["a"]}, "partial: 1 examples were left out (a), so"),
        ({"train_overlap": OVERLAP}, OVERLAP["says"]),
        ({"train_overlap": {"count": None, "says": "cannot be checked"}}, "cannot be checked"),
        ({"selected_on": "val rsum"}, "the checkpoint was selected on val rsum"),
        ({"run": {"selected_on": "val rsum"}}, "the checkpoint was selected on val rsum"),
        ({"selected_on": "test rsum"}, "selected on test rsum, the split scored: no held-out number"),
        ({"rerank": 16}, "reranked: the head scored only the 16 best by cosine"),
        ({"feasibility": {"mode": "neg_inf", "threshold": 0.40691}}, "mode neg_inf, threshold 0.4069;"),
        ({"run": {"seed": 2, "train": {"order_seed": 0}}}, "on the batches of seed 0, whatever the seed"),
        ({"notes": ["a list\x07 ends early"]}, "a list\\x07 ends early"),
    ],
)  # fmt: skip
def test_each_fact_is_one_sentence(meta, sentence):
    (found,) = remarks(table(**meta))
    assert sentence in found


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"partial": False, "dropped": []},
        {"train_overlap": {"count": 0, "says": "none was trained on"}},
        {"run": {"selected_on": None, "method": "a"}, "direction": "t2i"},
        {"run": {"seed": 2, "train": {"order_seed": None}}},
        {"run": {"seed": 0, "train": {"order_seed": 0}}},
    ],
)
def test_nothing_is_said_where_there_is_nothing_to_say(meta):
    assert remarks(table(**meta)) == []


def test_a_table_without_some_examples_is_partial():
    assert not is_partial(table())
    assert is_partial(table(partial=True))
    assert is_partial(table(dropped=["a"]))


def run_of(t, method="a", seed=0) -> Run:
    facts = {"method": method, "seed": seed, "backbone": "clip:x", "dataset": "d"}
    return Run(Path(method), facts, {"t": t})


def test_a_report_names_the_rows_that_a_sentence_is_true_of():
    runs = [run_of(table(selected_on="val rsum"), "a"), run_of(table(rerank=2), "b")]
    runs += [run_of(table(selected_on="val rsum"), "c")]
    (found,) = compare(runs)
    assert found.notes == (
        "a · clip:x, c · clip:x: the checkpoint was selected on val rsum",
        "b · clip:x: reranked: the head scored only the 2 best by cosine; not a full ranking",
    )
    assert "Note: a · clip:x, c · clip:x: the checkpoint" in markdown([found])


def test_the_notes_stand_under_the_legacy_curve_too():
    scores = np.eye(4) + np.eye(4)[::-1] / 2
    pairs = [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")]
    t = CompositionScores(
        scores, np.arange(4), pairs, np.arange(4) < 2, "test", "logit", meta={"partial": True}
    )
    exact, legacy = compare([run_of(t)])
    assert legacy.curve == "legacy"
    assert exact.notes == legacy.notes
    assert "partial" in exact.notes[0]


def test_seeds_are_counted_in_words(tmp_path):
    one = compare([run_of(table())])[0]
    two = compare([run_of(table(), seed=0), run_of(table(), seed=1)])[0]
    mixed = compare([run_of(table(), seed=s) for s in (0, 1, 2)] + [run_of(table(), "b")])[0]
    assert [c.seeds for c in (one, two, mixed)] == ["1 seed", "2 seeds", "1–3 seeds"]
    assert "5 queries, 7 candidates; 1 seed\n" in markdown([one])


def test_the_shell_prints_split_space_seeds_and_notes(tmp_path, capsys):
    path = score_io.save(table(rerank=3), tmp_path / "s.zarr")
    assert cli.main(["metrics", str(path)]) == 0
    out = capsys.readouterr().out
    assert "retrieval · split test · space cosine · 1 seed" in out
    assert "  note: reranked: the head scored only the 3 best" in out
    assert cli.main(["metrics", "--json", str(path)]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["seeds"], len(entry["notes"])) == (1, 1)


def test_composed_tables_have_a_page(tmp_path):
    """A report of a composed table needs its own heading and reading."""
    asked = ComposedQueries(("1", "2"), ("a", "b"), [["c"], ["d"]], "own", "val", "all")
    t = ComposedScores(np.arange(8.0).reshape(2, 4), list("abcd"), asked, "cosine")
    run = tmp_path / "run"
    run.mkdir()
    facts = {"method": "a", "seed": 0, "backbone": "clip:x", "dataset": "d"}
    (run / "run.json").write_text(json.dumps(facts))
    score_io.save(t, run / "scores-val.zarr")
    assert len(read_runs([run])) == 1
    text = report([run], tmp_path / "r.html")[0].read_text(encoding="utf-8")
    assert "<h2>Composed image retrieval, d</h2>" in text
    assert "; 1 seed.</p>" in text


def test_a_bad_score_is_named_without_control_characters():
    t = table()
    scores = t.scores.copy()
    scores[1, 2] = np.nan
    with pytest.raises(ScoreTableError, match=r"query 1 \(b\\x07\) with column 2") as caught:
        replace(t, scores=scores, ids=["a", "b\x07", "c", "d", "e"])
    assert "\x07" not in str(caught.value)
