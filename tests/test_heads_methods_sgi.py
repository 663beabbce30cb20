"""sgi against the slow loop of its equation, on random features and on a cache with crops and parts of captions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from cache_builder import FeatureCache, build, load_backbone, load_dataset
from cache_builder.datasets.base import Dataset, Tasks
from cache_builder.segments import prefixed, segments
from cache_builder.views import crop_boxes
from heads.errors import MissingStream, TaskError
from heads.features import Features
from heads.methods import sgi
from heads.miniature import small_context, small_features
from heads.runs import score_run, train_run
from heads.score import score
from heads.source import Source, check_streams, context_of
from heads.tasks import CompositionData, MatchingData, RetrievalData, load_task
from heads.testing import check_head

STREAMS = ["crop/pooled", "image/pooled", "text/pooled"]


def head_of(alpha: float = 0.0) -> sgi.Head:
    return sgi.Head(sgi.Config(alpha=alpha), small_context())


def slow(crops, parts, image, text, alpha: float) -> float:
    """The equation: for each part the best crop, their mean, mixed with the whole."""
    total = 0.0
    for part in parts:
        total += max(float(cosine_similarity(crop, part, dim=0)) for crop in crops)
    whole = float(cosine_similarity(image, text, dim=0))
    return (1 - alpha) * total / len(parts) + alpha * whole


def few(**options: str) -> Dataset:
    """Two 2×2 items and two captioned pictures of every split, and nothing else."""
    whole = load_dataset("toy_world", scale=0.004, **options)

    def first(examples: tuple) -> tuple:
        splits = ("train", "val", "test")
        return tuple(e for s in splits for e in [e for e in examples if e.split == s][:2])

    tasks = Tasks(retrieval=first(whole.tasks.retrieval), two_by_two=first(whole.tasks.two_by_two))
    images = {i for e in tasks.two_by_two for i in e.images} | {e.image for e in tasks.retrieval}
    said = {c for e in (*tasks.two_by_two, *tasks.retrieval) for c in e.captions}
    strings = {t.text for t in whole.texts if t.id in said}
    parts = {prefixed(part) for text in strings for part in segments(text)}
    return replace(
        whole,
        tasks=tasks,
        images=tuple(i for i in whole.images if i.id in images),
        texts=tuple(t for t in whole.texts if t.id in said | parts),
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    path = tmp_path_factory.mktemp("sgi") / "toy.zarr"
    return build(
        few(segments="rules"),
        load_backbone("clip:demo"),
        path,
        streams=STREAMS,
        crops="fast",
        progress=False,
    )


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_suite_of_heads(alpha: float) -> None:
    check_head(sgi, sgi.Config(alpha=alpha))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_scores_are_those_of_the_slow_loop(alpha: float) -> None:
    head = head_of(alpha)
    names = {"image/pooled", "crop/pooled"}, {"text/pooled", "segment/pooled"}
    queries = small_features(4, 1, frozenset(names[0]), head.context)
    candidates = small_features(5, 2, frozenset(names[1]), head.context)
    got = head(queries, candidates)
    for i in range(4):
        for j in range(5):
            crops = queries["crop/pooled"][i][queries["crop/mask"][i]]
            parts = candidates["segment/pooled"][j][candidates["segment/mask"][j]]
            want = slow(
                crops, parts, queries["image/pooled"][i], candidates["text/pooled"][j], alpha
            )
            assert got[i, j].item() == pytest.approx(want, abs=1e-6)


def test_a_picture_without_crops_is_refused() -> None:
    head = head_of()
    queries = small_features(3, 1, frozenset({"crop/pooled"}), head.context)
    mask = queries["crop/mask"].clone()
    mask[1] = False
    bare = Features({**queries.streams, "crop/mask": mask})
    candidates = small_features(3, 2, frozenset({"segment/pooled"}), head.context)
    with pytest.raises(TaskError, match="1 of these 3 images have none"):
        head(bare, candidates)
    with pytest.raises(TaskError, match="1 of these 3 images have none"):
        head.paired(bare, candidates)


@pytest.mark.parametrize(
    ("cells", "rule", "n"),
    [((7, 7), "all", 140), ((11, 7), "all", 252), ((12, 7), "all", 280), ((7, 12), "all", 280), ((7, 7), "fast", 86)],
)  # fmt: skip
def test_there_are_as_many_windows_as_the_paper_s_grid_gives(
    cells: tuple[int, int], rule: str, n: int
) -> None:
    """Counted one by one: squares of whole cells, by their upper left corner."""
    columns, rows = cells
    sizes = (1, 2, 7) if rule == "fast" else range(1, 8)
    every = [
        (32 * x, 32 * y, 32 * (x + k), 32 * (y + k))
        for k in sizes
        for y in range(rows)
        for x in range(columns)
        if x + k <= columns and y + k <= rows
    ]
    found = [tuple(box) for box in crop_boxes(32 * columns, 32 * rows, rule).tolist()]
    assert sorted(found) == sorted(every)
    assert len(found) == n


@pytest.mark.parametrize("alpha", [0.0, 0.25])
@pytest.mark.parametrize("task", ["two_by_two", "retrieval"])
def test_a_table_from_a_cache_is_that_of_the_slow_loop(
    cache: FeatureCache, task: str, alpha: float
) -> None:
    data = load_task(cache, task, "val")
    assert not isinstance(data, CompositionData)
    head = sgi.Head(sgi.Config(alpha=alpha), context_of(cache))
    table = torch.from_numpy(
        np.asarray(score(head, data, direction="i2t" if task == "retrieval" else None).scores)
    ).float()
    crops, bounds = cache.read_ragged("crop/pooled", np.arange(len(cache.image_ids)))
    crops = torch.from_numpy(np.asarray(crops)).float()
    image = torch.from_numpy(
        np.asarray(cache.read("image/pooled", np.arange(len(cache.image_ids))))
    ).float()
    text = torch.from_numpy(
        np.asarray(cache.read("text/pooled", np.arange(len(cache.text_ids))))
    ).float()
    place = {name: row for row, name in enumerate(cache.text_ids)}

    def want(i: int, c: int) -> float:
        parts = [text[place[f"segment:{part}"]] for part in segments(cache.texts[c])]
        return slow(crops[bounds[i] : bounds[i + 1]], parts, image[i], text[c], alpha)

    assert isinstance(data, MatchingData | RetrievalData)
    for item in range(2):
        if task == "retrieval":
            for c in range(2):
                cell = table[item, c].item()
                assert cell == pytest.approx(want(data.images[item], data.captions[c]), abs=1e-5)
        else:
            for i in range(2):
                for c in range(2):
                    rows = data.images[item, i], data.captions[item, c]
                    assert table[item, i, c].item() == pytest.approx(want(*rows), abs=1e-5)


def test_parts_read_from_disk_are_those_held_in_memory(cache: FeatureCache) -> None:
    data = load_task(cache, "two_by_two", "test")
    assert isinstance(data, MatchingData)
    needs = sgi.Head.needs(sgi.Config())
    captions = data.captions.reshape(-1)
    held = Source(cache, needs, data.images.reshape(-1), captions)
    read = Source(cache, needs, data.images.reshape(-1), captions, ram_limit=0)
    assert read.on_disk
    assert not held.on_disk
    rows = captions[[3, 0, 3, 2]]
    for name in ("segment/pooled", "segment/mask"):
        assert torch.equal(held.texts(rows)[name], read.texts(rows)[name])
    lengths = [len(segments(cache.texts[row])) for row in rows]
    assert held.texts(rows)["segment/mask"].sum(1).tolist() == lengths


def test_a_run_needs_no_training_and_scores_both_ways(cache: FeatureCache, tmp_path: Path) -> None:
    run = train_run(cache, "sgi", tmp_path / "run", task="two_by_two", progress=False)
    assert run.record["parameters"] == 0
    assert len(score_run(tmp_path / "run", split="test")) == 1
    assert len(score_run(tmp_path / "run", split="test", task="retrieval", rerank=3)) == 2


def test_a_cache_without_crops_or_parts_is_refused_with_the_command_that_builds_them(
    cache: FeatureCache, tmp_path: Path
) -> None:
    needs = sgi.Head.needs(sgi.Config())
    backbone = load_backbone("clip:demo")
    dataset = few()
    bare = build(dataset, backbone, tmp_path / "bare.zarr", streams=STREAMS[1:], progress=False)
    with pytest.raises(
        MissingStream,
        match=r"sgi reads crop/pooled, but .*--set 'segments=\"rules\"'.* crop/pooled",
    ):
        check_streams(bare, needs, "sgi")
    whole = build(
        dataset, backbone, tmp_path / "whole.zarr", streams=STREAMS, crops="fast", progress=False
    )
    with pytest.raises(
        MissingStream,
        match=r"has no text of any part; build .*segments=.*--crops fast",
    ):
        check_streams(whole, needs, "sgi")
    data = load_task(cache, "two_by_two", "train")
    assert isinstance(data, MatchingData)
    with pytest.raises(MissingStream, match=r"lacks \d+ parts of these \d+ captions, the first: "):
        Source(cache, needs, data.images.reshape(-1), data.captions.reshape(-1))
