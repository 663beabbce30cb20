"""Branches of an image, one a kind of concept, and words and views of a primitive under the condition of its partner.

    X ── Branch_attr ── row ──▶ v_attr          row: the class token, or the readout's own pooling of all rows
    X ── Branch_obj  ── row ──▶ v_obj
    X ── Branch_pair ── row ──▶ v_pair

    partner tokens ─┬───────────── [partner ; down(X)] ── self block ──┐ kv
    (of the obj     │              words of attrs, EOS row ────── cross block ──▶ conditioned words, one set an image
     found, for     └──────────────────────────────────────────────────┐ kv
     attrs)         row of Branch_attr ── down ────────────────── cross block ──▶ conditioned view

Only what is read is computed: one row of a branch's last block, the EOS row of each word, one row of the view. Rows of
a cross block do not see each other, so this is the full block's own value.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from heads.blocks.attention import Block
from heads.blocks.fusion import CrossBlock
from heads.blocks.readout import Readout


def quick_gelu(x: Tensor) -> Tensor:
    """Each x times sigmoid(1.702 x), the activation of the first CLIPs."""
    return x * torch.sigmoid(1.702 * x)


class Branch(nn.Module):
    """Pre-LN transformer blocks over all image rows, of which one row is read.

    Args:
        dim: width of the image tower.
        heads: attention heads; must divide `dim`.
        n_blocks: how many; with 0 the rows stay as they are.
        dropout: probability.
    """

    def __init__(self, dim: int, heads: int, n_blocks: int, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(dim, heads, 4 * dim, dropout, quick_gelu) for _ in range(n_blocks)
        )

    def forward(
        self, x: Float[Tensor, "b n w"], mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n w"]:
        """All rows; `mask` is True where one is real."""
        for block in self.blocks:
            x = block(x, mask)
        return x

    def first(
        self, x: Float[Tensor, "b n w"], mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b w"]:
        """Row 0 of `forward`: the last block computes no other."""
        for block in self.blocks[:-1]:
            x = block(x, mask)
        for block in self.blocks[-1:]:
            assert isinstance(block, Block)
            return block.first(x, mask)
        return x[:, 0]

    def looks(
        self, x: Float[Tensor, "b n w"], mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n"]:
        """How much row 0 looks at each row in the last block, mean over heads, for pictures; there must be a block."""
        for block in self.blocks[:-1]:
            x = block(x, mask)
        last = self.blocks[-1]
        assert isinstance(last, Block)
        return last.weights(x, mask).mean(1)[:, 0]

    def row(
        self,
        readout: Readout,
        x: Float[Tensor, "b n w"],
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b w"]:
        """What leads into the joint space by `readout.image`: row 0, or what the readout's query sees of all rows."""
        if readout.pools_all_rows():
            return readout.view(self(x, mask), mask)
        return self.first(x, mask)


class Down(nn.Module):
    """Linear, layer norm, dropout: rows of the image tower at the width of the text tower."""

    def __init__(self, width: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "*b w"]) -> Float[Tensor, "*b v"]:
        """Row by row."""
        return self.dropout(self.norm(self.linear(x)))


class ConditionedWords(nn.Module):
    """Semantic stream: words of one kind look at the tokens of the partner and at the image.

    Args:
        width: of the image tower.
        dim: of the text tower.
        heads: attention heads; must divide `dim`.
        dropout: probability.
    """

    def __init__(self, width: int, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.down = Down(width, dim, dropout)
        self.mix = Block(dim, heads, 4 * dim, dropout, quick_gelu)
        self.cross = CrossBlock(dim, heads, dropout, activation=quick_gelu)

    def forward(
        self,
        words: Float[Tensor, "k v"],
        partner: Float[Tensor, "b l v"],
        x: Float[Tensor, "b n w"],
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b k v"]:
        """Cross(words, Self([partner ; down(x)])).

        Args:
            words: raw EOS row of every word's prompt, the same for every image.
            partner: raw token states of the partner found in each image.
            x: raw image rows.
            mask: True where an image row is real; None is everywhere.
        """
        rows = torch.cat([partner, self.down(x)], 1)
        if mask is not None:
            mask = torch.cat([mask.new_ones(partner.shape[:2]), mask], 1)
        return words + self.cross(words[None], self.mix(rows, mask), mask)


class ConditionedView(nn.Module):
    """Visual stream: the row of a branch looks at the tokens of the partner. Arguments as of `ConditionedWords`."""

    def __init__(self, width: int, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.down = Down(width, dim, dropout)
        self.cross = CrossBlock(dim, heads, dropout, activation=quick_gelu)

    def forward(
        self, row: Float[Tensor, "b w"], partner: Float[Tensor, "b l v"]
    ) -> Float[Tensor, "b v"]:
        """VCross(down(row), partner)."""
        q = self.down(row)[:, None]
        return (q + self.cross(q, partner))[:, 0]
