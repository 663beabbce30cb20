"""The legacy seen–unseen curve: the procedure of ExplainableML/czsl at 716b074 and CSP at 029a4af.

Published numbers come from it, so it is kept with its quirks (docs/protocols.md, CZSL, legacy curve); for comparisons
of your own take the exact one. It looks at every score again for each of about twenty biases.
"""

import math
import warnings

import numpy as np
from jaxtyping import Bool, Float, Int

from eval.composition import CompositionScores
from eval.curve import Curve
from eval.errors import EvalWarning
from eval.table import blocks, checked_k, largest

MASKED = np.float32(-1e10)
"""The score of a column outside the label space."""
END_BIAS = np.float32(1000)
"""The bias that stands for "only unseen pairs"."""
STEP_BACK = np.float32(1e-4)
"""How far a bias stays below the one that would change the image it comes from."""
BINS = 20
"""About this many biases are kept."""


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
