"""Your own pictures: a folder of images and a table of captions, or of (attr, obj) labels.

    ROOT/images/**        ROOT/data.csv  or  ROOT/data.jsonl        optionally ROOT/pairs.csv

One record, captions → retrieval, and labels → czsl:
    {"image": "mugs/001.jpg", "captions": ["a red mug on a desk", "red cup"], "split": "test"}
    image,attr,obj,split
    mugs/001.jpg,red,mug,train

There are no official counts: what was found is printed. Rules: docs/protocols.md, own data. Ours beyond them: without a
table the images alone are read (no texts, no task); photos are turned upright by their EXIF orientation.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from cache_builder.datasets.base import (
    CompositionExample,
    CompositionTask,
    Dataset,
    Pair,
    RetrievalExample,
    Tasks,
    TextRecord,
)
from cache_builder.datasets.checking import SPLITS, check_options, file_name, text
from cache_builder.datasets.compositions import PRESETS, pair_id, prompt
from cache_builder.datasets.files import image_record, require_root, require_some_image
from cache_builder.images import (
    decode_rule,
)
from cache_builder.records import DatasetError, DatasetNotFound, read_csv, read_jsonl

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
"""Files listed when there is no table; what they hold is decided by content."""

HOW = (
    "put the pictures below ROOT/images and the table at ROOT/data.csv "
    "(columns image, caption — or image, attr, obj, split)"
)

COLUMNS = ("image", "attr", "obj", "split", "caption", "captions")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: either a pair or captions."""

    place: str
    image: str
    split: str
    pair: Pair | None
    captions: tuple[str, ...]


def load(
    root: str | Path | None,
    *,
    world: str = "closed",
    names: str = "plain",
    upright: bool = True,
    follow_links: bool = False,
) -> Dataset:
    """Images of ROOT/images with the captions or labels of ROOT/data.csv (or .jsonl).

    Args:
        root: the folder described above.
        world: labels only: prompts of the listed pairs ("closed") or of every attr × every obj ("open").
        names: labels only: preset that cleans names for prompts, "plain" or "csp".
        upright: turn photos by their EXIF orientation, as viewers show them.
        follow_links: open images through links that leave ROOT/images.

    Raises:
        DatasetNotFound: no ROOT/images, or a table that lists none of its files.
        DatasetError: a malformed table, or one that contradicts itself; names the first three offenders.
    """
    root = require_root("folder", root, HOW)
    check_options(
        {"world": ("closed", "open"), "names": tuple(PRESETS)},
        world=world,
        names=names,
        upright=upright,
        follow_links=follow_links,
    )
    if not (root / "images").is_dir():
        raise DatasetNotFound(
            f"folder looked for pictures in {root / 'images'} and found no such folder; {HOW}"
        )
    rows, counts = _read_table(root)
    on_disk = _list_images(root / "images")
    images = tuple(dict.fromkeys(row.image for row in rows)) if rows else on_disk
    if not images:
        raise DatasetNotFound(f"folder found no picture below {root / 'images'}; {HOW}")
    records = tuple(
        image_record(name, [(root / "images", name)], follow_links=follow_links, upright=upright)
        for name in images
    )
    if rows:
        where = f"image names are relative to {root / 'images'}"
        require_some_image("folder", records, where, of="the table")
    if rows:
        counts["images without a row"] = f"{len(set(on_disk) - set(images)):,}"
    if any(row.pair for row in rows):
        texts, tasks = _labels(rows, root, world, names, counts)
    else:
        texts, tasks = _captions(rows, counts)
        if (root / "pairs.csv").is_file():
            counts["pairs.csv"] = "not read: it adds candidates to labels, and there are none"
    return Dataset(
        name="folder",
        images=records,
        texts=texts,
        tasks=tasks,
        decode=decode_rule(upright=upright),
        counts={"images": f"{len(images):,}", "texts": f"{len(texts):,}", **counts},
        root=str(root),
    )


def miniature(root: str | Path, *, kind: str = "labels") -> Path:
    """Six small pictures and a table, with labels (two unseen pairs, one homograph) or with captions."""
    root = Path(root)
    table = [
        ("mugs/red 1.png", "red", "mug", "train", (200, 40, 40)),
        ("mugs/blue.jpg", "blue", "mug", "train", (40, 60, 200)),
        ("fruit/orange.png", "orange", "orange", "train", (250, 150, 20)),
        ("fruit/blaue Pflaume ü.jpg", "blue", "plum", "val", (50, 40, 120)),
        ("mugs/orange.webp", "orange", "mug", "test", (240, 130, 30)),
        ("mugs/red 2.gif", "red", "mug", "test", (180, 30, 50)),
    ]
    for index, (image, *_, colour) in enumerate(table):
        path = root / "images" / image
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + 5 * index, 37), colour).save(path)
    if kind == "labels":
        lines = ["image,attr,obj,split", *(",".join(row[:4]) for row in table)]
        (root / "data.csv").write_text("\n".join([*lines, ""]), encoding="utf-8")
    else:
        records = [
            {"image": i, "captions": [f"a {a} {o}", f"one {o}, {a}"], "split": s}
            for i, a, o, s, _ in table
        ]
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        (root / "data.jsonl").write_text(text, encoding="utf-8")
    return root


def _list_images(images: Path) -> tuple[str, ...]:
    r"""Names of the picture files below a folder, in code-point order; links to folders are not entered.

    An id is UTF-8. Bytes of a name that are not are shown as `\xff`: a backslash is refused, so the build lists it.
    """
    above = len(os.path.join(images, ""))
    found = {
        os.fsencode(os.path.join(folder, file)[above:]).decode("utf-8", "backslashreplace")
        for folder, _, files in os.walk(images)
        for file in files
        if file.lower().endswith(SUFFIXES)
    }
    return tuple(sorted(found))


def _read_table(root: Path) -> tuple[list[Row], dict[str, str]]:
    """Rows without exact duplicates, and what to tell about the table."""
    tables = [path for path in (root / "data.csv", root / "data.jsonl") if path.is_file()]
    if len(tables) == 2:
        raise DatasetError(f"{root} holds both data.csv and data.jsonl; keep the one that counts")
    if not tables:
        return [], {"table": "none: images only, no texts and no task"}
    path = tables[0]
    records = list(read_csv(path) if path.suffix == ".csv" else read_jsonl(path))
    if not records:
        raise DatasetError(f"{path} has no rows; remove it to embed the images alone")
    rows = _rows((f"{path.name} line {number}", record) for number, record in records)
    if len({row.pair is None for row in rows}) == 2:
        first = next(row for row in rows if (row.pair is None) != (rows[0].pair is None))
        raise DatasetError(
            f"{path} mixes captions and labels ({rows[0].place} against {first.place}); one kind a table"
        )
    unique: dict[object, Row] = {}
    for row in rows:
        unique.setdefault((row.image, row.split, row.pair, row.captions), row)
    ignored = sorted({key for _, record in records for key in record} - set(COLUMNS))
    counts = {
        "table": path.name,
        "duplicate rows dropped": f"{len(rows) - len(unique):,}",
        "columns ignored": ", ".join(map(repr, ignored)) or "none",
    }
    return list(unique.values()), counts


def _rows(records: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Row]:
    """All rows checked; one error for all that are malformed."""
    rows: list[Row] = []
    faults: list[str] = []
    for place, record in records:
        try:
            rows.append(_row(record, place))
        except DatasetError as error:
            faults.append(str(error))
    _refuse(faults, "malformed rows", "mend them or take them out")
    return rows


def _row(record: Mapping[str, Any], place: str) -> Row:
    """One checked row."""
    image = text(record.get("image"), f"{place}: image")
    file_name(image, f"{place}: image")
    labelled = "attr" in record or "obj" in record
    captioned = "caption" in record or "captions" in record
    if labelled == captioned:
        raise DatasetError(
            f"{place}: needs either attr, obj and split, or caption(s); has {', '.join(map(repr, record))}"
        )
    if "caption" in record and "captions" in record:
        raise DatasetError(f"{place}: has both caption and captions; keep one of them")
    split = "" if record.get("split") is None else record["split"]
    if captioned and split == "":
        split = "test"
    if split not in SPLITS:
        raise DatasetError(f"{place}: split {split!r} is not one of {', '.join(SPLITS)}")
    if labelled:
        pair = (
            text(record.get("attr"), f"{place}: attr"),
            text(record.get("obj"), f"{place}: obj"),
        )
        return Row(place, image, split, pair, ())
    listed = record.get("captions")
    if listed is None:
        listed = [record.get("caption")]
    if not isinstance(listed, list) or not listed:
        raise DatasetError(f"{place}: captions is {str(listed)[:60]!r}, not a list of texts")
    captions = tuple(text(c, f"{place}: caption") for c in listed)
    return Row(place, image, split, None, captions)


def _refuse(offenders: Iterable[str], what: str, remedy: str) -> None:
    """One error for all rows that break a rule; shows the first three."""
    listed = list(offenders)
    if listed:
        raise DatasetError(f"{len(listed):,} {what}: {'; '.join(listed[:3])}; {remedy}")


def _conflicts(rows: list[Row], fact: Callable[[Row], object]) -> list[str]:
    """Images for which a fact has two values."""
    first: dict[str, Row] = {}
    return [
        f"{row.image!r} is {fact(before)!r} in {before.place} and {fact(row)!r} in {row.place}"
        for row in rows
        if fact(before := first.setdefault(row.image, row)) != fact(row)
    ]


def _labels(
    rows: list[Row], root: Path, world: str, names: str, counts: dict[str, str]
) -> tuple[tuple[TextRecord, ...], Tasks]:
    _refuse(_conflicts(rows, lambda r: r.split), "images in two splits", "an image belongs to one")
    _refuse(_conflicts(rows, lambda r: r.pair), "images with two pairs", "one pair an image")
    examples = tuple(CompositionExample(r.image, *r.pair, r.split) for r in rows if r.pair)
    pairs: dict[str, dict[Pair, None]] = {split: {} for split in SPLITS}
    for example in examples:
        pairs[example.split][example.attr, example.obj] = None
    if not pairs["train"]:
        raise DatasetError(
            f"{root} has labels but no row with split train; seen pairs are those with a train row"
        )
    if (root / "pairs.csv").is_file():
        _add_pairs(root / "pairs.csv", pairs, counts)
    listed = {split: tuple(of) for split, of in pairs.items()}
    task = CompositionTask(examples, listed, {})
    union = sorted({pair for of in listed.values() for pair in of})
    prompted = union if world == "closed" else task.candidates("test", "open")
    seen = set(listed["train"])
    counts |= {
        "attrs × objs": f"{len(task.attrs):,} × {len(task.objs):,}",
        "pairs": f"{len(union):,}, of which unseen {len(set(union) - seen):,}",
        **_per_split(rows),
    }
    texts = tuple(TextRecord(pair_id(*pair), prompt(*pair, names=names)) for pair in prompted)
    prompts = {pair: pair_id(*pair) for pair in prompted}
    return texts, Tasks(czsl=CompositionTask(examples, listed, prompts))


def _add_pairs(path: Path, pairs: Mapping[str, dict[Pair, None]], counts: dict[str, str]) -> None:
    """Candidates that no image shows; a pair is seen by its images alone."""
    unseen: list[str] = []
    ignored: dict[str, None] = {}
    for number, record in read_csv(path):
        place = f"{path.name} line {number}"
        if (split := record.get("split", "")) not in SPLITS:
            raise DatasetError(f"{place}: split {split!r} is not one of {', '.join(SPLITS)}")
        pair = (
            text(record.get("attr"), f"{place}: attr"),
            text(record.get("obj"), f"{place}: obj"),
        )
        if split == "train" and pair not in pairs["train"]:
            unseen.append(f"{' '.join(pair)} in {place}")
        pairs[split][pair] = None
        ignored |= dict.fromkeys(key for key in record if key not in ("attr", "obj", "split"))
    _refuse(unseen, "train pairs without a train image", "list them for val or test")
    if ignored:
        counts[f"columns ignored in {path.name}"] = ", ".join(map(repr, sorted(ignored)))


def _captions(rows: list[Row], counts: dict[str, str]) -> tuple[tuple[TextRecord, ...], Tasks]:
    """Captions of repeated images are joined in file order; caption k of an image has the id `image#k`."""
    _refuse(_conflicts(rows, lambda r: r.split), "images in two splits", "an image belongs to one")
    joined: dict[str, list[str]] = {}
    for row in rows:
        joined.setdefault(row.image, []).extend(row.captions)
    splits = {row.image: row.split for row in rows}
    texts = tuple(
        TextRecord(f"{image}#{k}", caption)
        for image, captions in joined.items()
        for k, caption in enumerate(captions)
    )
    retrieval = tuple(
        RetrievalExample(image, tuple(f"{image}#{k}" for k in range(len(captions))), splits[image])
        for image, captions in joined.items()
    )
    counts |= _per_split(rows)
    return texts, Tasks(retrieval=retrieval)


def _per_split(rows: list[Row]) -> dict[str, str]:
    splits = {row.image: row.split for row in rows}
    return {f"{s} images": f"{list(splits.values()).count(s):,}" for s in SPLITS if rows}
