"""COCO captions in Karpathy's splits: 123,287 images of 2014 with five captions each, a few with six or seven.

One row of dataset_coco.json, under "images"; images lie in ROOT/train2014 and ROOT/val2014:
    {"filepath": "val2014", "filename": "COCO_val2014_000000391895.jpg", "imgid": 0, "split": "test",
     "sentids": [770337, …], "cocoid": 391895, "sentences": [{"tokens": ["a", "man", …], "imgid": 0, "sentid": 770337,
     "raw": "A man with a red helmet on a small moped on a dirt road. "}, …]}
Also read: a list of a split, coco_test.json or coco_karpathy_test.json, likewise train and val:
    {"image": "val2014/COCO_val2014_000000391895.jpg", "caption": ["A man with a red helmet on …", …]}

Counts, A asserted on the published set, P from papers:
             train     restval   val       test
    images   82783 P   30504 P   5000 A    5000 A
    captions                     25010 P   25010 A = 4990 × 5 + 10 × 6
Split train is train and restval. The protocol of 1,000 images (mean of five folds) is another one, and not offered.
Source: Lin et al. 2014 (arXiv 1405.0312), Chen et al. 2015 (1504.00325); splits of Karpathy and Fei-Fei, CVPR 2015.
"""

import json
from pathlib import Path

from cache_builder.datasets.base import Dataset
from cache_builder.datasets.karpathy import read_karpathy
from cache_builder.datasets.karpathy_files import Layout, draw, write_karpathy

LAYOUT = Layout(
    name="coco",
    folders=("train2014", "val2014"),
    lists=("coco_{split}.json", "coco_karpathy_{split}.json"),
    official={
        "val images": 5000,
        "test images": 5000,
        "test captions": 25010,
        "test images with 5 captions": 4990,
        "test images with 6 captions": 10,
    },
    papers={"train images": 82783, "restval images": 30504, "val captions": 25010},
    marks=frozenset(
        f"COCO_val2014_{number:012d}.jpg"
        for number in (
            391895, 206770, 428064, 399178, 456519, 378814, 114616, 468302, 299023, 455974
        )
    ),
    source=(
        "get dataset_coco.json (caption_datasets.zip of cs.stanford.edu/people/karpathy/deepimagesent), train2014.zip "
        "and val2014.zip (cocodataset.org/#download), and unpack them as ROOT/dataset_coco.json, ROOT/train2014 and "
        "ROOT/val2014"
    ),
)  # fmt: skip


def load(
    root: str | Path | None,
    *,
    with_restval: bool = True,
    captions: str = "all",
    check: str = "auto",
    follow_links: bool = False,
    require_images: bool = True,
) -> Dataset:
    """COCO's captions; the arguments are those of `read_karpathy`.

    `captions="first5"` gives the 25,000 test captions of some papers. `with_restval=False` trains on train2014 alone.
    """
    return read_karpathy(
        root,
        LAYOUT,
        with_restval=with_restval,
        captions=captions,
        check=check,
        follow_links=follow_links,
        require_images=require_images,
    )


ROWS = (
    ("train2014/COCO_train2014_000000000009.jpg", "train", ["A red mug. ", "a mug", "red", "one cup", "A cup"]),
    ("val2014/COCO_val2014_000000000042.jpg", "restval", ["A dog, and a ball.", "a \"dog\"", "dog", "pet", "A pet"]),
    ("val2014/COCO_val2014_000000000073.jpg", "val", ["A blue bus.\n", "bus", "a bus", "blue", "A Bus"]),
    ("val2014/COCO_val2014_000000000074.jpg", "test", ["Two cats.", "cats", "a pair", "two", "A cat", "six"]),
    ("train2014/COCO_train2014_000000000025.jpg", "train", ["A tree.", "tree", "a tree", "green", "A tree"]),
    ("val2014/COCO_val2014_000000000133.jpg", "test", ["A bed. ", "bed", "two", "white", "A bed"]),
)  # fmt: skip
"""Image, part and captions: one restval row, one of six captions, outer blanks, and captions that two images share."""


def miniature(root: str | Path, *, kind: str = "karpathy") -> Path:
    """Six images in the exact layout: as dataset_coco.json, or with kind "lists" as one list a split."""
    root = Path(root)
    draw(root, ROWS)
    if kind == "karpathy":
        write_karpathy(root, ROWS, LAYOUT)
        return root
    for split in ("train", "val", "test"):
        rows = [
            {"image": image, "caption": captions}
            for image, part, captions in ROWS
            if part.replace("restval", "train") == split
        ]
        (root / f"coco_{split}.json").write_text(json.dumps(rows), encoding="utf-8")
    return root
