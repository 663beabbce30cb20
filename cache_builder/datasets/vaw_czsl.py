"""VAW-CZSL: objects of Visual Genome, 440 attributes of one or several words × 541 objects; the most pairs of the four.

One row of the metadata (form; the archive's own paths are unchecked, images are looked for as written below images/):
    {"image": "2300001.jpg", "attr": "almost_empty", "obj": "bottle", "set": "train"}
A line of a pair file: `almost_empty+bottle`. Names hold `_` and `-` (`chain-link`), so only `+` separates them.

Counts, A asserted on the published set, P from papers:
    attrs  objs   pairs     train    unseen       open world  train images | val pairs      test pairs
    440 A  541 A  15785+ P  11175 A  4610-4792 P  238040 A    72203 P      | 2121 + 2322 P  2449 + 2470 P
Val / test images: 9524 / 10856, P. 15785 pairs less 11175 seen leave 4610 unseen, while val and test of the papers have
2322 + 2470 = 4792: some may be in both, and those are counted. Homographs, A: the 16 of `OFFICIAL`.
Source: Saini, Pham, Shrivastava, CVPR 2022 (nirat1606/OADis at 87fc2df reads it).
"""

from pathlib import Path

from cache_builder.datasets.base import Dataset
from cache_builder.datasets.composition_counts import Counts
from cache_builder.datasets.composition_files import row, write_miniature
from cache_builder.datasets.compositions import Layout, read_compositions

OFFICIAL = Counts(
    attrs=440,
    objs=541,
    train_pairs=11175,
    open_world_pairs=238040,
    homographs=(
        *("asphalt", "baby", "cloth", "concrete", "dirt", "glass", "gravel", "metal"),
        *("orange", "paper", "plastic", "square", "statue", "straw", "toy", "wool"),
    ),
)

PAPERS = {
    "pairs": "at least 15,785",
    "unseen pairs": "4,610 to 4,792",
    "train images": "72,203",
    "val pairs": "2,121 + 2,322",
    "test pairs": "2,449 + 2,470",
    "val images": "9,524",
    "test images": "10,856",
}
"""Printed beside what is found, never asserted."""

MARKS = frozenset(
    {
        ("attr", "almost_empty"),
        ("attr", "brushing_teeth"),
        ("attr", "chain-link"),
        ("attr", "riding_bike"),
        ("attr", "wearing_bow_tie"),
        ("obj", "cell_phone"),
        ("obj", "clock_tower"),
        ("obj", "lamp_shade"),
        ("obj", "tennis_court"),
        ("obj", "tree_trunk"),
    }
)
"""Five attributes and five objects that hardly another set has together."""

LAYOUT = Layout(
    name="vaw_czsl",
    official=OFFICIAL,
    marks=MARKS,
    source=(
        "get images, compositional-split-natural and the metadata from the VAW-CZSL folder that the README of "
        "github.com/nirat1606/OADis links to, and put them into ROOT"
    ),
    papers=PAPERS,
    separator="+",
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
    """VAW-CZSL, or any set in its layout; the arguments are those of `read_compositions`."""
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
    """Six images: `+` lines, several words by `_`, `-` and blank, a homograph, an unseen pair of both val and test."""
    pairs = {
        "train": ["almost_empty+bottle", "chain-link+fence", "toy+coffee_table"],
        "val": ["almost_empty+bottle", "long sleeved+toy", "toy+fence"],
        "test": ["chain-link+fence", "toy+fence", "almost_empty+coffee_table"],
    }
    rows = [
        ("2300001.jpg", "almost_empty", "bottle", "train", (60, 140, 90)),
        ("2300002.jpg", "chain-link", "fence", "train", (130, 130, 140)),
        ("part 2/2300003.jpg", "toy", "coffee_table", "train", (150, 100, 60)),
        ("2300004.jpg", "long sleeved", "toy", "val", (210, 90, 160)),
        ("2300005.jpg", "toy", "fence", "test", (230, 200, 40)),
        ("2300006.jpg", "almost_empty", "coffee_table", "test", (140, 95, 70)),
    ]
    table = [row(*labels) for *labels, _ in rows]
    table.append(row("2300007.jpg", "chain-link", "toy", "train"))
    pictures = {f"images/{image}": colour for image, *_, colour in rows}
    return write_miniature(Path(root), pairs, table, pictures)
