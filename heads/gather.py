"""Rows as they are stored → a batch of float32 (ids: int64, pixels: uint8) on the device that trains. Only here is
anything widened.

stored in memory, batch on the CPU     widened row by row straight into a kept batch: one pass over memory
stored in memory, batch on CUDA        gathered into a pinned stage, transferred as stored, widened there
stored on the device                   gathered and widened there
stored in eight bits                   gathered as stored, brought back where the batch is made
"""

import torch
from jaxtyping import Int
from torch import Tensor

from heads.buffers import Buffers
from heads.coded import Coded

WIDE_ROW = 32 << 10
"""Bytes. Shorter rows cost more as calls than as a second copy, out of a block that stays in the core's cache."""

SCRATCH = 256 << 10
"""Bytes of that block."""


def widened(dtype: torch.dtype) -> torch.dtype:
    """What a stored type is handed out as. Levels of pictures stay bytes: a quarter of what would travel."""
    if dtype == torch.uint8:
        return dtype
    return torch.float32 if dtype.is_floating_point else torch.int64


class Gatherer:
    """Gathers rows of one stream into batches, whose memory is used again once nobody holds them.

    Args:
        device: where batches are made.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self.buffers = Buffers()
        self.scratch: Tensor | None = None

    def __reduce__(self) -> tuple[type["Gatherer"], tuple[torch.device]]:
        """A copy in another process begins with no memory."""
        return Gatherer, (self.device,)

    def take(self, stored: Tensor | Coded, rows: Int[Tensor, " b"]) -> Tensor:
        """Rows of `stored`, in their order, repeats included: (B, …)."""
        out = self.empty(len(rows), stored)
        self.fill(out, stored, rows)
        return out

    def empty(self, n: int, stored: Tensor | Coded) -> Tensor:
        """A batch of n rows of `stored` to be filled, in one piece or in several."""
        kind = torch.float32 if isinstance(stored, Coded) else stored.dtype
        shape, dtype = (n, *stored.shape[1:]), widened(kind)
        if self.device.type == "cpu":
            return self.buffers.take(shape, dtype)
        return torch.empty(
            shape, dtype=dtype, device=self.device
        )  # torch keeps device memory itself

    def fill(self, out: Tensor, stored: Tensor | Coded, rows: Int[Tensor, " b"]) -> None:
        """Write rows of `stored` to `out`, which has as many."""
        if isinstance(stored, Coded):
            out.copy_(stored.take(rows, out.device))
        elif stored.device.type != "cpu":
            out.copy_(stored.index_select(0, rows.to(stored.device, non_blocking=True)))
        elif out.device.type != "cpu":
            # torch hands pinned memory out again only when the transfer out of it is over.
            shape = (len(rows), *stored.shape[1:])
            stage = torch.empty(shape, dtype=stored.dtype, pin_memory=True)
            torch.index_select(stored, 0, rows, out=stage)
            out.copy_(stage.to(out.device, non_blocking=True))
        elif out.dtype == stored.dtype:
            torch.index_select(stored, 0, rows, out=out)
        elif stored.stride(0) * stored.itemsize >= WIDE_ROW:
            for place, row in zip(out.unbind(0), rows.tolist(), strict=True):
                place.copy_(stored[row])
        else:
            self._fill_narrow(out, stored, rows)

    def _fill_narrow(self, out: Tensor, stored: Tensor, rows: Int[Tensor, " b"]) -> None:
        """Gather as stored, a block at a time, and widen the block while it is in the core's cache."""
        length = max(1, SCRATCH // max(1, stored.stride(0) * stored.itemsize))
        if self.scratch is None or len(self.scratch) != length:
            with torch.inference_mode(
                mode=False
            ):  # a block made while scoring must serve training too
                self.scratch = torch.empty((length, *stored.shape[1:]), dtype=stored.dtype)
        for start in range(0, len(rows), length):
            some = rows[start : start + length]
            block = self.scratch[: len(some)]
            torch.index_select(stored, 0, some, out=block)
            out[start : start + len(some)].copy_(block)
