"""Two processes that train as one: the weights of one process, in-batch negatives and all; who writes; who stops."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import drawn
from safetensors.torch import load_file
from test_heads_tensorboard import history, read
from torch import Tensor

from cache_builder import FeatureCache, build
from cache_builder.plugins import find
from heads import ranks
from heads.cli import main
from heads.tensorboard import FOLDER

RECIPE = ["--set", "train.epochs=2", "--set", "train.warmup_steps=0", "--set", "train.lr=1e-3"]
CZSL = ["--task", "czsl", "--set", "train.batch_size=7", "--set", "head.chunk=4"]
KINDS: dict[str, list[str]] = {
    # Experts are all kept: where two are chosen, rounding can choose another one.
    "eva": [
        *("eva", *CZSL, "--set", "head.top_k=8", "--set", "head.adapter_dropout=0"),
        *("--set", "head.image_chunk=3", "--set", "train.accumulate=2"),
    ],
    "finetune": [*("finetune", "--task", "two_by_two", "--set", "train.batch_size=6")],
}


CUT = [
    *("eva", *CZSL, "--set", "head.top_k=8", "--set", "head.adapter_dropout=0"),
    *("--set", "head.cut=1", "--set", "train.clip=0.05"),
]


class _Own:
    """A group whose other processes have nothing."""

    @staticmethod
    def apply(own: Tensor) -> Tensor:
        return own


@pytest.fixture(scope="module")
def cache(fast_folder: Path) -> FeatureCache:
    folder = fast_folder / "ranks"
    folder.mkdir()
    backbone = find("cache_builder.backbones", "clip").tiny(folder / "files")
    streams = [*sorted(backbone.streams), "image/pixels", "image/block_1"]
    named = {"backbone_name": f"clip:{folder / 'files'}", "streams": streams, "storage": "fp32"}
    return build(drawn(), backbone, folder / "ranks.zarr", progress=False, **named)


def launched(arguments: list[str], **options: Any) -> "subprocess.Popen[str]":
    """Two processes on this machine, as torchrun starts them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*command, "-m", "heads.cli", "train", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finished(process: "subprocess.Popen[str]") -> str:
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err[-3000:]
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_end_in_the_weights_of_one(
    cache: FeatureCache, kind: str, fast_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses to 1e-5 and weights to 1e-4 of their size: sums are made in another order, twelve or six times."""
    arguments = [*KINDS[kind], *RECIPE, "--cache", str(cache.place)]
    assert main(["train", *arguments, "--out", str(fast_path / "one")]) == 0
    capsys.readouterr()
    said = finished(launched([*arguments, "--tensorboard", "--out", str(fast_path / "two")]))
    assert said.count("wrote") == 1  # one of them speaks
    assert len(list((fast_path / "two" / FOLDER).iterdir())) == 1  # and tells TensorBoard
    assert read(fast_path / "two") == history(fast_path / "two")
    one, two = (_history(fast_path / name) for name in ("one", "two"))
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], abs=1e-5, rel=1e-5)
    mine, theirs = (load_file(fast_path / n / "model.safetensors") for n in ("one", "two"))
    for name, value in mine.items():
        assert torch.allclose(theirs[name].float(), value.float(), rtol=1e-4, atol=1e-4), name
    record = json.loads((fast_path / "two" / "run.json").read_text())
    assert record["processes"] == 2
    names = {n: {p.name for p in (fast_path / n).iterdir()} for n in ("one", "two")}
    assert names["two"] - {FOLDER} == names["one"]


def test_an_interrupted_training_of_two_goes_on(
    cache: FeatureCache, fast_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both stop behind the same step, and both go on: the weights are those of an undisturbed training."""
    arguments = [*CUT, *RECIPE, "--set", "train.epochs=8", "--cache", str(cache.place)]
    assert main(["train", *arguments, "--out", str(fast_path / "one")]) == 0
    capsys.readouterr()
    out = fast_path / "two"
    process = launched([*arguments, "--out", str(out)], start_new_session=True)
    assert process.stderr is not None
    while "loss" not in (line := process.stderr.readline()):
        assert line or process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert not (out / "run.json").exists()
    assert any(p.name.startswith("training-") for p in out.iterdir())
    assert "goes on after step" in finished(launched([*arguments, "--out", str(out), "--resume"]))
    mine, theirs = (load_file(fast_path / n / "model.safetensors") for n in ("one", "two"))
    for name, value in mine.items():
        assert torch.allclose(theirs[name].float(), value.float(), rtol=1e-3, atol=1e-3), name


def test_random_numbers_of_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Towers that draw do so otherwise in every process and every time; those that do not, leave all as it was."""
    monkeypatch.setattr(ranks, "n_ranks", lambda: 2)
    monkeypatch.setattr(ranks, "_Gathered", _Own)
    rows = [torch.ones(5)]

    def drawn_by(rank: int, run: ranks.Run) -> list[Tensor]:
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        torch.manual_seed(0)
        found = [ranks.shared(run, rows)[0] for _ in range(2)]
        return [*found, torch.rand(1)]

    first, second = (drawn_by(rank, lambda x: (torch.rand_like(x),)) for rank in (0, 1))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[2], second[2])
    quiet = drawn_by(1, lambda x: (2 * x,))
    torch.manual_seed(0)
    assert torch.equal(quiet[2], torch.rand(1))


def test_without_accelerate_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
    cache: FeatureCache,
    capsys: pytest.CaptureFixture[str],
    fast_path: Path,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    arguments = [
        "csp",
        *CZSL,
        *RECIPE,
        "--cache",
        str(cache.place),
        "--out",
        str(fast_path / "no"),
    ]
    assert main(["train", *arguments]) == 1
    assert "pip install 'headstart[ranks]'" in capsys.readouterr().err
    assert not (fast_path / "no").exists()


def test_one_process_is_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert ranks.is_first()
    assert ranks.n_ranks() == 1
    assert ranks.anywhere(flag=True)
    assert not ranks.anywhere(flag=False)
    assert ranks.least(7) == 7
    ranks.wait()
    with ranks.joined("cpu"):
        assert ranks.n_ranks() == 1
    (out,) = ranks.shared(lambda x: (2 * x,), [torch.ones(3)])
    assert torch.equal(out, 2 * torch.ones(3))


def _history(run: Path) -> list[dict[str, Any]]:
    lines = (run / "history.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]
