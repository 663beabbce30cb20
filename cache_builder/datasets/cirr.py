"""CIRR: edits between similar photographs, each of six, asked of the whole split and of the other five.

One record of captions/cap.rc2.val.json, and an entry of image_splits/split.rc2.val.json:
    {"pairid": 12060, "reference": "dev-244-0-img0", "target_hard": "dev-1028-1-img1",
     "target_soft": {"dev-1028-1-img1": 1.0}, "caption": "show three bottles of soft drink",
     "img_set": {"id": 36, "members": ["dev-430-3-img0", "dev-63-0-img1", "dev-1028-1-img1", "dev-1028-2-img1",
     "dev-244-0-img0", "dev-1028-2-img0"], "reference_rank": 2, "target_rank": 3}}
    "dev-244-0-img0": "./dev/dev-244-0-img0.png"

Counts, A asserted on the published set, P from papers:
               train      val        test (files and images say test1)
    queries    28,225 P   4,181 A    4,148 A, without targets
    images     16,939 A   2,297 A    2,315 A
Two layouts: official ROOT/{captions, image_splits, img_raw/{train/<n>, dev, test1}}, and common
ROOT/{train, dev, test1} beside ROOT/cirr/{captions, image_splits}.
Traps: val images are called dev; `target_soft` (1, 0.5, 0.2, −1) is used by no metric; `reference_rank` and
`target_rank` are no places among the members; one test caption is blank, and its query is kept with the text "".
Source: Liu et al., ICCV 2021; Cuberick-Orion/CIRR, branch cirr_dataset at 2276fba. Annotations MIT; images under the
terms of NLVR2.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from cache_builder.datasets.base import (
    ComposedExample,
    Dataset,
    Gallery,
    ImageRecord,
    Tasks,
    TextRecord,
)
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
    require_root,
    require_some_image,
)
from cache_builder.datasets.triplets import (
    Annotation,
    check_examples,
    check_unique,
    read_rows,
    require_files,
    some_of,
)
from cache_builder.images import decode_rule
from cache_builder.records import DatasetError, DatasetNotFound, read_json

FILES = {"train": "train", "val": "val", "test": "test1"}
FOLDERS = {"train": "train", "val": "dev", "test": "test1"}
"""What a split is called in the names of the annotation files, and of the image folders."""

QUERIES = {"train": 28225, "val": 4181, "test": 4148}
IMAGES = {"train": 16939, "val": 2297, "test": 2315}

MARKS: Mapping[str, Sequence[str]] = {
    "train": ("train-1706-2-img0", "train-9981-1-img0", "train-1232-1-img1", "train-1804-0-img1"),
    "val": ("dev-740-0-img1", "dev-982-0-img1", "dev-146-0-img0", "dev-105-3-img1"),
    "test": ("test1-121-1-img1", "test1-1044-2-img1", "test1-171-2-img1", "test1-497-1-img0"),
}
"""Images of the published splits."""

LAYOUTS = {"official": ("", "img_raw"), "common": ("cirr", "")}
"""Folders of annotations and of images below the root."""

SOURCE = (
    "get captions and image_splits from branch cirr_dataset of github.com/Cuberick-Orion/CIRR, and the images from "
    "NLVR2 (github.com/lil-lab/nlvr) on request"
)

OPTIONS = {
    "layout": ("auto", *LAYOUTS),
}


def load(
    root: str | Path | None,
    *,
    splits: str | Sequence[str] = ("val", "test"),
    layout: str = "auto",
    check: str = "auto",
    require_images: bool = True,
    follow_links: bool = False,
) -> Dataset:
    """CIRR, rc2: per split a gallery without the reference, and the five other members of each set as subset.

    Args:
        root: a folder in one of the layouts above.
        splits: of train, val and test, which to read; a text lists them with commas. Train is not read unless asked
            for: zero-shot methods do not use it, and it has most of the images.
        layout: "official" or "common"; "auto" takes the one whose captions folder is there.
        check: "official" asserts the published counts, "none" does not, "auto" does if the images have the names of
            the published ones.
        require_images: false for texts and tasks only; then no image need be there.
        follow_links: open images through links that leave their folder.

    Raises:
        DatasetNotFound: part of the layout is missing.
        DatasetError: both layouts are there, a row is malformed, or the counts are not the published ones.
        UnknownName: no such split, layout or check.
    """
    check_options(
        OPTIONS,
        layout=layout,
        check=check,
        require_images=require_images,
        follow_links=follow_links,
    )
    chosen = some_of("splits", splits, SPLITS)
    folder = require_root("cirr", root, SOURCE)
    layout = _layout(folder) if layout == "auto" else layout
    annotations, pictures = (folder / part for part in LAYOUTS[layout])
    files = [
        f"{kind}.rc2.{FILES[s]}.json"
        for s in chosen
        for kind in ("captions/cap", "image_splits/split")
    ]
    remedy = "Or name with splits= those that are there"
    require_files("cirr", annotations, files, SOURCE, remedy)
    images: dict[str, ImageRecord] = {}
    examples: list[ComposedExample] = []
    texts: list[TextRecord] = []
    galleries: dict[str, Gallery] = {}
    counts: dict[str, Count] = {}
    for split in chosen:
        listed = {
            image: image_record(image, places, follow_links=follow_links)
            for image, places in _read_images(annotations, split, pictures).items()
        }
        rows = read_rows(annotations / f"captions/cap.rc2.{FILES[split]}.json")
        found = [_example(row, split) for row in rows]
        if require_images:
            require_some_image("cirr", [*listed.values()], f"{SOURCE}; {WITHOUT}", of=split)
        texts += [
            TextRecord(e.id, r.text("caption", empty=True))
            for e, r in zip(found, rows, strict=True)
        ]
        check_unique("cirr", "image names", (*images, *listed))
        images |= listed
        examples += found
        galleries[split] = Gallery(tuple(listed), with_reference=False)
        counts[f"{split} queries"] = Count(len(rows), QUERIES[split], asserted=split != "train")
        counts[f"{split} images"] = Count(len(listed), IMAGES[split])
    check_unique("cirr", "pairids", (e.id for e in examples))
    check_examples("cirr", examples, galleries)
    told = judge(
        "cirr",
        folder,
        counts,
        recognised=known_by_one([mark for s in chosen for mark in MARKS[s]], images),
        check=check,
        source=SOURCE,
    )
    blank = sum(not text.text for text in texts)
    return Dataset(
        name="cirr",
        images=tuple(images.values()),
        texts=tuple(texts),
        tasks=Tasks(composed=tuple(examples), galleries=galleries),
        decode=decode_rule(upright=False),
        counts=told
        | {"blank captions": f"{blank:,}", "layout": layout}
        | ({} if require_images else NOT_LOOKED_FOR),
        root=str(folder),
    )


def miniature(root: str | Path, *, layout: str = "official") -> Path:
    """Three splits of seven, six and six images, in one of the two layouts."""
    root = Path(root)
    annotations, pictures = (root / part for part in LAYOUTS[layout])
    for part in ("captions", "image_splits"):
        (annotations / part).mkdir(parents=True)
    pairid = 7
    for split, extra in (("train", 0), ("val", 1), ("test", 0)):
        stem, where = FOLDERS[split], "train/3" if split == "train" else FOLDERS[split]
        names = [f"{stem}-90{i}-{i % 4}-img{i % 2}" for i in range(6 + extra)]
        for i, name in enumerate(names):
            path = pictures / where / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (30 + 2 * i, 25), (40 * i, 200 - 30 * i, 90)).save(path)
        rows = []
        for reference, target, caption in ((0, 2, "show two more cups"), (4, 1, "mirror it ")):
            row = {"pairid": pairid, "reference": names[reference], "caption": caption}
            ranks = {"reference_rank": 1}
            if split != "test":
                row |= {
                    "target_hard": names[target],
                    "target_soft": {names[target]: 1.0, names[5]: -1.0},
                }
                ranks["target_rank"] = 4
            rows.append(row | {"img_set": {"id": 8, "members": names[:6], **ranks}})
            pairid += 2
        for part, value in (
            ("captions/cap", rows),
            ("image_splits/split", {n: f"./{where}/{n}.png" for n in names}),
        ):
            (annotations / f"{part}.rc2.{FILES[split]}.json").write_text(json.dumps(value))
    return root


def _layout(root: Path) -> str:
    """The layout whose captions folder is there."""
    there = [name for name, (part, _) in LAYOUTS.items() if (root / part / "captions").is_dir()]
    if not there:
        raise DatasetNotFound(
            f"cirr looked in {root} for captions/ (layout official) and cirr/captions/ (layout common), and found "
            f"neither; {SOURCE}"
        )
    if len(there) == 2:
        raise DatasetError(
            f"{root} holds both captions/ (layout official) and cirr/captions/ (layout common); say which one counts "
            "with layout=official or layout=common"
        )
    return there[0]


def _read_images(annotations: Path, split: str, pictures: Path) -> dict[str, tuple[Place, ...]]:
    """Image → where it lies; a path outside the split's folder is refused."""
    path = annotations / f"image_splits/split.rc2.{FILES[split]}.json"
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise DatasetError(f"{path} holds a {type(raw).__name__}, not names with their files")
    found: dict[str, tuple[Place, ...]] = {}
    for name, value in raw.items():
        place = f"{path} image {name!r:.80}"
        folder, _, rest = text(value, place).removeprefix("./").partition("/")
        if folder != FOLDERS[split]:
            raise DatasetError(f"{place} lies at {value!r:.80}, not below ./{FOLDERS[split]}/")
        found[text(name, place)] = ((pictures / folder, file_name(rest, place)),)
    return found


def _example(row: Annotation, split: str) -> ComposedExample:
    reference, members = row.text("reference"), row.inner("img_set").texts("members")
    if len(members) != 6 or len(set(members)) != 6 or reference not in members:
        raise DatasetError(
            f"{row.place}: members {members!r:.200} are not six different images with the reference {reference!r}"
        )
    targets = () if split == "test" else (row.text("target_hard"),)
    for target in targets:
        if target not in members:
            raise DatasetError(f"{row.place}: target_hard {target!r} is not among the members")
    return ComposedExample(
        id=str(row.number("pairid")),
        reference=reference,
        modifications=(str(row.number("pairid")),),
        targets=targets,
        categories=(),
        split=split,
        gallery=split,
        subset=tuple(one for one in members if one != reference),
    )
