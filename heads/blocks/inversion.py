"""Inversion networks φ: from an image feature to a word of the text tower. Dropout acts while training alone.

    pic2word        [Linear D→512, Dropout .1, ReLU] × 2 (512→512), Linear →V                   arXiv 2302.03084
    searle, lincir  Linear D→4D, GELU, Dropout .5, Linear 4D→4D, GELU, Dropout .5, Linear →V    2303.15247, 2312.01998
    context_i2w     tokens ⊙ caption → global branch + tanh(g) · local branch                   2309.16137

Parameters are named as in the files that the authors published, so that those load as they are.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

Kind = Literal["pic2word", "searle", "lincir", "context_i2w"]

MIDDLE = 512
"""Width of pic2word's hidden layers (released code)."""

N_LATENTS, N_LAYERS, N_HEADS, HEAD_WIDTH, FFN = 4, 6, 8, 64, 4
"""Of context_i2w's local branch (METHODS; after the paper's description)."""


class Pic2Word(nn.Module):
    """φ of Pic2Word.

    Args:
        d: width of the feature.
        v: width of a word.
    """

    def __init__(self, d: int, v: int) -> None:
        super().__init__()
        widths = [(d, MIDDLE), (MIDDLE, MIDDLE)]
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Linear(i, o), nn.Dropout(0.1), nn.ReLU()) for i, o in widths)
        )
        self.fc_out = nn.Linear(MIDDLE, v)

    def forward(self, f: Float[Tensor, "b d"]) -> Float[Tensor, "b v"]:
        """Words of features, which are not normalised."""
        return self.fc_out(self.layers(f))


class Searle(nn.Module):
    """φ of SEARLE and LinCIR.

    Args:
        d: width of the feature.
        v: width of a word.
    """

    def __init__(self, d: int, v: int) -> None:
        super().__init__()
        wide = 4 * d
        self.layers = nn.Sequential(
            nn.Linear(d, wide),
            nn.GELU(),
            nn.Dropout(0.5),
            nn.Linear(wide, wide),
            nn.GELU(),
            nn.Dropout(0.5),
            nn.Linear(wide, v),
        )

    def forward(self, f: Float[Tensor, "b d"]) -> Float[Tensor, "b v"]:
        """Words of features, which are not normalised."""
        return self.layers(f)


class ContextI2W(nn.Module):
    """φ of Context-I2W: reads all image rows in the light of a caption; a reconstruction from the paper's description.

    The caption weighs the channels of every row. The global branch reads the class token, the local branch four
    learned queries that look at all rows in turn; it enters by tanh(g), and g starts at 0.

    Args:
        d: width of captions and of the joint space.
        w: width of image rows.
        v: width of a word.
    """

    def __init__(self, d: int, w: int, v: int) -> None:
        super().__init__()
        self.caption = nn.Linear(d, w, bias=False)
        self.rows = weight_norm(nn.Linear(w, w, bias=False))
        self.out_global, self.out_local = _Out(d, w, v), _Out(d, w, v)
        self.latents = nn.Parameter(torch.randn(N_LATENTS, w))
        self.looks = nn.ModuleList(_Look(w) for _ in range(N_LAYERS))
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(
        self,
        rows: Float[Tensor, "b n w"],
        caption: Float[Tensor, "b d"],
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b v"]:
        """Words.

        Args:
            rows: raw image rows, the class token first.
            caption: pooled text that says what to look for.
            mask: True where a row is real; None is everywhere.
        """
        weighed = self.rows(rows) * self.caption(caption)[:, None]
        latents = self.latents.expand(len(rows), -1, -1)
        for look in self.looks:
            latents = look(latents, weighed, mask)
        local = self.out_local(latents.mean(1))
        return self.out_global(weighed[:, 0]) + self.gate.tanh() * local


class _Out(nn.Module):
    """A row → LayerNorm, projection, the network of Pic2Word."""

    def __init__(self, d: int, w: int, v: int) -> None:
        super().__init__()
        self.norm, self.proj, self.word = (
            nn.LayerNorm(w),
            nn.Linear(w, d, bias=False),
            Pic2Word(d, v),
        )

    def forward(self, row: Float[Tensor, "b w"]) -> Float[Tensor, "b v"]:
        return self.word(self.proj(self.norm(row)))


class _Look(nn.Module):
    """Latents look at rows once, then think."""

    def __init__(self, w: int) -> None:
        super().__init__()
        inner = N_HEADS * HEAD_WIDTH
        self.norm_latents, self.norm_rows = nn.LayerNorm(w), nn.LayerNorm(w)
        self.query = nn.Linear(w, inner, bias=False)
        self.key_value = nn.Linear(w, 2 * inner, bias=False)
        self.out = nn.Linear(inner, w, bias=False)
        self.think = nn.Sequential(
            nn.LayerNorm(w),
            nn.Linear(w, FFN * w, bias=False),
            nn.GELU(),
            nn.Linear(FFN * w, w, bias=False),
        )

    def forward(
        self,
        latents: Float[Tensor, "b k w"],
        rows: Float[Tensor, "b n w"],
        mask: Bool[Tensor, "b n"] | None,
    ) -> Float[Tensor, "b k w"]:
        query = self.query(self.norm_latents(latents))
        key, value = self.key_value(self.norm_rows(rows)).chunk(2, -1)
        query, key, value = (
            x.unflatten(-1, (N_HEADS, -1)).transpose(1, 2) for x in (query, key, value)
        )
        seen = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=None if mask is None else mask[:, None, None]
        )
        latents = latents + self.out(seen.transpose(1, 2).flatten(-2))
        return latents + self.think(latents)


def uniform_gaussian(f: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    """LinCIR's noise: f + u·n, u ~ U(0, 1) for each item, n ~ N(0, I); from torch's global generator."""
    return f + torch.rand(len(f), 1, device=f.device, dtype=f.dtype) * torch.randn_like(f)
