"""Flickr30k in Karpathy's splits: 31,014 photos with five captions each.

One row of dataset_flickr30k.json, under "images"; images lie in ROOT/images:
    {"filename": "1007129816.jpg", "imgid": 67, "split": "test", "sentids": [335, …], "sentences": [{"imgid": 67,
     "tokens": ["the", "man", …], "raw": "The man with pierced ears is wearing …", "sentid": 335}, …]}
Also read: a file of a split, flickr30k_test.json in either spelling, or flickr30k_test_karpathy.txt; so train and val:
    {"split": "test", "image_name": "1007129816.jpg", "captions": ["The man with pierced ears …", …]}
    {"image": "flickr30k-images/1007129816.jpg", "caption": [text, …]}         images lie in ROOT/flickr30k-images
    1007129816.jpg,The man with pierced ears is wearing glasses and an orange hat.           below a header

Counts, A asserted on the published set, P from papers:
             train     val       test
    images   29000 P   1014 A    1000 A
    captions                     5000 A
Source: Young et al., TACL 2014; splits of Karpathy and Fei-Fei, CVPR 2015; the lines are those of CLIP_benchmark.
"""

import json
from pathlib import Path

from cache_builder.datasets.base import Dataset
from cache_builder.datasets.checking import SPLITS
from cache_builder.datasets.karpathy import read_karpathy
from cache_builder.datasets.karpathy_files import Layout, draw, write_karpathy

LAYOUT = Layout(
    name="flickr30k",
    folders=("images", "flickr30k-images"),
    lists=("flickr30k_{split}.json", "flickr30k_{split}_karpathy.txt"),
    official={"val images": 1014, "test images": 1000, "test captions": 5000},
    papers={"train images": 29000},
    marks=frozenset(
        f"{number}.jpg"
        for number in (
            1007129816, 2064792226, 2661138991, 3023339840, 3478547247,
            3999246475, 4604969760, 4859764297, 5986222648, 97234558,
        )
    ),
    source=(
        "get dataset_flickr30k.json (caption_datasets.zip of cs.stanford.edu/people/karpathy/deepimagesent) and the "
        "images (flickr30k-images.tar.gz, by the form at shannon.cs.illinois.edu/DenotationGraph), and unpack them as "
        "ROOT/dataset_flickr30k.json and ROOT/images"
    ),
)  # fmt: skip


def load(
    root: str | Path | None,
    *,
    captions: str = "all",
    check: str = "auto",
    follow_links: bool = False,
    require_images: bool = True,
) -> Dataset:
    """Flickr30k's captions; the arguments are those of `read_karpathy`."""
    return read_karpathy(
        root,
        LAYOUT,
        captions=captions,
        check=check,
        follow_links=follow_links,
        require_images=require_images,
    )


ROWS = (
    ("1001.jpg", "train", ["A man, in a hat. ", "man", "a man", "hat", "A hat"]),
    ("1002.jpg", "val", ["A \"red\" kite.", "kite", "a kite", "red", "A kite"]),
    ("1003.jpg", "test", ["Two dogs run.", "dogs", "two", "they run, fast", "A dog", "six"]),
    ("1004.jpg", "test", ["A cat named a.jpg, asleep", "cat", "two", "asleep", "A cat"]),
)  # fmt: skip
"""Image, part and captions: commas, quotes, outer blanks, six captions, and a caption that two images share."""


def miniature(root: str | Path, *, kind: str = "karpathy") -> Path:
    """Four images in the exact layout: dataset_flickr30k.json, or one file a split: kind "lists" (JSON) or "lines"."""
    root = Path(root)
    draw(root, ROWS)
    if kind == "karpathy":
        write_karpathy(root, ROWS, LAYOUT)
        return root
    for split in SPLITS:
        rows = [(image, captions) for image, part, captions in ROWS if part == split]
        listed = [{"split": split, "image_name": i, "captions": captions} for i, captions in rows]
        lines = [
            "image,caption",
            *(f"{i},{caption}" for i, captions in rows for caption in captions),
            "",
        ]
        name, text = {
            "lists": (f"flickr30k_{split}.json", json.dumps(listed, indent=1)),
            "lines": (f"flickr30k_{split}_karpathy.txt", "\n".join(lines)),
        }[kind]
        (root / name).write_text(text, encoding="utf-8")
    return root
