"""Partners: for every example another one that shares exactly one of its primitives, from the labels alone.

    main (red, cup)      same_attr: (red, any other obj)      same_obj: (any other attr, cup)

Examples are sorted by (attr, obj), so those with one attr are a block, and those with the same pair a hole in it:

    attr red   │ bag bag │ cup cup cup │ hat │          count = block - hole        the draw skips the hole
                           └── hole ──┘

A partner is uniform over all such examples, and a function of (seed, epoch, example) and of whom it is drawn among:
all examples where they are held in memory, and in a block shuffle those of the pool that is being used up, so that each
chunk is still read once. Only who has no partner in its pool gets one from elsewhere, which is read by itself.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

PARTNERS = ("same_attr", "same_obj")
"""Kinds of partner, in the order of the last axis of all that is drawn here."""


class Drawn(NamedTuple):
    """Partners of some examples.

    Attributes:
        example: numbers of the partners, (n, 2); where there is none, of some example that stands in.
        valid: False where one stands in, (n, 2).
        elsewhere: True where the partner is not among those it was first looked for, (n, 2).

    """

    example: Int[np.ndarray, "n 2"]
    valid: Bool[np.ndarray, "n 2"]
    elsewhere: Bool[np.ndarray, "n 2"]


class Among:
    """Some of all examples, to draw partners from.

    Args:
        attr, obj: labels of all examples.
        some: numbers of those that are drawn from.
    """

    def __init__(
        self, attr: Int[np.ndarray, " e"], obj: Int[np.ndarray, " e"], some: Int[np.ndarray, " m"]
    ) -> None:
        self.labels = ((attr, obj), (obj, attr))
        self.width = int(max(attr.max(initial=0), obj.max(initial=0))) + 1
        self.orders: list[np.ndarray] = []
        self.keys: list[np.ndarray] = []
        for shared, other in self.labels:
            order = some[np.lexsort((other[some], shared[some]))]
            self.orders.append(order)
            self.keys.append((shared * self.width + other)[order])

    def draw(self, examples: Int[np.ndarray, " n"], lots: Float[np.ndarray, "n 2"]) -> Drawn:
        """A partner of each kind for `examples`; `lots` in [0, 1) decide which."""
        found = np.empty((len(examples), len(PARTNERS)), np.int64)
        valid = np.empty(found.shape, bool)
        for k, (shared, other) in enumerate(self.labels):
            order, keys, mine = self.orders[k], self.keys[k], shared[examples]
            first, last = (np.searchsorted(keys, (mine + i) * self.width) for i in (0, 1))
            own = mine * self.width + other[examples]
            hole, after = (np.searchsorted(keys, own + i) for i in (0, 1))
            count = (last - first) - (after - hole)
            at = first + np.floor(lots[:, k] * count).astype(np.int64)
            at += np.where(at >= hole, after - hole, 0)
            anybody = np.floor(lots[:, k] * len(order)).astype(np.int64)
            valid[:, k] = count > 0
            found[:, k] = order[np.where(count > 0, at, anybody)]
        return Drawn(found, valid, np.zeros_like(valid))


class PartnerSampler:
    """Draws the partners of labelled examples in one epoch.

    Args:
        attr, obj: labels of all examples.
        seed, epoch: decide every draw.
    """

    def __init__(
        self,
        attr: Int[np.ndarray, " e"],
        obj: Int[np.ndarray, " e"],
        *,
        seed: int,
        epoch: int,
    ) -> None:
        self.attr, self.obj = attr, obj
        self.lots = np.random.default_rng([seed, epoch, len(PARTNERS)]).random((len(attr), 2))
        self.everybody = Among(attr, obj, np.arange(len(attr)))

    def among(self, some: Int[np.ndarray, " m"]) -> Among:
        """A part of the examples to draw from, e.g. those of a pool."""
        return Among(self.attr, self.obj, some)

    def draw(self, examples: Int[np.ndarray, " n"], near: Among | None = None) -> Drawn:
        """Partners of `examples`: from `near` where it has one, else from all."""
        lots = self.lots[examples]
        if near is None:
            return self.everybody.draw(examples, lots)
        here, anywhere = near.draw(examples, lots), self.everybody.draw(examples, lots)
        elsewhere = anywhere.valid & ~here.valid
        example = np.where(elsewhere, anywhere.example, here.example)
        return Drawn(example, anywhere.valid, elsewhere)
