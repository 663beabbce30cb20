"""compare and demo, end to end on a few dozen scenes."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_builder import FeatureCache, build, load_backbone, load_dataset
from eval import score_io
from eval.czsl import CompositionScores
from eval.errors import ScoreTableError
from heads import compare as comparing
from heads.cli import main
from heads.compare import Entry, Question, compare
from heads.compare_engines import Processes
from heads.errors import ConfigError, RunExists
from heads.runs import score_run, train_run

SMALL = {"layers": 2, "dim": 16, "heads": 2, "ffn": 16, "n_sampled": 1}
ENTRIES = (
    Entry("zero_shot", "zero_shot", "two_by_two", (Question("two_by_two"),)),
    Entry("local", "tf_local", "two_by_two", (Question("two_by_two"),), SMALL, {"steps": 2}),
)


@pytest.fixture(scope="module")
def cache(fast_folder: Path) -> FeatureCache:
    dataset = load_dataset("toy_world", scale=0.01)
    return build(dataset, load_backbone("clip:demo"), fast_folder / "compare.zarr", progress=False)


def test_a_comparison_does_not_depend_on_the_number_of_workers(
    cache: FeatureCache, tmp_path: Path
) -> None:
    one = compare({"clip": cache}, ENTRIES, (3, 4), tmp_path / "one").runs
    two = compare({"clip": cache}, ENTRIES, (3, 4), tmp_path / "two", engine=Processes(5)).runs
    assert [run.name for run in one] == ["zero_shot-seed3", "local-seed3", "local-seed4"]
    for a, b in zip(one, two, strict=True):
        weights = [(run / "model.safetensors").read_bytes() for run in (a, b)]
        assert weights[0] == weights[1]
    assert (one[1] / "model.safetensors").read_bytes() != (
        one[2] / "model.safetensors"
    ).read_bytes()


def test_a_comparison_refuses_other_samples_and_equal_labels(
    cache: FeatureCache, fast_folder: Path, tmp_path: Path
) -> None:
    other = build(
        load_dataset("toy_world", scale=0.01, seed=1),
        load_backbone("clip:demo"),
        fast_folder / "other.zarr",
        progress=False,
    )
    with pytest.raises(ConfigError, match="do not hold the same samples"):
        compare({"a": cache, "b": other}, ENTRIES, (0,), tmp_path)
    with pytest.raises(ConfigError, match=r"labels of their own.*local, local"):
        compare({"a": cache}, (ENTRIES[1], ENTRIES[1]), (0,), tmp_path)


def test_an_interrupted_comparison_goes_on_where_it_stopped(
    cache: FeatureCache, tmp_path: Path
) -> None:
    whole = compare({"clip": cache}, ENTRIES, (3, 4), tmp_path / "whole").runs
    runs = compare({"clip": cache}, ENTRIES, (3, 4), tmp_path / "again").runs
    kept, unscored, unrecorded = runs
    before = (kept / "run.json").stat().st_mtime_ns
    shutil.rmtree(unscored / "scores-test.zarr")
    trained = (unscored / "run.json").stat().st_mtime_ns
    shutil.rmtree(unrecorded / "scores-test.zarr")
    (unrecorded / "run.json").unlink()
    again = compare({"clip": cache}, ENTRIES, (3, 4), tmp_path / "again", engine=Processes(2))
    assert (again.runs, again.failures) == (runs, [])
    assert (kept / "run.json").stat().st_mtime_ns == before
    assert (unscored / "run.json").stat().st_mtime_ns == trained
    for a, b in zip(whole, runs, strict=True):
        tables = [score_io.load(run / "scores-test.zarr") for run in (a, b)]
        one, two = (np.asarray(table.scores) for table in tables)  # pyright: ignore[reportAttributeAccessIssue]
        assert np.array_equal(one, two)
        assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    other = replace(ENTRIES[1], train={"steps": 3})
    with pytest.raises(RunExists, match=r"was begun otherwise: train\.steps was 2 and is 3"):
        compare({"clip": cache}, (other,), (3,), tmp_path / "again")
    stale = json.loads((kept / "run.json").read_text())
    stale["head"]["template"] = "a drawing of {attr} {obj}"  # another default, when it was made
    (kept / "run.json").write_text(json.dumps(stale))
    with pytest.raises(RunExists, match=r"was begun otherwise: head\.template"):
        compare({"clip": cache}, ENTRIES, (3, 4), tmp_path / "again")


def test_a_diverged_run_is_named_and_all_others_are_made(
    cache: FeatureCache, tmp_path: Path
) -> None:
    wild = replace(ENTRIES[1], label="wild", train={"steps": 2, "lr": 1e30, "warmup_steps": 0})
    found = compare({"clip": cache}, (*ENTRIES, wild), (0,), tmp_path)
    (failure,) = found.failures
    assert re.search(r"wild-seed0: .* step", failure)
    assert [run.name for run in found.runs] == ["zero_shot-seed0", "local-seed0"]
    assert all((run / "scores-test.zarr").exists() for run in found.runs)


def test_a_run_whose_test_scores_cannot_be_used_holds_up_no_other(
    cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = comparing.score_run

    def spoiled(run: Path, **options: Any) -> list[Path]:
        if run.name == "local-seed0":
            raise ScoreTableError("the score of query 3 is nan")
        return real(run, **options)

    class Here:
        """Does passes in this process, where a function can be replaced."""

        def run(self, work: Any, passes: Any) -> Any:
            return ((jobs, work(jobs)) for jobs in passes)

    monkeypatch.setattr(comparing, "score_run", spoiled)
    found = compare({"clip": cache}, ENTRIES, (0,), tmp_path, engine=Here())
    assert [run.name for run in found.runs] == ["zero_shot-seed0"]
    assert "local-seed0: the score of query 3 is nan" in found.failures[0]


def test_a_trained_probe_beats_chance_on_held_out_images(fast_folder: Path) -> None:
    dataset = load_dataset("toy_world", scale=0.05)
    cache = build(dataset, load_backbone("clip:demo"), fast_folder / "e.zarr", progress=False)
    settings = {"head": {"C": 1.0}, "train": {"device": "cpu"}}
    run = train_run(
        cache, "linear_probe", fast_folder / "probe", task="czsl", settings=settings, progress=False
    )
    (table,) = score_run(run.path)
    scores = score_io.load(table)
    assert isinstance(scores, CompositionScores)
    right = scores.scores.argmax(1) == scores.target
    assert len(right) >= 50
    assert right.mean() > 30 / scores.scores.shape[1]  # thirty times chance
    assert right[scores.seen[scores.target]].mean() > 0.3


def test_the_demo_goes_from_pictures_to_a_report(
    fast_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = fast_folder / "demo"
    assert (
        main(["demo", "--out", str(out), "--scale", "0.02", "--epochs", "1", "--seeds", "1"]) == 0
    )
    shown = capsys.readouterr().out
    assert f"report: {out / 'report.html'}" in shown
    assert "| zero_shot " in shown
    found = json.loads((out / "metrics.json").read_text())
    assert set(found) == {"clip:demo", "siglip2:demo", "pe:demo", "llava:demo"}
    assert set(found["llava:demo"]) == {"late_maxsim", "tf_local"}  # no joint space: no cosine
    for family in ("siglip2:demo", "pe:demo"):
        assert set(found[family]) == set(found["clip:demo"])
    metrics = found["clip:demo"]
    assert set(metrics) == {"zero_shot", "linear_probe", "tf_global", "late_maxsim", "tf_local"}
    assert set(metrics["tf_local"]) == {"0"}
    closed = metrics["zero_shot"]["0"]["toy_world/czsl/test/closed"]["metrics"]
    assert closed["pair_acc"] > 0.3  # chance is 1/221
    samples = [FeatureCache.open(path).spec.dataset.digest for path in (out / "caches").iterdir()]
    assert len(samples) == 4
    assert len(set(samples)) == 1
    page = (out / "report.html").read_text()
    assert "What heads look at" in page
    assert main(["demo", "--out", str(out)]) == 1
    assert "holds an earlier demo" in capsys.readouterr().err
