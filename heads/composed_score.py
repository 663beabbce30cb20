"""Composed queries against images: every query is embedded once, each of its wordings by itself, and the gallery once.

wordings of a query   "is red and has a bow" · "has a bow and is red"      (FashionIQ)
its vector            mean direction of theirs, at their mean length       our choice where scores are no cosines
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from eval.composed_table import ComposedScores
from heads.base import EmbeddingHead, Head
from heads.checkpoint import method_name
from heads.composed_tasks import ComposedData, TripletData
from heads.errors import TaskError
from heads.grid import blocks, embedded, whole
from heads.source import Source


def composed_scores(
    head: Head, data: ComposedData, source: Source, block: int, meta: Mapping[str, Any]
) -> ComposedScores:
    """The table of a split; images that do not compete with a query are -inf.

    Raises:
        TaskError: the head embeds no queries: it would have to meet every image with every query.
    """
    if not isinstance(head, EmbeddingHead):
        raise TaskError(
            f"{method_name(head)} scores every query with every image anew, which composed retrieval does not do; use "
            "a head that embeds (EmbeddingHead)"
        )
    gallery = embedded(
        head.embed_candidates, lambda p: source.gallery(data.images[p]), len(data.images), block
    )
    query = _queries(head, data, source, block)
    n, own = len(data), data.own_columns
    width = max(map(len, data.columns)) if own else len(data.images)
    scores = np.full((n, width), -np.inf, dtype=np.float32)
    for part in blocks(n, block):
        rows = (query[part] @ gallery.T + head.offset()).float().cpu().numpy()
        for i, row in zip(range(part.start, part.stop), rows, strict=True):
            columns = data.columns[i]
            scores[i, slice(len(columns)) if own else columns] = row[columns]
    names = np.array(data.image_ids)
    if own:
        listed = [[*names[c], *[""] * (width - len(c))] for c in data.columns]
        names = np.array(listed)
    return ComposedScores(scores, names, data.queries, head.score_space, meta)


def triplet_scores(
    head: Head, data: TripletData, source: Source, block: int
) -> tuple[Float[np.ndarray, "q c"], Bool[np.ndarray, "q c"]]:
    """Every query with every different target caption, and which are right: captions of one string are one."""
    texts = data.cache.texts
    columns: dict[str, int] = {}
    rows: list[int] = []
    own = np.empty(len(data), dtype=np.int64)
    for i, row in enumerate(data.targets.tolist()):
        if texts[row] not in columns:
            columns[texts[row]] = len(rows)
            rows.append(row)
        own[i] = columns[texts[row]]
    targets = np.array(rows)
    table = whole(
        head,
        lambda p: source.images(data.images[p], texts=data.modifications[p]),
        lambda p: source.texts(targets[p]),
        (len(data), len(targets)),
        block,
    )
    return table, np.arange(len(targets)) == own[:, None]


def _queries(
    head: EmbeddingHead, data: ComposedData, source: Source, block: int
) -> Float[Tensor, "q d"]:
    """A vector for every query."""
    owner, which = np.nonzero(data.modifications >= 0)
    said = data.modifications[owner, which]
    each = embedded(
        head.embed_queries,
        lambda p: source.images(data.references[owner[p]], texts=said[p]),
        len(said),
        block,
    )
    return (
        each if len(each) == len(data) else mean_direction(each, torch.from_numpy(owner), len(data))
    )


def mean_direction(
    each: Float[Tensor, "m d"], owner: Int[Tensor, " m"], n: int
) -> Float[Tensor, "n d"]:
    """Of the vectors of each owner the mean direction, at their mean length."""
    owner = owner.to(each.device)
    zeros = each.new_zeros(n)
    direction = each.new_zeros(n, each.shape[1]).index_add(0, owner, F.normalize(each, dim=-1))
    ones = torch.ones_like(owner, dtype=each.dtype)
    count = zeros.index_add(0, owner, ones)
    length = zeros.index_add(0, owner, each.norm(dim=-1)) / count
    return F.normalize(direction, dim=-1) * length[:, None]
