"""CIRCO: composed retrieval with several right answers, in all 123,403 unlabelled images of COCO 2017.

One record of annotations/val.json; test rows have neither target, ground truths nor aspects:
    {"reference_img_id": 271520, "target_img_id": 355099,
     "relative_caption": "shows two people and has a more colorful background",
     "shared_concept": "a girl with a traditional Chinese umbrella", "gt_img_ids": [355099, 528417, 534704], "id": 0,
     "semantic_aspects": ["cardinality", "statement_with_conjunction", "comparative_statement",
     "spatial_relations_background"]}
The gallery is COCO2017_unlabeled/annotations/image_info_unlabeled2017.json, in file order; of its entries are read
    {"images": [{"id": 8, "file_name": "000000000008.jpg"}, …]}
and the pictures lie in COCO2017_unlabeled/unlabeled2017.

Counts, A asserted on the published set, P from papers:
    queries val 220 A, test 800 A, with ids 0 … n−1 in order A; ground truths of val 1–14 A, 916 in all A (mean 4.16);
    gallery 123,403 P
Traps: the published loader pads ground truths to 23, the files do not, and padding here would be a wrong answer that
counts as right. The shared concept is no part of the modification.
Source: Baldrati et al., arXiv 2303.15247; miccunifi/CIRCO at 267b5c9. Annotations CC BY-NC 4.0; images under the terms
of COCO.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from cache_builder.datasets.base import ComposedExample, Dataset, Gallery, Tasks, TextRecord
from cache_builder.datasets.checking import (
    Count,
    check_options,
    file_name,
    judge,
    known_by_one,
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
    as_annotation,
    check_examples,
    check_unique,
    read_rows,
    require_files,
    some_of,
)
from cache_builder.images import decode_rule
from cache_builder.records import DatasetError, read_json

ASPECTS = (
    "cardinality",
    "addition",
    "negation",
    "direct_addressing",
    "compare_change",
    "comparative_statement",
    "statement_with_conjunction",
    "spatial_relations_background",
    "viewpoint",
)

QUERIES = {"val": 220, "test": 800}
TRUTHS = {"fewest": 1, "most": 14, "in all": 916}
GALLERY = 123403

MARKS: Mapping[str, Sequence[int]] = {
    "val": (358023, 453004, 213941, 100047, 515554, 364450),
    "test": (297636, 509353, 198461, 76800, 234172, 87575),
}
"""References of the published queries."""

LIST = "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json"
PICTURES = "COCO2017_unlabeled/unlabeled2017"

SOURCE = (
    "get annotations/ from github.com/miccunifi/CIRCO, and unlabeled2017.zip with image_info_unlabeled2017.zip from "
    "images.cocodataset.org, unpacked below ROOT/COCO2017_unlabeled"
)


def load(
    root: str | Path | None,
    *,
    splits: str | Sequence[str] = ("val", "test"),
    check: str = "auto",
    require_images: bool = True,
    follow_links: bool = False,
) -> Dataset:
    """CIRCO: one gallery, "unlabeled2017", for all queries, with the reference in it.

    Args:
        root: the folder described above.
        splits: of val and test, which to read; a text lists them with commas. Both ask the same gallery.
        check: "official" asserts the published counts, "none" does not, "auto" does if the queries have the
            references of the published ones.
        require_images: false for texts and tasks only. No image need be there, nor their list: without it the gallery
            is what the annotations name, and is called "annotated".
        follow_links: open images through links that leave their folder.

    Raises:
        DatasetNotFound: part of the layout is missing.
        DatasetError: a row is malformed, or the counts are not the published ones.
        UnknownName: no such split or check.
    """
    check_options(check=check, require_images=require_images, follow_links=follow_links)
    chosen = some_of("splits", splits, tuple(QUERIES))
    wanted = [f"annotations/{split}.json" for split in chosen] + [LIST] * require_images
    remedy = (
        "Or name with splits= those that are there; "
        "require_images=false does without images and their list"
    )
    folder = require_files("circo", root, wanted, SOURCE, remedy)
    rows = {split: read_rows(folder / f"annotations/{split}.json") for split in chosen}
    whole = (folder / LIST).is_file()
    gallery = "unlabeled2017" if whole else "annotated"
    examples = [_example(row, split, gallery) for split in chosen for row in rows[split]]
    for split in chosen:
        check_unique("circo", f"ids of {split}", (e.id for e in examples if e.split == split))
    if whole:
        places = _read_list(folder)
    else:
        named = dict.fromkeys(i for e in examples for i in (e.reference, *e.targets))
        places = {i: ((folder / PICTURES, f"{int(i):012d}.jpg"),) for i in named}
    galleries = {gallery: Gallery(tuple(places), with_reference=True)}
    check_examples("circo", examples, galleries)
    told = judge(
        "circo",
        folder,
        _counts(rows, examples, len(places) if whole else None),
        recognised=known_by_one(
            [(s, mark) for s in chosen for mark in MARKS[s]],
            {(s, row.number("reference_img_id")) for s in chosen for row in rows[s]},
        ),
        check=check,
        source=SOURCE,
    )
    if not whole:
        told["gallery"] = f"{len(places):,}, only what the annotations name: there is no {LIST}"
    images = tuple(image_record(i, p, follow_links=follow_links) for i, p in places.items())
    if require_images:
        require_some_image("circo", images, f"{SOURCE}; {WITHOUT}", of="unlabeled2017")
    return Dataset(
        name="circo",
        images=images,
        texts=tuple(
            TextRecord(f"{split}/{row.number('id')}", row.text("relative_caption"))
            for split in chosen
            for row in rows[split]
        ),
        tasks=Tasks(composed=tuple(examples), galleries=galleries),
        decode=decode_rule(upright=False),
        counts=told | ({} if require_images else NOT_LOOKED_FOR),
        root=str(folder),
    )


def miniature(root: str | Path) -> Path:
    """Six images in no order of their numbers; two val queries with two and one ground truths, one test query."""
    root = Path(root)
    numbers = (900000000042, 7, 900000000007, 31, 8, 120)
    for path in (root / "annotations", root / PICTURES, (root / LIST).parent):
        path.mkdir(parents=True)
    for i, number in enumerate(numbers):
        Image.new("RGB", (33, 28 + i), (30 * i, 90, 250 - 40 * i)).save(
            root / PICTURES / f"{number:012d}.jpg"
        )
    listed = [
        {"license": 3, "file_name": f"{n:012d}.jpg", "height": 28, "width": 33, "id": n}
        for n in numbers
    ]
    (root / LIST).write_text(json.dumps({"info": {"year": 2017}, "images": listed}))
    asked = [
        {
            "reference_img_id": 7,
            "relative_caption": "has two dogs ",
            "shared_concept": "a dog",
            "id": 0,
        },
        {
            "reference_img_id": 8,
            "relative_caption": "is seen from above",
            "shared_concept": "a car",
            "id": 1,
        },
    ]
    answers = [
        {
            "target_img_id": 31,
            "gt_img_ids": [31, 900000000042],
            "semantic_aspects": ["cardinality", "addition"],
        },
        {"target_img_id": 120, "gt_img_ids": [120], "semantic_aspects": ["viewpoint"]},
    ]
    both = [a | b for a, b in zip(asked, answers, strict=True)]
    for split, rows in (("val", both), ("test", asked[:1])):
        (root / f"annotations/{split}.json").write_text(json.dumps(rows, indent=4))
    return root


def _read_list(root: Path) -> dict[str, tuple[Place, ...]]:
    """Image → where it lies, in file order."""
    path = root / LIST
    found: dict[str, tuple[Place, ...]] = {}
    for number, raw in enumerate(as_annotation(read_json(path), str(path)).list("images")):
        row = as_annotation(raw, f"{path} image {number}")
        image = str(row.number("id"))
        if image in found:
            raise DatasetError(f"{row.place}: id {image} occurs twice")
        found[image] = ((root / PICTURES, file_name(row.text("file_name"), row.place)),)
    return found


def _example(row: Annotation, split: str, gallery: str) -> ComposedExample:
    targets: tuple[int, ...] = ()
    aspects: tuple[str, ...] = ()
    if split != "test":
        truths, first = row.numbers("gt_img_ids"), row.number("target_img_id")
        if len(set(truths)) != len(truths) or first not in truths:
            raise DatasetError(
                f"{row.place}: gt_img_ids {truths!r:.200} are not different images with the target {first}"
            )
        targets = (first, *(one for one in truths if one != first))
        aspects = row.texts("semantic_aspects")
        if not set(aspects) <= set(ASPECTS):
            unknown = next(a for a in aspects if a not in ASPECTS)
            raise DatasetError(
                f"{row.place}: semantic aspect {unknown!r} is not one of {', '.join(ASPECTS)}"
            )
    return ComposedExample(
        id=str(row.number("id")),
        reference=str(row.number("reference_img_id")),
        modifications=(f"{split}/{row.number('id')}",),
        targets=tuple(map(str, targets)),
        categories=aspects,
        split=split,
        gallery=gallery,
    )


def _counts(
    rows: Mapping[str, Sequence[Annotation]],
    examples: Sequence[ComposedExample],
    gallery: int | None,
) -> dict[str, Count]:
    counts: dict[str, Count] = {}
    for split, read in rows.items():
        counts[f"{split} queries"] = Count(len(read), QUERIES[split])
        in_place = sum(row.number("id") == place for place, row in enumerate(read))
        counts[f"{split} ids in order"] = Count(in_place, QUERIES[split])
        if split != "test":
            ahead = sum(r.numbers("gt_img_ids")[0] == r.number("target_img_id") for r in read)
            counts[f"{split} ground truths that begin with the target"] = Count(
                ahead, QUERIES[split]
            )
    sizes = [len(e.targets) for e in examples if e.split == "val"]
    if sizes:
        found = {"fewest": min(sizes), "most": max(sizes), "in all": sum(sizes)}
        counts |= {f"val ground truths, {k}": Count(n, TRUTHS[k]) for k, n in found.items()}
    if gallery is not None:
        counts["gallery"] = Count(gallery, GALLERY, asserted=False)
    return counts
