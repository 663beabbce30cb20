"""What every reader checks alike: options, cells of annotations, found counts beside published ones. No `load`.

Marks on counts, here and in the readers: A was counted in the public files and is asserted, P stands in papers and is
only printed.
"""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_builder.errors import UnknownName
from cache_builder.images import UnsafeName, check_name
from cache_builder.records import DatasetError

SPLITS = ("train", "val", "test")
CHECKS = ("auto", "official", "none")

MAX_NUMBER = 10**12
"""Numbers that make ids or file names are below it."""

Size = int | tuple[str, ...]
"""A number, or the words that were counted."""


@dataclass(frozen=True, slots=True)
class Count:
    """A line of a count table.

    Attributes:
        found: in the files read.
        expected: published, or None.
        asserted: mark A; otherwise P.

    """

    found: Size
    expected: Size | None = None
    asserted: bool = True


def check_options(known: Mapping[str, Sequence[object]] | None = None, /, **values: object) -> None:
    """Refuse a value that its option does not know.

    Args:
        known: option → its values. One that is not named is `check`, or a switch.
        values: what was asked for.

    Raises:
        UnknownName: names the option and what it may be.
    """
    common = {**dict.fromkeys(values, (True, False)), "check": CHECKS}
    for option, value in values.items():
        allowed = {**common, **(known or {})}[option]
        if value not in allowed:
            shown = ", ".join(str(v).lower() if isinstance(v, bool) else str(v) for v in allowed)
            raise UnknownName(f"{option}={value!r} is not known; choose one of {shown}")


def text(value: Any, what: str, *, empty: bool = False) -> str:
    """A text without outer blanks and otherwise as it is; it may be blank only if that is said.

    >>> text(" a mug ", "row 3: caption")
    'a mug'
    """
    if not isinstance(value, str) or not (empty or value.strip()):
        raise DatasetError(f"{what} is {value!r:.80}; it must be a text that is not blank")
    return value.strip()


def number(value: Any, what: str) -> int:
    """The value, if it is an integer in [0, 10¹²); booleans are none."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_NUMBER:
        raise DatasetError(
            f"{what} is {value!r:.80}, not an integer from 0 to below {MAX_NUMBER:,}"
        )
    return value


def file_name(value: Any, what: str) -> str:
    """The name of an image file as it is written, if it leads nowhere else."""
    if not isinstance(value, str):
        raise DatasetError(f"{what} is {value!r:.80}; it must be the name of an image file")
    try:
        return check_name(value)
    except UnsafeName as error:
        raise DatasetError(f"{what}: {error}") from error


def known_by_one(marks: Collection[Hashable], found: Collection[Hashable]) -> bool:
    """Is this the published set or a part of it? One mark is enough: names and digests that no other set has."""
    return any(mark in found for mark in marks)


def known_by_half(marks: Collection[Hashable], found: Collection[Hashable]) -> bool:
    """The same where a mark may occur in another set too, as a word may: half of them together do not."""
    return 2 * sum(mark in found for mark in marks) >= len(marks)


def judge(
    name: str,
    root: Path,
    counts: Mapping[str, Count],
    *,
    recognised: bool,
    check: str,
    source: str,
) -> dict[str, str]:
    """Found counts for people, beside the published ones if this is the published set; asserted where `check` says so.

    Args:
        name: of the data set.
        root: where it was read.
        counts: its table.
        recognised: whether the set is the published one or part of it, by marks of its own.
        check: "official" asserts counts of mark A, "none" does not, "auto" does if the set is recognised.
        source: how to get the set.

    Raises:
        DatasetError: asserted counts differ; names every one with both values.
    """
    asserted = check == "official" or (check == "auto" and recognised)
    certain = {what: c for what, c in counts.items() if c.asserted and c.expected is not None}
    wrong = [
        f"{what}: {_show(c.expected)} expected, {_show(c.found)} found"
        for what, c in certain.items()
        if c.expected is not None and c.found != c.expected
    ]
    if asserted and wrong:
        raise DatasetError(
            f"{root} is not the published {name}: {'; '.join(wrong)}. Get the whole set ({source}), or pass "
            'check="none" if this is a subset or a set of your own'
        )
    if asserted:
        identity = (
            "the published one, its counts asserted" if certain else "no count of it is certain"
        )
    else:
        identity = (
            "published names, counts not asserted" if recognised else "another set in this layout"
        )
    beside = asserted or recognised
    return {"set": identity} | {
        what: _show(c.found) + (_beside(c) if beside else "") for what, c in counts.items()
    }


def _beside(count: Count) -> str:
    if count.expected is None:
        return ""
    label = "published" if count.asserted else "papers"
    if isinstance(count.expected, tuple) and count.expected == count.found:
        return f" ({label} {len(count.expected)}, the same)"
    return f" ({label} {_show(count.expected)})"


def _show(size: Size) -> str:
    """`1,262`, or `2 (orange, wool)`."""
    if isinstance(size, int):
        return f"{size:,}"
    return f"{len(size)} ({', '.join(size)})" if size else "0"
