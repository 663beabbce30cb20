"""The verbs build, info, verify and list: what a user reads, and the exit status."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from cache_builder import FeatureCache
from cache_builder.cli import main
from cache_builder.datasets import folder
from cache_builder.pipe import quiet_when_unread

Make = Callable[..., FeatureCache]
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def command(fast_path: Path) -> list[str]:
    root = folder.miniature(fast_path / "photos")
    options = ["--backbone", "clip:demo", "--dataset", "folder", "--root", str(root)]
    return ["build", *options, "--out", str(fast_path / "c.zarr")]


def test_build_says_what_it_will_do_and_what_it_did(
    command: list[str], fast_path: Path, capsys: Captured
) -> None:
    assert main([*command, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "image/patches" in shown
    assert "texts cut to fit" in shown
    assert "MB" in shown
    assert not (fast_path / "c.zarr").exists()
    assert main([*command, "--batch-size", "3"]) == 0
    shown = capsys.readouterr().out
    assert "images/s" in shown
    assert f"cache: {fast_path / 'c.zarr'}" in shown
    assert FeatureCache.open(fast_path / "c.zarr").header.backbone_name == "clip:demo"
    assert main(command) == 0
    assert "finished already, nothing to do" in capsys.readouterr().out


def test_what_crops_and_views_will_cost_is_said_and_they_are_built(
    command: list[str], fast_path: Path, capsys: Captured
) -> None:
    streams = ["--streams", "crop/pooled", "image/view_flip/pooled", "image/block_1"]
    command += [*streams, "--crops", "fast"]
    assert main([*command, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^crop/pooled +about [\d.]+ MB  about [\d.]+ KiB each$", shown, re.M)
    assert re.search(r"^image/block_1 +[\d.]+ MB  [\d.]+ KiB each$", shown, re.M)
    assert main([*command, "--batch-size", "auto"]) == 0
    cache = FeatureCache.open(fast_path / "c.zarr")
    assert cache.header.batch_size == 64
    assert len(cache.boxes()) >= 6 * 86
    capsys.readouterr()
    assert main(["info", str(cache.path)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^crop +fast: short side 224", shown, re.M)
    assert re.search(r"^flip +mirrored left to right$", shown, re.M)


def test_build_names_the_pictures_it_could_not_use(
    command: list[str], fast_path: Path, capsys: Captured
) -> None:
    bad = next(p for p in sorted((fast_path / "photos").rglob("*")) if is_picture(p))
    bad.write_bytes(b"not a picture at all")
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "1 images could not be used" in shown
    assert bad.name in shown
    assert main([*command, "--strict"]) == 1
    assert bad.name in capsys.readouterr().err


def is_picture(path: Path) -> bool:
    try:
        Image.open(path).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ["--set", "wurld=open"],
            "--set wurld=open: not an option of data set folder; did you mean world?",
        ),
        (["--backbone", "clip"], "names no checkpoint; write family:checkpoint"),
        (["--dataset", "foldr"], "did you mean 'folder'?"),
        (["--streams", "image/depth"], "does not offer the streams image/depth"),
        (["--root", "/does/not/exist"], "/does/not/exist"),
        (["--batch-size", "0"], "batch_size 0"),
    ],
)
def test_a_wrong_argument_is_one_sentence(
    command: list[str], fast_path: Path, capsys: Captured, change: list[str], message: str
) -> None:
    assert main([*command, *change]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (fast_path / "c.zarr").exists()


def test_an_unwritable_place_is_one_sentence(
    command: list[str], fast_path: Path, capsys: Captured
) -> None:
    (fast_path / "file").write_text("in the way")
    assert main([*command, "--out", str(fast_path / "file" / "c.zarr")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_info_and_verify_tell_a_good_cache_from_a_bad_one(
    make_cache: Make, capsys: Captured
) -> None:
    cache = make_cache()
    assert main(["info", str(cache.path)]) == 0
    shown = capsys.readouterr().out
    assert "sealed, 30 of 30 chunks" in shown
    assert json.dumps(cache.spec.backbone.dims) in shown
    assert cache.digest() in shown
    assert main(["verify", str(cache.path)]) == 0
    assert "30 chunks" in capsys.readouterr().out
    for chunk in (1, 3):
        file = cache.chunks.file("image/patches", chunk)
        file.write_bytes(b"\x01" + file.read_bytes()[1:])
    with pytest.raises(SystemExit) as status:
        main(["verify", str(cache.path)])
    assert status.value.code == 1
    errors = capsys.readouterr().err
    assert "chunk 1 of image/patches is damaged" in errors
    assert "chunk 3 of image/patches is damaged" in errors
    assert main(["verify", "nowhere.zarr"]) == 1
    assert "no feature cache at nowhere.zarr" in capsys.readouterr().err


def test_control_c_says_how_to_go_on(
    command: list[str], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cache_builder.backbones.two_towers import TwoTowers

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TwoTowers, "encode_images", interrupt)
    with pytest.raises(SystemExit) as status:
        main(command)
    assert status.value.code == 130
    assert "Repeat the command to go on" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(command) == 0


def test_help_is_light() -> None:
    code = (
        "import sys\nfrom cache_builder.cli import main\n"
        "try: main(['build', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'zarr', 'numpy', 'pydantic'} & set(sys.modules)"
    )
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=root)


def test_auto_says_what_it_wants_of_a_mode_and_a_begun_cache_keeps_its_own(
    command: list[str], fast_path: Path, capsys: Captured
) -> None:
    assert main([*command, "--store", "auto"]) == 0
    shown = capsys.readouterr().out
    for mode in ("fp16", "lossless", "bf16", "int8-channel", "fp8-token"):
        assert re.search(rf"^{mode} +[\d.]+ +[\d.]+ MB .*(image|text)/", shown, re.M)
    assert "wanted: 0.999 in the mean and 0.99 at worst" in shown
    chosen = FeatureCache.open(fast_path / "c.zarr").spec.storage
    assert f"chosen: {chosen} " in shown
    assert main([*command, "--store", "auto"]) == 0
    assert f"was begun with --store {chosen} and keeps it" in capsys.readouterr().out


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("cache_builder.cli", ["info", "CACHE"]),
        ("heads.cli", ["info", "CACHE"]),
        ("heads.cli", ["list", "datasets"]),
        ("heads.cli", ["build", "--help"]),
    ],
)
def test_a_command_that_nobody_reads_ends_quietly(
    module: str, words: list[str], buffered: bool, make_cache: Make
) -> None:
    """As in `headstart info CACHE | head -1`, however early `head` goes."""
    cache = str(make_cache().path)
    command = [sys.executable, "-m", module]
    env = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*command, *(cache if word == "CACHE" else word for word in words)],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == (0 if "--help" in words else 141)  # argparse itself forgives it


def test_a_build_that_nobody_reads_ends_quietly_and_is_resumed(
    command: list[str], fast_path: Path
) -> None:
    words = [sys.executable, "-m", "cache_builder.cli", *command]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.stderr, done.returncode) == ("", 141)
    assert main(command) == 0


def test_any_other_broken_pipe_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BrokenPipeError, match="of a helper"), quiet_when_unread():
        raise BrokenPipeError("of a helper")
    sys.stdout.write("still here\n")
    sys.stdout.flush()
    assert capfd.readouterr().out == "still here\n"
