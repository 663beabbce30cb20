"""An inversion network φ and what it reads: for the method that trains one, and for one that adapts a trained one.

    pic2word, searle, lincir     image/pooled (B, D), un-normalised                                    → S* (B, V)
    context_i2w                  image/prefix and image/patches (B, N+1, W), text/pooled of the edit   → S* (B, V)

Weights come from a run of `inversion`, or from a file that its authors published. They travel in `Context.tables`, by
the names that they have in the network; a head that was given some keeps them frozen.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from heads.base import Context
from heads.blocks.inversion import ContextI2W, Kind, Pic2Word, Searle
from heads.errors import ConfigError
from heads.features import Features

TEMPLATES: Mapping[Kind, str] = {
    "pic2word": "a photo of $ , {modification}",
    "searle": "a photo of $ that {modification}",
    "lincir": "a photo of $ that {modification}",
    "context_i2w": "a photo of $ that {modification}",
}
"""Query text of each kind (METHODS: released code; of context_i2w our choice within its family)."""

TABLE = "phi/"
"""Before the names of given weights among `Context.tables`; the kind follows."""


class Phi(nn.Module):
    """One network, built for a cache.

    Args:
        kind: which one.
        context: shapes of the cache; if its tables hold weights of a φ, they are taken and frozen.

    Attributes:
        width: of a word, V.
        reads: width of the features that come in.
    """

    def __init__(self, kind: Kind, context: Context) -> None:
        super().__init__()
        self.kind = kind
        (d,) = context.shapes["image/pooled"]
        assert context.backbone is not None
        self.width = v = int(context.backbone.dims["text_width"])
        self.reads = context.shapes["image/patches"][-1] if kind == "context_i2w" else d
        self.net: nn.Module
        if kind == "context_i2w":
            self.net = ContextI2W(d, self.reads, v)
        else:
            self.net = Pic2Word(d, v) if kind == "pic2word" else Searle(d, v)
        if given := given_weights(context):
            self.net.load_state_dict(given[1])
            self.requires_grad_(requires_grad=False)

    @staticmethod
    def streams(kind: Kind) -> frozenset[str]:
        """What it reads of queries."""
        if kind != "context_i2w":
            return frozenset({"image/pooled"})
        return frozenset({"image/prefix", "image/patches", "text/pooled"})

    def forward(
        self, queries: Features, modulate: Callable[[Tensor], Tensor] = lambda f: f
    ) -> Float[Tensor, "b v"]:
        """Pseudo-words in float32.

        Args:
            queries: with `streams(kind)`.
            modulate: applied to the features that come in.
        """
        device = next(iter(queries.streams.values())).device
        with torch.autocast(device.type, enabled=False):
            if not isinstance(self.net, ContextI2W):
                return self.net(modulate(queries["image/pooled"].float()))
            rows = torch.cat([queries["image/prefix"], queries["image/patches"]], dim=1).float()
            mask = queries.streams.get("image/mask")
            if mask is not None:
                mask = torch.cat([mask.new_ones(len(mask), rows.shape[1] - mask.shape[1]), mask], 1)
            return self.net(modulate(rows), queries["text/pooled"].float(), mask)


def with_weights(context: Context, source: Path, kind: Kind | None = None) -> Context:
    """`context` with the weights of a trained φ among its tables.

    Args:
        context: of the cache.
        source: a run of `inversion`, or a file that its authors published.
        kind: what it must be; None: whatever it is. A published file of SEARLE and one of LinCIR look alike.

    Raises:
        ConfigError: it is none, or of another kind or width.
    """
    found, state = _of_run(source) if source.is_dir() else _of_file(source, kind)
    if kind not in (None, found):
        raise ConfigError(
            f"{source} holds a φ of {found}, but kind is {kind}; set head.kind={found}"
        )
    made = Phi(found, context).net.state_dict()
    differ = [
        f"{name} {_shape(made.get(name))} instead of {_shape(state.get(name))}"
        for name in sorted({*made, *state})
        if _shape(made.get(name)) != _shape(state.get(name))
    ]
    if differ:
        raise ConfigError(
            f"the φ of {source} does not fit this cache's backbone, which needs {'; '.join(differ[:3])}; use one that "
            "was trained for it"
        )
    tables = {f"{TABLE}{found}/{name}": value.float() for name, value in state.items()}
    return replace(context, tables={**context.tables, **tables})


def given_weights(context: Context) -> tuple[Kind, dict[str, Tensor]] | None:
    """Kind and tensors of a φ among the tables, if there is one."""
    found: dict[Kind, dict[str, Tensor]] = {}
    for kind in get_args(Kind):
        below = f"{TABLE}{kind}/"
        state = {n.removeprefix(below): t for n, t in context.tables.items() if n.startswith(below)}
        if state:
            found[kind] = state
    return next(iter(found.items()), None)


def small_weights(context: Context, kind: Kind) -> Context:
    """`context` with the weights of an untrained φ, for tests of what adapts one."""
    state = Phi(kind, context).net.state_dict()
    tables = {f"{TABLE}{kind}/{name}": value for name, value in state.items()}
    return replace(context, tables={**context.tables, **tables})


def _of_run(run: Path) -> tuple[Kind, dict[str, Tensor]]:
    """The φ that a run trained."""
    try:
        said = json.loads((run / "config.json").read_text(encoding="utf-8"))
        tensors = load_file(run / "model.safetensors")
    except (OSError, SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{run} is no trained run ({error}); train one: headstart train inversion"
        ) from error
    below = "head/phi.net."
    state = {n.removeprefix(below): t for n, t in tensors.items() if n.startswith(below)}
    if not (isinstance(said, dict) and state and said.get("method") == "inversion"):
        method = said.get("method") if isinstance(said, dict) else "nobody"
        raise ConfigError(
            f"{run} is a run of {method}, and φ is trained by inversion; name one of its runs"
        )
    return said["config"]["kind"], state


def _of_file(path: Path, kind: Kind | None) -> tuple[Kind, dict[str, Tensor]]:
    """The φ of a published file."""
    raise ConfigError(f"{path}: published files come with published_phi.py")


def _shape(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else str(tuple(tensor.shape))
