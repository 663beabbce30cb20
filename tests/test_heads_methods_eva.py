"""eva: csp's towers at its start, its equations afterwards, and the cut that changes nothing but the cost."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from drawn import LIVE_FAMILIES
from torch import Tensor, nn
from torch.nn import functional as F

from heads import load_method, testing
from heads.base import Context
from heads.blocks.moe import shared_out
from heads.errors import ConfigError
from heads.features import Batch, Features
from heads.live import LiveBackbone
from heads.methods import csp, eva
from heads.miniature import small_features

B = 5
families = pytest.mark.parametrize("family", LIVE_FAMILIES)


@pytest.fixture
def context(family: str, contexts: dict[str, Context]) -> Context:
    return contexts[family]


def head_of(context: Context, **config: Any) -> eva.Head:
    torch.manual_seed(0)
    quiet = {"dropout": 0.0, "adapter_dropout": 0.0, **config}
    return eva.Head(eva.Config(**quiet), context)


def moved(head: eva.Head, seed: int = 1) -> eva.Head:
    """Off its start, where experts add nothing."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return head


def pairs(context: Context) -> Features:
    a, o = len(context.attrs), len(context.objs)
    index = torch.cartesian_prod(torch.arange(a), torch.arange(o))
    return Features({}, {"attr": index[:, 0], "obj": index[:, 1]})


def batch_of(context: Context, **streams: Tensor) -> Batch:
    """Five images of the pairs 0, 1, 2, … in turn; every pair is a candidate."""
    candidates = pairs(context)
    target = torch.arange(B) % len(candidates)
    labels = {name: values[target] for name, values in candidates.labels.items()}
    none = torch.zeros(B, len(candidates), dtype=torch.bool), torch.empty(B, 0, dtype=torch.int64)
    return Batch(Features(streams, labels), candidates, target, *none)


def pixels(context: Context) -> Tensor:
    return small_features(B, 3, frozenset({"image/pixels"}), context)["image/pixels"]


def entering(context: Context, k: int) -> Tensor:
    """What enters the k-th image block from the end, of the same pixels."""
    backbone = LiveBackbone(context, "test").on("cpu")
    depth = backbone.depth["image"]
    given = backbone.normalised(pixels(context))
    return backbone.encode_images(given, blocks=[depth - k])[f"block_{depth - k}"]


@families
@torch.no_grad()
def test_at_its_start_both_towers_are_the_frozen_ones_bit_for_bit(context: Context) -> None:
    head, candidates = head_of(context).eval(), pairs(context)
    torch.manual_seed(0)
    plain = csp.Head(csp.Config(learn_context=True), context).eval()
    backbone = LiveBackbone(context, "test").on("cpu")
    pooled = backbone.encode_images(backbone.normalised(pixels(context)))["pooled"]
    image, _ = head._images(Features({"image/pixels": pixels(context)}))
    assert torch.equal(image, F.normalize(pooled, dim=-1))
    text = head.gather([candidates]).text
    assert torch.equal(text, plain.embed_candidates(candidates))


@families
@pytest.mark.parametrize("k", [1, 2])
def test_the_cut_is_the_full_model_with_the_same_adapters_step_after_step(
    context: Context, k: int
) -> None:
    """Losses, gradients and weights, bit for bit, over five steps of AdamW; k = 2 is all blocks of the miniature."""
    full = head_of(context, image_blocks=k)
    cut = head_of(context, cut=k)
    assert full.state_dict().keys() == cut.state_dict().keys()
    batches = (
        batch_of(context, **{"image/pixels": pixels(context)}),
        batch_of(context, **{f"image/block_-{k}": entering(context, k)}),
    )
    steps = [torch.optim.AdamW(head.parameters(), lr=1e-2) for head in (full, cut)]
    for _ in range(5):
        losses = []
        for head, batch, step in zip((full, cut), batches, steps, strict=True):
            step.zero_grad()
            loss, _ = head.loss(batch)
            loss.backward()
            losses.append(loss.detach())
            step.step()
        assert torch.equal(*losses)
        for (name, a), b in zip(full.named_parameters(), cut.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
            assert a.grad is None or torch.equal(a.grad, b.grad), name  # type: ignore[arg-type]
            assert torch.equal(a, b), name


@families
def test_a_half_precision_stream_moves_the_gradients_little(context: Context) -> None:
    """A cache in fp16: measured 4e-4 of the largest gradient at most; twenty times that is allowed."""
    head, k = moved(head_of(context, cut=1)), 1
    found = []
    for states in (entering(context, k), entering(context, k).half().float()):
        head.zero_grad()
        head.loss(batch_of(context, **{"image/block_-1": states}))[0].backward()
        found.append([p.grad.clone() for p in head.parameters() if p.grad is not None])
    largest = max(float(g.abs().max()) for g in found[0])
    assert all(float((a - b).abs().max()) <= 8e-3 * largest for a, b in zip(*found, strict=True))


def by_hand(head: eva.Head, batch: Batch) -> dict[str, Tensor]:
    """The losses from unit embeddings, one image and one word at a time."""
    image, variants = head._images(batch.queries, variants=True)
    assert variants is not None
    words, labels = head.prompts.words(), batch.candidates.labels
    text = head._texts("pair", words, labels["attr"], labels["obj"])
    s, tau = head.readout.scale(), head.log_tau.exp().clamp(max=100)
    cosine = image @ text.T
    found = {"pair": F.cross_entropy(s * cosine, batch.target)}
    for i, name in enumerate(("attr", "obj")):
        n, true = head._sizes()[i], batch.queries.labels[name]
        z = torch.stack(
            [
                torch.stack([tau[i] * row[labels[name] == a].max() for a in range(n)])
                for row in cosine
            ]
        )
        found[name] = F.cross_entropy(z, true)
        index = torch.arange(n)
        t = head._texts(name, words, index, index)
        rows = []
        for b in range(len(image)):
            affinity = [
                v @ t[true[b]] + head.config.affinity_weight * (v @ image[b]) for v in variants[b]
            ]
            best = max(range(len(affinity)), key=lambda e: float(affinity[e].detach()))
            rows.append(s * torch.stack([variants[b][best] @ t[a] for a in range(n)]))
        found[f"{name}_variant"] = F.cross_entropy(torch.stack(rows), true)
    return found


@pytest.mark.parametrize("start", [math.log(100), 4.6052, 4.7655])
def test_temperatures_learn_at_their_cap(contexts: dict[str, Context], start: float) -> None:
    """CLIP's scale is 100 and a bit in float32, SigLIP2's above it: both begin as the backbone has it, and move."""
    context = contexts["clip"]
    context = replace(context, readout={**context.readout, "logit_scale": torch.tensor(start)})
    head = moved(head_of(context))
    with torch.no_grad():
        head.log_tau.fill_(start)
        assert [float(tau) for tau in head._taus()] == pytest.approx([1.0, 1.0], rel=1e-5)
    batch = batch_of(context, **{"image/pixels": pixels(context)})
    head.loss(batch)[0].backward()
    assert head.log_tau.grad is not None
    assert bool((head.log_tau.grad != 0).all())
    with torch.no_grad():
        head.log_tau.add_(1.0)
        s = float(head.readout.scale())
        assert float(head._taus()[0]) * s == pytest.approx(max(100.0, s), rel=1e-5)


@families
def test_the_loss_is_its_definition(context: Context) -> None:
    head = moved(head_of(context, weight_primitive=0.7, weight_variant=0.3, affinity_weight=20.0))
    batch = batch_of(context, **{"image/pixels": pixels(context)})
    loss, parts = head.loss(batch)
    want = by_hand(head, batch)
    for name, value in want.items():
        assert torch.allclose(parts[f"{name}_loss"], value, atol=1e-5), name
    total = want["pair"] + 0.7 * (want["attr"] + want["obj"])
    total = total + 0.3 * (want["attr_variant"] + want["obj_variant"])
    assert torch.allclose(loss, total, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(loss, [*head.parameters()]),
        torch.autograd.grad(total, [*head.parameters()]),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=2e-4, rtol=1e-3)


@families
@torch.no_grad()
def test_a_variant_is_the_last_block_under_one_expert(context: Context) -> None:
    """The tower is run with the last block's experts replaced by one of them, for every token."""
    head = moved(head_of(context)).eval()
    _, variants = head._images(Features({"image/pixels": pixels(context)}), variants=True)
    assert variants is not None
    experts, last = head.experts["image"], head.experts["image"].blocks[-1]
    kept = experts[last]

    class One(nn.Module):
        def __init__(self, e: int) -> None:
            super().__init__()
            self.e = e

        def forward(self, u: Tensor) -> Tensor:
            return u @ kept.down[self.e].T @ kept.up[self.e]

    for e in range(variants.shape[1]):
        experts.adapters[str(last)] = One(e)
        alone = F.normalize(head.images.images(pixels(context)).float(), dim=-1)
        assert torch.allclose(variants[:, e], alone, atol=2e-5), e
    experts.adapters[str(last)] = kept


@families
@torch.no_grad()
def test_the_score_is_its_definition(context: Context) -> None:
    head = moved(head_of(context, beta=0.3)).eval()
    queries = Features({"image/pixels": pixels(context)})
    some = pairs(context).take(torch.tensor([0, 1, 3, 4]))  # the last attr of three has no pair
    got = head(queries, some)
    logits = head._logits(head._images(queries)[0], head.gather([some]).text)
    tau = head.log_tau.exp().clamp(max=100) / head.readout.scale()
    for b, row in enumerate(logits):
        p = row.softmax(0)
        for i, name in enumerate(("attr", "obj")):
            labels = some.labels[name]
            z = {a: tau[i] * row[labels == a].max() for a in labels.tolist()}
            total = sum(torch.exp(v) for v in z.values())
            p = p + 0.3 * torch.stack([torch.exp(z[a]) / total for a in labels.tolist()])
        assert torch.allclose(got[b], p, atol=1e-5)


@families
@torch.no_grad()
def test_without_alignment_the_score_is_the_softmax(context: Context) -> None:
    head = moved(head_of(context, text_to_image=False)).eval()
    queries, some = Features({"image/pixels": pixels(context)}), pairs(context)
    logits = head._logits(head._images(queries)[0], head.gather([some]).text)
    assert torch.allclose(head(queries, some), logits.softmax(-1))


@families
def test_images_and_prompts_in_parts_are_the_same_step(context: Context) -> None:
    batch, found = batch_of(context, **{"image/pixels": pixels(context)}), []
    for chunks in ({}, {"chunk": 2, "image_chunk": 2}):
        head = moved(head_of(context, balance=0.5, **chunks))
        loss, _ = head.loss(batch)
        loss.backward()
        found.append((loss.detach(), [p.grad for p in head.parameters()]))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert a is not None
        assert b is not None
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-3)


def test_dropout_inside_a_part_is_the_same_when_it_is_run_again(
    contexts: dict[str, Context],
) -> None:
    """Numerical derivative along the gradient, the random numbers being those of the forward pass."""
    context = contexts["clip"]
    head = moved(head_of(context, adapter_dropout=0.3, dropout=0.3, image_chunk=2, chunk=2))
    batch = batch_of(context, **{"image/pixels": pixels(context)})

    def loss() -> Tensor:
        torch.manual_seed(5)
        return head.loss(batch)[0]

    loss().backward()
    p = head.experts["image"][0].up
    assert p.grad is not None
    direction = p.grad / p.grad.norm()
    with torch.no_grad():
        step, moved_by = 1e-2, []
        for sign in (1, -1):
            p.add_(sign * step * direction)
            moved_by.append(loss())
            p.sub_(sign * step * direction)
    slope = (moved_by[0] - moved_by[1]) / (2 * step)
    assert float(slope.detach()) == pytest.approx(float(p.grad.norm()), rel=0.05)


REGULARISED: list[dict[str, Any]] = [
    {},
    {"cut": 1},
    {"cut": 2, "image_blocks": 1, "text_blocks": 1},
    {"image_blocks": 0, "image_to_text": False},
    {"text_blocks": 0, "n_shared": 0},
    {"text_to_image": False, "adapter_input": "normed"},
    {"primitive_score": "probability", "affinity": "cross"},
    {"balance": 0.1, "isolation": 0.1, "n_shared": 2},
    {"learn_primitives": False, "learn_context": False},
]


@families
@pytest.mark.parametrize("config", REGULARISED)
def test_it_keeps_the_promises_of_a_head(context: Context, config: dict[str, Any]) -> None:
    """With as many experts kept as there are: one that no token chooses has no gradient."""
    testing.check_head(load_method("eva"), eva.Config(n_experts=3, top_k=3, **config), context)


@families
def test_regularisers_are_their_definitions(context: Context) -> None:
    head = moved(head_of(context, balance=0.5, isolation=0.25))
    batch = batch_of(context, **{"image/pixels": pixels(context)})
    loss, parts = head.loss(batch)
    plain = sum(
        float(parts[f"{k}_loss"]) * w
        for k, w in (
            ("pair", 1),
            ("attr", 1),
            ("obj", 1),
            ("attr_variant", 0.1),
            ("obj_variant", 0.1),
        )
    )
    extra = 0.5 * float(parts["balance_loss"]) + 0.25 * float(parts["isolation_loss"])
    assert float(loss.detach()) == pytest.approx(plain + extra, rel=1e-4)
    spread, towers = [], head._adapters()
    with shared_out(towers["image"]) as shares:
        head._images(batch.queries)
    with shared_out(towers["text"]) as more:
        head.gather([batch.candidates])
    for share in (one for some in (*shares.values(), *more.values()) for one in some):
        flat = share.reshape(-1, share.shape[-1])
        first = torch.stack([(flat.argmax(1) == e).float().mean() for e in range(flat.shape[1])])
        spread.append(float((flat.shape[1] * (first * flat.mean(0)).sum()).detach()))
    assert float(parts["balance_loss"]) == pytest.approx(sum(spread) / len(spread), rel=1e-4)


@families
@torch.no_grad()
def test_routing_is_the_mean_share_over_the_rows_of_an_image(context: Context) -> None:
    head = moved(head_of(context, image_chunk=2)).eval()
    queries = Features({"image/pixels": pixels(context)})
    found = head.routing(queries)
    assert found is not None
    assert found.shape == (B, 2, 8)
    assert torch.allclose(found.sum(-1), torch.ones(B, 2))
    one = head.routing(queries.take(torch.tensor([3])))
    assert one is not None
    assert torch.allclose(found[3], one[0], atol=1e-5)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"cut": 9}, "head.cut is 9, but the image tower of .* has 2 blocks"),
        ({"image_blocks": 9}, "the last 9 image blocks"),
        ({"text_blocks": 9}, "the last 9 text blocks"),
    ],
)
def test_more_blocks_than_the_tower_has(
    contexts: dict[str, Context], config: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        head_of(contexts["clip"], **config)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"top_k": 9}, "top_k is 9, but there are 8"),
        ({"cut": 1, "image_blocks": 2}, "only the last 1 are run"),
        ({"image_blocks": 0}, "image_to_text needs experts"),
        (
            {
                "image_blocks": 0,
                "image_to_text": False,
                "text_blocks": 0,
                "learn_primitives": False,
                "learn_context": False,
            },
            "nothing is left to train",
        ),
    ],
)
def test_settings_that_contradict_each_other(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        eva.Config(**config)


def test_a_saved_head_is_its_own_weights_alone(contexts: dict[str, Context]) -> None:
    """Experts, routers, prompts and temperatures: nothing of the towers."""
    names = {name.split(".")[0] for name in head_of(contexts["clip"]).state_dict()}
    assert names == {"experts", "prompts", "log_tau"}


@families
@pytest.mark.parametrize("blocks", [0, 1])
def test_text_blocks_that_hold_nothing_trained_are_run_once(context: Context, blocks: int) -> None:
    """Words fixed, experts in the last blocks alone: the same losses and weights, step after step, as from block 0."""
    batch = batch_of(context, **{"image/block_-1": entering(context, 1)})
    fixed = {"learn_primitives": False, "learn_context": False}
    heads = [
        head_of(context, cut=1, text_blocks=blocks, chunk=chunk, **fixed) for chunk in (512, 4)
    ]
    assert heads[0].prompts.fixed_blocks == heads[0].prompts.live.on("cpu").depth["text"] - blocks
    heads.append(head_of(context, cut=1, text_blocks=blocks, **fixed))
    heads[-1].prompts.fixed_blocks = 0
    found = []
    for head in heads:
        head.train()
        step, losses = torch.optim.AdamW(head.parameters(), lr=1e-2), []
        for _ in range(3):
            step.zero_grad()
            loss, _ = head.loss(batch)
            loss.backward()
            losses.append(float(loss.detach()))
            step.step()
        head.eval()
        with torch.no_grad():
            found.append(
                (losses, head(batch.queries, pairs(context).take(torch.tensor([0, 3, 1]))))
            )
    for losses, scores in found[:2]:
        assert losses == pytest.approx(found[2][0], abs=1e-5)
        assert torch.allclose(scores, found[2][1], atol=1e-5)
    assert 0 < len(heads[0].prompts._entering) <= 4
