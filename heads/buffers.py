"""Memory that is used again as soon as nobody holds what was made of it.

A fresh batch costs more than its values: the kernel hands out zeroed pages one fault at a time. Whoever keeps a batch
(a list of batches, a tensor saved for the backward pass) must still never see it change. Both hold:

    take ─▶ tensor ─holds▶ a view of kept memory ◀─weak reference─ Buffers        view gone = memory free again
"""

import math
import weakref

import numpy as np
import torch
from torch import Tensor

from cache_builder.reader import aligned_empty


class Buffers:
    """Page-aligned tensors on the CPU, whose memory is kept across batches and epochs. For one thread.

    Args:
        keep: memories kept; what is taken while all of them are in use is freed after use.
        pinned: page-locked, so that a CUDA device reads them without a copy of its own.
    """

    def __init__(self, keep: int = 3, *, pinned: bool = False) -> None:
        self.keep, self.pinned = keep, pinned
        self.held: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, nobody else's for as long as it, a view of it or its array is alive."""
        size = math.prod(shape) * dtype.itemsize
        free = [i for i, (_, user) in enumerate(self.held) if user() is None]
        large = [i for i in free if len(self.held[i][0]) >= size]
        if large:
            memory = self.held.pop(large[0])[0]
        else:
            memory = self._allocate(size)
            if free:
                del self.held[free[0]]
        view = memory[:size]
        if len(self.held) < self.keep:
            self.held.insert(0, (memory, weakref.ref(view)))
        # Only torch may see the view: numpy gives a view of a view the first one's base, which would let it go.
        return torch.from_numpy(view).view(dtype).view(shape)

    def _allocate(self, size: int) -> np.ndarray:
        if self.pinned:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
        return aligned_empty((size,), np.uint8)
