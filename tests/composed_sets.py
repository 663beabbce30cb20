"""What tests of composed-retrieval readers share: files changed in place, and examples as the evaluator takes them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache_builder.datasets.base import ComposedExample, Dataset
from eval.composed_table import ComposedQueries

OFFICIAL = pytest.mark.skipif(
    "HEADSTART_OFFICIAL_DATA" not in os.environ,
    reason="set HEADSTART_OFFICIAL_DATA to a folder with cirr/{captions,image_splits} (branch cirr_dataset of "
    "Cuberick-Orion/CIRR), fashioniq/{captions,image_splits} (XiaoxiaoGuo/fashion-iq), circo/annotations "
    "(miccunifi/CIRCO) and genecis/{focus,change}_object.json (facebookresearch/genecis)",
)

NO_NUMBERS = pytest.mark.parametrize(
    "number", [True, False, -1, 10**12, 1.0, "7", None, [7]], ids=repr
)
"""What is no number of an image."""


def official(name: str) -> Path:
    """The root of a published set; genecis has a folder of its name below it."""
    folder = Path(os.environ["HEADSTART_OFFICIAL_DATA"])
    return folder if name == "genecis" else folder / name


def rewrite(path: Path, change: Callable[[Any], object]) -> Any:
    """Change what a JSON file holds, in place or into what `change` returns; returns what it then holds."""
    held = json.loads(path.read_text())
    changed = change(held)
    held = held if changed is None else changed
    path.write_text(json.dumps(held))
    return held


def change_row(path: Path, row: int, **cells: Any) -> None:
    """Set cells of a row; None takes the cell away."""

    def change(rows: list[dict[str, Any]]) -> None:
        for key, value in cells.items():
            rows[row].pop(key, None)
            if value is not None:
                rows[row][key] = value

    rewrite(path, change)


def asked(dataset: Dataset, split: str) -> list[ComposedExample]:
    return [e for e in dataset.tasks.composed if e.split == split]


def words(dataset: Dataset, example: ComposedExample) -> list[str]:
    """The modifications of a query as texts."""
    texts = {t.id: t.text for t in dataset.texts}
    return [texts[one] for one in example.modifications]


def as_queries(dataset: Dataset, split: str) -> ComposedQueries:
    """The examples of a split as `eval` takes them, field by field; it refuses what disagrees with its meanings."""
    examples = asked(dataset, split)
    return ComposedQueries(
        ids=[e.id for e in examples],
        reference=[e.reference for e in examples],
        targets=[e.targets for e in examples],
        protocol=dataset.name,
        split=split,
        gallery=[e.gallery for e in examples],
        categories=[e.categories for e in examples],
        subset=[e.subset for e in examples],
    )


def encoded(dataset: Dataset) -> set[str]:
    """Images that the tasks name; all of them must be among the images to encode."""
    held = {image.id for image in dataset.images}
    named = {i for g in dataset.tasks.galleries.values() for i in g.images}
    named |= {i for e in dataset.tasks.composed for i in (e.reference, *e.targets, *e.subset)}
    assert named <= held, f"not encoded: {sorted(named - held)[:3]}"
    return held


def read(path: Path) -> Any:
    return json.loads(path.read_text())
