"""Would another decoder, or processes instead of threads, bring pictures faster to the backbone?

    python tests/benchmarks/decode.py
    python tests/benchmarks/decode.py --photos shared/clothing_cc0/images
    python tests/benchmarks/decode.py --backbone clip:demo --sizes 240x180

PIL          what images.py does: recognised by content, RGB; resized and normalised by the backbone's transform
simplejpeg   libjpeg-turbo's own wrapper, then `Image.fromarray` and the same transform
torchvision  `torchvision.io.decode_jpeg`, likewise
no copy      PIL without the last `convert`, which copies a picture that is RGB already

Each alone in this thread, then with the backbone's transform in two threads, and in two spawned processes that return
arrays. Rates are pictures a second, of CPU seconds (this process and its children) or by the clock. `differs` is the
largest difference of any pixel from PIL's: the fingerprint of a cache names one way of decoding, so a decoder with
another pixel needs another `decode` rule, whatever it gains.

Decided from three rounds on a busy two-core machine, pressure over 90 % (pillow 13.0, simplejpeg 1.9, torchvision
0.29; medians, pictures per CPU second
with the transform of clip:demo, in two threads): at 500 × 375 PIL 442, simplejpeg 486, torchvision 479, no copy 480; at
2000 × 1500 39, 42, 41, 42; photos of 240 × 180 1,340, 1,751, 1,580, 1,375. All pixels were equal. PIL without its copy
is adopted. Over that simplejpeg gains 1 %, nothing, and 27 % on the small photos; its pixels are equal only while both
wheels carry like versions of libjpeg-turbo, which no fingerprint tells, so it is not. Spawned processes did no more per
CPU second (408, 30 and 1,200 for PIL); by the clock the runs of one row differ more than the rows: threads stay.
"""

import argparse
import io
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg  # pyright: ignore[reportMissingImports]
import torch
from measure import backbone, pressure, spread, table
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from cache_builder import load_backbone
from cache_builder.images import FORMATS, decode

WORKERS = 2
PART = 8
"""Pictures of one task."""


def by_simplejpeg(data: bytes) -> Image.Image:
    return Image.fromarray(simplejpeg.decode_jpeg(data, "RGB"))


def by_torchvision(data: bytes) -> Image.Image:
    found: Any = decode_jpeg(
        torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB
    )
    return Image.fromarray(found.permute(1, 2, 0).contiguous().numpy())


def without_copy(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        image.load()
        return image


DECODERS: dict[str, Callable[[bytes], Image.Image]] = {
    "PIL": decode,
    "simplejpeg": by_simplejpeg,
    "torchvision": by_torchvision,
    "no copy": without_copy,
}

_model: Any = None


def prepare(transform: Callable[[Image.Image], Any], decoder: str, part: list[bytes]) -> Any:
    """Normalised pixels of a few files."""
    return torch.stack([transform(DECODERS[decoder](data)) for data in part])


def start(name: str) -> None:
    """In a spawned process: its own copy of the backbone, for the transform."""
    global _model
    torch.set_num_threads(1)
    _model = load_backbone(name)


def prepare_there(decoder: str, part: list[bytes]) -> Any:
    """The same in a spawned process, as an array."""
    return prepare(_model.preprocess, decoder, part).numpy()


def soft(size: tuple[int, int], n: int) -> list[bytes]:
    """Soft noise with a little grain, as JPEG files."""
    random, files = np.random.default_rng(0), []
    for _ in range(n):
        file = io.BytesIO()
        coarse = Image.fromarray(random.integers(0, 255, (24, 32, 3), np.uint8))
        smooth = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int16)
        grain = random.integers(-6, 7, smooth.shape, np.int16)
        pixels = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
        pixels.save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def cpu() -> float:
    """CPU seconds of this process and of its children, those that still run included."""
    mine = time.process_time()
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        mine += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return mine


def rate(work: Callable[[], object], n: int) -> tuple[float, float]:
    """Pictures a second: of CPU time, and by the clock."""
    wall, used = time.perf_counter(), cpu()
    work()
    return n / max(cpu() - used, 1e-9), n / (time.perf_counter() - wall)


def through(pool: Executor, job: Callable[[list[bytes]], Any], files: list[bytes]) -> None:
    for _ in pool.map(job, [files[i : i + PART] for i in range(0, len(files), PART)]):
        pass


def differs(files: Sequence[bytes], decoder: Callable[[bytes], Image.Image]) -> int:
    """Largest difference of a pixel from PIL's."""
    most = 0
    for data in files:
        ours, other = np.asarray(decode(data), np.int16), np.asarray(decoder(data), np.int16)
        assert ours.shape == other.shape
        most = max(most, int(np.abs(ours - other).max()))
    return most


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--backbone", default="clip:demo", help="whose transform (%(default)s)")
    parser.add_argument("--sizes", nargs="+", default=["500x375", "2000x1500"])
    parser.add_argument("--photos", type=Path, help="folder with JPEG files, besides")
    parser.add_argument("--number", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sets = {}
    for size in args.sizes:
        width, height = map(int, size.split("x"))
        sets[size] = soft((width, height), max(16, args.number * 500 * 375 // (width * height)))
    if args.photos:
        found = sorted(args.photos.rglob("*.jpg"))[: 4 * args.number]
        sets[args.photos.name] = [file.read_bytes() for file in found]
    spawn = multiprocessing.get_context("spawn")
    with (
        backbone(args.backbone) as model,
        ThreadPoolExecutor(WORKERS) as threads,
        ProcessPoolExecutor(WORKERS, spawn, start, (args.backbone,)) as processes,
    ):
        for title, files in sets.items():
            few = files[: PART * WORKERS]
            through(processes, partial(prepare_there, "PIL"), few)
            print(
                f"\n{title}: {len(files)} files of {np.mean([*map(len, files)]) / 1e3:.0f} kB, transform of "
                f"{args.backbone}, {args.rounds} rounds, median (range); /proc/pressure/cpu: {pressure()}\n"
            )
            measure(model, files, threads, processes, args.rounds)


def measure(
    model: Any, files: list[bytes], threads: Executor, processes: Executor, rounds: int
) -> None:
    jobs: dict[tuple[str, str], Callable[[], object]] = {}
    for name, decoder in DECODERS.items():
        here = partial(prepare, model.preprocess, name)
        there = partial(prepare_there, name)
        jobs[name, "alone"] = lambda decoder=decoder: [decoder(data) for data in files]
        jobs[name, "threads"] = lambda job=here: through(threads, job, files)
        jobs[name, "processes"] = lambda job=there: through(processes, job, files)
    found: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in jobs}
    for _ in range(rounds):
        for key, job in jobs.items():
            found[key].append(rate(job, len(files)))
    rows = []
    for name, decoder in DECODERS.items():
        cells = [spread([r[0] for r in found[name, "alone"]], 0)]
        for how in ("threads", "processes"):
            cells += [spread([r[kind] for r in found[name, how]], 0) for kind in (0, 1)]
        rows.append([name, str(differs(files, decoder)), *cells])
    heads = ["", "differs", "decoding /CPU s"]
    heads += [f"2 {how} {clock}" for how in ("threads", "processes") for clock in ("/CPU s", "/s")]
    table(heads, rows)


if __name__ == "__main__":
    main()
