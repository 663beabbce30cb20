"""What a backbone is to the builder, and to whoever enters it.

A family file of this folder has two handles: `load(checkpoint, *, dtype, device) -> Backbone` and `tiny() -> Backbone`,
a small random-weight model of the true class. Images go in as PIL pictures, texts as strings; streams come out by name.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from PIL.Image import Image
from torch import Tensor, nn

from cache_builder.spec import BackboneSpec


@runtime_checkable
class Backbone(Protocol):
    """A frozen two-tower (or one-tower) model whose streams go into a cache.

    Streams without the side prefix, `B` rows each:
        images: `pooled` (B, D), `patches` (B, N, W), `prefix` (B, P, W)
        texts:  `pooled` (B, D), `tokens` (B, L, V), `length` (B,) int: rows 0 … length-1 of `tokens` are to be stored,
                and row length-1 is the row the library pools.
    Tokens are raw: the input of the final norm. Nothing is L2-normalised.
    """

    spec: BackboneSpec
    streams: frozenset[str]
    """What it can fill, with side: {"image/pooled", "image/patches", …}."""
    device: str

    def preprocess(self, image: Image) -> Float[Tensor, "3 height width"]:
        """The library's own evaluation transform, pixel for pixel."""
        ...

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "b l"]:
        """Token ids as the library pads and truncates them, on the CPU."""
        ...

    def vocabulary(self) -> list[str]:
        """The string of every token id, in order, for people: specials as the tokenizer writes them."""
        ...

    def truncated(self, texts: Sequence[str]) -> int:
        """How many of `texts` do not fit the context length and are cut."""
        ...

    def lengths(self, ids: Int[Tensor, "b l"]) -> Int[Tensor, " b"]:
        """How many tokens of each text are to be stored, known without a forward pass, on the CPU."""
        ...

    def encode_images(self, pixels: Float[Tensor, "b 3 height width"]) -> dict[str, Tensor]:
        """Image streams, on the backbone's device."""
        ...

    def encode_texts(self, ids: Int[Tensor, "b l"]) -> dict[str, Tensor]:
        """Text streams, on the backbone's device."""
        ...

    def readout(self) -> dict[str, Tensor]:
        """The frozen tensors between raw tokens and the joint space, float32 on the CPU.

        Names: `image/norm.weight`, `image/norm.bias`, `image/proj`, `image/eps`, `text/norm.weight`, `text/norm.bias`,
        `text/proj`, `text/eps`, `logit_scale` (a log), and `logit_bias` where the model has one.
        """
        ...


class OpenBackbone(Backbone, Protocol):
    """A backbone that may be entered: prompts, pseudo-words, adapters, cut training."""

    def tower(self, side: str) -> nn.Module:
        """The module of one side: "image" or "text"."""
        ...

    def embed_tokens(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l v"]:
        """Token embeddings, before positions."""
        ...

    def encode_embedded(
        self, embedded: Float[Tensor, "b l v"], end: Int[Tensor, " b"]
    ) -> dict[str, Tensor]:
        """Text streams from embedded tokens; row `end` is pooled."""
        ...

    def resume_from(self, side: str, block: int, states: Float[Tensor, "b n w"]) -> Tensor:
        """Run blocks `block`… on cached activations; returns the raw tokens (input of the final norm)."""
        ...
