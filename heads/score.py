"""SEAM: head × data → the score tables that `eval` reads.

The matrix is filled block by block over queries and candidates, so memory holds one block of features and the scores.
An open world is reduced as its rows come (eval/czsl_summary.py), so memory holds one block of scores too.
An `EmbeddingHead` embeds every row once; a head that must see both sides together scores only the cells it has to: the
2 or 4 of a matching item, or the K best by cached cosine when a ranking is reranked.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int

from eval.composed_table import ComposedScores
from eval.composition import CompositionScores
from eval.czsl_summary import KEEP, CompositionSummary, Layout, summarise, summarise_levels
from eval.feasibility import Feasibility, grid
from eval.matching import MatchingScores
from eval.retrieval import BothDirections, RetrievalScores, both_directions
from heads.base import EmbeddingHead, Head, Needs, SetHead
from heads.checkpoint import check_cache, method_name
from heads.composed_score import composed_scores, triplet_scores
from heads.errors import CheckpointMismatch, TaskError
from heads.features import Features
from heads.grid import CROSS_BLOCK, Rows, blocks, by_levels, by_rows, embedded, whole
from heads.source import Source, check_roles
from heads.tasks import (
    ComposedData,
    CompositionData,
    MatchingData,
    RetrievalData,
    TaskData,
    TripletData,
    rows_of,
)

POOLED = Needs(frozenset({"image/pooled"}), frozenset({"text/pooled"}))

Direction = Literal["t2i", "i2t"]


def score(
    head: Head,
    data: TaskData,
    *,
    block: int = 1024,
    direction: Direction | None = None,
    rerank: int | None = None,
    source: Source | None = None,
) -> CompositionScores | MatchingScores | RetrievalScores | ComposedScores:
    """Score a split with a trained head, in float32, and keep every score (`score_open` keeps the best).

    Args:
        head: trained, on any device; left in the mode it was in.
        data: what `load_task` returns.
        block: queries and candidates whose features are held at once.
        direction: retrieval only, and needed there. t2i: captions ask for images; i2t: images ask for captions.
        rerank: retrieval only. The K best of every query by cached cosine get the head's score, the others stay below
            them in cosine order (also those tied with the first left out); None scores every cell.
        source: the rows of `data`, if they are already in memory (see `source_of`).

    Returns:
        CompositionScores (images × candidate pairs), MatchingScores (n, 2) or (n, 2, 2) as [image, caption],
        RetrievalScores with queries and gallery according to `direction`, or, of triplets, queries × target captions;
        ComposedScores (queries × images that compete, the others -inf).

    Raises:
        MissingStream, CheckpointMismatch: the data's cache is not one this head can be scored on.
        TaskError: the head does not score this task, or `direction` or `rerank` do not go with it.
    """
    _check(head, data, rerank)
    if isinstance(data, RetrievalData) != (direction in get_args(Direction)):
        raise TaskError(
            f"direction {direction!r} of {data.kind}: retrieval is scored in one of "
            f"{', '.join(get_args(Direction))}, other tasks without"
        )
    source = source or source_of(head, data)
    facts = _facts(head, data)
    with scoring(head):
        if isinstance(data, CompositionData):
            table = whole(head, *_composition(data, source, range(len(data.pairs))), block)
            return CompositionScores(scores=table, seen=data.seen, **_labels(data), **facts)
        if isinstance(data, MatchingData):
            return MatchingScores(
                scores=_matching(head, data, source, block),
                category=np.array(data.category),
                ids=_distinct(data.ids),
                **facts,
            )
        if isinstance(data, ComposedData):
            return composed_scores(head, data, source, block, facts["meta"])
        if isinstance(data, TripletData):
            table, positives = triplet_scores(head, data, source, block)
            return RetrievalScores(scores=table, positives=positives, ids=data.ids, **facts)
        assert isinstance(data, RetrievalData)
        assert direction is not None
        table = _retrieval(head, data, source, block, direction, rerank)
    facts["meta"] |= {"direction": direction} | ({} if rerank is None else {"rerank": rerank})
    positives, ids, candidates = data.positives(), data.image_ids, data.caption_ids
    if direction == "t2i":
        table, positives, ids, candidates = table.T, positives.T, candidates, ids
    facts["meta"] |= {"candidates": list(candidates)}
    return RetrievalScores(scores=table, positives=positives, ids=ids, **facts)


def score_both(
    head: Head,
    data: RetrievalData,
    *,
    block: int = 1024,
    rerank: int | None = None,
    source: Source | None = None,
) -> BothDirections:
    """Score retrieval in both directions: one matrix read both ways, or with `rerank` a ranking for each.

    Args and errors as for `score`.
    """
    source = source or source_of(head, data)
    images = score(head, data, block=block, direction="i2t", rerank=rerank, source=source)
    assert isinstance(images, RetrievalScores)
    if rerank is None:
        both = both_directions(images)
        return replace(both, t2i=replace(both.t2i, ids=data.caption_ids))
    captions = score(head, data, block=block, direction="t2i", rerank=rerank, source=source)
    assert isinstance(captions, RetrievalScores)
    return BothDirections(images, captions)


def score_open(
    head: Head,
    data: CompositionData,
    *,
    block: int = 1024,
    source: Source | None = None,
    feasibility: Feasibility | None = None,
    keep: int = KEEP,
) -> CompositionSummary:
    """Score a split against a world too large to keep: rows are reduced as they come.

    Args:
        head, data, block, source: as for `score`.
        feasibility: how plausible the pairs are; the table then answers for every threshold of its grid
            (`eval.feasibility.grid`). A head whose scores are probabilities over its candidates is scored anew at each:
            what a threshold takes away is no candidate, so the others share its probability.
        keep: how many of the best of each image are kept: the largest k that can be asked for.

    Raises:
        MissingStream, CheckpointMismatch, TaskError: as for `score`.
        ScoreTableError: the feasibility is not of these pairs.
    """
    _check(head, data, None)
    source = source or source_of(head, data)
    layout = _layout(data, feasibility)
    with scoring(head):
        given = (*_composition(data, source, layout.order), block)
        keep, facts = min(keep, len(data.pairs)), _labels(data) | _facts(head, data)
        if isinstance(head, SetHead) and head.relative and layout.levels:
            rows = by_levels(head, *given, layout.sizes())
            return summarise_levels(rows, layout, keep=keep, **facts)
        return summarise(by_rows(head, *given), layout, keep=keep, arranged=True, **facts)


def _facts(head: Head, data: TaskData) -> dict[str, Any]:
    """What every table says of itself."""
    own = data.cache.header.options.get("check") == "none"
    return {
        "space": head.score_space,
        "split": data.split,
        "meta": {
            "task": data.kind,
            "method": method_name(head),
            "cache": data.cache.fingerprint,
            "partial": bool(data.dropped) or own,
            "dropped": list(data.dropped),
            **({"relative": True} if isinstance(head, SetHead) and head.relative else {}),
        },
    }


def _labels(data: CompositionData) -> dict[str, Any]:
    """Of a table of images × candidate pairs."""
    return {
        "target": data.target,
        "pairs": np.array(data.pairs),
        "world": data.world,
        "ids": _distinct(data.image_ids),
    }


def source_of(head: Head, data: TaskData, *, ram_limit: int | None = None) -> Source:
    """The rows of `data` that `head` reads, kept in memory if they fit; on the head's device."""
    learned = isinstance(data, TripletData)
    needs = head.training_needs(head.config) if learned else head.needs(head.config)
    return Source(data.cache, needs, *rows_of(data), ram_limit=ram_limit, device=_device(head))


def _check(head: Head, data: TaskData, rerank: int | None) -> None:
    name = method_name(head)
    if data.kind not in head.tasks | {head.learns_from(head.config)}:
        raise TaskError(f"{name} scores {', '.join(sorted(head.tasks))}, not {data.kind}")
    if rerank is not None and not isinstance(data, RetrievalData):
        raise TaskError(f"rerank={rerank} is for retrieval, and this is {data.kind}")
    if rerank is not None and rerank < 1:
        raise TaskError(f"rerank={rerank} would score nothing; it is a number from 1")
    if data.kind in head.tasks:
        check_roles(head.needs(head.config), data.kind, name)
    check_cache(head, data.cache)
    needs = head.needs(head.config)
    if isinstance(data, CompositionData) and (needs.live or not needs.candidates):
        # Such a head knows pairs by their indices alone, so the vocabularies must be the ones it was trained with.
        mine, theirs = (head.context.attrs, head.context.objs), (data.attrs, data.objs)
        if mine != theirs:
            raise CheckpointMismatch(
                f"{name} knows {len(mine[0])} attrs × {len(mine[1])} objs of its training data by number, but "
                f"{data.cache.place} has {len(theirs[0])} × {len(theirs[1])} with other names; train it on that one"
            )


def _composition(
    data: CompositionData, source: Source, order: Sequence[int] | Int[np.ndarray, " c"]
) -> tuple[Rows, Rows, tuple[int, int]]:
    """Images, candidate pairs in the given order, and their numbers."""
    index, prompts = data.pair_index[order], data.prompts[order]
    labels = [torch.from_numpy(index[:, i].copy()).to(source.device) for i in range(2)]

    def candidates(part: slice) -> Features:
        streams = source.texts(prompts[part]).streams
        return Features(streams, {"attr": labels[0][part], "obj": labels[1][part]})

    shape = (len(data.images), len(data.pairs))
    return lambda part: source.images(data.images[part]), candidates, shape


def _layout(data: CompositionData, feasibility: Feasibility | None) -> Layout:
    """Candidates in the order in which they are reduced: with feasibility, by the thresholds of its grid."""
    if feasibility is None:
        return Layout.of(data.seen)
    rho = feasibility.of(data.pairs)
    return Layout.of(data.seen, rho, () if data.seen.all() else grid(rho, data.seen))


def _retrieval(
    head: Head,
    data: RetrievalData,
    source: Source,
    block: int,
    direction: Direction,
    rerank: int | None,
) -> Float[np.ndarray, "i t"]:
    if rerank is None:
        return whole(
            head,
            lambda part: source.images(data.images[part]),
            lambda part: source.texts(data.captions[part]),
            (len(data.images), len(data.captions)),
            block,
        )
    cosine = _cosines(data, _device(head))
    cosine = cosine.T if direction == "t2i" else cosine
    k = min(rerank, cosine.shape[1])
    best = torch.from_numpy(cosine).topk(k, dim=1).indices.numpy()  # ties at the cut: see `_below`
    asking = np.repeat(np.arange(len(cosine)), k)
    cells = (best.reshape(-1), asking) if direction == "t2i" else (asking, best.reshape(-1))
    fresh = _cells(head, data.images, data.captions, np.stack(cells, axis=1), source, block)
    table = _below(cosine, best, fresh.reshape(len(cosine), k))
    return table.T if direction == "t2i" else table


def _matching(
    head: Head, data: MatchingData, source: Source, block: int
) -> Float[np.ndarray, "n 2"] | Float[np.ndarray, "n 2 2"]:
    n, images = data.images.shape
    # Cell (item, image, caption), in that order, as positions in the flattened images and captions.
    image = np.repeat(np.arange(n * images), 2)
    caption = np.repeat(np.arange(n * 2).reshape(n, 1, 2), images, axis=1).reshape(-1)
    cells = np.stack([image, caption], axis=1)
    flat = _cells(head, data.images.reshape(-1), data.captions.reshape(-1), cells, source, block)
    return flat.reshape(n, 2) if images == 1 else flat.reshape(n, 2, 2)


def _cells(
    head: Head,
    image_rows: Int[np.ndarray, " i"],
    text_rows: Int[np.ndarray, " t"],
    cells: Int[np.ndarray, "n 2"],
    source: Source,
    block: int,
) -> Float[np.ndarray, " n"]:
    """Only the cells (image, caption) given as positions in the two lists of rows."""
    out = np.empty(len(cells), dtype=np.float32)
    if isinstance(head, EmbeddingHead):
        images, of_image = np.unique(image_rows, return_inverse=True)
        texts, of_text = np.unique(text_rows, return_inverse=True)
        query = embedded(head.embed_queries, lambda p: source.images(images[p]), len(images), block)
        gallery = embedded(
            head.embed_candidates, lambda p: source.texts(texts[p]), len(texts), block
        )
        cells = np.stack([of_image[cells[:, 0]], of_text[cells[:, 1]]], axis=1)
        for part in blocks(len(cells), block):
            i, c = torch.from_numpy(cells[part]).to(query.device).T
            product = (query[i] * gallery[c]).sum(-1) + head.offset()
            out[part] = product.float().cpu().numpy()
        return out
    for part in blocks(len(cells), min(block, CROSS_BLOCK)):
        images, captions = image_rows[cells[part, 0]], text_rows[cells[part, 1]]
        paired = head.paired(source.images(images), source.texts(captions))
        out[part] = paired.float().cpu().numpy()
    return out


def _cosines(data: RetrievalData, device: torch.device) -> Float[np.ndarray, "i t"]:
    """Cosine of the cached pooled embeddings."""
    source = Source(data.cache, POOLED, data.images, data.captions, device=device)
    image = source.images(data.images)["image/pooled"]
    text = source.texts(data.captions)["text/pooled"]
    unit = torch.nn.functional.normalize
    return (unit(image, dim=-1) @ unit(text, dim=-1).T).cpu().numpy()


def _below(
    cosine: Float[np.ndarray, "q c"], best: Int[np.ndarray, "q k"], fresh: Float[np.ndarray, "q k"]
) -> Float[np.ndarray, "q c"]:
    """Reranked cells keep the head's score, the others follow below by whole steps: equal cosines stay ties.

    Candidates tied across the cut all stay below it: which of them came in would hang on their order.
    """
    out = np.empty(cosine.shape, dtype=np.float32)
    for row in range(len(cosine)):
        _, rank = np.unique(-cosine[row], return_inverse=True)
        left_out = np.delete(cosine[row], best[row])
        inside = cosine[row, best[row]] > (left_out.max() if len(left_out) else -np.inf)
        out[row] = fresh[row].min() - 1 - rank
        out[row, best[row][inside]] = fresh[row][inside]
    return out


def _distinct(ids: tuple[str, ...]) -> tuple[str, ...]:
    """The ids, if they name the rows of a table one by one: an image labelled twice does not."""
    return ids if len(set(ids)) == len(ids) else ()


def _device(head: Head) -> torch.device:
    tensors = [*head.parameters(), *head.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


@contextmanager
def scoring(head: Head) -> Generator[None]:
    """No gradient, no dropout, no reduced precision; the mode is put back afterwards."""
    was_training = head.training
    head.eval()
    try:
        with torch.inference_mode(), torch.autocast(_device(head).type, enabled=False):
            yield
    finally:
        head.train(was_training)
