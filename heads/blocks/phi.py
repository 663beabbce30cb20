"""An inversion network φ and what it reads: for the method that trains one, and for one that adapts a trained one.

    pic2word, searle, lincir     image/pooled (B, D), un-normalised                                    → S* (B, V)
    context_i2w                  image/prefix and image/patches (B, N, W), text/pooled of the edit     → S* (B, V)

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
from heads.blocks.inversion import ContextI2W, Kind, image_rows, network
from heads.blocks.published_phi import read_phi
from heads.blocks.readout import Readout
from heads.errors import ConfigError
from heads.features import Features

TEMPLATES: Mapping[Kind, str] = {
    "pic2word": "a photo of $ , {modification}",
    "searle": "a photo of $ that {modification}",
    "lincir": "a photo of $ that {modification}",
    "context_i2w": "a photo of $ that {modification}",
}
"""Query text of each kind (METHODS: released code; of context_i2w our choice within its family)."""

MAY_LACK = frozenset({"image/prefix"})
"""What a φ does without where the backbone has none."""

TABLE = "phi/"
"""Before the names of given weights among `Context.tables`; the kind follows."""


class Phi(nn.Module):
    """One network, built for a cache.

    Args:
        kind: which one.
        context: shapes and readout of the cache; if its tables hold weights of a φ, they are taken and frozen.

    Attributes:
        width: of a word, V.
        reads: width of the features that come in.
    """

    def __init__(self, kind: Kind, context: Context) -> None:
        super().__init__()
        (d,) = context.shapes["image/pooled"]
        assert context.backbone is not None
        self.width = int(context.backbone.dims["text_width"])
        self.reads = context.shapes["image/patches"][-1] if kind == "context_i2w" else d
        self.net = network(kind, d, self.width, self.reads)
        self.readout = Readout(context.readout)
        if given := given_weights(context):
            self.net.load_state_dict(given[1])
            self.requires_grad_(requires_grad=False)

    @staticmethod
    def streams(kind: Kind) -> frozenset[str]:
        """What it reads of queries; of these, image/prefix may be wanting."""
        if kind != "context_i2w":
            return frozenset({"image/pooled"})
        return frozenset({"image/prefix", "image/patches", "text/pooled"})

    def forward(
        self, queries: Features, modulate: Callable[[Tensor], Tensor] = lambda f: f
    ) -> Float[Tensor, "b v"]:
        """Pseudo-words in float32.

        Args:
            queries: with `streams(kind)`.
            modulate: applied to the features that come in; of rows, to each.
        """
        device = next(iter(queries.streams.values())).device
        with torch.autocast(device.type, enabled=False):
            if not isinstance(self.net, ContextI2W):
                return self.net(modulate(queries["image/pooled"].float()))
            prefix, mask = (queries.streams.get(f"image/{s}") for s in ("prefix", "mask"))
            patches = queries["image/patches"].float()
            prefix = None if prefix is None else prefix.float()
            rows, real = image_rows(self.readout, prefix, patches, mask)
            return self.net(modulate(rows), queries["text/pooled"].float(), real)


def with_weights(context: Context, source: Path, kind: Kind | None = None) -> Context:
    """`context` with the weights of a trained φ among its tables.

    Args:
        context: of the cache.
        source: a run of `inversion`, or a file that its authors published.
        kind: what it must be; None: whatever it is. A published file of SEARLE and one of LinCIR look alike.

    Raises:
        ConfigError: it is none, or of another kind or width.
    """
    found, state = _of_run(source, context) if source.is_dir() else _of_file(source, kind, context)
    if kind not in (None, found):
        raise ConfigError(
            f"{source} holds a φ of kind {found}, and {kind} was asked for; name that kind in the settings"
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


def _of_run(run: Path, context: Context) -> tuple[Kind, dict[str, Tensor]]:
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
    theirs = said["context"]["backbone"]
    assert context.backbone is not None
    if theirs["weights"] != context.backbone.weights:
        raise ConfigError(
            f"the φ of {run} was trained for another backbone, {theirs['family']}:{theirs['checkpoint']}, than the "
            f"{context.backbone.family}:{context.backbone.checkpoint} of this cache; train one on this cache"
        )
    return said["config"]["kind"], state


def _of_file(path: Path, kind: Kind | None, context: Context) -> tuple[Kind, dict[str, Tensor]]:
    """The φ of a published file; of SEARLE and LinCIR, which share a network, the one that is asked for."""
    assert context.backbone is not None
    (d,) = context.shapes["image/pooled"]
    found, state = read_phi(path, d, int(context.backbone.dims["text_width"]))
    return "lincir" if (found, kind) == ("searle", "lincir") else found, state


def _shape(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else str(tuple(tensor.shape))
