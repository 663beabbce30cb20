"""eva_head: its fusion is the definition's, the base stays what it was, and a finished run is taken as it is."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import make_live
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from cache_builder import FeatureCache
from cache_builder.errors import UnknownName
from eval import score_io
from eval.composition import CompositionScores
from heads import load_method, miniature, score, testing
from heads.base import Context, Head, Needs, SetHead
from heads.blocks.primitives import fused, nested_fused, primitive_logits, primitive_maxima
from heads.checkpoint import load, save
from heads.config import parse
from heads.errors import CheckpointMismatch, ConfigError
from heads.features import Features
from heads.loader import Loader
from heads.methods import eva_head
from heads.runs import score_run, train_run
from heads.score import source_of
from heads.source import context_of
from heads.tasks import load_task

OF = ("logit", "probability")
SMALL: dict[str, Any] = {"layers": 2, "dim": 8, "heads": 2, "ffn": 8}
BASES: dict[str, dict[str, Any]] = {
    "zero_shot": {},
    "csp": {"base": "csp"},
    "linear_probe": {"base": "linear_probe", "settings": {"C": 1.0}},
    "tf_local": {"base": "tf_local", "settings": SMALL},
    "branch_blocks": {"base": "branch_blocks"},
}


@pytest.fixture(scope="module")
def cache(fast_folder: Path) -> FeatureCache:
    (folder := fast_folder / "eva_head").mkdir()
    return make_live(folder, "clip")


def slow(
    scores: Tensor, attr: list[int], obj: list[int], beta: float, tau: tuple[Any, Any], of: str
) -> Tensor:
    """The definition, one image, one pair and one word at a time; what is -inf does not exist."""
    rows = []
    for row in scores:
        there = [i for i in range(len(row)) if row[i] > -torch.inf]
        total = torch.stack([row[i].exp() for i in there]).sum()
        p = {i: row[i].exp() / total for i in there}
        word = []
        for labels, t in ((attr, tau[0]), (obj, tau[1])):
            z = {}
            for w in {labels[i] for i in there}:
                of_word = [row[i] if of == "logit" else p[i] for i in there if labels[i] == w]
                z[w] = t * torch.stack(of_word).max()
            below = torch.stack([v.exp() for v in z.values()]).sum()
            word.append({w: v.exp() / below for w, v in z.items()})
        none = torch.tensor(-torch.inf, dtype=row.dtype)
        found = [
            p[i] + beta * (word[0][attr[i]] + word[1][obj[i]]) if i in p else none
            for i in range(len(row))
        ]
        rows.append(torch.stack(found))
    return torch.stack(rows)


def drawn_candidates(seed: int, c: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (3, c) and words; attr 2 of 5 and obj 4 of 5 are no candidate's."""
    draw = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(3, c, generator=draw)
    attr = torch.tensor([0, 1, 3, 4])[torch.randint(4, (c,), generator=draw)]
    return scores, attr, torch.randint(4, (c,), generator=draw)


def test_a_words_largest_score_and_none_for_a_word_that_no_candidate_has() -> None:
    scores = torch.tensor([[1.0, 5.0, 2.0, -torch.inf], [4.0, 3.0, 9.0, 0.0]])
    got = primitive_maxima(scores, torch.tensor([0, 0, 2, 3]), 5)
    inf = torch.inf
    assert got.tolist() == [[5.0, -inf, 2.0, -inf, -inf], [4.0, -inf, 9.0, 0.0, -inf]]


def test_the_gradient_of_a_maximum_is_shared_by_those_that_tie() -> None:
    scores = torch.tensor([[2.0, 2.0, 1.0, 7.0]], requires_grad=True)
    primitive_maxima(scores, torch.tensor([0, 0, 0, 1]), 3)[:, :2].sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [[0.5, 0.5, 0.0, 1.0]]


@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("seed", range(3))
def test_the_fusion_is_the_definitions_in_values_and_gradients(seed: int, of: str) -> None:
    scores, attr, obj = drawn_candidates(seed)
    scores[0, 4] = scores[2, :3] = -torch.inf
    weight = torch.randn(3, 12)
    found = []
    for make in (False, True):
        x, t, u = (
            v.double().requires_grad_() for v in (scores, torch.tensor(1.7), torch.tensor(0.4))
        )
        if make:
            table = fused(x, attr, obj, 5, 5, beta=0.3, tau_attr=t, tau_obj=u, of=of)  # type: ignore[arg-type]
        else:
            table = slow(x, attr.tolist(), obj.tolist(), 0.3, (t, u), of)
        there = table.isfinite()
        torch.where(there, weight * table, 0.0).sum().backward()
        found.append((table.detach(), x.grad, t.grad, u.grad))
    for want, got in zip(*found, strict=True):
        assert got.double().numpy() == pytest.approx(want.numpy(), rel=1e-4, abs=2e-6)


def test_a_word_that_no_candidate_has_gives_tau_a_gradient_that_is_a_number() -> None:
    scores, attr, _ = drawn_candidates(1)
    tau = torch.tensor(2.0, requires_grad=True)
    z = primitive_logits(scores, attr, 9, tau=tau)
    assert z.isneginf().any(0).tolist() == [False, False, True, False, False, *[True] * 4]
    F.cross_entropy(z, attr[:3]).backward()
    assert tau.grad is not None
    assert tau.grad.isfinite()


def test_without_any_candidate_there_is_no_score() -> None:
    scores, attr, obj = drawn_candidates(0)
    scores[1] = -torch.inf
    got = fused(scores, attr, obj, 5, 5, beta=0.5)
    assert got[1].isneginf().all()
    assert got[[0, 2]].isfinite().all()


@settings(derandomize=True, deadline=None, max_examples=80)
@given(
    st.integers(0, 9999),
    st.sampled_from([1.0, 30.0, 300.0]),
    st.lists(st.integers(1, 40), min_size=1, max_size=6, unique=True),
    st.sampled_from(OF),
    st.booleans(),
)
def test_nested_is_the_fusion_of_each_prefix(
    seed: int, scale: float, sizes: list[int], of: Any, some_are_none: bool
) -> None:
    scores, attr, obj = drawn_candidates(seed, 40)
    scores *= scale
    if some_are_none:
        scores[torch.rand(scores.shape) < 0.3] = -torch.inf
    sizes = sorted(sizes, reverse=True)
    given_: dict[str, Any] = {"beta": 0.5, "tau_attr": 0.7, "tau_obj": 3.0, "of": of}
    for n, got in zip(sizes, nested_fused(scores, attr, obj, 5, 5, sizes, **given_), strict=True):
        want = fused(scores[:, :n], attr[:n], obj[:n], 5, 5, **given_)
        assert got.shape == want.shape
        assert got.numpy() == pytest.approx(want.numpy(), rel=1e-6, abs=1e-6)
    assert not list(nested_fused(scores, attr, obj, 5, 5, [], **given_))


def head_of(cache: FeatureCache, config: dict[str, Any], seed: int = 0) -> eva_head.Head:
    """A head whose base was moved at random, or solved."""
    torch.manual_seed(seed)
    chosen = parse(eva_head.Config, config, "head")
    head = eva_head.Head(chosen, eva_head.Head.prepare(chosen, context_of(cache), cache))
    if head.training_by == "closed_form":
        train = load_task(cache, "czsl", "train")
        head.solve(Loader(train, head.needs(chosen), batch_size=8, seed=0).all(), 0)
    with torch.no_grad():
        for p in head.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    return head.eval()


@pytest.fixture(scope="module")
def on(cache: FeatureCache) -> Callable[..., eva_head.Head]:
    """The head on a base of `BASES`, made once, under other settings of the fusion."""
    made = {name: head_of(cache, config) for name, config in BASES.items()}

    def under(name: str, tau: float = 1.0, **fusion: Any) -> eva_head.Head:
        head = made[name]
        head.config = eva_head.Config(**{**head.config.model_dump(), **fusion})
        head.log_tau.data.fill_(np.log(tau))
        return head

    return under


def table(head: Head, cache: FeatureCache, world: str = "closed", block: int = 1024) -> Any:
    found = score(head, load_task(cache, "czsl", "test", world), block=block)
    assert isinstance(found, CompositionScores)
    return found


On = Callable[..., eva_head.Head]


@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("name", BASES)
def test_scores_are_the_fusion_of_the_bases_own(
    cache: FeatureCache, on: On, name: str, of: str
) -> None:
    head = on(name, 1.5, beta=0.2, primitive_score=of)
    data: Any = load_task(cache, "czsl", "test")
    base = torch.from_numpy(table(head.base, cache).scores)
    if name == "branch_blocks":  # cosines
        assert base.abs().max() <= 1.001
        base = base * context_of(cache).readout["logit_scale"].exp()
    attr, obj = (data.pair_index[:, i].tolist() for i in range(2))
    want = slow(base.double(), attr, obj, 0.2, (1.5, 1.5), of)
    for block in (1024, 5):
        got = table(head, cache, block=block)
        assert got.space == "probability"
        assert got.meta["relative"] is True
        assert got.scores == pytest.approx(want.numpy(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", BASES)
def test_with_beta_0_every_image_ranks_pairs_as_the_base_does(
    cache: FeatureCache, on: On, name: str
) -> None:
    head = on(name, beta=0.0)
    for world in ("closed", "open"):
        mine, own = table(head, cache, world).scores, table(head.base, cache, world).scores
        assert mine.sum(1) == pytest.approx(np.ones(len(mine)), rel=1e-5)
        # Rounding may make ties of the base's neighbours, but never turns them round.
        ranked = np.take_along_axis(mine, np.argsort(-own, axis=1), 1)
        assert (np.diff(ranked, axis=1) <= 1e-8).all()


@pytest.mark.parametrize("name", BASES)
def test_the_first_n_candidates_are_a_set_of_their_own(
    cache: FeatureCache, on: On, name: str
) -> None:
    head = on(name, beta=0.5, primitive_score="logit")
    data: Any = load_task(cache, "czsl", "test", "open")
    found = {}
    with torch.no_grad():
        queries, candidates = sides(head, cache, data)
        sizes = [15, 11, 4, 1]
        nested = head.nested(queries, head.gather([candidates]), sizes)
        for n, got in zip(sizes, nested, strict=True):
            found[n] = got.clone()
        for n in sizes:
            want = head(queries, candidates.take(torch.arange(n)))
            assert torch.allclose(found[n], want, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[15][:, :4], found[4], atol=1e-3)


def sides(head: Head, cache: FeatureCache, data: Any) -> tuple[Features, Features]:
    source = source_of(head, data)
    labels = {
        k: torch.from_numpy(data.pair_index[:, i].copy()) for i, k in enumerate(("attr", "obj"))
    }
    return source.images(data.images), Features(source.texts(data.prompts).streams, labels)


class Relative(SetHead):
    """Logits that hang on how many candidates there are."""

    score_space = "logit"
    tasks = frozenset({"czsl"})
    training_kind = "none"

    @classmethod
    def needs(cls, config: Any) -> Needs:
        return Needs(frozenset({"image/pooled"}), frozenset({"text/pooled"}))

    def gather(self, parts: Any) -> Tensor:
        return torch.cat([part["text/pooled"] for part in parts])

    def against(self, queries: Features, gathered: Tensor) -> Tensor:
        return queries["image/pooled"] @ gathered.T / len(gathered)

    def first(self, gathered: Tensor, n: int) -> Tensor:
        return gathered[:n]


def test_a_base_that_is_itself_relative_is_asked_anew_for_every_prefix() -> None:
    context = miniature.small_context()
    head = eva_head.Head(eva_head.Config(), context)
    head.base = Relative(head.base.config, context)
    queries = miniature.small_features(4, 3, frozenset({"image/pooled"}), context)
    candidates = miniature.small_features(6, 4, frozenset({"text/pooled"}), context)
    nested = head.nested(queries, head.gather([candidates]), [6, 3, 1])
    for n, got in zip([6, 3, 1], nested, strict=True):
        assert torch.allclose(got, head(queries, candidates.take(torch.arange(n))), atol=1e-6)


def test_needs_are_the_bases() -> None:
    csp, tf = (eva_head.Config(**BASES[name]) for name in ("csp", "tf_local"))
    assert eva_head.Head.needs(csp).live == {"text"}
    assert eva_head.Head.needs(tf) == load_method("tf_local").Head.needs(
        load_method("tf_local").Config(**SMALL)
    )
    trident = eva_head.Config(base="trident")
    assert eva_head.Head.training_needs(trident).partners == {"same_attr", "same_obj"}
    frozen = eva_head.Config(train_tau=True)
    assert eva_head.Head.training_needs(frozen) == eva_head.Head.needs(frozen)
    how = [eva_head.Head.trained_by(c) for c in (csp, frozen, eva_head.Config())]
    assert how == ["gradient", "gradient", "none"]


def test_names_of_the_bases_parameters_are_passed_on() -> None:
    config = eva_head.Config(base="trident", settings={"n_local": 1})
    head = eva_head.Head(config, eva_head.Head.miniature(config, miniature.small_context()))
    assert head.lr_shares()
    assert set(head.lr_shares()) == {f"base.{name}" for name in head.base.lr_shares()}
    assert head.n_trained() == head.base.n_trained()


@pytest.mark.parametrize("of", OF)
def test_the_loss_with_tau_is_the_bases_and_that_of_the_words(of: Any) -> None:
    config = eva_head.Config(
        base="tf_local", settings=SMALL, train_tau=True, tau=3.0, weight_primitive=0.7,
        primitive_score=of,
    )  # fmt: skip
    torch.manual_seed(0)
    head = eva_head.Head(config, miniature.small_context()).eval()
    with torch.no_grad():
        head.log_tau.copy_(torch.tensor([3.0, 5.0]).log())
    batch = miniature.small_batch(head)
    labels = {"attr": torch.arange(6) % 3, "obj": torch.arange(6) % 2}
    batch = replace(batch, candidates=replace(batch.candidates, labels=labels))
    ell = head.base(batch.queries, batch.candidates)
    judged = ell if of == "logit" else ell.softmax(-1)
    want = head.base.loss(batch)[0]
    for name, n, tau in (("attr", 3, 3.0), ("obj", 2, 5.0)):
        z = torch.stack([judged[:, labels[name] == w].amax(1) for w in range(n)], 1)
        want = want + 0.7 * F.cross_entropy(tau * z, batch.queries.labels[name])
    got, parts = head.loss(batch)
    assert torch.allclose(got, want, rtol=1e-5)
    assert parts["tau_obj"].item() == pytest.approx(5.0)
    assert {"primitive_attr_loss", "primitive_obj_loss", "batch_accuracy"} < set(parts)
    plain = eva_head.Head(eva_head.Config(base="tf_local", settings=SMALL), head.context).eval()
    plain.load_state_dict(head.state_dict())
    assert torch.equal(plain.loss(batch)[0], head.base.loss(batch)[0])


def test_tau_is_capped() -> None:
    head = eva_head.Head(eva_head.Config(train_tau=True), miniature.small_context())
    with torch.no_grad():
        head.log_tau.copy_(torch.tensor([0.0, 99.0]))
    assert head.tau().tolist() == pytest.approx([1.0, 100.0], rel=1e-5)


def test_training_tau_alone_lowers_the_loss_of_the_words(
    cache: FeatureCache, fast_path: Path
) -> None:
    train = {"steps": 8, "batch_size": 37, "lr": 0.1, "warmup_steps": 0}
    given_: dict[str, Any] = {"head": {"train_tau": True}, "train": train}
    run = train_run(
        cache, "eva_head", fast_path / "run", task="czsl", settings=given_, progress=False
    )
    steps = [line for line in run.result.history if "primitive_attr_loss" in line]
    assert len(steps) == 8
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[0]["tau_attr"] == 1.0
    assert steps[-1]["tau_attr"] != 1.0
    assert run.record["parameters"] == 2


Trained = dict[str, Path]


@pytest.fixture(scope="module")
def runs(cache: FeatureCache, fast_folder: Path) -> Trained:
    """A finished run of three kinds of bases."""
    wanted: dict[str, dict[str, Any]] = {
        "zero_shot": {},
        "csp": {"head": {"dropout": 0.1}, "train": {"steps": 2, "lr": 0.05, "batch_size": 16}},
        "linear_probe": {"head": {"target": "pair"}},
        "tf_local": {"head": SMALL, "train": {"steps": 2, "batch_size": 16}},
    }
    found = {name: fast_folder / "eva_head" / f"run-{name}" for name in wanted}
    for name, given_ in wanted.items():
        train_run(cache, name, found[name], task="czsl", settings=given_, progress=False)
    return found


@pytest.mark.parametrize("name", ["zero_shot", "csp", "linear_probe", "tf_local"])
def test_a_finished_run_is_taken_as_it_is_and_kept_whole(
    cache: FeatureCache, runs: Trained, name: str, fast_path: Path
) -> None:
    given_ = {"head": {"base": str(runs[name]), "beta": 0.25}}
    made = train_run(
        cache, "eva_head", fast_path / "fused", task="czsl", settings=given_, progress=False
    )
    record = json.loads((made.path / "config.json").read_text())["config"]
    own = json.loads((runs[name] / "config.json").read_text())
    assert (record["base"], record["settings"]) == (own["method"], own["config"])
    assert record["run"] == str(runs[name])
    assert (made.record["steps"], made.record["parameters"], made.record["examples"]["train"]) == (
        made.result.steps, 0, 0,
    )  # fmt: skip
    before = load(runs[name])
    want = table(before, cache).scores
    assert table(made.head.base, cache).scores == pytest.approx(want, rel=1e-6, abs=1e-6)  # type: ignore[union-attr, arg-type]
    data: Any = load_task(cache, "czsl", "test")
    attr, obj = (torch.from_numpy(data.pair_index[:, i].copy()) for i in range(2))
    fusion = fused(torch.from_numpy(want), attr, obj, 3, 5, beta=0.25).numpy()
    mine = table(made.head, cache).scores
    assert mine == pytest.approx(fusion, rel=1e-4, abs=1e-6)
    runs[name].rename(fast_path / "gone")  # what was saved does not need it
    try:
        again = load(made.path)
        assert table(again, cache).scores.tolist() == mine.tolist()
        (path,) = score_run(made.path, cache=cache)
        assert score_io.load(path).scores.tolist() == mine.tolist()  # type: ignore[union-attr]
        copy = load(save(again, fast_path / "copy"))
        assert copy.config == again.config
    finally:
        (fast_path / "gone").rename(runs[name])


@pytest.mark.parametrize("train_tau", [False, True])
@pytest.mark.parametrize("name", ["csp", "linear_probe", "tf_local"])
def test_a_head_on_a_run_keeps_the_promises_of_a_head(
    cache: FeatureCache, runs: Trained, name: str, train_tau: bool
) -> None:
    config = eva_head.Config(base=str(runs[name]), train_tau=train_tau)
    assert eva_head.Head.trained_by(config) == ("gradient" if train_tau else "none")
    if name != "csp" and (name, train_tau) != ("linear_probe", True):  # unsolved, all of it ties
        testing.check_head(eva_head, config, miniature.small_context())
    head = head_of(cache, {"base": str(runs[name]), "train_tau": train_tau})
    assert [n for n, p in head.named_parameters() if p.requires_grad] == ["log_tau"] * train_tau
    assert not head.train().base.training
    assert head.training


def test_tau_alone_is_trained_on_a_run(cache: FeatureCache, runs: Trained, fast_path: Path) -> None:
    given_: dict[str, Any] = {
        "head": {"base": str(runs["csp"]), "train_tau": True},
        "train": {"steps": 3, "lr": 0.1, "warmup_steps": 0},
    }
    made = train_run(
        cache, "eva_head", fast_path / "run", task="czsl", settings=given_, progress=False
    )
    assert made.record["parameters"] == 2
    own, mine = load(runs["csp"]).state_dict(), made.head.state_dict()
    assert all(torch.equal(mine[f"base.{name}"], value) for name, value in own.items())
    assert mine["log_tau"].abs().min() > 0


@pytest.mark.parametrize("name", ["csp", "linear_probe", "tf_local"])
def test_a_base_is_trained_as_it_would_be_alone(
    cache: FeatureCache, name: str, fast_path: Path
) -> None:
    config = {**BASES[name]}
    if name == "linear_probe":
        config["settings"] = {"target": "pair"}  # its penalty is chosen by validation
    train = {} if name == "linear_probe" else {"steps": 2, "lr": 0.01, "batch_size": 16}
    options: dict[str, Any] = {"task": "czsl", "progress": False}
    on_top = train_run(
        cache, "eva_head", fast_path / "a", settings={"head": config, "train": train}, **options
    )
    alone = train_run(
        cache, name, fast_path / "b",
        settings={"head": config.get("settings", {}), "train": train}, **options,
    )  # fmt: skip
    again = load(on_top.path)
    assert table(again, cache).scores.tolist() == table(on_top.head, cache).scores.tolist()
    assert on_top.record["parameters"] == alone.record["parameters"]
    if name == "linear_probe":
        assert on_top.head.config.settings["n_pairs"] == 11
        assert len([x for x in on_top.result.history if "C" in x]) == 7
        assert on_top.head.base.config == again.base.config  # type: ignore[union-attr]
        assert on_top.head.config.settings["C"] == again.base.config.C  # type: ignore[union-attr]
        return
    losses = [[x["loss"] for x in run.result.history if "loss" in x] for run in (on_top, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_context_without_the_weights_of_the_run_is_refused(
    cache: FeatureCache, runs: Trained
) -> None:
    config = eva_head.Config(base=str(runs["csp"]))
    with pytest.raises(ConfigError, match=r"takes the weights of .* make it with Head\.prepare"):
        eva_head.Head(config, context_of(cache))


def test_a_run_of_other_words_or_another_backbone_is_refused(
    cache: FeatureCache, runs: Trained
) -> None:
    context = context_of(cache)
    config = eva_head.Config(base=str(runs["linear_probe"]))
    other = replace(context, attrs=("blue", "green", "dry"))
    with pytest.raises(CheckpointMismatch, match="knows 3 attrs × 5 objs of its training data"):
        eva_head.Head.prepare(config, other, cache)
    swapped = config.model_copy(update={"settings": {**config.settings, "max_iter": 7}})
    with pytest.raises(CheckpointMismatch, match="of other settings than"):
        eva_head.Head.prepare(swapped, context, cache)


def test_what_cannot_be_a_base_is_refused_with_one_sentence(
    runs: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**values: Any) -> str:
        with pytest.raises(
            (ConfigError, CheckpointMismatch, UnknownName, FileNotFoundError)
        ) as caught:
            parse(eva_head.Config, values, "head")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "simfp, whose scores are probabilities already" in refused(base="simfp")
    assert "eva_head, whose scores are probabilities already" in refused(base="eva_head")
    assert "sgi, which scores matching, retrieval, two_by_two and no pairs" in refused(base="sgi")
    assert "did you mean 'csp'" in refused(base="cps")
    assert "no trained head in" in refused(base=str(tmp_path / "nothing"))
    assert "whose settings are its own" in refused(base=str(runs["csp"]), settings={"dropout": 0.1})
    assert "no key head.settings.dropot" in refused(base="csp", settings={"dropot": 0.1})
    said = refused(base="linear_probe", train_tau=True)
    assert "solved in closed form; train linear_probe by itself and give its run" in said
    assert "leaves out; set it above 0" in refused(train_tau=True, weight_primitive=0.0)
    (tmp_path / "config.json").write_text('{"format": 99}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "checkpoint format 99" in refused(base=str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "csp").mkdir()  # a method's name is the method
    assert parse(eva_head.Config, {"base": "csp"}, "head").run is None


def test_a_configuration_says_all_that_is_in_force() -> None:
    config = eva_head.Config(base="csp", settings={"views": 2})
    csp = load_method("csp")
    assert config.settings == csp.Config(views=2).model_dump(mode="json")
    assert eva_head.Config(**config.model_dump(mode="json")) == config


def test_candidates_of_other_words_are_scored_by_a_base_that_knows_none() -> None:
    """zero_shot reads texts: the labels only say which candidates share a word."""
    context: Context = miniature.small_context()
    head = eva_head.Head(eva_head.Config(), context)
    queries = miniature.small_features(3, 3, frozenset({"image/pooled"}), context)
    texts = miniature.small_features(4, 4, frozenset({"text/pooled"}), context)
    scores = [
        head(queries, Features(texts.streams, {"attr": torch.tensor(a), "obj": torch.tensor(o)}))
        for a, o in (([0, 0, 1, 1], [0, 1, 0, 1]), ([7, 7, 40, 40], [3, 90, 3, 90]))
    ]
    assert torch.allclose(*scores)
