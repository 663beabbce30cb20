"""Tables with two images and two captions a row, read once for the sets that come so. No data set itself, so no `load`.

JSON lines, CSV or parquet with the columns of `Columns`; caption i is of image i. A picture is the name of a file below
a folder of images, or, in parquet, its encoded bytes. Reader rules: docs/protocols.md, matching readers.
"""

import filecmp
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL.Image import Image

from cache_builder.datasets.base import ImageRecord, MatchingExample, TextRecord
from cache_builder.datasets.checking import file_name, text
from cache_builder.datasets.files import (
    NOT_LOOKED_FOR,
    WITHOUT,
    image_record,
    listed,
    missing_images,
)
from cache_builder.images import decode
from cache_builder.parquet import ParquetTable
from cache_builder.records import DatasetError, DatasetNotFound, read_csv, read_jsonl

NO_CATEGORY = "all"
"""Category of every row of a table without one."""


@dataclass(frozen=True, slots=True)
class Columns:
    """What the columns of a table are called.

    Attributes:
        images: those of image 0 and 1.
        captions: those of caption 0 and 1.
        category: joined by "_"; () means that the table may have a column `category`.
        id: None means that the table may have a column `id`, "" that rows go by their number whatever it has.

    """

    images: tuple[str, str] = ("image_0", "image_1")
    captions: tuple[str, str] = ("caption_0", "caption_1")
    category: tuple[str, ...] = ()
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Pictures:
    """Where the pictures of a table lie, and what they are called.

    Attributes:
        folder: of those that are files.
        suffixes: endings tried, in order, behind the name that the table has.
        by_row: ids are row number and column, as for embedded pictures; else the file's name is its id.
        required: whether they are looked for.
        follow_links: open pictures through links that leave the folder.

    """

    folder: Path
    suffixes: tuple[str, ...] = ("",)
    by_row: bool = False
    required: bool = True
    follow_links: bool = False


@dataclass(frozen=True, slots=True)
class TwoImages:
    """A table, read: parts of a `Dataset`, and what to tell about it."""

    images: tuple[ImageRecord, ...]
    texts: tuple[TextRecord, ...]
    examples: tuple[MatchingExample, ...]
    counts: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Line:
    """One line: its place for messages, its cells, and the opener of embedded pictures."""

    place: str
    cells: Mapping[str, Any]
    embedded: Mapping[str, Callable[[], bytes]]

    def text(self, column: str) -> str:
        """The text in a cell."""
        return text(self.cells.get(column), f"{self.place}: {column}")


def read_two_images(
    name: str, paths: Sequence[Path], columns: Columns, pictures: Pictures, source: str
) -> TwoImages:
    """The rows of one table, or of the parts of one, in their order.

    Ids: an example has its `id` or the row's number from 0; its texts have that and the column's name, as `7/caption`.

    Args:
        name: of the data set, for messages.
        paths: the table's files; all .jsonl, all .csv or all .parquet.
        columns: what its columns are called.
        pictures: where its pictures lie.
        source: how to get the set, for the message when its pictures are not there.

    Raises:
        DatasetNotFound: the folder of the pictures, or all of them, are missing.
        DatasetError: a column, text or name is missing or malformed, or an id occurs twice.
    """
    rows: list[Line] = []
    named: set[str] = set()
    for path in paths:
        rows += _rows(path, columns, named)
    if not rows:
        raise DatasetError(f"{', '.join(map(str, paths))} has no rows")
    columns = _present(columns, rows)
    ids = [_id(row, columns.id, number) for number, row in enumerate(rows)]
    _refuse_repeated(ids, rows)
    images: dict[str, ImageRecord] = {}
    texts: list[TextRecord] = []
    examples: list[MatchingExample] = []
    for number, (row_id, row) in enumerate(zip(ids, rows, strict=True)):
        pair: list[str] = []
        for column in columns.images:
            own_id = f"{number if pictures.by_row else row_id}/{column}"
            if column in row.embedded:
                record, shared = ImageRecord(own_id, partial(_open, row.embedded[column])), False
            else:
                file = file_name(row.cells.get(column), f"{row.place}: {column}")
                places = [(pictures.folder, file + suffix) for suffix in pictures.suffixes]
                image_id, shared = (own_id, False) if pictures.by_row else (file, True)
                record = image_record(image_id, places, follow_links=pictures.follow_links)
            if record.id in images and not (shared and images[record.id].path):
                raise DatasetError(
                    f"{row.place}: {record.id!r} is the id of two pictures; rename the id or the file"
                )
            images.setdefault(record.id, record)
            pair.append(record.id)
        captions = [row.text(column) for column in columns.captions]
        text_ids = [f"{row_id}/{column}" for column in columns.captions]
        texts += map(TextRecord, text_ids, captions)
        words = [row.text(column) for column in columns.category]
        category = "_".join(words) or NO_CATEGORY
        examples.append(
            MatchingExample(row_id, tuple(pair), (text_ids[0], text_ids[1]), category, "test")
        )
    files = [record for record in images.values() if record.path]
    if files and pictures.required and not pictures.folder.is_dir():
        raise DatasetNotFound(
            f"{name} looked for pictures in {pictures.folder} and found no such folder; {source}; "
            "require_images=false reads the texts alone"
        )
    remedy = f"{source}; {WITHOUT}"
    missing = (
        {"images missing": missing_images(name, files, remedy)}
        if pictures.required
        else NOT_LOOKED_FOR
    )
    ignored = sorted(named - {*columns.images, *columns.captions, *columns.category, columns.id})
    return TwoImages(
        images=tuple(images.values()),
        texts=tuple(texts),
        examples=tuple(examples),
        counts={
            "rows": f"{len(rows):,}",
            "images": f"{len(images):,}",
            **missing,
            "unsolvable: captions alike": listed(_captions_alike(examples, texts)),
            "unsolvable: images alike": _images_alike(
                examples, rows, columns, images, pictures.required
            ),
            "columns ignored": ", ".join(map(repr, ignored)) or "none",
            "read from": ", ".join(path.name for path in paths),
        },
    )


def _rows(path: Path, columns: Columns, named: set[str]) -> Iterator[Line]:
    """Rows of one file; adds the names of all its columns to `named`."""
    if path.suffix != ".parquet":
        for n, cells in (read_csv if path.suffix == ".csv" else read_jsonl)(path):
            named |= set(cells)
            yield Line(f"{path.name} line {n}", cells, {})
        return
    table = ParquetTable(path)
    named |= set(table.kinds)
    category = columns.category or ("category",)
    wanted = {*columns.images, *columns.captions, *category, columns.id or "id"}
    if columns.id == "":
        wanted.discard("id")
    kinds = {column: kind for column, kind in table.kinds.items() if column in wanted}
    strange = [column for column, kind in kinds.items() if kind == "other"]
    if strange:
        raise DatasetError(
            f"{path}: column {strange[0]!r} holds neither texts, whole numbers nor encoded pictures"
        )
    plain = [column for column, kind in kinds.items() if kind in ("text", "number")]
    embedded = [column for column, kind in kinds.items() if kind == "image"]
    for n, cells in enumerate(table.rows(plain)):
        cell = {column: partial(table.cell, column, n) for column in embedded}
        yield Line(f"{path.name} row {n}", cells, cell)


def _present(columns: Columns, rows: Sequence[Line]) -> Columns:
    """The columns with what the table has of the optional ones; a column that some row lacks is an error."""
    first = rows[0]
    of = columns.id
    if of is None and "id" in first.cells:
        of = "id"
    category = columns.category
    if not category and "category" in first.cells:
        category = ("category",)
    wanted = [*columns.images, *columns.captions, *category, *([of] if of else [])]
    for row in rows:
        lacking = [c for c in wanted if c not in row.cells and c not in row.embedded]
        if lacking:
            has = ", ".join(map(repr, [*row.cells, *row.embedded]))
            raise DatasetError(
                f"{row.place}: there is no column {', '.join(map(repr, lacking))}; it has {has}. "
                "Columns of other names are named with columns={…}"
            )
    for key, absent in (("id", of is None), ("category", not category)):
        late = next((row for row in rows if absent and key in row.cells), None)
        if late:
            raise DatasetError(f"{late.place} has a column {key!r} and {first.place} has not")
    return Columns(columns.images, columns.captions, category, of)


def _id(row: Line, column: str | None, number: int) -> str:
    value = row.cells.get(column) if column else number
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise DatasetError(
            f"{row.place}: {column} is {str(value)[:60]!r}; an id is a text that is not blank, or a whole number"
        )
    return value.strip()


def _refuse_repeated(ids: Sequence[str], rows: Sequence[Line]) -> None:
    first: dict[str, Line] = {}
    twice = [
        f"{row_id!r} in {first[row_id].place} and {row.place}"
        for row_id, row in zip(ids, rows, strict=True)
        if first.setdefault(row_id, row) is not row
    ]
    if twice:
        raise DatasetError(
            f"{len(twice):,} ids occur twice: {'; '.join(twice[:3])}; an id is of one row"
        )


def _open(cell: Callable[[], bytes]) -> Image:
    return decode(cell())


def _captions_alike(examples: Sequence[MatchingExample], texts: Sequence[TextRecord]) -> list[str]:
    """Rows that no score can get right, as those below: they are kept, and count as wrong."""
    pairs = zip(examples, texts[::2], texts[1::2], strict=True)
    return [example.id for example, one, other in pairs if one.text == other.text]


def _images_alike(
    examples: Sequence[MatchingExample],
    rows: Sequence[Line],
    columns: Columns,
    images: Mapping[str, ImageRecord],
    look: bool,
) -> str:
    alike = [
        example.id
        for example, row in zip(examples, rows, strict=True)
        if len(set(example.images)) == 1
        or (look and _same_bytes(row, columns, [images[i] for i in example.images]))
    ]
    return listed(alike) + ("" if look else " by name; their bytes not compared")


def _same_bytes(row: Line, columns: Columns, records: Sequence[ImageRecord]) -> bool:
    """Do two pictures have the same bytes? What cannot be read is left to the build."""
    cells = [row.embedded[column] for column in columns.images if column in row.embedded]
    paths = [record.path for record in records if record.path]
    try:
        if len(cells) == 2:
            return cells[0]() == cells[1]()
        return len(paths) == 2 and filecmp.cmp(paths[0](), paths[1](), shallow=False)
    except (OSError, ValueError):
        return False
