"""Half precision and compiled blocks: how far they are from float32, and that nothing else changes.

Bounds are relative to the largest value of a stream. bfloat16 keeps 8 bits, float16 11: rounding is 2**-9 and 2**-12
for each factor that autocast casts, and adds up over blocks. The same float32 weights are read out in all of them.
"""

import shutil
from pathlib import Path
from typing import Any

import kinds
import pytest
import torch
from kinds import HUB, KINDS, OPEN_CLIP, POOLING, TEXTS, largest, library, stacked

from cache_builder.readout import pool_image, pool_text, project_patches

BOUND = {"bfloat16": 2e-2, "float16": 2.5e-3}
"""Largest difference of any stream's value, in units of the stream's largest; measured 1.2e-2 and 1.5e-3."""

COSINE = {"bfloat16": 0.9998, "float16": 0.99999}
"""Smallest cosine of a pooled vector with that of float32."""

COMPILED = 4e-6
"""Fused operations round once where separate ones round twice; values are of order 3."""


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def directory(kind: str) -> Path:
    return kinds.directory(kind)


def streams(kind: str, model: Any) -> dict[str, torch.Tensor]:
    """All a pass gives, rows that nobody stores left out."""
    texts = [t for t in TEXTS if t or kind not in kinds.LLAVA]
    image = model.encode_images(stacked(model), [1])
    text = model.encode_texts(model.tokenize(texts))
    rows = torch.arange(text["tokens"].shape[1]) < text["length"][:, None]
    found = {f"image/{name}": value for name, value in image.items() if name != "length"}
    if "length" in image:
        real = torch.arange(image["patches"].shape[1]) < image["length"][:, None]
        found |= {f"image/{n}": image[n][real] for n in ("patches", "block_1")}
    found |= {"text/tokens": text["tokens"][rows]}
    return found | ({"text/pooled": text["pooled"]} if "pooled" in text else {})


@pytest.mark.parametrize("dtype", BOUND)
def test_half_precision_is_the_library_under_autocast_and_stays_close(
    kind: str, directory: Path, dtype: str
) -> None:
    whole, half = kinds.model(kind), kinds.load(kind, directory, dtype=dtype)
    exact, ours = streams(kind, whole), streams(kind, half)
    for name, value in exact.items():
        assert largest(ours[name], value) <= BOUND[dtype] * float(value.abs().max()), name
        if name.endswith("pooled"):
            cosine = torch.cosine_similarity(ours[name].float(), value)
            assert cosine.min() >= COSINE[dtype], name
    assert half.spec.compute.startswith(f"{dtype} autocast")
    assert half.spec.weights == whole.spec.weights
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    readout = half.readout()
    assert readout.keys() == whole.readout().keys()
    assert all(torch.equal(value, readout[name]) for name, value in whole.readout().items())
    if kind in POOLING:
        texts = half.tokenize(TEXTS)
        with torch.autocast("cpu", getattr(torch, dtype)):
            theirs = library(kind, half, stacked(half), texts)
        assert torch.equal(ours["image/pooled"], theirs["image/pooled"])
        assert torch.equal(ours["text/pooled"], theirs["text/pooled"])
        assert torch.equal(half.encode_images(stacked(half), [2])["block_2"], theirs["image/raw"])


@pytest.mark.parametrize("dtype", BOUND)
def test_the_readout_in_float32_of_half_precision_tokens_is_closer_to_float32(
    kind: str, directory: Path, dtype: str
) -> None:
    """A reader pools in float32, so only the tower's rounding is left; the bound is the tower's own."""
    whole, half = kinds.model(kind), kinds.load(kind, directory, dtype=dtype)
    r, pixels = half.readout(), stacked(half)
    exact, ours = whole.encode_images(pixels), half.encode_images(pixels)
    patches = ours["patches"].float()
    if kind not in POOLING:
        a, b = project_patches(r, patches), project_patches(r, exact["patches"])
    else:
        mask = None
        if "length" in ours:
            mask = torch.arange(patches.shape[1]) < ours["length"][:, None]
        prefix = ours["prefix"].float() if "prefix" in ours else None
        a, b = pool_image(r, prefix, patches, mask), exact["pooled"]
        ids = half.tokenize(TEXTS)
        text, rows = half.encode_texts(ids), whole.encode_texts(ids)
        last = text["tokens"][torch.arange(len(ids)), text["length"] - 1].float()
        assert largest(pool_text(r, last), rows["pooled"]) <= BOUND[dtype] * float(
            rows["pooled"].abs().max()
        )
    assert largest(a, b) <= BOUND[dtype] * float(b.abs().max())


@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU: install g++"
)
@pytest.mark.parametrize("kind", ["clip", "siglip2-naflex"], scope="module")
def test_compiled_blocks_give_the_same_but_for_rounding(kind: str, directory: Path) -> None:
    """One of open_clip's and one of transformers'."""
    plain, compiled = kinds.model(kind), kinds.load(kind, directory, compiled=True)
    exact, ours = streams(kind, plain), streams(kind, compiled)
    for name, value in exact.items():
        assert largest(ours[name], value) <= COMPILED, name
    assert compiled.spec.compute == plain.spec.compute + ", torch.compile"
    assert compiled.spec.weights == plain.spec.weights
    assert kind in OPEN_CLIP + HUB
