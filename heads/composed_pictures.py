"""What a run answers to composed queries: the files `RUN/pictures/*.npz` that the report draws.

    query-00-add.npz   reference, edit, images (the best five), names, scores, hits, rank, competing, kinds, id
    routing.npz        kinds, counts, shares (kinds, blocks, experts), reads: only where a router mixes experts
    modality.npz       mean, covariance, to_mean, pairs, each before and after, edges, …: where images are modulated

Queries are the first of each kind of edit, then the second …, so nobody chooses the pretty ones. Ranks are those of the
table: of equal scores a wrong image comes first. All files say their `task` and `split`, and are of one call: what an
earlier one wrote is removed.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cache_builder import FeatureCache
from cache_builder.datasets.base import Dataset
from eval.composed_table import ComposedScores
from heads import checkpoint, load_method
from heads.base import Head
from heads.composed_diagnostics import EDGES, PAIRS, Gap, gap, random_pairs
from heads.composed_tasks import ComposedData
from heads.grid import blocks
from heads.pictures import plain_name, replace_files, square
from heads.routing import Routed, usage
from heads.run_files import read_run
from heads.score import scoring, source_of
from heads.tasks import load_task

BEST = 5
"""Images shown of a query."""

BLOCK = 256
"""Queries whose text is run at once."""

MOST = 20_000
"""Vectors of a side whose distribution is measured, at most: evenly spaced ones of more."""

WHOLE = '"resize_mode": "longest"'
"""Said of pictures that keep their shape: all of them is shown."""


@runtime_checkable
class Modulated(Protocol):
    """A head that moves image embeddings before it reads them."""

    def modulate(self, f: Float[Tensor, "*b w"]) -> Float[Tensor, "*b w"]:
        """What it reads in place of f."""
        ...


def save_composed_pictures(
    run: str | Path,
    cache: FeatureCache,
    dataset: Dataset,
    table: ComposedScores,
    *,
    n: int = 10,
    backbone: str | None = None,
) -> list[Path]:
    """Write `n` queries of a table with their best images, and what the head's parts do on all of its queries.

    Args:
        run: directory of the run.
        cache: that the table was scored on.
        dataset: the same samples, for their pixels.
        table: what the run answered.
        n: queries at most.
        backbone: where the backbone lies that the head runs a side of; None is where it lay in training.
    """
    data = load_task(cache, "composed", table.split, allow_missing=True)
    assert isinstance(data, ComposedData)
    assert data.queries.ids == table.queries.ids, "the table is of another cache"
    files = _queries(data, dataset, table, n)
    method = load_method(read_run(run)["method"]).Head
    if hasattr(method, "routing") or hasattr(method, "modulate"):
        head = checkpoint.load(run, backbone=backbone)
        parts = {"routing.npz": routing(head, data), "modality.npz": modality(head, data)}
        files |= {name: found for name, found in parts.items() if found}
    return replace_files(run, files, {"task": "composed", "split": table.split})


# ── queries ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def round_robin(categories: Sequence[Sequence[str]], n: int) -> list[tuple[int, str]]:
    """The first query of each kind, in order of appearance, then the second …, `n` at most, none twice; with its kind.

    Args:
        categories: (Q,) kinds of each query; one without any is of the kind "".
    """
    queues: dict[str, list[int]] = {}
    for i, kinds in enumerate(categories):
        for kind in kinds or ("",):
            queues.setdefault(kind, []).append(i)
    chosen: dict[int, str] = {}
    turns: dict[str, Iterator[int]] = {kind: iter(queue) for kind, queue in queues.items()}
    while turns and len(chosen) < n:
        for kind in list(turns):
            i = next((i for i in turns[kind] if i not in chosen), None)
            if i is None:
                del turns[kind]
            elif len(chosen) < n:
                chosen[i] = kind
    return list(chosen.items())


def best(
    row: Float[np.ndarray, " c"], right: Bool[np.ndarray, " c"]
) -> tuple[Int[np.ndarray, " k"], int]:
    """Columns of the best `BEST` that compete, and the rank of the best right one, 0 where none is known to be right.

    Of equal scores wrong ones come first, then the lower column, as `eval.composed` ranks.
    """
    order = np.lexsort((np.arange(len(row)), right, -row))
    order = order[row[order] > -np.inf]
    hits = np.flatnonzero(right[order])
    return order[:BEST], int(hits[0]) + 1 if len(hits) else 0


def _queries(
    data: ComposedData, dataset: Dataset, table: ComposedScores, n: int
) -> dict[str, dict[str, Any]]:
    """A file for each query that is shown."""
    cache, asked = data.cache, table.queries
    pixels = {record.id: record for record in dataset.images}
    cut = WHOLE if cache.is_ragged("image/patches") else cache.spec.backbone.preprocessing
    chosen = round_robin(asked.categories, n)
    rows = {i: row for i, row in table.rows() if i in dict(chosen)}
    files: dict[str, dict[str, Any]] = {}
    for i, kind in chosen:
        names = table.names(i)
        right = np.isin(names, asked.right(i))
        columns, rank = best(rows[i], right)
        shown = [square(pixels[str(name)].open(), cut) for name in names[columns]]
        side = max(picture.shape[0] for picture in shown)
        said = data.modifications[i]
        files["-".join(filter(None, [f"query-{len(files):02d}", plain_name(kind)])) + ".npz"] = {
            "reference": square(pixels[asked.reference[i]].open(), cut),
            "edit": np.array([cache.texts[row] for row in said[said >= 0]]),
            "images": np.stack([_grown(picture, side) for picture in shown]),
            "names": names[columns],
            "scores": rows[i][columns],
            "hits": right[columns],
            "rank": np.array(rank),
            "competing": np.array(np.count_nonzero(rows[i] > -np.inf)),
            "kinds": np.array(asked.categories[i], dtype=str),
            "id": np.array(asked.ids[i]),
        }
    return files


def _grown(picture: np.ndarray, side: int) -> np.ndarray:
    """A smaller square among larger ones, by repeated pixels: they share one array."""
    at = np.arange(side) * len(picture) // side
    return picture[at][:, at]


# ── parts of the head ────────────────────────────────────────────────────────────────────────────────────────────────


def routing(head: Head, data: ComposedData) -> dict[str, Any] | None:
    """Mean shares of experts by kind of edit over all queries; None where no router mixes any.

    Several wordings of a query are averaged first, so that every query counts once.
    """
    if not isinstance(head, Routed):
        return None
    source = source_of(head, data)
    owner, which = np.nonzero(data.modifications >= 0)
    said = data.modifications[owner, which]
    found: list[np.ndarray] = []
    with scoring(head):
        for part in blocks(len(said), BLOCK):
            queries = source.images(data.references[owner[part]], texts=said[part])
            shares = head.routing(queries)
            if shares is None:
                return None
            found.append(shares.float().cpu().numpy())
    each = np.concatenate(found).astype(np.float64)
    mean = np.zeros((len(data), *each.shape[1:]))
    np.add.at(mean, owner, each)
    mean /= np.bincount(owner, minlength=len(data))[:, None, None]
    used = usage(mean, data.queries.kinds, data.queries.categories)
    return {
        "kinds": np.array(used.kinds),
        "counts": used.counts,
        "shares": used.shares,
        "reads": np.array(str(getattr(head.config, "router", ""))),
    }


def modality(head: Head, data: ComposedData) -> dict[str, Any] | None:
    """How far references lie from texts, before and after the modulation.

    None where nothing is modulated, or not the pooled embedding, or the cache holds no pooled texts.
    """
    pooled = {"image/pooled"} <= head.needs(head.config).queries
    if not (isinstance(head, Modulated) and getattr(head.config, "modulated", False) and pooled):
        return None
    cache = data.cache
    if "text/pooled" not in cache.streams:
        return None
    rows, text_of = _texts(data)
    images = _vectors(cache, "image/pooled", np.unique(data.references))
    texts = _vectors(cache, "text/pooled", rows).numpy()
    with scoring(head):
        device = next(iter(head.parameters())).device
        after = head.modulate(images.to(device)).float().cpu().numpy()
    pairs = random_pairs(len(images), len(texts))
    gaps: list[Gap] = [gap(some, texts, pairs) for some in (images.numpy(), after)]
    return {
        **{
            name: np.array([getattr(one, name) for one in gaps])
            for name in ("mean", "covariance", "to_mean", "pairs")
        },
        "edges": EDGES,
        "n_images": np.array(len(images)),
        "n_texts": np.array(len(texts)),
        "n_pairs": np.array(PAIRS),
        "text_of": np.array(text_of),
    }


def _texts(data: ComposedData) -> tuple[Int[np.ndarray, " t"], str]:
    """Rows of captions that say what pictures show, the split's if it has some, or else of all texts; what they are."""
    listed = data.cache.tasks.retrieval
    for examples, which in (
        ([e for e in listed if e.split == data.split], f"captions of split {data.split}"),
        (listed, "captions of all splits"),
    ):
        if ids := sorted({caption for e in examples for caption in e.captions}):
            return np.sort(data.cache.rows("text", ids)), which
    return np.arange(len(data.cache.text_ids)), "all texts of the cache"


def _vectors(cache: FeatureCache, stream: str, rows: Int[np.ndarray, " n"]) -> Float[Tensor, "m d"]:
    """Those of the rows, or of `MOST` evenly spaced ones of them."""
    if len(rows) > MOST:
        rows = rows[np.linspace(0, len(rows) - 1, MOST).astype(np.int64)]
    return torch.from_numpy(cache.read(stream, rows)).float()
