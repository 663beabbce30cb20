"""Does a build take memory that grows with the data set, or time that grows faster than it? 10^3 to 10^5 pictures.

    python tests/benchmarks/build_growth.py
    python tests/benchmarks/build_growth.py --most 10000 --engine

A stand-in backbone (no forward pass to speak of) and pictures of one colour, drawn when opened: what is left is the
build's own work. Every size runs in a process of its own. Memory is how far the peak rises above what the process took
before `build`; records, ids and labels are held before that, but their copies in the build do grow: tens of bytes a
picture. Targets: memory flat but for ids, time per row not growing.

`--engine` shares the build out in units in this process alone, as several processes would.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from growth import memory
from measure import pressure, table
from PIL import Image

from cache_builder import build
from cache_builder.datasets.base import Dataset, ImageRecord, Tasks, TextRecord
from cache_builder.passes import Passes

sys.path.insert(0, str(Path(__file__).parent.parent))
from stand_in import StandIn

CHUNK = 1 << 16
"""Bytes of a chunk: small, so that there are many."""


def pictures(n: int) -> Dataset:
    """Pictures that are drawn when they are opened."""
    colours = [Image.new("RGB", (6, 6), (i % 256, i * 7 % 256, 9)) for i in range(256)]
    images = tuple(ImageRecord(f"i{i}", lambda i=i: colours[i % 256]) for i in range(n))
    texts = tuple(TextRecord(f"t{i}", f"text {i}") for i in range(n // 100))
    return Dataset("drawn", images, texts, Tasks(), decode="colours")


class Alone:
    """An engine without helpers: the caller builds unit after unit."""

    @contextmanager
    def helping(self, passes: Passes) -> Generator[None]:
        del passes
        yield


def one(n: int, engine: bool, chunk_bytes: int) -> None:
    """Print pictures, seconds by the clock and of the CPU, peak growth of a build, and what the process took before."""
    torch.set_num_threads(1)
    dataset = pictures(n)
    options = {"batch_size": 64, "progress": False, "chunk_bytes": chunk_bytes}
    if engine:
        options["engine"] = Alone()
    with tempfile.TemporaryDirectory() as folder:
        build(pictures(500), StandIn(), Path(folder, "warm.zarr"), **options)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now
        before, started, used = memory("VmRSS"), time.perf_counter(), time.process_time()
        cache = build(dataset, StandIn(), Path(folder, "c.zarr"), **options)
        wall, cpu = time.perf_counter() - started, time.process_time() - used
        chunks = len(cache.chunks.manifest)
    print(n, wall, cpu, memory("VmHWM") - before, before, chunks)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--most", type=int, default=10**5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunk-bytes", type=int, default=CHUNK)
    parser.add_argument("--engine", action="store_true", help="in units")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.one, args.engine, args.chunk_bytes)
        return
    sizes = [n for n in (10**3, 10**4, 10**5) if n <= args.most]
    found: dict[int, list[list[float]]] = {n: [] for n in sizes}
    for _ in range(args.rounds):
        for n in sizes:
            command = [sys.executable, __file__, "--one", str(n), *["--engine"] * args.engine]
            command += ["--chunk-bytes", str(args.chunk_bytes)]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[n].append([float(word) for word in out.split()])
    print(f"median of {args.rounds}; /proc/pressure/cpu: {pressure()}\n")
    rows = []
    for n, runs in found.items():
        middle = [sorted(column)[len(runs) // 2] for column in zip(*runs, strict=True)]
        each = [f"{seconds / n * 1e6:.0f}" for seconds in middle[1:3]]
        rows.append([f"{n:,}", *each, *(f"{value:.0f}" for value in middle[3:])])
    table(
        ["pictures", "us each", "CPU us each", "MB more at its peak", "MB before", "chunks"], rows
    )


if __name__ == "__main__":
    main()
