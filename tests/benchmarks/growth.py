"""Does an epoch from disk take memory that grows with the cache, or time that grows faster than it? 10^3 to 10^6 rows.

    python tests/benchmarks/growth.py
    python tests/benchmarks/growth.py --most 100000

Every size runs in a process of its own. Memory is how far the process's peak rises above what it took before the epoch,
once a shorter epoch has warmed it up; a cache's ids and labels are held before that, and do grow. All chunk files are
links to one, so they are read from the page cache. Targets: memory flat, time per row not growing.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch
from measure import pressure, table
from random_cache import make_repeated_cache

from heads.base import Needs
from heads.loader import Loader
from heads.tasks import load_task

ROW = (8, 512)
CHUNK, LIMIT = 1 << 20, 4 << 20
"""Bytes of a chunk (128 rows), and of the two pools together."""


def memory(field: str) -> float:
    """A line of /proc/self/status in MB."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


def one(n: int) -> None:
    """Print rows, seconds and peak growth of an epoch, and what the process took before it."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        cache = make_repeated_cache(Path(folder, "c.zarr"), n, ROW, CHUNK)
        needs = Needs(frozenset({"image/patches"}), frozenset({"text/pooled"}))
        data = load_task(cache, "czsl", "train")
        loader = Loader(data, needs, batch_size=64, seed=0, ram_limit=LIMIT)
        if loader.pools is None:
            raise SystemExit(f"{n} rows fit in memory")
        for _ in islice(loader.epoch(0), 10):
            pass
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
        before, started = memory("VmRSS"), time.perf_counter()
        rows = sum(len(batch.target) for batch in loader.epoch(1))
        seconds = time.perf_counter() - started
        print(rows, seconds, memory("VmHWM") - before, before)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--most", type=int, default=10**6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.one)
        return
    found = []
    sizes = [n for n in (10**3, 10**4, 10**5, 10**6) if n <= args.most]
    for _ in range(args.rounds):
        for n in sizes:
            command = [sys.executable, __file__, "--one", str(n)]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found.append(tuple(float(word) for word in out.split()))
    print(f"rows of {ROW} fp16, median of {args.rounds}; /proc/pressure/cpu: {pressure()}\n")
    rows = []
    for n in sizes:
        runs = [run for run in found if run[0] == n]
        assert len(runs) == args.rounds, f"an epoch of {n} rows had another number of them"
        middle = [sorted(column)[len(runs) // 2] for column in zip(*runs, strict=True)]
        per_row = f"{middle[1] / n * 1e6:.2f}"
        rows.append([f"{n:,}", f"{middle[1]:.3f}", per_row, f"{middle[2]:.1f}", f"{middle[3]:.0f}"])
    table(["rows", "seconds", "us a row", "MB more at its peak", "MB before"], rows)


if __name__ == "__main__":
    main()
