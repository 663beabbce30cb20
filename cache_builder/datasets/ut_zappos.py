"""UT-Zappos: catalogue pictures of shoes, 16 materials × 12 kinds; the closed world of CZSL with the fewest pairs.

One row of the metadata (form; dots belong to the names, which have no suffix and no split in them):
    {"image": "Faux.Leather_Shoes.Heels/7500001.12.jpg", "_image": "Shoes/Heels/Some Brand/7500001.12.jpg",
     "attr": "Faux.Leather", "obj": "Shoes.Heels", "set": "train"}
A line of a pair file: `Faux.Leather Shoes.Heels`. `_image` is the path in the ut-zap50k-images tree, `image` the one
after every picture has been copied to images/<attr>_<obj>/; either place will do.

Counts, A asserted on the published set, P from papers:
    attrs  objs  pairs  train  unseen  open world  train images | val pairs  test pairs  val / test images
    16 A   12 A  116 A  83 A   33 A    192 A       22998 A      | 15 + 15 P  18 + 18 P   3214 / 2914 P
Closed-world candidates: val 98, test 101, both P. Homographs: none, A.
Source: Yu, Grauman, CVPR 2014; split of Purushwalkam et al. 2019 (ExplainableML/czsl at 716b074 reads it).
"""

from pathlib import Path

from cache_builder.datasets.base import Dataset
from cache_builder.datasets.composition_counts import Counts
from cache_builder.datasets.composition_files import Labels, Spelling, as_written, write_miniature
from cache_builder.datasets.compositions import Layout, read_compositions

OFFICIAL = Counts(
    attrs=16,
    objs=12,
    pairs=116,
    train_pairs=83,
    unseen_pairs=33,
    open_world_pairs=192,
    train_images=22998,
    homographs=(),
)

PAPERS = {
    "val pairs": "15 + 15",
    "test pairs": "18 + 18",
    "val candidates, closed": "98",
    "test candidates, closed": "101",
    "val images": "3,214",
    "test images": "2,914",
}
"""Printed beside what is found, never asserted."""

MARKS = frozenset(
    {
        ("attr", "Full.grain.leather"),
        ("attr", "Hair.Calf"),
        ("attr", "Nubuck"),
        ("attr", "Patent.Leather"),
        ("attr", "Sheepskin"),
        ("obj", "Boots.Knee.High"),
        ("obj", "Shoes.Boat.Shoes"),
        ("obj", "Shoes.Clogs.and.Mules"),
        ("obj", "Shoes.Loafers"),
        ("obj", "Shoes.Oxfords"),
    }
)
"""Five attributes and five objects that hardly another set has together."""

SHORT = {
    "Canvas": "canvas",
    "Cotton": "cotton",
    "Faux.Fur": "fake fur",
    "Faux.Leather": "fake leather",
    "Full.grain.leather": "full grain leather",
    "Hair.Calf": "calf hair",
    "Leather": "leather",
    "Nubuck": "nubuck",
    "Nylon": "nylon",
    "Patent.Leather": "patent leather",
    "Rubber": "rubber",
    "Satin": "satin",
    "Sheepskin": "sheepskin",
    "Suede": "suede",
    "Synthetic": "synthetic",
    "Wool": "wool",
    "Boots.Ankle": "ankle boots",
    "Boots.Knee.High": "knee high boots",
    "Boots.Mid-Calf": "mid calf boots",
    "Sandals": "sandals",
    "Shoes.Boat.Shoes": "boat shoes",
    "Shoes.Clogs.and.Mules": "clogs",
    "Shoes.Flats": "flats",
    "Shoes.Heels": "heels",
    "Shoes.Loafers": "loafers",
    "Shoes.Oxfords": "oxfords",
    "Shoes.Sneakers.and.Athletic.Shoes": "sneakers",
    "Slippers": "slippers",
}
"""Preset `short`: names as people say them, the idea of CAILA (arXiv 2305.16681); the words are our choice."""


def image_or_original(row: Labels) -> tuple[Spelling, ...]:
    """The reorganised picture, then the one in the original tree, unpacked as ROOT/_images."""
    original = row.get("_image")
    return (*as_written(row), ("_images", original)) if original else as_written(row)


LAYOUT = Layout(
    name="ut_zappos",
    official=OFFICIAL,
    marks=MARKS,
    source=(
        "get ut-zap50k-images.zip from vision.cs.utexas.edu/projects/finegrained/utzap50k and unpack its folder as "
        "ROOT/_images; pair files and metadata come in compositional_split_natural.tar.gz, fetched by "
        "utils/download_data.sh of github.com/ExplainableML/czsl"
    ),
    papers=PAPERS,
    places=image_or_original,
    folders=("images", "_images"),
    step=(
        "a step of the set-up is missing: unpack the folder of ut-zap50k-images.zip as ROOT/_images, "
        "or copy the file of each row's _image to ROOT/images/<attr>_<obj>/"
    ),
    short=SHORT,
)


def load(
    root: str | Path | None,
    *,
    world: str = "closed",
    names: str = "plain",
    check: str = "auto",
    require_images: bool = True,
    follow_links: bool = False,
) -> Dataset:
    """UT-Zappos, or any set in its layout; the arguments are those of `read_compositions`.

    `names` may also be "short", see `SHORT`, where all names are UT-Zappos' own.
    """
    return read_compositions(
        root,
        LAYOUT,
        world=world,
        names=names,
        check=check,
        require_images=require_images,
        follow_links=follow_links,
    )


def miniature(root: str | Path) -> Path:
    """Six images: dotted names, capitals and a name without, one picture only below _images/, one in both, NA."""
    pairs = {
        "train": ["kidskin Slippers", "Suede Boots.Mid-Calf", "Faux.Leather Shoes.Heels"],
        "val": ["Suede Boots.Mid-Calf", "Suede Shoes.Heels"],
        "test": ["Faux.Leather Shoes.Heels", "kidskin Shoes.Sneakers.and.Athletic.Shoes"],
    }
    rows = [
        ("7000001.11.jpg", "Boots/Mid-Calf/North & South", "Suede", "Boots.Mid-Calf", "train"),
        ("7000002.4.jpg", "Shoes/Heels/Ann B.", "Faux.Leather", "Shoes.Heels", "train"),
        ("7000003.72.jpg", "Slippers/Slipper Flats/Home", "kidskin", "Slippers", "train"),
        ("7000004.5.jpg", "Shoes/Heels/Ann B.", "Suede", "Shoes.Heels", "val"),
        ("7000005.9.jpg", "Shoes/Heels/Ann B.", "Faux.Leather", "Shoes.Heels", "test"),
        (
            "7000006.1.jpg",
            "Shoes/Sneakers and Athletic Shoes/Run",
            "kidskin",
            "Shoes.Sneakers.and.Athletic.Shoes",
            "test",
        ),
    ]
    colours = [(90, 60, 30), (200, 30, 60), (120, 20, 90), (110, 80, 50), (190, 40, 70), (60, 20, 150)]  # fmt: skip
    table = [
        {"image": f"{attr}_{obj}/{file}", "_image": f"{tree}/{file}", "attr": attr, "obj": obj, "set": split}
        for file, tree, attr, obj, split in rows
    ]  # fmt: skip
    table.append(table[0] | {"image": "NA_Sandals/7000007.3.jpg", "attr": "NA", "obj": "Sandals"})
    pictures = {f"images/{row['image']}": c for row, c in zip(table, colours, strict=False)}
    del pictures[f"images/{table[2]['image']}"]  # this one was never copied
    pictures |= {f"_images/{table[i]['_image']}": colours[i] for i in (1, 2)}
    return write_miniature(Path(root), pairs, table, pictures)
