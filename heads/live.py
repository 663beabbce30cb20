"""SEAM: a frozen backbone inside the graph, for heads that learn what goes into one of its towers.

    cache ── images ──▶ head ◀── pooled ── text tower, frozen ◀── prompts ── head's parameters
                          └───────────────── gradients pass through ─────────────▲

It is the backbone that made the cache: what is loaded must have the same weights, tokenizer and architecture as the
cache's spec says. Nothing of it is a parameter of the head, so it is never trained, saved or counted. The libraries
behind it are imported when the first head asks for one.
"""

from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cache_builder import load_backbone, plugins
from cache_builder.backbones.base import OpenBackbone, Prompts
from cache_builder.errors import CacheError
from cache_builder.spec import BackboneSpec
from heads.base import Context
from heads.errors import CheckpointMismatch, ConfigError

SAME = ("family", "weights", "tokenizer", "architecture", "activation")
"""Fields in which the backbone must be the cache's; versions and compute type only move the last digits."""

_SHARED: "WeakValueDictionary[tuple[str, str, str], _Loaded]" = WeakValueDictionary()
"""(name, weights, device) → the one copy in this process, for as long as a head holds it."""


@dataclass(eq=False)
class _Loaded:
    backbone: OpenBackbone


class LiveBackbone:
    """The frozen backbone of a cache, on whatever device it is asked for; loaded when first used.

    Not an `nn.Module`, on purpose: a head that keeps one does not own its weights.

    Args:
        context: says which backbone, and where it lies.
        who: the method, for messages.

    Raises:
        ConfigError: the context names no backbone, or one without a text tower that leads into the joint space.
    """

    def __init__(self, context: Context, who: str) -> None:
        self.spec, self.name, self.who = _claimed(context, who), context.backbone_name, who
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
        backbone, kind = self.on(embedded.device), embedded.device.type
        if torch.is_autocast_enabled(kind):
            backbone = _computing_in(backbone, torch.get_autocast_dtype(kind))
        found = backbone.encode_embedded(embedded, end, prompts=prompts)
        return found["tokens"], found["pooled"]

    def share(self, n: int) -> float:
        """`n` parameters as a share of those of the whole dual encoder."""
        return n / sum(p.numel() for p in self.on("cpu").model.parameters())

    def __deepcopy__(self, memo: dict[int, Any]) -> "LiveBackbone":
        """A copied head runs the same backbone."""
        return copy(self)

    def _load(self, device: str) -> OpenBackbone:
        try:
            # Weights drawn before they are filled must not move the seed of the head that is being built, and those
            # made while scoring must serve training too.
            with torch.random.fork_rng(devices=[]), torch.inference_mode(mode=False):
                loaded: Any = load_backbone(self.name, device=device)
        except CacheError as error:
            raise CheckpointMismatch(
                f"{self.who} runs the text tower of {self.name}, which cannot be loaded: {error}; if the checkpoint "
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
