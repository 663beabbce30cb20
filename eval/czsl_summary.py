"""Open worlds in O(images) memory: of each image's scores only the best are kept, and rows may come in blocks.

    kept of an image   the score of its true pair; its K best seen pairs; for each feasibility level its K best unseen
                       pairs that are at least so feasible
    what follows       the exact curve and every metric for k <= K, chance, bootstrap, paired tests, and all of these at
                       any threshold of the grid: bit for bit what the table of all scores gives

Why K are enough: whether the true pair is among the k best with its own side shows in that side's k best, and the one
threshold of an image is its distance to one of the k best of the other side (`eval.composition.thresholds_of`).
Not for: the legacy curve and the two compatibility modes of feasibility, which look at every score again.

Letters: `Q` images, `C` candidate pairs, `K` kept, `L` levels: thresholds plus one, `B` images of a block.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from eval.composition import Composition, thresholds_of
from eval.curve import Thresholds
from eval.errors import ScoreTableError
from eval.feasibility import Mode, kept
from eval.reduction import (
    Layout,
    any_candidate,
    best,
    best_of_levels,
    checked_levels,
    checked_rows,
)
from eval.sides import Sides
from eval.table import checked_facts, checked_k, checked_scores, refuse_nan

KEEP = 5
"""How many are kept by default: the largest k in use (VAW-CZSL)."""


@dataclass(frozen=True, slots=True, eq=False)
class CompositionSummary(Composition):
    """The best scores of images against candidate pairs, with everything that makes them a measurement.

    Attributes:
        own: (Q,) score of each image's true pair, before any threshold; or (Q, L), one for each level, where scores are
            relative: where they depend on which other pairs are candidates, as probabilities over these do.
        best_seen, seen_columns: (Q, K), or (Q, L, K) where scores are relative: scores of the best seen pairs,
            descending, and their columns; on a tie the lower column first; -inf and -1 where there are fewer.
        best_unseen, unseen_columns: (Q, L, K) likewise of the unseen pairs that pass the first l thresholds.
        candidates: (C,) bool, True where a pair is a candidate of some image.
        target, pairs, seen, split, space, world, ids, meta: as in `CompositionScores`.
        rho: (C,) feasibility, or None; levels: (L - 1,) thresholds that may be asked for, ascending.
        threshold: the one in force: unseen pairs below it are no candidates. -inf: none.

    Raises:
        ScoreTableError: shapes that disagree, a pair twice, NaN or +inf, a threshold that is no level.

    """

    kind: ClassVar[str] = "czsl_summary"

    own: NDArray[Any]
    best_seen: NDArray[Any]
    seen_columns: NDArray[Any]
    best_unseen: NDArray[Any]
    unseen_columns: NDArray[Any]
    candidates: NDArray[Any]
    target: NDArray[Any]
    pairs: NDArray[Any] | Sequence[Sequence[Any]]
    seen: NDArray[Any]
    split: str
    space: str
    world: str = "open"
    ids: Sequence[str] = ()
    meta: Mapping[str, Any] = field(default_factory=dict[str, Any])
    rho: NDArray[np.float64] | None = None
    levels: Sequence[float] = ()
    threshold: float = -np.inf

    def __post_init__(self) -> None:
        q, c, n = len(self.own), len(self.candidates), len(self.levels) + 1
        k = self.best_seen.shape[-1]
        each = (n,) if self.relative else ()
        shapes = {"own": (q, *each), "best_seen": (q, *each, k), "seen_columns": (q, *each, k)}
        shapes |= {"best_unseen": (q, n, k), "unseen_columns": (q, n, k), "candidates": (c,)}
        wrong = [name for name, shape in shapes.items() if getattr(self, name).shape != shape]
        if wrong or (self.rho is not None and self.rho.shape != (c,)):
            raise ScoreTableError(
                f"a summary of {q} images, {c} candidates and {n} levels needs another shape of "
                f"{', '.join(wrong) or 'rho'}; score the run again"
            )
        for name in ("own", "best_seen", "best_unseen"):
            values = checked_scores(getattr(self, name), name)
            if np.isnan(values).any() or np.isposinf(values).any():
                raise ScoreTableError(f"{name} holds NaN or +inf; score the run again")
        for name in ("seen_columns", "unseen_columns"):
            columns = getattr(self, name)
            if columns.min(initial=-1) < -1 or columns.max(initial=-1) >= c:
                raise ScoreTableError(f"{name} names a column beyond 0 to {c - 1}")
        self._settle(q, c)
        _ = self._level

    def at(self, threshold: float) -> "CompositionSummary":
        """The same images with another threshold in force.

        Raises:
            ScoreTableError: it is not one of the levels.

        """
        other = copy.copy(self)
        object.__setattr__(other, "threshold", float(threshold))
        _ = other._level
        return other

    def pruned(
        self, threshold: float, rho: Float[np.ndarray, " c"] | None = None, mode: Mode = "neg_inf"
    ) -> "CompositionSummary":
        """`at`, for feasibility that this summary was made with.

        Raises:
            ScoreTableError: another feasibility, or a mode that needs every score.

        """
        if mode != "neg_inf":
            raise ScoreTableError(
                f"mode {mode} changes scores that this table does not keep; score again with every score kept "
                "(headstart score … --dense), or use neg_inf"
            )
        if rho is not None and not (self.rho is not None and np.array_equal(rho, self.rho)):
            raise ScoreTableError(
                "the feasibility given is not the one this table was reduced with; score again with it "
                "(headstart score … --world open --feasibility FILE)"
            )
        return self.at(threshold)

    @property
    def keep(self) -> int:
        """K, the largest k that can be asked for."""
        return self.best_seen.shape[-1]

    @property
    def relative(self) -> bool:
        """Was each level scored by itself, among its own candidates?"""
        return self.own.ndim > 1

    def _of_level(self, values: NDArray[Any]) -> NDArray[Any]:
        """What is kept for the threshold in force of `own` and of the seen pairs."""
        return values[:, self._level] if self.relative else values

    @property
    def _level(self) -> int:
        """How many levels are passed by what is kept."""
        if self.threshold == -np.inf:
            return 0
        place = int(np.searchsorted(np.asarray(self.levels), self.threshold))
        if place == len(self.levels) or self.levels[place] != self.threshold:
            known = f"{self.levels[0]:.4f} to {self.levels[-1]:.4f}" if self.levels else "none"
            raise ScoreTableError(
                f"threshold {self.threshold} is not one of the {len(self.levels)} levels kept ({known}); score again "
                "with it, or with the feasibility it was searched on"
            )
        return place + 1

    def thresholds(self, k: int = 1) -> Thresholds:
        """One number an image; O(Q·K)."""
        checked_k(k, self.shape[1])
        if k > self.keep:
            raise ScoreTableError(
                f"k = {k} was asked for, but this table keeps the best {self.keep} of each image; score again with "
                f"--keep {k}"
            )
        is_seen, s = self.seen_labelled, self._of_level(self.own)
        best_seen, seen_columns = map(self._of_level, (self.best_seen, self.seen_columns))
        if self.rho is not None:
            pruned = ~kept(self.rho, self.seen, self.threshold)[self.target]
            s = np.where(pruned, s.dtype.type(-np.inf), s)
        unseen, columns = self.best_unseen[:, self._level], self.unseen_columns[:, self._level]
        mine = np.where(is_seen[:, None], best_seen, unseen)
        where = np.where(is_seen[:, None], seen_columns, columns)
        other = np.where(is_seen[:, None], unseen, best_seen)
        ahead = (mine > s[:, None]) | ((mine == s[:, None]) & (where < self.target[:, None]))
        return thresholds_of(s, 1 + ahead.sum(1), other, is_seen, k)

    def predicted(self) -> Int[np.ndarray, " q"]:
        """Column of the best pair of each image, the lowest on a tie; -1 without a candidate."""
        return self.sides().at(None)

    def sides(self) -> Sides:
        """The best seen and the best unseen pair of each image, of those that pass the threshold in force."""
        unseen, column = (x[:, self._level, 0] for x in (self.best_unseen, self.unseen_columns))
        seen, mine = (self._of_level(x)[:, 0] for x in (self.best_seen, self.seen_columns))
        return Sides(seen, mine, unseen, column)

    def competing(self) -> Bool[np.ndarray, " c"]:
        """True where a pair is a candidate of some image."""
        if self.rho is None:
            return self.candidates
        return self.candidates & kept(self.rho, self.seen, self.threshold)


def summarise(
    rows: Iterable[NDArray[Any]],
    layout: Layout,
    target: Int[np.ndarray, " q"],
    pairs: NDArray[Any] | Sequence[Sequence[Any]],
    *,
    split: str,
    space: str,
    world: str = "open",
    ids: Sequence[str] = (),
    meta: Mapping[str, Any] | None = None,
    keep: int = KEEP,
    arranged: bool = False,
) -> CompositionSummary:
    """Reduce rows of scores, which are dropped block by block.

    Args:
        rows: (B, C) blocks of float32 or float64 scores, in the order of `target`.
        layout: of the candidates.
        target, pairs, split, space, world, ids, meta: as in `CompositionScores`.
        keep: K.
        arranged: the columns of `rows` are already in the order `layout.order`, which saves a copy.

    Raises:
        ScoreTableError: NaN or +inf (names image and pair), too few or too many rows, or labels that do not fit.

    """
    place = _places(layout)

    def reduced(
        block: NDArray[Any], at: Int[np.ndarray, " b"], candidates: Bool[np.ndarray, " c"]
    ) -> tuple[NDArray[Any], ...]:
        seen, unseen = best(block, layout, keep)
        if not candidates.all():
            candidates |= any_candidate(block)
        return block[np.arange(len(at)), at], *seen, *unseen

    blocks = (b if arranged else b[:, layout.order] for b in checked_rows(rows, len(place)))
    each = ((len(block), partial(reduced, block)) for block in blocks)
    facts = _Facts(target, pairs, split, space, world, ids, meta or {})
    return _joined(each, layout, keep, facts)


def summarise_levels(
    rows: Iterable[tuple[int, Iterable[NDArray[Any]]]],
    layout: Layout,
    target: Int[np.ndarray, " q"],
    pairs: NDArray[Any] | Sequence[Sequence[Any]],
    *,
    split: str,
    space: str,
    world: str = "open",
    ids: Sequence[str] = (),
    meta: Mapping[str, Any] | None = None,
    keep: int = KEEP,
) -> CompositionSummary:
    """Reduce rows of relative scores: those of a pair change with every pair that a threshold takes away.

    Args:
        rows: in the order of `target`, the number of images B of a block, and its scores: for every n of
            `layout.sizes()`, descending, (B, n) among the first n candidates of `layout.order`, which are then all
            there are. Each may be overwritten by the next.
        layout, target, pairs, split, space, world, ids, meta, keep: as for `summarise`.

    Raises:
        ScoreTableError: as for `summarise`.

    """
    each = (
        (b, partial(best_of_levels, checked_levels(levels, layout), layout, keep))
        for b, levels in rows
    )
    facts = _Facts(target, pairs, split, space, world, ids, meta or {})
    return _joined(each, layout, keep, facts)


_Reduce = Callable[[NDArray[Any], NDArray[np.bool_]], tuple[NDArray[Any], ...]]
"""Places of some images' true pairs → their rows of the five arrays of `CompositionSummary`.

The second argument is True at the places of the layout known to be candidates of some image, and learns of more.
"""


@dataclass(frozen=True, slots=True)
class _Facts:
    """What a summary says besides its scores."""

    target: NDArray[Any]
    pairs: Any
    split: str
    space: str
    world: str
    ids: Sequence[str]
    meta: Mapping[str, Any]


def _joined(
    blocks: Iterable[tuple[int, _Reduce]],
    layout: Layout,
    keep: int,
    facts: _Facts,
) -> CompositionSummary:
    """The summary of blocks, each reduced once its true pairs' places are known."""
    c, target = len(layout.order), facts.target
    checked_k(keep, c, "the number kept of each image")
    names = checked_facts(facts.split, facts.space, facts.ids, len(target))
    place, candidates = _places(layout), np.zeros(c, dtype=bool)
    parts: list[tuple[NDArray[Any], ...]] = []
    done = 0
    for size, reduced in blocks:
        b = slice(done, done + size)
        if b.stop > len(target):
            raise ScoreTableError(f"there are {len(target)} targets, but more rows of scores")
        try:
            parts.append(reduced(place[target[b]], candidates))
        except FloatingPointError as error:
            whole = np.full((size, c), -np.inf)
            whole[:, : error.args[0].shape[1]] = error.args[0]
            refuse_nan(whole[:, place], names[b], _PairNames(facts.pairs), first=done)
            raise
        done = b.stop
    if done != len(target):
        raise ScoreTableError(f"there are {len(target)} targets, but {done} rows of scores")
    return CompositionSummary(
        *(np.concatenate(part) for part in zip(*parts, strict=True)),
        candidates=candidates[place],
        target=target,
        pairs=facts.pairs,
        seen=layout.seen,
        split=facts.split,
        space=facts.space,
        world=facts.world,
        ids=facts.ids,
        meta=dict(facts.meta),
        rho=layout.rho,
        levels=layout.levels,
    )


def _places(layout: Layout) -> Int[np.ndarray, " c"]:
    """Where each column stands in the layout."""
    place = np.empty(len(layout.order), dtype=np.int64)
    place[layout.order] = np.arange(len(place))
    return place


class _PairNames(Sequence[str]):
    """What to call the columns, made only when one is asked for."""

    def __init__(self, pairs: Any) -> None:
        self.pairs = pairs

    def __getitem__(self, i: Any) -> Any:
        return f"pair {tuple(np.asarray(self.pairs[i]).tolist())}"

    def __len__(self) -> int:
        return len(self.pairs)
