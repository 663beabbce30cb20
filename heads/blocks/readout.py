"""The backbone's own way from raw tokens to the joint space, frozen: final norm, projection, logit scale and bias."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cache_builder.readout import (
    final_norm,
    project_patches,
    project_tokens,
    project_view,
    view_image,
)
from heads.errors import ConfigError

CAP = 100.0
"""Largest temperature that is learned (METHODS' rule, as CLIP's own training has it)."""


def temperature(log: Float[Tensor, "*b"], start: float) -> Float[Tensor, "*b"]:
    """exp(log), at most `CAP`, or what it started from if that was more; its gradient passes also at the cap.

    Args:
        log: what is trained.
        start: exp of what it began as.
    """
    over = log - math.log(max(CAP, start))
    return (log - over.clamp(min=0).detach()).exp()


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

    def has(self, name: str) -> bool:
        """Is there a tensor of that name?"""
        return name in self._names

    def scale(self) -> Tensor:
        """The factor s on cosines: exp of the stored log, 100 for trained CLIPs; 1 where the backbone has none."""
        return (
            self["logit_scale"].exp().squeeze() if "logit_scale" in self._names else torch.ones(())
        )

    def bias(self) -> Tensor:
        """Constant on every logit; 0 where the backbone has none."""
        return self["logit_bias"].squeeze() if "logit_bias" in self._names else torch.zeros(())

    def norm(self, side: str, raw: Float[Tensor, "*b w"]) -> Float[Tensor, "*b w"]:
        """The final norm of tower `side` ("image" or "text") on raw tokens, in float32.

        LLaVA reads its projector on patches without a norm: there, they stay as they are.
        """
        if not (side == "image" and "image/projector.fc1.weight" in self._names):
            _ = self[f"{side}/norm.weight"]  # refuses a readout without it
        with torch.autocast(raw.device.type, enabled=False):
            return final_norm(self._tensors(), side, raw.float())

    def joint(self, side: str, raw: Float[Tensor, "b n w"]) -> Float[Tensor, "b n d"]:
        """Raw tokens of tower `side` in the joint space, as what is pooled gets there; not normalised."""
        self.joint_width(side)  # refuses a readout without projection
        project = project_patches if side == "image" else project_tokens
        with torch.autocast(raw.device.type, enabled=False):
            return project(self._tensors(), raw.float())

    def pools_all_rows(self) -> bool:
        """Does a learned query pool all image rows? Else row 0, the class token, is what is pooled."""
        return self.has("image/pool.latent")

    def view(
        self, rows: Float[Tensor, "b n w"], mask: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b w"]:
        """What the backbone's learned query sees of all raw image rows, prefix first.

        Args:
            rows: of the image tower.
            mask: True where a row is real; None is everywhere.
        """
        with torch.autocast(rows.device.type, enabled=False):
            return view_image(self._tensors(), rows.float(), mask)

    def image(self, row: Float[Tensor, "b w"]) -> Float[Tensor, "b d"]:
        """The pooled embedding that a `view`, or a raw class token where there is no such query, leads to."""
        view = row if self.pools_all_rows() else self.norm("image", row)
        with torch.autocast(row.device.type, enabled=False):
            return project_view(self._tensors(), view.float())

    def joint_width(self, side: str) -> int:
        """Width of the space that `joint` leads to: D, or the language model's where patches are projected into it."""
        if side == "image" and "image/projector.fc2.weight" in self._names:
            return self["image/projector.fc2.weight"].shape[0]
        if f"{side}/proj" in self._names:
            return self[f"{side}/proj"].shape[1]
        projected = f"{side}/proj.weight" in self._names
        if not projected and side == "image" and "image/pool.latent" in self._names:
            return self["image/pool.latent"].shape[-1]
        if not projected and side == "text" and "image/projector.fc2.weight" in self._names:
            return self["text/norm.weight"].shape[0]
        return self[f"{side}/proj.weight"].shape[0]

    def _tensors(self) -> dict[str, Tensor]:
        return {name: self[name] for name in self._names}
