"""Routers and expert prompts as blocks: every kind of routing against its equation, in the towers of all families."""

from typing import Any

import kinds
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cache_builder.backbones.two_towers import TwoTowers
from heads.blocks.moe import ExpertPrompts, Router, balance

every = pytest.mark.parametrize("kind", ["clip", "pe", "siglip2", "siglip2-hub"])
reads = pytest.mark.parametrize("router", ["pseudo_word", "eos", "both"])

E, M = 3, 2


@pytest.fixture
def model(kind: str) -> TwoTowers:
    return kinds.model(kind)


def made(model: TwoTowers, n_experts: int = E, depth: int | None = None, **named: Any) -> Any:
    """Prompts with routers that have made up their minds."""
    torch.manual_seed(0)
    width = model.spec.dims["text_width"]
    prompts = ExpertPrompts(n_experts, M, depth or model.depth["text"], width, **named)
    for weight in prompts.routers.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return prompts


def entered(model: TwoTowers, kind: str, texts: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Embedded tokens that leave room for the prompts, the row of the third word, the row that is pooled."""
    ids = model.tokenize(texts)
    width = (
        model.spec.dims["context"] - M if kind in kinds.WHOLE else int(model.ends(ids).max()) + 1
    )
    end = model.ends(ids[:, :width])
    return model.embed_tokens(ids[:, :width]), torch.full_like(end, 3), end


def routed(
    model: TwoTowers, prompts: ExpertPrompts, embedded: Tensor, slot: Tensor, end: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Pooled texts, and the shares at every block."""
    shares: list[Tensor] = []
    before = prompts.at(slot, end, lambda _, share: shares.append(share))
    return model.encode_embedded(embedded, end, prompts=before)["pooled"], shares


def softmax(logits: Tensor) -> Tensor:
    return logits.exp() / logits.exp().sum(-1, keepdim=True)


@every
@reads
@torch.no_grad()
def test_prompts_of_each_block_are_mixed_by_the_states_that_enter_it(
    kind: str, model: TwoTowers, router: Any
) -> None:
    """Block by block, from the definition, with what stood in the tower before it."""
    prompts = made(model, router=router, temperature=0.7)
    embedded, slot, end = entered(model, kind, ("a red mug", "two old buildings"))
    pooled, shares = routed(model, prompts, embedded, slot, end)
    assert model.text is not None
    at, states, depth = model.text.tokens.first_free, embedded, len(prompts.experts)
    assert len(shares) == depth == model.depth["text"]
    for k, block in enumerate(model.blocks("text")):
        rows = []
        for i in range(len(states)):
            at_word = F.layer_norm(states[i, slot[i]], states.shape[2:])
            at_end = F.layer_norm(states[i, end[i]], states.shape[2:])
            weight = prompts.routers[k].weight
            logits = {
                "pseudo_word": lambda w=weight, x=at_word: w @ x,
                "eos": lambda w=weight, y=at_end: w @ y,
                "both": lambda w=weight, x=at_word, y=at_end: (
                    w[:, : len(x)] @ x + w[:, len(x) :] @ y
                ),
            }[router]()
            share = softmax(logits / 0.7)
            torch.testing.assert_close(shares[k][i], share, rtol=1e-3, atol=1e-5)
            rows.append(sum(share[e] * prompts.experts[k, e] for e in range(E)))
        whole = torch.cat([states[:, :at], torch.stack(rows), states[:, at:]], 1)
        whole = model.text.run(block, model.text.place(whole) if k == 0 else whole)
        states = torch.cat([whole[:, :at], whole[:, at + M :]], 1)
    torch.testing.assert_close(pooled, model.text.pool(states, end), rtol=1e-3, atol=1e-4)


@every
@pytest.mark.parametrize("depth", [1, 2, 3])
@torch.no_grad()
def test_one_expert_is_a_plain_deep_prompt(kind: str, model: TwoTowers, depth: int) -> None:
    prompts = made(model, n_experts=1, depth=depth)
    embedded, slot, end = entered(model, kind, ("a red mug", "two old buildings"))
    pooled, shares = routed(model, prompts, embedded, slot, end)
    plain = model.encode_embedded(embedded, end, prompts=prompts.experts[:, 0])["pooled"]
    assert torch.equal(pooled, plain)
    assert not shares
    assert [name for name, _ in prompts.named_parameters()] == ["experts"]


@every
@reads
def test_everything_learns_and_nothing_frozen_does(
    kind: str, model: TwoTowers, router: Any
) -> None:
    """Every expert, every row of every router, and what stands in the slot."""
    prompts = made(model, router=router)
    embedded, slot, end = entered(model, kind, ("a red mug", "two old buildings"))
    embedded = embedded.detach().requires_grad_()
    pooled, shares = routed(model, prompts, embedded, slot, end)
    pooled.pow(3).sum().backward()
    for name, p in prompts.named_parameters():
        assert p.grad is not None, name
        assert bool((p.grad.flatten(1).abs().sum(1) > 0).all()), name
    assert embedded.grad is not None
    assert bool((embedded.grad[:, 3] != 0).any())
    assert all(share.requires_grad for share in shares)  # a loss may ask for balance
    assert all(p.grad is None for p in model.model.parameters())


@pytest.mark.parametrize("kind", ["clip", "pe"])
@torch.no_grad()
def test_a_causal_tower_hides_the_edit_from_the_pseudo_word_and_not_from_the_end(
    kind: str, model: TwoTowers
) -> None:
    """Same beginning, other edits; at block 0 the end of text is one embedding, whatever stands before it."""
    embedded, slot, end = entered(model, kind, ("a red mug is wet", "a red mug has no lid"))
    assert torch.equal(embedded[0, :4], embedded[1, :4])
    blind = routed(model, made(model, router="pseudo_word"), embedded, slot, end)[1]
    seeing = routed(model, made(model, router="eos"), embedded, slot, end)[1]
    for share in blind:
        torch.testing.assert_close(share[0], share[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(seeing[0][0], seeing[0][1], rtol=0, atol=1e-6)
    assert all(float((share[0] - share[1]).abs().max()) > 1e-3 for share in seeing[1:])


@torch.no_grad()
def test_a_tower_without_mask_shows_the_edit_to_the_pseudo_word() -> None:
    model = kinds.model("siglip2")
    embedded, slot, end = entered(model, "siglip2", ("a red mug is wet", "a red mug has no lid"))
    shares = routed(model, made(model, router="pseudo_word"), embedded, slot, end)[1]
    torch.testing.assert_close(
        shares[0][0], shares[0][1], rtol=0, atol=1e-6
    )  # before block 0 no row has seen another
    assert float((shares[1][0] - shares[1][1]).abs().max()) > 1e-4


@torch.no_grad()
def test_one_state_does_not_drown_the_other() -> None:
    """Each is normalised by itself: how large a row is says nothing."""
    torch.manual_seed(0)
    router, x, y = Router(4, 6, n_states=2), torch.randn(3, 6), torch.randn(3, 6)
    torch.nn.init.normal_(router.weight)
    torch.testing.assert_close(router(x, 300 * y), router(x, y), rtol=1e-4, atol=1e-5)
    assert float((router(x, y) - router(x, y.flip(0))).abs().max()) > 0.01


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_tokens_are_routed_each_by_itself(top_k: int | None) -> None:
    """Rows (B, L, V) as well as (B, V); shares sum to 1, as many as are kept are not 0."""
    torch.manual_seed(0)
    router, tokens = Router(4, 6, top_k=top_k), torch.randn(2, 5, 6)
    torch.nn.init.normal_(router.weight)
    share = router(tokens)
    assert share.shape == (2, 5, 4)
    torch.testing.assert_close(share.sum(-1), torch.ones(2, 5))
    assert bool(((share > 0).sum(-1) == (top_k or 4)).all())
    torch.testing.assert_close(share[1, 3], router(tokens[1, 3][None])[0])


def test_temperature_sharpens() -> None:
    torch.manual_seed(0)
    warm, x = Router(4, 6, temperature=1.0), torch.randn(5, 6)
    cold = Router(4, 6, temperature=0.05)
    cold.weight.data = warm.weight.data
    assert bool((cold(x).amax(-1) > warm(x).amax(-1)).all())
    assert torch.equal(cold(x).argmax(-1), warm(x).argmax(-1))


def test_recomputing_gives_the_same_and_adds_nothing() -> None:
    """Under checkpointing the function is called again; shares are those of the call, gradients are not doubled."""
    model = kinds.model("clip")
    embedded, slot, end = entered(model, "clip", ("a red mug", "two old buildings"))
    prompts = made(model, router="both")

    def run(embedded: Tensor) -> tuple[Tensor, ...]:
        pooled, shares = routed(model, prompts, embedded, slot, end)
        return pooled, *shares

    found = []
    for recompute in (False, True):
        prompts.zero_grad()
        given = embedded.detach().clone().requires_grad_()
        out = checkpoint(run, given, use_reentrant=False) if recompute else run(given)
        pooled, *shares = out
        (pooled.pow(3).sum() + sum(balance(share) for share in shares)).backward()
        grads = [p.grad.clone() for p in prompts.parameters() if p.grad is not None]
        found.append([pooled, *shares, given.grad, *grads])
    assert len(found[0]) == len(found[1]) == 2 + 2 * len(prompts.routers) + 1
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_balance_is_its_equation_and_draws_shares_from_the_fullest() -> None:
    """E Σ f p; only p carries a gradient, f_e E / B of it to each share of e."""
    torch.manual_seed(0)
    share = torch.randn(9, 4).softmax(-1).requires_grad_()
    rows = share.tolist()
    often = [sum(row.index(max(row)) == e for row in rows) / 9 for e in range(4)]
    mean = [sum(row[e] for row in rows) / 9 for e in range(4)]
    got = balance(share)
    assert got.item() == pytest.approx(4 * sum(f * p for f, p in zip(often, mean, strict=True)))
    got.backward()
    torch.testing.assert_close(share.grad, (torch.tensor(often) * 4 / 9).expand(9, 4))


@every
def test_half_precision_stays_finite_and_routes_in_full(kind: str, model: TwoTowers) -> None:
    half = kinds.load(kind, kinds.directory(kind), dtype="bfloat16")
    prompts = made(model, router="both")
    embedded, slot, end = entered(half, kind, ("a red mug", "two old buildings"))
    with torch.autocast("cpu", torch.bfloat16):
        pooled, shares = routed(half, prompts, embedded, slot, end)
    pooled.float().pow(3).sum().backward()
    assert bool(pooled.isfinite().all())
    assert {share.dtype for share in shares} == {torch.float32}
    grads = [p.grad for p in prompts.parameters() if p.grad is not None]
    assert len(grads) == 1 + len(prompts.routers)
    assert all(bool(g.isfinite().all()) for g in grads)
    whole, _ = routed(model, prompts, *entered(model, kind, ("a red mug", "two old buildings")))
    cosine = F.cosine_similarity(whole, pooled.float())
    assert bool((cosine > 0.99).all())
