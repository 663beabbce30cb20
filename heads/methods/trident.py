"""TRIDENT: slots of patches and of a global vector, disentangled over image triplets, against smoothed word targets.

Paper:      "Leveraging MLLM Embeddings and Attribute Smoothing for Compositional Zero-Shot Learning", arXiv 2411.12584
            (IJCAI 2025), section 3.
Reference:  xud-yan/Trident (read for its constants, not copied). None of its published figures is claimed here.
Symbols:    p, q → `n_local`, `n_global`; α → `smoothing`; g → `image/prefix` row 0; X → `image/patches`; word vectors →
            `word/states`; F → slots [local ; global]; sh, ex → `Disentangled`; v → `embed_queries`.
Differs:    gates are trained (the release never registers them; `train_gates=false` freezes them as drawn, and saves
            them). GELU in the projector, as LLaVA-1.5 has it. Attributes, objects and auxiliary words have rows of
            their own by (role, word); an auxiliary word that is an attribute of the task is that attribute. The images
            of a triplet share one batch norm. Without an LLM's words, auxiliary attributes are the nearest ones of the
            vocabulary (`auxiliary="nearest"`, a lexical stand-in). Backbones without a projector: patches and prefix
            go through the backbone's final norm, and the convolution reads them as they are; `global_stream="pooled"`
            where there is no class token (SigLIP2, PE). Widths follow the global vector: 1024 for LLaVA-1.5.
Mode, cost: cache-only; for LLaVA-1.5-7B 25.2 M parameters + 4096 a word; 8.4 M multiply-adds a patch (see blocks/
            aggregation.py), 9.7 GFLOP an image of 576 patches forward.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from cache_builder import FeatureCache
from heads import losses
from heads.base import Context, EmbeddingHead, HeadConfig, Needs
from heads.blocks.aggregation import (
    Aggregation,
    ConditionMasks,
    Disentangled,
    Disentangler,
    Projection,
    pool_grid,
)
from heads.blocks.readout import Readout
from heads.blocks.words import WordEmbedder
from heads.errors import ConfigError, MissingStream
from heads.features import Batch, Features
from heads.maps import Maps
from heads.words import K_AUXILIARY, word_tables


class Config(HeadConfig):
    """Provenance in brackets: P paper, C authors' released code, T third-party notes, O our choice."""

    n_local: int = Field(
        default=12,
        ge=0,
        description="local slots; MIT-States 12, C-GQA 4 (C); 0: none, and no patch is read, an ablation (O)",
    )
    n_global: int = Field(default=6, ge=1, description="global slots; MIT-States 6, C-GQA 2 (C)")
    smoothing: float = Field(
        default=0.09,
        ge=0,
        lt=1,
        description="probability that the auxiliary attributes of an image's pair take from the true one; MIT-States "
        "0.09, C-GQA and VAW-CZSL 0.03 (C)",
    )
    auxiliary: str = Field(
        default="nearest",
        description="auxiliary attributes of the train pairs: a file that `headstart words` made from a language "
        "model's answers (P); nearest: the three attributes of closest word vectors, a lexical stand-in; none (O)",
    )
    words: Literal["llava", "clip_text", "glove"] = Field(
        default="llava",
        description="word vectors: word/states of a LLaVA (P), text/pooled of the bare word, or GloVe",
    )
    glove: str | None = Field(
        default=None, description="file of GloVe vectors, one word a line; for words=glove (O)"
    )
    global_stream: Literal["prefix", "pooled"] = Field(
        default="prefix",
        description="global vector: image/prefix row 0, the class token (P), or image/pooled, where the backbone has "
        "none or does not pool by it (O)",
    )
    train_gates: bool = Field(
        default=True, description="train the gates of the patches; the release does not (O)"
    )
    gate: Literal["sigmoid", "relu"] = Field(
        default="sigmoid", description="weight of a patch in a slot: sigmoid (C), relu (T)"
    )
    mask: Literal["relu", "softplus", "ones"] = Field(
        default="relu",
        description="condition masks: relu (C) kills half of the entries for good, softplus none; ones: no mask (O)",
    )
    projector_activation: Literal["gelu", "relu"] = Field(
        default="gelu",
        description="inside LLaVA's projector: gelu, as it was trained (O), or relu (C)",
    )
    pool_patches: bool = Field(
        default=False, description="average the patches 2×2 first: a quarter of the cost (O)"
    )
    weight_ortho: float = Field(default=0.1, ge=0, description="weight of orthogonality (C)")
    weight_disentangle: float = Field(
        default=0.25, ge=0, description="weight of the disentangling loss (C)"
    )
    temperature: float = Field(default=0.05, gt=0, description="cosines are divided by it (C)")
    dropout: float = Field(
        default=0.3,
        ge=0,
        lt=1,
        description="probability that a channel of all patches is dropped (C)",
    )
    word_dropout: float = Field(
        default=0.05, ge=0, lt=1, description="probability, in the word network and on pairs (C)"
    )
    words_lr: float = Field(
        default=0.0075,
        gt=0,
        description="learning rate of the word vectors as a share of train.lr: 1.5e-6 of 2e-4 (C)",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if (self.words == "glove") != (self.glove is not None):
            raise ValueError(
                f"glove names the file of words=glove, and belongs to nothing else; words is {self.words!r} and glove "
                f"{self.glove!r}"
            )
        if self.pool_patches and not self.n_local:
            raise ValueError("pool_patches averages patches, but with n_local 0 none are read")
        return self


class Head(EmbeddingHead):
    """cos(v, t): an image's mean slots against a pair's words. Disentangling happens in training only."""

    score_space = "cosine"
    tasks = frozenset({"czsl"})

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        if "words" not in context.tables:
            raise ConfigError(
                "trident starts from word vectors, which Head.prepare(config, context, cache) puts into the context; "
                "`headstart train` and heads.runs.train_run call it"
            )
        self.readout = Readout(context.readout)
        stream = f"image/{config.global_stream}"
        width = context.shapes[stream][-1]
        self.local = self._aggregation(width) if config.n_local else None
        self.masks = ConditionMasks(config.n_global, width, config.mask)
        self.image = nn.Linear((1 if self.local is None else 2) * width, width)
        self.pair = nn.Linear(2 * width, width)
        self.pair_dropout = nn.Dropout(config.word_dropout)
        table = context.tables["words"]
        self.words = WordEmbedder(table, 2 * width, width, config.word_dropout)
        self.disentangler = Disentangler(width)
        self.register_buffer("auxiliary", context.tables["auxiliary"].clone())

    @classmethod
    def needs(cls, config: Any) -> Needs:
        """Patches and a global vector; of candidates the labels alone; a partner of each kind to train."""
        patches = {"image/patches"} if config.n_local else set()
        return Needs(
            frozenset({f"image/{config.global_stream}", *patches}),
            frozenset(),
            partners=frozenset({"same_attr", "same_obj"}),
        )

    @classmethod
    def prepare(cls, config: Any, context: Context, cache: FeatureCache) -> Context:
        """The word vectors, and the auxiliary attributes of every train pair.

        Raises:
            MissingStream: the global vector would be row 0 of a backbone that pools by attention, where no row is the
                class token; or word vectors are missing.
        """
        if config.global_stream == "prefix" and Readout(context.readout).pools_all_rows():
            raise MissingStream(
                f"trident reads the class token, row 0 of image/prefix, as its global vector, and {cache.place} is of "
                "a backbone that pools all rows by attention: choose head.global_stream=pooled"
            )
        chosen = config.model_dump(include={"words", "glove", "auxiliary"})
        return word_tables(context, cache, **chosen)

    @classmethod
    def miniature(cls, config: Any, context: Context) -> Context:
        """Random vectors of the vocabulary and two more words, which are auxiliary to every other pair."""
        n_attrs, n_objs = len(context.attrs), len(context.objs)
        pairs = torch.cartesian_prod(torch.arange(n_attrs), torch.arange(n_objs))[::2]
        others = torch.tensor([n_attrs + n_objs, n_attrs + n_objs + 1, 0]).expand(len(pairs), -1)
        vectors = torch.randn(n_attrs + n_objs + 2, 11, generator=torch.Generator().manual_seed(9))
        tables = {"words": vectors, "auxiliary": torch.cat([pairs, others], dim=1)}
        return replace(context, tables=tables)

    def lr_shares(self) -> dict[str, float]:
        """Word vectors barely move."""
        return {"words.table": self.config.words_lr}

    def embed_queries(self, queries: Features) -> Float[Tensor, "q d"]:
        """Unit image vectors."""
        return F.normalize(self._embed(self._slots(queries)).float(), dim=-1)

    def embed_candidates(self, candidates: Features) -> Float[Tensor, "c d"]:
        """Unit pair vectors, from the candidates' labels alone."""
        return self._pairs(self.words(), candidates)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """L = comp + w_ortho · ortho + w_dis · dis, over a main image and its two partners.

        Without a partner an arbitrary image stands in: it is classified and kept orthogonal, and has no part in
        disentangling.
        """
        partners = [batch.partners[kind] for kind in ("same_attr", "same_obj")]
        images = [batch.queries, *(partner.features for partner in partners)]
        kinds = self._slots(_joined(images))
        words = self.words()

        vectors = F.normalize(self._embed(kinds).float(), dim=-1)
        target = torch.cat([batch.target, *(partner.target for partner in partners)])
        with torch.autocast(vectors.device.type, enabled=False):
            logits = vectors @ self._pairs(words, batch.candidates).T / self.config.temperature
            comp = F.cross_entropy(logits, target)
            # Three images of one size each: the mean over all of them is the mean of the six terms.
            ortho = torch.stack([losses.orthogonality(slots) for slots in kinds]).mean()
        slots = torch.cat(kinds, dim=1).chunk(3)
        terms: list[Tensor] = []
        for kind, partner, theirs in zip(("attr", "obj"), partners, slots[1:], strict=True):
            found = self.disentangler(slots[0], theirs)
            labels = (batch.queries.labels, partner.features.labels)
            targets = self._targets(kind, *labels, n=len(words))
            terms += [
                losses.masked_cross_entropy(self._classify(feature, words), wanted, partner.valid)
                for feature, wanted in zip(found, targets, strict=True)
            ]
        dis = torch.stack(terms).mean()
        loss = comp + self.config.weight_ortho * ortho + self.config.weight_disentangle * dis
        named = {"comp_loss": comp, "ortho_loss": ortho, "dis_loss": dis}
        valid = torch.stack([partner.valid for partner in partners]).float().mean()
        return loss, {**{k: v.detach() for k, v in named.items()}, "with_partner": valid}

    def maps(self, query: Features, candidate: Features) -> Maps:
        """The gates of every local slot over the patches, and the condition masks; the text plays no part."""
        n, masks = self.config.n_local, self.masks.values().detach()
        if not n and not len(masks):
            raise ConfigError(
                "trident draws the gates of its local slots and its condition masks, and this head has neither "
                "(n_local=0, mask='ones'), so there is nothing to draw; train one with local slots or with masks"
            )
        if self.local is None:
            gates = masks.new_empty(0, 0)  # no patch is read, and there need not be any
        else:
            patches = self.readout.norm("image", query["image/patches"])
            gates = self.local.weights(pool_grid(patches) if self.config.pool_patches else patches)[
                0
            ]
        return Maps(
            gates,
            tuple(f"slot {i + 1}" for i in range(n)),
            f"how far the {self.config.gate} gate of each local slot lets a patch through; a slot is the mean of all "
            "patches, each times its gate. The text plays no part",
            {f"mask {i + 1}": mask for i, mask in enumerate(masks)},
            f"condition masks: what every channel of the global vector is multiplied by, the same for every picture; "
            f"{self.config.mask} of what was trained, so that 0 closes a channel",
        )

    def _aggregation(self, width: int) -> Aggregation:
        """What makes local slots."""
        n_patches, patch_width = self.context.shapes["image/patches"]
        config = self.config
        if config.pool_patches:
            _check_grid(n_patches)
        projection = Projection(
            self.readout, patch_width, width, activation=config.projector_activation
        )
        chosen = config.model_dump(include={"gate", "train_gates", "dropout"})
        return Aggregation(projection, config.n_local, **chosen)

    def _slots(self, images: Features) -> tuple[Tensor, ...]:
        """Local (B, n_local, w), if there are any, and global slots (B, n_global, w)."""
        if self.config.global_stream == "prefix":
            vector = self.readout.norm("image", images["image/prefix"][:, 0])
        else:
            vector = images["image/pooled"]
        whole = self.masks(vector)
        return (whole,) if self.local is None else (self._local(self.local, images), whole)

    def _local(self, aggregation: Aggregation, images: Features) -> Tensor:
        patches = self.readout.norm("image", images["image/patches"])
        mask = images.streams.get("image/mask")
        if self.config.pool_patches:
            if mask is not None:
                raise ConfigError(
                    "pool_patches needs one square grid, but these pictures keep their shapes; set "
                    "head.pool_patches=false"
                )
            patches = pool_grid(patches)
        return aggregation(patches, mask)

    def _embed(self, kinds: tuple[Tensor, ...]) -> Tensor:
        """Image vectors W [mean l ; mean g], or W mean g where there are no local slots."""
        return self.image(torch.cat([slots.mean(1) for slots in kinds], dim=-1))

    def _pairs(self, words: Tensor, candidates: Features) -> Tensor:
        """Unit t_(a,o) = W Dropout [e_o ; e_a]."""
        attr, obj = candidates.labels["attr"], candidates.labels["obj"] + len(self.context.attrs)
        joined = self.pair_dropout(torch.cat([words[obj], words[attr]], dim=-1))
        return F.normalize(self.pair(joined).float(), dim=-1)

    def _classify(self, feature: Tensor, words: Tensor) -> Tensor:
        """Logits over the whole vocabulary: attributes, objects, auxiliary words."""
        with torch.autocast(feature.device.type, enabled=False):
            cosine = F.normalize(feature.float(), dim=-1) @ F.normalize(words.float(), dim=-1).T
            return cosine / self.config.temperature

    def _targets(self, kind: str, main: Any, partner: Any, n: int) -> Disentangled:
        """Target distributions of what is shared and what is not; an image's own attribute is smoothed."""

        def attr(labels: Any, share: float) -> Tensor:
            return losses.smoothed(labels["attr"], self._others(labels), share, n)

        def obj(labels: Any) -> Tensor:
            return F.one_hot(labels["obj"] + len(self.context.attrs), n).float()

        share = self.config.smoothing
        if kind == "attr":
            return Disentangled(
                attr(main, 0.0), attr(main, share), attr(partner, share), obj(main), obj(partner)
            )
        return Disentangled(
            obj(main), obj(main), obj(main), attr(main, share), attr(partner, share)
        )

    def _others(self, labels: Any) -> Int[Tensor, "b k"]:
        """Rows of the auxiliary words of images' pairs, -1 where there is none."""
        known = self.get_buffer("auxiliary")
        size = (len(self.context.attrs), len(self.context.objs), K_AUXILIARY)
        table = known.new_full(size, -1)
        table[known[:, 0], known[:, 1]] = known[:, 2:]
        return table[labels["attr"], labels["obj"]]


def _joined(images: list[Features]) -> Features:
    """Rows of several images one after the other; ragged patches are padded to the longest."""

    def padded(name: str, value: Tensor) -> Tensor:
        longest = max(one[name].shape[1] for one in images)
        missing = longest - value.shape[1] if name in ("image/patches", "image/mask") else 0
        return F.pad(value, (*(0, 0) * (value.ndim - 2), 0, missing)) if missing else value

    streams = images[0].streams
    return Features(
        {name: torch.cat([padded(name, one.streams[name]) for one in images]) for name in streams}
    )


def _check_grid(n: int) -> None:
    side = round(n**0.5)
    if side**2 != n or side % 2:
        raise ConfigError(
            f"pool_patches averages 2 × 2 of a square grid with an even side, but there are {n} patches; set "
            "head.pool_patches=false"
        )
