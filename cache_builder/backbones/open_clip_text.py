"""The text tower of every open_clip model that families read: causal (CLIP, PE) or not (SigLIP2). No family itself."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from cache_builder.backbones.base import Blocks
from cache_builder.backbones.checkpoints import CheckpointError
from cache_builder.backbones.tokens import Tokens


class OpenClipText:
    """A `TextTower` over open_clip's `TextTransformer`, or over a `CLIP` that holds its parts itself.

    Args:
        model: open_clip's model.
        tokenizer: open_clip's tokenizer.
        name: of the checkpoint, for messages.

    Raises:
        CheckpointError: the tower has another shape, or the tokenizer does not belong to it.
    """

    words = False
    pools = True

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.text: Any = getattr(model, "text", model)
        if fault := _other_shape(self.text):
            raise CheckpointError(f"{name}: its text tower {fault}; this family cannot read it")
        self.module: nn.Module = self.text.transformer
        self.blocks: Blocks = self.text.transformer.resblocks
        self.whole = self.text.attn_mask is None
        pool = getattr(self.text, "pool_type", None) or model.text_pool_type
        self.tokens = _tokens(tokenizer, pool, int(self.text.context_length))
        eos = getattr(self.text, "eos_id", getattr(model, "text_eos_id", None))
        if pool == "eos" and eos != self.tokens.end:
            raise CheckpointError(
                f"{name} pools at id {eos}, but its tokenizer's end-of-text is {self.tokens.end}; take the tokenizer "
                "files of this very checkpoint"
            )
        size = self.text.token_embedding.num_embeddings
        self.tokens.check(name, _vocabulary_size(tokenizer), size)

    @property
    def dims(self) -> dict[str, int]:
        """Its part of `BackboneSpec.dims`."""
        width = self.text.ln_final.normalized_shape[0]
        return {"text_width": width, "context": self.tokens.context}

    @property
    def activation(self) -> str:
        """Of the feed-forward part."""
        return repr(self.text.transformer.resblocks[0].mlp.gelu)

    def embed(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l v"]:
        """Token embeddings before positions."""
        return self.text.token_embedding(ids)

    def place(self, embedded: Float[Tensor, "b l v"]) -> Float[Tensor, "b l v"]:
        """Add positions."""
        return placed(embedded, self.text.positional_embedding)

    def run(self, block: nn.Module, states: Tensor) -> Tensor:
        """One residual block under the causal mask, if there is one."""
        mask, l = self.text.attn_mask, states.shape[1]
        return block(states, attn_mask=None if mask is None else mask[:l, :l].to(states.dtype))

    def pool(self, raw: Tensor, end: Tensor) -> Tensor:
        """Final norm, then the projection of row `end`."""
        normed = self.text.ln_final(raw)[torch.arange(len(raw), device=raw.device), end]
        projection = self.text.text_projection
        return projection(normed) if isinstance(projection, nn.Linear) else normed @ projection

    def readout(self) -> dict[str, Tensor]:
        """Final norm and projection."""
        found = {
            "norm.weight": self.text.ln_final.weight,
            "norm.bias": self.text.ln_final.bias,
            "eps": torch.tensor(self.text.ln_final.eps),
        }
        projection = self.text.text_projection
        if not isinstance(projection, nn.Linear):
            return {**found, "proj": projection}
        # torch declares a bias even where a layer was made without one
        without = projection.bias is None  # pyright: ignore[reportUnnecessaryComparison]
        bias = {} if without else {"proj.bias": projection.bias}
        return {**found, "proj.weight": projection.weight, **bias}


def placed(embedded: Float[Tensor, "b l v"], positions: Tensor) -> Float[Tensor, "b l v"]:
    """Embedded tokens with the positions of as many rows."""
    return embedded + positions[: embedded.shape[1]].to(embedded.dtype)


def _other_shape(text: Any) -> str:
    """In what a text tower differs from what this file reads; empty if in nothing."""
    if not hasattr(text, "ln_final"):
        return f"is a {type(text).__name__}"
    faults = {
        "masks padding": getattr(text, "use_pad_mask", False),
        "appends a class token": getattr(text, "cls_emb", None) is not None,
        "has no projection": text.text_projection is None,
    }
    return next((fault for fault, here in faults.items() if here), "")


def _tokens(tokenizer: Any, pool: Any, context: int) -> Tokens:
    """open_clip's tokenizer, and where its tower pools."""

    def encode(texts: Sequence[str], length: int) -> Tensor:
        return tokenizer(list(texts), context_length=length)

    def words() -> list[str]:
        decode = getattr(tokenizer, "tokenizer", tokenizer).decode
        return [decode([i]).strip() for i in range(_vocabulary_size(tokenizer))]

    if isinstance(tokenizer, SimpleTokenizer):
        start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
        return Tokens(encode, words, context, pool, start, end, pad=0, reserved=(start, end))
    return from_hub_tokenizer(tokenizer.tokenizer, encode, words, context, pool)


def from_hub_tokenizer(inner: Any, encode: Any, words: Any, context: int, pool: Any) -> Tokens:
    """The rules of a transformers tokenizer, from the special tokens it declares."""
    needed = ["eos_token", "pad_token"] + ([] if pool == "last" else ["bos_token"])
    missing = [n for n in needed if getattr(inner, n) is None]
    if missing:
        raise CheckpointError(f"the tokenizer in use declares no {' and no '.join(missing)}")
    start = None if pool == "last" else inner.bos_token_id
    end, pad = inner.eos_token_id, inner.pad_token_id
    reserved = {*inner.all_special_ids} - {inner.unk_token_id} | {end, pad}  # a word may be unknown
    return Tokens(encode, words, context, pool, start, end, pad, tuple(sorted(reserved)))


def _vocabulary_size(tokenizer: Any) -> int:
    if isinstance(tokenizer, SimpleTokenizer):
        return tokenizer.vocab_size
    return len(tokenizer.tokenizer)
