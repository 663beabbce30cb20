"""Shuffled batches for training, from memory or, when the patches do not fit, in blocks of whole chunks.

    RAM mode        every example permuted globally, streams gathered from memory
    block shuffle   chunks permuted → pools of k chunks, read by two threads into kept buffers while the pool before is
                    used up → examples permuted inside their pool → batches, across pool borders where needed

Both give every example exactly once an epoch, in an order that depends on (seed, epoch) alone. What a batch looks like:

    czsl                      images                        × all train pairs
    two_by_two, image_text    I0 I1 I0 I1 …                 × T0 T1 T0 T1 …          own hard negative inside the matrix
    matching, text            I I …                         × T⁺ T⁺ … T⁻ T⁻ …
    matching, none            I I …                         × T⁺ T⁺ …
    retrieval                 images                        × one of its captions each, drawn anew every epoch
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from heads.base import Needs
from heads.errors import ConfigError
from heads.features import Batch, Features
from heads.pools import PoolReader
from heads.source import Source, quarter_of_free_memory
from heads.tasks import CompositionData, MatchingData, RetrievalData, TaskData

Negatives = Literal["auto", "none", "text", "image_text"]
Captions = Callable[[np.random.Generator], Int[np.ndarray, "e t"]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What one epoch goes through, in the order of the data.

    Attributes:
        images: image rows of each example, (E, 1) or (E, 2).
        captions: text rows of each example for one epoch, (E, T); T = 0 when all batches share their candidates.
        true: (image row, text row) of every true match; what is in here is never a negative. None with shared
            candidates, where `target` says it all.
        labels: of each example's image.
        target: column of each example, with shared candidates.
        pairs: (C, 2) labels of the shared candidates, and `prompts` (C,) their text rows.
        hard: (C, K) columns of the hard negatives of each shared candidate, -1 where there is none.

    """

    images: Int[np.ndarray, "e i"]
    captions: Captions
    text_rows: Int[np.ndarray, " t"]
    true: Int[np.ndarray, "m 2"] | None = None
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    target: Int[np.ndarray, " e"] | None = None
    pairs: Int[np.ndarray, "c 2"] | None = None
    hard: Int[np.ndarray, "c k"] | None = None


class Loader:
    """Batches of one task for training a head.

    Args:
        data: what to train on, normally `load_task(cache, task, "train")`.
        needs: the head's declaration; no other stream is read.
        batch_size: rows (images) of a batch; `image_text` makes them from half as many items. The last batch of an
            epoch may be smaller, none is dropped.
        seed: of the order, and of the captions drawn.
        negatives: which hard negatives a batch brings (see the drawing above); "auto" is image_text for two_by_two,
            text for matching, else none. For czsl, "text" names the pairs that share exactly one primitive with the
            true pair; they are among the candidates anyway.
        ram_limit: bytes that streams may take in memory, and beyond it the pools of a block shuffle; None is a quarter
            of what is free.
        device: where batches are put.

    Attributes:
        waited: seconds that the consumer has waited for batches, reading and gathering included.

    """

    def __init__(
        self,
        data: TaskData,
        needs: Needs,
        *,
        batch_size: int,
        seed: int,
        negatives: Negatives = "none",
        ram_limit: int | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.data, self.seed, self.device = data, seed, device
        ram_limit = quarter_of_free_memory() if ram_limit is None else ram_limit
        self.plan = _plan(data, usual_negatives(data) if negatives == "auto" else negatives)
        per_example = self.plan.images.shape[1]
        if batch_size < per_example or batch_size % per_example:
            raise ConfigError(
                f"batch_size {batch_size} does not work with negatives 'image_text': each item gives two rows, so it "
                "must be even"
            )
        self.examples_per_batch = batch_size // per_example
        self.paired_negatives = per_example == 2
        self.source = Source(
            data.cache,
            needs,
            self.plan.images,
            self.plan.text_rows,
            ram_limit=ram_limit,
            device=device,
        )
        # Ragged streams that do not fit in memory are read row by row: correct, and slow.
        dense = [s for s in self.source.on_disk if not data.cache.is_ragged(s)]
        big = [s for s in dense if s.startswith("image/")]
        self.pools = PoolReader(data.cache, big[0], ram_limit) if big else None
        self.shared = self._shared_candidates()
        self.true = None if self.plan.true is None else _TrueMatches(data, self.plan.true)
        self.waited = 0.0

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.plan.images) // self.examples_per_batch)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Batches of one epoch, every example once; the same order for the same (seed, epoch)."""
        rng = np.random.default_rng([self.seed, epoch])
        captions = self.plan.captions(rng)
        batches = self._order(rng)
        while True:
            started = time.perf_counter()
            found = next(batches, None)
            batch = found and self._batch(*found, captions)
            self.waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def all(self) -> Batch:
        """The whole set as one batch, in the order of the data: for closed-form fits."""
        captions = self.plan.captions(np.random.default_rng([self.seed, 0]))
        return self._batch(np.arange(len(self.plan.images)), {}, captions)

    def _order(self, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, dict[str, Tensor]]]:
        """Example numbers batch by batch, with the streams already read for their first images."""
        if self.pools is not None:
            for index, values in self.pools.epoch(
                self.plan.images[:, 0], self.examples_per_batch, rng
            ):
                yield index, {self.pools.stream: values}
            return
        order = rng.permutation(len(self.plan.images))
        for start in range(0, len(order), self.examples_per_batch):
            yield order[start : start + self.examples_per_batch], {}

    def _batch(self, index: np.ndarray, read: dict[str, Tensor], captions: np.ndarray) -> Batch:
        """Examples → queries, candidates, and which cell of their matrix is what."""
        images = self.plan.images[index]
        given = {s: self._with_second_images(s, v, images) for s, v in read.items()}
        queries = self.source.images(images.reshape(-1), given)
        if self.shared is not None:
            return self._labelled(index, queries, self.shared)
        assert self.true is not None
        texts = captions[index]
        rows = texts.reshape(-1) if self.paired_negatives else texts.T.reshape(-1)
        target = np.arange(images.size)
        negative = np.empty((images.size, 0), dtype=np.int64)
        if self.paired_negatives:
            negative = (target ^ 1)[:, None]
        elif texts.shape[1] == 2:
            negative = (target + len(index))[:, None]
        ignore = self.true.table(images.reshape(-1), rows)
        ignore[target, target] = False
        return Batch(
            queries,
            self.source.texts(rows),
            *(self._tensor(a) for a in (target, ignore, negative)),
        )

    def _labelled(self, index: np.ndarray, queries: Features, candidates: Features) -> Batch:
        plan = self.plan
        assert plan.target is not None
        assert plan.hard is not None
        target = plan.target[index]
        labels = {name: self._tensor(values[index]) for name, values in plan.labels.items()}
        return Batch(
            Features(queries.streams, labels),
            candidates,
            self._tensor(target),
            self._tensor(np.zeros((len(index), len(candidates)), dtype=bool)),
            self._tensor(plan.hard[target]),
        )

    def _shared_candidates(self) -> Features | None:
        """Prompts of all candidate pairs, read once."""
        if self.plan.pairs is None:
            return None
        labels = {
            name: self._tensor(self.plan.pairs[:, i].copy())
            for i, name in enumerate(("attr", "obj"))
        }
        return Features(self.source.texts(self.plan.text_rows).streams, labels)

    def _with_second_images(
        self, stream: str, first: Tensor, images: Int[np.ndarray, "b i"]
    ) -> Tensor:
        """Interleave the first images' values with those of the second, read row by row."""
        if images.shape[1] == 1:
            return first
        second = self.source.dense(stream, images[:, 1])
        return torch.stack([first, second], dim=1).flatten(0, 1)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


class _TrueMatches:
    """Which (image, caption) cells are true, captions with the same string counting as one."""

    def __init__(self, data: TaskData, matches: Int[np.ndarray, "m 2"]) -> None:
        texts = data.cache.texts
        first: dict[str, int] = {}
        self.same = np.array([first.setdefault(t, i) for i, t in enumerate(texts)], dtype=np.int64)
        self.width = len(texts)
        self.keys = np.unique(matches[:, 0] * self.width + self.same[matches[:, 1]])

    def table(
        self, images: Int[np.ndarray, " b"], captions: Int[np.ndarray, " m"]
    ) -> Bool[np.ndarray, "b m"]:
        """True in every cell that is a match; looks up the few captions of each image, not each of the B × M cells."""
        own = images * self.width
        first, last = np.searchsorted(self.keys, [own, own + self.width])
        columns = self.same[captions]
        out = np.zeros((len(images), len(captions)), dtype=bool)
        for k in range((last - first).max(initial=0)):
            at = first + k
            caption = np.where(at < last, self.keys[at.clip(max=len(self.keys) - 1)] - own, -1)
            out |= caption[:, None] == columns
        return out


def usual_negatives(data: TaskData) -> Negatives:
    """The hard negatives that examples of this kind bring."""
    if data.kind == "two_by_two":
        return "image_text"
    return "text" if data.kind == "matching" else "none"


def _plan(data: TaskData, negatives: Negatives) -> Plan:
    if isinstance(data, CompositionData):
        return _composition(data, negatives)
    if isinstance(data, MatchingData):
        return _matching(data, negatives)
    if negatives != "none":
        raise ConfigError(f"retrieval data have no hard negatives; negatives is {negatives!r}")
    return _retrieval(data)


def _composition(data: CompositionData, negatives: Negatives) -> Plan:
    if negatives == "image_text":
        raise ConfigError(
            "negatives 'image_text' is for matching data with two images; czsl has 'none', 'text'"
        )
    none = np.empty((len(data.images), 0), dtype=np.int64)
    return Plan(
        images=data.images[:, None],
        captions=lambda _: none,
        text_rows=data.prompts,
        labels={"attr": data.attr, "obj": data.obj},
        target=data.target,
        pairs=data.pair_index,
        hard=_sharing_one(data.pair_index, with_any=negatives == "text"),
    )


def _sharing_one(pairs: Int[np.ndarray, "c 2"], *, with_any: bool) -> Int[np.ndarray, "c k"]:
    """Columns of the pairs that share exactly one primitive with each pair, padded with -1."""
    if not with_any:
        return np.empty((len(pairs), 0), dtype=np.int64)
    shared = (pairs[:, None] == pairs[None]).sum(-1) == 1
    out = np.full((len(pairs), max(1, shared.sum(1).max())), -1, dtype=np.int64)
    for row, columns in zip(out, shared, strict=True):
        found = np.flatnonzero(columns)
        row[: len(found)] = found
    return out


def _matching(data: MatchingData, negatives: Negatives) -> Plan:
    two = data.images.shape[1] == 2
    if negatives == "image_text" and not two:
        raise ConfigError(
            f"negatives 'image_text' needs two images an item, but the {data.split} items of {data.cache.path} have "
            "one; use 'text' or 'none'"
        )
    own = data.captions if two else data.captions[:, :1]
    true = np.stack([data.images.reshape(-1), own.reshape(-1)], axis=1)
    if negatives == "image_text":
        images, captions = data.images, data.captions
    else:
        # Every image is an example of its own: its caption, and the item's other caption as the negative.
        images = data.images.reshape(-1, 1)
        captions = np.concatenate([data.captions, data.captions[:, ::-1]], axis=1).reshape(-1, 2)
        captions = captions if two else data.captions
        captions = captions if negatives == "text" else captions[:, :1]
    return Plan(images, lambda _: captions, np.unique(data.captions), true)


def _retrieval(data: RetrievalData) -> Plan:
    """An image without captions has no positive and is no training example."""
    captions = data.captions[data.matches[:, 1]]
    with_captions, start, count = np.unique(
        data.matches[:, 0], return_index=True, return_counts=True
    )

    def draw(rng: np.random.Generator) -> Int[np.ndarray, "e t"]:
        return captions[start + rng.integers(0, count)][:, None]

    true = np.stack([data.images[data.matches[:, 0]], captions], axis=1)
    return Plan(data.images[with_captions][:, None], draw, np.unique(captions), true)
