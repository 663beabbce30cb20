"""How one image and one text are scored from their tokens: jointly, or token against patch.

Both scorers have the same five verbs, so that a head need not know which it holds:

    encode_image (B, N, ·), encode_text (M, L, ·)   once per item
    cells(image, text, columns (B, K))              K chosen candidates of every image   → (B, K)
    grid(image, text)                               all of them                          → (B, M)
    attention(image, text)                          text i on the patches of image i     → (B, L, N)
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from heads.blocks.attention import Block

INIT_STD = 0.2
"""Standard deviation of learned tokens, types and positions at the start: a third of what torch's linear layers
make of normed tokens. With ViT's 0.02, word order stayed invisible for hundreds of steps in a two-object toy
(measured; our choice)."""

INIT_TEMPERATURE = 0.07
"""CLIP's initial temperature: a learned log scale starts at log(1 / 0.07) (CLIP paper, section 2.5)."""

MAX_SCALE = 100.0
"""A learned scale is capped here (CLIP paper, section 2.5)."""


class Encoded(NamedTuple):
    """Items of one side, ready to be paired.

    Attributes:
        tokens: (B, N, dim).
        mask: True where a token is real, (B, N).
        qkv: of the first joint block, (B, N, 3·dim); empty last axis where there is none.

    """

    tokens: Float[Tensor, "b n d"]
    mask: Bool[Tensor, "b n"]
    qkv: Float[Tensor, "b n e"]


class Embed(nn.Module):
    """Linear(LN(tokens)) + type + position: one side's raw tokens in the scorer's width.

    Args:
        width: of the incoming tokens.
        dim: of the outgoing ones.
        positions: number of learned positions; 0 for none.
        typed: whether to add a learned vector that tells the sides apart.

    """

    def __init__(self, width: int, dim: int, positions: int, *, typed: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, dim)
        self.kind = nn.Parameter(INIT_STD * torch.randn(dim)) if typed else None
        self.position = nn.Parameter(INIT_STD * torch.randn(positions, dim)) if positions else None

    def forward(self, tokens: Float[Tensor, "b n w"]) -> Float[Tensor, "b n d"]:
        """Embed tokens; the row number is the position."""
        x = self.linear(self.norm(tokens))
        if self.kind is not None:
            x = x + self.kind
        if self.position is not None:
            x = x + self.position[: x.shape[1]]
        return x


class JointTransformer(nn.Module):
    """score = w · X[c] + b, where X is a transformer's output on [c ; image tokens ; text tokens].

        X0   c │ v1 v2 … vN │ t1 … tL ░ ░      ░ padding: never attended to
             │        every token sees every real token
        X4   c ──▶ w · LN(X4[c]) + b

    Computed as written, except for work that cannot change the result: the first block's q, k, v belong to one token
    alone and are projected once per item, and of the last block only row c is computed.

    Args:
        image, text: embeddings of the two sides.
        dim, heads, ffn, layers, dropout: of the blocks.
        chunk: cells scored at once. More cells than this are scored in turn, and recomputed for the backward pass.
        zero_output: start with w = b = 0, so that the score starts at 0.

    """

    def __init__(
        self,
        image: Embed,
        text: Embed,
        *,
        dim: int,
        heads: int,
        ffn: int,
        layers: int,
        dropout: float,
        chunk: int,
        zero_output: bool,
    ) -> None:
        super().__init__()
        self.chunk = chunk
        self.image, self.text = image, text
        self.c = nn.Parameter(INIT_STD * torch.randn(dim))
        self.blocks = nn.ModuleList(Block(dim, heads, ffn, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, 1)
        if zero_output:
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)

    def encode_image(
        self, tokens: Float[Tensor, "b n w"], mask: Bool[Tensor, "b n"] | None = None
    ) -> Encoded:
        """Image tokens; `mask` is True where one is real, None if all are."""
        return self._encoded(self.image(tokens), _all_real(tokens) if mask is None else mask)

    def encode_text(self, tokens: Float[Tensor, "m l v"], mask: Bool[Tensor, "m l"]) -> Encoded:
        """Text tokens; `mask` is True where one is real."""
        return self._encoded(self.text(tokens), mask)

    def cells(
        self, image: Encoded, text: Encoded, columns: Int[Tensor, "b k"]
    ) -> Float[Tensor, "b k"]:
        """Scores of image i with the texts `columns[i]`."""
        n_rows, n_columns = columns.shape
        tiles = list(_tiles(n_rows, n_columns, self.chunk))
        if len(tiles) == 1:
            return self._tile(image, text, columns)
        out = image.tokens.new_empty(columns.shape, dtype=torch.float32)
        for r, k in tiles:
            part = Encoded._make(t[r] for t in image)
            if torch.is_grad_enabled():  # memory of one tile instead of all; dropout draws the same
                got = checkpoint(self._tile, part, text, columns[r, k], use_reentrant=False)
            else:
                got = self._tile(part, text, columns[r, k])
            assert isinstance(got, Tensor)
            out[r, k] = got
        return out

    def grid(self, image: Encoded, text: Encoded) -> Float[Tensor, "b m"]:
        """Scores of all pairs."""
        every = torch.arange(len(text.tokens), device=text.tokens.device)
        return self.cells(image, text, every.expand(len(image.tokens), -1))

    def attention(self, image: Encoded, text: Encoded) -> Float[Tensor, "b l n"]:
        """Attention of text tokens to patches, averaged over heads, in the block before the last.

        Not in the last one: there the score reads row c alone, so what text rows attend to is never trained. With a
        single block there is no other choice, and the map means little. Weights go to all tokens, so those to the
        patches sum to less than 1.
        """
        columns = torch.arange(len(image.tokens), device=image.tokens.device)[:, None]
        x, mask, _ = self._joined(image, text, columns)
        for block in self.blocks[:-2]:
            x = block(x, mask)
        shown = self.blocks[max(0, len(self.blocks) - 2)]
        assert isinstance(shown, Block)
        weights = shown.weights(x, mask).mean(1)
        n = image.tokens.shape[1]
        return weights[:, n + 1 :, 1 : n + 1]

    def _encoded(self, tokens: Tensor, mask: Tensor) -> Encoded:
        first = self.blocks[0]
        assert isinstance(first, Block)
        shared = first.project(tokens) if len(self.blocks) > 1 else tokens[..., :0]
        return Encoded(tokens, mask, shared)

    def _joined(self, image: Encoded, text: Encoded, columns: Tensor) -> tuple[Tensor, ...]:
        """[c ; image ; text] of every cell, flattened: tokens, mask, and q, k, v of the first block."""
        b, k = columns.shape
        c = self._encoded(self.c.expand(1, 1, -1), image.mask.new_ones(1, 1))
        flat = columns.flatten()

        def join(which: int) -> Tensor:
            own = image[which].unsqueeze(1)
            parts = (
                c[which].unsqueeze(0).expand(b, k, *c[which].shape[1:]),
                own.expand(-1, k, *own.shape[2:]),
                text[which].index_select(0, flat).unflatten(0, (b, k)),
            )
            return torch.cat(parts, dim=2).flatten(0, 1)

        return join(0), join(1), join(2)

    def _tile(self, image: Encoded, text: Encoded, columns: Tensor) -> Tensor:
        x, mask, qkv = self._joined(image, text, columns)
        *early, last = self.blocks
        for i, block in enumerate(early):
            x = block(x, mask, qkv if i == 0 else None)
        assert isinstance(last, Block)
        final = self.norm(last.first(x, mask)).float()
        score = (final * self.output.weight[0]).sum(-1) + self.output.bias
        return score.unflatten(0, tuple(columns.shape))


class LateInteraction(nn.Module):
    """score = e^a · mean over real text tokens of the largest cosine with a patch.

    Each side runs through its own transformer, so both can be stored per item.

    Args:
        image, text: embeddings of the two sides.
        dim, heads, ffn, dropout: of the blocks.
        layers: blocks of each side.
        chunk: cells scored at once.

    """

    def __init__(
        self,
        image: Embed,
        text: Embed,
        *,
        dim: int,
        heads: int,
        ffn: int,
        layers: int,
        dropout: float,
        chunk: int,
    ) -> None:
        super().__init__()
        self.chunk = chunk
        self.image, self.text = image, text
        self.image_blocks = nn.ModuleList(Block(dim, heads, ffn, dropout) for _ in range(layers))
        self.text_blocks = nn.ModuleList(Block(dim, heads, ffn, dropout) for _ in range(layers))
        self.image_norm, self.text_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.a = nn.Parameter(torch.tensor(-math.log(INIT_TEMPERATURE)))

    def encode_image(
        self, tokens: Float[Tensor, "b n w"], mask: Bool[Tensor, "b n"] | None = None
    ) -> Encoded:
        """Unit vectors of image tokens; `mask` is True where one is real, None if all are."""
        x = self.image(tokens)
        for block in self.image_blocks:
            x = block(x, mask)
        return self._unit(self.image_norm(x), _all_real(tokens) if mask is None else mask)

    def encode_text(self, tokens: Float[Tensor, "m l v"], mask: Bool[Tensor, "m l"]) -> Encoded:
        """Unit vectors of text tokens; `mask` is True where one is real."""
        x = self.text(tokens)
        for block in self.text_blocks:
            x = block(x, mask)
        return self._unit(self.text_norm(x), mask)

    def cells(
        self, image: Encoded, text: Encoded, columns: Int[Tensor, "b k"]
    ) -> Float[Tensor, "b k"]:
        """Scores of image i with the texts `columns[i]`."""
        chosen = text.tokens.index_select(0, columns.flatten()).unflatten(0, tuple(columns.shape))
        with torch.autocast(chosen.device.type, enabled=False):
            cosine = torch.einsum("bnd,bkld->bknl", image.tokens, chosen)
        best = _real_only(cosine, image.mask[:, None, :, None]).amax(2)
        return self._pooled(best, text.mask[columns])

    def grid(self, image: Encoded, text: Encoded) -> Float[Tensor, "b m"]:
        """Scores of all pairs, some images at a time."""
        rows = []
        with torch.autocast(image.tokens.device.type, enabled=False):
            height = max(1, self.chunk // max(1, len(text.tokens)))
            for some, real in zip(
                image.tokens.split(height), image.mask.split(height), strict=True
            ):
                cosine = torch.einsum("bnd,mld->bmnl", some, text.tokens)
                best = _real_only(cosine, real[:, None, :, None]).amax(2)
                rows.append(self._pooled(best, text.mask.expand(len(some), -1, -1)))
        return torch.cat(rows)

    def attention(self, image: Encoded, text: Encoded) -> Float[Tensor, "b l n"]:
        """Cosine of text token and patch, -1 to 1; the score takes the largest of each row."""
        with torch.autocast(image.tokens.device.type, enabled=False):
            return text.tokens @ image.tokens.mT

    def scale(self) -> Tensor:
        """e^a, at most 100."""
        return self.a.clamp(max=math.log(MAX_SCALE)).exp()

    def _pooled(self, best: Tensor, mask: Tensor) -> Tensor:
        """Mean over real tokens, times e^a."""
        total = best.masked_fill(~mask, 0.0).sum(-1)
        return self.scale() * total / mask.sum(-1)

    def _unit(self, tokens: Tensor, mask: Tensor) -> Encoded:
        unit = F.normalize(tokens.float(), dim=-1)
        return Encoded(unit, mask, unit[..., :0])


def _all_real(tokens: Tensor) -> Tensor:
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def _real_only(cosine: Tensor, mask: Tensor) -> Tensor:
    """-inf where a patch is padding, so that it is never the best; pictures of one shape have none, and pay nothing."""
    return cosine if bool(mask.all()) else cosine.masked_fill(~mask, -torch.inf)


def _tiles(b: int, k: int, chunk: int) -> Iterator[tuple[slice, slice]]:
    """Rectangles of at most `chunk` cells that cover (b, k): whole rows where they fit."""
    width = max(1, min(k, chunk))
    height = max(1, chunk // width)
    for i in range(0, b, height):
        for j in range(0, k, width):
            yield slice(i, i + height), slice(j, j + width)
