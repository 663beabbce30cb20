"""Prompts at every block are the library's own layers on states whose rows were overwritten, in every family.

The reference runs the library's whole stack on the same states, with hooks that put the rows in. The same operations on
the same batch: nothing may differ.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import kinds
import pytest
import torch
from kinds import KINDS, OPEN_CLIP, Seen, final_norm
from torch import Tensor
from transformers.masking_utils import create_bidirectional_mask

from cache_builder.backbones.two_towers import TwoTowers


@pytest.fixture
def model(kind: str) -> TwoTowers:
    return kinds.model(kind)


every = pytest.mark.parametrize("kind", KINDS)
sides = pytest.mark.parametrize("side", ["image", "text"])


@contextmanager
def overwritten(blocks: Any, at: int, rows: Tensor) -> Iterator[None]:
    """rows[j] stand at `at` … when block j begins, for j ≥ 1; the states of block 0 hold rows[0] already."""
    hooks = []
    for j in range(1, rows.shape[-3]):

        def put(_: Any, args: Any, kwargs: Any, j: int = j) -> Any:
            states = args[0] if args else kwargs.pop("hidden_states")
            m = rows.shape[-2]
            mine = rows[..., j, :, :].expand(len(states), -1, -1)
            states = torch.cat([states[:, :at], mine, states[:, at + m :]], 1)
            return (states, *args[1:]), kwargs

        hooks.append(blocks[j].register_forward_pre_hook(put, with_kwargs=True))
    yield
    for hook in hooks:
        hook.remove()


def run_library(
    kind: str, model: TwoTowers, side: str, states: Tensor, mask: Any, m: int
) -> Tensor:
    """The library's whole stack of a side on states that enter block 0; raw rows."""
    module: Any = model.model
    text = getattr(module, "text", module)
    if side == "text" and kind in OPEN_CLIP:
        l = states.shape[1]
        causal = None if text.attn_mask is None else text.attn_mask[:l, :l]
        return text.transformer(states, attn_mask=causal)
    if side == "text":
        if kind.startswith("llava"):
            with Seen({"raw": final_norm(model, "text")}) as seen:
                module.model.language_model(inputs_embeds=states)
            return seen["raw"]
        return module.text_model.encoder(inputs_embeds=states).last_hidden_state
    if hasattr(module, "visual") and not hasattr(module.visual, "trunk"):
        return module.visual.transformer(states)
    if kind in OPEN_CLIP:
        trunk = module.visual.trunk
        rope = {"rope": trunk.rope.get_embed()} if kind.startswith("pe") else {}
        for block in trunk.blocks if rope else ():
            block.attn.num_prefix_tokens += m
        for block in trunk.blocks:
            states = block(states, **rope)
        for block in trunk.blocks if rope else ():
            block.attn.num_prefix_tokens -= m
        return states
    if kind.startswith("llava"):
        encoder, depth = module.model.vision_tower.encoder, model.depth["image"]
        if depth == len(encoder.layers):
            return encoder(inputs_embeds=states).last_hidden_state
        with Seen({"raw": encoder.layers[depth]}) as seen:
            encoder(inputs_embeds=states)
        return seen["raw"]
    vision = module.vision_model
    if mask is not None:
        mask = torch.cat([mask.new_ones(len(mask), m), mask], 1)
        mask = create_bidirectional_mask(
            config=vision.config, inputs_embeds=states, attention_mask=mask
        )
    return vision.encoder(inputs_embeds=states, attention_mask=mask).last_hidden_state


@every
@sides
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("each", [False, True])
@torch.no_grad()
def test_prompts_stand_in_the_rows_of_their_blocks(
    kind: str, model: TwoTowers, side: str, depth: int, each: bool
) -> None:
    m = 3
    states, mask, end, at = kinds.entering(kind, model, side, m)
    generator = torch.Generator().manual_seed(0)
    shape = (len(states),) * each + (depth, m, states.shape[-1])
    prompts = torch.randn(shape, generator=generator)
    first = prompts[..., 0, :, :].expand(len(states), -1, -1)
    whole = torch.cat([states[:, :at], first, states[:, at:]], 1)
    if side == "text":
        assert model.text is not None
        found = model.encode_embedded(states, end, prompts=prompts)
        whole = model.text.place(whole)
    else:
        found = model.resume_from("image", 0, states, mask=mask, prompts=prompts)
    with overwritten(model.blocks(side), at, prompts):
        raw = run_library(kind, model, side, whole, mask, m)
    expected = torch.cat([raw[:, :at], raw[:, at + m :]], 1)
    if side == "text":
        assert torch.equal(found["tokens"], expected)
    else:
        assert torch.equal(found["patches"], expected[:, model.image.n_prefix :])
    if "pooled" in found:
        assert found["pooled"].shape == (len(states), model.spec.dims["joint"])
        plain = run_library(kind, model, side, whole, mask, m)
        other = torch.cat([plain[:, :at], plain[:, at + m :]], 1)
        assert torch.equal(other, expected) == (depth == 1)


@every
@sides
@torch.no_grad()
def test_prompts_leave_nothing_behind(kind: str, model: TwoTowers, side: str) -> None:
    states, mask, end, _ = kinds.entering(kind, model, side, 0)
    given = {"mask": mask} if side == "image" else {"end": end}
    if side == "text":
        assert model.text is not None
        states = model.text.place(states)
    before = model.resume_from(side, 0, states, **given)
    short, mask_, end_, _ = kinds.entering(kind, model, side, 2)
    prompts = torch.randn(2, 2, states.shape[-1])
    if side == "text":
        model.encode_embedded(short, end_, prompts=prompts)
    else:
        model.resume_from("image", 0, short, mask=mask_, prompts=prompts)
    after = model.resume_from(side, 0, states, **given)
    assert all(torch.equal(before[name], after[name]) for name in before)


@every
@sides
@torch.no_grad()
def test_prompts_may_begin_at_any_block(kind: str, model: TwoTowers, side: str) -> None:
    """Put in at block 1, they are rows of block 1; towers that need all their rows have no room for them there."""
    m = 2
    states, mask, end, at = kinds.entering(kind, model, side, m)
    prompts = torch.randn(1, m, states.shape[-1])
    rows = prompts[0].expand(len(states), -1, -1)
    found = model.resume_from(side, 1, states, prompts=prompts, mask=mask)
    whole = torch.cat([states[:, :at], rows, states[:, at:]], 1)
    both = whole
    if mask is not None:
        mask = torch.cat([mask.new_ones(len(mask), m), mask], 1)
    for block in model.blocks(side)[1:]:
        if side == "image":
            both = model.image.run(block, both, mask, m)
        else:
            assert model.text is not None
            both = model.text.run(block, both)
    expected = torch.cat([both[:, :at], both[:, at + m :]], 1)
    got = found["tokens"] if side == "text" else found["patches"]
    assert torch.equal(got, expected if side == "text" else expected[:, model.image.n_prefix :])
    assert ("pooled" in found) == (side == "image" and model.image.pools)
    del end
