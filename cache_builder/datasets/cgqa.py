"""C-GQA: crops of everyday scenes, 413 attributes × 674 objects; few images a pair, and the largest open world.

One row of the metadata; images lie flat below images/:
    {"image": "2386621-3-delicious-picnic.jpg", "attr": "delicious", "obj": "picnic", "set": "val"}
A line of a pair file: `delicious picnic`. Only the updated archive is read: papers that tell of 453 attributes and 870
objects mean the old one.

Counts, A asserted on the published set, P from papers:
    attrs  objs   pairs   train   unseen  open world  train / all images | val pairs      test pairs   val / test images
    413 A  674 A  7767 A  5592 A  2175 A  278362 A    26920 / 39298 A    | 1040 + 1252 P  888 + 923 P  7280 / 5098 P
Papers print the two numbers of val the other way round, 1252 seen + 1040 unseen, but 2175 unseen less 923 of test are
1252. Closed-world candidates: val 6844, test 6515, both P. 4524 pairs have exactly one image (A), so the median is one.
Homographs, A: the 14 of `OFFICIAL`. Source: Naeem et al., CVPR 2021 (ExplainableML/czsl at 716b074 reads it).
"""

from pathlib import Path

from cache_builder.datasets.base import Dataset
from cache_builder.datasets.composition_counts import Counts
from cache_builder.datasets.composition_files import row, write_miniature
from cache_builder.datasets.compositions import Layout, read_compositions

OFFICIAL = Counts(
    attrs=413,
    objs=674,
    pairs=7767,
    train_pairs=5592,
    unseen_pairs=2175,
    open_world_pairs=278362,
    train_images=26920,
    images=39298,
    pairs_of_one_image=4524,
    homographs=(
        *("banana", "baseball", "chocolate", "computer", "orange", "park", "railroad"),
        *("snow", "strawberry", "street", "toilet", "tomato", "trash", "wool"),
    ),
)

PAPERS = {
    "val pairs": "1,040 + 1,252, printed the other way round: 7,767 - 5,592 - 923 = 1,252 are unseen",
    "test pairs": "888 + 923",
    "val candidates, closed": "6,844",
    "test candidates, closed": "6,515",
    "val images": "7,280",
    "test images": "5,098",
}
"""Printed beside what is found, never asserted."""

MARKS = frozenset(
    {
        ("attr", "clumped"),
        ("attr", "evergreen"),
        ("attr", "inflatable"),
        ("attr", "outstretched"),
        ("attr", "upholstered"),
        ("obj", "antelope"),
        ("obj", "coleslaw"),
        ("obj", "milkshake"),
        ("obj", "parachute"),
        ("obj", "radiator"),
    }
)
"""Five attributes and five objects that hardly another set has together."""

LAYOUT = Layout(
    name="cgqa",
    official=OFFICIAL,
    marks=MARKS,
    source=(
        "get cgqa-updated.zip (images, pair files and metadata; not the older archive of 453 attributes), fetched by "
        "utils/download_data.sh of github.com/ExplainableML/czsl, and unpack it as ROOT"
    ),
    papers=PAPERS,
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
    """C-GQA, or any set in its layout; the arguments are those of `read_compositions`."""
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
    """Six flat images: the homograph orange, a pair that val and test share with train, an NA row."""
    pairs = {
        "train": ["orange fruit", "ripe orange", "wet street"],
        "val": ["wet street", "wet orange"],
        "test": ["ripe orange", "orange street", "orange orange"],
    }
    rows = [
        ("1000001-0-orange-fruit.jpg", "orange", "fruit", "train", (240, 130, 30)),
        ("1000001-1-ripe-orange.jpg", "ripe", "orange", "train", (250, 150, 40)),
        ("1000002-0-wet-street.jpg", "wet", "street", "train", (80, 90, 110)),
        ("1000003-2-wet-orange.jpg", "wet", "orange", "val", (220, 140, 60)),
        ("1000004-0-orange-street.jpg", "orange", "street", "test", (160, 110, 80)),
        ("1000005-7-orange-orange.jpg", "orange", "orange", "test", (255, 140, 0)),
    ]
    table = [row(*labels) for *labels, _ in rows]
    table.append(row("1000006-0-wet-fruit.jpg", "wet", "fruit", "NA"))
    pictures = {f"images/{image}": colour for image, *_, colour in rows}
    return write_miniature(Path(root), pairs, table, pictures)
