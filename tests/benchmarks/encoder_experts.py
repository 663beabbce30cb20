"""Tokens a second through the experts of eva, beside other ways to compute them; a part of encoder.py.

two products   `MoELoRA`: all experts are two matrix products, in which the shares scale the middle
loop           the usual way: for every expert, take its tokens, two products, add them back by their shares
dense LoRA     one low-rank map of rank (S + E)·R, without router: what the two products would cost alone
grouped GEMM   tokens sorted by expert, one `grouped_mm` a product; CUDA in bf16 alone
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from measure import in_turn, ratios, spread
from torch import Tensor, nn
from torch.nn import functional as F

from heads.blocks.moe import MoELoRA

E, S, K, R = 8, 1, 2, 16
"""Experts, shared ones, experts of a token, rank."""

Way = Callable[[MoELoRA, Tensor], Tensor]


def two_products(experts: MoELoRA, u: Tensor) -> Tensor:
    """What is trained."""
    return experts(u)


def shared(experts: MoELoRA, u: Tensor) -> Tensor:
    """What the experts add that every token passes."""
    down, up = (w[: experts.n_shared].flatten(0, 1) for w in (experts.down, experts.up))
    return F.linear(u, down) @ up


def loop(experts: MoELoRA, u: Tensor) -> Tensor:
    """Expert after expert, on the tokens that chose it."""
    share, out = experts.router(u), shared(experts, u)
    for e in range(share.shape[1]):
        tokens = share[:, e].nonzero()[:, 0]
        down, up = (w[experts.n_shared + e] for w in (experts.down, experts.up))
        made = F.linear(u.index_select(0, tokens), down) @ up
        gate = share[:, e].index_select(0, tokens)[:, None]
        out = out.index_add(0, tokens, made * gate.to(made.dtype))
    return out


def grouped(experts: MoELoRA, u: Tensor) -> Tensor:
    """Tokens sorted by expert; `grouped_mm` knows no autocast."""
    share, kind = experts.router(u), torch.bfloat16
    gate, chosen = share.topk(K, dim=-1)
    order = chosen.flatten().argsort()
    tokens = order // K
    ends = chosen.flatten().bincount(minlength=E).cumsum(0).int()
    down, up = (w[experts.n_shared :].to(kind) for w in (experts.down, experts.up))
    hidden = F.grouped_mm(u[tokens].to(kind), down.transpose(1, 2), offs=ends)
    made = F.grouped_mm(hidden, up, offs=ends)
    made = made * gate.flatten()[order, None].to(kind)
    out = shared(experts, u)
    return out.index_add(0, tokens, made.to(out.dtype))


class Dense(nn.Module):
    """A low-rank map of rank (S + E)·R."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.Parameter(0.02 * torch.randn((S + E) * R, width))
        self.up = nn.Parameter(0.02 * torch.randn((S + E) * R, width))

    def forward(self, u: Tensor) -> Tensor:
        return F.linear(u, self.down) @ self.up


def gradients(experts: MoELoRA, way: Way, u: Tensor) -> list[Tensor]:
    """The output, and gradients of a fixed weighting of it: of the tokens and of every parameter."""
    wanted = [u.detach().requires_grad_(), *experts.parameters()]
    out = way(experts, wanted[0])
    weight = torch.linspace(-1, 1, out.shape[1], device=out.device, dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), wanted)]


def differs(experts: MoELoRA, way: Way, u: Tensor) -> float:
    """Largest difference from `two_products` in output or gradients, as a share of the largest value there."""
    both = (gradients(experts, w, u) for w in (way, two_products))
    pairs = zip(*both, strict=True)
    return max(float((a.float() - b).abs().max() / b.abs().max()) for a, b in pairs)


def rows(width: int, tokens: int, device: str, bf16: bool, rounds: int) -> Iterator[list[str]]:
    """Of the table, for one W."""
    torch.manual_seed(0)
    experts = MoELoRA(width, n_experts=E, n_shared=S, rank=R, top_k=K).to(device)
    nn.init.normal_(experts.up, std=0.02)
    dense = Dense(width).to(device)
    u = torch.randn(tokens, width, device=device)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "loop over experts": lambda u: loop(experts, u),
        "two products": experts,
        f"dense LoRA, rank {(S + E) * R}": dense,
    }
    if (error := differs(experts, loop, u)) > 1e-4:
        raise SystemExit(f"the loop over experts differs from MoELoRA by {error:.1e}")
    if reason := no_grouped(experts, u, bf16):
        print(f"MoE-LoRA, W {width}: grouped GEMM is left out: {reason}")
    else:
        ways["grouped GEMM"] = lambda u: grouped(experts, u)
    repeats = 20 if "cuda" in device else 1

    def job(way: Callable[[Tensor], Tensor], backward: bool) -> Callable[[], None]:
        given = u.detach().requires_grad_(backward)
        wanted: list[Any] = [given, *(dense if way is dense else experts).parameters()]

        def run() -> None:
            for _ in range(repeats):
                with torch.set_grad_enabled(backward):
                    with torch.autocast(u.device.type, torch.bfloat16, enabled=bf16):
                        out = way(given)
                    if backward:
                        torch.autograd.grad(out, wanted, u.to(out.dtype))
            if u.is_cuda:
                torch.cuda.synchronize()

        return run

    for title, backward in (("forward", False), ("forward and backward", True)):
        jobs: dict[str, Callable[[], object]] = {n: job(w, backward) for n, w in ways.items()}
        for one in jobs.values():
            one()
        found = in_turn(jobs, max(rounds, 5))
        base = found["loop over experts"]
        for name, runs in found.items():
            yield [
                f"MoE-LoRA, W {width}, {title}: {name}",
                spread([tokens * repeats / s.wall / 1e3 for s in runs], 1),
                "1,000 tokens/s",
                spread(ratios([s.wall for s in base], [s.wall for s in runs])),
                spread(ratios([s.cpu for s in base], [s.cpu for s in runs])),
            ]


def no_grouped(experts: MoELoRA, u: Tensor, bf16: bool) -> str:
    """Why `grouped` cannot be timed, or nothing."""
    if not (u.is_cuda and bf16):
        return "it is for CUDA in bf16"
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has none"
    try:
        error = differs(experts, grouped, u)
    except RuntimeError as refused:
        return str(refused).splitlines()[0]
    # bf16 has 8 bits: an expert's products, and the sums over tokens that its gradients are, round in some of them.
    return "" if error < 0.05 else f"it differs from MoELoRA by {error:.1e}"
