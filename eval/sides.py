"""The best seen and the best unseen pair of each image: all that a prediction at a calibration bias depends on.

Letters: `Q` images, `C` candidate pairs.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from eval.table import blocks


@dataclass(frozen=True, slots=True, eq=False)
class Sides:
    """Of every image, the best candidate of either side; on a tie inside a side the lowest column.

    Attributes:
        seen, unseen: (Q,) its score; -inf where no pair of that side is a candidate.
        seen_column, unseen_column: (Q,) its column; -1 where there is none.

    """

    seen: Float[np.ndarray, " q"]
    seen_column: Int[np.ndarray, " q"]
    unseen: Float[np.ndarray, " q"]
    unseen_column: Int[np.ndarray, " q"]

    @classmethod
    def of(cls, scores: Float[np.ndarray, "q c"], seen: Bool[np.ndarray, " c"]) -> "Sides":
        """From every score; temporary memory independent of Q."""
        found = [*_best(scores, np.flatnonzero(seen)), *_best(scores, np.flatnonzero(~seen))]
        return cls(*found)

    def at(self, bias: float | None) -> Int[np.ndarray, " q"]:
        """Column predicted for each image; -1 without a candidate.

        Args:
            bias: added to unseen candidates, also -inf or inf; an unseen pair wins if it is larger than the margin
                seen − unseen, as on the exact curve. None adds nothing, and a tie goes to the lowest column of all.

        """
        if bias is None:
            lower = self.unseen_column < self.seen_column
            tied = (self.seen == self.unseen) & (self.unseen_column >= 0)
            chosen = (self.unseen > self.seen) | (tied & lower)
        else:
            with np.errstate(invalid="ignore"):  # -inf − -inf: no candidate at all
                margin = self.seen.astype(np.float64) - self.unseen.astype(np.float64)
            chosen = (bias > margin) | (margin == -np.inf)
        return np.where(chosen, self.unseen_column, self.seen_column)


def _best(
    scores: Float[np.ndarray, "q c"], columns: Int[np.ndarray, " s"]
) -> tuple[Float[np.ndarray, " q"], Int[np.ndarray, " q"]]:
    best = np.full(len(scores), -np.inf, dtype=scores.dtype)
    where = np.full(len(scores), -1)
    for rows in blocks(*scores.shape) if len(columns) else ():
        part = scores[rows][:, columns]
        at = part.argmax(1)
        best[rows] = part[np.arange(len(part)), at]
        where[rows] = np.where(best[rows] > -np.inf, columns[at], -1)
    return best, where
