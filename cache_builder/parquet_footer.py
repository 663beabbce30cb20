"""What the footer of a parquet file says of its row groups, read without pyarrow.

pyarrow ends the whole process on some damaged footers: its `RowGroupMetaData.column` lets C++ exceptions through, about
once in 200 files with a few bits flipped (26.0.1). Source: parquet.thrift of apache/parquet-format, and Thrift's
compact protocol; only the fields used here are named.
"""

from dataclasses import dataclass
from typing import Any

ROW_GROUPS = 4
"""Field of FileMetaData."""

COLUMNS, N_ROWS = 1, 3
"""Fields of RowGroup."""

META_DATA = 3
"""Field of ColumnChunk."""

PATH_IN_SCHEMA, TOTAL_UNCOMPRESSED_SIZE = 3, 6
"""Fields of ColumnMetaData."""

DEEPEST = 32
"""Levels of nesting; parquet needs about ten."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows, and column → bytes of all that is in it, uncompressed, as stated."""

    n_rows: int
    sizes: dict[str, int]


def row_groups(footer: bytes) -> list[RowGroup]:
    """The row groups in a file's footer, which is FileMetaData in Thrift's compact protocol.

    Raises:
        ValueError: it is cut, or is no such thing.
    """
    try:
        found = []
        for group in _Reader(footer).struct().get(ROW_GROUPS, []):
            sizes: dict[str, int] = {}
            for chunk in group[COLUMNS]:
                about = chunk[META_DATA]
                column = about[PATH_IN_SCHEMA][0].decode()
                sizes[column] = sizes.get(column, 0) + about[TOTAL_UNCOMPRESSED_SIZE]
            if min(group[N_ROWS], *sizes.values(), 0) < 0:
                raise ValueError("it states a negative size")
            found.append(RowGroup(group[N_ROWS], sizes))
        return found
    except (LookupError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"its footer is damaged ({type(error).__name__})") from error


class _Reader:
    """Values of the compact protocol, one after another: a struct is a dict by field number, a text is bytes."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.depth = data, 0, 0

    def struct(self) -> dict[int, Any]:
        self.depth += 1
        if self.depth > DEEPEST:
            raise ValueError("its footer is nested too deeply")
        found: dict[int, Any] = {}
        field = 0
        while head := self.byte():
            field = field + (head >> 4) if head >> 4 else self.integer()
            kind = head & 15
            found[field] = kind == 1 if kind in (1, 2) else self.value(kind)
        self.depth -= 1
        return found

    def value(self, kind: int) -> Any:
        if kind in (1, 2, 3):
            return self.byte()
        if kind in (4, 5, 6):
            return self.integer()
        if kind == 7:
            return self.bytes(8)
        if kind == 8:
            return self.bytes(self.varint())
        if kind in (9, 10):
            head = self.byte()
            n = self.varint() if head >> 4 == 15 else head >> 4
            return [self.value(head & 15) for _ in range(n)]
        if kind == 12:
            return self.struct()
        # 11 is a map, which parquet has none of.
        raise ValueError(f"its footer has a value of kind {kind}")

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def bytes(self, n: int) -> bytes:
        if self.at + n > len(self.data):
            raise IndexError
        self.at += n
        return self.data[self.at - n : self.at]

    def varint(self) -> int:
        found = 0
        for shift in range(0, 70, 7):
            byte = self.byte()
            found |= (byte & 127) << shift
            if byte < 128:
                return found
        raise ValueError("its footer has a number of more than 64 bits")

    def integer(self) -> int:
        """A signed number: 0, 1, 2, 3 stand for 0, -1, 1, -2."""
        n = self.varint()
        return n >> 1 ^ -(n & 1)
