"""Zero-shot: the backbone's own cosine of pooled embeddings, the floor of every table.

Paper:      "Learning Transferable Visual Models From Natural Language Supervision" (CLIP), arXiv 2103.00020 (ICML
            2021).
Reference:  open_clip's `logits = scale * image @ text.T (+ bias)`; logits from a cache equal the library's.
Symbols:    scale s = exp(readout logit_scale), bias = readout logit_bias (0 without one).
Differs:    nothing. The prompt is the cache's: "a photo of {attr} {obj}" for pairs, the bare caption or modification
            elsewhere (our choice). Composed queries are the usual baselines of that field: `query`.
Mode, cost: cache-only, `image/pooled` and `text/pooled`; 0 parameters, no training; 2·D FLOP per cell.
"""

from typing import Any, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from heads.base import Context, EmbeddingHead, HeadConfig, Needs
from heads.blocks.readout import Readout
from heads.features import Features


class Config(HeadConfig):
    """Provenance in brackets: O our choice."""

    query: Literal["image", "text", "sum"] | None = Field(
        default=None,
        description="composed retrieval: reference alone, modification alone, or the sum of their unit vectors; "
        "none: the other tasks (O)",
    )


class Head(EmbeddingHead):
    """score = s · cos(q, c) + bias, in float32: half precision would make ties."""

    score_space = "logit"
    tasks = EmbeddingHead.tasks | {"composed"}
    training_kind = "none"

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        self.readout = Readout(context.readout)

    @classmethod
    def needs(cls, config: Any) -> Needs:
        """Pooled embeddings of both sides; of composed queries those asked for, and images as candidates."""
        image, text = frozenset({"image/pooled"}), frozenset({"text/pooled"})
        if config.query is None:
            return Needs(image, text)
        return Needs({"image": image, "text": text, "sum": image | text}[config.query], image)

    def embed_queries(self, queries: Features) -> Float[Tensor, "q d"]:
        """Unit embeddings of what asks, times s."""
        asked = [
            F.normalize(queries[s].float(), dim=-1) for s in sorted(self.needs(self.config).queries)
        ]
        total = asked[0] if len(asked) == 1 else F.normalize(asked[0] + asked[1], dim=-1)
        return self.readout.scale() * total

    def embed_candidates(self, candidates: Features) -> Float[Tensor, "c d"]:
        """Unit embeddings of the candidates."""
        (stream,) = self.needs(self.config).candidates
        return F.normalize(candidates[stream].float(), dim=-1)

    def offset(self) -> Tensor | float:
        """The backbone's logit bias."""
        return self.readout.bias()
