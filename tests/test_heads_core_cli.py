"""The whole path on the command line: train, score, and refusals in one sentence."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import drawn, make_drawn

from cache_builder import FeatureCache, build
from cache_builder.backbones import clip
from cache_builder.datasets.base import Tasks
from eval import score_io
from heads import checkpoint
from heads.cli import main
from heads.errors import CheckpointMismatch, TaskError
from heads.run_files import read_run
from heads.runs import score_run, train_run

SMALL = ["head.layers=1", "head.dim=8", "head.heads=2", "head.ffn=12"]
QUICK = ["train.epochs=2", "train.batch_size=6", "train.device=cpu"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    return make_drawn(tmp_path_factory.mktemp("cli") / "drawn.zarr")


def train(cache: FeatureCache, out: Path, method: str, *more: str, sets: list[str] = QUICK) -> int:
    options = [word for text in sets for word in ("--set", text)]
    return main(["train", method, "--cache", str(cache.path), "--out", str(out), *options, *more])


def test_train_and_score_leave_a_complete_run(cache: FeatureCache, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sets = [*SMALL, *QUICK]
    assert train(cache, run, "tf_local", "--task", "two_by_two", "--seed", "5", sets=sets) == 0
    assert main(["score", str(run), "--split", "test"]) == 0
    names = ["config.json", "history.jsonl", "model.safetensors", "run.json", "scores-test.zarr"]
    assert sorted(p.name for p in run.iterdir()) == names
    record = json.loads((run / "run.json").read_text())
    assert (record["method"], record["task"], record["seed"]) == ("tf_local", "two_by_two", 5)
    assert record["train"]["negatives"] == "image_text"
    assert record["selected_on"] == "val group_score"
    assert record["cache"]["fingerprint"] == cache.fingerprint
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert sum("loss" in line for line in lines) == record["steps"] == 2 * 3
    assert sum("validation" in line for line in lines) == 2
    table: Any = score_io.load(run / "scores-test.zarr")
    assert np.asarray(table.scores).shape == (5, 2, 2)
    assert table.meta["run"]["seed"] == 5


def test_the_same_seed_gives_the_same_run(cache: FeatureCache, tmp_path: Path) -> None:
    for name in ("a", "b"):
        sets = [*SMALL, *QUICK]
        assert train(cache, tmp_path / name, "tf_local", "--task", "czsl", sets=sets) == 0
    a, b = (checkpoint.load(tmp_path / name).state_dict() for name in ("a", "b"))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("task", "tables"),
    [
        ("czsl", ["scores-val.zarr"]),
        ("matching", ["scores-val.zarr"]),
        ("retrieval", ["scores-val-i2t.zarr", "scores-val-t2i.zarr"]),
    ],
)
def test_a_head_without_training_is_scored_on_every_task(
    cache: FeatureCache, tmp_path: Path, task: str, tables: list[str]
) -> None:
    run = tmp_path / "run"
    assert train(cache, run, "zero_shot", "--task", task) == 0
    assert main(["score", str(run), "--split", "val"]) == 0
    assert sorted(p.name for p in run.glob("scores*")) == tables
    assert read_run(run)["best"]


def test_other_tasks_worlds_and_reranks_have_names_of_their_own(
    cache: FeatureCache, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert train(cache, run, "zero_shot", "--task", "czsl") == 0
    assert main(["score", str(run), "--world", "open"]) == 0
    assert main(["score", str(run), "--task", "retrieval", "--rerank", "3"]) == 0
    assert sorted(p.name for p in run.glob("scores*")) == [
        "scores-retrieval-test-i2t-rerank3.zarr",
        "scores-retrieval-test-t2i-rerank3.zarr",
        "scores-test-open.zarr",
    ]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said on stderr: one line."""
    text = capsys.readouterr().err.strip()
    assert "\n" not in text
    assert "Traceback" not in text
    return text


def test_nothing_is_overwritten(
    cache: FeatureCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(cache, run, "zero_shot", "--task", "czsl") == 0
    assert main(["score", str(run)]) == 0
    capsys.readouterr()
    assert train(cache, run, "zero_shot", "--task", "czsl") == 1
    assert f"{run} already exists" in said(capsys)
    assert main(["score", str(run)]) == 1
    assert "scores-test.zarr already exists" in said(capsys)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["zero_shto", "--task", "czsl"], "did you mean 'zero_shot'"),
        (["zero_shot"], "name one (--task)"),
        (["zero_shot", "--task", "composed"], "no task 'composed'"),
        (["linear_probe", "--task", "matching"], "linear_probe works on czsl, not on matching"),
        (["tf_local", "--task", "czsl", "--set", "head.layer=1"], "did you mean 'layers'"),
        (["zero_shot", "--task", "czsl", "--config", "no.toml"], "no.toml: No such file"),
        (["no.such.module", "--task", "czsl"], "no module 'no.such.module'"),
    ],
)
def test_a_user_s_error_is_one_sentence_and_status_1(
    cache: FeatureCache,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    expected: str,
) -> None:
    assert train(cache, tmp_path / "run", words[0], *words[1:]) == 1
    assert expected in said(capsys)
    assert not (tmp_path / "run").exists()


def test_a_missing_cache_or_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = str(tmp_path / "nowhere")
    assert main(["train", "zero_shot", "--cache", nowhere]) == 1
    assert nowhere in said(capsys)
    assert main(["score", nowhere]) == 1
    assert "is no run" in said(capsys)


def test_dropped_training_images_are_counted(tmp_path: Path) -> None:
    cache = make_drawn(tmp_path / "c.zarr", broken=("train2", "val5"))
    settings: dict[str, dict[str, Any]] = {"head": {}, "train": {"device": "cpu"}}
    run = train_run(cache, "linear_probe", tmp_path / "run", task="czsl", settings=settings)
    assert run.record["dropped"] == {"train": 1, "val": 1}
    assert run.record["examples"] == {"train": 36, "val": 12}
    (path,) = score_run(run.path, split="val", allow_missing=True)
    assert score_io.load(path).meta["partial"] is True


def test_a_table_is_of_the_cache_it_was_scored_on(cache: FeatureCache, tmp_path: Path) -> None:
    other = make_drawn(tmp_path / "other.zarr", order_seed=1)
    assert other.digest() != cache.digest()
    run = tmp_path / "run"
    assert train(cache, run, "zero_shot", "--task", "matching") == 0
    for path in (cache.path, other.path):
        assert main(["score", str(run), "--cache", str(path)]) == 0
    for name, scored in (("scores-test.zarr", cache), ("scores-other-test.zarr", other)):
        meta = score_io.load(run / name).meta
        assert meta["run"]["cache"]["digest"] == scored.digest()
        assert meta["run"]["cache"]["path"] == str(scored.path)
        assert meta["run"]["cache"]["dataset"]["name"] == "drawn"


def test_a_cache_that_changed_since_training_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "drawn.zarr"
    trained = make_drawn(path)
    run = train_run(trained, "zero_shot", tmp_path / "run", task="matching")
    shutil.rmtree(path)
    now = make_drawn(path, order_seed=1)
    with pytest.raises(CheckpointMismatch) as caught:
        score_run(run.path)
    for digest in (trained.digest(), now.digest()):
        assert digest[:12] in str(caught.value)
    assert "--cache" in str(caught.value)


@pytest.mark.parametrize("verb", ["train", "score"])
def test_a_flipped_byte_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    cache = make_drawn(tmp_path / "c.zarr")
    run = tmp_path / "run"
    if verb == "score":
        assert train(cache, run, "zero_shot", "--task", "matching") == 0
        capsys.readouterr()
    file = cache.chunks.file("image/pooled", 0)
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    if verb == "train":
        assert train(cache, run, "zero_shot", "--task", "matching") == 1
    else:
        assert main(["score", str(run)]) == 1
    assert "chunk 0 of image/pooled is damaged" in said(capsys)


def test_a_head_without_training_needs_no_train_split(tmp_path: Path) -> None:
    whole = drawn()
    tasks = Tasks(matching=tuple(e for e in whole.tasks.matching if e.split == "test"))
    path = tmp_path / "c.zarr"
    cache = build(replace(whole, tasks=tasks), clip.tiny(), path, progress=False)
    run = train_run(cache, "zero_shot", tmp_path / "run")
    assert run.record["examples"] == {"train": 0, "val": 0}
    assert run.record["selected_on"] is None
    (path,) = score_run(run.path)
    table: Any = score_io.load(path)
    assert np.asarray(table.scores).shape == (5, 2)
    with pytest.raises(TaskError, match="no matching examples of split 'train'"):
        train_run(cache, "tf_local", tmp_path / "other")


def test_training_from_a_cache_imports_no_backbone_library(
    cache: FeatureCache, tmp_path: Path
) -> None:
    code = (
        "import sys; from heads.cli import main; "
        f"assert not main(['train', 'zero_shot', '--cache', {str(cache.path)!r}, '--task', 'czsl', "
        f"'--out', {str(tmp_path / 'run')!r}]); "
        f"assert not main(['score', {str(tmp_path / 'run')!r}]); "
        "bad = {'open_clip', 'transformers', 'timm', 'torchvision'} & set(sys.modules); assert not bad, bad"
    )
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, capture_output=True)


def test_help_costs_no_torch() -> None:
    code = (
        "import sys; from heads.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'zarr' not in sys.modules"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=root, capture_output=True, text=True
    )
    assert "train" in done.stdout


def test_list_names_the_plugins_and_the_settings_of_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["list", "datasets"]) == 0
    assert "folder " in capsys.readouterr().out
    assert main(["list", "methods", "tf_local"]) == 0
    shown = capsys.readouterr().out
    assert "2604.11496" in shown
    assert "--set head.layers=4" in shown
    assert main(["list", "datasets", "toy_world"]) == 0
    assert "--set scale=None" in capsys.readouterr().out
    assert main(["list", "methods", "tf_locl"]) == 1
    assert "did you mean 'tf_local'" in capsys.readouterr().err
