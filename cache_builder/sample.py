"""What a storage mode costs a backbone's embeddings: measured on a sample, before anything is decided.

Plain cosine hides destroyed features: a few huge channels carry it. So rows are compared whitened: every channel is
brought to mean 0 and deviation 1 first. A lossy mode passes with a mean of 0.999 and a minimum of 0.99 (our choice).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numcodecs
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

from cache_builder.backbones.base import Backbone
from cache_builder.beside import each
from cache_builder.contents import image_order
from cache_builder.datasets.base import Dataset, ImageRecord
from cache_builder.encoders import PictureEncoder
from cache_builder.errors import BadInput
from cache_builder.format import is_ragged, stream
from cache_builder.header import StorageReport
from cache_builder.loading import attempt
from cache_builder.quantise import Moments, dequantised, quantised
from cache_builder.spec import CacheSpec
from cache_builder.storage import MODES, TOKENS
from cache_builder.words import words_of

MOST = 1024
"""Rows of a side that are looked at."""

KEPT = 16384
"""Tokens of a stream that are kept to measure what a mode costs."""

BATCH = 32

WHITE_MEAN, WHITE_MIN = 0.999, 0.99
"""What a lossy mode must reach on every stream."""

LOSSY = ("bf16", "int8-channel", "fp8-token")


@dataclass
class Sample:
    """Token streams of some rows.

    Attributes:
        moments: of all tokens seen.
        rows: stream → some of its tokens (n, W).
    """

    moments: Moments = field(default_factory=Moments)
    rows: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, tokens: Tensor) -> None:
        """More tokens (n, W) of a stream."""
        tokens = tokens.detach().float().cpu()
        self.moments.add(name, tokens)
        held = self.rows.get(name, tokens[:0])
        if len(held) < KEPT:
            self.rows[name] = torch.cat([held, tokens[: KEPT - len(held)]])


def sampled(spec: CacheSpec, dataset: Dataset, backbone: Backbone, most: int = MOST) -> Sample:
    """Encode the first `most` images in row order, as many texts and words, and look at their token streams.

    Raises:
        BadInput: streams of images are asked for, and no image of the sample can be used.
    """
    sample = Sample()
    with torch.inference_mode():
        for name, tokens in _tokens(spec, dataset, backbone, most):
            sample.add(name, tokens)
    asked = [s for s in spec.streams if stream(s).kind in TOKENS]
    empty = [s for s in asked if s not in sample.rows]
    if empty and dataset.images and any(s.startswith("image/") for s in empty):
        raise BadInput(
            f"not one of the first {min(most, len(dataset.images))} images can be used: {empty[0]} cannot be measured"
        )
    for name in empty:  # a side without rows: nothing will be stored by these numbers
        width = backbone.spec.dims["image_width" if name.startswith("image/") else "text_width"]
        sample.add(name, torch.zeros(1, width))
    return sample


def _tokens(
    spec: CacheSpec, dataset: Dataset, backbone: Backbone, most: int
) -> Iterator[tuple[str, Tensor]]:
    """Stream and tokens (n, W), batch by batch."""
    names = [s for s in spec.streams if stream(s).kind in TOKENS]
    images = [s for s in names if s.startswith("image/")]
    if images:
        encoder = PictureEncoder(images, backbone)
        for looks in _looks(encoder, image_order(spec, dataset)[:most]):
            outputs = encoder.encode(each(looks, lambda t: t.to(backbone.device)))
            for name in images:
                key = stream(name).key
                home = key.rpartition("/")[0]
                ragged = is_ragged(name, spec.backbone.dims)
                length = outputs[f"{home}/length" if home else "length"] if ragged else None
                yield name, _real(outputs[key], length)
    if "text/tokens" in names:
        texts = [t.text for t in dataset.texts[:: max(1, -(-len(dataset.texts) // most))]]
        for start in range(0, len(texts), BATCH):
            ids = backbone.tokenize(texts[start : start + BATCH])
            found = backbone.encode_texts(ids.to(backbone.device))
            yield "text/tokens", _real(found["tokens"], found["length"])
    if "word/states" in names:
        parts = [part for word in words_of(dataset.tasks, dataset.words) for part in word.parts]
        parts = parts[:: max(1, -(-len(parts) // most))]
        for start in range(0, len(parts), BATCH):
            ids = backbone.tokenize_words(parts[start : start + BATCH])
            found = backbone.encode_words(ids.to(backbone.device))
            yield "word/states", _real(found["states"], found["length"])


def _looks(encoder: PictureEncoder, records: list[ImageRecord]) -> Iterator[Mapping[str, Tensor]]:
    """Preprocessed looks at those of the pictures that can be used, in batches."""
    for start in range(0, len(records), BATCH):
        found = [attempt(r.id, r.open) for r in records[start : start + BATCH]]
        usable = [image for image in found if not isinstance(image, str)]
        if usable:
            shown = [encoder.looks(0, image) for image in usable]
            ready = [
                {home: encoder.backbone.preprocess(look) for home, look in looks.items()}
                for looks in shown
            ]
            yield default_collate(ready)


def _real(values: Tensor, length: Tensor | None) -> Tensor:
    """Tokens one after the other, without padding."""
    if length is None:
        return values.flatten(0, 1)
    places = torch.arange(values.shape[1], device=values.device)
    return values[places < length.to(values.device)[:, None]]


def reports(sample: Sample, storage: str) -> dict[str, StorageReport]:
    """What a mode costs every token stream of a sample."""
    moments = sample.moments.found()
    return {name: _report(rows, storage, *moments[name]) for name, rows in sample.rows.items()}


def _report(rows: Tensor, storage: str, mean: Tensor, std: Tensor) -> StorageReport:
    mode = MODES[storage]
    given = (mean, std) if mode.centred else (None, None)
    stored = quantised(rows, mode, *given)
    back = dequantised(stored[""], mode.torch_dtype, stored.get("_scale"), *given).float()
    white = F.cosine_similarity((rows - mean) / std, (back - mean) / std, dim=-1)
    alike = F.cosine_similarity(rows, back, dim=-1)
    size = sum(t.numel() * t.element_size() for t in stored.values())
    if mode.compressed:
        blosc = numcodecs.Blosc(cname="zstd", clevel=5, shuffle=numcodecs.Blosc.BITSHUFFLE)
        size = len(blosc.encode(np.ascontiguousarray(stored[""].numpy())))
    return StorageReport(
        bytes_per_value=size / rows.numel(),
        cosine=float(alike.mean()),
        white_mean=float(white.mean()),
        white_min=float(white.min()),
        rows=len(rows),
    )


def passes(found: Mapping[str, StorageReport]) -> bool:
    """Does a mode keep what every stream says?"""
    return all(r.white_mean >= WHITE_MEAN and r.white_min >= WHITE_MIN for r in found.values())


def smallest(found: Mapping[str, Mapping[str, StorageReport]]) -> str:
    """The mode with the fewest bytes of those that pass; `fp16` if none does."""

    def size(mode: str) -> float:
        return sum(r.bytes_per_value for r in found[mode].values())

    good = [mode for mode in LOSSY if passes(found[mode]) and size(mode) < size("fp16")]
    return min(good, key=size, default="fp16")
