"""Composed queries with their best images, experts by kind of edit, the gap of modalities: against slow definitions."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
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
from eval.composed import ranks
from eval.composed_table import ComposedQueries, ComposedScores
from eval.report import report
from heads import checkpoint, load_method
from heads.cli import main
from heads.composed_diagnostics import EDGES, gap, random_pairs
from heads.composed_pictures import (
    BEST,
    _texts,
    best,
    modality,
    round_robin,
    routing,
    save_composed_pictures,
)
from heads.pictures import square
from heads.routing import ALL, NO_KIND, usage
from heads.runs import score_run, train_run
from heads.score import score, source_of
from heads.source import context_of
from heads.tasks import ComposedData, load_task

SPLITS = {"cirr": "val", "fashioniq": "val", "circo": "val", "genecis": "val"}
POOLED = ("image/pooled", "text/pooled")


@pytest.fixture(scope="module")
def toy(fast_folder: Path) -> FeatureCache:
    """A small toy_world with triplets, by the bundled CLIP."""
    return build(
        load_dataset("toy_world", scale=0.01, triplets="rules"),
        load_backbone("clip:demo"),
        fast_folder / "pictured-toy.zarr",
        streams=POOLED,
        backbone_name="clip:demo",
        progress=False,
    )


@pytest.fixture(scope="module")
def trained(toy: FeatureCache, fast_folder: Path) -> Callable[..., Path]:
    """A run of `mota`, two steps after a φ that is as short; scored on the test split."""
    folder = fast_folder / "pictured-runs"
    steps = {"steps": 2, "batch_size": 16, "warmup_steps": 0, "device": "cpu", "lr": 0.05}

    def train(method: str, name: str, **head: Any) -> Path:
        settings = {"head": head, "train": {} if method == "zero_shot" else steps}
        task = "composed"
        return train_run(
            toy, method, folder / name, task=task, settings=settings, progress=False
        ).path

    @cache
    def phi() -> Path:
        return train("inversion", "phi", kind="lincir")

    @cache
    def make(name: str, **head: Any) -> Path:
        if name in ("phi", "zero"):
            run = phi() if name == "phi" else train("zero_shot", "zero", query="sum")
        else:
            run = train("mota", name, phi=str(phi()), **head)
        score_run(run)
        return run

    return make


def composed(found: FeatureCache, split: str = "test") -> ComposedData:
    data = load_task(found, "composed", split)
    assert isinstance(data, ComposedData)
    return data


def table_of(run: Path, split: str = "test") -> ComposedScores:
    table = score_io.load(run / f"scores-{split}.zarr")
    assert isinstance(table, ComposedScores)
    return table


def read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as found:
        return {name: found[name] for name in found}


# ── which queries, and what they get ─────────────────────────────────────────────────────────────────────────────────


def test_queries_are_the_first_of_each_kind_then_the_second() -> None:
    kinds = [("a",), ("a",), ("b",), ("a", "c"), (), ("b", "a"), ("a",)]
    assert round_robin(kinds, 9) == [
        (0, "a"), (2, "b"), (3, "c"), (4, ""), (1, "a"), (5, "b"), (6, "a"),
    ]  # fmt: skip
    assert round_robin(kinds, 3) == round_robin(kinds, 9)[:3]
    assert round_robin([()] * 3, 2) == [(0, ""), (1, "")]


@given(st.lists(st.lists(st.sampled_from("abc"), unique=True), max_size=12), st.integers(0, 15))
def test_round_robin_takes_each_query_once_and_as_many_as_it_can(
    kinds: list[list[str]], n: int
) -> None:
    chosen = round_robin(kinds, n)
    taken = [i for i, _ in chosen]
    assert len(set(taken)) == len(taken) == min(n, len(kinds))
    assert all(kind in (kinds[i] or [""]) for i, kind in chosen)
    for kind in {kind for _, kind in chosen}:
        mine = [i for i, k in chosen if k == kind]
        assert mine == sorted(mine)


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, -np.inf]), min_size=2, max_size=9), st.data())
def test_the_best_and_the_rank_are_those_of_the_evaluation(
    scores: list[float], data: st.DataObject
) -> None:
    """Ties too: the rank is `eval.composed`'s, and a right image within the best stands at its rank."""
    row = np.array(scores, dtype=np.float32)
    competing = np.flatnonzero(row > -np.inf).tolist()
    if not competing:
        return
    some = st.lists(st.sampled_from(competing), min_size=1, unique=True)
    targets = [str(c) for c in data.draw(some)]
    names = [str(c) for c in range(len(row))]
    queries = ComposedQueries(["q"], ["reference"], [targets], "own", "test", "all")
    table = ComposedScores(row[None], names, queries, "cosine")
    columns, rank = best(row, np.isin(names, targets))
    assert rank == ranks(table).right[0, 0]
    assert len(columns) == min(BEST, len(competing))
    assert (np.diff(row[columns]) <= 0).all()
    hits = [i + 1 for i, c in enumerate(columns) if str(c) in targets]
    assert hits[:1] == ([rank] if rank <= BEST else [])


def test_without_published_answers_nothing_is_right() -> None:
    columns, rank = best(np.arange(8, dtype=np.float32), np.zeros(8, dtype=bool))
    assert (columns.tolist(), rank) == ([7, 6, 5, 4, 3], 0)


@pytest.mark.parametrize("name", SPLITS)
def test_a_query_file_says_what_the_table_says(
    name: str, fast_folder: Path, tmp_path: Path
) -> None:
    """Several wordings, own candidates, answers unpublished: every benchmark's miniature."""
    root = fast_folder / f"pictured-{name}"
    plugins.find("cache_builder.datasets", name).miniature(root)
    dataset = load_dataset(name, root)
    backbone = load_backbone("clip:demo")
    out = fast_folder / f"pictured-{name}.zarr"
    held = build(dataset, backbone, out, streams=POOLED, progress=False)
    splits = {e.split for e in held.tasks.composed}
    split = SPLITS[name] if SPLITS[name] in splits else sorted(splits)[0]
    method = load_method("zero_shot")
    data = composed(held, split)
    table = score(method.Head(method.Config(query="sum"), context_of(held)), data)
    assert isinstance(table, ComposedScores)
    said = {"method": "zero_shot", "task": "composed", "cache": {"path": "", "digest": ""}}
    (tmp_path / "run.json").write_text(json.dumps(said))
    paths = save_composed_pictures(tmp_path, held, dataset, table, n=6)
    chosen = round_robin(table.queries.categories, 6)
    assert len(paths) == len(chosen) == min(6, len(table.ids))
    pixels = {record.id: record for record in dataset.images}
    found_ranks = ranks(table).right[:, 0] if table.queries.answered else np.zeros(len(table.ids))
    rows = dict(table.rows())
    cut = held.spec.backbone.preprocessing
    for number, (path, (i, kind)) in enumerate(zip(paths, chosen, strict=True)):
        found = read(path)
        tail = "-" + re.sub(r"\W+", "_", kind) if kind else ""
        assert path.name == f"query-{number:02d}{tail}.npz"
        assert str(found["id"]) == table.ids[i]
        assert found["edit"].tolist() == [held.texts[t] for t in data.modifications[i] if t >= 0]
        assert found["kinds"].tolist() == list(table.queries.categories[i])
        assert found["rank"] == found_ranks[i]
        assert found["competing"] == np.isfinite(rows[i]).sum()
        right = table.queries.right(i)
        assert found["hits"].tolist() == [n in right for n in found["names"].tolist()]
        where = table.lookup(i)
        assert [rows[i][where[n]] for n in found["names"].tolist()] == found["scores"].tolist()
        assert found["scores"].tolist() == sorted(rows[i], reverse=True)[: len(found["scores"])]
        reference = pixels[table.queries.reference[i]].open()
        np.testing.assert_array_equal(found["reference"], square(reference, cut))
        for one, shown in zip(found["names"].tolist(), found["images"], strict=True):
            own = square(pixels[one].open(), cut)
            at = np.arange(len(shown)) * len(own) // len(shown)  # a smaller one among larger ones
            np.testing.assert_array_equal(shown, own[at][:, at])
        assert (str(found["task"]), str(found["split"])) == ("composed", split)
    assert table.queries.answered == all(read(path)["rank"] > 0 for path in paths)


# ── numbers, against slow definitions ────────────────────────────────────────────────────────────────────────────────


def test_usage_is_the_mean_of_a_slow_loop() -> None:
    shares = np.random.default_rng(0).dirichlet(np.ones(3), size=(7, 2)).astype(np.float32)
    categories = [("add",), ("add", "remove"), (), ("remove",), ("add",), (), ("remove",)]
    found = usage(shares, ("remove", "add"), categories)
    assert found.kinds == ("remove", "add", NO_KIND, ALL)
    assert found.counts.tolist() == [3, 3, 2, 7]
    rows = {"remove": [1, 3, 6], "add": [0, 1, 4], NO_KIND: [2, 5], ALL: list(range(7))}
    for g, kind in enumerate(found.kinds):
        for k in range(2):
            for e in range(3):
                slow = sum(float(shares[i, k, e]) for i in rows[kind]) / len(rows[kind])
                assert found.shares[g, k, e] == pytest.approx(slow, abs=1e-12)
    assert usage(shares, (), [()] * 7).kinds == (ALL,)


def test_the_gap_is_its_definition() -> None:
    rng = np.random.default_rng(1)
    images, texts = rng.normal(size=(30, 4)) + 1, 2 * rng.normal(size=(20, 4)) - (0, 1, 0, 0)
    pairs = random_pairs(30, 20)
    found = gap(images, texts, pairs)
    sizes = [sum(v * v for v in t) ** 0.5 for t in texts]
    distance = sum((images[:, d].mean() - texts[:, d].mean()) ** 2 for d in range(4)) ** 0.5
    assert found.mean == pytest.approx(distance / np.mean(sizes))
    ci, ct = (np.cov(x.T, bias=True) for x in (images, texts))
    assert found.covariance == pytest.approx((((ci - ct) ** 2).sum() / (ct**2).sum()) ** 0.5)

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    mean = np.sum([t / size for t, size in zip(texts, sizes, strict=True)], 0)
    to_mean, random = [0] * 41, [0] * 41
    for image in images:
        to_mean[min(int((cosine(image, mean) + 1) / 2 * 41), 40)] += 1
    for i, t in pairs:
        random[min(int((cosine(images[i], texts[t]) + 1) / 2 * 41), 40)] += 1
    assert found.to_mean.tolist() == to_mean
    assert found.pairs.tolist() == random
    assert len(EDGES) == 42


def test_the_gap_of_a_set_to_itself_is_0_and_identical_texts_have_no_covariance_to_divide_by() -> (
    None
):
    x = np.random.default_rng(2).normal(size=(9, 3))
    same = gap(x, x, random_pairs(9, 9))
    assert (same.mean, same.covariance) == (0, 0)
    alike = np.tile([2.0, 0.0, 0.0], (3, 1))
    one = gap(alike, alike, random_pairs(3, 3))
    assert np.isnan(one.covariance)
    assert one.to_mean.tolist() == [0] * 40 + [3]


def test_random_pairs_are_the_same_each_time_and_reach_both_sides() -> None:
    pairs = random_pairs(7, 300)
    np.testing.assert_array_equal(pairs, random_pairs(7, 300))
    assert (set(pairs[:, 0]), set(pairs[:, 1])) == (set(range(7)), set(range(300)))


# ── of a trained run ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_routing_is_the_mean_of_heads_own_shares_one_query_at_a_time(
    toy: FeatureCache, trained: Callable[..., Path]
) -> None:
    head: Any = checkpoint.load(trained("eos", router="eos", n_experts=3))
    data = composed(toy)
    found = routing(head, data)
    assert found is not None
    assert str(found["reads"]) == "eos"
    kinds = data.queries.kinds
    assert found["kinds"].tolist() == [*kinds, ALL]
    sums: dict[str, list[np.ndarray]] = {}
    source = source_of(head, data)
    with torch.no_grad():
        for i, said in enumerate(data.queries.categories):
            one = head.routing(
                source.images(data.references[[i]], texts=data.modifications[[i], 0])
            )[0].numpy()
            for kind in (*said, ALL):
                sums.setdefault(kind, []).append(one)
    for g, kind in enumerate(found["kinds"].tolist()):
        assert found["counts"][g] == len(sums[kind])
        np.testing.assert_allclose(found["shares"][g], np.mean(sums[kind], 0), atol=1e-5)
    np.testing.assert_allclose(found["shares"].sum(-1), 1, atol=1e-6)
    assert np.ptp(found["shares"][:-1], axis=0).max() > 1e-4  # it can see the edit


def test_wordings_of_a_query_are_averaged_before_queries_are(
    toy: FeatureCache, trained: Callable[..., Path]
) -> None:
    """The second query says two things: it must still weigh as much as the first."""
    head: Any = checkpoint.load(trained("eos", router="eos", n_experts=3))
    data = composed(toy)
    said = data.modifications[:, 0]
    queries = {
        name: getattr(data.queries, name)[:2]
        for name in ("ids", "reference", "targets", "gallery", "categories", "subset")
    }
    asked = ComposedQueries(**queries, protocol="own", split="test")
    words = np.array([[said[0], -1], [said[1], said[3]]])
    part = replace(data, queries=asked, references=data.references[:2], modifications=words)

    def share(i: int, text: int) -> np.ndarray:
        alone = {name: values[i : i + 1] for name, values in queries.items()}
        of = replace(
            part,
            queries=ComposedQueries(**alone, protocol="own", split="test"),
            references=data.references[[i]],
            modifications=np.array([[text]]),
        )
        found = routing(head, of)
        assert found is not None
        return found["shares"][-1]

    found = routing(head, part)
    assert found is not None
    second = (share(1, said[1]) + share(1, said[3])) / 2
    want = (share(0, said[0]) + second) / 2
    np.testing.assert_allclose(found["shares"][-1], want, atol=1e-6)


def test_modality_is_the_gap_before_and_after_the_modulation(
    toy: FeatureCache, trained: Callable[..., Path]
) -> None:
    head: Any = checkpoint.load(trained("eos", router="eos", n_experts=3))
    data = composed(toy)
    found = modality(head, data)
    assert found is not None
    captions = {c for e in toy.tasks.retrieval if e.split == "test" for c in e.captions}
    texts = toy.read("text/pooled", np.sort(toy.rows("text", sorted(captions)))).astype(np.float64)
    f = torch.from_numpy(toy.read("image/pooled", np.unique(data.references))).float()
    with torch.no_grad():
        moved = f * head.mdm.gain + head.mdm.shift
    assert not torch.equal(f, moved)
    pairs = random_pairs(len(f), len(texts))
    for at, some in enumerate((f, moved)):
        one = gap(some.numpy(), texts, pairs)
        assert found["mean"][at] == pytest.approx(one.mean)
        assert found["covariance"][at] == pytest.approx(one.covariance)
        assert abs(found["to_mean"][at] - one.to_mean).sum() <= 2
        assert abs(found["pairs"][at] - one.pairs).sum() <= 4
    assert found["mean"][0] != found["mean"][1]
    assert (int(found["n_images"]), int(found["n_texts"])) == (len(f), len(texts))
    assert str(found["text_of"]) == "captions of split test"


def test_texts_are_the_splits_captions_or_all_captions_or_all_texts(
    toy: FeatureCache, trained: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = composed(toy)
    whole = toy.tasks
    assert _texts(data)[1] == "captions of split test"
    for kept, says in (
        (tuple(e for e in whole.retrieval if e.split == "train"), "captions of all splits"),
        ((), "all texts of the cache"),
    ):
        monkeypatch.setitem(toy.__dict__, "tasks", replace(whole, retrieval=kept))
        rows, found = _texts(data)
        assert found == says
        captions = {c for e in kept for c in e.captions}
        want = toy.rows("text", sorted(captions)) if captions else np.arange(len(toy.text_ids))
        assert rows.tolist() == sorted(want.tolist())


def test_parts_that_are_off_write_no_file(toy: FeatureCache, trained: Callable[..., Path]) -> None:
    data = composed(toy)
    for name, head, has in (
        ("one", {"n_experts": 1}, (False, True)),
        ("tpt", {"mdm": "none", "n_experts": 2}, (True, False)),
    ):
        loaded = checkpoint.load(trained(name, **head))
        assert (routing(loaded, data) is not None, modality(loaded, data) is not None) == has


@pytest.mark.parametrize("name", ["phi", "zero"])
def test_a_run_without_routers_writes_queries_alone(
    toy: FeatureCache, trained: Callable[..., Path], name: str
) -> None:
    run = trained(name)
    dataset = load_dataset("toy_world", scale=0.01, triplets="rules")
    (run / "pictures").mkdir(exist_ok=True)
    for stale in ("routing.npz", "modality.npz"):
        (run / "pictures" / stale).write_bytes(b"")
    paths = save_composed_pictures(run, toy, dataset, table_of(run), n=3)
    assert [path.name[:9] for path in paths] == ["query-00-", "query-01-", "query-02-"]
    assert sorted((run / "pictures").iterdir()) == paths


def test_from_the_command_line_to_the_page(
    toy: FeatureCache,
    trained: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An earlier call's files go, a stranger's stay; the report shows every query, and both parts."""
    run = trained("word", n_experts=2)
    (run / "pictures").mkdir(exist_ok=True)
    for name in ("00-red_cup.npz", "strip.npz", "query-77-add.npz", "query-78.npz", "notes.npz"):
        (run / "pictures" / name).write_bytes(b"")
    for path in run.glob("scores-*"):
        shutil.rmtree(path)
    assert main(["score", str(run), "--pictures", "5"]) == 0
    assert "routing.npz" in capsys.readouterr().out
    names = sorted(path.name[:8] for path in (run / "pictures").iterdir())
    assert names == ["modality", "notes.np", *[f"query-0{i}" for i in range(5)], "routing."]
    (run / "pictures" / "notes.npz").unlink()
    page = report([run], tmp_path / "r.html")[0].read_text(encoding="utf-8")
    assert page.count('alt="reference picture of ') == 5
    data = composed(toy)
    for i, _ in round_robin(data.queries.categories, 5):
        assert f"“{toy.texts[data.modifications[i, 0]]}”" in page
    hits = sum(int(read(p)["hits"].sum()) for p in (run / "pictures").glob("query-*"))
    assert page.count('<span class="tick">✓</span>') == hits
    assert "Experts by kind of edit" in page
    assert "each had 50.0 %" in page
    assert "cannot see the modification" in page
    assert "Images and texts before and after the modulation" in page
