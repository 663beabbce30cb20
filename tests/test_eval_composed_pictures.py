"""Composed queries on the page: thumbnails with marks, the map of experts, histograms and distances."""

import base64
import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from eval.composed_pictures import is_composed
from eval.composed_plots import before_and_after, usage_map
from eval.errors import RunError
from eval.report import report

K = 5


def write_run(root: Path) -> Path:
    run = root / "run"
    (run / "pictures").mkdir(parents=True)
    facts = {"method": "mota", "backbone": "clip:demo", "dataset": "toy", "seed": 3}
    (run / "run.json").write_text(json.dumps(facts))
    return run


def query(run: Path, name: str = "query-00-add.npz", **changed: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, size=(K + 1, 6, 6, 3), dtype=np.uint8)
    arrays = {
        "reference": pixels[0],
        "edit": np.array(["add <a> hat"]),
        "images": pixels[1:],
        "names": np.array([f"image {k}" for k in range(K)]),
        "scores": np.array([0.9, 0.8, 0.7, 0.6, 0.5], dtype=np.float32),
        "hits": np.array([False, True, False, False, True]),
        "rank": np.array(2),
        "competing": np.array(1234),
        "kinds": np.array(["add"]),
        "id": np.array("q7"),
        "split": np.array("val"),
        **changed,
    }
    kept = {name: value for name, value in arrays.items() if value is not None}
    np.savez(run / "pictures" / name, **kept)


def routing(run: Path, **changed: Any) -> None:
    shares = np.array([[[0.9, 0.1], [0.5, 0.5]], [[0.2, 0.8], [0.2, 0.8]], [[0.55, 0.45], [0.35, 0.65]]])  # fmt: skip
    arrays = {
        "kinds": np.array(["add", "remove", "all queries"]),
        "counts": np.array([4, 5, 9]),
        "shares": shares,
        "reads": np.array("pseudo_word"),
        "split": np.array("val"),
        **changed,
    }
    np.savez(run / "pictures" / "routing.npz", **arrays)


def modality(run: Path, **changed: Any) -> None:
    counts = np.zeros((2, 41), dtype=np.int64)
    counts[0, 20:23], counts[1, 21] = (1, 2, 1), 4
    arrays = {
        "mean": np.array([1.25, 0.5]),
        "covariance": np.array([2.0, np.nan]),
        "to_mean": counts,
        "pairs": 2 * counts,
        "edges": np.linspace(-1, 1, 42),
        "n_images": np.array(4),
        "n_texts": np.array(60),
        "n_pairs": np.array(8),
        "text_of": np.array("captions of split val"),
        "split": np.array("val"),
        **changed,
    }
    np.savez(run / "pictures" / "modality.npz", **arrays)


def page(run: Path) -> str:
    return report([run], run.parent / "r.html")[0].read_text(encoding="utf-8").partition("<body>")[2]  # fmt: skip


def table(html: str, name: str) -> list[list[str]]:
    """The rows of a CSV that the page holds."""
    found = re.search(rf'download="{name}\.csv" href="data:text/csv;base64,([^"]+)"', html)
    assert found
    return list(csv.reader(io.StringIO(base64.b64decode(found[1]).decode())))


# ── queries ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_query_is_a_row_whose_right_images_have_a_frame_and_a_tick(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    query(run)
    html = page(run)
    assert "What composed queries get" in html
    assert "What heads look at" not in html
    assert "<h3>mota · clip:demo, toy, seed 3</h3>" in html
    assert '<p class="soft">1 query of split val.</p>' in html
    assert "add · best right image: rank 2 of 1,234" in html
    assert "“add &lt;a&gt; hat”" in html
    items = re.findall(r"<li.*?</li>", html.partition('class="answers"')[2])
    assert len(items) == 2 + K
    assert 'alt="reference picture of q7"' in items[0]
    for place, item in enumerate(items[2:], 1):
        right = place in (2, 5)
        assert ("frame hit" in item, "✓" in item, ", right:" in item) == (right,) * 3
        assert f"image {place - 1}, score 0.{10 - place}00" in item
        assert f"<small>{place} · 0.{10 - place}00</small>" in item
    assert html.count('class="tick"') == 2


def test_the_pictures_are_those_of_the_file_in_its_order(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    query(run)
    with np.load(run / "pictures" / "query-00-add.npz") as found:
        want = [found["reference"], *found["images"]]
    shown = re.findall(r"data:image/png;base64,([^\"]+)", page(run))
    assert len(shown) == len(want)
    for code, pixels in zip(shown, want, strict=True):
        drawn = imread(io.BytesIO(base64.b64decode(code)))[..., :3]
        np.testing.assert_array_equal(np.round(255 * drawn).astype(np.uint8), pixels)


def test_queries_stand_in_order_and_wordings_side_by_side(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    for i in (2, 0, 1):
        query(run, f"query-{i:02d}.npz", edit=np.array([f"edit {i}", "or so"]))
    html = page(run)
    assert re.findall(r"“(edit \d) / or so”", html) == ["edit 0", "edit 1", "edit 2"]
    assert "3 queries of split val" in html


def test_unpublished_answers_are_said_and_nothing_is_marked(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    query(run, hits=np.zeros(K, dtype=bool), rank=np.array(0))
    html = page(run)
    assert "right images are not published; 1,234 compete" in html
    assert "rank" not in html.partition('class="shot"')[2].partition("<ul")[0]
    assert 'class="tick"' not in html


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hits": None}, "hits is missing"),
        ({"names": np.array(["a"])}, r"names <U1 \(1,\)"),
        ({"images": np.zeros((K, 6, 6, 3))}, "images float64"),
        ({"reference": np.zeros((6, 6), np.uint8)}, r"reference uint8 \(6, 6\)"),
        ({"names": np.array([None] * K)}, "Python objects"),
    ],
)
def test_a_query_that_cannot_be_drawn_is_named(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    run = write_run(tmp_path)
    query(run, **change)
    with pytest.raises(RunError, match=rf"query-00-add\.npz.*{message}"):
        page(run)


def test_files_are_told_apart_by_their_names() -> None:
    mine = ("query-00.npz", "query-123-add.npz", "routing.npz", "modality.npz")
    others = ("query-0.npz", "00-add.npz", "strip.npz", "query-00.png", "my-query-00.npz", "a.npz")
    assert [is_composed(Path("x", name)) for name in (*mine, *others)] == [True] * 4 + [False] * 6


# ── parts of the head ────────────────────────────────────────────────────────────────────────────────────────────────


def test_experts_are_shown_as_means_over_blocks_with_uniform_use_beside(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    routing(run)
    html = page(run)
    cells = re.findall(r"<title>([^<]+)</title></rect><text[^>]*>([\d.]+)</text>", html)
    assert cells == [
        ("add, expert 1: 70.00 %, 4 queries", "70.0"),
        ("add, expert 2: 30.00 %, 4 queries", "30.0"),
        ("remove, expert 1: 20.00 %, 5 queries", "20.0"),
        ("remove, expert 2: 80.00 %, 5 queries", "80.0"),
        ("all queries, expert 1: 45.00 %, 9 queries", "45.0"),
        ("all queries, expert 2: 55.00 %, 9 queries", "55.0"),
    ]
    assert "split val, 9 queries: mean share of each expert over the 2 routed blocks" in html
    assert "each had 50.0 %" in html
    rows = table(html, "experts")
    assert rows[0] == ["kind", "n", "block", "expert", "share"]
    assert ["add", "4", "mean", "1", "0.7"] in rows
    assert ["add", "4", "2", "1", "0.5"] in rows
    assert len(rows) == 1 + 3 * 3 * 2


@pytest.mark.parametrize(("reads", "blind"), [("pseudo_word", True), ("eos", False), ("both", False)])  # fmt: skip
def test_only_a_router_at_the_pseudo_word_is_called_blind(
    reads: str, blind: bool, tmp_path: Path
) -> None:
    run = write_run(tmp_path)
    routing(run, reads=np.array(reads))
    assert ("causal text tower cannot see the modification" in page(run)) == blind


def test_the_darkest_square_is_the_largest_share() -> None:
    shares = np.array([[0.25, 0.75], [0.6, 0.4]])
    svg = usage_map(["a", "all queries"], np.array([1, 2]), shares, "what <it> shows")
    shades = [float(shade) for shade in re.findall(r'fill-opacity="([\d.]+)"', svg)]
    np.testing.assert_allclose(shades, 0.6 * shares.ravel() / 0.75, atol=5e-4)
    assert 'aria-label="what &lt;it&gt; shows"' in svg


def test_distances_and_histograms_stand_before_and_after(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    modality(run)
    html = page(run)
    assert "<td>1.250</td><td>0.500</td>" in html
    assert "<td>2.000</td><td>–</td>" in html
    assert html.count("4 reference images of split val, 60 texts (captions of split val)") == 3
    assert "Cosine of 8 random image–text pairs" in html
    rows = table(html, "modality")
    assert rows[1] == ["mean", "", "", "1.25", "0.5"]
    assert sum(int(row[3]) for row in rows if row[0] == "to_mean") == 4
    assert sum(int(row[4]) for row in rows if row[0] == "pairs") == 8
    assert len(rows) == 3 + 2 * 41


def test_a_histogram_draws_shares_over_the_bins_that_hold_any() -> None:
    counts = np.zeros((2, 41), dtype=np.int64)
    counts[0, 20], counts[0, 22], counts[1, 21] = 1, 3, 8
    svg = before_and_after(np.linspace(-1, 1, 42), counts, "label")
    before, after = re.findall(r'<path d="(M[^"]+)" fill="(?:var\(--s0\)|none)"', svg)
    heights = [
        [(172 - float(y)) / 160 for y in re.findall(r"V([\d.]+)H", path)]
        for path in (before, after)
    ]
    np.testing.assert_allclose(heights, [[0, 0.25, 0, 0.75, 0], [0, 0, 1, 0, 0]], atol=1e-3)
    assert "stroke-dasharray" in svg
    assert "100 %" in svg


def test_an_empty_histogram_is_an_empty_plot() -> None:
    svg = before_and_after(np.linspace(-1, 1, 42), np.zeros((2, 41), dtype=np.int64), "label")
    assert "nan" not in svg


def test_of_very_many_kinds_the_most_frequent_are_drawn_and_all_are_in_the_csv(
    tmp_path: Path,
) -> None:
    """44 kinds and their total, of which 40 and the total are drawn; kind 3 is the rarest."""
    run = write_run(tmp_path)
    counts = np.arange(50, 94)
    counts[3] = 1
    kinds = [f"kind{i:02d}" for i in range(44)]
    routing(
        run,
        kinds=np.array([*kinds, "all queries"]),
        counts=np.array([*counts, counts.sum()]),
        shares=np.full((45, 2, 2), 0.5),
    )
    html = page(run)
    assert "The 40 of most" in html
    assert "are drawn, of 44." in html
    (svg,) = re.findall(r"<svg[^>]*Share of 2 experts.*?</svg>", html, re.DOTALL)
    drawn = set(re.findall(r"kind\d\d", svg.replace("mota", "")))
    assert drawn == set(kinds) - {"kind00", "kind01", "kind02", "kind03"}
    assert len({row[0] for row in table(html, "experts")[1:]}) == 45


@pytest.mark.parametrize(
    ("write", "change", "message"),
    [
        (routing, {"counts": np.array([1])}, r"routing\.npz must hold shares .* counts int64 \(1,\)"),
        (routing, {"shares": np.ones((3, 2))}, r"routing\.npz must hold shares"),
        (modality, {"mean": np.ones(3)}, r"modality\.npz must hold edges .* mean float64 \(3,\)"),
        (modality, {"edges": np.ones(3)}, r"modality\.npz must hold edges"),
    ],
)  # fmt: skip
def test_parts_that_cannot_be_drawn_are_named(
    write: Any, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    run = write_run(tmp_path)
    write(run, **change)
    with pytest.raises(RunError, match=message):
        page(run)


def test_a_run_without_parts_has_no_plots_of_them(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    query(run)
    assert "<figure>" not in page(run)
