"""Any data with two images and two captions a row, where caption i is of image i: Winoground, or your own. Test only.

One record of ROOT/data.jsonl; pictures are names of files below ROOT/images, or in parquet also encoded bytes:
    {"id": "0", "image_0": "ex_0_img_0.png", "image_1": "ex_0_img_1.png",
     "caption_0": "an old person kisses a young person", "caption_1": "a young person kisses an old person",
     "category": "Relation"}

Counts: none asserted. Printed beside what was found (P): winoground 400 rows; bivlc 2,933 (its reader asserts them).
Winoground (arXiv 2204.03162) is gated and for research only; its category is the column collapsed_tag.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from cache_builder.datasets.base import Dataset, Tasks
from cache_builder.datasets.checking import check_options
from cache_builder.datasets.files import require_root
from cache_builder.datasets.two_images import Columns, Pictures, read_two_images
from cache_builder.errors import UnknownName
from cache_builder.images import UnsafeName, check_name, decode_rule
from cache_builder.records import DatasetError, DatasetNotFound

KEYS = ("image_0", "image_1", "caption_0", "caption_1", "category", "id")
SUFFIXES = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True, slots=True)
class Preset:
    """What a known set calls its columns, and where it lies.

    Attributes:
        columns: our names → those of the table, as the option `columns`.
        stems: names of the table's file, without its ending.
        suffixes: endings tried behind the name of a picture.
        rows: published number of rows, which is printed and not asserted.
        source: how to get it.

    """

    columns: Mapping[str, str | Sequence[str]]
    stems: tuple[str, ...]
    suffixes: tuple[str, ...]
    rows: int | None
    source: str


PRESETS = {
    "own": Preset(
        columns={},
        stems=("data",),
        suffixes=("",),
        rows=None,
        source=(
            "put the table at ROOT/data.jsonl, .csv or .parquet (columns image_0, image_1, caption_0, caption_1, and "
            "if you like id and category; columns={…} for other names) and the pictures below ROOT/images"
        ),
    ),
    "winoground": Preset(
        columns={"category": "collapsed_tag"},
        stems=("examples", "data/examples", "data"),
        suffixes=("", ".png"),  # the released table has bare stems
        rows=400,
        source=(
            "ask for access at huggingface.co/datasets/facebook/winoground; put its examples.jsonl into ROOT, and "
            "unpack images.zip as ROOT/images"
        ),
    ),
    "bivlc": Preset(
        columns={
            "image_0": "image",
            "image_1": "negative_image",
            "caption_0": "caption",
            "caption_1": "negative_caption",
            "category": ("type", "subtype"),
        },
        stems=("test", "data/test", "data"),
        suffixes=("",),
        rows=2933,
        source="the published parts are read, and their counts asserted, by the data set bivlc",
    ),
}


def load(
    root: str | Path | None,
    *,
    preset: str = "own",
    columns: Mapping[str, str | Sequence[str]] | None = None,
    table: str | None = None,
    require_images: bool = True,
    follow_links: bool = False,
) -> Dataset:
    """Rows of a table as `two_by_two` examples.

    Args:
        root: the folder of the table, and of `images` unless the table holds the pictures.
        preset: "own", or "winoground" or "bivlc" for what those call their columns.
        columns: `KEYS` → the table's own names, over those of the preset; a category may be several, joined by "_".
        table: the table's file below ROOT; None looks for the preset's.
        require_images: whether picture files are looked for; false is for work on texts alone.
        follow_links: open picture files through links that leave ROOT/images.

    Raises:
        DatasetNotFound: there is no table, no ROOT/images, or none of the pictures.
        DatasetError: several tables, a column that is not there, a malformed row, an id twice; pyarrow is missing.
        UnknownName: no such preset, or `columns` for something else.
    """
    check_options(require_images=require_images, follow_links=follow_links)
    if preset not in PRESETS:
        raise UnknownName(f"preset={preset!r} is not known; choose one of {', '.join(PRESETS)}")
    known = PRESETS[preset]
    named = _columns({**known.columns, **_checked(columns or {})})
    root = require_root("two_by_two", root, known.source)
    pictures = Pictures(
        root / "images",
        suffixes=known.suffixes,
        required=require_images,
        follow_links=follow_links,
    )
    found = read_two_images(
        "two_by_two", [_table(root, table, known)], named, pictures, known.source
    )
    categories = Counter(example.category for example in found.examples)
    counts = {"preset": preset, **found.counts}
    if known.rows is not None:
        counts["rows"] += f" (published {known.rows:,}, not asserted)"
    shown = [f"{category!r} {n:,}" for category, n in sorted(categories.items())]
    counts["categories"] = ", ".join(shown[:12]) + (", …" if len(shown) > 12 else "")
    return Dataset(
        name="two_by_two",
        images=found.images,
        texts=found.texts,
        tasks=Tasks(two_by_two=found.examples),
        decode=decode_rule(upright=False),
        counts=counts,
        root=str(root),
    )


def miniature(root: str | Path) -> Path:
    """Four rows on six pictures; one has two captions alike, one shares a picture with another, one has 0 as its id."""
    root = Path(root)
    rows = [
        (0, "a/0.png", "a/1.png", "a cup on a book", "a book on a cup", "relation"),
        ("b 1", "b.jpg", "c.jpg", " a red hat, a blue coat", "a blue hat, a red coat", "attribute"),
        ("c", "b.jpg", "d.png", "a red hat", "a dog", "object"),
        ("d", "d.png", "e.png", "it is there", "it is there ", "object"),
    ]
    table = [dict(zip(("id", *KEYS[:5]), row, strict=True)) for row in rows]
    (root / "images/a").mkdir(parents=True)
    for i, name in enumerate(["a/0.png", "a/1.png", "b.jpg", "c.jpg", "d.png", "e.png"]):
        Image.new("RGB", (40 + 3 * i, 36), (40 * i, 120, 200 - 30 * i)).save(root / "images" / name)
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    return root


def _checked(columns: Any) -> Mapping[str, str | Sequence[str]]:
    if not isinstance(columns, Mapping) or not set(columns) <= set(KEYS):
        raise UnknownName(
            f"columns={str(columns)[:80]}: it names the table's columns for some of {', '.join(KEYS)}, "
            'as {"image_0": "left"}'
        )
    for key, name in columns.items():
        several = key == "category" and isinstance(name, list | tuple) and name
        if not all(isinstance(n, str) and n for n in (name if several else [name])):
            raise UnknownName(
                f"columns: {key} is {str(name)[:60]!r}; it must be the name of a column"
            )
    return columns


def _columns(names: Mapping[str, str | Sequence[str]]) -> Columns:
    def one(key: str) -> str:
        return str(names.get(key, key))

    category = names.get("category", ())
    found = Columns(
        images=(one("image_0"), one("image_1")),
        captions=(one("caption_0"), one("caption_1")),
        category=(category,) if isinstance(category, str) else tuple(category),
        id=one("id") if "id" in names else None,
    )
    four = [*found.images, *found.captions]
    if len(set(four)) < len(four):
        raise UnknownName(f"columns: images and captions are four columns, not {', '.join(four)}")
    return found


def _table(root: Path, table: str | None, preset: Preset) -> Path:
    if table is not None:
        try:
            path = root / check_name(table)
        except UnsafeName as error:
            raise DatasetError(f"table={table!r}: {error}") from error
        if path.suffix not in SUFFIXES:
            raise DatasetError(f"table={table!r} is none of {', '.join(SUFFIXES)}")
        if not path.is_file():
            raise DatasetNotFound(f"two_by_two: there is no table {path}; {preset.source}")
        return path
    tried = [f"{stem}{suffix}" for stem in preset.stems for suffix in SUFFIXES]
    found = [name for name in tried if (root / name).is_file()]
    if not found:
        raise DatasetNotFound(
            f"two_by_two looked in {root} for {', '.join(tried)} and found none; {preset.source}"
        )
    if len(found) > 1:
        raise DatasetError(
            f"{root} holds {' and '.join(found)}; keep the one that counts, or name it with table="
        )
    return root / found[0]
