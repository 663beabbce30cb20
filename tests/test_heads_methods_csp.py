"""csp: equal to zero_shot at its start, to its equations after a step, and to itself whatever the cut."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import LIVE_FAMILIES, PAIRS
from torch import Tensor
from torch.nn import functional as F

from cache_builder import FeatureCache, load_backbone
from eval.composition import CompositionScores
from heads import load_method, score, testing
from heads.base import Context
from heads.blocks.prompts import lay_out, word_ids
from heads.checkpoint import load, save
from heads.errors import CheckpointMismatch, ConfigError
from heads.features import Batch, Features
from heads.loader import Loader
from heads.methods import csp
from heads.runs import score_run, train_run
from heads.source import context_of
from heads.tasks import load_task
from heads.validation import metrics

VARIANTS: list[dict[str, Any]] = [
    {},
    {"learn_context": True, "learn_primitives": False},
    {"learn_context": True, "train_candidates": 5, "views": 2},
    {"chunk": 2},
]


@pytest.fixture(params=LIVE_FAMILIES)
def cache(
    request: pytest.FixtureRequest, live_cache: Callable[[str], FeatureCache]
) -> FeatureCache:
    return live_cache(request.param)


def head_of(context: Context, **config: Any) -> csp.Head:
    return csp.Head(csp.Config(**config), context)


def all_pairs(context: Context) -> Features:
    a, o = len(context.attrs), len(context.objs)
    index = torch.cartesian_prod(torch.arange(a), torch.arange(o))
    return Features({}, {"attr": index[:, 0], "obj": index[:, 1]})


def batch_of(context: Context, n: int = 7) -> Batch:
    """Seven images of the pairs 0, 1, 2, … in turn; every pair is a candidate."""
    candidates = all_pairs(context)
    target = torch.arange(n) % len(candidates)
    dim = context.shapes["image/pooled"][0]
    pooled = torch.randn(n, dim, generator=torch.Generator().manual_seed(1))
    queries = Features(
        {"image/pooled": pooled}, {k: v[target] for k, v in candidates.labels.items()}
    )
    ignore = torch.zeros(n, len(candidates), dtype=torch.bool)
    return Batch(queries, candidates, target, ignore, torch.empty(n, 0, dtype=torch.long))


@pytest.mark.parametrize(
    ("family", "values"),
    [("clip", v) for v in VARIANTS] + [(f, VARIANTS[2]) for f in LIVE_FAMILIES[1:]],
)
def test_csp_keeps_the_promises_of_a_head(
    contexts: dict[str, Context], family: str, values: dict[str, Any]
) -> None:
    testing.check_head(csp, csp.Config(**values), contexts[family])


@pytest.mark.parametrize("family", LIVE_FAMILIES)
def test_at_its_start_it_is_zero_shot_where_every_name_is_one_token(family: str) -> None:
    backbone: Any = load_backbone(f"{family}:demo")
    words = ("red", "blue", "big", "small", "cup", "key", "ring", "star", "ball", "box")
    single = [w for w in words if len(word_ids(backbone, w)) == 1]
    attrs, objs = tuple(single[:2]), tuple(single[2:5])
    assert len(objs) >= 2, single
    shapes = {"image/pooled": (backbone.spec.dims["joint"],)}
    names = {"backbone": backbone.spec, "backbone_name": f"{family}:demo"}
    context = Context(shapes, backbone.readout(), attrs, objs, **names)
    head = head_of(context).eval()
    zero_shot = load_method("zero_shot")
    prompts = [f"a photo of {a} {o}" for a in attrs for o in objs]
    pooled = backbone.encode_texts(backbone.tokenize(prompts))["pooled"]
    images = Features({"image/pooled": torch.randn(3, *shapes["image/pooled"])})
    want = zero_shot.Head(zero_shot.Config(), context)(images, Features({"text/pooled": pooled}))
    with torch.no_grad():
        got = head(images, all_pairs(context))
    assert torch.allclose(got, want, rtol=1e-5, atol=2e-5), (got - want).abs().max()


@pytest.mark.parametrize(("family", "longest"), [("clip", 77), ("pe", 48)])
def test_a_causal_tower_does_not_see_how_long_a_prompt_is(
    contexts: dict[str, Context], family: str, longest: int
) -> None:
    context = contexts[family]
    least = head_of(context)
    # One token a letter here: "a photo of" takes ten rows, so eight of them do not do.
    assert least.prompts.layouts["pair"].ids.shape == (14,)
    some = all_pairs(context)
    with torch.no_grad():
        found = [head_of(context, context_length=n).eval() for n in (14, 16, longest)]
        tables = [head.embed_candidates(some) for head in [least.eval(), *found]]
    assert all(torch.allclose(t, tables[0], atol=2e-6) for t in tables)
    with pytest.raises(ConfigError, match=rf"takes 14 rows and the tower at most {longest}"):
        head_of(context, context_length=13)
    with pytest.raises(ConfigError, match=f"context_length is {longest + 1}"):
        head_of(context, context_length=longest + 1)


def test_eight_rows_are_enough_for_clip() -> None:
    """With whole words for tokens, as in published CLIPs; and 8 = 16 = 32."""
    backbone: Any = load_backbone("clip:demo")
    template = "a photo of {attr} {obj}"
    layout = lay_out(backbone, template, None, "csp")
    assert layout.ids.tolist()[:4] == backbone.tokenize(["a photo of"])[0, :4].tolist()
    assert (len(layout.ids), layout.slots, layout.end) == (8, (4, 5), 6)
    assert lay_out(backbone, template, 16, "csp").slots == (4, 5)


def test_a_tower_without_mask_takes_all_its_rows(contexts: dict[str, Context]) -> None:
    layout = head_of(contexts["siglip2"]).prompts.layouts["pair"]
    assert (len(layout.ids), layout.end, layout.context.start) == (64, 63, 0)
    with pytest.raises(ConfigError, match="has no mask and needs all 64 rows"):
        head_of(contexts["siglip2"], context_length=16)


@pytest.mark.parametrize("family", LIVE_FAMILIES)
@pytest.mark.parametrize(
    ("config", "trained"),
    [
        ({}, ["prompts.primitives"]),
        ({"learn_context": True, "learn_primitives": False}, ["prompts.contexts.pair"]),
        ({"learn_context": True}, ["prompts.contexts.pair", "prompts.primitives"]),
    ],
)
def test_only_what_is_learned_gets_a_gradient(
    contexts: dict[str, Context], family: str, config: dict[str, Any], trained: list[str]
) -> None:
    context = contexts[family]
    head = head_of(context, **config)
    head.loss(batch_of(context))[0].backward()
    with_gradient = [n for n, p in head.named_parameters() if p.grad is not None and p.grad.any()]
    assert sorted(with_gradient) == sorted(trained) == sorted(dict(head.named_parameters()))
    counts = {"prompts.primitives": (3 + 2) * 40, "prompts.contexts.pair": 10 * 40}
    assert head.n_trained() == sum(counts[name] for name in trained)


def test_a_word_that_is_attr_and_obj_has_two_rows(contexts: dict[str, Context]) -> None:
    clip = contexts["clip"]
    context = Context(
        clip.shapes,
        clip.readout,
        ("dry", "red"),
        ("red", "cup", "dry"),
        **{"backbone": clip.backbone, "backbone_name": clip.backbone_name},
    )
    head = head_of(context).eval()
    table = head.prompts.primitives
    assert torch.equal(table[0], table[4])
    assert torch.equal(table[1], table[2])
    candidates = all_pairs(context)
    before = head.embed_candidates(candidates).detach()
    with torch.no_grad():
        table[2] += 1.0  # the obj "red"
    changed = (head.embed_candidates(candidates) != before).any(1)
    assert changed.tolist() == (candidates.labels["obj"] == 0).tolist()


def test_a_word_of_several_tokens_starts_as_their_mean(contexts: dict[str, Context]) -> None:
    head = head_of(contexts["clip"])
    backbone = head.prompts.live.on("cpu")
    # One token a letter, and one for the blank before the word.
    ids = backbone.tokenize(["a wet"])[0, 2:6]
    assert torch.equal(head.prompts.primitives[1], backbone.embed_tokens(ids[None])[0].mean(0))


def plain_scores(head: csp.Head, table: Tensor, batch: Batch) -> Tensor:
    """Scores from the definition: one prompt at a time, all rows of the tower, by the backbone's own functions."""
    backbone, texts = head.prompts.live.on("cpu"), []
    ids = backbone.tokenize(
        ["a photo ofzz"]
    )  # the two letters stand where the words go: a letter is a token
    (letter,) = {int(t) for t in ids[0]} - {int(t) for t in backbone.tokenize(["a photo of"])[0]}
    first, second = (ids[0] == letter).nonzero().flatten().tolist()
    labels = (batch.candidates.labels[role].tolist() for role in ("attr", "obj"))
    for i, j in zip(*labels, strict=True):
        rows = list(backbone.embed_tokens(ids)[0])
        rows[first], rows[second] = table[i], table[len(head.context.attrs) + j]
        found = backbone.encode_embedded(torch.stack(rows)[None], backbone.ends(ids))
        texts.append(found["pooled"])
    image = F.normalize(batch.queries["image/pooled"], dim=-1)
    readout = head.context.readout
    scale, bias = readout["logit_scale"].exp(), readout.get("logit_bias", torch.zeros(()))
    return scale * image @ F.normalize(torch.cat(texts), dim=-1).T + bias


@pytest.mark.parametrize("family", LIVE_FAMILIES)
def test_a_step_follows_the_equations(contexts: dict[str, Context], family: str) -> None:
    context = contexts[family]
    head, batch = head_of(context, chunk=4), batch_of(context)
    head.eval()
    table = head.prompts.primitives.detach().clone().requires_grad_()
    want = F.cross_entropy(plain_scores(head, table, batch), batch.target)
    (slope,) = torch.autograd.grad(want, table)
    loss, parts = head.loss(batch)
    loss.backward()
    assert torch.allclose(loss, want, rtol=1e-5)
    assert 0 <= parts["batch_accuracy"] <= 1
    grad = head.prompts.primitives.grad
    assert grad is not None
    assert torch.allclose(grad, slope, rtol=1e-3, atol=1e-5 * float(slope.abs().max()))
    with torch.no_grad():
        head.prompts.primitives.sub_(0.01 * grad)
        got = head(batch.queries, batch.candidates)
        assert torch.allclose(got, plain_scores(head, table - 0.01 * slope, batch), atol=1e-4)


def test_chunks_change_neither_loss_nor_gradient(contexts: dict[str, Context]) -> None:
    context, found = contexts["clip"], []
    for chunk in (1, 4, 6, 100):
        head = head_of(context, chunk=chunk, learn_context=True)
        torch.manual_seed(0)  # the dropout of this step
        loss = head.loss(batch_of(context))[0]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in head.parameters())])
    for other in found[1:]:
        gaps = [
            float((a - b).abs().max() / a.abs().max()) for a, b in zip(found[0], other, strict=True)
        ]
        assert max(gaps) < 1e-5, gaps


def test_dropout_falls_on_the_table_while_training(contexts: dict[str, Context]) -> None:
    head = head_of(contexts["clip"], dropout=0.5)
    torch.manual_seed(0)
    share = float((head.prompts.words() == 0).float().mean())
    assert 0.35 < share < 0.65
    assert torch.equal(head.eval().prompts.words(), head.prompts.primitives)
    frozen = head_of(contexts["clip"], dropout=0.5, learn_context=True, learn_primitives=False)
    assert torch.equal(frozen.prompts.words(), frozen.prompts.primitives)


@pytest.mark.parametrize(("n", "kept"), [(1, 3), (3, 3), (5, 5), (6, 6), (99, 6)])
def test_sampled_candidates_hold_those_of_the_batch(
    contexts: dict[str, Context], n: int, kept: int
) -> None:
    context = contexts["clip"]
    head, batch = head_of(context, train_candidates=n), batch_of(context, 3)
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        candidates, target = head._sampled(batch)
        labels = torch.stack([candidates.labels["attr"], candidates.labels["obj"]], 1)
        assert len({tuple(row) for row in labels.tolist()}) == len(candidates) == kept
        truth = torch.stack([batch.queries.labels["attr"], batch.queries.labels["obj"]], 1)
        assert torch.equal(labels[target], truth)
        seen |= {tuple(row) for row in labels.tolist()}
    assert len(seen) == (3 if n <= 3 else 6)


def test_a_sample_of_all_candidates_is_the_full_loss(contexts: dict[str, Context]) -> None:
    context = contexts["clip"]
    losses = [
        head_of(context, train_candidates=n).eval().loss(batch_of(context))[0] for n in (None, 6, 7)
    ]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


def test_two_views_are_drawn_row_by_row_in_training_alone(contexts: dict[str, Context]) -> None:
    head = head_of(contexts["clip"], views=2)
    plain, flipped = torch.zeros(64, 24), torch.ones(64, 24)
    queries = Features({"image/pooled": plain, "image/view_flip/pooled": flipped})
    torch.manual_seed(0)
    drawn = head._view(queries)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert bool((drawn == drawn[:, :1]).all())
    assert torch.equal(head.eval()._view(queries), plain)
    assert "image/view_flip/pooled" in csp.Head.needs(csp.Config(views=2)).queries
    assert csp.Head.needs(csp.Config()).queries == {"image/pooled"}


def test_settings_that_cannot_work_are_refused(contexts: dict[str, Context]) -> None:
    with pytest.raises(ValueError, match="nothing is left to train"):
        csp.Config(learn_primitives=False)
    with pytest.raises(ConfigError, match="'red' is none of them; use 'csp'"):
        head_of(contexts["clip"], name_preset="short")
    clip = contexts["clip"]
    bare = Context(
        clip.shapes, clip.readout, backbone=clip.backbone, backbone_name=clip.backbone_name
    )
    with pytest.raises(ConfigError, match="need the attrs and objs of a czsl task"):
        head_of(bare)


def test_short_names_of_ut_zappos(contexts: dict[str, Context]) -> None:
    clip = contexts["clip"]
    names = {"backbone": clip.backbone, "backbone_name": clip.backbone_name}
    context = Context(clip.shapes, clip.readout, ("Faux.Fur",), ("Boots.Ankle",), **names)
    backbone = load_backbone(clip.backbone_name)
    for preset, attr, obj in (
        ("short", "fake fur", "ankle boots"),
        ("csp", "faux fur", "boots ankle"),
    ):
        table = head_of(context, name_preset=preset).prompts.primitives
        for row, word in zip(table, (attr, obj), strict=True):
            ids = word_ids(backbone, word)  # type: ignore[arg-type]
            assert torch.equal(row, backbone.embed_tokens(ids[None])[0].mean(0))  # type: ignore[attr-defined]


def test_a_trained_head_comes_back_bit_for_bit(cache: FeatureCache, fast_path: Path) -> None:
    settings = {
        "head": {"learn_context": True},
        "train": {"steps": 3, "batch_size": 16, "lr": 0.01},
    }
    options: dict[str, Any] = {"task": "czsl", "settings": settings, "progress": False}
    run = train_run(cache, "csp", fast_path / "run", **options)
    again = train_run(cache, "csp", fast_path / "again", **options)
    data = load_task(cache, "czsl", "test", "open")
    assert len(data.pairs) == len(PAIRS)  # type: ignore[union-attr]
    tables = [score(h, data) for h in (run.head, again.head, load(run.path))]
    tables.append(score(run.head, data, block=4))
    found = [table.scores for table in tables if isinstance(table, CompositionScores)]
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])
    assert np.allclose(found[0], found[3], atol=1e-4)
    assert score_run(run.path, world="open")
    assert run.record["parameters"] == run.head.n_trained()
    losses = [line["loss"] for line in run.result.history if "loss" in line]
    assert losses[-1] != losses[0]


def test_training_lowers_the_loss_on_its_own_images(cache: FeatureCache) -> None:
    data = load_task(cache, "czsl", "train")
    head = head_of(context_of(cache), dropout=0.0)
    batch = Loader(data, head.needs(head.config), batch_size=64, seed=0).all()
    optimizer = torch.optim.Adam(head.parameters(), lr=0.003)
    losses = []
    for _ in range(12):
        loss = head.loss(batch)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    assert 0 <= metrics(head, data)["pair_acc"] <= 1


def test_other_vocabularies_are_refused(cache: FeatureCache, tmp_path: Path) -> None:
    head = head_of(context_of(cache))
    save(head, tmp_path)
    head = load(tmp_path)
    object.__setattr__(head.context, "attrs", ("x", *head.context.attrs[1:]))
    with pytest.raises(CheckpointMismatch, match="by number"):
        score(head, load_task(cache, "czsl", "test"))
