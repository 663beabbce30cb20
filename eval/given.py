"""What is told beside a file of scores: facts that the file may not say, and lists that lie in files of their own.

Nothing is guessed: a split, a score space and, for CZSL, a world are said by the file or by the caller, and where both
say one, they must agree.
"""

import difflib
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.errors import ScoreTableError, ScoreTableNotFound
from eval.table import plain

LINE_LIMIT = 1 << 24
"""Longest line of a text file, characters; a row of open-world C-GQA in CSV has about four million."""

WORLDS = ("closed", "open")


@dataclass(frozen=True, slots=True)
class Given:
    """Facts and lists, each None where it is not given.

    Attributes:
        split: train, val or test.
        space: "cosine", "logit" or "probability".
        world: "closed" or "open"; CZSL.
        pairs: file of the pairs of the columns, in order: "attr obj" or "attr+obj" a line.
        train_pairs: file of the pairs that occur in training, such as `train_pairs.txt`.
        split_pairs: file of the pairs of the split scored, such as `test_pairs.txt`; columns that are neither of these
            nor of training are left out, as CZSL's closed world has it.
        targets: file of the true pairs of the rows, "attr obj" a line, or their places in `pairs` (text or .npy).
        qrels: file of right answers of retrieval: "query 0 document relevance" a line.

    """

    split: str | None = None
    space: str | None = None
    world: str | None = None
    pairs: Path | None = None
    train_pairs: Path | None = None
    split_pairs: Path | None = None
    targets: Path | None = None
    qrels: Path | None = None

    def only(self, path: Path, *names: str) -> None:
        """Refuse what is given but has no use for this file: it would be ignored in silence.

        Raises:
            ScoreTableError: names the first such fact.

        """
        for field in fields(self):
            if field.name not in names and getattr(self, field.name) is not None:
                raise ScoreTableError(
                    f"{option(field.name)} was given, but {path} has no use for it; it takes "
                    f"{', '.join(map(option, names)) or 'nothing'}"
                )

    def fact(self, name: str, path: Path, found: object = None) -> str:
        """The value of split, space or world.

        Args:
            name: of the fact.
            path: the file of scores.
            found: what that file says itself.

        Raises:
            ScoreTableError: nobody says it, or file and caller say different things.

        """
        told = getattr(self, name)
        if told is None and found is None:
            raise ScoreTableError(
                f"{path} does not say its {name}, and a number without it means nothing; say it with {option(name)}"
            )
        if told is not None and found is not None and str(found) != told:
            raise ScoreTableError(
                f"{option(name)} {told} was given, but {path} says {plain(str(found))}; leave it out, or give the "
                "other file"
            )
        value = told if told is not None else str(found)
        if name == "world" and value not in WORLDS:
            raise ScoreTableError(f"world {value!r} is unknown; it is one of {', '.join(WORLDS)}")
        return value

    def needed(self, name: str, path: Path, what: str) -> Path:
        """The file given under a name.

        Raises:
            ScoreTableError: it is not given.

        """
        found = getattr(self, name)
        if found is None:
            raise ScoreTableError(f"{path} does not say {what}; give {option(name)} FILE")
        return found


def option(name: str) -> str:
    """How a fact is given in the shell."""
    return f"--{name.replace('_', '-')}"


def closest(name: str, known: Collection[str]) -> str:
    """The known names, and the nearest of them, for a message."""
    near = difflib.get_close_matches(name, known, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"(known: {', '.join(known)})"


def lines_of(path: Path, what: str) -> Iterator[tuple[int, str]]:
    """Lines of a UTF-8 text file with their numbers, without line ends; blank ones are left out.

    Raises:
        ScoreTableNotFound: there is no file.
        ScoreTableError: not UTF-8, or a line that is too long.

    """
    if not path.is_file():
        raise ScoreTableNotFound(f"no {what} at {path}, or no regular file; name the file")
    with path.open(encoding="utf-8-sig", newline=None) as file:
        number = 0
        try:
            while line := file.readline(LINE_LIMIT + 1):
                number += 1
                if len(line) > LINE_LIMIT:
                    raise ScoreTableError(
                        f"{path} line {number} has more than {LINE_LIMIT:,} characters: this is no {what}"
                    )
                if line.strip():
                    yield number, line.rstrip("\n")
        except UnicodeDecodeError as error:
            raise ScoreTableError(
                f"{path} is not UTF-8 after line {number} ({error.reason}); save the {what} as UTF-8 text"
            ) from error


def number_of(text: str, where: str, query: str, candidate: str) -> float:
    """One score; -inf stands for "not a candidate".

    Raises:
        ScoreTableError: no number, NaN or +inf, naming query and candidate.

    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value < math.inf:
        raise ScoreTableError(
            f"{where}: the score of query {plain(query)} with {plain(candidate)} is {plain(text)!r}: it must be a "
            "finite number, or -inf for 'not a candidate'"
        )
    return value


def flags(values: NDArray[Any], name: str, path: Path) -> NDArray[np.bool_]:
    """True and False, or 1 and 0, as bool.

    Raises:
        ScoreTableError: other values.

    """
    if values.dtype != np.bool_ and not (
        values.dtype.kind in "iu" and bool(np.isin(values, (0, 1)).all())
    ):
        raise ScoreTableError(
            f"{name} of {path} must be bool, or 0 and 1, but is {values.dtype} and holds other values"
        )
    return values.astype(np.bool_)


def unknown(names: Collection[str], known: Collection[str], what: str, path: Path) -> None:
    """Refuse names that no reader looks at.

    Raises:
        ScoreTableError: names the first, and the nearest of the known ones.

    """
    for name in names:
        if name not in known:
            raise ScoreTableError(
                f"{path} holds {what} {plain(name)!r}, which has no meaning here: leave it out; {closest(name, known)}"
            )


def origin(path: Path, notes: Collection[str] = (), **facts: Any) -> Mapping[str, Any]:
    """`meta` of an imported table: where it comes from, and what its reader found."""
    found: dict[str, Any] = {"imported": path.name, **facts}
    return found | ({"notes": list(notes)} if notes else {})
