"""SugarCrepe: does an image prefer its COCO caption to a fluent hard negative? Seven kinds of edit. Test only.

One record of swap_obj.json, an object keyed by string index:
    "0": {"filename": "000000222235.jpg", "caption": "A cat sits on its hind legs, and swats at the plant.",
          "negative_caption": "A cat sits on the plant, and swats at its hind legs."}

Counts, all A (asserted on the published set, RAIVNLab/sugar-crepe at 0047054):
    add_att  add_obj  replace_att  replace_obj  replace_rel  swap_att  swap_obj | items  images
        692    2,062          788        1,652        1,406       666       245 | 7,511   1,560
Key "108" of swap_obj is missing: a caption of COCO image 310622 was removed. Older copies have it (246, 7,512, 1,561).
Of the 7,511 true captions 1,074 have outer whitespace, which is stripped; of the negatives none (both counted).
Source: Hsieh et al., arXiv 2306.14610, MIT licence; pictures are those of COCO val2017. No prompt template.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from cache_builder.datasets.base import Dataset, MatchingExample, Tasks, TextRecord
from cache_builder.datasets.checking import (
    Count,
    check_options,
    file_name,
    judge,
    known_by_one,
    text,
)
from cache_builder.datasets.files import (
    NOT_LOOKED_FOR,
    WITHOUT,
    image_record,
    listed,
    missing_images,
    require_root,
)
from cache_builder.images import decode_rule
from cache_builder.records import DatasetError, DatasetNotFound, read_json

SUBSETS = {
    "add_att": 692,
    "add_obj": 2062,
    "replace_att": 788,
    "replace_obj": 1652,
    "replace_rel": 1406,
    "swap_att": 666,
    "swap_obj": 245,
}
"""File stem, which is the category → items."""

REMOVED = "108"
"""Key of swap_obj that today's release lacks and older copies have."""

MARKS = frozenset(
    f"{number:012}.jpg"
    for number in (501523, 163257, 82180, 213224, 121506, 67180, 398237, 99242, 241326, 10977)
)
"""Ten COCO pictures of many items: whatever has one of them is the published set or part of it."""

PUBLISHED = {**SUBSETS, "items": 7511, "images": 1560}

SOURCE = (
    "the seven JSON files are in the folder data of github.com/RAIVNLab/sugar-crepe; the pictures are COCO's "
    "val2017.zip from images.cocodataset.org/zips, unpacked as ROOT/val2017, or anywhere with images=FOLDER"
)


def load(
    root: str | Path | None,
    *,
    images: str | None = None,
    check: str = "auto",
    require_images: bool = True,
    follow_links: bool = False,
) -> Dataset:
    """SugarCrepe as `matching` examples: one image, the true caption first, category the file's stem.

    Args:
        root: holds the seven files, or a folder `data` with them, as a clone of the repository does.
        images: folder with `val2017` in it, or that folder itself, so that one copy of COCO serves all;
            None looks for ROOT/val2017, then ROOT/images/val2017.
        check: "official" asserts the published counts, "none" does not, "auto" asserts them if one of `MARKS` occurs.
        require_images: whether pictures are looked for; false is for work on texts alone.
        follow_links: open pictures through links that leave val2017.

    Raises:
        DatasetNotFound: a file or all pictures are missing.
        DatasetError: an item is malformed, or the counts are not the published ones.
        UnknownName: no such check.
    """
    check_options(check=check, require_images=require_images, follow_links=follow_links)
    root = require_root("sugarcrepe", root, SOURCE)
    folder = _folder_of(root)
    pictures = _pictures_of(root, images, require_images)
    texts: list[TextRecord] = []
    examples: list[MatchingExample] = []
    names: dict[str, None] = {}
    unsolvable: list[str] = []
    found = dict.fromkeys(SUBSETS, 0)
    older = False
    for subset in SUBSETS:
        items = _read_items(folder / f"{subset}.json")
        found[subset] = len(items)
        older |= subset == "swap_obj" and len(items) == 246 and REMOVED in items
        # Items, never a range over the keys: one is missing.
        for key, item in items.items():
            place = f"{subset}.json item {key!r}"
            name = file_name(item.get("filename"), f"{place}: filename")
            keys = "caption", "negative_caption"
            pair = tuple(text(item.get(key), f"{place}: {key}") for key in keys)
            ids = f"{subset}/{key}/caption", f"{subset}/{key}/negative_caption"
            names[name] = None
            texts += map(TextRecord, ids, pair)
            examples.append(MatchingExample(f"{subset}/{key}", (name,), ids, subset, "test"))
            unsolvable += [f"{subset}/{key}"] * (pair[0] == pair[1])
    records = tuple(
        image_record(name, [(pictures, name)], follow_links=follow_links) for name in names
    )
    sizes = {**found, "items": len(examples), "images": len(names)}
    expected = _of_copy(older)
    counts = judge(
        "sugarcrepe",
        root,
        {what: Count(n, expected[what]) for what, n in sizes.items()},
        recognised=known_by_one(MARKS, names),
        check=check,
        source=SOURCE,
    )
    if older:
        counts["older copy"] = (
            f"swap_obj has key {REMOVED!r}, which the release has since removed: 7,512 items"
        )
    counts["unsolvable items"] = listed(unsolvable)
    if require_images:
        counts["images missing"] = missing_images("sugarcrepe", records, f"{SOURCE}; {WITHOUT}")
    else:
        counts |= NOT_LOOKED_FOR
    return Dataset(
        name="sugarcrepe",
        images=records,
        texts=tuple(texts),
        tasks=Tasks(matching=tuple(examples)),
        decode=decode_rule(upright=False),
        counts=counts,
        root=str(root),
    )


def miniature(root: str | Path) -> Path:
    """Fourteen items on five pictures, two a file: a gap in the keys, outer whitespace, pictures in several files."""
    root = Path(root)
    colours = [(200, 60, 50), (60, 90, 200), (70, 160, 80), (230, 200, 60), (120, 120, 130)]
    edits = {
        "add_att": ("A cup on a table. ", "A cracked cup on a table."),
        "add_obj": ("a dog runs", "a dog runs beside a cat"),
        "replace_att": ("A red car is parked.", "A green car is parked."),
        "replace_obj": ("A bird on a wire.\n", "A bird on a roof."),
        "replace_rel": ("The lamp is over the desk.", "The lamp is under the desk."),
        "swap_att": ("A black cat and a white dog.", "A white cat and a black dog."),
        "swap_obj": ("A child pulls a goat.", "A goat pulls a child."),
    }
    (root / "val2017").mkdir(parents=True)
    for i, colour in enumerate(colours):
        picture = Image.new("RGB", (40 + 3 * i, 36), colour)
        picture.save(root / "val2017" / f"{i + 1:012}.jpg")
    for i, (subset, (caption, negative)) in enumerate(edits.items()):
        keys = ("0", "2") if subset == "swap_obj" else ("0", "1")
        items = {
            key: {
                "filename": f"{(i + 2 * k) % len(colours) + 1:012}.jpg",
                "caption": caption,
                "negative_caption": negative,
            }
            for k, key in enumerate(keys)
        }
        (root / f"{subset}.json").write_text(json.dumps(items, indent=4))
    return root


def _folder_of(root: Path) -> Path:
    """Where the seven files lie."""
    missing = {
        folder: [f"{s}.json" for s in SUBSETS if not (folder / f"{s}.json").is_file()]
        for folder in (root, root / "data")
    }
    begun = [folder for folder, names in missing.items() if len(names) < len(SUBSETS)]
    if len(begun) == 2:
        raise DatasetError(
            f"{root} and {root / 'data'} both hold files of sugarcrepe; keep those that count"
        )
    if not begun:
        raise DatasetNotFound(
            f"sugarcrepe looked in {root} and {root / 'data'} for add_att.json and the six like it and found none; "
            f"{SOURCE}"
        )
    if missing[begun[0]]:
        raise DatasetNotFound(
            f"sugarcrepe looked in {begun[0]} for {', '.join(missing[begun[0]])} and found nothing of the kind; "
            f"{SOURCE}"
        )
    return begun[0]


def _pictures_of(root: Path, images: str | None, required: bool) -> Path:
    """The folder val2017."""
    tried = [root / "val2017", root / "images/val2017"]
    if images is not None:
        tried = [Path(images) / "val2017", Path(images)]
    found = next((folder for folder in tried if folder.is_dir()), None)
    if found is None and required:
        raise DatasetNotFound(
            f"sugarcrepe looked for the pictures in {' and '.join(map(str, tried))} and found no such folder; "
            f"{SOURCE}; require_images=false reads the texts alone"
        )
    return found or tried[0]


def _read_items(path: Path) -> Mapping[str, Mapping[str, object]]:
    items = read_json(path)
    if not isinstance(items, dict):
        raise DatasetError(
            f"{path} holds a {type(items).__name__}, not an object of items by their index"
        )
    for key, item in items.items():
        if not isinstance(item, dict):
            raise DatasetError(f"{path} item {key!r} is a {type(item).__name__}, not an object")
    return items


def _of_copy(older: bool) -> dict[str, int]:
    """What to expect: the release, or the older copy with one item and one picture more."""
    more = ("swap_obj", "items", "images") if older else ()
    return {what: n + (what in more) for what, n in PUBLISHED.items()}
