"""From strings to ids, and which of the rows they become are stored. No family itself.

end      49406 a photo of … 49407 0 0 0       CLIP, PE: stored up to and including the end of text, which is also the
│                  └ pooled          pooled row; id 0 after that is padding, but the word "!" before it
last     a photo of … 1 0 0 0 … 0             SigLIP2: stored up to and including the end of text, then the row of the
└ end     └ pooled      last position, which is the pooled one and nearly always padding
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from cache_builder.backbones.checkpoints import CheckpointError, first_line


@dataclass(frozen=True)
class Tokens:
    """A tokenizer with a fixed context length, and the rules of the tower behind it.

    Attributes:
        encode: texts and a length → ids padded and cut to that length, as the library does it.
        words: the string of every id.
        context: length of a row of ids.
        pool: which row the library pools: that of the largest id, of the end of text, or the last one.
        start: id of the begin of text, None without one; `end`, `pad` likewise, always there.
        reserved: ids that no word may have.
    """

    encode: Callable[[Sequence[str], int], Int[Tensor, "b l"]]
    words: Callable[[], list[str]]
    context: int
    pool: Literal["argmax", "eos", "last"]
    start: int | None
    end: int
    pad: int
    reserved: tuple[int, ...]

    @property
    def first_free(self) -> int:
        """Rows before the first word."""
        return 0 if self.start is None else 1

    def tokenize(self, texts: Sequence[str], length: int | None = None) -> Int[Tensor, "b l"]:
        """Ids padded and cut to the context length or to `length` rows, on the CPU.

        Raises:
            CheckpointError: a text spells a special token, which the tokenizer would encode as one: rows would then be
                cut or pooled in its middle. Names the text.
        """
        ids = self.encode(texts, length or self.context)
        ends = self._ends_of_text(ids)
        column = torch.arange(ids.shape[1])
        inside = (column >= self.first_free) & (column < ends[:, None])
        strays = inside & torch.isin(ids, torch.tensor(self.reserved))
        strays |= (column > ends[:, None]) & (ids != self.pad)
        for row in strays.any(1).nonzero().flatten().tolist():
            raise CheckpointError(
                f"text {texts[row]!r} spells a special token of the tokenizer and would be pooled in its middle; "
                "reword it"
            )
        return ids

    def vocabulary(self) -> list[str]:
        """The string of every token id, in order."""
        return self.words()

    def truncated(self, texts: Sequence[str]) -> int:
        """How many texts do not fit the context length; the library overwrites their last id by the end of text."""
        longer = self.encode(texts, self.context + 1)
        return int((self._ends_of_text(longer) == self.context).sum())

    def ends(self, ids: Int[Tensor, "b l"]) -> Int[Tensor, " b"]:
        """The pooled row of each text."""
        if self.pool == "last":
            return torch.full((len(ids),), ids.shape[1] - 1, device=ids.device)
        return self._ends_of_text(ids)

    def lengths(self, ids: Int[Tensor, "b l"]) -> Int[Tensor, " b"]:
        """Rows to store of each text: up to its end, and the pooled row behind it if that is another one."""
        inside = self._ends_of_text(ids) + 1
        return (inside + 1).clamp(max=ids.shape[1]) if self.pool == "last" else inside

    def check(self, name: str, size: int, n_embeddings: int) -> None:
        """Do tokenizer and tower belong together?

        Args:
            name: of the checkpoint, for messages.
            size: ids the tokenizer knows.
            n_embeddings: rows of the tower's table.

        Raises:
            CheckpointError: they do not: texts would be pooled at the wrong place, or ids have no embedding.
        """
        if self.pool == "last" and self.pad == self.end:
            raise CheckpointError(
                f"{name} pads with its end of text, as SigLIP 1 does; family siglip2 reads SigLIP 2"
            )
        if self.pool == "argmax" and self.end != size - 1:
            raise CheckpointError(
                f"{name} pools at the largest id, but its tokenizer's end-of-text is {self.end} and its "
                f"largest {size - 1}; texts would be pooled at random"
            )
        try:
            probe = self.encode(["a photo"], self.context)
        except Exception as error:  # tokenizers raises its own, plain ones
            raise CheckpointError(
                f"{name}: the tokenizer does not fit the text tower, it cannot encode 'a photo': {first_line(error)}"
            ) from error
        good = size <= n_embeddings and probe.shape == (1, self.context)
        good = good and int((probe == self.end).sum()) == 1
        if good and self.start is not None:
            good = int(probe[0, 0]) == self.start
        if good and self.pool == "last":  # Gemma's: padding 0, on the right, end 1
            good = (self.pad, self.end) == (0, 1) and int(probe[0, -1]) == self.pad
        if not good:
            raise CheckpointError(
                f"{name}: the tokenizer does not fit the text tower: {size} ids for {n_embeddings} embeddings, "
                f"'a photo' → {probe[0, :8].tolist()} of length {probe.shape[1]} for {self.context} positions, "
                f"start {self.start}, end {self.end}, "
                f"padding {self.pad}; take the tokenizer files of this very checkpoint"
            )

    def _ends_of_text(self, ids: Tensor) -> Tensor:
        """Position of the end-of-text id, (B,); the first one, which is the one the library pools."""
        return ids.argmax(-1) if self.pool == "argmax" else (ids == self.end).int().argmax(-1)
