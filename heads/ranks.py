"""Several processes (ranks) that train one head as one: each runs the towers on its share of the rows.

    rows of a batch ─▶ own share ─▶ tower ─▶ gathered from all ranks ─▶ the same loss of the whole batch, everywhere
    gradients       ◀── the mean over ranks (DDP) ◀── of a share: summed over all losses ◀──┘

All else is done by every rank alike, from the same seed, so in-batch negatives, prompts and validation are those of one
process, and so are the steps, but for rounding and for the random numbers inside towers. Started by torchrun; the
processes find each other, and gradients meet, through Accelerate. A head needs to know nothing of it.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from heads.errors import ConfigError

Run = Callable[..., tuple[Tensor, ...]]


def wanted() -> bool:
    """Was this process started as one of several?"""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def n_ranks() -> int:
    """Processes that have joined; 1 where there is no group."""
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if joined else 1


def is_first() -> bool:
    """Is this the process that writes and speaks?"""
    return int(os.environ.get("RANK", "0")) == 0


def averaging(head: nn.Module, device: torch.device) -> Callable[[Any], Any]:
    """`head.loss`, whose gradients are averaged over all ranks in the backward pass.

    Every rank starts from the first one's parameters.

    Raises:
        ConfigError: Accelerate is not installed.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError as error:
        raise ConfigError(
            "training on several processes needs Accelerate: pip install 'headstart[ranks]'"
        ) from error
    # A head may leave a parameter out of a step, and its buffers are the same everywhere.
    how = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    accelerator = Accelerator(cpu=device.type == "cpu", kwargs_handlers=[how])
    return accelerator.prepare_model(_Loss(head))


def shared(run: Run, rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What `run` makes of rows, each rank having run it on its share of them; in their order, with gradients.

    Args:
        run: from some rows to tensors of as many rows.
        rows: tensors of equal first axis, the same on every rank.
    """
    n, ranks = len(rows[0]), n_ranks()
    if ranks == 1 or not n:
        return run(*rows)
    rank, share = torch.distributed.get_rank(), -(-n // ranks)
    # Shares are of equal size, so that random numbers go on alike: the last rows are run more than once.
    mine = (torch.arange(share) + rank * share).clamp(max=n - 1)
    own = [r[mine.to(r.device)] for r in rows]
    draw = int(torch.randint(2**62, ()))
    devices = [own[0].device] if own[0].is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(draw + rank)  # no two shares under the same dropout
        found = run(*own)
    return tuple(_Gathered.apply(values)[:n] for values in found)


class _Loss(nn.Module):
    """A head's loss as the forward pass that DDP watches."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head: Any = head

    def forward(self, batch: Any) -> Any:
        return self.head.loss(batch)


class _Gathered(torch.autograd.Function):
    """Rows of all ranks, one after the other; backward: what all ranks' losses say of the own ones."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        ctx.n = len(own)
        parts = [torch.empty_like(own) for _ in range(n_ranks())]
        torch.distributed.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total.split(ctx.n)[torch.distributed.get_rank()]
