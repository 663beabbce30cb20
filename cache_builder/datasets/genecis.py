"""GeneCIS: which of about 15 images agrees with the reference in one named respect; four zero-shot tasks.

One record of genecis/change_object.json (COCO val2017), and an image as attribute tasks name it (Visual Genome 1.2):
    {"condition": "wall", "reference": {"val_image_id": 189213}, "target": {"val_image_id": 153527},
     "gallery": [{"val_image_id": 121506}, … 14]}
    {"image_id": 2317429, "instance_bbox": [12, 30, 100, 80]}     x, y, width, height of an object, in pixels
Pictures: val2017/%012d.jpg; VG_100K_all/<image_id>.jpg, or else VG_100K or VG_100K_2.

Counts, A asserted on the published set, P from papers:
                   focus_attribute   change_attribute   focus_object   change_object
    rows           1,998 P           2,112 P            1,960 A        1,960 A
    distractors    9 P               14 P               14 A           14 A
Traps: the target comes first, so ties must count against it. An attribute image is a crop, lop-sided on purpose: see
`crop_box`. One row of change_object lists its target among the distractors too; it competes once. A condition is one
word or two, and no prompt is made of it here.
Source: Vaze, Carion, Misra, CVPR 2023; facebookresearch/genecis at 0c5c968, CC BY-NC 4.0; images under the terms of
COCO and Visual Genome.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from cache_builder.datasets.base import ComposedExample, Dataset, ImageRecord, Tasks, TextRecord
from cache_builder.datasets.checking import Count, check_options, judge, known_by_one
from cache_builder.datasets.files import (
    NOT_LOOKED_FOR,
    WITHOUT,
    Place,
    first_path,
    image_record,
    require_some_image,
)
from cache_builder.datasets.triplets import (
    Annotation,
    as_annotation,
    check_examples,
    read_rows,
    require_files,
    some_of,
)
from cache_builder.images import MAX_PIXELS, MAX_SIDE, BadImage, decode_rule, image_size, open_image
from cache_builder.records import DatasetError

TASKS = ("focus_attribute", "change_attribute", "focus_object", "change_object")

ROWS = {
    "focus_attribute": 1998,
    "change_attribute": 2112,
    "focus_object": 1960,
    "change_object": 1960,
}
DISTRACTORS = {
    "focus_attribute": 9,
    "change_attribute": 14,
    "focus_object": 14,
    "change_object": 14,
}

MARKS: Mapping[str, Sequence[tuple[str, str]]] = {
    "focus_object": (
        ("435081", "305609"),
        ("302536", "492758"),
        ("129062", "151938"),
        ("416534", "166166"),
    ),
    "change_object": (
        ("435081", "305609"),
        ("302536", "492758"),
        ("129062", "151938"),
        ("416534", "166166"),
    ),
}
"""References and targets of published rows."""

COCO = "val2017"
GENOME = ("VG_100K_all", "VG_100K", "VG_100K_2")
"""Image folders; a picture of Visual Genome lies in the first that has it."""

DILATION = 0.7
"""By what share of its width and height a box grows."""

SOURCE = (
    "get the folder genecis/ of github.com/facebookresearch/genecis, val2017.zip from images.cocodataset.org as "
    "ROOT/val2017, and for the attribute tasks the images of Visual Genome 1.2 (visualgenome.org) as ROOT/VG_100K and "
    "ROOT/VG_100K_2"
)

Box = tuple[float, float, float, float]


def load(
    root: str | Path | None,
    *,
    tasks: str | Sequence[str] = TASKS,
    check: str = "auto",
    require_images: bool = True,
    follow_links: bool = False,
) -> Dataset:
    """GeneCIS, split test: every row ranks its own candidates, the target before its distractors; there is no gallery.

    Args:
        root: the folder described above.
        tasks: which of the four to read; a text lists them with commas. Their mean needs all four.
        check: "official" asserts the published counts, "none" does not, "auto" does if the object tasks hold
            published rows. Nothing is asserted of attribute tasks.
        require_images: false for texts and tasks only; then no image need be there.
        follow_links: open images through links that leave their folder.

    Raises:
        DatasetNotFound: part of the layout is missing.
        DatasetError: a row is malformed, or the counts are not the published ones.
        UnknownName: no such task or check.
    """
    check_options(check=check, require_images=require_images, follow_links=follow_links)
    chosen = some_of("tasks", tasks, TASKS)
    remedy = "Or name the tasks that are there, e.g. tasks=focus_object,change_object"
    wanted = [f"genecis/{task}.json" for task in chosen]
    folder = require_files("genecis", root, wanted, SOURCE, remedy)
    images: dict[str, ImageRecord] = {}
    files: dict[str, list[ImageRecord]] = {"COCO": [], "Visual Genome": []}
    conditions: dict[str, None] = {}
    examples: list[ComposedExample] = []
    counts: dict[str, Count] = {}
    repeated = 0
    for task in chosen:
        rows = read_rows(folder / f"genecis/{task}.json")
        expected = partial(Count, asserted=task in MARKS)
        with_all = 0
        for number, row in enumerate(rows):
            entries = [row.inner("reference"), row.inner("target")]
            entries += [as_annotation(one, f"{row.place}: gallery") for one in row.list("gallery")]
            ids = []
            for entry in entries:
                image, where, box = _image(entry, folder, task)
                if image not in images:
                    images[image] = _record(image, where, box, follow_links)
                    whole = image_record(image, where, follow_links=follow_links)
                    files["COCO" if box is None else "Visual Genome"].append(whole)
                ids.append(image)
            condition = row.text("condition")
            conditions.setdefault(condition)
            subset = tuple(dict.fromkeys(ids[1:]))
            repeated += len(subset) < len(ids) - 1
            with_all += len(ids) - 2 == DISTRACTORS[task]
            name = f"{task}/{number}"
            examples.append(
                ComposedExample(name, ids[0], (condition,), (ids[1],), (task,), "test", "", subset)
            )
        counts[f"{task} rows"] = expected(len(rows), ROWS[task])
        counts[f"{task} rows with {DISTRACTORS[task]} distractors"] = expected(with_all, ROWS[task])
    check_examples("genecis", examples, {})
    told = judge(
        "genecis",
        folder,
        counts,
        recognised=known_by_one(
            [(t, *mark) for t in chosen for mark in MARKS.get(t, ())],
            {(e.categories[0], e.reference, e.targets[0]) for e in examples},
        ),
        check=check,
        source=SOURCE,
    )
    if require_images:
        for what, listed in files.items():
            require_some_image("genecis", listed, f"{SOURCE}; {WITHOUT}", of=what)
    cropped = "; " + CROP_RULE if files["Visual Genome"] else ""
    return Dataset(
        name="genecis",
        images=tuple(images.values()),
        texts=tuple(TextRecord(condition, condition) for condition in conditions),
        tasks=Tasks(composed=tuple(examples)),
        decode=decode_rule(upright=False) + cropped,
        counts=told
        | {"rows that list an image twice": f"{repeated:,}"}
        | ({} if require_images else NOT_LOOKED_FOR),
        root=str(folder),
    )


CROP_RULE = f"boxes grown by {DILATION} up and left, then down and right from there, padded to square with black"
"""How crops are made, for `Dataset.decode`."""


def crop_box(size: tuple[int, int], box: Box) -> tuple[int, int, int, int]:
    """The part of a picture that an attribute image shows: left, top, right, bottom in whole pixels.

    A box grows to the left and to the top by 0.7 of its width and height, as far as there is a picture; then it
    reaches to the right and down by 1.7 of them from where it starts now. So there is context on the right only if the
    left side ran into the edge. Halves are rounded to even, as Pillow does.

    Args:
        size: width and height of the picture.
        box: x, y, width and height of the object.

    Raises:
        BadImage: nothing of the picture is within.

    >>> crop_box((200, 100), (100, 10, 20, 30))
    (86, 0, 120, 51)
    """
    starts, ends = [], []
    for length, start, extent in zip(size, box[:2], box[2:], strict=True):
        begin = max(0, start - DILATION * extent)
        starts.append(round(begin))
        ends.append(round(min(length, begin + (1 + DILATION) * extent)))
    left, top, right, bottom = (*starts, *ends)
    if left >= right or top >= bottom:
        raise BadImage(f"box {box} shows nothing of a picture of {size[0]} × {size[1]} pixels")
    if max(right - left, bottom - top) ** 2 > MAX_PIXELS:
        raise BadImage(f"box {box} padded to a square has more than {MAX_PIXELS:,} pixels")
    return left, top, right, bottom


def crop(picture: Image.Image, box: Box) -> Image.Image:
    """An attribute image: `crop_box` of a picture, in the middle of a black square."""
    part = picture.crop(crop_box(picture.size, box))
    side = max(part.size)
    square = Image.new(part.mode, (side, side))
    square.paste(part, ((side - part.width) // 2, (side - part.height) // 2))
    return square


def miniature(root: str | Path) -> Path:
    """Two rows a task: three images of COCO, and two of Visual Genome in two folders with seven boxes."""
    root = Path(root)
    for part in ("genecis", COCO, *GENOME[1:]):
        (root / part).mkdir(parents=True)
    for i, number in enumerate((5, 70, 4321)):
        Image.new("RGB", (40, 30 + i), (80 * i, 120, 60)).save(root / COCO / f"{number:012d}.jpg")
    for i, (part, number) in enumerate(zip(GENOME[1:], (61, 2400001), strict=True)):
        picture = Image.linear_gradient("L").rotate(90 * i).resize((64 + i, 48)).convert("RGB")
        picture.save(root / part / f"{number}.jpg")
    coco = [{"val_image_id": n} for n in (5, 70, 4321)]
    boxes = [[20, 10, 12, 8], [0, 0, 30.5, 20], [50, 30, 14, 18]]
    genome = [{"image_id": n, "instance_bbox": box} for n in (61, 2400001) for box in boxes]
    for task in TASKS:
        of = coco if task.endswith("object") else genome
        condition = "wall" if task.endswith("object") else "color"
        rows = [
            {
                "condition": condition,
                "reference": of[i],
                "target": of[i + 1],
                "gallery": of[i + 2 :] + of[:i],
            }
            for i in (0, 1)
        ]
        (root / f"genecis/{task}.json").write_text(json.dumps(rows, indent=4))
    return root


def _image(entry: Annotation, root: Path, task: str) -> tuple[str, tuple[Place, ...], Box | None]:
    """An image's id, where its file may lie, and its box if it is a crop."""
    if task.endswith("object"):
        number = entry.number("val_image_id")
        return str(number), ((root / COCO, f"{number:012d}.jpg"),), None
    number, box = entry.number("image_id"), _box(entry)
    image = f"{number}@" + ",".join(str(int(v) if v == int(v) else v) for v in box)
    return image, tuple((root / part, f"{number}.jpg") for part in GENOME), box


def _box(entry: Annotation) -> Box:
    values = entry.list("instance_bbox")
    if (
        len(values) != 4
        or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        or not all(abs(v) < MAX_SIDE for v in values)
        or min(values[2:]) <= 0
    ):
        raise DatasetError(
            f"{entry.place}: instance_bbox is {values!r:.80}, not x, y, width and height in pixels"
        )
    x, y, width, height = (float(v) for v in values)
    return x, y, width, height


def _record(image: str, where: Sequence[Place], box: Box | None, follow_links: bool) -> ImageRecord:
    if box is None:
        return image_record(image, where, follow_links=follow_links)
    first = partial(first_path, tuple(where), follow_links)
    # No path: two crops of one file are two pictures.
    return ImageRecord(image, partial(_open_crop, first, box), partial(_measure_crop, first, box))


def _open_crop(first: partial[Path], box: Box) -> Image.Image:
    return crop(open_image(first()), box)


def _measure_crop(first: partial[Path], box: Box) -> tuple[int, int]:
    left, top, right, bottom = crop_box(image_size(first()), box)
    side = max(right - left, bottom - top)
    return side, side
