"""Accuracy per primitive and confusion given the object: equal to loops from the definition, and to the curve."""

import base64
import csv
import io
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import czsl
from eval.comparison import Comparison, Row, compare
from eval.composition import CompositionScores
from eval.curve import best_point
from eval.czsl_summary import CompositionSummary, summarise
from eval.diagnostic_figures import diagnostics_of
from eval.diagnostics import (
    Confusion,
    accuracy,
    best_hm_bias,
    confusion,
    mean_confusion,
    most_confused,
)
from eval.errors import ScoreTableError
from eval.figures import figures_of
from eval.reduction import Layout
from eval.runs import Group, Question, Run

quick = settings(derandomize=True, deadline=None, max_examples=60)
FACTS: dict[str, Any] = {"split": "test", "space": "logit"}
BIASES = [None, 0.0, 0.25, -0.5, -np.inf, np.inf]

worlds = st.fixed_dictionaries(
    {
        "q": st.integers(1, 12),
        "a": st.integers(1, 4),
        "o": st.integers(1, 3),
        "share": st.sampled_from([0.0, 0.5, 0.8, 1.0]),
        "tied": st.booleans(),
        "seed": st.integers(0, 10_000),
    }
)


def world(*, q, a, o, share, tied, seed) -> CompositionScores:
    """A part of attrs × objs as candidates in random order; ties, -inf scores and rows, empty sides."""
    rng = np.random.default_rng(seed)
    pairs = [(f"a{i}", f"o{j}") for i in range(a) for j in range(o) if rng.random() < 0.8]
    pairs = pairs or [("a0", "o0")]
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    c = len(pairs)
    values = [-np.inf, -0.5, 0.0, 0.25, 1.0] if tied else rng.normal(size=50)
    scores = rng.choice(values, size=(q, c))
    scores[rng.random(q) < 0.1] = -np.inf
    return CompositionScores(scores, rng.integers(c, size=q), pairs, rng.random(c) < share, **FACTS)


def summary_of(table: CompositionScores) -> CompositionSummary:
    return summarise(
        [table.scores], Layout.of(table.seen), table.target, table.pairs, keep=1, **FACTS
    )


def predicted(table: CompositionScores, row: int, columns: list[int], bias: float | None) -> int:
    """The definition, one image at a time; -1 where no candidate is left."""
    score = table.scores[row]
    alive = [c for c in columns if score[c] > -np.inf]
    if not alive:
        return -1
    if bias is None:
        return min(alive, key=lambda c: (-score[c], c))
    best = {}
    for side in (True, False):
        mine = [c for c in alive if table.seen[c] == side]
        if mine:
            best[side] = min(mine, key=lambda c: (-score[c], c))
    if len(best) == 1:
        return next(iter(best.values()))
    return best[bool(bias <= score[best[True]] - score[best[False]])]


@quick
@given(worlds, st.sampled_from(BIASES), st.sampled_from(["attr", "obj"]))
def test_accuracy_is_the_share_of_images_whose_predicted_pair_has_it(drawn, bias, kind):
    table = world(**drawn)
    which = ("attr", "obj").index(kind)
    n, right = Counter(), Counter()
    for q, target in enumerate(table.target):
        truth = table.pairs[target][which]
        guess = predicted(table, q, list(range(table.shape[1])), bias)
        for side in ("all", bool(table.seen[target])):
            n[truth, side] += 1
            right[truth, side] += guess >= 0 and table.pairs[guess][which] == truth
    found = accuracy(table, kind, bias)
    assert list(found.names) == sorted({name for name, _ in n})
    want = [
        [right[name, s] / n[name, s] if n[name, s] else np.nan for s in ("all", True, False)]
        for name in found.names
    ]
    np.testing.assert_array_equal(found.share(), want)
    np.testing.assert_array_equal(found.n, [[n[m, True], n[m, False]] for m in found.names])
    also = accuracy(summary_of(table), kind, bias)
    assert also.names == found.names
    np.testing.assert_array_equal(also.right, found.right)


@quick
@given(worlds)
def test_without_bias_the_mean_over_images_is_the_accuracy_of_the_table(drawn):
    table = world(**drawn)
    metrics = czsl.evaluate(table)
    for kind in ("attr", "obj"):
        found = accuracy(table, kind, None)
        assert found.right.sum() / len(table.target) == metrics[f"{kind}_acc"]


@quick
@given(worlds)
def test_at_the_best_bias_pairs_are_right_as_often_as_the_curve_says(drawn):
    table = world(**drawn)
    bias = best_hm_bias(table)
    if not all(table.counts):
        assert bias is None
        return
    points = czsl.exact_curve(table)
    at = best_point(points.seen[None], points.unseen[None])[0]
    if bias is None:
        assert points.seen[at] * points.unseen[at] == 0
        return
    hit = table.sides().at(bias) == table.target
    assert hit[table.seen_labelled].mean() == points.seen[at]
    assert hit[~table.seen_labelled].mean() == points.unseen[at]
    assert best_hm_bias(summary_of(table)) == bias


@quick
@given(worlds, st.sampled_from(BIASES))
def test_confusion_counts_the_best_attribute_among_the_pairs_of_the_true_object(drawn, bias):
    table = world(**drawn)
    cells, silent, drawn_right, alone = Counter(), Counter(), 0.0, 0
    for q, target in enumerate(table.target):
        attr, obj = table.pairs[target]
        columns = [c for c, pair in enumerate(table.pairs) if pair[1] == obj]
        alive = [c for c in columns if table.scores[q, c] > -np.inf]
        drawn_right += 1 / len(alive) if target in alive else 0
        alone += len(alive) == 1
        guess = predicted(table, q, columns, bias)
        if guess < 0:
            silent[attr] += 1
        else:
            cells[attr, table.pairs[guess][0], obj] += 1
    found = confusion(table, bias)
    names = [(found.attrs[a], found.attrs[g], found.objs[o]) for a, g, o in found.cells]
    assert dict(zip(names, found.count, strict=True)) == cells
    assert {a: n for a, n in zip(found.attrs, found.silent, strict=True) if n} == silent
    assert found.alone == alone
    assert found.chance == pytest.approx(drawn_right / len(table.target))
    right = sum(n for (a, g, _), n in cells.items() if a == g) / len(table.target)
    assert found.right() == pytest.approx(right)
    wrong = {k: n for k, n in cells.items() if k[0] != k[1]}
    pair = Counter({})
    for (a, _, o), n in cells.items():
        pair[a, o] += n
    assert [tuple(line) for line in found.most()] == [
        (*k, wrong[k], pair[k[0], k[2]]) for k in sorted(wrong, key=lambda k: (-wrong[k], k))
    ]


@quick
@given(worlds, st.sampled_from(BIASES))
def test_rows_of_the_matrix_sum_to_the_images_of_an_attribute(drawn, bias):
    table = world(**drawn)
    found = confusion(table, bias)
    truth = Counter(str(table.pairs[t][0]) for t in table.target)
    total = found.matrix().sum(1) + found.silent
    assert dict(zip(found.attrs, total, strict=True)) == {a: truth[a] for a in found.attrs}


@quick
@given(worlds, st.sampled_from(BIASES), st.randoms(use_true_random=False))
def test_other_names_permute_accuracy_and_matrix(drawn, bias, random):
    table = world(**drawn)
    old = sorted({a for a, _ in table.pairs})
    new = random.sample([f"b{i}" for i in range(len(old))], len(old))
    renamed = dict(zip(old, new, strict=True))
    pairs = [(renamed[a], o) for a, o in table.pairs]
    other = CompositionScores(table.scores, table.target, pairs, table.seen, **FACTS)
    found, moved = confusion(table, bias), confusion(other, bias)
    order = [moved.attrs.index(renamed[a]) for a in found.attrs]
    np.testing.assert_array_equal(found.matrix(), moved.matrix()[np.ix_(order, order)])
    np.testing.assert_array_equal(found.silent, moved.silent[order])
    shares = [dict(zip(x.names, x.share().tolist(), strict=True)) for x in
              (accuracy(t, "attr", bias) for t in (table, other))]  # fmt: skip
    assert {renamed[a]: str(v) for a, v in shares[0].items()} == {
        a: str(v) for a, v in shares[1].items()
    }


@quick
@given(worlds)
def test_a_perfect_table_confuses_nothing(drawn):
    table = world(**drawn)
    perfect = np.zeros(table.shape)
    perfect[np.arange(len(perfect)), table.target] = 1.0
    table = CompositionScores(perfect, table.target, table.pairs, table.seen, **FACTS)
    bias = best_hm_bias(table)
    assert bias is None or abs(bias) < 1
    found = confusion(table, bias)
    assert np.array_equal(found.matrix(), np.diag(found.matrix().sum(1)))
    assert found.right() == 1
    assert found.most() == []
    assert len(most_confused(found.matrix(), 5)) == 0
    for kind in ("attr", "obj"):
        assert (accuracy(table, kind, bias).share()[:, 0] == 1).all()


@quick
@given(worlds)
def test_the_mean_of_a_confusion_with_itself_is_itself_and_otherwise_of_counts(drawn):
    table = world(**drawn)
    one, two = confusion(table, None), confusion(table, np.inf)
    same, both = mean_confusion([one, one]), mean_confusion([one, two])
    np.testing.assert_array_equal(same.matrix(), one.matrix())
    assert same.most() == one.most()
    np.testing.assert_allclose(both.matrix(), (one.matrix() + two.matrix()) / 2)
    assert both.right() == pytest.approx((one.right() + two.right()) / 2)
    assert (both.silent.tolist(), both.alone, both.chance) == (
        one.silent.tolist(), one.alone, one.chance,
    )  # fmt: skip


def test_a_bias_without_bound_is_infinite() -> None:
    """One unseen-labelled image has no seen candidate: it is right at every bias, the first point is as good as any."""
    scores = np.array([[1.0, -np.inf, -np.inf], [-np.inf, -np.inf, 1.0]])
    pairs = [("a", "o"), ("b", "o"), ("c", "o")]
    table = CompositionScores(
        scores, np.array([0, 2]), pairs, np.array([True, True, False]), **FACTS
    )
    assert best_hm_bias(table) == -np.inf
    assert accuracy(table, "attr", -np.inf).share()[:, 0].tolist() == [1, 1]
    scores[0] = [
        1.0,
        -np.inf,
        2.0,
    ]  # right below 1 − 2 only; then another image is right above that
    two = np.vstack([scores, scores[:1]])
    two[2] = [0.0, -np.inf, 2.0]
    both = CompositionScores(
        two, np.array([0, 2, 2]), pairs, np.array([True, True, False]), **FACTS
    )
    assert best_hm_bias(both) == pytest.approx(-1.5)


def test_confusion_needs_every_score() -> None:
    table = world(q=3, a=2, o=2, share=0.5, tied=False, seed=1)
    with pytest.raises(ScoreTableError, match="--dense"):
        confusion(summary_of(table), None)
    other = world(q=3, a=1, o=2, share=0.5, tied=False, seed=1)
    with pytest.raises(ScoreTableError, match="no mean"):
        mean_confusion([confusion(table, None), confusion(other, None)])


def test_numbers_for_names_are_words_in_the_result() -> None:
    table = CompositionScores(
        np.eye(2), np.array([0, 0]), np.array([[1, 7], [0, 7]]), np.array([True, False]), **FACTS
    )
    found = confusion(table, None)
    assert found.most() == [("1", "0", "7", 1.0, 2.0)]


@quick
@given(st.integers(1, 7), st.integers(1, 8), st.integers(0, 10_000))
def test_the_chain_holds_the_attributes_confused_most_each_once(a, k, seed):
    rng = np.random.default_rng(seed)
    matrix = rng.integers(0, 4, (a, a)).astype(float)
    chain = most_confused(matrix, k)
    both = matrix + matrix.T - 2 * np.diag(np.diag(matrix))
    total = both.sum(1)
    want = [i for i in sorted(range(a), key=lambda i: (-total[i], i))[:k] if total[i] > 0]
    assert sorted(chain) == sorted(want)
    if len(chain) > 1:
        inside = both[np.ix_(chain, chain)]
        assert inside.max() in np.diag(inside, 1)


def test_attributes_taken_for_each_other_stand_side_by_side() -> None:
    matrix = np.diag([9.0] * 5)
    matrix[0, 3], matrix[3, 4], matrix[1, 2] = 5, 2, 1
    assert most_confused(matrix, 5).tolist() == [0, 3, 4, 1, 2]
    assert most_confused(matrix, 3).tolist() == [0, 3, 4]


def test_a_confusion_without_images_of_one_kind_has_no_best_bias() -> None:
    table = world(q=4, a=2, o=2, share=1.0, tied=False, seed=0)
    assert best_hm_bias(table) is None
    assert isinstance(confusion(table, None), Confusion)


# ── in the report ────────────────────────────────────────────────────────────────────────────────────────────────────


def plotted(n_attrs: int = 4, n_objs: int = 3, seeds: tuple[int, ...] = (0, 1)) -> Comparison:
    """One row of two seeds and one of a summary, which keeps the best pairs only."""
    pairs = [(f"a{i:02d}<", f"o{j}") for i in range(n_attrs) for j in range(n_objs)]
    c = len(pairs)
    target, seen = np.arange(4 * c) % c, np.arange(c) % 3 > 0

    def table(seed: int) -> CompositionScores:
        noise = np.random.default_rng(seed).normal(size=(len(target), c))
        return CompositionScores(noise + 1.5 * np.eye(c)[target], target, pairs, seen, **FACTS)

    def group(method: str, tables: list[Any]) -> Group:
        facts = {"method": method, "backbone": "clip:demo", "dataset": "toy"}
        runs = [Run(Path("r"), {**facts, "seed": s}) for s in range(len(tables))]
        return Group("clip:demo", method, "logit", tuple(runs), tuple(tables))

    whole = [table(seed) for seed in seeds]
    rows = tuple(Row(g, (), {}) for g in (group("m", whole), group("kept", [summary_of(whole[0])])))
    question = Question("toy", "czsl", "", "test", "closed", "0")
    return Comparison(question, 1, "exact", rows, {}, "")


SERIES = {"m · clip:demo": 0, "kept · clip:demo": 1}


def csvs(page: str, name: str) -> list[dict[str, str]]:
    """The rows of the CSV files of that name in a page."""
    code = re.findall(rf'download="{name}\.csv" href="data:text/csv;base64,([^"]+)"', page)
    return [
        row for one in code for row in csv.DictReader(io.StringIO(base64.b64decode(one).decode()))
    ]


def test_the_report_shows_each_attribute_at_its_mean_over_seeds() -> None:
    c = plotted()
    page = diagnostics_of(c, SERIES)
    tables = [t for t in c.rows[0].group.tables if isinstance(t, CompositionScores)]
    shares = [accuracy(t, "attr", best_hm_bias(t)).share()[:, 0] for t in tables]
    for i, mean in enumerate(np.mean(shares, axis=0)):
        assert f"<title>a{i:02d}&lt;, m · clip:demo: {100 * mean:.1f} % of 12</title>" in page
    assert "a00<" not in page
    lines = csvs(page, "accuracy-attr")
    assert len(lines) == 4 * 2 * 3  # attributes × with and without bias × seeds of both rows
    one = next(
        x for x in lines if (x["attr"], x["seed"], x["row"]) == ("a02<", "1", "m · clip:demo")
    )
    bias = best_hm_bias(tables[1])
    assert bias is not None
    assert float(one["bias"]) == pytest.approx(bias, rel=1e-5)
    found = accuracy(tables[1], "attr", bias)
    assert [one[k] for k in ("n_seen", "right_seen", "n_unseen", "right_unseen")] == [
        str(x) for k in (0, 1) for x in (found.n[2, k], found.right[2, k])
    ]


def test_the_report_shows_what_is_taken_for_what_and_says_what_is_left_out() -> None:
    c = plotted()
    page = diagnostics_of(c, SERIES)
    tables = [t for t in c.rows[0].group.tables if isinstance(t, CompositionScores)]
    found = mean_confusion([confusion(t, best_hm_bias(t)) for t in tables])
    assert "mean of 2 seeds" in page
    assert "tables that keep the best pairs of each image only are left out" in page
    matrix = found.matrix()
    for i, j in zip(*np.nonzero(matrix), strict=True):
        n = f"{100 * matrix[i, j] / 12:.1f} % ({matrix[i, j]:.4g} images)"
        what = f"right {n}" if i == j else f"taken for a{j:02d}&lt;: {n}"
        assert re.search(rf"<title>a{i:02d}&lt;:? {re.escape(what)}</title>", page)
    lines = csvs(page, "confusion")
    assert [(x["attr"], x["taken_for"], x["obj"], float(x["images"]), float(x["of"])) for x in lines] == [
        tuple(m) for m in found.most()
    ]  # fmt: skip
    assert page.count("<li>") == 8
    assert f"{100 * found.right():.1f} % right given the object" in page


def test_with_many_attributes_the_hardest_and_most_confused_are_drawn_and_the_page_says_so() -> (
    None
):
    c = plotted(n_attrs=40, n_objs=2, seeds=(3,))
    page = diagnostics_of(c, SERIES)
    assert "The 30 of 40 with the lowest mean over the rows are drawn." in page
    assert re.search(r"The 24 attributes with the most confusions, of \d\d with any", page)
    assert len(csvs(page, "accuracy-attr")) == 40 * 2 * 2
    assert len(page) < 250_000


def test_other_tables_have_no_such_section_and_a_perfect_one_has_no_map() -> None:
    c = plotted()
    assert diagnostics_of(replace(c, curve="legacy"), SERIES) == ""
    table = c.rows[0].group.tables[0]
    assert isinstance(table, CompositionScores)
    perfect = replace(table, scores=np.eye(table.shape[1])[table.target])
    group = replace(c.rows[0].group, runs=c.rows[0].group.runs[:1], tables=(perfect,))
    page = diagnostics_of(replace(c, rows=(replace(c.rows[0], group=group),)), SERIES)
    assert "100.0 % right given the object" in page
    assert "No attribute was taken for another." in page


def test_rows_of_one_label_in_two_score_spaces_are_both_drawn() -> None:
    c = plotted()
    row = c.rows[0]
    other = Group(
        "clip:demo", "m", "cosine", row.group.runs, plotted(seeds=(7, 8)).rows[0].group.tables
    )
    page = diagnostics_of(replace(c, rows=(*c.rows, Row(other, (), {}))), SERIES)
    lines = csvs(page, "accuracy-attr")
    labels = ["m (logit) · clip:demo", "kept · clip:demo", "m (cosine) · clip:demo"]
    assert list(dict.fromkeys(x["row"] for x in lines)) == labels
    marks = re.findall(
        r'fill="([^"]+)"[^>]*><title>a00&lt;, m \((\w+)\) · clip:demo: ([\d.]+) %', page
    )
    assert [space for _, space, _ in marks] == ["logit", "cosine"]
    assert len({colour for colour, _, _ in marks}) == 2
    for (_, _, shown), group in zip(marks, (row.group, other), strict=True):
        tables = [t for t in group.tables if isinstance(t, CompositionScores)]
        share = np.mean([accuracy(t, "attr", best_hm_bias(t)).share()[0, 0] for t in tables])
        assert float(shown) == pytest.approx(100 * share, abs=0.051)


def test_curves_of_one_label_in_two_score_spaces_are_both_drawn() -> None:
    tables = [t for t in plotted().rows[0].group.tables if isinstance(t, CompositionScores)]
    facts = {"method": "m", "backbone": "clip:demo", "dataset": "toy", "seed": 0}
    both = {"0": tables[0], "1": replace(tables[1], space="cosine")}
    exact = next(c for c in compare([Run(Path("r"), facts, both)]) if c.curve == "exact")
    lines = csvs(figures_of(exact, SERIES), "curve")
    for space, table in zip(("logit", "cosine"), tables, strict=True):
        mine = [x for x in lines if x["row"] == f"m ({space}) · clip:demo"]
        points = czsl.exact_curve(table)
        assert [float(x["seen"]) for x in mine] == pytest.approx(points.seen, rel=1e-5)


def test_a_table_s_scores_are_gone_through_once_for_its_accuracies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    c = plotted()
    whole = replace(c, rows=c.rows[:1])
    calls: list[str] = []
    for name in ("sides", "thresholds"):
        kept = getattr(CompositionScores, name)

        def counted(self: Any, *args: Any, name: str = name, kept: Any = kept) -> Any:
            calls.append(name)
            return kept(self, *args)

        monkeypatch.setattr(CompositionScores, name, counted)
    assert "mean of 2 seeds" in diagnostics_of(whole, SERIES)
    assert calls == []  # all from the best pairs, which are found in one pass
