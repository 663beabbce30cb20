"""Compositional matching: does a model prefer the true caption, and the true image?

Two tables: one image with a true and a false caption (SugarCrepe, arXiv 2306.14610), and two images with two captions
(Winoground, arXiv 2204.03162; BiVLC, arXiv 2406.09952). Every comparison is strict: a tie is a miss.

    scores (n, 2, 2), indexed [image, caption]     i2t: both rows right: image fixed, choose the caption
               caption 0   caption 1                    (Winoground's "text score")
      image 0   s(0,0)  >   s(0,1)                 t2i: both columns right: caption fixed, choose the image
                  v           ^                         (Winoground's "image score")
      image 1   s(1,0)  <   s(1,1)                 group: both

Not for: `i2t` alone as a claim about both directions; SugarCrepe alone as a claim about composition (text-only
negatives reach 90 % by the plausibility of captions).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from eval.errors import ScoreTableError
from eval.table import checked_facts, checked_scores, refuse_nan

CATEGORY_MEAN = "mean_of_categories"
"""Key behind the slash for the unweighted mean over categories."""

CHANCE = {
    "accuracy": 1 / 2,
    "i2t": 1 / 4,
    "t2i": 1 / 4,
    "group_score": 4 / 24,  # of the 24 orders of four scores, four satisfy all four comparisons
    "i2t_0": 1 / 2,
    "i2t_1": 1 / 2,
    "t2i_0": 1 / 2,
    "t2i_1": 1 / 2,
}


@dataclass(frozen=True, slots=True, eq=False)
class MatchingScores:
    """Scores of images with true and false captions.

    Attributes:
        scores: (n, 2, 2) indexed [image, caption], caption i being of image i; or (n, 2), true caption first.
        category: (n,) kind of the false caption, e.g. "swap"; one word for each item.
        space: "cosine", "logit" or "probability".
        split: train, val or test.
        ids: names of the items, or empty.
        meta: anything else worth keeping: run, cache fingerprint.

    Raises:
        ScoreTableError: shapes that disagree, an empty category, NaN or +inf.

    """

    scores: NDArray[Any]
    category: NDArray[Any] | Sequence[str]
    space: str
    split: str = "test"
    ids: Sequence[str] = ()
    meta: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        scores, category = checked_scores(self.scores), np.asarray(self.category)
        if scores.shape[1:] not in ((2, 2), (2,)):
            raise ScoreTableError(
                f"scores must be (n, 2, 2) or (n, 2), but have shape {scores.shape}"
            )
        if category.shape != (len(scores),):
            raise ScoreTableError(
                f"{len(scores)} items need one category each, but category is {category.shape}"
            )
        category = category.astype(str)
        if np.isin(category, ["", CATEGORY_MEAN]).any():
            raise ScoreTableError(
                f"a category may not be empty or called {CATEGORY_MEAN!r}; rename it"
            )
        ids = checked_facts(self.split, self.space, self.ids, len(scores))
        refuse_nan(scores, ids, ["caption"] * 2)
        for name, value in zip(("scores", "category", "ids"), (scores, category, ids), strict=True):
            object.__setattr__(self, name, value)

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories present, sorted."""
        return tuple(np.unique(np.asarray(self.category)).tolist())


def evaluate(scores: MatchingScores) -> dict[str, float]:
    """Shares of items that are right, as fractions.

    For (n, 2, 2): `i2t`, `t2i`, `group_score`, and the four comparisons `i2t_0`, `i2t_1` (image 0, 1 chooses its
    caption), `t2i_0`, `t2i_1` (caption 0, 1 chooses its image). For (n, 2): `accuracy`. Each also as
    `<metric>/<category>` and, as the unweighted mean over categories, `<metric>/mean_of_categories`.
    """
    parts = outcomes(scores)
    metrics = {name: float(np.nanmean(right)) for name, right in parts.items()}
    for name in (name for name in parts if "/" not in name):
        metrics[f"{name}/{CATEGORY_MEAN}"] = float(
            np.mean([metrics[f"{name}/{c}"] for c in scores.categories])
        )
    return metrics


def outcomes(scores: MatchingScores) -> dict[str, Float[np.ndarray, " n"]]:
    """Per metric and item: 1 right, 0 wrong, NaN where the item is not of the metric's category."""
    s = scores.scores
    if s.ndim == 2:
        right = {"accuracy": s[:, 0] > s[:, 1]}
    else:
        atoms = {
            "i2t_0": s[:, 0, 0] > s[:, 0, 1],
            "i2t_1": s[:, 1, 1] > s[:, 1, 0],
            "t2i_0": s[:, 0, 0] > s[:, 1, 0],
            "t2i_1": s[:, 1, 1] > s[:, 0, 1],
        }
        i2t, t2i = atoms["i2t_0"] & atoms["i2t_1"], atoms["t2i_0"] & atoms["t2i_1"]
        right = {"i2t": i2t, "t2i": t2i, "group_score": i2t & t2i, **atoms}
    category = np.asarray(scores.category)
    parts = {name: values.astype(np.float64) for name, values in right.items()}
    for c in scores.categories:
        for name in right:
            parts[f"{name}/{c}"] = np.where(category == c, parts[name], np.nan)
    return parts


def chance(scores: MatchingScores) -> dict[str, float]:
    """What random scores get: 1/2 for one comparison, 1/4 for two, 1/6 for the group."""
    return {name: CHANCE[name.split("/")[0]] for name in evaluate(scores)}
