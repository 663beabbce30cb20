"""Batch memory: never changed under whoever holds it, used again when nobody does; and the rows gathered into it."""

import mmap
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heads.buffers import Buffers
from heads.gather import SCRATCH, WIDE_ROW, Gatherer

quickly = settings(derandomize=True, deadline=None, max_examples=40)


def test_memory_that_nobody_holds_is_used_again() -> None:
    buffers = Buffers(keep=2)
    seen = set()
    for n in (7, 7, 5, 3, 7):
        seen.add(buffers.take((n, 4), torch.float32).data_ptr())
    assert len(seen) == 1


@pytest.mark.parametrize(
    "keep",
    [
        lambda t: t,
        lambda t: t[1:],
        lambda t: t.view(-1)[3],
        lambda t: t.numpy(),
        lambda t: t.numpy()[0, 2:],
        lambda t: t.detach().view(torch.int32),
        lambda t: t.untyped_storage(),
        lambda t: (t * torch.ones(4, requires_grad=True)).grad_fn,  # saved for the backward pass
    ],
    ids=["itself", "rows", "number", "array", "part of array", "bits", "storage", "graph"],
)
def test_whatever_holds_a_batch_keeps_it(keep: Callable[[Tensor], object]) -> None:
    buffers = Buffers(keep=2)
    first = buffers.take((3, 4), torch.float32).fill_(1)
    place = first.data_ptr()
    held = keep(first)
    del first
    others = [buffers.take((3, 4), torch.float32).data_ptr() for _ in range(4)]
    assert place not in others
    del held
    both = [buffers.take((3, 4), torch.float32) for _ in range(2)]
    assert place in [batch.data_ptr() for batch in both]


@quickly
@given(
    sizes=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 4)), max_size=30),
    keep=st.integers(1, 4),
)
def test_batches_in_use_never_share_memory(sizes: list[tuple[int, int]], keep: int) -> None:
    """Whatever is taken and let go, in any order, every batch still has what was written to it."""
    buffers = Buffers(keep)
    held: list[Tensor] = []
    for number, (n, let_go) in enumerate(sizes):
        del held[:let_go]
        held.append(buffers.take((n,), torch.float32).fill_(number))
        assert all(len(t.unique()) <= 1 for t in held)
        assert held[-1].data_ptr() % mmap.PAGESIZE == 0
    assert len(buffers.held) <= keep


def test_larger_batches_replace_smaller_memory() -> None:
    buffers = Buffers(keep=1)
    for n in (10, 100_000, 10, 100_000):
        buffers.take((n,), torch.uint8)
    assert [len(memory) for memory, _ in buffers.held] == [100_000]


WIDTHS = (1, 6, WIDE_ROW // 2, WIDE_ROW // 2 - 1)
LONG = SCRATCH // WIDE_ROW + 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int32])
@quickly
@given(
    width=st.sampled_from(WIDTHS),
    rows=st.lists(st.integers(0, 8), max_size=LONG),
)
def test_gathered_rows_are_the_stored_ones_widened(
    dtype: torch.dtype, width: int, rows: list[int]
) -> None:
    values = torch.arange(9)[:, None] * 3 + torch.arange(width) % 50
    stored = values.to(dtype)
    index = torch.tensor(rows, dtype=torch.int64)
    found = Gatherer().take(stored, index)
    wide = torch.float32 if dtype.is_floating_point else torch.int64
    assert found.dtype == wide
    assert torch.equal(found, stored[index].to(wide))


def test_a_batch_kept_by_the_consumer_does_not_change() -> None:
    stored = torch.from_numpy(np.random.default_rng(0).normal(size=(50, 7)).astype(np.float16))
    gather = Gatherer()
    kept = [gather.take(stored, torch.arange(i, i + 5)) for i in range(0, 45)]
    for i, batch in enumerate(kept):
        assert torch.equal(batch, stored[i : i + 5].float())


def test_a_gatherer_used_while_scoring_can_be_used_while_training() -> None:
    stored = torch.ones(3, 2, dtype=torch.float16)
    gather = Gatherer()
    with torch.inference_mode():
        gather.take(stored, torch.arange(3))
    weight = torch.ones(2, requires_grad=True)
    (gather.take(stored, torch.arange(2)) * weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [2, 2]
