"""How numbers are stored: one word per mode, what it makes of a stream, and how the numbers come back.

    fp32, fp16     as they are
    bf16           uint16 with the attribute torch_dtype: zarr knows no bfloat16
    int8-channel   (value − mean) / std of its channel, then 8 bits with a scale per token
    fp8-token      e4m3 with a scale per token, as uint8
    pool2x2        fp16, patches averaged over windows of 2 × 2
    lossless       fp16, compressed

Lossy modes are for tokens. Pooled embeddings and prefix tokens are small and stay fp16; pixels are 8-bit levels in
every mode, which `lossless` compresses. A row that holds no numbers (a quarantined picture) has the scale NaN. numpy
only: quantise.py is the torch side. Source: our choice, after the measurements in docs/storage.md.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_builder.errors import UnknownName


class Mode(NamedTuple):
    """What a stored array consists of.

    Attributes:
        dtype: zarr data type.
        torch_dtype: what the numbers are, where zarr has no such type.
        scaled: a scale per token stands beside it, `…_scale`.
        centred: values are of mean 0 and standard deviation 1 per channel; `…_mean` and `…_std` stand beside it.
        compressed: without loss.
    """

    dtype: str
    torch_dtype: str = ""
    scaled: bool = False
    centred: bool = False
    compressed: bool = False


MODES = {
    "fp16": Mode("float16"),
    "fp32": Mode("float32"),
    "bf16": Mode("uint16", "bfloat16"),
    "int8-channel": Mode("int8", scaled=True, centred=True),
    "fp8-token": Mode("uint8", "float8_e4m3fn", scaled=True),
    "pool2x2": Mode("float16"),
    "lossless": Mode("float16", compressed=True),
}
"""By the word that `--store` takes."""

TOKENS = ("patches", "block", "tokens", "states")
"""Kinds of stream that lossy modes are for."""

STATISTICS = ("_mean", "_std")
"""What stands beside a centred array, one number per channel."""


def mode_of(storage: str, kind: str) -> Mode:
    """How a kind of stream is stored under a storage mode."""
    mode = MODES[storage]
    if kind == "pixels":
        return Mode("uint8", compressed=mode.compressed)
    return MODES["fp16"] if mode.scaled and kind not in TOKENS else mode


def pooled_patches(dims: Mapping[str, int]) -> int:
    """Patches that are left of a square grid after windows of 2 × 2; a last odd row or column is averaged alone.

    Raises:
        UnknownName: patches are no square grid.
    """
    n = dims.get("patches", 0)
    side = math.isqrt(n)
    if side * side != n or not n:
        raise UnknownName(
            f"--store pool2x2 needs patches in a square grid, but this backbone has {n or 'as many as fit the picture'}"
        )
    return (-(-side // 2)) ** 2


def decoded(
    stored: NDArray[Any],
    torch_dtype: str,
    scale: NDArray[np.float32] | None = None,
    mean: NDArray[np.float32] | None = None,
    std: NDArray[np.float32] | None = None,
) -> NDArray[Any]:
    """Numbers as they were meant: float32 (…, W), or as stored where nothing was done to them.

    Args:
        stored: (…, W).
        torch_dtype: of its layout.
        scale: (…) per token.
        mean, std: (W) per channel.
    """
    if torch_dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if scale is None:
        return stored
    values = E4M3[stored] if torch_dtype == "float8_e4m3fn" else stored.astype(np.float32)
    values = values * scale[..., None]
    if mean is not None and std is not None:
        values = values * std + mean
    return values


def _e4m3(code: int) -> float:
    """The number of an eight-bit float with 4 exponent bits, bias 7, 3 mantissa bits and no infinity."""
    exponent, mantissa = code >> 3 & 15, code & 7
    size = math.ldexp(mantissa, -9) if not exponent else math.ldexp(8 + mantissa, exponent - 10)
    size = math.nan if (exponent, mantissa) == (15, 7) else size
    return -size if code & 128 else size


E4M3 = np.array([_e4m3(code) for code in range(256)], np.float32)
"""Every e4m3 number by its code."""
