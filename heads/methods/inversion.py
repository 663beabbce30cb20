"""Inversion networks: a picture becomes a word of the text tower, and the word joins an edit in a composed query.

Paper:      Pic2Word, arXiv 2302.03084 (CVPR 2023); SEARLE, 2303.15247 (ICCV 2023); LinCIR, 2312.01998 (CVPR 2024);
            Context-I2W, 2309.16137 (AAAI 2024).
Reference:  google-research/composed_image_retrieval, miccunifi/SEARLE, navervision/lincir, Pter61/context-i2w.   (read
            for facts, not copied)
Symbols:    φ → `phi`, f (un-normalised pooled image) → S* = φ(f), "a photo of $ that …" → `template`, u·n (the noise of
            LinCIR) → `uniform_gaussian`, s of Pic2Word's loss → the readout's logit scale, frozen.
Differs:    searle learns from 1 − cos(E_T("a photo of S*"), f), or with `oti` distils words found picture by picture,
            without the paper's phrases; spans of lincir are runs of adjectives and nouns that our lexicon knows, where
            the paper has a tagger; context_i2w is a reconstruction; the best weights are those of the best recall@1 on
            val.
Mode, cost: cached images, or cached captions (lincir), + live text tower: one pass of short texts a step.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from cache_builder import FeatureCache
from cache_builder.reading import read
from heads.base import Context, EmbeddingHead, Needs, Training
from heads.blocks.inversion import Kind, uniform_gaussian
from heads.blocks.inversion_targets import distillation, invert
from heads.blocks.phi import MAY_LACK, TEMPLATES, Phi, with_weights
from heads.blocks.pseudo_words import Pieces, PseudoWords, TextConfig, pieces_of
from heads.blocks.readout import Readout
from heads.features import Batch, Features
from heads.live import LiveBackbone
from heads.losses import contrastive, products
from heads.strings import STREAM, unpack

PHOTO = "a photo of $"
"""What a picture alone is written as in training (released code of Pic2Word and SEARLE)."""

TARGET = "target/word"
"""Stream of the words that SEARLE's network learns to give."""


class Config(TextConfig):
    """Provenance in brackets: P paper, C code, O our choice."""

    kind: Kind = Field(
        default="pic2word",
        description="pic2word, searle: from pictures; lincir: from captions alone; context_i2w: from pictures with "
        "captions, reading patches",
    )
    weights: Path | None = Field(
        default=None,
        description="file of weights that were published for the cache's backbone; none: train (see `kind`)",
    )
    noise: bool = Field(
        default=True,
        description="lincir: move each caption by u·n, u~U(0,1), n~N(0,I), before φ (P)",
    )
    oti: bool = Field(
        default=False,
        description="searle: first find a word for every picture, by 350 steps through the tower, then learn to give "
        "it (C); False: learn from the pictures directly (O)",
    )
    normalise_input: bool = Field(
        default=False, description="φ reads unit vectors; False: pooled ones as they are (C)"
    )


class Head(EmbeddingHead):
    """score = cos(E_T(template with φ(f) and the modification), gallery image)."""

    score_space = "cosine"
    tasks = frozenset({"composed"})

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        self.phi = Phi(config.kind, context)
        self.readout = Readout(context.readout)
        self.live = LiveBackbone(context, "inversion")
        self.texts = PseudoWords(self.live, chunk=config.chunk, recompute=config.recompute)
        self.template = config.template or TEMPLATES[config.kind]

    @classmethod
    def needs(cls, config: Any) -> Needs:
        """What φ reads of the reference, the modification's text, and pooled images of the gallery."""
        queries = Phi.streams(config.kind) | {STREAM}
        return Needs(queries, frozenset({"image/pooled"}), MAY_LACK, live=frozenset({"text"}))

    @classmethod
    def training_needs(cls, config: Any) -> Needs:
        """Pictures; captions; or pictures with captions."""
        live = frozenset({"text"})
        if config.kind == "lincir":
            return Needs(frozenset(), frozenset({"text/pooled", STREAM}), live=live)
        if config.kind == "context_i2w":
            images = Phi.streams(config.kind) - {"text/pooled"}
            return Needs(images | {"image/pooled"}, frozenset({STREAM}), MAY_LACK, live=live)
        return Needs(frozenset({"image/pooled"}), frozenset({"image/pooled"}), live=live)

    @classmethod
    def learns_from(cls, config: Any) -> str:
        """Pictures of any task, or the captions of retrieval."""
        return "retrieval" if config.kind in ("lincir", "context_i2w") else "images"

    @classmethod
    def trained_by(cls, config: Any) -> Training:
        """By nothing where weights are given."""
        return "gradient" if config.weights is None else "none"

    @classmethod
    def prepare(cls, config: Any, context: Context, cache: FeatureCache) -> Context:
        """`context` with published weights, where there are some."""
        if config.weights is None:
            return context
        return with_weights(context, config.weights, config.kind)

    def embed_queries(self, queries: Features) -> Float[Tensor, "q d"]:
        """Unit embeddings of the composed texts, in float32."""
        said = [pieces_of(self.template, text) for text in unpack(queries[STREAM])]
        return self._embedded(self._words(queries), said)

    def embed_candidates(self, candidates: Features) -> Float[Tensor, "c d"]:
        """Unit image embeddings."""
        return F.normalize(candidates["image/pooled"].float(), dim=-1)

    def before_training(self, examples: Iterable[Features]) -> Mapping[str, Tensor]:
        """SEARLE's targets: a word for every picture whose "a photo of …" means it."""
        if not (self.config.kind == "searle" and self.config.oti):
            return {}
        found = [
            invert(
                lambda v: self.texts.encode(v, [pieces_of(PHOTO)] * len(v)),
                some["image/pooled"].float(),
                self.phi.width,
            )
            for some in examples
        ]
        return {TARGET: torch.cat(found)}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the kind: see the module's text."""
        match self.config.kind:
            case "lincir":
                return self._from_captions(batch.candidates), {}
            case "context_i2w":
                return self._in_context(batch)
            case kind:
                words = self._words(batch.queries)
                if TARGET in batch.queries.streams:
                    return distillation(words, batch.queries[TARGET])
                text = self._photo(words)
                image = F.normalize(batch.candidates["image/pooled"].float(), dim=-1)
                if kind == "searle":
                    return (1 - (text * image[batch.target]).sum(-1)).mean(), {}
                return contrastive(self.readout.scale() * products(text, image), batch)

    def noticed(self) -> set[str]:
        """Texts that did not fit."""
        return self.texts.cut

    def remarks(self) -> Mapping[str, Any]:
        """Texts that did not fit."""
        return {"texts cut": len(self.texts.cut)}

    def _words(self, queries: Features) -> Float[Tensor, "b v"]:
        def given(f: Tensor) -> Tensor:
            return F.normalize(f, dim=-1) if self.config.normalise_input else f

        return self.phi(queries, given)

    def _embedded(self, words: Tensor, said: list[Pieces]) -> Float[Tensor, "b d"]:
        return F.normalize(self.texts.encode(words, said).float(), dim=-1)

    def _photo(self, words: Tensor) -> Float[Tensor, "b d"]:
        return self._embedded(words, [pieces_of(PHOTO)] * len(words))

    def _from_captions(self, captions: Features) -> Tensor:
        """LinCIR: a caption whose adjectives and nouns are pseudo-words made of itself shall mean the same."""
        pooled = captions["text/pooled"].float()
        words = self.phi.net(
            uniform_gaussian(pooled) if self.config.noise and self.training else pooled
        )
        said = [keyword_pieces(text) for text in unpack(captions[STREAM])]
        replaced = [i for i, pieces in enumerate(said) if len(pieces) > 1]
        if not replaced:
            return 0.0 * words.sum()
        text = self.texts.encode(words[replaced], [said[i] for i in replaced]).float()
        return (text - pooled[replaced]).square().sum() / pooled.numel()

    def _in_context(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Context-I2W: the caption without its objects says where to look; the word shall mean the picture."""
        said = [(without_objects(text),) for text in unpack(batch.candidates[STREAM])]
        n = len(batch.target)
        with torch.no_grad():
            nothing = batch.queries["image/pooled"].new_zeros(len(said), self.phi.width)
            context = self.texts.encode(nothing, said).float()[batch.target]
        queries = Features({**batch.queries.streams, "text/pooled": context})
        text = self._photo(self._words(queries))
        image = F.normalize(batch.queries["image/pooled"].float(), dim=-1)
        scores = self.readout.scale() * products(text, image)
        target = torch.arange(n, device=text.device)
        hit = (scores.argmax(1) == target).float().mean()
        loss = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
        return loss, {"batch_accuracy": hit}


def keyword_pieces(caption: str) -> Pieces:
    """A caption around its runs of adjectives and nouns.

    >>> keyword_pieces("a red ball left of two wooden chairs")
    ('a', 'left of two', '')
    """
    pieces, start, run = [], 0, False
    for piece in read(caption).pieces:
        word = piece.of("adjective") or piece.of("noun")
        if word and not run:
            pieces.append(caption[start : piece.start].strip())
        if word:
            start = piece.stop
        run = word
    return (*pieces, caption[start:].strip())


def without_objects(caption: str) -> str:
    """A caption without its nouns.

    >>> without_objects("a red ball left of two wooden chairs")
    'a red left of two wooden'
    """
    left = caption
    for piece in reversed(read(caption).pieces):
        if piece.of("noun"):
            left = f"{left[: piece.start]} {left[piece.stop :]}"
    return " ".join(left.split())
