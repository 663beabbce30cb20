"""MDM, the modality modulation of MOTA: what an image embedding goes through before a frozen φ reads it.

    diag   f̃ = γ ⊙ f + β        γ = 1, β = 0 at the start            2D parameters
    full   f̃ = Γ f + β          Γ = I, β = 0 at the start            D² + D

Paper:   arXiv 2410.23736 v2, which has no public code; the two forms are our choice.
Letters: γ, Γ → gain, β → shift (not the β_w of the entropy weights).
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Modulation(nn.Module):
    """An affine map that starts as the identity, bit for bit (a negative zero becomes a positive one).

    Computed in float32 under autocast too, since bf16 would round what is to stay as it is. On a GPU `full` is the
    identity as long as matrix products do not use TF32, which is torch's default.

    Args:
        kind: a gain for every entry, or a whole matrix.
        dim: width D of what is modulated.
    """

    def __init__(self, kind: Literal["diag", "full"], dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.eye(dim) if kind == "full" else torch.ones(dim))
        self.shift = nn.Parameter(torch.zeros(dim))

    def forward(self, f: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """The same map for every vector of `f`, which may be embeddings (B, D) or rows of images (B, N, D)."""
        with torch.autocast(f.device.type, enabled=False):
            f = f.float()
            return (F.linear(f, self.gain) if self.gain.ndim == 2 else self.gain * f) + self.shift
