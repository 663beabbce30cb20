"""Modality distribution modulation (MDM): a learned affine map before a frozen network; the identity at start.

diag   γ ⊙ f + β    γ = 1, β = 0     2·D parameters       arXiv 2410.23736 (scale and shift; the form is our choice)
full   Γ f + β      Γ = I            D² + D parameters
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Modulation(nn.Module):
    """γ ⊙ f + β, or Γ f + β.

    Args:
        kind: "diag" or "full".
        d: width of f.
    """

    def __init__(self, kind: Literal["diag", "full"], d: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(d) if kind == "diag" else torch.eye(d))
        self.shift = nn.Parameter(torch.zeros(d))

    def forward(self, f: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """The modulated features; rows of tokens share one map."""
        moved = self.scale * f if self.scale.ndim == 1 else f @ self.scale.T
        return moved + self.shift
