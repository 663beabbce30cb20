"""The layout that compositional zero-shot data sets share, read once for all of them. No data set itself, so no `load`.

    ROOT/images/...
    ROOT/compositional-split-natural/{train,val,test}_pairs.txt     one pair a line
    ROOT/metadata_compositional-split-natural.t7                    torch.save(list of dict), or .json / .jsonl

The metadata decides the split of an image, never its folder: seen pairs recur in val and test.
Reader rules: docs/protocols.md, CZSL readers, 1-8. Prompts: "a photo of {attr} {obj}".
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from cache_builder.datasets.base import (
    CompositionExample,
    CompositionTask,
    Dataset,
    Pair,
    Tasks,
    TextRecord,
)
from cache_builder.datasets.checking import SPLITS, check_options, judge, known_by_half
from cache_builder.datasets.composition_counts import (
    Counts,
    count,
    per_split,
    table,
    with_papers,
)
from cache_builder.datasets.composition_files import (
    METADATA,
    PAIR_FOLDER,
    Labels,
    Spelling,
    as_written,
)
from cache_builder.datasets.files import (
    NOT_LOOKED_FOR,
    WITHOUT,
    Place,
    image_record,
    listed,
    require_root,
    require_some_image,
)
from cache_builder.images import check_name, decode_rule
from cache_builder.records import (
    DatasetError,
    DatasetNotFound,
    check_unicode,
    read_json,
    read_jsonl,
    read_lines,
    read_t7,
)

PRESETS: Mapping[str, Callable[[str], str]] = {
    "plain": lambda name: " ".join(name.lower().replace(".", " ").replace("_", " ").split()),
    "csp": lambda name: name.lower().replace(".", " "),
}
"""How a name is written in a prompt. `csp` is the rule of the CSP release; only VAW-CZSL, which has `_`, tells them
apart. A set may bring a table of its own, `Layout.short`, that the preset `short` names."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What differs between the sets of this layout.

    Attributes:
        name: the plugin's file name.
        official: counted in the public files; asserted under `check`.
        marks: a few (role, word) of the official vocabulary, by which the set is recognised even when damaged.
        source: how to get the set, for the message when it is not there.
        papers: numbers from papers, printed only, by the line of the counts they stand beside.
        separator: between the two names of a pair line; None for blanks.
        places: where to look for the image of a row, in order.
        folders: image folders that `places` names; one of them has to be there.
        step: what a missing image of this set usually means, for the message.
        short: official name → short one, for the preset `short`; empty if the set has none.

    """

    name: str
    official: Counts
    marks: frozenset[tuple[str, str]]
    source: str
    papers: Mapping[str, str] = field(default_factory=dict)
    separator: str | None = None
    places: Callable[[Labels], tuple[Spelling, ...]] = as_written
    folders: tuple[str, ...] = ("images",)
    step: str = ""
    short: Mapping[str, str] = field(default_factory=dict)


def read_compositions(
    root: str | Path | None,
    layout: Layout,
    *,
    world: str,
    names: str,
    check: str,
    require_images: bool,
    follow_links: bool,
) -> Dataset:
    """A data set of the shared layout.

    Args:
        root: the folder described above.
        layout: what is particular to this set.
        world: prompts of which pairs: "closed" (all three pair files) or "open" (every attr × every obj).
        names: preset that cleans names for prompts, see `PRESETS`.
        check: "official" asserts the published counts, "none" does not, "auto" asserts them if the vocabulary is the
            published set's (at least half of `layout.marks`), and otherwise says that it is another set.
        require_images: False looks for no image and needs no image folder, for work with the annotation files alone;
            an image that is there still opens.
        follow_links: open images through links that leave the image folder.

    Raises:
        DatasetNotFound: part of the layout is missing.
        DatasetError: a line or row is malformed, the counts are not the published ones, or a name has no short one.
        UnknownName: no such world, preset or check, or an option that must be true or false is neither.
        UnsafeName: an image name leads out of its folder.
    """
    presets = (*PRESETS, "short") if layout.short else tuple(PRESETS)
    check_options(
        {"world": ("closed", "open"), "names": presets},
        world=world,
        names=names,
        check=check,
        require_images=require_images,
        follow_links=follow_links,
    )
    root = require_root(layout.name, root, layout.source)
    metadata = _require_layout(root, layout, require_images)
    pairs = {s: _read_pairs(root / PAIR_FOLDER / f"{s}_pairs.txt", layout) for s in SPLITS}
    union = {pair for of in pairs.values() for pair in of}
    rows = _read_rows(metadata)
    kept = [r for r in rows if _usable(r, union)]
    if not any(r["set"] == "train" for r in kept):
        raise DatasetError(
            f"{metadata} has {len(rows):,} rows, and none of split train shows a pair of the pair files; "
            f"look whether attr and obj are the right way round; {layout.source}"
        )
    examples = tuple(
        CompositionExample(r["image"], r["attr"], r["obj"], _split(r["set"])) for r in kept
    )
    task = CompositionTask(examples, pairs, prompts={})
    torn = _in_two_splits(examples)
    words = {("attr", a) for a in task.attrs} | {("obj", o) for o in task.objs}
    published = known_by_half(layout.marks, words)
    if torn and not published:  # what is published is what it is, and is told below
        raise DatasetError(
            f"{metadata}: {len(torn):,} images have rows in two splits, e.g. {', '.join(map(repr, torn[:3]))}; "
            "an image belongs to one"
        )
    told = judge(
        layout.name,
        root,
        table(count(task), layout.official),
        recognised=published,
        check=check,
        source=layout.source,
    )
    told |= per_split(task)
    first_row: dict[str, Labels] = {}
    for row in kept:
        first_row.setdefault(row["image"], row)
    images = tuple(
        image_record(image, _places(root, layout, row), layout.step, follow_links=follow_links)
        for image, row in first_row.items()
    )
    if require_images:
        require_some_image(layout.name, images, f"{layout.source}; {WITHOUT}")
    prompted = sorted(union) if world == "closed" else product(task.attrs, task.objs)
    prompts = {pair: pair_id(*pair) for pair in prompted}
    written = _written(names, task, layout)
    return Dataset(
        name=layout.name,
        images=images,
        texts=tuple(
            TextRecord(text_id, _sentence(written[attr], written[obj]))
            for (attr, obj), text_id in prompts.items()
        ),
        tasks=Tasks(czsl=CompositionTask(examples, pairs, prompts)),
        decode=decode_rule(upright=False),
        counts={
            **_with_odd_sets(with_papers(told, layout.papers if published else {}), kept),
            "rows dropped": f"{len(rows) - len(kept):,} of {len(rows):,} (NA, or pair not in the pair files)",
            "repeated images": f"{len(kept) - len(first_row):,}",
            **({"images in two splits": listed(torn)} if torn else {}),
            "read from": metadata.name,
            **({} if require_images else NOT_LOOKED_FOR),
        },
        root=str(root),
    )


def prompt(attr: str, obj: str, *, names: str = "plain") -> str:
    """The candidate string of a pair.

    >>> prompt("Faux.Leather", "Boots.Mid-Calf")
    'a photo of faux leather boots mid-calf'
    """
    clean = PRESETS[names]
    return _sentence(clean(attr), clean(obj))


def _sentence(attr: str, obj: str) -> str:
    return f"a photo of {attr} {obj}"


def _written(names: str, task: CompositionTask, layout: Layout) -> Mapping[str, str]:
    """Every name as it stands in a prompt; the rule never looks at the role, so homographs need no key of their own."""
    words = sorted({*task.attrs, *task.objs})
    if names in PRESETS:
        return {word: PRESETS[names](word) for word in words}
    uncovered = [word for word in words if word not in layout.short]
    if uncovered:
        shown = ", ".join(map(repr, uncovered[:3]))
        raise DatasetError(
            f"names='short' of {layout.name} knows the {len(layout.short)} published names only, and {len(uncovered)} "
            f"of the {len(words)} names here are others, e.g. {shown}; use names='plain'"
        )
    return layout.short


def pair_id(attr: str, obj: str) -> str:
    """Text id of a pair's prompt; different pairs have different ids, whatever their names hold.

    >>> pair_id("almost_empty", "bottle"), pair_id("a+b", "c")
    ('almost_empty+bottle', 'a%2Bb+c')
    """
    return "+".join(name.replace("%", "%25").replace("+", "%2B") for name in (attr, obj))


def _require_layout(root: Path, layout: Layout, require_images: bool) -> Path:
    """The metadata file, once everything else is known to be there."""
    # A JSON copy wins: somebody made it because the .t7 could not be read.
    candidates = [root / f"{METADATA}{suffix}" for suffix in (".json", ".jsonl", ".t7")]
    metadata = next((path for path in candidates if path.is_file()), None)
    images_there = any((root / folder).is_dir() for folder in layout.folders)
    wanted = {
        " or ".join(f"{f}/" for f in layout.folders): images_there or not require_images,
        **{
            f"{PAIR_FOLDER}/{s}_pairs.txt": (root / PAIR_FOLDER / f"{s}_pairs.txt").is_file()
            for s in SPLITS
        },
        f"{METADATA}.t7 (or .json, .jsonl)": metadata is not None,
    }
    missing = [name for name, there in wanted.items() if not there]
    if missing or metadata is None:
        raise DatasetNotFound(
            f"{layout.name} looked in {root} for {', '.join(missing)} and found nothing of the kind; {layout.source}"
        )
    return metadata


def _read_pairs(path: Path, layout: Layout) -> tuple[Pair, ...]:
    found: dict[Pair, None] = {}
    for number, line in read_lines(path):
        names = [name.strip() for name in line.strip().split(layout.separator)]
        if len(names) != 2 or not all(names):
            between = "blanks" if layout.separator is None else repr(layout.separator)
            raise DatasetError(
                f"{path} line {number}: {line.strip()!r} is not a pair of two names with {between} between them"
            )
        found[names[0], names[1]] = None
    return tuple(found)


def _read_rows(path: Path) -> list[Labels]:
    if path.suffix == ".jsonl":
        raw: Any = [row for _, row in read_jsonl(path)]
    else:
        raw = {".t7": read_t7, ".json": read_json}[path.suffix](path)
    if not isinstance(raw, list):
        raise DatasetError(f"{path} holds a {type(raw).__name__}, not a list of rows")
    for number, row in enumerate(raw):
        keys = ("image", "attr", "obj", "set")
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in keys):
            raise DatasetError(
                f"{path} row {number}: {str(row)[:80]!r} lacks a text under image, attr, obj or set"
            )
        if not isinstance(row.get("_image", ""), str):
            raise DatasetError(f"{path} row {number}: _image is {row['_image']!r}, not a text")
        check_name(row["image"])
        check_unicode(row, f"{path} row {number}")
    return raw


def _places(root: Path, layout: Layout, row: Labels) -> tuple[Place, ...]:
    """Where to look for the image of a row; a name that could lead out of its folder is refused at once."""
    return tuple((root / folder, check_name(name)) for folder, name in layout.places(row))


def _usable(row: Labels, union: set[Pair]) -> bool:
    return "NA" not in (row["attr"], row["set"]) and (row["attr"], row["obj"]) in union


def _in_two_splits(examples: Sequence[CompositionExample]) -> list[str]:
    first: dict[str, str] = {}
    torn = (e.image for e in examples if first.setdefault(e.image, e.split) != e.split)
    return list(dict.fromkeys(torn))


def _split(value: str) -> str:
    """`train` and `val` are themselves; anything else counts as test."""
    return value if value in ("train", "val") else "test"


def _with_odd_sets(counts: Mapping[str, str], kept: Sequence[Labels]) -> dict[str, str]:
    """The counts, with the values of `set` that were read as test for want of a better rule."""
    odd = sorted({r["set"] for r in kept} - set(SPLITS))
    including = f" (including set = {', '.join(map(repr, odd))})" if odd else ""
    return {**counts, "test images": counts["test images"] + including}
