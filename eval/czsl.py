"""Compositional zero-shot learning: the seen–unseen curve, its area, harmonic mean and extremes.

Definition: Chao et al. (arXiv 1605.04253) for the curve; Purushwalkam et al. (arXiv 1905.05908) for compositions.
`curve="legacy"` (eval/legacy.py) is the procedure that published numbers come from.
Letters: `Q` images, `C` candidate pairs, `K` top-k.

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
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool

from eval.composition import Composition, CompositionScores
from eval.curve import Curve, best_point, summarise, trace
from eval.errors import ScoreTableError
from eval.legacy import legacy_curve

__all__ = [
    "CompositionScores",
    "CurveKind",
    "chance",
    "evaluate",
    "exact_curve",
    "unbiased_hits",
]

CurveKind = Literal["exact", "legacy"]


def evaluate(scores: Composition, *, k: int = 1, curve: CurveKind = "exact") -> dict[str, float]:
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
    if curve == "exact":
        points = exact_curve(scores, k)
    elif isinstance(scores, CompositionScores):
        points = legacy_curve(scores, k)
    else:
        raise ScoreTableError(
            "the legacy curve looks at every score again, and this table keeps the best of each image only; use the "
            "exact curve, or score again with every score kept (headstart score … --dense)"
        )
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


def exact_curve(scores: Composition, k: int = 1) -> Curve:
    """The whole seen–unseen curve: every point at which any image changes."""
    return trace(scores.thresholds(k))


def unbiased_hits(scores: Composition) -> dict[str, Bool[np.ndarray, " q"]]:
    """Per image: are the pair, the attribute and the object of the best pair right, over the whole label space?

    On a tie the lowest column is the prediction. An image without any candidate predicts nothing.
    """
    predicted = scores.predicted()
    pairs = np.asarray(scores.pairs)
    guess, truth = pairs[predicted], pairs[scores.target]
    return {
        "pair_acc": predicted == scores.target,
        "attr_acc": (predicted >= 0) & (guess[:, 0] == truth[:, 0]),
        "obj_acc": (predicted >= 0) & (guess[:, 1] == truth[:, 1]),
    }


def chance(scores: Composition, *, k: int = 1) -> dict[str, float]:
    """What random scores get, n seen and m unseen pairs competing (a column of -inf does not compete).

    Extremes min(k/n, 1) and min(k/m, 1); for k = 1 also auc 1/(2nm), best_hm 2/(√n + √m)², and the accuracies of a pair
    drawn at random. Only metrics that `evaluate` also gives, and none of a side on which no candidate competes.
    """
    alive = scores.competing()
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
