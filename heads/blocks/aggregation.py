"""Many patches and one global vector → a few slots, and what two images' slots share.

    patches (B, N, W) ── Projection ── Z (B, N, w) ── Gates ──▶ local slots  (B, n_local, w)
    global vector (B, w) ───────────────────── ConditionMasks ─▶ global slots (B, n_global, w)
    slots of two images ── Disentangler ──▶ what they share, and what each has alone

From TRIDENT, arXiv 2411.12584: its feature adaptive aggregation, condition masks and disentangling. w is the width of
the global vector, B items, N patches.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from heads.blocks.readout import Readout

Activation = Literal["gelu", "relu"]

CHUNK = 16384
"""Tokens projected at once where no gradient is kept: 0.27 GB of a 4096-wide hidden layer (our choice)."""


class Projection(nn.Module):
    """A trained 1×1 convolution behind the frozen two-layer projector of a LLaVA, or on the patches themselves.

    The projector ends in a linear layer, so convolution and that layer are one matrix, W_conv·W_fc2, made once a step:

        W_conv (W_fc2 h + b_fc2) + b_conv  =  (W_conv W_fc2) h + (W_conv b_fc2 + b_conv)

    Exact, values and gradients. For LLaVA-1.5-7B (1024 → 4096 → 4096 → 1024) a token costs 4096·(1024 + 1024) = 8.4 M
    multiply-adds instead of 4096·(1024 + 4096 + 1024) = 25.2 M, and the matrix 1024·4096² = 17.2 G once, which is saved
    by 1,024 tokens. Counted with torch's flop counter in a test.

    Args:
        readout: of the cache; `image/projector.*` are read where it has them.
        width: of a patch.
        out: channels of the convolution.
        activation: between the projector's layers; LLaVA-1.5 has "gelu", TRIDENT's release "relu".
        folded: False computes the two matrices one after the other, for tests.

    """

    def __init__(
        self,
        readout: Readout,
        width: int,
        out: int,
        *,
        activation: Activation = "gelu",
        folded: bool = True,
    ) -> None:
        super().__init__()
        self.readout, self.folded = readout, folded
        self.projected = readout.has("image/projector.fc1.weight")
        self.activation = F.gelu if activation == "gelu" else F.relu
        self.conv = nn.Linear(readout.joint_width("image") if self.projected else width, out)

    def forward(self, tokens: Float[Tensor, "t w"]) -> Float[Tensor, "t c"]:
        """Channels of every token; tokens of many images in one row, for a 1×1 convolution sees each alone."""
        weight, bias = self.conv.weight, self.conv.bias
        if self.projected and self.folded:
            with torch.autocast(weight.device.type, enabled=False):
                last = self.readout["image/projector.fc2.weight"]
                if self.readout.has("image/projector.fc2.bias"):
                    bias = bias + weight @ self.readout["image/projector.fc2.bias"]
                weight = weight @ last
        parts = [tokens] if torch.is_grad_enabled() else tokens.split(CHUNK)
        return torch.cat([F.linear(self._before(some), weight, bias) for some in parts])

    def _before(self, tokens: Tensor) -> Tensor:
        """What the trained matrix multiplies."""
        if not self.projected:
            return tokens
        hidden = self.activation(self._layer("fc1", tokens))
        return hidden if self.folded else self._layer("fc2", hidden)

    def _layer(self, name: str, x: Tensor) -> Tensor:
        bias = f"image/projector.{name}.bias"
        found = self.readout[bias] if self.readout.has(bias) else None
        return F.linear(x, self.readout[f"image/projector.{name}.weight"], found)


class Aggregation(nn.Module):
    """l_i = (1/N) Σ_n gate(w_i·z_n + b_i) z_n, with Z = Dropout1d(ReLU(BN(Conv(…)))): a mean, not over Σ gates.

    Args:
        projection: patches → channels.
        n_local: slots.
        gate: sigmoid, or relu.
        train_gates: False leaves the gates as they were drawn.
        dropout: probability that a channel is dropped in all patches of an image.

    """

    def __init__(
        self,
        projection: Projection,
        n_local: int,
        *,
        gate: Literal["sigmoid", "relu"],
        train_gates: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        width = projection.conv.out_features
        self.projection = projection
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(dropout)
        self.gates = nn.Linear(width, n_local).requires_grad_(train_gates)
        self.gate = torch.sigmoid if gate == "sigmoid" else F.relu

    def forward(
        self, patches: Float[Tensor, "b n w"], mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b s c"]:
        """Local slots; `mask` is True where a patch is real, None if all are."""
        b, n, _ = patches.shape
        flat = patches.flatten(0, 1) if mask is None else patches[mask]
        # Statistics of the norm are over real patches of all images.
        z = F.relu(self.norm(self.projection(flat).float()))
        if mask is None:
            z, count = z.unflatten(0, (b, n)), float(n)
        else:
            z = z.new_zeros(b, n, z.shape[-1]).masked_scatter(mask[..., None], z)
            count = mask.sum(1).float()[:, None, None]
        z = z * self.dropout(z.new_ones(b, 1, z.shape[-1]))
        return self.gate(self.gates(z)).mT.to(z.dtype) @ z / count

    def weights(self, patches: Float[Tensor, "b n w"]) -> Float[Tensor, "b s n"]:
        """gate(w_i·z_n + b_i) of every slot and patch, all of them real, for pictures: nothing is dropped."""
        z = F.relu(self.norm(self.projection(patches.flatten(0, 1)).float()))
        return self.gate(self.gates(z)).unflatten(0, patches.shape[:2]).mT


class ConditionMasks(nn.Module):
    """g_j = f(m_j) ⊙ g with m_j from N(0, 1): what one global vector says under several conditions.

    Args:
        n_global: masks.
        width: of the vector.
        kind: f: relu (half of the entries start at 0 and never leave it), softplus, or ones (no mask at all).
    """

    def __init__(
        self, n_global: int, width: int, kind: Literal["relu", "softplus", "ones"]
    ) -> None:
        super().__init__()
        self.n_global, self.kind = n_global, kind
        self.masks = None if kind == "ones" else nn.Parameter(torch.randn(n_global, width))

    def forward(self, vector: Float[Tensor, "b w"]) -> Float[Tensor, "b s w"]:
        """Global slots."""
        if self.masks is None:
            return vector[:, None].expand(-1, self.n_global, -1)
        return vector[:, None] * self.values()

    def values(self) -> Float[Tensor, "s w"]:
        """f(m), which no image changes; no row without masks."""
        if self.masks is None:
            return torch.empty(0, 0)
        return F.relu(self.masks) if self.kind == "relu" else F.softplus(self.masks)


class Disentangled(NamedTuple):
    """Of a main image and its partner, (B, w) each.

    Attributes:
        shared: joined from both, `shared_main` and `shared_partner` each one's view of it.
        alone_main, alone_partner: what is left of each.

    """

    shared: Float[Tensor, "b w"]
    shared_main: Float[Tensor, "b w"]
    shared_partner: Float[Tensor, "b w"]
    alone_main: Float[Tensor, "b w"]
    alone_partner: Float[Tensor, "b w"]


class Disentangler(nn.Module):
    """Weighs every slot of two images by how much it is of what they share.

        α_k = σ(MLP₁[F^m_k ; F^r_k])     shared_main    = mean_k α_k F^m_k      alone_main    = mean_k (1-α_k) F^m_k
        β_k = σ(MLP₂[F^m_k ; F^r_k])     shared_partner = mean_k β_k F^r_k      alone_partner = mean_k (1-β_k) F^r_k
                                         shared         = W [shared_main ; shared_partner]

    Args:
        width: of a slot; the MLPs are 2·width → width → ReLU → 1.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.main, self.partner = _weigher(width), _weigher(width)
        self.join = nn.Linear(2 * width, width)

    def forward(
        self, main: Float[Tensor, "b s w"], partner: Float[Tensor, "b s w"]
    ) -> Disentangled:
        """What the slots of images and of their partners share, and what not."""
        both = torch.cat([main, partner], dim=-1)
        alpha, beta = torch.sigmoid(self.main(both)), torch.sigmoid(self.partner(both))
        shared_main, shared_partner = (alpha * main).mean(1), (beta * partner).mean(1)
        return Disentangled(
            self.join(torch.cat([shared_main, shared_partner], dim=-1)),
            shared_main,
            shared_partner,
            ((1 - alpha) * main).mean(1),
            ((1 - beta) * partner).mean(1),
        )


def pool_grid(patches: Float[Tensor, "b n w"]) -> Float[Tensor, "b m w"]:
    """2×2 means of a square grid of patches, in the same row-by-row order: a quarter of them.

    ┌──┬──┐
    │ab│cd│        abef  cdgh
    │ef│gh│   →    ijmn  klop
    ├──┼──┤
    │ij│kl│
    │mn│op│
    └──┴──┘
    """
    side = round(patches.shape[1] ** 0.5)
    grid = patches.unflatten(1, (side // 2, 2, side // 2, 2))
    return grid.mean((2, 4)).flatten(1, 2)


def _weigher(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 1))
