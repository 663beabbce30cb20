"""Experts and the router that mixes them.

a = softmax(W LN(r) / τ)      dense, or the top-k of it, renormalised; LN has no parameters of its own
    W LN(r) + W' LN(r')       where two states are read: each is normalised by itself, so that neither drowns the other
Σ_s E_s(u) + Σ_e a_e E_e(u)   low-rank experts, E_e(u) = B_e A_e u: s are shared, every token chooses among the others
                              (EVA, ICLR 2026, OpenReview hUtTGobe1r)
P^(l) = Σ_e a_e P_e^(l)       prompts before block l, mixed for each text by the state of one of its rows (MoE-TPT of
                              arXiv 2410.23736; the form is our choice)
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from heads.errors import ConfigError


class Router(nn.Module):
    """Shares of experts from one state, or from several whose logits add up.

    Args:
        n_experts: E.
        width: of a state, V.
        n_states: how many are read.
        top_k: experts that keep a share; None: all.
        temperature: τ.
        normed: LN on the states; else they are read as they are.

    Raises:
        ConfigError: fewer experts than are kept.
    """

    def __init__(
        self,
        n_experts: int,
        width: int,
        *,
        n_states: int = 1,
        top_k: int | None = None,
        temperature: float = 1.0,
        normed: bool = True,
    ) -> None:
        super().__init__()
        if top_k is not None and top_k > n_experts:
            raise ConfigError(f"top_k is {top_k}, but there are {n_experts} experts; keep fewer")
        self.weight = nn.Parameter(0.02 * torch.randn(n_experts, n_states * width))
        self.top_k, self.temperature, self.normed = top_k, temperature, normed

    def forward(self, *states: Float[Tensor, "*b v"]) -> Float[Tensor, "*b e"]:
        """Shares that sum to 1, in float32; of every row by itself, texts or tokens."""
        with torch.autocast(states[0].device.type, enabled=False):
            read = [r.float() for r in states]
            if self.normed:
                read = [F.layer_norm(r, r.shape[-1:]) for r in read]
            logits = torch.cat(read, dim=-1) @ self.weight.T / self.temperature
            if self.top_k is None:
                return logits.softmax(-1)
            kept = logits.topk(self.top_k, dim=-1)
            return torch.zeros_like(logits).scatter(-1, kept.indices, kept.values.softmax(-1))


def balance(share: Float[Tensor, "b e"]) -> Tensor:
    """E · Σ_e f_e p_e: 1 where experts are used alike, E where one is all (arXiv 2101.03961, eq. 4).

    Args:
        share: of experts, a row for each text; f_e is how often e has the largest one, p_e the mean.
    """
    n = share.shape[-1]
    first = F.one_hot(share.argmax(-1), n).to(share.dtype).mean(0)
    return n * (first * share.mean(0)).sum()


class ExpertPrompts(nn.Module):
    """Deep prompts: E sets of m rows before each of the first `depth` blocks of a tower, mixed for each text.

    Args:
        n_experts, n_prompts, depth, width: E, m, number of blocks, V. One expert has no router.
        router: the row whose state it reads: of the first slot, of the end of text, or both, whose logits add up.
        top_k, temperature: of the routers.
    """

    def __init__(
        self,
        n_experts: int,
        n_prompts: int,
        depth: int,
        width: int,
        *,
        router: Literal["pseudo_word", "eos", "both"] = "pseudo_word",
        top_k: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.reads, self.depth = router, depth
        self.experts = nn.Parameter(0.02 * torch.randn(depth, n_experts, n_prompts, width))
        n_states = 2 if router == "both" else 1
        self.routers = nn.ModuleList(
            Router(n_experts, width, n_states=n_states, top_k=top_k, temperature=temperature)
            for _ in range(depth if n_experts > 1 else 0)
        )

    def at(
        self,
        slot: Int[Tensor, " b"],
        end: Int[Tensor, " b"],
        seen: Callable[[int, Tensor], None] | None = None,
    ) -> Callable[[int, Tensor], Tensor | None]:
        """Rows before every block, as `encode_embedded` takes them.

        Args:
            slot, end: rows of each text that routers may read.
            seen: is told the number of a block and the shares there, (B, E), with their gradient.
        """
        rows = torch.arange(len(slot), device=slot.device)

        def before(k: int, states: Float[Tensor, "b l v"]) -> Float[Tensor, "b m v"] | None:
            if k >= self.depth:
                return None
            if not self.routers:
                return self.experts[k, 0].expand(len(states), -1, -1)
            at = {"pseudo_word": (slot,), "eos": (end,), "both": (slot, end)}[self.reads]
            share = self.routers[k](*(states[rows, row] for row in at))
            if seen is not None:
                seen(k, share)
            return torch.einsum("be,emv->bmv", share, self.experts[k])

        return before


class MoELoRA(nn.Module):
    """Low-rank experts that every token chooses among, and shared ones that it does not choose.

    All of them are two matrix products of inner width (S + E)·R, in which the shares scale the middle. At such ranks
    sorting tokens by expert costs more than it saves (tests/benchmarks/encoder.py).

    Args:
        width: W of a token.
        n_experts, n_shared: E and S.
        rank: R.
        top_k: experts of a token.
        scale: a constant on the whole.
        dropout: probability, on the R values of each expert.

    Raises:
        ConfigError: fewer experts than are kept.
    """

    def __init__(
        self,
        width: int,
        *,
        n_experts: int,
        n_shared: int,
        rank: int,
        top_k: int,
        scale: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.n_shared, self.scale, self.dropout = n_shared, scale, dropout
        self.router = Router(n_experts, width, top_k=top_k, normed=False)
        n = n_shared + n_experts
        self.down = nn.Parameter(torch.empty(n, rank, width))
        for expert in self.down:
            nn.init.kaiming_uniform_(expert, a=5**0.5)
        self.up = nn.Parameter(torch.zeros(n, rank, width))

    def forward(self, u: Float[Tensor, "*b w"]) -> Float[Tensor, "*b w"]:
        """The shared experts, and the chosen ones by their shares; in the type of the autocast around."""
        share = self.router(u)
        gate = torch.cat([share.new_ones(*share.shape[:-1], self.n_shared), share], dim=-1)
        hidden = self._hidden(u)
        hidden = (hidden * gate[..., None].to(hidden.dtype)).flatten(-2)
        return self.scale * (hidden @ self.up.flatten(0, 1))

    def each(self, u: Float[Tensor, "*b w"]) -> Float[Tensor, "*b e w"]:
        """What every expert makes of a token by itself, shared ones first, as if its share were 1."""
        return self.scale * torch.einsum("...er,erw->...ew", self._hidden(u), self.up)

    def _hidden(self, u: Float[Tensor, "*b w"]) -> Float[Tensor, "*b e r"]:
        hidden = F.linear(u, self.down.flatten(0, 1)).unflatten(-1, self.down.shape[:2])
        return F.dropout(hidden, self.dropout, self.training)


@contextmanager
def shared_out(experts: Mapping[int, MoELoRA]) -> Generator[dict[int, list[Tensor]]]:
    """Block → shares of its experts at every call, (…, E) with their gradient, while the block of code lasts."""
    shares: dict[int, list[Tensor]] = {k: [] for k in experts}

    def told(k: int) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _args, share: shares[k].append(share)

    hooks = [one.router.register_forward_hook(told(k)) for k, one in experts.items()]
    try:
        yield shares
    finally:
        for hook in hooks:
            hook.remove()


def isolation(down: Float[Tensor, "e r w"]) -> Tensor:
    """Mean squared cosine between the input directions of different experts: 0 where they read nothing in common."""
    unit = F.normalize(down.float(), dim=-1)
    gram = torch.einsum("irw,jsw->ijrs", unit, unit).square().mean((-2, -1))
    n = len(down)
    return (gram.sum() - gram.diagonal().sum()) / max(1, n * (n - 1))
