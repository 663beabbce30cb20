"""Pseudo-words, expert prompts and other weights inside a frozen text tower, on the bundled backbones."""

from contextlib import suppress
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from cache_builder import load_backbone
from heads.base import Context
from heads.blocks.lora import Copy, LoRA, under, used_by
from heads.blocks.moe import ExpertPrompts, Router, balance
from heads.blocks.prompts import word_ids
from heads.blocks.pseudo_words import PseudoWords, pieces_of
from heads.errors import ConfigError
from heads.live import LiveBackbone
from heads.methods.inversion import keyword_pieces

every = pytest.mark.parametrize("family", ["clip", "siglip2", "pe"])
LONG = " ".join(["is red and has a bow"] * 20)
WORD = "red"  # one token in the vocabulary of the bundled backbones


@cache
def live_of(family: str) -> LiveBackbone:
    name = f"{family}:demo"
    return LiveBackbone(
        Context({}, backbone=load_backbone(name).spec, backbone_name=name), "a test"
    )


def embedding(live: LiveBackbone, n: int = 1) -> Tensor:
    backbone = live.on("cpu")
    ids = word_ids(backbone, WORD)
    assert len(ids) == 1
    return backbone.embed_tokens(ids[None])[0].float().expand(n, -1)


def written(live: LiveBackbone, text: str) -> Tensor:
    """What the library makes of a text."""
    backbone = live.on("cpu")
    return backbone.encode_texts(backbone.tokenize([text]))["pooled"]


@every
@pytest.mark.parametrize(
    "edit", ["is red", "", LONG, "costs $ 5, not $"], ids=["short", "none", "long", "dollar"]
)
def test_the_embedding_of_a_word_in_the_slot_is_that_word(family: str, edit: str) -> None:
    live = live_of(family)
    texts = PseudoWords(live)
    got = texts.encode(embedding(live), [pieces_of("a photo of $ that {modification}", edit)])
    assert torch.allclose(got, written(live, f"a photo of {WORD} that {edit}"), atol=2e-5)
    assert len(texts.cut) == (edit == LONG)


@every
def test_every_slot_of_a_caption_is_opened_where_it_belongs(family: str) -> None:
    live = live_of(family)
    pieces = keyword_pieces("a blue ball left of two wooden chairs")
    assert pieces == ("a", "left of two", "")
    got = PseudoWords(live).encode(embedding(live), [pieces])
    assert torch.allclose(got, written(live, f"a {WORD} left of two {WORD}"), atol=2e-5)


@every
def test_a_slot_that_was_cut_off_is_left_out(family: str) -> None:
    live = live_of(family)
    texts = PseudoWords(live)
    for pieces in (("a photo of", LONG, ""), ("a photo of", LONG)):
        assert torch.isfinite(texts.encode(embedding(live), [pieces])).all()
        assert int(texts._rows[pieces].slot.sum()) == 1
    assert texts.cut


@every
@pytest.mark.parametrize("recompute", [False, True])
def test_parts_by_length_and_recomputing_change_nothing(family: str, recompute: bool) -> None:
    live = live_of(family)
    said = [
        pieces_of("a photo of $ that {modification}", e) for e in ("is red", LONG, "", "has a bow")
    ]
    torch.manual_seed(0)
    prompts = ExpertPrompts(3, 2, 2, live.on("cpu").spec.dims["text_width"], router="both")
    found = []
    for chunk, again in ((100, False), (1, recompute), (3, recompute)):
        words = torch.randn(4, embedding(live).shape[1], generator=torch.Generator().manual_seed(1))
        words.requires_grad_()
        prompts.zero_grad()
        texts = PseudoWords(live, reserve=2, chunk=chunk, recompute=again)
        pooled, shares = texts.prompted(words, said, prompts)
        (pooled.sin().sum() + sum(s.square().sum() for s in shares)).backward()
        grads = [p.grad.clone() for p in prompts.parameters() if p.grad is not None]
        found.append([pooled, *shares, words.grad, *grads])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.allclose(a, b, atol=2e-5)


@every
def test_prompts_stand_before_the_words_and_take_rows_from_a_long_text_alone(family: str) -> None:
    """Prompts that are token embeddings, before the first block alone, are those tokens."""
    live = live_of(family)
    backbone = live.on("cpu")
    for edit, cut in (("is red", False), (LONG, True)):
        texts = PseudoWords(live, reserve=2)
        prompts = ExpertPrompts(1, 2, 1, embedding(live).shape[1])
        prompts.experts.data[0, 0] = embedding(live, 2)
        said = [pieces_of("a photo of $ that {modification}", edit)]
        got, shares = texts.prompted(embedding(live), said, prompts)
        want = written(live, f"{WORD} {WORD} a photo of {WORD} that {edit}")
        assert torch.allclose(got, want, atol=2e-5)
        assert not shares
        assert bool(texts.cut) == cut
    assert not any(p.requires_grad for p in backbone.tower("text").parameters())


def test_too_many_prompts_are_refused() -> None:
    live = live_of("clip")
    with pytest.raises(ConfigError, match="prompts leave"):
        PseudoWords(live, reserve=live.on("cpu").spec.dims["context"] - 2)


def test_routing_is_the_softmax_of_a_normed_state() -> None:
    torch.manual_seed(0)
    router, state = Router(4, 6, temperature=0.5), torch.randn(3, 6)
    for row, share in zip(state, router(state), strict=True):
        normed = (row - row.mean()) / (row.var(unbiased=False) + 1e-5).sqrt()
        logits = torch.stack([(w * normed).sum() / 0.5 for w in router.weight])
        assert torch.allclose(share, logits.exp() / logits.exp().sum(), atol=1e-6)
    kept = Router(4, 6, top_k=2)
    kept.weight.data = router.weight.data
    dense = Router(4, 6)
    dense.weight.data = router.weight.data
    for full, few in zip(dense(state), kept(state), strict=True):
        best = full.topk(2).indices
        want = torch.zeros(4)
        want[best] = full[best] / full[best].sum()
        assert torch.allclose(few, want, atol=1e-6)
    assert torch.allclose(kept(state).sum(-1), torch.ones(3))
    with pytest.raises(ConfigError, match="top_k"):
        Router(2, 6, top_k=3)


def test_balance_is_1_when_experts_are_used_alike_and_e_when_one_is_all() -> None:
    assert balance(torch.eye(4).repeat(3, 1)) == pytest.approx(1.0)
    assert balance(torch.eye(4)[[0, 0, 0]]) == pytest.approx(4.0)


def test_parameters_at_full_size() -> None:
    """METHODS ch. 9 at L/14: prompts 147,456 and routers 36,864."""
    prompts = ExpertPrompts(4, 4, 12, 768)
    assert prompts.experts.numel() == 147_456
    assert sum(p.numel() for p in prompts.routers.parameters()) == 36_864
    assert not list(ExpertPrompts(1, 4, 12, 768).routers)


@pytest.mark.parametrize(
    ("router", "sees"), [("pseudo_word", False), ("eos", True), ("both", True)]
)
def test_in_a_causal_tower_a_pseudo_word_routes_without_seeing_the_edit(
    router: Any, sees: bool
) -> None:
    live = live_of("clip")
    torch.manual_seed(0)
    prompts = ExpertPrompts(3, 2, 2, embedding(live).shape[1], router=router)
    for one in prompts.routers.parameters():
        torch.nn.init.normal_(one)
    said = [pieces_of("a photo of $ that {modification}", e) for e in ("is red", "has a bow on it")]
    _, shares = PseudoWords(live, reserve=2).prompted(embedding(live, 2), said, prompts)
    later = shares[1]  # at block 0 the end of text is the same embedding, whatever stands before it
    assert torch.allclose(later[0], later[1], atol=1e-6) != sees


@every
def test_a_prompt_is_the_mixture_that_the_shares_say(family: str) -> None:
    torch.manual_seed(0)
    live = live_of(family)
    prompts = ExpertPrompts(3, 2, 2, embedding(live).shape[1])
    told = {}
    before = prompts.at(
        torch.tensor([4]), torch.tensor([6]), lambda k, share: told.setdefault(k, share)
    )
    states = torch.randn(1, 8, embedding(live).shape[1])
    for k in range(2):
        rows = before(k, states)
        want = torch.stack([told[k][0, e] * prompts.experts[k, e] for e in range(3)]).sum(0)
        assert rows is not None
        assert torch.allclose(rows[0], want, atol=1e-6)
    assert before(2, states) is None


@every
def test_a_tower_under_other_weights_is_that_tower_and_is_itself_again(family: str) -> None:
    live = live_of(family)
    tower, said = live.on("cpu").model, [pieces_of("a photo of $")]
    texts, word = PseudoWords(live), embedding(live)
    names, before = [n for n, _ in tower.named_parameters()], texts.encode(word, said)
    of_text = used_by(tower, lambda: texts.encode(word, said))
    assert not [n for n in of_text if n.startswith("visual.")]
    assert any("embedding" in n for n in of_text)
    lora = LoRA(tower, of_text, rank=2)
    assert lora.names
    assert torch.allclose(texts.encode(word, said, lora.weights(tower)), before, atol=1e-5)
    for up in lora.up:
        torch.nn.init.normal_(up, std=0.1)
    changed = texts.encode(word, said, lora.weights(tower))
    assert not torch.allclose(changed, before, atol=1e-4)
    changed.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lora.parameters())
    # The same matrices written into the tower give the same numbers.
    kept = {n: tower.get_parameter(n).detach().clone() for n in lora.names}
    with torch.no_grad():
        for name, value in lora.weights(tower).items():
            tower.get_parameter(name).copy_(value)
        merged = texts.encode(word, said)
        for name, value in kept.items():
            tower.get_parameter(name).copy_(value)
    assert torch.allclose(merged, changed, atol=1e-6)
    assert [n for n, _ in tower.named_parameters()] == names
    assert torch.equal(texts.encode(word, said), before)
    copy = Copy(tower, of_text)
    assert torch.allclose(texts.encode(word, said, copy.weights(tower)), before, atol=1e-5)
    again = PseudoWords(live, recompute=True).encode(word, said, lora.weights(tower))
    assert torch.allclose(again, changed)


def test_an_error_under_other_weights_leaves_the_tower_as_it_was() -> None:
    layer = torch.nn.Linear(2, 2)
    before = {n: p.clone() for n, p in layer.named_parameters()}
    with suppress(ZeroDivisionError), under(layer, {"weight": torch.zeros(2, 2)}):
        assert torch.equal(layer(torch.ones(2)), layer.bias)
        _ = 1 / 0
    with (
        pytest.raises(AttributeError),
        under(layer, {"weight": torch.zeros(2, 2), "no": torch.zeros(1)}),
    ):
        pass
    assert "weight" not in layer.__dict__
    assert all(torch.equal(p, before[n]) for n, p in layer.named_parameters())


def test_targets_that_match_nothing_are_named() -> None:
    with pytest.raises(
        ConfigError, match=r"no matrix of the tower is called 'q_proj'; it has weight"
    ):
        LoRA(torch.nn.Linear(2, 2), ["weight", "bias"], rank=1, targets="q_proj")
