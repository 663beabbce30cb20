"""Zero-shot: the backbone's own cosine of pooled embeddings, the floor of every table.

Paper:      "Learning Transferable Visual Models From Natural Language Supervision" (CLIP), arXiv 2103.00020 (ICML
            2021).
Reference:  open_clip's `logits = scale * image @ text.T (+ bias)`; logits from a cache equal the library's.
Symbols:    scale s = exp(readout logit_scale), bias = readout logit_bias (0 without one).
Differs:    nothing. The prompt is the cache's: "a photo of {attr} {obj}" for pairs, the bare caption elsewhere (our
            choice).
Mode, cost: cache-only, `image/pooled` and `text/pooled`; 0 parameters, no training; 2·D FLOP per cell.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from heads.base import Context, EmbeddingHead, HeadConfig, Needs
from heads.blocks.readout import Readout
from heads.features import Features


class Config(HeadConfig):
    """Nothing to choose."""


class Head(EmbeddingHead):
    """score = s · cos(q, c) + bias, in float32: half precision would make ties."""

    score_space = "logit"
    training_kind = "none"

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        self.readout = Readout(context.readout)

    @classmethod
    def needs(cls, config: Any) -> Needs:
        """Pooled embeddings of both sides."""
        return Needs(frozenset({"image/pooled"}), frozenset({"text/pooled"}))

    def embed_queries(self, queries: Features) -> Float[Tensor, "q d"]:
        """Unit image embeddings times s."""
        return self.readout.scale() * F.normalize(queries["image/pooled"].float(), dim=-1)

    def embed_candidates(self, candidates: Features) -> Float[Tensor, "c d"]:
        """Unit text embeddings."""
        return F.normalize(candidates["text/pooled"].float(), dim=-1)

    def offset(self) -> Tensor | float:
        """The backbone's logit bias."""
        return self.readout.bias()
