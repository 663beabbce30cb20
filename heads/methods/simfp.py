"""SIMFP: hard pair prompts, soft attr and obj prompts, and an exchange between words and patches.

Paper:      "Separated Inter/Intra-Modal Fusion Prompts for Compositional Zero-Shot Learning", arXiv 2501.17171 (AIAP
            2025).
Reference:  none public; a reconstruction from the paper's description, so no figure made here is the paper's.
Symbols:    v, X → `image/pooled`, readout of `image/patches`; t_c → `text/pooled` of the pair's prompt; t_a, t_o → soft
            prompts; D_a, D_o → `branches`; CA → heads/blocks/fusion.py; α, β, γ → `weight_pair`, `_attr`, `_obj`.
Differs:    all forms but the three kinds of prompts, the two stages and the weighted sum of losses are ours. One norm
            for q and kv. With hard pair prompts p(pair) is zero_shot's and not trained; pair texts meet patches only
            under `fuse_pairs`.
Mode, cost: cached images and pair texts + live text tower on A + O soft prompts; 29.8 M parameters at D 768 and 360
            primitives; texts become (B, A + O, D), so queries are scored `chunk` at a time.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from heads.base import Context, HeadConfig, Needs, SetHead
from heads.blocks.fusion import Branch, Fusion, Order
from heads.blocks.nested import nested_mixture
from heads.blocks.prompts import TEMPLATES, SoftPrompts, encode_texts, spell
from heads.blocks.readout import Readout
from heads.errors import ConfigError
from heads.features import Batch, Features
from heads.live import LiveBackbone
from heads.maps import Maps

PRIMITIVES = ("attr", "obj")


class Config(HeadConfig):
    """Provenance in brackets: T reported of the paper, O our choice."""

    prompts: tuple[Literal["hard", "soft"], Literal["hard", "soft"], Literal["hard", "soft"]] = (
        Field(
            default=("hard", "soft", "soft"),
            description="prompts of pairs, attrs and objs: hard, the strings (pairs: as cached), or soft, learned "
            "words in a template (T)",
        )
    )
    fusion: Order = Field(
        default="inter_intra",
        description="exchange between words and patches (inter), between attrs and objs (intra), and their order (T)",
    )
    fuse_pairs: int = Field(
        default=0,
        ge=0,
        description="pair texts that also see the patches, the best of each image by the un-fused cosine; 0: none (O)",
    )
    share_branches: bool = Field(
        default=True, description="attrs and objs share the weights of the exchange (O)"
    )
    heads: int = Field(
        default=8, ge=1, description="attention heads; must divide the joint width (O)"
    )
    weight_pair: float = Field(
        default=1.0,
        ge=0,
        description="α, of the pairs' loss; moves nothing while pair prompts are hard and un-fused, as by default (O)",
    )
    weight_attr: float = Field(
        default=1.0, ge=0, description="β, of the attrs' loss; 0.1 on C-GQA (O)"
    )
    weight_obj: float = Field(
        default=1.0, ge=0, description="γ, of the objs' loss; 0.1 on C-GQA (O)"
    )
    learn_context: bool = Field(
        default=True, description="train the words 'a photo of' of the soft prompts (O)"
    )
    dropout: float = Field(
        default=0.3, ge=0, lt=1, description="probability, on the learned words (O, as in CSP)"
    )
    dropout_fusion: float = Field(
        default=0.1, ge=0, lt=1, description="probability, in the exchange (O)"
    )
    dropout_branch: float = Field(
        default=0.5, ge=0, lt=1, description="probability, on the branches' image vectors (O)"
    )
    context_length: int | None = Field(
        default=None,
        ge=1,
        description="rows of a soft prompt; none: as many as tower and prompt need, at least 8 (O)",
    )
    name_preset: Literal["csp", "short"] = Field(
        default="csp",
        description="how names are spelt: lower case with '.' as a blank, or UT-Zappos' short names (O)",
    )
    chunk: int = Field(
        default=64,
        ge=1,
        description="images that texts are fused with at once when scoring; does not change results beyond rounding "
        "(O)",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.fuse_pairs and "inter" not in self.fusion:
            raise ValueError(
                f"fuse_pairs needs an inter stage, but fusion is {self.fusion!r}; set fuse_pairs to 0"
            )
        return self


@dataclass(frozen=True, slots=True)
class Gathered:
    """A candidate set.

    Attributes:
        attr, obj: labels of every candidate.
        pair: texts of every candidate, as the tower pools them.
        text: "attr", "obj" → texts of the whole vocabulary.
        present: "attr", "obj" → True where some candidate has it.
    """

    attr: Int[Tensor, " c"]
    obj: Int[Tensor, " c"]
    pair: Float[Tensor, "c d"]
    text: dict[str, Tensor]
    present: dict[str, Bool[Tensor, " _"]]


class Head(SetHead):
    """score = p(pair) + p(attr)·p(obj), each a softmax over exactly the candidates given."""

    score_space = "probability"
    tasks = frozenset({"czsl"})

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        if not (context.attrs and context.objs):
            raise ConfigError(
                "simfp has branches for attrs and objs, but this task has no such vocabularies; it needs a czsl task"
            )
        dim = context.shapes["image/pooled"][0]
        if dim % config.heads:
            raise ConfigError(
                f"head.heads is {config.heads}, which does not divide the joint {dim}"
            )
        self.readout = Readout(context.readout)
        self.live = LiveBackbone(context, "simfp")
        kinds = dict(zip(("pair", *PRIMITIVES), config.prompts, strict=True))
        self.soft = frozenset(name for name, kind in kinds.items() if kind == "soft")
        self.prompts = self._soft_prompts() if self.soft else None
        spelt = spell(context.attrs, context.objs, config.name_preset)
        words = {"attr": spelt[: len(context.attrs)], "obj": spelt[len(context.attrs) :]}
        for name in PRIMITIVES:
            if name not in self.soft:
                texts = [f"a photo of {word}" for word in words[name]]
                self.register_buffer(
                    f"hard_{name}", encode_texts(self.live, texts), persistent=False
                )
        self.branches = nn.ModuleDict({k: Branch(dim, config.dropout_branch) for k in PRIMITIVES})
        self.fusion = Fusion(
            dim,
            config.heads,
            config.dropout_fusion,
            order=config.fusion,
            shared=config.share_branches,
            pairs=config.fuse_pairs > 0,
        )

    @classmethod
    def needs(cls, config: Any) -> Needs:
        """Pooled images, patches where texts see them, texts of hard pair prompts, and the text tower."""
        seen = {"image/patches"} if "inter" in config.fusion else set()
        hard = {"text/pooled"} if config.prompts[0] == "hard" else set()
        return Needs(frozenset({"image/pooled", *seen}), frozenset(hard), live=frozenset({"text"}))

    def gather(self, parts: Iterable[Features]) -> Gathered:
        """Labels and texts of a candidate set, and the texts of the whole vocabulary."""
        words = None if self.prompts is None else self.prompts.words()
        attrs, objs, pairs = [], [], []
        for part in parts:
            attrs.append(part.labels["attr"])
            objs.append(part.labels["obj"])
            pairs.append(self._pairs(part, words))
        attr, obj = torch.cat(attrs), torch.cat(objs)
        sizes = {"attr": len(self.context.attrs), "obj": len(self.context.objs)}
        return Gathered(
            attr,
            obj,
            torch.cat(pairs),
            {name: self._primitives(name, n, words) for name, n in sizes.items()},
            self._present(attr, obj),
        )

    def first(self, gathered: Gathered, n: int) -> Gathered:
        """The set of its first n candidates alone."""
        attr, obj = gathered.attr[:n], gathered.obj[:n]
        return Gathered(attr, obj, gathered.pair[:n], gathered.text, self._present(attr, obj))

    def nested(
        self, queries: Features, gathered: Gathered, sizes: Sequence[int]
    ) -> Iterator[Float[Tensor, "q n"]]:
        """Probabilities over the first n, from logits that are the same for all n; fused pairs are not, and cost n."""
        if self.config.fuse_pairs:
            yield from super().nested(queries, gathered, sizes)
            return
        parts = torch.arange(len(queries), device=gathered.attr.device).split(self.config.chunk)
        found = [self._logits(queries.take(part), gathered) for part in parts]
        z = {k: torch.cat([some.pop(k) for some in found]) for k in ("pair", *PRIMITIVES)}
        yield from nested_mixture(
            z["pair"], z["attr"], z["obj"], gathered.attr, gathered.obj, sizes
        )

    def against(self, queries: Features, gathered: Gathered) -> Float[Tensor, "q c"]:
        """Probabilities, for `chunk` queries at a time."""
        device = gathered.attr.device
        parts = torch.arange(len(queries), device=device).split(self.config.chunk)
        return torch.cat([self._probability(queries.take(part), gathered) for part in parts])

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted cross-entropies over train pairs, and over the attrs and objs that occur in them."""
        z = self._logits(batch.queries, self.gather([batch.candidates]))
        found = {
            "pair": F.cross_entropy(z["pair"], batch.target),
            **{k: F.cross_entropy(z[k], batch.queries.labels[k]) for k in PRIMITIVES},
        }
        weights = {
            "pair": self.config.weight_pair,
            "attr": self.config.weight_attr,
            "obj": self.config.weight_obj,
        }
        total = sum((weights[k] * found[k] for k in found), torch.zeros_like(found["pair"]))
        parts = {f"{k}_loss": value.detach() for k, value in found.items()}
        parts["batch_accuracy"] = (z["pair"].argmax(1) == batch.target).float().mean()
        return total, parts

    def maps(self, query: Features, candidate: Features) -> Maps:
        """Where the attr and the obj of a pair look in the inter-modal exchange."""
        if "inter" not in self.config.fusion:
            raise ConfigError(
                f"simfp's words look at patches in an inter-modal exchange, but this head was trained with "
                f"fusion={self.config.fusion!r}; train one with fusion=inter or inter_intra to draw maps"
            )
        words = None if self.prompts is None else self.prompts.words()
        names = {"attr": self.context.attrs, "obj": self.context.objs}
        text = {k: self._primitives(k, len(names[k]), words) for k in PRIMITIVES}
        patches = self.readout.joint("image", query["image/patches"])
        found = self.fusion.looks(text, patches, query.streams.get("image/mask"))
        index = {k: int(candidate.labels[k][0]) for k in PRIMITIVES}
        return Maps(
            torch.stack([found[k][0, index[k]] for k in PRIMITIVES]),
            tuple(names[k][index[k]] for k in PRIMITIVES),
            "the attention that the words of the pair, attr and obj, pay to each patch in the inter-modal exchange, "
            "mean over heads; it sums to 1 over the patches",
        )

    def _probability(self, queries: Features, gathered: Gathered) -> Float[Tensor, "q c"]:
        p = {k: z.softmax(-1) for k, z in self._logits(queries, gathered).items()}
        return p["pair"] + p["attr"][:, gathered.attr] * p["obj"][:, gathered.obj]

    def _logits(self, queries: Features, gathered: Gathered) -> dict[str, Tensor]:
        """s·cos of every branch, in float32; -inf for a primitive that no candidate has."""
        v = queries["image/pooled"].float()
        patches, mask = None, queries.streams.get("image/mask")
        if "inter" in self.config.fusion:
            patches = self.readout.joint("image", queries["image/patches"])
        image = {k: self.branches[k](v) for k in PRIMITIVES}
        image, text = self.fusion(image, gathered.text, patches, mask)
        z = {
            k: self._cosines(image[k], text[k]).masked_fill(~gathered.present[k], -torch.inf)
            for k in PRIMITIVES
        }
        z["pair"] = self._cosines(v[:, None], gathered.pair[None])
        if self.config.fuse_pairs and patches is not None:
            best = z["pair"].topk(min(self.config.fuse_pairs, len(gathered.pair)), dim=1).indices
            fused = self.fusion.fuse_texts("pair", gathered.pair[best], patches, mask)
            z["pair"] = z["pair"].scatter(1, best, self._cosines(v[:, None], fused))
        return z

    def _cosines(
        self, image: Float[Tensor, "b 1 d"], text: Float[Tensor, "_ k d"]
    ) -> Float[Tensor, "b k"]:
        with torch.autocast(image.device.type, enabled=False):
            v, t = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
            cosine = v[:, 0] @ t[0].T if len(t) == 1 else (t @ v.mT)[..., 0]
            return self.readout.scale() * cosine

    def _pairs(self, part: Features, words: Tensor | None) -> Float[Tensor, "c d"]:
        if self.prompts is None or words is None or "pair" not in self.soft:
            return part["text/pooled"].float()
        rows = self.prompts.rows("pair", part.labels["attr"], part.labels["obj"])
        return self.prompts.encode("pair", words, rows).float()

    def _primitives(self, name: str, n: int, words: Tensor | None) -> Float[Tensor, "k d"]:
        if self.prompts is None or words is None or name not in self.soft:
            return self.get_buffer(f"hard_{name}")
        index = torch.arange(n, device=words.device)
        return self.prompts.encode(name, words, self.prompts.rows(name, index, index)).float()

    def _present(self, attr: Int[Tensor, " c"], obj: Int[Tensor, " c"]) -> dict[str, Tensor]:
        sizes = {"attr": len(self.context.attrs), "obj": len(self.context.objs)}
        return {
            name: torch.bincount(index, minlength=sizes[name]) > 0
            for name, index in (("attr", attr), ("obj", obj))
        }

    def _soft_prompts(self) -> SoftPrompts:
        return SoftPrompts(
            self.live,
            self.context.attrs,
            self.context.objs,
            templates={name: TEMPLATES[name] for name in TEMPLATES if name in self.soft},
            preset=self.config.name_preset,
            learn_context=self.config.learn_context,
            dropout=self.config.dropout,
            length=self.config.context_length,
        )
