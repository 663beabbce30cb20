"""From cached tokens to the backbone's own embeddings and logits, with the cache's readout tensors: no backbone.

    pooled image = proj(norm(prefix row 0))                        CLIP
                   proj(pool(norm(prefix and patches)))            SigLIP2, PE: one learned query attends to all rows
    pooled text  = proj(norm(last stored row))
    logits       = exp(logit_scale) · cos + logit_bias
    LLaVA pools nothing: its patches go through a projector into the language model's space, its words through a norm.

The operations and their order are the library's, so the results equal its own exactly (0.0) in fp32 when they are
computed on rows of the same batch shape; matrix products of another shape may be tiled differently (≤ 1e-6).

Names, below `image/` and `text/` (a family has some of them):
    norm.weight  norm.bias  eps          the tower's final norm; without a bias it is a root-mean-square norm
    proj | proj.weight  proj.bias        (in, D) as a matrix, or (D, in) as a linear layer
    pool.latent  pool.heads  pool.q.*  pool.kv.* | pool.in_proj.*  pool.out.*
    pool.norm.*  pool.eps  pool.fc1.*  pool.fc2.*  pool.tanh
                                         attention pool; tanh: 1 if its GELU is the tanh approximation
    projector.fc1.*  projector.fc2.*     LLaVA's two layers around an exact GELU
and `logit_scale` (a log), `logit_bias`.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Readout = Mapping[str, Tensor]


def pool_image(
    readout: Readout,
    prefix: Float[Tensor, "b p w"] | None,
    patches: Float[Tensor, "b n w"],
    mask: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, "b d"]:
    """Pooled embedding of raw image tokens; does not normalise.

    Args:
        readout: tensors by the names above.
        prefix: raw prefix tokens, None where the family has none; CLIP pools row 0 (the class token) alone.
        patches: raw patch tokens; CLIP's pooled embedding does not read them.
        mask: True where a patch is real, for pictures that keep their shape. Padded patches without a mask are 1 % off.
    """
    if "image/pool.latent" not in readout:
        assert prefix is not None, "a class token is pooled, but there is no prefix"
        return project_view(readout, _norm(readout, "image", prefix[:, 0]))
    rows = patches if prefix is None else torch.cat([prefix, patches], 1)
    return project_view(readout, view_image(readout, rows, mask))


def view_image(
    readout: Readout, rows: Float[Tensor, "b n w"], mask: Bool[Tensor, "b n"] | None = None
) -> Float[Tensor, "b w"]:
    """What the attention pool sees of all raw rows, prefix first; `mask` is True where a row is real."""
    return _attention_pool(readout, _norm(readout, "image", rows), mask)


def project_view(readout: Readout, view: Float[Tensor, "b w"]) -> Float[Tensor, "b d"]:
    """A normed class token, or what `view_image` returned, in the joint space."""
    return _project(readout, "image", view)


def pool_text(readout: Readout, rows: Float[Tensor, "b v"]) -> Float[Tensor, "b d"]:
    """Pooled embedding of raw text rows: the last stored row of each text; does not normalise."""
    return _project(readout, "text", _norm(readout, "text", rows))


def pool_words(
    readout: Readout,
    states: Float[Tensor, "t v"],
    offsets: Int[Tensor, " p1"],
    parts: Int[Tensor, " w1"],
) -> Float[Tensor, "w v"]:
    """One vector per word of `word/states`: normed first, then the mean over the tokens of a part, then over its parts.

    The order TRIDENT takes from LLaVA (METHODS: a compound is the mean of its parts); the other order differs.

    Args:
        readout: tensors by the names above.
        states: raw states, one part after the other.
        offsets: part i has states offsets[i] … offsets[i + 1] - 1; no part is empty.
        parts: word j has parts parts[j] … parts[j + 1] - 1; no word is empty.
    """
    return _segment_means(_segment_means(_norm(readout, "text", states), offsets), parts)


def project_patches(readout: Readout, patches: Float[Tensor, "b n w"]) -> Float[Tensor, "b n d"]:
    """Patch tokens in the joint space.

    Through the norm and projection of the class token (CLIP); along the value path of the attention pool, as if each
    patch were all that is attended to (SigLIP2, PE); through the projector into the language model's space (LLaVA).
    """
    if "image/projector.fc1.weight" in readout:
        hidden = F.gelu(_linear(readout, "image/projector.fc1", patches))
        return _linear(readout, "image/projector.fc2", hidden)
    normed = _norm(readout, "image", patches)
    if "image/pool.latent" in readout:
        seen = _linear(readout, "image/pool.out", _values(readout, normed))
        normed = _feed_forward(readout, seen)
    return _project(readout, "image", normed)


def project_tokens(readout: Readout, tokens: Float[Tensor, "b l v"]) -> Float[Tensor, "b l d"]:
    """Text tokens in the joint space, by the norm and projection the pooling row goes through."""
    return _project(readout, "text", _norm(readout, "text", tokens))


def logits(
    readout: Readout,
    image_pooled: Float[Tensor, "q d"],
    text_pooled: Float[Tensor, "c d"],
) -> Float[Tensor, "q c"]:
    """Zero-shot logits of every image with every text, from pooled embeddings of any norm."""
    # (scale · image) @ text.T, in this order: the library's.
    scaled = readout["logit_scale"].exp() * F.normalize(image_pooled, dim=-1)
    scores = scaled @ F.normalize(text_pooled, dim=-1).T
    return scores + readout["logit_bias"] if "logit_bias" in readout else scores


def final_norm(readout: Readout, side: str, rows: Float[Tensor, "*b w"]) -> Float[Tensor, "*b w"]:
    """The final norm of a tower, "image" or "text", on raw rows; unchanged where it has none (LLaVA's patches)."""
    return _norm(readout, side, rows)


def _norm(readout: Readout, side: str, rows: Tensor) -> Tensor:
    weight, bias = readout.get(f"{side}/norm.weight"), readout.get(f"{side}/norm.bias")
    if weight is None:
        if side == "image" and "image/projector.fc1.weight" in readout:
            return rows  # LLaVA reads its projector on patches without a norm
        raise KeyError(
            f"the readout has no {side}/norm.weight, only {', '.join(readout) or 'nothing'}"
        )
    eps = float(readout[f"{side}/eps"])
    if bias is None:
        scale = torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps)
        return weight * (rows * scale)
    return F.layer_norm(rows, weight.shape, weight, bias, eps)


def _project(readout: Readout, side: str, normed: Tensor) -> Tensor:
    if f"{side}/proj" in readout:
        return normed @ readout[f"{side}/proj"]
    if f"{side}/proj.weight" in readout:
        return _linear(readout, f"{side}/proj", normed)
    pooled, spoken = "image/pool.latent" in readout, "image/projector.fc1.weight" in readout
    if (side == "image" and pooled) or (side == "text" and spoken):
        return (
            normed  # SigLIP2's attention pool, and LLaVA's language model, end in their own width
        )
    raise KeyError(f"the readout has no {side}/proj, only {', '.join(readout) or 'nothing'}")


def _linear(readout: Readout, name: str, rows: Tensor) -> Tensor:
    """A linear layer by name."""
    return F.linear(rows, readout[f"{name}.weight"], readout.get(f"{name}.bias"))


def _attention_pool(readout: Readout, rows: Tensor, mask: Tensor | None) -> Tensor:
    """The learned query's view of all rows, (B, W)."""
    latent, heads = readout["image/pool.latent"], int(readout["image/pool.heads"])
    b, n, w = rows.shape
    if "image/pool.in_proj.weight" in readout:  # transformers: an nn.MultiheadAttention
        bias = None if mask is None else _additive(mask, heads, rows.dtype)
        seen, _ = F.multi_head_attention_forward(
            *(x.transpose(0, 1) for x in (latent.repeat(b, 1, 1), rows, rows)),
            embed_dim_to_check=w,
            num_heads=heads,
            in_proj_weight=readout["image/pool.in_proj.weight"],
            in_proj_bias=readout["image/pool.in_proj.bias"],
            bias_k=None,
            bias_v=None,
            add_zero_attn=False,
            dropout_p=0.0,
            out_proj_weight=readout["image/pool.out.weight"],
            out_proj_bias=readout["image/pool.out.bias"],
            training=False,
            attn_mask=bias,
        )
        return _feed_forward(readout, seen.transpose(0, 1))[:, 0]
    q = _linear(readout, "image/pool.q", latent.expand(b, -1, -1))
    q = q.reshape(b, 1, heads, w // heads).transpose(1, 2)
    kv = _linear(readout, "image/pool.kv", rows).reshape(b, n, 2, heads, w // heads)
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    real = None if mask is None else mask[:, None, None]
    seen = F.scaled_dot_product_attention(q, k, v, attn_mask=real)
    seen = _linear(readout, "image/pool.out", seen.transpose(1, 2).reshape(b, 1, w))
    return _feed_forward(readout, seen)[:, 0]


def _values(readout: Readout, rows: Tensor) -> Tensor:
    """The value of each row: the last third of a joint projection, the last half of one of keys and values."""
    joint = "image/pool.in_proj" if "image/pool.in_proj.weight" in readout else "image/pool.kv"
    w = rows.shape[-1]
    weight, bias = readout[f"{joint}.weight"], readout.get(f"{joint}.bias")
    return F.linear(rows, weight[-w:], None if bias is None else bias[-w:])


def _feed_forward(readout: Readout, rows: Tensor) -> Tensor:
    """The pool's feed-forward part, as a residual."""
    weight, bias = readout["image/pool.norm.weight"], readout["image/pool.norm.bias"]
    normed = F.layer_norm(rows, weight.shape, weight, bias, float(readout["image/pool.eps"]))
    gelu = "tanh" if bool(readout["image/pool.tanh"]) else "none"
    hidden = F.gelu(_linear(readout, "image/pool.fc1", normed), approximate=gelu)
    return rows + _linear(readout, "image/pool.fc2", hidden)


def _additive(mask: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """A mask of real rows as the library adds it to attention scores: (B · heads, 1, N)."""
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    added = torch.where(mask[:, None, None], zero, torch.finfo(dtype).min)
    return added.expand(-1, heads, -1, -1).reshape(-1, 1, mask.shape[1])


def _segment_means(rows: Tensor, bounds: Tensor) -> Tensor:
    sizes = bounds.diff()
    owner = torch.repeat_interleave(torch.arange(len(sizes), device=rows.device), sizes)
    sums = rows.new_zeros(len(sizes), rows.shape[-1]).index_add(0, owner, rows)
    return sums / sizes[:, None]
