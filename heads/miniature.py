"""Small random features for `check_head` and tests: a context, rows of any stream, a batch."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from heads.base import Context, Head
from heads.features import Batch, Features, Partner
from heads.live import tiny
from heads.strings import STREAM, pack

RAGGED = ("crop/pooled", "segment/pooled")
"""Streams of rows that differ in length, besides tokens of texts."""

B, M = 5, 6
D, N, W, L, V = 8, 7, 10, 4, 9
K, S = 6, 3
DEPTH = 3
"""Image blocks that `small_context` counts from the end."""


def small_context() -> Context:
    """Shapes of a miniature cache, a random readout and a 3 × 2 vocabulary."""
    g = torch.Generator().manual_seed(7)
    readout = {"logit_scale": torch.tensor(2.0)}
    for side, width in (("image", W), ("text", V)):
        readout |= {
            f"{side}/norm.weight": 1 + 0.1 * torch.randn(width, generator=g),
            f"{side}/norm.bias": 0.1 * torch.randn(width, generator=g),
            f"{side}/proj": torch.randn(width, D, generator=g) / width**0.5,
            f"{side}/eps": torch.tensor(1e-5),
        }
    shapes = {
        "image/patches": (N, W),
        "image/prefix": (1, W),
        **{f"image/block_-{k}": (1 + N, W) for k in range(1, DEPTH + 1)},
        "image/pooled": (D,),
        "text/pooled": (D,),
        "text/tokens": (L, V),
        "crop/pooled": (K, D),
        "segment/pooled": (S, D),
    }
    return Context(shapes, readout, ("red", "wet", "old"), ("cup", "dog"))


def live_context(family: str, directory: Path) -> Context:
    """Like `small_context`, of a family's miniature, whose files are left in `directory`."""
    backbone = tiny(family, directory)
    dims = backbone.spec.dims
    text = (dims["context"], dims["text_width"])
    block = (dims["prefix"] + dims["patches"], dims["image_width"])
    shapes = {
        "image/patches": (dims["patches"], dims["image_width"]),
        "image/prefix": (dims["prefix"], dims["image_width"]),
        "image/pixels": (3, dims["image_size"], dims["image_size"]),
        **{f"image/block_-{k}": block for k in range(1, dims["image_blocks"] + 1)},
        "image/pooled": (dims["joint"],),
        "image/view_flip/pooled": (dims["joint"],),
        "text/pooled": (dims["joint"],),
        "text/tokens": text,
    }
    small = small_context()
    return Context(
        shapes,
        backbone.readout(),
        small.attrs,
        small.objs,
        backbone=backbone.spec,
        backbone_name=f"{family}:{directory}",
    )


def small_features(n: int, seed: int, streams: frozenset[str], context: Context) -> Features:
    """`n` random rows that hold `streams` and nothing else; text rows differ in length and carry labels.

    Pixels are uint8, everything else of pictures is float32.
    """
    g = torch.Generator().manual_seed(seed)
    out: dict[str, Tensor] = {}
    if STREAM in streams:
        said = ("is red", "has a bow", "add a dog left of it")
        out[STREAM] = pack([said[i % 3] for i in range(n)])
    for stream in sorted(streams - {"text/mask", "text/ids", STREAM}):
        shape = (n, *context.shapes[stream])
        if stream.endswith("/pixels"):
            out[stream] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=g)
            continue
        out[stream] = 3 * torch.randn(shape, generator=g)
        if stream in RAGGED:
            mask = torch.arange(out[stream].shape[1]) < (torch.arange(n) % 3 + 1)[:, None]
            out[stream] = out[stream] * mask[..., None]
            out[f"{stream.partition('/')[0]}/mask"] = mask
    if streams & {"text/tokens", "text/mask", "text/ids"}:
        length = context.shapes["text/tokens"][0]
        mask = torch.arange(length) < (torch.arange(n) % (length - 1) + 2)[:, None]
        out["text/mask"] = mask
        if "text/tokens" in out:
            out["text/tokens"] = out["text/tokens"] * mask[..., None]
        if "text/ids" in streams:
            out["text/ids"] = torch.randint(1, 99, mask.shape, generator=g) * mask
    index = torch.arange(n)
    labels = {"attr": index % len(context.attrs), "obj": index % len(context.objs)}
    return Features(out, labels)


def small_batch(head: Head) -> Batch:
    """Five queries, six candidates, one hard negative each; labelled candidates only where a head needs them."""
    needs = head.training_needs(head.config)
    queries = small_features(B, 1, needs.queries, head.context)
    candidates = small_features(M, 2, needs.candidates, head.context)
    constant = head.before_training([queries])
    queries = replace(queries, streams={**queries.streams, **constant})
    if head.tasks != frozenset({"czsl"}) and needs.candidates:
        candidates = replace(candidates, labels={})
    target = torch.arange(B)
    ignore = torch.zeros(B, M, dtype=torch.bool)
    ignore[0, 3] = True
    partners = {
        kind: Partner(small_features(B, 6 + k, needs.queries, head.context), target, target != k)
        for k, kind in enumerate(sorted(needs.partners))
    }
    negative = ((target + 1) % M)[:, None]
    return Batch(queries, candidates, target, ignore, negative, partners, target)
