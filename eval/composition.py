"""Images against candidate pairs: the facts that every composition table has, and the table that holds every score.

    Composition              labels, candidates, split, world; how each image is reduced for the exact curve
      CompositionScores      (Q, C) scores, in memory
      CompositionSummary     the best scores of each image only, for open worlds (eval/czsl_summary.py)

Letters: `Q` images, `C` candidate pairs, `K` top-k.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from eval.curve import Thresholds
from eval.errors import ScoreTableError
from eval.feasibility import Mode, filtered
from eval.sides import Sides
from eval.table import blocks, checked_facts, checked_k, checked_scores, largest, refuse_nan


class Composition(ABC):
    """What a measurement of images against candidate pairs always says, however many of its scores are kept.

    Attributes:
        target: (Q,) integers, the column of each image's true pair.
        pairs: (C, 2) as (attr, obj), names or indices; no pair twice.
        seen: (C,) bool, True where the pair occurs in training.
        split, space, world, ids, meta: see `CompositionScores`.
        kind: what a file with such a table says it holds.

    """

    __slots__ = ()

    kind: ClassVar[str]
    target: NDArray[Any]
    pairs: NDArray[Any] | Sequence[Sequence[Any]]
    seen: NDArray[Any]
    split: str
    space: str
    world: str
    ids: Sequence[str]
    meta: Mapping[str, Any]

    @abstractmethod
    def thresholds(self, k: int = 1) -> Thresholds:
        """One number an image, from which the exact curve follows."""

    @abstractmethod
    def predicted(self) -> Int[np.ndarray, " q"]:
        """Column of the best pair of each image without any bias, the lowest on a tie; -1 without a candidate."""

    @abstractmethod
    def sides(self) -> Sides:
        """The best seen and the best unseen pair of each image."""

    @abstractmethod
    def competing(self) -> Bool[np.ndarray, " c"]:
        """True where a pair is a candidate of some image."""

    def _settle(self, q: int, c: int) -> list[tuple[Any, ...]]:
        """Check the labels of q images and c candidates, keep them as arrays, and name the candidates."""
        target, pairs, seen = (np.asarray(x) for x in (self.target, self.pairs, self.seen))
        if target.shape != (q,) or pairs.shape != (c, 2) or seen.shape != (c,):
            raise ScoreTableError(
                f"scores {(q, c)} need target ({q},), pairs ({c}, 2) and seen ({c},), but got target "
                f"{target.shape}, pairs {pairs.shape} and seen {seen.shape}"
            )
        if seen.dtype != np.bool_ or target.dtype.kind not in "iu":
            raise ScoreTableError(
                f"seen must be bool and target integers, but they are {seen.dtype} and {target.dtype}"
            )
        if target.min() < 0 or target.max() >= c:
            raise ScoreTableError(
                f"targets must be columns 0 to {c - 1}, but reach from {target.min()} to {target.max()}; give a "
                "pruned true pair a column of -inf"
            )
        names = [tuple(pair) for pair in pairs.tolist()]
        if len(set(names)) != c:
            twice, times = Counter(names).most_common(1)[0]
            raise ScoreTableError(
                f"pair {twice} is a candidate {times} times; keep one column a pair"
            )
        ids = checked_facts(self.split, self.space, self.ids, q)
        settled = {"target": target, "pairs": pairs, "seen": seen, "ids": ids}
        for name, value in settled.items():
            object.__setattr__(self, name, value)
        return names

    @abstractmethod
    def pruned(
        self, threshold: float, rho: Float[np.ndarray, " c"] | None = None, mode: Mode = "neg_inf"
    ) -> "Composition":
        """The same images after unseen pairs less feasible than a threshold are dealt with (`eval.feasibility`)."""

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of images and of candidate pairs."""
        return len(self.target), len(self.seen)

    @property
    def seen_labelled(self) -> Bool[np.ndarray, " q"]:
        """True where an image's true pair occurs in training."""
        return self.seen[self.target]

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of seen- and unseen-labelled images."""
        n_seen = int(self.seen_labelled.sum())
        return n_seen, len(self.target) - n_seen


@dataclass(frozen=True, slots=True, eq=False)
class CompositionScores(Composition):
    """Scores of images against candidate pairs, with everything that makes them a measurement.

    Attributes:
        scores: (Q, C) float32 or float64, larger is better, -inf where a pair is not a candidate.
        target: (Q,) integers, the column of each image's true pair. A pruned true pair keeps its column, at -inf: the
            image is then never hit and stays in the denominator.
        pairs: (C, 2) as (attr, obj), names or indices; no pair twice.
        seen: (C,) bool, True where the pair occurs in training.
        split: train, val or test.
        space: "cosine", "logit" or "probability".
        world: "closed" (train ∪ split pairs) or "open" (all attr × obj).
        ids: names of the images, or empty.
        meta: anything else worth keeping: run, cache fingerprint. `relative` true: a score depends on which other
            pairs are candidates.

    Raises:
        ScoreTableError: shapes that disagree, a pair twice, a target that is no column, NaN or +inf.

    """

    kind: ClassVar[str] = "czsl"

    scores: NDArray[Any]
    target: NDArray[Any]
    pairs: NDArray[Any] | Sequence[Sequence[Any]]
    seen: NDArray[Any]
    split: str
    space: str
    world: str = "closed"
    ids: Sequence[str] = ()
    meta: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        scores = checked_scores(self.scores)
        if scores.ndim != 2:
            raise ScoreTableError(f"scores must be (images, pairs), but have shape {scores.shape}")
        object.__setattr__(self, "scores", scores)
        names = self._settle(*scores.shape)
        refuse_nan(scores, self.ids, [f"pair {name}" for name in names])

    def thresholds(self, k: int = 1) -> Thresholds:
        """One number an image; O(Q·C) time, temporary memory independent of Q."""
        checked_k(k, self.scores.shape[1])
        return Thresholds.join(
            [
                reduce_rows(self.scores[rows], self.target[rows], self.seen, k)
                for rows in blocks(*self.scores.shape)
            ]
        )

    def predicted(self) -> Int[np.ndarray, " q"]:
        """Column of the best pair of each image, the lowest on a tie; -1 without a candidate."""
        best = self.scores.argmax(1)
        return np.where(self.scores[np.arange(len(best)), best] > -np.inf, best, -1)

    def sides(self) -> Sides:
        """The best seen and the best unseen pair of each image."""
        return Sides.of(self.scores, self.seen)

    def pruned(
        self, threshold: float, rho: Float[np.ndarray, " c"] | None = None, mode: Mode = "neg_inf"
    ) -> "CompositionScores":
        """A new table; see `eval.feasibility.filtered` for the modes.

        Args:
            threshold: T.
            rho: feasibility of the columns; this table keeps none, so it has to be given.
            mode: what becomes of infeasible scores.

        """
        if rho is None:
            raise ScoreTableError(
                "this table keeps no feasibility; give it (headstart metrics … --feasibility FILE)"
            )
        if mode == "neg_inf" and self.meta.get("relative"):
            raise ScoreTableError(
                "these scores are probabilities over all candidates of the table, and pairs left out now would keep "
                "their share; score again with the feasibility, which every threshold then has scores of its own for "
                "(headstart score … --world open --feasibility FILE, without --dense)"
            )
        return replace(self, scores=filtered(self.scores, rho, self.seen, threshold, mode))

    def competing(self) -> Bool[np.ndarray, " c"]:
        """True where a pair is a candidate of some image."""
        return np.asarray((self.scores > -np.inf).any(0))


def reduce_rows(
    scores: Float[np.ndarray, "q c"],
    target: Int[np.ndarray, " q"],
    seen: Bool[np.ndarray, " c"],
    k: int = 1,
) -> Thresholds:
    """Thresholds of a block of rows, which may then be dropped."""
    is_seen = seen[target]
    s = scores[np.arange(len(scores)), target]
    r, other = np.ones(len(s), dtype=np.int64), np.empty((len(s), k), dtype=scores.dtype)
    for side in (True, False):
        rows, columns = np.flatnonzero(is_seen == side), np.flatnonzero(seen == side)
        if not len(rows):
            continue
        own = scores[np.ix_(rows, columns)]
        ahead = (own > s[rows, None]) | ((own == s[rows, None]) & (columns < target[rows, None]))
        r[rows] += ahead.sum(1)
        other[rows] = largest(scores[np.ix_(rows, np.flatnonzero(seen != side))], k)
    return thresholds_of(s, r, other, is_seen, k)


def thresholds_of(
    s: Float[np.ndarray, " q"],
    r: Int[np.ndarray, " q"],
    other: Float[np.ndarray, "q k2"],
    is_seen: Bool[np.ndarray, " q"],
    k: int,
) -> Thresholds:
    """The bias at which each image changes between hit and miss.

    With o the (k − r + 1)-th largest score of the other side, t = s − o for a seen-labelled image and t = o − s for an
    unseen-labelled one; r > k or s = −inf is never a hit.

    Args:
        s: score of the true pair.
        r: its rank among the candidates of its own side, seen or unseen; ties: lower index first. Any
            value above k means the same.
        other: k or more largest scores of the other side, descending; -inf where there are fewer.
        is_seen: is the true pair a seen one?
        k: a hit is the true pair among the k best.

    """
    t = np.where(is_seen, -np.inf, np.inf)  # never a hit, until shown otherwise
    hit = (r <= k) & (s > -np.inf)
    margin = s[hit].astype(np.float64) - other[hit, k - r[hit]].astype(np.float64)
    t[hit] = np.where(is_seen[hit], margin, -margin)
    return Thresholds(t, is_seen)
