"""Softmaxes over the first n candidates, for many n, with about one exponential a candidate.

    p(pair) + p(attr)·p(obj)      pair: over the first n; attr, obj: over those that some of the first n have

exp(z - r) of every candidate is made once, with r the largest logit of the largest set; a smaller set only divides by
another sum. Where the best that is left is FAR below r, so that small probabilities would be lost, it is made again.
Our own arrangement; what it equals is `softmax` of each set.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

FAR = 20.0
"""Of two words it is e^-40 at most, and float32 reaches e^-87: what is lost is below e^-47, 4e-21, of the best."""


def nested_mixture(
    pair: Float[Tensor, "b c"],
    attr_logits: Float[Tensor, "b a"],
    obj_logits: Float[Tensor, "b o"],
    attr: Int[Tensor, " c"],
    obj: Int[Tensor, " c"],
    sizes: Sequence[int],
) -> Iterator[Float[Tensor, "b n"]]:
    """p(pair) + p(attr)·p(obj) over the first n candidates, for every n of `sizes`; the next overwrites what was given.

    Args:
        pair, attr_logits, obj_logits: float32 logits, those of pairs by candidate.
        attr, obj: of every candidate.
        sizes: descending, each at least 1.
    """
    if not sizes:
        return
    out = torch.empty((len(pair), max(sizes)), dtype=pair.dtype, device=pair.device)
    pairs, words = Pairs(pair, sizes), _Words(attr_logits, obj_logits, attr, obj)
    for n in sizes:
        torch.mul(*pairs.first(n), out=out[:, :n])
        yield out[:, :n].addcmul_(*words.first(n))


class Pairs:
    """The softmax of each candidate's own logit, as exponentials and what they are to be multiplied with.

    Args:
        z: float32 logits.
        sizes: that will be asked for, descending, each at least 1.

    Attributes:
        reference: r of the exponentials that were given last, (B,).

    """

    def __init__(self, z: Float[Tensor, "b c"], sizes: Sequence[int]) -> None:
        self.z, self.edges = z, [0, *sorted(sizes)]
        self.top = torch.stack([z[:, i:j].amax(1) for i, j in pairwise(self.edges)]).cummax(0)[0]
        self.reference = torch.full_like(self.top[0], torch.inf)

    def first(self, n: int) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b 1"]]:
        """Of the first n: (B, n) and (B, 1)."""
        at = self.edges.index(n) - 1
        top = self.top[at]
        if not float((self.reference - top).max()) <= FAR:  # or there is none yet, or none is left
            self.reference = top
            self.exp = (self.z[:, :n] - top[:, None]).exp_()
            parts = [
                self.exp[:, i:j].sum(1, dtype=torch.float64)
                for i, j in pairwise(self.edges[: at + 2])
            ]
            self.total = torch.stack(parts).cumsum(0)
        return self.exp[:, :n], (1 / self.total[at])[:, None].to(self.exp.dtype)


class _Words:
    """The product of the softmaxes of a candidate's attr and obj, likewise."""

    def __init__(
        self,
        attr_logits: Float[Tensor, "b a"],
        obj_logits: Float[Tensor, "b o"],
        attr: Int[Tensor, " c"],
        obj: Int[Tensor, " c"],
    ) -> None:
        self.z, self.at = (attr_logits, obj_logits), (attr, obj)
        place = torch.arange(len(attr), device=attr.device)
        # Where each word comes first; one that no candidate has, behind all of them.
        self.comes = [
            torch.full_like(z[0], len(attr), dtype=torch.long).scatter_reduce(0, i, place, "amin")
            for z, i in zip(self.z, self.at, strict=True)
        ]
        self.reference: list[Tensor] | None = None

    def first(self, n: int) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b 1"]]:
        """Of the first n: (B, n) and (B, 1)."""
        left = [
            z.masked_fill(comes >= n, -torch.inf)
            for z, comes in zip(self.z, self.comes, strict=True)
        ]
        top = [z.amax(1) for z in left]
        old = self.reference
        if old is None or max(float((r - t).max()) for r, t in zip(old, top, strict=True)) > FAR:
            self.reference = old = top
            exp = [(z - t[:, None]).exp() for z, t in zip(left, top, strict=True)]
            attr, obj = (e[:, i[:n]] for e, i in zip(exp, self.at, strict=True))
            self.exp = attr.mul_(obj)
        totals = [
            (z - r[:, None]).double().exp().sum(1, keepdim=True)
            for z, r in zip(left, old, strict=True)
        ]
        return self.exp[:, :n], (1 / (totals[0] * totals[1])).to(self.exp.dtype)
