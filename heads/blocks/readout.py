"""The backbone's own way from raw tokens to the joint space, frozen: final norm, projection, logit scale and bias."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from cache_builder.readout import project_patches, project_tokens
from heads.errors import ConfigError


class Readout(nn.Module):
    """Frozen tensors of `readout/`, as buffers that move with the head but are not saved with it.

    They belong to the cache, and a head's `Context` keeps a copy.

    Args:
        tensors: name → value, e.g. `image/norm.weight` (W,), `image/proj` (W, D) or
            `text/proj.weight` (D, V) and `text/proj.bias` (D,) of a linear layer, `image/eps`, `logit_scale` (a log).

    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names: dict[str, str] = {}
        for i, (name, value) in enumerate(sorted(tensors.items())):
            self._names[name] = f"tensor_{i}"  # a buffer's name may hold neither dot nor slash
            self.register_buffer(
                self._names[name], value.detach().clone().float(), persistent=False
            )

    def __getitem__(self, name: str) -> Tensor:
        """A tensor by its name in the cache."""
        if name not in self._names:
            raise ConfigError(
                f"this method needs readout/{name}, but the cache holds {', '.join(self._names) or 'no readout'}; "
                "build the cache with a backbone that has a linear readout, or choose another method"
            )
        return self.get_buffer(self._names[name])

    def scale(self) -> Tensor:
        """The factor s on cosines: exp of the stored log, 100 for trained CLIPs; 1 where the backbone has none."""
        return (
            self["logit_scale"].exp().squeeze() if "logit_scale" in self._names else torch.ones(())
        )

    def bias(self) -> Tensor:
        """Constant on every logit; 0 where the backbone has none."""
        return self["logit_bias"].squeeze() if "logit_bias" in self._names else torch.zeros(())

    def norm(self, side: str, raw: Float[Tensor, "*b w"]) -> Float[Tensor, "*b w"]:
        """The final norm of tower `side` ("image" or "text") on raw tokens, in float32."""
        weight, bias = self[f"{side}/norm.weight"], self[f"{side}/norm.bias"]
        with torch.autocast(raw.device.type, enabled=False):
            return F.layer_norm(raw.float(), weight.shape, weight, bias, self.eps(side))

    def eps(self, side: str) -> float:
        """Epsilon of the final norm."""
        return float(self[f"{side}/eps"])

    def joint(self, side: str, raw: Float[Tensor, "b n w"]) -> Float[Tensor, "b n d"]:
        """Raw tokens of tower `side` in the joint space, as its pooled token gets there; not normalised."""
        self.joint_width(side)  # refuses a readout without projection
        project = project_patches if side == "image" else project_tokens
        with torch.autocast(raw.device.type, enabled=False):
            return project({name: self[name] for name in self._names}, raw.float())

    def joint_width(self, side: str) -> int:
        """D of the projection of tower `side`."""
        if f"{side}/proj" in self._names:
            return self[f"{side}/proj"].shape[1]
        return self[f"{side}/proj.weight"].shape[0]
