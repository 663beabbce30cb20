"""What a data set is to the builder: images, texts, and the task examples that join them by id.

A data set file of this folder has two handles: `load(root, **options) -> Dataset` reads the official layout, and
`miniature(root) -> Path` writes a handful of files in that same layout. Nothing here knows a backbone or a head.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image

from cache_builder.errors import CacheCorrupt

Pair = tuple[str, str]
"""(attr, obj), by name: an index would differ between worlds."""


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image: its id in the data set's own words, and how to get its pixels.

    Attributes:
        id: unique within the data set.
        open: returns the decoded RGB picture; raises `ValueError`, or an `OSError` about the file itself, if it cannot
            be used, which the build then quarantines.
        measure: returns width and height of that picture without decoding it, and raises likewise; None where that is
            no cheaper.
        path: returns the file that the picture is in, and raises as `open` does; None where there is none. Files of the
            same bytes are encoded once.

    """

    id: str
    open: Callable[[], Image]
    measure: Callable[[], tuple[int, int]] | None = None
    path: Callable[[], Path] | None = None

    def size(self) -> tuple[int, int]:
        """Width and height of the decoded picture, in pixels."""
        return self.open().size if self.measure is None else self.measure()


@dataclass(frozen=True, slots=True)
class TextRecord:
    """One string to encode, exactly as the tokenizer shall see it."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class CompositionExample:
    """An image labelled with its pair."""

    image: str
    attr: str
    obj: str
    split: str

    @property
    def images(self) -> tuple[str, ...]:
        """All that it names."""
        return (self.image,)


@dataclass(frozen=True, slots=True)
class CompositionTask:
    """Compositional zero-shot learning: images, the pairs of every split, and the prompt of every candidate pair.

    Attributes:
        examples: labelled images.
        pairs: split → its pairs in file order; `pairs["train"]` are the seen ones.
        prompts: pair → id of its prompt among the texts. Pairs beyond the splits' own make the open world.

    """

    examples: tuple[CompositionExample, ...]
    pairs: Mapping[str, tuple[Pair, ...]]
    prompts: Mapping[Pair, str]

    @property
    def attrs(self) -> tuple[str, ...]:
        """Sorted union over the splits."""
        return tuple(sorted({attr for pairs in self.pairs.values() for attr, _ in pairs}))

    @property
    def objs(self) -> tuple[str, ...]:
        """Sorted union over the splits."""
        return tuple(sorted({obj for pairs in self.pairs.values() for _, obj in pairs}))

    def candidates(self, split: str, world: str = "closed") -> tuple[Pair, ...]:
        """Candidate pairs: train ∪ the split's pairs (closed) or all attr × obj, attribute-major (open)."""
        if world == "open":
            objs = self.objs
            return tuple((attr, obj) for attr in self.attrs for obj in objs)
        return tuple(dict.fromkeys((*self.pairs["train"], *self.pairs[split])))


@dataclass(frozen=True, slots=True)
class MatchingExample:
    """A caption against its hard negative.

    Among `Tasks.matching` it has one image, and the true caption comes first; among `Tasks.two_by_two` it has two
    images, and caption i is of image i.
    """

    id: str
    images: tuple[str, ...]
    captions: tuple[str, str]
    category: str
    split: str

    @property
    def texts(self) -> tuple[str, ...]:
        """All that it names."""
        return self.captions


@dataclass(frozen=True, slots=True)
class RetrievalExample:
    """An image with the ids of all its captions."""

    image: str
    captions: tuple[str, ...]
    split: str

    @property
    def images(self) -> tuple[str, ...]:
        """All that it names."""
        return (self.image,)

    @property
    def texts(self) -> tuple[str, ...]:
        """All that it names."""
        return self.captions


@dataclass(frozen=True, slots=True)
class Gallery:
    """Images that a composed query is asked of.

    Attributes:
        images: their ids, in the order that breaks ties.
        with_reference: whether the query's own reference competes.

    """

    images: tuple[str, ...]
    with_reference: bool


@dataclass(frozen=True, slots=True)
class ComposedExample:
    """Composed retrieval: reference image + modification text → target images.

    Attributes:
        id: the query's name in the data set.
        reference: image id.
        modifications: text ids. Several say the same in other words: each is embedded and normalised, then averaged.
        targets: right images, the one that the query was written for first; none where they are unpublished.
        categories: kinds of edit, or semantic aspects.
        split: train, val or test.
        gallery: which of `Tasks.galleries` it is asked of; "" where only `subset` is ranked.
        subset: a few images that are also ranked by themselves, or alone.

    """

    id: str
    reference: str
    modifications: tuple[str, ...]
    targets: tuple[str, ...]
    categories: tuple[str, ...]
    split: str
    gallery: str = ""
    subset: tuple[str, ...] = ()

    @property
    def images(self) -> tuple[str, ...]:
        """All that it names; its gallery has more."""
        return (self.reference, *self.targets, *self.subset)

    @property
    def texts(self) -> tuple[str, ...]:
        """All that it names."""
        return self.modifications


@dataclass(frozen=True, slots=True)
class TripletExample:
    """Text-anchored triplet, to train on: an image, an edit in words, and the caption of a picture that nobody has.

    Attributes:
        id: unique among the triplets.
        image: id of the reference.
        reference: text id of a caption of it.
        modification: text id of the edit.
        target: text id of what the edited picture would be called.
        category: "substitute", "remove", "add", or "" where nobody said.
        split: train or val.

    """

    id: str
    image: str
    reference: str
    modification: str
    target: str
    category: str
    split: str

    @property
    def images(self) -> tuple[str, ...]:
        """All that it names."""
        return (self.image,)

    @property
    def texts(self) -> tuple[str, ...]:
        """All that it names."""
        return (self.reference, self.modification, self.target)


EXAMPLES = {
    "matching": MatchingExample,
    "two_by_two": MatchingExample,
    "retrieval": RetrievalExample,
    "composed": ComposedExample,
    "triplets": TripletExample,
}
"""Field of `Tasks` → what it lists, for all but `czsl`."""


def name_of(example: Any) -> str:
    """What tells an example from others of its task and split: its id, or its image where it has none."""
    return example.id if hasattr(example, "id") else example.image


LATER = frozenset({"triplets"})
"""Fields that came after caches were written: absent from the text where empty, so that no digest moved."""


@dataclass(frozen=True, slots=True)
class Tasks:
    """Everything a data set can be asked; an empty field is a task it does not have.

    `galleries` are what the examples of `composed` name.
    """

    czsl: CompositionTask | None = None
    matching: tuple[MatchingExample, ...] = ()
    two_by_two: tuple[MatchingExample, ...] = ()
    retrieval: tuple[RetrievalExample, ...] = ()
    composed: tuple[ComposedExample, ...] = ()
    triplets: tuple[TripletExample, ...] = ()
    galleries: Mapping[str, Gallery] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The tasks present, in the order of the fields."""
        return tuple(k for k in ("czsl", *EXAMPLES) if getattr(self, k))

    def examples(self, kind: str) -> Sequence[Any]:
        """Those of a task, in the order of the data set; none where it has no such task."""
        if kind == "czsl":
            return self.czsl.examples if self.czsl else ()
        return getattr(self, kind)

    def to_json(self) -> str:
        """Canonical text: the same tasks give the same bytes on every machine."""
        czsl = self.czsl and {
            "examples": [[e.image, e.attr, e.obj, e.split] for e in self.czsl.examples],
            "pairs": {split: [list(p) for p in pairs] for split, pairs in self.czsl.pairs.items()},
            "prompts": [[*pair, text] for pair, text in self.czsl.prompts.items()],
        }
        written = [k for k in EXAMPLES if k not in LATER or getattr(self, k)]
        rest = {k: [asdict(e) for e in getattr(self, k)] for k in written}
        galleries = {name: asdict(gallery) for name, gallery in self.galleries.items()}
        return json.dumps(
            {"czsl": czsl, "galleries": galleries, **rest},
            ensure_ascii=False,
            sort_keys=True,
            separators=(",", ":"),
        )

    def digest(self) -> str:
        """sha256 of the text: equal digests ask the same."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> "Tasks":
        """Inverse of `to_json`.

        Raises:
            CacheCorrupt: it is not what `to_json` writes.
        """
        try:
            return cls._from_json(json.loads(text))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            what = f"{type(error).__name__} {error}".strip()
            raise CacheCorrupt(f"the tasks are not understood ({what}); build again") from error

    @classmethod
    def _from_json(cls, raw: Any) -> "Tasks":
        czsl = raw["czsl"] and CompositionTask(
            examples=tuple(CompositionExample(*row) for row in raw["czsl"]["examples"]),
            pairs={s: tuple((a, o) for a, o in pairs) for s, pairs in raw["czsl"]["pairs"].items()},
            prompts={(a, o): text_id for a, o, text_id in raw["czsl"]["prompts"]},
        )

        def tupled(row: dict[str, Any]) -> dict[str, Any]:
            return {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}

        listed: dict[str, Any] = {
            k: tuple(kind(**tupled(r)) for r in (raw.get(k, []) if k in LATER else raw[k]))
            for k, kind in EXAMPLES.items()
        }
        galleries = {name: Gallery(**tupled(g)) for name, g in raw["galleries"].items()}
        return cls(czsl=czsl or None, galleries=galleries, **listed)


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set as the builder sees it.

    Attributes:
        name: the plugin's file name.
        images, texts: what to encode, in file order; ids unique per side.
        tasks: what can be asked of them.
        decode: how pixels were obtained, as canonical text (part of the cache's fingerprint).
        words: auxiliary attributes, which the option `words` of any czsl data set adds (words.py).
        counts: what was found, for people: `{"train images": "348", ...}`, printed at the start of a build.
        root, options: where it was read from and how; `load_dataset` fills in the options. Recorded for finding the
            pictures again, not part of any fingerprint.

    """

    name: str
    images: tuple[ImageRecord, ...]
    texts: tuple[TextRecord, ...]
    tasks: Tasks
    decode: str
    counts: Mapping[str, str] = field(default_factory=dict)
    root: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ()

    def digest(self) -> str:
        """sha256 over image ids, text ids with their strings, tasks, and auxiliary attributes where there are some.

        Equal digests mean identical samples.
        """
        body = json.dumps(
            [
                [i.id for i in self.images],
                [[t.id, t.text] for t in self.texts],
                self.tasks.to_json(),
                *([list(self.words)] if self.words else []),
            ],
            ensure_ascii=False,
            separators=(",", ":"),
        )
        return hashlib.sha256(body.encode()).hexdigest()
