"""CSP: attr and obj words as learned vectors, composed in a prompt that a frozen text tower reads; CoOp is a setting.

Paper:      "Learning to Compose Soft Prompts for Compositional Zero-Shot Learning", arXiv 2204.03574 (ICLR 2023);
            CoOp: "Learning to Prompt for Vision-Language Models", arXiv 2109.01134, as the CSP paper uses it.
Reference:  BatsResearch/csp.   (read, not copied)
Symbols:    θ (attr and obj vectors) → `prompts.primitives`; cos(v, E_T(prompt))·s → forward, s = exp(logit_scale).
Differs:    rows are keyed by (role, word); no augmentation, as the cache holds fixed views; the best epoch is
            selected by val AUC, where the release saves every epoch; towers without a mask (SigLIP2) take all rows.
Mode, cost: cached images + live text tower; (A+O)·V parameters; a step runs all train pairs through the tower,
            forward and backward, whatever the batch.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from heads.base import Context, EmbeddingHead, HeadConfig, Needs
from heads.blocks.prompts import TEMPLATES, SoftPrompts
from heads.blocks.readout import Readout
from heads.features import Batch, Features
from heads.live import LiveBackbone


class Config(HeadConfig):
    """Provenance in brackets: P paper, C code, O our choice."""

    learn_primitives: bool = Field(
        default=True, description="train the vectors of attrs and objs; False for CoOp (C)"
    )
    learn_context: bool = Field(
        default=False, description="train the vectors of 'a photo of'; True for CoOp (C)"
    )
    dropout: float = Field(
        default=0.3,
        ge=0,
        lt=1,
        description="probability, on values of the primitives' vectors while training (C)",
    )
    context_length: int | None = Field(
        default=None,
        ge=1,
        description="rows of a prompt in the tower; none: 8 (C), or as many as the tower and the prompt need (O)",
    )
    name_preset: Literal["csp", "short"] = Field(
        default="csp",
        description="how names are spelt before their tokens are averaged: lower case with '.' as a blank (C), or "
        "UT-Zappos' short names (O)",
    )
    views: Literal[1, 2] = Field(
        default=1,
        description="2: while training, each image is its cached view or its mirror image (stream "
        "image/view_flip/pooled), drawn anew each step (O)",
    )
    train_candidates: int | None = Field(
        default=None,
        ge=1,
        description="train pairs of a step: those of the batch, and others drawn up to this number; none: all (C)",
    )
    chunk: int = Field(
        default=512,
        ge=1,
        description="prompts in the tower at once; more are recomputed in the backward pass to bound memory; does not "
        "change results beyond rounding (O)",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if not (self.learn_primitives or self.learn_context):
            raise ValueError("nothing is left to train: set learn_primitives or learn_context")
        return self


class Head(EmbeddingHead):
    """score = s · cos(image, E_T(prompt of the pair)) + bias; candidates need only their (attr, obj) labels."""

    score_space = "logit"
    tasks = frozenset({"czsl"})

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        self.readout = Readout(context.readout)
        self.prompts = SoftPrompts(
            LiveBackbone(context, "csp"),
            context.attrs,
            context.objs,
            templates={"pair": TEMPLATES["pair"]},
            preset=config.name_preset,
            learn_primitives=config.learn_primitives,
            learn_context=config.learn_context,
            dropout=config.dropout,
            length=config.context_length,
            chunk=config.chunk,
        )

    @classmethod
    def needs(cls, config: Any) -> Needs:
        """Pooled images, the text tower, and of candidates the labels alone."""
        views = {"image/pooled"} | ({"image/view_flip/pooled"} if config.views == 2 else set())
        return Needs(frozenset(views), frozenset(), live=frozenset({"text"}))

    def embed_queries(self, queries: Features) -> Float[Tensor, "q d"]:
        """Unit image embeddings times s."""
        return self._scaled(queries["image/pooled"])

    def embed_candidates(self, candidates: Features) -> Float[Tensor, "c d"]:
        """Unit embeddings of the pairs' prompts, in float32."""
        rows = self.prompts.rows("pair", candidates.labels["attr"], candidates.labels["obj"])
        return F.normalize(self.prompts.encode("pair", self.prompts.words(), rows).float(), dim=-1)

    def offset(self) -> Tensor | float:
        """The backbone's logit bias."""
        return self.readout.bias()

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy over the train pairs, all of them or a sample that holds those of the batch."""
        candidates, target = self._sampled(batch)
        text = self.embed_candidates(candidates)
        with torch.autocast(text.device.type, enabled=False):
            scores = self._scaled(self._view(batch.queries)) @ text.T
        hit = (scores.argmax(1) == target).float().mean()
        return F.cross_entropy(scores, target), {"batch_accuracy": hit}

    def _scaled(self, pooled: Tensor) -> Tensor:
        return self.readout.scale() * F.normalize(pooled.float(), dim=-1)

    def _view(self, queries: Features) -> Tensor:
        pooled = queries["image/pooled"]
        if self.config.views == 1 or not self.training:
            return pooled
        flipped = torch.rand(len(pooled), 1, device=pooled.device) < 0.5
        return torch.where(flipped, queries["image/view_flip/pooled"], pooled)

    def _sampled(self, batch: Batch) -> tuple[Features, Tensor]:
        """Candidates of a step, and each query's column among them."""
        n = self.config.train_candidates
        if n is None or n >= len(batch.candidates):
            return batch.candidates, batch.target
        own, target = batch.target.unique(return_inverse=True)
        lottery = torch.rand(len(batch.candidates), device=own.device)
        lottery[own] = -1.0
        others = lottery.topk(max(0, n - len(own))).indices
        return batch.candidates.take(torch.cat([own, others])), target
