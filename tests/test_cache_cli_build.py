"""`headstart build` beyond one process, one go and one storage: what a user types, and what comes back."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pictures_on_disk import write_pictures

from cache_builder import FeatureCache
from cache_builder.cli import main

ROOT = Path(__file__).parent.parent
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "photos", {f"{i}.png": i for i in range(12)}, (40, 30))


def command(root: Path, out: Path, *more: str) -> list[str]:
    words = ["build", "--backbone", "clip:demo", "--dataset", "folder", "--root", str(root)]
    return [*words, "--out", str(out), "--batch-size", "4", *more]


def test_appending_from_the_command_line(photos: Path, fast_path: Path, capsys: Captured) -> None:
    out = fast_path / "c.zarr"
    assert main(command(photos, out)) == 0
    write_pictures(photos, {f"{i}.png": i for i in range(17)}, (40, 30))
    assert main(command(photos, out)) == 1
    assert "dataset.n_images: expected 17, found 12" in capsys.readouterr().err
    assert main(command(photos, out, "--append")) == 0
    cache = FeatureCache.open(out)
    assert (cache.spec.dataset.n_images, cache.spec.generations) == (17, ((12, 12, 0),))
    assert main(command(photos, out, "--append")) == 0
    capsys.readouterr()
    assert main(["info", str(out)]) == 0
    assert re.search(r"before it was added to +12 images and 12 texts\n", capsys.readouterr().out)


def test_two_ranks_from_the_command_line(photos: Path, fast_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, devices in (("one", ["--device", "cpu"]), ("two", ["--devices", "cpu,cpu"])):
        words = command(photos, fast_path / f"{name}.zarr", *devices)
        done = subprocess.run(
            [sys.executable, "-m", "cache_builder.cli", *words],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    one, two = (FeatureCache.open(fast_path / f"{n}.zarr") for n in ("one", "two"))
    assert one.digest() == two.digest()


def test_auto_prints_what_modes_cost_before_it_decides(
    photos: Path, fast_path: Path, capsys: Captured
) -> None:
    out = fast_path / "c.zarr"
    assert main(command(photos, out, "--store", "auto")) == 0
    text = capsys.readouterr().out
    chosen = re.search(r"^chosen: (\S+)", text, re.M)
    assert chosen, text
    for mode in ("fp16", "bf16", "int8-channel", "fp8-token", "lossless"):
        assert re.search(rf"^{mode} +\d\.\d+ +[\d,.]+ MB", text, re.M), text
    assert text.index("chosen:") < text.index("image/patches ")
    cache = FeatureCache.open(out)
    assert cache.spec.storage == chosen[1]
    assert main(command(photos, out, "--store", "auto")) == 0  # keeps what it began with
    assert "measuring" not in capsys.readouterr().out


def test_an_unknown_storage_lists_the_known_ones(
    photos: Path, fast_path: Path, capsys: Captured
) -> None:
    assert main(command(photos, fast_path / "c.zarr", "--store", "int4")) == 1
    assert "no storage 'int4' (known: fp16, fp32, bf16, int8-channel" in capsys.readouterr().err
    assert not (fast_path / "c.zarr").exists()


def test_wrong_engines_are_one_sentence(photos: Path, fast_path: Path, capsys: Captured) -> None:
    for words, message in (
        (["--address", "ray://x:1"], "add --engine ray"),
        (["--devices", "cpu,"], "names an empty device"),
        (["--devices", "cpu,cuda:9"], ""),
    ):
        if message:
            assert main(command(photos, fast_path / "c.zarr", *words)) == 1
            assert message in capsys.readouterr().err


def test_control_c_finishes_the_chunk_in_hand_and_says_how_to_go_on(
    tmp_path: Path, fast_path: Path
) -> None:
    photos = write_pictures(tmp_path / "many", {f"{i}.png": i for i in range(600)}, (40, 30))
    out = fast_path / "c.zarr"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [*command(photos, out, "--streams", "image/patches"), "--batch-size", "2"]
    builder = subprocess.Popen(
        [sys.executable, "-m", "cache_builder.cli", *words],
        cwd=ROOT,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert builder.stderr is not None
    deadline = time.monotonic() + 120
    while not (out / "zarr.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    builder.send_signal(signal.SIGINT)
    error = builder.communicate(timeout=120)[1]
    assert builder.returncode == 130, error
    assert "finishing the chunk in hand; Ctrl-C again stops at once" in error
    assert f"what is finished lies in {out}. Repeat the command to go on from there." in error
    assert FeatureCache.open(out, allow_building=True).state == "building"
    assert main(words) == 0
    cache = FeatureCache.open(out)
    assert cache.verify().ok
    assert np.isfinite(cache.read("image/patches")).all()


def test_the_bar_says_rate_bytes_and_what_it_waits_for(
    photos: Path, fast_path: Path, capsys: Captured
) -> None:
    assert main(command(photos, fast_path / "c.zarr")) == 0
    bars = capsys.readouterr().err
    assert re.search(
        r"images: 100%.*\d+/\d+ \[.*image/s.* MB/s, waits for the (backbone|pictures|casting|disk)",
        bars,
    )


def test_shards_can_be_asked_for(photos: Path, fast_path: Path) -> None:
    out = fast_path / "c.zarr"
    assert main(command(photos, out, "--shards", "4")) == 0
    array = json.loads((out / "image/patches/zarr.json").read_text())
    assert array["codecs"][0]["name"] == "sharding_indexed"
    assert array["codecs"][0]["configuration"]["chunk_shape"][0] == 4
