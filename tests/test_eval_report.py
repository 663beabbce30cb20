"""Run directories → comparisons, markdown, CSV, JSON and the page; and the verbs."""

import base64
import csv
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imsave

from eval import cli, czsl, formats, matching, score_io
from eval.bootstrap import Interval
from eval.comparison import compare, metrics
from eval.composition import CompositionScores
from eval.errors import RunError, ScoreTableError
from eval.figures import figures_of
from eval.matching import MatchingScores
from eval.plots import DASHES, SERIES, seen_unseen
from eval.report import comparison_table, report
from eval.retrieval import RetrievalScores
from eval.runs import Question, read_runs

C, Q = 6, 40
TARGET = np.arange(Q) % C
PAIRS = np.array(
    [["red", "hat"], ["old", "hat"], ["red", "cup"], ["old", "cup"], ["wet", "cup"], ["wet", "hat"]]
)
CACHE = {
    "fingerprint": "f00dcafe1234",
    "backbone": {"family": "clip", "checkpoint": "demo"},
    "dataset": {"name": "toy_world"},
}


def czsl_table(seed, strength=1.5, space="logit", **options) -> CompositionScores:
    scores = np.random.default_rng(seed).normal(size=(Q, C)) + strength * np.eye(C)[TARGET]
    return CompositionScores(scores, TARGET, PAIRS, np.arange(C) < 4, "test", space, **options)


def matching_table(seed, strength=1.0, shape=(2, 2)) -> MatchingScores:
    true = np.eye(2) if len(shape) == 2 else np.array([1.0, 0])
    scores = np.random.default_rng(seed).normal(size=(30, *shape)) + strength * true
    return MatchingScores(scores, np.array(["swap", "add", "replace"] * 10), "cosine", "test")


def retrieval_table(seed, **meta) -> RetrievalScores:
    scores = np.random.default_rng(seed).normal(size=(12, 12)) + np.eye(12)
    return RetrievalScores(scores, np.eye(12, dtype=bool), "cosine", "test", meta=meta)


def write_run(root: Path, method: str, seed: int = 0, tables=None, history=None, **facts) -> Path:
    path = root / f"{method}-{len(list(root.glob('*')))}-seed{seed}"
    path.mkdir(parents=True)
    record = {
        "method": method,
        "seed": seed,
        "cache": CACHE,
        "parameters": 4100,
        "seconds": 2.5,
    } | facts
    (path / "run.json").write_text(json.dumps(record))
    for name, table in (tables or {"test": czsl_table(seed)}).items():
        score_io.save(table, path / f"scores-{name}.zarr", run=record)
    if history:
        (path / "history.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in history))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Zero-shot and two methods of two seeds, over all tasks; one of them worse than chance at swaps."""
    root = tmp_path_factory.mktemp("runs")
    tables = {
        "czsl": czsl_table(9, 0.5, "cosine"),
        "match": matching_table(9),
        "t2i": retrieval_table(9, direction="t2i"),
    }
    write_run(root, "zero_shot", tables=tables, parameters=0, seconds=None)
    for seed in (0, 1):
        history = [{"step": i, "loss": 2.0 / i} for i in (1, 2, 3)]
        history += [{"step": 3, "validation": {"auc": 0.4 + seed / 10}}]
        tables = {
            "czsl": czsl_table(seed, 3),
            "match": matching_table(seed, 3),
            "t2i": retrieval_table(seed, direction="t2i"),
        }
        write_run(
            root,
            "tf_local",
            seed,
            tables,
            history,
            head={"layers": 2},
            train={"seed": seed, "select": "auc"},
        )
        write_run(
            root, "late_maxsim", seed, {"match": matching_table(seed, -2)}, train={"seed": seed}
        )
    return root


@pytest.fixture(scope="module")
def files(runs, tmp_path_factory) -> list[Path]:
    """The report of those runs, made once."""
    return report([runs], tmp_path_factory.mktemp("made") / "out" / "report.html", title="A < B")


class Page(HTMLParser):
    """Collects what a page asks for from elsewhere, its open tags and its tables."""

    VOID = frozenset({"meta", "img", "br", "link", "path", "use", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.scripts = 0
        self.anchors: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        facts = dict(attrs)
        self.scripts += tag == "script"
        self.anchors += [facts["id"] or ""] if "id" in facts else []
        for name in ("src", "href", "xlink:href"):
            value = facts.get(name) or "#"
            if not value.startswith(("#", "data:")):
                self.fetched.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


# ── comparing ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_task_is_a_table_of_its_own_and_czsl_has_two_curves(runs):
    found = compare(read_runs([runs]))
    assert [(c.question.kind, c.curve) for c in found] == [
        ("czsl", "exact"),
        ("czsl", "legacy"),
        ("matching", None),
        ("retrieval", None),
    ]
    assert found[0].title == "czsl · toy_world · test · closed world · k = 1 · exact curve"
    assert [row.group.method for row in found[2].rows] == ["zero_shot", "late_maxsim", "tf_local"]
    assert found[2].columns == [
        *("group_score", "i2t", "t2i"),
        *("group_score/add", "group_score/replace", "group_score/swap"),
    ]


def test_seeds_are_one_row_with_mean_spread_and_values(runs):
    row = compare(read_runs([runs]))[0].rows[1]
    values = [czsl.evaluate(czsl_table(seed, 3))["auc"] for seed in (0, 1)]
    cell = row.cells["auc"]
    assert cell.seeds == pytest.approx(values)
    assert cell.mean == pytest.approx(np.mean(values))
    assert cell.std == pytest.approx(np.std(values, ddof=1))
    assert cell.low is not None
    assert cell.high is not None
    assert cell.low < cell.mean < cell.high
    assert row.gain is not None
    assert row.gain.estimate == pytest.approx(cell.mean - czsl.evaluate(czsl_table(9, 0.5))["auc"])
    assert row.gain.excludes_zero


def test_one_seed_has_no_spread(runs):
    zero_shot = compare(read_runs([runs]))[0].rows[0]
    assert zero_shot.cells["auc"].std is None
    assert zero_shot.gain is None


def test_tables_of_other_items_worlds_or_splits_are_other_comparisons(tmp_path):
    root = tmp_path / "runs"
    write_run(root, "a", tables={"1": czsl_table(0)})
    write_run(root, "b", tables={"1": czsl_table(0, world="open")})
    write_run(root, "c", tables={"1": czsl_table(0, ids=[f"i{i}" for i in range(Q)])})
    write_run(root, "d", tables={"1": retrieval_table(0), "2": retrieval_table(0, partial=True)})
    titles = [c.title for c in compare(read_runs([root])) if c.curve != "legacy"]
    assert len(titles) == 5
    assert titles[-1] == "retrieval · partial · toy_world · test"


def scored_elsewhere(run: Path, table, dataset: str) -> None:
    """A further table of a run, of another cache than it was trained on."""
    record = json.loads((run / "run.json").read_text())
    record["cache"] = CACHE | {"dataset": {"name": dataset}}
    score_io.save(table, run / "scores-elsewhere.zarr", run=record)


def test_a_table_belongs_to_the_data_set_it_was_scored_on(tmp_path):
    """Trained on toy_world, scored also on mit_states, whose items happen to be equal here."""
    root = tmp_path / "runs"
    scored_elsewhere(write_run(root, "a"), czsl_table(1), "mit_states")
    write_run(root, "b", cache=CACHE | {"dataset": {"name": "mit_states"}})
    found = [c for c in compare(read_runs([root])) if c.curve == "exact"]
    rows = {c.question.dataset: [row.group.runs[0].method for row in c.rows] for c in found}
    assert rows == {"mit_states": ["a", "b"], "toy_world": ["a"]}
    assert set(metrics(found)["clip:demo"]["a"]["0"]) == {
        f"{name}/czsl/test/closed" for name in ("mit_states", "toy_world")
    }
    only = root / "c-seed0"
    (root / "a-0-seed0").rename(only)
    (only / "scores-test.zarr").rename(tmp_path / "gone.zarr")
    text = report([only], tmp_path / "r.html")[0].read_text(encoding="utf-8")
    assert "1 data set (mit_states)" in text


def test_seeds_trained_on_other_data_are_no_seeds_of_one_row(tmp_path):
    root = tmp_path / "runs"
    for seed, trained in enumerate(("toy_world", "photos")):
        facts = {"cache": CACHE | {"dataset": {"name": trained}}}
        scored_elsewhere(write_run(root, "a", seed, **facts), czsl_table(seed), "mit_states")
    found = next(c for c in compare(read_runs([root])) if c.question.dataset == "mit_states")
    assert [row.group.method for row in found.rows] == [
        "a (trained_data=toy_world)",
        "a (trained_data=photos)",
    ]


def test_the_score_space_keeps_rows_apart(tmp_path):
    root = tmp_path / "runs"
    write_run(root, "a", 0, {"1": czsl_table(0, space="cosine")})
    write_run(root, "a", 1, {"1": czsl_table(1, space="logit")})
    assert [row.group.space for row in compare(read_runs([root]))[0].rows] == ["cosine", "logit"]


def test_one_method_under_two_configurations_is_two_rows_that_say_what_differs(tmp_path):
    root = tmp_path / "runs"
    for layers in (1, 2):
        for seed in (0, 1):
            facts = {"head": {"layers": layers, "dim": 8}, "train": {"seed": seed, "device": "cpu"}}
            write_run(root, "tf_local", seed, {"1": czsl_table(seed + layers)}, **facts)
    write_run(
        root,
        "tf_local",
        0,
        {"1": czsl_table(7)},
        head={"layers": 2, "dim": 8},
        task="czsl",
        label="ours",
    )
    labels = [row.group.method for row in compare(read_runs([root]))[0].rows]
    assert labels == [
        "tf_local (layers=1)",
        "tf_local (layers=2)",
        "ours",
    ]


def test_a_reranked_table_is_a_row_beside_the_full_ranking(tmp_path):
    root = tmp_path / "runs"
    write_run(root, "a", tables={"full": retrieval_table(0), "part": retrieval_table(1, rerank=5)})
    assert [r.group.method for r in compare(read_runs([root]))[0].rows] == [
        "a (rerank=None)",
        "a (rerank=5)",
    ]


def test_the_same_row_and_seed_twice_is_refused(tmp_path):
    root = tmp_path / "runs"
    first, second = (write_run(root, "a", 0) for _ in range(2))
    with pytest.raises(RunError, match=f"{first.name}.*{second.name}.*seed 0"):
        compare(read_runs([root]))


def test_exactly_chance_is_not_below_it(tmp_path):
    """Shares of twelve summed up twelve times miss the share by their last bits."""
    root = tmp_path / "runs"
    scores = np.eye(12)[np.roll(np.arange(12), 1)]
    found = RetrievalScores(scores, np.eye(12, dtype=bool), "cosine", "test")
    write_run(root, "a", 0, tables={"test": found})
    (c,) = compare(read_runs([root]))

    def is_below(mean: float) -> bool:
        cell = replace(c.rows[0].cells["recall@1"], seeds=(mean,))
        return c.is_below_chance(replace(c.rows[0], cells={"recall@1": cell}), "recall@1")

    assert c.chance["recall@1"] == pytest.approx(1 / 12)
    assert not any(is_below(mean) for mean in (1 / 12 - 1e-12, 1 / 12, 1 / 12 + 1e-12))
    assert is_below(1 / 12 - 1e-6)


def test_below_chance_is_marked_and_only_that(runs):
    table = compare(read_runs([runs]))[2]
    _, bad, ours = table.rows
    assert table.is_below_chance(bad, "group_score/swap")
    assert not table.is_below_chance(ours, "group_score/swap")
    text = formats.markdown([table])
    lines = {line.split("|")[2].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "▼" in lines["late_maxsim"]
    assert "▼" not in lines["tf_local"] + lines["zero_shot"]
    assert "▼ below chance" in text


def test_k_is_part_of_the_metric_s_name(runs):
    found = compare(read_runs([runs / "tf_local-1-seed0"]), k=3)
    assert found[0].name("auc") == "auc@3"
    assert "auc@3" in formats.markdown(found[:1])
    assert "pair_acc" not in found[0].columns
    assert (
        compare(read_runs([runs / "tf_local-1-seed0"]), k=5)[0].curve == "exact"
    )  # 4 seen pairs: no legacy at 5


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_markdown_states_space_seeds_chance_and_intervals(runs):
    text = comparison_table([runs])
    head = next(line for line in text.splitlines() if "auc" in line)
    for word in ("backbone", "method", "space", "seeds", "best_hm", "auc − zero_shot"):
        assert word in head
    row = next(line for line in text.splitlines() if "tf_local" in line)
    assert re.search(
        r"clip:demo \| tf_local +\| logit +\| +2 \| +\d+\.\d ± \d+\.\d \[\d+\.\d, \d+\.\d\]", row
    )
    assert "*chance*" in text
    assert "28 images of seen and 12 of unseen pairs; 4 seen and 2 unseen candidates" in text
    assert "Note: zero_shot · clip:demo: the legacy curve" in text
    widths = {len(line) for line in text.split("###")[1].splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_the_csv_holds_every_metric_as_a_fraction(runs):
    rows = list(csv.DictReader(io.StringIO(formats.to_csv(compare(read_runs([runs]))))))
    row = next(
        r for r in rows if (r["method"], r["metric"], r["curve"]) == ("tf_local", "auc", "exact")
    )
    values = [czsl.evaluate(czsl_table(seed, 3))["auc"] for seed in (0, 1)]
    assert float(row["mean"]) == pytest.approx(np.mean(values), abs=1e-5)
    assert row["seed_values"] == f"0:{values[0]:.6g} 1:{values[1]:.6g}"
    assert (row["split"], row["world"], row["space"], row["k"], row["seeds"]) == (
        "test",
        "closed",
        "logit",
        "1",
        "2",
    )
    assert float(row["chance"]) == pytest.approx(1 / 16)
    assert float(row["minus_low"]) > 0
    swap = next(r for r in rows if (r["method"], r["metric"]) == ("zero_shot", "i2t/swap"))
    assert swap["minus_zero_shot"] == "" == swap["std"]


@pytest.mark.parametrize(
    ("value", "cell"),
    [("=1+1", "'=1+1"), ("@x", "'@x"), (-0.5, "-0.5"), (None, ""), ("a\nb", "a\\x0ab")],
)
def test_a_csv_cell_is_never_a_formula(value, cell):
    assert formats.csv_cell(value) == cell


@pytest.mark.parametrize(
    ("value", "shown"), [(0.1234, "12.3"), (0.0, "0.0"), (0.00021, "0.021"), (1.0, "100.0")]
)
def test_percent_never_hides_a_small_number(value, shown):
    assert formats.percent(value) == shown


def test_signed_differences_show_their_interval():
    assert formats.signed(Interval(0.041, -0.002, 0.08)) == "+4.1 [-0.2, +8.0]"


def test_metrics_are_nested_by_backbone_method_seed_and_task(runs):
    found = metrics(compare(read_runs([runs])))
    entry = found["clip:demo"]["tf_local"]["1"]["toy_world/czsl/test/closed"]
    assert entry["metrics"] == czsl.evaluate(czsl_table(1, 3))
    assert entry["legacy_metrics"] == czsl.evaluate(czsl_table(1, 3), curve="legacy")
    assert (entry["space"], entry["k"], entry["chance"]["auc"]) == ("logit", 1, 1 / 16)
    entry = found["clip:demo"]["late_maxsim"]["0"]["toy_world/matching/2×2/test"]
    assert entry["metrics"] == matching.evaluate(matching_table(0, -2))
    json.dumps(found, allow_nan=False)


def test_two_tables_of_one_task_are_told_apart_by_their_items(tmp_path):
    write_run(
        tmp_path,
        "a",
        tables={
            "1": retrieval_table(0),
            "2": RetrievalScores(np.eye(3), np.eye(3, dtype=bool), "cosine"),
        },
    )
    tasks = metrics(compare(read_runs([tmp_path])))["clip:demo"]["a"]["0"]
    assert len(tasks) == 2
    assert len([key for key in tasks if key.startswith("toy_world/retrieval/test/")]) == 1


def test_each_of_two_tables_of_one_task_has_its_own_legacy_metrics(tmp_path):
    tables = {"1": czsl_table(0), "2": czsl_table(1, ids=[f"i{i}" for i in range(Q)])}
    write_run(tmp_path, "a", tables=tables)
    tasks = metrics(compare(read_runs([tmp_path])))["clip:demo"]["a"]["0"]
    found = {entry["metrics"]["auc"]: entry["legacy_metrics"] for entry in tasks.values()}
    assert found == {
        czsl.evaluate(t)["auc"]: czsl.evaluate(t, curve="legacy") for t in tables.values()
    }


def test_the_json_has_metrics_that_only_one_seed_has(tmp_path):
    """`bias_at_best_hm` is absent where unbounded: no cell of the row, but a number of the other seed."""
    for seed, scores in enumerate((czsl_table(0).scores, np.zeros((Q, C)))):
        table = CompositionScores(scores, TARGET, PAIRS, np.arange(C) < 4, "test", "logit")
        write_run(tmp_path, "a", seed, {"1": table})
    comparisons = compare(read_runs([tmp_path]))
    assert "bias_at_best_hm" not in comparisons[0].rows[0].cells
    seeds = metrics(comparisons)["clip:demo"]["a"]
    first, second = (seeds[s]["toy_world/czsl/test/closed"]["metrics"] for s in "01")
    assert first == czsl.evaluate(czsl_table(0))
    assert "bias_at_best_hm" in first
    assert "bias_at_best_hm" not in second


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_page_is_whole_loads_nothing_and_has_its_own_script_alone(files):
    assert [f.name for f in files] == ["report.html", "report.md", "report.csv", "report.json"]
    assert sorted(p.name for p in files[0].parent.iterdir()) == sorted(f.name for f in files)
    text = files[0].read_text(encoding="utf-8")
    page = Page(text)
    assert page.fetched == []
    assert page.open == []
    assert page.scripts == 1
    assert "A &lt; B" in text
    assert not re.search(r"url\((?!data:|#)|@import|\$\w|#f00d", text)
    sections = {
        "czsl-toy_world",
        "matching-toy_world",
        "retrieval-toy_world",
        "training",
        "runs",
        "reading",
    }
    assert sections <= set(page.anchors)


@pytest.mark.parametrize("name", ["out.json", "out.md", "out.csv", "v1.2", "out"])
def test_a_page_that_is_not_called_html_is_refused_and_nothing_written(name, runs, tmp_path):
    with pytest.raises(ScoreTableError, match=rf"asked for as {name},.*such as {name}\.html"):
        report([runs / "zero_shot-0-seed0"], tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_dot_in_the_page_s_name_stays(tmp_path):
    write_run(tmp_path / "runs", "a")
    files = report([tmp_path / "runs"], tmp_path / "v1.2.HTM")
    assert [f.name for f in files] == ["v1.2.HTM", "v1.2.md", "v1.2.csv", "v1.2.json"]


def test_the_same_runs_give_the_same_page(runs, files, tmp_path):
    again = report([runs], tmp_path / "report.html", title="A < B")
    assert [f.read_bytes() for f in again] == [f.read_bytes() for f in files]


def test_the_page_says_what_every_number_needs(files):
    text = files[0].read_text(encoding="utf-8")
    for fact in (
        "split <b>test",
        "world <b>closed",
        "k <b>1",
        "curve <b>exact",
        "curve <b>legacy",
        "score space <b>cosine, logit",
        "seeds <b>1–2",
    ):
        assert fact in text, fact
    assert text.count('<tr class="chance">') == 4
    assert 'class="below"' in text
    assert "f00dcafe1234" in text
    assert "0.2064 → 0.1978" in text
    # Curve, three metrics by category, training of tf_local; accuracy by attribute and object, a confusion map a row;
    # for each of three questions, the headline against seconds and against parameters.
    assert text.count("<svg viewBox") - text.count('class="key"') == 1 + 3 + 1 + 2 + 2 + 3 * 2
    pictures = [svg for svg in re.findall(r"<svg [^>]*>", text) if "aria-hidden" not in svg]
    assert all('role="img" aria-label="' in svg for svg in pictures)


def test_a_training_panel_says_whose_it_is(tmp_path):
    root, history = tmp_path / "runs", [{"step": i, "loss": 1.0 / i} for i in (1, 2)]
    write_run(root, "tf_local", history=history, label="ours", task="czsl")
    write_run(root, "late_maxsim", history=history)
    text = report([root], tmp_path / "r.html")[0].read_text(encoding="utf-8")
    for name, task in (("ours", ", czsl"), ("late_maxsim", "")):
        assert f"<b>{name} · clip:demo</b>{task}, toy_world: one line a seed" in text
        assert f'aria-label="Training of {name} · clip:demo{task}"' in text


def test_the_numbers_of_a_plot_come_with_it(files):
    text = files[0].read_text(encoding="utf-8")
    data = {
        name: base64.b64decode(code).decode()
        for name, code in re.findall(
            r'download="([^"]+)" href="data:text/csv;base64,([^"]+)"', text
        )
    }
    curve = list(csv.DictReader(io.StringIO(data["curve.csv"])))
    points = czsl.exact_curve(czsl_table(1, 3))
    mine = [float(r["seen"]) for r in curve if r["row"].startswith("tf_local") and r["seed"] == "1"]
    assert mine == pytest.approx(points.seen.tolist(), abs=1e-5)
    bars = list(csv.DictReader(io.StringIO(data["group_score.csv"])))
    assert {r["category"] for r in bars} == {"add", "replace", "swap"}
    assert data["training.csv"].splitlines()[:2] == ["seed,step,loss,validation", "0,1,2,"]


def data_of(html: str) -> dict[str, list[dict[str, str]]]:
    """The CSV files inside a page, as rows."""
    links = re.findall(r'download="([^"]+)" href="data:text/csv;base64,([^"]+)"', html)
    texts = {name: base64.b64decode(code).decode() for name, code in links}
    return {name: list(csv.DictReader(io.StringIO(text))) for name, text in texts.items()}


def test_names_from_files_stay_in_their_cell_and_are_no_formulas(tmp_path):
    kinds = ["left, right", "=cmd()", 'say "so"']
    table = MatchingScores(np.random.default_rng(0).normal(size=(30, 2)), kinds * 10, "cosine")
    write_run(tmp_path, "a", tables={"1": table, "2": czsl_table(0)}, label="=a, b")
    found = {c.question.kind: c for c in compare(read_runs([tmp_path])) if c.curve != "legacy"}
    series = {"=a, b · clip:demo": 0}
    unknown = replace(found["matching"], chance={})
    rows = data_of(figures_of(unknown, series))["accuracy.csv"]
    assert [r["category"] for r in rows] == ["'=cmd()", "left, right", 'say "so"']
    assert {(r["row"], r["chance"]) for r in rows} == {("'=a, b · clip:demo", "")}
    assert all(None not in r for r in rows)
    rows = data_of(figures_of(found["matching"], series))["accuracy.csv"]
    assert {r["chance"] for r in rows} == {"0.5"}
    rows = data_of(figures_of(found["czsl"], series))["curve.csv"]
    assert {r["row"] for r in rows} == {"'=a, b · clip:demo"}
    assert rows[0]["bias"] == ""


def test_words_from_files_cannot_become_markup(tmp_path):
    evil = "<img src=x onerror=alert(1)>\x07"
    write_run(
        tmp_path,
        "a",
        backbone=evil,
        cache={"dataset": {"name": '"><script>'}},
        label=evil,
        note="</code><script>",
    )
    text = report([tmp_path], tmp_path / "r.html")[0].read_text(encoding="utf-8")
    page = Page(text)
    assert (page.scripts, page.fetched) == (1, [])
    assert "\x07" not in text


def attention(path: Path, **change) -> None:
    arrays = {
        "image": np.full((8, 12, 3), 90, np.uint8),
        "words": np.array(["red", "cup"]),
        "weights": np.arange(12, dtype=np.float32).reshape(2, 2, 3),
        "caption": np.array("a red cup"),
        "score": np.float32(0.25),
    } | change
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})


def test_pictures_show_every_word_and_whose_they_are(tmp_path):
    run = write_run(tmp_path / "runs", "tf_local")
    attention(run / "pictures" / "a.npz")
    attention(run / "pictures" / "b.npz", caption=None, score=None, weights=np.zeros((2, 2, 3)))
    imsave(run / "pictures" / "c.png", np.zeros((3, 5, 3), np.uint8))
    text = report([run], tmp_path / "r.html")[0].read_text(encoding="utf-8")
    assert "<h3>tf_local · clip:demo, toy_world, seed 0</h3>" in text
    assert '<b>a red cup</b><span class="soft"> · score 0.250' in text
    assert '<b>red cup</b><span class="soft"></span>' in text
    assert [text.count(f"where “{word}” looks") for word in ("red", "cup")] == [2, 2]
    assert text.count("cup<small>6–11</small>") == 1
    assert "verdict" not in text.partition("<body>")[2]
    assert 'alt="c"' in text
    assert Page(text).fetched == []


def test_a_picture_says_what_its_maps_are_and_whether_the_head_was_right(tmp_path):
    run = write_run(tmp_path / "runs", "trident")
    says = {"says": np.array("gates <of> slots")}
    attention(run / "pictures" / "a.npz", verdict=np.array("predicted"), right=np.True_, **says)
    attention(run / "pictures" / "b.npz", verdict=np.array("not it"), right=np.False_, **says)
    strip = np.array([[0.0, 2.0, 0.0, 4.0], [1.0, 0.0, 0.0, 0.0]])
    words = np.array(["mask 1", "mask 2"])
    np.savez(run / "pictures" / "strip.npz", strip=strip, words=words, says=np.array("masks"))
    text = report([run], tmp_path / "r.html")[0].read_text(encoding="utf-8")
    assert text.count("Shown: gates &lt;of&gt; slots.") == 1
    assert '<p class="verdict"><span class="up">✓</span> predicted</p>' in text
    assert '<p class="verdict"><span class="down">✗</span> not it</p>' in text
    assert '<span class="soft">masks</span>' in text
    assert "<small>mask 1: 50 % closed, largest 4</small>" in text
    assert "<small>mask 2: 75 % closed, largest 1</small>" in text
    page = Page(text)
    assert (page.fetched, page.open) == ([], [])
    np.savez(run / "pictures" / "strip.npz", strip=strip, words=words[:1])
    with pytest.raises(RunError, match=r"strip\.npz must hold strip.*\(2, 4\) and 1 words"):
        report([run], tmp_path / "r.html")


def test_a_veil_is_clear_at_the_largest_weight_and_dark_at_the_smallest():
    from eval.pictures import _veil

    veil = _veil(np.array([[0.1, 0.4], [0.2, 0.25]]))[..., 3]
    dark = round(255 * 0.82)
    assert veil.tolist() == [[dark, 0], [139, 105]]  # 0.82 · 255 · (2/3, 1/2)
    assert (_veil(np.full((2, 2), 0.3))[..., 3] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": None}, "weights"),
        ({"weights": np.zeros((3, 2, 3))}, r"\(3, 2, 3\) for 2 words"),
        ({"weights": np.zeros((2, 0, 3))}, r"\(2, 0, 3\) for 2 words"),
        ({"weights": np.full((2, 2, 3), "x")}, r"<U1 \(2, 2, 3\) for 2 words"),
        ({"image": np.zeros((8, 12, 3))}, "float64"),
        ({"image": np.zeros((8, 12, 2), np.uint8)}, r"uint8 \(8, 12, 2\)"),
        ({"image": np.zeros((0, 12, 3), np.uint8)}, r"uint8 \(0, 12, 3\)"),
        ({"score": np.zeros(2)}, r"one number as score, but it is float64 of shape \(2,\)"),
        ({"strip": np.zeros((2, 0))}, r"strip \(rows, numbers\).* float64 \(2, 0\) and 2 words"),
        ({"strip": np.full((2, 3), "x")}, r"strip \(rows, numbers\).* <U1 \(2, 3\) and 2 words"),
    ],
)
def test_a_picture_that_cannot_be_drawn_is_named(change, message, tmp_path):
    run = write_run(tmp_path / "runs", "tf_local")
    attention(run / "pictures" / "a.npz", **change)
    with pytest.raises(RunError, match=rf"a\.npz.*{message}"):
        report([run], tmp_path / "r.html")


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 cut off", b"\x93NUMPY\x01\x00"])
def test_a_picture_file_that_is_damaged_is_named(content, tmp_path):
    run = write_run(tmp_path / "runs", "tf_local")
    attention(run / "pictures" / "a.npz")
    (run / "pictures" / "a.npz").write_bytes(content)
    with pytest.raises(RunError, match=r"a\.npz holds no picture: .* is damaged or no \.npz"):
        report([run], tmp_path / "r.html")


def test_other_forms_of_a_run_are_read_too(tmp_path):
    """One-image matching, a flat run.json from elsewhere, validation only, an empty history, one side of CZSL."""
    seen_only = CompositionScores(
        np.eye(4, 6), np.arange(4), PAIRS, np.arange(6) < 4, "val", "logit"
    )
    tables = {"1": matching_table(0, shape=(2,)), "2": seen_only}
    flat = {"cache": None, "backbone": "mine", "dataset": "theirs", "parameters": None}
    write_run(
        tmp_path,
        "a",
        0,
        tables,
        [{"step": i, "validation": {"rsum": 2.0}} for i in (1, 2)] + [{"step": 3}],
        **flat,
    )
    write_run(tmp_path, "b", 0, {"1": matching_table(0, shape=(2,))}, [{"step": 0}], **flat)
    found = compare(read_runs([tmp_path]))
    assert [c.headline for c in found] == ["best_seen", "best_seen", "accuracy"]
    assert found[2].title == "matching · 1×2 · theirs · test"
    text = report([tmp_path], tmp_path / "r.html")[0].read_text(encoding="utf-8")
    assert "rsum" in text


def test_more_rows_than_colours_differ_by_their_dashes():
    assert len(DASHES) > 1
    curves = {str(i): [czsl.exact_curve(czsl_table(i))] for i in range(len(SERIES) + 1)}
    svg = seen_unseen(curves, {name: int(name) for name in curves}, "many")
    assert svg.count("stroke-dasharray") == 1
    assert 'aria-label="many"' in svg


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_runs_are_found_one_level_below(runs):
    assert len(read_runs([runs])) == 5
    assert [r.path.name for r in read_runs([runs / "zero_shot-0-seed0"])] == ["zero_shot-0-seed0"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", "{", "run.json is not JSON"),
        ("run.json", "[1]", "must be a JSON object, but is a list"),
        ("run.json", '{"method": "a"}', "does not say seed, backbone, dataset"),
        ("history.jsonl", '{"step": 1}\n{"st', "history.jsonl line 2 is not JSON"),
        ("run.json", b'{"method": "\xff"}', r"run\.json is not UTF-8"),
        ("history.jsonl", b'{"step": "\xff"}', r"history\.jsonl is not UTF-8"),
        *(
            (
                "run.json",
                json.dumps({"method": "a", "seed": seed, "backbone": "b", "dataset": "c"}),
                r"run\.json says seed .*; it must be an integer",
            )
            for seed in ("a", 0.5, True)
        ),
    ],
)
def test_a_broken_run_is_named(name, content, message, tmp_path):
    run = write_run(tmp_path, "a")
    (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RunError, match=message):
        read_runs([run])


def test_no_run_at_all_is_an_error(tmp_path):
    with pytest.raises(RunError, match=f"no run at {tmp_path}"):
        read_runs([tmp_path])
    with pytest.raises(RunError, match="name at least one"):
        read_runs([])


def test_a_question_has_a_key_without_empty_parts():
    assert Question("d", "retrieval", "", "test", "", "0").key() == "d/retrieval/test"


# ── verbs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_metrics_prints_every_number_with_interval_and_chance(runs, capsys):
    paths = [str(p) for p in sorted((runs / "late_maxsim-2-seed0").glob("*.zarr"))]
    assert cli.main(["metrics", *paths, str(runs / "tf_local-1-seed0" / "scores-czsl.zarr")]) == 0
    out = capsys.readouterr().out
    assert "matching · split test · space cosine" in out
    assert "czsl · split test · closed world · k = 1 · exact curve · space logit · 1 seed" in out
    assert re.search(r"group_score/swap +0\.0 +\[0\.0, 0\.0\] +16\.7  ▼ below chance", out)
    assert re.search(r"bias_at_best_hm +-?\d", out)


def test_metrics_as_json_are_fractions(runs, capsys):
    run = runs / "tf_local-1-seed0"
    assert (
        cli.main(
            [
                "metrics",
                str(run / "scores-czsl.zarr"),
                str(run / "scores-t2i.zarr"),
                "--k",
                "1",
                "3",
                "--json",
            ]
        )
        == 0
    )
    first, second = json.loads(capsys.readouterr().out)
    table = czsl_table(0, 3)
    expected = czsl.evaluate(table) | {f"{m}@3": v for m, v in czsl.evaluate(table, k=3).items()}
    assert first["metrics"] == expected
    assert first["intervals"]["auc@3"][0] < expected["auc@3"] <= first["intervals"]["auc@3"][1]
    assert (
        set(second["metrics"])
        == {"recall@1", "recall@3", "map@1", "map@3"}
        == set(second["intervals"])
    )


def test_metrics_on_the_legacy_curve_print_its_warning(runs, capsys):
    path = runs / "zero_shot-0-seed0" / "scores-czsl.zarr"
    assert cli.main(["metrics", str(path), "--curve", "legacy"]) == 0
    out = capsys.readouterr().out
    assert "warning: the legacy curve" in out
    assert re.search(r"auc +\d+\.\d +– +–", out)


def test_a_user_s_error_is_one_sentence_and_status_1(runs, tmp_path, capsys):
    assert cli.main(["metrics", str(tmp_path / "nope.zarr")]) == 1
    assert capsys.readouterr().err.startswith("python -m eval metrics: no score table at")
    match = str(runs / "zero_shot-0-seed0" / "scores-match.zarr")
    assert cli.main(["metrics", match, "--k", "2"]) == 1
    assert "has no k" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "nope")]) == 1
    assert "no run at" in capsys.readouterr().err


def test_report_writes_the_page_and_prints_its_tables(runs, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert cli.main(["report", str(runs), "-o", str(out), "--title", "mine"]) == 0
    printed = capsys.readouterr().out
    assert "*chance*" in printed
    assert f"wrote {out}, " in printed
    assert "<h1>mine</h1>" in out.read_text(encoding="utf-8")


def modules_after(code: str) -> set[str]:
    shown = f"{code}\nimport sys; print(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", shown],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    return set(done.stdout.split())


def test_metrics_alone_import_neither_torch_nor_zarr_nor_matplotlib():
    loaded = modules_after(
        "import eval.czsl, eval.matching, eval.retrieval, eval.bootstrap, eval.cli"
    )
    assert not loaded & {"torch", "zarr", "matplotlib", "sklearn", "scipy"}


def test_the_report_imports_no_torch():
    assert "torch" not in modules_after("import eval.report")


def test_the_import_check_can_fail():
    assert {"zarr", "matplotlib"} <= modules_after("import eval.report")
