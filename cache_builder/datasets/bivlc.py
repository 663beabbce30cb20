"""BiVLC: SugarCrepe's captions with a picture for the false one too, so that images must choose as well. Test only.

One row of the published parquet files; pictures are encoded bytes, or a struct with `bytes`:
    {"image": <bytes>, "caption": "A man throwing a ball while smiling and on a field.",
     "negative_caption": "A man throwing a ball while a child is smiling on a field.", "negative_image": <bytes>,
     "type": "add", "subtype": "obj"}

Counts, all A (asserted on the published set; IMirandaM/BiVLC at 84f0d17):
    replace 2,099 = obj 1,200 + rel 462 + att 437 | add 475 = obj 399 + att 76 | swap 359 = att 278 + obj 81 | 2,933
Negative images are generated: a detector of generated pictures could score well. Built from SugarCrepe, so that the two
are no independent evidence. Source: Miranda et al., arXiv 2406.09952; data set imirandam/BiVLC, MIT licence.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from cache_builder.datasets.base import Dataset, Tasks, TextRecord
from cache_builder.datasets.checking import Count, check_options, judge, known_by_one
from cache_builder.datasets.files import require_root
from cache_builder.datasets.two_images import Columns, Pictures, read_two_images
from cache_builder.images import decode_rule
from cache_builder.records import DatasetError, DatasetNotFound

CATEGORIES = {
    "replace_obj": 1200,
    "replace_rel": 462,
    "replace_att": 437,
    "add_obj": 399,
    "add_att": 76,
    "swap_att": 278,
    "swap_obj": 81,
}
"""type_subtype → rows."""


def _sizes(categories: Mapping[str, int]) -> dict[str, int]:
    """Rows by category, by type, and all."""
    types = {
        kind: sum(n for category, n in categories.items() if category.partition("_")[0] == kind)
        for kind in ("replace", "add", "swap")
    }
    return {**categories, **types, "rows": sum(categories.values())}


PUBLISHED = _sizes(CATEGORIES)

SOURCE = (
    "get data/test-*.parquet, about 537 MB in two parts, with "
    "`hf download imirandam/BiVLC --repo-type dataset --local-dir ROOT`"
)

COLUMNS = Columns(
    images=("image", "negative_image"),
    captions=("caption", "negative_caption"),
    category=("type", "subtype"),
    id="",
)

MARKS = frozenset(
    {
        "e85fb89bcfee0dfc",
        "d19f26adefdf70d5",
        "7b04c8b3fb3c5722",
        "d6e76ba1219255f4",
        "91cf87a82af57520",
        "2db6084c340a7ba6",
        "59eb58901e6c29b4",
        "47997c1524eb458d",
        "dd9e326cab73cbce",
        "12a9c2aa70905c60",
    }
)
"""Of ten rows, the first and the last among them, as `mark` writes them: whatever has one is the published set."""

PART = re.compile(r"test-(\d{5})-of-(\d{5})(-[0-9a-f]+)?\.parquet")


def load(
    root: str | Path | None,
    *,
    check: str = "auto",
    require_images: bool = True,
    follow_links: bool = False,
) -> Dataset:
    """BiVLC as `two_by_two` examples: caption i is of image i, category type_subtype.

    Ids are row number and column: example `7`, image `7/negative_image`, text `7/caption`.

    Args:
        root: holds `data/test-*.parquet`, or `test-*.parquet` (optional pyarrow); or, in the same places, `test.jsonl`
            with the same columns, the pictures being names of files below ROOT/images.
        check: "official" asserts the published counts, "none" does not, "auto" asserts them if one of `MARKS` occurs.
        require_images: whether picture files are looked for; false is for work on texts alone.
        follow_links: open picture files through links that leave ROOT/images.

    Raises:
        DatasetNotFound: there is no table, a part of it is missing, or all pictures are.
        DatasetError: a row is malformed, the counts are not the published ones, or pyarrow is missing.
        UnknownName: no such check.
    """
    check_options(check=check, require_images=require_images, follow_links=follow_links)
    root = require_root("bivlc", root, SOURCE)
    found = read_two_images(
        "bivlc",
        _tables(root),
        COLUMNS,
        Pictures(root / "images", by_row=True, required=require_images, follow_links=follow_links),
        SOURCE,
    )
    categories = Counter(example.category for example in found.examples)
    counts = judge(
        "bivlc",
        root,
        {
            what: Count(n, PUBLISHED.get(what))
            for what, n in (dict.fromkeys(PUBLISHED, 0) | _sizes(categories)).items()
        },
        recognised=known_by_one(MARKS, {*marks(found.texts)}),
        check=check,
        source=SOURCE,
    )
    return Dataset(
        name="bivlc",
        images=found.images,
        texts=found.texts,
        tasks=Tasks(two_by_two=found.examples),
        decode=decode_rule(upright=False),
        counts={**found.counts, **counts},
        root=str(root),
    )


def miniature(root: str | Path, *, kind: str = "jsonl") -> Path:
    """Seven rows, one of each type and subtype, as JSON lines with files, or as two parquet parts ("parquet")."""
    root = Path(root)
    rows = [
        ("add", "obj", "A boy kicks a ball.", "A boy kicks a ball past a dog."),
        ("add", "att", "A bench under a tree.", "A broken bench under a tree."),
        ("replace", "obj", "A plate of rice.", "A plate of beans."),
        ("replace", "att", "A small boat.", "A large boat."),
        ("replace", "rel", "A hat on a chair.", "A hat beneath a chair."),
        ("swap", "att", "A red door in a white wall.", "A white door in a red wall."),
        ("swap", "obj", "A horse behind a cart. ", "A cart behind a horse."),
    ]
    columns = ("type", "subtype", *COLUMNS.captions)
    table = [
        {
            "image": f"{i}.png",
            "negative_image": f"{i}-negative.png",
            **dict(zip(columns, row, strict=True)),
        }
        for i, row in enumerate(rows)
    ]
    (root / "images").mkdir(parents=True)
    (root / "data").mkdir()
    for i, row in enumerate(table):
        for column, red in zip(COLUMNS.images, (30 * i, 255 - 30 * i), strict=True):
            Image.new("RGB", (40 + i, 36), (red, 90, 20)).save(root / "images" / row[column])
    if kind == "jsonl":
        lines = "".join(json.dumps(row) + "\n" for row in table)
        (root / "data/test.jsonl").write_text(lines)
    else:
        _write_parquet(root, table)
    return root


def mark(caption: str, negative: str) -> str:
    """Sixteen hex digits of the sha256 of both captions: the set is known again without a copy of its texts."""
    return hashlib.sha256(f"{caption}\n{negative}".encode()).hexdigest()[:16]


def marks(texts: Sequence[TextRecord]) -> Iterable[str]:
    """Those of all rows."""
    return (mark(a.text, b.text) for a, b in zip(texts[::2], texts[1::2], strict=True))


def _tables(root: Path) -> list[Path]:
    """The parts of the table, in order."""
    folders = (root / "data", root)
    parts = [path for folder in folders for path in sorted(folder.glob("test-*.parquet"))]
    lines = [path for folder in folders if (path := folder / "test.jsonl").is_file()]
    if not parts and not lines:
        raise DatasetNotFound(
            f"bivlc looked in {folders[0]} and {root} for test-*.parquet, or test.jsonl, and found neither; "
            f"{SOURCE}"
        )
    if len({path.parent for path in [*parts, *lines]}) > 1 or (parts and lines) or len(lines) > 1:
        raise DatasetError(
            f"{root} holds several tables, {', '.join(str(p.relative_to(root)) for p in [*parts, *lines])}; "
            "keep the one that counts"
        )
    if lines or (len(parts) == 1 and not PART.fullmatch(parts[0].name)):
        return lines or parts
    return _whole(parts)


def _whole(parts: Sequence[Path]) -> list[Path]:
    """Parts 0, 1, …, each once: two downloads in one folder would double the rows, a missing part halve them."""
    numbered: dict[int, Path] = {}
    totals: set[int] = set()
    for path in parts:
        match = PART.fullmatch(path.name)
        if match is None or int(match[1]) in numbered:
            raise DatasetError(
                f"{path.parent} holds parts of several downloads, {', '.join(p.name for p in parts)}; keep one"
            )
        numbered[int(match[1])] = path
        totals.add(int(match[2]))
    if len(totals) > 1:
        raise DatasetError(
            f"{parts[0].parent} holds parts of several downloads, {', '.join(p.name for p in parts)}; keep one"
        )
    missing = [n for n in range(max(totals)) if n not in numbered]
    if missing or len(numbered) > max(totals):
        raise DatasetNotFound(
            f"bivlc looked in {parts[0].parent} for {max(totals)} parts test-*-of-{max(totals):05}.parquet and found "
            f"{len(numbered)}; {SOURCE}"
        )
    return [numbered[n] for n in sorted(numbered)]


def _write_parquet(root: Path, table: Sequence[dict[str, str]]) -> None:
    """Two parts with the pictures inside, in the place of the files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [
        row
        | {
            column: {"bytes": (root / "images" / row[column]).read_bytes(), "path": row[column]}
            for column in COLUMNS.images
        }
        for row in table
    ]
    for path in (root / "images").iterdir():
        path.unlink()
    (root / "images").rmdir()
    for part, rows in enumerate((cells[:4], cells[4:])):
        path = root / f"data/test-{part:05}-of-00002.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
