"""toy_world: procedural pictures of one or two things, with all four tasks, from one seed and without a download.

One record, a two_by_two item whose captions have one held-out pair each (image i shows caption i,
in a layout of its own):

    MatchingExample(id="two_by_two/test/unseen/swap_att/00018",
                    images=("two_by_two/test/00018/0", "two_by_two/test/00018/1"),
                    captions=("a huge key left of a double circle",
                              "a double key left of a huge circle"),
                    category="swap_att", split="test")

Counts at scale 1, for any seed:

    task                       train    val   test  images
    czsl                       2,400    500  1,000  its own, one thing each; val and test half seen, half unseen
    two_by_two                 1,200    200    400  its own, two an item, two things each
    matching                     600    200    300  those of retrieval
    retrieval, 2 captions      3,000    200    300  its own (train: 600, and those of two_by_two)
    composed                     300    100    300  its own, two an item

17 attributes × 15 objects; 187 pairs occur in training, 34 are first met in val and 34 in test; the
partition belongs to the world's version. Everything of a train split is made of train pairs. In val
and test every second item is "unseen" (its id says so): there the true caption holds at least one
pair held out for that split, and the false one *as many*, so that novelty gives nothing away. Of
the categories, "replace_*" and "swap_*" exist in both, "add_*" only in matching: its negative is the
true caption plus something false. A composed item's targets are all pictures of its split's gallery
(references and targets) that show what the edit asks for.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from cache_builder.datasets.base import (
    ComposedExample,
    CompositionExample,
    CompositionTask,
    Dataset,
    Gallery,
    ImageRecord,
    MatchingExample,
    RetrievalExample,
    Tasks,
    TextRecord,
)
from cache_builder.demo.contrasts import CATEGORIES, EDITS, SWAP_REPLACE, draw_contrast, draw_edit
from cache_builder.demo.draw import IMAGE_SIZE, render
from cache_builder.demo.statements import Statement, caption
from cache_builder.demo.world import (
    RELATIONS,
    WORLD_VERSION,
    Scene,
    key_rng,
    pairs_of,
    sample_scene,
)
from cache_builder.records import DatasetError, DatasetNotFound, read_json

MARKER = "toy_world.json"
SPLITS = ("train", "val", "test")
CZSL = {"train": 2400, "val": 500, "test": 1000}
TWO_BY_TWO = {"train": 1200, "val": 200, "test": 400}
RETRIEVAL = {"train": 600, "val": 200, "test": 300}
COMPOSED = {"train": 300, "val": 100, "test": 300}


def load(
    root: str | Path | None = None,
    *,
    seed: int | None = None,
    scale: float | int | None = None,
) -> Dataset:
    """Sample the whole data set; pictures are drawn when they are opened.

    Args:
        root: a folder with a `toy_world.json` such as `{"seed": 3, "scale": 0.5}`, or None.
        seed, scale: override the file; without either, 0 and 1. `scale` multiplies the counts
            (never below one item of each kind); item i is the same at every scale.

    Raises:
        DatasetNotFound: `root` is given and holds no `toy_world.json`.
    """
    options = {"seed": 0, "scale": 1.0}
    if root:
        path = Path(root) / MARKER
        if not path.is_file():
            raise DatasetNotFound(
                f"toy_world was given root {root}, which has no {MARKER}; leave the root out, or write the file"
            )
        found = read_json(path)
        if not isinstance(found, dict) or set(found) - set(options):
            raise DatasetError(
                f"{path} holds {found!r}; it may hold {' and '.join(options)}, and nothing else"
            )
        options |= found
    options |= {k: v for k, v in (("seed", seed), ("scale", scale)) if v is not None}
    made = {key: _number(key, value) for key, value in options.items()}
    making = _Making(int(made["seed"]), made["scale"])
    tasks = making.tasks()
    return Dataset(
        name="toy_world",
        images=tuple(
            ImageRecord(name, partial(render, scene), _size)
            for name, scene in making.scenes.items()
        ),
        texts=tuple(TextRecord(text, text) for text in making.texts),
        tasks=tasks,
        decode=f"rendered by toy_world v{WORLD_VERSION}; RGB {IMAGE_SIZE}x{IMAGE_SIZE}",
        counts=_counts(tasks),
        root=str(root or ""),
    )


def miniature(root: str | Path) -> Path:
    """Write the options of a world of a few dozen pictures."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    (root / MARKER).write_text(json.dumps({"seed": 0, "scale": 0.01}) + "\n")
    return root


def scenes_of(seed: int = 0, scale: float = 1.0) -> dict[str, Scene]:
    """Image id → the sampled scene: the ground truth that statements are checked against."""
    making = _Making(seed, scale)
    making.tasks()
    return making.scenes


def _draw_scene(rng: np.random.Generator, shown: Statement) -> Scene:
    if shown.relation is not None and shown.relation not in RELATIONS:
        shown = shown.turned()
    return sample_scene(rng, tuple((attr, obj) for attr, obj in shown.said if attr), shown.relation)


def _size() -> tuple[int, int]:
    return IMAGE_SIZE, IMAGE_SIZE


@dataclass
class _Making:
    """The data set while it grows: scenes by image id and texts, both in the order of their first use."""

    seed: int
    scale: float
    scenes: dict[str, Scene] = field(default_factory=dict)
    texts: dict[str, None] = field(default_factory=dict)
    one_by_two: list[MatchingExample] = field(default_factory=list)

    def tasks(self) -> Tasks:
        czsl, two_by_two, retrieval = self.czsl(), self.two_by_two(), self.retrieval()
        return Tasks(
            czsl=czsl,
            matching=tuple(self.one_by_two),
            two_by_two=tuple(two_by_two),
            retrieval=tuple(retrieval),
            composed=(composed := tuple(self.composed())),
            galleries={split: _gallery(composed, split) for split in SPLITS},
        )

    def _items(
        self, purpose: str, sizes: dict[str, int], kinds: int
    ) -> Iterator[tuple[str, int, np.random.Generator, bool]]:
        """(split, index, its generator, whether it is an unseen item); every kind at least once in either form."""
        for split in SPLITS:
            for i in range(max(2 * kinds, round(sizes[split] * self.scale))):
                yield (
                    split,
                    i,
                    key_rng(self.seed, f"{purpose}/{split}", i),
                    split != "train" and i // kinds % 2 == 1,
                )

    def _say(self, text: str) -> str:
        self.texts.setdefault(text)
        return text

    def czsl(self) -> CompositionTask:
        prompts = {pair: self._say(f"a photo of {pair[0]} {pair[1]}") for pair in pairs_of("all")}
        orders = {
            (s, p): key_rng(self.seed, f"czsl/{s}/{p}", 0).permutation(len(pairs_of(p)))
            for s in SPLITS
            for p in SPLITS
        }
        examples = []
        for split, i, rng, unseen in self._items("czsl", CZSL, 1):
            part = split if unseen else "train"
            order = orders[split, part]
            turn = i if split == "train" else i // 2
            pair = pairs_of(part)[order[turn % len(order)]]
            image = f"czsl/{split}/{i:05d}"
            self.scenes[image] = sample_scene(rng, (pair,))
            examples.append(CompositionExample(image, pair[0], pair[1], split))
        pairs = {"train": pairs_of("train")}
        for split in SPLITS[1:]:
            shown = {(e.attr, e.obj) for e in examples if e.split == split}
            pairs[split] = tuple(pair for pair in pairs_of("all") if pair in shown)
        return CompositionTask(tuple(examples), pairs, prompts)

    def two_by_two(self) -> list[MatchingExample]:
        examples = []
        for split, i, rng, unseen in self._items("two_by_two", TWO_BY_TWO, len(SWAP_REPLACE)):
            category = SWAP_REPLACE[i % len(SWAP_REPLACE)]
            _, true, false = draw_contrast(rng, category, split, unseen)
            images = (f"two_by_two/{split}/{i:05d}/0", f"two_by_two/{split}/{i:05d}/1")
            self.scenes |= {images[0]: _draw_scene(rng, true), images[1]: _draw_scene(rng, false)}
            captions = (self._say(caption(true)), self._say(caption(false)))
            name = f"two_by_two/{split}/{'unseen' if unseen else 'seen'}/{category}/{i:05d}"
            examples.append(MatchingExample(name, images, captions, category, split))
        return examples

    def retrieval(self) -> list[RetrievalExample]:
        """Scenes with two captions each; every scene of its own also carries a 1×2 matching item."""
        examples = []
        for split, i, rng, unseen in self._items("retrieval", RETRIEVAL, len(CATEGORIES)):
            category = CATEGORIES[i % len(CATEGORIES)]
            shown, true, false = draw_contrast(rng, category, split, unseen)
            image = f"retrieval/{split}/{i:05d}"
            self.scenes[image] = _draw_scene(rng, shown)
            examples.append(RetrievalExample(image, self._captions(image), split))
            captions = (self._say(caption(true)), self._say(caption(false)))
            name = f"one_by_two/{split}/{'unseen' if unseen else 'seen'}/{category}/{i:05d}"
            self.one_by_two.append(MatchingExample(name, (image,), captions, category, split))
        reused = [image for image in self.scenes if image.startswith("two_by_two/train/")]
        return [
            *examples,
            *(RetrievalExample(image, self._captions(image), "train") for image in reused),
        ]

    def _captions(self, image: str) -> tuple[str, ...]:
        pairs, relation = self.scenes[image].graph
        shown = Statement(pairs, relation)
        return self._say(caption(shown)), self._say(f"there is {caption(shown.turned())}")

    def composed(self) -> list[ComposedExample]:
        drafts, shows = [], {}
        for split, i, rng, unseen in self._items("composed", COMPOSED, len(EDITS)):
            kind = EDITS[i % len(EDITS)]
            reference, text, target = draw_edit(rng, kind, split, unseen)
            start, goal = f"composed/{split}/{i:05d}/reference", f"composed/{split}/{i:05d}/target"
            for image, shown in ((start, reference), (goal, target)):
                self.scenes[image] = _draw_scene(rng, shown)
                shows.setdefault((split, self.scenes[image].graph), []).append(image)
            name = f"composed/{split}/{'unseen' if unseen else 'seen'}/{kind}/{i:05d}"
            drafts.append(
                ComposedExample(name, start, (self._say(text),), (goal,), (kind,), split, split)
            )
        return [
            replace(d, targets=tuple(shows[d.split, self.scenes[d.targets[0]].graph]))
            for d in drafts
        ]


def _gallery(composed: tuple[ComposedExample, ...], split: str) -> Gallery:
    """All that the split's examples name; a query's own reference is no answer to it."""
    named = (i for e in composed if e.split == split for i in (e.reference, *e.targets))
    return Gallery(tuple(dict.fromkeys(named)), with_reference=False)


def _number(key: str, value: object) -> float:
    number = float(value) if isinstance(value, int | float) and value is not True else -1.0
    if 0 < number <= 100 if key == "scale" else number >= 0 and number.is_integer():
        return number
    wish = "a number above 0 and at most 100" if key == "scale" else "a whole number from 0"
    raise DatasetError(f"toy_world's {key} is {value!r}; it must be {wish}")


def _counts(tasks: Tasks) -> dict[str, str]:
    found = Counter((kind, e.split) for kind in tasks.kinds for e in tasks.examples(kind))
    counts = {f"{name} {split}": f"{n:,}" for (name, split), n in found.items()}
    return counts | {"pairs": ", ".join(f"{len(pairs_of(split))} {split}" for split in SPLITS)}
