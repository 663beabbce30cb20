"""Conformance of a backbone that may be entered: resumed at any block, prompted before it, adapted beside it."""

from collections.abc import Callable
from typing import Any

from cache_builder.conforming import (
    BATCH_TOLERANCE,
    CAPTIONS,
    EXACT,
    NonConformance,
    must,
    near,
    sample_pixels,
)


def check_entering(backbone: Any) -> dict[str, float]:
    """Embedded tokens give the same as ids; resuming at any block gives the whole pass; prompts act."""
    pixels, found = sample_pixels(backbone), dict[str, float]()
    depth = backbone.depth["image"]
    must(depth == len(backbone.blocks("image")), "depth: is not the number of blocks")
    out = backbone.encode_images(pixels, range(depth + 1))
    entering, mask = backbone.embed_pixels(pixels)
    found |= near("image embedded = block_0", entering, out["block_0"], EXACT)
    for k in range(depth + 1):
        resumed = backbone.resume_from("image", k, out[f"block_{k}"], mask=mask)
        for name, value in resumed.items():
            found |= near(f"image/{name} resumed at block {k}", value, out[name], EXACT)
    found |= _check_prompts(
        backbone,
        "image",
        entering,
        lambda given, p: backbone.resume_from("image", 0, given, mask=mask, prompts=p),
    )
    if "text/tokens" in backbone.streams:
        ids = backbone.tokenize(CAPTIONS)
        whole, embedded = backbone.encode_texts(ids), backbone.embed_tokens(ids)
        end = backbone.ends(ids)
        again = backbone.encode_embedded(embedded, end)
        if "pooled" in whole:
            found |= near("embedded = ids, pooled", again["pooled"], whole["pooled"], EXACT)
        states: list[Any] = []

        def keep(_: Any, args: Any) -> None:
            states.append(args[0])

        hooks = [block.register_forward_pre_hook(keep) for block in backbone.blocks("text")]
        backbone.encode_embedded(embedded, end)
        for hook in hooks:
            hook.remove()
        for k, entered in enumerate([*states, again["tokens"]]):
            resumed = backbone.resume_from("text", k, entered, end=end)
            for name, value in resumed.items():
                found |= near(f"text/{name} resumed at block {k}", value, again[name], EXACT)
        room = backbone.spec.dims["context"] - 2
        cut, last = embedded[:, :room], end.clamp(max=min(room, embedded.shape[1]) - 1)
        found |= _check_prompts(
            backbone, "text", cut, lambda given, p: backbone.encode_embedded(given, last, prompts=p)
        )
    return found


def check_branches(backbone: Any) -> dict[str, float]:
    """What is added behind the end of a block's last branch is added to what the block returns: adapters fit there."""
    import torch

    found: dict[str, float] = {}
    for side, depth in backbone.depth.items():
        width = backbone.spec.dims[f"{side}_width"]
        branches = backbone.branches(side)
        must(len(branches) == depth, f"branches: {len(branches)} of {depth} {side} blocks")
        moved = torch.linspace(-1, 1, width, device=backbone.device)
        seen: dict[str, Any] = {}
        last, branch = backbone.blocks(side)[-1], branches[-1].feed_forward

        def told(_module: Any, _args: Any, out: Any, seen: dict[str, Any] = seen) -> None:
            seen["out"] = out[0] if isinstance(out, tuple) else out

        def entered(_module: Any, args: Any, seen: dict[str, Any] = seen) -> None:
            seen["stream"] = args[0]

        hooks = [
            last.register_forward_hook(told),
            branch.norm.register_forward_pre_hook(entered),
        ]
        _run_side(backbone, side)
        plain = dict(seen)
        hooks.append(branch.end.register_forward_hook(_adds(moved)))
        _run_side(backbone, side)
        for hook in hooks:
            hook.remove()
        name = f"{side} block under an addition to its last branch"
        found |= near(name, seen["out"], plain["out"] + moved, BATCH_TOLERANCE)
        found |= near(f"{side} stream into that branch", seen["stream"], plain["stream"], EXACT)
    return found


def _run_side(backbone: Any, side: str) -> None:
    if side == "image":
        backbone.encode_images(sample_pixels(backbone))
    else:
        backbone.encode_texts(backbone.tokenize(CAPTIONS))


def _adds(moved: Any) -> Callable[..., Any]:
    def hook(_module: Any, _args: Any, out: Any) -> Any:
        first, *rest = out if isinstance(out, tuple) else (out,)
        return (first + moved, *rest) if rest else first + moved

    return hook


def _check_prompts(
    backbone: Any, side: str, states: Any, run: Callable[[Any, Any], dict[str, Any]]
) -> dict[str, float]:
    """Prompts change what comes out, keep its shape, and get a gradient; nothing frozen does."""
    import torch

    depth, width = min(2, backbone.depth[side]), states.shape[-1]
    name = "patches" if side == "image" else "tokens"
    with torch.enable_grad():
        prompts = torch.randn(depth, 2, width, device=states.device).requires_grad_()
        last = run(states, prompts)[name]
        last.float().pow(3).mean().backward()
    grad = prompts.grad
    if grad is None:
        raise NonConformance(f"{side} prompts get no gradient")
    must(bool((grad.abs().sum((1, 2)) > 0).all()), f"{side} prompts of one block get no gradient")
    touched = [n for n, p in backbone.model.named_parameters() if p.grad is not None]
    must(not touched, f"{side} prompts: a gradient reached the frozen {touched[:1]}")
    other = run(states, prompts.detach() + 1)[name]
    must(last.shape == other.shape == states.shape[:1] + last.shape[1:], f"{side} prompts: shape")
    must(not torch.equal(last, other), f"{side} prompts change nothing")
    rows = states.shape[1] - (last.shape[1] if side == "image" else 0)
    expected = backbone.spec.dims.get("prefix", 0)
    must(rows == expected or side == "text", f"{side} prompts are not taken out again")
    again = run(states, prompts.detach())[name]
    found = near(f"{side} prompted, with and without gradients", again, last, BATCH_TOLERANCE)
    return found | _check_prompt_functions(backbone, side, states, prompts.detach(), run)


def _check_prompt_functions(
    backbone: Any,
    side: str,
    states: Any,
    prompts: Any,
    run: Callable[[Any, Any], dict[str, Any]],
) -> dict[str, float]:
    """Prompts made by a function are those of a tensor; it sees the states alone, once a block, with their gradient."""
    import torch

    depth, name = len(prompts), "patches" if side == "image" else "tokens"
    seen: list[Any] = []
    entered: list[Any] = []

    def made(j: int, given: Any) -> Any:
        must(j == len(seen), f"{side} prompts: asked for block {j} after {len(seen)} blocks")
        seen.append(given)
        return prompts[j].expand(len(given), -1, -1) if j < depth else None

    def enter(_: Any, args: Any) -> None:
        entered.append(args[0])

    hooks = [block.register_forward_pre_hook(enter) for block in backbone.blocks(side)[:depth]]
    got = run(states, made)[name]
    for hook in hooks:
        hook.remove()
    key = f"{side} prompts by a function = by a tensor"
    found = near(key, got, run(states, prompts)[name], EXACT)
    must(
        all(one.shape == states.shape for one in seen),
        f"{side} prompts: a function is shown {[tuple(one.shape) for one in seen]} instead of the states without "
        f"prompts, {tuple(states.shape)}",
    )
    found |= near(f"{side} states shown before block 0", seen[0], states, EXACT)
    m = prompts.shape[1]
    for j in range(1, depth):  # behind which rows the prompts stand is the tower's own affair
        whole = entered[j]
        rows = prompts[j].expand(len(whole), -1, -1)
        at = next(
            (i for i in range(whole.shape[1] - m + 1) if torch.equal(whole[:, i : i + m], rows)),
            None,
        )
        if at is None:
            raise NonConformance(f"{side} prompts are not among the rows that enter block {j}")
        bare = torch.cat([whole[:, :at], whole[:, at + m :]], 1)
        found |= near(f"{side} states shown before block {j}", seen[j], bare, EXACT)

    slopes = [_slope(states, prompts, lambda g, p: run(g, p)[name], kept) for kept in (True, False)]
    must(
        not torch.equal(*slopes),
        f"{side} prompts: no gradient passes through the states that a function is shown",
    )
    return found


def _slope(states: Any, prompts: Any, run: Callable[[Any, Any], Any], kept: bool) -> Any:
    """How what comes out moves with `states`; through those shown before the last prompts too, if that is kept."""
    import torch

    depth = len(prompts)
    with torch.enable_grad():
        given = states.detach().clone().requires_grad_()

        def made(j: int, shown: Any) -> Any:
            if j >= depth:
                return None
            shown = shown if kept or j < depth - 1 else shown.detach()
            return prompts[j] + shown.mean(1, keepdim=True)

        run(given, made).float().pow(3).mean().backward()
        return given.grad
