"""A frozen module under other weights: low-rank updates (LoRA), or a trained copy; the module itself is left alone.

    with under(tower, lora.weights(tower)):     W + (α/r)·B A in place of W, for as long as the block lasts
        pooled = …                              gradients reach A and B; behind it the tower is what it was

Entered inside a function that is recomputed in the backward pass, it is entered again there. `peft` replaces modules of
the tower instead, so that it would no longer be the one that other heads share, and is silently dead on the output
projection of torch's attention.
"""

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import compress

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heads.errors import ConfigError
from heads.live import OpenBackbone

LINEAR = (
    r".*(blocks|layers)\.\d+\..*"
    r"(in_proj_weight|(out_proj|[qkv]_proj|qkv|attn\.proj|fc\d|c_fc|c_proj)\.weight)"
)
"""Linear maps of the blocks, as open_clip, timm and transformers name them; those of attention pools are left out."""

QUERY_VALUE = r".*(blocks|layers)\.\d+\..*(in_proj_weight|qkv\.weight|[qv]_proj\.weight)"
"""Queries and values of attention (arXiv 2106.09685, section 4.2); of a matrix that has q, k and v the first and last
third, each with an update of its own."""

FUSED = ("in_proj_weight", "qkv.weight")
"""How matrices end that hold q, k and v, one below the other."""


@contextmanager
def under(module: nn.Module, weights: Mapping[str, Tensor]) -> Generator[None]:
    """Let a module compute with other tensors in place of the parameters of these names.

    May be entered within itself: what is inside wins, and what is outside holds again behind it.

    Raises:
        AttributeError: it has no such parameter.
    """
    held: list[tuple[nn.Module, str, Tensor | None]] = []
    try:
        for name, value in weights.items():
            owner, last = _place(module, name)
            held.append((owner, last, owner.__dict__.get(last)))
            # Found before the parameter, which stays where it is.
            owner.__dict__[last] = value
        yield
    finally:
        for owner, last, before in reversed(held):
            if before is None:
                owner.__dict__.pop(last, None)
            else:
                owner.__dict__[last] = before


def used_by(module: nn.Module, run: Callable[[], Tensor]) -> list[str]:
    """Names of the parameters that what `run` computes with the module depends on, in its order."""
    stand_ins = {n: p.detach().requires_grad_() for n, p in module.named_parameters()}
    with torch.enable_grad(), under(module, stand_ins):
        found = torch.autograd.grad(run().sum(), [*stand_ins.values()], allow_unused=True)
    # torch declares gradients even of what it allows to be unused
    used = [grad is not None for grad in found]  # pyright: ignore[reportUnnecessaryComparison]
    return list(compress(stand_ins, used))


def _place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and its name there; `under` may stand before it."""
    home, _, last = name.rpartition(".")
    owner = module.get_submodule(home)
    if last not in _parameters(owner):
        raise AttributeError(f"{type(module).__name__} has no parameter {name!r}")
    return owner, last


def _own(module: nn.Module, name: str) -> Tensor:
    """A parameter itself, whatever stands before it."""
    owner, last = _place(module, name)
    return _parameters(owner)[last]


def _parameters(owner: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own, two names of one included."""
    return dict(owner.named_parameters(recurse=False, remove_duplicate=False))


class LoRA(nn.Module):
    """W + (α/r)·B A for linear weights of a frozen module; B starts at 0, so that nothing changes at first.

    Args:
        module: whose weights; only their names and shapes are kept.
        names: parameters that come into question, as `used_by` finds them.
        rank: r.
        alpha: α; None: r.
        targets: regular expression of the names that are taken, matched whole. Under `QUERY_VALUE` matrices that hold
            q, k and v are updated in the rows of q and of v.

    Raises:
        ConfigError: it matches no matrix; says which there are.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Sequence[str],
        *,
        rank: int,
        alpha: float | None = None,
        targets: str = LINEAR,
    ) -> None:
        super().__init__()
        matrices = [name for name in names if _own(module, name).ndim == 2]
        self.names = [name for name in matrices if re.fullmatch(targets, name)]
        if not self.names:
            raise ConfigError(
                f"no matrix of the tower is called {targets!r}; it has {', '.join(matrices[:6])}, …"
            )
        self.scale = (rank if alpha is None else alpha) / rank
        self.rows: list[tuple[str, int, int]] = []
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for name in self.names:
            rows, columns = _own(module, name).shape
            thirds = [(0, rows // 3), (rows - rows // 3, rows)]
            q_and_v = targets == QUERY_VALUE and name.endswith(FUSED)
            for start, stop in thirds if q_and_v else [(0, rows)]:
                down = torch.empty(rank, columns)
                nn.init.kaiming_uniform_(down, a=5**0.5)
                self.rows.append((name, start, stop))
                self.down.append(nn.Parameter(down))
                self.up.append(nn.Parameter(torch.zeros(stop - start, rank)))

    def attached(self, backbone: OpenBackbone) -> AbstractContextManager[None]:
        """Let the backbone's model compute with the updates."""
        return under(backbone.model, self.weights(backbone.model))

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """The updated weights, for `under`: what a merged tower has."""
        found = {name: _own(module, name) for name in self.names}
        for (name, start, stop), down, up in zip(self.rows, self.down, self.up, strict=True):
            update = self.scale * (up @ down)
            below = len(found[name]) - stop
            found[name] = found[name] + F.pad(update, (0, 0, start, below))
        return found


class Copy(nn.Module):
    """Parameters of a frozen module, as a head's own to train.

    Args:
        module: what is copied.
        names: which of its parameters.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.names = list(names)
        copies = (_own(module, name).detach().clone() for name in names)
        self.values = nn.ParameterList(nn.Parameter(value) for value in copies)

    def attached(self, backbone: OpenBackbone) -> AbstractContextManager[None]:
        """Let the backbone's model compute with the copy."""
        return under(backbone.model, self.weights(backbone.model))

    def weights(self, module: nn.Module) -> dict[str, Tensor]:
        """The trained weights, for `under`."""
        return dict(zip(self.names, self.values, strict=True))
