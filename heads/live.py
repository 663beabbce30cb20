"""SEAM: a frozen backbone inside the graph, for heads that learn what goes into its towers, or stands inside them.

    cache ── images ──▶ head ◀── pooled ── text tower, frozen ◀── prompts ── head's parameters
                          └───────────────── gradients pass through ─────────────▲
    cache ── pixels, or states that enter block k ──▶ image tower, frozen, with adapters ──▶ head

It is the backbone that made the cache: what is loaded must have the same weights, tokenizer and architecture as the
cache's spec says. Nothing of it is a parameter of the head, so it is never trained, saved or counted. The libraries
behind it are imported when the first head asks for one.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from weakref import WeakValueDictionary

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from cache_builder import load_backbone, plugins
from cache_builder.backbones.base import OpenBackbone, Prompts
from cache_builder.backbones.branches import Branch
from cache_builder.errors import CacheError
from cache_builder.spec import BackboneSpec
from heads.base import Context
from heads.errors import CheckpointMismatch, ConfigError

__all__ = [
    "Attachment",
    "Branch",
    "LiveBackbone",
    "OpenBackbone",
    "Prompts",
    "tiny",
    "write_backbone",
]

SAME = ("family", "weights", "tokenizer", "architecture", "activation")
"""Fields in which the backbone must be the cache's; versions and compute type only move the last digits."""

_SHARED: "WeakValueDictionary[tuple[str, str, str], _Loaded]" = WeakValueDictionary()
"""(name, weights, device) → the one copy in this process, for as long as a head holds it."""


@dataclass(eq=False)
class _Loaded:
    backbone: OpenBackbone


class _Reached(Exception):
    """What lies behind is not wanted."""


@runtime_checkable
class Attachment(Protocol):
    """What a head trains inside a tower: adapters beside its branches, or other weights in place of its own."""

    def attached(self, backbone: OpenBackbone) -> AbstractContextManager[None]:
        """Let the backbone compute with it, for as long as the block lasts."""
        ...


class LiveBackbone:
    """The frozen backbone of a cache, on whatever device it is asked for; loaded when first used.

    Not an `nn.Module`, on purpose: a head that keeps one does not own its weights.

    Args:
        context: says which backbone, and where it lies.
        who: the method, for messages.
        adapters: attached whenever it computes; they belong to the head. Only while a head computes with it, so heads
            of one process share the frozen weights.

    Raises:
        ConfigError: the context names no backbone, or one without a text tower that leads into the joint space.
    """

    def __init__(self, context: Context, who: str, adapters: Sequence[Attachment] = ()) -> None:
        self.spec, self.name, self.who = _claimed(context, who), context.backbone_name, who
        self.adapters = tuple(adapters)
        self._held: _Loaded | None = None

    def on(self, device: torch.device | str) -> OpenBackbone:
        """The backbone on `device`, in evaluation mode, wanting no gradient.

        Raises:
            CheckpointMismatch: it cannot be loaded from its name, or what is there is not what made the cache.
        """
        where = str(torch.device(device))
        if self._held is None or self._held.backbone.device != where:
            key = (self.name, self.spec.weights, where)
            found = _SHARED.get(key) or _Loaded(self._load(where))
            self._check(found.backbone)
            _SHARED[key] = self._held = found
        return self._held.backbone

    def encode(
        self,
        embedded: Float[Tensor, "c l v"],
        end: Int[Tensor, " c"],
        prompts: Prompts | None = None,
    ) -> Float[Tensor, "c d"]:
        """Pooled texts of embedded tokens, read at row `end`; in the type of the autocast around, else float32."""
        return self.states(embedded, end, prompts)[1]

    def states(
        self,
        embedded: Float[Tensor, "c l v"],
        end: Int[Tensor, " c"],
        prompts: Prompts | None = None,
    ) -> tuple[Float[Tensor, "c l v"], Float[Tensor, "c d"]]:
        """Raw states of all rows, before the final norm, and what `encode` returns."""
        with self.adapted(embedded.device) as backbone:
            found = backbone.encode_embedded(embedded, end, prompts=prompts)
        return found["tokens"], found["pooled"]

    def texts(self, ids: Int[Tensor, "c l"], device: torch.device) -> Float[Tensor, "c d"]:
        """Pooled texts of token ids, in the type of the autocast around."""
        with self.adapted(device) as backbone:
            return backbone.encode_embedded(backbone.embed_tokens(ids), backbone.ends(ids))[
                "pooled"
            ]

    def images(self, levels: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Pooled images of pixels as `image/pixels` holds them."""
        with self.adapted(levels.device) as backbone:
            states, mask = backbone.embed_pixels(backbone.normalised(levels))
            return backbone.resume_from("image", 0, states, mask=mask)["pooled"]

    def resume(
        self, block: int, states: Float[Tensor, "b n w"], mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b d"]:
        """Pooled images of the states that enter image block `block`; `mask` is True where a row is real."""
        with self.adapted(states.device) as backbone:
            return backbone.resume_from("image", block, states, mask=mask)["pooled"]

    def entering_texts(
        self, block: int, embedded: Float[Tensor, "c l v"]
    ) -> Float[Tensor, "c l v"]:
        """The states that enter text block `block` of the tower as it is; at its depth, its raw rows."""
        bare = copy(self)
        bare.adapters = ()
        kept: list[Tensor] = []

        def reached(_module: Any, given: tuple[Tensor, ...]) -> None:
            kept.append(given[0])
            raise _Reached

        with bare.adapted(embedded.device) as backbone:
            end = torch.zeros(len(embedded), dtype=torch.int64, device=embedded.device)
            blocks = backbone.blocks("text")
            if block == len(blocks):
                return backbone.encode_embedded(embedded, end)["tokens"]
            hook = blocks[block].register_forward_pre_hook(reached)
            try:
                backbone.encode_embedded(embedded, end)
            except _Reached:
                return kept[0]
            finally:
                hook.remove()
        raise AssertionError("a block was not run")

    def resume_texts(
        self, block: int, states: Float[Tensor, "c l v"], end: Int[Tensor, " c"]
    ) -> tuple[Float[Tensor, "c l v"], Float[Tensor, "c d"]]:
        """What `states` returns, of the states that enter text block `block`."""
        with self.adapted(states.device) as backbone:
            found = backbone.resume_from("text", block, states, end=end)
        return found["tokens"], found["pooled"]

    @contextmanager
    def adapted(self, device: torch.device | str) -> Generator[OpenBackbone]:
        """The backbone with its adapters, for as long as the block lasts, computing in the type of the autocast around.

        Whoever computes under gradient checkpointing enters it inside what is computed again.
        """
        backbone, kind = self.on(device), torch.device(device).type
        if torch.is_autocast_enabled(kind):
            backbone = _computing_in(backbone, torch.get_autocast_dtype(kind))
        with ExitStack() as held:
            for one in self.adapters:
                held.enter_context(one.attached(backbone))
            yield backbone

    def share(self, n: int) -> float:
        """`n` parameters as a share of those of the whole dual encoder."""
        backbone = self._held.backbone if self._held else self.on("cpu")
        return n / sum(p.numel() for p in backbone.model.parameters())

    def __deepcopy__(self, memo: dict[int, Any]) -> "LiveBackbone":
        """A copied head runs the same backbone, with its own adapters."""
        other = copy(self)
        other.adapters = deepcopy(self.adapters, memo)
        return other

    def _load(self, device: str) -> OpenBackbone:
        try:
            # Weights drawn before they are filled must not move the seed of the head that is being built, and those
            # made while scoring must serve training too.
            with torch.random.fork_rng(devices=[]), torch.inference_mode(mode=False):
                loaded: Any = load_backbone(self.name, device=device)
        except CacheError as error:
            raise CheckpointMismatch(
                f"{self.who} runs {self.name}, which cannot be loaded: {error}; if the checkpoint "
                "has moved, say where it is with --backbone FAMILY:CHECKPOINT"
            ) from error
        return loaded

    def _check(self, loaded: OpenBackbone) -> None:
        for field in SAME:
            wanted, found = getattr(self.spec, field), getattr(loaded.spec, field)
            if wanted != found:
                raise CheckpointMismatch(
                    f"{self.who} needs the backbone that made the cache, {self.spec.family}:{self.spec.checkpoint}, "
                    f"but {self.name} has another {field}: {_short(found)} instead of {_short(wanted)}; point to the "
                    "right one with --backbone FAMILY:CHECKPOINT"
                )


def write_backbone(name: str, weights: Mapping[str, Tensor], out: Path) -> None:
    """Write the checkpoint of a backbone with other weights; see `cache_builder.backbones.rewrite`."""
    from cache_builder.backbones.rewrite import rewrite  # brings the libraries

    rewrite(name, weights, out)


def tiny(family: str, directory: Path) -> OpenBackbone:
    """A family's random-weight miniature, whose files are left in `directory`: loads again as `family:directory`."""
    return plugins.find("cache_builder.backbones", family).tiny(directory)


def _claimed(context: Context, who: str) -> BackboneSpec:
    spec = context.backbone
    if spec is None or not context.backbone_name:
        raise ConfigError(
            f"{who} runs the text tower of the cache's backbone, but its context names none; make it with "
            "heads.source.context_of(cache)"
        )
    known = ("joint", "text_width", "context")
    if missing := [name for name in known if name not in spec.dims]:
        raise ConfigError(
            f"{who} runs a text tower that leads into the joint space, and {spec.family}:{spec.checkpoint} has none "
            f"(no {', '.join(missing)} in its spec); use a cache of clip, siglip2 or pe, or a method that reads a "
            "cache alone"
        )
    return spec


def _computing_in(backbone: OpenBackbone, dtype: torch.dtype) -> OpenBackbone:
    """The same weights under another compute type: what is float32 here would switch autocast off."""
    other: Any = copy(backbone)
    other.dtype = dtype
    return other


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:40]}…{text[-12:]}"
