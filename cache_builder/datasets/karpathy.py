"""Images with several captions each, in Karpathy's splits: what COCO and Flickr30k share. No data set itself.

Captions are the raw strings: outer whitespace goes, nothing else, and no sentence is put together from tokens. Equal
captions of different images are texts of their own. Layout: `karpathy_files.py`; reader rules: docs/protocols.md,
image-text retrieval readers.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cache_builder.datasets.base import Dataset, ImageRecord, RetrievalExample, Tasks, TextRecord
from cache_builder.datasets.checking import (
    SPLITS,
    Count,
    check_options,
    judge,
    known_by_one,
)
from cache_builder.datasets.files import (
    NOT_LOOKED_FOR,
    WITHOUT,
    image_record,
    require_root,
    require_some_image,
)
from cache_builder.datasets.karpathy_files import (
    PARTS,
    Layout,
    Listing,
    Sentence,
    annotation_files,
    place_of,
    read_rows,
)
from cache_builder.images import decode_rule
from cache_builder.records import DatasetError

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
    check_options(
        {"captions": ("all", "first5")},
        captions=captions,
        check=check,
        follow_links=follow_links,
        require_images=require_images,
        with_restval=with_restval,
    )
    root = require_root(layout.name, root, layout.source)
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
    published = known_by_one(layout.marks, {place_of(row.image)[1] for row in rows})
    told = judge(
        layout.name,
        root,
        _counts(found, listed, layout, expected=published or check == "official"),
        recognised=published,
        check=check,
        source=layout.source,
    )
    kept = [row for row in rows if with_restval or row.part != "restval"]
    images = {row.image: _record(root, row.image, follow_links) for row in kept}
    if require_images:
        for folder in dict.fromkeys(place_of(image)[0] for image in images):
            inside = [record for image, record in images.items() if place_of(image)[0] == folder]
            remedy = f"{layout.source}; {WITHOUT}"
            require_some_image(layout.name, inside, remedy, of=str(root / folder))
    texts, examples = _tasks(kept, FIRST if captions == "first5" else None)
    return Dataset(
        name=layout.name,
        images=tuple(images.values()),
        texts=texts,
        tasks=Tasks(retrieval=examples),
        decode=decode_rule(upright=False),
        counts={
            **told,
            **({} if with_restval else {"restval": "left out of train"}),
            "captions": f"{'all' if captions == 'all' else 'the first five of an image'}: {len(texts):,}",
            "empty captions dropped": f"{empty:,}",
            **({} if require_images else NOT_LOOKED_FOR),
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


def _joined(rows: Iterable[Listing]) -> tuple[list[Captioned], int]:
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
    return image_record(image, [(root / folder, name)], follow_links=follow_links)


def _counts(
    found: Mapping[str, int], listed: Sequence[str], layout: Layout, *, expected: bool
) -> dict[str, Count]:
    """Found numbers, and of the splits there are the published ones, where those are `expected`."""
    names = dict.fromkeys(
        [
            *(f"{part} {what}" for part in PARTS for what in ("images", "captions")),
            *found,
            *(layout.official if expected else ()),
        ]
    )
    parts = {*listed, *(name.split()[0] for name in found)}
    published = {**layout.papers, **layout.official}
    return {
        name: Count(found.get(name, 0), published.get(name), asserted=name in layout.official)
        for name in names
        if name.split()[0] in parts
    }
