"""Other weights in a frozen module: in every family and both towers, nested, recomputed, in half precision."""

from typing import Any

import kinds
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cache_builder.backbones.two_towers import TwoTowers
from heads.blocks.lora import Copy, LoRA, under, used_by

every = pytest.mark.parametrize("kind", ["clip", "siglip2", "pe", "siglip2-hub", "siglip2-naflex"])
sides = pytest.mark.parametrize("side", ["image", "text"])


@pytest.fixture
def model(kind: str) -> TwoTowers:
    return kinds.model(kind)


def entered(model: TwoTowers, side: str) -> tuple[Any, ...]:
    """Where a pass of that side begins, for `encoded`."""
    if side == "text":
        ids = model.tokenize(["a red mug", "two"])
        return (ids, model.ends(ids))
    return (kinds.stacked(model),)


def encoded(model: TwoTowers, side: str, given: tuple[Any, ...]) -> Tensor:
    """A pass from ids or pixels that keeps gradients: raw rows and what is pooled of them."""
    if side == "text":
        found = model.encode_embedded(model.embed_tokens(given[0]), given[1])
    else:
        states, mask = model.embed_pixels(given[0])
        found = model.resume_from("image", 0, states, mask=mask)
    rows = found["tokens" if side == "text" else "patches"]
    return torch.cat([rows.flatten(1), found["pooled"]], dim=1)


def lora_of(model: TwoTowers, side: str) -> tuple[LoRA, tuple[Any, ...]]:
    """Of the weights of the blocks of one side."""
    given = entered(model, side)
    names = used_by(model.model, lambda: encoded(model, side, given))
    return LoRA(model.model, names, rank=2, alpha=3.0), given


def layout(module: nn.Module) -> list[Any]:
    """Everything of a library's module that could be left changed: names, order, identity."""
    return [
        (name, list(one.__dict__), list(one._parameters.items()), list(one._buffers), one.training)
        for name, one in module.named_modules()
    ]


@every
@sides
@torch.no_grad()
def test_low_rank_updates_begin_as_nothing_at_all(kind: str, model: TwoTowers, side: str) -> None:
    lora, given = lora_of(model, side)
    want = encoded(model, side, given)
    with under(model.model, lora.weights(model.model)):
        assert torch.equal(encoded(model, side, given), want)


@every
@sides
def test_they_sit_on_every_linear_weight_of_the_blocks(
    kind: str, model: TwoTowers, side: str
) -> None:
    """Attention in and out, feed-forward in and out, whatever the library calls them."""
    lora, _ = lora_of(model, side)
    own = {id(p) for p in model.blocks(side).parameters() if p.ndim == 2}
    names = {name for name, p in model.model.named_parameters() if id(p) in own}
    assert set(lora.names) == names  # and on none of an attention pool
    for name, down, up in zip(lora.names, lora.down, lora.up, strict=True):
        assert (len(up), down.shape[1]) == model.model.get_parameter(name).shape


@every
@sides
def test_each_of_them_acts_and_learns(kind: str, model: TwoTowers, side: str) -> None:
    lora, given = lora_of(model, side)
    for up in lora.up:
        nn.init.normal_(up, std=0.05)
    with under(model.model, lora.weights(model.model)):
        out = encoded(model, side, given)
    out.pow(3).sum().backward()
    for name, down, up in zip(lora.names, lora.down, lora.up, strict=True):
        for part in (down, up):
            assert part.grad is not None, name
            assert bool((part.grad != 0).any()), name
    assert all(p.grad is None and not p.requires_grad for p in model.model.parameters())


@every
@sides
def test_the_gradient_is_that_of_the_weight_that_stands_there(
    kind: str, model: TwoTowers, side: str
) -> None:
    """dL/dB = α/r · dL/dW Aᵀ, dL/dA = α/r · Bᵀ dL/dW, with dL/dW of the library's model holding W itself."""
    lora, given = lora_of(model, side)
    for up in lora.up:
        nn.init.normal_(up, std=0.05)
    with under(model.model, lora.weights(model.model)):
        encoded(model, side, given).pow(3).sum().backward()
    merged = kinds.load(kind, kinds.directory(kind))
    with torch.no_grad():
        for name, down, up in zip(lora.names, lora.down, lora.up, strict=True):
            merged.model.get_parameter(name).add_(up @ down, alpha=1.5)  # 3 / 2
            merged.model.get_parameter(name).requires_grad_()
    encoded(merged, side, given).pow(3).sum().backward()
    for name, down, up in zip(lora.names, lora.down, lora.up, strict=True):
        slope = merged.model.get_parameter(name).grad
        assert slope is not None
        assert up.grad is not None
        assert down.grad is not None
        big = float(slope.abs().max())
        torch.testing.assert_close(up.grad, 1.5 * slope @ down.T, rtol=1e-3, atol=1e-4 * big)
        torch.testing.assert_close(down.grad, 1.5 * up.T @ slope, rtol=1e-3, atol=1e-4 * big)


@every
@sides
def test_the_library_s_modules_are_left_as_they_were(
    kind: str, model: TwoTowers, side: str
) -> None:
    lora, given = lora_of(model, side)
    for up in lora.up:
        nn.init.normal_(up, std=0.05)
    before, keys = layout(model.model), list(model.model.state_dict())
    with torch.no_grad():
        want = encoded(model, side, given)
        with under(model.model, lora.weights(model.model)):
            changed = encoded(model, side, given)
        again = encoded(model, side, given)
    assert not torch.allclose(changed, want, rtol=0, atol=1e-3)
    assert torch.equal(again, want)
    assert list(model.model.state_dict()) == keys
    for (name, *old), (name_, *new) in zip(before, layout(model.model), strict=True):
        assert name == name_
        assert old[0] == new[0]
        assert [(k, id(p)) for k, p in old[1]] == [(k, id(p)) for k, p in new[1]]
        assert old[2:] == new[2:]


@every
def test_a_copy_of_the_text_side_is_trained_and_its_original_is_not(
    kind: str, model: TwoTowers
) -> None:
    """Token embeddings, positions, blocks, final norm and projection: all that a text goes through."""
    given = entered(model, "text")
    names = used_by(model.model, lambda: encoded(model, "text", given))
    copy = Copy(model.model, names)
    before = {name: p.clone() for name, p in model.model.named_parameters()}
    with torch.no_grad():
        want = encoded(model, "text", given)
        with under(model.model, copy.weights(model.model)):
            same = encoded(model, "text", given)
    # Not bit for bit on every CPU: torch.matmul chooses its kernel by whether a weight wants gradients.
    assert torch.allclose(same, want, rtol=0, atol=2e-6)
    with under(model.model, copy.weights(model.model)):
        encoded(model, "text", given).pow(3).sum().backward()
    assert all(p.grad is not None for p in copy.parameters())
    torch.optim.SGD(copy.parameters(), lr=0.1).step()
    assert all(torch.equal(p, before[name]) for name, p in model.model.named_parameters())
    with torch.no_grad(), under(model.model, copy.weights(model.model)):
        assert not torch.equal(encoded(model, "text", given), want)
    assert len(copy.state_dict()) == len(names)  # and it can be saved


@every
def test_half_precision_stays_finite(kind: str, model: TwoTowers) -> None:
    lora, given = lora_of(model, "text")
    for up in lora.up:
        nn.init.normal_(up, std=0.05)
    half: Any = kinds.load(kind, kinds.directory(kind), dtype="bfloat16")
    with torch.autocast("cpu", torch.bfloat16), under(half.model, lora.weights(half.model)):
        out = encoded(half, "text", given)
    out.float().pow(3).sum().backward()
    assert bool(out.isfinite().all())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in lora.parameters())


def test_weights_entered_within_others_hold_inside_alone() -> None:
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    outer, inner, bias = torch.zeros(2, 2), nn.Parameter(torch.eye(2)), torch.tensor([5.0, 7.0])
    with under(layer, {"weight": outer, "bias": bias}):
        with under(layer, {"weight": inner}):
            assert torch.equal(layer(x), x + bias)
        assert torch.equal(layer(x)[0], bias)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert not {"weight", "bias"} & set(layer.__dict__)


def test_low_rank_updates_are_of_the_frozen_weight_also_where_another_stands() -> None:
    layer = nn.Linear(3, 2)
    lora = LoRA(layer, ["weight"], rank=1, targets="weight")
    own = layer.weight.detach().clone()
    with under(layer, {"weight": torch.zeros(2, 3)}):
        assert torch.equal(lora.weights(layer)["weight"], own)
        assert torch.equal(Copy(layer, ["weight"]).values[0], own)


@pytest.mark.parametrize("backward_inside", [False, True])
def test_what_is_recomputed_is_recomputed_under_the_same_weights(backward_inside: bool) -> None:
    """Also where the backward pass runs while other weights are in force: they are in force again behind it."""
    torch.manual_seed(0)
    stack: Any = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    stack.requires_grad_(requires_grad=False)
    lora, x = LoRA(stack, ["0.weight", "2.weight"], rank=2, targets=".*"), torch.randn(4, 3)
    for up in lora.up:
        nn.init.normal_(up)
    other = {"0.weight": torch.full((3, 3), 9.0)}

    def run(x: Tensor) -> Tensor:
        with under(stack, lora.weights(stack)):
            return stack(x)

    def slopes(recompute: bool) -> list[Tensor]:
        lora.zero_grad()
        y = checkpoint(run, x, use_reentrant=False) if recompute else run(x)
        if backward_inside:
            with under(stack, other):
                y.sin().sum().backward()
                assert stack[0].weight is other["0.weight"]
        else:
            y.sin().sum().backward()
        return [p.grad.clone() for p in lora.parameters() if p.grad is not None]

    plain, again = slopes(recompute=False), slopes(recompute=True)
    assert len(plain) == 4
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_finding_what_a_pass_uses_copies_and_leaves_nothing() -> None:
    stack: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    stack.requires_grad_(requires_grad=False)
    before = layout(stack)
    addresses: list[int] = []

    def run() -> Tensor:
        addresses.append(stack[0].weight.data_ptr())
        return stack[2](stack[0](torch.ones(1, 3)))

    assert used_by(stack, run) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert addresses == [stack[0].weight.data_ptr()]
    assert [str(one) for one in layout(stack)] == [str(one) for one in before]
    assert not any(p.requires_grad for p in stack.parameters())


def test_names_that_are_no_parameter_are_refused_by_name() -> None:
    layer = nn.BatchNorm1d(2)
    for name in ("running_mean", "no", "far.away.weight"):
        with (
            pytest.raises(AttributeError, match=name.split(".")[0]),
            under(layer, {name: torch.ones(2)}),
        ):
            pass
    assert not {"running_mean", "no"} & set(layer.__dict__)
