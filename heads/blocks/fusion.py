"""Exchange between prompts and an image: inter-modal (words see patches), intra-modal (attrs see objs).

    text   t_attr  t_obj        inter   t' = t + λ_t ⊙ CA(t, patches)     v' = v + λ_v ⊙ CA(v, all t of its branch)
    image  v_attr  v_obj        intra   t'' = t' + CA(t', t' of the other branch)       v'' likewise

With λ at 0 and fresh intra blocks, whose outputs start at zero, nothing changes.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

Order = Literal["none", "inter", "intra", "inter_intra", "intra_inter"]

LAMBDA = 0.1
"""Where λ starts (our choice)."""

PARTNER = {"attr": "obj", "obj": "attr"}


class CrossBlock(nn.Module):
    """CA(q, kv) = u + MLP(LN(q + u)) with u = attention(LN q, LN kv); the caller adds q, so this is the change alone.

    With q added it is a pre-LN block of cross-attention. One norm serves q and kv: with a single key no other path
    would train a norm of q's own. Dropout on both outputs (our choice).

    Args:
        dim: width of all rows.
        heads: attention heads; must divide `dim`.
        dropout: probability.
        zero_output: start as the zero map.
        activation: of the hidden units.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dropout: float,
        *,
        zero_output: bool = False,
        activation: Callable[[Tensor], Tensor] = F.gelu,
    ) -> None:
        super().__init__()
        self.heads, self.activation = heads, activation
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)
        if zero_output:
            for linear in (self.out, self.fc2):
                nn.init.zeros_(linear.weight)
                nn.init.zeros_(linear.bias)

    def forward(
        self,
        q: Float[Tensor, "p m d"],
        kv: Float[Tensor, "r n d"],
        mask: Bool[Tensor, "r n"] | None = None,
    ) -> Float[Tensor, "b m d"]:
        """The change of rows `q` that look at rows `kv`.

        Args:
            q, kv: B items each, or one that all items share: it is projected once.
            mask: True where a row of kv may be looked at; None is everywhere.
        """
        seen = None if mask is None else mask[:, None, None, :]
        looked = F.scaled_dot_product_attention(*self._rows(q, kv), attn_mask=seen)
        u = self.dropout(self.out(looked.transpose(1, 2).flatten(2)))
        return u + self.dropout(self.fc2(self.activation(self.fc1(self.norm2(q + u)))))

    def weights(
        self,
        q: Float[Tensor, "p m d"],
        kv: Float[Tensor, "r n d"],
        mask: Bool[Tensor, "r n"] | None = None,
    ) -> Float[Tensor, "b h m n"]:
        """How much each row of q looks at each row of kv, in each head; rows sum to 1. Arguments as of `forward`."""
        of_q, k, _ = self._rows(q, kv)
        logits = of_q @ k.mT / of_q.shape[-1] ** 0.5
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None, :], -torch.inf)
        return logits.float().softmax(-1)

    def _rows(self, q: Tensor, kv: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, (B, H, rows, D / H) each."""
        b, dim = max(len(q), len(kv)), q.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        of_q = F.linear(self.norm1(q), weight[:dim], bias[:dim])
        k, v = F.linear(self.norm1(kv), weight[dim:], bias[dim:]).chunk(2, dim=-1)
        return tuple(
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2).expand(b, -1, -1, -1)
            for t in (of_q, k, v)
        )


class Fusion(nn.Module):
    """The exchange of two branches, attr and obj, in either order.

    Args:
        dim, heads, dropout: of the blocks.
        order: which stages, and which comes first.
        shared: one set of weights for all branches; else one each. Modalities and stages have their own in any case.
        pairs: a third set for `fuse_texts`, where sets are not shared.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dropout: float,
        *,
        order: Order,
        shared: bool = True,
        pairs: bool = False,
    ) -> None:
        super().__init__()
        self.stages = tuple(stage for stage in order.split("_") if stage != "none")
        self.place = {"attr": 0, "obj": 0 if shared else 1, "pair": 0 if shared else 2}

        def blocks(n: int, *, zero_output: bool) -> nn.ModuleList:
            return nn.ModuleList(
                CrossBlock(dim, heads, dropout, zero_output=zero_output) for _ in range(n)
            )

        if "inter" in self.stages:
            n = 1 if shared else 2
            m = n if shared or not pairs else 3
            self.inter_text = blocks(m, zero_output=False)
            self.inter_image = blocks(n, zero_output=False)
            self.lambda_text = nn.ParameterList(torch.full((dim,), LAMBDA) for _ in range(m))
            self.lambda_image = nn.ParameterList(torch.full((dim,), LAMBDA) for _ in range(n))
        if "intra" in self.stages:
            self.intra_text = blocks(1 if shared else 2, zero_output=True)
            self.intra_image = blocks(1 if shared else 2, zero_output=True)

    def forward(
        self,
        image: Mapping[str, Float[Tensor, "b d"]],
        text: Mapping[str, Float[Tensor, "_ d"]],
        patches: Float[Tensor, "b n d"] | None,
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> tuple[dict[str, Float[Tensor, "b 1 d"]], dict[str, Float[Tensor, "_ k d"]]]:
        """Image vectors and word vectors of both branches after the exchange.

        Args:
            image: branch → vectors of the items.
            text: branch → vectors of its words, the same for every item.
            patches: what the words look at; None only without an inter stage.
            mask: True where a patch is real; None is everywhere.

        Returns:
            Branch → (B, 1, D), and branch → (B, words, D); words that nothing has changed per item stay (1, words, D).
        """
        v = {branch: rows[:, None] for branch, rows in image.items()}
        t = {branch: rows[None] for branch, rows in text.items()}
        for stage in self.stages:
            if stage == "intra":
                v, t = self._intra(v, self.intra_image), self._intra(t, self.intra_text)
                continue
            assert patches is not None
            at = self.place
            seeing = {k: self.fuse_texts(k, t[k], patches, mask) for k in t}
            v = {
                k: v[k] + self.lambda_image[at[k]] * self.inter_image[at[k]](v[k], t[k]) for k in v
            }
            t = seeing
        return v, t

    def fuse_texts(
        self,
        branch: str,
        text: Float[Tensor, "p k d"],
        patches: Float[Tensor, "b n d"],
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b k d"]:
        """Texts of a branch ("attr", "obj" or "pair") after they have seen the patches of each item."""
        at = self.place[branch]
        return text + self.lambda_text[at] * self.inter_text[at](text, patches, mask)

    def looks(
        self,
        text: Mapping[str, Float[Tensor, "_ d"]],
        patches: Float[Tensor, "b n d"],
        mask: Bool[Tensor, "b n"] | None = None,
    ) -> dict[str, Float[Tensor, "b _ n"]]:
        """How much every word of both branches looks at each patch in the inter stage, mean over heads; rows sum to 1.

        Nothing without an inter stage.
        """
        if "inter" not in self.stages:
            return {}
        t = {branch: rows[None] for branch, rows in text.items()}
        if self.stages[0] == "intra":
            t = self._intra(t, self.intra_text)
        return {
            k: self.inter_text[self.place[k]].weights(t[k], patches, mask).mean(1)  # type: ignore[operator]
            for k in t
        }

    def _intra(self, rows: dict[str, Tensor], blocks: nn.ModuleList) -> dict[str, Tensor]:
        return {k: rows[k] + blocks[self.place[k]](rows[k], rows[PARTNER[k]]) for k in rows}


class Branch(nn.Module):
    """Linear, batch norm, ReLU, dropout: an image vector as one kind of primitive sees it.

    A batch of one has no variance: it is normalised as in evaluation.
    """

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(dim, dim), nn.BatchNorm1d(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Same width."""
        y, norm = self.linear(x), self.norm
        if len(y) == 1:
            mean, var = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
            y = F.batch_norm(y, mean, var, norm.weight, norm.bias, eps=norm.eps)
        else:
            y = norm(y)
        return self.dropout(F.relu(y))
