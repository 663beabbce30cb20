"""Training inside an encoder from the command line: the streams it wants, the run it leaves, the map of its experts."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from drawn import N_IMAGES, PAIRS, drawn, make_live

from cache_builder import FeatureCache, build, load_backbone
from eval.report import report
from heads.ablation import plan, read
from heads.cli import main
from heads.run_files import Trained
from heads.runs import score_run, train_run
from heads.sweep import train_runs
from heads.wanted import Wanted

SMALL = {"rank": 2, "n_experts": 3}
TRAIN = {"steps": 2, "batch_size": 8}


@pytest.fixture(scope="module")
def plain(fast_folder: Path) -> FeatureCache:
    """As a build leaves it that asked for nothing special."""
    folder = fast_folder / "encoder"
    folder.mkdir()
    return make_live(folder, "clip")


@pytest.fixture(scope="module")
def cache(plain: FeatureCache, fast_folder: Path) -> FeatureCache:
    """With pixels, and the states that enter the last block."""
    backbone = load_backbone(plain.header.backbone_name)
    streams = [*plain.streams, "image/pixels", "image/block_1"]
    path = fast_folder / "encoder" / "with.zarr"
    named = {"backbone_name": plain.header.backbone_name, "progress": False}
    return build(drawn(), backbone, path, streams=streams, **named)


@pytest.mark.parametrize(
    ("arguments", "stream"),
    [
        (["eva"], "image/pixels"),
        (["eva", "--set", "head.cut=1"], "image/block_1"),
        (["eva", "--set", "head.cut=2"], "image/block_0"),
        (["finetune"], "image/pixels"),
    ],
)
def test_a_missing_stream_comes_with_the_command_that_adds_it(
    plain: FeatureCache,
    arguments: list[str],
    stream: str,
    fast_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--cache", str(plain.place), "--task", "czsl", "--out", str(fast_path / "run")]
    assert main(["train", *arguments, *given]) == 1
    said = capsys.readouterr().err
    assert f"reads {stream}" in said
    command = re.search(r"headstart build .*", said)
    assert command is not None
    words = shlex.split(command[0])
    assert stream in words[words.index("--streams") :]
    assert not (fast_path / "run").exists()


def test_a_cut_deeper_than_the_tower(
    cache: FeatureCache, fast_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--cache", str(cache.place), "--task", "czsl", "--out", str(fast_path / "run")]
    assert main(["train", "eva", "--set", "head.cut=7", *given]) == 1
    said = capsys.readouterr().err
    assert "2 image blocks" in said or "has 2" in said


@pytest.mark.parametrize("cut", [None, 1])
def test_from_training_to_the_map_of_experts(
    cache: FeatureCache,
    cut: int | None,
    fast_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = fast_path / "run"
    settings = {"head": {**SMALL, "cut": cut}, "train": TRAIN}
    trained = train_run(cache, "eva", run, task="czsl", settings=settings, progress=False)
    assert trained.record["remarks"]["of the dual encoder"] > 0
    score_run(run, cache=cache)
    monkeypatch.setattr("heads.drawing.load_dataset", lambda *_a, **_k: drawn())
    assert main(["score", str(run), "--split", "val", "--pictures", "3"]) == 0
    with np.load(run / "pictures" / "routing.npz") as found:
        kinds, counts, shares = found["kinds"].tolist(), found["counts"], found["shares"]
    seen = sorted({PAIRS[i % 13][0] for i in range(N_IMAGES["val"])})
    assert kinds == [*seen, "all images"]
    assert counts[-1] == counts[:-1].sum() == N_IMAGES["val"]
    assert shares.shape == (len(kinds), cut or 2, 3)
    assert shares.sum(-1) == pytest.approx(np.ones((len(kinds), cut or 2)))
    weighed = (counts[:-1, None, None] * shares[:-1]).sum(0) / counts[-1]
    assert weighed == pytest.approx(shares[-1], abs=1e-6)
    page = fast_path / "report.html"
    report([run], page)
    text = page.read_text()
    assert "Experts by attribute" in text
    assert f"in the last of {cut or 2} routed blocks of the image tower" in text


def test_every_row_of_the_ablation_trains_a_step(fast_folder: Path) -> None:
    backbone = load_backbone("clip:demo")
    streams = [
        "image/pooled",
        "image/pixels",
        "text/pooled",
        *(f"image/block_{k}" for k in (0, 2, 3)),
    ]
    path = fast_folder / "encoder-demo.zarr"
    named = {"backbone_name": "clip:demo", "progress": False}
    cache = build(drawn(), backbone, path, streams=streams, **named)
    ablation = read("eva")
    made = plan(ablation, {"it": cache}, settings={"train": {"steps": 1}})
    assert made.left_out == []
    assert [entry.label for entry in made.entries["it"]] == ablation.labels
    wanted = [
        Wanted(e.method, path.parent / f"encoder-{e.label}", {"head": e.head, "train": e.train})
        for e in made.entries["it"]
    ]
    runs = train_runs(cache, wanted, task="czsl", progress=False)
    assert all(isinstance(run, Trained) for run in runs)


def test_a_head_without_maps_and_experts_has_no_pictures(
    plain: FeatureCache, fast_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_run(
        plain, "csp", fast_path / "run", task="czsl", settings={"train": TRAIN}, progress=False
    )
    assert main(["score", str(fast_path / "run"), "--pictures", "3"]) == 1
    assert "csp has no maps to draw" in capsys.readouterr().err
