"""The layout that compositional zero-shot data sets share, read once for all of them. No data set itself, so no `load`.

    ROOT/images/...
    ROOT/compositional-split-natural/{train,val,test}_pairs.txt     one pair a line
    ROOT/metadata_compositional-split-natural.t7                    torch.save(list of dict), or .json / .jsonl

The metadata decides the split of an image, never its folder: seen pairs recur in val and test.
Reader rules: docs/protocols.md, CZSL readers, 1-8. Prompts: "a photo of {attr} {obj}".
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal

from PIL.Image import Image

from cache_builder.datasets.base import (
    CompositionExample,
    CompositionTask,
    Dataset,
    ImageRecord,
    Pair,
    Tasks,
    TextRecord,
)
from cache_builder.errors import UnknownName
from cache_builder.images import check_name, decode_rule, image_path, image_size, open_image
from cache_builder.records import (
    DatasetError,
    DatasetNotFound,
    check_unicode,
    read_json,
    read_jsonl,
    read_lines,
    read_t7,
)

SPLITS = ("train", "val", "test")
PAIR_FOLDER = "compositional-split-natural"
METADATA = "metadata_compositional-split-natural"

NamePreset = Literal["plain", "csp"]
PRESETS: Mapping[str, Callable[[str], str]] = {
    "plain": lambda name: " ".join(name.lower().replace(".", " ").replace("_", " ").split()),
    "csp": lambda name: name.lower().replace(".", " "),
}
"""How a name is written in a prompt. `csp` is the rule of the CSP release; both agree on MIT-States."""

Row = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Counts:
    """Sizes that identify a published set; `None` where the published number is not certain enough to assert."""

    attrs: int | None
    objs: int | None
    pairs: int | None
    train_pairs: int | None
    unseen_pairs: int | None
    open_world_pairs: int | None
    train_images: int | None


@dataclass(frozen=True, slots=True)
class Layout:
    """What differs between the sets of this layout.

    Attributes:
        name: the plugin's file name.
        official: counted in the public files; asserted under `check`.
        marks: a few (role, word) of the official vocabulary, by which the set is recognised even when damaged.
        source: how to get the set, for the message when it is not there.
        split_pair: cuts a line of a pair file into its names.
        places: file names to try, below `images/`, for a row of the metadata.

    """

    name: str
    official: Counts
    marks: frozenset[tuple[str, str]]
    source: str
    split_pair: Callable[[str], Sequence[str]]
    places: Callable[[Row], Iterable[str]]


def read_compositions(
    root: str | Path | None,
    layout: Layout,
    *,
    world: str,
    names: str,
    check: str,
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
        follow_links: open images through links that leave the image folder.

    Raises:
        DatasetNotFound: part of the layout is missing.
        DatasetError: a line or row is malformed, or the counts are not the published ones.
        UnknownName: no such world, preset or check.
    """
    _known("world", world, ("closed", "open"))
    _known("names", names, tuple(PRESETS))
    _known("check", check, ("auto", "official", "none"))
    root = _require_root(root, layout)
    metadata = _require_layout(root, layout)
    pairs = {s: _read_pairs(root / PAIR_FOLDER / f"{s}_pairs.txt", layout) for s in SPLITS}
    union = sorted({pair for listed in pairs.values() for pair in listed})
    rows = _read_rows(metadata)
    kept = [r for r in rows if _usable(r, set(union))]
    examples = tuple(
        CompositionExample(r["image"], r["attr"], r["obj"], _split(r["set"])) for r in kept
    )
    task = CompositionTask(examples=examples, pairs=pairs, prompts={})
    found = count(task)
    published = _is_published(task, layout)
    official = check == "official" or (check == "auto" and published)
    if official:
        _assert_counts(found, layout, root)
    first_row: dict[str, Row] = {}
    for row in kept:
        first_row.setdefault(row["image"], row)
    prompted = union if world == "closed" else task.candidates("test", "open")
    images = root / "images"
    places = {i: tuple(layout.places(r)) for i, r in first_row.items()}
    _require_some_image(images, places, layout)
    return Dataset(
        name=layout.name,
        images=tuple(
            ImageRecord(
                image,
                partial(_open_first, images, places[image], follow_links),
                partial(_measure_first, images, places[image], follow_links),
                partial(_first, images, places[image], follow_links),
            )
            for image in first_row
        ),
        texts=tuple(TextRecord(pair_id(*pair), prompt(*pair, names=names)) for pair in prompted),
        tasks=Tasks(
            czsl=CompositionTask(examples, pairs, {pair: pair_id(*pair) for pair in prompted})
        ),
        decode=decode_rule(upright=False),
        counts=_report(found, layout if published else None, official, rows, kept, metadata),
        root=str(root),
    )


def prompt(attr: str, obj: str, *, names: str = "plain") -> str:
    """The candidate string of a pair.

    >>> prompt("Faux.Leather", "Boots.Mid-Calf")
    'a photo of faux leather boots mid-calf'
    """
    clean = PRESETS[names]
    return f"a photo of {clean(attr)} {clean(obj)}"


def pair_id(attr: str, obj: str) -> str:
    """Text id of a pair's prompt; different pairs have different ids, whatever their names hold.

    >>> pair_id("almost_empty", "bottle"), pair_id("a+b", "c")
    ('almost_empty+bottle', 'a%2Bb+c')
    """
    return "+".join(name.replace("%", "%25").replace("+", "%2B") for name in (attr, obj))


def count(task: CompositionTask) -> Counts:
    """The sizes of a task, as `Counts`."""
    union = {pair for listed in task.pairs.values() for pair in listed}
    seen = set(task.pairs["train"])
    return Counts(
        attrs=len(task.attrs),
        objs=len(task.objs),
        pairs=len(union),
        train_pairs=len(seen),
        unseen_pairs=len(union - seen),
        open_world_pairs=len(task.attrs) * len(task.objs),
        train_images=sum(e.split == "train" for e in task.examples),
    )


def space_or_underscore(row: Row) -> tuple[str, ...]:
    """The image as written, then with its first folder spelled with spaces, then with underscores."""
    folder, slash, rest = row["image"].partition("/")
    if not slash:
        return (row["image"],)
    spellings = (folder, folder.replace("_", " "), folder.replace(" ", "_"))
    return tuple(dict.fromkeys(f"{spelling}/{rest}" for spelling in spellings))


def _known(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UnknownName(f"{option}={value!r} is not known; choose one of {', '.join(known)}")


def _require_root(root: str | Path | None, layout: Layout) -> Path:
    if root is None:
        raise DatasetNotFound(
            f"{layout.name} needs the folder it lies in (--root); {layout.source}"
        )
    if not Path(root).is_dir():
        raise DatasetNotFound(f"{layout.name}: there is no folder {root}; {layout.source}")
    return Path(root)


def _require_layout(root: Path, layout: Layout) -> Path:
    """The metadata file, once everything else is known to be there."""
    # A JSON copy wins: somebody made it because the .t7 could not be read.
    candidates = [root / f"{METADATA}{suffix}" for suffix in (".json", ".jsonl", ".t7")]
    metadata = next((path for path in candidates if path.is_file()), None)
    wanted = {
        "images/": (root / "images").is_dir(),
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
        names = layout.split_pair(line.strip())
        if len(names) != 2 or not all(names):
            raise DatasetError(f"{path} line {number}: {line.strip()!r} is not a pair of two names")
        found[names[0], names[1]] = None
    return tuple(found)


def _read_rows(path: Path) -> list[Row]:
    raw = {".t7": read_t7, ".json": read_json, ".jsonl": lambda p: [r for _, r in read_jsonl(p)]}[
        path.suffix
    ](path)
    if not isinstance(raw, list):
        raise DatasetError(f"{path} holds a {type(raw).__name__}, not a list of rows")
    for number, row in enumerate(raw):
        if not isinstance(row, dict) or not all(
            isinstance(row.get(key), str) for key in ("image", "attr", "obj", "set")
        ):
            raise DatasetError(
                f"{path} row {number}: {str(row)[:80]!r} lacks a text under image, attr, obj or set"
            )
        check_name(row["image"])
        check_unicode(row, f"{path} row {number}")
    return raw


def _usable(row: Row, union: set[Pair]) -> bool:
    return (
        "NA" not in (row["attr"], row["set"])
        and (
            row["attr"],
            row["obj"],
        )
        in union
    )


def _split(value: str) -> str:
    """`train` and `val` are themselves; anything else counts as test."""
    return value if value in ("train", "val") else "test"


def _is_published(task: CompositionTask, layout: Layout) -> bool:
    words = {("attr", a) for a in task.attrs} | {("obj", o) for o in task.objs}
    return 2 * len(layout.marks & words) >= len(layout.marks)


def _assert_counts(found: Counts, layout: Layout, root: Path) -> None:
    wrong = [
        f"{field.name} {expected:,} expected, {getattr(found, field.name):,} found"
        for field in fields(Counts)
        if (expected := getattr(layout.official, field.name))
        not in (None, getattr(found, field.name))
    ]
    if wrong:
        raise DatasetError(
            f"{root} is not the published {layout.name}: {'; '.join(wrong)}. Get the whole set "
            f'({layout.source}), or pass check="none" if this is a subset or a set of your own'
        )


def _require_some_image(
    images: Path, places: Mapping[str, tuple[str, ...]], layout: Layout
) -> None:
    """A folder without a single listed image is a half-downloaded set, not 30,000 bad files."""
    if not any(os.path.exists(images / name) for tried in places.values() for name in tried):
        first = next(iter(places.values()), ("…",))
        raise DatasetNotFound(
            f"{layout.name} found none of its {len(places):,} images; the first was looked for at "
            f"{' and '.join(str(images / name) for name in first)}; {layout.source}"
        )


def _open_first(images: Path, names: tuple[str, ...], follow_links: bool) -> Image:
    return open_image(_first(images, names, follow_links))


def _measure_first(images: Path, names: tuple[str, ...], follow_links: bool) -> tuple[int, int]:
    return image_size(_first(images, names, follow_links))


def _first(images: Path, names: tuple[str, ...], follow_links: bool) -> Path:
    """The first of the places where an image may lie."""
    tried = [image_path(images, name, follow_links=follow_links) for name in names]
    for path in tried:
        if path.exists():
            return path
    raise FileNotFoundError(f"no such file: {' nor '.join(str(p) for p in tried)}")


def _report(
    found: Counts,
    layout: Layout | None,
    official: bool,
    rows: Sequence[Row],
    kept: Sequence[Row],
    metadata: Path,
) -> dict[str, str]:
    """Found numbers, for people; beside them the published ones, if it is that set (`layout` is None otherwise)."""
    lines = {}
    for field in fields(Counts):
        expected = getattr(layout.official, field.name) if layout else None
        beside = f" (published {expected:,})" if expected else ""
        lines[field.name.replace("_", " ")] = f"{getattr(found, field.name):,}{beside}"
    if official:
        identity = "the published one, its counts asserted"
    else:
        identity = (
            "published names, counts not asserted" if layout else "another set in this layout"
        )
    splits = [_split(r["set"]) for r in kept]
    odd = sorted({r["set"] for r in kept} - set(SPLITS))
    including = f" (including set = {', '.join(map(repr, odd))})" if odd else ""
    return {
        "set": identity,
        **lines,
        "val images": f"{splits.count('val'):,}",
        "test images": f"{splits.count('test'):,}{including}",
        "rows dropped": f"{len(rows) - len(kept):,} of {len(rows):,} (NA, or pair not in the pair files)",
        "repeated images": f"{len(kept) - len({r['image'] for r in kept}):,}",
        "read from": metadata.name,
    }
