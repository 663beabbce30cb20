"""Several processes (ranks) that train one head as one: each runs the towers on its share of the rows.

    rows of a batch ─▶ own share ─▶ tower ─▶ gathered from all ranks ─▶ the same loss of the whole batch, everywhere
    gradients       ◀── the mean over ranks (DDP) ◀── of a share: summed over all losses ◀──┘

All else is done by every rank alike, from the same seed, so in-batch negatives, prompts and validation are those of one
process, and so are the steps, but for rounding and for the random numbers inside towers. Started by torchrun; the
processes find each other, and gradients meet, through Accelerate. A head needs to know nothing of it, unless its loss
takes from inside the towers what does not come out by `shared`.
"""

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from heads.errors import ConfigError

Run = Callable[..., tuple[Tensor, ...]]


def is_first() -> bool:
    """Is this the process that writes and speaks? It is, where no group was joined."""
    return n_ranks() == 1 or torch.distributed.get_rank() == 0


def n_ranks() -> int:
    """Processes that have joined; 1 where there is no group."""
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if joined else 1


@contextmanager
def joined(device: str) -> Generator[None]:
    """Be one of several processes, if this one was started so, for as long as the block lasts.

    Args:
        device: as `train.device` has it; of several CUDA devices each process gets its own.

    Raises:
        ConfigError: Accelerate is not installed.
    """
    if not _started_as_one_of_several():
        yield
        return
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ConfigError(
            "training on several processes needs Accelerate: pip install 'headstart[ranks]'"
        ) from error
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    try:
        yield
    finally:
        state.destroy_process_group()


def anywhere(*, flag: bool) -> bool:
    """Is a flag set in any of the processes? All of them ask at the same place."""
    if n_ranks() == 1:
        return flag
    found = torch.tensor(int(flag), device=_device())
    torch.distributed.all_reduce(found)
    return bool(found)


def least(number: int) -> int:
    """The least of a number that each process has found. All of them ask at the same place."""
    if n_ranks() == 1:
        return number
    found = torch.tensor(number, device=_device())
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MIN)
    return int(found)


def wait() -> None:
    """Until all processes are here."""
    if n_ranks() > 1:
        torch.distributed.barrier()


def averaged(head: nn.Module, loss: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`loss`, but gradients of the head are averaged over all processes in its backward pass.

    Every process starts from the first one's parameters.
    """
    if n_ranks() == 1:
        return loss
    from accelerate import Accelerator

    return Accelerator(cpu=_device().type == "cpu").prepare_model(_Loss(head, loss))


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
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if cuda else []):
        torch.manual_seed(int(torch.randint(2**62, ())) + rank)  # no two shares under one dropout
        before = _random_states(cuda=cuda)
        found = run(*own)
        drew = any(map(_differ, before, _random_states(cuda=cuda)))
    if drew:
        torch.randint(2**62, ())  # the next time under another one
    return tuple(_Gathered.apply(values)[:n] for values in found)


class _Loss(nn.Module):
    """A head's loss as the forward pass that DDP watches."""

    def __init__(self, head: nn.Module, loss: Callable[[Any], Any]) -> None:
        super().__init__()
        self.head, self.of = head, loss

    def forward(self, batch: Any) -> Any:
        return self.of(batch)


class _Gathered(torch.autograd.Function):
    """Rows of all ranks, one after the other; backward: what all ranks' losses say of the own ones."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        ctx.n = len(own)
        own = own.contiguous()
        parts = [torch.empty_like(own) for _ in range(n_ranks())]
        torch.distributed.all_gather(parts, own)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total.split(ctx.n)[torch.distributed.get_rank()]


def _started_as_one_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ


def _random_states(*, cuda: bool) -> list[Tensor]:
    """Of all generators that a tower may draw from, wherever its rows come from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if cuda else [])]


def _differ(a: Tensor, b: Tensor) -> bool:
    return not torch.equal(a, b)


def _device() -> torch.device:
    """Where this process's collectives take their tensors."""
    return torch.device("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
