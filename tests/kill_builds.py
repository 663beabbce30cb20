"""Kills work on a cache with SIGKILL and repeats it; writes a JSON line per trial. Run by test_cache_kill.py.

A trial forks a child that works on its own folder and is ended in one of three ways: it kills itself at its k-th file
operation (Python's audit events open, os.rename, os.mkdir, os.truncate in that folder), its parent kills it at some
moment, or the kernel does when a file grows beyond a size (SIGXFSZ), which tears a write in two. Another child then
does the work again. To have something else killed (an append, an export), add it to `WORKS`.
"""

import json
import logging
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from small_caches import BUILDS, grown, smaller
from stand_in import StandIn, dataset

from cache_builder import FeatureCache, build
from cache_builder.append import next_place
from cache_builder.passes import Passes
from cache_builder.units import share

torch.set_num_threads(1)
FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.truncate")


@dataclass(frozen=True)
class Work:
    """Something that is killed.

    Attributes:
        do: the work, on a folder; repeating it must finish it.
        prepare: makes the folder it is done on, once; trials work on copies. None: there is none yet.
        result: what must be equal, however often it was killed.
    """

    do: Callable[[Path], object]
    prepare: Callable[[Path], object] | None = None
    result: Callable[[Path], str] = lambda path: verified_digest(path)


def verified_digest(path: Path) -> str:
    """The digest of a cache of which every byte was compared."""
    cache = FeatureCache.open(path)
    assert cache.verify().ok
    assert cache.header.digest == cache.digest()
    return cache.digest()


def damaged(path: Path) -> None:
    """A sealed cache that lost some chunks of embeddings, and parts of others."""
    cache = BUILDS["fixed"](path)
    keys = [key for key in cache.chunks.manifest if key[0] in cache.streams]
    for i, key in enumerate(keys[::3]):
        file = cache.chunks.file(*key)
        file.unlink() if i % 2 else os.truncate(file, 5)


class Others:
    """Three threads that help, each with a journal of its own."""

    @contextmanager
    def helping(self, passes: Passes) -> Generator[None]:
        def help_out(number: int) -> None:
            writer = f"helper{number}x{os.getpid()}"
            cache = FeatureCache(passes.cache.place, passes.cache.header, writer=writer)
            share(replace(passes, cache=cache), number, 3)

        threads = [threading.Thread(target=help_out, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        yield
        for thread in threads:
            thread.join()


def together(path: Path) -> FeatureCache:
    """Several that share out the units of one cache."""
    given = {"batch_size": 4, "chunk_bytes": 100, "progress": False}
    return build(dataset(40, bad=(3, 8)), StandIn(), path, engine=Others(), **given)


WORKS = {
    **{f"build {kind}": Work(make) for kind, make in BUILDS.items() if kind != "appended"},
    "build together": Work(together),
    "repair": Work(BUILDS["fixed"], damaged),
    "append": Work(grown, smaller),
}
"""What is killed, by name."""


def in_child(work: Callable[[], object]) -> int:
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


def killing_itself(do: Callable[[Path], object], path: Path, at: int | None, note: Path) -> None:
    """Work until file operation `at` below `path`; with None, to the end, and write how many there were."""
    seen = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        # Also beside the folder, where the next generation of a cache is built.
        if event in FILE_EVENTS and path.name in str(arguments[0]):
            seen += 1
            if seen == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    do(path)
    note.write_text(str(seen))


def torn(do: Callable[[Path], object], path: Path, part: str, at: int, more: int) -> None:
    """Work until a file `part…` is opened for writing for the `at`-th time; only `more` bytes are then written."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard, seen = resource.getrlimit(resource.RLIMIT_FSIZE)[1], 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        name, mode = (str(a) for a in arguments[:2]) if event == "open" else ("", "")
        inside = name.rpartition(path.name)[2].partition("/")[2]
        if path.name in name and inside.startswith(part) and mode[:1] in ("a", "w"):
            seen += 1
            if seen == at:
                kept = mode[0] == "a" and os.path.exists(name)
                size = os.path.getsize(name) if kept else 0
                resource.setrlimit(resource.RLIMIT_FSIZE, (size + more, hard))

    sys.addaudithook(hook)
    do(path)


class Trials:
    """All trials of one kind of work."""

    def __init__(self, name: str, folder: Path, rng: np.random.Generator) -> None:
        self.name, self.work, self.rng = name, WORKS[name], rng
        self.folder = folder / name.replace(" ", "-")
        self.folder.mkdir()
        self.start = self.folder / "start"
        if self.work.prepare:
            self.work.prepare(self.start)
        began = time.perf_counter()
        whole = self.fresh("whole")
        note = self.folder / "total"
        ending(in_child(lambda: killing_itself(self.work.do, whole, None, note)))
        self.seconds = time.perf_counter() - began
        self.total = int(note.read_text())
        self.lines = self.written(whole)
        self.tell("whole", 0, whole, total=self.total)

    def fresh(self, name: str) -> Path:
        """A folder of its own for a trial."""
        path = self.folder / f"{name}.zarr"
        if self.start.exists():
            shutil.copytree(self.start, path)
        return path

    def written(self, whole: Path) -> int:
        """Lines that the work adds to the manifest."""
        before = self.start / "manifest.jsonl"
        count = (whole / "manifest.jsonl").read_bytes().count(b"\n")
        return count - (before.read_bytes().count(b"\n") if before.exists() else 0)

    def points(self, count: int) -> None:
        """At file operations from the first to the last."""
        for at in np.unique(np.linspace(1, self.total, count).astype(int)).tolist():
            path = self.fresh(f"point{at}")
            pid = in_child(
                lambda p=path, k=at: killing_itself(self.work.do, p, k, self.folder / "n")
            )
            self.tell("point", ending(pid), path, at=at)

    def moments(self, count: int) -> None:
        """At drawn moments."""
        for i in range(count):
            path = self.fresh(f"moment{i}")
            pid = in_child(lambda p=path: self.work.do(p))
            time.sleep(self.seconds * float(self.rng.random()))
            os.kill(pid, signal.SIGKILL)
            self.tell("moment", ending(pid), path)

    def tears(self, count: int) -> None:
        """In the middle of a write: of a line of the manifest, early and late, and of other files in turn."""
        for i in range(count):
            path, part = self.fresh(f"torn{i}"), "" if i % 3 == 2 else "manifest.jsonl"
            at, more = int(self.rng.integers(1, self.lines + 1)), int(self.rng.integers(1, 60))

            def work(path: Path = path, part: str = part, at: int = at, more: int = more) -> None:
                torn(self.work.do, path, part, at, more)

            self.tell("torn", ending(in_child(work)), path)

    def chain(self, at: int, most: int) -> None:
        """Again and again, until it ends by itself."""
        path, note, deaths = self.fresh("chain"), self.folder / "n", 0
        while deaths < most:
            pid = in_child(lambda: killing_itself(self.work.do, path, at, note))
            if ending(pid) != -signal.SIGKILL:
                break
            deaths += 1
        self.tell("chain", 0, path, deaths=deaths)

    def tell(self, kind: str, killed: int, path: Path, **more: int) -> None:
        """What repeating the work makes of it: its exit code and, if it is right, its result."""
        proof = self.folder / "proof"

        def finish() -> None:
            self.work.do(path)
            proof.write_text(self.work.result(path))

        code = ending(in_child(finish))
        trial = {"work": self.name, "kind": kind, "killed": killed, "finish": code, **more}
        trial["result"] = proof.read_text() if code == 0 else None
        sys.stdout.write(json.dumps(trial) + "\n")
        proof.unlink(missing_ok=True)
        shutil.rmtree(path)
        assert not next_place(path).exists()


def main(folder: Path, seed: int, points: int, moments: int, tears: int) -> None:
    logging.disable(logging.WARNING)
    for i, name in enumerate(WORKS):
        trials = Trials(name, folder, np.random.default_rng([seed, i]))
        trials.points(points)
        trials.moments(moments)
        trials.tears(tears)
        trials.chain(trials.total // 4, 12)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
