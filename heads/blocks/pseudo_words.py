"""Texts with pseudo-words: vectors that stand among the words of a text, read by a frozen text tower.

    "a photo of $ that {modification}"

    [SOS] a photo of [S*] that is red and has a bow [EOS]          positions are added behind the insertion,
                     └ slot                          └ pooled      so that they cover it
    tower without mask: the same, padded to all its rows, of which the last is pooled (SigLIP2)

A slot is a row of its own and no token, so it needs no "$" in the vocabulary (SigLIP2's tokenizer deletes it), and a
"$" in somebody's text is a "$". In CLIP the rows are those of the released code, where "$" (id 259) is overwritten.
Texts that do not fit are cut before their end of text, which stays.

    a step         texts sorted by length, cut into parts of `chunk`, each only as long as its longest: the same
                   numbers as at full length (a causal tower does not see what comes after), and fewer rows
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from heads.base import HeadConfig
from heads.blocks.lora import under
from heads.blocks.moe import ExpertPrompts
from heads.errors import ConfigError
from heads.live import LiveBackbone, OpenBackbone


class TextConfig(HeadConfig):
    """Fields of heads that write composed texts; provenance in brackets: C code, O our choice."""

    template: str | None = Field(
        default=None,
        description="query text, with $ for the picture and {modification}; none: that of φ's kind (C)",
    )
    chunk: int = Field(
        default=128,
        ge=1,
        description="texts in the tower at once, sorted by length; does not change results beyond rounding (O)",
    )
    recompute: bool = Field(
        default=False,
        description="run the tower again in the backward pass: less memory, and half more time (O)",
    )

    @field_validator("template")
    @classmethod
    def _has_both(cls, template: str | None) -> str | None:
        if template is not None and (template.count("$"), template.count(EDIT)) != (1, 1):
            raise ValueError(f"a template has one $ and one {EDIT}, and this is {template!r}")
        return template


Pieces = tuple[str, ...]
"""A text between its slots: ("a photo of", "that is red") has one. A piece may be empty."""

EDIT = "{modification}"
"""Where the edit stands in a template."""

MEMO = 1 << 17
"""Texts whose rows are kept; then all are forgotten (our choice: some 100 MB)."""


@dataclass(frozen=True, slots=True)
class Row:
    """A text in the rows of a tower.

    Attributes:
        ids: (L,) of its tokens, 0 in the slots.
        slot: (L,) where the slots are.
        first, end: the first slot, and the row that is pooled.
    """

    ids: Int[Tensor, " l"]
    slot: Bool[Tensor, " l"]
    first: int
    end: int


class PseudoWords:
    """Makes texts of pieces and pseudo-words; owns no parameter.

    Args:
        live: the backbone whose text tower reads them.
        reserve: rows that stay free for prompts.
        chunk: texts in the tower at once.
        recompute: run a part again in the backward pass instead of keeping its activations.

    Attributes:
        cut: texts that did not fit, as they were.
    """

    def __init__(
        self, live: LiveBackbone, *, reserve: int = 0, chunk: int = 128, recompute: bool = False
    ) -> None:
        self.live, self.reserve, self.chunk, self.recompute = live, reserve, chunk, recompute
        self.cut: set[str] = set()
        self._rows: dict[Pieces, Row] = {}
        self._counts: dict[str, int] = {}
        backbone = live.on("cpu")
        self.context = backbone.spec.dims["context"] - reserve
        empty = backbone.tokenize([""])
        self.whole = int(backbone.ends(empty)[0]) == empty.shape[1] - 1
        self.first = int(backbone.lengths(empty)[0]) - 1 - self.whole
        if self.context < self.first + 3:
            raise ConfigError(
                f"{live.who}: {reserve} prompts leave {self.context} of the {self.context + reserve} rows of the text "
                f"tower of {live.name}; use fewer"
            )

    def encode(
        self,
        words: Float[Tensor, "b v"],
        texts: Sequence[Pieces],
        weights: Mapping[str, Tensor] | None = None,
    ) -> Float[Tensor, "b d"]:
        """Pooled texts, not normalised; every slot of text i holds pseudo-word i.

        Args:
            words: the pseudo-words.
            texts: what stands around them.
            weights: of the backbone's model, in place of its own; see `lora.under`.
        """
        return self._encoded(words, texts, None, weights or {})[0]

    def prompted(
        self, words: Float[Tensor, "b v"], texts: Sequence[Pieces], prompts: ExpertPrompts
    ) -> tuple[Float[Tensor, "b d"], list[Float[Tensor, "b e"]]]:
        """Like `encode`, with prompts before the blocks; also each block's shares of experts, if there are routers."""
        pooled, *shares = self._encoded(words, texts, prompts, {})
        return pooled, shares

    def _encoded(
        self,
        words: Float[Tensor, "b v"],
        texts: Sequence[Pieces],
        prompts: ExpertPrompts | None,
        weights: Mapping[str, Tensor],
    ) -> list[Tensor]:
        """Pooled texts and shares, in the order of the texts."""
        found = self._laid_out(texts)
        order = sorted(range(len(texts)), key=lambda i: len(found[i].ids))
        run = partial(self._some, prompts=prompts, weights=weights)
        if torch.is_grad_enabled() and self.recompute:
            # The tower draws nothing, so its random state needs no keeping.
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        parts = [
            run(words[index], [found[i] for i in index])
            for index in (order[i : i + self.chunk] for i in range(0, len(order), self.chunk))
        ]
        back = torch.empty(len(order), dtype=torch.int64)
        back[order] = torch.arange(len(order))
        back = back.to(words.device)
        return [torch.cat(some)[back] for some in zip(*parts, strict=True)]

    def _some(
        self,
        words: Float[Tensor, "b v"],
        rows: Sequence[Row],
        prompts: ExpertPrompts | None,
        weights: Mapping[str, Tensor],
    ) -> tuple[Tensor, ...]:
        """One part, as long as its longest: pooled, and shares."""
        ids = pad_sequence([row.ids for row in rows], batch_first=True)
        slot = pad_sequence([row.slot for row in rows], batch_first=True).to(words.device)
        first, end = (
            torch.tensor([getattr(row, name) for row in rows], device=words.device)
            for name in ("first", "end")
        )
        shares: list[Tensor] = []
        before = prompts and prompts.at(first, end, lambda _, share: shares.append(share))
        backbone = self.live.on(words.device)
        with under(backbone.model, weights):
            embedded = backbone.embed_tokens(ids).to(words.dtype)
            embedded = torch.where(slot[..., None], words[:, None], embedded)
            return self.live.encode(embedded, end, before), *shares

    def _laid_out(self, texts: Sequence[Pieces]) -> list[Row]:
        """Rows of texts; each is tokenized once."""
        new = [pieces for pieces in dict.fromkeys(texts) if pieces not in self._rows]
        if new:
            if len(self._rows) > MEMO:
                self._rows.clear()
                new = list(dict.fromkeys(texts))
            backbone = self.live.on("cpu")
            for n in {len(pieces) for pieces in new}:
                self._lay_out(backbone, [pieces for pieces in new if len(pieces) == n], n - 1)
        return [self._rows[pieces] for pieces in texts]

    def _lay_out(self, backbone: OpenBackbone, texts: Sequence[Pieces], n: int) -> None:
        """Of texts with n slots: tokenize what stands around them, and open the slots where they belong."""
        length = self.context - n
        heads = dict.fromkeys(_joined(p[: k + 1]) for p in texts for k in range(n))
        self._count(backbone, [h for h in heads if h not in self._counts])
        joined = [_joined(pieces) for pieces in texts]
        ids = backbone.tokenize_within(joined, length)
        longer = backbone.tokenize_within(joined, length + 2)
        ends = backbone.lengths(longer) - 1 - int(self.whole)  # row of the end of text, if it fits
        for pieces, text, row, end in zip(texts, joined, ids.tolist(), ends.tolist(), strict=True):
            if end >= length:
                self.cut.add(text)
            last = min(end, length - 1)
            at = [self.first + self._counts[_joined(pieces[: k + 1])] for k in range(n)]
            opened = [place + k for k, place in enumerate(at) if place <= last]
            made = row if self.whole else row[: last + 1]
            for place in opened:
                made.insert(place, 0)
            made += [0] * (self.context - len(made)) if self.whole else []
            slot = torch.zeros(len(made), dtype=torch.bool)
            slot[opened] = True
            first = opened[0] if opened else 0
            self._rows[pieces] = Row(torch.tensor(made), slot, first, len(made) - 1)

    def _count(self, backbone: OpenBackbone, texts: Sequence[str]) -> None:
        """How many tokens the beginnings of texts have."""
        if texts:
            lengths = backbone.lengths(backbone.tokenize(texts)) - 1 - int(self.whole) - self.first
            self._counts |= zip(texts, lengths.tolist(), strict=True)


def _joined(pieces: Sequence[str]) -> str:
    return " ".join(piece for piece in pieces if piece)


def pieces_of(template: str, modification: str = "") -> Pieces:
    """A template with "$" for the pseudo-word and {modification}, as pieces.

    >>> pieces_of("a photo of $ that {modification}", "has a bow")
    ('a photo of', 'that has a bow')
    """
    around = [re.sub(r"\s+", " ", part).strip() for part in template.split("$")]
    return tuple(part.replace(EDIT, modification) for part in around)
