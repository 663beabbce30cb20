"""Compositional zero-shot learning: the seen–unseen curve, its area, harmonic mean and extremes.

Definition: Chao et al. (arXiv 1605.04253) for the curve; Purushwalkam et al. (arXiv 1905.05908) for compositions.
`curve="legacy"` is the procedure of ExplainableML/czsl at 716b074 and CSP at 029a4af, the source of published numbers.
Letters: `Q` images, `C` candidate pairs, `K` top-k, `R` bootstrap resamples, `T` points of a curve.

    S ▲ best_seen                a bias b is added to every unseen candidate; S(b), U(b) are the
      │▔▔▔▔▔╲                    shares of seen- and unseen-labelled images whose true pair is then
      │      ╲▁                  among the top k. `auc` is the area under S over U, `best_hm` the best
      │  auc   ╲   best_unseen   harmonic mean of the two.
      └─────────┴─────▶ U

Not for: comparing different k, worlds, score spaces, curves or feasibility filters; judging deployed accuracy (the bias
is tuned on the labels of the very images it is measured on); ranking models by `best_seen` or `best_unseen`, which are
extremes that cannot be had together.
"""

import difflib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from eval.errors import EvalWarning, ScoreTableError
from eval.table import blocks, checked_facts, checked_k, checked_scores, largest, refuse_nan

CurveKind = Literal["exact", "legacy"]

MASKED = np.float32(-1e10)
"""Legacy: the score of a column outside the label space."""
END_BIAS = np.float32(1000)
"""Legacy: the bias that stands for "only unseen pairs"."""
STEP_BACK = np.float32(1e-4)
"""Legacy: how far a bias stays below the one that would change the image it comes from."""
BINS = 20
"""Legacy: about this many biases are kept."""


@dataclass(frozen=True, slots=True, eq=False)
class CompositionScores:
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
        meta: anything else worth keeping: run, cache fingerprint.

    Raises:
        ScoreTableError: shapes that disagree, a pair twice, a target that is no column, NaN or +inf.

    """

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
        scores, target = checked_scores(self.scores), np.asarray(self.target)
        pairs, seen = np.asarray(self.pairs), np.asarray(self.seen)
        if scores.ndim != 2:
            raise ScoreTableError(f"scores must be (images, pairs), but have shape {scores.shape}")
        q, c = scores.shape
        if target.shape != (q,) or pairs.shape != (c, 2) or seen.shape != (c,):
            raise ScoreTableError(
                f"scores {scores.shape} need target ({q},), pairs ({c}, 2) and seen ({c},), but got target "
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
            twice = next(name for name in names if names.count(name) > 1)
            raise ScoreTableError(
                f"pair {twice} is a candidate {names.count(twice)} times; keep one column a pair"
            )
        ids = checked_facts(self.split, self.space, self.ids, q)
        refuse_nan(scores, ids, [f"pair {name}" for name in names])
        for name, value in zip(
            ("scores", "target", "pairs", "seen", "ids"),
            (scores, target, pairs, seen, ids),
            strict=True,
        ):
            object.__setattr__(self, name, value)

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
class Thresholds:
    """All that the exact curve needs of each image: the bias at which it changes between hit and miss.

    Attributes:
        t: (Q,). A seen-labelled image is a hit while b <= t: +inf always, -inf never. An unseen-labelled one is a hit
            once b > t: -inf always, +inf never.
        seen: (Q,), True for a seen-labelled image.

    """

    t: Float[np.ndarray, " q"]
    seen: Bool[np.ndarray, " q"]

    @classmethod
    def join(cls, parts: Sequence["Thresholds"]) -> "Thresholds":
        """Thresholds of blocks of rows, as if they had been one table."""
        return cls(np.concatenate([p.t for p in parts]), np.concatenate([p.seen for p in parts]))


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """Points of a seen–unseen curve, in the order in which the area is taken.

    Attributes:
        seen, unseen: (T,) S and U; NaN throughout where there is no image of that kind.
        bias: (T,) exact: the middle of the interval of biases that give the point, NaN where it is unbounded;
            legacy: the bias that was added.

    """

    seen: Float[np.ndarray, " t"]
    unseen: Float[np.ndarray, " t"]
    bias: Float[np.ndarray, " t"]


def evaluate(
    scores: CompositionScores, *, k: int = 1, curve: CurveKind = "exact"
) -> dict[str, float]:
    """The metrics of a table, as fractions; a metric that does not exist for the data is an absent key.

    `auc`, `best_hm`, `best_seen`, `best_unseen`; `hm_seen`, `hm_unseen` (S and U where the harmonic mean is best) and
    `bias_at_best_hm` (absent where the interval of best biases is unbounded). For k = 1 also `pair_acc`, `attr_acc`
    and `obj_acc` of the pair predicted at bias 0 over the whole label space. Without unseen-labelled images only
    `best_seen` and these accuracies exist; without seen-labelled ones, only `best_unseen` and they.

    Args:
        scores: the table.
        k: a hit is the true pair among the k best.
        curve: "exact", or "legacy" for comparison with published numbers.

    Raises:
        ScoreTableError: more than the available candidates are asked for, or an unknown curve.

    """
    known = get_args(CurveKind)
    if curve not in known:
        near = difflib.get_close_matches(str(curve), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ScoreTableError(f"no curve {curve!r}{hint} (known: {', '.join(known)})")
    points = exact_curve(scores, k) if curve == "exact" else legacy_curve(scores, k)
    metrics: dict[str, float] = {}
    n_seen, n_unseen = scores.counts
    if n_seen and n_unseen:
        summary = summarise(points.seen[None], points.unseen[None])
        metrics = {name: float(value[0]) for name, value in summary.items()}
        bias = points.bias[best_point(points.seen[None], points.unseen[None])[0]]
        if np.isfinite(bias):
            metrics["bias_at_best_hm"] = float(bias)
    elif n_seen:
        metrics["best_seen"] = float(points.seen.max())
    else:
        metrics["best_unseen"] = float(points.unseen.max())
    if k == 1:
        metrics |= {name: float(hit.mean()) for name, hit in unbiased_hits(scores).items()}
    return metrics


# ── exact curve ──────────────────────────────────────────────────────────────────────────────────────────────────────


def thresholds(scores: CompositionScores, k: int = 1) -> Thresholds:
    """Reduce a table to one number an image; O(Q·C) time, temporary memory independent of Q."""
    checked_k(k, scores.scores.shape[1])
    return Thresholds.join(
        [
            reduce_rows(scores.scores[rows], scores.target[rows], scores.seen, k)
            for rows in blocks(*scores.scores.shape)
        ]
    )


def reduce_rows(
    scores: Float[np.ndarray, "q c"],
    target: Int[np.ndarray, " q"],
    seen: Bool[np.ndarray, " c"],
    k: int = 1,
) -> Thresholds:
    """Thresholds of a block of rows, which may then be dropped.

    With own = candidates on the true pair's side, other = the opposite side, s = its score and r its rank inside own
    (ties: lower index first), o is the (k − r + 1)-th largest of other; then t = s − o for a seen-labelled image and
    t = o − s for an unseen-labelled one.
    """
    is_seen = seen[target]
    t = np.where(is_seen, -np.inf, np.inf)  # never a hit, until shown otherwise
    for side in (True, False):
        rows = np.flatnonzero(is_seen == side)
        if not len(rows):
            continue
        columns = np.flatnonzero(seen == side)
        own, other = (
            scores[np.ix_(rows, columns)],
            scores[np.ix_(rows, np.flatnonzero(seen != side))],
        )
        s = scores[rows, target[rows], None]
        ahead = (own > s) | ((own == s) & (columns < target[rows, None]))
        r = 1 + ahead.sum(1)
        hit = (r <= k) & (s[:, 0] > -np.inf)
        o = largest(other, k)[hit, k - r[hit]].astype(np.float64)  # -inf: fewer others than needed
        margin = s[hit, 0].astype(np.float64) - o
        t[rows[hit]] = margin if side else -margin
    return Thresholds(t, is_seen)


def hit_rates(
    reduced: Thresholds, weights: Float[np.ndarray, "r q"]
) -> tuple[Float[np.ndarray, "r t"], Float[np.ndarray, "r t"], Float[np.ndarray, " m"]]:
    """S and U at every point of the exact curve, for one or many weightings of the images.

    Point 0 is b → −∞, point j the bias just above the j-th distinct finite threshold.

    Args:
        reduced: the images.
        weights: how often each image counts; ones for the plain curve, multinomial counts for a bootstrap.

    Returns:
        S, U with T = m + 1 points, and the m distinct finite thresholds.

    """
    tau = np.unique(reduced.t[np.isfinite(reduced.t)])
    points = np.arange(len(tau) + 1)

    def cumulated(rows: NDArray[Any], at: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Weight of the images of `rows`, sorted by `at`, that come before each point; and their total weight."""
        order = np.argsort(at, kind="stable")
        total = np.zeros((len(weights), len(rows) + 1))
        np.cumsum(weights[:, rows[order]], axis=1, out=total[:, 1:])
        return total[:, np.searchsorted(at[order], points)], total[:, -1:]

    with np.errstate(invalid="ignore", divide="ignore"):  # no image of a kind: NaN
        rows = np.flatnonzero(reduced.seen)
        t = reduced.t[rows]
        # A seen-labelled image is hit up to the point that counts the thresholds below its own; -1: never at all.
        last = np.where(t == -np.inf, -1, np.searchsorted(tau, t, side="left"))
        gone, total = cumulated(rows, last)
        s = (total - gone) / total
        rows = np.flatnonzero(~reduced.seen)
        t = reduced.t[rows]
        # An unseen-labelled image is hit from the point just above its threshold on; +inf: after the last point.
        first = np.where(t == -np.inf, 0, np.searchsorted(tau, t, side="left") + 1)
        come, total = cumulated(rows, first - 1)
        u = come / total
    return s, u, tau


def exact_curve(scores: CompositionScores, k: int = 1) -> Curve:
    """The whole seen–unseen curve: every point at which any image changes."""
    return curve(thresholds(scores, k))


def curve(reduced: Thresholds) -> Curve:
    """Points of the exact curve from reduced images."""
    s, u, tau = hit_rates(reduced, np.ones((1, len(reduced.t))))
    bias = np.full(len(tau) + 1, np.nan)
    bias[1:-1] = tau[:-1] / 2 + tau[1:] / 2
    return Curve(s[0], u[0], bias)


def harmonic_mean(
    seen: Float[np.ndarray, "r t"], unseen: Float[np.ndarray, "r t"]
) -> Float[np.ndarray, "r t"]:
    """2SU/(S+U), and 0 where S or U is 0."""
    total = seen + unseen
    return np.divide(2 * seen * unseen, total, out=np.zeros_like(total), where=seen * unseen > 0)


def best_point(
    seen: Float[np.ndarray, "r t"], unseen: Float[np.ndarray, "r t"]
) -> Int[np.ndarray, " r"]:
    """Index of the best harmonic mean, the first one on equality."""
    return harmonic_mean(seen, unseen).argmax(1)


def summarise(
    seen: Float[np.ndarray, "r t"], unseen: Float[np.ndarray, "r t"]
) -> dict[str, Float[np.ndarray, " r"]]:
    """Area, best harmonic mean with its S and U, and extremes, of one or many curves."""
    rows, best = np.arange(len(seen)), best_point(seen, unseen)
    width, height = np.diff(unseen, axis=1), (seen[:, 1:] + seen[:, :-1]) / 2
    return {
        "auc": (width * height).sum(1),
        "best_hm": harmonic_mean(seen, unseen)[rows, best],
        "best_seen": seen.max(1),
        "best_unseen": unseen.max(1),
        "hm_seen": seen[rows, best],
        "hm_unseen": unseen[rows, best],
    }


# ── without bias ─────────────────────────────────────────────────────────────────────────────────────────────────────


def unbiased_hits(scores: CompositionScores) -> dict[str, Bool[np.ndarray, " q"]]:
    """Per image: are the pair, the attribute and the object of the best pair right, over the whole label space?

    On a tie the lowest column is the prediction. An image without any candidate predicts nothing.
    """
    predicted = scores.scores.argmax(1)
    any_candidate = scores.scores[np.arange(len(predicted)), predicted] > -np.inf
    pairs = np.asarray(scores.pairs)
    guess, truth = pairs[predicted], pairs[scores.target]
    return {
        "pair_acc": any_candidate & (predicted == scores.target),
        "attr_acc": any_candidate & (guess[:, 0] == truth[:, 0]),
        "obj_acc": any_candidate & (guess[:, 1] == truth[:, 1]),
    }


# ── legacy curve ─────────────────────────────────────────────────────────────────────────────────────────────────────


def legacy_curve(scores: CompositionScores, k: int = 1) -> Curve:
    """The procedure that published numbers come from, in float32, quirks included.

    No point at b → −∞, so `best_seen` is read at the smallest kept bias; the end point, bias 1000, comes last; a
    perfect model scores below 1 (0.979 with 24 unseen images); without an unseen hit at 1000 only that point is left.

    Raises:
        ScoreTableError: fewer than k seen candidates, whose k-th largest score the procedure needs.

    """
    checked_k(k, int(scores.seen.sum()), "k of the legacy curve, which ranks among the seen pairs,")
    if scores.space != "logit":
        warnings.warn(
            f"the legacy curve adds 1000 in float32 and steps by 1e-4, which distorts scores of space "
            f"{scores.space!r} (0.2064 → 0.1978 in one case); scale cosines to logits first, or use the exact curve",
            EvalWarning,
            stacklevel=3,
        )
    gone = np.isneginf(scores.scores)
    raw = np.where(gone, MASKED, scores.scores.astype(np.float32))
    is_seen = scores.seen_labelled

    def hits(bias: np.float32) -> Bool[np.ndarray, " q"]:
        return np.concatenate(
            [
                _biased_hits(raw[rows], gone[rows], scores.target[rows], ~scores.seen, k, bias)
                for rows in blocks(*raw.shape)
            ]
        )

    end = hits(END_BIAS)
    unseen_hits = np.flatnonzero(end & ~is_seen)
    kth_seen = largest(raw[np.ix_(unseen_hits, np.flatnonzero(scores.seen))], k)[:, -1]
    steps = np.sort(kth_seen - raw[unseen_hits, scores.target[unseen_hits]] - STEP_BACK)
    kept = steps[:: max(len(steps) // BINS, 1)]
    table = np.stack([*(hits(bias) for bias in kept), end])
    n_seen, n_unseen = scores.counts
    return Curve(
        table[:, is_seen].sum(1) / (n_seen or math.nan),
        table[:, ~is_seen].sum(1) / (n_unseen or math.nan),
        np.append(kept, END_BIAS).astype(np.float64),
    )


def _biased_hits(
    raw: Float[np.ndarray, "q c"],
    gone: Bool[np.ndarray, "q c"],
    target: Int[np.ndarray, " q"],
    unseen: Bool[np.ndarray, " c"],
    k: int,
    bias: np.float32,
) -> Bool[np.ndarray, " q"]:
    """Is the true pair among the top k after adding a bias to unseen pairs? Ties: lower column first."""
    biased = np.where(gone, MASKED, raw + np.where(unseen, bias, np.float32(0)))
    rows = np.arange(len(raw))
    s = biased[rows, target, None]
    columns = np.arange(len(unseen))
    ahead = (biased > s) | ((biased == s) & (columns < target[:, None]))
    return (ahead.sum(1) < k) & ~gone[rows, target]


# ── chance ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def chance(scores: CompositionScores, *, k: int = 1) -> dict[str, float]:
    """What random scores get, n seen and m unseen pairs competing (a column of -inf does not compete).

    Extremes min(k/n, 1) and min(k/m, 1); for k = 1 also auc 1/(2nm), best_hm 2/(√n + √m)², and the accuracies of a pair
    drawn at random. Only metrics that `evaluate` also gives, and none of a side on which no candidate competes.
    """
    alive = (scores.scores > -np.inf).any(0)
    n, m = int((alive & scores.seen).sum()), int((alive & ~scores.seen).sum())
    n_seen, n_unseen = scores.counts
    lines: dict[str, float] = {}
    if n_seen and n:
        lines["best_seen"] = min(k / n, 1.0)
    if n_unseen and m:
        lines["best_unseen"] = min(k / m, 1.0)
    if k == 1 and len(lines) == 2:
        lines |= {"auc": 1 / (2 * n * m), "best_hm": 2 / (math.sqrt(n) + math.sqrt(m)) ** 2}
    if k == 1 and n + m:
        pairs = np.asarray(scores.pairs)
        lines["pair_acc"] = 1 / (n + m)
        for name, part in (("attr_acc", 0), ("obj_acc", 1)):
            truth, candidates = pairs[scores.target, part], pairs[alive, part]
            values, counts = np.unique(candidates, return_counts=True)
            share = dict(zip(values.tolist(), (counts / (n + m)).tolist(), strict=True))
            lines[name] = float(np.mean([share.get(v, 0.0) for v in truth.tolist()]))
    return lines
