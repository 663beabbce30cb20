"""Soft prompts: words of a template that are vectors of their own, read by a frozen text tower.

    "a photo of {attr} {obj}"    [SOS] a photo of [attr] [obj] [EOS] [pad]…      one slot a primitive, 8 rows in CLIP
                                       └ context ┘  └ slots ┘    └ pooled
    tower without mask           a photo of [attr] [obj] [EOS] [pad] … [pad]     all 64 rows of SigLIP2
                                                                       └ pooled

Rows of the table are keyed by (role, word): a word that is an attr and an obj has two.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cache_builder.datasets.compositions import PRESETS as SPELLINGS
from cache_builder.datasets.ut_zappos import SHORT
from heads.blocks.recompute import in_parts
from heads.errors import ConfigError
from heads.live import LiveBackbone, OpenBackbone

TEMPLATES = {
    "pair": "a photo of {attr} {obj}",
    "attr": "a photo of {attr}",
    "obj": "a photo of {obj}",
}
"""One prompt a branch (METHODS: chapters 5, 6)."""

PRESETS: Mapping[str, Callable[[str], str]] = {
    "csp": SPELLINGS["csp"],
    "short": lambda name: SHORT[name],
}
"""How a name of the vocabulary is spelt before it becomes tokens: rule of the CSP release, or short UT-Zappos names."""

KEPT = 3
"""Sets of prompts whose states behind fixed blocks are kept: one for each template."""

LENGTH = 8
"""Rows of a prompt in a causal tower, unless it needs more (release of CSP)."""


@dataclass(frozen=True)
class Layout:
    """Where things stand in the rows of a template.

    Attributes:
        ids: of every row, 0 where a slot is.
        context: the rows of the words before the first slot.
        slots: rows of the slots, in their order, and `roles` what goes there.
        end: the row that is pooled.
    """

    ids: Int[Tensor, " l"]
    context: slice
    slots: tuple[int, ...]
    roles: tuple[str, ...]
    end: int


class SoftPrompts(nn.Module):
    """A table of primitives and a context per template, and the pooled texts they make.

    Args:
        live: the backbone whose text tower reads them.
        attrs, objs: vocabularies.
        templates: those that are wanted, by name: text with the slots {attr} and {obj}.
        preset: key of `PRESETS`.
        learn_primitives, learn_context: train the table; train the words before the first slot, a copy per template.
        dropout: probability, on values of the table while training.
        length: rows of a prompt; None is 8, or what the longest template needs, or all rows in a tower without mask.
        chunk: prompts in the tower at once. While training, more are computed again in the backward pass, so that
            memory does not grow with their number.
        fixed_blocks: so many of the first blocks hold nothing that is trained. Where no word is learned either, the
            states behind them are computed once for a set of prompts, and the tower begins there.

    Raises:
        ConfigError: no vocabulary, a name the preset does not know, or a length the tower or the template refuses.
    """

    def __init__(
        self,
        live: LiveBackbone,
        attrs: Sequence[str],
        objs: Sequence[str],
        *,
        templates: Mapping[str, str],
        preset: str = "csp",
        learn_primitives: bool = True,
        learn_context: bool = False,
        dropout: float = 0.3,
        length: int | None = None,
        chunk: int = 256,
        fixed_blocks: int = 0,
    ) -> None:
        super().__init__()
        if not (attrs and objs):
            raise ConfigError(
                "soft prompts need the attrs and objs of a czsl task, but this cache has none; choose another cache or "
                "method"
            )
        self.live, self.chunk, self.n_attrs = live, chunk, len(attrs)
        self.fixed_blocks = 0 if learn_primitives or learn_context else fixed_blocks
        self._entering: dict[tuple[str, str, bytes], Tensor] = {}
        backbone = live.on("cpu")
        spelt = spell(attrs, objs, preset)
        self.layouts = {
            name: lay_out(backbone, text, length, live.who) for name, text in templates.items()
        }
        for name, layout in self.layouts.items():
            rows = backbone.embed_tokens(layout.ids[None])[0].float()
            self.register_buffer(f"rows_{name}", rows, persistent=False)
        self.contexts = nn.ParameterDict()
        if learn_context:
            for name, layout in self.layouts.items():
                words = self.get_buffer(f"rows_{name}")[layout.context]
                self.contexts[name] = nn.Parameter(words.clone())
        table = torch.stack([_mean_embedding(backbone, word) for word in spelt])
        if learn_primitives:
            self.primitives = nn.Parameter(table)
        else:
            self.register_buffer("primitives", table, persistent=False)
        self.dropout = nn.Dropout(dropout if learn_primitives else 0.0)

    def words(self) -> Float[Tensor, "w v"]:
        """The table, attrs before objs, under the dropout of this step: draw it once a step, for all templates."""
        return self.dropout(self.primitives)

    def rows(
        self, template: str, attr: Int[Tensor, " c"] | None, obj: Int[Tensor, " c"] | None
    ) -> Int[Tensor, "c k"]:
        """Table rows for the slots of a template, from indices into the vocabularies."""
        of_role = {"attr": attr, "obj": None if obj is None else obj + self.n_attrs}
        found = [of_role[role] for role in self.layouts[template].roles]
        return torch.stack([index for index in found if index is not None], dim=1)

    def encode(
        self, template: str, words: Float[Tensor, "w v"], rows: Int[Tensor, "c k"]
    ) -> Float[Tensor, "c d"]:
        """Pooled texts, not normalised, as the tower makes them.

        Args:
            template: name of one.
            words: what `words()` returned.
            rows: what `rows()` returned.
        """
        return self._run(template, words, rows, pooled_alone=True)[0]

    def states(
        self, template: str, words: Float[Tensor, "w v"], rows: Int[Tensor, "c k"]
    ) -> tuple[Float[Tensor, "c l v"], Float[Tensor, "c d"]]:
        """Raw states of the rows up to the one that is pooled, which comes last, and what `encode` returns.

        Rows behind it are left out: a causal tower pools without them, and they would hang on the prompt's length.
        """
        pooled, states = self._run(template, words, rows, pooled_alone=False)
        return states, pooled

    def _run(
        self,
        template: str,
        words: Float[Tensor, "w v"],
        rows: Int[Tensor, "c k"],
        *,
        pooled_alone: bool,
    ) -> tuple[Tensor, ...]:
        """Pooled texts, and the states that lead to them unless these are left out."""
        layout = self.layouts[template]

        def some(given: Tensor) -> tuple[Tensor, ...]:
            end = torch.full((len(given),), layout.end, device=given.device)
            if self.fixed_blocks:
                states, pooled = self.live.resume_texts(self.fixed_blocks, given, end)
            else:
                states, pooled = self.live.states(self._embedded(template, words, given), end)
            return (pooled,) if pooled_alone else (pooled, states[:, : layout.end + 1])

        given = self._fixed(template, words, rows) if self.fixed_blocks else rows
        return in_parts(some, [given], self.chunk)

    def _embedded(
        self, template: str, words: Float[Tensor, "w v"], rows: Int[Tensor, "c k"]
    ) -> Float[Tensor, "c l v"]:
        """Prompts as they enter the tower."""
        layout, frozen = self.layouts[template], self.get_buffer(f"rows_{template}")
        embedded = frozen.repeat(len(rows), 1, 1)
        learned = template in self.contexts
        embedded[:, layout.context] = self.contexts[template] if learned else frozen[layout.context]
        embedded[:, list(layout.slots)] = words[rows]
        return embedded

    def _fixed(
        self, template: str, words: Float[Tensor, "w v"], rows: Int[Tensor, "c k"]
    ) -> Float[Tensor, "c l v"]:
        """States behind the fixed blocks; while training, those of a few sets of prompts are kept."""
        kind = rows.device.type
        half = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else ""
        key = (template, half, rows.cpu().numpy().tobytes())
        if key in self._entering:
            return self._entering[key].to(rows.device)

        def some(rows: Int[Tensor, "c k"]) -> tuple[Tensor]:
            embedded = self._embedded(template, words, rows)
            return (self.live.entering_texts(self.fixed_blocks, embedded),)

        training = torch.is_grad_enabled()
        with torch.no_grad():
            found = in_parts(some, [rows], self.chunk)[0]
        if training:
            if len(self._entering) >= KEPT:
                self._entering.clear()
            self._entering[key] = found
        return found


def spell(attrs: Sequence[str], objs: Sequence[str], preset: str) -> list[str]:
    """Names as they are written, attrs before objs.

    Raises:
        ConfigError: the preset knows only some names, and this is none of them.
    """
    try:
        return [PRESETS[preset](name) for name in (*attrs, *objs)]
    except KeyError as error:
        raise ConfigError(
            f"name preset {preset!r} has the {len(SHORT)} names of UT-Zappos, and {error} is none of them; use 'csp'"
        ) from error


@torch.no_grad()
def encode_texts(
    live: LiveBackbone, texts: Sequence[str], chunk: int = 256
) -> Float[Tensor, "c d"]:
    """Pooled embeddings of whole strings, at the tower's full context, on the CPU."""
    backbone = live.on("cpu")
    parts = (texts[i : i + chunk] for i in range(0, len(texts), chunk))
    return torch.cat([backbone.encode_texts(backbone.tokenize(p))["pooled"].float() for p in parts])


def lay_out(backbone: OpenBackbone, template: str, length: int | None, who: str) -> Layout:
    """Rows of a template in a backbone's text tower."""
    first, *rest = re.split(r"\{(attr|obj)\}", template)
    ids, start, eos = _sentence(backbone, first.strip())
    row = ids[:eos].tolist()
    context, slots, roles = slice(start, len(row)), [], []
    for role, text in zip(rest[::2], rest[1::2], strict=True):
        slots.append(len(row))
        roles.append(role)
        row.append(0)
        row += word_ids(backbone, text.strip()).tolist() if text.strip() else []
    needed, whole = len(row) + 1, backbone.spec.dims["context"]
    unmasked = int(backbone.ends(ids[None])) != eos
    wanted = whole if unmasked else max(LENGTH, needed)
    wanted = min(wanted, whole) if length is None else length
    if unmasked and wanted != whole:
        raise ConfigError(
            f"{who}: the text tower of {backbone.spec.family} has no mask and needs all {whole} rows, padding "
            f"included; context_length is {length}, leave it out"
        )
    if not needed <= wanted <= whole:
        raise ConfigError(
            f"{who}: the prompt {template!r} takes {needed} rows and the tower at most {whole}; context_length is "
            f"{length or wanted}"
        )
    row += ids[eos:].tolist()[: wanted - len(row)]  # the end of text, and padding
    end = wanted - 1 if unmasked else needed - 1
    return Layout(torch.tensor(row), context, tuple(slots), tuple(roles), end)


def word_ids(backbone: OpenBackbone, word: str) -> Int[Tensor, " k"]:
    """Token ids of a word as it stands inside a sentence: some tokenizers write a word with the blank before it.

    Raises:
        ConfigError: nothing is left of the word.
    """
    short, _, eos = _sentence(backbone, "a photo of")
    long, _, end = _sentence(backbone, f"a photo of {word}")
    if end <= eos or not torch.equal(long[:eos], short[:eos]):
        raise ConfigError(f"the tokenizer of {backbone.spec.family} leaves nothing of {word!r}")
    return long[eos:end]


def _sentence(backbone: OpenBackbone, text: str) -> tuple[Int[Tensor, " l"], int, int]:
    """Ids of a short text, the row of its first word, and the row of its end of text."""
    both = backbone.tokenize(["", text])
    # What is stored ends with the end of text, or with the pooled row behind it where that is the last of all.
    behind = (backbone.ends(both) == both.shape[1] - 1).int()
    start, eos = (backbone.lengths(both) - 1 - behind).tolist()
    return both[1], start, eos


def _mean_embedding(backbone: OpenBackbone, word: str) -> Float[Tensor, " v"]:
    return backbone.embed_tokens(word_ids(backbone, word)[None])[0].float().mean(0)
