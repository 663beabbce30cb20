"""A run on disk: what training leaves in its directory, and what may be there before.

    config.json model.safetensors     the head (checkpoint.py)
    history.jsonl                     every step and every validation
    run.json                          settings asked for and as resolved, versions, commit, seed, cache, data, result

`run.json` is written last: a directory with one is a finished run. Until then there may be training-<n>.json and
training-<n>.safetensors, from which an interrupted training goes on (training_state.py).
"""

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cache_builder import FeatureCache
from cache_builder.durable import write_durably
from cache_builder.flock import takes
from heads import checkpoint, load_method, training_state
from heads.base import Head
from heads.config import describe_cache, git_commit, parse, versions
from heads.errors import CheckpointMismatch, ConfigError, HeadError, RunExists
from heads.learner import FitResult
from heads.tensorboard import is_told, remove_orphans
from heads.train_config import TrainConfig

RECORD = "run.json"
HISTORY = "history.jsonl"
LOCK = "lock"
"""Held while a run is trained; the kernel frees it however its holder ends."""

TRAINING = "another process is training into"


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished run.

    Attributes:
        path: its directory.
        head: with the best weights, in evaluation mode.
        result: history and best validation.
        record: what `run.json` says.

    """

    path: Path
    head: Head
    result: FitResult
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failed:
    """A run that ended in an error, of which nothing is kept."""

    path: Path
    error: HeadError


def check_places(places: Sequence[Path], *, resume: bool = False) -> None:
    """Refuse places that hold anything, and two runs in one; to resume, an interrupted training may be there.

    Raises:
        RunExists, ConfigError: names the place.
    """
    for out in places:
        held = [p for p in out.iterdir() if p.name != LOCK] if out.is_dir() else []
        begun = bool(training_state.numbers(out)) or all(map(_is_left, held))
        if held and begun and not (out / RECORD).exists():
            if not resume:
                raise RunExists(
                    f"{out} holds a training that was interrupted; go on with the same command and --resume, or remove "
                    "it to start anew"
                )
        elif out.exists() and (held or not out.is_dir()):
            raise RunExists(f"{out} already exists; choose another --out, or remove it")
    if twice := sorted({str(out) for out in places if places.count(out) > 1}):
        raise ConfigError(f"several runs would be kept in {twice[0]}; give each a place of its own")


@contextmanager
def taken(places: Sequence[Path], *, resume: bool = False) -> Generator[None]:
    """Make the directories of runs, and hold them against other processes; those left empty are gone afterwards.

    Raises:
        RunExists: another process trains into one of them, or did meanwhile.
    """
    with ExitStack() as held:
        for out in places:
            held.enter_context(alone(out, TRAINING))
        check_places(places, resume=resume)
        for out in places:
            remove_orphans(out, RECORD)
        yield


def _is_left(path: Path) -> bool:
    """May an interrupted training leave this?"""
    return _is_unfinished(path.name) or is_told(path)


def _is_unfinished(name: str) -> bool:
    """May an interrupted training leave a file of this name?"""
    return (
        name in (*checkpoint.FILES, HISTORY)
        or training_state.is_part(name)
        or (name.startswith(f"{RECORD}.") and name.endswith(".part"))
    )


@contextmanager
def alone(out: Path, what: str) -> Generator[None]:
    """Make a directory and hold it against others of this kind; empty, it is gone afterwards.

    Args:
        out: the directory.
        what: who else may hold it, for a message.

    Raises:
        RunExists: somebody does.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("a") as file:
        if not takes(file.fileno(), out / LOCK):
            raise RunExists(f"{what} {out}; wait for it, or choose another --out")
        try:
            yield
        finally:
            (out / LOCK).unlink(missing_ok=True)
            with suppress(OSError):
                out.rmdir()


def write(
    out: Path,
    head: Head,
    train: TrainConfig,
    result: FitResult,
    cache: FeatureCache,
    facts: Mapping[str, Any],
) -> Trained:
    """Keep a trained head in `out`, with its record; what its training was to go on from is removed then.

    Args:
        out: a directory that `check_places` let pass.
        head, train, result: what was trained, how, and what came of it.
        cache: what it was trained on.
        facts: what else the record says.
    """
    record = {
        "method": checkpoint.method_name(head),
        **facts,
        "seed": train.seed,
        "head": head.config.model_dump(mode="json"),
        "train": train.model_dump(mode="json"),
        "device": str(train.torch_device()),
        "parameters": head.n_trained(),
        **({"remarks": remarks} if (remarks := dict(head.remarks())) else {}),
        "best": result.best,
        "steps": result.steps,
        "seconds": round(result.seconds, 3),
        "data_wait_seconds": round(result.waited, 3),
        "versions": versions(),
        "commit": git_commit(),
        "cache": describe_cache(cache),
    }
    checkpoint.save(head, out)
    lines = "".join(f"{json.dumps(line)}\n" for line in result.history)
    (out / HISTORY).write_text(lines, encoding="utf-8")
    text = json.dumps(record, indent=2, ensure_ascii=False)
    long = bool(training_state.numbers(out))
    if long:  # not even a power cut may take what took so long
        for name in (*checkpoint.FILES, HISTORY):
            training_state.sync_file(out / name)
    write_durably(out / RECORD, f"{text}\n".encode(), sync=long)
    for file in [p for p in out.glob(f"{RECORD}.*") if _is_unfinished(p.name)]:
        file.unlink()
    training_state.clear(out)
    return Trained(out, head, result, json.loads(text))


def check_same(out: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on in a directory of something else.

    Args:
        out: the directory.
        then, now: what it belongs to, and what is asked for: as `heads.sweep` describes it.

    Raises:
        RunExists: says field by field what differs.
    """
    if found := training_state.differences(then, now):
        raise RunExists(
            f"{out} was begun otherwise: {'; '.join(found)}; repeat the command that it was begun with, or choose "
            "another --out"
        )


def anywhere(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a run belongs to but for the name of its device: where it is trained is no part of what it is."""

    def without(settings: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in settings.items() if name != "device"}

    asked: Mapping[str, Any] = facts["asked"]
    return {
        **facts,
        "asked": {**asked, "train": without(asked.get("train", {}))},
        "train": without(facts["train"]),
    }


def check_finished(out: Path, now: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a finished run, if it is what is asked for.

    Args and errors as for `read_trained`.
    """
    record = read_run(out)
    then = anywhere({"learned": record["task"], **record})
    then["device"] = str(record["device"]).partition(":")[0]
    then["processes"] = record.get("processes", 1)
    then["cache"] = {name: record["cache"].get(name) for name in now["cache"]}
    method = load_method(now["method"])
    if method.Head.trained_by(parse(method.Config, now["head"], "head")) == "closed_form":
        then["head"] = now["head"]  # validation chose among configurations
    check_same(out, {name: then.get(name) for name in now}, now)
    return record


def read_trained(
    out: Path, now: Mapping[str, Any], device: torch.device, backbone: str | None = None
) -> Trained:
    """A finished run, if it is what is asked for.

    Args:
        out: its directory.
        now: what is asked for, as for `check_same`.
        device: where its head is put.
        backbone: as for `checkpoint.load`.

    Raises:
        RunExists: it is another one, and this says field by field what differs; or another process is about it.
        CheckpointMismatch: it is damaged.
    """
    record = check_finished(out, now)
    with alone(out, TRAINING):
        training_state.clear(out)  # it may have been killed right after its record was written
    lines = (out / HISTORY).read_text(encoding="utf-8").splitlines()
    result = FitResult(
        [json.loads(line) for line in lines],
        record["best"],
        record["seconds"],
        record["data_wait_seconds"],
        record["steps"],
    )
    return Trained(out, checkpoint.load(out, device, backbone=backbone), result, record)


def read_run(run: str | Path) -> dict[str, Any]:
    """The record of a run.

    Raises:
        FileNotFoundError: not a run directory.
        CheckpointMismatch: its `run.json` is damaged.
    """
    path = Path(run) / RECORD
    if not path.is_file():
        raise FileNotFoundError(
            f"{run} is no run: {path} is missing; make one with `headstart train`"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        _ = record["task"], record["cache"]["path"], record["cache"]["digest"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointMismatch(
            f"{path} is no record of a run ({error!r}); train it again"
        ) from error
    return record
