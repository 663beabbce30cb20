"""From a cache to a classifier in two lines: values and labels of a split, row by row, without torch."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn import make_drawn
from sklearn.linear_model import LogisticRegression
from stand_in import KeptStandIn, StandIn, dataset

from cache_builder import FeatureCache, build
from cache_builder.datasets.base import (
    CompositionExample,
    CompositionTask,
    RetrievalExample,
    Tasks,
)
from cache_builder.errors import UnknownIds, UnknownName

Make = Callable[..., FeatureCache]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    return make_drawn(tmp_path_factory.mktemp("numpy") / "drawn.zarr")


def coloured(bad: tuple[int, ...] = ()) -> Any:
    """Pictures whose colour says their attribute, half of them for training, in an order of their own."""
    plain = dataset(40, bad=bad)

    def label(i: int) -> tuple[str, str]:
        return ("dark" if i * 7 % 256 < 128 else "bright"), "cube"

    order = np.random.default_rng(0).permutation(40).tolist()
    examples = tuple(
        CompositionExample(f"i{i}", *label(i), "train" if i % 2 else "test") for i in order
    )
    pairs = (("dark", "cube"), ("bright", "cube"))
    task = CompositionTask(
        examples, {"train": pairs, "test": pairs}, dict(zip(pairs, ("t0", "t1"), strict=True))
    )
    return replace(plain, tasks=Tasks(czsl=task))


@pytest.mark.parametrize("storage", ["fp16", "fp32"])
def test_a_logistic_regression_is_two_lines_away(make_cache: Make, storage: str) -> None:
    cache = make_cache(dataset=coloured(), storage=storage)
    x, y = cache.numpy("image/pooled", "train"), cache.labels("train")["attr"]
    probe = LogisticRegression(C=1e3).fit(x, y)
    assert probe.classes_.tolist() == ["bright", "dark"]
    held_out = probe.score(cache.numpy("image/pooled", "test"), cache.labels("test")["attr"])
    assert held_out >= 0.95
    shuffled = np.random.default_rng(1).permutation(y)  # labels of other rows teach nothing
    assert LogisticRegression(C=1e3).fit(x, shuffled).score(x, y) < 0.9


def test_rows_follow_the_examples_and_are_float32(drawn: FeatureCache) -> None:
    czsl = drawn.tasks.czsl
    assert czsl is not None
    for split in ("train", "val", "test"):
        examples = [e for e in czsl.examples if e.split == split]
        labels = drawn.labels(split)
        assert list(labels) == ["id", "attr", "obj", "pair"]
        assert labels["id"].tolist() == [e.image for e in examples]
        assert labels["attr"].tolist() == [e.attr for e in examples]
        assert labels["obj"].tolist() == [e.obj for e in examples]
        assert labels["pair"].tolist() == [f"{e.attr} {e.obj}" for e in examples]
        for stream in ("image/pooled", "image/patches", "image/prefix"):
            values = drawn.numpy(stream, split)
            assert values.dtype == np.float32
            for row, e in zip(values, examples, strict=True):
                stored = drawn.read(stream, drawn.rows("image", [e.image]))[0]
                np.testing.assert_array_equal(row, stored.astype(np.float32))


@pytest.mark.parametrize("task", ["matching", "two_by_two", "retrieval"])
def test_other_tasks_have_splits_of_their_own(drawn: FeatureCache, task: str) -> None:
    labels = drawn.labels("test", task=task)
    examples = [e for e in getattr(drawn.tasks, task) if e.split == "test"]
    images = [i for e in examples for i in (e.images if hasattr(e, "images") else (e.image,))]
    assert labels["id"].tolist() == images
    assert ("category" in labels) == (task != "retrieval")
    assert len(drawn.numpy("image/pooled", "test", task=task)) == len(images)


def test_the_only_task_need_not_be_named(make_cache: Make) -> None:
    tasks = Tasks(retrieval=(RetrievalExample("i3", ("t0",), "val"),))
    cache = make_cache(dataset=replace(dataset(), tasks=tasks))
    assert cache.labels("val")["id"].tolist() == ["i3"]


def test_unknown_splits_and_tasks_list_those_there_are(
    drawn: FeatureCache, make_cache: Make
) -> None:
    with pytest.raises(
        UnknownName, match=r"'dev'; there are test \(13\), train \(37\), val \(13\)"
    ):
        drawn.numpy("image/pooled", "dev")
    with pytest.raises(UnknownName, match=r"no task 'composed'.*czsl, matching, two_by_two, ret"):
        drawn.labels("train", task="composed")
    bare = make_cache(dataset=replace(dataset(), tasks=Tasks()))
    with pytest.raises(UnknownName, match=r"several tasks, or none.*there are: none"):
        bare.labels("train")
    with pytest.raises(UnknownName, match=r"no stream 'image/poolt' .*image/pooled"):
        drawn.numpy("image/poolt", "train")


def test_streams_that_make_no_array_of_a_split_are_refused(
    drawn: FeatureCache, make_cache: Make
) -> None:
    with pytest.raises(UnknownName, match=r"rows of text/pooled are none: use read or read_ragged"):
        drawn.numpy("text/pooled", "train")
    kept = make_cache(backbone=KeptStandIn())
    with pytest.raises(UnknownName, match=r"image/patches is ragged.*use read_ragged"):
        kept.numpy("image/patches", "train")


def test_quarantined_images_are_refused_or_left_out_of_values_and_labels(
    fast_path: Path,
) -> None:
    cache = build(coloured(bad=(3,)), StandIn(), fast_path / "c.zarr", progress=False)
    with pytest.raises(UnknownIds, match=r"1 quarantined\): 'i3' \(picture 3"):
        cache.numpy("image/pooled", "train")
    x = cache.numpy("image/pooled", "train", allow_missing=True)
    labels = cache.labels("train", allow_missing=True)
    assert len(x) == len(labels["id"]) == len(labels["attr"]) == 19
    assert "i3" not in labels["id"]
    assert np.isfinite(x).all()


def test_numpy_needs_no_torch(drawn: FeatureCache) -> None:
    code = (
        "import sys\nfrom cache_builder import FeatureCache\n"
        f"c = FeatureCache.open({str(drawn.path)!r})\n"
        "print(c.numpy('image/pooled', 'train').shape, len(c.labels('train')['attr']))\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["(37,", "24)", "37"]
