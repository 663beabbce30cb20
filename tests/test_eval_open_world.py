"""The feasibility threshold: searched on val as the slow loop does, carried to test, written down."""

import dataclasses
import json
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import cli, czsl, score_io
from eval.comparison import compare
from eval.composition import Composition, CompositionScores
from eval.czsl_summary import CompositionSummary, summarise
from eval.errors import EvalWarning, ScoreTableError
from eval.feasibility import Feasibility, Mode, filtered, grid
from eval.matching import MatchingScores
from eval.open_world import search_threshold, select
from eval.reduction import Layout
from eval.report import report
from eval.runs import read_runs

ATTRS, OBJS = ("blue", "green", "red"), ("bag", "cup", "fan", "hat")
PAIRS = [(a, o) for a in ATTRS for o in OBJS]
SEEN = np.arange(12) % 3 == 0
MODES = get_args(Mode)
FACTS: dict[str, Any] = {"space": "logit", "world": "open"}


def world(split="val", seed=0, q=40, **options) -> tuple[CompositionScores, Feasibility]:
    """Images of half-learned pairs; what is rare in them is less feasible."""
    rng = np.random.default_rng(seed)
    target = rng.choice([0, 3, 6, 9, 1, 4, 5, 11], size=q)
    scores = (rng.normal(size=(q, 12)) + 1.5 * np.eye(12)[target]).astype(np.float32)
    rho = np.random.default_rng(7).random(12)
    rho[[1, 4, 5, 11]] += 1
    facts: dict[str, Any] = FACTS | {"split": split} | options
    return CompositionScores(scores, target, PAIRS, SEEN, **facts), Feasibility(rho, ATTRS, OBJS)


def reduced(table: CompositionScores, rho: Feasibility | None, keep: int = 3) -> CompositionSummary:
    values = None if rho is None else rho.of(PAIRS)
    layout = Layout.of(SEEN, values, () if values is None else grid(values, SEEN))
    labels: dict[str, Any] = {"split": table.split, "keep": keep} | FACTS
    return summarise([table.scores], layout, table.target, PAIRS, **labels)


@settings(derandomize=True, deadline=None, max_examples=6)
@given(st.integers(0, 999), st.sampled_from(MODES), st.sampled_from(["exact", "legacy"]))
def test_the_search_is_masking_and_measuring_again_at_every_grid_point(seed, mode, curve):
    table, file = world(seed=seed)
    rho = file.of(PAIRS)
    best, expected, aucs = 0.0, -10.0, []
    for t in np.linspace(rho[~SEEN].min(), rho[~SEEN].max(), 50).tolist():
        masked = filtered(table.scores, rho, SEEN, t, mode)
        found = czsl.evaluate(
            CompositionScores(masked, table.target, PAIRS, SEEN, "val", "logit"), curve=curve
        )
        aucs.append(found["auc"])
        if found["auc"] > best:
            best, expected = found["auc"], t
    got = search_threshold(table, rho, mode=mode, curve=curve)
    assert (got.threshold, got.auc, got.aucs) == (expected, best, aucs)
    if (mode, curve) == ("neg_inf", "exact"):
        again = search_threshold(reduced(table, file), rho)
        assert (again.threshold, again.auc, again.aucs) == (expected, best, aucs)


def test_without_any_area_every_pair_is_kept_and_said_so():
    table, file = world()
    wrong = CompositionScores(-np.eye(12)[table.target], table.target, PAIRS, SEEN, "val", "logit")
    flat = CompositionScores(wrong.scores, wrong.target, PAIRS, SEEN, "val", "logit", world="open")
    with pytest.warns(EvalWarning, match="no feasibility threshold gives val an auc above 0"):
        found = search_threshold(flat, file.of(PAIRS))
    assert (found.threshold, found.auc) == (-np.inf, 0)
    with pytest.warns(EvalWarning, match="every pair is kept"):
        use = select(flat, file)
    test = world("test", 1)[0]
    made = use(test)
    assert isinstance(made, CompositionScores)
    assert np.array_equal(made.scores, test.scores)
    assert made.meta["feasibility"]["threshold"] is None
    assert made.meta["feasibility"]["kept"] == 8


def test_a_threshold_needs_images_of_both_kinds():
    table, file = world()
    only = table.seen_labelled
    seen_only = CompositionScores(
        table.scores[only], table.target[only], PAIRS, SEEN, "val", "logit"
    )
    with pytest.raises(ScoreTableError, match="and 0 of unseen pairs; it needs both"):
        search_threshold(seen_only, file.of(PAIRS))


@pytest.mark.parametrize("brief", [False, True])
def test_the_threshold_of_val_is_used_on_test_unchanged_and_stored(brief):
    (val, file), (test, _) = world(), world("test", 1)
    rho = file.of(PAIRS)
    threshold = search_threshold(val, rho).threshold
    given = (reduced(val, file), reduced(test, file)) if brief else (val, test)
    made = select(given[0], None if brief else file, name="VAL")(given[1])
    assert isinstance(made, Composition)
    assert czsl.evaluate(made) == czsl.evaluate(test.pruned(threshold, rho))
    facts = made.meta["feasibility"]
    assert facts["threshold"] == threshold
    assert facts["rule"] == "feasible, neg_inf, T by val auc (exact)"
    assert (facts["kept"], facts["unseen"]) == (int((rho[~SEEN] >= threshold).sum()), 8)
    assert (facts["selected_on"], facts["selected_by"]) == ("VAL", "val auc (exact)")
    json.dumps(facts, allow_nan=False)


def test_tables_that_cannot_be_filtered_are_refused():
    (val, file), (test, _) = world(), world("test", 1)
    with pytest.raises(ScoreTableError, match="val table keeps no feasibility; give it"):
        select(val)
    with pytest.raises(ScoreTableError, match="val table keeps no feasibility"):
        select(reduced(val, None))
    closed = world(world="closed")[0]
    with pytest.raises(
        ScoreTableError, match=r"CompositionScores of split 'val'; score with --world"
    ):
        select(closed, file)
    matching = MatchingScores(np.zeros((2, 2)), np.array(["a", "b"]), space="logit", split="test")
    with pytest.raises(ScoreTableError, match="but this is MatchingScores"):
        select(val, file)(matching)
    other = CompositionScores(test.scores, test.target, PAIRS, ~SEEN, "test", "logit", world="open")
    with pytest.raises(
        ScoreTableError, match=r"test table has other candidates \(12\) than val \(12\)"
    ):
        select(val, file)(other)


def test_the_split_that_chose_the_threshold_is_not_filtered_by_it():
    (val, file), (more, _) = world(), world("val", 1)
    for table in (val, more):
        with pytest.raises(ScoreTableError, match="chosen on VAL, a table of split val"):
            select(val, file, name="VAL")(table)


@pytest.mark.parametrize("brief", [False, True])
def test_equal_seen_flags_do_not_make_other_pairs_the_same(brief):
    (val, file), (test, _) = world(), world("test", 1)
    pairs = [PAIRS[i] for i in (0, 2, 1, *range(3, 12))]
    other = dataclasses.replace(reduced(test, file) if brief else test, pairs=pairs)
    with pytest.raises(ScoreTableError, match="test table has other pairs in its columns than val"):
        select(reduced(val, file) if brief else val, None if brief else file)(other)


# ── the command line ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def tables(tmp_path):
    """Paths of val and test, whole and reduced, and of the feasibility."""
    (val, file), (test, _) = world(), world("test", 1)
    made = {
        "val": val,
        "test": test,
        "val-brief": reduced(val, file),
        "test-brief": reduced(test, file),
    }
    paths = {name: str(score_io.save(t, tmp_path / f"{name}.zarr")) for name, t in made.items()}
    return paths | {"rho": str(file.save(tmp_path / "rho.npz"))}


def printed(capsys, *args: str) -> Any:
    assert cli.main(["metrics", *args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_metrics_selects_on_val_and_prints_the_threshold_and_what_it_keeps(tables, capsys):
    (brief,) = printed(capsys, tables["test-brief"], "--select-on", tables["val-brief"])
    whole_args = (tables["test"], "--select-on", tables["val"], "--feasibility", tables["rho"])
    (whole,) = printed(capsys, *whole_args)
    (plain,) = printed(capsys, tables["test-brief"])
    for name in ("metrics", "chance", "intervals"):
        assert brief[name] == whole[name]
    assert brief["feasibility"]["threshold"] == whole["feasibility"]["threshold"]
    assert "feasibility" not in plain
    assert plain["metrics"]["auc"] != brief["metrics"]["auc"]
    assert cli.main(["metrics", tables["test-brief"], "--select-on", tables["val-brief"]]) == 0
    out = capsys.readouterr().out
    facts = brief["feasibility"]
    line = f"feasibility filter: T = {facts['threshold']:.4f}, {facts['kept']} of 8 unseen pairs, neg_inf"
    assert f"{line}; T by val auc (exact)" in out
    assert f"% on {tables['val-brief']}" in out


def test_parity_with_csp_takes_its_mode_and_its_curve(tables, capsys):
    args = (tables["test"], "--select-on", tables["val"], "--feasibility", tables["rho"])
    (found,) = printed(capsys, *args, "--mode", "csp_multiply", "--curve", "legacy")
    (val, file), (test, _) = world(), world("test", 1)
    rho = file.of(PAIRS)
    t = search_threshold(val, rho, mode="csp_multiply", curve="legacy").threshold
    expected = czsl.evaluate(test.pruned(t, rho, "csp_multiply"), curve="legacy")
    assert found["metrics"] == expected
    assert found["feasibility"]["selected_by"] == "val auc (legacy)"


def test_the_filtered_table_can_be_saved_with_its_record(tables, capsys, tmp_path):
    new = tmp_path / "scores-test-feasible.zarr"
    args = (
        tables["test-brief"],
        "--select-on",
        tables["val-brief"],
        "--k",
        "2",
        "--save",
        str(new),
    )
    (found,) = printed(capsys, *args)
    loaded = score_io.load(new)
    assert isinstance(loaded, CompositionSummary)
    assert loaded.meta["feasibility"] == found["feasibility"]
    assert loaded.threshold == found["feasibility"]["threshold"]
    again = printed(capsys, str(new), "--k", "2")[0]
    assert again["metrics"] == found["metrics"]
    assert again["feasibility"] == found["feasibility"]


def test_a_report_puts_filtered_and_unfiltered_tables_apart_and_methods_together(tmp_path):
    (val, file), (test, _) = world(), world("test", 1)
    for i, method in enumerate(("zero_shot", "probe")):
        run = tmp_path / "runs" / method
        run.mkdir(parents=True)
        facts = {"method": method, "backbone": "clip:x", "dataset": "toy", "seed": 0}
        (run / "run.json").write_text(json.dumps(facts))
        shifted = dataclasses.replace(test, scores=test.scores + i * np.eye(12)[test.target])
        use = select(dataclasses.replace(val, scores=val.scores + i * (file.of(PAIRS) < 1)), file)
        whole = reduced(shifted, file)
        score_io.save(whole, run / "scores-open.zarr")
        score_io.save(use(whole), run / "scores-feasible.zarr")
    files = report([tmp_path / "runs"], tmp_path / "r.html")
    text = files[1].read_text()
    assert "czsl · toy · test · open world" in text
    assert "czsl · feasible, neg_inf, T by val auc (exact) · toy · test · open world" in text
    found = compare(read_runs([tmp_path / "runs"]))
    assert [(len(c.rows), c.curve) for c in found] == [(2, "exact")] * 2
    assert "best_unseen" in found[0].rows[1].cells
    assert all(c.rows[1].gain is not None for c in found)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--mode", "csp_multiply"],
            "--mode filters by a threshold, which --select-on VAL chooses",
        ),
        (["--feasibility", "x.npz", "--save", "y"], "--feasibility, --save filters by"),
        (["--select-on", "val-brief", "--k", "1", "2"], "one threshold for one --k"),
        (
            ["--select-on", "val-brief", "--mode", "csp_multiply"],
            "needs|that this table does not keep",
        ),
        (
            ["--select-on", "val-brief", "--feasibility", "nowhere.npz"],
            "nowhere.npz is no feasibility",
        ),
        (["--select-on", "val-brief", "--curve", "legacy"], "looks at every score again"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(tables, capsys, args, message):
    words = [tables.get(word, word) for word in args]
    assert cli.main(["metrics", tables["test-brief"], *words]) == 1
    error = capsys.readouterr().err
    assert any(part in error for part in message.split("|")), error
    assert error.count("\n") == 1


def test_the_modes_of_the_command_line_are_those_there_are(capsys):
    with pytest.raises(SystemExit):
        cli.main(["metrics", "--help"])
    assert f"{{{','.join(MODES)}}}" in capsys.readouterr().out
