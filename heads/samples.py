"""Do caches hold the same samples, and what can be asked of all of them where they do not?

    identical     equal digests of the data set (ids, strings, tasks), and the same images in quarantine
    shared        examples that every cache has, about images and texts that every cache has and can use

Nothing is ever compared on a part unless somebody asks for it: `refuse_differences` says in what caches differ and what
they share; `on_shared` gives them back with nothing but that to be asked.
"""

import textwrap
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cache_builder import FeatureCache
from cache_builder.datasets.base import (
    EXAMPLES,
    CompositionExample,
    CompositionTask,
    Gallery,
    Pair,
    Tasks,
    name_of,
)
from heads.errors import ConfigError

NAMED = 3
"""Ids that a message names."""


@dataclass(frozen=True)
class Shared:
    """What caches have in common.

    Attributes:
        caches: name → cache.
    """

    caches: Mapping[str, FeatureCache]

    @cached_property
    def images(self) -> frozenset[str]:
        """Images that all hold, and none has in quarantine."""
        usable = [set(c.image_ids) - set(c.quarantined) for c in self.caches.values()]
        return frozenset(set.intersection(*usable))

    @cached_property
    def texts(self) -> frozenset[str]:
        """Ids of the texts that all hold.

        Raises:
            ConfigError: one id stands for two texts.
        """
        strings = [dict(zip(c.text_ids, c.texts, strict=True)) for c in self.caches.values()]
        ids = frozenset(set.intersection(*map(set, strings)))
        self._check_one_meaning("text", strings, ids)
        return ids

    @cached_property
    def tasks(self) -> Tasks:
        """Examples that all have, of shared images and texts alone.

        Raises:
            ConfigError: an example is one thing in one cache and another in the next.
        """
        first, *_ = everything = [c.tasks for c in self.caches.values()]
        galleries = self._galleries([t.galleries for t in everything])
        kept: dict[str, tuple[Any, ...]] = {}
        for kind in EXAMPLES:
            named = [{_name(e): e for e in getattr(tasks, kind)} for tasks in everything]
            common = set.intersection(*map(set, named))
            self._check_one_meaning(f"{kind} example", named, common)
            kept[kind] = tuple(
                e for e in getattr(first, kind) if _name(e) in common and self._usable(e, galleries)
            )
        czsl = self._compositions([t.czsl for t in everything])
        return Tasks(czsl=czsl, galleries=galleries, **kept)

    def _galleries(self, found: Sequence[Mapping[str, Gallery]]) -> dict[str, Gallery]:
        """Galleries that all have, of images that all of them list."""
        common = set.intersection(*map(set, found))
        rules = [{name: g.with_reference for name, g in galleries.items()} for galleries in found]
        self._check_one_meaning("place of the reference in gallery", rules, common)
        shared: dict[str, Gallery] = {}
        for name, gallery in found[0].items():
            if name in common:
                listed = self.images.intersection(*(galleries[name].images for galleries in found))
                images = tuple(i for i in gallery.images if i in listed)
                shared[name] = Gallery(images, gallery.with_reference)
        return shared

    def _compositions(self, found: Sequence[CompositionTask | None]) -> CompositionTask | None:
        """The czsl task: pairs that all list, with prompts that all hold, and the images that have them."""
        tasks = [task for task in found if task is not None]
        if len(tasks) < len(found):
            return None
        first = tasks[0]
        labels: list[dict[tuple[str, str], CompositionExample]] = [
            {_name(e): e for e in task.examples} for task in tasks
        ]
        common = set.intersection(*map(set, labels))
        self._check_one_meaning("label of image", labels, common)
        prompts = {
            pair: text
            for pair, text in first.prompts.items()
            if text in self.texts and all(task.prompts.get(pair) == text for task in tasks)
        }
        pairs: dict[str, tuple[Pair, ...]] = {}
        for split, listed in first.pairs.items():
            known = set(prompts).intersection(*(task.pairs.get(split, ()) for task in tasks))
            pairs[split] = tuple(pair for pair in listed if pair in known)
        candidates = {split: {*pairs.get("train", ()), *own} for split, own in pairs.items()}
        examples = tuple(
            e
            for e in first.examples
            if e.image in self.images
            and _name(e) in common
            and (e.attr, e.obj) in candidates.get(e.split, ())
        )
        return CompositionTask(examples, pairs, prompts) if examples else None

    def _usable(self, example: Any, galleries: Mapping[str, Gallery]) -> bool:
        """Are all images and texts of an example shared, and its targets in the gallery that is left?"""
        gallery = galleries.get(getattr(example, "gallery", ""))
        listed = gallery is None or set(example.targets) <= set(gallery.images)
        return set(example.images) <= self.images and set(example.texts) <= self.texts and listed

    def _check_one_meaning(
        self, what: str, found: Sequence[Mapping[Any, Any]], common: Iterable[Hashable]
    ) -> None:
        """Refuse caches in which one name means two things: then they are of different data."""
        names = list(self.caches)
        for key in sorted(common, key=str):
            for name, mine in zip(names[1:], found[1:], strict=True):
                if mine[key] != found[0][key]:
                    one, other = (textwrap.shorten(repr(v), 90) for v in (found[0][key], mine[key]))
                    raise ConfigError(
                        f"{names[0]} and {name} are of different data under equal names: the {what} {key!r} is {one} "
                        f"in one and {other} in the other; build both from the same data set"
                    )


def refuse_differences(caches: Mapping[str, FeatureCache]) -> None:
    """Refuse caches that do not hold identical samples; says what differs, and what they share.

    Raises:
        ConfigError: they do not.
    """
    names = list(caches)
    for name in names[1:]:
        if found := _differences(caches[names[0]], caches[name], (names[0], name)):
            raise ConfigError(
                f"{names[0]} and {name} do not hold the same samples: {found}. Build them from the same data set, or "
                f"compare on what all {len(caches)} share (--intersect): {_offer(Shared(caches))}"
            )


def refuse_unusable(cache: FeatureCache, task: str, split: str) -> None:
    """Refuse a split that cannot be scored whole, as some of its images are in quarantine.

    Raises:
        ConfigError: names the first.
    """
    bad = cache.quarantined
    if not bad or cache.asked is not None:
        return
    gone = {
        image
        for example in cache.tasks.examples(task)
        if example.split == split
        for image in example.images
        if image in bad
    }
    if gone:
        first = sorted(gone)[0]
        raise ConfigError(
            f"{len(gone)} images of {task}'s {split} split are quarantined in {cache.place} ({first!r}: {bad[first]}); "
            "repair them and build again, or compare without them: --intersect"
        )


def on_shared(caches: Mapping[str, FeatureCache]) -> dict[str, FeatureCache]:
    """The same caches, asked only what all of them can be asked; as they are where that is everything.

    Images in quarantine are left out also where all caches have the same there.

    Raises:
        ConfigError: they share no sample, or are of different data under equal names.
    """
    names = list(caches)
    differ = any(_differences(caches[names[0]], caches[n], (names[0], n)) for n in names[1:])
    if not differ and not any(cache.quarantined for cache in caches.values()):
        return dict(caches)
    shared = Shared(caches)
    if len({cache.spec.dataset.name for cache in caches.values()}) > 1:
        held = ", ".join(f"{name} of {c.spec.dataset.name}" for name, c in caches.items())
        raise ConfigError(
            f"caches of different data sets share no sample: {held}; name caches of one data set"
        )
    if not shared.tasks.kinds:
        raise ConfigError(
            f"{', '.join(caches)} have no example of any task in common; build them from the same data set"
        )
    return {name: cache.asking(shared.tasks) for name, cache in caches.items()}


def _differences(a: FeatureCache, b: FeatureCache, names: tuple[str, str]) -> str:
    """In words; empty where the samples are identical."""
    mine, theirs = a.spec.dataset, b.spec.dataset
    if mine.name != theirs.name:
        return f"data set {mine.name} and data set {theirs.name}"
    parts = [
        *_only("images", a.image_ids, b.image_ids, names),
        *_only("texts", a.text_ids, b.text_ids, names),
        *_only("images in quarantine", a.quarantined, b.quarantined, names),
    ]
    if mine.digest == theirs.digest:
        return "; ".join(parts)
    for kind in ("czsl", *EXAMPLES):
        ours, others = (len(c.tasks.examples(kind)) for c in (a, b))
        if ours != others:
            parts.append(f"{ours:,} {kind} examples and {others:,}")
    if a.header.options != b.header.options:
        parts.append(f"built with options {a.header.options} and {b.header.options}")
    digests = f"data set digests {mine.digest[:8]} and {theirs.digest[:8]}"
    return "; ".join([*parts, digests])


def _only(what: str, a: Iterable[str], b: Iterable[str], names: tuple[str, str]) -> list[str]:
    """Ids that one has and the other lacks, the first few by name."""
    mine, theirs = dict.fromkeys(a), dict.fromkeys(b)
    parts: list[str] = []
    for name, have, lack in ((names[0], mine, theirs), (names[1], theirs, mine)):
        if alone := [i for i in have if i not in lack]:
            more = ", …" if len(alone) > NAMED else ""
            said = ", ".join(map(repr, alone[:NAMED]))
            parts.append(f"{len(alone):,} {what} are only in {name} ({said}{more})")
    return parts


def _offer(shared: Shared) -> str:
    """How much is left."""
    try:
        tasks = shared.tasks
    except ConfigError as error:
        return f"nothing, because {error}"
    counts = [f"{len(tasks.examples(kind)):,} {kind} examples" for kind in tasks.kinds]
    return ", ".join([f"{len(shared.images):,} images", *counts]) if counts else "nothing"


def _name(example: Any) -> tuple[str, str]:
    """What tells an example from others of its kind: its id, or its image, and its split."""
    return name_of(example), example.split
