"""MIT-States: natural objects in 115 states, the oldest CZSL benchmark; about 70 % of its labels are reported noisy.

One row of the metadata:
    {"image": "ancient_building/Nicolaus_5.jpg", "attr": "ancient", "obj": "building", "set": "train"}
A line of a pair file: `ancient building`. Image folders have spaces ("ancient building"), the metadata underscores.

Counts, A asserted on the published set, P from papers:
    attrs  objs  pairs  train  unseen  open world  train images | val pairs   test pairs   val / test images
    115 A  245 A 1962 A 1262 A  700 A     28175 A       30338 A | 300 + 300 P 400 + 400 P  10420 / 12995 P
Closed-world candidates: val 1562, test 1662, both P. Homographs: none, A.
Source: Isola, Lim, Adelson, CVPR 2015; split of Purushwalkam et al. 2019 (ExplainableML/czsl at 716b074 reads it).
"""

from pathlib import Path

from cache_builder.datasets.base import Dataset
from cache_builder.datasets.composition_counts import Counts
from cache_builder.datasets.composition_files import row, space_or_underscore, write_miniature
from cache_builder.datasets.compositions import Layout, read_compositions

OFFICIAL = Counts(
    attrs=115,
    objs=245,
    pairs=1962,
    train_pairs=1262,
    unseen_pairs=700,
    open_world_pairs=28175,
    train_images=30338,
    homographs=(),
)

PAPERS = {
    "val pairs": "300 + 300",
    "test pairs": "400 + 400",
    "val candidates, closed": "1,562",
    "test candidates, closed": "1,662",
    "val images": "10,420",
    "test images": "12,995",
}
"""Printed beside what is found, never asserted."""

MARKS = frozenset(
    {
        ("attr", "caramelized"),
        ("attr", "moldy"),
        ("attr", "verdant"),
        ("attr", "windblown"),
        ("attr", "unripe"),
        ("obj", "armor"),
        ("obj", "bathroom"),
        ("obj", "iguana"),
        ("obj", "persimmon"),
        ("obj", "tiger"),
    }
)
"""Five attributes and five objects that hardly another set has together."""

LAYOUT = Layout(
    name="mit_states",
    official=OFFICIAL,
    marks=MARKS,
    source=(
        "get the images (release_dataset.zip) from web.mit.edu/phillipi/Public/states_and_transformations "
        "and unpack them as ROOT/images; pair files and metadata come in "
        "compositional_split_natural.tar.gz, fetched by utils/download_data.sh of github.com/ExplainableML/czsl"
    ),
    papers=PAPERS,
    places=space_or_underscore,
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
    """MIT-States, or any set in its layout; the arguments are those of `read_compositions`.

    `check="auto"` asserts the published counts if the vocabulary is MIT-States' own, and otherwise reports
    "another set in mit_states's layout".
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
    """Six images in this layout: spaces for underscores, an NA row, a row of no listed pair, two unseen pairs."""
    root = Path(root)
    pairs = {
        "train": ["ancient building", "moldy bread", "ripe orange"],
        "val": ["ancient building", "moldy bread", "ripe bread"],
        "test": ["ripe orange", "moldy orange"],
    }
    rows = [
        ("ancient_building/a 1.jpg", "ancient", "building", "train", (120, 90, 60)),
        ("moldy_bread/b.jpg", "moldy", "bread", "train", (90, 140, 80)),
        ("ripe_orange/c.png", "ripe", "orange", "train", (250, 140, 20)),
        ("ripe_bread/d.jpg", "ripe", "bread", "val", (200, 160, 110)),
        ("moldy_orange/e.jpg", "moldy", "orange", "test", (140, 150, 70)),
        ("ripe_orange/f.jpg", "ripe", "orange", "test", (240, 150, 30)),
    ]
    table = [row(*labels) for *labels, _ in rows]
    table.append(row("NA/adj.jpg", "NA", "bread", "NA"))
    table.append(row("old_car/g.jpg", "old", "car", "train"))
    # The archive's spelling, except one folder that is spelled like the metadata.
    pictures = {
        f"images/{image if image.startswith('moldy_bread/') else image.replace('_', ' ')}": colour
        for image, *_, colour in rows
    }
    return write_miniature(root, pairs, table, pictures)
