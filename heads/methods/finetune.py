"""Fine-tuning of a dual encoder: all its weights, low-rank updates (LoRA), or bottleneck adapters; the usual baselines.

Paper:      full: NegCLIP, arXiv 2210.01936 (ICLR 2023), and BiVLC, arXiv 2406.09952; lora: arXiv 2106.09685 (ICLR
            2022); bottleneck: arXiv 1902.00751 (ICML 2019), placed as in Troika, arXiv 2303.15230 (CVPR 2024).
Reference:  IMirandaM/BiVLC, bighuang624/Troika.   (read, not copied)
Symbols:    W → `Copy`; W + (α/r) B A → `LoRA`, both of heads/blocks/lora.py; up(relu(down u)) → `Bottleneck` of
            heads/blocks/adapters.py; score = s·cos(pooled) → forward.
Differs:    LoRA stands in for weights instead of replacing modules, so that it also updates q and v alone where the
            library fuses them; bottlenecks read the residual stream; splits are by image, not by caption.
Mode, cost: both towers live, from stored pixels; trained at L/14: full 428 M, lora 2.16 M (R 16, q and v), bottleneck
            6.34 M (image tower); a step runs the images and all texts of the batch, forward and backward.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from heads import losses
from heads.base import Context, EmbeddingHead, HeadConfig, Needs
from heads.blocks.adapters import Beside, Bottleneck, Part, last_blocks
from heads.blocks.lora import LINEAR, QUERY_VALUE, Copy, LoRA, used_by
from heads.blocks.prompts import TEMPLATES, SoftPrompts
from heads.blocks.readout import Readout, temperature
from heads.blocks.recompute import in_parts
from heads.errors import ConfigError
from heads.features import Batch, Features
from heads.live import LiveBackbone, OpenBackbone
from heads.strings import STREAM, unpack

PARTS: tuple[Part, Part] = ("attention", "feed_forward")

Side = Literal["image", "text"]


class Config(HeadConfig):
    """Provenance in brackets: P paper, C code, O our choice."""

    kind: Literal["full", "lora", "bottleneck"] = Field(
        default="full",
        description="what is trained: all weights and the scale (C), low-rank updates of linear weights (P), or "
        "adapters beside attention and feed-forward part (P)",
    )
    towers: tuple[Side, ...] = Field(
        default=("image", "text"),
        description="towers that are trained; the bottlenecks of Troika stand in the image tower alone (C)",
    )
    blocks: Literal["all"] | int = Field(
        default="all", description="bottleneck: blocks with adapters, the last n or all (C)"
    )
    rank: int = Field(default=16, ge=1, description="lora: R (O)")
    alpha: float = Field(
        default=16.0, gt=0, description="lora: updates are scaled by alpha / R (O)"
    )
    targets: Literal["qv", "linear"] = Field(
        default="qv",
        description="lora: queries and values of attention (P), or all linear maps of the blocks (O)",
    )
    width: int = Field(default=64, ge=1, description="bottleneck: its width (C)")
    scale: float = Field(default=0.1, gt=0, description="bottleneck: factor on what is added (C)")
    adapter_dropout: float = Field(
        default=0.1, ge=0, lt=1, description="bottleneck: probability, inside (C)"
    )
    prompts: Literal["text", "soft"] = Field(
        default="text",
        description="texts as the data set has them, or soft prompts of attr and obj, for czsl (C)",
    )
    learn_context: bool = Field(
        default=False, description="soft: train the words 'a photo of' too (C)"
    )
    dropout: float = Field(
        default=0.3, ge=0, lt=1, description="soft: probability, on the learned words (C)"
    )
    context_length: int | None = Field(
        default=None,
        ge=1,
        description="soft: rows of a prompt; none: 8, or as many as tower and prompt need (O)",
    )
    name_preset: Literal["csp", "short"] = Field(
        default="csp",
        description="soft: how names are spelt: lower case with '.' as a blank, or UT-Zappos' short names (O)",
    )
    parity_train_mode: bool = Field(
        default=False,
        description="no dropout from the second epoch on, as the release of Troika has it by its order of calls (C)",
    )
    chunk: int = Field(
        default=512,
        ge=1,
        description="texts in the tower at once; more are recomputed in the backward pass to bound memory (O)",
    )
    image_chunk: int = Field(
        default=64, ge=1, description="images in the tower at once, likewise (O)"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if not self.towers or len(set(self.towers)) != len(self.towers):
            raise ValueError(f"towers are image, text or both, not {list(self.towers)}")
        return self


class Head(EmbeddingHead):
    """score = s · cos(image, text) + bias, by towers that are trained."""

    score_space = "logit"

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        self.readout = Readout(context.readout)
        backbone = LiveBackbone(context, "finetune").on("cpu")
        self.trained: Any = nn.ModuleDict(
            {side: self._trained(backbone, side) for side in config.towers}
        )
        self.images = self._live("image")
        self.texts = self._live("text")
        if config.kind == "full":
            self.log_scale = nn.Parameter(self.readout.scale().log())
        if config.prompts == "soft":
            self.prompts = SoftPrompts(
                self.texts,
                context.attrs,
                context.objs,
                templates={"pair": TEMPLATES["pair"]},
                preset=config.name_preset,
                learn_context=config.learn_context,
                dropout=config.dropout,
                length=config.context_length,
                chunk=config.chunk,
            )
        if config.parity_train_mode:
            self.register_buffer("trained_before", torch.zeros((), dtype=torch.bool))
            self.register_buffer("stays_off", torch.zeros((), dtype=torch.bool))

    @classmethod
    def needs(cls, config: Any) -> Needs:
        """Pixels, both towers, and what texts say, or the labels of pairs alone."""
        said = frozenset({STREAM} if config.prompts == "text" else ())
        return Needs(frozenset({"image/pixels"}), said, live=frozenset({"image", "text"}))

    def embed_queries(self, queries: Features) -> Float[Tensor, "q d"]:
        """Unit image embeddings times s."""

        def some(levels: Tensor) -> tuple[Tensor]:
            return (self.images.images(levels),)

        (pooled,) = in_parts(some, [queries["image/pixels"]], self.config.image_chunk)
        return self._scale() * F.normalize(pooled.float(), dim=-1)

    def embed_candidates(self, candidates: Features) -> Float[Tensor, "c d"]:
        """Unit text embeddings, in float32."""
        if self.config.prompts == "text":
            pooled = self._pooled(candidates[STREAM])
        elif "attr" in candidates.labels:
            rows = self.prompts.rows("pair", candidates.labels["attr"], candidates.labels["obj"])
            pooled = self.prompts.encode("pair", self.prompts.words(), rows)
        else:
            raise ConfigError(
                "soft prompts are made of attrs and objs, which only czsl has; leave head.prompts at text"
            )
        return F.normalize(pooled.float(), dim=-1)

    def offset(self) -> Tensor | float:
        """The backbone's logit bias."""
        return self.readout.bias()

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Contrastive over the batch and its hard negatives, or over all train pairs (heads/losses.py)."""
        return losses.contrastive(self(batch.queries, batch.candidates), batch)

    def remarks(self) -> dict[str, Any]:
        """The share of the dual encoder that was trained."""
        return {"of the dual encoder": self.images.share(self.n_trained())}

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        """Parameters of the backbone's module as they are now, by name.

        Raises:
            ConfigError: bottlenecks depend on what passes them, and cannot become part of a weight.
        """
        if self.config.kind == "bottleneck":
            raise ConfigError(
                "bottleneck adapters are not linear in what passes them, so they cannot be merged into weights; the "
                "run keeps them beside the backbone (head.kind=lora and full can be merged)"
            )
        model = self.images.on("cpu").model
        found = {n: v for one in self.trained.values() for n, v in one.weights(model).items()}
        scale = {"logit_scale": self._scale().log()} if self.config.kind == "full" else {}
        return {name: value.detach().cpu() for name, value in (found | scale).items()}

    def train(self, mode: bool = True) -> "Head":
        """Training mode; under `parity_train_mode` it is left for good by the first evaluation behind it."""
        if self.config.parity_train_mode:
            self.stays_off |= bool(self.trained_before) and not mode
            self.trained_before |= mode
            mode = mode and not bool(self.stays_off)
        return super().train(mode)

    def _pooled(self, said: Tensor) -> Float[Tensor, "c d"]:
        """Texts by the tower, no longer than the longest of them needs."""
        device = said.device
        backbone = self.texts.on(device)
        ids = backbone.tokenize(unpack(said))
        ids = ids[:, : int(backbone.ends(ids).max()) + 1]

        def some(ids: Tensor) -> tuple[Tensor]:
            return (self.texts.texts(ids, device),)

        return in_parts(some, [ids], self.config.chunk)[0]

    def _scale(self) -> Tensor:
        if self.config.kind == "full":
            return temperature(self.log_scale, float(self.readout.scale()))
        return self.readout.scale()

    def _live(self, side: Side) -> LiveBackbone:
        if side not in self.trained:
            return LiveBackbone(self.context, "finetune")
        found = self.trained[side]
        adapters: Any = found if isinstance(found, nn.ModuleList) else [found]
        return LiveBackbone(self.context, "finetune", [*adapters])

    def _trained(self, backbone: OpenBackbone, side: Side) -> nn.Module:
        """What is trained of a tower."""
        config = self.config
        if config.kind == "bottleneck":
            depth, width = len(backbone.blocks(side)), backbone.spec.dims[f"{side}_width"]
            if config.blocks != "all" and not 1 <= config.blocks <= depth:
                raise ConfigError(
                    f"head.blocks is {config.blocks}, but the {side} tower of {self.context.backbone_name} has "
                    f"{depth}; say fewer, or all"
                )
            sizes = {"scale": config.scale, "dropout": config.adapter_dropout}
            return nn.ModuleList(
                Beside(
                    side,
                    {
                        k: Bottleneck(width, config.width, **sizes)
                        for k in last_blocks(depth, config.blocks)
                    },
                    part=part,
                )
                for part in PARTS
            )
        names = used_by(backbone.model, _small_run(backbone, side))
        if config.kind == "full":
            return Copy(backbone.model, names)
        targets = QUERY_VALUE if config.targets == "qv" else LINEAR
        return LoRA(backbone.model, names, rank=config.rank, alpha=config.alpha, targets=targets)


def _small_run(backbone: OpenBackbone, side: Side) -> Callable[[], Tensor]:
    """One text, or one grey picture, through a tower."""
    if side == "text":
        ids = backbone.tokenize(["a"])
        end = backbone.ends(ids)
        return lambda: backbone.encode_embedded(backbone.embed_tokens(ids), end)["pooled"]
    size = backbone.spec.dims["image_size"]
    grey = torch.full((1, 3, size, size), 127, dtype=torch.uint8)

    def run() -> Tensor:
        states, mask = backbone.embed_pixels(backbone.normalised(grey))
        return backbone.resume_from("image", 0, states, mask=mask)["pooled"]

    return run
