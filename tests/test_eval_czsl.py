"""CZSL against the slow loop written from the definition, and against the legacy procedure step by step."""

import inspect
import itertools
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval import composition as composition_table
from eval import curve, czsl, legacy, table
from eval.composition import CompositionScores
from eval.czsl import evaluate
from eval.errors import EvalWarning, ScoreTableError

quick = settings(derandomize=True, deadline=None, max_examples=60)

PAIRS = [(a, o) for a in range(3) for o in range(4)]


def composition(scores, target, seen, **options) -> CompositionScores:
    scores = np.asarray(scores)
    facts: dict[str, Any] = {"split": "test", "space": "logit"} | options
    return CompositionScores(
        scores, np.asarray(target), np.array(PAIRS[: scores.shape[1]]), np.asarray(seen), **facts
    )


@st.composite
def tables(draw, min_images=1, both_sides=False):
    """Arguments of `composition`: small tables with many ties, -inf entries, one-candidate rows and empty sides."""
    c = draw(st.integers(2 if both_sides else 1, 7))
    q = draw(st.integers(min_images, 9))
    values = st.sampled_from([-np.inf, -1.0, -0.5, 0.0, 0.25, 1.0, 1.5])
    scores = np.array(
        draw(st.lists(st.lists(values, min_size=c, max_size=c), min_size=q, max_size=q))
    )
    target = np.array(draw(st.lists(st.integers(0, c - 1), min_size=q, max_size=q)))
    seen = np.array(draw(st.lists(st.booleans(), min_size=c, max_size=c)))
    if both_sides:
        seen[:2] = [True, False]
        scores = np.vstack([scores, np.zeros((2, c))])
        target = np.append(target, [0, 1])
    return scores, target, seen


# ── the slow loops ───────────────────────────────────────────────────────────────────────────────────────────────────


def is_hit(row, target, seen, bias, k) -> bool:
    """Is the true pair among the top k once the bias is added? One image, sorted in plain Python.

    Seen wins between the sides on equality; inside a side the lower index does.
    """
    if row[target] == -np.inf:
        return False
    order = sorted(
        (c for c in range(len(row)) if row[c] > -np.inf),
        key=lambda c: (-(row[c] + (0 if seen[c] else bias)), not seen[c], c),
    )
    return target in order[:k]


def slow_points(scores, target, seen, k):
    """(S, U) before, at and between all biases at which anything can change."""
    finite = [row[np.isfinite(row)] for row in scores]
    changes = sorted({a - b for values in finite for a in values for b in values})
    biases = [-1e6]
    for i, change in enumerate(changes):
        after = changes[i + 1] if i + 1 < len(changes) else change + 2
        biases.append((change + after) / 2)
    biases[-1] = 1e6 if len(biases) > 1 else biases[-1]
    points = []
    for bias in biases:
        right = [is_hit(r, t, seen, bias, k) for r, t in zip(scores, target, strict=True)]
        of_seen = [h for h, t in zip(right, target, strict=True) if seen[t]]
        of_unseen = [h for h, t in zip(right, target, strict=True) if not seen[t]]
        points.append(
            (
                sum(of_seen) / len(of_seen) if of_seen else None,
                sum(of_unseen) / len(of_unseen) if of_unseen else None,
            )
        )
    return points


def slow_metrics(t: CompositionScores, k: int) -> dict[str, float]:
    points = slow_points(t.scores, t.target, t.seen, k)
    found: dict[str, float] = {}
    if points[0][0] is not None:
        found["best_seen"] = max(s for s, _ in points)
    if points[0][1] is not None:
        found["best_unseen"] = max(u for _, u in points)
    if len(found) == 2:
        found["auc"] = sum(
            (u1 - u0) * (s0 + s1) / 2 for (s0, u0), (s1, u1) in itertools.pairwise(points)
        )
        means = [2 * s * u / (s + u) if s and u else 0.0 for s, u in points]
        found["best_hm"] = max(means)
        found["hm_seen"], found["hm_unseen"] = points[means.index(max(means))]
    if k == 1:
        best = [
            next((c for c in range(len(row)) if row[c] == max(row) > -np.inf), None)
            for row in t.scores
        ]
        pairs = list(zip(best, t.target, strict=True))
        found["pair_acc"] = float(np.mean([b == y for b, y in pairs]))
        for name, part in (("attr_acc", 0), ("obj_acc", 1)):
            found[name] = float(
                np.mean([b is not None and PAIRS[b][part] == PAIRS[y][part] for b, y in pairs])
            )
    return found


def slow_legacy(t: CompositionScores, k: int):
    """Points (S, U, bias) by the numbered steps, one image and one bias at a time, in float32."""
    f = np.float32
    raw = [[f(-1e10) if x == -np.inf else f(x) for x in row] for row in t.scores]

    def top(row, gone, bias):
        shifted = [f(x) if t.seen[c] else f(f(x) + f(bias)) for c, x in enumerate(row)]
        shifted = [f(-1e10) if gone[c] else x for c, x in enumerate(shifted)]
        return sorted(range(len(row)), key=lambda c: (-shifted[c], c))[:k]

    def rates(bias):
        right: tuple[list, list] = ([], [])
        for row, original, y in zip(raw, t.scores, t.target, strict=True):
            gone = [x == -np.inf for x in original]
            right[int(not t.seen[y])].append(not gone[y] and y in top(row, gone, bias))
        return [float(np.mean(r)) for r in right], right

    end, (_, unseen_right) = rates(1000)
    unseen_rows = [i for i, y in enumerate(t.target) if not t.seen[y]]
    steps = []
    for i, right in zip(unseen_rows, unseen_right, strict=True):
        if right:
            kth = sorted((x for c, x in enumerate(raw[i]) if t.seen[c]), reverse=True)[k - 1]
            steps.append(f(f(kth - raw[i][t.target[i]]) - f(1e-4)))
    steps.sort()
    kept = steps[:: max(len(steps) // 20, 1)]
    return [(*rates(d)[0], d) for d in kept] + [(*end, 1000)]


# ── exact curve ──────────────────────────────────────────────────────────────────────────────────────────────────────


@quick
@given(tables(), st.integers(1, 4))
def test_every_metric_equals_the_slow_loop(drawn, k):
    t = composition(*drawn)
    k = min(k, t.scores.shape[1])
    fast, slow = evaluate(t, k=k), slow_metrics(t, k)
    assert set(fast) - {"bias_at_best_hm"} == set(slow)
    for name, value in slow.items():
        assert fast[name] == pytest.approx(value, abs=1e-12), name


@quick
@given(tables(both_sides=True), st.integers(1, 2))
def test_the_reported_bias_gives_the_reported_harmonic_mean(drawn, k):
    t = composition(*drawn)
    found = evaluate(t, k=k)
    if "bias_at_best_hm" in found:
        right = np.array(
            [
                is_hit(r, y, t.seen, found["bias_at_best_hm"], k)
                for r, y in zip(t.scores, t.target, strict=True)
            ]
        )
        assert right[t.seen_labelled].mean() == pytest.approx(found["hm_seen"])
        assert right[~t.seen_labelled].mean() == pytest.approx(found["hm_unseen"])


def test_the_ten_keys_are_there_and_no_other():
    rng = np.random.default_rng(0)
    t = composition(rng.normal(size=(30, 7)), np.arange(30) % 7, np.arange(7) < 4)
    for kind in ("exact", "legacy"):
        assert set(evaluate(t, curve=kind)) == {
            *("auc", "best_hm", "best_seen", "best_unseen", "hm_seen", "hm_unseen"),
            *("bias_at_best_hm", "pair_acc", "attr_acc", "obj_acc"),
        }


def test_primitive_accuracies_are_not_reported_beyond_the_best_pair():
    t = composition(
        np.random.default_rng(1).normal(size=(9, 5)), np.arange(9) % 5, np.arange(5) < 3
    )
    assert not {"pair_acc", "attr_acc", "obj_acc"} & set(evaluate(t, k=2))


def test_an_unbounded_best_bias_is_an_absent_key():
    t = composition([[1.0, 0.0], [0.0, 1.0]], [0, 1], [True, False])
    shifted = composition([[9.0, -np.inf], [-np.inf, 9.0]], [0, 1], [True, False])
    assert evaluate(t)["bias_at_best_hm"] == 0
    assert "bias_at_best_hm" not in evaluate(shifted)
    assert evaluate(shifted)["best_hm"] == 1
    assert evaluate(shifted)["auc"] == 0  # the curve is one point: nothing is added at its ends


@pytest.mark.parametrize(
    ("seen", "key", "absent"),
    [(True, "best_seen", "best_unseen"), (False, "best_unseen", "best_seen")],
)
def test_an_empty_side_leaves_its_extreme_and_the_accuracies(seen, key, absent):
    flags = np.array([seen, seen, not seen])
    t = composition([[1.0, 0, 3], [2.0, 1, 0]], [0, 1], flags)
    for kind in ("exact", "legacy"):
        found = evaluate(t, curve=kind)
        assert set(found) == {key, "pair_acc", "attr_acc", "obj_acc"}
        assert absent not in czsl.chance(t)
    assert evaluate(t)[key] == 0.5


def test_a_perfect_scorer_gets_one():
    target = np.arange(24) % 6
    t = composition(
        5 * np.eye(6)[target] + np.linspace(0, 0.3, 24)[:, None], target, np.arange(6) < 3
    )
    found = evaluate(t)
    for name in set(found) - {"bias_at_best_hm"}:
        assert found[name] == pytest.approx(1), name


def test_a_constant_scorer_is_read_by_the_tie_rules():
    t = composition(np.zeros((6, 4)), [0, 1, 2, 3, 0, 2], [True, True, False, False])
    found = evaluate(t)
    assert found["pair_acc"] == pytest.approx(2 / 6)  # the lowest column is the prediction
    assert found["best_seen"] == pytest.approx(2 / 3)
    assert found["best_unseen"] == pytest.approx(2 / 3)
    assert found["auc"] == pytest.approx(2 / 9)  # one slanted edge: ties count one half


def test_a_row_without_any_candidate_predicts_nothing():
    t = composition([[-np.inf, -np.inf], [0.0, -1.0]], [0, 0], [True, False])
    assert evaluate(t)["pair_acc"] == 0.5
    assert evaluate(t)["attr_acc"] == 0.5


def test_blocks_of_rows_join_to_the_same_curve(monkeypatch):
    rng = np.random.default_rng(2)
    t = composition(
        rng.normal(size=(50, 7)).astype(np.float32), rng.integers(7, size=50), np.arange(7) < 4
    )
    whole = evaluate(t)
    parts = [
        composition_table.reduce_rows(t.scores[i : i + 3], t.target[i : i + 3], t.seen)
        for i in range(0, 50, 3)
    ]
    joined = curve.trace(curve.Thresholds.join(parts))
    assert np.array_equal(joined.seen, czsl.exact_curve(t).seen)
    monkeypatch.setattr(table, "CELLS_PER_BLOCK", 10)
    assert evaluate(t) == whole
    assert evaluate(t, curve="legacy")["auc"] == pytest.approx(whole["auc"], abs=0.05)


@quick
@given(tables(both_sides=True))
def test_the_curve_is_monotone_and_the_harmonic_mean_lies_between_its_parts(drawn):
    t = composition(*drawn)
    points = czsl.exact_curve(t)
    assert (np.diff(points.seen) <= 0).all()
    assert (np.diff(points.unseen) >= 0).all()
    found = evaluate(t)
    low, high = sorted((found["hm_seen"], found["hm_unseen"]))
    if found["best_hm"]:
        assert low - 1e-12 <= found["best_hm"] <= (low + high) / 2 + 1e-12
    assert 0 <= found["auc"] <= found["best_seen"] * found["best_unseen"] + 1e-12


@quick
@given(tables(both_sides=True), st.integers(0, 99))
def test_permuting_images_or_adding_a_constant_per_image_changes_nothing(drawn, seed):
    t = composition(*drawn)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(t.target))
    shift = rng.choice([-4.0, 0.5, 8.0], size=(len(order), 1))
    other = composition(t.scores[order] + shift, t.target[order], t.seen)
    assert evaluate(other) == pytest.approx(evaluate(t))


def test_a_softmax_per_image_changes_the_curve():
    # Margins of the seen-labelled images are 1 and 2, of the unseen-labelled one -1.5: a softmax reorders them, because
    # the third image's large scores leave it a margin near 0 only.
    scores = np.array([[1.0, -9.0, 0.0], [-9.0, 2.0, 0.0], [9.5, 9.0, 8.0]])
    t = composition(scores, [0, 1, 2], [True, True, False])
    softmaxed = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    other = composition(softmaxed, t.target, t.seen, space="probability")
    assert evaluate(t)["pair_acc"] == evaluate(other)["pair_acc"]
    assert evaluate(t)["auc"] != evaluate(other)["auc"]


def test_one_positive_factor_for_all_scores_changes_only_the_bias():
    rng = np.random.default_rng(3)
    t = composition(rng.normal(size=(40, 6)), rng.integers(6, size=40), np.arange(6) < 3)
    scaled, plain = evaluate(composition(4 * t.scores, t.target, t.seen)), evaluate(t)
    assert scaled.pop("bias_at_best_hm") == pytest.approx(4 * plain.pop("bias_at_best_hm"))
    assert scaled == plain


# ── legacy ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@quick
@given(tables(both_sides=True), st.integers(1, 2))
def test_the_legacy_curve_equals_its_numbered_steps(drawn, k):
    t = composition(*drawn)
    k = min(k, int(t.seen.sum()))
    slow = np.array(slow_legacy(t, k), dtype=np.float64)
    fast = legacy.legacy_curve(t, k)
    np.testing.assert_allclose(np.stack([fast.seen, fast.unseen, fast.bias], 1), slow, atol=1e-12)
    found = evaluate(t, k=k, curve="legacy")
    assert found["auc"] == pytest.approx(np.trapezoid(slow[:, 0], slow[:, 1]))


@pytest.mark.parametrize(("n", "kept"), [(19, 19), (39, 39), (40, 20), (41, 21), (60, 20)])
def test_about_twenty_legacy_biases_are_kept(n, kept):
    scores = np.stack([np.zeros(n), np.linspace(1, 2, n)], 1)
    t = composition(np.vstack([scores, [[5.0, 0.0]]]), [*[1] * n, 0], [True, False])
    assert len(legacy.legacy_curve(t).bias) == kept + 1


def test_a_perfect_model_scores_0_979_on_the_legacy_curve_with_24_unseen_images():
    rng = np.random.default_rng(4)
    target = np.arange(48) % 4
    scores = 20 * np.eye(4)[target] + rng.random((48, 4))
    t = composition(scores, target, [True, True, False, False])
    assert evaluate(t, curve="legacy")["auc"] == pytest.approx(1 - 1 / 48, abs=1e-9)
    assert round(1 - 1 / 48, 3) == 0.979
    assert evaluate(t)["auc"] == pytest.approx(1)


def test_without_an_unseen_hit_only_the_legacy_end_point_is_left():
    scores = [[5.0, 0.0, 0.0], [5.0, 0.0, 3.0]]
    t = composition(scores, [0, 1], [True, False, False])
    found = evaluate(t, curve="legacy")
    assert found["auc"] == found["best_hm"] == found["best_seen"] == 0
    assert found["bias_at_best_hm"] == 1000
    assert evaluate(t)["best_seen"] == 1


def test_adding_1000_in_float32_rounds_small_scores():
    assert float(np.float32(0.2064) + legacy.END_BIAS - legacy.END_BIAS) != pytest.approx(
        0.2064, abs=1e-6
    )
    assert np.spacing(np.float32(1000)) == pytest.approx(6.1e-5, rel=0.01)


@pytest.mark.parametrize("space", ["cosine", "probability"])
def test_the_legacy_curve_warns_where_it_distorts(space):
    t = composition([[0.2, 0.1], [0.1, 0.2]], [0, 1], [True, False], space=space)
    with pytest.warns(EvalWarning, match=f"{space}.*0.2064 → 0.1978"):
        evaluate(t, curve="legacy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(t)


def test_legacy_and_exact_agree_on_many_images():
    rng = np.random.default_rng(5)
    target = rng.integers(12, size=6000)
    scores = rng.normal(size=(6000, 12)) + 1.5 * np.eye(12)[target]
    t = composition(scores, target, np.arange(12) < 6)
    exact, legacy = evaluate(t), evaluate(t, curve="legacy")
    assert legacy["auc"] < exact["auc"]
    assert legacy["auc"] == pytest.approx(exact["auc"], abs=0.003)
    assert legacy["best_hm"] == pytest.approx(exact["best_hm"], abs=0.006)


# ── chance ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("k", [1, 2])
def test_chance_is_what_random_scores_get(k):
    """200,000 images: a share of 1/5 then has a standard error of 0.001; the tolerance is four of them."""
    rng = np.random.default_rng(6)
    q, c = 200_000, 12
    t = composition(rng.normal(size=(q, c)), rng.integers(c, size=q), np.arange(c) < 5)
    found, lines = evaluate(t, k=k), czsl.chance(t, k=k)
    assert ("auc" in lines) == (k == 1)
    for name, value in lines.items():
        assert found[name] == pytest.approx(value, abs=0.006 if name == "best_hm" else 0.004), name


def test_chance_of_mit_states_is_the_documented_one():
    n, m = 1262, 400
    assert 1 / (2 * n * m) == pytest.approx(1.0e-6, rel=0.02)
    assert 2 / (np.sqrt(n) + np.sqrt(m)) ** 2 == pytest.approx(6.5e-4, rel=0.02)


def test_chance_counts_only_columns_that_compete():
    scores = np.zeros((2, 4))
    scores[:, 3] = -np.inf
    t = composition(scores, [0, 2], [True, True, False, False])
    assert czsl.chance(t)["best_unseen"] == 1
    assert czsl.chance(t)["pair_acc"] == pytest.approx(1 / 3)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scores": np.array([[0.0, np.nan, 1], [0, 0, 0]])},
            r"query 0 \(photo7\).*column 1 \(pair \('red', 'cup'\)\).*nan",
        ),
        (
            {"scores": np.array([[0.0, 1, 1], [0, 0, np.inf]])},
            r"query 1 \(photo8\).*\('old', 'hat'\).*inf",
        ),
        ({"scores": np.zeros((2, 3), dtype=np.float16)}, "float16.*artificial ties"),
        ({"scores": np.zeros((0, 3)), "target": np.zeros(0, int), "ids": ()}, "empty split"),
        ({"scores": np.zeros(3)}, r"\(3,\)"),
        ({"target": np.array([0])}, r"target \(2,\).*got target \(1,\)"),
        ({"target": np.array([0, 3])}, "columns 0 to 2.*0 to 3"),
        ({"target": np.array([-1, 2])}, "columns 0 to 2.*-1 to 2"),
        ({"target": np.array([0.0, 1.0])}, "integers"),
        ({"seen": np.array([1, 0, 1])}, "seen must be bool"),
        ({"seen": np.array([True])}, r"seen \(1,\)"),
        (
            {"pairs": np.array([["red", "hat"], ["red", "cup"], ["red", "hat"]])},
            r"\('red', 'hat'\) is a candidate 2 times",
        ),
        ({"space": "distance"}, "'distance'.*cosine, logit, probability"),
        ({"split": ""}, "split"),
        ({"ids": ("a", "a")}, "2 ids, 1 of them different"),
        ({"ids": ("a",)}, "1 ids"),
    ],
)
def test_a_table_that_cannot_give_an_honest_number_is_refused(change, message):
    good = {
        "scores": np.zeros((2, 3)),
        "target": np.array([0, 2]),
        "pairs": np.array([["red", "hat"], ["red", "cup"], ["old", "hat"]]),
        "seen": np.array([True, True, False]),
        "split": "test",
        "space": "logit",
        "ids": ("photo7", "photo8"),
    }
    CompositionScores(**good)
    with pytest.raises(ScoreTableError, match=message):
        CompositionScores(**(good | change))


@pytest.mark.parametrize("k", [0, 4])
def test_a_k_that_does_not_exist_is_refused(k):
    t = composition(np.zeros((2, 3)), [0, 2], [True, True, False])
    with pytest.raises(ScoreTableError, match=f"k = {k} was asked for, but there are 3"):
        evaluate(t, k=k)


def test_the_legacy_curve_needs_k_seen_pairs():
    t = composition(np.zeros((2, 3)), [0, 2], [True, False, False])
    with pytest.raises(ScoreTableError, match="seen pairs, = 2 was asked for, but there are 1"):
        evaluate(t, k=2, curve="legacy")


def test_integer_scores_and_pairs_by_name_are_taken():
    t = CompositionScores(
        np.array([[3, 1], [0, 2]]),
        np.array([0, 1]),
        [("red", "hat"), ("old", "hat")],
        np.array([True, False]),
        "test",
        "logit",
    )
    assert t.scores.dtype == np.float64
    assert evaluate(t)["obj_acc"] == 1


def test_an_unknown_curve_is_refused():
    """Without the type checks of the tests, which a user does not have."""
    t = composition(np.eye(2), [0, 1], [True, False])
    with pytest.raises(ScoreTableError, match=r"no curve 'exakt'; did you mean 'exact'.*legacy"):
        inspect.unwrap(evaluate)(t, curve="exakt")
    with pytest.raises(ScoreTableError, match=r"no curve 'x' \(known: exact, legacy\)"):
        inspect.unwrap(evaluate)(t, curve="x")


@pytest.mark.parametrize(
    ("dead", "absent"),
    [
        ([True, True], {"auc", "best_hm", "best_seen", "best_unseen", "pair_acc", "attr_acc"}),
        ([True, False], {"auc", "best_hm", "best_seen"}),
        ([False, True], {"auc", "best_hm", "best_unseen"}),
    ],
)
def test_without_a_candidate_there_is_no_chance(dead, absent):
    t = composition(np.where(dead, -np.inf, np.eye(2)), [0, 1], [True, False])
    found = czsl.chance(t)
    assert not set(found) & absent
    assert set(found) < set(evaluate(t))
    assert ("pair_acc" in found) == (not all(dead))
