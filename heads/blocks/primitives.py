"""Words judged by the best pair that has them, and their probabilities beside that of the pair.

    p(pair) + β (p(attr) + p(obj))      p(pair): softmax of the logits over the candidates
    z(word) = τ · max of all candidates with the word, of their logits or of p(pair)
    p(word) = softmax of z over the words that some candidate has

A candidate with logit -inf is none: it has no part in any sum or maximum, and its own score is -inf. All in float32.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from heads.blocks.nested import Pairs

Of = Literal["logit", "probability"]
"""What the largest is taken of."""


def primitive_maxima(
    scores: Float[Tensor, "b c"], labels: Int[Tensor, " c"], n: int
) -> Float[Tensor, "b n"]:
    """For each of n words the largest score of the candidates that have it; -inf for a word that none has.

    The gradient of a maximum goes to the candidate that has it; where several tie, each gets an equal share.

    Args:
        scores: of candidates.
        labels: word of every candidate, 0 to n - 1.
        n: number of words.
    """
    scores = scores.float()
    nothing = scores.new_full((len(scores), n), -torch.inf)
    return nothing.scatter_reduce(1, labels.expand_as(scores), scores, "amax")


def pair_probability(logits: Float[Tensor, "b c"]) -> Float[Tensor, "b c"]:
    """Softmax over the candidates; -inf, not 0, for one that is none."""
    logits = logits.float()
    return logits.softmax(-1).masked_fill(logits.isneginf(), -torch.inf)


def primitive_logits(
    logits: Float[Tensor, "b c"],
    labels: Int[Tensor, " c"],
    n: int,
    *,
    tau: float | Tensor = 1.0,
    of: Of = "logit",
) -> Float[Tensor, "b n"]:
    """The z of n words; -inf for one that no candidate has.

    Args:
        logits: of candidates.
        labels, n: as for `primitive_maxima`.
        tau: τ, above 0.
        of: what the largest is taken of.
    """
    judged = logits if of == "logit" else pair_probability(logits)
    return _times(primitive_maxima(judged, labels, n), tau)


def fused(
    scores: Float[Tensor, "b c"],
    attr: Int[Tensor, " c"],
    obj: Int[Tensor, " c"],
    n_attrs: int,
    n_objs: int,
    *,
    beta: float,
    tau_attr: float | Tensor = 1.0,
    tau_obj: float | Tensor = 1.0,
    of: Of = "logit",
) -> Float[Tensor, "b c"]:
    """p(pair) + β (p(attr) + p(obj)) of every candidate.

    Args:
        scores: logits of candidates.
        attr, obj: words of every candidate, below `n_attrs` and `n_objs`.
        n_attrs, n_objs: sizes of the vocabularies.
        beta: β; with 0 this is the softmax.
        tau_attr, tau_obj: τ, above 0.
        of: what the largest is taken of.
    """
    out = pair_probability(scores)
    for labels, n, tau in ((attr, n_attrs, tau_attr), (obj, n_objs, tau_obj)):
        p = primitive_logits(scores, labels, n, tau=tau, of=of).softmax(-1)
        out = out + beta * p.index_select(1, labels)
    return out.masked_fill(scores.isneginf(), -torch.inf)


def nested_fused(
    scores: Float[Tensor, "b c"],
    attr: Int[Tensor, " c"],
    obj: Int[Tensor, " c"],
    n_attrs: int,
    n_objs: int,
    sizes: Sequence[int],
    *,
    beta: float,
    tau_attr: float | Tensor = 1.0,
    tau_obj: float | Tensor = 1.0,
    of: Of = "logit",
) -> Iterator[Float[Tensor, "b n"]]:
    """`fused` of the first n candidates alone, for every n of `sizes`; the next overwrites what was given.

    Every candidate's exponential is made about once and its logit compared once: the largest of a prefix is that of the
    shorter one before it, or of the candidates in between. Without gradients.

    Args:
        scores, attr, obj, n_attrs, n_objs, beta, tau_attr, tau_obj, of: as for `fused`.
        sizes: descending, each at least 1.
    """
    if not sizes:
        return
    scores = scores.detach().float()
    out = torch.empty((len(scores), max(sizes)), device=scores.device)
    beside = torch.empty_like(out).flatten()
    none = scores.isneginf()
    some_are_none = bool(none.any())
    pairs = Pairs(scores, sizes)
    words = [
        (labels, tau, _prefix_maxima(scores, labels, n, sizes))
        for labels, n, tau in ((attr, n_attrs, tau_attr), (obj, n_objs, tau_obj))
    ]
    for n in sizes:
        exp, share = pairs.first(n)
        torch.mul(exp, share, out=out[:, :n])
        for labels, tau, maxima in words:
            best = maxima[n]
            if of == "probability":
                p = (best - pairs.reference[:, None]).exp_().mul_(share)
                best = p.masked_fill_(best.isneginf(), -torch.inf)
            p = _times(best, tau).softmax(-1).mul_(beta)
            looked_up = beside[: len(p) * n].view(len(p), n)
            out[:, :n].add_(torch.index_select(p, 1, labels[:n], out=looked_up))
        yield out[:, :n].masked_fill_(none[:, :n], -torch.inf) if some_are_none else out[:, :n]


def _times(best: Float[Tensor, "b n"], tau: float | Tensor) -> Float[Tensor, "b n"]:
    """τ · best, and -inf where best is; τ times -inf would give τ no gradient but NaN."""
    absent = best.isneginf()
    return (tau * best.masked_fill(absent, 0.0)).masked_fill(absent, -torch.inf)


def _prefix_maxima(
    scores: Float[Tensor, "b c"], labels: Int[Tensor, " c"], n_words: int, sizes: Sequence[int]
) -> dict[int, Float[Tensor, "b n"]]:
    """`primitive_maxima` of the first n candidates, for every n of `sizes`."""
    edges = [0, *sorted(sizes)]
    between = [primitive_maxima(scores[:, i:j], labels[i:j], n_words) for i, j in pairwise(edges)]
    return dict(zip(edges[1:], torch.stack(between).cummax(0).values, strict=True))
