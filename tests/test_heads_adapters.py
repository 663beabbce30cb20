"""Adapters beside the branches of a frozen tower: exact at first, where they say, gone afterwards; every family."""

from typing import Any

import kinds
import pytest
import torch
from test_heads_lora import encoded, entered, every, layout, sides
from timm.models.eva import EvaBlockPostNorm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cache_builder.backbones.branches import branches_of
from cache_builder.backbones.two_towers import TwoTowers
from cache_builder.errors import UnknownName
from heads.blocks.adapters import Beside, Bottleneck, Input, Part, Passed, last_blocks


@pytest.fixture
def model(kind: str) -> TwoTowers:
    return kinds.model(kind)


parts = pytest.mark.parametrize("part", ["attention", "feed_forward"])


class Constant(nn.Module):
    """Adds a vector, and remembers what it was given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.linspace(-1, 1, width))

    def forward(self, u: Tensor) -> Tensor:
        self.given = u
        return self.vector.expand_as(u)


def bottlenecks(model: TwoTowers, side: str, part: Part = "feed_forward") -> Beside:
    width = model.spec.dims[f"{side}_width"]
    made = {k: Bottleneck(width, 3, scale=0.5, dropout=0.0) for k in range(len(model.blocks(side)))}
    return Beside(side, made, part=part)


def moved(beside: Beside) -> Beside:
    """Away from where they begin, and the same in every test: three units behind a ReLU can all be shut."""
    for one in beside.parameters():
        nn.init.normal_(one, std=0.2, generator=torch.Generator().manual_seed(one.numel()))
    return beside


@every
@sides
@parts
@torch.no_grad()
def test_they_begin_as_nothing_and_leave_nothing(
    kind: str, model: TwoTowers, side: str, part: Part
) -> None:
    given, beside = entered(model, side), bottlenecks(model, side, part)
    before, want = layout(model.model), encoded(model, side, given)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules()]
    with beside.attached(model):
        assert torch.equal(encoded(model, side, given), want)
    with moved(beside).attached(model):
        assert not torch.allclose(encoded(model, side, given), want, atol=1e-3)
    assert torch.equal(encoded(model, side, given), want)
    after = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules()]
    assert hooks == after
    for (name, *old), (name_, *new) in zip(before, layout(model.model), strict=True):
        assert name == name_
        assert old[0] == new[0]
        assert [(k, id(p)) for k, p in old[1]] == [(k, id(p)) for k, p in new[1]]


@every
@sides
@parts
@torch.no_grad()
def test_what_they_add_is_added_to_the_residual_stream(
    kind: str, model: TwoTowers, side: str, part: Part
) -> None:
    """By hand: behind attention the rest of the block is run on the moved stream; behind the FFN nothing is."""
    given, last = entered(model, side), len(model.blocks(side)) - 1
    block, branches = model.blocks(side)[last], model.branches(side)[last]
    seen: dict[str, Tensor] = {}

    def told(_module: nn.Module, _args: Any, out: Any) -> None:
        seen["out"] = out[0] if isinstance(out, tuple) else out

    hooks = [
        branches.attention.norm.register_forward_pre_hook(lambda _m, a: seen.update(h=a[0])),
        branches.feed_forward.norm.register_forward_pre_hook(lambda _m, a: seen.update(x=a[0])),
        block.register_forward_hook(told),
    ]
    encoded(model, side, given)
    plain = dict(seen)
    adapter = Constant(model.spec.dims[f"{side}_width"])
    with Beside(side, {last: adapter}, part=part).attached(model):
        encoded(model, side, given)
    for hook in hooks:
        hook.remove()
    if part == "feed_forward":
        want, read = plain["out"] + adapter.vector, plain["x"]
    else:
        x = plain["x"] + adapter.vector
        feed_forward: Any = block.mlp
        want, read = x + feed_forward(branches.feed_forward.norm(x)), plain["h"]
    assert torch.allclose(seen["out"], want, atol=1e-5)
    assert torch.equal(adapter.given, read)


@every
@sides
@parts
@pytest.mark.parametrize("reads", ["residual", "normed"])
@torch.no_grad()
def test_they_read_the_stream_or_its_norm_and_tell_what_passed(
    kind: str, model: TwoTowers, side: str, part: Part, reads: Input
) -> None:
    adapter, told = Constant(model.spec.dims[f"{side}_width"]), list[Passed]()
    beside = Beside(side, {0: adapter}, part=part, reads=reads)
    with beside.attached(model), beside.watched(0, told.append):
        encoded(model, side, entered(model, side))
    norm = getattr(model.branches(side)[0], part).norm
    (passed,) = told
    assert (passed.block, passed.part) == (0, part)
    assert passed.given is adapter.given
    want = passed.residual if reads == "residual" else norm(passed.residual)
    assert torch.equal(passed.given, want)
    with beside.attached(model):
        encoded(model, side, entered(model, side))
    assert len(told) == 1


@every
@sides
@parts
def test_every_adapter_learns_and_the_tower_does_not(
    kind: str, model: TwoTowers, side: str, part: Part
) -> None:
    given, beside = entered(model, side), moved(bottlenecks(model, side, part))

    def run() -> Tensor:
        with beside.attached(model):
            return encoded(model, side, given).pow(3).sum()

    run().backward()
    want = {name: p.grad for name, p in beside.named_parameters()}
    assert all(g is not None and bool((g != 0).any()) for g in want.values())
    assert all(p.grad is None for p in model.model.parameters())
    beside.zero_grad()
    again: Any = checkpoint(run, use_reentrant=False)  # attached anew in the backward pass
    again.backward()
    for name, p in beside.named_parameters():
        assert p.grad is not None
        assert torch.equal(p.grad, want[name]), name  # type: ignore[arg-type]


def test_half_precision_is_added_in_the_type_of_the_branch() -> None:
    half: Any = kinds.load("clip", kinds.directory("clip"), dtype="bfloat16")
    beside = moved(bottlenecks(half, "image"))
    with torch.autocast("cpu", torch.bfloat16), beside.attached(half):
        out = encoded(half, "image", entered(half, "image"))
    out.float().pow(3).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in beside.parameters() if p.grad is not None)


def test_a_block_that_norms_behind_its_branches_is_refused() -> None:
    with pytest.raises(UnknownName, match="EvaBlockPostNorm"):
        branches_of(EvaBlockPostNorm(dim=8, num_heads=2))
    with pytest.raises(UnknownName, match="Linear"):
        branches_of(nn.Linear(2, 2))


def test_a_bottleneck_is_its_equation() -> None:
    one = Bottleneck(6, 3, scale=0.1, dropout=0.0)
    u = torch.randn(4, 5, 6)
    assert torch.equal(one(u), torch.zeros_like(u))
    nn.init.normal_(one.up.weight)
    nn.init.normal_(one.up.bias)
    want = torch.stack(
        [
            0.1
            * (one.up.weight @ (one.down.weight @ row + one.down.bias).clamp(min=0) + one.up.bias)
            for row in u.flatten(0, 1)
        ]
    )
    assert torch.allclose(one(u).flatten(0, 1), want, atol=1e-6)


def test_the_last_blocks() -> None:
    assert [*last_blocks(4, "all")] == [0, 1, 2, 3]
    assert [*last_blocks(4, 1)] == [3]
    assert [*last_blocks(4, 0)] == []
