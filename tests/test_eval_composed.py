"""Composed retrieval against the slow loop written from its definition, from scores and from lists."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import cli, comparison, composed, score_io
from eval.composed import evaluate
from eval.composed_lists import evaluate_lists, ranked, ranked_subset
from eval.composed_queries import CATEGORIES, ComposedQueries
from eval.composed_table import ComposedScores
from eval.errors import ScoreTableError
from eval.runs import Run, questions

quick = settings(derandomize=True, deadline=None, max_examples=150)
KS = {
    "cirr": (1, 5, 10, 50),
    "fashioniq": (10, 50),
    "circo": (5, 10, 25, 50),
    "genecis": (1, 2, 3),
    "own": (1, 5, 10),
}


drawn = st.tuples(
    st.sampled_from(tuple(KS)), st.integers(0, 2**32), st.integers(5, 64), st.integers(1, 6)
)


def make(drawn, values=(-1.0, 0.0, 0.5, 2.0)) -> ComposedScores:
    """Few distinct values, so many ties; shared columns with holes, or own candidates of unequal number."""
    protocol, seed, n, q = drawn
    rng = np.random.default_rng(seed)
    names = [f"img{i}" for i in range(n)]
    kinds = CATEGORIES.get(protocol, ("red", "blue", "swap_att"))
    own = protocol in ("genecis", "own") and rng.random() < 0.5
    queries: dict[str, list] = {
        n: [] for n in ("reference", "targets", "categories", "subset", "gallery")
    }
    columns, scores = [], []
    with_subset = protocol == "cirr" or rng.random() < 0.5
    for _ in range(q):
        order = rng.permutation(names).tolist()
        reference, others = order[0], order[1:]
        n_right = int(rng.integers(1, 4)) if protocol in ("circo", "own") else 1
        right = others[:n_right]
        few = rng.permutation([*others[: n_right + 2], reference]).tolist() if with_subset else []
        alone = protocol in ("genecis", "own") and with_subset and rng.random() < 0.5
        must = {*right, *few, *([reference] if protocol in ("fashioniq", "circo") else [])}
        columns.append(rng.permutation(names).tolist() if own else names)
        row = rng.choice(values, size=len(names))
        for j, name in enumerate(columns[-1]):
            if name not in must and rng.random() < 0.3:
                row[j] = -np.inf
                if own and rng.random() < 0.5:
                    columns[-1][j] = ""
                    row[j] = 7.0  # padding may hold anything
        scores.append(row)
        queries["reference"].append(reference)
        queries["targets"].append(right)
        queries["subset"].append(few)
        queries["gallery"].append("" if alone else "all")
        one = protocol in ("fashioniq", "genecis")
        count = 1 if one else int(rng.integers(0, len(kinds) + 1))
        queries["categories"].append(rng.permutation(kinds)[:count].tolist())
    asked = ComposedQueries([f"q{i}" for i in range(q)], **queries, protocol=protocol, split="val")
    return ComposedScores(np.array(scores), columns if own else names, asked, "cosine")


def competing(table, i) -> list[tuple[float, int, str]]:
    """(score, column, name) of what query i ranks, from the words of the protocol."""
    asked = table.queries
    columns = list(table.candidates if np.ndim(table.candidates) == 1 else table.candidates[i])
    found = []
    for j, name in enumerate(columns):
        if name == "" or table.scores[i, j] == -np.inf:
            continue
        if name == asked.reference[i] and (asked.protocol == "cirr" or asked.gallery[i] == ""):
            continue
        if asked.gallery[i] == "" and name not in asked.subset[i]:
            continue
        found.append((float(table.scores[i, j]), j, str(name)))
    return found


def pessimistic(rows, right) -> list[str]:
    """Names, best first: of equal scores the wrong ones go first, then right ones by column."""
    return [name for _, _, name in sorted(rows, key=lambda r: (-r[0], r[2] in right, r[1]))]


def slow(table) -> dict[str, float]:
    """Every metric by walking down each list."""
    asked = table.queries
    p = asked.protocol
    per_query: dict[str, list] = {}  # metric → (value, categories)
    most = max(len(competing(table, i)) for i in range(len(asked.ids)))
    most_subset = max(len(set(s) - {r}) for s, r in zip(asked.subset, asked.reference, strict=True))
    for i in range(len(asked.ids)):
        targets = list(asked.targets[i])
        right = targets if p in ("circo", "own") else targets[:1]
        rows = competing(table, i)
        order = pessimistic(rows, right)
        for k in KS[p]:
            if k > most:
                continue
            wanted = right if p == "own" else targets[:1]
            hit = any(name in wanted for name in order[:k])
            per_query.setdefault(f"recall@{k}", []).append((i, float(hit)))
        for k in {"circo": (5, 10, 25, 50), "own": (1, 5, 10)}.get(p, ()):
            if k > most:
                continue
            total, seen = 0.0, 0
            for rank, name in enumerate(order[:k], 1):
                if name in right:
                    seen += 1
                    total += seen / rank
            per_query.setdefault(f"map@{k}", []).append((i, total / min(len(right), k)))
        few = set(asked.subset[i]) - {asked.reference[i]}
        if p in ("cirr", "own") and few:
            ranking = pessimistic([r for r in rows if r[2] in few], right)
            for k in (1, 2, 3):
                if k <= most_subset:
                    hit = any(name in right for name in ranking[:k])
                    per_query.setdefault(f"recall_subset@{k}", []).append((i, float(hit)))
    found: dict[str, float] = {}
    sizes = [len(competing(table, i)) for i in range(len(asked.ids))]
    for metric, values in per_query.items():
        name, _, k = metric.partition("@")
        if p not in ("fashioniq", "genecis"):
            found[metric] = float(np.mean([v for _, v in values]))
        kinds = sorted({kind for row in asked.categories for kind in row})
        if p == "circo":
            kinds = kinds if metric == "map@10" else []
        parts = []
        for kind in [] if p == "cirr" else kinds:
            mine = [v for i, v in values if kind in asked.categories[i]]
            size = max(n for i, n in enumerate(sizes) if kind in asked.categories[i])
            if mine and size >= int(k):
                parts.append(float(np.mean(mine)))
                label = f"semantic_map@10/{kind}" if p == "circo" else f"{metric}/{kind}"
                found[label] = parts[-1]
        n = {"fashioniq": 3, "genecis": 4, "own": len(kinds)}.get(p, 0)
        if n and len(parts) == n:
            found[f"{metric}/macro_{n}"] = float(np.mean(parts))
    ends = {
        "cirr": ("recall@5", "recall_subset@1"),
        "fashioniq": ("recall@10/macro_3", "recall@50/macro_3"),
    }
    if p in ends and all(name in found for name in ends[p]):
        found["avg"] = (found[ends[p][0]] + found[ends[p][1]]) / 2
    return found


@quick
@given(drawn)
def test_every_protocol_equals_the_slow_loop(drawn):
    table = make(drawn)
    expected = slow(table)
    if not expected:
        with pytest.raises(ScoreTableError, match=r"measures at K = .* no query has more than"):
            evaluate(table)
        return
    assert evaluate(table) == pytest.approx(expected, abs=1e-12)


@quick
@given(drawn, st.integers(0, 99))
def test_order_of_queries_and_an_increasing_map_per_query_change_nothing(drawn, seed):
    table = make(drawn)
    if not slow(table):
        return
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(table.ids))
    mapped = np.exp(table.scores[order]) * rng.integers(1, 9, size=(len(order), 1))
    mapped[np.isneginf(table.scores[order])] = -np.inf
    asked = table.queries
    rows = {
        name: [getattr(asked, name)[i] for i in order]
        for name in ("ids", "reference", "targets", "categories", "subset", "gallery")
    }
    names = np.asarray(table.candidates)
    columns = names[order] if table.columns is None else names
    other = ComposedScores(mapped, columns, replace(asked, **rows), "logit")
    assert evaluate(other) == pytest.approx(evaluate(table))


@quick
@given(drawn)
def test_a_constant_scorer_finds_nothing_where_k_or_more_are_wrong(drawn):
    table = make(drawn, values=(1.0,))
    if not slow(table):
        return
    parts = composed.outcomes(table)
    for i in range(len(table.ids)):
        rows = competing(table, i)
        wrong = len(rows) - len({r[2] for r in rows} & set(table.queries.right(i)))
        for name, values in parts.items():
            if name.startswith(("recall@", "map@", "semantic")) and wrong >= int(
                name.split("@")[1].split("/")[0]
            ):
                assert values[i] == 0 or np.isnan(values[i]), name


@quick
@given(drawn, st.booleans())
def test_lists_of_scores_without_ties_measure_as_the_scores_do(drawn, cut):
    """Lists hold everything, or only the 50 best: what is measured at K = 50 and below needs no more."""
    tied = make(drawn)
    apart = np.random.default_rng(0).permutation(tied.scores.size).reshape(tied.scores.shape) * 1.0
    apart[np.isneginf(tied.scores)] = -np.inf
    table = ComposedScores(apart, tied.candidates, tied.queries, "logit")
    if not slow(table) or table.queries.protocol == "fashioniq":
        return  # fashioniq has no gallery of a query's own
    named = [
        gallery and query for gallery, query in zip(table.queries.gallery, table.ids, strict=True)
    ]
    asked = replace(table.queries, gallery=named)  # every row has holes of its own
    galleries = {
        query: {*(name for _, _, name in competing(table, i)), asked.reference[i]}
        if asked.protocol == "cirr"
        else {name for _, _, name in competing(table, i)}
        for i, query in enumerate(table.ids)
    }
    k = 50 if cut else 99
    found = evaluate_lists(asked, ranked(table, k), galleries, ranked_subset(table, k))
    assert found == pytest.approx(evaluate(table))


@quick
@given(drawn)
def test_lists_go_by_score_and_then_by_column(drawn):
    table = make(drawn)
    for i, name in enumerate(table.ids):
        rows = sorted(competing(table, i), key=lambda r: (-r[0], r[1]))
        for k in (1, 3, 99):
            assert list(ranked(table, k)[name]) == [r[2] for r in rows[:k]]
        few = set(table.queries.subset[i]) - {table.queries.reference[i]}
        inside = [r[2] for r in rows if r[2] in few]
        assert list(ranked_subset(table, 3)[name]) == inside[:3]


# ── by hand ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def facts(protocol="cirr", **changes) -> dict[str, Any]:
    """Two queries of five images; `changes` replace fields."""
    return {
        "ids": ("1", "2"),
        "reference": ("a", "b"),
        "targets": (("c",), ("d",)),
        "protocol": protocol,
        "split": "val",
        "gallery": "val",
        **changes,
    }


IMAGES = tuple("abcde")


def table(scores, protocol="cirr", candidates=IMAGES, **changes) -> ComposedScores:
    return ComposedScores(
        np.array(scores, float), candidates, ComposedQueries(**facts(protocol, **changes)), "cosine"
    )


def test_cirr_ranks_without_the_reference_and_averages_recall_with_the_subset():
    t = table(
        [[9, 5, 4, 3, 2], [1, 9, 3, 4, 5]],
        subset=(("a", "c", "d", "e"), ("b", "d", "e", "a")),
    )
    found = evaluate(t, ks=(1, 2, 4))
    assert (found["recall@1"], found["recall@2"], found["recall@4"]) == (0, 1, 1)
    assert (found["recall_subset@1"], found["recall_subset@2"]) == (0.5, 1)
    assert "avg" not in found  # four candidates have no recall@5
    with pytest.raises(ScoreTableError, match="K = 5 was asked for, but there are 4"):
        evaluate(t, ks=(5,))
    six = ComposedScores(np.c_[t.scores, [8, 8]], [*IMAGES, "f"], t.queries, "cosine")
    found = evaluate(six)
    assert found["avg"] == (found["recall@5"] + found["recall_subset@1"]) / 2 == 0.75


def test_soft_targets_of_cirr_are_wrong_answers():
    t = table([[0, 5, 4, 3, 2], [0, 0, 0, 1, 0]], targets=(("c", "b"), ("d",)))
    assert evaluate(t, ks=(1, 2)) == {"recall@1": 0.5, "recall@2": 1}


def test_a_soft_target_that_ties_or_is_better_in_the_subset_counts_against():
    few = (("c", "e", "d"), ("d", "a", "e"))
    t = table([[0, 0, 4, 0, 4], [0, 0, 0, 1, 0]], targets=(("c", "e"), ("d",)), subset=few)
    found = evaluate(t, ks=(1, 2))
    assert (found["recall@1"], found["recall@2"]) == (0.5, 1)
    assert (found["recall_subset@1"], found["recall_subset@2"]) == (0.5, 1)


def test_of_tied_right_images_the_lower_column_is_ahead():
    """CIRCO's first target is one of two equal ones; whatever their order in the list of targets."""
    for targets, expected in ((("b", "d"), (1, 1)), (("d", "b"), (0, 1))):
        t = table([[0, 1, 0, 1, 0]] * 2, "circo", reference=("a", "a"), targets=(targets,) * 2)
        found = evaluate(t, ks=(1, 2))
        assert (found["recall@1"], found["recall@2"]) == expected
        assert (found["map@1"], found["map@2"]) == (1, 1)


def test_fashioniq_holds_three_galleries_in_one_table():
    """dress ranks a–d, shirt c–f, toptee e–h; each reference competes and is never the answer."""
    gone = -np.inf
    images = "abcdefgh"
    scores = [
        [9, 5, 1, 1, gone, gone, gone, gone],
        [gone, gone, 2, 9, 1, 1, gone, gone],
        [gone, gone, gone, gone, 9, 1, 2, 3],
    ]
    t = table(
        scores, "fashioniq", tuple(images), ids=("1", "2", "3"), reference=("a", "d", "e"),
        targets=(("b",), ("c",), ("f",)), categories=(("dress",), ("shirt",), ("toptee",)),
        gallery=("val/dress/split", "val/shirt/split", "val/toptee/split"),
    )  # fmt: skip
    found = evaluate(t, ks=(1, 2, 4))
    assert found["recall@2/dress"] == found["recall@2/shirt"] == 1
    assert found["recall@2/toptee"] == found["recall@1/dress"] == 0
    assert found["recall@2/macro_3"] == pytest.approx(2 / 3)
    assert found["recall@4/macro_3"] == 1
    assert "recall@2" not in found  # pooled over categories is nobody's number
    assert t.queries.gallery_names == ("val split",)
    assert (
        comparison.counts(t) == "3 queries of protocol fashioniq, 8 candidates; gallery val split"
    )


def test_fashioniq_weighs_categories_alike_and_averages_both_means():
    """Two dress queries, one right; 60 candidates, so that both K exist."""
    names = [str(i) for i in range(60)]
    scores = np.zeros((4, 60))
    scores[0, 1] = scores[2, 1] = 1
    scores[3, 2:22] = 1  # the toptee target is behind 20
    scores[3, 1] = 0.5
    t = ComposedScores(
        scores, names,
        ComposedQueries(
            tuple("wxyz"), ("0",) * 4, (("1",),) * 4, "fashioniq", "val", "split",
            categories=(("dress",), ("dress",), ("shirt",), ("toptee",)),
        ), "cosine",
    )  # fmt: skip
    found = evaluate(t)
    assert (found["recall@10/dress"], found["recall@10/shirt"], found["recall@10/toptee"]) == (
        0.5,
        1,
        0,
    )
    assert found["recall@10/macro_3"] == 0.5
    assert found["recall@50/macro_3"] == pytest.approx(2.5 / 3)
    assert found["avg"] == pytest.approx((0.5 + 2.5 / 3) / 2)
    assert next(iter(found)) == "avg"


def test_a_mean_over_categories_needs_all_of_them():
    some = table([[0, 0, 1, 0, 0]] * 2, "fashioniq", categories=(("dress",), ("shirt",)))
    assert set(evaluate(some, ks=(2,))) == {"recall@2/dress", "recall@2/shirt"}
    two = table(
        [[0, 0, 1, 0, 0]] * 2, "genecis", categories=(("focus_object",), ("change_object",))
    )
    assert not any("macro" in name for name in evaluate(two))


def test_genecis_ranks_each_row_s_own_candidates_and_a_constant_gets_nothing():
    """Ten and fifteen candidates in one table, the target first, as the files have it."""
    names = [
        [f"{i}.{j}" if j < n else "" for j in range(15)] for i, n in enumerate((10, 15, 15, 10))
    ]
    asked = ComposedQueries(
        tuple("wxyz"), ("r",) * 4, tuple((f"{i}.0",) for i in range(4)), "genecis", "test", "own candidates",
        categories=tuple((kind,) for kind in CATEGORIES["genecis"]),
    )  # fmt: skip
    flat = ComposedScores(np.zeros((4, 15), np.float32), names, asked, "cosine")
    found = evaluate(flat)
    assert len(found) == 15
    assert set(found.values()) == {0.0}
    lines = composed.chance(flat)
    assert lines["recall@1/focus_attribute"] == pytest.approx(0.1)
    assert [lines[f"recall@{k}/change_attribute"] for k in (1, 2, 3)] == pytest.approx(
        [1 / 15, 2 / 15, 0.2]
    )
    best = np.zeros((4, 15))
    best[:, 0] = [1, 1, 1, -1]
    found = evaluate(ComposedScores(best, names, asked, "cosine"))
    assert found["recall@1/macro_4"] == 0.75


def test_the_same_rows_as_subsets_of_one_gallery_give_the_same():
    rng = np.random.default_rng(0)
    names = [str(i) for i in range(30)]
    rows = [rng.permutation(30)[:n] for n in (10, 15)]
    scores = rng.integers(0, 4, size=(2, 30)) * 1.0
    facts = {
        "ids": "xy", "reference": ("r", "s"), "targets": [[str(r[0])] for r in rows], "protocol": "genecis",
        "split": "test", "categories": (("focus_object",), ("change_object",)),
    }  # fmt: skip
    wide = ComposedScores(
        scores,
        names,
        ComposedQueries(**facts, gallery="", subset=[[str(j) for j in r] for r in rows]),
        "cosine",
    )
    own = np.array([[str(j) for j in sorted(r)] + [""] * (15 - len(r)) for r in rows])
    values = np.array(
        [[scores[i, int(j)] if j else -np.inf for j in row] for i, row in enumerate(own)]
    )
    narrow = ComposedScores(values, own, ComposedQueries(**facts, gallery="own"), "cosine")
    assert evaluate(wide) == evaluate(narrow)
    assert composed.chance(wide) == composed.chance(narrow)


def test_circo_divides_by_the_smaller_of_targets_and_k_and_recalls_the_first_target_only():
    names = [str(i) for i in range(60)]
    scores = -np.arange(60.0)[None].repeat(2, 0)
    asked = ComposedQueries(
        ("0", "1"), ("59", "58"), (("6", "0", "2"), ("20",)), "circo", "val", "unlabeled2017",
        categories=(("negation", "addition"), ("addition",)),
    )  # fmt: skip
    found = evaluate(ComposedScores(scores, names, asked, "cosine"))
    first = (1 + 2 / 3 + 3 / 7) / 3
    assert found["map@5"] == pytest.approx((1 + 2 / 3) / 3 / 2)
    assert found["map@10"] == pytest.approx(first / 2)
    assert found["map@25"] == pytest.approx((first + 1 / 21) / 2)
    assert [found[f"recall@{k}"] for k in (5, 10, 25)] == [0, 0.5, 1]
    assert found["semantic_map@10/negation"] == pytest.approx(first)
    assert found["semantic_map@10/addition"] == pytest.approx(first / 2)
    assert not any("viewpoint" in name or "macro" in name for name in found)


def test_map_may_fall_as_k_grows():
    names = [str(i) for i in range(12)]
    asked = ComposedQueries(("0",), ("11",), (tuple("0123456789"),), "circo", "val", "u")
    scores = np.array([[9.0, 8, 7, 6, 5, -5, -5, -5, -5, -5, 0, 0]])
    found = evaluate(ComposedScores(scores, names, asked, "cosine"))
    assert found["map@5"] == 1
    assert found["map@10"] == pytest.approx((5 + 6 / 8 + 7 / 9 + 8 / 10) / 10)


def test_own_data_count_every_target_and_are_given_by_category():
    t = table(
        [[0, 1, 2, 3, 4], [0, 9, 0, 1, 0]],
        "own",
        targets=(("c", "e"), ("d",)),
        categories=(("x",), ("y", "x")),
    )
    found = evaluate(t, ks=(1, 5))
    assert (found["recall@1"], found["recall@5"]) == (0.5, 1)
    assert found["map@5"] == pytest.approx(((1 + 2 / 3) / 2 + 1 / 2) / 2)
    assert (found["recall@1/x"], found["recall@1/y"], found["recall@1/macro_2"]) == (0.5, 0, 0.25)


def test_one_candidate_is_always_found_and_a_query_s_subset_may_stand_alone():
    t = table([[0, 0, 1, 0, 0]] * 2, "own", gallery="", subset=(("c",), ("b", "d")))
    assert evaluate(t, ks=(1,)) == {"recall@1": 1, "map@1": 1, "recall_subset@1": 1}
    assert composed.chance(t, ks=(1,)) == evaluate(t, ks=(1,))


@pytest.mark.parametrize("protocol", KS)
def test_chance_is_what_random_scores_get(protocol):
    """4,000 queries: the standard error of a half is 0.008; the tolerance is four of them, for categories more."""
    rng = np.random.default_rng(1)
    names = [str(i) for i in range(55)]
    kinds = CATEGORIES.get(protocol, ("x", "y"))
    q = 4000
    order = rng.permuted(np.tile(np.arange(55), (q, 1)), axis=1).astype(str)
    n = rng.integers(1, 5, size=q)
    asked = ComposedQueries(
        [str(i) for i in range(q)], order[:, 0].tolist(), [order[i, 1 : 1 + n[i]].tolist() for i in range(q)],
        protocol, "val", "all", [(kinds[i % len(kinds)],) for i in range(q)],
        [order[i, :6].tolist() for i in range(q)] if protocol in ("cirr", "own") else (),
    )  # fmt: skip
    t = ComposedScores(rng.normal(size=(q, 55)), names, asked, "cosine")
    found, lines = evaluate(t), composed.chance(t)
    assert set(found) == set(lines)
    for name, value in lines.items():
        assert found[name] == pytest.approx(value, abs=0.06 if "/" in name else 0.032), name


def test_chance_equals_the_documented_lines():
    """CIRR val: 2,296 others, five in the subset; FashionIQ's galleries; CIRCO below 0.01 %."""
    hits = composed._expected(
        composed.chance_of_hit, 10, np.ones(3, int), np.array([3817, 6346, 5373])
    )
    assert [f"{100 * h:.2f}" for h in hits] == ["0.26", "0.16", "0.19"]
    rng = np.random.default_rng(0)
    names = [str(i) for i in range(2297)]
    asked = ComposedQueries(
        ("q",), ("0",), (("1",),), "cirr", "val", "val", subset=(("0", "1", "2", "3", "4", "5"),)
    )
    lines = composed.chance(ComposedScores(rng.normal(size=(1, 2297)), names, asked, "cosine"))
    for k in (1, 5, 10, 50):
        assert lines[f"recall@{k}"] == pytest.approx(k / 2296)
    assert [lines[f"recall_subset@{k}"] for k in (1, 2, 3)] == pytest.approx([0.2, 0.4, 0.6])
    maps = composed._expected(composed.chance_precision, 50, np.array([4]), np.array([123403])) / 4
    assert maps[0] < 1e-4


def test_a_gallery_smaller_than_every_k_of_the_protocol_is_refused():
    asked = ComposedQueries(["1"], ["a"], (("c",),), "circo", "val", "unlabeled2017")
    table = ComposedScores(np.eye(1, 4), tuple("abcd"), asked, "cosine")
    with pytest.raises(ScoreTableError, match=r"circo measures at K = 5, 10, 25, 50.* more than 4"):
        composed.evaluate(table)
    assert composed.evaluate(table, ks=[4])["recall@4"] == 1


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "cir"}, "'cir' is unknown.*cirr, fashioniq"),
        ({"ids": ("1", "1")}, "cannot name 2 rows"),
        ({"ids": ()}, "no query"),
        ({"reference": ("a",)}, "reference for each of them, but there are 1"),
        ({"targets": (("a",), ("d",))}, "reference 'a' of query '1' is also its target"),
        ({"targets": (("c", "c"), ("d",))}, "targets of query '1' hold.*twice"),
        ({"targets": (("c",), ())}, "1 of 2 queries have no target, the first is '2'"),
        ({"subset": (("a", "c"), ("b", "c"))}, "target 'd' of query '2' is not in its subset"),
        ({"subset": (("c", "c"), ("d",))}, "subset of query '1' hold"),
        ({"targets": ("c", "d")}, "targets must hold a list of names.*text 'c'"),
        ({"subset": (("c",), ())}, "query '2' has no subset, but others have"),
        ({"gallery": ""}, "nothing is ranked"),
        ({"gallery": "", "subset": (("c",), ("d",))}, "cirr ranks one"),
        ({"split": ""}, "split"),
        ({"protocol": "circo", "categories": (("colour",), ())}, "query '1'.*'colour'.*viewpoint"),
        ({"protocol": "fashioniq"}, r"query '1' are \(\), but fashioniq knows exactly one of dress"),
        ({"protocol": "fashioniq", "categories": (("dress",), ("shoes",))}, "query '2'.*'shoes'"),
        ({"protocol": "genecis", "categories": (("focus_object", "change_object"), ())}, "exactly one"),
        ({"protocol": "own", "categories": (("macro_3",), ())}, "'macro_3'.*rename"),
        (
            {
                "protocol": "fashioniq",
                "categories": (("dress",), ("shirt",)),
                "gallery": ("dress-split", "shirt-union"),
            },
            r"split, union.*not to be averaged",
        ),
    ],
)  # fmt: skip
def test_queries_that_cannot_give_an_honest_number_are_refused(changes, message):
    ComposedQueries(**facts())
    with pytest.raises(ScoreTableError, match=message):
        ComposedQueries(**(facts() | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": np.zeros((2, 5), np.float16)}, "float16: half precision"),
        ({"scores": np.zeros((3, 5))}, r"2 queries.*\(3, 5\)"),
        ({"scores": np.zeros((2, 0)), "candidates": ()}, r"\(2, 0\)"),
        ({"candidates": "abcd"}, r"must be \(5,\) or \(2, 5\), but they are \(4,\)"),
        ({"candidates": tuple("abcdd")}, "'d' twice"),
        ({"candidates": [list("abcde"), list("abddc")]}, "candidates of query '2' hold 'd' twice"),
        ({"candidates": ("a", "b", "c", "d", "")}, "empty name"),
        (
            {"candidates": tuple("abcef")},
            "'d', in the target of query '2', is none of its candidates",
        ),
        ({"space": "distance"}, "'distance' is unknown"),
    ],
)
def test_tables_that_cannot_give_an_honest_number_are_refused(changes, message):
    good = {"scores": np.zeros((2, 5)), "candidates": tuple("abcde"), "space": "cosine"}
    asked = ComposedQueries(**facts())
    ComposedScores(**good, queries=asked)
    changed = good | changes
    if isinstance(changed["candidates"], str):
        changed["candidates"] = tuple(changed["candidates"])
    with pytest.raises(ScoreTableError, match=message):
        ComposedScores(**changed, queries=asked)


@pytest.mark.parametrize(
    ("cell", "value", "message"),
    [
        ((1, 4), np.nan, r"query '2' with 'e' \(column 4\) is nan"),
        ((0, 1), np.inf, r"query '1' with 'b' \(column 1\) is inf"),
        ((1, 3), -np.inf, "'d', in the target of query '2', has score -inf.*gallery 'val'"),
        ((0, 3), -np.inf, "'d', in the subset of query '1', has score -inf"),
    ],
)
def test_rows_that_cannot_be_ranked_are_refused(cell, value, message):
    scores = np.zeros((2, 5))
    scores[cell] = value
    t = table(scores, subset=(("c", "d"), ("d", "e")))
    with pytest.raises(ScoreTableError, match=message):
        evaluate(t, ks=(1,))
    with pytest.raises(ScoreTableError, match=message):
        ranked(t, 1)


@pytest.mark.parametrize("protocol", ["fashioniq", "circo"])
def test_a_reference_that_the_protocol_keeps_may_not_be_taken_out(protocol):
    scores = np.zeros((2, 5))
    scores[0, 0] = -np.inf
    kinds = {"categories": (("dress",), ("dress",))} if protocol == "fashioniq" else {}
    with pytest.raises(ScoreTableError, match=f"reference of query '1' is -inf, but in {protocol}"):
        evaluate(table(scores, protocol, **kinds), ks=(1,))


def test_queries_without_targets_have_lists_but_no_metric():
    t = table(np.arange(10.0).reshape(2, 5), targets=(), split="test")
    with pytest.raises(ScoreTableError, match="test queries of cirr come without targets"):
        evaluate(t)
    assert ranked(t, 2) == {"1": ("e", "d"), "2": ("e", "d")}


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"1": ["c"]}, r"exactly the 2 queries, but 1 have none \('2'\)"),
        ({"1": [], "2": [], "3": []}, r"1 are no query \('3'\)"),
        ({"1": ["c", "d", "c"], "2": []}, "query '1' holds 'c' twice"),
        ({"1": ["c"], "2": ["z"]}, "query '2' holds 'z', which is none of its 5 candidates"),
        ({"1": ["a"], "2": []}, "query '1' holds its own reference 'a'"),
    ],
)
def test_lists_that_no_server_takes_are_refused(lists, message):
    with pytest.raises(ScoreTableError, match=message):
        evaluate_lists(ComposedQueries(**facts()), lists, IMAGES)


def test_lists_need_the_gallery_that_the_queries_rank_and_a_subset_list_stays_inside():
    asked = ComposedQueries(**facts(subset=(("a", "c"), ("b", "d"))))
    with pytest.raises(ScoreTableError, match="target 'd' of query '2' is none of the 4"):
        evaluate_lists(asked, {"1": [], "2": []}, tuple("abce"))
    with pytest.raises(ScoreTableError, match="ranks the gallery 'val', but there are only 'test'"):
        evaluate_lists(asked, {"1": [], "2": []}, {"test": IMAGES})
    with pytest.raises(ScoreTableError, match="'e', which is none of its 1 candidates"):
        evaluate_lists(asked, {"1": [], "2": []}, IMAGES, {"1": ["e"], "2": []})


def test_a_short_list_misses_what_it_does_not_hold():
    asked = ComposedQueries(**facts(subset=(("a", "c", "e"), ("b", "d", "e"))))
    found = evaluate_lists(asked, {"1": ["c"], "2": []}, [*IMAGES, "f"], {"1": [], "2": ["d"]})
    assert (found["recall@1"], found["recall@5"], found["recall_subset@2"]) == (0.5, 0.5, 0.5)
    assert found["avg"] == 0.5


# ── on disk, in reports ──────────────────────────────────────────────────────────────────────────────────────────────


def stored() -> ComposedScores:
    """7 queries of 9 images, one of them with a name that is no ASCII."""
    rng = np.random.default_rng(2)
    names = [*"abcdefgh", "ü"]
    order = [rng.permutation(names).tolist() for _ in range(7)]
    asked = ComposedQueries(
        tuple(f"q{i}" for i in range(7)), [o[0] for o in order], [o[1:3] for o in order], "own", "val", "all",
        [("x",)] * 4 + [("y",)] * 3, [o[:5] for o in order],
    )  # fmt: skip
    scores = rng.normal(size=(7, 9)).astype(np.float32)
    return ComposedScores(scores, names, asked, "cosine", {"partial": False})


def test_what_goes_in_comes_out_and_rows_stay_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(score_io, "CHUNK_CELLS", 20)
    t = stored()
    path = score_io.save(t, tmp_path / "scores.zarr", run={"seed": 1})
    back = score_io.load(path)
    assert isinstance(back, ComposedScores)
    assert isinstance(back.scores, zarr.Array)
    assert len([p for p in (path / "scores" / "c").rglob("*") if p.is_file()]) == 4
    assert np.array_equal(np.asarray(back.scores[:]), t.scores)
    assert back.scores.dtype == np.float32
    assert (back.queries, back.space, back.digest()) == (t.queries, t.space, t.digest())
    assert back.meta == {"partial": False, "run": {"seed": 1}}
    assert evaluate(back) == evaluate(t)
    assert score_io.kind(back) == "composed"
    assert (back.shape, back.world) == ((7, 9), "")
    again = score_io.load(score_io.save(back, path, overwrite=True))
    assert isinstance(again, ComposedScores)
    assert evaluate(again) == evaluate(t)


def test_the_shell_gives_the_numbers_and_says_which_images_were_trained_on(tmp_path, capsys):
    overlap = {"count": 3, "says": "3 of its 9 images were trained on"}
    t = replace(stored(), meta={"train_overlap": overlap})
    path = score_io.save(t, tmp_path / "scores.zarr")
    assert cli.main(["metrics", "--json", str(path)]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["metrics"] == evaluate(t)
    assert entry["chance"] == composed.chance(t)
    assert entry["notes"] == [overlap["says"]]
    assert cli.main(["metrics", str(path)]) == 0
    assert overlap["says"] in capsys.readouterr().out


def test_own_candidates_go_through_the_file_too(tmp_path):
    names = [["a", "b", ""], ["c", "d", "e"]]
    asked = ComposedQueries(
        ("1", "2"), ("r", "s"), (("a",), ("d",)), "genecis", "test", "own candidates",
        (("focus_object",), ("change_object",)),
    )  # fmt: skip
    t = ComposedScores(np.array([[1.0, 2, -np.inf], [1, 2, 3]]), names, asked, "logit")
    back = score_io.load(score_io.save(t, tmp_path / "scores.zarr"))
    assert isinstance(back, ComposedScores)
    assert np.asarray(back.candidates).tolist() == names
    assert evaluate(back) == evaluate(t)


def test_damage_is_found_when_loading_and_nan_when_saving(tmp_path):
    t = stored()
    path = score_io.save(t, tmp_path / "scores.zarr")
    chunk = next(p for p in (path / "scores" / "c").rglob("*") if p.is_file())
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(ScoreTableError, match="damaged or incomplete"):
        score_io.load(path)
    chunk.unlink()
    with pytest.raises(ScoreTableError, match=r"is nan.*missing part"):
        score_io.load(path)
    bad = ComposedScores(np.full_like(t.scores, np.nan), t.candidates, t.queries, "cosine")
    with pytest.raises(ScoreTableError, match="is nan"):
        score_io.save(bad, tmp_path / "bad.zarr")
    assert not (tmp_path / "bad.zarr").exists()


def test_a_table_as_large_as_circo_is_read_in_blocks(tmp_path):
    """50 of its 800 rows; only a block of rows is in memory at a time."""

    class Rows:
        shape, dtype, largest = (50, 123_403), np.dtype("float32"), 0

        def __getitem__(self, part):
            n = part.stop - part.start
            Rows.largest = max(Rows.largest, n)
            return np.random.default_rng(part.start).random((n, 123_403), dtype=np.float32)

    names = [str(i) for i in range(123_403)]
    asked = ComposedQueries(
        names[:50],
        names[:50],
        [names[60 + i : 64 + i] for i in range(50)],
        "circo",
        "test",
        "unlabeled2017",
    )
    found = evaluate(ComposedScores(Rows(), names, asked, "cosine"))
    assert found["recall@50"] < 0.1
    assert Rows.largest <= 33


def runs_of(tables: dict[str, ComposedScores]) -> list[Run]:
    return [
        Run(Path(name), {"method": name, "seed": 0, "backbone": "clip:x", "dataset": "d"}, {"t": t})
        for name, t in tables.items()
    ]


def test_a_comparison_shows_the_headline_its_categories_and_the_gain():
    t = stored()
    better = ComposedScores(t.scores + _bonus(t), t.candidates, t.queries, "cosine")
    runs = runs_of({"zero_shot": t, "ours": better})
    assert len(questions(runs)) == 1
    [c] = comparison.compare(runs)
    assert c.headline == "recall@1"
    assert c.columns[:3] == ["recall@1", "recall@5", "map@1"]
    assert c.columns[-2:] == ["recall@1/x", "recall@1/y"]
    assert c.categories == ["x", "y"]
    assert not any("macro" in name for name in c.columns)
    gain = c.rows[1].gain
    assert gain is not None
    assert gain.estimate == pytest.approx(evaluate(better)["recall@1"] - evaluate(t)["recall@1"])
    assert c.counts == "7 queries of protocol own, 9 candidates; gallery all"
    cell = c.rows[1].cells["recall@1/macro_2"]
    assert cell.low is not None
    for name in c.columns:
        assert name in c.chance


class CountedRows:
    """Rows on disk that say how many of them were read."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.shape, self.dtype, self.read = values, values.shape, values.dtype, 0

    def __getitem__(self, part):
        self.read += len(self.values[part])
        return self.values[part]


def test_a_comparison_and_metrics_read_every_row_once(monkeypatch, tmp_path, capsys):
    t = stored()
    given = [CountedRows(t.scores), CountedRows(t.scores + _bonus(t))]
    tables = [ComposedScores(s, t.candidates, t.queries, "cosine") for s in given]
    comparison.compare(runs_of(dict(zip(("zero_shot", "ours"), tables, strict=True))))
    assert [s.read for s in given] == [7, 7]
    path = score_io.save(t, tmp_path / "scores.zarr")
    once, passes = composed.ranks, []
    monkeypatch.setattr(composed, "ranks", lambda *a: passes.append(a) or once(*a))
    assert cli.main(["metrics", str(path), "--k", "2", "7", "--json"]) == 0
    assert len(passes) == 1
    [shown] = json.loads(capsys.readouterr().out)
    assert shown["metrics"] == evaluate(t, ks=[2, 7])
    assert shown["chance"] == composed.chance(t, ks=[2, 7])


@quick
@given(drawn)
def test_known_ranks_change_no_number(drawn):
    t = make(drawn)
    found = composed.ranks(t)
    for measured in (composed.evaluate, composed.chance):
        try:
            expected = measured(t)
        except ScoreTableError:
            continue  # no K of the protocol exists
        assert measured(t, found=found) == expected


def test_ranks_of_another_table_or_too_few_are_refused():
    t = stored()
    with pytest.raises(ScoreTableError, match=r"ranks of 5 queries to K = 10 .* of 7 queries"):
        evaluate(t, found=composed.empty_ranks(5, 10))
    with pytest.raises(ScoreTableError, match=r"to K = 10 were given .*measured to K = 12"):
        composed.chance(t, ks=[12], found=composed.ranks(t))


@pytest.mark.parametrize(
    "change",
    [
        {"reference": [f"r{i}" for i in range(7)]},
        {"targets": [row[:1] for row in stored().queries.targets]},
        {"gallery": "others"},
        {"protocol": "circo", "categories": ()},
        {"categories": [["x"]] * 7},
        {"candidates": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_questions_under_the_same_ids_are_another_comparison(change):
    t = stored()
    names = list(reversed(list(t.candidates))) if change.pop("candidates", False) else t.candidates
    other = ComposedScores(t.scores, names, replace(t.queries, **change), "cosine")
    runs = runs_of({"zero_shot": t, "ours": other})
    assert len(questions(runs)) == 2
    assert [row.gain for c in comparison.compare(runs) for row in c.rows] == [None, None]
    groups = [group for found in questions(runs).values() for group in found]
    with pytest.raises(ScoreTableError, match="the two tables differ in"):
        comparison._rows(groups, 1, [[None]] * 2)


def _bonus(t: ComposedScores) -> np.ndarray:
    """One more for right images."""
    return np.array([[name in row for name in t.candidates] for row in t.queries.targets]) * 1.0


@pytest.mark.parametrize(
    ("protocol", "kinds", "headline"),
    [
        ("fashioniq", ("dress", "shirt", "toptee"), "avg"),
        ("fashioniq", ("dress",), "recall@10/dress"),
        ("genecis", CATEGORIES["genecis"], "recall@1/macro_4"),
        ("genecis", ("focus_object",), "recall@1/focus_object"),
        ("circo", ("negation",), "map@5"),
        ("cirr", (), "avg"),
    ],
)
def test_every_protocol_has_a_headline(protocol, kinds, headline):
    names = [str(i) for i in range(60)]
    q = 8
    asked = ComposedQueries(
        names[:q], ["50"] * q, [[str(i + 1)] for i in range(q)], protocol, "val", "split",
        [[kinds[i % len(kinds)]] for i in range(q)] if kinds else (),
        [[str(i + 1), "50", "51", "52"] for i in range(q)] if protocol == "cirr" else (),
    )  # fmt: skip
    t = ComposedScores(np.random.default_rng(0).normal(size=(q, 60)), names, asked, "cosine")
    [c] = comparison.compare(runs_of({"a": t}))
    assert (c.headline, c.columns[0], c.categories) == (
        headline,
        headline if "/" not in headline or "macro" in headline else c.columns[0],
        [],
    )
    assert set(c.columns) == set(evaluate(t))


# ── official files ───────────────────────────────────────────────────────────────────────────────────────────────────

OFFICIAL = Path(os.environ.get("HEADSTART_OFFICIAL_DATA", "/nowhere"))
needs_circo = pytest.mark.skipif(
    not (OFFICIAL / "circo").is_dir(),
    reason="HEADSTART_OFFICIAL_DATA must name a folder with circo/annotations/{val,test}.json and "
    "circo/submission_examples/ of github.com/miccunifi/CIRCO (commit 267b5c9)",
)


@needs_circo
def test_circo_s_example_submission_gives_the_published_numbers():
    rows = json.loads((OFFICIAL / "circo/annotations/val.json").read_text())
    lists = json.loads((OFFICIAL / "circo/submission_examples/submission_val.json").read_text())
    asked = ComposedQueries(
        [str(r["id"]) for r in rows],
        [str(r["reference_img_id"]) for r in rows],
        [[str(i) for i in r["gt_img_ids"]] for r in rows],
        "circo", "val", "unlabeled2017",
        [r["semantic_aspects"] for r in rows],
    )  # fmt: skip
    named = {query: [str(i) for i in images] for query, images in lists.items()}
    gallery = {i for images in named.values() for i in images} | {
        t for r in asked.targets for t in r
    }
    found = evaluate_lists(asked, named, gallery)
    assert [f"{100 * found[f'map@{k}']:.3f}" for k in (5, 10, 25, 50)] == [
        "0.486",
        "0.518",
        "0.540",
        "0.602",
    ]
    assert [f"{100 * found[f'recall@{k}']:.2f}" for k in (5, 10, 25, 50)] == [
        "0.91",
        "0.91",
        "1.36",
        "3.64",
    ]
    assert sum(name.startswith("semantic_map@10/") for name in found) == 9
    for aspect in CATEGORIES["circo"]:
        mine = []
        for r in rows:
            if aspect in r["semantic_aspects"]:
                hits = [image in r["gt_img_ids"] for image in lists[str(r["id"])][:10]]
                total = sum(sum(hits[: i + 1]) / (i + 1) for i in range(10) if hits[i])
                mine.append(total / min(len(r["gt_img_ids"]), 10))
        assert found[f"semantic_map@10/{aspect}"] == pytest.approx(np.mean(mine))


class Constant:
    """One score for every image of the row's own gallery, made row by row."""

    dtype = np.dtype("float32")

    def __init__(self, members: list[np.ndarray], width: int) -> None:
        self.members, self.shape = members, (len(members), width)

    def __getitem__(self, part: slice) -> np.ndarray:
        rows = np.full((part.stop - part.start, self.shape[1]), -np.inf, np.float32)
        for row, mine in zip(rows, self.members[part], strict=True):
            row[mine] = 0.5
        return rows


def official(folder: str, where: str):
    return pytest.mark.skipif(
        not (OFFICIAL / folder).is_dir(),
        reason=f"HEADSTART_OFFICIAL_DATA must name a folder with {folder}/ of github.com/{where}",
    )


def read(name: str) -> Any:
    return json.loads((OFFICIAL / name).read_text())


@official(
    "cirr", "Cuberick-Orion/CIRR, branch cirr_dataset (commit 2276fba: captions/, image_splits/)"
)
def test_constant_scores_on_cirr_val_get_nothing_and_chance_is_the_documented_line():
    rows, images = (
        read("cirr/captions/cap.rc2.val.json"),
        list(read("cirr/image_splits/split.rc2.val.json")),
    )
    asked = ComposedQueries(
        [str(r["pairid"]) for r in rows], [r["reference"] for r in rows],
        [[r["target_hard"], *(t for t in r["target_soft"] if t != r["target_hard"])] for r in rows],
        "cirr", "val", "val", subset=[r["img_set"]["members"] for r in rows],
    )  # fmt: skip
    t = ComposedScores(Constant([np.arange(2297)] * len(rows), 2297), images, asked, "cosine")
    assert t.scores.shape == (4181, 2297)
    assert set(evaluate(t).values()) == {0.0}
    lines = composed.chance(t)
    assert [lines[f"recall@{k}"] for k in (1, 5, 10, 50)] == pytest.approx(
        [k / 2296 for k in (1, 5, 10, 50)]
    )
    assert [lines[f"recall_subset@{k}"] for k in (1, 2, 3)] == pytest.approx([0.2, 0.4, 0.6])


@official("fashioniq", "XiaoxiaoGuo/fashion-iq (commit f71b16c: captions/, image_splits/)")
@pytest.mark.parametrize("kind", ["split", "union"])
def test_constant_scores_on_fashioniq_val_get_nothing_and_chance_is_the_documented_line(kind):
    sizes = {"split": (3817, 6346, 5373), "union": (2628, 3089, 2902)}[kind]
    rows = {c: read(f"fashioniq/captions/cap.{c}.val.json") for c in CATEGORIES["fashioniq"]}
    galleries = {
        c: read(f"fashioniq/image_splits/split.{c}.val.json")
        if kind == "split"
        else list(dict.fromkeys(x for r in rows[c] for x in (r["candidate"], r["target"])))
        for c in rows
    }
    names = list(dict.fromkeys(image for gallery in galleries.values() for image in gallery))
    place = {name: i for i, name in enumerate(names)}
    members = {c: np.array([place[image] for image in gallery]) for c, gallery in galleries.items()}
    every = [(c, i, r) for c, mine in rows.items() for i, r in enumerate(mine)]
    asked = ComposedQueries(
        [f"{c}/{i}" for c, i, _ in every], [r["candidate"] for *_, r in every], [[r["target"]] for *_, r in every],
        "fashioniq", "val", [f"{c} {kind}" for c, *_ in every], [[c] for c, *_ in every],
    )  # fmt: skip
    t = ComposedScores(
        Constant([members[c] for c, *_ in every], len(names)), names, asked, "cosine"
    )
    assert tuple(map(len, members.values())) == sizes
    assert (len(t.ids), t.queries.gallery_names) == (6016, (kind,))
    assert set(evaluate(t).values()) == {0.0}
    lines = composed.chance(t)
    assert [lines[f"recall@10/{c}"] for c in rows] == pytest.approx([10 / n for n in sizes])
    if kind == "split":
        assert [f"{100 * lines[f'recall@10/{c}']:.2f}" for c in rows] == ["0.26", "0.16", "0.19"]


@official("genecis", "facebookresearch/genecis (commit 0c5c968: the object tasks)")
def test_constant_scores_on_genecis_get_nothing_though_the_target_comes_first():
    kinds = ("focus_object", "change_object")
    every = [(kind, r) for kind in kinds for r in read(f"genecis/{kind}.json")]
    number = "val_image_id"
    own = [
        list(dict.fromkeys(str(x[number]) for x in (r["target"], *r["gallery"]))) for _, r in every
    ]
    asked = ComposedQueries(
        [f"{kind}/{i}" for i, (kind, _) in enumerate(every)], [str(r["reference"][number]) for _, r in every],
        [row[:1] for row in own], "genecis", "test", "own candidates", [[kind] for kind, _ in every],
    )  # fmt: skip
    padded = np.array([row + [""] * (15 - len(row)) for row in own])
    assert sorted({len(row) for row in own}) == [
        14,
        15,
    ]  # one row names its target among the distractors
    t = ComposedScores(np.full((len(own), 15), 0.5), padded, asked, "cosine")
    assert len(t.ids) == 3920
    assert set(evaluate(t).values()) == {0.0}
    lines = composed.chance(t)
    assert [f"{100 * lines[f'recall@{k}/focus_object']:.1f}" for k in (1, 2, 3)] == [
        "6.7",
        "13.3",
        "20.0",
    ]
    assert not any("macro" in name for name in lines)
