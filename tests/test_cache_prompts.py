"""Prompts at every block are the library's own layers on states whose rows were overwritten, in every family.

The reference runs the library's whole stack on the same states, with hooks that put the rows in. The same operations on
the same batch: nothing may differ.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import kinds
import pytest
import torch
from kinds import KINDS, OPEN_CLIP, Seen, final_norm
from torch import Tensor
from transformers.masking_utils import create_bidirectional_mask

from cache_builder.backbones.two_towers import TwoTowers
from cache_builder.errors import UnknownName
from cache_builder.testing import NonConformance, check_backbone


@pytest.fixture
def model(kind: str) -> TwoTowers:
    return kinds.model(kind)


every = pytest.mark.parametrize("kind", KINDS)
sides = pytest.mark.parametrize("side", ["image", "text"])


@contextmanager
def overwritten(blocks: Any, at: int, rows: Tensor) -> Generator[None]:
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


def run_with(
    model: TwoTowers, side: str, states: Tensor, mask: Any, end: Tensor, prompts: Any
) -> Any:
    """Streams of a side from what enters it, under prompts."""
    if side == "text":
        return model.encode_embedded(states, end, prompts=prompts)
    return model.resume_from("image", 0, states, mask=mask, prompts=prompts)


@every
@sides
@torch.no_grad()
def test_a_function_that_looks_at_nothing_is_the_tensor_it_takes_its_rows_from(
    kind: str, model: TwoTowers, side: str
) -> None:
    m = 3
    states, mask, end, _ = kinds.entering(kind, model, side, m)
    prompts = torch.randn(len(states), 2, m, states.shape[-1])
    for depth in (1, 2):  # behind the first block rows go on as they are, or are put in anew
        some = prompts[:, :depth]
        got, want = (
            run_with(model, side, states, mask, end, given)
            for given in (lambda k, _, some=some: some[:, k] if k < some.shape[1] else None, some)
        )
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


@every
@sides
@torch.no_grad()
def test_a_function_sees_each_token_in_its_own_row_before_every_block(
    kind: str, model: TwoTowers, side: str
) -> None:
    """Once a block, the states that enter it, without the prompts that stand among them."""
    m = 2
    states, mask, end, at = kinds.entering(kind, model, side, m)
    rows = torch.randn(model.depth[side], m, states.shape[-1])
    seen: list[Tensor] = []

    def made(k: int, shown: Tensor) -> Tensor:
        assert k == len(seen)
        seen.append(shown)
        return rows[k].expand(len(shown), -1, -1)

    with Seen({str(k): block for k, block in enumerate(model.blocks(side))}) as entered:
        run_with(model, side, states, mask, end, made)
    assert len(seen) == len(entered) >= 2
    assert torch.equal(seen[0], states)  # of texts: before positions are added
    for k in range(1, len(seen)):
        whole = entered[str(k)]
        assert torch.equal(whole[:, at : at + m], rows[k].expand(len(whole), -1, -1))
        assert torch.equal(seen[k], torch.cat([whole[:, :at], whole[:, at + m :]], 1))


@every
@sides
def test_gradients_pass_through_the_states_that_a_function_is_shown(
    kind: str, model: TwoTowers, side: str
) -> None:
    """By the chain rule: of a function, the sum of what its rows do and what the states do by themselves."""
    states, mask, end, _ = kinds.entering(kind, model, side, 2)
    weight = torch.randn(model.depth[side], 1, states.shape[-1])

    def slope(function: bool) -> Tensor:
        given = states.detach().clone().requires_grad_()
        seen = list[tuple[Tensor, Tensor]]()

        def made(k: int, shown: Tensor) -> Tensor:
            rows = (shown.mean(1, keepdim=True) * weight[k]).expand(-1, 2, -1)
            if not function:
                seen.append((rows, rows.detach().requires_grad_()))
                return seen[-1][1]
            return rows

        out = run_with(model, side, given, mask, end, made)
        name = "tokens" if side == "text" else "patches"
        out[name].float().pow(3).mean().backward(retain_graph=True)
        for rows, cut in reversed(seen):  # what the rows' own gradient still has to pass on
            assert cut.grad is not None
            rows.backward(cut.grad, retain_graph=True)
        assert given.grad is not None
        return given.grad

    torch.testing.assert_close(slope(function=True), slope(function=False), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_rows_that_end_at_once_are_none_and_are_asked_for_once() -> None:
    model = kinds.model("clip")
    states, _, end, _ = kinds.entering("clip", model, "text", 2)
    asked: list[int] = []

    def none(k: int, shown: Tensor) -> None:
        asked.append(k)

    got = model.encode_embedded(states, end, prompts=none)
    assert asked == [0]
    assert torch.equal(got["pooled"], model.encode_embedded(states, end)["pooled"])


def test_a_function_that_changes_the_number_of_its_rows_is_refused() -> None:
    model = kinds.model("pe")
    states, _, end, _ = kinds.entering("pe", model, "text", 4)
    with pytest.raises(UnknownName, match="3 prompts before block 1, but 2 before the first"):
        model.encode_embedded(
            states, end, prompts=lambda k, s: s.new_zeros(len(s), 2 + k, s.shape[-1])
        )


@pytest.mark.parametrize("kind", ["clip", "siglip2"])
def test_rows_of_a_function_are_counted_before_anything_runs(kind: str) -> None:
    model = kinds.model(kind)
    states, _, end, _ = kinds.entering(kind, model, "text", 0)
    n = model.spec.dims["context"]
    states = torch.cat(
        [states, states.new_zeros(len(states), n - states.shape[1], states.shape[2])], 1
    )
    ran: list[int] = []
    hook = model.blocks("text")[0].register_forward_pre_hook(lambda *_: ran.append(0))
    with pytest.raises(UnknownName, match=f"{n + 2} rows, 2 of them prompts, do not fit"):
        model.encode_embedded(states, end, prompts=lambda _, s: s[:, :2])
    hook.remove()
    assert not ran


class ShowsPrompts(TwoTowers):
    """Shows a function what stands in the tower, prompts and all."""

    def encode_embedded(self, embedded: Any, end: Any, *, prompts: Any = None) -> Any:
        if callable(prompts):
            inner = prompts
            prompts = lambda k, s: inner(k, torch.cat([s[:, :2], s], 1) if k else s)  # noqa: E731
        return super().encode_embedded(embedded, end, prompts=prompts)


class CutsGradients(TwoTowers):
    """Shows a function states that lead nowhere."""

    def resume_from(self, *given: Any, prompts: Any = None, **named: Any) -> Any:
        inner = prompts
        if callable(inner):
            prompts = lambda k, s: inner(k, s.detach())  # noqa: E731
        return super().resume_from(*given, prompts=prompts, **named)


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        (ShowsPrompts, "text prompts: a function is shown"),
        (CutsGradients, "image prompts: no gradient passes through the states"),
    ],
)
def test_the_suite_catches_a_family_that_shows_functions_something_else(
    broken: type[TwoTowers], fault: str
) -> None:
    model = kinds.load("clip", kinds.directory("clip"))
    model.__class__ = broken
    with pytest.raises(NonConformance, match=fault):
        check_backbone(model)
