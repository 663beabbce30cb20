"""The language model of a LLaVA as a text tower: Llama, Mistral or Qwen 2, causal, nothing pooled. No family itself.

texts    <bos> a red cup <pad>      begin of text first, as the model was trained; padding on the right, never stored
words    red <pad> <pad>            bare: no begin of text, as TRIDENT asks for them
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from cache_builder.backbones.base import Blocks
from cache_builder.backbones.checkpoints import CheckpointError

LONGEST = 128
"""Most tokens of a stored text (our choice: language models take thousands, captions have dozens)."""


class LlamaTokens:
    """Ids of texts with, and of words without, the begin of text; padded to the longest of a call, on the right.

    Args:
        tokenizer: a transformers tokenizer.
        context: most ids of a text.
    """

    def __init__(self, tokenizer: Any, context: int) -> None:
        self.tokenizer, self.context = tokenizer, context
        self.pad = tokenizer.pad_token_id
        if self.pad is None:
            raise CheckpointError("the tokenizer in use declares no pad_token")
        begin = tokenizer("a").input_ids[0]
        self.first_free = int(begin in tokenizer.all_special_ids)
        # A word may be unknown, unless that looks like padding, which is not counted as a token.
        self.reserved = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id} | {self.pad}
        self.rule = f"texts with, words without begin of text; padding=right; context={context}"

    def tokenize(self, texts: Sequence[str], length: int | None = None) -> Int[Tensor, "b l"]:
        """Ids of whole texts, cut to the context length or to `length` rows.

        Raises:
            CheckpointError: a text spells a special token, or has no token; names it.
        """
        return self._padded([self._ids(t, words=False)[: length or self.context] for t in texts])

    def tokenize_words(self, phrases: Sequence[str]) -> Int[Tensor, "b l"]:
        """Ids of bare phrases; see `tokenize`."""
        return self._padded([self._ids(p, words=True)[: self.context] for p in phrases])

    def vocabulary(self) -> list[str]:
        """The string of every token id, in order."""
        return [self.tokenizer.decode([i]).strip() for i in range(len(self.tokenizer))]

    def truncated(self, texts: Sequence[str]) -> int:
        """How many texts have more ids than are kept."""
        return sum(len(self._ids(t, words=False)) > self.context for t in texts)

    def ends(self, ids: Int[Tensor, "b l"]) -> Int[Tensor, " b"]:
        """The last real row."""
        return self.lengths(ids) - 1

    def lengths(self, ids: Int[Tensor, "b l"]) -> Int[Tensor, " b"]:
        """Real rows of each text: padding never stands before a word, and is no word."""
        return (ids != self.pad).sum(-1)

    def _ids(self, text: str, *, words: bool) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=not words, verbose=False).input_ids
        rest = ids[0 if words else self.first_free :]
        if not rest or self.reserved & {*rest}:
            what = "spells a special token of the tokenizer; reword it" if rest else "has no token"
            raise CheckpointError(f"text {text!r} {what}")
        return ids

    def _padded(self, rows: Sequence[list[int]]) -> Tensor:
        longest = max(map(len, rows), default=0)
        padded = [row + [self.pad] * (longest - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64).reshape(len(rows), longest)


class LlavaText:
    """A `TextTower` over LLaVA's language model: causal, so padding on the right changes nothing and needs no mask.

    Args:
        model: `LlavaForConditionalGeneration`.
        tokenizer: its tokenizer.
        config: its configuration.
        name: of the checkpoint, for messages.
    """

    words = True
    pools = False
    whole = False

    def __init__(self, model: Any, tokenizer: Any, config: Any, name: str) -> None:
        self.lm = model.model.language_model
        self.module: nn.Module = self.lm
        self.blocks: Blocks = self.lm.layers
        most = config.text_config.max_position_embeddings
        self.tokens = LlamaTokens(tokenizer, min(LONGEST, most))
        n, begin = self.lm.embed_tokens.num_embeddings, self.lm.config.bos_token_id
        first, image = tokenizer("a").input_ids[0], tokenizer.get_vocab().get("<image>")
        wrong_begin = self.tokens.first_free and begin is not None and first != begin
        if len(tokenizer) > n or wrong_begin or image not in (None, config.image_token_index):
            raise CheckpointError(
                f"{name}: the tokenizer does not fit the language model: {len(tokenizer)} ids for {n} embeddings, "
                f"texts begin with {first} (configured: {begin}), <image> is {image} (configured: "
                f"{config.image_token_index}); take the tokenizer files of this very checkpoint"
            )

    @property
    def dims(self) -> dict[str, int]:
        """Its part of `BackboneSpec.dims`."""
        return {"text_width": self.lm.config.hidden_size, "context": self.tokens.context}

    @property
    def activation(self) -> str:
        """Of the feed-forward part."""
        return repr(self.lm.layers[0].mlp.act_fn)

    def embed(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l v"]:
        """Token embeddings; positions are rotary, inside attention."""
        return self.lm.embed_tokens(ids)

    def place(self, embedded: Float[Tensor, "b l v"]) -> Float[Tensor, "b l v"]:
        """As they are."""
        return embedded

    def run(self, block: nn.Module, states: Tensor) -> Tensor:
        """One causal layer: scaled dot product attention is causal without a mask, other kernels are given one."""
        positions = torch.arange(states.shape[1], device=states.device)[None]
        turned = self.lm.rotary_emb(states, position_ids=positions)
        mask = None
        if self.lm.config._attn_implementation != "sdpa":
            mask = create_causal_mask(
                config=self.lm.config,
                inputs_embeds=states,
                attention_mask=None,
                past_key_values=None,
                position_ids=positions,
            )
        return block(
            states, attention_mask=mask, position_embeddings=turned, position_ids=positions
        )

    def pool(self, raw: Tensor, end: Tensor) -> Tensor:
        """LLaVA pools nothing."""
        raise NotImplementedError

    def readout(self) -> dict[str, Tensor]:
        """The language model's norm."""
        norm = self.lm.norm
        return {"norm.weight": norm.weight, "eps": torch.tensor(norm.variance_epsilon)}
