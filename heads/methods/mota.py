"""MoTa-Adapter: small parts around a frozen inversion network and text tower, trained on text-anchored triplets.

Paper:      "Modality and Task Adaptation for Enhanced Zero-shot Composed Image Retrieval", arXiv 2410.23736 v2 (v1 is
            another method).
Reference:  none: a reconstruction. Third-party notes give the order MDM → φ → S* → prompted tower, routed by S*; the
            forms are ours.
Baselines:  rtd, "Reducing Task Discrepancy of Text Encoders for Zero-Shot Composed Image Retrieval", arXiv 2406.09188
            (ICCV 2025): a trained copy of the text tower; lora_text: LoRA on it, with mota's own loss.
Symbols:    γ, β (MDM) → `mdm`; P_e, W_r (MoE-TPT) → `prompts`; S* → `phi`; q0 → stream base/pooled, computed once;
            w_i → `entropy_weights`; τ → `temperature`; β_w → `entropy_weight`.
Differs:    the loss is ours, after the properties that the paper states; how triplets are made: docs/protocols.md.
Mode, cost: cached images and target captions + live text tower, once a step over the modifications.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from cache_builder import FeatureCache
from heads.base import Context, EmbeddingHead, Needs, Training
from heads.blocks.inversion import Kind, uniform_gaussian
from heads.blocks.lora import Copy, LoRA, used_by
from heads.blocks.modulation import Modulation
from heads.blocks.moe import ExpertPrompts, balance
from heads.blocks.phi import MAY_LACK, TEMPLATES, Phi, given_weights, small_weights, with_weights
from heads.blocks.pseudo_words import Pieces, PseudoWords, TextConfig, pieces_of
from heads.errors import ConfigError
from heads.features import Batch, Features
from heads.live import LiveBackbone
from heads.losses import entropy_weights, products, weighted_contrastive
from heads.strings import STREAM, unpack

BASE = "base/pooled"
"""Stream of the queries that φ and the tower make before anything is trained."""


class Config(TextConfig):
    """Provenance in brackets: P paper, C code (of RTD), T third-party notes, O our choice."""

    phi: Path | None = Field(
        default=None,
        description="the trained inversion network: a run of `inversion`, or a published file; needed to train",
    )
    phi_kind: Kind | None = Field(
        default=None,
        description="what φ is, where its files do not say it (SEARLE's and LinCIR's look alike), or it is context_i2w",
    )
    mdm: Literal["diag", "full", "none"] = Field(
        default="diag", description="modulation of φ's input: γ⊙f + β, Γf + β, or none (O)"
    )
    n_prompts: int = Field(
        default=4, ge=0, description="prompts before each block of the text tower; 0: none (O)"
    )
    n_experts: int = Field(
        default=4, ge=1, description="sets of prompts, mixed by a router; 1: plain deep prompts (O)"
    )
    depth: int | None = Field(
        default=None, ge=1, description="blocks that get prompts of their own; none: all (O)"
    )
    router: Literal["pseudo_word", "eos", "both"] = Field(
        default="pseudo_word",
        description="state that the router reads: at S* (T), at the end of text, or both; in a causal tower S* cannot "
        "see the modification",
    )
    top_k: int | None = Field(
        default=None, ge=1, description="experts kept for each text; none: all, weighed (O)"
    )
    router_temperature: float = Field(default=1.0, gt=0, description="τ_r of the router (O)")
    balance: float = Field(
        default=0.0, ge=0, description="weight of the loss that spreads texts over experts (O)"
    )
    entropy_weight: float = Field(
        default=1.0,
        ge=0,
        description="β_w: how much more a triplet weighs that the base model is unsure of; 0: all alike (O)",
    )
    temperature: float = Field(default=0.07, gt=0, description="τ of the loss (C)")
    baseline: Literal["none", "rtd", "lora_text"] = Field(
        default="none",
        description="in place of all above but φ: rtd trains a copy of the text tower from captions alone (needs "
        "train.negatives=text); lora_text trains low-rank updates of it",
    )
    rank: int = Field(default=8, ge=1, description="lora_text: rank of the updates (O)")
    noise: float = Field(
        default=0.5, ge=0, description="rtd: scale of the noise u·n on reference captions (C)"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.baseline == "rtd" and self.phi_kind == "context_i2w":
            raise ValueError("rtd makes words of captions, and context_i2w of pictures alone")
        return self

    @property
    def prompted(self) -> bool:
        """Are there prompts?"""
        return self.baseline == "none" and self.n_prompts > 0

    @property
    def modulated(self) -> bool:
        """Is there a modulation?"""
        return self.baseline == "none" and self.mdm != "none"


class Head(EmbeddingHead):
    """score = cos(prompted tower's "a photo of φ(MDM(f)) that …", gallery image); the gallery is as it was cached."""

    score_space = "cosine"
    tasks = frozenset({"composed"})

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        given = given_weights(context)
        if given is None:
            raise ConfigError(
                "mota adapts a trained inversion network; name its run: --set head.phi=RUN (headstart train inversion)"
            )
        self.phi = Phi(given[0], context).eval()
        self.template = config.template or TEMPLATES[given[0]]
        self.live = LiveBackbone(context, "mota")
        if config.modulated:
            assert config.mdm != "none"
            self.mdm = Modulation(config.mdm, self.phi.reads)
        backbone = self.live.on("cpu")
        if config.prompted:
            depth = len(backbone.blocks("text"))
            if (config.depth or 1) > depth:
                raise ConfigError(
                    f"head.depth is {config.depth}, but the text tower has {depth} blocks"
                )
            self.prompts = ExpertPrompts(
                config.n_experts,
                config.n_prompts,
                config.depth or depth,
                self.phi.width,
                router=config.router,
                top_k=config.top_k,
                temperature=config.router_temperature,
            )
        reserve = config.n_prompts if config.prompted else 0
        words = partial(PseudoWords, self.live, chunk=config.chunk, recompute=config.recompute)
        self.texts = words(reserve=reserve)
        self.plain = words() if reserve else self.texts
        if config.baseline != "none":
            word = torch.zeros(1, self.phi.width)
            names = used_by(backbone.model, lambda: self.texts.encode(word, [pieces_of("$")]))
            rtd = config.baseline == "rtd"
            model, rank = backbone.model, config.rank
            self.tower = Copy(model, names) if rtd else LoRA(model, names, rank=rank)

    @classmethod
    def needs(cls, config: Any) -> Needs:
        """What φ reads of the reference, the modification's text, and pooled images of the gallery."""
        queries = Phi.streams(config.phi_kind or "pic2word") | {STREAM}
        return Needs(queries, frozenset({"image/pooled"}), MAY_LACK, live=frozenset({"text"}))

    @classmethod
    def training_needs(cls, config: Any) -> Needs:
        """The same queries, of triplets, and captions; of rtd captions and modifications alone."""
        rtd = config.baseline == "rtd"
        queries = frozenset({STREAM}) if rtd else cls.needs(config).queries
        return Needs(queries, frozenset({"text/pooled"}), MAY_LACK, live=frozenset({"text"}))

    @classmethod
    def learns_from(cls, config: Any) -> str:
        """Text-anchored triplets."""
        return "triplets"

    @classmethod
    def trained_by(cls, config: Any) -> Training:
        """By nothing where all parts are off: that is φ alone, the base of every comparison."""
        trained = config.prompted or config.modulated or config.baseline != "none"
        return "gradient" if trained else "none"

    @classmethod
    def prepare(cls, config: Any, context: Context, cache: FeatureCache) -> Context:
        """`context` with the weights of φ."""
        if config.phi is None:
            raise ConfigError(
                "mota adapts a trained inversion network; name its run, --set head.phi=RUN (headstart train inversion "
                "makes one)"
            )
        context = with_weights(context, config.phi, config.phi_kind)
        found = given_weights(context)
        if found and Phi.streams(found[0]) != Phi.streams(config.phi_kind or "pic2word"):
            raise ConfigError(
                f"the φ of {config.phi} is of kind {found[0]}, which reads other streams; say so: "
                f"--set head.phi_kind={found[0]}"
            )
        return context

    @classmethod
    def miniature(cls, config: Any, context: Context) -> Context:
        """`context` with the weights of a random φ."""
        return small_weights(context, config.phi_kind or "pic2word")

    def embed_queries(self, queries: Features) -> Float[Tensor, "q d"]:
        """Unit embeddings of the composed texts, in float32."""
        return self._embedded(queries)[0]

    def embed_candidates(self, candidates: Features) -> Float[Tensor, "c d"]:
        """Unit embeddings of images, or of the target captions that stand for them in training."""
        stream = "image/pooled" if "image/pooled" in candidates.streams else "text/pooled"
        return F.normalize(candidates[stream].float(), dim=-1)

    def undecayed(self) -> frozenset[str]:
        """The modulation, which starts as the identity and not at 0."""
        return frozenset({"mdm.gain"} if self.config.modulated else ())

    def before_training(self, examples: Iterable[Features]) -> Mapping[str, Tensor]:
        """Queries of φ and the tower as they are, for the entropies."""
        if self.config.baseline == "rtd" or not self.config.entropy_weight:
            return {}
        said = [(self.phi(some), self._pieces(some)) for some in examples]
        return {BASE: torch.cat([self.plain.encode(words, texts).float() for words, texts in said])}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Contrastive over the batch, each triplet weighed by how unsure the base model is of it; rtd: see `_rtd`."""
        if self.config.baseline == "rtd":
            return self._rtd(batch)
        targets = self.embed_candidates(batch.candidates.take(batch.target))
        barred = batch.ignore[:, batch.target]
        weight = torch.ones_like(batch.target, dtype=targets.dtype)
        if BASE in batch.queries.streams:
            base = products(F.normalize(batch.queries[BASE], dim=-1), targets)
            weight = entropy_weights(
                base / self.config.temperature, barred, self.config.entropy_weight
            )
        query, shares = self._embedded(batch.queries)
        scores = products(query, targets) / self.config.temperature
        loss, parts = weighted_contrastive(scores, barred, weight)
        if self.config.balance and shares:
            spread = torch.stack([balance(share) for share in shares]).mean()
            return loss + self.config.balance * spread, {**parts, "balance": spread.detach()}
        return loss, parts

    def noticed(self) -> set[str]:
        """Texts that did not fit."""
        return self.texts.cut

    def remarks(self) -> Mapping[str, Any]:
        """Texts that did not fit, and the share of the dual encoder that was trained."""
        return {
            "of the dual encoder": self.live.share(self.n_trained()),
            "texts cut": len(self.texts.cut),
        }

    def routing(self, queries: Features) -> Float[Tensor, "b k e"] | None:
        """Shares of the experts for each text, by block; None where there is no router."""
        return torch.stack(shares, 1) if (shares := self._embedded(queries)[1]) else None

    def modulate(self, f: Float[Tensor, "*b w"]) -> Float[Tensor, "*b w"]:
        """What φ reads in place of f."""
        return self.mdm(f) if self.config.modulated else f

    def train(self, mode: bool = True) -> "Head":
        """φ is frozen: its dropout stays off."""
        super().train(mode)
        self.phi.eval()
        return self

    def _pieces(self, queries: Features) -> list[Pieces]:
        return [pieces_of(self.template, text) for text in unpack(queries[STREAM])]

    def _embedded(
        self, queries: Features
    ) -> tuple[Float[Tensor, "b d"], list[Float[Tensor, "b e"]]]:
        """Unit composed texts, and the shares of experts at each block, if there are routers."""
        words, said = self.phi(queries, self.modulate), self._pieces(queries)
        if self.config.baseline != "none":
            return self._in_tower(words, said), []
        if not self.config.prompted:
            return F.normalize(self.texts.encode(words, said).float(), dim=-1), []
        pooled, shares = self.texts.prompted(words, said, self.prompts)
        return F.normalize(pooled.float(), dim=-1), shares

    def _in_tower(self, words: Float[Tensor, "b v"], said: list[Pieces]) -> Float[Tensor, "b d"]:
        """Unit texts by the trained tower."""
        weights = self.tower.weights(self.live.on(words.device).model)
        return F.normalize(self.texts.encode(words, said, weights).float(), dim=-1)

    def _rtd(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """RTD: query with target, and the reference's own word with the reference; all others of both are negatives."""
        if not batch.negative.shape[1]:
            raise ConfigError("rtd learns from reference captions too: set train.negatives=text")
        pooled = batch.candidates["text/pooled"].float()
        target, reference = pooled[batch.target], pooled[batch.negative[:, 0]]
        moved = reference + self.config.noise * (uniform_gaussian(reference) - reference)
        words = self.phi.net(moved if self.training else reference)
        said = [*self._pieces(batch.queries), *[pieces_of("a photo of $")] * len(words)]
        query = self._in_tower(torch.cat([words, words]), said)
        right = F.normalize(torch.cat([target, reference]), dim=-1)
        same = (products(right, right) > 1 - 1e-6).fill_diagonal_(fill_value=False)
        scores = products(query, right) / self.config.temperature
        return weighted_contrastive(scores, same, torch.ones_like(scores[:, 0]))
