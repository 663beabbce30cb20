"""Pictures and words of the items that a comparison gets wrong most often: RUN/pictures/failures*.npz (eval/album.py).

They are written into the first run of each comparison, a file for each question; a report shows them for all rows.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageOps

from cache_builder import FeatureCache, load_dataset
from cache_builder.datasets.base import name_of
from eval.comparison import Comparison
from eval.failures import Failure, hardest
from eval.runs import Question
from heads.pictures import plain_name
from heads.task_examples import of_split

SIDE = 112
"""Pixels of a square that holds the whole picture: what a page shows, twice as fine."""


def save_failures(
    comparisons: Sequence[Comparison], caches: Mapping[str, FeatureCache]
) -> list[Path]:
    """Write the items that each comparison shows; those of two worlds, which are of the same images, together.

    Args:
        comparisons: of runs in directories OUT/<cache>/<label>-seed<n>.
        caches: by name.

    Returns:
        The files.

    Raises:
        DatasetError: pictures are not where they were.
    """
    shown: dict[Path, tuple[Question, dict[str, Failure]]] = {}
    for c in comparisons:
        if c.curve == "legacy" or not (found := hardest(c)):
            continue
        asked, run = c.question, c.rows[0].group.runs[0].path
        name = "-".join(filter(None, ["failures", plain_name(asked.variant)])) + ".npz"
        _, items = shown.setdefault(run / "pictures" / name, (asked, {}))
        items |= {failure.name: failure for failure in found}
    for path, (asked, items) in shown.items():
        path.parent.mkdir(exist_ok=True)
        arrays = _arrays(caches[path.parents[1].parent.name], asked, items)
        np.savez(path, allow_pickle=False, **arrays)
    return list(shown)


def _arrays(cache: FeatureCache, asked: Question, items: Mapping[str, Failure]) -> dict[str, Any]:
    """The file's arrays, in the order of the items."""
    texts = dict(zip(cache.text_ids, cache.texts, strict=True))
    answers = [answer for failure in items.values() for answer in failure.answers]
    captions = list(dict.fromkeys(answer.caption for answer in answers if answer.caption))
    examples = {name_of(e): e for e in of_split(cache, _task(asked), asked.split)}
    shows: list[tuple[str, ...]] = []
    says: list[tuple[str, ...]] = []
    for name, failure in items.items():
        if failure.reference:
            said = " / ".join(texts[i] for i in examples[name].modifications)
            shows.append((failure.reference, failure.target))
            says.append((said,))
        elif failure.target:  # a caption that asks for images
            shows.append((failure.target,))
            says.append((texts[name],))
        else:
            shows.append(examples[name].images)
            says.append(tuple(texts[i] for i in _captions(asked.kind, examples[name])))
    named = [image for images in shows for image in images]
    named = list(dict.fromkeys([*named, *(answer.image for answer in answers if answer.image)]))
    return {
        "items": np.array(list(items)),
        "shows": np.array(shows),
        "says": np.array(says, dtype=str),
        "names": np.array(named),
        "images": _pictures(cache, named),
        "texts": np.array(captions, dtype=str),
        "strings": np.array([texts[i] for i in captions], dtype=str),
        "kind": np.array(asked.kind),
        "variant": np.array(asked.variant),
        "split": np.array(asked.split),
        "dataset": np.array(asked.dataset),
    }


def _pictures(cache: FeatureCache, named: Sequence[str]) -> np.ndarray:
    """Whole pictures in squares, (n, SIDE, SIDE, 3)."""
    header = cache.header
    dataset = load_dataset(cache.spec.dataset.name, header.root or None, **header.options)
    records = {record.id: record for record in dataset.images}
    opened = (records[name].open().convert("RGB") for name in named)
    return np.stack([np.asarray(ImageOps.pad(picture, (SIDE, SIDE))) for picture in opened])


def _task(asked: Question) -> str:
    """What a data set calls what is asked: `eval` has one kind for both forms of matching."""
    return "two_by_two" if asked.variant.startswith("2×2") else asked.kind


def _captions(kind: str, example: Any) -> Sequence[str]:
    """Text ids that stand beside an item: both captions of matching, the first of an image that asks for captions."""
    return () if kind == "czsl" else example.captions[: 1 if kind == "retrieval" else None]
