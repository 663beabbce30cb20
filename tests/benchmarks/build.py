"""How much of the backbone's own speed does a build reach? Target: >= 97 % of forward-only on a CPU, >= 95 % on a GPU.

    python tests/benchmarks/build.py                                                      ViT-B-32, random weights
    python tests/benchmarks/build.py --backbone clip:demo --images 2048 --batch-size 64 --photo 56 56
    python tests/benchmarks/build.py --backbone clip:ViT-L-14/openai --device cuda --images 4096 --batch-size 256

forward    encode_images and encode_texts on batches that lie in memory, nothing kept: the ceiling
build      the same rows from JPEG files in memory to a sealed cache
ready      a build whose decoding and preprocessing are a look-up: what casting, checks, crc and writing cost
empty      a build of no rows: creating, fsyncing and sealing a cache, which does not grow with it
decode     decoding and preprocessing alone, in one thread: what the build has to hide behind the forward pass

`forward / this` is the share of the backbone's speed that is reached; `without empty` takes the fixed cost off first,
and so is the share for a cache of usual size. Wall seconds depend on who else is busy; CPU seconds of the process are
fairer, but hidden work counts there as well: with every core in the forward pass, forward / (forward + decode) is the
most that can be had. One torch thread by default, because waiting OpenMP threads spin and count as CPU seconds.
"""

import argparse
import copy
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import backbone, in_turn, pressure, ratios, spread, table
from PIL import Image

from cache_builder import build
from cache_builder.backbones.base import Backbone
from cache_builder.datasets.base import Dataset, ImageRecord, Tasks, TextRecord
from cache_builder.images import decode

DISTINCT = 64
"""Different pictures; more would only take memory."""


def photos(n: int, n_texts: int, size: tuple[int, int]) -> Dataset:
    """Soft noise as JPEG files in memory."""
    random = np.random.default_rng(0)
    files = []
    for _ in range(min(n, DISTINCT)):
        file = io.BytesIO()
        coarse = Image.fromarray(random.integers(0, 255, (24, 32, 3), np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    images = [ImageRecord(f"i{i}", lambda i=i: decode(files[i % DISTINCT])) for i in range(n)]
    texts = [TextRecord(f"t{i}", f"a photo of thing number {i}") for i in range(n_texts)]
    return Dataset("noise", tuple(images), tuple(texts), Tasks(), decode="noise")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--backbone", default="random:ViT-B-32", help="%(default)s, or any name")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--photo", type=int, nargs=2, default=(500, 375), metavar=("W", "H"))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="threads that decode")
    parser.add_argument("--out", type=Path, help="on the disk in question (default: temporary)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with backbone(args.backbone, dtype=args.dtype, device=args.device) as model:
        measure(model, args)


def measure(model: Backbone, args: argparse.Namespace) -> None:
    dataset = photos(args.images, args.texts, tuple(args.photo))
    nothing = photos(0, 0, tuple(args.photo))
    size = args.batch_size
    pixels = [model.preprocess(r.open()) for r in dataset.images[:DISTINCT]]
    batches = [
        torch.stack([pixels[i % DISTINCT] for i in range(start, min(start + size, args.images))])
        for start in range(0, args.images, size)
    ]
    ids = [
        model.tokenize([t.text for t in dataset.texts[i : i + size]])
        for i in range(0, args.texts, size)
    ]

    def forward(images: list[torch.Tensor], texts: list[torch.Tensor]) -> None:
        with torch.inference_mode():
            for batch in images:
                model.encode_images(batch.to(args.device))
            for batch in texts:
                model.encode_texts(batch.to(args.device))
        if "cuda" in args.device:
            torch.cuda.synchronize()

    def built(dataset: Dataset, model: Backbone) -> None:
        with tempfile.TemporaryDirectory(dir=args.out) as folder:
            path = Path(folder, "c.zarr")
            options = {"batch_size": size, "workers": args.workers}
            build(dataset, model, path, progress=False, **options)

    # The picture is the number of its pixels: nothing is decoded.
    ready: Any = copy.copy(model)
    ready.preprocess = lambda number: pixels[number]
    numbers = tuple(
        ImageRecord(r.id, lambda i=i: i % DISTINCT)  # pyright: ignore[reportArgumentType]
        for i, r in enumerate(dataset.images)
    )
    looked_up = Dataset("noise", numbers, dataset.texts, Tasks(), decode="none")

    jobs: dict[str, Callable[[], object]] = {
        "forward": lambda: forward(batches, ids),
        "build": lambda: built(dataset, model),
        "ready": lambda: built(looked_up, ready),
        "empty": lambda: built(nothing, model),
        "decode": lambda: [model.preprocess(r.open()) for r in dataset.images],
    }
    forward(batches[:1], ids[:1])
    jobs["empty"]()
    found = in_turn(jobs, args.rounds)

    wall = {name: [s.wall for s in runs] for name, runs in found.items()}
    cpu = {name: [s.cpu for s in runs] for name, runs in found.items()}
    rows = []
    for name in jobs:
        shares = [""] * 4
        if name in ("build", "ready"):
            shares = [
                spread(
                    ratios(
                        kind["forward"],
                        [t - less * e for t, e in zip(kind[name], kind["empty"], strict=True)],
                    )
                )
                for kind in (wall, cpu)
                for less in (0, 1)
            ]
        rows.append([name, spread(wall[name]), spread(cpu[name]), *shares])
    print(
        f"{args.backbone} on {args.device}, {args.threads} torch threads: {args.images} images + {args.texts} texts in "
        f"batches of {size}, {args.rounds} rounds, median (range); /proc/pressure/cpu: {pressure()}\n"
    )
    heads = [
        "",
        "wall s",
        "CPU s",
        "wall: forward / this",
        "without empty",
        "CPU: forward / this",
        "without empty",
    ]
    table(heads, rows)


if __name__ == "__main__":
    main()
