"""Images with several captions each, in Karpathy's splits: what COCO and Flickr30k share. No data set itself.

Captions are the raw strings: outer whitespace goes, nothing else, and no sentence is put together from tokens. Equal
captions of different images are texts of their own. Layout: `karpathy_files.py`; reader rules: docs/protocols.md,
image-text retrieval readers.
"""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from PIL import Image

from cache_builder.datasets.base import Dataset, ImageRecord, RetrievalExample, Tasks, TextRecord
from cache_builder.datasets.karpathy_files import (
    PARTS,
    SPLITS,
    Layout,
    Row,
    Sentence,
    annotation_files,
    place_of,
    read_rows,
)
from cache_builder.errors import UnknownName
from cache_builder.images import decode_rule, image_path, image_size, open_image
from cache_builder.records import DatasetError, DatasetNotFound

FIRST = 5
"""Captions an image that `captions="first5"` keeps."""


@dataclass(slots=True)
class Captioned:
    """An image with all its captions, in file order; `part` is one of `PARTS`."""

    image: str
    part: str
    sentences: list[Sentence] = field(default_factory=list)


def read_karpathy(
    root: str | Path | None,
    layout: Layout,
    *,
    captions: str,
    check: str,
    follow_links: bool,
    require_images: bool,
    with_restval: bool = True,
) -> Dataset:
    """A data set of the shared layout; image ids are its paths, text ids its sentence numbers or `image#k`.

    Args:
        root: the folder described above.
        layout: what is particular to this set.
        captions: "all", or "first5": the first five of every image.
        check: "official" asserts the published counts of every split that is there, "none" does not, "auto" asserts
            them if any of `layout.marks` is listed, and otherwise says that it is another set.
        follow_links: open images through links that leave their folder.
        require_images: False reads captions alone: images are listed, and not looked for.
        with_restval: take restval into train; False leaves it out.

    Raises:
        DatasetNotFound: no file of the layout, or a folder without a single listed image.
        DatasetError: a row is malformed, an image is in two splits, or the counts are not the published ones.
        UnknownName: no such value of an option.
    """
    _known("captions", captions, ("all", "first5"))
    _known("check", check, ("auto", "official", "none"))
    for option, value in (
        ("follow_links", follow_links),
        ("require_images", require_images),
        ("with_restval", with_restval),
    ):
        _known(option, value, (True, False))
    root = _require_root(root, layout)
    files = annotation_files(root, layout)
    rows, empty = _joined(row for split, path in files for row in read_rows(path, split, layout))
    if not rows:
        raise DatasetError(
            f"{' and '.join(str(p) for _, p in files)} list no image; {layout.source}"
        )
    whole = files[0][0] is None
    if not (whole or with_restval) and any(row.part == "train" for row in rows):
        raise DatasetError(
            f"{layout.name} was asked to leave out restval, but a list of train does not say which images are restval; "
            f"put dataset_{layout.name}.json into {root}, or leave with_restval as it is"
        )
    found = count(rows)
    listed = SPLITS if whole else tuple(str(split) for split, _ in files)
    published = any(place_of(row.image)[1] in layout.marks for row in rows)
    asserted = check == "official" or (check == "auto" and published)
    if asserted:
        _assert_counts(found, listed, layout, root)
    kept = [row for row in rows if with_restval or row.part != "restval"]
    if require_images:
        _require_images(root, kept, layout)
    texts, examples = _tasks(kept, FIRST if captions == "first5" else None)
    return Dataset(
        name=layout.name,
        images=tuple(_record(root, row.image, follow_links) for row in kept),
        texts=texts,
        tasks=Tasks(retrieval=examples),
        decode=decode_rule(upright=False),
        counts={
            "set": _identity(published, asserted),
            **_shown_counts(found, listed, layout, published),
            **({} if with_restval else {"restval": "left out of train"}),
            "captions": f"{'all' if captions == 'all' else 'the first five of an image'}: {len(texts):,}",
            "empty captions dropped": f"{empty:,}",
            **({} if require_images else {"images on disk": "images not looked for"}),
            "read from": ", ".join(path.name for _, path in files),
        },
        root=str(root),
    )


def count(rows: Iterable[Captioned]) -> dict[str, int]:
    """Sizes by name: images and captions of every part, and test images by their number of captions.

    >>> count([Captioned("a.jpg", "test", [Sentence("a mug", None)])])["test images with 1 captions"]
    1
    """
    found: Counter[str] = Counter()
    for row in rows:
        found[f"{row.part} images"] += 1
        found[f"{row.part} captions"] += len(row.sentences)
        if row.part == "test":
            found[f"test images with {len(row.sentences)} captions"] += 1
    return dict(found)


def _known(option: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        choices = ", ".join(str(k) for k in known)
        raise UnknownName(f"{option}={value!r} is not known; choose one of {choices}")


def _require_root(root: str | Path | None, layout: Layout) -> Path:
    if root is None:
        raise DatasetNotFound(
            f"{layout.name} needs the folder it lies in (--root); {layout.source}"
        )
    if not Path(root).is_dir():
        raise DatasetNotFound(f"{layout.name}: there is no folder {root}; {layout.source}")
    return Path(root)


def _joined(rows: Iterable[Row]) -> tuple[list[Captioned], int]:
    """One entry an image, captions of its rows in file order, stripped; and how many were empty and dropped."""
    found: dict[str, Captioned] = {}
    empty = 0
    twice: dict[str, str] = {}
    for image, part, sentences in rows:
        entry = found.setdefault(image, Captioned(image, part))
        if entry.part != part:
            twice[image] = f"{image!r} is in {entry.part} and in {part}"
        for sentence in sentences:
            text = sentence.text.strip()
            empty += not text
            if text:
                entry.sentences.append(Sentence(text, sentence.number))
    if twice:
        raise DatasetError(
            f"{len(twice):,} images are in two splits: {'; '.join(list(twice.values())[:3])}"
        )
    return list(found.values()), empty


def _assert_counts(
    found: Mapping[str, int], listed: Sequence[str], layout: Layout, root: Path
) -> None:
    wrong = [
        f"{expected:,} {name} expected, {found.get(name, 0):,} found"
        for name, expected in layout.official.items()
        if name.split()[0] in listed and found.get(name, 0) != expected
    ]
    if wrong:
        raise DatasetError(
            f"{root} is not the published {layout.name}: {'; '.join(wrong)}. Get the whole set ({layout.source}), or "
            'pass check="none" if this is a subset or a set of your own'
        )


def _require_images(root: Path, rows: Sequence[Captioned], layout: Layout) -> None:
    """A folder without a single listed image is a half-downloaded set, not 80,000 bad files."""
    folders: dict[str, list[str]] = {}
    for row in rows:
        folder, name = place_of(row.image)
        folders.setdefault(folder, []).append(name)
    for folder, names in folders.items():
        if not any(os.path.exists(root / folder / name) for name in names):
            raise DatasetNotFound(
                f"{layout.name} found none of the {len(names):,} images listed of {root / folder}, the first of them "
                f"{names[0]}; {layout.source}; captions alone are read with require_images=false"
            )


def _tasks(
    rows: Iterable[Captioned], most: int | None
) -> tuple[tuple[TextRecord, ...], tuple[RetrievalExample, ...]]:
    """Texts in the order of images, and what is asked of them; `most` captions of an image, None for all."""
    texts: dict[str, TextRecord] = {}
    examples: list[RetrievalExample] = []
    for row in rows:
        own: list[str] = []
        for k, (text, number) in enumerate(row.sentences[:most]):
            text_id = f"{row.image}#{k}" if number is None else str(number)
            if text_id in texts:
                raise DatasetError(
                    f"sentid {text_id} is given to two captions, the second of image {row.image!r}"
                )
            texts[text_id] = TextRecord(text_id, text)
            own.append(text_id)
        split = "train" if row.part == "restval" else row.part
        examples.append(RetrievalExample(row.image, tuple(own), split))
    return tuple(texts.values()), tuple(examples)


def _record(root: Path, image: str, follow_links: bool) -> ImageRecord:
    folder, name = place_of(image)
    path = partial(image_path, root / folder, name, follow_links=follow_links)
    return ImageRecord(image, partial(_open, path), partial(_measure, path), path)


def _open(path: "partial[Path]") -> Image.Image:
    return open_image(path())


def _measure(path: "partial[Path]") -> tuple[int, int]:
    return image_size(path())


def _identity(published: bool, asserted: bool) -> str:
    if asserted:
        return "the published one, its counts asserted"
    return "published images, counts not asserted" if published else "another set in this layout"


def _shown_counts(
    found: Mapping[str, int], listed: Sequence[str], layout: Layout, published: bool
) -> dict[str, str]:
    """Found numbers, for people; beside them the published ones, if it is that set."""
    expected = {
        **{name: f"{n:,} published" for name, n in layout.official.items()},
        **{name: f"{n:,} in papers" for name, n in layout.papers.items()},
    }
    names = dict.fromkeys(
        [*(f"{p} {what}" for p in PARTS for what in ("images", "captions")), *found]
    )
    parts = {*listed, *(name.split()[0] for name in found)}
    return {
        name: f"{found.get(name, 0):,}"
        + (f" ({expected[name]})" if published and name in expected else "")
        for name in names
        if name.split()[0] in parts
    }
