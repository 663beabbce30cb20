"""Which experts of a head are used by what: mean shares by kind, for the report's heat-maps.

shares (Q, K, E) of queries at K blocks  →  mean share of each expert, a row for each kind (of edit, attribute)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from heads.base import Head
from heads.features import Features
from heads.grid import blocks
from heads.score import scoring, source_of
from heads.tasks import CompositionData

BLOCK = 256
"""Images that are run at once."""

ALL = "all queries"
NO_KIND = "no category"


@runtime_checkable
class Routed(Protocol):
    """A head with routers."""

    def routing(self, queries: Features) -> Float[Tensor, "b k e"] | None:
        """Shares of the experts for each query, by block; None where there is no router."""
        ...


@dataclass(frozen=True, slots=True)
class Usage:
    """Mean shares of experts.

    Attributes:
        kinds: (G,) of edit, the last being all queries together.
        shares: (G, K, E) means at each block; a row sums to 1.
        counts: (G,) queries; one of several kinds counts in each.

    """

    kinds: tuple[str, ...]
    shares: Float[np.ndarray, "g k e"]
    counts: Int[np.ndarray, " g"]


def usage(
    shares: Float[np.ndarray, "q k e"], kinds: Sequence[str], categories: Sequence[Sequence[str]]
) -> Usage:
    """Mean shares of the queries of each kind, of those of none if there are other ones, and of all.

    Args:
        shares: of experts, by query and block.
        kinds: those present, in the order of the rows.
        categories: (Q,) kinds of each query.
    """
    rows = {kind: [i for i, named in enumerate(categories) if kind in named] for kind in kinds}
    without = [i for i, named in enumerate(categories) if not named]
    if kinds and without:
        rows[NO_KIND] = without
    rows[ALL] = list(range(len(shares)))
    means = np.stack([shares[some].mean(0, dtype=np.float64) for some in rows.values()])
    return Usage(tuple(rows), means, np.array([len(some) for some in rows.values()]))


def by_attribute(head: Head, data: CompositionData) -> dict[str, Any] | None:
    """Mean shares of the experts by true attribute, over all images of a split; None where no router mixes any.

    Returns:
        kinds, counts and shares of `usage`, and in words what they are of.
    """
    routed: Any = head
    if not isinstance(head, Routed):
        return None
    source, found = source_of(routed, data), []
    with scoring(routed):
        for part in blocks(len(data.images), BLOCK):
            shares = routed.routing(source.images(data.images[part]))
            if shares is None:
                return None
            found.append(shares.float().cpu().numpy())
    attrs = [data.attrs[i] for i in data.attr]
    used = usage(np.concatenate(found), sorted(set(attrs)), [(attr,) for attr in attrs])
    kinds = [kind if kind != ALL else "all images" for kind in used.kinds]
    facts = {"by": "attribute", "of": "images", "tower": "image", "drawn": "last", "reads": ""}
    shares = {"kinds": np.array(kinds), "counts": used.counts, "shares": used.shares}
    return {**shares, **{name: np.array(value) for name, value in facts.items()}}
