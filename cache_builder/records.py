"""Annotation files as checked rows: text, JSON, JSON lines, CSV and `.t7`, within limits and without running anything.

Rules (docs/protocols.md, safety): sizes are looked at before reading, text is UTF-8 with an optional BOM, JSON keys are
unique and numbers finite, a Git LFS pointer is called by its name, and no pickle is ever executed.
"""

import csv
import io
import json
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cache_builder.errors import CacheError

MAX_PAIR_FILE = 16 * 2**20
MAX_JSON = 512 * 2**20
MAX_T7 = 256 * 2**20
MAX_LINE = 2**20
"""Sizes in bytes; a line counts its UTF-8 bytes."""

LFS = b"version https://git-lfs"


class DatasetError(CacheError, ValueError):
    """The files of a data set are missing, damaged or contradict each other; names the file and the place."""


class DatasetNotFound(DatasetError, FileNotFoundError):
    """A file or folder of the layout is not there; says what was looked for, where, and how to get it."""


def check_file(path: Path, limit: int) -> None:
    """Refuse what is no regular file, is too large, or is a Git LFS pointer in place of the data."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise DatasetError(f"{path} is not a regular file")
    if found.st_size > limit:
        raise DatasetError(f"{path} has {found.st_size:,} bytes, more than the {limit:,} allowed")
    with path.open("rb") as file:
        if file.read(32).startswith(LFS):
            raise DatasetError(
                f"{path} is a Git LFS pointer, not the data; fetch it with `git lfs pull` or download the file"
            )


def read_text(path: Path, limit: int = MAX_PAIR_FILE) -> str:
    """A whole UTF-8 file, without its byte-order mark."""
    check_file(path, limit)
    with path.open("rb") as file:
        data = file.read(limit + 1)  # what lies in /proc has no size and no end
    if len(data) > limit:
        raise DatasetError(f"{path} has more than the {limit:,} bytes allowed")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error


def read_json(path: Path, limit: int = MAX_JSON) -> Any:
    """A JSON document; duplicate keys, NaN and Infinity are refused."""
    return parse_json(read_text(path, limit), str(path))


def parse_json(text: str, place: str) -> Any:
    """One JSON value; `place` goes into the message."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} occurs twice")
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        found = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
        if "\\ud" in text.lower():
            check_unicode(found, place)
        return found
    except DatasetError:
        raise
    except RecursionError:
        raise DatasetError(f"{place}: nested too deeply to be an annotation file") from None
    except ValueError as error:
        raise DatasetError(f"{place}: not valid JSON: {error}") from error


def check_unicode(value: Any, place: str) -> None:
    """Refuse halves of surrogate pairs, which no UTF-8 file can hold: ids and captions are stored as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start : error.end]
        raise DatasetError(f"{place}: {half!r} is half a character, which is no text") from None


def read_lines(path: Path, limit: int = MAX_PAIR_FILE) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1."""
    # Newlines only: str.splitlines() would also cut at U+2028, which captions may hold.
    for number, line in enumerate(read_text(path, limit).split("\n"), 1):
        if len(line.encode()) > MAX_LINE:
            raise DatasetError(f"{path} line {number} is longer than {MAX_LINE:,} bytes")
        if line.strip():
            yield number, line


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """One JSON object a line, with its line number."""
    for number, line in read_lines(path, MAX_JSON):
        row = parse_json(line, f"{path} line {number}")
        if not isinstance(row, dict):
            raise DatasetError(f"{path} line {number}: a {type(row).__name__}, not a JSON object")
        yield number, row


def read_csv(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a comma-separated file with a header (RFC 4180), with their line numbers; cells are stripped."""
    lines = csv.reader(io.StringIO(read_text(path, MAX_JSON), newline=""), strict=True)
    try:
        header = [cell.strip() for cell in next(lines, [])]
        if len(set(header)) < len(header) or not all(header):
            raise DatasetError(f"{path}: header {header} has an empty or repeated column name")
        for cells in lines:
            if not cells:
                continue
            if len(cells) != len(header):
                raise DatasetError(
                    f"{path} line {lines.line_num}: {len(cells)} cells under {len(header)} columns "
                    f"({', '.join(header)}); quote a cell that holds a comma"
                )
            yield lines.line_num, dict(zip(header, (cell.strip() for cell in cells), strict=True))
    except csv.Error as error:
        raise DatasetError(f"{path} line {lines.line_num}: {error}") from error


def read_t7(path: Path) -> Any:
    """What `torch.save` wrote, plain containers and tensors only; anything that would run code is refused."""
    import torch  # seconds to import, and only this one layout needs it

    check_file(path, MAX_T7)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as parts:
                size = sum(part.file_size for part in parts.infolist())
            if size > MAX_T7:
                raise ValueError(
                    f"unpacked it has {size:,} bytes, more than the {MAX_T7:,} allowed"
                )
        return torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # unpickler, zip and struct errors; never retried with weights_only=False
        raise DatasetError(
            f"{path} cannot be read without running what is in it ({_first_line(error).partition('. ')[0]}); "
            f"put the same rows beside it as JSON, {path.with_suffix('.json').name}"
        ) from error


def _first_line(error: Exception) -> str:
    """What an error says, or else what it is."""
    return next(iter(str(error).splitlines()), type(error).__name__)
