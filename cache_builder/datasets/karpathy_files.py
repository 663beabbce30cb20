"""Files of captions in Karpathy's splits → checked rows; for miniatures, rows → files. No data set itself.

    ROOT/dataset_NAME.json     {"images": [row, …], "dataset": NAME}: all splits, with sentence numbers
    or, one file a split, which is in the file's name:
    ROOT/….json                [{"image": path, "caption": [text, …]}, …], or with split, image_name and captions
    ROOT/….txt                 a header, then lines of name.jpg,caption

The path in front of an image's last slash is the folder of ROOT it lies in; an image without one lies in `images`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from cache_builder.datasets.checking import SPLITS, file_name, number, text
from cache_builder.images import check_name
from cache_builder.records import MAX_JSON, DatasetError, DatasetNotFound, read_json, read_lines

PARTS = ("train", "restval", "val", "test")
"""Splits as Karpathy's files name them: restval is the part of COCO's validation images that trains."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What differs between the sets of this layout.

    Attributes:
        name: the plugin's file name; `dataset_NAME.json` is the file of all splits.
        folders: of ROOT, where images may lie.
        lists: file names of one split's list, with `{split}` in them.
        official: counts of the published set, asserted: name as in `count` → number.
        papers: counts that are printed beside what was found, and never asserted.
        marks: file names of some images of the published test split, by which the set is recognised.
        source: how to get the set, for the message when it is not there.

    """

    name: str
    folders: tuple[str, ...]
    lists: tuple[str, ...]
    official: Mapping[str, int]
    papers: Mapping[str, int]
    marks: frozenset[str]
    source: str


class Sentence(NamedTuple):
    """A caption, and its number in the data set if it has one."""

    text: str
    number: int | None


Listing = tuple[str, str, list[Sentence]]
"""Image, part, captions as written."""


def annotation_files(root: Path, layout: Layout) -> list[tuple[str | None, Path]]:
    """The file of all splits (split None), or the lists by split; the former wins, since it says more."""
    whole = root / f"dataset_{layout.name}.json"
    if whole.is_file():
        return [(None, whole)]
    found: list[tuple[str | None, Path]] = []
    for split in SPLITS:
        paths = [root / name.format(split=split) for name in layout.lists]
        there = [path for path in paths if path.is_file()]
        if len(there) > 1:
            names = " and ".join(path.name for path in there)
            raise DatasetError(
                f"{root} holds {names}, both of split {split}; keep the one that counts"
            )
        found += [(split, path) for path in there]
    if not found:
        lists = ", ".join(name.format(split="{train,val,test}") for name in layout.lists)
        raise DatasetNotFound(
            f"{layout.name} looked in {root} for {whole.name}, or {lists}, and found none of them; {layout.source}"
        )
    return found


def read_rows(path: Path, split: str | None, layout: Layout) -> Iterator[Listing]:
    """Rows of one file, in its order; `split` is None for the file of all splits.

    Raises:
        DatasetError: not such a file, or a malformed row, with its number from 0 (JSON) or its line (text).
    """
    if path.suffix == ".txt":
        yield from _read_lines(path, str(split), layout)
        return
    listed = read_json(path)
    if split is None:
        name = listed.get("dataset", layout.name) if isinstance(listed, dict) else layout.name
        if name != layout.name:
            raise DatasetError(f"{path} says that it is of {name!r}, not of {layout.name}")
        listed = listed.get("images") if isinstance(listed, dict) else None
    if not isinstance(listed, list):
        under = ' under "images"' if split is None else ""
        raise DatasetError(f"{path} holds no list of rows{under}")
    for n, row in enumerate(listed):
        try:
            if not isinstance(row, dict):
                raise ValueError(f"a {type(row).__name__}, not an object")
            image, part, sentences = _of_karpathy(row) if split is None else _of_list(row, split)
            yield _placed(image, layout), part, sentences
        except ValueError as error:
            raise DatasetError(f"{path} row {n}: {error}") from error


def _of_karpathy(row: Mapping[str, Any]) -> Listing:
    """One image of dataset_NAME.json; `ValueError` says what is wrong with it."""
    if "cocoid" in row:
        number(row["cocoid"], "cocoid")
    part = row.get("split")
    if part not in PARTS:
        raise ValueError(f"split is {part!r}, not one of {', '.join(PARTS)}")
    name, listed = file_name(row.get("filename"), "filename"), row.get("sentences")
    if "filepath" in row:
        name = f"{file_name(row['filepath'], 'filepath')}/{name}"
    if not isinstance(listed, list) or not all(isinstance(s, dict) for s in listed):
        raise ValueError(f"sentences is {str(listed)[:60]!r}, not a list of objects")
    sentences = [
        Sentence(
            text(s.get("raw"), "raw", empty=True),
            number(s["sentid"], "sentid") if "sentid" in s else None,
        )
        for s in listed
    ]
    return name, part, sentences


def _of_list(row: Mapping[str, Any], split: str) -> Listing:
    """One row of a split's list, in either spelling."""
    said = row.get("split", split)
    if said != split:
        raise ValueError(f"split is {said!r}, in a file of {split}")
    one, several = ("image_name", "captions") if "image_name" in row else ("image", "caption")
    listed = row.get(several)
    listed = [listed] if isinstance(listed, str) else listed
    if not isinstance(listed, list):
        raise ValueError(f"{several} is {str(listed)[:60]!r}, not a list of texts")
    return (
        file_name(row.get(one), one),
        split,
        [Sentence(text(c, several, empty=True), None) for c in listed],
    )


def _read_lines(path: Path, split: str, layout: Layout) -> Iterator[Listing]:
    """Lines of name.jpg,caption. What follows the first `.jpg,` is the caption, commas and quotes included."""
    for at, (n, line) in enumerate(read_lines(path, MAX_JSON)):
        name, comma, caption = line.partition(".jpg,")
        if at == 0:
            if comma:
                raise DatasetError(f"{path} line {n} is a row; the first line must be the header")
            continue
        if not comma:
            raise DatasetError(
                f"{path} line {n}: {line[:80]!r} is not of the form name.jpg,caption"
            )
        try:
            yield _placed(f"{name}.jpg", layout), split, [Sentence(caption, None)]
        except ValueError as error:
            raise DatasetError(f"{path} line {n}: {error}") from error


def _placed(image: str, layout: Layout) -> str:
    """The image's path, once its folder is one of the set's."""
    folder, _ = place_of(check_name(image))
    if folder not in layout.folders:
        raise ValueError(
            f"image {image!r} lies in {folder}/, which is not one of {', '.join(layout.folders)}"
        )
    return image


def place_of(image: str) -> tuple[str, str]:
    """Folder of ROOT and name in it."""
    folder, _, name = image.rpartition("/")
    return folder or "images", name


def draw(root: Path, rows: Sequence[tuple[str, str, Sequence[str]]]) -> None:
    """For miniatures: a small picture for every (image, part, captions), in the folder where its name puts it."""
    for index, (image, _, _) in enumerate(rows):
        path = root.joinpath(*place_of(image))
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + 3 * index, 36), (30 * index, 200 - 20 * index, 90)).save(path)


def write_karpathy(
    root: Path, rows: Sequence[tuple[str, str, Sequence[str]]], layout: Layout
) -> None:
    """For miniatures: dataset_NAME.json with every key that the published one has."""
    written: list[dict[str, Any]] = []
    number = 7000
    for imgid, (image, part, captions) in enumerate(rows):
        sentences = [
            {
                "tokens": raw.lower().replace(".", "").split(),
                "raw": raw,
                "imgid": imgid,
                "sentid": number + k,
            }
            for k, raw in enumerate(captions)
        ]
        number += len(captions)
        folder, _, name = image.rpartition("/")
        digits = "".join(c for c in name.rpartition("_")[2] if c.isdigit())
        written.append(
            {
                **({"filepath": folder, "cocoid": int(digits)} if folder else {}),
                "filename": name,
                "imgid": imgid,
                "split": part,
                "sentids": [s["sentid"] for s in sentences],
                "sentences": sentences,
            }
        )
    text = json.dumps({"images": written, "dataset": layout.name})
    (root / f"dataset_{layout.name}.json").write_text(text, encoding="utf-8")
