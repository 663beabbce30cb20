"""Matching against the slow loop written from its definition, and against published outcomes."""

import csv
import os
from pathlib import Path

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
    plain, typed = (
        ["swap", "add_", "_replace"],
        ["swap_att", "swap_obj", "add_obj", "replace_of_two"],
    )
    kinds = st.sampled_from(draw(st.sampled_from([plain, typed, [*typed, "swap"]])))
    return scores, draw(st.lists(kinds, min_size=n, max_size=n))


def slow(scores, kinds, name) -> dict[str, float]:
    """One metric by counting: overall, by category, by type where all have one, and the two means."""
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
    by_kind, by_type = {}, {}
    for answer, kind in zip(right, kinds, strict=True):
        by_kind.setdefault(kind, []).append(answer)
        halves = kind.split("_", 1)
        by_type.setdefault(halves[0] if len(halves) == 2 and all(halves) else None, []).append(
            answer
        )
    groups = dict(by_kind)
    if None not in by_type:
        groups |= by_type
        shares = [sum(g) / len(g) for g in by_type.values()]
        found[f"{name}/mean_of_types"] = sum(shares) / len(shares)
    shares = [sum(g) / len(g) for g in by_kind.values()]
    found[f"{name}/macro_{len(by_kind)}"] = sum(shares) / len(shares)
    return found | {f"{name}/{kind}": sum(g) / len(g) for kind, g in groups.items()}


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
    kinds = np.array(["swap_att", "add_att", "add_obj"])
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
    kinds = np.array(["swap_att", "add_att", "add_obj", "swap_obj"] * 25_000)
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
        ({"category": np.array(["swap", "mean_of_types"])}, "'mean_of_types'.*rename"),
        ({"category": np.array(["macro_7", "swap"])}, "'macro_7'.*rename"),
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


# ── published outcomes ───────────────────────────────────────────────────────────────────────────────────────────────

OFFICIAL = Path(os.environ.get("HEADSTART_OFFICIAL_DATA", "/nowhere"))
needs_outcomes = pytest.mark.skipif(
    not (OFFICIAL / "bivlc_results").is_dir(),
    reason="HEADSTART_OFFICIAL_DATA must name a folder with bivlc_results/, the per-item outcomes BiVLC_<model>.csv "
    "and SUGARCREPE_CORRECT_<model>.csv of github.com/IMirandaM/BiVLC (commit 84f0d17)",
)

# ALL, REPLACE, SWAP, ADD: i2t, t2i, group in percent, as its authors print them (arXiv 2406.09952)
BIVLC = {
    "ViT-B-32": "75.83/52.40/49.06 82.09/60.36/57.27 46.52/16.16/13.65 70.32/44.63/39.58",
    "CLIP_COCO": "82.75/63.89/60.96 87.99/72.42/69.94 51.53/25.07/20.89 83.16/55.58/51.58",
    "CLIP_TROHN-Text": "78.18/62.19/57.48 83.61/70.03/65.84 54.32/25.35/20.61 72.21/55.37/48.42",
    "CLIP_TROHN-Img": "88.54/71.84/69.25 91.62/79.18/76.61 62.40/32.03/27.86 94.74/69.47/68.00",
}
SUGARCREPE = {
    "ViT-B-32": "68.79 77.21 80.08 90.92 69.20 63.96 61.38 75.09 80.76 63.27 73.04 73.08 76.56",
    "CLIP_TROHN-Img": "94.08 95.59 88.45 94.37 84.00 73.12 69.11 95.21 89.37 72.04 85.54 85.53 89.40",
}
SUBSETS = [
    *("add_att", "add_obj"),
    *("replace_att", "replace_obj", "replace_rel"),
    *("swap_att", "swap_obj"),
]


def outcomes_of(name: str) -> list[dict[str, str]]:
    with (OFFICIAL / "bivlc_results" / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def category_of(rows: list[dict[str, str]]) -> list[str]:
    return [f"{row['type']}_{row['subtype']}" for row in rows]


def table_with(wins: list[bool]) -> np.ndarray:
    """Scores (2, 2) whose comparisons i2t_0, i2t_1, t2i_0, t2i_1 come out as told; cycles cannot be."""
    best = {
        (a, b, c, d): np.array([[w, x], [y, z]], float)
        for w, x, y, z in np.ndindex(4, 4, 4, 4)
        for a, b, c, d in [(w > x, z > y, w > y, z > x)]
    }
    a, b, c, d = wins
    return best[a, b, c, d]


@needs_outcomes
@pytest.mark.parametrize("model", BIVLC)
def test_published_outcomes_of_bivlc_give_the_published_table(model):
    rows = outcomes_of(f"BiVLC_{model}")
    atoms = ("text_score_i0", "text_score_i1", "image_score_c0", "image_score_c1")
    wins = [[row[name] == "True" for name in atoms] for row in rows]
    scores = np.stack([table_with(won) for won in wins])
    items = MatchingScores(scores, category_of(rows), "cosine")
    for i, name in enumerate(("i2t_0", "i2t_1", "t2i_0", "t2i_1")):
        assert matching.outcomes(items)[name].tolist() == [won[i] for won in wins]
    found = evaluate(items)
    groups = ("", "/replace", "/swap", "/add")
    printed = " ".join(
        "/".join(f"{100 * found[name + group]:.2f}" for name in ("i2t", "t2i", "group_score"))
        for group in groups
    )
    assert (len(rows), printed) == (2933, BIVLC[model])
    for name, theirs in (("i2t", "text_score"), ("t2i", "image_score"), ("group_score",) * 2):
        assert found[name] == np.mean([row[theirs] == "True" for row in rows])
    if model == "ViT-B-32":
        by_subtype = [
            "/".join(
                f"{100 * found[f'{m}/swap_{kind}']:.2f}" for m in ("i2t", "t2i", "group_score")
            )
            for kind in ("att", "obj")
        ]
        assert by_subtype == ["46.76/17.27/14.75", "45.68/12.35/9.88"]


@needs_outcomes
@pytest.mark.parametrize("model", SUGARCREPE)
def test_published_outcomes_of_sugarcrepe_give_the_published_row(model):
    rows = outcomes_of(f"SUGARCREPE_CORRECT_{model}")
    right = np.array([int(row["correct"]) for row in rows])
    items = MatchingScores(
        np.stack([right, np.full(len(rows), 0.5)], 1), category_of(rows), "cosine"
    )
    found = evaluate(items)
    names = [*SUBSETS, "add", "replace", "swap", "mean_of_types", "macro_7"]
    printed = [f"{100 * found[f'accuracy/{name}']:.2f}" for name in names]
    printed.append(f"{100 * found['accuracy']:.2f}")
    assert (len(rows), printed) == (7512, SUGARCREPE[model].split())


# ── types ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_items_are_pooled_within_a_type_and_types_weigh_alike():
    """swap: 1 of 3 right, add: 1 of 1; by category 1/1, 0/2, 1/1."""
    right = np.array([1.0, 0, 0, 1])
    kinds = ["swap_att", "swap_obj", "swap_obj", "add_obj"]
    found = evaluate(MatchingScores(np.stack([right, np.full(4, 0.5)], 1), kinds, "logit"))
    assert found["accuracy/swap"] == pytest.approx(1 / 3)
    assert found["accuracy/mean_of_types"] == pytest.approx(2 / 3)
    assert found["accuracy/macro_3"] == pytest.approx(2 / 3)
    assert found["accuracy"] == 0.5


def test_the_mean_over_categories_says_over_how_many():
    five = [f"swap_{i}" for i in range(5)]
    found = evaluate(MatchingScores(np.eye(5)[:, :2], five, "logit"))
    assert "accuracy/macro_5" in found
    assert "accuracy/macro_7" not in found


def test_categories_without_types_are_not_pooled():
    """Winoground's tags; one of many without an underscore is enough."""
    table = MatchingScores(np.zeros((3, 2, 2)), ["Object", "Both", "a_b"], "logit")
    assert table.types == ()
    assert not any("types" in name or name.endswith("/a") for name in evaluate(table))
