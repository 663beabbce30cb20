"""A cache as one .h5 file and back: exact, whole or absent, and nothing believed that no checksum confirms."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import hypothesis.extra.numpy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_in import SPEC, KeptStandIn, StandIn, WordStandIn, dataset

from cache_builder import FeatureCache
from cache_builder.cache import Contents
from cache_builder.cli import main
from cache_builder.datasets.base import Tasks
from cache_builder.errors import (
    CacheCorrupt,
    CacheError,
    CacheIncomplete,
    CacheLocked,
    CacheMismatch,
    CacheNotFound,
)
from cache_builder.format import SCHEMA
from cache_builder.hdf5 import export_hdf5, import_hdf5
from cache_builder.hdf5_writing import whole_or_absent
from cache_builder.header import header_checksum
from cache_builder.spec import CacheSpec, DatasetSpec

ROOT = Path(__file__).parent.parent
Make = Callable[..., FeatureCache]
STREAMS = sorted(StandIn.streams)
VIEWS = ["image/view_flip/pooled", "image/view_center/patches", "image/block_1"]
KINDS = {
    "plain": {},
    "fp32": {"storage": "fp32"},
    "words": {"backbone": WordStandIn()},
    "kept": {"backbone": KeptStandIn()},
    "kept views": {
        "backbone": KeptStandIn(),
        "streams": ["image/patches", "image/view_flip/patches", "image/block_0"],
    },
    "views": {"streams": [*STREAMS, *VIEWS]},
    "crops": {"streams": [*STREAMS, "crop/pooled"], "crops": "fast", "dataset": dataset(3)},
    "bad": {"dataset": dataset(bad=(3, 8))},
    "kept bad": {"backbone": KeptStandIn(), "dataset": dataset(bad=(0, 7))},
    "no texts": {"dataset": dataset(n_texts=0)},
    "no pictures": {"dataset": dataset(0)},
    "odd strings": {"dataset": dataset(texts=["", "a\0b", "é" * 40, "\u2028", "x\n"])},
    "one chunk": {"chunk_bytes": 1 << 20},
}
"""Every kind of cache that the stand-ins can make."""


def files(cache: FeatureCache) -> dict[str, bytes]:
    """All files of a cache, but the lock, what building took, and the order of journals."""
    found = {p.relative_to(cache.path).as_posix(): p for p in cache.path.rglob("*") if p.is_file()}
    kept = {n: p.read_bytes() for n, p in found.items() if n not in ("lock", "builds.jsonl")}
    return {
        n: b"".join(sorted(b.splitlines(True))) if n.endswith("l") else b for n, b in kept.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_cache_comes_back_byte_for_byte(
    make_cache: Make, fast_path: Path, kind: str
) -> None:
    cache = make_cache(**KINDS[kind])
    file = export_hdf5(cache, fast_path / "c.h5")
    back = import_hdf5(file, fast_path / "back.zarr")
    assert back.verify().ok
    assert back.digest() == cache.digest()
    assert files(back) == files(cache)
    assert export_hdf5(back, fast_path / "again.h5").read_bytes() == file.read_bytes()


@pytest.fixture(scope="module")
def kills(fast_folder: Path) -> list[dict]:
    folder = fast_folder / "kills"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/kill_exchange.py"), str(folder), "24"],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_killed_exports_and_imports_finish_when_repeated(kills: list[dict]) -> None:
    digest = {t["kind"]: t["proof"] for t in kills if t["kind"].endswith("source")}
    digest = {
        "export": digest["source"],
        "import": digest["source"],
        "foreign": digest["foreign source"],
    }
    killed = [t for t in kills if t.get("killed") == -signal.SIGKILL]
    for kind in digest:
        these = [t for t in killed if t["kind"] == kind]
        assert len({t["at"] for t in these}) >= 22, "killed at 24 places each"
        assert max(t["at"] for t in these) > 0.9 * these[0]["total"]
    for trial in killed:
        assert (trial["again"], trial["proof"]) == (0, digest[trial["kind"]]), trial
        if trial["kind"] == "export":
            assert set(trial["names"]) <= {"c.h5.headstart-part", "c.h5"}
            assert trial["early"] in (None, digest["export"]), "a half file under its final name"
            assert trial["left"] == ["c.h5"]


FLIPS = 300


def outcome(work: Callable[[], FeatureCache]) -> tuple[str, FeatureCache | None]:
    """The message of a user's error, or what was made; anything else is a bug."""
    try:
        return "", work()
    except CacheError as error:
        return str(error), None


def test_a_flipped_byte_is_an_error_or_changes_nothing(make_cache: Make, fast_path: Path) -> None:
    cache = make_cache(dataset=dataset(bad=(3,)))
    file = export_hdf5(cache, fast_path / "c.h5")
    good, rng = bytearray(file.read_bytes()), np.random.default_rng(0)
    refused = 0
    for trial, at in enumerate(rng.choice(len(good), FLIPS, replace=False).tolist()):
        data = good.copy()
        data[at] ^= int(rng.integers(1, 256))
        damaged = fast_path / f"{trial}.h5"
        damaged.write_bytes(data)
        said, back = outcome(lambda d=damaged, t=trial: import_hdf5(d, fast_path / f"{t}.zarr"))
        if back is None:
            assert len(said.splitlines()) == 1, said
            refused += 1
        else:
            assert (back.digest(), back.verify().ok) == (cache.digest(), True)
            assert back.header == cache.header
        damaged.unlink()
        shutil.rmtree(fast_path / f"{trial}.zarr", ignore_errors=True)
    assert FLIPS / 3 < refused < FLIPS, refused


def test_a_damaged_chunk_costs_nothing_that_was_received_before_it(
    make_cache: Make, fast_path: Path
) -> None:
    cache = make_cache()
    file = export_hdf5(cache, fast_path / "c.h5")
    good = file.read_bytes()
    last = cache.chunks.file("text/tokens", cache.layout("text/tokens").n_chunks - 1).read_bytes()
    at = good.index(last)
    file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
    with pytest.raises(CacheCorrupt, match=r"chunk \d+ of text/tokens is not what was written"):
        import_hdf5(file, fast_path / "back.zarr")
    half = FeatureCache.open(fast_path / "back.zarr", allow_building=True)
    assert (half.state, [array for array, _ in half.pending()]) == ("building", ["text/tokens"])
    file.write_bytes(good)
    assert import_hdf5(file, fast_path / "back.zarr").digest() == cache.digest()


def test_a_file_cut_anywhere_is_an_error(make_cache: Make, fast_path: Path) -> None:
    file = export_hdf5(make_cache(), fast_path / "c.h5")
    good = file.read_bytes()
    for size in [*range(0, 200, 7), *range(200, len(good), len(good) // 40)]:
        file.write_bytes(good[:size])
        with pytest.raises(CacheCorrupt, match=r"c\.h5 (cannot be read as HDF5|is damaged)"):
            import_hdf5(file, fast_path / "back.zarr")
        assert not (fast_path / "back.zarr").exists()


def test_an_h5_user_finds_arrays_under_their_names(make_cache: Make, fast_path: Path) -> None:
    cache = make_cache(dataset=dataset(bad=(2,)))
    file = export_hdf5(cache, fast_path / "c.h5")
    opened: Any = h5py.File(file)
    with opened as h5:
        np.testing.assert_array_equal(h5["image/patches"][5], cache.read("image/patches")[5])
        assert h5["image/patches"].dtype == np.float16
        assert [axis.label for axis in h5["image/patches"].dims] == ["image", "patch", "width"]
        assert list(h5["image/id"].asstr()[:]) == cache.image_ids
        assert list(h5["text/string"].asstr()[:]) == cache.texts
        assert json.loads(h5["header.json"].asstr()[()])["digest"] == cache.digest()
        assert h5["tasks.json"].asstr()[()] == cache.tasks.to_json()
        assert json.loads(h5["quarantine.jsonl"].asstr()[()])["id"] == "i2"


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "value": (
        lambda h: h["image/pooled"].write_direct(np.ones((13, 7), "<f2")),
        "is not what was written",
    ),
    "string": (lambda h: h["image/id"].__setitem__(0, b"i99"), "the strings of image/id are not"),
    "added": (
        lambda h: h.create_dataset("image/mine", data=[1.0]),
        "'image/mine', which no export",
    ),
    "removed": (lambda h: h.__delitem__("text/pooled"), "it lacks text/pooled"),
    "soft link": (lambda h: swap(h, h5py.SoftLink("/image/pooled")), "a link that leads elsewhere"),
    "external link": (
        lambda h: swap(h, h5py.ExternalLink("/etc/passwd", "/x")),
        "a link that leads elsewhere",
    ),
    "external data": (
        lambda h: remake(h, external=[("/etc/passwd", 0, 9 * 7 * 2)]),
        "does not lie in the file itself",
    ),
    "virtual": (lambda h: virtual(h), "does not lie in the file itself"),
    "references": (lambda h: remake(h, dtype=h5py.ref_dtype), "text/pooled is object"),
    "objects": (lambda h: remake(h, dtype=h5py.string_dtype()), "text/pooled is object"),
    "type": (lambda h: remake(h, dtype="<f4"), "text/pooled is float32"),
    "byte order": (lambda h: remake(h, dtype=">f2"), "text/pooled is >f2"),
    "shape": (lambda h: remake(h, shape=(9, 8)), r"text/pooled is float16 \(9, 8\)"),
    "empty": (lambda h: remake(h), "text/pooled is not stored as"),
    "bomb": (
        lambda h: remake(h, chunks=(7, 7), compression="gzip"),
        "text/pooled is not stored as",
    ),
    "group": (lambda h: swap(h, None), "does not lie in the file itself"),
    "text": (lambda h: retext(h, "tasks.json", b"{}"), "tasks.json is not the text"),
    "pointer text": (lambda h: pointer(h), "tasks.json is not stored as"),
}


def swap(h5: Any, link: object) -> None:
    del h5["text/pooled"]
    if link is None:
        h5.create_group("text/pooled")
    else:
        h5["text/pooled"] = link


def remake(h5: Any, **options: object) -> None:
    del h5["text/pooled"]
    h5.create_dataset("text/pooled", **{"shape": (9, 7), "dtype": "<f2", **options})  # ty: ignore


def virtual(h5: Any) -> None:
    del h5["text/pooled"]
    layout = h5py.VirtualLayout((9, 7), "<f2")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (9, 7))
    h5.create_virtual_dataset("text/pooled", layout)


def retext(h5: Any, name: str, data: bytes, honest: bool = False) -> None:
    old = h5[name].attrs["sha256"]
    del h5[name]
    h5.create_dataset(name, data=np.array(data, h5py.string_dtype("utf-8", len(data))))
    h5[name].attrs["sha256"] = np.bytes_(hashlib.sha256(data).hexdigest()) if honest else old


def pointer(h5: Any) -> None:
    del h5["tasks.json"]
    h5["tasks.json"] = "{}"


def reheader(h5: Any, change: Callable[[dict[str, Any]], object]) -> None:
    header = json.loads(h5["header.json"].asstr()[()])
    change(header)
    header["crc32c"] = header_checksum({k: v for k, v in header.items() if k != "crc32c"})
    retext(h5, "header.json", json.dumps(header).encode(), honest=True)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_refused_with_what_differs(
    make_cache: Make, fast_path: Path, change: str
) -> None:
    file = export_hdf5(make_cache(), fast_path / "c.h5")
    do, message = CHANGES[change]
    with h5py.File(file, "r+") as h5:
        do(h5)
    with pytest.raises(CacheCorrupt, match=message) as info:
        import_hdf5(file, fast_path / "back.zarr")
    assert len(str(info.value).splitlines()) == 1


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer": (lambda a: a.update(schema_version=SCHEMA + 1), "install a newer headstart"),
    "unsealed": (lambda a: a.update(state="building"), "never sealed"),
    "spec": (lambda a: a["spec"].update(order_seed=5), "was edited"),
    "digest": (lambda a: a.update(digest="0" * 64), "content digest"),
    "no format": (lambda a: a.update(format="x"), "no header of a cache"),
    "unknown": (lambda a: a.update(colour="blue"), "not understood: colour"),
    "above": (lambda a: rename(a, "../x"), r"not understood: arrays"),
    "root": (lambda a: rename(a, "/image/pooled"), "not understood: arrays"),
    "journal": (lambda a: rename(a, "tasks.json/x"), "not understood: arrays"),
    "chunk folder": (lambda a: rename(a, "image/patches/c/0"), "it nests the array"),
    "inside": (lambda a: rename(a, "image/patches/deep"), "it nests the array"),
    "objects": (lambda a: a["arrays"]["image/pooled"].update(dtype="O"), "not understood: arrays"),
    "endless": (
        lambda a: a["arrays"]["image/pooled"].update(shape=[10**15, 7], chunk=1),
        "more than can be addressed|more than 10000000",
    ),
    "negative": (lambda a: a["arrays"]["image/pooled"].update(chunk=-1), "not understood: arrays"),
    "no stream": (lambda a: stream_named(a, "image/wonder"), "was edited|it lacks the array"),
    "lacks": (lambda a: a["arrays"].pop("image/id"), "it lacks the array image/id"),
}


def stream_named(attributes: dict[str, Any], name: str) -> None:
    """A claim that agrees with itself, of a stream that no cache has."""
    spec = attributes["spec"]
    spec["streams"] = [*spec["streams"], name]
    attributes["fingerprint"] = CacheSpec.model_validate(spec).fingerprint()
    attributes["arrays"][name] = {**attributes["arrays"].pop("image/pooled"), "name": name}


def rename(attributes: dict[str, Any], name: str) -> None:
    layout = attributes["arrays"].pop("image/pooled")
    attributes["arrays"][name] = {**layout, "name": name}


@pytest.mark.parametrize("change", HEADERS)
def test_a_header_from_a_stranger_is_not_believed(
    make_cache: Make, fast_path: Path, change: str
) -> None:
    file = export_hdf5(make_cache(), fast_path / "c.h5")
    do, message = HEADERS[change]
    with h5py.File(file, "r+") as h5:
        reheader(h5, do)
    with pytest.raises(CacheError, match=message):
        import_hdf5(file, fast_path / "in/back.zarr")
    assert sorted(p.name for p in fast_path.iterdir()) in (
        ["c.h5", "demo.zarr"],
        ["c.h5", "demo.zarr", "in"],
    )


def test_other_files_are_named_for_what_they_are(fast_path: Path) -> None:
    with pytest.raises(CacheNotFound, match="does not exist; make one with: headstart export"):
        import_hdf5(fast_path / "none.h5", fast_path / "c.zarr")
    with pytest.raises(CacheNotFound, match="is a folder"):
        import_hdf5(fast_path, fast_path / "c.zarr")
    with h5py.File(fast_path / "foreign.h5", "w") as h5:
        h5["feats"] = np.zeros((3, 4))
    with pytest.raises(
        CacheCorrupt, match=r"it holds feats\); a foreign feature file comes in with a mapping"
    ):
        import_hdf5(fast_path / "foreign.h5", fast_path / "c.zarr")
    (fast_path / "text.h5").write_text("hello")
    with pytest.raises(CacheCorrupt, match="cannot be read as HDF5"):
        import_hdf5(fast_path / "text.h5", fast_path / "c.zarr")
    assert not (fast_path / "c.zarr").exists()


def test_only_a_sealed_and_intact_cache_is_exported(make_cache: Make, fast_path: Path) -> None:
    cache = make_cache()
    file = cache.chunks.file("image/patches", 2)
    good = file.read_bytes()
    file.write_bytes(good[:5] + b"?" + good[6:])
    with pytest.raises(CacheCorrupt, match="chunk 2 of image/patches is damaged"):
        export_hdf5(cache, fast_path / "c.h5")
    file.unlink()
    with pytest.raises(CacheIncomplete, match="only a sealed cache is exported"):
        export_hdf5(cache, fast_path / "c.h5")
    file.write_bytes(good)
    cache.unseal()
    with pytest.raises(CacheIncomplete, match="only a sealed cache is exported"):
        export_hdf5(FeatureCache.open(cache.path, allow_building=True), fast_path / "c.h5")
    assert not list(fast_path.glob("c.h5*"))


def test_nothing_is_overwritten_and_repeating_does_nothing(
    make_cache: Make, fast_path: Path
) -> None:
    cache, other = make_cache("a.zarr"), make_cache("b.zarr", dataset=dataset(5))
    file = export_hdf5(cache, fast_path / "c.h5")
    before = file.stat()
    assert export_hdf5(cache, file).stat() == before
    with pytest.raises(CacheMismatch, match="an export of another cache"):
        export_hdf5(other, file)
    (fast_path / "notes.h5").write_text("mine")
    with pytest.raises(CacheMismatch, match="exists and is something else"):
        export_hdf5(cache, fast_path / "notes.h5")
    assert (fast_path / "notes.h5").read_text() == "mine"
    back = import_hdf5(file, fast_path / "back.zarr")
    stamps = {p: p.stat().st_mtime_ns for p in back.path.rglob("zarr.json")}
    assert import_hdf5(file, back.path).digest() == cache.digest()
    assert stamps == {p: p.stat().st_mtime_ns for p in back.path.rglob("zarr.json")}
    with pytest.raises(CacheMismatch, match=r"dataset\.n_images: expected 13, found 5"):
        import_hdf5(file, other.path)
    (fast_path / "full").mkdir()
    (fast_path / "full/notes").write_text("mine")
    with pytest.raises(CacheNotFound, match="is not a feature cache"):
        import_hdf5(file, fast_path / "full")
    back.chunks.file("image/pooled", 0).unlink()
    assert import_hdf5(file, back.path).verify().ok, "a lost chunk is brought back"


def test_a_cache_of_the_same_claim_and_other_pixels_is_not_mixed_in(
    make_cache: Make, fast_path: Path
) -> None:
    data = dataset()
    swapped = tuple(
        replace(r, open=o.open) for r, o in zip(data.images, reversed(data.images), strict=True)
    )
    cache = make_cache("a.zarr")
    file = export_hdf5(cache, fast_path / "c.h5")
    other = make_cache("b.zarr", dataset=replace(data, images=swapped))
    with pytest.raises(CacheMismatch, match=r"of the same claim .* other bytes"):
        import_hdf5(file, other.path)
    other = make_cache("d.zarr", batch_size=5)
    other.unseal()
    with pytest.raises(CacheMismatch, match=r"of the same claim .* it was cut"):
        import_hdf5(file, other.path)


def test_a_full_disk_leaves_no_half_file_and_the_source_as_it_was(
    make_cache: Make, tmp_path: Path, fast_path: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may mount the small disk that is filled here")
    cache = make_cache(dataset=dataset(900, 40), chunk_bytes=3000)
    file = export_hdf5(cache, fast_path / "whole.h5")
    disk = tmp_path / "disk"
    disk.mkdir()
    for size in (16, 40, 60, 80, 100):
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k,nr_inodes=5000", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("this machine does not allow mounting a small disk")
        try:
            with pytest.raises(OSError, match="No space left"):
                export_hdf5(cache, disk / "c.h5")
            assert list(disk.iterdir()) == []
            with pytest.raises(OSError, match="No space left"):
                import_hdf5(file, disk / "c.zarr")
            remount = ["mount", "-o", "remount,size=64m,nr_inodes=50000", str(disk)]
            subprocess.run(remount, check=True)
            assert import_hdf5(file, disk / "c.zarr").digest() == cache.digest()
            assert export_hdf5(cache, disk / "c.h5").read_bytes() == file.read_bytes()
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    assert cache.verify().ok


def test_ctrl_c_leaves_nothing_half(
    make_cache: Make, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, calls, plain = make_cache(), 0, os.pwrite

    def stopped(*arguments: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(os, "pwrite", stopped)
    with pytest.raises(KeyboardInterrupt):
        export_hdf5(cache, fast_path / "c.h5")
    assert not list(fast_path.glob("c.h5*"))
    assert cache.verify().ok
    assert export_hdf5(cache, fast_path / "c.h5").is_file()


def test_two_exports_to_one_name_do_not_meet(make_cache: Make, fast_path: Path) -> None:
    cache, file = make_cache(), fast_path / "c.h5"
    with whole_or_absent(file), pytest.raises(CacheLocked, match="another process is exporting"):
        export_hdf5(cache, file)


@given(
    strings=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=9),
    values=hypothesis.extra.numpy.arrays(
        st.sampled_from(["<f2", "<f4", "<i4", "<i8"]),
        hypothesis.extra.numpy.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    ),
)
@settings(max_examples=60, deadline=None)
def test_any_array_comes_back(fast_folder: Path, strings: list[str], values: np.ndarray) -> None:
    with tempfile.TemporaryDirectory(dir=fast_folder) as made:
        contents = Contents(
            tasks=Tasks(),
            arrays={
                "image/id": [str(i) for i in range(len(strings))],
                "text/id": [],
                "text/string": [],
                "word/string": strings,
                "readout/a.b": values,
                "text/ids": np.arange(values.size, dtype=np.int32),
            },
        )
        spec = CacheSpec(
            backbone=SPEC,
            dataset=DatasetSpec(name="n", digest="d", decode="c", n_images=len(strings), n_texts=0),
            streams=("text/pooled",),
        )
        cache = FeatureCache.create(Path(made, "a.zarr"), spec, contents, chunk_bytes=16)
        cache.seal()
        file = export_hdf5(FeatureCache.open(cache.path), Path(made, "a.h5"))
        back = import_hdf5(file, Path(made, "b.zarr"))
        assert back.digest() == cache.digest()
        assert files(back) == files(cache)


def test_the_verbs_come_and_go(
    make_cache: Make, fast_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, file = make_cache(), fast_path / "c.h5"
    assert main(["export", str(cache.path), str(file)]) == 0
    assert "every chunk compared" in capsys.readouterr().out
    command = ["import", str(file), "--out", str(fast_path / "back.zarr")]
    assert main(command) == 0
    assert "13 images and 9 texts in" in capsys.readouterr().out
    assert main(command) == 0
    assert "finished already" in capsys.readouterr().out
    assert main([*command, "--dataset", "folder"]) == 1
    assert "belong to a mapping" in capsys.readouterr().err
    (fast_path / "file").write_text("in the way")
    assert main(["export", str(cache.path), str(fast_path / "file/c.h5")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_opening_a_cache_and_help_import_no_h5py() -> None:
    code = (
        "import sys, cache_builder, cache_builder.cli\nfrom cache_builder import FeatureCache\n"
        "assert 'h5py' not in sys.modules\nimport cache_builder.hdf5\nassert 'h5py' in sys.modules\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("verb", ["export", "import"])
def test_ctrl_c_is_one_sentence_and_its_own_exit_status(
    make_cache: Make,
    fast_path: Path,
    verb: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = make_cache()
    file = export_hdf5(cache, fast_path / "c.h5")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    commands = {
        "export": ["export", str(cache.path), str(fast_path / "d.h5")],
        "import": ["import", str(file), "--out", str(fast_path / "back.zarr")],
    }
    with monkeypatch.context() as patched:
        patched.setattr(FeatureCache, "write_chunk", stop)
        patched.setattr(os, "pwrite", stop)
        with pytest.raises(SystemExit) as info:
            main(commands[verb])
    assert info.value.code == 130
    assert "stopped while writing" in capsys.readouterr().err
    assert not list(fast_path.glob("d.h5*"))
    assert main(commands[verb]) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"storage": "lossless", "chunk_bytes": 100_000},
        {"storage": "int8-channel"},
        {"storage": "fp8-token", "inner_rows": 2, "chunk_bytes": 200},
        {"storage": "bf16"},
    ],
    ids=lambda o: o["storage"],
)
def test_every_storage_comes_back_byte_for_byte(
    make_cache: Make, fast_path: Path, options: dict[str, Any]
) -> None:
    """Large chunks too: the bytes of a compressed one must not depend on how many threads share the work."""
    cache = make_cache(dataset=dataset(4000, 9), **options)
    back = import_hdf5(export_hdf5(cache, fast_path / "c.h5"), fast_path / "back.zarr")
    assert back.digest() == cache.header.digest
    assert back.verify().ok
    for (array, chunk), entry in cache.chunks.manifest.items():
        assert back.chunks.manifest[array, chunk] == entry
