"""The last step of every preprocessing, both ways: 8-bit levels of a resized picture ↔ what a tower reads. No family.

    torchvision, open_clip    (levels / 255 − mean) / std
    transformers              (levels − 255·mean) / (255·std)     both products taken once, in float32

Both libraries resize and crop in 8 bits, so nothing is lost by keeping levels. The two orders differ in the last bits:
each is computed as its library computes it. Divisors are tensors on the device of the levels, because torch on CUDA
multiplies by the reciprocal of a plain number, and that has other last bits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torchvision.transforms import Normalize

from cache_builder.errors import UnknownName

WHITE = 255.0
"""The highest level."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """How one tower's library scales levels: `(levels / unit − mean) / std`, in float32, in this order.

    Attributes:
        unit: levels are divided by it first; 1 changes nothing.
        mean, std: of the three channels, in units of `levels / unit`.
    """

    unit: float
    mean: Float[Tensor, " 3"]
    std: Float[Tensor, " 3"]

    def normalised(self, levels: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """What the tower reads, on the device of `levels`."""
        unit, mean, std = self._on(levels.device)
        return levels.to(torch.float32).div_(unit).sub_(mean).div_(std)

    def levels(self, pixels: Float[Tensor, "b 3 h w"]) -> UInt8[Tensor, "b 3 h w"]:
        """The levels behind what the tower reads: exact, since rounding errors are far below half a level."""
        unit, mean, std = self._on(pixels.device)
        found = pixels.to(torch.float32).mul(std).add_(mean).mul_(unit)
        return found.round_().clamp_(0, WHITE).to(torch.uint8)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        mean, std = (t.to(device)[:, None, None] for t in (self.mean, self.std))
        return torch.tensor(self.unit, device=device), mean, std


def of_transform(transform: Any) -> Scaling:
    """Of a torchvision transform that ends in `ToTensor` and `Normalize`, as open_clip makes it."""
    last = transform.transforms[-1]
    if not isinstance(last, Normalize):
        raise UnknownName(
            f"image/pixels needs a transform that ends in Normalize; this one ends in {type(last).__name__}"
        )
    mean, std = (torch.tensor([*values], dtype=torch.float32) for values in (last.mean, last.std))
    return Scaling(WHITE, mean, std)


def of_processor(processor: Any) -> Scaling:
    """Of an image processor of transformers, with its torchvision backend."""
    if not (processor.do_rescale and processor.do_normalize):
        raise UnknownName(
            f"image/pixels needs an image processor that rescales and normalises; this {type(processor).__name__} has "
            f"do_rescale={processor.do_rescale}, do_normalize={processor.do_normalize}"
        )
    unit = 1.0 / processor.rescale_factor  # 255, up to its rounding
    mean, std = (
        torch.tensor([*values], dtype=torch.float32) * unit
        for values in (processor.image_mean, processor.image_std)
    )
    return Scaling(1.0, mean, std)
