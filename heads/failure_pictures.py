"""Pictures and words of the items that a comparison gets wrong most often: RUN/pictures/failures.npz (eval/album.py).

They are written into the first run of each comparison; a report shows them for all rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageOps

from cache_builder import FeatureCache, load_dataset
from eval.album import FAILURES
from eval.comparison import Comparison
from eval.failures import Failure, hardest
from heads.task_examples import of_split

SIDE = 112
"""Pixels of a square that holds the whole picture: what a page shows, twice as fine."""


@dataclass
class _Shown:
    """What is shown of one run's items."""

    kind: str
    split: str
    dataset: str
    items: dict[str, Failure] = field(default_factory=dict[str, Failure])


def save_failures(
    comparisons: Sequence[Comparison], caches: Mapping[str, FeatureCache]
) -> list[Path]:
    """Write the items that each comparison shows; those of two worlds, which have one run, together.

    Args:
        comparisons: of runs in directories OUT/<cache>/<label>-seed<n>.
        caches: by name.

    Returns:
        The files.

    Raises:
        DatasetError: pictures are not where they were.
    """
    shown: dict[tuple[Path, str], _Shown] = {}
    for c in comparisons:
        if c.curve == "legacy" or not (found := hardest(c)):
            continue
        run = c.rows[0].group.runs[0]
        asked = c.question
        one = _Shown(asked.kind, asked.split, asked.dataset)
        mine = shown.setdefault((run.path, str(run.facts["task"])), one)
        mine.items |= {failure.name: failure for failure in found}
    written: list[Path] = []
    for (run, task), mine in shown.items():
        cache = caches[run.parent.name]
        path = run / "pictures" / FAILURES
        path.parent.mkdir(exist_ok=True)
        np.savez(path, allow_pickle=False, **_arrays(cache, task, mine))
        written.append(path)
    return written


def _arrays(cache: FeatureCache, task: str, shown: _Shown) -> dict[str, Any]:
    """The file's arrays, in the order of the items."""
    header = cache.header
    dataset = load_dataset(cache.spec.dataset.name, header.root or None, **header.options)
    texts = dict(zip(cache.text_ids, cache.texts, strict=True))
    shows: list[tuple[str, ...]] = []
    says: list[tuple[str, ...]] = []
    names: dict[str, None] = {}
    examples = {_id(e): e for e in of_split(cache, task, shown.split)}
    for name, failure in shown.items.items():
        example = examples[name]
        if task == "composed":
            shows.append((failure.reference, failure.target))
            says.append((" / ".join(texts[i] for i in example.modifications),))
            names |= dict.fromkeys(answer.image for answer in failure.answers)
        else:
            shows.append(example.images)
            says.append(() if task == "czsl" else tuple(texts[i] for i in example.captions))
        names |= dict.fromkeys(shows[-1])
    records = {record.id: record for record in dataset.images}
    images = [
        np.asarray(ImageOps.pad(records[name].open().convert("RGB"), (SIDE, SIDE)))
        for name in names
    ]
    return {
        "items": np.array(list(shown.items)),
        "shows": np.array(shows),
        "says": np.array(says, dtype=str),
        "names": np.array(list(names)),
        "images": np.stack(images),
        "task": np.array(shown.kind),
        "split": np.array(shown.split),
        "dataset": np.array(shown.dataset),
    }


def _id(example: Any) -> str:
    """What a score table calls it: the image of a composition, else its own name."""
    return example.id if hasattr(example, "id") else example.image
