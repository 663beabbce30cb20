"""What a backbone is to the builder, and to whoever enters it.

A family file of this folder has two handles: `load(checkpoint, *, dtype, device, compiled) -> Backbone` and
`tiny() -> Backbone`, a small random-weight model of the true class. Images go in as PIL pictures, texts as strings;
streams come out by name. The usual way to fulfil both contracts is `two_towers.TwoTowers` with two towers of the
family's own.

Letters: B items · N patches · P prefix rows · L text tokens · D joint dim · W image width · V text width · M prompts.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int, UInt8
from PIL.Image import Image
from torch import Tensor, nn

from cache_builder.backbones.branches import Branches
from cache_builder.spec import BackboneSpec

Blocks = nn.ModuleList | nn.Sequential
"""Blocks of a tower, in order; libraries keep them in either."""

Pixels = Any
"""What `preprocess` makes of one picture: a tensor (3, height, width), or a dict of tensors where pictures keep their
shape (NaFlex: `pixels` (N, 3·p·p), `mask` (N,), `shape` (2,), padded to one N). `default_collate` stacks them."""


@runtime_checkable
class Backbone(Protocol):
    """A frozen two-tower (or one-tower) model whose streams go into a cache.

    Streams without the side prefix, `B` rows each:
        images: `pooled` (B, D), `patches` (B, N, W), `prefix` (B, P, W), `block_<k>` (B, P + N, W); where pictures keep
                their shape also `length` (B,): rows 0 … length-1 of `patches` and `block_<k>` are real.
        texts:  `pooled` (B, D), `tokens` (B, L, V), `length` (B,) int: rows 0 … length-1 of `tokens` are to be stored,
                and row length-1 is the row the library pools.
        words:  `states` (B, L, V), `length` (B,).
    Tokens are raw: the input of the final norm. Nothing is L2-normalised. No family has all streams.
    """

    spec: BackboneSpec
    device: str

    @property
    def streams(self) -> frozenset[str]:
        """What it fills unless less is asked for, with side: {"image/pooled", "image/patches", …}."""
        ...

    @property
    def depth(self) -> Mapping[str, int]:
        """Side → number of blocks; `image/block_<k>` exists for k = 0 … depth["image"]."""
        ...

    def preprocess(self, image: Image) -> Pixels:
        """The library's own evaluation transform, pixel for pixel."""
        ...

    def levels(self, pixels: Pixels) -> UInt8[Tensor, "b 3 h w"]:
        """The 8-bit levels behind stacked pixels, on their device; `UnknownName` where pictures keep their shape.

        `normalised(levels(pixels))` equals `pixels` bit for bit.
        """
        ...

    def normalised(self, levels: UInt8[Tensor, "b 3 h w"]) -> Pixels:
        """The library's own scaling and normalisation, on the device of `levels`."""
        ...

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of patches of a picture of that size, in pixels."""
        ...

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "b l"]:
        """Token ids as the library pads and truncates them, on the CPU."""
        ...

    def tokenize_words(self, phrases: Sequence[str]) -> Int[Tensor, "b l"]:
        """Token ids of bare phrases, for the stream `word/states`; only of families that have it."""
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

    def encode_images(self, pixels: Pixels, blocks: Collection[int] = ()) -> dict[str, Tensor]:
        """Image streams of stacked pixels, on the backbone's device; also the states that enter `blocks`."""
        ...

    def encode_texts(self, ids: Int[Tensor, "b l"]) -> dict[str, Tensor]:
        """Text streams, on the backbone's device."""
        ...

    def encode_words(self, ids: Int[Tensor, "b l"]) -> dict[str, Tensor]:
        """Word streams, on the backbone's device."""
        ...

    def readout(self) -> dict[str, Tensor]:
        """The frozen tensors between raw tokens and joint space, on the CPU, named as in cache_builder/readout.py."""
        ...


Prompts = (
    Float[Tensor, "depth m w"]
    | Float[Tensor, "b depth m w"]
    | Callable[[int, Float[Tensor, "b n w"]], Float[Tensor, "b m w"] | None]
)
"""Rows that are put before blocks; see `OpenBackbone.resume_from`."""


class OpenBackbone(Backbone, Protocol):
    """A backbone that may be entered: prompts, pseudo-words, adapters, cut training. All of these keep gradients.

    Attributes:
        model: the library's whole module, with both towers and all that is before and behind their blocks.
    """

    model: nn.Module

    def tower(self, side: str) -> nn.Module:
        """The module of one side: "image" or "text"."""
        ...

    def blocks(self, side: str) -> Blocks:
        """Its blocks, in order: what adapters wrap and hooks enter."""
        ...

    def branches(self, side: str) -> list[Branches]:
        """The residual branches of each block: what adapters stand beside."""
        ...

    def embed_pixels(
        self, pixels: Pixels
    ) -> tuple[Float[Tensor, "b n w"], Bool[Tensor, "b n"] | None]:
        """The states that enter image block 0 (prefix rows, then patches, positions added), and which rows are real.

        The mask is None where all are.
        """
        ...

    def tokenize_within(self, texts: Sequence[str], length: int) -> Int[Tensor, "b l"]:
        """Like `tokenize`, but padded and cut to `length` rows, so that room is left; a cut text keeps its end."""
        ...

    def embed_tokens(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l v"]:
        """Token embeddings, before positions. Put a pseudo-word in by assigning its row."""
        ...

    def ends(self, ids: Int[Tensor, "b l"]) -> Int[Tensor, " b"]:
        """The row of each text that the library pools, for `encode_embedded`."""
        ...

    def encode_embedded(
        self,
        embedded: Float[Tensor, "b l v"],
        end: Int[Tensor, " b"],
        *,
        prompts: Prompts | None = None,
    ) -> dict[str, Tensor]:
        """Text streams from embedded tokens; row `end` is pooled. For `prompts` see `resume_from`."""
        ...

    def resume_from(
        self,
        side: str,
        block: int,
        states: Float[Tensor, "b n w"],
        *,
        end: Int[Tensor, " b"] | None = None,
        mask: Bool[Tensor, "b n"] | None = None,
        prompts: Prompts | None = None,
    ) -> dict[str, Tensor]:
        """Run blocks `block`… on activations that enter block `block`, and finish.

        Args:
            side: "image" or "text".
            block: 0 … depth; at depth no block runs.
            states: activations, positions added.
            end: texts: the row to pool; without it nothing is pooled.
            mask: images that keep their shape: True where a row is real.
            prompts: M extra rows, behind the rows that must stay first (class token, begin of text).
                prompts[…, j, :, :] stands in them when the j-th block that is run begins; where prompts end, the rows
                go on as they are. They are taken out before anything is returned. A function makes them of j and the
                states that enter that block (of `encode_embedded`, j = 0: the embedded tokens), without the extra rows,
                so that a token has the same row everywhere; None where they end. It is called once for each j, in
                order, and gives as many rows each time; gradients pass through the states too.

        Returns:
            images: `patches`, `prefix` and `pooled`, as far as the family has them; texts: `tokens`, and `pooled` if
            `end` is given. `tokens` are raw in the order of `states`.
        """
        ...
