"""What a composition set holds in numbers: counted, held against the published set, told to people. No `load`.

Marks as in docs/protocols.md: A numbers come from the public files and are asserted, P numbers from papers and are only
printed beside what was found.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields

from cache_builder.datasets.base import CompositionTask
from cache_builder.datasets.checking import Count


@dataclass(frozen=True, slots=True)
class Counts:
    """Sizes that identify a set; as the official ones, None is a number not certain enough to assert.

    Attributes:
        attrs, objs: sizes of the vocabularies, sorted unions over the three pair files.
        pairs, train_pairs, unseen_pairs: of all three files; of train's; the rest.
        open_world_pairs: attrs × objs.
        train_images: rows of split train that name a listed pair.
        images: such rows of all three splits.
        pairs_of_one_image: listed pairs that exactly one row shows.
        homographs: words that are attr and obj alike, sorted.

    """

    attrs: int | None = None
    objs: int | None = None
    pairs: int | None = None
    train_pairs: int | None = None
    unseen_pairs: int | None = None
    open_world_pairs: int | None = None
    train_images: int | None = None
    images: int | None = None
    pairs_of_one_image: int | None = None
    homographs: tuple[str, ...] | None = None


def count(task: CompositionTask) -> Counts:
    """The sizes of a task; every field is filled."""
    union = {pair for listed in task.pairs.values() for pair in listed}
    seen = set(task.pairs["train"])
    attrs, objs = task.attrs, task.objs
    shown = Counter((e.attr, e.obj) for e in task.examples)
    return Counts(
        attrs=len(attrs),
        objs=len(objs),
        pairs=len(union),
        train_pairs=len(seen),
        unseen_pairs=len(union - seen),
        open_world_pairs=len(attrs) * len(objs),
        train_images=sum(e.split == "train" for e in task.examples),
        images=len(task.examples),
        pairs_of_one_image=sum(n == 1 for n in shown.values()),
        homographs=tuple(sorted(set(attrs) & set(objs))),
    )


def table(found: Counts, official: Counts) -> dict[str, Count]:
    """Every count beside the published one, for `checking.judge`."""
    return {
        field.name.replace("_", " "): Count(
            getattr(found, field.name), getattr(official, field.name)
        )
        for field in fields(Counts)
    }


def with_papers(lines: Mapping[str, str], papers: Mapping[str, str]) -> dict[str, str]:
    """The lines, with P numbers as "(papers: …)" behind those they belong to; all of these must be there."""
    assert set(papers) <= set(lines), f"no such lines: {set(papers) - set(lines)}"
    return {
        line: f"{text} (papers: {papers[line]})" if line in papers else text
        for line, text in lines.items()
    }


def per_split(task: CompositionTask) -> dict[str, str]:
    """What A does not cover: val and test, computed."""
    seen = set(task.pairs["train"])
    listed = {split: set(task.pairs[split]) for split in ("val", "test")}
    images = Counter(e.split for e in task.examples)
    lines = {}
    for split, pairs in listed.items():
        unseen = pairs - seen
        lines[f"{split} pairs"] = f"{len(pairs & seen):,} seen + {len(unseen):,} unseen"
        lines[f"{split} candidates, closed"] = f"{len(seen) + len(unseen):,}"
        lines[f"{split} images"] = f"{images[split]:,}"
    lines["unseen, val and test"] = f"{len(listed['val'] & listed['test'] - seen):,}"
    # Such an image has no right answer among its split's closed-world candidates, and scoring refuses it.
    known = {split: seen | pairs for split, pairs in listed.items()} | {"train": seen}
    strays = sum((e.attr, e.obj) not in known[e.split] for e in task.examples)
    lines["images of no candidate"] = f"{strays:,}"
    return lines
