"""eva_head: EVA's fusion of a pair with its words, laid on any head that scores pairs, trained here or long finished.

Paper:      "Decoupling Primitive with Experts: Dynamic Feature Alignment for Compositional Zero-Shot Learning" (EVA),
            ICLR 2026, OpenReview hUtTGobe1r.
Reference:  none public; a reconstruction from descriptions, so no figure made here is the paper's.
Symbols:    ℓ → `_logits`, the base's logits, or its cosines times s; p_pair, z_attr, z_obj → blocks/primitives.py;
            τ → exp of `log_tau`; β → `beta`; λ1 → `weight_primitive`.
Differs:    the fusion alone, without EVA's adapters, prompts and variants, on a base that is not EVA (all ours). s is 1
            where the backbone has no logit scale (LLaVA), and then p_pair is nearly flat. The maxima run over the
            candidates that there are, so one candidate more changes every score.
Mode, cost: streams and live towers of the base; 0 parameters more, or two τ. The fusion is two maxima and two
            look-ups a cell. A base that embeds nothing and gathers nothing has all candidates' features in memory.
            With `train_tau` a step scores twice, once for the base's own loss and once for that of the words.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from cache_builder import FeatureCache, plugins
from heads import base as contract
from heads import checkpoint, load_method
from heads.base import Context, EmbeddingHead, HeadConfig, Needs, SetHead, Training
from heads.blocks.primitives import Of, fused, nested_fused, primitive_logits
from heads.blocks.readout import CAP, Readout, temperature
from heads.config import parse
from heads.errors import CheckpointMismatch, ConfigError
from heads.features import Batch, Features

WEIGHTS = "weights/"
"""Tables of the context that hold what a finished run came to."""


class Config(HeadConfig):
    """Provenance in brackets: T reported of the paper, O our choice."""

    base: str = Field(
        default="zero_shot",
        description="whose scores are fused: a method that scores pairs by cosines or logits, or the directory of a "
        "finished run of one, whose settings and weights are then taken and stay as they are (O)",
    )
    settings: dict[str, Any] = Field(
        default={},
        validate_default=True,
        description="fields of the base's own configuration, a table: [head.settings], or --set head.settings.NAME=; "
        "none beside a run (O)",
    )
    beta: float = Field(
        default=0.5, ge=0, description="β, weight of the words' probabilities beside the pair's (T)"
    )
    tau: float = Field(
        default=1.0,
        gt=0,
        le=CAP,
        description="τ on the largest score of a word; where it starts, if it is trained (O)",
    )
    train_tau: bool = Field(
        default=False,
        description="train τ of attrs and τ of objs, by the words' cross-entropy, beside the base's own loss (O)",
    )
    weight_primitive: float = Field(
        default=1.0,
        ge=0,
        description="λ1, of the cross-entropies of attrs and objs; used with train_tau alone (O)",
    )
    primitive_score: Of = Field(
        default="logit",
        description="what a word has the largest of: the pairs' logits (O), or their probabilities, as the paper's "
        "formula has it literally (T)",
    )
    run: str | None = Field(
        default=None,
        description="directory that base was, if it was one; filled in, and never read again once the head is saved "
        "(O)",
    )

    @model_validator(mode="before")
    @classmethod
    def _method_of_run(cls, values: Any) -> Any:
        """In place of a directory the method and the settings of what lies there."""
        base = values.get("base")
        if values.get("run") is not None or not isinstance(base, str) or not _is_directory(base):
            return values
        if "settings" in values:
            raise ConfigError(
                f"head.settings is given, but head.base is the run {base}, whose settings are its own; leave "
                "settings out, or name a method as base"
            )
        found = checkpoint.describe(base)
        own = {"base": found["method"], "settings": found["config"]}
        return {**values, **own, "run": str(Path(base).absolute())}

    @field_validator("base")
    @classmethod
    def _scores_pairs(cls, base: str) -> str:
        kind = load_method(base).Head
        if "czsl" not in kind.tasks:
            raise ConfigError(
                f"head.base is {base}, which scores {', '.join(sorted(kind.tasks))} and no pairs of attr and obj; "
                "choose a method of czsl"
            )
        if kind.score_space == "probability":
            raise ConfigError(
                f"head.base is {base}, whose scores are probabilities already, and eva_head makes its own from cosines "
                "or logits; choose a base of one of these spaces"
            )
        return base

    @field_validator("settings")
    @classmethod
    def _complete(cls, settings: dict[str, Any], info: Any) -> dict[str, Any]:
        """With the base's defaults, so that a record says all that was in force."""
        if "base" not in info.data:  # refused already
            return settings
        model = load_method(info.data["base"]).Config
        return parse(model, settings, "head.settings").model_dump(mode="json")

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if not self.train_tau:
            return self
        if self.run is None and _base_of(self)[2] == "closed_form":
            raise ConfigError(
                f"head.train_tau learns by gradient, and {self.base} is solved in closed form; train {self.base} by "
                "itself and give its run as head.base, or leave train_tau out"
            )
        if not self.weight_primitive:
            raise ConfigError(
                "head.train_tau learns from the words' loss, which head.weight_primitive=0 leaves out; set it above 0"
            )
        return self


@dataclass(frozen=True, slots=True)
class Gathered:
    """A candidate set.

    Attributes:
        attr, obj: labels of every candidate.
        n_attrs, n_objs: numbers of labels to tell apart.
        held: of the candidates what the base meets queries with: embeddings, what it gathered, or their features in
            parts.
    """

    attr: Int[Tensor, " c"]
    obj: Int[Tensor, " c"]
    n_attrs: int
    n_objs: int
    held: Any


class Head(SetHead):
    """score = p(pair) + β (p(attr) + p(obj)), over exactly the candidates given."""

    score_space = "probability"
    tasks = frozenset({"czsl"})

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        kind, settings, _ = _base_of(config)
        split = {True: {}, False: {}}
        for name, table in context.tables.items():
            split[name.startswith(WEIGHTS)][name] = table
        self.base: contract.Head = kind(settings, replace(context, tables=split[False]))
        self.readout = Readout(context.readout)
        start = torch.full((2,), config.tau).log()
        self.log_tau = nn.Parameter(start, requires_grad=config.train_tau)
        if config.run is not None:
            self._take({k.removeprefix(WEIGHTS): v for k, v in split[True].items()}, config.run)

    @classmethod
    def needs(cls, config: Any) -> Needs:
        """Those of the base."""
        kind, settings, _ = _base_of(config)
        return kind.needs(settings)

    @classmethod
    def training_needs(cls, config: Any) -> Needs:
        """Those of the base, and what it scores with where its scores are trained on; a run meets no partners."""
        kind, settings, how = _base_of(config)
        if how == "none":
            return replace(kind.needs(settings), partners=frozenset())
        needs = kind.training_needs(settings)
        return needs | kind.needs(settings) if config.train_tau else needs

    @classmethod
    def trained_by(cls, config: Any) -> Training:
        """As the base is; a run is finished, so there nothing is left but τ."""
        return "gradient" if config.train_tau else _base_of(config)[2]

    @classmethod
    def prepare(cls, config: Any, context: Context, cache: FeatureCache) -> Context:
        """With the base's own tables, or what a finished run came to.

        Raises:
            FileNotFoundError: the run is gone.
            MissingStream, CheckpointMismatch: the run is of another backbone, or knows other words.
        """
        kind, settings, _ = _base_of(config)
        if config.run is None:
            return kind.prepare(settings, context, cache)
        live = bool(kind.needs(settings).live)
        found = checkpoint.load(config.run, backbone=context.backbone_name if live else None)
        checkpoint.check_cache(found, cache)
        _check_run(found, config, context)
        return _with_weights(found, context)

    @classmethod
    def miniature(cls, config: Any, context: Context) -> Context:
        """With the base's stand-ins; for a run, one freshly drawn."""
        kind, settings, _ = _base_of(config)
        facts = kind.miniature(settings, context)
        return facts if config.run is None else _with_weights(kind(settings, facts), facts)

    def train(self, mode: bool = True) -> "Head":
        """A base that was taken from a run does not change, and so is never in training."""
        super().train(mode)
        if self.config.run is not None:
            self.base.eval()
        return self

    def n_trained(self) -> int:
        """Numbers of the base, if it is trained here, and τ."""
        own = self.log_tau.numel() if self.log_tau.requires_grad else 0
        return own + (self.base.n_trained() if self._trains_base else 0)

    def undecayed(self) -> frozenset[str]:
        """Those of the base."""
        own = self.base.undecayed() if self._trains_base else ()
        return frozenset(f"base.{name}" for name in own)

    def lr_shares(self) -> dict[str, float]:
        """Those of the base."""
        own = self.base.lr_shares() if self._trains_base else {}
        return {f"base.{name}": share for name, share in own.items()}

    def before_training(self, examples: Iterable[Features]) -> Mapping[str, Tensor]:
        """What the base's loss wants."""
        return self.base.before_training(examples) if self._trains_base else {}

    def remarks(self) -> Mapping[str, Any]:
        """Those of the base."""
        return self.base.remarks()

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The base's own; with `train_tau` + λ1 (CE over attrs + CE over objs), of those that occur in train pairs."""
        if not self.config.train_tau:
            return self.base.loss(batch)
        known = self.gather([batch.candidates])
        logits, of = self._logits(batch.queries, known), self.config.primitive_score
        tau = dict(zip(("attr", "obj"), self.tau(), strict=True))
        z = {
            "attr": primitive_logits(logits, known.attr, known.n_attrs, tau=tau["attr"], of=of),
            "obj": primitive_logits(logits, known.obj, known.n_objs, tau=tau["obj"], of=of),
        }
        found = {k: F.cross_entropy(z[k], batch.queries.labels[k]) for k in z}
        total = self.config.weight_primitive * (found["attr"] + found["obj"])
        parts = {f"primitive_{k}_loss": value.detach() for k, value in found.items()}
        parts |= {f"tau_{k}": value.detach() for k, value in tau.items()}
        if self._trains_base:
            own, said = self.base.loss(batch)
            total, parts = total + own, {**said, **parts}
        return total, parts

    def candidates(self) -> Sequence[Config]:
        """One for each configuration that a closed-form base offers."""
        if self.training_by != "closed_form":
            return (self.config,)
        return tuple(self._under(config) for config in self.base.candidates())

    def solve(self, batch: Batch, seed: int) -> dict[str, float]:
        """Fit the base."""
        self.base.config = _base_of(self.config)[1]
        report = self.base.solve(batch, seed)
        self.config = self._under(self.base.config)
        return report

    def tau(self) -> Float[Tensor, "2"]:
        """τ of attrs and of objs."""
        return temperature(self.log_tau, self.config.tau)

    def gather(self, parts: Iterable[Features]) -> Gathered:
        """Labels of a candidate set, and what the base makes of it."""
        self.base.config = _base_of(self.config)[1]  # validation may have chosen another one
        attrs, objs = [], []

        def noted() -> Iterator[Features]:
            for part in parts:
                attrs.append(part.labels["attr"])
                objs.append(part.labels["obj"])
                yield part

        if isinstance(self.base, EmbeddingHead):
            held = torch.cat([self.base.embed_candidates(part).float() for part in noted()])
        elif isinstance(self.base, SetHead):
            held = self.base.gather(noted())
        else:
            held = list(noted())
        attr, obj = torch.cat(attrs), torch.cat(objs)
        return Gathered(attr, obj, int(attr.max()) + 1, int(obj.max()) + 1, held)

    def against(self, queries: Features, gathered: Gathered) -> Float[Tensor, "q c"]:
        """Probabilities over all that were gathered."""
        return fused(self._logits(queries, gathered), *self._words(gathered), **self._fusion())

    def nested(
        self, queries: Features, gathered: Gathered, sizes: Sequence[int]
    ) -> Iterator[Float[Tensor, "q n"]]:
        """Probabilities over the first n, from logits that are the same for all n unless the base says otherwise."""
        words = self._words(gathered)
        if not (isinstance(self.base, SetHead) and self.base.relative):
            logits = self._logits(queries, gathered)
            yield from nested_fused(logits, *words, sizes, **self._fusion())
            return
        attr, obj, *numbers = words
        for scores in self.base.nested(queries, gathered.held, sizes):
            n = scores.shape[1]
            yield fused(self._scaled(scores), attr[:n], obj[:n], *numbers, **self._fusion())

    @property
    def _trains_base(self) -> bool:
        return _base_of(self.config)[2] != "none"

    def _logits(self, queries: Features, gathered: Gathered) -> Float[Tensor, "q c"]:
        """ℓ of every candidate, in float32."""
        base, held = self.base, gathered.held
        if isinstance(base, SetHead):
            return self._scaled(base.against(queries, held))
        if not isinstance(base, EmbeddingHead):
            return self._scaled(torch.cat([base(queries, part) for part in held], dim=1))
        q = base.embed_queries(queries)
        with torch.autocast(q.device.type, enabled=False):
            return self._scaled(q.float() @ held.T + base.offset())

    def _scaled(self, scores: Float[Tensor, "q c"]) -> Float[Tensor, "q c"]:
        cosines = self.base.score_space == "cosine"
        return scores.float() * self.readout.scale() if cosines else scores.float()

    def _words(self, gathered: Gathered) -> tuple[Tensor, Tensor, int, int]:
        return gathered.attr, gathered.obj, gathered.n_attrs, gathered.n_objs

    def _fusion(self) -> dict[str, Any]:
        attr, obj = self.tau()
        config = self.config
        return {
            "beta": config.beta,
            "tau_attr": attr,
            "tau_obj": obj,
            "of": config.primitive_score,
        }

    def _under(self, base: Any) -> Config:
        """This configuration with another one of the base."""
        return self.config.model_copy(update={"settings": base.model_dump(mode="json")})

    def _take(self, weights: Mapping[str, Tensor], run: str) -> None:
        """Put the weights of a run into the base, for good."""
        if set(weights) != set(self.base.state_dict()):
            raise ConfigError(
                f"eva_head takes the weights of {run}, but its context does not hold them; make it with "
                "Head.prepare(config, context, cache)"
            )
        self.base.load_state_dict(weights)
        self.base.requires_grad_(requires_grad=False)
        self.base.eval()


def _is_directory(base: str) -> bool:
    """Is it where a run lies, and not the name of a method?"""
    known = plugins.names("heads.methods")
    return base not in known and ("/" in base or Path(base).is_dir())


def _base_of(config: Config) -> tuple[type[contract.Head], Any, Training]:
    """Head and configuration of the base, and how it is trained here; a run is finished."""
    module = load_method(config.base)
    settings = parse(module.Config, config.settings, "head.settings")
    finished = config.run is not None
    return module.Head, settings, "none" if finished else module.Head.trained_by(settings)


def _with_weights(head: contract.Head, context: Context) -> Context:
    """`context` with the tables of a head, and what these and all else became in it."""
    weights = {f"{WEIGHTS}{k}": v.detach().cpu() for k, v in head.state_dict().items()}
    return replace(context, tables={**head.context.tables, **weights})


def _check_run(found: contract.Head, config: Config, context: Context) -> None:
    """`CheckpointMismatch` unless a run is what the configuration says, and knows the words of the task."""
    method, settings = checkpoint.method_name(found), found.config.model_dump(mode="json")
    if (method, settings) != (config.base, config.settings):
        raise CheckpointMismatch(
            f"{config.run} holds a {method} of other settings than head.base and head.settings say; give the directory "
            "itself as head.base, and leave head.settings and head.run out"
        )
    needs = found.needs(found.config)
    mine, theirs = ((c.attrs, c.objs) for c in (found.context, context))
    if (needs.live or not needs.candidates) and mine != theirs:
        raise CheckpointMismatch(
            f"the {method} of {config.run} knows {len(mine[0])} attrs × {len(mine[1])} objs of its training data by "
            f"number, but this task has {len(theirs[0])} × {len(theirs[1])} with other names; take a run of this task"
        )
