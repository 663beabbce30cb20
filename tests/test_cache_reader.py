"""Reading: page-aligned buffers, rows in any order, whole chunks, and arrays that somebody re-encoded."""

import errno
import mmap
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_in import dataset
from zarr.codecs import GzipCodec

from cache_builder import FeatureCache
from cache_builder.errors import CacheCorrupt, CacheError
from cache_builder.reader import ChunkReader, aligned_empty

Make = Callable[..., FeatureCache]


@pytest.mark.parametrize("shape", [(3, 5), (7,), (2, 3, 5)])
@pytest.mark.parametrize("dtype", ["float16", "float32", "int64"])
def test_aligned_memory_starts_on_a_page(shape: tuple[int, ...], dtype: str) -> None:
    values = aligned_empty(shape, dtype)
    assert values.ctypes.data % mmap.PAGESIZE == 0
    assert (values.shape, values.dtype) == (shape, np.dtype(dtype))
    assert values.flags.c_contiguous
    assert values.flags.writeable


def test_chunks_read_one_by_one_are_the_array(make_cache: Make) -> None:
    cache = make_cache()
    for stream in ("image/patches", "image/pooled", "text/tokens", "text/ids"):
        reader = ChunkReader(cache, stream)
        out = aligned_empty((reader.chunk_rows, *reader.row_shape), reader.dtype)
        parts = [out[: reader.read_chunk(i, out)].copy() for i in range(reader.n_chunks)]
        whole: Any = zarr.open_array(str(cache.path), path=stream, mode="r")[:]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
        assert reader.n_rows == len(whole)


@pytest.fixture(scope="module")
def shared(fast_folder):
    from stand_in import StandIn

    from cache_builder import build

    return build(
        dataset(41, 17),
        StandIn(),
        fast_folder / "shared.zarr",
        batch_size=8,
        chunk_bytes=150,
        progress=False,
    )


@settings(derandomize=True, deadline=None, max_examples=60)
@given(rows=st.lists(st.integers(0, 40), max_size=60), data=st.data())
def test_any_rows_in_any_order_with_repeats(
    shared: FeatureCache, rows: list[int], data: st.DataObject
) -> None:
    if data.draw(st.booleans()):
        rows = sorted(rows)
    index = np.array(rows, np.int64)
    for stream in ("image/patches", "image/pooled"):
        np.testing.assert_array_equal(shared.read(stream, index), shared.read(stream)[index])


@settings(derandomize=True, deadline=None, max_examples=60)
@given(rows=st.lists(st.integers(0, 16), max_size=25))
def test_any_ragged_rows_in_any_order(shared: FeatureCache, rows: list[int]) -> None:
    for stream in ("text/tokens", "text/ids"):
        whole, at = shared.read_ragged(stream)
        values, offsets = shared.read_ragged(stream, np.array(rows, np.int64))
        assert len(offsets) == len(rows) + 1
        for i, row in enumerate(rows):
            np.testing.assert_array_equal(
                values[offsets[i] : offsets[i + 1]], whole[at[row] : at[row + 1]]
            )


@pytest.mark.parametrize("small_run", [0, 1 << 30])
def test_single_reads_and_whole_chunks_give_the_same(
    shared: FeatureCache, monkeypatch: pytest.MonkeyPatch, small_run: int
) -> None:
    monkeypatch.setattr("cache_builder.reader.SMALL_RUN", small_run)
    monkeypatch.setattr("cache_builder.reader.WHOLE_SHARE", 2.0)
    rows = np.array([40, 3, 4, 5, 0, 39, 3, 17, 18], np.int64)
    np.testing.assert_array_equal(
        shared.read("image/patches", rows), shared.read("image/patches")[rows]
    )


def test_a_wrong_buffer_is_refused(make_cache: Make) -> None:
    reader = ChunkReader(make_cache(), "image/patches")
    with pytest.raises(ValueError, match=r"out is float32\[3, 5, 3\], but image/patches needs"):
        reader.read_chunk(0, np.empty((3, 5, 3), np.float32))
    with pytest.raises(ValueError, match="contiguous"):
        reader.read_chunk(0, np.empty((5, 3, 3), np.float16).swapaxes(0, 1))
    with pytest.raises(ValueError, match=r"out has 60 bytes, too few for 90"):
        reader.read_chunk(0, np.empty((2, 5, 3), np.float16))


def test_a_failing_disk_is_named_and_any_other_error_stays_what_it_is(
    make_cache: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_cache().place.open("tasks.json")
    out = np.empty(file.size, np.uint8)
    with pytest.raises(
        CacheCorrupt, match=rf"tasks\.json ends at byte {file.size}, before what was"
    ):
        file.read_into(out, 3)
    for number, kind, message in (
        (errno.EIO, CacheCorrupt, r"tasks\.json cannot be read: the disk reports"),
        (errno.ENOMEM, OSError, os.strerror(errno.ENOMEM)),
    ):

        def failing(*_: object, number: int = number) -> int:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "preadv", failing)
        with pytest.raises(kind, match=message):
            file.read_into(out, 0)
    file.close()


def test_arrays_without_rows_are_refused(make_cache: Make) -> None:
    cache = make_cache()
    for array in ("image/id", "readout/logit_scale"):
        with pytest.raises(CacheError, match="strings and single numbers have no rows"):
            ChunkReader(cache, array)


def test_an_array_that_somebody_encoded_anew_is_refused(make_cache: Make) -> None:
    cache = make_cache()
    before = cache.read("image/patches")
    layout = cache.layout("image/patches")
    again = zarr.create_array(
        str(cache.path),
        name="image/patches",
        shape=layout.shape,
        chunks=layout.chunk_shape,
        dtype=layout.dtype,
        dimension_names=layout.dims,
        compressors=GzipCodec(),
        overwrite=True,
    )
    again[:] = before
    for read in (lambda: ChunkReader(cache, "image/patches"), lambda: cache.read("image/patches")):
        with pytest.raises(CacheCorrupt, match=r"cannot be read chunk by chunk: .*codecs"):
            read()
