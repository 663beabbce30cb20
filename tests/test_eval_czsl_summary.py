"""Summaries of open worlds: bit for bit what the table of all scores gives, at every k, block size and threshold."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import bootstrap, czsl, score_io
from eval.composition import CompositionScores
from eval.czsl_summary import CompositionSummary, summarise, summarise_levels
from eval.errors import ScoreTableError
from eval.feasibility import filtered, grid
from eval.reduction import Layout

quick = settings(derandomize=True, deadline=None, max_examples=80)

FACTS: dict[str, Any] = {"split": "test", "space": "logit"}


worlds = st.fixed_dictionaries(
    {
        "shape": st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 4)),
        "share": st.sampled_from([0.0, 0.5, 0.8, 1.0]),
        "tied": st.tuples(st.booleans(), st.booleans()),
        "dtype": st.sampled_from(["float32", "float64"]),
        "n_levels": st.integers(1, 6),
        "seed": st.integers(0, 10_000),
    }
)


def world(*, shape, share, tied, dtype, n_levels, seed):
    """Dense table, rho and levels: many ties in both, -inf scores and rows, empty sides, one candidate."""
    rng = np.random.default_rng(seed)
    q, o, c = shape[0], shape[2], shape[1] * shape[2]
    values = [-np.inf, -1.0, -0.5, 0.0, 0.25, 1.0] if tied[0] else rng.normal(size=40)
    scores = rng.choice(values, size=(q, c)).astype(dtype)
    scores[rng.random(q) < 0.1] = -np.inf
    seen = rng.random(c) < share
    rho = rng.choice([-0.5, 0.0, 0.25, 0.5, 1.0], size=c) if tied[1] else rng.random(c)
    pairs = [(f"a{i // o}", f"o{i % o}") for i in range(c)]
    table = CompositionScores(scores, rng.integers(c, size=q), pairs, seen, world="open", **FACTS)
    levels = [] if seen.all() else grid(rho, seen, n_levels)
    return table, rho, levels


def summary_of(table, *, block=3, keep=1, rho=None, levels=()) -> CompositionSummary:
    rows = (table.scores[i : i + block] for i in range(0, len(table.scores), block))
    facts: dict[str, Any] = {
        "split": table.split,
        "space": table.space,
        "ids": table.ids,
        "meta": table.meta,
    }
    layout = Layout.of(table.seen, rho, levels)
    return summarise(rows, layout, table.target, table.pairs, keep=keep, **facts)


def everything(table, k) -> dict:
    return {
        "metrics": czsl.evaluate(table, k=k),
        "chance": czsl.chance(table, k=k),
        "counts": table.counts,
        "t": table.thresholds(k).t.tolist(),
        "predicted": table.predicted().tolist(),
        "competing": table.competing().tolist(),
    }


@quick
@given(worlds, st.integers(1, 4), st.integers(1, 4), st.integers(1, 10))
def test_a_summary_equals_the_table_of_all_scores(drawn, k, more, block):
    table, _, _ = world(**drawn)
    c = table.shape[1]
    summary = summary_of(table, block=block, keep=min(k + more - 1, c))
    assert everything(summary, min(k, c)) == everything(table, min(k, c))


@quick
@given(worlds, st.integers(1, 3), st.integers(1, 10))
def test_every_level_equals_a_table_pruned_and_measured_again(drawn, k, block):
    table, rho, levels = world(**drawn)
    k = min(k, table.shape[1])
    summary = summary_of(table, block=block, keep=k, rho=rho, levels=levels)
    assert everything(summary, k) == everything(table, k)
    for t in levels:
        assert everything(summary.pruned(t, rho), k) == everything(table.pruned(t, rho), k)


@quick
@given(worlds, st.integers(1, 3))
def test_kept_lists_are_the_best_in_order_with_ties_to_the_lowest_column(drawn, keep):
    table, rho, levels = world(**drawn)
    keep = min(keep, table.shape[1])
    summary = summary_of(table, keep=keep, rho=rho, levels=levels)
    for i, row in enumerate(table.scores):
        for level in range(len(levels) + 1):
            alive = [
                c for c in np.flatnonzero(~table.seen)
                if row[c] > -np.inf and (level == 0 or rho[c] >= levels[level - 1])
            ]  # fmt: skip
            best = sorted(alive, key=lambda c: (-row[c], c))[:keep]
            padding = [-1] * (keep - len(best))
            assert summary.unseen_columns[i, level].tolist() == [*best, *padding]
            assert summary.best_unseen[i, level, : len(best)].tolist() == row[best].tolist()


@quick
@given(worlds)
def test_a_summary_does_not_touch_the_rows_it_is_made_from(drawn):
    table, rho, levels = world(**drawn)
    layout = Layout.of(table.seen, rho, levels)
    arranged = np.ascontiguousarray(table.scores[:, layout.order])
    before = arranged.copy()
    given: dict[str, Any] = {"keep": min(3, table.shape[1]), "arranged": True} | FACTS
    made = summarise([arranged], layout, table.target, table.pairs, **given)
    assert np.array_equal(arranged, before)
    assert everything(made, 1) == everything(table, 1)


def large(seed=0, q=60, strength=1.0):
    rng = np.random.default_rng(seed)
    target = np.arange(q) * 5 % 12
    scores = (rng.normal(size=(q, 12)) + strength * np.eye(12)[target]).astype(np.float32)
    pairs = [(f"a{i // 4}", f"o{i % 4}") for i in range(12)]
    seen = np.arange(12) % 3 > 0
    return CompositionScores(scores, target, pairs, seen, world="open", **FACTS)


@pytest.mark.parametrize("k", [1, 3])
def test_intervals_and_paired_differences_are_those_of_the_table(k):
    ours, theirs = large(0, strength=2.0), large(1)
    brief = [summary_of(t, keep=3) for t in (ours, theirs)]
    options: dict[str, Any] = {"k": k, "resamples": 50}
    assert bootstrap.intervals([brief[0]], **options) == bootstrap.intervals([ours], **options)
    expected = bootstrap.difference([ours], [theirs], **options)
    assert bootstrap.difference([brief[0]], [brief[1]], **options) == expected
    assert bootstrap.difference([brief[0]], [theirs], **options) == expected


def test_many_random_images_at_fifty_levels_agree():
    rng = np.random.default_rng(2)
    q, c = 80, 600
    pairs = [(i // 30, i % 30) for i in range(c)]
    seen, rho = rng.random(c) < 0.1, rng.normal(size=c)
    target = rng.integers(c, size=q)
    scores = rng.normal(size=(q, c)).astype(np.float32)
    scores[np.arange(q), target] += 3
    table = CompositionScores(scores, target, pairs, seen, world="open", **FACTS)
    levels = grid(rho, seen)
    summary = summary_of(table, block=17, keep=5, rho=rho, levels=levels)
    for t in levels[::7]:
        for k in (1, 5):
            assert everything(summary.at(t), k) == everything(table.pruned(t, rho), k)


# ── on disk ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_summary_on_disk_comes_back_as_it_was(tmp_path):
    for name, rho, levels in (("plain", None, ()), ("levels", np.linspace(-1, 1, 12), (-0.5, 0.1))):
        made = summary_of(large(), keep=3, rho=rho, levels=levels)
        made = made.at(levels[-1]) if levels else made
        path = score_io.save(made, tmp_path / f"{name}.zarr", run={"seed": 3})
        found = score_io.load(path)
        assert isinstance(found, CompositionSummary)
        assert score_io.kind(found) == "czsl"
        for field in dataclasses.fields(made):
            if field.name != "meta":
                mine, theirs = (np.asarray(getattr(t, field.name)) for t in (made, found))
                assert mine.dtype == theirs.dtype, field.name
                assert np.array_equal(mine, theirs), field.name
        assert found.meta["run"] == {"seed": 3}
        assert everything(found, 3) == everything(made, 3)


@pytest.mark.parametrize(
    "array", ["own", "best_seen", "seen_columns", "best_unseen", "unseen_columns", "pairs", "rho"]
)
def test_a_missing_chunk_of_a_summary_is_an_error(tmp_path, array):
    made = summary_of(large(), rho=np.linspace(0, 1, 12), levels=(0.5,))
    path = score_io.save(made, tmp_path / "s.zarr")
    chunk = next(p for p in (path / array / "c").rglob("*") if p.is_file())
    whole = chunk.read_bytes()
    chunk.unlink()
    with pytest.raises(ScoreTableError, match=r"score the run again|0 to 11"):
        score_io.load(path)
    chunk.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ScoreTableError, match=r"damaged or incomplete.*score the run again"):
        score_io.load(path)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_needs_every_score_says_so():
    table, rho = large(), np.linspace(0, 1, 12)
    summary = summary_of(table, keep=2, rho=rho, levels=[0.5])
    with pytest.raises(ScoreTableError, match=r"legacy curve looks at every score.*--dense"):
        czsl.evaluate(summary, curve="legacy")
    for mode in ("csp_multiply", "compcos_minus_one"):
        with pytest.raises(ScoreTableError, match=rf"{mode} changes scores.*--dense"):
            summary.pruned(0.5, rho, mode)
    with pytest.raises(ScoreTableError, match=r"k = 3 .*keeps the best 2 .*--keep 3"):
        czsl.evaluate(summary, k=3)
    with pytest.raises(ScoreTableError, match="k = 13 was asked for, but there are 12"):
        czsl.evaluate(summary, k=13)
    with pytest.raises(
        ScoreTableError, match=r"0\.4 is not one of the 1 levels .*0\.5000 to 0\.5000"
    ):
        summary.at(0.4)
    with pytest.raises(ScoreTableError, match=r"is not one of the 0 levels kept .none"):
        summary_of(table).at(0.4)
    with pytest.raises(ScoreTableError, match="not the one this table was reduced with"):
        summary.pruned(0.5, rho + 1)
    with pytest.raises(ScoreTableError, match="keeps no feasibility"):
        table.pruned(0.5)


@pytest.mark.parametrize("column", [-2, 12])
@pytest.mark.parametrize("name", ["seen_columns", "unseen_columns"])
def test_a_summary_that_names_no_column_is_refused(name, column):
    """Of 12 columns: -1 is padding, 11 the last."""
    summary = summary_of(large())
    columns = getattr(summary, name).copy()
    columns[..., 0] = column
    with pytest.raises(ScoreTableError, match=f"{name} names a column beyond 0 to 11"):
        dataclasses.replace(summary, **{name: columns})


def test_a_score_that_is_no_number_is_named_by_image_and_pair():
    for bad in (np.nan, np.inf):
        table = large()
        rows = [table.scores[:40].copy(), table.scores[40:].copy()]
        rows[1][2, 5] = bad
        with pytest.raises(
            ScoreTableError, match=rf"query 42 .*column 5 \(pair \('a1', 'o1'\)\) is {bad}"
        ):
            summarise(rows, Layout.of(table.seen), table.target, table.pairs, **FACTS)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([np.zeros((59, 12))], "60 targets, but 59 rows"),
        ([np.zeros((61, 12))], "60 targets, but more rows"),
        ([np.zeros((60, 11))], r"must be \(images, 12\), but is \(60, 11\)"),
        ([np.zeros((60, 12), dtype=np.float16)], "float16.*artificial ties"),
    ],
)
def test_rows_that_do_not_fit_the_labels_are_refused(rows, message):
    table = large()
    with pytest.raises(ScoreTableError, match=message):
        summarise(rows, Layout.of(table.seen), table.target, table.pairs, **FACTS)


def test_levels_need_feasibility_in_ascending_order():
    seen = np.array([True, False])
    for rho, levels in ((None, [0.1]), (np.array([0.0, 1]), [0.3, 0.1])):
        with pytest.raises(ScoreTableError, match="need feasibility values and ascending order"):
            Layout.of(seen, rho, levels)


def test_filtering_a_table_is_filtering_its_scores():
    table, rho = large(), np.linspace(0, 1, 12)
    for mode in ("neg_inf", "csp_multiply", "compcos_minus_one"):
        found = table.pruned(0.5, rho, mode)
        assert np.array_equal(found.scores, filtered(table.scores, rho, table.seen, 0.5, mode))


# ── scores that depend on who else is a candidate ────────────────────────────────────────────────────────────────────


def relative(
    drawn, block, keep
) -> tuple[CompositionSummary, list[tuple[float, CompositionScores]]]:
    """A summary, and for every threshold the table of all scores: numbers of its own, as if scored anew."""
    table, rho, levels = world(**drawn)
    layout, rng = Layout.of(table.seen, rho, levels), np.random.default_rng(drawn["seed"] + 1)
    scores = {
        n: rng.permuted(table.scores, axis=0)[:, rng.permutation(table.shape[1])]
        for n in layout.sizes()
    }

    def rows():
        for i in range(0, len(table.scores), block):
            parts = [scores[n][i : i + block] for n in layout.sizes()]
            buffer = np.empty_like(parts[0])  # what comes next overwrites what was given
            yield (
                len(parts[0]),
                (
                    np.copyto(buffer[:, :n], part[:, layout.order[:n]]) or buffer[:, :n]
                    for n, part in zip(layout.sizes(), parts, strict=True)
                ),
            )

    made = summarise_levels(
        rows(), layout, table.target, table.pairs, split="test", space="probability", keep=keep
    )
    tables = []
    for level, t in enumerate([-np.inf, *levels]):
        n = layout.kept(level)
        whole = scores[n] if n else table.scores
        kept = dataclasses.replace(table, scores=filtered(whole, rho, table.seen, t))
        assert int((table.seen | (rho >= t)).sum()) == n
        tables.append((t, kept))
    return made, tables


@quick
@given(worlds, st.integers(1, 4), st.integers(1, 4), st.integers(1, 10))
def test_each_level_of_relative_scores_equals_a_table_of_its_own_scores(drawn, k, more, block):
    c = drawn["shape"][1] * drawn["shape"][2]
    made, tables = relative(drawn, block, min(k + more - 1, c))
    assert made.relative
    for t, table in tables:
        got, want = everything(made.at(t), min(k, c)), everything(table, min(k, c))
        # Which pairs compete is known of the loosest level alone: that of the others follows from feasibility.
        assert {**got, "competing": 0, "chance": 0} == {**want, "competing": 0, "chance": 0}


def test_relative_scores_come_back_from_a_file_and_are_refused_by_name(tmp_path):
    drawn: dict[str, Any] = {
        "shape": (5, 2, 3), "share": 0.5, "tied": (False, False), "dtype": "float32",
        "n_levels": 4, "seed": 3,
    }  # fmt: skip
    made, tables = relative(drawn, 2, 3)
    loaded = score_io.load(score_io.save(made, tmp_path / "t.zarr"))
    assert isinstance(loaded, CompositionSummary)
    for t, table in tables:
        assert czsl.evaluate(loaded.at(t)) == czsl.evaluate(table)
    with pytest.raises(ScoreTableError, match="another shape of own"):
        dataclasses.replace(made, own=made.own[:, :2])
    table, rho, levels = world(**drawn)
    layout = Layout.of(table.seen, rho, levels)
    n = layout.sizes()[-1]
    bad = [np.zeros((5, m), np.float32) for m in layout.sizes()]
    bad[-1][2, n - 1] = np.nan
    name = table.pairs[layout.order[n - 1]]
    labels: dict[str, Any] = {"split": "test", "space": "probability", "keep": 1}
    with pytest.raises(ScoreTableError, match=rf"query 2 .*{name[0]}', '{name[1]}.* is nan"):
        summarise_levels([(5, bad)], layout, table.target, table.pairs, **labels)
    with pytest.raises(ScoreTableError, match=rf"\(images, {layout.sizes()[0]}\), but is"):
        summarise_levels([(5, bad[::-1])], layout, table.target, table.pairs, **labels)


def test_a_table_of_all_scores_that_are_relative_is_not_pruned():
    table = CompositionScores(
        np.eye(2), np.array([0, 1]), [("a", "b"), ("c", "d")], np.array([True, False]),
        "test", "probability", world="open", meta={"relative": True},
    )  # fmt: skip
    with pytest.raises(ScoreTableError, match="without --dense"):
        table.pruned(0.5, np.array([0.0, 1.0]))
    assert table.pruned(0.5, np.array([0.0, 0.0]), "csp_multiply").scores[1, 1] == 0
