"""What all score tables share: what makes a matrix of scores usable, rows in blocks, the largest values of a row.

Letters: `Q` queries (rows), `C` candidates (columns), `K` top-k. Larger scores are better; `-inf` means "not a
candidate".
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from eval.errors import ScoreTableError

SPACES = ("cosine", "logit", "probability")
"""What a score is; numbers from different spaces are never put in one column."""

CELLS_PER_BLOCK = 1 << 22
"""Scores looked at in one go (32 MB of float64), so that temporary memory does not grow with the table."""


def checked_scores(values: Any, what: str = "scores") -> NDArray[Any]:
    """The values as a float32 or float64 array.

    Raises:
        ScoreTableError: half precision (its rounding makes artificial ties), not a number at all, NaN or +inf.

    """
    scores = np.asarray(values)
    if scores.dtype.kind in "iu":
        scores = scores.astype(np.float64)
    if scores.dtype.kind != "f" or scores.dtype.itemsize not in (4, 8):
        raise ScoreTableError(
            f"{what} must be float32 or float64, but they are {scores.dtype}: half precision makes artificial ties. "
            "Compute scores from float32 embeddings."
        )
    if not scores.size:
        raise ScoreTableError(
            f"{what} have shape {scores.shape}: an empty split or an empty gallery has no metric"
        )
    return scores


def plain(text: str) -> str:
    """Text without control characters, which a name may hold."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def refuse_nan(
    scores: NDArray[Any], query: Sequence[str], candidate: Sequence[str], first: int = 0
) -> None:
    """Raise for the first NaN or +inf.

    Args:
        scores: any shape, queries first, candidates next.
        query: ids of the rows, or nothing.
        candidate: what to call the columns.
        first: number of the first row, where the scores are a block of a table.

    """
    if scores.max(initial=-np.inf) < np.inf:  # NaN is not; this needs no memory
        return
    bad = np.isnan(scores) | np.isposinf(scores)
    where = tuple(int(i) for i in np.argwhere(bad)[0])
    row, column = where[0], where[1]
    name = f" ({plain(query[row])})" if query else ""
    raise ScoreTableError(
        f"the score of query {first + row}{name} with column {column} ({plain(candidate[column])}) "
        f"is {scores[where]}, one of {int(bad.sum())} that are NaN or +inf: scores must be finite, or -inf for "
        "'not a candidate'. Look for a division by a zero norm in the head."
    )


def checked_facts(split: str, space: str, ids: Sequence[str], n: int) -> tuple[str, ...]:
    """The ids of the rows as a tuple, after checking the words that go with a table.

    Raises:
        ScoreTableError: an empty split, an unknown space, or ids that do not name `n` different rows.

    """
    if not split:
        raise ScoreTableError("a table needs its split: a number without its split is not a number")
    if space not in SPACES:
        raise ScoreTableError(f"score space {space!r} is unknown; it is one of {', '.join(SPACES)}")
    if len(ids) not in (0, n) or len(set(ids)) != len(ids):
        raise ScoreTableError(
            f"{len(ids)} ids, {len(set(ids))} of them different, cannot name {n} rows; give one id a row, or none"
        )
    return tuple(str(i) for i in ids)


def checked_k(k: int, n: int, what: str = "k") -> int:
    """Top-k that exists.

    Raises:
        ScoreTableError: `k` is below 1 or above the number of candidates `n`.

    """
    if not 1 <= k <= n:
        raise ScoreTableError(
            f"{what} = {k} was asked for, but there are {n} candidates: choose 1 to {n}"
        )
    return k


def blocks(q: int, c: int) -> Iterator[slice]:
    """Row ranges that cover a (Q, C) table with a bounded number of cells each."""
    step = max(1, CELLS_PER_BLOCK // c)
    for start in range(0, q, step):
        yield slice(start, min(start + step, q))


def largest(values: Float[np.ndarray, "q c"], k: int) -> Float[np.ndarray, "q k"]:
    """The k largest values of each row, descending, padded with -inf where there are fewer."""
    n = values.shape[1]
    if n > k:
        values = np.partition(values, n - k, axis=1)[:, n - k :]
    top = np.full((len(values), k), -np.inf, dtype=values.dtype)
    top[:, : values.shape[1]] = np.sort(values, axis=1)[:, ::-1]
    return top


def chance_of_hit(k: int, positives: int, n: int) -> float:
    """Chance that one or more of `positives` among `n` land in the top `k` of a random order."""
    return 1 - math.comb(n - positives, k) / math.comb(n, k)


def chance_precision(k: int, c: int, n: int) -> float:
    """Expected sum over ranks i ≤ k of precision(i)·rel(i), with c right among n in random order."""
    both = (c - 1) / (n - 1) if n > 1 else 0.0
    return sum(c / n * (1 + (i - 1) * both) / i for i in range(1, k + 1))
