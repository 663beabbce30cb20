"""Which items rows get right, how far two rows agree on them, and which items go wrong most."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from test_eval_leaderboard import write_run
from test_eval_report import data_of

from eval import score_io
from eval.agreement import agreement, agreements, circles, kappa
from eval.comparison import compare
from eval.composed_table import ComposedQueries, ComposedScores
from eval.composition import CompositionScores
from eval.correctness import majority, right_items, right_seeds, wrong_share
from eval.diagnostics import best_hm_bias
from eval.errors import RunError
from eval.failures import hardest
from eval.matching import MatchingScores
from eval.report import report
from eval.retrieval import RetrievalScores
from eval.runs import read_runs

PAIRS = np.array([["red", "hat"], ["old", "hat"], ["red", "cup"], ["old", "cup"], ["wet", "cup"]])
SEEN = np.array([True, True, True, False, False])
RIGHT = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30)


def czsl_table(seed: int, strength: float = 1.5) -> CompositionScores:
    target = np.arange(35) % 5
    scores = np.random.default_rng(seed).normal(size=(35, 5)) + strength * np.eye(5)[target]
    return CompositionScores(scores + 2 * SEEN, target, PAIRS, SEEN, "test", "logit")


def matching_table(seed: int, shape: tuple[int, ...] = (2, 2)) -> MatchingScores:
    scores = np.random.default_rng(seed).integers(0, 4, size=(21, *shape)).astype(float)
    return MatchingScores(scores, np.array(["swap", "add", "replace"] * 7), "cosine", "test")


def composed_table(seed: int, q: int = 6) -> ComposedScores:
    images = [f"img{i}" for i in range(9)]
    queries = ComposedQueries(
        ids=[f"q{i}" for i in range(q)],
        reference=[f"img{i}" for i in range(q)],
        targets=[[f"img{i + 1}"] for i in range(q)],
        protocol="own",
        split="test",
        gallery="test",
        categories=[["add"] if i % 2 else ["remove"] for i in range(q)],
    )
    scores = np.random.default_rng(seed).integers(0, 6, size=(q, 9)).astype(float)
    scores[0, 1] = scores[0, 5] = 9  # the right image and a wrong one behind it, equally good
    return ComposedScores(scores, images, queries, "cosine")


# ── what is right ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_pair_is_right_at_the_bias_of_the_best_harmonic_mean():
    table = czsl_table(0)
    bias = best_hm_bias(table)
    assert bias is not None
    found = right_items(table)
    for i, row in enumerate(table.scores):
        moved = [score + (0 if SEEN[c] else bias) for c, score in enumerate(row)]
        assert found[i] == (moved.index(max(moved)) == table.target[i])
    unbiased = table.scores.argmax(1) == table.target
    assert found[~SEEN[table.target]].sum() > unbiased[~SEEN[table.target]].sum()


def test_an_item_of_matching_is_right_where_all_comparisons_are():
    table = matching_table(0)
    for right, s in zip(right_items(table), table.scores, strict=True):
        images = s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0]
        captions = s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1]
        assert right == (images and captions)
    table = matching_table(1, (2,))
    for right, s in zip(right_items(table), table.scores, strict=True):
        assert right == (s[0] > s[1])


def test_a_query_is_right_where_a_right_answer_beats_every_wrong_one():
    scores = np.array([[0.5, 0.5, 0.1], [0.2, 0.9, 0.1], [0.1, 0.2, 0.3]])
    table = RetrievalScores(scores, np.eye(3, dtype=bool), "cosine", "test")
    assert right_items(table).tolist() == [False, True, True]
    asked = composed_table(3)
    for i, right in enumerate(right_items(asked)):
        row = asked.scores[i]
        target = asked.lookup(i)[asked.queries.targets[i][0]]
        assert right == all(row[target] > row[c] for c in range(9) if c != target)


def test_the_majority_is_more_than_half_of_the_seeds():
    seeds = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 0]], dtype=bool)
    assert majority(seeds).tolist() == [True, False, True, False]
    assert majority(seeds[:2]).tolist() == [True, False, False, False]
    assert wrong_share([seeds, seeds[:1]]).tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])


# ── agreement ────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(RIGHT)
def test_agreement_counts_what_a_loop_counts(items):
    a, b = (np.array(column) for column in zip(*items, strict=True))
    n = len(items)
    found = agreement(0, 1, a, b)
    assert found.both == pytest.approx(sum(x and y for x, y in items) / n)
    assert found.first == pytest.approx(sum(x and not y for x, y in items) / n)
    assert found.second == pytest.approx(sum(y and not x for x, y in items) / n)
    assert found.neither == pytest.approx(sum(not (x or y) for x, y in items) / n)
    assert found.oracle == pytest.approx(sum(x or y for x, y in items) / n)
    assert found.oracle >= max(a.mean(), b.mean()) - 1e-12


@given(RIGHT)
def test_kappa_is_cohens_by_definition(items):
    a, b = (np.array(column) for column in zip(*items, strict=True))
    observed = float((a == b).mean())
    expected = float(a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean()))
    found = kappa(a, b)
    if expected == 1:
        assert found is None
    else:
        assert found is not None
        assert found == pytest.approx((observed - expected) / (1 - expected), abs=1e-9)
        assert kappa(b, a) == pytest.approx(found)


@given(RIGHT)
def test_a_row_agrees_with_itself(items):
    a = np.array([x for x, _ in items])
    assume(a.any() and not a.all())
    assert kappa(a, a) == pytest.approx(1)
    assert agreement(0, 0, a, a).oracle == pytest.approx(a.mean())


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for b, backbone in enumerate(("clip:demo", "pe:demo")):
        for m, method in enumerate(("zero_shot", "csp", "only_pe")):
            if (method, b) == ("only_pe", 0):
                continue
            for seed in (0, 1, 2) if m == 1 else (0,):
                write_run(root, method, backbone, seed, czsl_table(9 * b + 3 * m + seed, 1 + m))
    return root


def test_rows_meet_those_of_their_method_and_of_their_backbone(runs):
    (c, _) = compare(read_runs([runs]))
    labels = [row.group.label for row in c.rows]
    met = {circle.name: [labels[i] for i in circle.rows] for circle in circles(c.rows)}
    assert list(met) == ["zero_shot", "csp", "clip:demo", "pe:demo"]
    assert met["csp"] == ["csp · clip:demo", "csp · pe:demo"]
    assert len(met["pe:demo"]) == 3


def test_agreements_are_of_the_majority_of_seeds(runs):
    (c, _) = compare(read_runs([runs]))
    right, pairs = agreements(c)
    of_row = [
        [sum(bool(right_items(t)[i]) for t in row.group.tables) * 2 > len(row.group.tables) for i in range(35)]
        for row in c.rows
    ]  # fmt: skip
    assert right == pytest.approx([np.mean(row) for row in of_row])
    assert len(pairs) == 10
    for (i, j), found in pairs.items():
        both = np.mean([x and y for x, y in zip(of_row[i], of_row[j], strict=True)])
        assert found.both == pytest.approx(both)


def test_the_page_has_a_matrix_for_each_circle_and_all_pairs_as_csv(runs, tmp_path):
    text = report([runs], tmp_path / "r.html")[0].read_text(encoding="utf-8")
    part = text[text.index("Which rows get the same") :].partition("<h3>")[0]
    assert part.count("<table>") == 4
    (c, _) = compare(read_runs([runs]))
    right, pairs = agreements(c)
    rows = data_of(text)["agreement.csv"]
    assert len(rows) == len(pairs)
    for row, found in zip(rows, pairs.values(), strict=True):
        assert float(row["oracle"]) == pytest.approx(found.oracle, abs=1e-5)
        assert float(row["kappa"]) == pytest.approx(found.kappa, abs=1e-5)
    zero_shot = part[: part.index("</table>")]
    square = re.findall(r"<td[^>]*>([^<]+)(?:<small class=soft>(\w+) ([^<]+))?", zero_shot)
    found = pairs[
        0, next(i for i, r in enumerate(c.rows) if r.group.label == "zero_shot · pe:demo")
    ]
    assert square[0][0] == f"{100 * right[0]:.1f}"
    assert square[1] == (f"{found.kappa:.2f}", "oracle", f"{100 * found.oracle:.1f}")
    assert square[2] == (f"{100 * found.second:.1f}", "column", f"{100 * found.first:.1f}")


# ── what goes wrong most ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_hardest_items_are_those_wrong_most_often_then_furthest_off(runs):
    (c, _) = compare(read_runs([runs]))
    wrong = [
        np.mean([np.mean([not right_items(t)[i] for t in row.group.tables]) for row in c.rows])
        for i in range(35)
    ]

    def far(i: int) -> float:
        off = []
        for row in c.rows:
            table = row.group.tables[0]
            assert isinstance(table, CompositionScores)
            guess = PAIRS[table.sides().at(best_hm_bias(table))[i]]
            off.append(np.mean(guess != PAIRS[table.target[i]]))
        return float(np.mean(off))

    expected = sorted(
        (i for i in range(35) if wrong[i] > 0),
        key=lambda i: (-round(wrong[i], 9), -round(far(i), 9), i),
    )
    found = hardest(c, 35)
    assert [f.number for f in found] == expected
    for failure in found:
        assert failure.wrong == pytest.approx(wrong[failure.number])
        assert failure.asked == " ".join(PAIRS[failure.number % 5])
        for row, answer in zip(c.rows, failure.answers, strict=True):
            assert answer.is_right == (answer.words == failure.asked)
            assert answer.is_right == right_seeds(row)[0, failure.number]
    assert hardest(c, 3) == found[:3]


def test_matching_says_which_comparisons_are_lost(tmp_path):
    scores = np.array(
        [[[3, 1], [1, 3]], [[1, 3], [3, 1]], [[3, 3], [0, 4]], [[3, 1], [4, 5]]], dtype=float
    )
    table = MatchingScores(scores, ["swap", "add", "swap", "add"], "cosine", "test", list("abcd"))
    write_run(tmp_path, "a", "clip:demo", 0, table)
    (c,) = compare(read_runs([tmp_path]))
    found = {f.name: f.answers[0] for f in hardest(c)}
    assert list(found) == ["b", "c", "d"]
    assert found["b"].words == "all four"
    assert found["c"].words == "image 1 → caption 2"
    assert found["d"].words == "caption 1 → image 2"
    assert not any(answer.is_right for answer in found.values())


def test_a_head_that_is_always_right_has_no_failures(tmp_path):
    scores = np.tile(np.array([[2.0, 0.0]]), (5, 1))
    write_run(tmp_path, "a", "clip:demo", 0, MatchingScores(scores, ["x"] * 5, "cosine", "test"))
    (c,) = compare(read_runs([tmp_path]))
    assert hardest(c) == []
    text = report([tmp_path], tmp_path / "r.html")[0].read_text(encoding="utf-8")
    assert "What goes wrong most" not in text


def test_a_composed_answer_is_the_image_ranked_first_a_wrong_one_on_a_tie(tmp_path):
    write_run(tmp_path, "a", "clip:demo", 0, composed_table(3))
    (c,) = compare(read_runs([tmp_path]))
    table = composed_table(3)
    found = hardest(c)
    assert next(f.answers[0].image for f in found if f.number == 0) == "img5"
    for failure in found:
        row, target = table.scores[failure.number], failure.number + 1
        best = [i for i in range(9) if row[i] == row.max()]
        expected = next((i for i in best if i != target), best[0])
        assert failure.answers[0].image == f"img{expected}"
        rank = sum(row[i] >= row[target] for i in range(9))
        assert failure.answers[0].words == f"right one: rank {rank} of 9"
        assert (failure.reference, failure.target) == (f"img{failure.number}", f"img{target}")
    ranks = [sum(table.scores[f.number] >= table.scores[f.number][f.number + 1]) for f in found]
    assert ranks == sorted(ranks, reverse=True)


def query_file(run: Path, number: int, **change) -> None:
    """Query `number`: red is its reference, the images of two others blue."""
    red, blue = (np.full((4, 4, 3), colour, np.uint8) for colour in ((250, 0, 0), (0, 0, 250)))
    arrays = {
        "reference": red,
        "edit": np.array(["remove <it>"]),
        "images": np.stack([blue, blue]),
        "names": np.array([f"img{number + 1}", "img8"]),
        "scores": np.array([0.5, 0.25]),
        "hits": np.array([True, False]),
        "rank": np.int64(1),
        "competing": np.int64(9),
        "id": np.array(f"q{number}"),
    } | change
    (run / "pictures").mkdir(exist_ok=True)
    np.savez(run / "pictures" / f"query-{number:02d}.npz", **arrays)


def test_pictures_of_any_run_are_shown_once_and_ids_where_there_is_none(tmp_path):
    run = write_run(tmp_path / "runs", "a", "clip:demo", 0, composed_table(3))
    write_run(tmp_path / "runs", "b", "pe:demo", 0, composed_table(4))
    query_file(run, 2)
    text = report([tmp_path / "runs"], tmp_path / "r.html")[0].read_text(encoding="utf-8")
    part = text[text.index("What goes wrong most") :]
    part = part[: part.index("</table>")]
    assert "“remove &lt;it&gt;”" in part
    assert 'aria-label="reference img2"' in part
    shown = len(re.findall(r"--shot-\d+:url\(data:image/png", part))
    assert shown == len(set(re.findall(r"var\(--shot-(\d+)\)", part)))
    assert "reference: img0" in part
    query_file(run, 2, scores=np.zeros(3))
    with pytest.raises(RunError, match=r"query-02\.npz must hold reference"):
        report([tmp_path / "runs"], tmp_path / "r.html")


def test_pictures_of_another_data_set_are_not_shown(tmp_path):
    """Trained and drawn on toy_world; the table of the comparison was scored on another."""
    run = write_run(tmp_path / "runs", "a", "clip:demo", 0, composed_table(3))
    (run / "scores-test.zarr").rename(run / "gone")
    record = json.loads((run / "run.json").read_text())
    record["cache"] = {"dataset": {"name": "cirr"}}
    score_io.save(composed_table(3), run / "scores-elsewhere.zarr", run=record)
    query_file(run, 2, id=np.array("another"))
    text = report([run], tmp_path / "r.html")[0].read_text(encoding="utf-8")
    part = text[text.index("What goes wrong most") :].partition("</table>")[0]
    assert "--shot-" not in part


def failures_file(run: Path, table: CompositionScores, **change) -> None:
    """Every image of a table is red."""
    items = np.asarray(table.ids)
    arrays = {
        "items": items,
        "shows": items[:, None],
        "says": np.empty((len(items), 0), str),
        "names": items,
        "images": np.full((len(items), 4, 4, 3), (250, 0, 0), np.uint8),
        "texts": np.empty(0, str),
        "strings": np.empty(0, str),
        "kind": np.array("czsl"),
        "variant": np.array(""),
        "split": np.array("test"),
        "dataset": np.array("toy_world"),
    } | change
    (run / "pictures").mkdir(exist_ok=True)
    np.savez(
        run / "pictures" / "failures.npz", **{k: v for k, v in arrays.items() if v is not None}
    )


def wrong_most(root: Path, out: Path) -> str:
    text = report([root], out)[0].read_text(encoding="utf-8")
    return text[text.index("What goes wrong most") :].partition("</table>")[0]


def test_failures_of_any_task_have_their_pictures_if_they_are_of_its_items(tmp_path):
    table = czsl_table(3)
    table = replace(table, ids=[f"img<{i}>" for i in range(35)])
    run = write_run(tmp_path / "runs", "a", "clip:demo", 0, table)
    shown = hardest(compare(read_runs([run]))[0])
    failures_file(run, table)
    part = wrong_most(run, tmp_path / "r.html")
    assert part.count('role="img"') == len(shown)
    assert f'aria-label="img&lt;{shown[0].name[4:-1]}&gt;"' in part
    assert len(re.findall(r"--shot-\d+:", part)) == len(shown)
    for fact in ("kind", "variant", "split", "dataset"):
        failures_file(run, table, **{fact: np.array("another")})
        assert "--shot-" not in wrong_most(run, tmp_path / "r.html")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "images is missing"),
        ({"images": np.zeros((35, 4, 4, 3))}, r"must hold items .* but it holds .* images float64"),
        ({"images": np.zeros((35, 4, 4, 1), np.uint8)}, r"images uint8 \(35, 4, 4, 1\)"),
        ({"names": np.array(["a"])}, "must hold items"),
        ({"shows": np.array(["a"] * 35)}, "must hold items"),
        ({"says": np.empty((3, 0), str)}, "must hold items"),
        ({"texts": np.array(["a"])}, "must hold items"),
    ],
)
def test_a_damaged_file_of_failures_is_named(tmp_path, change, message):
    run = write_run(tmp_path / "runs", "a", "clip:demo", 0, czsl_table(3))
    failures_file(run, replace(czsl_table(3), ids=[f"i{i}" for i in range(35)]), **change)
    with pytest.raises(RunError, match=rf"failures\.npz .*{message}"):
        report([run], tmp_path / "r.html")
    (run / "pictures" / "failures.npz").write_bytes(b"no zip")
    with pytest.raises(RunError, match="holds no pictures of items"):
        report([run], tmp_path / "r.html")


def test_failures_as_csv_hold_every_row_s_answer(runs, tmp_path):
    text = report([runs], tmp_path / "r.html")[0].read_text(encoding="utf-8")
    rows = data_of(text)["failures.csv"]
    (c, _) = compare(read_runs([runs]))
    assert len(rows) == len(hardest(c, 200)) * len(c.rows)
    assert {row["right"] for row in rows} == {"0", "1"}


# ── side by side ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_categories_of_all_rows_stand_side_by_side(tmp_path):
    for method, backbone, seed in (("a", "clip:demo", 0), ("a", "pe:demo", 1)):
        write_run(tmp_path / "runs", method, backbone, seed, matching_table(seed))
    text = report([tmp_path / "runs"], tmp_path / "r.html")[0].read_text(encoding="utf-8")
    part = text[text.index("<h3>Category by category") :]
    lines = re.findall(r"<tr>(.*?)</tr>", part.partition("</table>")[0])
    (c,) = compare(read_runs([tmp_path / "runs"]))
    for line in lines[1:]:
        name = re.findall(r"<th scope=row>(\w+)", line)[0]
        shown = [float(v) for v in re.findall(r'data-value="([^"]+)"', line)]
        values = [row.cells[f"group_score/{name}"].mean for row in c.rows]
        assert shown[:2] == pytest.approx(values)
        assert shown[2] == pytest.approx(max(values) - min(values))
    assert len(lines) == 4


def test_attributes_and_objects_of_all_rows_stand_side_by_side(runs, tmp_path):
    text = report([runs], tmp_path / "r.html")[0].read_text(encoding="utf-8")
    for noun, names in (("Attribute", {"red", "old", "wet"}), ("Object", {"hat", "cup"})):
        part = text[text.index(f"{noun} by {noun.lower()}, all rows") :].partition("</table>")[0]
        assert set(re.findall(r"<th scope=row>(\w+)", part)) == names
        assert part.count("clip:demo") == 2
        assert part.count("pe:demo") == 3
    links = {name: rows for name, rows in data_of(text).items() if name.startswith("accuracy-")}
    assert set(links) == {"accuracy-attr.csv", "accuracy-obj.csv"}
