"""tf_local: a transformer scores a match jointly from frozen patch and text tokens; its controls are config fields.

Paper:      "Revisiting Compositionality in Dual-Encoder Vision-Language Models: The Role of Inference", arXiv
            2604.11496 v2.
Reference:  none public; a reconstruction from the paper's description, so no figure made here is the paper's. The
            loss mirrors the authors' earlier fine-tuning code (IMirandaM/BiVLC).
Symbols:    Zv, Zt → readout-normed `image/patches`, `text/tokens`; Xv, Xt → the same after `Embed`; c, w, b →
            `scorer.c`, `scorer.output`; a → `a` (residual_global), `scorer.a` (late_maxsim, a log).
Differs:    block shape deduced from the 13.3 M parameters of the paper; dropout on branch outputs only; linear layers
            start as torch's do, learned vectors as N(0, 0.2²). tf_global, late_maxsim and residual_global are our
            controls. late_maxsim has no type vectors and one final norm per side; its a starts at log(1/0.07),
            capped at log 100. The sampled loss also has a text→image part, over the cells drawn by the rows.
Mode, cost: cache-only; for CLIP B/32 dims 13,336,065 parameters (global 13,139,969; late_maxsim 13,335,041;
            residual_global adds 1); computed for 77 text tokens, 2.4 GFLOP per cell forward (late_maxsim: 0.6 per
            image, 1.0 per text, 0.004 per cell).
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from heads import base, losses
from heads.base import Context, HeadConfig, Needs
from heads.blocks.alignment import Embed, Encoded, JointTransformer, LateInteraction
from heads.blocks.readout import Readout
from heads.errors import ConfigError
from heads.features import Batch, Features
from heads.maps import Maps


class Config(HeadConfig):
    """Provenance in brackets: P paper, C authors' released code, D deduced here, O our choice."""

    variant: Literal["local", "global", "late_maxsim"] = Field(
        default="local",
        description="what is aligned: patches with text tokens in one transformer (P), the two pooled embeddings in "
        "the same transformer as a capacity control (O), or each text token with its best patch (O)",
    )
    residual_global: bool = Field(
        default=False,
        description="add a·cos(pooled) with a starting at the backbone's logit scale and the rest at zero, so that "
        "training starts at zero_shot (O)",
    )
    layers: int = Field(
        default=4,
        ge=1,
        description="transformer blocks; late_maxsim gives half of them to each side, so it needs an even number (D)",
    )
    dim: int = Field(default=512, ge=1, description="width of a token inside the scorer (D)")
    heads: int = Field(default=8, ge=1, description="attention heads; must divide dim (D)")
    ffn: int = Field(
        default=2048, ge=1, description="hidden width of the blocks' feed-forward part (D)"
    )
    dropout: float = Field(
        default=0.1, ge=0, lt=1, description="probability, on both branches of a block (O)"
    )
    pos: Literal["learned", "none"] = Field(
        default="learned",
        description="position vectors of patches and words; 'none' makes the score blind to their order (O)",
    )
    space: Literal["width", "joint"] = Field(
        default="width",
        description="tokens after the backbone's final norm, in the tower's own width, or also projected to the joint "
        "space (O)",
    )
    keep_prefix: bool = Field(
        default=False,
        description="also read image/prefix (CLS and registers), before the patches (O)",
    )
    n_sampled: int | None = Field(
        default=None,
        ge=0,
        description="score per query its positive, its own hard negatives and this many others instead of the full "
        "matrix; 14 is usual from batch 256 on; None is the full matrix (O)",
    )
    top_sampled: int = Field(
        default=64,
        ge=0,
        description="the others are drawn from this many candidates of highest cached cosine; 0 draws from all alike, "
        "for backbones without a joint space (O)",
    )
    chunk: int = Field(
        default=1024,
        ge=1,
        description="cells (image-text pairs) scored at once; more are recomputed in the backward pass to bound "
        "memory; does not change results beyond rounding (O)",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.dim % self.heads:
            raise ValueError(f"heads must divide dim, but dim is {self.dim} and heads {self.heads}")
        if self.variant == "late_maxsim" and self.layers % 2:
            raise ValueError(
                f"late_maxsim halves its layers between the sides; layers is {self.layers}"
            )
        if self.variant == "late_maxsim" and self.residual_global:
            raise ValueError(
                "residual_global needs a score that can start at zero: choose variant local or global"
            )
        return self


class Head(base.Head):
    """A scorer on readout-normed tokens (or pooled embeddings), optionally on top of the backbone's own cosine."""

    score_space = "logit"

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        self.readout = Readout(context.readout)
        self.scorer = _scorer(config, context)
        self.a = nn.Parameter(self.readout.scale().clone()) if config.residual_global else None

    @classmethod
    def needs(cls, config: Any) -> Needs:
        """Tokens for local and late_maxsim, pooled embeddings for global, the residual and the sampled loss."""
        queries: set[str] = set()
        candidates: set[str] = set()
        if config.variant != "global":
            queries |= {"image/patches"} | ({"image/prefix"} if config.keep_prefix else set())
            candidates |= {"text/tokens"}
        by_cosine = config.n_sampled is not None and config.top_sampled > 0
        if config.variant == "global" or config.residual_global or by_cosine:
            queries |= {"image/pooled"}
            candidates |= {"text/pooled"}
        return Needs(frozenset(queries), frozenset(candidates))

    def forward(self, queries: Features, candidates: Features) -> Float[Tensor, "q c"]:
        """All pairs; every item is embedded once."""
        scores = self.scorer.grid(self.encode_queries(queries), self.encode_candidates(candidates))
        if self.a is None:
            return scores
        image, text = self._unit(queries, "image"), self._unit(candidates, "text")
        with torch.autocast(image.device.type, enabled=False):  # half precision would make ties
            return scores + self.a * (image @ text.T)

    def paired(self, queries: Features, candidates: Features) -> Float[Tensor, " b"]:
        """Row by row."""
        device = self.scorer.image.linear.weight.device
        columns = torch.arange(len(queries), device=device)[:, None]
        return self._cells(queries, candidates, columns)[:, 0]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Symmetric contrastive loss over the batch, full or sampled (see heads/losses.py)."""
        if self.config.n_sampled is None:
            return losses.contrastive(self(batch.queries, batch.candidates), batch)
        drawn = losses.draw(
            batch, n_sampled=self.config.n_sampled, top_sampled=self.config.top_sampled
        )
        cells = self._cells(batch.queries, batch.candidates, drawn.columns)
        scores = losses.scatter(cells, drawn, len(batch.candidates))
        return losses.contrastive(scores, batch, drawn=drawn)

    def maps(self, query: Features, candidate: Features) -> Maps:
        """Where each token of the text looks; see `attention`."""
        says = {
            "local": "the attention of each word to each patch in the block before the last, mean over heads",
            "late_maxsim": "the cosine of each word with each patch, of which the score takes the largest",
        }
        looks = attention(self, query, candidate)[0]
        return Maps(looks, None, says[self.config.variant])

    def _cells(self, queries: Features, candidates: Features, columns: Tensor) -> Tensor:
        """Scores of query i with the candidates `columns[i]`."""
        scores = self.scorer.cells(
            self.encode_queries(queries), self.encode_candidates(candidates), columns
        )
        if self.a is None:
            return scores
        image, text = self._unit(queries, "image"), self._unit(candidates, "text")
        return scores + self.a * (image[:, None] * text[columns]).sum(-1)

    def encode_queries(self, queries: Features) -> Encoded:
        """Image tokens as the scorer reads them."""
        if self.config.variant == "global":
            return self.scorer.encode_image(queries["image/pooled"][:, None])
        raw, mask = queries["image/patches"], queries.streams.get("image/mask")
        if self.config.keep_prefix:
            prefix = queries["image/prefix"]
            raw = torch.cat([prefix, raw], dim=1)
            if mask is not None:
                mask = torch.cat([mask.new_ones(prefix.shape[:2]), mask], dim=1)
        return self.scorer.encode_image(self._normed("image", raw), mask)

    def encode_candidates(self, candidates: Features) -> Encoded:
        """Text tokens as the scorer reads them."""
        if self.config.variant == "global":
            pooled = candidates["text/pooled"][:, None]
            return self.scorer.encode_text(pooled, torch.ones_like(pooled[..., 0]).bool())
        tokens = self._normed("text", candidates["text/tokens"])
        return self.scorer.encode_text(tokens, candidates["text/mask"])

    def _normed(self, side: str, raw: Tensor) -> Tensor:
        read = self.readout.joint if self.config.space == "joint" else self.readout.norm
        return read(side, raw)

    def _unit(self, features: Features, side: str) -> Tensor:
        return F.normalize(features[f"{side}/pooled"].float(), dim=-1)


def attention(head: Head, queries: Features, candidates: Features) -> Float[Tensor, "b l n"]:
    """Where the words of text i look in image i, for pictures.

    Variant local: attention weights from text token to patch, averaged over heads, in the block before the last
    (rows sum to less than 1, the rest goes to words and c). Variant late_maxsim: cosines of token and patch. Rows
    of padding mean nothing.

    Raises:
        ConfigError: the head is of variant global, which sees no patches.
    """
    if head.config.variant == "global":
        raise ConfigError("attention maps need patches, but this head is of variant 'global'")
    with torch.no_grad():
        maps = head.scorer.attention(
            head.encode_queries(queries), head.encode_candidates(candidates)
        )
    return maps[..., maps.shape[-1] - queries["image/patches"].shape[1] :]


def _scorer(config: Config, context: Context) -> JointTransformer | LateInteraction:
    """The scorer of a variant, sized for a cache."""
    image_shape, text_shape = _token_shapes(config, context)
    learned = config.pos == "learned" and config.variant != "global"
    typed = config.variant != "late_maxsim"

    def embed(shape: tuple[int, int]) -> Embed:
        return Embed(shape[1], config.dim, shape[0] if learned else 0, typed=typed)

    shared = config.model_dump(include={"dim", "heads", "ffn", "dropout", "chunk"})
    image, text = embed(image_shape), embed(text_shape)
    if config.variant == "late_maxsim":
        return LateInteraction(image, text, layers=config.layers // 2, **shared)
    return JointTransformer(
        image, text, layers=config.layers, zero_output=config.residual_global, **shared
    )


def _token_shapes(config: Config, context: Context) -> tuple[tuple[int, int], tuple[int, int]]:
    """(positions, width) of image and text tokens as the scorer sees them."""
    if config.variant == "global":
        return (1, context.shapes["image/pooled"][0]), (1, context.shapes["text/pooled"][0])
    n, w = context.shapes["image/patches"]
    l, v = context.shapes["text/tokens"]
    if config.keep_prefix:
        n += context.shapes["image/prefix"][0]
    if config.space == "joint":
        readout = Readout(context.readout)
        w, v = readout.joint_width("image"), readout.joint_width("text")
    return (n, w), (l, v)
