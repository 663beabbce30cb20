"""sgi: a caption is scored part by part, each part by the crop that shows it best; nothing is trained.

Paper:      "Adding simple structure at inference improves Vision-Language Compositionality", arXiv 2506.09691.
Reference:  none read; written from the description.
Symbols:    crop k of the image → `crop/pooled`; segment j of the caption, m of them → `segment/pooled`; α → `alpha`.
            score = (1 − α) · (1/m) Σ_j max_k cos(crop_k, segment_j) + α · cos(image, caption)
Differs:    segments come from a closed lexicon and function words, not from a language model or parser: noun phrases,
            and each two neighbours with what joins them (cache_builder/segments.py); a repeated segment counts once.
            α is ours. Windows: 140 of a square picture (7 × 7 cells), 252 on 11 × 7, 280 on 12 × 7; `--crops fast`: 86.
Mode, cost: cache-only, crops and segments; 0 parameters, no training; crops × segments · 2·D FLOP a cell, so some
            hundreds of times zero_shot's; the build encodes every window.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from heads import base
from heads.base import Context, HeadConfig, Needs
from heads.blocks.readout import Readout
from heads.errors import TaskError
from heads.features import Features


class Config(HeadConfig):
    """One number to choose."""

    alpha: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of the plain cosine of the whole image with the whole caption; 1 is zero_shot (O)",
    )


class Head(base.Head):
    """Mean over segments of the best cosine among crops, in float32: half precision would make ties."""

    score_space = "cosine"
    training_kind = "none"
    tasks = frozenset({"matching", "two_by_two", "retrieval"})

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        self.readout = Readout(context.readout)  # says which device and which backbone this is for

    @classmethod
    def needs(cls, config: Any) -> Needs:
        """Crops and segments; with `alpha`, both wholes too."""
        whole = config.alpha > 0
        return Needs(
            frozenset({"crop/pooled"} | ({"image/pooled"} if whole else set())),
            frozenset({"segment/pooled"} | ({"text/pooled"} if whole else set())),
        )

    def forward(self, queries: Features, candidates: Features) -> Float[Tensor, "q c"]:
        """All pairs, one image at a time: crops × all segments fit into memory, images × crops × segments do not."""
        crops, there = _crops(queries)
        parts, real = _unit(candidates, "segment/pooled"), candidates["segment/mask"]
        with torch.autocast(crops.device.type, enabled=False):
            rows = [
                _mean(_best(crops[i] @ parts.flatten(0, 1).T, there[i]).view(real.shape), real)
                for i in range(len(crops))
            ]
            scores = torch.stack(rows)
            if not self.config.alpha:
                return scores
            whole = _unit(queries, "image/pooled") @ _unit(candidates, "text/pooled").T
            return torch.lerp(scores, whole, self.config.alpha)

    def paired(self, queries: Features, candidates: Features) -> Float[Tensor, " b"]:
        """Row by row."""
        crops, there = _crops(queries)
        parts, real = _unit(candidates, "segment/pooled"), candidates["segment/mask"]
        with torch.autocast(crops.device.type, enabled=False):
            cosines = (crops @ parts.mT).masked_fill(~there[..., None], -torch.inf)
            scores = _mean(cosines.amax(1), real)
            if not self.config.alpha:
                return scores
            whole = (_unit(queries, "image/pooled") * _unit(candidates, "text/pooled")).sum(-1)
            return torch.lerp(scores, whole, self.config.alpha)


def _crops(queries: Features) -> tuple[Float[Tensor, "q k d"], Bool[Tensor, "q k"]]:
    """Unit crops, and True where there is one.

    Raises:
        TaskError: an image has none.
    """
    there = queries["crop/mask"]
    if bare := int((~there.any(1)).sum()):
        raise TaskError(
            f"sgi compares crops, and {bare} of these {len(there)} images have none: a picture longer than eight of "
            "its short sides is not cut; leave such pictures out of the data set"
        )
    return _unit(queries, "crop/pooled"), there


def _best(cosines: Float[Tensor, "k n"], there: Bool[Tensor, " k"]) -> Float[Tensor, " n"]:
    """Of every segment, the cosine of the crop closest to it."""
    return cosines.masked_fill(~there[:, None], -torch.inf).amax(0)


def _mean(best: Float[Tensor, "c m"], real: Bool[Tensor, "c m"]) -> Float[Tensor, " c"]:
    """Mean over the segments that are real; every caption has one."""
    return best.masked_fill(~real, 0.0).sum(-1) / real.sum(-1)


def _unit(features: Features, stream: str) -> Tensor:
    return F.normalize(features[stream].float(), dim=-1)
