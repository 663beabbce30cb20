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

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from eval.errors import ScoreTableError
from eval.table import checked_facts, checked_scores, refuse_nan

TYPE_MEAN = "mean_of_types"
"""Key behind the slash for the unweighted mean over types; SugarCrepe's headline."""

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
        category: (n,) kind of the false caption; one word for each item. Where all are `<type>_<subtype>`
            ("swap_att"), items are pooled by type, too.
        space: "cosine", "logit" or "probability".
        split: train, val or test.
        ids: names of the items, or empty.
        meta: anything else worth keeping: run, cache fingerprint.

    Raises:
        ScoreTableError: shapes that disagree, an empty category, NaN or +inf.

    """

    kind: ClassVar[str] = "matching"
    world: ClassVar[str] = ""

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
        for c in np.unique(category).tolist():
            if not c or c == TYPE_MEAN or re.fullmatch(r"macro_\d+", c):
                raise ScoreTableError(
                    f"a category may not be called {c!r}: it may neither be empty nor be the name of a mean "
                    f"({TYPE_MEAN}, macro_7); rename it"
                )
        ids = checked_facts(self.split, self.space, self.ids, len(scores))
        refuse_nan(scores, ids, ["caption"] * 2)
        for name, value in zip(("scores", "category", "ids"), (scores, category, ids), strict=True):
            object.__setattr__(self, name, value)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the scores: (n, 2, 2) or (n, 2)."""
        return self.scores.shape

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories present, sorted."""
        return tuple(np.unique(np.asarray(self.category)).tolist())

    @property
    def types(self) -> tuple[str, ...]:
        """What stands before the first underscore of the categories, sorted; none unless every category has one."""
        parts = [c.partition("_") for c in self.categories]
        return tuple(sorted({t for t, _, _ in parts})) if all(t and s for t, _, s in parts) else ()


def evaluate(scores: MatchingScores) -> dict[str, float]:
    """Shares of items that are right, as fractions.

    For (n, 2, 2): `i2t`, `t2i`, `group_score`, and the four comparisons `i2t_0`, `i2t_1` (image 0, 1 chooses its
    caption), `t2i_0`, `t2i_1` (caption 0, 1 chooses its image). For (n, 2): `accuracy`. All items are pooled; behind a
    slash each also by type (`accuracy/swap`) and category (`accuracy/swap_att`), and as the unweighted means
    `accuracy/mean_of_types` and `accuracy/macro_<n>`, over n categories (SugarCrepe: `macro_7`).
    """
    shares = {name: float(np.nanmean(right)) for name, right in outcomes(scores).items()}
    return summarise(scores, shares)


def outcomes(scores: MatchingScores) -> dict[str, Float[np.ndarray, " n"]]:
    """Per metric and item: 1 right, 0 wrong, NaN where the item is not of the metric's type or category."""
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
    of_type = np.array([c.partition("_")[0] for c in category.tolist()])
    groups = {t: of_type == t for t in scores.types} | {c: category == c for c in scores.categories}
    parts = {name: values.astype(np.float64) for name, values in right.items()}
    for group, members in groups.items():
        for name in right:
            parts[f"{name}/{group}"] = np.where(members, parts[name], np.nan)
    return parts


def summarise(scores: MatchingScores, shares: Mapping[str, Any]) -> dict[str, Any]:
    """The shares with the unweighted means over types and over categories added.

    Args:
        scores: the table that says which types and categories there are.
        shares: the metrics of `outcomes`, each a fraction or (R,) fractions of R resamples.

    """
    metrics = dict(shares)
    means = {f"macro_{len(scores.categories)}": scores.categories}
    means |= {TYPE_MEAN: scores.types} if scores.types else {}
    for name in [m for m in shares if "/" not in m]:
        for mean, groups in means.items():
            metrics[f"{name}/{mean}"] = sum(shares[f"{name}/{g}"] for g in groups) / len(groups)
    return metrics


def chance(scores: MatchingScores) -> dict[str, float]:
    """What random scores get: 1/2 for one comparison, 1/4 for two, 1/6 for the group."""
    return {name: CHANCE[name.split("/")[0]] for name in evaluate(scores)}
