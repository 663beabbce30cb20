"""Retrieval against the slow loop written from its definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import retrieval
from eval.errors import ScoreTableError
from eval.retrieval import RetrievalScores, evaluate

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
