"""Kills builds with SIGKILL and finishes them; writes a JSON line per trial. Run by test_cache_kill.py, as a process.

A trial forks: the child builds and kills itself at its k-th file operation (Python's audit events open, os.rename,
os.mkdir, os.truncate in the cache's folder), or the parent kills it at some moment. Another child repeats the build.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from stand_in import StandIn, dataset

from cache_builder import build

torch.set_num_threads(1)
FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.truncate")


def full_build(path: Path) -> None:
    build(dataset(bad=(3, 8)), StandIn(), path, batch_size=4, chunk_bytes=100, progress=False)


def count_events(path: Path, at: int | None, count_file: Path | None = None) -> None:
    """Die at file operation `at` below `path`; with None, live and write how many there were."""
    seen = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event in FILE_EVENTS and str(arguments[0]).startswith(str(path)):
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    full_build(path)
    if count_file is not None:
        count_file.write_text(str(seen))


def in_child(work: Callable[[], None]) -> int:
    """Process id of a fork that does `work`."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException as error:
        sys.stderr.write(repr(error))
        os._exit(1)
    os._exit(0)


def ending(pid: int) -> int:
    """0, or minus the signal that ended the process."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcome(path: Path) -> dict[str, object]:
    """What the repeated build makes of it: its exit code and, if it verifies, the digest."""
    proof = path.with_suffix(".digest")

    def finish() -> None:
        full_build(path)
        from cache_builder import FeatureCache

        cache = FeatureCache.open(path)
        assert cache.verify().ok
        proof.write_text(cache.digest())

    code = ending(in_child(finish))
    return {"finish": code, "digest": proof.read_text() if code == 0 else None}


def tell(trial: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(trial) + "\n")


def main(folder: Path, points: int, moments: int, chain: int) -> None:
    total_file = folder / "total"
    started = time.perf_counter()
    ending(in_child(lambda: count_events(folder / "whole.zarr", None, total_file)))
    seconds = time.perf_counter() - started
    total = int(total_file.read_text())
    tell({"kind": "whole", "total": total, **outcome(folder / "whole.zarr")})
    for i in range(points):
        at = 1 + i * (total - 1) // (points - 1)
        path = folder / f"point{at}.zarr"
        killed = ending(in_child(lambda p=path, k=at: count_events(p, k)))
        tell({"kind": "point", "at": at, "killed": killed, **outcome(path)})
    for i in range(moments):
        path = folder / f"moment{i}.zarr"
        pid = in_child(lambda p=path: full_build(p))
        time.sleep(seconds * (i + 0.5) / moments)
        os.kill(pid, signal.SIGKILL)
        tell({"kind": "moment", "killed": ending(pid), **outcome(path)})
    path, deaths = folder / "chain.zarr", 0
    while deaths < chain and ending(in_child(lambda: count_events(path, 60))) == -signal.SIGKILL:
        deaths += 1
    tell({"kind": "chain", "deaths": deaths, **outcome(path)})


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
