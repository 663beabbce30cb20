"""FeatureDataset: rows of one cache, or of several joined by id, for anybody's training loop.

    {"clip": cache_a, "pe": cache_b}          ids in both          one item, one dict
    ids  a b c d         b d e       ──▶      b d           ──▶    {"id": "b", "clip/image/pooled": (D,), …}

A batch is one read: torch hands the whole list of indices to `__getitems__`. Streams whose rows differ in length (text
tokens, patches of pictures that keep their shape) are padded by `collate`, with a mask; where there are none, torch's
own collation does too, with one copy more. For pairs of an image and a text, take two data sets and torch's
`StackDataset`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from cache_builder import FeatureCache
from cache_builder.errors import UnknownIds, UnknownName
from cache_builder.splits import split_labels
from heads.errors import ConfigError
from heads.gather import Gatherer

Item = dict[str, Any]


class Items(list[Item]):
    """Items of one read, whose fixed streams are still in one piece: `collate` need not copy them together.

    Attributes:
        whole: stream → values (B, …), and their rows as they stand in the items.
    """

    whole: Mapping[str, tuple[Tensor, Sequence[Tensor]]]

    def intact(self, name: str) -> bool:
        """Do the items still hold the rows of a stream, all and in their order?"""
        rows = self.whole[name][1] if name in self.whole else ()
        return len(rows) == len(self) and all(
            item[name] is row for item, row in zip(self, rows, strict=True)
        )


class FeatureDataset(Dataset[Item]):
    """A map-style data set. It holds no file and no value, so worker processes and pickles are cheap.

    Args:
        caches: one cache, or several by a name of your choice. They are joined by id; a row is one id that all have.
        streams: what an item has: "image/pooled", "image/patches", "text/tokens", …, all of images or all of texts.
            With several caches the name comes first: "clip/image/pooled".
        split: only the images of that split, in the order of its examples; with czsl they bring their labels.
        task: whose split, as in `FeatureCache.labels`.
        allow_missing: of a split, leave out images that are quarantined, or that a cache lacks, instead of refusing.
        ids: only these, in this order; instead of `split`. Default: all, in the row order of the first cache.

    Attributes:
        ids: of the items, in their order.
        dropped: ids that were left out, because a cache lacks them or their image is quarantined: of all ids, or of a
            split with `allow_missing`.
        attrs, objs: vocabularies of the labels, sorted; empty without labels.

    An item holds `id`, float32 tensors under the names of `streams` (token ids: int64, pixels: uint8) and, if its split
    has them, the labels `attr` and `obj`, indices into the vocabularies.

    Raises:
        UnknownName: a cache has no such stream, task or split.
        UnknownIds: an id of `ids` or an image of the split is not in every cache, or is quarantined there; or nothing
            is in all of them.
        ConfigError: streams of images and of texts together, or `split` and `ids` together, or `allow_missing` without
            a split, or a text id whose strings differ between the caches.
    """

    def __init__(
        self,
        caches: FeatureCache | Mapping[str, FeatureCache],
        streams: Sequence[str],
        *,
        split: str | None = None,
        task: str | None = None,
        ids: Sequence[str] | None = None,
        allow_missing: bool = False,
    ) -> None:
        self.caches = {"": caches} if isinstance(caches, FeatureCache) else dict(caches)
        if not isinstance(caches, FeatureCache) and not all(n and "/" not in n for n in caches):
            raise ConfigError(
                f"names of caches are words without '/', not {', '.join(map(repr, caches))}"
            )
        self.streams = tuple(streams)
        self.homes = {name: _find(self.caches, name) for name in self.streams}
        self.side = _side(self.homes)
        if split is not None and (ids is not None or self.side != "image"):
            what = "streams of texts" if ids is None else "ids"
            raise ConfigError(f"a split names images by itself and does not go with {what}")
        if allow_missing and split is None:
            raise ConfigError(
                "allow_missing is for a split; ids must all be there, and without either `dropped` says what is not"
            )
        first = next(iter(self.caches.values()))
        self.attrs: tuple[str, ...] = ()
        self.objs: tuple[str, ...] = ()
        labels: dict[str, np.ndarray] = {}
        if split is not None:
            found = split_labels(first.tasks, split, task)
            ids = found["id"].tolist()
            if "attr" in found and first.tasks.czsl is not None:
                self.attrs, self.objs = first.tasks.czsl.attrs, first.tasks.czsl.objs
                vocabulary = {"attr": np.array(self.attrs), "obj": np.array(self.objs)}
                labels = {name: np.searchsorted(v, found[name]) for name, v in vocabulary.items()}
        named = ids is not None and split is None
        asked = list(_ids(first, self.side) if ids is None else ids)
        usable = [_usable(cache, self.side) for cache in self.caches.values()]
        kept = [i for i, one in enumerate(asked) if named or all(one in some for some in usable)]
        if not kept and not named:
            counts = ", ".join(
                f"{cache.place} ({len(some)} usable)"
                for cache, some in zip(self.caches.values(), usable, strict=True)
            )
            raise UnknownIds(
                f"none of the {len(asked)} {self.side} ids asked for is in all of {counts}"
            )
        self.ids = [asked[i] for i in kept]
        there = set(self.ids)
        self.dropped = tuple(dict.fromkeys(i for i in asked if i not in there))
        if self.dropped and split is not None and not allow_missing:
            raise UnknownIds(
                f"{len(self.dropped)} of the {len(set(asked))} images of split {split!r} cannot be read: "
                f"{_why(self.caches, self.dropped)}; allow_missing=True leaves them out"
            )
        self.labels = {name: values[kept] for name, values in labels.items()}
        self.rows = {name: cache.rows(self.side, self.ids) for name, cache in self.caches.items()}
        if self.side == "text":
            _check_strings(self.caches, self.rows, self.ids)
        self.gather = Gatherer()

    def __len__(self) -> int:
        """Number of items."""
        return len(self.ids)

    def __getitem__(self, index: int) -> Item:
        """One item; a negative index counts from the end."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Items:
        """Items of a whole batch, read at once; torch's DataLoader calls this."""
        at = np.asarray(indices, np.int64)
        at = np.where(at < 0, at + len(self), at)
        if not ((at >= 0) & (at < len(self))).all():
            raise IndexError(f"items are 0 … {len(self) - 1}, asked for {list(indices)}")
        columns: dict[str, Sequence[Any]] = {"id": [self.ids[i] for i in at.tolist()]}
        whole: dict[str, tuple[Tensor, Sequence[Tensor]]] = {}
        for name, (cache, stream) in self.homes.items():
            values, columns[name] = self._read(self.caches[cache], stream, self.rows[cache][at])
            if not self.caches[cache].is_ragged(stream):
                whole[name] = values, columns[name]
        columns |= {name: values[at].tolist() for name, values in self.labels.items()}
        items = Items(
            dict(zip(columns, item, strict=True)) for item in zip(*columns.values(), strict=True)
        )
        items.whole = whole
        return items

    def collate(self, items: Sequence[Item]) -> Item:
        """Items → one batch: fixed streams (B, …), ragged ones (B, L, …) padded with 0 to the longest.

        Beside a ragged stream lies its mask (B, L), True where an entry is real: `text/mask` for `text/tokens`,
        `pe/image/mask` for `pe/image/patches`. Labels become int64 (B,), ids a list.
        """
        ragged = [n for n, (c, stream) in self.homes.items() if self.caches[c].is_ragged(stream)]
        whole: dict[str, Tensor] = {}
        if isinstance(items, Items):
            whole = {n: values for n, (values, _) in items.whole.items() if items.intact(n)}
        apart = {*ragged, *whole}
        batch = default_collate(
            [{k: v for k, v in item.items() if k not in apart} for item in items]
        )
        batch |= whole
        for name in ragged:
            rows: list[Tensor] = [item[name] for item in items]
            batch[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            lengths = torch.tensor([len(row) for row in rows])
            mask = torch.arange(batch[name].shape[1]) < lengths[:, None]
            batch[f"{name.rpartition('/')[0]}/mask"] = mask
        return batch

    def _read(
        self, cache: FeatureCache, stream: str, rows: np.ndarray
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Values of rows, all of one read: in one piece, and one tensor each."""
        unique, inverse = np.unique(rows, return_inverse=True)
        if not cache.is_ragged(stream):
            stored = torch.from_numpy(cache.read(stream, unique))
            values = self.gather.take(stored, torch.from_numpy(inverse))
            return values, values.unbind(0)
        values, offsets = cache.read_ragged(stream, unique)
        wide = self.gather.take(torch.from_numpy(values), torch.arange(len(values)))
        bounds = zip(offsets[:-1][inverse].tolist(), offsets[1:][inverse].tolist(), strict=True)
        return wide, [wide[start:stop] for start, stop in bounds]


def _find(caches: Mapping[str, FeatureCache], name: str) -> tuple[str, str]:
    """A stream's name → the name of its cache and the stream's own there."""
    cache, _, stream = ("", "", name) if "" in caches else name.partition("/")
    if cache not in caches:
        example = next((f"{c}/{s}" for c, held in caches.items() for s in held.streams), "")
        raise UnknownName(
            f"stream {name!r} must begin with the name of its cache ({', '.join(caches)}), for instance {example!r}"
        )
    held = caches[cache]
    ids = {f"{s.split('/')[0]}/ids" for s in held.streams if s in ("text/tokens", "word/states")}
    if stream not in {*held.streams, *ids}:
        known = ", ".join((*held.streams, *sorted(ids)))
        raise UnknownName(f"{held.place} has no stream {stream!r} (it has: {known})")
    return cache, stream


def _side(homes: Mapping[str, tuple[str, str]]) -> Literal["image", "text"]:
    """What the rows of all streams are: images or texts."""
    sides = {name: stream.split("/")[0] for name, (_, stream) in homes.items()}
    sides = {name: "image" if side == "crop" else side for name, side in sides.items()}
    if len(set(sides.values())) != 1:
        found = ", ".join(sides) or "none"
        raise ConfigError(
            f"streams must be of one side, all of images or all of texts, not {found}"
        )
    if "word" in sides.values():
        raise ConfigError("rows of word/states are parts of words: read them with read_ragged")
    return "image" if "image" in sides.values() else "text"


def _ids(cache: FeatureCache, side: str) -> Sequence[str]:
    return cache.image_ids if side == "image" else cache.text_ids


def _usable(cache: FeatureCache, side: str) -> set[str]:
    return set(_ids(cache, side)) - (set(cache.quarantined) if side == "image" else set())


def _why(caches: Mapping[str, FeatureCache], ids: Sequence[str]) -> str:
    """What is the matter with the first three images."""
    found = []
    for one in ids[:3]:
        cache = next(c for c in caches.values() if one not in _usable(c, "image"))
        found.append(f"{one!r} ({cache.quarantined.get(one, f'not in {cache.place}')})")
    return ", ".join([*found, *(["…"] if len(ids) > 3 else [])])


def _check_strings(
    caches: Mapping[str, FeatureCache], rows: Mapping[str, np.ndarray], ids: Sequence[str]
) -> None:
    """One text id must be one string in all caches."""
    strings = {name: cache.texts for name, cache in caches.items()}
    for i, one in enumerate(ids):
        found = {name: strings[name][rows[name][i]] for name in caches}
        if len(set(found.values())) > 1:
            shown = ", ".join(f"{text!r} in {caches[name].place}" for name, text in found.items())
            raise ConfigError(f"text {one!r} is {shown}: the caches are not of one data set")
