"""Entering an encoder: pseudo-words, gradients, cut training, and what is refused, in every family."""

from pathlib import Path

import kinds
import pytest
import torch
from kinds import KINDS, WHOLE, Seen, largest, stacked
from torch import nn

from cache_builder.backbones.two_towers import TwoTowers
from cache_builder.errors import UnknownName

FUSED = 2e-6
"""nn.MultiheadAttention without a mask takes a fused kernel where no gradient is asked for: 9e-7 measured."""


@pytest.fixture
def model(kind: str) -> TwoTowers:
    return kinds.model(kind)


every = pytest.mark.parametrize("kind", KINDS)
sides = pytest.mark.parametrize("side", ["image", "text"])


@every
@torch.no_grad()
def test_a_pseudo_word_in_the_row_of_a_slot_is_that_word(kind: str, model: TwoTowers) -> None:
    slot, word = model.tokenize(["a red ~", "~"]), model.tokenize(["a red z", "z"])
    if kind == "siglip2":  # whose normaliser deletes the sign
        slot = model.tokenize(["a red q", "q"])
    if kind == "siglip2-naflex":  # one sign, one token, only for letters
        slot = model.tokenize(["a red q", "q"])
    changed = slot != word
    assert changed.sum(1).tolist() == [1, 1]
    embedded = model.embed_tokens(slot)
    vector = model.embed_tokens(word)[changed][0]
    embedded[changed] = vector  # what a method would learn
    assert model.text is not None
    end = model.text.tokens.ends(slot)
    ours, whole = model.encode_embedded(embedded, end), model.encode_texts(word)
    for i, n in enumerate((model.lengths(word) - 1).tolist()):
        assert torch.equal(ours["tokens"][i, :n], whole["tokens"][i, :n])
    if "pooled" in whole:
        assert torch.equal(ours["pooled"], whole["pooled"])
    before = model.encode_texts(slot)["tokens"]
    assert largest(before[:, :2], whole["tokens"][:, :2]) > 0  # the second text begins with it


def frozen(model: TwoTowers) -> bool:
    return all(p.grad is None and not p.requires_grad for p in model.model.parameters())


@every
@sides
def test_gradients_reach_what_was_injected_and_nothing_frozen(
    kind: str, model: TwoTowers, side: str
) -> None:
    states, mask, end, _ = kinds.entering(kind, model, side, 2)
    states = states.detach().requires_grad_()
    prompts = torch.randn(2, 2, states.shape[-1], requires_grad=True)
    if side == "text":
        found = model.encode_embedded(states, end, prompts=prompts)
    else:
        found = model.resume_from("image", 0, states, mask=mask, prompts=prompts)
    target = found.get("pooled", found["tokens" if side == "text" else "patches"])
    target.float().pow(3).sum().backward()
    assert states.grad is not None
    assert prompts.grad is not None
    assert (prompts.grad.abs().amax((1, 2)) > 0).all()  # at each block
    reached = states.grad.abs().amax(-1) > 0
    real = mask if mask is not None else torch.ones_like(reached)
    if (
        side == "text" and kind not in WHOLE and "pooled" in found
    ):  # causal: rows up to the pooled one
        real = torch.arange(reached.shape[1]) <= end[:, None]
    assert torch.equal(reached, real)
    assert frozen(model)


@every
@sides
def test_gradients_pass_from_a_cached_block(kind: str, model: TwoTowers, side: str) -> None:
    """Cut training: what a cache holds of block 1 goes on through the rest, and asks for gradients."""
    pixels = stacked(model)
    if side == "image":
        out = model.encode_images(pixels, [1])
        assert not any(value.requires_grad for value in out.values())
        states = out["block_1"].clone().requires_grad_()
        mask = pixels["mask"].bool() if isinstance(pixels, dict) else None
        found = model.resume_from("image", 1, states, mask=mask)
        assert all(largest(value, out[name]) <= FUSED for name, value in found.items())
    else:
        whole, _, end, _ = kinds.entering(kind, model, side, 0)
        with Seen({"1": model.blocks("text")[1]}) as seen, torch.no_grad():
            out = model.encode_embedded(whole, end)
        states = seen["1"].clone().requires_grad_()
        found = model.resume_from("text", 1, states, end=end)
        assert largest(found["tokens"], out["tokens"]) <= FUSED
    next(iter(found.values())).float().pow(2).sum().backward()
    assert states.grad is not None
    assert states.grad.abs().sum() > 0
    assert frozen(model)


@pytest.mark.parametrize("kind", WHOLE)
@torch.no_grad()
def test_a_text_tower_without_mask_refuses_fewer_rows(model: TwoTowers) -> None:
    assert model.text is not None
    ids, n = model.tokenize(["a red mug"]), model.spec.dims["context"]
    embedded, end = model.embed_tokens(ids), model.text.tokens.ends(ids)
    match = (
        f"no mask and needs all {n} rows, padding included; it was given {n - 1}, 0 of them prompts"
    )
    with pytest.raises(UnknownName, match=match):
        model.encode_embedded(embedded[:, : n - 1], end)
    with pytest.raises(UnknownName, match=match):
        model.resume_from("text", 1, embedded[:, : n - 1])
    prompts = torch.randn(1, 2, embedded.shape[-1])
    with pytest.raises(UnknownName, match=f"it was given {n - 1}, 2 of them prompts"):
        model.encode_embedded(embedded[:, : n - 3], end, prompts=prompts)
    model.encode_embedded(embedded[:, : n - 2], end - 2, prompts=prompts)


@every
@torch.no_grad()
def test_too_many_rows_are_refused_with_numbers(kind: str, model: TwoTowers) -> None:
    n, width = model.spec.dims["context"], model.spec.dims["text_width"]
    embedded, end = torch.zeros(1, n, width), torch.tensor([0])
    prompts = torch.randn(1, 2, width)
    match = f"{n + 2} rows, 2 of them prompts, do not fit the text tower's {n} positions"
    with pytest.raises(UnknownName, match=match):
        model.encode_embedded(embedded, end, prompts=prompts)
    with pytest.raises(UnknownName, match=match):
        model.resume_from("text", 1, embedded, prompts=prompts)
    with pytest.raises(UnknownName, match=f"{n + 1} rows, 0 of them prompts"):
        model.encode_embedded(torch.zeros(1, n + 1, width), end)


@every
@sides
def test_a_block_that_does_not_exist_is_refused(kind: str, model: TwoTowers, side: str) -> None:
    depth = model.depth[side]
    states = torch.zeros(1, 2, model.spec.dims[f"{side}_width"])
    for block in (-1, depth + 1):
        match = f"{side} tower has blocks 0 … {depth}, asked to resume at {block}"
        with pytest.raises(UnknownName, match=match):
            model.resume_from(side, block, states)


@every
@sides
def test_the_modules_that_adapters_wrap_are_the_ones_that_run(
    kind: str, model: TwoTowers, side: str
) -> None:
    """What `blocks` lists is called once each, in order, in a plain pass; `tower` holds them all."""
    blocks = model.blocks(side)
    called: list[int] = []
    hooks = [
        block.register_forward_pre_hook(lambda *_, k=k: called.append(k))
        for k, block in enumerate(blocks)
    ]
    if side == "image":
        model.encode_images(stacked(model))
    else:
        model.encode_texts(model.tokenize(["a red mug"]))
    for hook in hooks:
        hook.remove()
    assert called == list(range(model.depth[side]))
    assert {*blocks} <= {*model.tower(side).modules()}
    assert isinstance(model.tower(side), nn.Module)


def test_a_model_without_text_says_so(tmp_path: Path) -> None:
    KINDS["llava"].write(tmp_path / "tiny")
    alone = kinds.load("llava", Path(f"{tmp_path / 'tiny'}@vision"))
    for call in (
        lambda: alone.tokenize(["a"]),
        lambda: alone.blocks("text"),
        lambda: alone.vocabulary(),
        lambda: alone.embed_tokens(torch.zeros(1, 1, dtype=torch.int64)),
    ):
        with pytest.raises(
            UnknownName, match=r"llava:tiny@vision was loaded without its text tower"
        ):
            call()
