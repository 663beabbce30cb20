"""TwoTowers: any image tower and any text tower behind the contracts `Backbone` and `OpenBackbone`. No family itself.

    pixels ─ embed ─▶ block 0 … block k … ─▶ raw rows ─ pool ─▶ pooled        one loop for encoding, resuming at
    ids    ─ embed ─▶ block 0 … block k … ─▶ raw rows ─ pool ─▶ pooled        block k, and prompts at every block

A tower says how its library embeds, runs one block, and pools. All else, what is stored, where gradients may flow, in
which precision, is said here once.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL.Image import Image
from torch import Tensor, nn

from cache_builder.backbones.base import Blocks, Pixels, Prompts
from cache_builder.backbones.branches import Branches, branches_of
from cache_builder.backbones.scaling import Scaling
from cache_builder.errors import UnknownName
from cache_builder.spec import BackboneSpec, with_depth

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Compute types. Weights stay float32; the two halves are torch's autocast, which keeps norms and sums in float32."""


@runtime_checkable
class ImageTower(Protocol):
    """What an image side must say about itself. Rows are prefix first, then patches in raster order."""

    module: nn.Module
    blocks: Blocks
    n_prefix: int
    pools: bool
    """Has it a pooled embedding in the joint space?"""
    ragged: bool
    """Do pictures keep their shape, so that they differ in patches?"""

    def preprocess(self, image: Image) -> Pixels:
        """The library's transform of one picture."""
        ...

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of patches of a picture of that size."""
        ...

    def scaling(self) -> Scaling:
        """How the library scales 8-bit levels; `UnknownName` where pictures keep their shape."""
        ...

    def embed(self, pixels: Any) -> tuple[Tensor, Tensor | None]:
        """States that enter block 0, and which rows are real (None: all)."""
        ...

    def run(self, block: nn.Module, states: Tensor, mask: Tensor | None, n_prompts: int) -> Tensor:
        """One block; `n_prompts` rows stand after the prefix."""
        ...

    def pool(self, raw: Tensor, mask: Tensor | None) -> Tensor:
        """The library's pooled embedding of raw rows; only if `pools`."""
        ...

    def readout(self) -> dict[str, Tensor]:
        """Named as in cache_builder/readout.py, without the side."""
        ...


@runtime_checkable
class TextTokens(Protocol):
    """Strings to ids, and which rows are stored; `tokens.Tokens` serves most families."""

    @property
    def context(self) -> int:
        """Most rows of a text."""
        ...

    @property
    def first_free(self) -> int:
        """Rows that must stay first, before any prompt: the begin of text in causal towers."""
        ...

    def tokenize(self, texts: Sequence[str], length: int | None = None) -> Int[Tensor, "b l"]:
        """Padded and cut as the library does it, on the CPU; to `length` rows where that is given."""
        ...

    def vocabulary(self) -> list[str]:
        """The string of every id."""
        ...

    def truncated(self, texts: Sequence[str]) -> int:
        """How many are cut."""
        ...

    def ends(self, ids: Int[Tensor, "b l"]) -> Int[Tensor, " b"]:
        """The row the library pools, or else the last real one."""
        ...

    def lengths(self, ids: Int[Tensor, "b l"]) -> Int[Tensor, " b"]:
        """Rows to store, the pooled one included, which then comes last."""
        ...


@runtime_checkable
class TextTower(Protocol):
    """What a text side must say about itself."""

    module: nn.Module
    blocks: Blocks
    pools: bool
    words: bool
    """Does it offer `word/states`?"""
    whole: bool
    """Has it no mask, so that padding takes part and all rows of the context are needed?"""

    @property
    def tokens(self) -> "TextTokens":
        """Strings to ids."""
        ...

    def embed(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l v"]:
        """Token embeddings before positions."""
        ...

    def place(self, embedded: Float[Tensor, "b l v"]) -> Float[Tensor, "b l v"]:
        """Add positions: the states that enter block 0."""
        ...

    def run(self, block: nn.Module, states: Tensor) -> Tensor:
        """One block, under the tower's own mask."""
        ...

    def pool(self, raw: Tensor, end: Tensor) -> Tensor:
        """The library's pooled embedding; only if `pools`."""
        ...

    def readout(self) -> dict[str, Tensor]:
        """Named as in cache_builder/readout.py, without the side."""
        ...


Before = Callable[[int, Tensor], Tensor | None]
"""What every form of `Prompts` becomes: (number of the block among those run, states without prompts) → rows."""


class TwoTowers:
    """A frozen model with an image tower, and usually a text tower.

    Args:
        model: the library's whole module, frozen and in evaluation mode.
        image, text: how its sides are run.
        spec: all that can change a stored number.
        device, dtype: where and in which type it computes.
        scalars: `logit_scale` (a log) and `logit_bias`, where the model has them.
        compiled: put every block through torch.compile. Blocks of a tower share one compiled form.
    """

    def __init__(
        self,
        model: nn.Module,
        image: ImageTower,
        text: TextTower | None,
        spec: BackboneSpec,
        *,
        device: str,
        dtype: str,
        scalars: Mapping[str, Tensor],
        compiled: bool = False,
    ) -> None:
        assert not model.training, (
            "a backbone in training mode changes its features from pass to pass"
        )
        self.model: Any = model  # the library's, untyped
        self.image, self.text = image, text
        stated = {"dims": with_depth(spec.dims, self.depth)}
        self.spec = spec.model_copy(update=stated)
        self.device, self.dtype = device, DTYPES[dtype]
        self.scalars = dict(scalars)
        if compiled:
            for side in ("image", "text") if text else ("image",):
                for block in self.blocks(side):
                    block.compile()

    @property
    def streams(self) -> frozenset[str]:
        """What it fills unless less is asked for."""
        found = {"image/patches"}
        found |= {"image/prefix"} if self.image.n_prefix else set()
        found |= {"image/pooled"} if self.image.pools else set()
        if self.text is not None:
            found |= {"text/tokens"}
            found |= {"text/pooled"} if self.text.pools else set()
            found |= {"word/states"} if self.text.words else set()
        return frozenset(found)

    @property
    def depth(self) -> dict[str, int]:
        """Side → number of blocks."""
        text = {} if self.text is None else {"text": len(self.text.blocks)}
        return {"image": len(self.image.blocks), **text}

    def preprocess(self, image: Image) -> Pixels:
        """The library's evaluation transform, pixel for pixel."""
        return self.image.preprocess(image)

    def levels(self, pixels: Pixels) -> UInt8[Tensor, "b 3 h w"]:
        """The 8-bit levels behind preprocessed pixels, on their device."""
        return self.image.scaling().levels(pixels)

    def normalised(self, levels: UInt8[Tensor, "b 3 h w"]) -> Pixels:
        """Preprocessed pixels again, on the device of `levels`: bit for bit what `preprocess` gives."""
        return self.image.scaling().normalised(levels)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of patches of a picture of that size."""
        return self.image.grid(width, height)

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "b l"]:
        """Ids as the library pads and cuts them, on the CPU."""
        return self._text.tokens.tokenize(texts)

    def tokenize_within(self, texts: Sequence[str], length: int) -> Int[Tensor, "b l"]:
        """Ids padded and cut to `length` rows, as the library does it for its own context, on the CPU."""
        return self._text.tokens.tokenize(texts, length)

    def tokenize_words(self, phrases: Sequence[str]) -> Int[Tensor, "b l"]:
        """Ids of bare phrases, on the CPU."""
        tokens: Any = self._words.tokens
        return tokens.tokenize_words(phrases)

    def vocabulary(self) -> list[str]:
        """The string of every token id, in order."""
        return self._text.tokens.vocabulary()

    def truncated(self, texts: Sequence[str]) -> int:
        """How many texts do not fit the context length and are cut."""
        return self._text.tokens.truncated(texts)

    def lengths(self, ids: Int[Tensor, "b l"]) -> Int[Tensor, " b"]:
        """How many tokens of each text are to be stored."""
        return self._text.tokens.lengths(ids)

    @torch.no_grad()
    def encode_images(self, pixels: Pixels, blocks: Collection[int] = ()) -> dict[str, Tensor]:
        """Image streams, on the backbone's device; also `block_<k>` for every k in `blocks`.

        Raises:
            UnknownName: there is no such block.
        """
        if absent := [k for k in blocks if not 0 <= k <= self.depth["image"]]:
            raise UnknownName(
                f"the image tower has blocks 0 … {self.depth['image']}, asked for the states that enter {absent[0]}"
            )
        with self._precision():
            states, mask = self.image.embed(_to(pixels, self.device))
            kept: dict[str, Tensor] = {}
            raw = self._run("image", 0, states, mask, wanted={*blocks}, kept=kept)
            found = {**self._image_streams(raw, mask), **kept}
        return found if mask is None else {**found, "length": mask.sum(1)}

    @torch.no_grad()
    def encode_texts(self, ids: Int[Tensor, "b l"]) -> dict[str, Tensor]:
        """Text streams, on the backbone's device.

        Ids of a causal tower may be cut after the longest text of the batch: the rows stay the same up to 1e-6, and
        the pass becomes several times cheaper. At full width pooled rows equal the library's exactly.
        """
        length, end = self._text.tokens.lengths(ids), self._text.tokens.ends(ids)
        found = self.encode_embedded(self.embed_tokens(ids), end)
        length = length.to(self.device)
        # The pooled row comes last among the stored ones, wherever it stands in the tower.
        rows, tokens = torch.arange(len(ids), device=self.device), found["tokens"]
        tokens[rows, length - 1] = tokens[rows, end.to(self.device)]
        return {**found, "length": length}

    @torch.no_grad()
    def encode_words(self, ids: Int[Tensor, "b l"]) -> dict[str, Tensor]:
        """Raw states of bare phrases."""
        found = self.encode_embedded(self.embed_tokens(ids), self._words.tokens.ends(ids))
        return {"states": found["tokens"], "length": self._text.tokens.lengths(ids).to(self.device)}

    def readout(self) -> dict[str, Tensor]:
        """The frozen tensors between raw tokens and joint space, float32 on the CPU."""
        sides = {"image": self.image, **({"text": self.text} if self.text is not None else {})}
        found = {f"{s}/{k}": v for s, tower in sides.items() for k, v in tower.readout().items()}
        found |= {name: value.reshape(()) for name, value in self.scalars.items()}
        return {k: v.detach().to("cpu", torch.float32).clone() for k, v in found.items()}

    def tower(self, side: str) -> nn.Module:
        """The module of one side."""
        return self._side(side).module

    def blocks(self, side: str) -> Blocks:
        """Its blocks, in order."""
        return self._side(side).blocks

    def branches(self, side: str) -> list[Branches]:
        """The residual branches of each block."""
        return [branches_of(block) for block in self.blocks(side)]

    def embed_pixels(self, pixels: Pixels) -> tuple[Tensor, Tensor | None]:
        """The states that enter image block 0, and which rows are real (None: all)."""
        with self._precision():
            return self.image.embed(_to(pixels, self.device))

    def embed_tokens(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l v"]:
        """Token embeddings before positions, on the backbone's device."""
        with self._precision():
            return self._text.embed(ids.to(self.device))

    def ends(self, ids: Int[Tensor, "b l"]) -> Int[Tensor, " b"]:
        """The row of each text that the library pools."""
        return self._text.tokens.ends(ids)

    def encode_embedded(
        self, embedded: Tensor, end: Int[Tensor, " b"], *, prompts: Prompts | None = None
    ) -> dict[str, Tensor]:
        """Text streams from embedded tokens; row `end` is pooled. Keeps gradients.

        Prompts are put in before positions are added, so that tokens and prompts together must fit the context (fill it
        exactly, in a tower without mask: leave out as many rows of padding).
        """
        with self._precision():
            before, m = _before(prompts), 0
            if before is not None and (rows := before(0, embedded)) is not None:
                m = rows.shape[1]
                embedded = _insert(embedded, rows, self._text.tokens.first_free)
            self._check_rows(embedded.shape[1], m)
            before = before if m else None  # no rows first, none later: as in `resume_from`
            raw = self._run("text", 0, self._text.place(embedded), None, before, inserted=m)
            return self._text_streams(raw, end)

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
        """Run blocks `block`… on activations that enter block `block`, and finish; see `OpenBackbone`."""
        if side not in self.depth:
            raise UnknownName(f"no side {side!r} (this backbone has: {', '.join(self.depth)})")
        depth = self.depth[side]
        if not 0 <= block <= depth:
            raise UnknownName(
                f"the {side} tower has blocks 0 … {depth}, asked to resume at {block}"
            )
        with self._precision():
            raw = self._run(side, block, states, mask, _before(prompts))
            return (
                self._image_streams(raw, mask) if side == "image" else self._text_streams(raw, end)
            )

    def _run(
        self,
        side: str,
        first: int,
        states: Tensor,
        mask: Tensor | None,
        before: Before | None = None,
        *,
        inserted: int = 0,
        wanted: Collection[int] = (),
        kept: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Raw rows of blocks `first`…; those of prompts are taken out again.

        Args:
            side, first, states, mask: as in `resume_from`.
            before: the prompts before each block that is run.
            inserted: so many rows stand in the states already, those before the first block.
            wanted, kept: states that enter these blocks are put into `kept` as `block_<k>`.
        """
        blocks, image = self.blocks(side), side == "image"
        at, m = self.image.n_prefix if image else self._text.tokens.first_free, inserted
        if before is not None and not m and (rows := before(0, states)) is not None:
            m = rows.shape[1]
            states = _insert(states, rows, at)
            mask = None if mask is None else torch.cat([mask.new_ones(len(mask), m), mask], 1)
        if not image and first < len(blocks):
            self._check_rows(states.shape[1], m)
        run = partial(self.image.run, mask=mask, n_prompts=m) if image else self._text.run
        for k, block in enumerate(blocks[first:], first):
            if m and before is not None and k > first:
                bare = _without(states, at, m)
                rows = before(k - first, bare)
                before = before if rows is not None else None
                if rows is not None and rows.shape[1] != m:
                    raise UnknownName(
                        f"{rows.shape[1]} prompts before block {k}, but {m} before the first: give as many rows "
                        "everywhere, or None where they end"
                    )
                states = states if rows is None else _insert(bare, rows, at)
            if k in wanted and kept is not None:
                kept[f"block_{k}"] = states
            states = run(block, states)
        if len(blocks) in wanted and kept is not None:
            kept[f"block_{len(blocks)}"] = states
        return _without(states, at, m) if m else states

    def _check_rows(self, n: int, m: int) -> None:
        """`UnknownName` unless a text tower takes `n` rows, `m` of them prompts."""
        context = self._text.tokens.context
        if n > context:
            raise UnknownName(
                f"{n} rows, {m} of them prompts, do not fit the text tower's {context} positions: cut the text, "
                "keeping its end"
            )
        if self._text.whole and n < context:
            raise UnknownName(
                f"this text tower has no mask and needs all {context} rows, padding included; it was given {n}, {m} of "
                "them prompts"
            )

    def _text_streams(self, raw: Tensor, end: Tensor | None) -> dict[str, Tensor]:
        if end is None or not self._text.pools:
            return {"tokens": raw}
        return {"tokens": raw, "pooled": self._text.pool(raw, end.to(raw.device))}

    def _image_streams(self, raw: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        p = self.image.n_prefix
        found = {"patches": raw[:, p:]}
        found |= {"prefix": raw[:, :p]} if p else {}
        return found | ({"pooled": self.image.pool(raw, mask)} if self.image.pools else {})

    def _precision(self) -> AbstractContextManager[Any]:
        kind = torch.device(self.device).type
        return torch.autocast(kind, self.dtype, enabled=self.dtype != torch.float32)

    @property
    def _text(self) -> TextTower:
        if self.text is None:
            name = f"{self.spec.family}:{self.spec.checkpoint}"
            raise UnknownName(f"{name} was loaded without its text tower")
        return self.text

    @property
    def _words(self) -> TextTower:
        if not self._text.words:
            raise UnknownName(f"family {self.spec.family} has no word/states; llava has")
        return self._text

    def _side(self, side: str) -> ImageTower | TextTower:
        return self.image if side == "image" else self._text


def _before(prompts: Prompts | None) -> Before | None:
    """Prompts as a function of the number of the block, and of the states that enter it; its rows in their type."""
    if prompts is None:
        return None
    if not isinstance(prompts, Tensor):

        def typed(k: int, states: Tensor) -> Tensor | None:
            rows = prompts(k, states)
            return None if rows is None else rows.to(states.dtype)

        return typed

    def rows(k: int, states: Tensor) -> Tensor | None:
        if k >= prompts.shape[-3]:
            return None
        return prompts[..., k, :, :].to(states.dtype).expand(len(states), -1, -1)

    return rows


def _without(states: Tensor, at: int, m: int) -> Tensor:
    """States without the rows that were inserted."""
    return torch.cat([states[:, :at], states[:, at + m :]], 1)


def _insert(states: Tensor, rows: Tensor, at: int) -> Tensor:
    return torch.cat([states[:, :at], rows, states[:, at:]], 1)


def _to(pixels: Pixels, device: str) -> Pixels:
    if isinstance(pixels, Mapping):
        return {name: value.to(device) for name, value in pixels.items()}
    return pixels.to(device)
