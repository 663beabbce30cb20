"""A full disk, a folder that cannot be written, no descriptors, a wrong clock, other processes, another place.

Each ends in the digest of an undisturbed build, or in one sentence and a cache that a repetition finishes.
"""

import contextlib
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from damages import same, snapshot
from faults import SEED, count
from judging import Judge
from kill_builds import ending, in_child, killing_itself
from small_caches import fixed, is_clear, observe

from cache_builder import FeatureCache
from cache_builder.errors import CacheError, CacheIncomplete, CacheLocked, CacheNotFound

GONE = frozenset({"lock", "builds.jsonl"})


@pytest.fixture(scope="module")
def whole(fast_folder: Path) -> Judge:
    """The undisturbed build."""
    return Judge(fast_folder / "whole.zarr", fixed)


def said(error: Exception) -> str:
    """The sentence of a refusal: ours, or the system's about a file."""
    assert isinstance(error, (CacheError, OSError)), repr(error)
    assert "\n" not in str(error)
    return str(error)


@pytest.fixture
def small_disk(fast_path: Path) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A file system of its own, and how to mount it again with other options."""
    place = fast_path / "disk"
    place.mkdir()

    def mount(options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        subprocess.run(command, check=True, capture_output=True)

    try:
        mount("size=64k")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here; the limit on file sizes is tested instead")
    yield place, mount
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_a_sentence_and_no_damage(
    small_disk: tuple[Path, Callable[[str], None]], whole: Judge
) -> None:
    place, mount = small_disk
    full = kept = 0
    for size in range(8, 260, 12):
        mount(f"remount,size={size}k")
        try:
            fixed(place / "a.zarr")
            kept += 1
            count("disk full", "same result")
        except Exception as error:
            full += "No space left" in said(error)
            count("disk full", "clear error")
        if size % 24 == 8:  # now and then from the start, else resumed with a little more room
            mount("remount,size=4m")
            assert fixed(place / "a.zarr").digest() == whole.digest
            shutil.rmtree(place / "a.zarr")
    assert full > 5
    assert full + kept == len(range(8, 260, 12))
    mount("remount,size=4m")
    fixed(place / "a.zarr")
    assert not same(whole.files, snapshot(place / "a.zarr"), GONE)


def test_a_file_that_may_not_grow_is_a_sentence_and_no_damage(
    fast_path: Path, whole: Judge
) -> None:
    for size in (10, 100, 200, 500, 900, 1_500, 2_500):
        path, told = fast_path / f"{size}.zarr", fast_path / "told"

        def limited(path: Path = path, told: Path = told, size: int = size) -> None:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
            try:
                fixed(path)
                text = "finished"
            except Exception as error:
                text = said(error)
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            told.write_text(text)

        assert ending(in_child(limited)) == 0
        assert "File too large" in told.read_text()
        assert fixed(path).digest() == whole.digest
        count("file size limited", "clear error")


def test_without_descriptors_nothing_is_wrong_and_a_repetition_finishes(
    fast_path: Path, whole: Judge
) -> None:
    ends = set()
    for spare in range(1, 11):
        path, told = fast_path / f"{spare}.zarr", fast_path / f"told{spare}"

        def starved(path: Path = path, told: Path = told, spare: int = spare) -> None:
            used = max(map(int, os.listdir("/proc/self/fd")))
            hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 30, hard))
            taken: list[int] = []
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.dup(0))
            for handle in taken[-spare:]:
                os.close(handle)
            try:
                fixed(path)
                text = "finished"
            except Exception as error:
                text = said(error)
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            told.write_text(text)

        assert ending(in_child(starved)) == 0
        text = told.read_text()
        assert text == "finished" or "Too many open files" in text, text
        assert fixed(path).digest() == whole.digest
        ends.add(text == "finished")
        count("no descriptors left", "same result" if text == "finished" else "clear error")
    assert False in ends


def test_a_folder_that_cannot_be_written_is_read_and_not_built(
    small_disk: tuple[Path, Callable[[str], None]], whole: Judge
) -> None:
    place, mount = small_disk
    mount("remount,size=4m")
    fixed(place / "a.zarr")
    lost = whole.files.keys() & {"image/patches/c/1/0/0"}
    (place / "a.zarr" / next(iter(lost))).unlink()
    before = snapshot(place / "a.zarr")
    mount("remount,ro")
    for path in (place / "a.zarr", place / "new.zarr"):
        with pytest.raises(OSError, match="Read-only file system") as caught:
            fixed(path)
        said(caught.value)
        count("read-only folder", "clear error")
    found = observe(place / "a.zarr", "read")
    assert is_clear(found.pop("image/patches"))
    assert all(value == whole.whole[item] for item, value in found.items())
    mount("remount,rw,size=4m")
    assert snapshot(place / "a.zarr") == before
    assert fixed(place / "a.zarr").digest() == whole.digest


@pytest.mark.parametrize("when", [0.0, 4_000_000_000.0])
def test_nothing_depends_on_the_clock(
    when: float, fast_path: Path, whole: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fast_path / "a.zarr"
    ending(in_child(lambda: killing_itself(fixed, path, 150, fast_path / "n")))
    for file in path.rglob("*"):
        os.utime(file, (when, when))
    monkeypatch.setattr(time, "time", lambda: when)
    assert fixed(path).digest() == whole.digest
    assert observe(path, "read") == whole.whole
    count("clock wrong between kill and resume", "same result")


def test_builders_at_once_end_in_one_cache(fast_path: Path, whole: Judge) -> None:
    rng, refused = np.random.default_rng([SEED, 3]), 0

    def builder(path: Path, wait: float) -> None:
        time.sleep(wait)
        try:
            assert fixed(path).digest() == whole.digest
        except CacheLocked as error:
            os._exit(7 if is_clear(error) else 8)

    for case in range(20):
        path = fast_path / f"{case}.zarr"
        waits = (rng.random(3) * 0.06).tolist()
        ends = [ending(p) for p in [in_child(lambda w=w, p=path: builder(p, w)) for w in waits]]
        assert set(ends) <= {0, 7}, (case, ends)
        assert 0 in ends
        refused += ends.count(7)
        assert FeatureCache.open(path).verify().ok
        assert not same(whole.files, snapshot(path), GONE)
        count("builders at once", "clear error", times=ends.count(7))
        count("builders at once", "same result", times=ends.count(0))
    assert refused


def reads_while(pid: int, path: Path, whole: Judge, kind: str, allowed: tuple[type, ...]) -> int:
    """Read until a process has ended; every item is right or an error of these kinds."""
    done, times = False, 0
    while not done:
        done = os.waitpid(pid, os.WNOHANG) != (0, 0)
        for item, value in observe(path, "read").items():
            if isinstance(value, Exception):
                assert isinstance(value, allowed), (item, value)
            else:
                assert value == whole.whole[item], item
        times += 1
        count(kind, "same result")
    assert observe(path, "read") == whole.whole
    return times


def test_a_reader_during_a_build_sees_nothing_or_all(fast_path: Path, whole: Judge) -> None:
    times = 0
    for case in range(8):
        path = fast_path / f"{case}.zarr"
        pid = in_child(lambda p=path: fixed(p))
        kinds = (CacheNotFound, CacheIncomplete)
        times += reads_while(pid, path, whole, "read during a build", kinds)
    assert times > 16


def test_a_reader_during_a_repair_never_sees_wrong_numbers(fast_path: Path, whole: Judge) -> None:
    for case in range(8):
        path = fast_path / f"{case}.zarr"
        shutil.copytree(whole.path, path)
        for name in list(whole.files)[case::5]:
            if name.startswith("image/p") and "/c/" in name:
                (path / name).unlink()
        pid = in_child(lambda p=path: fixed(p))
        reads_while(pid, path, whole, "read during a repair", (CacheIncomplete,))


def test_a_build_during_verify_disturbs_neither(fast_path: Path, whole: Judge) -> None:
    path = fast_path / "a.zarr"
    fixed(path)
    for _ in range(10):
        pid = in_child(lambda: fixed(path))
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            assert FeatureCache.open(path).verify().ok
            count("verify during a build", "same result")
    assert snapshot(path).keys() == whole.files.keys()


PLACES = ("with blanks", "Übergröße ß 日本", "two\nlines", "'quotes\" $(id) `id`", "-rf", "x" * 200)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("how", ["moved", "copied", "built"])
def test_a_cache_is_finished_wherever_it_went(
    place: str, how: str, fast_path: Path, whole: Judge
) -> None:
    path, there = fast_path / "begun.zarr", fast_path / place / "cache here.zarr"
    there.parent.mkdir()
    begun = there if how == "built" else path
    ending(in_child(lambda: killing_itself(fixed, begun, 170, fast_path / "n")))
    if how == "moved":
        path.rename(there)
    elif how == "copied":
        shutil.copytree(path, there)
    with contextlib.suppress(CacheIncomplete):
        FeatureCache.open(there)
    assert fixed(there).digest() == whole.digest
    assert FeatureCache.open(there).verify().ok
    count("moved or copied between kill and resume", "same result")
