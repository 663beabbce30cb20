"""The command line behind a run or a score table, as somebody would type it: for `run.json` and for reports.

Only what was asked for is in it, not every default. Bits depend on the number of threads, so that stands before it.
"""

import json
import math
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from heads.config import value_of


def train_command(
    method: str,
    out: Path,
    *,
    cache: str,
    task: str,
    settings: Mapping[str, Mapping[str, Any]],
    backbone: str | None = None,
    threads: int,
) -> str:
    """`headstart train`, which makes one run by itself; empty where a setting has a value that no command can say.

    Args:
        method: a file of `heads/methods`, or a dotted module.
        out: the run's directory.
        cache: path or URL of its cache.
        task: what it is trained for.
        settings: as they were asked for.
        backbone: where the cache's backbone lay, if that was said.
        threads: of torch, in the process that trained.
    """
    words = ["headstart", "train", method, "--cache", cache, "--task", task]
    for section, values in settings.items():
        for key, value in _flat(values):
            if not _can_be_said(value):
                return ""
            words += ["--set", f"{section}.{key}={_value(value)}"]
    words += ["--backbone", backbone] if backbone else []
    return f"OMP_NUM_THREADS={threads} {shlex.join([*words, '--out', str(out)])}"


def score_command(
    run: Path,
    *,
    split: str,
    world: str,
    task: str | None,
    rerank: int | None,
    cache: str | None,
    dense: bool,
    keep: int | None,
    allow_missing: bool = False,
    backbone: str | None = None,
) -> str:
    """`headstart score`, which makes a table of a run.

    Args:
        run: its directory.
        split, world, rerank, dense, allow_missing, backbone: as of `score_run`.
        task, cache: only where they are not those of the run.
        keep: of an open world, where it is not the usual one.
    """
    words = ["headstart", "score", str(run), "--split", split]
    words += ["--task", task] if task else []
    words += ["--world", world] if world != "closed" else []
    words += ["--rerank", str(rerank)] if rerank else []
    words += ["--cache", cache] if cache else []
    words += ["--dense"] if dense else []
    words += ["--keep", str(keep)] if keep is not None else []
    words += ["--allow-missing"] if allow_missing else []
    words += ["--backbone", backbone] if backbone else []
    return shlex.join(words)


def _flat(values: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    """Fields with dotted names; tables in tables by their path."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{start}{key}.")
        else:
            yield f"{start}{key}", value


def _can_be_said(value: Any) -> bool:
    """Has TOML this value? It knows no None, and JSON's word for infinity would be read as a word."""
    if isinstance(value, Mapping):
        return all(map(_can_be_said, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_can_be_said, value))
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _value(value: Any) -> str:
    """What `--set` reads as this value: TOML, or the bare word."""
    if isinstance(value, str):
        return value if value_of(value) == value else json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{json.dumps(k)} = {_value_inside(v)}' for k, v in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value_inside, value))}]"
    return json.dumps(value)


def _value_inside(value: Any) -> str:
    """Inside a list or table no bare word will do."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else _value(value)
