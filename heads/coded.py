"""Rows as a lossy storage mode keeps them: small numbers, a scale per token, and what brings them back.

They stay so in memory and on the way to the device; `gather.py` brings back only the rows of a batch, where it is made.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from cache_builder import FeatureCache
from cache_builder.quantise import dequantised


@dataclass(frozen=True, slots=True)
class Coded:
    """Rows of a stream in eight bits.

    Attributes:
        values: (n, …, W) int8, or uint8 if they are floats.
        scale: (n, …) of every token.
        torch_dtype: what the floats are; empty for integers.
        mean, std: (W) that the channels were centred by, if they were.
    """

    values: Tensor
    scale: Tensor
    torch_dtype: str
    mean: Tensor | None = None
    std: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def shape(self) -> torch.Size:
        """Of the numbers they stand for."""
        return self.values.shape

    def to(self, device: str | torch.device, *, non_blocking: bool = False) -> "Coded":
        """The same on a device."""
        moved = (None if t is None else t.to(device) for t in (self.mean, self.std))
        values, scale = (t.to(device, non_blocking=non_blocking) for t in (self.values, self.scale))
        return Coded(values, scale, self.torch_dtype, *moved)

    def take(self, rows: Int[Tensor, " b"], device: torch.device) -> Tensor:
        """Numbers of rows (B, …), made on a device."""
        index = rows.to(self.values.device, non_blocking=True)
        some = (self.values.index_select(0, index), self.scale.index_select(0, index))
        values, scale = (t.to(device, non_blocking=True) for t in some)
        centre = (None if t is None else t.to(device) for t in (self.mean, self.std))
        return dequantised(values, self.torch_dtype, scale, *centre)


def as_stored(
    cache: FeatureCache, stream: str, values: np.ndarray, scale: np.ndarray | None
) -> Tensor | Coded:
    """What was read of a stream, without a copy: a tensor of a type that torch knows, or `Coded`."""
    tensor, torch_dtype = torch.from_numpy(values), cache.layout(stream).torch_dtype
    if scale is None:
        return tensor.view(getattr(torch, torch_dtype)) if torch_dtype else tensor
    centre = (None if a is None else torch.from_numpy(a) for a in cache.statistics(stream))
    return Coded(tensor, torch.from_numpy(scale), torch_dtype, *centre)


def read_stored(cache: FeatureCache, stream: str, places: np.ndarray) -> Tensor | Coded:
    """Places along a stream's first axis, as stored."""
    scale = f"{stream}_scale"
    scales = cache.stored(scale, places) if scale in cache.header.arrays else None
    return as_stored(cache, stream, cache.stored(stream, places), scales)
