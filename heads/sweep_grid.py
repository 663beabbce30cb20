"""Which runs a sweep asks for: methods × the values of its axes.

csp simfp · train.seed=0,1 · head.dropout=0.1,0.3   →   csp-seed0-dropout=0.1  csp-seed0-dropout=0.3  csp-seed1-…
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from heads import load_method
from heads.base import Training
from heads.config import parse, read_settings, value_of
from heads.errors import ConfigError

SEED = "train.seed"


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a sweep: its method, its settings, and the name of its directory among the others."""

    method: str
    settings: dict[str, dict[str, Any]]
    name: str


def points(
    methods: Sequence[str],
    configs: Mapping[str, Path],
    sets: Sequence[str],
    sweeps: Sequence[str],
    *,
    own_order: bool = False,
) -> list[Point]:
    """Every combination; heads without randomness take the first seed alone.

    Args:
        methods: files of `heads/methods`, or dotted modules.
        configs: method → its TOML file, where there is one.
        sets: `KEY=VALUE` for all runs, of keys that are not swept.
        sweeps: `KEY=VALUE,VALUE,…`, one an axis.
        own_order: each seed shuffles for itself. Otherwise runs of several seeds take the batches of the first
            (`train.order_seed`), which are then read once for all.

    Raises:
        ConfigError: a method or key that is named twice, or an axis that is none.
    """
    if twice := _twice(methods):
        raise ConfigError(f"{twice} is named twice; use --sweep for several settings of one method")
    axes = dict(parsed := [axis(text) for text in sweeps])
    if twice := _twice([key for key, _ in parsed]):
        raise ConfigError(f"--sweep {twice} is given twice; put all its values into one")
    if both := [key for text in sets if (key := text.partition("=")[0].strip()) in axes]:
        raise ConfigError(f"{both[0]} is both set and swept; leave out one of the two")
    seeds = axes.get(SEED, [])
    if own_order and len(seeds) < 2:
        raise ConfigError(
            "--own-order is about the seeds of --sweep train.seed=…, and there are no two"
        )
    found: list[Point] = []
    for method in methods:
        for values in product(*axes.values()):
            chosen = dict(zip(axes, values, strict=True))
            settings = read_settings(configs.get(method), sets, chosen)
            draws = trained_by(method, settings["head"]) == "gradient"
            if not draws and chosen.get(SEED) != (seeds or [None])[0]:
                continue
            if len(seeds) > 1 and not own_order:
                settings["train"].setdefault("order_seed", seeds[0])
            found.append(Point(method, settings, _name(method, chosen)))
    if twice := _twice([point.name for point in found]):
        raise ConfigError(
            f"two runs of this sweep would be called {twice}; sweep them one after another"
        )
    return found


def trained_by(method: str, head: Mapping[str, Any]) -> Training:
    """How a method is trained under these settings of its head; `ConfigError` if they are none of its."""
    module = load_method(method)
    return module.Head.trained_by(parse(module.Config, head, "head"))


def config_files(given: Sequence[str], methods: Sequence[str]) -> dict[str, Path]:
    """Method → its file, from `METHOD=FILE`, or from `FILE` where there is one method.

    Raises:
        ConfigError: a file for no method that is named, or two for one.
    """
    found: dict[str, Path] = {}
    for text in given:
        method, _, file = text.partition("=")
        if method not in methods:
            if len(methods) > 1 or (file and not Path(text).exists()):
                raise ConfigError(
                    f"--config {text!r} is not METHOD=FILE for one of the methods named ({', '.join(methods)})"
                )
            method, file = methods[0], text
        if method in found:
            raise ConfigError(f"{method} has two --config files, {found[method]} and {file}")
        found[method] = Path(file)
    return found


def axis(text: str) -> tuple[str, list[Any]]:
    """`KEY=A,B` → KEY and its values, each TOML or else a bare word.

    Raises:
        ConfigError: no values, or two that are the same.
    """
    key, _, values = text.partition("=")
    try:
        found = tomllib.loads(f"values = [{values}]")["values"]
    except tomllib.TOMLDecodeError:
        found = [value_of(word.strip()) for word in values.split(",")]
    if not values.strip() or any(value in found[:i] for i, value in enumerate(found)):
        raise ConfigError(
            f"--sweep {text!r} is not of the form KEY=VALUE,VALUE,… with values that differ, e.g. train.seed=0,1,2"
        )
    return key.strip(), found


def _name(method: str, chosen: Mapping[str, Any]) -> str:
    """e.g. `csp-dropout=0.5-seed0`."""
    parts = [method]
    for key, value in chosen.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        text = text.lower() if isinstance(value, bool) else text
        plain = re.sub(r"[^\w.+,-]+", "_", text)
        parts.append(f"seed{plain}" if key == SEED else f"{key.rpartition('.')[2]}={plain}")
    return "-".join(parts)


def _twice(words: Sequence[str]) -> str:
    """The first word that occurs twice, or none."""
    return next((word for i, word in enumerate(words) if word in words[:i]), "")
