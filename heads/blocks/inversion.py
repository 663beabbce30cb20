"""φ: from an image to a pseudo-word S*, an embedding that stands in a sentence where a word would.

    f ── φ ──▶ S*        "a photo of S* that {modification}" ── text tower ──▶ q

    pic2word      [Linear → 512, dropout .1, ReLU] × 2, Linear → V                       1,050,368 parameters at L/14
    searle        [Linear → 4D, GELU, dropout .5] × 2 (4D → 4D), Linear → V              14,162,688
    lincir        the same network as searle, trained on captions                        14,162,688
    context_i2w   reads all image rows and a caption, see `ContextI2W`                   68,471,297

f is the pooled embedding as the backbone makes it, NOT normalised.

Papers:  Pic2Word, arXiv 2302.03084; SEARLE, 2303.15247; LinCIR, 2312.01998; Context-I2W, 2309.16137.
Widths, order of layers and starting values as in the released code (read for these facts, not copied).
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from heads.blocks.readout import Readout
from heads.errors import ConfigError

Kind = Literal["pic2word", "searle", "lincir", "context_i2w"]

HIDDEN = 512
"""Hidden width of pic2word, whatever the backbone."""


class Inversion(nn.Module):
    """Three linear layers, the first two each with an activation and dropout.

    Args:
        dim: width D of a pooled embedding.
        hidden: of both hidden layers.
        out: width V of a word.
        activation: a new layer of it.
        dropout: probability.
    """

    def __init__(
        self, dim: int, hidden: int, out: int, activation: Callable[[], nn.Module], dropout: float
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dim, hidden),
            activation(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            activation(),
            nn.Dropout(dropout),
            nn.Linear(hidden, out),
        )

    def forward(self, f: Float[Tensor, "b d"]) -> Float[Tensor, "b v"]:
        """Pseudo-words of pooled embeddings that are not normalised."""
        return self.layers(f)


def pic2word(dim: int, out: int) -> Inversion:
    """Pic2Word's network. Dropout stands before ReLU there; the two commute, so it stands behind it here."""
    return Inversion(dim, HIDDEN, out, nn.ReLU, 0.1)


def searle(dim: int, out: int) -> Inversion:
    """SEARLE's network, which LinCIR took over."""
    return Inversion(dim, 4 * dim, out, nn.GELU, 0.5)


class LatentBlock(nn.Module):
    """Latents look at image rows and at themselves, then go through a feed-forward part; both added.

    z ← z + Out · MHA(q = LN z, kv = [LN' x ; LN z]);   z ← z + W₂ GELU(W₁ LN'' z);   no linear layer has a bias.

    Args:
        dim: width of all rows.
        heads, head_dim: attention heads, and the width of one, which need not make up `dim`.
        ffn: hidden width of the feed-forward part.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, ffn: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_rows, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q = nn.Linear(dim, heads * head_dim, bias=False)
        self.kv = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)
        self.norm_ffn = nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, ffn, bias=False), nn.Linear(ffn, dim, bias=False)

    def forward(
        self,
        z: Float[Tensor, "b k w"],
        x: Float[Tensor, "b n w"],
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b k w"]:
        """Latents `z` after one look at rows `x`; `mask` is True where a row of x is real, None is everywhere."""
        normed = self.norm_latents(z)
        k, v = self.kv(torch.cat([self.norm_rows(x), normed], 1)).chunk(2, dim=-1)
        if mask is not None:  # latents see each other in any case
            mask = torch.cat([mask, mask.new_ones(z.shape[:2])], 1)[:, None, None]
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q(normed), k, v)
        )
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        z = z + self.out(seen.transpose(1, 2).flatten(2))
        return z + self.fc2(F.gelu(self.fc1(self.norm_ffn(z))))


class ContextI2W(nn.Module):
    """S* = global + tanh(g) · local, both from image rows that a caption has turned and weighed.

        caption (B, D) ── C, no bias ── c (B, W)
        rows (B, 1 + N, W) ── R, weight-normed, no bias ── ⊙ c ─┬─ row 0 ── LN ── P ── φ_global ──────────────┐
                                                                 └─ rows 1… ── 4 latents, 6 blocks ── mean ──   + ─ S*
                                                                    LN ── P' ── φ_local ── · tanh(g), g = 0 ───┘

    φ_global and φ_local are networks of pic2word. P and P' (W → D) are trained from a random start, as in the release:
    they are not the backbone's readout, and 68.5 M counts them. The release builds P as W → V and reads captions of
    width V, which is the same where D = V, as in CLIP L/14, and does not run elsewhere; ours have D (our choice).
    With g = 0 nothing but g and the global branch gets a gradient.

    Args:
        width: W of the image tower.
        dim: D of a pooled embedding, here the caption's.
        out: width V of a word.
        n_latents, n_blocks: how many.
        heads, head_dim, ffn_ratio: of a block; all five as in the release.
    """

    def __init__(
        self,
        width: int,
        dim: int,
        out: int,
        *,
        n_latents: int = 4,
        n_blocks: int = 6,
        heads: int = 8,
        head_dim: int = 64,
        ffn_ratio: int = 4,
    ) -> None:
        super().__init__()
        self.context = nn.Linear(dim, width, bias=False)
        turn = nn.Linear(width, width, bias=False).weight.detach()
        self.turn = nn.Parameter(turn)
        self.turn_length = nn.Parameter(turn.norm(dim=1, keepdim=True))
        self.global_norm, self.local_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.global_proj = nn.Parameter(width**-0.5 * torch.randn(width, dim))
        self.local_proj = nn.Parameter(width**-0.5 * torch.randn(width, dim))
        self.latents = nn.Parameter(torch.randn(n_latents, width))
        self.blocks = nn.ModuleList(
            LatentBlock(width, heads, head_dim, ffn_ratio * width) for _ in range(n_blocks)
        )
        self.latents_norm = nn.LayerNorm(width)
        self.global_phi, self.local_phi = pic2word(dim, out), pic2word(dim, out)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        tokens: Float[Tensor, "b n_plus_1 w"],
        caption: Float[Tensor, "b d"],
        mask: Bool[Tensor, "b n_plus_1"] | None = None,
    ) -> Float[Tensor, "b v"]:
        """Pseudo-words.

        Args:
            tokens: rows as `image_rows` puts them: one row for the whole image, then its patches.
            caption: pooled, not normalised; the modification when a query is made.
            mask: True where a row is real, row 0 always; None is everywhere.
        """
        rows = self._seen(tokens, caption)
        local = self._local(rows[:, 1:], None if mask is None else mask[:, 1:])
        return self._global(rows[:, 0]) + self.gate.tanh() * local

    def global_branch(
        self, tokens: Float[Tensor, "b n_plus_1 w"], caption: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b v"]:
        """The global branch alone, which reads row 0 of `tokens`."""
        return self._global(self._seen(tokens[:, :1], caption)[:, 0])

    def _seen(self, tokens: Tensor, caption: Tensor) -> Tensor:
        """Rows under the caption: R x ⊙ c, with the rows of R of the lengths `turn_length`."""
        turn = self.turn_length * F.normalize(self.turn, dim=1)
        return F.linear(tokens, turn) * self.context(caption)[:, None]

    def _global(self, row: Tensor) -> Tensor:
        return self.global_phi(self.global_norm(row) @ self.global_proj)

    def _local(self, patches: Tensor, mask: Tensor | None) -> Tensor:
        z = self.latents.expand(len(patches), -1, -1)
        for block in self.blocks:
            z = block(z, patches, mask)
        return self.local_phi(self.local_norm(self.latents_norm(z).mean(1)) @ self.local_proj)


def image_rows(
    readout: Readout,
    prefix: Float[Tensor, "b p w"] | None,
    patches: Float[Tensor, "b n w"],
    mask: Bool[Tensor, "b n"] | None = None,
) -> tuple[Float[Tensor, "b n_plus_1 w"], Bool[Tensor, "b n_plus_1"] | None]:
    """One row for the whole image, then its patches, with their mask: what `ContextI2W` reads.

    CLIP's first row is its class token. SigLIP2 has none, and PE's is not what it pools: there it is what the readout's
    learned query sees of all rows, which has the width of a row (our choice; the paper knows CLIP alone).

    Args:
        readout: of the cache.
        prefix: raw prefix rows, None where the backbone has none.
        patches: raw rows.
        mask: True where a patch is real; None is everywhere.

    Raises:
        ConfigError: neither a class token nor a query that pools.
    """
    if readout.pools_all_rows():
        rows, real = patches, mask
        if prefix is not None:
            rows = torch.cat([prefix, patches], 1)
            real = None if mask is None else torch.cat([mask.new_ones(prefix.shape[:2]), mask], 1)
        first = readout.view(rows, real)[:, None]
    elif prefix is not None:
        first = prefix[:, :1]
    else:
        raise ConfigError(
            "context_i2w needs one row for the whole image, but these images have no prefix row and the readout no "
            "pooling query; add image/prefix to the cache, or choose another kind"
        )
    if mask is not None:
        mask = torch.cat([mask.new_ones(len(mask), 1), mask], 1)
    return torch.cat([first.to(patches.dtype), patches], 1), mask


def network(kind: Kind, dim: int, out: int, width: int | None = None) -> Inversion | ContextI2W:
    """A new φ.

    Args:
        kind: whose.
        dim: width D of a pooled embedding.
        out: width V of a word.
        width: W of the image tower, for context_i2w alone.

    Raises:
        ConfigError: context_i2w without `width`.
    """
    if kind == "context_i2w":
        if width is None:
            raise ConfigError("context_i2w reads image rows and needs their width; give `width`")
        return ContextI2W(width, dim, out)
    return pic2word(dim, out) if kind == "pic2word" else searle(dim, out)


def uniform_gaussian(
    f: Float[Tensor, "b d"], generator: torch.Generator | None = None
) -> Float[Tensor, "b d"]:
    """LinCIR's noise on captions: f + u · n, with u from U(0, 1) for every item and n from N(0, 1) for every entry.

    Args:
        f: pooled, not normalised.
        generator: of the device of `f`; None is torch's own.
    """
    u = torch.rand(len(f), 1, dtype=f.dtype, device=f.device, generator=generator)
    n = torch.randn(f.shape, dtype=f.dtype, device=f.device, generator=generator)
    return f + u * n
