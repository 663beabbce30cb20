"""A cache as a folder of parquet tables: `export_parquet`; needs the optional pyarrow.

    photos.parquet/
      images.parquet   a row an image: id, split, attr …, image/pooled, image/patches …, crop/pooled
      texts.parquet    a row a text: id, string, text/pooled, text/tokens
      words.parquet    a row a part of a word, of caches with word/states
      header.json  tasks.json  quarantine.json

A cell of numbers is a list, flat; its shape is metadata of the column, -1 where rows differ in length. Numbers are
float32, which every reader of parquet knows and which holds all that is stored; pixels are uint8.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from cache_builder import exporting
from cache_builder.aside import new_folder
from cache_builder.cache import FeatureCache
from cache_builder.errors import CacheError
from cache_builder.exporting import Given, numbers, parts


@dataclass(frozen=True, slots=True)
class Table:
    """One file: columns of strings, and of rows of streams."""

    file: str
    strings: Mapping[str, Sequence[str]]
    streams: Sequence[str]


def export_parquet(cache: FeatureCache, folder: str | Path, *, progress: bool = False) -> Path:
    """Write a sealed cache as parquet tables into a folder, which appears whole, or not at all.

    Args:
        cache: sealed. It is only read, and every chunk compared with its checksum.
        folder: a free name.
        progress: show a bar.

    Returns:
        The folder.

    Raises:
        CacheError: pyarrow is missing.
        CacheIncomplete, CacheCorrupt: the cache is not finished, or not what was written.
        CacheMismatch: the name is taken.
        CacheLocked: another process is exporting to this name.
        OSError: the disk is full, or the place cannot be written; nothing is left behind.
    """
    folder = Path(folder)
    _require_pyarrow()
    exporting.check_free(folder)
    given = exporting.given(cache)
    with (
        new_folder(folder) as made,
        tqdm(desc="export", unit="B", unit_scale=True, disable=not progress) as bar,
    ):
        for table in _tables(given):
            for n_bytes in _write(given, table, made):
                bar.update(n_bytes)
        for name, text in given.texts().items():
            (made / f"{name}.json").write_text(text, encoding="utf-8")
    return folder


def _tables(given: Given) -> Iterator[Table]:
    cache = given.cache
    ids = [cache.image_ids[row] for row in given.images]
    yield Table("images", {"id": ids, **given.labels}, given.streams("image", "crop"))
    texts = {"id": cache.text_ids, "string": cache.texts}
    yield Table("texts", texts, given.streams("text"))
    if "word/id" in cache.header.arrays:
        owners = np.repeat(np.arange(len(cache.word_ids)), np.diff(cache.word_parts)).tolist()
        words = {"id": [cache.word_ids[i] for i in owners], "string": cache.word_strings}
        yield Table("words", words, given.streams("word"))


def _write(given: Given, table: Table, folder: Path) -> Iterator[int]:
    """Write a table a row group at a time; gives the bytes of the numbers of each."""
    import pyarrow as pa
    from pyarrow import parquet as pq

    n = len(table.strings["id"])
    fields = [pa.field(name, pa.string()) for name in table.strings]
    fields += [_field(given, stream) for stream in table.streams]
    sizes = reduce(add, (given.sizes(s) for s in table.streams), np.full(n, 64))
    digest = {"headstart": json.dumps({"cache": given.cache.header.digest})}
    packing: dict[str, Any] = {
        "use_dictionary": [name for name in table.strings if name not in ("id", "string")],
        "write_statistics": list(table.strings),
    }
    with pq.ParquetWriter(
        folder / f"{table.file}.parquet",
        pa.schema(fields, metadata=digest),
        compression="zstd",
        **packing,
    ) as writer:
        for part in parts(sizes):
            cells = [pa.array(values[part], pa.string()) for values in table.strings.values()]
            for stream, field in zip(table.streams, fields[len(cells) :], strict=True):
                values, offsets = numbers(given, stream, part)
                cells.append(_lists(values, offsets, field.type))
            writer.write_batch(pa.record_batch(cells, schema=writer.schema))
            yield int(sizes[part].sum())


def _field(given: Given, stream: str) -> Any:
    """A column of lists, whose shape its metadata tells."""
    import pyarrow as pa

    first, offsets = numbers(given, stream, slice(0, 0))
    number = pa.uint8() if first.dtype == np.uint8 else pa.float32()
    shape = [*((-1,) if offsets is not None else ()), *first.shape[1:]]
    fixed = int(np.prod(shape)) if offsets is None else -1
    return pa.field(stream, pa.list_(number, fixed), metadata={"shape": json.dumps(shape)})


def _lists(values: NDArray[Any], offsets: NDArray[np.int64] | None, kind: Any) -> Any:
    """Rows as cells."""
    import pyarrow as pa

    number = np.uint8 if values.dtype == np.uint8 else np.float32
    flat = pa.array(values.astype(number, copy=False).reshape(-1), kind.value_type)
    if offsets is None:
        return pa.FixedSizeListArray.from_arrays(flat, type=kind)
    width = int(np.prod(values.shape[1:]))
    return pa.ListArray.from_arrays(pa.array(offsets * width, pa.int32()), flat, type=kind)


def _require_pyarrow() -> None:
    try:
        import_module("pyarrow")
    except ImportError as error:
        raise CacheError(
            "parquet tables are written by pyarrow, which is not installed; pip install 'headstart[parquet]'"
        ) from error
