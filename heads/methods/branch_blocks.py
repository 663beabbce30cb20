"""branch_blocks: a transformer block a branch on cached image rows; primitives conditioned on the recognised partner.

Paper:      "Learning Dual-Stream Conditional Concepts in Compositional Zero-Shot Learning", IEEE TPAMI 47(11), 2025
            (DSCNet); a reconstruction from its abstract and the public description of its structure and settings.
Reference:  wqshmzh/DSCNet-CZSL.   (not ported)
Symbols:    X → image/prefix before image/patches; x → image/pooled; v_k → `_seen`; tokens(·), t_k → `prompts.states`;
            q, z → `Logits`; α1, α2, α3 → `weight_conditional`, `weight_primitive`, `weight_pair`; ρ → `half`.
Differs:    no public code was run against it, so no figure made here is the paper's. proj is read as the text tower's
            own norm and projection, frozen; each Down has its own weights; one norm for q and kv of a cross block.
            Prompts' rows behind the end of text are not seen. Partners are found among all attrs and objs, whether or
            not a candidate has them. One stored view. Where the backbone pools by attention, its own pooling of a
            branch's rows stands for row 0. Without conditions z is q.
Mode, cost: cached images + live text tower on pairs and A + O prompts; 83.8 M parameters at W 1024, V 768 and 360
            primitives, 38.1 M with conditional="none"; words become (B, A + O, V), so `chunk` are scored at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from heads.base import Context, HeadConfig, Needs, SetHead
from heads.blocks.branches import Branch, ConditionedView, ConditionedWords
from heads.blocks.fusion import PARTNER
from heads.blocks.prompts import SoftPrompts
from heads.blocks.readout import Readout
from heads.errors import ConfigError
from heads.features import Batch, Features
from heads.live import LiveBackbone
from heads.maps import Maps

TEMPLATES = {
    "pair": "a photo of {attr} {obj}",
    "attr": "a photo of {attr} object",
    "obj": "a photo of {obj}",
}


class Config(HeadConfig):
    """Provenance in brackets: P paper, C its code's settings, O our choice."""

    conditional: Literal["both", "semantic", "visual", "none"] = Field(
        default="both",
        description="what is conditioned on the recognised partner: words (semantic), image views (visual), both (P)",
    )
    branches: tuple[Literal["attr", "obj", "pair"], ...] = Field(
        default=("attr", "obj", "pair"),
        description="branches with blocks of their own; the others read the image rows as they are cached (C: all)",
    )
    residual: bool = Field(default=True, description="add the pooled image to every branch (C)")
    weight_conditional: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="α1, share of the primitives in the score; 0.5 on UT-Zappos and C-GQA (C)",
    )
    weight_primitive: float = Field(
        default=0.05, ge=0, description="α2, of the losses of attrs and objs (C)"
    )
    weight_pair: float = Field(
        default=0.05, ge=0, description="α3, of the loss of the pair branch alone (C)"
    )
    n_blocks: int = Field(default=1, ge=1, description="blocks of a branch (C)")
    dropout: float = Field(
        default=0.3,
        ge=0,
        lt=1,
        description="probability, on learned words, in blocks and behind Down (C)",
    )
    head_width: int = Field(
        default=64,
        ge=1,
        description="width of an attention head, 16 heads of 1024 and 12 of 768; a narrower tower has one head (C)",
    )
    context_length: int | None = Field(
        default=None,
        ge=1,
        description="rows of a prompt in the tower, 7 in CLIP (C); none: as many as tower and prompt need, at least 8; "
        "in a causal tower results are the same (O)",
    )
    name_preset: Literal["csp", "short"] = Field(
        default="csp",
        description="how names are spelt: lower case with '.' as a blank, or UT-Zappos' short names (O)",
    )
    chunk: int = Field(
        default=64,
        ge=1,
        description="images scored at once; does not change results beyond rounding (O)",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.weight_conditional == 0 and self.weight_primitive == 0:
            raise ValueError(
                "weight_conditional and weight_primitive are both 0, so attrs and objs are never trained; set one"
            )
        if len(set(self.branches)) < len(self.branches):
            raise ValueError(f"branches names one twice: {', '.join(self.branches)}")
        return self


@dataclass(frozen=True, slots=True)
class Gathered:
    """A candidate set, and the whole vocabulary.

    Attributes:
        attr, obj: labels of every candidate.
        pair: texts of every candidate, as the tower pools them.
        text: "attr", "obj" → texts of all attrs or objs.
        tokens: the same → raw token states of their prompts, the pooled row last.
    """

    attr: Int[Tensor, " c"]
    obj: Int[Tensor, " c"]
    pair: Float[Tensor, "c d"]
    text: dict[str, Tensor]
    tokens: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Logits:
    """Cosines, float32.

    Attributes:
        pair: of the pair branch with every candidate.
        q: "attr", "obj" → of that branch with every attr or obj.
        z: the same under the condition of the partner.
    """

    pair: Float[Tensor, "b c"]
    q: dict[str, Tensor]
    z: dict[str, Tensor]


class Head(SetHead):
    """score = (1 − α1) ρ(cos(v_pair, t_pair)) + α1/2 [ρ(z_attr) ρ(q_obj) + ρ(z_obj) ρ(q_attr)], ρ(c) = (1 + c)/2."""

    score_space = "cosine"
    tasks = frozenset({"czsl"})
    relative = False

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        live = LiveBackbone(context, "branch_blocks")
        self.readout = Readout(context.readout)
        if not self.readout.pools_all_rows() and context.shapes.get("image/prefix", (0,))[0] == 0:
            raise ConfigError(
                f"branch_blocks reads the class token of {live.spec.family}, but its context has no image/prefix; use "
                "a cache that was built with it"
            )
        width, dim = context.shapes["image/patches"][-1], live.spec.dims["text_width"]
        heads = {side: _heads(side, w, config) for side, w in (("image", width), ("text", dim))}
        self.prompts = SoftPrompts(
            live,
            context.attrs,
            context.objs,
            templates=TEMPLATES,
            preset=config.name_preset,
            learn_context=True,
            dropout=config.dropout,
            length=config.context_length,
        )
        self.branches = nn.ModuleDict(
            {
                k: Branch(
                    width,
                    heads["image"],
                    config.n_blocks if k in config.branches else 0,
                    config.dropout,
                )
                for k in TEMPLATES
            }
        )
        sizes = width, dim, heads["text"], config.dropout
        semantic, visual = (config.conditional in ("both", kind) for kind in ("semantic", "visual"))
        self.words = nn.ModuleDict(
            {k: ConditionedWords(*sizes) for k in PARTNER} if semantic else {}
        )
        self.views = nn.ModuleDict({k: ConditionedView(*sizes) for k in PARTNER} if visual else {})

    @classmethod
    def needs(cls, config: Any) -> Needs:
        """All image rows, pooled images where branches are residual, the text tower, and of candidates labels alone."""
        rows, pooled = {"image/prefix", "image/patches"}, {"image/pooled"}
        return Needs(
            frozenset(rows | (pooled if config.residual else set())),
            frozenset(),
            unless_none=frozenset({"image/prefix"}),
            live=frozenset({"text"}),
        )

    def gather(self, parts: Iterable[Features]) -> Gathered:
        """Labels and texts of a candidate set, texts and tokens of the whole vocabulary."""
        words, attrs, objs, pairs = self.prompts.words(), [], [], []
        for part in parts:
            attr, obj = part.labels["attr"], part.labels["obj"]
            attrs.append(attr)
            objs.append(obj)
            pairs.append(self.prompts.encode("pair", words, self.prompts.rows("pair", attr, obj)))
        text, tokens = {}, {}
        for k, n in (("attr", len(self.context.attrs)), ("obj", len(self.context.objs))):
            index = torch.arange(n, device=words.device)
            rows = self.prompts.rows(k, index, index)
            tokens[k], text[k] = self.prompts.states(k, words, rows)
        return Gathered(torch.cat(attrs), torch.cat(objs), torch.cat(pairs), text, tokens)

    def against(self, queries: Features, gathered: Gathered) -> Float[Tensor, "q c"]:
        """Scores, for `chunk` queries at a time."""
        parts = torch.arange(len(queries), device=gathered.attr.device).split(self.config.chunk)
        return torch.cat(
            [self._scores(self._logits(queries.take(p), gathered), gathered) for p in parts]
        )

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropies of the score over train pairs, of all attrs, of all objs, and of the pair branch."""
        gathered = self.gather([batch.candidates])
        found = self._logits(batch.queries, gathered)
        scores, s = self._scores(found, gathered), self.readout.scale()
        parts = {
            "score": F.cross_entropy(s * scores, batch.target),
            **{k: F.cross_entropy(s * found.z[k], batch.queries.labels[k]) for k in PARTNER},
            "pair": F.cross_entropy(s * found.pair, batch.target),
        }
        total = (
            parts["score"]
            + self.config.weight_primitive * (parts["attr"] + parts["obj"])
            + self.config.weight_pair * parts["pair"]
        )
        hit = (scores.argmax(1) == batch.target).float().mean()
        logged = {f"{k}_loss": value.detach() for k, value in parts.items()}
        return total, {**logged, "batch_accuracy": hit}

    def maps(self, query: Features, candidate: Features) -> Maps:
        """Where the row that each branch hands on looks in its last block; the text plays no part."""
        shown = [k for k in ("attr", "obj", "pair") if k in self.config.branches]
        if self.readout.pools_all_rows() or not shown:
            raise ConfigError(
                "branch_blocks draws where the class row of a branch's own block looks; this backbone pools all rows, "
                "or the head has no branch with a block (head.branches), so there is nothing to draw"
            )
        x, mask = _rows(query)
        n = query["image/patches"].shape[1]
        looks = [self.branches[k].looks(x, mask)[0, -n:] for k in shown]  # type: ignore[operator]
        return Maps(
            torch.stack(looks),
            tuple(f"{k} branch" for k in shown),
            "the attention of each branch's class row to each patch in the last block of the branch, mean over heads. "
            "The text plays no part",
        )

    def _scores(self, found: Logits, gathered: Gathered) -> Float[Tensor, "b c"]:
        at = {"attr": gathered.attr, "obj": gathered.obj}
        q, z = ({k: half(v)[:, at[k]] for k, v in c.items()} for c in (found.q, found.z))
        share = self.config.weight_conditional
        primitives = z["attr"] * q["obj"] + z["obj"] * q["attr"]
        return (1 - share) * half(found.pair) + share / 2 * primitives

    def _logits(self, queries: Features, gathered: Gathered) -> Logits:
        x, mask = _rows(queries)
        row = {k: branch.row(self.readout, x, mask) for k, branch in self.branches.items()}  # type: ignore[operator]
        v = self._seen(row, queries)
        q = {k: cosines(v[k], gathered.text[k]) for k in PARTNER}
        pair, z = cosines(v["pair"], gathered.pair), dict(q)
        for k, other in PARTNER.items() if self.config.conditional != "none" else ():
            partner = gathered.tokens[other][q[other].argmax(1)]
            view, text = v[k], gathered.text[k]
            if k in self.views:
                view = self.readout.joint("text", self.views[k](row[k], partner)[:, None])[:, 0]
            if k in self.words:
                text = self.words[k](gathered.tokens[k][:, -1], partner, x, mask)
                text = self.readout.joint("text", text)
            z[k] = cosines(view, text)
        return Logits(pair, q, z)

    def _seen(self, row: dict[str, Tensor], queries: Features) -> dict[str, Tensor]:
        """v_attr, v_obj, v_pair in the joint space."""
        x = queries["image/pooled"].float() if self.config.residual else 0.0
        own = {k: self.readout.image(r) for k, r in row.items()}
        v = {k: own[k] + x for k in PARTNER}
        return {**v, "pair": (v["attr"] + v["obj"] + own["pair"]) / 3 + x}


def half(cosine: Tensor) -> Tensor:
    """ρ: a cosine moved to 0 … 1."""
    return (1 + cosine) / 2


def cosines(
    view: Float[Tensor, "b d"], text: Float[Tensor, "k d"] | Float[Tensor, "b k d"]
) -> Float[Tensor, "b k"]:
    """Of each view with texts that are the same for all, or its own; in float32 also under autocast."""
    with torch.autocast(view.device.type, enabled=False):
        v, t = F.normalize(view.float(), dim=-1), F.normalize(text.float(), dim=-1)
        return v @ t.T if t.ndim == 2 else (t @ v[..., None])[..., 0]


def _rows(queries: Features) -> tuple[Float[Tensor, "b n w"], Tensor | None]:
    """Image rows, prefix first, and which are real (None: all)."""
    patches, prefix = queries["image/patches"], queries.streams.get("image/prefix")
    mask = queries.streams.get("image/mask")
    if prefix is None:
        return patches, mask
    if mask is not None:
        mask = torch.cat([mask.new_ones(prefix.shape[:2]), mask], 1)
    return torch.cat([prefix, patches], 1), mask


def _heads(side: str, width: int, config: Config) -> int:
    heads = max(1, width // config.head_width)
    if width % heads:
        raise ConfigError(
            f"head.head_width is {config.head_width}, which makes {heads} heads, and they do not divide the {side} "
            f"tower's {width}; choose a divisor of it"
        )
    return heads
