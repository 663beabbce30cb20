"""Open worlds from a cache: reduced as they are scored, filtered by word vectors, selected on val."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import PAIRS, make_drawn
from test_heads_core_score import SMALL, Cross

import heads.grid
from cache_builder import FeatureCache, build, load_backbone, load_dataset
from eval import czsl, score_io
from eval.composition import CompositionScores
from eval.czsl_summary import CompositionSummary
from eval.errors import ScoreTableError
from eval.feasibility import Feasibility, grid
from heads import load_method, score
from heads.base import Head, HeadConfig
from heads.cli import main
from heads.errors import ConfigError, MissingStream, TaskError
from heads.feasibility import feasibility_of, published
from heads.grid import by_rows
from heads.learner import seed_everything
from heads.loader import Loader
from heads.runs import score_run, train_run
from heads.score import score_open, source_of
from heads.source import context_of
from heads.tasks import CompositionData, load_task

ATTRS, OBJS = ("blue", "green", "red"), ("bag", "cup", "fan", "hat", "toy")
RHO = Feasibility(np.linspace(-1, 1, 15)[[*range(7, 15), *range(7)]], ATTRS, OBJS, "by hand")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    return make_drawn(tmp_path_factory.mktemp("open") / "drawn.zarr")


def head_of(cache: FeatureCache, method: str) -> Head:
    seed_everything(5)
    if method == "cross":
        return Cross(HeadConfig(), context_of(cache))
    module = load_method(method)
    head = module.Head(
        module.Config(**(SMALL if method == "tf_local" else {})), context_of(cache)
    ).eval()
    if method == "linear_probe":
        train = load_task(cache, "czsl", "train")
        head.solve(Loader(train, head.needs(head.config), batch_size=4, seed=0).all(), 0)
    return head


@pytest.mark.parametrize("method", ["zero_shot", "linear_probe", "tf_local", "cross"])
@pytest.mark.parametrize("block", [4, 1024])
def test_a_reduced_open_world_equals_the_whole_table(
    cache: FeatureCache, method: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, data = head_of(cache, method), load_task(cache, "czsl", "test", "open")
    assert isinstance(data, CompositionData)
    dense = score(head, data)
    assert isinstance(dense, CompositionScores)
    monkeypatch.setattr(heads.grid, "CELLS", 45)  # three rows of 15
    reduced = score_open(head, data, block=block, feasibility=RHO)
    assert (reduced.keep, reduced.world, reduced.ids) == (5, "open", dense.ids)
    rho = RHO.of(data.pairs)
    for t in [-np.inf, *grid(rho, data.seen)[::10]]:
        expected = czsl.evaluate(dense.pruned(t, rho))
        # Blocks of another shape may round a product otherwise, so a bias is not the same bit for bit.
        assert czsl.evaluate(reduced.at(t)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ["zero_shot", "tf_local"])
def test_rows_of_an_open_world_come_in_blocks_of_a_bounded_number_of_scores(
    cache: FeatureCache, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, data = head_of(cache, method), load_task(cache, "czsl", "test", "open")
    assert isinstance(data, CompositionData)
    source = source_of(head, data)
    monkeypatch.setattr(heads.grid, "CELLS", 45)
    rows = by_rows(
        head,
        lambda part: source.images(data.images[part]),
        lambda part: source.texts(data.prompts[part]),
        (len(data.images), len(data.pairs)),
        1024,
    )
    with torch.no_grad():
        assert [block.shape for block in rows] == [(3, 15)] * 4 + [(1, 15)]


def test_feasibility_and_dense_are_refused_elsewhere(cache: FeatureCache, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_run(cache, "zero_shot", run, task="czsl", progress=False)
    refused: list[dict[str, Any]] = [
        {"dense": True},
        {"task": "matching", "world": "open", "feasibility": RHO},
    ]
    for options in refused:
        with pytest.raises(TaskError, match="are for open worlds of czsl"):
            score_run(run, **options)


def test_from_a_cache_to_filtered_numbers_on_the_command_line(
    cache: FeatureCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, rho = tmp_path / "run", tmp_path / "rho.npz"
    train_run(cache, "zero_shot", run, task="czsl", progress=False)
    assert main(["feasibility", str(cache.path), "-o", str(rho)]) == 0
    assert "3 attrs × 5 objs, text/pooled of clip:" in capsys.readouterr().out
    for split in ("val", "test"):
        words = ["--split", split, "--world", "open", "--feasibility", str(rho), "--keep", "2"]
        assert main(["score", str(run), *words]) == 0
    val, test = (run / f"scores-{split}-open.zarr" for split in ("val", "test"))
    table = score_io.load(test)
    assert isinstance(table, CompositionSummary)
    assert (table.keep, len(table.levels)) == (2, 50)
    capsys.readouterr()
    assert main(["metrics", str(test), "--select-on", str(val), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["feasibility"]["unseen"] == 4
    assert found["feasibility"]["selected_on"] == str(val)
    test.rename(run / "kept.zarr")
    assert main(["score", str(run), "--world", "open", "--dense"]) == 0
    whole = score_io.load(test)
    assert isinstance(whole, CompositionScores)
    t = found["feasibility"]["threshold"]
    pruned = whole.pruned(t, Feasibility.load(rho).of(whole.pairs)) if t is not None else whole
    assert found["metrics"] == pytest.approx(czsl.evaluate(pruned), rel=1e-4)


def test_a_glove_file_is_read_for_the_words_of_a_cache(
    cache: FeatureCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"{w} {i + 1} {(i * i) % 7 - 3}" for i, w in enumerate((*ATTRS, *OBJS))]
    (tmp_path / "glove.txt").write_text("\n".join(lines))
    out = tmp_path / "g.npz"
    given = ["feasibility", str(cache.path), "--glove", str(tmp_path / "glove.txt"), "-o", str(out)]
    assert main(given) == 0
    assert Feasibility.load(out).source == "GloVe file glove.txt"
    (tmp_path / "glove.txt").write_text("\n".join(lines[1:]))
    capsys.readouterr()
    assert main(given) == 1
    assert "no vector for 1 of 3 words: blue" in capsys.readouterr().err


# ── word vectors ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_prompts_give_each_word_the_mean_of_its_own_less_that_of_all(cache: FeatureCache) -> None:
    unit = {}
    for a, o in PAIRS:
        row = cache.read("text/pooled", cache.rows("text", [f"prompt {a} {o}"]))[0].astype(float)
        unit[a, o] = row / np.linalg.norm(row)
    middle = np.mean(list(unit.values()), axis=0)
    attrs = np.stack([np.mean([unit[a, o] for o in OBJS], 0) - middle for a in ATTRS])
    objs = np.stack([np.mean([unit[a, o] for a in ATTRS], 0) - middle for o in OBJS])
    found = feasibility_of(cache)
    assert (found.attrs, found.objs) == (ATTRS, OBJS)
    assert found.source.startswith("text/pooled of clip:")

    def cos(x: np.ndarray, y: np.ndarray) -> float:
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    # "red fan" (2, 2) is not among the eleven training pairs; red has bag there, fan has blue and green.
    of_objs = cos(objs[2], objs[0])
    of_attrs = max(cos(attrs[2], attrs[0]), cos(attrs[2], attrs[1]))
    assert found.of([("red", "fan")])[0] == pytest.approx((of_objs + of_attrs) / 2, abs=1e-6)


def test_states_of_words_give_feasibility_and_their_absence_says_how_to_get_them(
    cache: FeatureCache, tmp_path: Path
) -> None:
    with pytest.raises(MissingStream, match=r"reads word/states.*headstart build .*word/states"):
        feasibility_of(cache, words="word/states")
    with pytest.raises(ConfigError, match="'word/ids'; choose one of text/pooled, word/states"):
        feasibility_of(cache, words="word/ids")
    dataset = load_dataset("toy_world", scale=0.01)
    streams = ["image/patches", "word/states"]
    llava = build(
        dataset, load_backbone("llava:demo"), tmp_path / "l.zarr", streams=streams, progress=False
    )
    found = feasibility_of(llava)
    assert found.source.startswith("word/states of llava:")
    rho = found.rho.reshape(len(found.attrs), len(found.objs))
    assert np.isfinite(rho).all()
    assert rho.std() > 0.01


def test_a_published_vector_is_read_and_what_is_not_one_refused(
    cache: FeatureCache, tmp_path: Path
) -> None:
    path = tmp_path / "feasibility_drawn.pt"
    torch.save({"feasibility": torch.arange(15.0)}, path)
    assert published(path, cache).of([("green", "cup")])[0] == 6
    torch.save({"feasibility": torch.arange(14.0)}, path)
    with pytest.raises(ScoreTableError, match="3 attrs × 5 objs = 15 finite floats"):
        published(path, cache)
    torch.save([1], path)
    with pytest.raises(ConfigError, match="feasibility': float tensor"):
        published(path, cache)
