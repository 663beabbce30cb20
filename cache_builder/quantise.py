"""Numbers to stored numbers and back, in torch, on whatever device they are: the torch side of storage.py."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from cache_builder.storage import Mode

E4M3_MOST = 448.0
"""The largest e4m3 number."""


def quantised(
    values: Float[Tensor, "*rows w"] | UInt8[Tensor, "*rows w"],
    mode: Mode,
    mean: Float[Tensor, " w"] | None = None,
    std: Float[Tensor, " w"] | None = None,
) -> dict[str, Tensor]:
    """What is stored of values: `""` and, where the mode has one, `"_scale"` (…) of every token.

    Args:
        values: finite, of any float dtype; NaN in all of a row marks it as holding nothing. Or levels of pictures.
        mode: how.
        mean, std: of every channel, where the mode asks for them.
    """
    if mode.torch_dtype == "bfloat16":
        return {"": values.to(torch.bfloat16).view(torch.uint16)}
    if not mode.scaled:
        return {"": values.to(getattr(torch, mode.dtype))}
    values = values.float()
    if mode.centred:
        assert mean is not None
        assert std is not None
        values = (values - mean) / std
    most = 127.0 if mode.dtype == "int8" else E4M3_MOST
    scale = values.abs().amax(-1) / most
    # A row of zeros keeps the scale 0: its codes are 0 as well.
    shrunk = values / torch.where(scale > 0, scale, 1.0)[..., None]
    shrunk = torch.nan_to_num(shrunk, nan=0.0).clamp(-most, most)
    if mode.dtype == "int8":
        return {"": shrunk.round().to(torch.int8), "_scale": scale}
    return {"": shrunk.to(torch.float8_e4m3fn).view(torch.uint8), "_scale": scale}


def dequantised(
    stored: Tensor,
    torch_dtype: str,
    scale: Float[Tensor, "*rows"] | None = None,
    mean: Float[Tensor, " w"] | None = None,
    std: Float[Tensor, " w"] | None = None,
) -> Tensor:
    """Inverse of `quantised` up to rounding: float32, on the device of `stored`; see `storage.decoded`."""
    if torch_dtype == "bfloat16":
        return stored.view(torch.bfloat16).float()
    if scale is None:
        return stored
    values = stored.view(torch.float8_e4m3fn).float() if torch_dtype else stored.float()
    values = values * scale[..., None]
    return values if mean is None or std is None else torch.addcmul(mean, values, std)


def pooled_2x2(patches: Float[Tensor, "b n w"]) -> Float[Tensor, "b m w"]:
    """Means over windows of 2 × 2 of a square grid; a last odd row or column is averaged alone."""
    b, n, w = patches.shape
    side = round(n**0.5)
    grid = patches.transpose(1, 2).reshape(b, w, side, side)
    pooled = F.avg_pool2d(grid, 2, ceil_mode=True, count_include_pad=False)
    return pooled.flatten(2).transpose(1, 2).contiguous()


class Moments:
    """Mean and standard deviation of every channel of streams, gathered batch by batch in double precision."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[int, Tensor, Tensor]] = {}

    def add(self, name: str, rows: Float[Tensor, "n w"]) -> None:
        """More rows of a stream."""
        rows = rows.double()
        n, total, squares = self._sums.get(name, (0, torch.zeros(()), torch.zeros(())))
        self._sums[name] = (
            n + len(rows),
            total.to(rows.device) + rows.sum(0),
            squares.to(rows.device) + rows.square().sum(0),
        )

    def found(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Stream → mean and standard deviation (W); a channel that never changes has the deviation 1."""
        out: dict[str, tuple[Tensor, Tensor]] = {}
        for name, (n, total, squares) in self._sums.items():
            mean = total / n
            std = (squares / n - mean.square()).clamp(min=0).sqrt()
            # Below single precision's grain around the mean, a deviation is rounding noise.
            std = torch.where(std > 1e-6 * mean.abs() + 1e-12, std, 1.0)
            out[name] = mean.float().cpu(), std.float().cpu()
        return out
