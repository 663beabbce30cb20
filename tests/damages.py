"""Damage to a cache folder as a disk, a copy or an editor does it: drawn from a seed, undone from a snapshot."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cache_builder import FeatureCache

Files = dict[str, bytes]
"""Path inside the folder → content."""

WEIGHTS = {
    "chunk": 38,
    "array metadata": 14,
    "group metadata": 6,
    "header": 16,
    "manifest": 12,
    "quarantine": 7,
    "tasks": 5,
    "lock": 2,
}
"""Part of a cache → how often it is hit, of 100."""

ACTS = ("flip", "scatter", "cut", "delete", "extend", "blank", "swap", "line")


@dataclass(frozen=True)
class Damage:
    """What was done, for the message of a failing test and for the table."""

    part: str
    act: str
    file: str
    detail: str


def snapshot(path: Path) -> Files:
    """All files below a folder."""
    return {
        os.path.relpath(file, path): Path(file).read_bytes()
        for below, _, names in os.walk(path)
        for file in (os.path.join(below, name) for name in names)
    }


def restore(path: Path, files: Files) -> None:
    """Make a folder hold exactly these files again."""
    now = snapshot(path)
    for name in now.keys() - files.keys():
        (path / name).unlink()
    for name, data in files.items():
        if now.get(name) != data:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)


def part_of(name: str, arrays: set[str]) -> str:
    """Which part of a cache a file is."""
    named = {"zarr.json": "header", "tasks.json": "tasks", "lock": "lock"}
    named |= {"manifest.jsonl": "manifest", "quarantine.jsonl": "quarantine"}
    named["builds.jsonl"] = "lock"  # for people, as the lock's name is: nothing depends on it
    if name in named:
        return named[name]
    if name.endswith("/zarr.json"):
        return "array metadata" if name.removesuffix("/zarr.json") in arrays else "group metadata"
    return "chunk"


def parts(cache: FeatureCache, files: Files) -> dict[str, list[str]]:
    """Part → its files, sorted."""
    found: dict[str, list[str]] = {part: [] for part in WEIGHTS}
    for name in sorted(files):
        found[part_of(name, set(cache.header.arrays))].append(name)
    return found


def draw(
    files: Files, by_part: dict[str, list[str]], rng: np.random.Generator
) -> tuple[Damage, Files]:
    """One damage: what it is, and the files it leaves."""
    part = str(rng.choice(list(WEIGHTS), p=np.array(list(WEIGHTS.values())) / 100))
    name = str(rng.choice(by_part[part]))
    act = str(rng.choice(ACTS, p=[0.4, 0.08, 0.14, 0.08, 0.08, 0.06, 0.08, 0.08]))
    data, after = files[name], dict(files)
    at = int(rng.integers(len(data))) if data else 0
    if act in ("flip", "scatter"):
        changed, detail = bytearray(data), []
        for _ in range(1 if act == "flip" else 9):
            at = int(rng.integers(len(data))) if data else 0
            if data:
                changed[at] ^= int(rng.integers(1, 256))
                detail.append(f"{at}→{changed[at]:02x}")
        after[name], told = bytes(changed), " ".join(detail)
    elif act == "cut":
        after[name], told = data[:at], f"to {at} of {len(data)}"
    elif act == "delete":
        del after[name]
        told = ""
    elif act == "extend":
        more = rng.bytes(int(rng.integers(1, 40))) if rng.random() < 0.5 else b"\n" * 3
        after[name], told = data + more, f"by {len(more)}"
    elif act == "blank":
        stop = min(len(data), at + int(rng.integers(1, 64)))
        after[name], told = data[:at] + bytes(stop - at) + data[stop:], f"{at}…{stop}"
    elif act == "swap":
        other = str(rng.choice([o for o in by_part[part] if o != name] or [name]))
        after[name], after[other], told = files[other], data, f"with {other}"
    else:  # lines of text lost, doubled or moved, as an editor or a merge does
        lines = data.split(b"\n")
        i, j = (int(k) for k in rng.integers(len(lines), size=2))
        what = int(rng.integers(3))
        if what == 0:
            del lines[i]
        elif what == 1:
            lines.insert(j, lines[i])
        else:
            lines[i], lines[j] = lines[j], lines[i]
        after[name], told = b"\n".join(lines), f"{('lost', 'doubled', 'moved')[what]} {i} {j}"
    if after == files and data:  # no other file to swap with, no line to lose
        act, told = "flip", f"{at}"
        after[name] = data[:at] + bytes([data[at] ^ 0x11]) + data[at + 1 :]
    return Damage(part, act, name, told), after


def meaning(name: str, data: bytes | None) -> Any:
    """What a file says, so that blanks and the order of lines do not count as damage; the bytes if it says nothing."""
    if name in ("lock", "builds.jsonl"):
        return None
    if data is None:
        return "gone"
    try:
        if name.endswith(".jsonl"):
            lines = [json.loads(line) for line in data.split(b"\n")[:-1]]
            if name == "manifest.jsonl":
                return {(e["array"], e["chunk"]): e for e in lines}
            return {e["id"]: e for e in lines}
        if name.endswith("zarr.json"):
            # Python's own reader takes NaN and huge numbers; as text they compare.
            return json.dumps(json.loads(data), sort_keys=True)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return data


def same(before: Files, after: Files, skip: frozenset[str] = frozenset()) -> list[str]:
    """Files whose meaning differs."""
    names = sorted((before.keys() | after.keys()) - skip)
    return [n for n in names if meaning(n, before.get(n)) != meaning(n, after.get(n))]
