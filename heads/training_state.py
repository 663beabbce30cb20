"""Where a training stands, on disk, so that it goes on in the same bits: written while it runs, gone when it ends.

    training-3.safetensors   head/<name> weights and buffers · optimizer/<i>/<name> moments of parameter i ·
                             best/<name> best weights · random/cpu, random/cuda generators of torch
    training-3.json          whose state this is, epoch and batches used of it, step, history, best record, Python's
                             generator, checksums of both files

Each file is whole or absent, and the state counts once its JSON is there. Runs that are trained side by side stand at
the same batch and write the same number; the number before is removed when all of them have written.

    run A   2 ─── 2 3 ─── 2 3 ─── 3        killed anywhere, there is a number that all have:
    run B   2 ─── 2 ───── 2 3 ─── 2 3      the largest one is gone on from

What a head computes before training (`Head.before_training`) is computed again. Nothing is pickled.
"""

import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cache_builder.durable import crc32c, write_durably
from heads import errors
from heads.errors import CheckpointMismatch, HeadError
from heads.learner import Learner

FORMAT = 1
NAMES = re.compile(r"training-(\d+)\.(json|safetensors)(\.[0-9a-f]+\.part)?")


@dataclass(frozen=True, slots=True)
class Found:
    """The state of runs that stand at the same batch.

    Attributes:
        epoch, used: the epoch they stand in, and how many batches of it are used up.
        room: limits of memory that the order of their examples was made under.
        states: directory → number of its files, and what the JSON says.

    """

    epoch: int
    used: int
    room: dict[str, int]
    states: dict[Path, tuple[int, dict[str, Any]]]


def is_part(name: str) -> bool:
    """Is this the name of a file of a state?"""
    return NAMES.fullmatch(name) is not None


def numbers(out: Path) -> set[int]:
    """Numbers of the states that lie in a directory."""
    found = [NAMES.fullmatch(p.name) for p in out.glob("training-*.json")]
    return {int(match[1]) for match in found if match and not match[3]}


def find(places: Sequence[Path]) -> list[Found]:
    """The states of runs that take the same batches, those together that stand at the same one.

    Args:
        places: their directories; those without a state have not begun, and are in none.

    Raises:
        CheckpointMismatch: a file is damaged.
    """
    have = {out: mine for out in places if (mine := numbers(out))}
    common = set.intersection(*have.values()) if have else set()
    together: dict[tuple[int, int], Found] = {}
    for out, mine in have.items():
        number = max(common or mine)
        state = read(out, number)
        position = state["epoch"], state["used"]
        found = together.setdefault(position, Found(*position, state["room"], {}))
        found.states[out] = number, state
    return list(together.values())


def save(
    out: Path,
    number: int,
    learner: Learner,
    position: tuple[int, int],
    belongs: Mapping[str, Any],
    room: Mapping[str, int],
) -> None:
    """Write where a learner stands; what was written before under other numbers stays.

    Args:
        out: its run's directory.
        number: of the state.
        learner: between two steps.
        position: epoch, and batches used of it.
        belongs: what must be the same when it is gone on with.
        room: limits of memory of its batches.
    """
    tensors, facts = _of(learner)
    weights, told = _files(out, number)
    part = weights.with_name(f"{weights.name}.{secrets.token_hex(4)}.part")
    try:
        save_file(tensors, part)
        digest = _digest(part)
        sync_file(part)
        part.rename(weights)
    except BaseException:
        part.unlink(missing_ok=True)  # a full disk needs the room
        raise
    epoch, used = position
    state = {
        "format": FORMAT,
        "belongs": belongs,
        "room": room,
        "epoch": epoch,
        "used": used,
        "tensors": digest,
        **facts,
    }
    text = json.dumps(state)
    write_durably(told, f'{{"crc32c": "{crc32c(text.encode())}", "state": {text}}}'.encode())


def read(out: Path, number: int) -> dict[str, Any]:
    """What the JSON of a state says.

    Raises:
        CheckpointMismatch: it is damaged, or of another format.
    """
    told = _files(out, number)[1]
    try:
        found = json.loads(told.read_text(encoding="utf-8"))
        state = found["state"]
        whole = crc32c(json.dumps(state).encode()) == found["crc32c"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointMismatch(_damaged(told)) from error
    if not whole:
        raise CheckpointMismatch(_damaged(told))
    if state["format"] != FORMAT:
        raise CheckpointMismatch(
            f"{told} is of format {state['format']}, and this version reads {FORMAT}; go on with the headstart that "
            f"wrote it, or remove {out} to start anew"
        )
    return state


def restore(learner: Learner, out: Path, found: Found) -> None:
    """Put a learner that has begun where a state says that it stood.

    Raises:
        CheckpointMismatch: the file of tensors is damaged, or does not fit this learner.
    """
    number, state = found.states[out]
    weights = _files(out, number)[0]
    try:
        if _digest(weights) != state["tensors"]:
            raise CheckpointMismatch(_damaged(weights))
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise CheckpointMismatch(_damaged(weights)) from error
    try:
        _give(learner, tensors, state)
    except (KeyError, IndexError, RuntimeError) as error:
        what = str(error).splitlines()[-1].strip()
        raise CheckpointMismatch(
            f"{weights} does not fit what its method builds now ({what}); go on with the headstart that wrote it, or "
            f"remove {out} to start anew"
        ) from error


def clear(out: Path, keep: int | None = None) -> None:
    """Remove all states but one; of each first what makes it count."""
    files = sorted(
        p for p in out.glob("training-*") if is_part(p.name)
    )  # .json before .safetensors
    for file in files:
        if file not in (() if keep is None else _files(out, keep)):
            file.unlink(missing_ok=True)


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Field by field what differs, in words; of a setting as it was asked for only if it means the same."""
    old, new = _flat(then), _flat(now)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [
        f"{name} was {_said(old, name)} and is {_said(new, name)}"
        for name in names
        if name.removeprefix("asked.") == name or name.removeprefix("asked.") not in names
    ]


def _of(learner: Learner) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that lasts from one step to the next: tensors, and the rest as JSON."""
    python, cpu, _, cuda = learner.random
    best, failure = learner.best, learner.failure
    moments = learner.optimizer.state_dict()["state"]
    tensors = {
        # Cloned, because safetensors refuses tensors that share memory.
        **{f"head/{k}": v.detach().cpu().clone() for k, v in learner.head.state_dict().items()},
        **{f"optimizer/{i}/{k}": v.cpu() for i, of in moments.items() for k, v in of.items()},
        **{f"best/{name}": value for name, value in best.state.items()},
        "random/cpu": cpu,
        **({} if cuda is None else {"random/cuda": cuda}),
    }
    facts = {
        "step": learner.step,
        "total": learner.total,
        "in_epoch": learner.in_epoch,
        "seconds": learner.seconds,
        "waited": learner.waited,
        "best": {"metric": best.metric, "stale": best.stale, "record": best.record},
        "failure": failure and [type(failure).__name__, str(failure)],
        "random": python,
        "noticed": sorted(learner.head.noticed()),
        "history": learner.history,
    }
    return {name: value.contiguous() for name, value in tensors.items()}, facts


def _give(learner: Learner, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """The reverse of `_of`."""
    learner.head.load_state_dict(_below(tensors, "head/"))
    learner.head.noticed().update(state["noticed"])
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in _below(tensors, "optimizer/").items():
        i, _, name = key.partition("/")
        if value.ndim and value.shape != learner.parameters[int(i)].shape:
            raise RuntimeError(f"moments of parameter {i} are of shape {tuple(value.shape)}")
        moments.setdefault(int(i), {})[name] = value
    groups = learner.optimizer.state_dict()["param_groups"]
    learner.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    best = state["best"]
    learner.best.metric, learner.best.stale = best["metric"], best["stale"]
    learner.best.record, learner.best.config = best["record"], learner.head.config
    learner.best.value = best["record"].get(best["metric"], -math.inf)
    learner.best.state = _below(tensors, "best/")
    version, words, gauss = state["random"]
    python = version, tuple(words), gauss
    learner.random = python, tensors["random/cpu"], learner.device, tensors.get("random/cuda")
    learner.step, learner.total = state["step"], state["total"]
    learner.in_epoch, learner.history = state["in_epoch"], state["history"]
    learner.seconds, learner.waited = state["seconds"], state["waited"]
    if state["failure"]:
        kind, message = state["failure"]
        learner.failure = getattr(errors, kind, HeadError)(message)


def _files(out: Path, number: int) -> tuple[Path, Path]:
    """Tensors, and the JSON that makes them count."""
    return out / f"training-{number}.safetensors", out / f"training-{number}.json"


def sync_file(file: Path) -> None:
    """Make the bytes of a file durable."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables with dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, Mapping)
        found |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found


def _said(values: Mapping[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "not given"


def _damaged(file: Path) -> str:
    return (
        f"{file} is damaged: it does not hold what was written; remove {file.parent} to start anew"
    )
