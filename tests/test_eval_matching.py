"""Matching against the slow loop written from its definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import matching
from eval.errors import ScoreTableError
from eval.matching import MatchingScores, evaluate

quick = settings(derandomize=True, deadline=None, max_examples=50)
few_values = st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 1.0])


@st.composite
def items(draw, shape):
    n = draw(st.integers(1, 7))
    size = n * int(np.prod(shape))
    scores = np.array(draw(st.lists(few_values, min_size=size, max_size=size))).reshape(n, *shape)
    kinds = draw(st.lists(st.sampled_from(["swap", "add", "replace"]), min_size=n, max_size=n))
    return scores, kinds


def slow(scores, kinds, name) -> dict[str, float]:
    """One metric by counting, overall and by category."""
    right = []
    for s in scores:
        if name == "accuracy":
            right.append(s[0] > s[1])
            continue
        text = s[0][0] > s[0][1], s[1][1] > s[1][0]
        image = s[0][0] > s[1][0], s[1][1] > s[0][1]
        right.append(
            {
                "i2t": all(text),
                "t2i": all(image),
                "group_score": all(text) and all(image),
                "i2t_0": text[0],
                "i2t_1": text[1],
                "t2i_0": image[0],
                "t2i_1": image[1],
            }[name]
        )
    found = {name: sum(right) / len(right)}
    for kind in set(kinds):
        mine = [r for r, k in zip(right, kinds, strict=True) if k == kind]
        found[f"{name}/{kind}"] = sum(mine) / len(mine)
    means = [v for k, v in found.items() if "/" in k]
    return found | {f"{name}/mean_of_categories": sum(means) / len(means)}


@quick
@given(items((2, 2)))
def test_two_by_two_metrics_equal_the_slow_loop(drawn):
    scores, kinds = drawn
    found = evaluate(MatchingScores(scores, np.array(kinds), "logit"))
    expected: dict[str, float] = {}
    for name in ("i2t", "t2i", "group_score", "i2t_0", "i2t_1", "t2i_0", "t2i_1"):
        expected |= slow(scores, kinds, name)
    assert found == pytest.approx(expected)


@quick
@given(items((2,)))
def test_one_image_metrics_equal_the_slow_loop(drawn):
    scores, kinds = drawn
    found = evaluate(MatchingScores(scores, np.array(kinds), "cosine"))
    assert found == pytest.approx(slow(scores, kinds, "accuracy"))


@quick
@given(items((2, 2)), st.integers(0, 99))
def test_order_and_one_increasing_map_change_nothing_and_the_group_is_never_best(drawn, seed):
    scores, kinds = drawn
    found = evaluate(MatchingScores(scores, np.array(kinds), "logit"))
    order = np.random.default_rng(seed).permutation(len(scores))
    other = MatchingScores(np.arctan(scores[order]) * 3, np.array(kinds)[order], "logit")
    assert evaluate(other) == pytest.approx(found)
    assert found["group_score"] <= min(found["i2t"], found["t2i"])


def test_a_softmax_over_the_two_captions_changes_the_choice_of_image():
    scores = np.array([[[2.0, 1.0], [3.0, 3.5]]])
    soft = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    before, after = (
        evaluate(MatchingScores(s, np.array(["swap"]), space))
        for s, space in ((scores, "logit"), (soft, "probability"))
    )
    assert before["i2t"] == after["i2t"] == 1
    assert (before["t2i"], after["t2i"]) == (0, 1)


def test_text_score_is_choosing_the_text():
    """The classic mix-up: only the captions of each image are told apart here."""
    scores = np.array([[[2.0, 1.0], [5.0, 6.0]]])
    found = evaluate(MatchingScores(scores, np.array(["swap"]), "logit"))
    assert (found["i2t"], found["t2i"], found["group_score"]) == (1, 0, 0)
    assert (found["t2i_0"], found["t2i_1"]) == (0, 1)


def test_a_constant_scorer_gets_zero_and_a_perfect_one_gets_one():
    kinds = np.array(["swap", "add", "add"])
    for shape, perfect in (((2, 2), np.eye(2)), ((2,), np.array([1.0, 0]))):
        constant = evaluate(MatchingScores(np.zeros((3, *shape)), kinds, "logit"))
        assert set(constant.values()) == {0.0}
        best = evaluate(
            MatchingScores(np.broadcast_to(perfect, (3, *shape)).copy(), kinds, "logit")
        )
        assert set(best.values()) == {1.0}


def test_chance_is_what_random_scores_get():
    """100,000 items: the standard error of a half is 0.0016; the tolerance is four of them."""
    rng = np.random.default_rng(0)
    kinds = np.array(["swap", "add"] * 50_000)
    for shape in ((2, 2), (2,)):
        t = MatchingScores(rng.normal(size=(100_000, *shape)), kinds, "logit")
        found, lines = evaluate(t), matching.chance(t)
        assert set(found) == set(lines)
        for name, value in lines.items():
            assert found[name] == pytest.approx(value, abs=0.01 if "/" in name else 0.0064), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": np.zeros((2, 3))}, r"\(2, 3\)"),
        ({"scores": np.full((2, 2), np.nan)}, r"query 0 \(a\).*4 that are NaN"),
        ({"category": np.array(["swap"])}, r"2 items.*\(1,\)"),
        ({"category": np.array(["swap", ""])}, "empty"),
        ({"category": np.array(["swap", "mean_of_categories"])}, "rename"),
        ({"space": "score"}, "'score'"),
        ({"scores": np.zeros((0, 2)), "category": np.zeros(0, str), "ids": ()}, "empty"),
    ],
)
def test_a_table_that_cannot_give_an_honest_number_is_refused(change, message):
    good = {
        "scores": np.zeros((2, 2)),
        "category": np.array(["swap", "add"]),
        "space": "logit",
        "ids": ("a", "b"),
    }
    MatchingScores(**good)
    with pytest.raises(ScoreTableError, match=message):
        MatchingScores(**(good | change))
