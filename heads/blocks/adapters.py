"""Modules beside the branches of a frozen tower's blocks, attached by hooks for as long as a block of code lasts.

    x + branch(x)   becomes   x + branch(x) + adapter(u)        u: the residual stream x, or the branch's own norm of it

The tower's modules stay what and where they are: behind the `with` it is the frozen tower again, bit for bit. What is
recomputed in the backward pass must attach them again, inside. Bottleneck adapters: "Parameter-Efficient Transfer
Learning for NLP", arXiv 1902.00751, beside both branches as in Troika (arXiv 2303.15230).
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from heads.live import Branch, OpenBackbone

Input = Literal["residual", "normed"]
Part = Literal["attention", "feed_forward"]


@dataclass(frozen=True, slots=True)
class Passed:
    """What passed an adapter.

    Attributes:
        block, part: where.
        residual: the stream that the branch is added to, (B, N, W).
        branch: what the frozen branch adds, without the adapter.
        given: what the adapter was given.
    """

    block: int
    part: Part
    residual: Tensor
    branch: Tensor
    given: Tensor


class Beside(nn.Module):
    """Adapters of one tower.

    Args:
        side: "image" or "text".
        adapters: block → adapter, from the states (…, W) to what is added to them.
        part: the branch that they stand beside.
        reads: what they are given.
    """

    def __init__(
        self,
        side: str,
        adapters: Mapping[int, nn.Module],
        *,
        part: Part = "feed_forward",
        reads: Input = "residual",
    ) -> None:
        super().__init__()
        self.side: str = side
        self.part: Part = part
        self.reads: Input = reads
        self.adapters = nn.ModuleDict({str(k): adapter for k, adapter in adapters.items()})
        self._watchers: list[tuple[int, Callable[[Passed], None]]] = []

    def __getitem__(self, block: int) -> Any:
        """The adapter of a block."""
        return self.adapters[str(block)]

    @property
    def blocks(self) -> list[int]:
        """Blocks that have one."""
        return [int(k) for k in self.adapters]

    @contextmanager
    def attached(self, backbone: OpenBackbone) -> Generator[None]:
        """Let the tower compute with the adapters."""
        branches = backbone.branches(self.side)
        with ExitStack() as held:
            for k in self.blocks:
                for handle in self._hooked(k, getattr(branches[k], self.part)):
                    held.callback(handle.remove)
            yield

    @contextmanager
    def watched(self, block: int, tell: Callable[[Passed], None]) -> Generator[None]:
        """Tell what passes the adapter of a block, whenever something does; gradients pass through it."""
        self._watchers.append((block, tell))
        try:
            yield
        finally:
            self._watchers.remove((block, tell))

    def _hooked(self, k: int, branch: Branch) -> list[Any]:
        """Hooks that add one adapter to a branch."""
        adapter, held = self[k], dict[str, Tensor]()

        def enters(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            held["residual"] = args[0]

        def is_normed(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            held["normed"] = out

        def ends(module: nn.Module, args: Any, out: Any) -> Any:
            added, *rest = out if isinstance(out, tuple) else (out,)
            given = held[self.reads]
            for tell in [tell for block, tell in self._watchers if block == k]:
                tell(Passed(k, self.part, held["residual"], added, given))
            held.clear()
            total = added + adapter(given).to(added.dtype)
            return (total, *rest) if isinstance(out, tuple) else total

        hooks = [branch.norm.register_forward_pre_hook(enters)]
        if self.reads == "normed":
            hooks.append(branch.norm.register_forward_hook(is_normed))
        return [*hooks, branch.end.register_forward_hook(ends)]


class Bottleneck(nn.Module):
    """scale · up(dropout(relu(down(u)))); `up` starts at 0, so that nothing changes at first.

    Args:
        width: of u.
        hidden: of the bottleneck.
        scale: a constant.
        dropout: probability, on the bottleneck.
    """

    def __init__(self, width: int, hidden: int, *, scale: float, dropout: float) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.scale, self.dropout = scale, dropout
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, u: Float[Tensor, "*b w"]) -> Float[Tensor, "*b w"]:
        """What is added to the branch."""
        hidden = F.dropout(torch.relu(self.down(u)), self.dropout, self.training)
        return self.scale * self.up(hidden)


def last_blocks(depth: int, wanted: int | Literal["all"]) -> Sequence[int]:
    """The last `wanted` of `depth` blocks."""
    return range(0 if wanted == "all" else depth - wanted, depth)
