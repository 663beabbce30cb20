"""A journal of a cache: lines that were made durable one by one, by one builder or by several.

    manifest.jsonl            the builder that holds the lock
    manifest-<writer>.jsonl   each process that helps it; merged into the first when it is done

Nobody writes another one's file while it is used, so no lock is needed and a torn last line stays the last.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Generic, TypeVar

from pydantic import BaseModel

from cache_builder.errors import CacheCorrupt
from cache_builder.place import Place

Line = TypeVar("Line", bound=BaseModel)


class Journal(Generic[Line]):
    """All files of one journal.

    Args:
        place: where the cache lies.
        name: `manifest` or `quarantine`.
        kind: of its lines.
        writer: whose file `append` writes; nobody's name is the lock holder's.
    """

    def __init__(self, place: Place, name: str, kind: type[Line], writer: str = "") -> None:
        self.place, self.name, self.kind, self.writer = place, name, kind, writer
        # Files only grow: what was understood once is not understood again, of thousands of lines.
        self._known: dict[str, tuple[bytes, list[Line]]] = {}

    def lines(self) -> list[Line]:
        """All lines, those of the lock holder first.

        Raises:
            CacheCorrupt: the main file is gone, or a line is not one of this journal.
        """
        # Parts first: what is merged meanwhile is then in the main file.
        helpers: list[Line] = []
        for part in self._parts():
            with suppress(FileNotFoundError):
                helpers += self._lines_of(part)
        try:
            return [*self._lines_of(f"{self.name}.jsonl"), *helpers]
        except FileNotFoundError:
            raise CacheCorrupt(
                f"{self.place}/{self.name}.jsonl is gone; restore it from a backup, or remove the cache and build it "
                "again"
            ) from None

    def _lines_of(self, file: str) -> list[Line]:
        """Lines of one file; a torn last one is no line."""
        data = self.place.read(file)
        whole = data[: data.rfind(b"\n") + 1]
        known, lines = self._known.get(file, (b"", []))
        if not whole.startswith(known):
            known, lines = b"", []
        try:
            new = whole[len(known) :].split(b"\n")[:-1]
            lines = lines + [self.kind.model_validate_json(line) for line in new]
        except ValueError as error:
            raise CacheCorrupt(
                f"{self.place}/{file} has a line that is not a {self.kind.__name__.lower()} record "
                f"({str(error).splitlines()[0]}); restore it from a backup, or remove the cache and build it again"
            ) from error
        self._known[file] = whole, lines
        return lines

    def append(self, line: Line, *, sync: bool = True) -> None:
        """Add a line and make it durable, unless a `sync_all` follows."""
        whose = f"-{self.writer}" if self.writer else ""
        self.place.append(f"{self.name}{whose}.jsonl", line.model_dump_json().encode(), sync=sync)

    def merge(self, lines: Sequence[Line]) -> None:
        """Make `lines` the main file and remove those of helpers; only for the lock holder, when no helper is left."""
        parts = self._parts()
        if parts:
            text = "".join(line.model_dump_json() + "\n" for line in lines)
            self.place.write(f"{self.name}.jsonl", text.encode())
        for part in parts:
            self.place.remove(part)

    def _parts(self) -> list[str]:
        pattern = re.compile(rf"{self.name}-[^/]+\.jsonl")
        return [name for name in self.place.names() if pattern.fullmatch(name)]
