"""Every czsl method's open world with feasibility: reduced in blocks, it is the kept candidates scored alone."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import make_live
from hypothesis import given, settings
from hypothesis import strategies as st

import heads.grid
from cache_builder import FeatureCache, build, load_backbone, load_dataset
from cache_builder.datasets.base import Tasks
from eval import czsl, score_io
from eval.composition import CompositionScores
from eval.czsl_summary import CompositionSummary
from eval.errors import ScoreTableError
from eval.feasibility import Feasibility, grid, kept
from heads import load_method
from heads.base import Head, SetHead
from heads.blocks.nested import nested_mixture
from heads.cli import main
from heads.errors import TaskError
from heads.loader import Loader
from heads.runs import train_run
from heads.score import score, score_open
from heads.source import context_of
from heads.tasks import CompositionData, load_task

SMALL: dict[str, Any] = {"dim": 16, "heads": 2, "ffn": 16, "layers": 1}
METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "zero_shot": ("clip", "zero_shot", {}),
    "linear_probe": ("clip", "linear_probe", {}),
    "tf_local": ("clip", "tf_local", SMALL),
    "tf_global": ("clip", "tf_local", {**SMALL, "variant": "global"}),
    "late_maxsim": ("clip", "tf_local", {**SMALL, "variant": "late_maxsim", "layers": 2}),
    "residual_global": ("clip", "tf_local", {**SMALL, "residual_global": True}),
    "trident": ("llava", "trident", {"n_local": 2, "n_global": 1}),
    "csp": ("clip", "csp", {}),
    "simfp": ("clip", "simfp", {}),
    "simfp fuse_pairs": ("clip", "simfp", {"fuse_pairs": 3}),
    "simfp soft": ("clip", "simfp", {"prompts": ("soft", "soft", "hard"), "fusion": "none"}),
    "branch_blocks": ("clip", "branch_blocks", {}),
    "eva_head": ("clip", "eva_head", {"tau": 2.0}),
    "eva_head csp": ("clip", "eva_head", {"base": "csp", "primitive_score": "probability"}),
    "eva_head linear_probe": ("clip", "eva_head", {"base": "linear_probe"}),
    "eva_head branch_blocks": ("clip", "eva_head", {"base": "branch_blocks"}),
    "eva_head tf_local": ("clip", "eva_head", {"base": "tf_local", "settings": SMALL}),
}
STREAMS = {
    "clip": ["image/pooled", "image/prefix", "image/patches", "text/pooled", "text/tokens"],
    "llava": ["image/prefix", "image/patches", "word/states"],
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FeatureCache]:
    """toy_world's czsl pictures under the bundled CLIP and LLaVA: 17 attrs × 15 objs."""
    folder, whole = tmp_path_factory.mktemp("toy"), load_dataset("toy_world", scale=0.05)
    task = whole.tasks.czsl
    assert task is not None
    few = [e for s in ("train", "test") for e in [e for e in task.examples if e.split == s][:20]]
    names, prompts = {e.image for e in few}, set(task.prompts.values())
    dataset = replace(
        whole,
        images=tuple(r for r in whole.images if r.id in names),
        texts=tuple(t for t in whole.texts if t.id in prompts),
        tasks=Tasks(czsl=replace(task, examples=tuple(few))),
    )
    return {
        family: build(
            dataset, load_backbone(f"{family}:demo"), folder / f"{family}.zarr",
            streams=streams, backbone_name=f"{family}:demo", progress=False,
        )
        for family, streams in STREAMS.items()
    }  # fmt: skip


def head_of(cache: FeatureCache, method: str, config: dict[str, Any], seed: int = 0) -> Head:
    """A head whose every parameter was moved at random, or solved."""
    torch.manual_seed(seed)
    module = load_method(method)
    chosen = module.Config(**config)
    head: Head = module.Head(chosen, module.Head.prepare(chosen, context_of(cache), cache))
    if head.training_by == "closed_form":
        train = load_task(cache, "czsl", "train")
        head.solve(Loader(train, head.needs(chosen), batch_size=4, seed=0).all(), 0)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return head.eval()


def open_of(cache: FeatureCache, seed: int = 0) -> tuple[CompositionData, Feasibility]:
    data = load_task(cache, "czsl", "test", "open")
    assert isinstance(data, CompositionData)
    rho = np.random.default_rng(seed).permutation(len(data.pairs)) / 7
    return data, Feasibility(rho, data.attrs, data.objs, "drawn")


def scored_alone(head: Head, data: CompositionData, mask: np.ndarray) -> CompositionScores:
    """The slow way: scores where the kept pairs are all the candidates there are, the others' columns at -inf."""
    some = np.flatnonzero(mask)
    narrow = replace(
        data,
        pairs=tuple(data.pairs[i] for i in some),
        pair_index=data.pair_index[some],
        prompts=data.prompts[some],
        seen=data.seen[some],
        target=np.zeros_like(data.target),  # of no meaning to a head
    )
    found = score(head, narrow)
    assert isinstance(found, CompositionScores)
    whole = np.full((len(data.images), len(mask)), -np.inf, np.float32)
    whole[:, some] = found.scores
    return CompositionScores(
        whole, data.target, np.array(data.pairs), data.seen, "test", found.space, world="open"
    )


def assert_equal(reduced: CompositionSummary, slow: CompositionScores, level: int) -> None:
    """Scores to 1e-6; what follows from them alike."""
    own = reduced.own[:, level] if reduced.relative else reduced.own
    true = slow.scores[np.arange(len(own)), slow.target]
    there = true > -np.inf
    assert own[there] == pytest.approx(true[there], rel=1e-4, abs=1e-6)
    for side, best in (
        (slow.seen, reduced.best_seen[:, level] if reduced.relative else reduced.best_seen),
        (~slow.seen, reduced.best_unseen[:, level]),
    ):
        expected = -np.sort(-slow.scores[:, side], axis=1)[:, : best.shape[1]]
        assert best[:, : expected.shape[1]] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    # Blocks of another shape may round a product otherwise, so a bias is not the same bit for bit.
    assert czsl.evaluate(reduced) == pytest.approx(czsl.evaluate(slow), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_scores_an_open_world_as_if_what_is_pruned_did_not_exist(
    toy: dict[str, FeatureCache], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, method, config = METHODS[name]
    head, (data, feasibility) = head_of(toy[family], method, config), open_of(toy[family])
    monkeypatch.setattr(heads.grid, "SET_CELLS", 11 * len(data.pairs))  # blocks of 11 images
    monkeypatch.setattr(heads.grid, "CELLS", 11 * len(data.pairs))
    relative = isinstance(head, SetHead) and head.relative
    assert relative == name.startswith(("simfp", "eva_head"))
    reduced = score_open(head, data, block=100, feasibility=feasibility, keep=3)
    rho = feasibility.of(data.pairs)
    dense = score(head, data)
    assert isinstance(dense, CompositionScores)
    levels = [-np.inf, *grid(rho, data.seen)]
    for level in (0, 17, 50):
        mask = kept(rho, data.seen, levels[level])
        assert (mask.sum() == len(mask)) == (level == 0)
        slow = scored_alone(head, data, mask)
        assert_equal(reduced.at(levels[level]), slow, level)
        if relative:
            with pytest.raises(ScoreTableError, match="probabilities over all candidates"):
                dense.pruned(levels[level], rho)
        else:
            pruned = dense.pruned(levels[level], rho)
            assert_equal(reduced.at(levels[level]), pruned, level)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "name", ["simfp", "simfp fuse_pairs", "simfp soft", "eva_head", "eva_head csp"]
)
def test_probabilities_are_made_anew_at_every_threshold_of_the_grid(
    live: FeatureCache, name: str, seed: int
) -> None:
    _, method, config = METHODS[name]
    head, (data, feasibility) = head_of(live, method, config, seed), open_of(live, seed)
    reduced = score_open(head, data, feasibility=feasibility, keep=4)
    rho = feasibility.of(data.pairs)
    levels, slow = [-np.inf, *grid(rho, data.seen)], {}
    assert len(levels) == 51
    for level, t in enumerate(levels):
        mask = kept(rho, data.seen, t)
        if mask.sum() not in slow:
            slow[mask.sum()] = scored_alone(head, data, mask)
        assert_equal(reduced.at(t), slow[mask.sum()], level)
    assert sorted(slow) == [11 + n for n in range(1, 5)]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    return make_live(tmp_path_factory.mktemp("live"), "clip")


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.integers(0, 9999),
    st.sampled_from([1.0, 30.0, 300.0]),
    st.lists(st.integers(1, 40), min_size=1, max_size=6, unique=True),
)
def test_nested_mixtures_are_softmaxes_of_each_prefix(
    seed: int, scale: float, sizes: list[int]
) -> None:
    draw = torch.Generator().manual_seed(seed)
    b, a, o, c = 3, 7, 5, 40
    z = {n: scale * torch.randn(b, k, generator=draw) for n, k in (("p", c), ("a", a), ("o", o))}
    attr = torch.randint(a - 1, (c,), generator=draw)  # the last attr is no candidate's
    obj = torch.randint(o, (c,), generator=draw)
    sizes = sorted(sizes, reverse=True)
    for n, got in zip(sizes, nested_mixture(z["p"], z["a"], z["o"], attr, obj, sizes), strict=True):
        parts = []
        for logits, index in ((z["a"], attr[:n]), (z["o"], obj[:n])):
            present = torch.zeros(logits.shape[1], dtype=torch.bool)
            present[index] = True
            parts.append(logits.double().masked_fill(~present, -torch.inf).softmax(-1)[:, index])
        want = z["p"][:, :n].double().softmax(-1) + parts[0] * parts[1]
        assert got.double().numpy() == pytest.approx(want.numpy(), rel=1e-4, abs=1e-6)


def test_a_relative_head_that_cannot_be_narrowed_says_so(live: FeatureCache) -> None:
    class Plain(load_method("simfp").Head):
        first, nested = SetHead.first, SetHead.nested

    data, feasibility = open_of(live)
    head = Plain(load_method("simfp").Config(), context_of(live)).eval()
    with pytest.raises(TaskError, match="give its Head a method `first`"):
        score_open(head, data, feasibility=feasibility)
    assert not score_open(head, data).relative


def test_no_block_of_scores_grows_with_images_times_pairs(
    live: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, (data, feasibility) = head_of(live, "simfp", {}), open_of(live)
    kind: Any = type(head)
    seen, nested = [], kind.nested

    def watched(self: Any, *given: Any) -> Iterator[torch.Tensor]:
        for block in nested(self, *given):
            seen.append(block.shape)
            yield block

    monkeypatch.setattr(kind, "nested", watched)
    monkeypatch.setattr(heads.grid, "SET_CELLS", 60)
    score_open(head, data, feasibility=feasibility)
    assert {rows for rows, _ in seen} == {4, 1}
    assert {columns for _, columns in seen} == {12, 13, 14, 15}


def test_simfp_is_filtered_on_the_command_line(
    live: FeatureCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, rho = tmp_path / "run", tmp_path / "rho.npz"
    settings = {"train": {"steps": 1}}
    train_run(live, "simfp", run, task="czsl", settings=settings, progress=False)
    assert main(["feasibility", str(live.path), "-o", str(rho)]) == 0
    for split in ("val", "test"):
        words = ["--split", split, "--world", "open", "--feasibility", str(rho)]
        assert main(["score", str(run), *words]) == 0
    val, test = (run / f"scores-{split}-open.zarr" for split in ("val", "test"))
    table = score_io.load(test)
    assert isinstance(table, CompositionSummary)
    assert table.relative
    assert table.meta["relative"] is True
    assert main(["metrics", str(test), "--select-on", str(val)]) == 0
    val.rename(run / "v.zarr")
    assert main(["score", str(run), "--split", "val", "--world", "open", "--dense"]) == 0
    capsys.readouterr()
    given = ["--select-on", str(val), "--feasibility", str(rho)]
    assert main(["metrics", str(test), *given]) == 1
    assert "without --dense" in capsys.readouterr().err
