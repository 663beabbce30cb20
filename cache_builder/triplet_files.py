"""Files that triplets come from and go to: captions in, triplets in and out; one JSON object a line.

    captions.jsonl  {"image": "mugs/001.jpg", "captions": ["a red mug on a desk", "red mug"], "split": "train"}
    triplets.jsonl  {"id": "17", "image": "mugs/001.jpg", "reference_caption": "a red mug on a desk",
                     "modification": "make the mug blue", "target_caption": "a blue mug on a desk"}

A triplet may also have `split` (train, the default, or val) and `category` (substitute, remove or add). The key
`conditioning_caption` of the files of RTD (arXiv 2406.09188) is read as `modification`; other keys are left alone, and
named. Nothing is taken from a file that has a single bad row: the error names the first three, and how many there are.
"""

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_builder.datasets.checking import SPLITS, file_name, number, text
from cache_builder.datasets.files import listed
from cache_builder.records import DatasetError, DatasetNotFound, read_csv, read_jsonl
from cache_builder.rewriting import plainly

LEARNED = ("train", "val")
"""Splits that have triplets: they are trained on."""

CATEGORIES = ("substitute", "remove", "add")

MOST_WORDS = 40
"""Words of a modification, and of a target caption, that is made here or taken of an answer: some 50 tokens."""

KEYS = ("id", "image", "reference_caption", "modification", "target_caption", "split", "category")

RTD_KEY = "conditioning_caption"
"""What RTD's files call the modification."""


@dataclass(frozen=True, slots=True)
class Caption:
    """A caption with its image; `id` is unique among those of the image."""

    id: str
    image: str
    text: str
    split: str

    @property
    def name(self) -> str:
        """Unique among all captions."""
        return f"{self.image}/{self.id}"


@dataclass(frozen=True, slots=True)
class Triplet:
    """A row of a file of triplets: its strings, not yet ids of texts."""

    id: str
    image: str
    reference_caption: str
    modification: str
    target_caption: str
    split: str = "train"
    category: str = ""


@dataclass(frozen=True, slots=True)
class TripletFile:
    """What a file of triplets holds; `ignored` are keys that mean nothing here."""

    triplets: tuple[Triplet, ...]
    ignored: tuple[str, ...]


def fault(reference: str, modification: str, target: str) -> str | None:
    """Why three strings are no triplet; None if they are one.

    >>> fault("a red cup", "the same", "A red cup.")
    'target equals reference'
    """
    if not modification.strip():
        return "empty modification"
    if not target.strip():
        return "empty target caption"
    if plainly(target) == plainly(reference):
        return "target equals reference"
    if plainly(modification) in (plainly(target), plainly(reference)):
        return "modification repeats a caption"
    if max(len(modification.split()), len(target.split())) > MOST_WORDS:
        return f"too long: more than {MOST_WORDS} words"
    return None


def read_captions(path: Path) -> list[Caption]:
    """Captions of a file that is no data set: .jsonl as above, or .csv with the columns image, caption and split.

    An image's captions are collected over its rows, in file order, each once; caption k has the id `image#k`, as those
    of data set `folder` have. Without a split they are of train.

    Raises:
        DatasetError: rows without an image or a caption, or an image in two splits; names the first three.
        DatasetNotFound: no such file.
    """
    _require(path, "captions")
    rows = read_csv(path) if path.suffix.lower() == ".csv" else read_jsonl(path)
    found: dict[str, dict[str, None]] = {}
    splits: dict[str, str] = {}
    faults: list[str] = []
    for n, row in rows:
        try:
            image, split, captions = _caption_row(row, f"line {n}")
            if splits.setdefault(image, split) != split:
                raise DatasetError(f"line {n}: {image!r} is of {split}, and was of {splits[image]}")
        except DatasetError as error:
            faults.append(str(error))
        else:
            found.setdefault(image, {}).update(dict.fromkeys(captions))
    _refuse(path, faults)
    if not found:
        raise DatasetError(f"{path} has no rows; a row is an image with its caption")
    return [
        Caption(f"{image}#{k}", image, caption, splits[image])
        for image, captions in found.items()
        for k, caption in enumerate(captions)
    ]


def read_triplets(path: Path) -> TripletFile:
    """All triplets of a file.

    Raises:
        DatasetError: a malformed or contradicting row, an id twice, a target that equals its reference, or no rows;
            names the first three.
        DatasetNotFound: no such file.
    """
    _require(path, "triplets")
    found: dict[str, Triplet] = {}
    ignored: dict[str, None] = {}
    faults: list[str] = []
    for n, row in read_jsonl(path):
        try:
            triplet = _triplet_row(row, f"line {n}")
            if triplet.id in found:
                raise DatasetError(f"line {n}: id {triplet.id!r} was there before")
        except DatasetError as error:
            faults.append(str(error))
        else:
            found[triplet.id] = triplet
        ignored |= dict.fromkeys(key for key in row if key not in (*KEYS, RTD_KEY))
    _refuse(path, faults)
    if not found:
        raise DatasetError(f"{path} has no rows; a row is an object with {', '.join(KEYS[:5])}")
    return TripletFile(tuple(found.values()), tuple(ignored))


def write_triplets(triplets: Iterable[Triplet], path: Path) -> None:
    """Write a file that `read_triplets` reads; one that is there is not overwritten."""
    rows = ({key: getattr(t, key) for key in KEYS if getattr(t, key)} for t in triplets)
    write_rows(rows, path)


def write_rows(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """JSON lines, whole or not at all.

    Raises:
        DatasetError: there is such a file already, or no such folder.
    """
    require_free(path)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("x", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        require_free(path)
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def require_free(path: Path) -> None:
    """Refuse to write where a file is, or where no folder is: `DatasetError`."""
    if not path.parent.is_dir():
        raise DatasetError(f"{path} cannot be written: there is no folder {path.parent}")
    if path.exists():
        raise DatasetError(
            f"{path} is there already and is not overwritten; choose another name, or remove it"
        )


def _caption_row(row: Mapping[str, Any], place: str) -> tuple[str, str, list[str]]:
    image = file_name(row.get("image"), f"{place}: image")
    split = row.get("split") or LEARNED[0]
    if split not in SPLITS:
        raise DatasetError(f"{place}: split {split!r} is not one of {', '.join(SPLITS)}")
    if ("caption" in row) == ("captions" in row):
        raise DatasetError(f"{place}: needs either caption or captions; has {', '.join(row)}")
    captions = row["captions"] if "captions" in row else [row["caption"]]
    if not isinstance(captions, list) or not captions:
        raise DatasetError(f"{place}: captions is {captions!r:.80}, not a list of texts")
    return image, split, [text(c, f"{place}: caption") for c in captions]


def _triplet_row(row: Mapping[str, Any], place: str) -> Triplet:
    name = row.get("id")
    if not isinstance(name, str):
        name = str(number(name, f"{place}: id"))
    said = {key: row[key] for key in ("modification", RTD_KEY) if key in row}
    if len(set(map(str, said.values()))) > 1:
        raise DatasetError(f"{place}: modification and {RTD_KEY} differ; keep one of them")
    values = {**row, "id": name, "modification": next(iter(said.values()), None)}
    name, image, reference, modification, target = (
        text(values.get(key), f"{place}: {key}") for key in KEYS[:5]
    )
    split, category = row.get("split", LEARNED[0]), row.get("category", "")
    if split not in LEARNED:
        raise DatasetError(
            f"{place}: split is {split!r:.80}; triplets are trained on, so it is one of {', '.join(LEARNED)}"
        )
    if category not in ("", *CATEGORIES):
        raise DatasetError(
            f"{place}: category is {category!r:.80}, not one of {', '.join(CATEGORIES)}"
        )
    if plainly(target) == plainly(reference):
        raise DatasetError(f"{place}: target_caption says what reference_caption says")
    return Triplet(name, image, reference, modification, target, split, category)


def _require(path: Path, what: str) -> None:
    if not path.is_file():
        raise DatasetNotFound(f"there is no file {path} of {what}")


def _refuse(path: Path, faults: Sequence[str]) -> None:
    """One error for all bad rows."""
    if faults:
        raise DatasetError(
            f"{path} has {len(faults):,} bad rows: {'; '.join(faults[:3])}; mend them or take them out"
        )


def require_images(images: Iterable[str], triplets: Sequence[Triplet], where: str) -> None:
    """Refuse triplets of images that a data set does not have.

    Raises:
        DatasetError: names the first three images and how many there are.
    """
    known = frozenset(images)
    unknown = list(dict.fromkeys(t.image for t in triplets if t.image not in known))
    if unknown:
        raise DatasetError(
            f"{where} names images that the data set does not have, {listed(unknown)}; its rows name images by the ids "
            "of the data set"
        )
