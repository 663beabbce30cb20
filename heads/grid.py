"""Every query with every candidate, in blocks: as one table, or row by row for tables that are never whole.

An `EmbeddingHead` embeds every row once; a `SetHead` gathers all candidates before it meets a query; any other head
sees a block of queries with a block of candidates.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from heads.base import CrossHead, EmbeddingHead, Head, SetHead
from heads.features import Features

CROSS_BLOCK = 256
"""Cells that a joint head sees at once, at most: about 0.7 GB of activations at 333 tokens × 2048 (our choice)."""

SET_CELLS = 1 << 23
"""Cells that a head which normalises over all candidates fills at once: 32 MiB for each of its tables (our choice)."""

CELLS = 1 << 25
"""Scores of a block of rows, at most (128 MB): what is held of a table that is never whole."""

Rows = Callable[[slice], Features]
"""Features of some queries, or of some candidates."""


def whole(
    head: Head, queries: Rows, candidates: Rows, shape: tuple[int, int], block: int
) -> Float[np.ndarray, "q c"]:
    """The table."""
    out = np.empty(shape, dtype=np.float32)
    if isinstance(head, EmbeddingHead | SetHead):
        for rows, scores in _rows(head, queries, candidates, shape, block, block):
            out[rows] = scores
        return out
    for columns in blocks(shape[1], _width(head, block)):
        some = candidates(columns)
        for rows in blocks(shape[0], block):
            out[rows, columns] = head(queries(rows), some).float().cpu().numpy()
    return out


def by_rows(
    head: Head, queries: Rows, candidates: Rows, shape: tuple[int, int], block: int
) -> Iterator[Float[np.ndarray, "b c"]]:
    """Its rows, some at a time; each block may be overwritten by the next. A head that embeds nothing meets all
    candidates anew for every block of queries.
    """
    height = max(1, min(block, CELLS // shape[1]))
    if isinstance(head, EmbeddingHead | SetHead):
        for _, scores in _rows(head, queries, candidates, shape, block, height):
            yield scores
        return
    for rows in blocks(shape[0], height):
        out = np.empty((rows.stop - rows.start, shape[1]), dtype=np.float32)
        some = queries(rows)
        for columns in blocks(shape[1], _width(head, block)):
            out[:, columns] = head(some, candidates(columns)).float().cpu().numpy()
        yield out


def by_levels(
    head: SetHead,
    queries: Rows,
    candidates: Rows,
    shape: tuple[int, int],
    block: int,
    sizes: Sequence[int],
) -> Iterator[tuple[int, Iterator[Float[np.ndarray, "b n"]]]]:
    """Rows, some at a time: how many, and their scores where the first n candidates are all there are, for every n of
    `sizes` (descending). Each may be overwritten by the next.
    """
    gathered = head.gather(candidates(part) for part in blocks(shape[1], block))
    for rows in blocks(shape[0], max(1, min(block, SET_CELLS // shape[1]))):
        levels = head.nested(queries(rows), gathered, sizes)
        yield rows.stop - rows.start, (level.float().cpu().numpy() for level in levels)


def _rows(
    head: EmbeddingHead | SetHead,
    queries: Rows,
    candidates: Rows,
    shape: tuple[int, int],
    block: int,
    height: int,
) -> Iterator[tuple[slice, Float[np.ndarray, "b c"]]]:
    """Rows of the table in blocks of `height`, or fewer, against candidates that are seen once."""
    if isinstance(head, EmbeddingHead):
        gallery = embedded(head.embed_candidates, candidates, shape[1], block)
        for rows in blocks(shape[0], height):
            query = head.embed_queries(queries(rows)).float()
            yield rows, (query @ gallery.T).add_(head.offset()).cpu().numpy()
        return
    gathered = head.gather(candidates(part) for part in blocks(shape[1], block))
    for rows in blocks(shape[0], max(1, min(block, SET_CELLS // shape[1]))):
        yield rows, head.against(queries(rows), gathered).float().cpu().numpy()


def _width(head: Head, block: int) -> int:
    return min(block, CROSS_BLOCK) if isinstance(head, CrossHead) else block


def embedded(
    embed: Callable[[Features], Tensor], rows: Rows, n: int, block: int
) -> Float[Tensor, "n d"]:
    """Embeddings of all rows in float32, written into one tensor: joining parts would hold them twice."""
    out: Tensor | None = None
    for part in blocks(n, block):
        some = embed(rows(part))
        if out is None:
            out = torch.empty((n, *some.shape[1:]), dtype=torch.float32, device=some.device)
        out[part] = some
    assert out is not None
    return out


def blocks(n: int, block: int) -> Iterator[slice]:
    """Ranges that cover n rows."""
    return (slice(start, min(start + block, n)) for start in range(0, n, block))
