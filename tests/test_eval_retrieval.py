"""Retrieval against the slow loop written from its definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import retrieval
from eval.errors import ScoreTableError
from eval.retrieval import BothDirections, RetrievalScores, both_directions, evaluate

quick = settings(derandomize=True, deadline=None, max_examples=60)


@st.composite
def galleries(draw):
    """Few distinct values, so many ties; queries without a right answer; -inf entries."""
    q, c = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    values = st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 2.0])
    scores = np.array(draw(st.lists(values, min_size=q * c, max_size=q * c))).reshape(q, c)
    scores[0] = np.where(np.isneginf(scores[0]), 0, scores[0])  # somebody has every candidate
    right = np.array(draw(st.lists(st.booleans(), min_size=q * c, max_size=q * c))).reshape(q, c)
    return scores, right


def slow_order(scores, right) -> list[bool]:
    """Is each rank right? Wrong candidates go first among equals, then the lower index."""
    alive = [c for c in range(len(scores)) if scores[c] > -np.inf]
    order = sorted(alive, key=lambda c: (-scores[c], bool(right[c]), c))
    return [bool(right[c]) for c in order]


def slow(scores, right, k) -> dict[str, float]:
    hits, precisions = [], []
    for row, truth in zip(scores, right, strict=True):
        top = slow_order(row, truth)[:k]
        hits.append(any(top))
        total = sum(sum(top[: i + 1]) / (i + 1) for i in range(len(top)) if top[i])
        precisions.append(total / min(truth.sum(), k) if truth.any() else 0.0)
    return {f"recall@{k}": float(np.mean(hits)), f"map@{k}": float(np.mean(precisions))}


@quick
@given(galleries())
def test_every_k_equals_the_slow_loop(drawn):
    scores, right = drawn
    ks = range(1, scores.shape[1] + 1)
    found = evaluate(RetrievalScores(scores, right, "cosine"), ks=list(ks))
    expected: dict[str, float] = {}
    for k in ks:
        expected |= slow(scores, right, k)
    assert found == pytest.approx(expected)
    recalls = [found[f"recall@{k}"] for k in ks]
    assert recalls == sorted(recalls)


@quick
@given(galleries(), st.integers(0, 99))
def test_order_of_queries_and_an_increasing_map_per_query_change_nothing(drawn, seed):
    scores, right = drawn
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(scores))
    mapped = np.exp(scores[order]) * rng.integers(1, 9, size=(len(scores), 1))
    mapped[np.isneginf(scores[order])] = -np.inf
    ks = [1, scores.shape[1]]
    before = evaluate(RetrievalScores(scores, right, "cosine"), ks=ks)
    assert evaluate(RetrievalScores(mapped, right[order], "logit"), ks=ks) == pytest.approx(before)


def test_blocks_of_rows_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    t = RetrievalScores(rng.normal(size=(30, 12)).round(1), rng.random((30, 12)) < 0.2, "cosine")
    whole = evaluate(t)
    monkeypatch.setattr("eval.table.CELLS_PER_BLOCK", 25)
    assert evaluate(t) == whole


def test_a_constant_scorer_finds_nothing_unless_everything_is_shown():
    t = RetrievalScores(np.zeros((3, 7)), np.eye(3, 7, dtype=bool), "cosine")
    assert evaluate(t, ks=[1, 6])["recall@6"] == 0
    assert evaluate(t, ks=[7])["recall@7"] == 1


def test_a_perfect_scorer_gets_one():
    right = np.kron(np.eye(4), np.ones((1, 5))).astype(bool)
    t = RetrievalScores(right.astype(float), right, "cosine")
    assert set(evaluate(t).values()) == {1.0}


def test_map_may_fall_as_k_grows():
    t = RetrievalScores(np.array([[3.0, 2.0, 1.0]]), np.array([[True, False, True]]), "cosine")
    found = evaluate(t, ks=[1, 2])
    assert (found["map@1"], found["map@2"]) == (1, 0.5)


def test_default_ks_above_the_gallery_are_absent_and_explicit_ones_refused():
    t = RetrievalScores(np.arange(14.0).reshape(2, 7), np.eye(2, 7, dtype=bool), "cosine")
    assert list(evaluate(t)) == ["recall@1", "recall@5", "map@1", "map@5"]
    with pytest.raises(ScoreTableError, match="K = 10 was asked for, but there are 7"):
        evaluate(t, ks=(1, 5, 10))
    with pytest.raises(ScoreTableError, match="no K at all"):
        evaluate(t, ks=())


def test_removed_candidates_do_not_count_as_candidates():
    scores = np.zeros((2, 3))
    scores[0, 0] = scores[1, 1] = -np.inf
    t = RetrievalScores(scores, np.array([[False, True, False], [False, False, True]]), "cosine")
    assert t.n_candidates == 2
    assert evaluate(t, ks=[2])["recall@2"] == 1
    with pytest.raises(ScoreTableError, match="there are 2"):
        evaluate(t, ks=[3])
    with pytest.raises(ScoreTableError, match="no query has a candidate"):
        evaluate(RetrievalScores(np.full((1, 2), -np.inf), np.ones((1, 2), dtype=bool), "cosine"))


def test_chance_is_what_random_scores_get():
    """10,000 queries: the standard error of a half is 0.005; the tolerance is four of them."""
    rng = np.random.default_rng(1)
    right = rng.random((10_000, 12)) < 0.15
    right[:, 0] |= np.arange(10_000) % 3 > 0
    scores = rng.normal(size=right.shape)
    scores[:1500, 9:] = -np.inf
    t = RetrievalScores(scores, right, "cosine")
    found, lines = evaluate(t), retrieval.chance(t)
    assert set(found) == set(lines)
    for name, value in lines.items():
        assert found[name] == pytest.approx(value, abs=0.02), name


@pytest.mark.parametrize(
    ("images", "k", "expected"), [(5000, 1, 0.0002), (5000, 5, 0.001), (1000, 10, 0.01)]
)
def test_chance_equals_the_documented_lines(images, k, expected):
    """COCO and Flickr30k: five captions an image, so both directions agree to the printed digits."""
    assert k / images == pytest.approx(expected)
    assert retrieval.chance_of_hit(k, 5, 5 * images) == pytest.approx(expected, rel=0.03)


def test_chance_of_a_single_candidate_is_certain():
    t = RetrievalScores(np.zeros((1, 1)), np.ones((1, 1), dtype=bool), "cosine")
    assert retrieval.chance(t) == {"recall@1": 1, "map@1": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": np.zeros((2, 4))}, r"\(2, 4\) and bool \(2, 3\)"),
        ({"positives": np.zeros((2, 3))}, "float64"),
        ({"scores": np.array([[0, 0, np.inf], [0, 0, 0]])}, "column 2.*inf"),
        ({"split": ""}, "split"),
    ],
)
def test_a_table_that_cannot_give_an_honest_number_is_refused(change, message):
    good = {
        "scores": np.zeros((2, 3)),
        "positives": np.eye(2, 3, dtype=bool),
        "space": "cosine",
        "split": "val",
    }
    RetrievalScores(**good)
    with pytest.raises(ScoreTableError, match=message):
        RetrievalScores(**(good | change))


# ── both directions of one table ─────────────────────────────────────────────────────────────────────────────────────


@st.composite
def images_and_captions(draw):
    """Few distinct values; images without captions, captions of two images or of none, -inf entries."""
    n, m = draw(st.integers(1, 12)), draw(st.integers(1, 13))
    values = st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 2.0])
    scores = np.array(draw(st.lists(values, min_size=n * m, max_size=n * m))).reshape(n, m)
    scores[0] = np.where(np.isneginf(scores[0]), 0, scores[0])
    scores[:, 0] = np.where(np.isneginf(scores[:, 0]), 0, scores[:, 0])
    own = np.array(draw(st.lists(st.booleans(), min_size=n * m, max_size=n * m))).reshape(n, m)
    return scores, own


@quick
@given(images_and_captions())
def test_both_directions_equal_the_slow_loop(drawn):
    scores, own = drawn
    n, m = scores.shape
    expected: dict[str, float] = {}
    for k in [k for k in (1, 5, 10) if k <= m]:
        for name, value in slow(scores, own, k).items():
            expected[f"i2t_{name}"] = value
        shares = []
        for i in range(n):
            top = slow_order(scores[i], own[i])[:k]
            shares.append(sum(top) / own[i].sum() if own[i].any() else 0)
        expected[f"i2t_true_recall@{k}"] = float(np.mean(shares))
    for k in [k for k in (1, 5, 10) if k <= n]:
        for name, value in slow(scores.T, own.T, k).items():
            expected[f"t2i_{name}"] = value
    if n >= 10 <= m:
        recalls = [f"{d}_recall@{k}" for d in ("i2t", "t2i") for k in (1, 5, 10)]
        expected["rsum"] = sum(expected[name] for name in recalls)
    table = RetrievalScores(scores, own, "cosine")
    found = retrieval.evaluate_both(both_directions(table))
    assert found == pytest.approx(expected)
    other = RetrievalScores(scores.T, own.T, "cosine", meta={"direction": "t2i"})
    assert retrieval.evaluate_both(both_directions(other)) == found


def test_an_image_with_five_captions_is_found_by_any_of_them_but_truly_recalled_by_a_fifth():
    own = np.kron(np.eye(3), np.ones((1, 5))).astype(bool)
    found = retrieval.evaluate_both(both_directions(RetrievalScores(own * 1.0, own, "cosine")))
    assert (found["i2t_recall@1"], found["i2t_true_recall@1"]) == (1, pytest.approx(0.2))
    assert (found["i2t_true_recall@5"], found["t2i_recall@1"]) == (1, 1)
    assert "rsum" not in found  # three images have no recall@5


def test_equal_captions_of_two_images_tie_and_count_against_both():
    """Captions 0 and 1 are one string, so their columns are equal."""
    scores = np.array([[0.9, 0.9], [0.8, 0.8]])
    found = retrieval.evaluate_both(
        both_directions(RetrievalScores(scores, np.eye(2, dtype=bool), "cosine")), ks=[1, 2]
    )
    assert (found["i2t_recall@1"], found["i2t_recall@2"]) == (0, 1)
    assert (found["t2i_recall@1"], found["t2i_recall@2"]) == (0.5, 1)


def test_an_image_without_captions_is_a_miss():
    own = np.array([[True, True], [False, False]])
    found = retrieval.evaluate_both(
        both_directions(RetrievalScores(own * 1.0, own, "cosine")), ks=[1, 2]
    )
    assert (found["i2t_recall@2"], found["i2t_true_recall@2"]) == (0.5, 0.5)


def test_a_constant_scorer_finds_nothing_either_way():
    own = np.kron(np.eye(20), np.ones((1, 5))).astype(bool)
    found = retrieval.evaluate_both(both_directions(RetrievalScores(own * 0.0, own, "cosine")))
    assert set(found.values()) == {0.0}
    assert "rsum" in found


def test_chance_of_both_directions_is_what_random_scores_get():
    """400 random tables of 12 × 24; 4,800 and 9,600 queries a direction."""
    rng = np.random.default_rng(3)
    own = np.kron(np.eye(12), np.ones((1, 2))).astype(bool)
    own[0] = False
    alive = np.where(rng.random(own.shape) < 0.1, -np.inf, 0)
    tables = [
        both_directions(RetrievalScores(rng.normal(size=own.shape) + alive, own, "cosine"))
        for _ in range(400)
    ]
    runs = [retrieval.evaluate_both(both) for both in tables]
    lines = retrieval.chance_both(tables[0])
    assert set(lines) == set(runs[0])
    for name, value in lines.items():
        spread = 0.1 if name == "rsum" else 0.02
        assert np.mean([run[name] for run in runs]) == pytest.approx(value, abs=spread), name


def test_reranked_tables_rank_one_way_and_are_given_as_two():
    rng = np.random.default_rng(0)
    scores, own = rng.normal(size=(3, 4)), np.eye(3, 4, dtype=bool)
    i2t = RetrievalScores(scores, own, "cosine", meta={"direction": "i2t", "rerank": 2})
    with pytest.raises(ScoreTableError, match="2 best of every query were rescored"):
        both_directions(i2t)
    t2i = RetrievalScores(-scores.T, own.T, "cosine", meta={"direction": "t2i", "rerank": 2})
    found = retrieval.evaluate_both(BothDirections(i2t, t2i), ks=[1])
    assert found["i2t_recall@1"] == evaluate(i2t, ks=[1])["recall@1"]
    assert found["t2i_recall@1"] == evaluate(t2i, ks=[1])["recall@1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positives": np.eye(4, 3, k=-1, dtype=bool)}, "their right answers differ"),
        ({"meta": {"direction": "i2t"}}, "t2i is a table of direction i2t; swap"),
        ({"split": "val"}, "differ in split"),
        ({"space": "logit"}, "differ in space"),
        ({"meta": {"rerank": 3}}, r"differ in rerank \(None and 3\)"),
    ],
)
def test_two_tables_that_are_not_one_result_are_refused(change, message):
    i2t = RetrievalScores(np.zeros((3, 4)), np.eye(3, 4, dtype=bool), "cosine")
    good = {"scores": np.zeros((4, 3)), "positives": np.eye(4, 3, dtype=bool), "space": "cosine"}
    BothDirections(i2t, RetrievalScores(**good))
    with pytest.raises(ScoreTableError, match=message):
        BothDirections(i2t, RetrievalScores(**(good | change)))
    with pytest.raises(ScoreTableError, match="'sideways'"):
        both_directions(
            RetrievalScores(i2t.scores, i2t.positives, "cosine", meta={"direction": "sideways"})
        )


@pytest.mark.parametrize(
    ("n_images", "captions", "expected"),
    [(5000, 5, (0.02, 0.10, 0.20)), (1000, 5, (0.10, 0.50, 1.00))],
)
def test_chance_of_the_benchmarks_is_the_documented_line(n_images, captions, expected):
    """COCO and Flickr30k in both directions, percent to two digits; sizes only, no scores of that size are made."""
    m = n_images * captions
    for k, percent in zip((1, 5, 10), expected, strict=True):
        assert 100 * retrieval.chance_of_hit(k, 1, n_images) == pytest.approx(percent)
        assert 100 * retrieval.chance_of_hit(k, captions, m) == pytest.approx(percent, abs=0.005)
