"""FashionIQ: edits of clothes in three categories, every edit worded by two people.

One record of captions/cap.dress.val.json; `candidate` is the reference, test rows have no target:
    {"target": "B0084Y8XIU", "candidate": "B005X4PL1G",
     "captions": ["is shiny and silver with shorter sleeves", "fit and flare"]}
image_splits/split.dress.val.json is a list of such names (ASINs); images/<asin>.jpg.

Counts, all A: asserted on the published set:
                                   dress               shirt               toptee
    queries train / val / test     5,985/2,017/2,024   5,988/2,038/2,038   6,027/1,961/2,056
    val gallery `split`            3,817               6,346               5,373
    val gallery `union`            2,628               3,089               2,902
Traps: two galleries circulate, and the smaller `union` (images of the split's triplets) scores higher, so the name of
the gallery is part of every number; some images can no longer be had; a few captions are empty.
Source: Wu et al., CVPR 2021; XiaoxiaoGuo/fashion-iq at f71b16c, whose README names the CDLA licence.
"""

import json
import os
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from PIL import Image

from cache_builder.datasets.base import ComposedExample, Dataset, Gallery, Tasks, TextRecord
from cache_builder.datasets.checking import (
    SPLITS,
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
    Place,
    image_record,
    require_some_image,
)
from cache_builder.datasets.triplets import (
    Annotation,
    check_examples,
    check_unique,
    read_list,
    read_rows,
    require_files,
    some_of,
)
from cache_builder.errors import UnknownName
from cache_builder.images import decode_rule
from cache_builder.records import DatasetError

CATEGORIES = ("dress", "shirt", "toptee")

QUERIES = {
    "dress": {"train": 5985, "val": 2017, "test": 2024},
    "shirt": {"train": 5988, "val": 2038, "test": 2038},
    "toptee": {"train": 6027, "val": 1961, "test": 2056},
}
GALLERIES = {
    "split": {"dress": 3817, "shirt": 6346, "toptee": 5373},
    "union": {"dress": 2628, "shirt": 3089, "toptee": 2902},
}
"""Of val."""

MARKS: Mapping[str, Sequence[str]] = {
    "train": ("B0058FQLVO", "B008X9NIPO", "B002Z2PJ3O", "B007E5DI76", "B0049B3R0G", "B008FJZF44"),
    "val": ("B0058FOPLC", "B008N05A40", "B002TSURL8", "B006XD31RC", "B004CPWN1I", "B008CMAZW6"),
    "test": ("B005GNVVJ0", "B0090KHNV0", "B002X0JDK8", "B007K6ESEG", "B0048A1OVM", "B008LR9CNK"),
}
"""References of the published triplets, two of each category."""

CLEAN = ".?, "
"""Characters stripped from both ends of a caption."""

SUFFIXES = (".jpg", ".png")
"""Of image files, in the order they are tried; what they hold is decided by content."""

SOURCE = (
    "get captions and image_splits from github.com/XiaoxiaoGuo/fashion-iq, and the images as images/<asin>.jpg by the "
    "links in github.com/hongwang600/fashion-iq-metadata"
)

OPTIONS = {
    "gallery": tuple(GALLERIES),
    "orders": ("both", "single"),
}


def load(
    root: str | Path | None,
    *,
    splits: str | Sequence[str] = ("val",),
    gallery: str = "split",
    orders: str = "both",
    check: str = "auto",
    require_images: bool = True,
    follow_links: bool = False,
) -> Dataset:
    """FashionIQ: a gallery for each category and split, called e.g. "val/dress/split", with the reference in it.

    Args:
        root: the folder described above.
        splits: of train, val and test, which to read; a text lists them with commas. Published numbers are of val:
            the targets of test are unpublished.
        gallery: "split" (all images of the category's list) or "union" (those in the split's triplets). Test has no
            `union`, since half of its triplets is unpublished.
        orders: the captions a and b as two modifications, "a and b" and "b and a" ("both"), or as the first alone
            ("single").
        check: "official" asserts the published counts, "none" does not, "auto" does if the triplets have the names of
            the published ones.
        require_images: false for texts and tasks only; then no image need be there.
        follow_links: open images through links that leave their folder.

    Raises:
        DatasetNotFound: part of the layout is missing.
        DatasetError: a row is malformed, or the counts are not the published ones.
        UnknownName: no such split, gallery, order or check.
    """
    check_options(
        OPTIONS,
        gallery=gallery,
        orders=orders,
        check=check,
        require_images=require_images,
        follow_links=follow_links,
    )
    chosen = some_of("splits", splits, SPLITS)
    if gallery == "union" and "test" in chosen:
        raise UnknownName(
            "fashioniq has no gallery union for test, whose targets are unpublished; ask for gallery=split, or leave "
            "test out of splits"
        )
    files = [
        f"{kind}.{category}.{split}.json"
        for split in chosen
        for category in CATEGORIES
        for kind in ("captions/cap", "image_splits/split")
    ]
    remedy = "Or name with splits= those that are there"
    folder = require_files("fashioniq", root, files, SOURCE, remedy)
    examples: list[ComposedExample] = []
    texts: list[TextRecord] = []
    galleries: dict[str, Gallery] = {}
    counts: dict[str, Count] = {}
    empty = 0
    for split, category in product(chosen, CATEGORIES):
        name = f"{split}/{category}/{gallery}"
        listed = _read_gallery(folder / f"image_splits/split.{category}.{split}.json")
        mine: list[ComposedExample] = []
        for number, row in enumerate(read_rows(folder / f"captions/cap.{category}.{split}.json")):
            said = _captions(row)
            empty += not all(said)
            query = f"{category}/{split}/{number}"
            wordings = _wordings(query, said, orders)
            texts += wordings
            mine.append(_example(row, query, wordings, category, split, name))
        if gallery == "union":
            named = {image for e in mine for image in (e.reference, *e.targets)}
            listed = tuple(image for image in listed if image in named)
        examples += mine
        galleries[name] = Gallery(listed, with_reference=True)
        counts[f"{split} {category} queries"] = Count(len(mine), QUERIES[category][split])
        of_val = GALLERIES[gallery][category] if split == "val" else None
        counts[f"{split} {category} gallery {gallery}"] = Count(len(listed), of_val)
    check_examples("fashioniq", examples, galleries)
    told = judge(
        "fashioniq",
        folder,
        counts,
        recognised=known_by_one(
            [mark for s in chosen for mark in MARKS[s]], {e.reference for e in examples}
        ),
        check=check,
        source=SOURCE,
    )
    images = dict.fromkeys(image for g in galleries.values() for image in g.images)
    records = tuple(
        image_record(image, _places(folder, image), follow_links=follow_links) for image in images
    )
    if require_images:
        require_some_image("fashioniq", records, f"{SOURCE}; {WITHOUT}", of=" and ".join(chosen))
        told["images missing"] = _missing(folder, images)
    return Dataset(
        name="fashioniq",
        images=records,
        texts=tuple(texts),
        tasks=Tasks(composed=tuple(examples), galleries=galleries),
        decode=decode_rule(upright=False),
        counts=told
        | {"queries with an empty caption": f"{empty:,}"}
        | ({} if require_images else NOT_LOOKED_FOR),
        root=str(folder),
    )


def clean(caption: str) -> str:
    """A caption without the characters `.?,` and blanks at its ends.

    >>> clean(" is blue, with a different character. ")
    'is blue, with a different character'
    """
    return caption.strip().strip(CLEAN)


def miniature(root: str | Path) -> Path:
    """Four images for each category and split, three of them in its triplets; one image is a shirt and a top."""
    root = Path(root)
    for part in ("captions", "image_splits", "images"):
        (root / part).mkdir(parents=True)
    for i, category in enumerate(CATEGORIES):
        for j, split in enumerate(SPLITS):
            names = [f"B0{category[:2].upper()}{split[0].upper()}000{k}" for k in range(4)]
            if (category, split) == ("toptee", "val"):
                names[0] = "B0SHV0001"
            for k, name in enumerate(names):
                Image.new("RGB", (24, 30 + k), (70 * i, 80 * j, 60 * k)).save(
                    root / f"images/{name}.jpg"
                )
            rows = [
                {
                    "target": names[1],
                    "candidate": names[0],
                    "captions": [" is red. ", "has a belt?"],
                },
                {
                    "target": names[0],
                    "candidate": names[2],
                    "captions": ["shorter, paler", "is white"],
                },
            ]
            if split == "test":
                rows = [{key: row[key] for key in ("candidate", "captions")} for row in rows]
            for part, value in (("captions/cap", rows), ("image_splits/split", names)):
                (root / f"{part}.{category}.{split}.json").write_text(json.dumps(value, indent=4))
    return root


def _read_gallery(path: Path) -> tuple[str, ...]:
    listed = tuple(text(one, str(path)) for one in read_list(path))
    check_unique("fashioniq", f"images of {path.name}", listed)
    for one in listed:
        file_name(one, str(path))
    return listed


def _captions(row: Annotation) -> tuple[str, str]:
    said = row.list("captions")
    if len(said) != 2 or not all(isinstance(one, str) for one in said):
        raise DatasetError(f"{row.place}: captions are {said!r:.80}, not two texts")
    a, b = (clean(one) for one in said)
    if not (a or b):
        raise DatasetError(f"{row.place}: both captions are empty")
    return a, b


def _wordings(name: str, said: tuple[str, str], orders: str) -> list[TextRecord]:
    pairs = (said, said[::-1]) if orders == "both" else (said,)
    return [TextRecord(f"{name}#{k}", f"{a} and {b}".strip()) for k, (a, b) in enumerate(pairs)]


def _example(
    row: Annotation,
    name: str,
    wordings: Sequence[TextRecord],
    category: str,
    split: str,
    gallery: str,
) -> ComposedExample:
    return ComposedExample(
        id=name,
        reference=row.text("candidate"),
        modifications=tuple(text.id for text in wordings),
        targets=() if split == "test" else (row.text("target"),),
        categories=(category,),
        split=split,
        gallery=gallery,
    )


def _places(root: Path, image: str) -> tuple[Place, ...]:
    return tuple((root / "images", image + suffix) for suffix in SUFFIXES)


def _missing(root: Path, images: Sequence[str] | Mapping[str, None]) -> str:
    """How many images the folder lacks, from one look at it."""
    there = set(os.listdir(root / "images"))
    gone = [i for i in images if not any(i + suffix in there for suffix in SUFFIXES)]
    first = f", e.g. {', '.join(map(repr, gone[:3]))}" if gone else ""
    return f"{len(gone):,} of {len(images):,}{first}"
