"""Intervals against scipy's bootstrap, resampling by hand, and known coverage."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from eval import bootstrap, composed, czsl, matching, retrieval
from eval.composed_queries import CATEGORIES, ComposedQueries
from eval.composed_table import ComposedScores
from eval.composition import CompositionScores
from eval.draws import clusters, draws, strata
from eval.errors import ScoreTableError
from eval.matching import MatchingScores
from eval.retrieval import RetrievalScores, both_directions


def composition(seed=0, q=60, c=6, strength=1.0, **options) -> CompositionScores:
    rng = np.random.default_rng(seed)
    target = np.arange(q) % c
    scores = rng.normal(size=(q, c)) + strength * np.eye(c)[target]
    pairs = np.stack([np.arange(c) // 2, np.arange(c) % 2], 1)
    facts: dict[str, Any] = {"split": "test", "space": "logit"} | options
    return CompositionScores(scores, target, pairs, np.arange(c) < c // 2, **facts)


def pairs_of_captions(seed=0, n=200, strength=0.5) -> MatchingScores:
    scores = np.random.default_rng(seed).normal(size=(n, 2)) + np.array([strength, 0])
    return MatchingScores(scores, np.array(["swap", "add"] * (n // 2)), "logit")


def two_by_two(seed=0, n=60) -> MatchingScores:
    """Types of unequal size and number of subtypes."""
    scores = np.random.default_rng(seed).normal(size=(n, 2, 2)) + 0.7 * np.eye(2)
    kinds = ["swap_att", "swap_obj", "add_obj", "replace_rel", "replace_rel", "replace_att"]
    return MatchingScores(scores, kinds * (n // 6), "logit")


def images_and_captions(seed=0, n=12) -> RetrievalScores:
    own = np.kron(np.eye(n), np.ones((1, 2))).astype(bool)
    return RetrievalScores(np.random.default_rng(seed).normal(size=own.shape) + own, own, "cosine")


def questions(protocol, seed=0, q=48, strength=1.5) -> ComposedScores:
    """60 images; every third query shares its target with the next."""
    rng = np.random.default_rng(9)
    names = [str(i) for i in range(60)]
    kinds = CATEGORIES.get(protocol, ("x", "y"))
    target = [str(1 + 2 * (i - (i % 3 == 1))) if i < 20 else str(i) for i in range(q)]
    asked = ComposedQueries(
        [f"q{i}" for i in range(q)],
        ["59"] * q,
        [
            [t, "0"] if protocol in ("circo", "own") and i % 5 == 0 else [t]
            for i, t in enumerate(target)
        ],
        protocol,
        "val",
        "split",
        [[kinds[int(rng.integers(len(kinds)))]] for _ in range(q)],
        [[t, "59", "58", "57", "56"] for t in target] if protocol in ("cirr", "own") else (),
    )
    right = np.array([[name in row for name in names] for row in map(asked.right, range(q))])
    scores = np.random.default_rng(seed).normal(size=(q, 60)) + strength * right
    return ComposedScores(scores, names, asked, "cosine")


def gallery(seed=0, q=12) -> RetrievalScores:
    rng = np.random.default_rng(seed)
    return RetrievalScores(rng.normal(size=(q, q)) + np.eye(q), np.eye(q, dtype=bool), "cosine")


@pytest.mark.parametrize(
    ("table", "evaluate"),
    [
        (composition(), czsl.evaluate),
        (pairs_of_captions(), matching.evaluate),
        (two_by_two(), matching.evaluate),
        (gallery(), retrieval.evaluate),
        (both_directions(images_and_captions()), retrieval.evaluate_both),
        *((questions(protocol), composed.evaluate) for protocol in composed.KS),
    ],
)
def test_estimates_are_the_metrics_themselves(table, evaluate):
    found, metrics = bootstrap.intervals([table], resamples=20), evaluate(table)
    assert set(found) == set(metrics) - {"bias_at_best_hm"}
    for name, interval in found.items():
        assert interval.estimate == pytest.approx(metrics[name], abs=1e-12), name
        assert interval.low <= interval.high


def test_a_resampled_curve_equals_the_curve_of_the_resampled_images():
    """The whole point of the weights: drawing an image twice is having it twice."""
    t = composition()
    weights = next(draws(strata(t), 7, 3))
    fast = bootstrap.estimator(t)(weights)
    for r, counts in enumerate(weights.astype(int)):
        rows = np.repeat(np.arange(len(t.target)), counts)
        drawn = CompositionScores(t.scores[rows], t.target[rows], t.pairs, t.seen, "test", "logit")
        slow = czsl.evaluate(drawn)
        for name, values in fast.items():
            assert values[r] == pytest.approx(slow[name], abs=1e-12), name


def test_every_draw_keeps_the_sizes_of_its_groups():
    groups = np.array([0, 1, 1, 0, 1])
    weights = np.concatenate(list(draws(groups, 50, 0)))
    assert weights.shape == (50, 5)
    assert (weights[:, groups == 0].sum(1) == 2).all()
    assert (weights[:, groups == 1].sum(1) == 3).all()
    assert len({tuple(w) for w in weights.tolist()}) > 20


def test_seen_and_unseen_images_keep_their_shares_in_every_draw():
    """All seen-labelled images right, all others wrong: only a draw of other shares could move the accuracy."""
    t = composition()
    right = np.where(t.seen_labelled, t.target, (t.target + 1) % 6)
    sure = CompositionScores(np.eye(6)[right], t.target, t.pairs, t.seen, "test", "logit")
    interval = bootstrap.intervals([sure], resamples=100)["pair_acc"]
    assert (interval.estimate, interval.low, interval.high) == (0.5, 0.5, 0.5)


def test_a_second_caption_that_always_agrees_narrows_no_interval():
    """Captions of one image are drawn together, also where they are no neighbours."""
    one = gallery(q=150)
    order = np.random.default_rng(1).permutation(300)
    scores, right = (np.repeat(x, 2, axis=0)[order] for x in (one.scores, one.positives))
    two = RetrievalScores(scores, right, "cosine")
    a, b = (bootstrap.intervals([t], resamples=2000)["recall@1"] for t in (one, two))
    assert b.estimate == pytest.approx(a.estimate)
    assert b.high - b.low == pytest.approx(a.high - a.low, rel=0.1)


def test_images_that_ask_for_their_captions_are_drawn_one_by_one():
    right = np.repeat(np.eye(5, dtype=bool), 2, axis=1)
    table = RetrievalScores(np.zeros((5, 10)), right, "cosine")
    assert clusters(table).tolist() == list(range(5))


def test_queries_are_drawn_together_along_chains_of_shared_answers():
    right = np.zeros((6, 5), dtype=bool)
    for query, candidate in [(0, 4), (1, 3), (2, 3), (2, 2), (4, 2), (4, 4)]:
        right[query, candidate] = True  # 0-4-2-1; 3 and 5 have no right answer
    table = RetrievalScores(np.zeros((6, 5)), right, "cosine")
    assert clusters(table).tolist() == [0, 0, 0, 3, 0, 5]
    weights = next(draws(np.zeros(6, dtype=int), 40, 0, clusters(table)))
    assert (weights[:, [0, 1, 2, 4]] == weights[:, :1]).all()
    assert (weights[:, [0, 3, 5]].sum(1) == 3).all()
    assert clusters(pairs_of_captions(n=4)).tolist() == [0, 1, 2, 3]


def test_draws_do_not_depend_on_how_many_are_made_at_a_time(monkeypatch):
    groups = np.zeros(10, dtype=int)
    whole = np.concatenate(list(draws(groups, 6, 0)))
    monkeypatch.setattr("eval.draws.CELLS_PER_DRAW", 20)
    assert np.array_equal(np.concatenate(list(draws(groups, 6, 0))), whole)


def test_the_interval_of_a_mean_is_scipy_s():
    t = pairs_of_captions(n=400)
    ours = bootstrap.intervals([t], resamples=4000)["accuracy"]
    right = (t.scores[:, 0] > t.scores[:, 1]).astype(float)
    theirs = stats.bootstrap(
        (right,), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(0)
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.006)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """150 experiments of 80 items: coverage of 95 % has a standard error of 0.018; small samples cost a little."""
    inside = 0
    for seed in range(150):
        interval = bootstrap.intervals(
            [pairs_of_captions(seed, n=80, strength=0.0)], resamples=200
        )["accuracy"]
        inside += interval.low <= 0.5 <= interval.high
    assert 0.88 <= inside / 150 <= 0.99


def test_a_paired_difference_is_narrower_than_an_unpaired_one():
    base = pairs_of_captions(n=400)
    better = MatchingScores(base.scores + np.array([0.1, 0]), base.category, "logit")
    paired = bootstrap.difference([better], [base])["accuracy"]
    apart = bootstrap.intervals([base])["accuracy"]
    assert paired.estimate == pytest.approx(
        matching.evaluate(better)["accuracy"] - matching.evaluate(base)["accuracy"]
    )
    assert paired.excludes_zero
    assert paired.high - paired.low < (apart.high - apart.low) / 2


def test_a_table_does_not_differ_from_itself():
    tables = [composition(), pairs_of_captions(), two_by_two(), gallery()]
    tables += [both_directions(images_and_captions()), *map(questions, composed.KS)]
    for table in tables:
        assert bootstrap.difference([table], [table], resamples=2)
        for interval in bootstrap.difference([table], [table], resamples=30).values():
            assert (interval.estimate, interval.low, interval.high) == (0, 0, 0)
            assert not interval.excludes_zero


def test_seeds_are_averaged_and_widen_the_interval():
    """Items are many and equal in all seeds, so the spread that is left is the seeds'."""
    tables = [composition(seed, q=3000, strength=s) for seed, s in enumerate((0.5, 1.0, 1.5))]
    alone = bootstrap.intervals([tables[1]], resamples=300)["auc"]
    together = bootstrap.intervals(tables, resamples=300)["auc"]
    assert together.estimate == pytest.approx(np.mean([czsl.evaluate(t)["auc"] for t in tables]))
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_a_category_that_a_draw_misses_is_left_out_of_it():
    t = MatchingScores(np.array([[1.0, 0]] * 4), np.array(["swap", "add", "add", "add"]), "logit")
    assert bootstrap.intervals([t], resamples=200)["accuracy/swap"].low == 1


def test_one_side_only_gives_intervals_of_what_exists():
    t = composition()
    one = CompositionScores(t.scores, t.target % 3, t.pairs, t.seen, "test", "logit")
    assert set(bootstrap.intervals([one], resamples=10)) == {
        "best_seen",
        "pair_acc",
        "attr_acc",
        "obj_acc",
    }
    other = CompositionScores(t.scores, 3 + t.target % 3, t.pairs, t.seen, "test", "logit")
    assert set(bootstrap.intervals([other], k=2, resamples=10)) == {"best_unseen"}


def test_the_same_seed_gives_the_same_interval():
    a, b, c = (bootstrap.intervals([composition()], resamples=50, seed=s)["auc"] for s in (1, 1, 2))
    assert a == b
    assert a != c


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (pairs_of_captions(), "CompositionScores and MatchingScores"),
        (composition(world="open"), "differ in world"),
        (composition(split="val"), "differ in split"),
        (composition(q=66), r"differ in target \(\(60,\) and \(66,\)"),
        (composition(ids=[f"b{i}" for i in range(60)]), "differ in ids"),
    ],
)
def test_tables_of_other_items_are_not_compared(other, message):
    named = composition(ids=[f"a{i}" for i in range(60)])
    with pytest.raises(ScoreTableError, match=message):
        bootstrap.difference([named], [other])


def test_unnamed_rows_are_compared_by_their_labels():
    named = composition(ids=[f"a{i}" for i in range(60)])
    assert bootstrap.difference([named], [composition()], resamples=5)["auc"].estimate == 0


def test_matching_tables_of_other_forms_are_not_compared():
    a = MatchingScores(np.zeros((2, 2)), np.array(["x", "y"]), "logit")
    b = MatchingScores(np.zeros((2, 2, 2)), np.array(["x", "y"]), "logit")
    with pytest.raises(ScoreTableError, match=r"\(2, 2\) and \(2, 2, 2\)"):
        bootstrap.same_items(a, b)


def test_no_table_is_an_error():
    with pytest.raises(ScoreTableError, match="no table"):
        bootstrap.intervals([])


# ── means over types and categories, both directions, composed retrieval ─────────────────────────────────────────────


def drawn_again(table, counts):
    """The table with item i `counts[i]` times; names are numbered anew."""
    rows = np.repeat(np.arange(len(counts)), counts)
    if isinstance(table, MatchingScores):
        return MatchingScores(table.scores[rows], np.asarray(table.category)[rows], table.space)
    asked = table.queries
    fields = {
        name: [getattr(asked, name)[i] for i in rows]
        for name in ("reference", "targets", "categories", "subset", "gallery")
    }
    ids = [str(i) for i in range(len(rows))]
    again = ComposedQueries(ids=ids, **fields, protocol=asked.protocol, split=asked.split)
    return ComposedScores(table.scores[rows], table.candidates, again, table.space)


@pytest.mark.parametrize(
    "table", [two_by_two(), *map(questions, composed.KS)], ids=lambda t: type(t).__name__
)
def test_resampled_metrics_are_those_of_the_resampled_items(table):
    """Means over types, categories and tasks, and avg, are worked out again from each draw."""
    weights = next(draws(strata(table), 7, 3, clusters(table)))
    fast = bootstrap.estimator(table)(weights)
    evaluate: Any = matching.evaluate if isinstance(table, MatchingScores) else composed.evaluate
    for r, counts in enumerate(weights.astype(int)):
        slow = evaluate(drawn_again(table, counts))
        for name, values in fast.items():
            if np.isnan(values[r]):  # a category that was not drawn, or a mean over it
                assert name not in slow or "macro" in name
            else:
                assert values[r] == pytest.approx(slow[name], abs=1e-12), name


def test_every_draw_keeps_the_numbers_of_a_category_s_clusters():
    for protocol in ("fashioniq", "genecis"):
        t = questions(protocol)
        groups, together = strata(t), clusters(t)
        assert len(set(groups.tolist())) == len(CATEGORIES[protocol])
        for cluster in set(together.tolist()):
            assert len(set(groups[together == cluster].tolist())) == 1
        first = np.unique(together, return_index=True)[1]
        weights = np.concatenate(list(draws(groups, 30, 0, together)))
        for group in set(groups.tolist()):
            mine = first[groups[first] == group]
            assert (weights[:, mine].sum(1) == len(mine)).all()
    assert set(strata(questions("circo")).tolist()) == {0}


def test_composed_queries_of_one_target_are_drawn_together():
    asked = ComposedQueries(
        list("abcdef"),
        ["r"] * 6,
        [["1"], ["2", "3"], ["1"], ["3"], ["4"], ["1"]],
        "circo",
        "val",
        "all",
    )
    t = ComposedScores(np.zeros((6, 5)), ["r", "1", "2", "3", "4"], asked, "cosine")
    assert clusters(t).tolist() == [0, 1, 0, 1, 4, 0]
    kinds = [["dress"], ["dress"], ["shirt"], ["toptee"], ["shirt"], ["shirt"]]
    asked = ComposedQueries(
        asked.ids, asked.reference, asked.targets, "fashioniq", "val", "s", kinds
    )
    t = ComposedScores(t.scores, t.candidates, asked, "cosine")
    assert clusters(t).tolist() == [0, 1, 2, 3, 4, 2]


def test_an_image_is_drawn_with_its_captions_in_both_directions():
    own = np.array([[1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0]], bool)
    both = both_directions(RetrievalScores(own * 1.0, own, "cosine"))
    together = clusters(both)
    assert together[:7].tolist() == [0, 1, 2, 0, 0, 1, 2]
    assert together[7] > 2  # a caption of no image
    weights = next(draws(strata(both), 20, 0, together))
    for image, caption in ((0, 3), (0, 4), (1, 5), (2, 6)):
        assert (weights[:, image] == weights[:, caption]).all()


def test_the_interval_of_rsum_is_found_by_drawing_images_by_hand():
    both = both_directions(images_and_captions(n=40))
    ours = bootstrap.intervals([both], resamples=2000)["rsum"]
    parts = retrieval.outcomes_both(both)
    rng = np.random.default_rng(5)
    sums = []
    for _ in range(2000):
        images = rng.integers(40, size=40)
        captions = 40 + np.concatenate([2 * images, 2 * images + 1])
        sums.append(
            sum(
                parts[f"i2t_recall@{k}"][images].mean() + parts[f"t2i_recall@{k}"][captions].mean()
                for k in (1, 5, 10)
            )
        )
    low, high = np.percentile(sums, [2.5, 97.5])
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.05)
    assert ours.estimate == pytest.approx(retrieval.evaluate_both(both)["rsum"])


@pytest.mark.parametrize("protocol", composed.KS)
def test_a_better_head_differs_in_every_metric_that_it_improves(protocol):
    worse, better = questions(protocol, 1, strength=0.5), questions(protocol, 1, strength=9)
    found = bootstrap.difference([better], [worse], resamples=200)
    assert set(found) == set(composed.evaluate(better))
    head = {
        "cirr": "avg",
        "fashioniq": "avg",
        "genecis": "recall@1/macro_4",
        "circo": "map@5",
        "own": "recall@1",
    }
    assert found[head[protocol]].low > 0
    for interval in found.values():
        assert interval.estimate >= 0


def test_the_k_asked_for_is_kept_in_differences():
    a, b = questions("own", 0), questions("own", 1)
    found = bootstrap.difference([a], [b], ks=(7,), resamples=5)
    assert {"recall@7", "map@7"} <= set(found)
    assert "recall@5" not in found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gallery": "union"}, r"differ in gallery \(\(48, 60\)"),
        ({"reference": ["58"] * 48}, "differ in reference"),
        ({"split": "test"}, "differ in split"),
    ],
)
def test_composed_tables_of_other_questions_are_not_compared(changes, message):
    t = questions("circo")
    other = ComposedScores(t.scores, t.candidates, replace(t.queries, **changes), "cosine")
    with pytest.raises(ScoreTableError, match=message):
        bootstrap.difference([t], [other])
    reordered = ComposedScores(t.scores, t.candidates[::-1], t.queries, "cosine")
    with pytest.raises(ScoreTableError, match="differ in candidates"):
        bootstrap.difference([t], [reordered])


def test_both_directions_of_other_items_are_not_compared():
    a = both_directions(images_and_captions(n=12))
    with pytest.raises(ScoreTableError, match="differ in positives"):
        bootstrap.difference([a], [both_directions(images_and_captions(n=13))])
    with pytest.raises(ScoreTableError, match="BothDirections and RetrievalScores"):
        bootstrap.difference([a], [a.i2t])
