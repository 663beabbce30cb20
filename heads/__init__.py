"""ROOM 2: feature cache → trained head → score table.

The public names are imported when first used, so that `headstart --help` costs no torch.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heads.base import Head
    from heads.score import score
    from heads.train import fit

__all__ = ["Head", "fit", "load_method", "score"]

_HOME = {"Head": "heads.base", "fit": "heads.train", "score": "heads.score"}


def load_method(name: str) -> ModuleType:
    """The method file called `name`, with its handles `Config` and `Head`; a dotted name is the user's own module.

    Raises:
        UnknownName: there is no such method; names the nearest and all that are known.
    """
    from cache_builder import plugins

    return plugins.find("heads.methods", name)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'heads' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


class _Package(ModuleType):
    """Keeps `heads.score` the function: importing the file score.py would put the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value.score if name == "score" else value)


sys.modules[__name__].__class__ = _Package
