"""What a head is worth on a split, while it is trained and by itself: score and evaluate at once."""

from collections.abc import Callable
from typing import Any

import numpy as np

from eval.composed import KS
from eval.composed import evaluate as evaluate_composed
from eval.composed_table import ComposedScores
from eval.czsl import Composition
from eval.czsl import evaluate as evaluate_czsl
from eval.matching import MatchingScores
from eval.matching import evaluate as evaluate_matching
from eval.retrieval import RetrievalScores
from eval.retrieval import evaluate as evaluate_retrieval
from heads.base import Head
from heads.score import score, score_both
from heads.source import Source
from heads.tasks import (
    ComposedData,
    CompositionData,
    MatchingData,
    RetrievalData,
    TaskData,
    TripletData,
)


def metrics(head: Head, data: TaskData, **options: Any) -> dict[str, float]:
    """Score and evaluate at once: the task's metrics; of retrieval both directions with `rsum`, of triplets the recall
    of target captions.

    Args:
        head: trained or in training.
        data: a split of one task.
        options: passed on to `score`.
    """
    if isinstance(data, RetrievalData):
        both = score_both(head, data, **options)
        found: dict[str, float] = {}
        for direction, table in (("t2i", both.t2i), ("i2t", both.i2t)):
            values = evaluate_retrieval(table)
            found |= {f"{direction}_{name}": value for name, value in values.items()}
        recalls = [value for name, value in found.items() if "_recall@" in name]
        return found | {"rsum": sum(recalls)}
    scores = score(head, data, **options)
    if isinstance(scores, Composition):
        return evaluate_czsl(scores)
    if isinstance(scores, ComposedScores):
        most = int((np.asarray(scores.scores) > -np.inf).sum(1).min())
        ks = [k for k in KS[scores.queries.protocol] if k < most]
        return evaluate_composed(scores, ks=ks or [1])
    if isinstance(scores, RetrievalScores):
        return evaluate_retrieval(scores)
    assert isinstance(scores, MatchingScores)
    return evaluate_matching(scores)


def validator(data: TaskData, source: Source) -> Callable[[Head], dict[str, float]]:
    """`validate` for training, from rows that are read once and kept."""
    return lambda head: metrics(head, data, source=source)


def selection(data: TaskData) -> str:
    """Validation metric that chooses the weights (docs/protocols.md, model selection)."""
    if isinstance(data, MatchingData):
        return "group_score" if data.kind == "two_by_two" else "accuracy"
    if isinstance(data, CompositionData):
        # Without images of both kinds there is no curve, and hence no area under it.
        return "auc" if len(set(data.seen[data.target].tolist())) == 2 else "pair_acc"
    if isinstance(data, ComposedData):
        return {"circo": "map@5", "fashioniq": "avg"}.get(data.queries.protocol, "recall@1")
    return "recall@1" if isinstance(data, TripletData) else "rsum"
