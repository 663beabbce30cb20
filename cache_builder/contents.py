"""What a new cache knows before its first forward pass: ids, strings, token ids, and where ragged rows begin.

    texts, words   tokenised here, so that all offsets are known           text/offsets, word/offsets, …
    pictures       only looked at for their size, where that decides       image/offsets, image/grid,
                   how many patches or crops they have                     crop/offsets, crop/box

Knowing every offset first is what lets any chunk be written alone, in any order, after any interruption.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from cache_builder.backbones.base import Backbone
from cache_builder.cache import Contents
from cache_builder.chunks import Values
from cache_builder.datasets.base import Dataset, ImageRecord
from cache_builder.duplicates import same_bytes
from cache_builder.format import Bad, is_ragged, stream
from cache_builder.loading import attempt, by_threads
from cache_builder.spec import CacheSpec
from cache_builder.views import VIEWS, crop_boxes
from cache_builder.words import Word, words_of

BATCH = 256
"""Texts tokenised at once."""

Size = tuple[int, int]


def contents(
    spec: CacheSpec,
    dataset: Dataset,
    backbone: Backbone,
    *,
    progress: bool = False,
) -> Contents:
    """All of a new cache, or of samples to append to one, but their embeddings.

    Args:
        spec: what it will hold.
        dataset, backbone: of it; only the samples that are new.
        progress: show a bar while pictures are measured.
    """
    records, copies = _copies_together(image_order(spec, dataset))
    arrays: dict[str, Values] = {
        "image/id": [record.id for record in records],
        "text/id": [t.id for t in dataset.texts],
        "text/string": [t.text for t in dataset.texts],
    }
    if copies is not None:
        arrays["image/copies"] = copies
    readout = backbone.readout().items()
    arrays |= {f"readout/{k}": v.detach().float().cpu().numpy() for k, v in readout}
    if "text/tokens" in spec.streams:
        strings = [t.text for t in dataset.texts]
        arrays |= _tokens("text", strings, backbone.tokenize, backbone.lengths)
        arrays["text/vocabulary"] = backbone.vocabulary()
    if "word/states" in spec.streams:
        arrays |= words_contents(words_of(dataset.tasks, dataset.words), backbone)
    homes, bad = ragged_homes(spec), list[Bad]()
    if homes:
        sizes = measure(records, progress)
        reasons = [(i, s) for i, s in enumerate(sizes) if isinstance(s, str)]
        bad = [Bad(id=records[i].id, reason=reason, row=i) for i, reason in reasons]
        known = [None if isinstance(s, str) else s for s in sizes]
        for home in homes:
            arrays |= _crops(known, spec) if home == "crop" else _grids(home, known, backbone)
    return Contents(dataset.tasks, arrays, bad)


def image_order(spec: CacheSpec, dataset: Dataset) -> list[ImageRecord]:
    """The images, shuffled by the spec's seed and by how often samples were appended before."""
    generation = len(spec.generations)
    seed = [spec.order_seed, generation] if generation else spec.order_seed
    order = np.random.default_rng(seed).permutation(len(dataset.images))
    return [dataset.images[i] for i in order]


def _copies_together(
    records: Sequence[ImageRecord],
) -> tuple[Sequence[ImageRecord], NDArray[np.int64] | None]:
    """Records with copies of a file behind its first, and where each file's records begin; None without copies."""
    groups = same_bytes(records)
    if len(groups) == len(records):
        return records, None
    return [records[i] for group in groups for i in group], _starts(map(len, groups))


def ragged_homes(spec: CacheSpec) -> list[str]:
    """Homes of streams whose extent depends on the sizes of pictures: `image`, its views, `crop`."""
    dims = spec.backbone.dims
    found = [stream(s) for s in spec.streams if is_ragged(s, dims)]
    return sorted({s.home for s in found if s.side in ("image", "crop")})


def n_entries(spec: CacheSpec, dataset: Dataset, backbone: Backbone, most: int) -> dict[str, int]:
    """Home of every ragged stream → entries along its first axis, estimated from at most `most` samples."""
    found: dict[str, int] = {}
    if "text/tokens" in spec.streams:
        texts = [t.text for t in _some(dataset.texts, most)]
        lengths = backbone.lengths(backbone.tokenize(texts)) if texts else torch.zeros(0)
        found["text"] = _scaled(lengths.tolist(), len(dataset.texts))
    if "word/states" in spec.streams:
        found["word"] = len(
            np.asarray(words_contents(words_of(dataset.tasks, dataset.words), backbone)["word/ids"])
        )
    homes = ragged_homes(spec)
    sizes = measure(_some(dataset.images, most), progress=False) if homes else []
    known = [None if isinstance(s, str) else s for s in sizes]
    for home in homes:
        arrays = _crops(known, spec) if home == "crop" else _grids(home, known, backbone)
        each = np.diff(np.asarray(arrays[f"{home}/offsets"]))
        found[home] = _scaled(each.tolist(), len(dataset.images))
    return found


def measure(records: Sequence[ImageRecord], progress: bool) -> list[Size | str]:
    """Width and height of every picture, or why it has none."""
    found = by_threads(lambda record: attempt(record.id, record.size), records, 2, "measure")
    return list(tqdm(found, "measuring", len(records), unit="image", disable=not progress))


def _tokens(
    home: str,
    strings: Sequence[str],
    tokenize: Callable[[Sequence[str]], Int[Tensor, "b l"]],
    lengths: Callable[[Int[Tensor, "b l"]], Int[Tensor, " b"]],
) -> dict[str, Values]:
    """Ids of all tokens to store, one string after the other, and where each begins."""
    ids: list[NDArray[np.int32]] = [np.zeros(0, np.int32)]
    sizes: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    for start in range(0, len(strings), BATCH):
        batch = tokenize(strings[start : start + BATCH])
        length = lengths(batch)
        ids.append(batch[torch.arange(batch.shape[1]) < length[:, None]].numpy().astype(np.int32))
        sizes.append(length.numpy().astype(np.int64))
    return {f"{home}/ids": np.concatenate(ids), f"{home}/offsets": _starts(np.concatenate(sizes))}


def words_contents(words: Sequence[Word], backbone: Backbone) -> dict[str, Values]:
    """Words of the czsl task, their parts, and the parts' tokens."""
    parts = [part for word in words for part in word.parts]
    return {
        "word/id": [word.id for word in words],
        "word/parts": _starts([len(word.parts) for word in words]),
        "word/string": parts,
        **_tokens("word", parts, backbone.tokenize_words, backbone.lengths),
    }


def _grids(home: str, sizes: Sequence[Size | None], backbone: Backbone) -> dict[str, Values]:
    """Rows and columns of patches of every picture, and where its patches begin; none where it cannot be used."""
    view = home.removeprefix("image/view_") if home != "image" else None
    grids = [(0, 0) if s is None else backbone.grid(*_seen(s, view)) for s in sizes]
    grid = np.array(grids, np.int32).reshape(-1, 2)
    return {f"{home}/grid": grid, f"{home}/offsets": _starts(grid.prod(1))}


def _seen(size: Size, view: str | None) -> Size:
    """The size of a view of a picture: asked of the view itself, on an empty one."""
    from PIL import Image

    return size if view is None else VIEWS[view].apply(Image.new("1", size)).size


def _crops(sizes: Sequence[Size | None], spec: CacheSpec) -> dict[str, Values]:
    """Boxes of every picture's crops, and where they begin."""
    rule = spec.rules["crop"].partition(":")[0]
    none = np.zeros((0, 4), np.int32)
    boxes = [none if s is None else crop_boxes(*s, rule) for s in sizes]
    flat = np.concatenate([none, *boxes])
    return {"crop/box": flat, "crop/offsets": _starts([len(some) for some in boxes])}


def _starts(sizes: Iterable[int] | NDArray[Any]) -> NDArray[np.int64]:
    """0, then the sums: where each row begins, and where the last one ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.fromiter(sizes, np.int64))])


def _some(rows: Sequence[Any], most: int) -> list[Any]:
    return list(rows[:: max(1, -(-len(rows) // most))])


def _scaled(sample: Sequence[int], n: int) -> int:
    return round(sum(sample) / len(sample) * n) if sample else 0
