"""TOML and `--set key=value` → the frozen models of a method and of the training loop; and what `run.json` records.

[head]                      fields of the method's Config
layers = 2
[train]                     fields of TrainConfig
lr = 3e-4                   --set train.lr=3e-4 overrides it
[head.settings]             a field that is itself a table, as a method on top of another one has
dropout = 0.1               --set head.settings.dropout=0.1

An unknown key is an error that names the nearest known one.
"""

import difflib
import importlib.metadata
import platform
import subprocess
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from cache_builder import FeatureCache
from cache_builder.errors import CacheError
from heads.errors import ConfigError, HeadError

SECTIONS = ("head", "train")
RECORDED = ("headstart", "torch", "numpy", "zarr", "safetensors", "scikit-learn", "pydantic")

Model = TypeVar("Model", bound=BaseModel)


def read_settings(
    path: Path | None, sets: Iterable[str] = (), values: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """Merge a TOML file and `key=value` overrides into {"head": {…}, "train": {…}}.

    Args:
        path: TOML with the tables `head` and `train`; None for none.
        sets: e.g. "train.lr=3e-4" or "head.variant=global"; the value is TOML, a bare word is a string.
        values: the same, as values: "train.lr" → 3e-4.

    Raises:
        ConfigError: unreadable TOML, an unknown table, or an override without "=", without its table, or into what is
            no table.
        FileNotFoundError: there is no such file.
    """
    settings: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    if path is not None:
        try:
            found = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not TOML: {error}") from error
        for name, table in found.items():
            check_section(name, str(path))
            if not isinstance(table, dict):
                raise ConfigError(f"{name} in {path} must be a table, [{name}], but is {table!r}")
            settings[name].update(table)
    given: list[tuple[str, str, Any]] = []
    for text in sets:
        key, equals, value = text.partition("=")
        given.append((f"--set {text!r}", key if equals else "", value_of(value.strip())))
    given += [(f"{key}={value}", key, value) for key, value in (values or {}).items()]
    for said, key, value in given:
        section, dot, name = key.strip().partition(".")
        if not (dot and name):
            raise ConfigError(f"{said} is not of the form head.NAME=VALUE or train.NAME=VALUE")
        check_section(section, said)
        *tables, last = name.split(".")
        place = settings[section]
        for table in tables:
            place = place.setdefault(table, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{said} wants a table at {section}.{table}, which is {place!r}")
        place[last] = value
    return settings


def parse(model: type[Model], values: Mapping[str, Any], section: str) -> Model:
    """Fill a frozen model from plain values.

    Args:
        model: a method's `Config`, or `TrainConfig`.
        values: field name → value.
        section: "head" or "train", for messages; "head.settings" of a table in it.

    Raises:
        ConfigError: an unknown key, with the nearest known one, or a value of the wrong type or range.
        HeadError, CacheError: as the model itself raised it, e.g. of a table in it.
    """
    for name in values:
        if name not in model.model_fields:
            known = ", ".join(model.model_fields) or "none"
            near = nearest(name, model.model_fields)
            raise ConfigError(f"no key {section}.{name}{near} (known: {known})")
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        first, *rest = error.errors()
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, HeadError | CacheError):  # a sentence of its own
            raise cause from error
        key = ".".join([section, *(str(part) for part in first["loc"])])
        more = f"; and {len(rest)} more" if rest else ""
        if first["type"] == "missing":
            raise ConfigError(f"{key} is missing, and it has no default{more}") from error
        message = first["msg"][:1].lower() + first["msg"][1:]
        raise ConfigError(f"{key} is {first['input']!r}: {message}{more}") from error


def describe_cache(cache: FeatureCache) -> dict[str, Any]:
    """What a run says about the cache it used: enough to find it again and to refuse another one.

    `asked` is the digest of what was asked of it, where that was only a part (`heads/samples.py`).
    """
    return {
        "path": cache.place.absolute(),
        "fingerprint": cache.fingerprint,
        "digest": cache.digest(),
        "backbone": cache.spec.backbone.model_dump(mode="json"),
        "dataset": cache.spec.dataset.model_dump(mode="json"),
        **({} if cache.asked is None else {"asked": cache.asked.digest()}),
    }


def versions() -> dict[str, str]:
    """Release numbers of Python and of the libraries that can change a trained weight."""
    found = {"python": platform.python_version()}
    for name in RECORDED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_commit() -> str | None:
    """Commit of the source tree this runs from, with "+" if files differ from it; None outside a work tree."""
    folder = Path(__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words],
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    # An installed copy may lie inside somebody else's work tree: only a tree that tracks this file counts.
    if not git("ls-files", Path(__file__).name) or (commit := git("rev-parse", "HEAD")) is None:
        return None
    return f"{commit}+" if git("status", "--porcelain", "--untracked-files=no") else commit


def check_section(name: str, where: str) -> None:
    """Refuse a table of settings that is none; `ConfigError` names the nearest."""
    if name not in SECTIONS:
        raise ConfigError(
            f"{where} names {name!r}{nearest(name, SECTIONS)}; the tables are {' and '.join(SECTIONS)}"
        )


def value_of(text: str) -> Any:
    """A TOML value, or the text itself where it is none: `--set head.variant=global` needs no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?`, or nothing where no known name is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
