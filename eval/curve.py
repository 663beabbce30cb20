"""The seen–unseen curve, from one number an image: its points, area, harmonic mean and extremes.

Letters: `Q` images, `R` weightings of them (bootstrap resamples), `T` points of a curve, `M` distinct thresholds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray


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


def trace(reduced: Thresholds) -> Curve:
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
