"""The two tables of proofs in docs/protocols.md: readers on the published files, metrics against the slow loops.

    HEADSTART_OFFICIAL_DATA=FOLDER python tests/benchmarks/proofs.py

Of every reader: what it makes of the official annotation files, and how many published counts it held them to. Of
every metric: the largest difference to a loop written from its definition, over random tables with ties and -inf.
The tests assert both; this prints them.
"""

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import test_cache_datasets_czsl as czsl_sets
import test_eval_composed as composed_tests
import test_eval_czsl as czsl_tests
import test_eval_matching as matching_tests
import test_eval_retrieval as retrieval_tests

from cache_builder.datasets import circo, cirr, coco, fashioniq, flickr30k, genecis, sugarcrepe
from cache_builder.datasets.base import Dataset
from cache_builder.datasets.composition_counts import Counts, count
from eval import composed, czsl, matching, retrieval
from eval.czsl import CompositionScores
from eval.matching import MatchingScores
from eval.retrieval import RetrievalScores

TABLES = 500
"""Random tables of every kind."""


def main() -> None:
    """Print both."""
    folder = os.environ.get("HEADSTART_OFFICIAL_DATA")
    if folder is None:
        print(
            "HEADSTART_OFFICIAL_DATA is not set: no table of readers (docs/protocols.md says what it holds)\n"
        )
    else:
        print(
            "| reader | images | texts | examples | published counts asserted |\n|---|---|---|---|---|"
        )
        for name, dataset, asserted in read(Path(folder)):
            print(
                f"| {name} | {len(dataset.images):,} | {len(dataset.texts):,} | {examples(dataset)} | {asserted} |"
            )
        print()
    print("| metric | slow loop | tables | largest difference |\n|---|---|---|---|")
    for name, metrics, pairs in compared():
        differences = [difference(fast, slow) for fast, slow in pairs]
        print(f"| {name} | {metrics} | {len(differences):,} | {max(differences):.1g} |")


def read(folder: Path) -> Iterator[tuple[str, Dataset, str]]:
    """Reader, what it reads of the published files, and which counts were held."""
    roots: dict[Any, tuple[Path, dict[str, Any]]] = {
        coco: (folder / "karpathy", {}),
        flickr30k: (folder / "karpathy", {}),
        sugarcrepe: (folder / "sugarcrepe", {}),
        cirr: (folder / "cirr", {}),
        fashioniq: (folder / "fashioniq", {"splits": "val,test"}),
        circo: (folder / "circo", {}),
        genecis: (folder, {"tasks": "focus_object,change_object"}),
    }
    for module, (root, options) in roots.items():
        dataset = module.load(root, require_images=False, **options)
        held = [
            what for what, said in dataset.counts.items() if "published" in said and what != "set"
        ]
        yield module.__name__.rpartition(".")[2], dataset, f"{len(held)}: {', '.join(held)}"
    with tempfile.TemporaryDirectory() as made:
        for table, (module, expected) in czsl_sets.TABLES.items():
            root = czsl_sets.official_root(table, Path(made) / table)
            dataset = module.load(root, check="none", require_images=False)
            assert dataset.tasks.czsl is not None
            found = count(dataset.tasks.czsl)
            names = [f.name for f in fields(Counts) if getattr(expected, f.name) is not None]
            assert all(getattr(found, n) == getattr(expected, n) for n in names)
            yield module.__name__.rpartition(".")[2], dataset, f"{len(names)}: {', '.join(names)}"


def examples(dataset: Dataset) -> str:
    """Examples by split."""
    tasks = dataset.tasks
    rows = tasks.czsl.examples if tasks.czsl else getattr(tasks, tasks.kinds[0])
    splits = sorted({e.split for e in rows})
    return ", ".join(f"{sum(e.split == s for e in rows):,} {s}" for s in splits)


def difference(fast: Mapping[str, float], slow: Mapping[str, float]) -> float:
    """The largest between two sets of metrics, which must have the same names."""
    known = {name: value for name, value in fast.items() if name != "bias_at_best_hm"}
    assert set(known) == set(slow), set(known) ^ set(slow)
    return max((abs(known[name] - slow[name]) for name in slow), default=0.0)


def _named(points: np.ndarray) -> dict[str, float]:
    """Points of a curve as if each number were a metric."""
    return {f"{i} {j}": float(x) for i, row in enumerate(points) for j, x in enumerate(row)}


Pairs = Iterator[tuple[Mapping[str, float], Mapping[str, float]]]


def compared() -> Iterator[tuple[str, str, Pairs]]:
    """Table, the loop, and fast and slow metrics of random ones."""
    rng = np.random.default_rng(0)
    values = np.array([-1.0, -0.5, 0.0, 0.25, 1.0, 1.5])

    def some(*shape: int | np.integer[Any], gone: float = 0.0) -> np.ndarray:
        scores = rng.choice(values, size=shape)
        scores[rng.random(shape) < gone] = -np.inf
        return scores

    def tables_of_czsl() -> Iterator[tuple[CompositionScores, int]]:
        for _ in range(TABLES):
            q, c = rng.integers(2, 12), rng.integers(2, 9)
            seen, target = rng.random(c) < 0.5, rng.integers(0, c, size=q)
            seen[:2], target[:2] = (True, False), (0, 1)
            k = int(rng.integers(1, min(seen.sum(), 4) + 1))
            yield czsl_tests.composition(some(q, c, gone=0.1), target, seen), k

    def pairs_of_exact() -> Pairs:
        for table, k in tables_of_czsl():
            yield czsl.evaluate(table, k=k), czsl_tests.slow_metrics(table, k)

    def pairs_of_legacy() -> Pairs:
        for table, k in tables_of_czsl():
            fast = czsl.legacy_curve(table, k)
            points = np.stack([fast.seen, fast.unseen, fast.bias], axis=1)
            slow = np.array(czsl_tests.slow_legacy(table, k), dtype=np.float64)
            yield _named(points), _named(slow)

    def pairs_of_matching(two: bool) -> Pairs:
        names = (
            ("i2t", "t2i", "group_score", "i2t_0", "i2t_1", "t2i_0", "t2i_1")
            if two
            else ("accuracy",)
        )
        for _ in range(TABLES):
            n = int(rng.integers(1, 9))
            scores = some(n, 2, 2) if two else some(n, 2)
            kinds = rng.choice(["swap_att", "swap_obj", "add_obj"], size=n)
            slow: dict[str, float] = {}
            for name in names:
                slow |= matching_tests.slow(scores, list(kinds), name)
            yield matching.evaluate(MatchingScores(scores, kinds, "logit")), slow

    def pairs_of_retrieval() -> Pairs:
        for _ in range(TABLES):
            q, c = rng.integers(1, 9), rng.integers(2, 9)
            scores, right = some(q, c, gone=0.1), rng.random((q, c)) < 0.3
            scores[0] = np.where(np.isneginf(scores[0]), 0, scores[0])
            slow: dict[str, float] = {}
            for k in range(1, c + 1):
                slow |= retrieval_tests.slow(scores, right, k)
            table = RetrievalScores(scores, right, "cosine")
            yield retrieval.evaluate(table, ks=list(range(1, c + 1))), slow

    def pairs_of_composed(protocol: str) -> Pairs:
        for seed in range(TABLES):
            table = composed_tests.make(
                (protocol, seed, int(rng.integers(5, 65)), int(rng.integers(1, 7)))
            )
            slow = composed_tests.slow(table)
            if slow:
                yield composed.evaluate(table), slow

    yield (
        "CZSL, exact curve, k = 1 to 4",
        "every bias at which anything can change",
        pairs_of_exact(),
    )
    yield "CZSL, legacy curve, k = 1 to 4", "the numbered steps, image by image", pairs_of_legacy()
    yield "matching, one image", "counting", pairs_of_matching(two=False)
    yield "matching, 2 × 2", "counting", pairs_of_matching(two=True)
    yield "retrieval, every K", "walking down each list", pairs_of_retrieval()
    for protocol in ("cirr", "fashioniq", "circo", "genecis", "own"):
        yield f"composed, {protocol}", "walking down each list", pairs_of_composed(protocol)


if __name__ == "__main__":
    main()
