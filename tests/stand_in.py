"""A backbone and a data set of a few numbers, for tests of the cache itself: sizes all differ, every value is known.

The real miniature is `cache_builder.backbones.clip.tiny()`; this one starts in no time and can be made to misbehave.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cache_builder.datasets.base import (
    CompositionExample,
    CompositionTask,
    Dataset,
    ImageRecord,
    Tasks,
    TextRecord,
)
from cache_builder.spec import BackboneSpec

DIMS = {
    "image_size": 6,
    "patches": 5,
    "prefix": 2,
    "image_width": 3,
    "text_width": 4,
    "context": 11,
    "joint": 7,
}

SPEC = BackboneSpec(
    family="stand_in",
    checkpoint="none",
    weights="0" * 64,
    preprocessing="mean colour",
    tokenizer="bytes",
    layer="only",
    dims=DIMS,
    activation="none",
    compute="float32",
    versions={"torch": "any"},
)

KEPT_DIMS = {
    **{name: n for name, n in DIMS.items() if name not in ("image_size", "patches", "prefix")},
    "patch_size": 2,
    "most_patches": 12,
}
"""Of the stand-in whose pictures keep their shape."""


class StandIn:
    """Streams are simple functions of the mean colour, or of the bytes of a text."""

    streams = frozenset(
        {"image/pooled", "image/patches", "image/prefix", "text/pooled", "text/tokens"}
    )
    depth: Mapping[str, int] = {"image": 2}
    device = "cpu"

    def __init__(self, change: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None):
        self.spec = SPEC
        self.change = change or (lambda outputs: outputs)
        self.encoded: list[int] = []

    def preprocess(self, image: Image.Image) -> Any:
        colour = torch.tensor(image.convert("RGB").getpixel((0, 0)), dtype=torch.float32)
        return colour[:, None, None].expand(3, 6, 6) / 255

    def levels(self, pixels: Any) -> Tensor:
        return (pixels * 255).round().to(torch.uint8)

    def normalised(self, levels: Tensor) -> Any:
        return levels.float() / 255

    def grid(self, width: int, height: int) -> tuple[int, int]:
        return 1, DIMS["patches"]

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        ids = torch.zeros(len(texts), DIMS["context"], dtype=torch.int64)
        for i, text in enumerate(texts):
            row = [257, *(b + 1 for b in text.encode()[: DIMS["context"] - 2]), 258]
            ids[i, : len(row)] = torch.tensor(row)
        return ids

    def tokenize_words(self, phrases: Sequence[str]) -> Tensor:
        return self.tokenize(phrases)[:, 1:]

    def vocabulary(self) -> list[str]:
        return ["<pad>", *(chr(i) for i in range(256)), "<start>", "<end>"]

    def truncated(self, texts: Sequence[str]) -> int:
        return sum(len(t.encode()) > DIMS["context"] - 2 for t in texts)

    def lengths(self, ids: Tensor) -> Tensor:
        return (ids > 0).sum(1)

    def encode_images(self, pixels: Any, blocks: Collection[int] = ()) -> dict[str, Tensor]:
        self.encoded.append(len(pixels))
        colour = pixels.mean((2, 3))
        steps = torch.arange(1, 6) / 10
        patches, prefix = colour[:, None] + steps[:, None], colour[:, None] - steps[:2, None]
        entering = {f"block_{k}": torch.cat([prefix, patches], 1) - k for k in blocks}
        return self.change(
            {
                "pooled": torch.cat([colour, colour.square(), colour[:, :1]], 1),
                "patches": patches,
                "prefix": prefix,
                **entering,
            }
        )

    def encode_texts(self, ids: Tensor) -> dict[str, Tensor]:
        self.encoded.append(len(ids))
        tokens = torch.stack([ids / 8, ids.float(), -ids.float(), torch.ones(ids.shape)], 2)
        pooled = torch.cat([tokens.mean(1), tokens.amax(1)[:, :3]], 1)
        return self.change({"pooled": pooled, "tokens": tokens, "length": self.lengths(ids)})

    def encode_words(self, ids: Tensor) -> dict[str, Tensor]:
        self.encoded.append(len(ids))
        states = torch.stack([ids.float(), -ids.float(), ids / 4, torch.ones(ids.shape)], 2)
        return self.change({"states": states, "length": self.lengths(ids)})

    def readout(self) -> dict[str, Tensor]:
        return {"logit_scale": torch.tensor(2.5), "image/proj": torch.arange(21.0).reshape(3, 7)}


class WordStandIn(StandIn):
    """Has the states of words too."""

    streams = StandIn.streams | {"word/states"}


class KeptStandIn(StandIn):
    """Pictures keep their shape: as many patches of 2 × 2 pixels as fit, 12 at most; a patch is its first pixel."""

    streams = frozenset({"image/pooled", "image/patches", "text/pooled"})

    def __init__(self, change: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None):
        super().__init__(change)
        self.spec = SPEC.model_copy(update={"dims": KEPT_DIMS})

    def grid(self, width: int, height: int) -> tuple[int, int]:
        rows = max(1, min(height // 2, 12))
        return rows, max(1, min(width // 2, 12 // rows))

    def preprocess(self, image: Image.Image) -> dict[str, Tensor]:
        rows, columns = self.grid(*image.size)
        pixels = torch.zeros(12, 3)
        for i in range(rows * columns):
            place = i % columns * 2, i // columns * 2
            pixels[i] = torch.tensor(image.getpixel(place)) / 255
        return {"pixels": pixels, "mask": torch.arange(12) < rows * columns}

    def encode_images(
        self, pixels: Mapping[str, Tensor], blocks: Collection[int] = ()
    ) -> dict[str, Tensor]:
        values, mask = pixels["pixels"], pixels["mask"]
        self.encoded.append(len(values))
        mean = values.sum(1) / mask.sum(1, keepdim=True)
        most = int(mask.sum(1).max())  # cut to the longest of the batch, as some libraries do
        found = {"patches": values + 1, **{f"block_{k}": values - k for k in blocks}}
        found = {name: value[:, :most] for name, value in found.items()}
        pooled = torch.cat([mean, mean.square(), mean[:, :1]], 1)
        return self.change({"pooled": pooled, **found, "length": mask.sum(1)})


def dataset(
    n_images: int = 13, n_texts: int = 9, *, bad: Collection[int] = (), texts: Sequence[str] = ()
) -> Dataset:
    """Single-coloured pictures; those in `bad` cannot be opened."""

    def opener(i: int) -> Callable[[], Image.Image]:
        def open_image() -> Image.Image:
            if i in bad:
                raise OSError(f"picture {i} is cut off")
            return Image.new("RGB", (6, 6), (i * 7 % 256, i * 31 % 256, 255 - i))

        return open_image

    strings = texts or [f"text {i} " + "é" * (i % 4) for i in range(n_texts)]
    records = tuple(TextRecord(f"t{i}", text) for i, text in enumerate(strings))
    task = CompositionTask(
        examples=tuple(
            CompositionExample(f"i{i}", "red", "cube", "train") for i in range(n_images)
        ),
        pairs={"train": (("red", "cube"),), "test": (("red", "ball"),)},
        prompts={("red", "cube"): "t0", ("red", "ball"): "t1"},
    )
    return Dataset(
        name="stand_in",
        images=tuple(ImageRecord(f"i{i}", opener(i)) for i in range(n_images)),
        texts=records,
        tasks=Tasks(czsl=task),
        decode="colours",
        counts={"images": str(n_images)},
        root="nowhere",
    )
