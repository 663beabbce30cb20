"""Word vectors of attributes and objects from a GloVe text file, read line by line.

    the 0.418 0.24968 -0.41242 …       one word a line, its numbers behind it, blanks between
    . . . -0.1573 -0.29517 0.30453 …   a few words of glove.840B hold blanks themselves: line 1 says how many numbers

A name is lower-cased, perhaps replaced (UT-Zappos), split at `_`, `-` and blanks; its vector is the mean of its parts'.
Of a word on several lines the first counts. Only the words asked for are kept, so a file of any length needs little
memory.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from eval.errors import ScoreTableError

LINE_BYTES = 1 << 20
"""Longest line that is read; 300 numbers take about 3 kB."""

UT_ZAPPOS: Mapping[str, str] = {
    "faux.fur": "fake_fur",
    "faux.leather": "fake_leather",
    "full.grain.leather": "thick_leather",
    "hair.calf": "hair_leather",
    "patent.leather": "shiny_leather",
    "nubuck": "grainy_leather",
    "boots.ankle": "ankle_boots",
    "boots.knee.high": "knee_high_boots",
    "boots.mid-calf": "midcalf_boots",
    "shoes.boat.shoes": "boat_shoes",
    "shoes.clogs.and.mules": "clogs_shoes",
    "shoes.flats": "flats_shoes",
    "shoes.heels": "heels",
    "shoes.loafers": "loafers",
    "shoes.oxfords": "oxford_shoes",
    "shoes.sneakers.and.athletic.shoes": "sneakers",
}
"""What stands for UT-Zappos' dotted names in the releases of CompCos and CSP."""


def parts_of(name: str, replacements: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Words whose vectors a name is the mean of.

    >>> parts_of("Faux.Fur", UT_ZAPPOS), parts_of("chain-link")
    (('fake', 'fur'), ('chain', 'link'))
    """
    lower = name.lower()
    plain = (replacements or {}).get(lower, lower)
    return tuple(part for part in re.split(r"[_\-\s]+", plain) if part) or (plain,)


def glove(
    path: str | os.PathLike[str],
    names: Sequence[str],
    replacements: Mapping[str, str] | None = None,
    *,
    parts: Callable[[str], Sequence[str]] | None = None,
) -> Float[np.ndarray, "n d"]:
    """One vector a name, float64.

    Args:
        path: the text file, e.g. glove.6B.300d.txt; nothing is downloaded.
        names: attributes or objects, as the data set writes them.
        replacements: lower-cased name → what to look up instead, e.g. `UT_ZAPPOS`.
        parts: words whose vectors a name is the mean of; None: `parts_of` with `replacements`.

    Raises:
        ScoreTableError: no such file, a malformed line (its number is named), or words without a vector.

    """
    apart = [parts(name) if parts else parts_of(name, replacements) for name in names]
    wanted = {part for found in apart for part in found}
    vectors: dict[str, Float[np.ndarray, " d"]] = {}
    for word, vector in _read(path, wanted):
        vectors.setdefault(word, vector)
    missing = sorted(wanted - vectors.keys())
    if missing:
        without = next(
            name for name, found in zip(names, apart, strict=True) if missing[0] in found
        )
        raise ScoreTableError(
            f"{path} has no vector for {len(missing)} of {len(wanted)} words: {', '.join(missing[:5])} (the first is "
            f"of {without!r}); use a larger vocabulary, or give the names replacements"
        )
    return np.stack([np.mean([vectors[part] for part in found], axis=0) for found in apart])


def _read(
    path: str | os.PathLike[str], wanted: set[str]
) -> Iterator[tuple[str, Float[np.ndarray, " d"]]]:
    """The lines of wanted words; every line must have as many numbers as the first, and be text."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise ScoreTableError(
            f"word vectors were to be read from {path}: {error.strerror}"
        ) from error
    with file:
        size = None
        for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES), b""), 1):
            where = f"{path} line {number}"
            if len(line) == LINE_BYTES:
                raise ScoreTableError(
                    f"{where} is longer than {LINE_BYTES} bytes; not a GloVe file"
                )
            text = line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").strip()
            fields = text.split() if size is None else text.rsplit(None, size)
            size = len(fields) - 1 if size is None else size
            if size < 2:
                raise ScoreTableError(
                    f"{where} has {len(fields)} fields, but a GloVe file starts with a word and its numbers; remove "
                    "the header if this is another format"
                )
            if len(fields) != size + 1 or _is_number(fields[0].split()[1:][-1:]):
                raise ScoreTableError(
                    f"{where} has {len(text.split()) - 1} numbers behind its word, but line 1 has {size}; the file is "
                    "damaged"
                )
            try:
                word = fields[0].decode("utf-8")
                if word not in wanted:
                    continue
                vector = np.array([float(x) for x in fields[1:]])
            except ValueError as error:  # also what is no UTF-8
                raise ScoreTableError(
                    f"{where} is not a word and {size} numbers: {error}"
                ) from error
            if not np.isfinite(vector).all():
                raise ScoreTableError(f"{where} holds a number that is not finite")
            yield word, vector


def _is_number(last: Sequence[bytes]) -> bool:
    """Is what ends a word of several pieces (none: one piece) a number, so that the line has one too many?"""
    try:
        return bool([float(piece) for piece in last])
    except ValueError:
        return False
