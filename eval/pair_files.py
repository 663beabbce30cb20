"""Scores of images against a list of pairs, as research code of CZSL keeps them: an array, and names in text files.

    pairs.txt           ancient building        one pair a line, in the order of the columns; or almost_empty+bottle
    train_pairs.txt     the same; these pairs are seen
    test_pairs.txt      the same; columns in neither of the two are no candidates of this split
    targets.txt         ancient building        the true pair of every row; or 17, its place in pairs.txt from 0

CSP, Troika and their relatives score every pair of all three splits, and mask columns in the evaluator: give
`split_pairs`, or the pairs of another split compete. Letters: `Q` images, `C` columns.
"""

import difflib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.composition import CompositionScores
from eval.errors import ScoreTableError
from eval.given import Given, lines_of, origin
from eval.table import checked_scores, plain

BYTES = 1 << 24
"""Largest pair file: 16 MiB."""

Pair = tuple[str, str]


def split_names(lines: Sequence[str], places: Sequence[str]) -> list[Pair]:
    """Pairs from text: cut at the one "+" if every line has one, else at blanks.

    Args:
        lines: "attr obj" or "attr+obj".
        places: what to call each line in a message.

    Raises:
        ScoreTableError: a line that does not hold exactly two names.

    """
    plus = bool(lines) and all(line.count("+") == 1 for line in lines)
    pairs: list[Pair] = []
    for line, place in zip(lines, places, strict=True):
        names = [part.strip() for part in line.split("+")] if plus else line.split()
        if len(names) != 2 or not all(names):
            raise ScoreTableError(
                f"{place} must hold an attr and an obj, 'attr obj' or 'attr+obj', but is {plain(line)!r}"
            )
        pairs.append((names[0], names[1]))
    return pairs


def read_pairs(path: Path, what: str) -> list[Pair]:
    """The pairs of a file, in order.

    Raises:
        ScoreTableError: too large, empty, a line that is no pair, a pair twice.

    """
    pairs = _rows(path, what)
    _, twice = _places(pairs)
    if twice is not None:
        raise ScoreTableError(f"{path} lists the pair {twice} twice; a pair has one column")
    return pairs


def composition(
    scores: NDArray[Any],
    pairs: Sequence[Pair] | None,
    path: Path,
    given: Given,
    *,
    target: Sequence[Pair] | NDArray[Any] | None = None,
    seen: NDArray[np.bool_] | None = None,
    ids: Sequence[str] = (),
    said: Any = None,
    **meta: Any,
) -> CompositionScores:
    """A table from scores (Q, C) and whatever lies in other files.

    Args:
        scores: one column a pair.
        pairs: names of the columns; None reads `given.pairs`.
        path: the file of the scores.
        given: facts and files.
        target: true pairs by name, or (Q,) their columns; None reads `given.targets`.
        seen: (C,) True where a pair occurs in training; None reads `given.train_pairs`.
        ids: names of the rows.
        said: split, space and world as the file says them, in a dict.
        meta: goes into the table's `meta`.

    Raises:
        ScoreTableError: something is said twice or not at all, or does not fit.

    """
    said = said or {}
    facts = {name: given.fact(name, path, said.get(name)) for name in ("split", "space", "world")}
    for name, value in (("pairs", pairs), ("targets", target), ("train_pairs", seen)):
        if value is not None and getattr(given, name) is not None:
            raise ScoreTableError(
                f"{path} holds its {name} itself, but --{name.replace('_', '-')} was given too; give one"
            )
    scores = checked_scores(scores, f"scores of {path}")
    names = pairs or read_pairs(given.needed("pairs", path, "which pair each column is"), "pairs")
    if scores.ndim != 2 or scores.shape[1] != len(names):
        raise ScoreTableError(
            f"{path} has scores of shape {scores.shape}, but {len(names)} pairs name the columns; they must be "
            f"(images, {len(names)})"
        )
    place, twice = _places(names)
    if twice is not None:
        raise ScoreTableError(f"{path} has two columns of the pair {twice}; keep one")
    if target is None:
        target = _targets(given.needed("targets", path, "the true pair of each row"))
    columns = _columns(target, place, len(scores), path)
    trained: set[Pair] = set()
    if seen is None:
        trained = set(
            read_pairs(given.needed("train_pairs", path, "which pairs are seen"), "pairs")
        )
        seen = np.array([name in trained for name in names])
    keep, notes = np.ones(len(names), np.bool_), list[str]()
    if given.split_pairs is not None and facts["world"] == "open":
        raise ScoreTableError(
            f"--split-pairs was given, but in the open world every column of {path} is a candidate; leave it out"
        )
    if given.split_pairs is not None:
        mine = set(read_pairs(given.split_pairs, "pairs"))
        keep = seen | np.array([name in mine for name in names])
    missing = [p for p in sorted(trained) if p not in place]
    if missing and facts["world"] == "closed":
        raise ScoreTableError(
            f"{len(missing)} training pairs, the first {missing[0]}, are no column of {path}: in the closed world all "
            "of them compete; score them too"
        )
    lost = np.flatnonzero(~keep[columns]).tolist()
    if lost:
        raise ScoreTableError(
            f"the true pair of row {lost[0]}, {names[int(columns[lost[0]])]}, is neither a training pair nor one of "
            f"{given.split_pairs}; {len(lost)} rows are such: give the pairs of the split scored"
        )
    idle = keep & ~seen
    idle[columns] = False
    if idle.any() and facts["world"] == "closed" and given.split_pairs is None:
        notes.append(
            f"{int(idle.sum())} of {int((~seen).sum())} unseen candidates are no image's true pair; if the columns "
            "hold the pairs of all splits, name the split's own with --split-pairs"
        )
    return CompositionScores(
        scores if keep.all() else scores[:, keep],
        (np.cumsum(keep) - 1)[columns],
        np.array(names)[keep],
        seen[keep],
        facts["split"],
        facts["space"],
        facts["world"],
        tuple(ids),
        origin(path, notes, **meta),
    )


def _rows(path: Path, what: str) -> list[Pair]:
    """Every line of a file of pairs; a pair may recur."""
    if path.is_file() and path.stat().st_size > BYTES:
        raise ScoreTableError(
            f"{path} has {path.stat().st_size:,} bytes, more than the {BYTES:,} of the largest file of {what}"
        )
    numbered = list(lines_of(path, f"file of {what}"))
    if not numbered:
        raise ScoreTableError(f"{path} is empty; it must hold a pair a line")
    return split_names([line for _, line in numbered], [f"{path} line {n}" for n, _ in numbered])


def _places(names: Sequence[Pair]) -> tuple[dict[Pair, int], Pair | None]:
    """Pair → column, and the first pair that occurs twice."""
    place: dict[Pair, int] = {}
    for i, name in enumerate(names):
        if place.setdefault(name, i) != i:
            return place, name
    return place, None


def _targets(path: Path) -> Sequence[Pair] | NDArray[Any]:
    """True pairs of the rows: names, or columns where every line is one whole number."""
    if path.suffix == ".npy":
        from eval.arrays import read_npy

        return read_npy(path)
    first = next(lines_of(path, "file of targets"), None)
    if first is None or not first[1].strip().isdecimal():
        return _rows(path, "targets")
    found: list[int] = []
    for number, line in lines_of(path, "file of targets"):
        if not (line.strip().isascii() and line.strip().isdecimal()):
            raise ScoreTableError(
                f"{path} line {number} is {plain(line)!r}, but line {first[0]} is a number: give the places of the "
                "pairs throughout, or their names"
            )
        found.append(int(line))
    return np.array(found)


def _columns(
    target: Sequence[Pair] | NDArray[Any], place: dict[Pair, int], n: int, path: Path
) -> NDArray[Any]:
    """The column of each row's true pair."""
    if len(target) != n:
        raise ScoreTableError(
            f"{path} has {n} rows, but there are {len(target)} targets; give one a row, in the same order"
        )
    if isinstance(target, np.ndarray):
        if target.shape != (n,) or target.dtype.kind not in "iu":
            raise ScoreTableError(
                f"targets must be {n} whole numbers, but are {target.dtype} of shape {target.shape}"
            )
        if target.min() < 0 or target.max() >= len(place):
            raise ScoreTableError(
                f"targets must be places 0 to {len(place) - 1} in the list of pairs, but reach from {target.min()} to "
                f"{target.max()}"
            )
        return target.astype(np.int64)
    for i, name in enumerate(target):
        if name not in place:
            raise ScoreTableError(
                f"the true pair of row {i}, {name}, is no column of {path}; give a pruned pair a column of -inf"
                f"{_nearest(name, place)}"
            )
    return np.array([place[name] for name in target])


def _nearest(name: Pair, known: Collection[Pair]) -> str:
    """The pair that may have been meant, for a message."""
    near = difflib.get_close_matches(" ".join(name), [" ".join(pair) for pair in known], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
