"""A plugin is a file: the name of a family, a data set or a method is its file's name, and nothing lists them.

Files without the handles of their neighbours (`compositions.py`, shared by data sets) are not offered by name.
"""

import ast
import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from cache_builder.errors import UnknownName

HANDLES = {"backbones": "load", "datasets": "load", "methods": "Head"}
"""The name a file of each folder must define at its top to count as a plugin; other folders: any file counts."""

NOUNS = {"backbones": "backbone family", "datasets": "data set", "methods": "method"}


def names(package: str) -> tuple[str, ...]:
    """Names of the plugins in a package, sorted; reads the files without importing them.

    >>> "folder" in names("cache_builder.datasets")
    True
    """
    folder = importlib.import_module(package)
    files = (info.name for info in pkgutil.iter_modules(folder.__path__))
    return tuple(sorted(name for name in files if _is_plugin(package, name)))


def find(package: str, name: str) -> ModuleType:
    """The plugin called `name`: a file of `package`, or any importable module if the name has a dot.

    Args:
        package: where the interchangeable files live, e.g. `cache_builder.datasets`.
        name: the file's name, or the dotted path of the user's own module.

    Raises:
        UnknownName: there is no such file or module; names the nearest and all that are known.
    """
    if "." in name:
        module = _own_module(package, name)
        handle = HANDLES.get(package.rpartition(".")[2])
        if handle and not hasattr(module, handle):
            raise UnknownName(f"module {name} is no {_noun(package)}: it defines no `{handle}`")
        return module
    if not _is_plugin(package, name):
        known = names(package)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UnknownName(
            f"no {_noun(package)} {name!r} in {package.replace('.', '/')}{hint} (known: {', '.join(known) or 'none'}; "
            "a module of your own is named with its dots)"
        )
    return importlib.import_module(f"{package}.{name}")


def _own_module(package: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Only the asked-for module or one of its parents: a missing import inside it is a bug there, and shows itself.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise UnknownName(
            f"no module {name!r} to take a {_noun(package)} from: {error.name!r} is not importable here; "
            "check the name, or install it or set PYTHONPATH"
        ) from error


def _noun(package: str) -> str:
    return NOUNS.get(package.rpartition(".")[2], "plugin")


def _is_plugin(package: str, name: str) -> bool:
    """Is there a file of that name with the handle of its neighbours? Reads that file alone."""
    paths = importlib.import_module(package).__path__
    there = any(info.name == name for info in pkgutil.iter_modules(paths))
    handle = HANDLES.get(package.rpartition(".")[2])
    return there and name != "base" and _offers(paths, name, handle)


def _offers(paths: Iterable[str], name: str, handle: str | None) -> bool:
    """Does the file define `handle` at its top level? Packages count as they are."""
    if handle is None:
        return True
    for path in (Path(p) / f"{name}.py" for p in paths):
        if path.is_file():
            body = ast.parse(path.read_bytes()).body
            return any(getattr(node, "name", None) == handle for node in body)
    return True
