"""Shuffled batches for training, from the device, from memory or, when the patches do not fit, in blocks of chunks.

    device, RAM     every example permuted globally, streams gathered where they are held
    block shuffle   chunks permuted → pools of k chunks, read by two threads into kept buffers while the pool before is
                    used up → examples permuted inside their pool → batches, across pool borders where needed

Both give every example exactly once an epoch, in an order that depends on (seed, epoch) alone. What a batch looks like:

    czsl                      images                        × all train pairs
    two_by_two, image_text    I0 I1 I0 I1 …                 × T0 T1 T0 T1 …          own hard negative inside the matrix
    matching, text            I I …                         × T⁺ T⁺ … T⁻ T⁻ …
    matching, none            I I …                         × T⁺ T⁺ …
    retrieval                 images                        × one of its captions each, drawn anew every epoch
    triplets                  images with modifications     × T⁺ T⁺ …   or with text   T⁺ T⁺ … T⁻ T⁻ …
    images                    I I …                         × I I …
"""

import time
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cache_builder import FeatureCache
from heads.base import Needs
from heads.block_names import array_of
from heads.errors import ConfigError
from heads.features import Batch, Features, Partner
from heads.plans import Negatives, plan_of, usual_negatives
from heads.pools import PoolReader
from heads.samplers import PARTNERS, Drawn, PartnerSampler
from heads.source import Source, quarter_of_free_memory
from heads.tasks import TaskData


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
        device_limit: bytes that streams may take on the device, tried before memory; None is half of what a CUDA
            device has free, and nothing on the CPU.
        source: the rows of `data` with the streams of `needs`, if somebody holds them already; the two limits on where
            streams are kept are then theirs.

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
        device_limit: int | None = None,
        source: Source | None = None,
    ) -> None:
        self.data, self.seed, self.device = data, seed, torch.device(device)
        self.ram_limit = quarter_of_free_memory() if ram_limit is None else ram_limit
        self.plan = plan_of(data, usual_negatives(data) if negatives == "auto" else negatives)
        per_example = self.plan.images.shape[1]
        if batch_size < per_example or batch_size % per_example:
            raise ConfigError(
                f"batch_size {batch_size} does not work with negatives 'image_text': each item gives two rows, so it "
                "must be even"
            )
        self.examples_per_batch = batch_size // per_example
        self.paired_negatives = per_example == 2
        self.source = source or Source(
            data.cache,
            needs,
            self.plan.images,
            self.plan.text_rows,
            ram_limit=self.ram_limit,
            device=device,
            device_limit=device_limit,
        )
        # Ragged streams that do not fit in memory are read row by row: correct, and slow.
        arrays = {s: array_of(data.cache, s) for s in self.source.on_disk if s.startswith("image/")}
        big = [s for s, array in arrays.items() if not data.cache.is_ragged(array)]
        first = self.plan.images[:, 0]
        self.pooled = big[0] if big else ""
        self.pools = (
            PoolReader(data.cache, arrays[big[0]], first, self.ram_limit, device) if big else None
        )
        self.shared = self._shared_candidates()
        self.partners = tuple(kind for kind in PARTNERS if kind in needs.partners)
        if self.partners and self.plan.target is None:
            raise ConfigError(
                f"partners ({', '.join(self.partners)}) share an attr or an obj, which only czsl data have; this is "
                f"{data.kind}"
            )
        self.true = None if self.plan.true is None else _TrueMatches(data.cache, self.plan.true)
        self.waited = 0.0

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.plan.images) // self.examples_per_batch)

    @property
    def room(self) -> dict[str, int]:
        """Limits in bytes that decide where rows are held, and so their order: the same ones give the same order."""
        return {**self.source.limits, "pools": self.ram_limit}

    @property
    def order(self) -> str:
        """What is permuted, in words."""
        if self.pools is None:
            return "of all rows"
        return f"within {self.pools.pool_chunks} chunks of {self.pools.stream} at a time"

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches of one epoch, every example once; the same order for the same (seed, epoch).

        Args:
            epoch: counted from 0.
            start: first batch wanted, 0 … len(self): an interrupted epoch goes on with exactly the batches it had left.
                What was skipped is not read.

        A batch keeps its values for as long as it is held; memory of a batch that is let go is used for a later one.
        """
        if not 0 <= start <= len(self):
            raise ValueError(f"an epoch has batches 0 … {len(self) - 1}, cannot start at {start}")
        rng = np.random.default_rng([self.seed, epoch])
        captions = self.plan.captions(rng)
        sampler = self._sampler(epoch)
        batches = self._order(rng, start, sampler)
        while True:
            started = time.perf_counter()
            found = next(batches, None)
            batch = None if found is None else self._batch(found, captions)
            self.waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch
            del found, batch  # the consumer's is now the only one

    def all(self, needs: Needs | None = None) -> Batch:
        """The whole set as one batch, in the order of the data: for closed-form fits.

        Args:
            needs: whose streams of queries; None is those of this loader.
        """
        captions = self.plan.captions(np.random.default_rng([self.seed, 0]))
        mine = copy(self)
        mine.source = self.source if needs is None else self.source.only(needs)
        return mine._batch(_Part(np.arange(len(self.plan.images)), {}), captions)

    def examples(self, size: int = 1024) -> Iterator[Features]:
        """Queries of the whole set, in the order of the data, `size` at a time; of two images an item, the first."""
        for start in range(0, len(self.plan.images), size):
            texts = None if self.plan.texts is None else self.plan.texts[start : start + size]
            yield self.source.images(self.plan.images[start : start + size, 0], texts=texts)

    def _sampler(self, epoch: int) -> PartnerSampler | None:
        """Who stands beside whom in an epoch, if the head wants partners."""
        if not self.partners:
            return None
        labels = self.plan.labels
        return PartnerSampler(labels["attr"], labels["obj"], seed=self.seed, epoch=epoch)

    def _order(
        self, rng: np.random.Generator, first: int, sampler: PartnerSampler | None
    ) -> Iterator["_Part"]:
        """Example numbers batch by batch, with their partners, and the streams already read for their first images."""
        size = self.examples_per_batch
        if self.pools is not None:
            stream = self.pooled
            for read in self.pools.epoch(size, rng, first, sampler):
                beside = tuple({stream: values} for values in read.partner_values)
                yield _Part(read.index, {stream: read.values}, read.partners, beside)
            return
        order = rng.permutation(len(self.plan.images))
        for start in range(first * size, len(order), size):
            index = order[start : start + size]
            yield _Part(index, {}, sampler and sampler.draw(index), ({}, {}))

    def _batch(self, part: "_Part", captions: np.ndarray) -> Batch:
        """Examples → queries, candidates, and which cell of their matrix is what."""
        index = part.index
        images = self.plan.images[index]
        given = {s: self._with_second_images(s, v, images) for s, v in part.read.items()}
        beside = None if self.plan.texts is None else self.plan.texts[index]
        queries = self.source.images(images.reshape(-1), given, beside)
        if self.shared is not None:
            return self._labelled(index, queries, self.shared, self._beside(part))
        target = np.arange(images.size)
        number = self._tensor(np.repeat(index, images.shape[1]))
        if self.true is None:
            none = (
                np.zeros((len(index), len(index)), dtype=bool),
                np.empty((len(index), 0), np.int64),
            )
            gallery = self.source.gallery(images[:, 0])
            target, ignore, negative = map(self._tensor, (target, *none))
            return Batch(queries, gallery, target, ignore, negative, index=number)
        texts = captions[index]
        rows = texts.reshape(-1) if self.paired_negatives else texts.T.reshape(-1)
        negative = np.empty((images.size, 0), dtype=np.int64)
        if self.paired_negatives:
            negative = (target ^ 1)[:, None]
        elif texts.shape[1] == 2:
            negative = (target + len(index))[:, None]
        ignore = self.true.table(images.reshape(-1) if beside is None else index, rows)
        ignore[target, target] = False
        cells = [self._tensor(cell) for cell in (target, ignore, negative)]
        return Batch(queries, self.source.texts(rows), cells[0], cells[1], cells[2], index=number)

    def _labelled(
        self,
        index: np.ndarray,
        queries: Features,
        candidates: Features,
        partners: dict[str, Partner],
    ) -> Batch:
        assert self.plan.target is not None
        assert self.plan.hard is not None
        target = self.plan.target[index]
        return Batch(
            Features(queries.streams, self._labels(index)),
            candidates,
            self._tensor(target),
            self._tensor(np.zeros((len(index), len(candidates)), dtype=bool)),
            self._tensor(self.plan.hard[target]),
            partners,
            self._tensor(index),
        )

    def _beside(self, part: "_Part") -> dict[str, Partner]:
        """The partners that the head wants, with the streams of queries."""
        if part.drawn is None:
            return {}
        assert self.plan.target is not None
        out: dict[str, Partner] = {}
        for kind in self.partners:
            k = PARTNERS.index(kind)
            index, far = part.drawn.example[:, k], np.flatnonzero(part.drawn.elsewhere[:, k])
            rows = self.plan.images[index, 0]
            for stream, values in part.beside[k].items():
                if len(far):
                    values[torch.from_numpy(far).to(values.device)] = self.source.dense(
                        stream, rows[far]
                    )
            streams = self.source.images(rows, part.beside[k]).streams
            out[kind] = Partner(
                Features(streams, self._labels(index)),
                self._tensor(self.plan.target[index]),
                self._tensor(part.drawn.valid[:, k]),
            )
        return out

    def _labels(self, index: np.ndarray) -> dict[str, Tensor]:
        return {name: self._tensor(values[index]) for name, values in self.plan.labels.items()}

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


@dataclass(frozen=True, slots=True)
class _Part:
    """What a batch is made of: its examples, what was read of them, and the same of their partners."""

    index: np.ndarray
    read: dict[str, Tensor]
    drawn: Drawn | None = None
    beside: tuple[dict[str, Tensor], ...] = ()


class _TrueMatches:
    """Which (image, caption) cells are true, captions with the same string counting as one."""

    def __init__(self, cache: FeatureCache, matches: Int[np.ndarray, "m 2"]) -> None:
        texts = cache.texts
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
            caption = np.where(at < last, self.keys[np.minimum(at, len(self.keys) - 1)] - own, -1)
            out |= caption[:, None] == columns
        return out
