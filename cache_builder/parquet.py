"""Parquet tables as checked rows and image cells, a row group at a time; needs the optional pyarrow.

Rules (docs/protocols.md, parquet tables): plain columns only. A file may carry an Arrow schema of its own, under which
types that some library registered are brought to life while the file is opened; that schema is hidden from the reader,
and a file whose schema names extension types is refused. What pandas or others left in the file is not looked at.
"""

import base64
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from itertools import accumulate, pairwise
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TypeVar

from cache_builder.images import MAX_BYTES, BadImage
from cache_builder.parquet_footer import RowGroup, row_groups
from cache_builder.records import MAX_LINE, DatasetError, check_file

MAX_FILE = 8 * 2**30
MAX_FOOTER = 16 * 2**20
MAX_CHUNK = 256 * 2**20
MAX_ROWS = 10_000_000
"""Sizes in bytes: of a file, its footer, one column of one row group; and rows of a file."""

KEPT = 64 * 2**20
"""Bytes of image columns kept for the next cells; the two last read are kept whatever their size."""

CELLS = 8
"""Image cells decoded at once: a small file may hold one large value for each of its rows."""

TEXTS = 1024
"""Rows of texts decoded at once."""

Kind = Literal["text", "number", "image", "other"]

T = TypeVar("T")


class ParquetTable:
    """One file: what its columns are, its rows of texts, and its image cells one by one, from any thread.

    Args:
        path: the file.
        max_cell: largest image cell, in bytes.
        max_chunk: most bytes of one column in one row group, which is what is read at once.

    Raises:
        DatasetError: pyarrow is missing; not a whole parquet file; too large; extension types.
    """

    def __init__(
        self, path: Path, *, max_cell: int = MAX_BYTES, max_chunk: int = MAX_CHUNK
    ) -> None:
        self.path, self.max_cell, self.max_chunk = path, max_cell, max_chunk
        check_file(path, MAX_FILE)
        _require_pyarrow(path)
        self._metadata, self._groups = self._guarded(lambda: _metadata(path))
        self.n_rows: int = self._metadata.num_rows
        if self.n_rows > MAX_ROWS:
            raise DatasetError(f"{path} has {self.n_rows:,} rows, more than {MAX_ROWS:,}")
        self._starts = [0, *accumulate(group.n_rows for group in self._groups)]
        if self._starts[-1] != self.n_rows or self._metadata.num_row_groups != len(self._groups):
            raise DatasetError(f"{path} has a footer that contradicts itself; download it again")
        self._file = self._guarded(lambda: self._open([]))
        types = self._guarded(lambda: [(f.name, f.type) for f in self._file.schema_arrow])
        self.kinds: dict[str, Kind] = {name: _kind(kind) for name, kind in types}
        """Column → what it is; a struct with a binary field `bytes` is an image, as plain bytes are."""
        if len(self.kinds) < len(types):
            raise DatasetError(f"{path} has two columns of one name")
        self._plain = {name: _is_binary(kind) for name, kind in types}
        self._lock = Lock()
        self._kept: OrderedDict[tuple[str, int], tuple[list[bytes | None], int]] = OrderedDict()

    def rows(self, columns: Sequence[str]) -> Iterator[dict[str, str | int | None]]:
        """Texts and whole numbers of the named columns, row by row.

        Raises:
            DatasetError: a column is of another kind, a text is longer than 1 MiB or no UTF-8, the file is damaged.
        """
        for name in columns:
            if self.kinds[name] not in ("text", "number"):
                raise DatasetError(
                    f"{self.path}: column {name!r} holds neither texts nor whole numbers"
                )
        if not columns:
            yield from ({} for _ in range(self.n_rows))
            return
        # As dictionaries: one long value that many rows share stays one value.
        file = self._guarded(lambda: self._open([c for c in columns if self.kinds[c] == "text"]))
        for group, (start, stop) in enumerate(pairwise(self._starts)):
            self._check_chunk(group, columns)
            batches = file.iter_batches(TEXTS, row_groups=[group], columns=list(columns))
            found = 0
            while cells := self._guarded(lambda it=batches: _next_values(it, columns)):
                found += len(cells[0])
                yield from (
                    dict(zip(columns, row, strict=True)) for row in zip(*cells, strict=True)
                )
            self._check_rows(group, found, stop - start)

    def cell(self, column: str, row: int) -> bytes:
        """The encoded picture in an image column.

        Raises:
            BadImage: the cell is empty or too large, or its part of the file is damaged.
        """
        group = bisect_right(self._starts, row) - 1
        with self._lock:
            try:
                values = self._chunk(column, group)
            except DatasetError as error:
                raise BadImage(str(error)) from error
            found = values[row - self._starts[group]]
        if found is None:
            raise BadImage(f"row {row} of {self.path.name} holds no bytes under {column!r}")
        if len(found) > self.max_cell:
            raise BadImage(
                f"row {row} of {self.path.name} has {len(found):,} bytes under {column!r}, "
                f"more than the {self.max_cell:,} allowed"
            )
        return found

    def _chunk(self, column: str, group: int) -> list[bytes | None]:
        """Cells of one column in one row group, read when first asked for."""
        if found := self._kept.get((column, group)):
            self._kept.move_to_end((column, group))
            return found[0]
        self._check_chunk(group, [column])
        plain, values, size = self._plain[column], [], 0
        leaf = column if plain else f"{column}.bytes"
        batches = self._file.iter_batches(CELLS, row_groups=[group], columns=[leaf])
        while (batch := self._guarded(lambda: next(batches, None))) is not None:
            cells = batch.column(column)
            values += (cells if plain else cells.field("bytes")).to_pylist()
            size += batch.nbytes
            if size > self.max_chunk:
                raise self._too_large(group, column, f"more than {self.max_chunk:,}")
        self._check_rows(group, len(values), self._starts[group + 1] - self._starts[group])
        self._kept[column, group] = values, size
        while len(self._kept) > 2 and sum(s for _, s in self._kept.values()) > KEPT:
            self._kept.popitem(last=False)
        return values

    def _check_chunk(self, group: int, columns: Sequence[str]) -> None:
        """Refuse a row group by the size that its footer states."""
        sizes = self._groups[group].sizes
        for name in columns:
            if sizes.get(name, 0) > self.max_chunk:
                raise self._too_large(group, name, f"{sizes[name]:,}")

    def _check_rows(self, group: int, found: int, stated: int) -> None:
        if found != stated:
            raise DatasetError(
                f"{self.path}: row group {group} has {found:,} rows, its footer says {stated:,}; download it again"
            )

    def _too_large(self, group: int, column: str, size: str) -> DatasetError:
        return DatasetError(
            f"{self.path}: row group {group} has {size} bytes under {column!r}, and at most {self.max_chunk:,} are "
            "read at once; write the file with smaller row groups, say of 100 rows"
        )

    def _open(self, as_dictionary: list[str]) -> Any:
        import pyarrow.parquet as pq

        return pq.ParquetFile(
            self.path,
            metadata=self._metadata,
            read_dictionary=as_dictionary,
            buffer_size=2**20,
            pre_buffer=False,
        )

    def _guarded(self, action: Callable[[], T]) -> T:
        """`action`, with what a damaged file makes a library raise as one kind of error."""
        try:
            return action()
        except (DatasetError, MemoryError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno:  # the disk's fault, not the file's
                raise
            what = next(iter(str(error).splitlines()), type(error).__name__)
            raise DatasetError(f"{self.path} cannot be read as parquet: {what}") from error


def _require_pyarrow(path: Path) -> None:
    try:
        import_module("pyarrow.parquet")  # optional: only this one container needs it
    except ImportError as error:
        raise DatasetError(
            f"{path} is a parquet file, and pyarrow, which reads them, is not installed: "
            "pip install 'headstart[parquet]', or put the same columns into JSON lines with the names of image files"
        ) from error


def _metadata(path: Path) -> tuple[Any, list[RowGroup]]:
    """The footer, with the Arrow schema that it may carry hidden under another key; and what it says of row groups.

    Opening a file brings the types of that schema to life, before anybody can look at them: a library that has
    registered a type may unpickle its parameters then.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        end = file.read(8)
        length = int.from_bytes(end[:4], "little")
        if end[4:] != b"PAR1" or length + 12 > size:
            raise DatasetError(f"{path} is no whole parquet file; download it again")
        if length > MAX_FOOTER:
            raise DatasetError(f"{path} has a footer of {length:,} bytes, more than {MAX_FOOTER:,}")
        file.seek(size - 8 - length)
        footer = file.read(length)
    hidden = footer.replace(b"ARROW:schema", b"hidden:schem")
    metadata = pq.ParquetFile(pa.BufferReader(b"PAR1" + hidden + end)).metadata
    schema = (metadata.metadata or {}).get(b"hidden:schem", b"")
    if b"ARROW:extension:" in base64.b64decode(schema):
        raise DatasetError(
            f"{path} declares Arrow extension types; only plain columns are read: write it without them"
        )
    return metadata, row_groups(footer)


def _kind(kind: Any) -> Kind:
    import pyarrow as pa

    if pa.types.is_string(kind):
        return "text"
    if pa.types.is_integer(kind):
        return "number"
    if _is_binary(kind):
        return "image"
    if pa.types.is_struct(kind) and (i := kind.get_field_index("bytes")) >= 0:
        return "image" if _is_binary(kind.field(i).type) else "other"
    return "other"


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind)


def _next_values(batches: Iterator[Any], columns: Sequence[str]) -> list[list[Any]]:
    """Cells of the next batch, by column; none behind the last."""
    batch = next(batches, None)
    return [] if batch is None else [_values(batch.column(column)) for column in columns]


def _values(column: Any) -> list[Any]:
    """Cells as Python values; those of a dictionary are made once."""
    import pyarrow as pa

    if not pa.types.is_dictionary(column.type):
        return column.to_pylist()
    longest = max((word.as_buffer().size for word in column.dictionary if word.is_valid), default=0)
    if longest > MAX_LINE:
        raise ValueError(f"a text of {longest:,} bytes, more than the {MAX_LINE:,} allowed")
    known = column.dictionary.to_pylist()
    return [None if i is None else known[i] for i in column.indices.to_pylist()]
