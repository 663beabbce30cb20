"""From cached tokens to the backbone's own embeddings and logits, with the cache's readout tensors: no backbone.

    pooled image = norm(prefix row 0) @ proj            pooled text = norm(last stored row) @ proj
    logits       = exp(logit_scale) · cos + logit_bias

The operations and their order are the library's, so the results equal its own exactly (0.0) in fp32 when they are
computed on rows of the same batch shape; matrix products of another shape may be tiled differently (≤ 1e-6).
"""

from collections.abc import Mapping

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def pool_image(
    readout: Mapping[str, Tensor],
    prefix: Float[Tensor, "b p w"],
    patches: Float[Tensor, "b n w"],
) -> Float[Tensor, "b d"]:
    """Pooled embedding of raw image tokens; does not normalise.

    Args:
        readout: tensors by the names of `Backbone.readout`.
        prefix: raw prefix tokens; row 0 (CLS) is the one CLIP pools.
        patches: raw patch tokens; CLIP's pooled embedding does not read them.
    """
    return _project(readout, "image", prefix[:, 0])


def pool_text(readout: Mapping[str, Tensor], rows: Float[Tensor, "b v"]) -> Float[Tensor, "b d"]:
    """Pooled embedding of raw text rows: the last stored row of each text; does not normalise."""
    return _project(readout, "text", rows)


def project_patches(
    readout: Mapping[str, Tensor], patches: Float[Tensor, "b n w"]
) -> Float[Tensor, "b n d"]:
    """Patch tokens in the joint space, by the norm and projection the class token goes through."""
    return _project(readout, "image", patches)


def project_tokens(
    readout: Mapping[str, Tensor], tokens: Float[Tensor, "b l v"]
) -> Float[Tensor, "b l d"]:
    """Text tokens in the joint space, by the norm and projection the pooling row goes through."""
    return _project(readout, "text", tokens)


def logits(
    readout: Mapping[str, Tensor],
    image_pooled: Float[Tensor, "q d"],
    text_pooled: Float[Tensor, "c d"],
) -> Float[Tensor, "q c"]:
    """Zero-shot logits of every image with every text, from pooled embeddings of any norm."""
    # (scale · image) @ text.T, in this order: the library's.
    scaled = readout["logit_scale"].exp() * F.normalize(image_pooled, dim=-1)
    scores = scaled @ F.normalize(text_pooled, dim=-1).T
    return scores + readout["logit_bias"] if "logit_bias" in readout else scores


def _project(readout: Mapping[str, Tensor], side: str, rows: Tensor) -> Tensor:
    weight, bias = readout[f"{side}/norm.weight"], readout[f"{side}/norm.bias"]
    normed = F.layer_norm(rows, weight.shape, weight, bias, float(readout[f"{side}/eps"]))
    if f"{side}/proj" in readout:
        return normed @ readout[f"{side}/proj"]
    return F.linear(normed, readout[f"{side}/proj.weight"], readout.get(f"{side}/proj.bias"))
