"""EVA: low-rank experts beside the FFN of every block of both towers, and the variant of a word that an image shows.

Paper:      "Decoupling Primitive with Experts: Dynamic Feature Alignment for Compositional Zero-Shot Learning", ICLR
            2026 (OpenReview hUtTGobe1r); earlier as arXiv 2506.20986.
Reference:  none public; a reconstruction from descriptions of the paper, so no figure made here is the paper's.
Symbols:    E_i, R → `MoELoRA` of heads/blocks/moe.py; f, t_p → `_images`, `gather`; z_a, by maxima over its pairs →
            heads/blocks/primitives.py; v_e, α → `_variants`, `affinity_weight`; λ1, λ2, β → `weight_primitive`,
            `weight_variant`, `beta`; τ_a, τ_o → `log_tau`.
Differs:    rank, dropout, initial values and temperatures are ours; maxima are of cosines (`primitive_score` has the
            other reading); variants are what one expert alone would make of the last block, pooled as the backbone
            pools: of the class token, or (SigLIP2, PE) of all rows. `cut` trains the last blocks from stored states.
Mode, cost: both towers live, from stored pixels (`cut`: from stored states, the last blocks); 10.0 M parameters at
            L/14, R 16 (cut 4: 3.9 M); a step runs the images and all train pairs, forward and backward.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from heads.base import Context, HeadConfig, Needs, SetHead
from heads.blocks.adapters import Beside, Passed, last_blocks
from heads.blocks.moe import MoELoRA, balance, isolation, shared_out
from heads.blocks.primitives import fused, nested_fused, primitive_logits
from heads.blocks.prompts import TEMPLATES, SoftPrompts
from heads.blocks.readout import Readout, temperature
from heads.blocks.recompute import in_parts
from heads.errors import ConfigError
from heads.features import Batch, Features
from heads.live import LiveBackbone
from heads.losses import products
from heads.ranks import n_ranks

PRIMITIVES = ("attr", "obj")

Blocks = Literal["all"] | Annotated[int, Field(ge=0)]


class Config(HeadConfig):
    """Provenance in brackets: T reported of the paper, O our choice."""

    cut: int | None = Field(
        default=None,
        ge=1,
        description="image blocks that are run, the last ones, on the states that enter them (stream "
        "image/block_-<cut>); none: all of them, on pixels (O)",
    )
    image_blocks: Blocks = Field(
        default="all", description="image blocks with experts, the last n or all that are run (T)"
    )
    text_blocks: Blocks = Field(
        default="all",
        description="text blocks with experts, the last n or all (T); 0: soft prompts alone",
    )
    rank: int = Field(default=16, ge=1, description="R of an expert (O)")
    n_experts: int = Field(default=8, ge=1, description="experts that a token chooses among (T)")
    n_shared: int = Field(default=1, ge=0, description="experts that every token passes (T)")
    top_k: int = Field(default=2, ge=1, description="experts a token chooses (T)")
    adapter_input: Literal["residual", "normed"] = Field(
        default="residual",
        description="what experts and routers read: the states before the block's second norm, or behind it (O)",
    )
    adapter_scale: float = Field(default=1.0, gt=0, description="factor on what experts add (O)")
    adapter_dropout: float = Field(
        default=0.1, ge=0, lt=1, description="probability, on the R values inside an expert (O)"
    )
    learn_primitives: bool = Field(default=True, description="train vectors of attrs and objs (T)")
    learn_context: bool = Field(
        default=True, description="train the words 'a photo of', a copy for each template (T)"
    )
    dropout: float = Field(
        default=0.3, ge=0, lt=1, description="probability, on the learned words (O, as in CSP)"
    )
    context_length: int | None = Field(
        default=None,
        ge=1,
        description="rows of a prompt; none: 8, or as many as tower and prompt need (O)",
    )
    name_preset: Literal["csp", "short"] = Field(
        default="csp",
        description="how names are spelt: lower case with '.' as a blank, or UT-Zappos' short names (O)",
    )
    text_to_image: bool = Field(
        default=True,
        description="losses and scores of attrs and objs by maxima over their pairs (T)",
    )
    image_to_text: bool = Field(
        default=True, description="losses of the experts' variants of an image; training alone (T)"
    )
    affinity: Literal["cross", "cross_intra"] = Field(
        default="cross_intra",
        description="what chooses a variant: its cosine with the true word, or also that with the image (T)",
    )
    affinity_weight: float = Field(
        default=1.0, ge=0, description="α, of the cosine with the image (O)"
    )
    primitive_score: Literal["logit", "probability"] = Field(
        default="logit", description="what the maxima are of: s·cos (O), or p(pair) (T, ambiguous)"
    )
    beta: float = Field(default=0.5, ge=0, description="β, of p(attr) + p(obj) in the score (T)")
    weight_primitive: float = Field(
        default=1.0, ge=0, description="λ1, of the losses by maxima; 0.1 on C-GQA (O)"
    )
    weight_variant: float = Field(
        default=0.1, ge=0, description="λ2, of the losses of variants (O)"
    )
    balance: float = Field(
        default=0.0,
        ge=0,
        description="weight of the loss that spreads tokens over experts; reported to do harm (T)",
    )
    isolation: float = Field(
        default=0.0,
        ge=0,
        description="weight of the loss that keeps experts from reading alike; reported to do harm (T; form O)",
    )
    chunk: int = Field(
        default=512,
        ge=1,
        description="prompts in the tower at once; more are recomputed in the backward pass to bound memory (O)",
    )
    image_chunk: int = Field(
        default=64, ge=1, description="images in the tower at once, likewise (O)"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k is {self.top_k}, but there are {self.n_experts} experts")
        if self.cut and self.image_blocks != "all" and self.image_blocks > self.cut:
            raise ValueError(
                f"image_blocks is {self.image_blocks}, but only the last {self.cut} are run: raise cut"
            )
        learned = self.learn_primitives or self.learn_context
        if not learned and self.image_blocks == 0 and self.text_blocks == 0:
            raise ValueError(
                "nothing is left to train: give some blocks experts, or learn the prompts"
            )
        if self.image_to_text and self.image_blocks == 0:
            raise ValueError(
                "image_to_text needs experts in the image tower, and image_blocks is 0; set it to false"
            )
        return self


@dataclass(frozen=True, slots=True)
class Gathered:
    """A candidate set.

    Attributes:
        attr, obj: labels of every candidate.
        text: unit embeddings of their prompts.
    """

    attr: Int[Tensor, " c"]
    obj: Int[Tensor, " c"]
    text: Float[Tensor, "c d"]


class Head(SetHead):
    """score = p(pair) + β·(p(attr) + p(obj)), each a softmax over exactly the candidates given."""

    score_space = "probability"
    tasks = frozenset({"czsl"})

    def __init__(self, config: Config, context: Context) -> None:
        super().__init__(config, context)
        self.readout = Readout(context.readout)
        backbone = LiveBackbone(context, "eva").on("cpu")
        depth = len(backbone.blocks("image"))
        if config.cut and config.cut > depth:
            raise ConfigError(
                f"head.cut is {config.cut}, but the image tower of {context.backbone_name} has {depth} blocks; cut at "
                f"most {depth}"
            )
        self.block = depth - config.cut if config.cut else 0
        self.experts: Any = nn.ModuleDict()
        run = config.cut or "all"
        image: Blocks = run if config.image_blocks == "all" else config.image_blocks
        wanted: dict[str, Blocks] = {"image": image, "text": config.text_blocks}
        for side, blocks in wanted.items():
            depth, width = len(backbone.blocks(side)), backbone.spec.dims[f"{side}_width"]
            if blocks != "all" and blocks > depth:
                raise ConfigError(
                    f"eva wants experts in the last {blocks} {side} blocks, but {context.backbone_name} has {depth}; "
                    f"lower head.{side}_blocks, or say all"
                )
            if blocks:
                self.experts[side] = self._beside(side, last_blocks(depth, blocks), width)
        texts = len(backbone.blocks("text"))
        trained = texts if config.text_blocks == "all" else config.text_blocks
        of = {side: (experts,) for side, experts in self.experts.items()}
        self.images = LiveBackbone(context, "eva", of.get("image", ()))
        self.prompts = SoftPrompts(
            LiveBackbone(context, "eva", of.get("text", ())),
            context.attrs,
            context.objs,
            templates=TEMPLATES if config.image_to_text else {"pair": TEMPLATES["pair"]},
            preset=config.name_preset,
            learn_primitives=config.learn_primitives,
            learn_context=config.learn_context,
            dropout=config.dropout,
            length=config.context_length,
            chunk=config.chunk,
            fixed_blocks=texts - trained,
        )
        if config.text_to_image:
            self.log_tau = nn.Parameter(self.readout.scale().log().repeat(2))

    @classmethod
    def needs(cls, config: Any) -> Needs:
        """Pixels, or the states that enter the last blocks; both towers; of candidates the labels alone."""
        images = f"image/block_-{config.cut}" if config.cut else "image/pixels"
        return Needs(frozenset({images}), frozenset(), live=frozenset({"image", "text"}))

    def gather(self, parts: Iterable[Features]) -> Gathered:
        """Labels and prompts of a candidate set."""
        words, found = self.prompts.words(), list(parts)
        attr, obj = (torch.cat([part.labels[name] for part in found]) for name in PRIMITIVES)
        return Gathered(attr, obj, self._texts("pair", words, attr, obj))

    def first(self, gathered: Gathered, n: int) -> Gathered:
        """The set of its first n candidates alone."""
        return Gathered(gathered.attr[:n], gathered.obj[:n], gathered.text[:n])

    def against(self, queries: Features, gathered: Gathered) -> Float[Tensor, "q c"]:
        """Probabilities."""
        logits = self._logits(self._images(queries)[0], gathered.text)
        if not self.config.text_to_image:
            return logits.softmax(-1)
        return fused(logits, gathered.attr, gathered.obj, *self._sizes(), **self._fusion())

    def nested(
        self, queries: Features, gathered: Gathered, sizes: Sequence[int]
    ) -> Iterator[Float[Tensor, "q n"]]:
        """Probabilities over the first n, from logits that are the same for all n."""
        logits = self._logits(self._images(queries)[0], gathered.text)
        fusion: dict[str, Any] = self._fusion() if self.config.text_to_image else {"beta": 0.0}
        yield from nested_fused(
            logits, gathered.attr, gathered.obj, *self._sizes(), sizes, **fusion
        )

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """L_pair + λ1 (L_attr + L_obj) + λ2 (Lv_attr + Lv_obj), and the regularisers that are asked for."""
        config, labels = self.config, batch.candidates.labels
        if config.balance and n_ranks() > 1:
            raise ConfigError(
                "head.balance is over all tokens of a batch, of which each of several processes runs a share; train "
                "with one process, or with head.balance=0"
            )
        words = self.prompts.words()
        with ExitStack() as held:
            watched = self._adapters() if config.balance else {}
            shares = [held.enter_context(shared_out(tower)) for tower in watched.values()]
            text = self._texts("pair", words, labels["attr"], labels["obj"])
            image, variants = self._images(batch.queries, variants=config.image_to_text)
        logits = self._logits(image, text)
        found = {"pair": F.cross_entropy(logits, batch.target)}
        weights = {"pair": 1.0}
        for name, n, tau in zip(PRIMITIVES, self._sizes(), self._taus(), strict=True):
            true = batch.queries.labels[name]
            if config.text_to_image:
                z = primitive_logits(logits, labels[name], n, tau=tau, of=config.primitive_score)
                found[name], weights[name] = F.cross_entropy(z, true), config.weight_primitive
            if variants is not None:
                z = self._variant_logits(name, n, words, image, variants, true)
                found[f"{name}_variant"] = F.cross_entropy(z, true)
                weights[f"{name}_variant"] = config.weight_variant
        if config.balance:
            of_block = [some for tower in shares for some in tower.values()]
            # Of a block, the shares of all parts of the batch together.
            spread = [balance(torch.cat([s.flatten(0, -2) for s in some])) for some in of_block]
            found["balance"], weights["balance"] = torch.stack(spread).mean(), config.balance
        if config.isolation:
            towers = self._adapters().values()
            alike = [isolation(one.down) for tower in towers for one in tower.values()]
            found["isolation"], weights["isolation"] = torch.stack(alike).mean(), config.isolation
        total = torch.stack([weights[name] * value for name, value in found.items()]).sum()
        hit = (logits.detach().argmax(1) == batch.target).float().mean()
        parts = {f"{name}_loss": value.detach() for name, value in found.items()}
        return total, {**parts, "batch_accuracy": hit}

    def routing(self, queries: Features) -> Float[Tensor, "b k e"] | None:
        """Mean share of every expert over the real rows of an image, by block; None where the image tower has none."""
        if "image" not in self.experts:
            return None
        with shared_out(self._adapters()["image"]) as shares:
            self._images(queries)
        found = torch.stack([torch.cat(some) for some in shares.values()], 1)
        mask = queries.streams.get("image/mask")
        if mask is None:
            return found.mean(2)
        real = mask[:, None, :, None].to(found.dtype)
        return (found * real).sum(2) / real.sum(2)

    def remarks(self) -> dict[str, Any]:
        """The share of the dual encoder that was trained."""
        return {"of the dual encoder": self.images.share(self.n_trained())}

    def _images(
        self, queries: Features, *, variants: bool = False
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b e d"] | None]:
        """Unit embeddings of images, and of what each expert of the last block alone would make of them."""
        (stream,) = self.needs(self.config).queries
        given = [queries[stream]]
        if self.config.cut and "image/mask" in queries.streams:
            given.append(queries["image/mask"])

        def some(rows: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
            passed: list[Passed] = []
            last = self.experts["image"].blocks[-1] if variants else 0
            watch = (
                self.experts["image"].watched(last, passed.append) if variants else nullcontext()
            )
            with watch:
                pooled = self._pooled(rows, mask)
            unit = F.normalize(pooled.float(), dim=-1)
            return (unit, self._variants(passed[0], mask)) if variants else (unit,)

        found = in_parts(some, given, self.config.image_chunk)
        return found[0], found[1] if variants else None

    def _pooled(self, rows: Tensor, mask: Tensor | None) -> Float[Tensor, "b d"]:
        """Images of pixels, or of the states that enter the first block that is run."""
        if not self.config.cut:
            return self.images.images(rows)
        return self.images.resume(self.block, rows, mask)

    def _variants(self, last: Passed, mask: Tensor | None) -> Float[Tensor, "b e d"]:
        """Unit embeddings of the last block's output with one expert at a time, and all of its share."""
        pools_all = self.readout.pools_all_rows()
        rows = slice(None) if pools_all else slice(1)
        frozen = (last.residual + last.branch)[:, rows]
        each = self.experts["image"][last.block].each(last.given[:, rows])  # (B, N, E, W)
        made = (frozen[:, :, None] + each).transpose(1, 2)
        flat = made.flatten(0, 1)
        if pools_all:
            every = None if mask is None else mask.repeat_interleave(made.shape[1], dim=0)
            view = self.readout.view(flat, every)
        else:
            view = flat[:, 0]
        return F.normalize(self.readout.image(view).float(), dim=-1).unflatten(0, made.shape[:2])

    def _variant_logits(
        self,
        name: str,
        n: int,
        words: Tensor,
        image: Float[Tensor, "b d"],
        variants: Float[Tensor, "b e d"],
        true: Int[Tensor, " b"],
    ) -> Float[Tensor, "b n"]:
        """s·cos of the variant that is closest to the true word, with all words."""
        index = torch.arange(n, device=true.device)
        text = self._texts(name, words, index, index)
        with torch.no_grad():
            affinity = torch.einsum("bed,bd->be", variants, text[true])
            if self.config.affinity == "cross_intra":
                intra = torch.einsum("bed,bd->be", variants, image)
                affinity = affinity + self.config.affinity_weight * intra
            best = affinity.argmax(1)
        return self._logits(variants[torch.arange(len(best), device=best.device), best], text)

    def _texts(
        self, template: str, words: Tensor, attr: Int[Tensor, " c"], obj: Int[Tensor, " c"]
    ) -> Float[Tensor, "c d"]:
        """Unit embeddings of prompts, in float32."""
        rows = self.prompts.rows(template, attr, obj)
        return F.normalize(self.prompts.encode(template, words, rows).float(), dim=-1)

    def _logits(
        self, image: Float[Tensor, "b d"], text: Float[Tensor, "c d"]
    ) -> Float[Tensor, "b c"]:
        return self.readout.scale() * products(image, text)

    def _sizes(self) -> tuple[int, int]:
        return len(self.context.attrs), len(self.context.objs)

    def _taus(self) -> tuple[Tensor | float, Tensor | float]:
        """What the largest of the logits, which are s·cos, or of the probabilities, are multiplied with."""
        if not self.config.text_to_image:
            return 1.0, 1.0
        tau = temperature(self.log_tau, float(self.readout.scale()))
        tau = tau if self.config.primitive_score == "probability" else tau / self.readout.scale()
        return tau[0], tau[1]

    def _fusion(self) -> dict[str, Any]:
        """How `fused` is to be called."""
        attr, obj = self._taus()
        of = self.config.primitive_score
        return {"beta": self.config.beta, "tau_attr": attr, "tau_obj": obj, "of": of}

    def _adapters(self) -> dict[str, dict[int, MoELoRA]]:
        """Side → block → its experts."""
        return {side: {k: one[k] for k in one.blocks} for side, one in self.experts.items()}

    def _beside(self, side: str, blocks: Sequence[int], width: int) -> Beside:
        config = self.config
        made = {
            k: MoELoRA(
                width,
                n_experts=config.n_experts,
                n_shared=config.n_shared,
                rank=config.rank,
                top_k=config.top_k,
                scale=config.adapter_scale,
                dropout=config.adapter_dropout,
            )
            for k in blocks
        }
        return Beside(side, made, reads=config.adapter_input)
