"""Samples appended to a sealed cache: the old rows stay, bit for bit, and the new ones are those of a new cache."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stand_in import KeptStandIn, StandIn, WordStandIn, dataset

from cache_builder import FeatureCache, build
from cache_builder.append import next_place
from cache_builder.datasets.base import Dataset, Tasks, TextRecord
from cache_builder.errors import CacheError, CacheIncomplete, CacheMismatch, CacheNotFound
from cache_builder.reader import ChunkReader

ALL = (
    "image/pooled",
    "image/patches",
    "image/block_1",
    "crop/pooled",
    "text/pooled",
    "text/tokens",
)
CASES = [
    (StandIn, "fp16"),
    (StandIn, "int8-channel"),
    (WordStandIn, "bf16"),
    (KeptStandIn, "fp16"),
    (KeptStandIn, "lossless"),
]


def some(n_images: int, n_texts: int, **options: Any) -> Dataset:
    """The first samples of one data set, with what is asked of them."""
    whole = dataset(40, 30, **options)
    return replace(
        whole,
        images=whole.images[:n_images],
        texts=whole.texts[:n_texts],
        tasks=dataset(n_images, n_texts).tasks,
    )


def make(data: Dataset, path: Path, kind: type[StandIn], storage: str = "fp16", **options: Any):
    streams = [*ALL, *(["word/states"] if kind is WordStandIn else [])]
    if kind is KeptStandIn:
        streams.remove("text/tokens")
    given = {"streams": streams, "batch_size": 4, "chunk_bytes": 100, "progress": False}
    return build(data, kind(), path, storage=storage, **{**given, **options})


def numbers(cache: FeatureCache, stream: str, ids: list[str]) -> list[np.ndarray]:
    side = stream.partition("/")[0]
    rows = cache.rows("text" if side == "text" else "image", ids)
    if not cache.is_ragged(stream):
        return list(cache.read(stream, rows))
    values, offsets = cache.read_ragged(stream, rows)
    return np.split(values, offsets[1:-1])


@pytest.mark.parametrize(("kind", "storage"), CASES)
def test_old_rows_stay_and_new_ones_are_as_in_a_new_cache(
    kind: type[StandIn], storage: str, fast_path: Path
) -> None:
    path = fast_path / "c.zarr"
    first = make(some(13, 9), path, kind, storage)
    held = {s: first.stored(s, np.arange(first.layout(s).shape[0])) for s in first.streams}
    ids = {
        side: first.image_ids if side == "image" else first.text_ids for side in ("image", "text")
    }
    for n_images, n_texts in ((14, 9), (30, 21), (30, 25)):
        grown = make(some(n_images, n_texts), path, kind, storage, append=True)
        assert grown.verify().ok
        for stream in (s for s in held if not s.startswith("word/")):
            stored = grown.stored(stream, np.arange(len(held[stream])))
            np.testing.assert_array_equal(stored, held[stream])
        assert grown.image_ids[:13] == ids["image"]
        assert grown.text_ids[:9] == ids["text"]
        assert sorted(grown.image_ids) == sorted(f"i{i}" for i in range(n_images))
    assert grown.spec.generations[0][:2] == (13, 9)
    assert len(grown.spec.generations) == 3
    assert not next_place(path).exists()
    fresh = make(some(30, 25), fast_path / "fresh.zarr", kind, "fp32")
    for stream in ALL:
        if stream in grown.streams:
            side = "text" if stream.startswith("text") else "image"
            names = [f"{side[0]}{i}" for i in (29, 0, 13, 14) if i < 25 or side == "image"]
            for a, b in zip(
                numbers(grown, stream, names), numbers(fresh, stream, names), strict=True
            ):
                np.testing.assert_allclose(a, b, rtol=0.07, atol=0.05 * np.abs(b).max())


def test_only_what_is_new_is_encoded(fast_path: Path) -> None:
    path = fast_path / "c.zarr"
    make(some(13, 9), path, StandIn, streams=["image/pooled", "image/patches", "text/pooled"])
    backbone = StandIn()
    build(
        some(20, 12),
        backbone,
        path,
        streams=["image/pooled", "image/patches", "text/pooled"],
        append=True,
        batch_size=4,
        progress=False,
    )
    assert sum(backbone.encoded) == 7 + 3


def test_whole_chunks_are_shared_with_the_generation_before(fast_path: Path) -> None:
    path = fast_path / "c.zarr"
    first = make(some(13, 9), path, StandIn)
    inodes = {i: first.chunks.file("image/patches", i).stat().st_ino for i in range(2)}
    grown = make(some(20, 9), path, StandIn, append=True)
    assert grown.layout("image/patches").chunk == first.layout("image/patches").chunk
    for i, inode in inodes.items():
        assert grown.chunks.file("image/patches", i).stat().st_ino == inode


def test_appending_nothing_changes_nothing_and_a_repeated_build_finds_it_finished(
    fast_path: Path,
) -> None:
    path = fast_path / "c.zarr"
    make(some(13, 9), path, StandIn)
    grown = make(some(20, 12), path, StandIn, append=True)
    assert make(some(20, 12), path, StandIn, append=True).digest() == grown.header.digest
    with pytest.raises(CacheMismatch, match="generations: expected"):
        make(some(20, 12), path, StandIn)


@pytest.mark.parametrize("lost", ["image/patches", "image/pooled", "text/tokens", "crop/pooled"])
def test_a_lost_chunk_of_any_generation_comes_back(lost: str, fast_path: Path) -> None:
    path = fast_path / "c.zarr"
    make(some(13, 9), path, StandIn)
    grown = make(some(30, 21), path, StandIn, append=True)
    assert grown.chunks.command.endswith(f"--append --out {path}")
    for first in range(3):
        files = [grown.chunks.file(lost, c) for c in range(first, grown.layout(lost).n_chunks, 3)]
        for file in files:
            file.unlink()
        again = make(some(30, 21), path, StandIn, append=True)
        assert again.digest() == grown.header.digest
        assert all(file.exists() for file in files)
        assert again.verify().ok


def test_quarantine_goes_on(fast_path: Path) -> None:
    path = fast_path / "c.zarr"
    make(some(13, 9, bad=(3, 20)), path, StandIn)
    grown = make(some(30, 9, bad=(3, 20)), path, StandIn, append=True)
    assert set(grown.quarantined) == {"i3", "i20"}
    for stream in ("image/pooled", "image/patches"):
        bad = np.isnan(grown.read(stream)).reshape(30, -1).all(1)
        assert {grown.image_ids[i] for i in np.flatnonzero(bad)} == {"i3", "i20"}


def test_a_reader_that_opened_the_old_generation_is_told_to_open_again(fast_path: Path) -> None:
    path = fast_path / "c.zarr"
    old = FeatureCache.open(make(some(13, 9), path, StandIn).path, check="read")
    reader = ChunkReader(old, "image/patches")
    before = old.read("image/patches")
    make(some(30, 21), path, StandIn, append=True)
    buffer = np.empty((reader.chunk_rows, *reader.row_shape), reader.dtype)
    for chunk in range(reader.n_chunks):  # a loader in the middle of an epoch
        rows = reader.read_chunk(chunk, buffer)
        start = chunk * reader.chunk_rows
        np.testing.assert_array_equal(buffer[:rows], before[start : start + rows])
    for read in (lambda: old.read("image/patches"), lambda: old.texts, lambda: old.tasks):
        with pytest.raises(CacheMismatch, match=r"was changed since it was opened.*open it again"):
            read()


Change = Callable[[Dataset], Dataset]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: replace(d, images=d.images[1:]), r"1 of the 13 images .* 'i0'; appending only"),
        (lambda d: replace(d, texts=d.texts[2:]), r"2 of the 9 texts .* 't0'"),
        (
            lambda d: replace(d, texts=(TextRecord("t0", "other"), *d.texts[1:])),
            r"1 texts .* 't0': 'text 0 ' became 'other'",
        ),
    ],
)
def test_what_was_there_must_still_be_there(change: Change, message: str, fast_path: Path) -> None:
    path = fast_path / "c.zarr"
    first = make(some(13, 9), path, StandIn)
    changed = replace(change(some(20, 12)), tasks=Tasks())
    with pytest.raises(CacheError, match=message):
        make(changed, path, StandIn, append=True)
    assert FeatureCache.open(path).digest() == first.header.digest


def test_anything_else_that_differs_is_named(fast_path: Path) -> None:
    path = fast_path / "c.zarr"
    make(some(13, 9), path, StandIn)
    with pytest.raises(CacheMismatch, match=r"storage: expected 'fp32', found 'fp16'"):
        make(some(20, 9), path, StandIn, "fp32", append=True)
    with pytest.raises(CacheNotFound, match="no feature cache"):
        make(some(20, 9), fast_path / "none.zarr", StandIn, append=True)


def test_an_unfinished_cache_is_finished_first(fast_path: Path) -> None:
    path = fast_path / "c.zarr"
    make(some(13, 9), path, StandIn)
    lines = (path / "manifest.jsonl").read_text().splitlines(keepends=True)
    (path / "manifest.jsonl").write_text("".join(lines[:-2]))
    with pytest.raises(CacheIncomplete, match="mend it before anything is added"):
        make(some(20, 9), path, StandIn, append=True)


def test_a_damaged_row_is_not_given_a_new_checksum(fast_path: Path) -> None:
    path = fast_path / "c.zarr"
    first = make(some(13, 9), path, StandIn)
    last = first.layout("image/patches").n_chunks - 1  # cut by the border, so its rows are copied
    file = first.chunks.file("image/patches", last)
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CacheError, match=rf"chunk {last} of image/patches is damaged"):
        make(some(20, 12), path, StandIn, append=True)
    assert not FeatureCache.open(path).verify().ok
    file.unlink()
    make(some(13, 9), path, StandIn)
    assert make(some(20, 12), path, StandIn, append=True).verify().ok


def test_an_append_that_was_stopped_does_not_bind_the_next_one(fast_path: Path) -> None:
    path = fast_path / "c.zarr"
    make(some(13, 9), path, StandIn)

    def stopped(_: object) -> dict:
        raise RuntimeError("power off")

    with pytest.raises(RuntimeError, match="power off"):
        build(some(20, 12), StandIn(stopped), path, streams=ALL, append=True, progress=False)
    assert next_place(path).exists()
    grown = make(some(24, 12), path, StandIn, append=True)
    assert grown.spec.dataset.n_images == 24
    assert grown.verify().ok
    assert not next_place(path).exists()


def test_shards_of_another_size_are_not_taken_over(fast_path: Path) -> None:
    path = fast_path / "c.zarr"
    make(some(13, 9), path, StandIn, inner_rows=2)
    assert make(some(30, 12), path, StandIn, append=True, inner_rows=0).verify().ok
    assert make(some(31, 12), path, StandIn, append=True, inner_rows=3).verify().ok
