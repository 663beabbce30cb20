"""Composed retrieval through the cache: from official files to server files, with baselines that need no training."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cache_builder import FeatureCache, build, load_backbone, load_dataset, plugins
from eval import score_io
from eval.composed import evaluate
from eval.composed_table import ComposedQueries, ComposedScores
from heads import load_method
from heads.cli import main
from heads.composed_score import mean_direction
from heads.errors import ConfigError, MissingStream, TaskError
from heads.plans import plan_of
from heads.score import score
from heads.source import context_of
from heads.strings import pack, unpack
from heads.tasks import ComposedData, load_task

SETS = {"cirr": "val", "fashioniq": "val", "circo": "val", "genecis": "val", "toy_world": "test"}


@pytest.fixture(scope="module")
def made(fast_folder: Path) -> Callable[[str], FeatureCache]:
    """The cache of a set's miniature, with the bundled CLIP; built when first asked for."""

    @cache
    def make(name: str) -> FeatureCache:
        root = fast_folder / f"composed-{name}"
        plugins.find("cache_builder.datasets", name).miniature(root)
        return build(
            load_dataset(name, root),
            load_backbone("clip:demo"),
            fast_folder / f"composed-{name}.zarr",
            streams=("image/pooled", "text/pooled"),
            backbone_name="clip:demo",
            progress=False,
        )

    return make


def split_of(cache: FeatureCache, name: str) -> str:
    splits = {e.split for e in cache.tasks.composed}
    return SETS[name] if SETS[name] in splits else sorted(splits)[0]


def zero_shot(cache: FeatureCache, query: str) -> Any:
    method = load_method("zero_shot")
    return method.Head(method.Config(query=query), context_of(cache))


@given(st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20)))
def test_texts_survive_being_a_stream(texts: list[str]) -> None:
    assert unpack(pack(texts)) == texts


def test_a_text_with_nul_is_refused() -> None:
    with pytest.raises(TaskError, match="NUL"):
        pack(["a\0b"])


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("query", ["image", "text", "sum"])
def test_a_table_is_the_definition_by_a_slow_loop(
    made: Callable[[str], FeatureCache], name: str, query: str
) -> None:
    """Every cell from the cache's arrays, by id: cosine of the mean wording with all that competes."""
    cache = made(name)
    split = split_of(cache, name)
    head = zero_shot(cache, query)
    table = score(head, load_task(cache, "composed", split))
    assert isinstance(table, ComposedScores)
    image, text = (
        dict(zip(ids, cache.read(f"{side}/pooled", np.arange(len(ids))).astype(float), strict=True))
        for side, ids in (("image", cache.image_ids), ("text", cache.text_ids))
    )

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x)

    scale = float(head.readout.scale())
    asked = [e for e in cache.tasks.composed if e.split == split]
    assert table.queries.ids == tuple(e.id for e in asked)
    for i, example in enumerate(asked):
        parts = {
            "image": [unit(image[example.reference])] * len(example.modifications),
            "text": [unit(text[m]) for m in example.modifications],
        }
        chosen = [parts[p] for p in ("image", "text") if query in (p, "sum")]
        wordings = [unit(np.sum(one, axis=0)) for one in zip(*chosen, strict=True)]
        vector = unit(np.sum(wordings, axis=0))
        gallery = cache.tasks.galleries[example.gallery] if example.gallery else None
        compete = set(gallery.images if gallery else example.subset)
        if gallery is None or not gallery.with_reference:
            compete -= {example.reference}
        found = {n: s for n, s in zip(table.names(i), table.scores[i], strict=True) if n}
        assert {n for n, s in found.items() if s > -np.inf} == compete
        for one in compete:
            assert found[one] == pytest.approx(scale * vector @ unit(image[one]), abs=scale * 2e-5)
    assert evaluate(table, ks=(1, 2))


def test_several_wordings_count_by_direction_and_keep_their_length() -> None:
    each = torch.tensor([[3.0, 0.0], [0.0, 5.0], [0.0, 2.0]])
    got = mean_direction(each, torch.tensor([0, 0, 1]), 2)
    want = torch.tensor([[4.0, 4.0], [0.0, 2.0]]) / torch.tensor([[2**0.5], [1.0]])
    assert torch.allclose(got, want)


def test_the_order_of_the_cache_does_not_matter(
    made: Callable[[str], FeatureCache], fast_folder: Path
) -> None:
    cache = made("toy_world")
    other = build(
        load_dataset("toy_world", fast_folder / "composed-toy_world"),
        load_backbone("clip:demo"),
        fast_folder / "composed-other-order.zarr",
        streams=("image/pooled", "text/pooled"),
        order_seed=9,
        progress=False,
    )
    assert other.image_ids != cache.image_ids
    tables = [score(zero_shot(c, "sum"), load_task(c, "composed", "test")) for c in (cache, other)]
    assert isinstance(tables[0], ComposedScores)
    assert isinstance(tables[1], ComposedScores)
    assert tables[0].digest() == tables[1].digest()
    assert np.allclose(tables[0].scores, tables[1].scores, atol=1e-4)


def test_from_annotations_to_the_files_of_a_server(
    made: Callable[[str], FeatureCache], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cirr", "circo"):
        cache = made(name)
        run = tmp_path / name
        train = ["train", "zero_shot", "--cache", str(cache.path), "--set", "head.query=sum"]
        assert main([*train, "--out", str(run)]) == 0
        assert main(["score", str(run), "--split", "test"]) == 0
        table = score_io.load(run / "scores-test.zarr")
        assert isinstance(table, ComposedScores)
        assert table.meta["task"] == "composed"
        sent = ["submit", str(run / "scores-test.zarr"), "--out", str(tmp_path / "sent")]
        assert main(sent) == 1  # a miniature has too few queries
        assert "submit" in capsys.readouterr().err
    capsys.readouterr()
    table = tmp_path / "cirr" / "scores-val.zarr"
    assert main(["score", str(tmp_path / "cirr"), "--split", "val"]) == 0
    assert main(["metrics", str(table)]) == 0
    assert "recall_subset@1" in capsys.readouterr().out


def test_a_whole_test_split_becomes_the_files_of_its_server(tmp_path: Path) -> None:
    names = [f"test1-{i}-0-img0" for i in range(60)]
    n = 4148
    queries = ComposedQueries(
        ids=[str(i) for i in range(n)],
        reference=[names[i % 60] for i in range(n)],
        targets=[()] * n,
        protocol="cirr",
        split="test",
        gallery="test",
        subset=[[names[(i + k) % 60] for k in range(6)] for i in range(n)],
    )
    scores = np.random.default_rng(0).normal(size=(n, 60)).astype(np.float32)
    score_io.save(ComposedScores(scores, names, queries, "cosine"), tmp_path / "scores.zarr")
    assert main(["submit", str(tmp_path / "scores.zarr"), "--out", str(tmp_path / "sent")]) == 0
    listed = json.loads((tmp_path / "sent" / "recall.json").read_text())
    order = [names[c] for c in np.argsort(-scores[7], kind="stable") if names[c] != names[7]]
    assert listed["7"] == order[:50]
    few = json.loads((tmp_path / "sent" / "recall_subset.json").read_text())
    assert few["7"] == [name for name in order if name in queries.subset[7]][:3]


def test_a_cosine_of_captions_is_told_how_to_ask_composed_queries(
    made: Callable[[str], FeatureCache],
) -> None:
    cache = made("toy_world")
    method = load_method("zero_shot")
    head = method.Head(method.Config(), context_of(cache))
    with pytest.raises(MissingStream, match=r"text/pooled of candidates.*are images.*list methods"):
        score(head, load_task(cache, "composed", "test"))
    with pytest.raises(MissingStream, match=r"reads text/pooled of queries"):
        score(zero_shot(cache, "sum"), load_task(cache, "czsl", "test"))


def test_composed_queries_are_scored_by_heads_that_know_them_and_not_trained_on(
    made: Callable[[str], FeatureCache],
) -> None:
    cache = made("toy_world")
    data = load_task(cache, "composed", "test")
    method = load_method("linear_probe")
    with pytest.raises(TaskError, match=r"linear_probe scores czsl, not composed"):
        score(method.Head(method.Config(), context_of(cache)), data)
    with pytest.raises(ConfigError, match="learn from triplets or images"):
        plan_of(data, "none")


def test_a_gallery_that_lost_an_image_is_refused_or_marked(fast_path: Path) -> None:
    plugins.find("cache_builder.datasets", "circo").miniature(fast_path / "set")
    dataset = load_dataset("circo", fast_path / "set")
    named = {i for e in dataset.tasks.composed for i in (e.reference, *e.targets)}
    spare = next(i for i in dataset.images if i.id not in named)
    assert spare.path is not None
    spare.path().write_bytes(b"no picture")
    cache = build(
        load_dataset("circo", fast_path / "set"),
        load_backbone("clip:demo"),
        fast_path / "circo.zarr",
        streams=("image/pooled", "text/pooled"),
        progress=False,
    )
    split = split_of(cache, "circo")
    with pytest.raises(TaskError, match="1 images of the gallery"):
        load_task(cache, "composed", split)
    data = load_task(cache, "composed", split, allow_missing=True)
    assert isinstance(data, ComposedData)
    assert spare.id not in data.image_ids
    assert data.dropped == (spare.id,)
    table = score(zero_shot(cache, "sum"), data)
    assert table.meta["partial"]
