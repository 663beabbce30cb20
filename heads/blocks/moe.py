"""Experts and the router that mixes them.

a = softmax(W LN(r) / τ)      dense, or the top-k of it, renormalised; LN has no parameters of its own
    W LN(r) + W' LN(r')       where two states are read: each is normalised by itself, so that neither drowns the other
P^(l) = Σ_e a_e P_e^(l)       prompts before block l, mixed for each text by the state of one of its rows (MoE-TPT of
                              arXiv 2410.23736; the form is our choice)
"""

from collections.abc import Callable
from typing import Literal

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
    ) -> None:
        super().__init__()
        if top_k is not None and top_k > n_experts:
            raise ConfigError(f"top_k is {top_k}, but there are {n_experts} experts; keep fewer")
        self.weight = nn.Parameter(0.02 * torch.randn(n_experts, n_states * width))
        self.top_k, self.temperature = top_k, temperature

    def forward(self, *states: Float[Tensor, "*b v"]) -> Float[Tensor, "*b e"]:
        """Shares that sum to 1, in float32; of every row by itself, texts or tokens."""
        with torch.autocast(states[0].device.type, enabled=False):
            normed = torch.cat([F.layer_norm(r.float(), r.shape[-1:]) for r in states], dim=-1)
            share = (normed @ self.weight.T / self.temperature).softmax(-1)
            if self.top_k is None:
                return share
            kept = torch.zeros_like(share).scatter(-1, share.topk(self.top_k, dim=-1).indices, 1.0)
            return share * kept / (share * kept).sum(-1, keepdim=True)


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
