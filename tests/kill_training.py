"""Kills `headstart train` with SIGKILL, resumes it, and writes a JSON line per trial. Run by test_heads_resume.py.

A child kills itself at its k-th file operation in the folder of its runs, or its parent kills it at some moment; then
the command is repeated with --resume until it ends by itself. Two runs of one sweep stand side by side.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawn import make_drawn
from kill_builds import ending, in_child
from safetensors.numpy import load_file

from heads.cli import main

torch.set_num_threads(1)
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir")
SETTINGS = (
    "head.layers=1 head.dim=8 head.heads=2 head.ffn=12 head.dropout=0.3 train.accumulate=2 "
    "train.epochs=2 train.batch_size=4 train.lr=0.01 train.device=cpu"
)
OWN = ("seconds", "data_wait", "data_wait_seconds", "commit", "command")
"""What of a record or of a line of history is the clock's, or the tree's."""


def train(cache: Path, out: Path, *more: str) -> None:
    """The command, with a state at the end of every step."""
    sets = [word for text in SETTINGS.split() for word in ("--set", text)]
    words = ["train", "tf_local", "--cache", str(cache), "--task", "two_by_two", "--out", str(out)]
    words += [*sets, "--sweep", "train.seed=1,2", "--save-every", "1e-9", *more]
    assert main(words) == 0


def counted(do: Callable[[], None], out: Path, at: int, note: Path) -> None:
    """Work until file operation `at` below `out`; with 0, to the end, and write how many there were."""
    seen = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event in EVENTS and str(out) in str(arguments[0]):
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    do()
    note.write_text(str(seen))


def result(out: Path) -> dict[str, Any]:
    """All that runs leave, but for the clock."""
    found: dict[str, Any] = {}
    for run in sorted(out.iterdir()):
        lines = (run / "history.jsonl").read_text().splitlines()
        record = json.loads((run / "run.json").read_text())
        weights = load_file(run / "model.safetensors")
        found[run.name] = [
            sorted(p.name for p in run.iterdir()),
            {k: v.tobytes().hex() for k, v in weights.items()},
            [{k: v for k, v in json.loads(x).items() if k not in OWN} for x in lines],
            {k: v for k, v in record.items() if k not in OWN},
        ]
    return found


def trials(folder: Path, seed: int, points: int, moments: int) -> None:
    """Kill at drawn operations and moments."""
    rng, cache, whole = np.random.default_rng(seed), folder / "c.zarr", folder / "whole"
    ending(in_child(lambda: make_drawn(cache) and None))
    note, began = folder / "note", time.perf_counter()
    assert ending(in_child(lambda: counted(lambda: train(cache, whole), whole, 0, note))) == 0
    seconds, total = time.perf_counter() - began, int(note.read_text())
    expected = result(whole)
    drawn = sorted(rng.choice(np.arange(1, total + 1), points, replace=False).tolist())
    for i, at in enumerate([*drawn, *[0] * moments]):
        out = folder / f"trial{i}"
        pid = in_child(lambda o=out, k=at: counted(lambda: train(cache, o), o, k, note))
        if not at:
            time.sleep(seconds * float(rng.random()))
            os.kill(pid, signal.SIGKILL)
        killed = ending(pid)
        steps = [json.loads(p.read_text())["state"]["step"] for p in out.glob("*/training-*.json")]
        # Killed once more on the way, early: going on must not spoil what it goes on from.
        again = ending(
            in_child(lambda o=out: counted(lambda: train(cache, o, "--resume"), o, 14, note))
        )
        code = ending(in_child(lambda o=out: train(cache, o, "--resume")))
        equal = code == 0 and result(out) == expected
        trial = {"at": at, "killed": killed, "again": again, "finish": code, "equal": equal}
        sys.stdout.write(f"\nTRIAL {json.dumps({**trial, 'steps': steps, 'of': total})}\n")
        sys.stdout.flush()  # a fork would write it once more
        shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    trials(Path(sys.argv[1]), *map(int, sys.argv[2:]))
