"""Pre-LN transformer block, with a cheap way to read one row of its output and a way to see its attention.

    x ── norm1 ── qkv ── attention ── out ──(+ x)── norm2 ── fc1 ── GELU ── fc2 ──(+)── y

The same function as `torch.nn.TransformerEncoderLayer(norm_first=True, activation="gelu")` in evaluation mode (a
test compares the two). Written out here because three callers need what that module hides: the projected q, k, v
(shared between pairs of one item), row 0 alone (all that a score reads from the last block), and attention weights.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """x + MHA(LN x), then x + FFN(LN x).

    Dropout acts on the output of both branches only; dropping attention weights or hidden units as well costs a CPU
    more than the matrix products (our choice).

    Args:
        dim: width of a token.
        heads: attention heads; must divide `dim`.
        ffn: hidden width of the feed-forward part.
        dropout: probability, 0 to 1.
        activation: of the hidden units.

    """

    def __init__(
        self,
        dim: int,
        heads: int,
        ffn: int,
        dropout: float,
        activation: Callable[[Tensor], Tensor] = F.gelu,
    ) -> None:
        super().__init__()
        self.heads, self.activation = heads, activation
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, ffn)
        self.fc2 = nn.Linear(ffn, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        mask: Bool[Tensor, "b l"] | None = None,
        qkv: Float[Tensor, "b l three_d"] | None = None,
    ) -> Float[Tensor, "b l d"]:
        """All rows.

        Args:
            x: tokens.
            mask: True where a token may be attended to; None is everywhere. Rows that are False still get an output,
                which means nothing.
            qkv: `project(x)`, where the caller has it already.
        """
        q, k, v = (self.project(x) if qkv is None else qkv).chunk(3, dim=-1)
        return self._finish(x, self._attend(q, k, v, mask))

    def first(
        self, x: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"] | None = None
    ) -> Float[Tensor, "b d"]:
        """Row 0 of `forward(x, mask)`, without computing the others: only their keys and values are needed."""
        dim = x.shape[-1]
        normed = self.norm1(x)
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(normed[:, :1], weight[:dim], bias[:dim])
        k, v = F.linear(normed, weight[dim:], bias[dim:]).chunk(2, dim=-1)
        return self._finish(x[:, :1], self._attend(q, k, v, mask))[:, 0]

    def project(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b three_d"]:
        """Queries, keys and values of each token, side by side; depends on that token alone."""
        return self.qkv(self.norm1(x))

    def weights(
        self, x: Float[Tensor, "b l d"], mask: Bool[Tensor, "b l"] | None = None
    ) -> Float[Tensor, "b h l l"]:
        """How much row i attends to row j in each head; rows sum to 1."""
        q, k, _ = (self._split(t) for t in self.project(x).chunk(3, dim=-1))
        logits = q @ k.mT / q.shape[-1] ** 0.5
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None, :], -torch.inf)
        return logits.float().softmax(-1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        seen = None if mask is None else mask[:, None, None, :]
        out = F.scaled_dot_product_attention(
            self._split(q), self._split(k), self._split(v), attn_mask=seen
        )
        return out.transpose(1, 2).flatten(2)

    def _split(self, x: Tensor) -> Tensor:
        """(B, L, H·d) → (B, H, L, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.dropout(self.out(attended))
        return x + self.dropout(self.fc2(self.activation(self.fc1(self.norm2(x)))))
