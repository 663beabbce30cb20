"""What do the cache's extra streams cost, and what do the speed options give? Against the library's plain calls.

    python tests/benchmarks/backbones.py                                             four families, true shape, CPU
    python tests/benchmarks/backbones.py --device cuda --dtype bfloat16 --peak 989   and model FLOP utilisation
    python tests/benchmarks/backbones.py --backbones clip:demo pe:demo --batch-size 64

library       the library's own call on a batch in memory: `encode_image`, pooled vectors only (LLaVA: the vision tower)
streams       `encode_images`: pooled, patches and prefix of the same batch
blocks        the same, and the states that enter two blocks
channels-last `streams` of pixels in that memory format
compiled      `streams` with the blocks through torch.compile; compiled before the clock runs
plain loop    open, transform and encode one batch after the other in one thread, as the libraries' examples do
build         the same pictures to a sealed cache, all streams

Ratios are library ÷ this, round by round, in CPU seconds of the process (wall seconds on a GPU): above 1 is faster than
the library's call. Model FLOP utilisation is counted FLOPs ÷ seconds ÷ `--peak` TFLOP/s.
"""

import argparse
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import backbone, in_turn, pressure, ratios, spread, table
from PIL import Image
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode

from cache_builder import build
from cache_builder.datasets.base import Dataset, ImageRecord, Tasks
from cache_builder.images import decode

FAMILIES = [
    "random:ViT-B-32",
    "random:ViT-B-32-SigLIP2-256",
    "random:PE-Core-S-16-384",
    "random:llava",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--backbones", nargs="+", default=FAMILIES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--no-compile", action="store_true", help="compiling takes a minute a family"
    )
    parser.add_argument("--peak", type=float, help="TFLOP/s of the device in this dtype")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.device}, {args.dtype}; /proc/pressure/cpu: {pressure()}")
    for name in args.backbones:
        measure(name, args)


def measure(name: str, args: argparse.Namespace) -> None:
    choice = {"device": args.device, "dtype": args.dtype}
    with backbone(name, **choice) as model:
        ours: Any = model
        files = photos(args.batch_size * args.batches)
        pixels = [ours.preprocess(decode(file)) for file in files]
        batches = [
            default_collate(pixels[i : i + args.batch_size]).to(args.device)
            for i in range(0, len(pixels), args.batch_size)
        ]
        half = ours.depth["image"] // 2

        def each(
            encode: Callable[[Any], object], given: list[torch.Tensor] | None = None
        ) -> Callable[[], None]:
            def run() -> None:
                with torch.inference_mode(), ours._precision():
                    for batch in given or batches:
                        encode(batch)
                if "cuda" in args.device:
                    torch.cuda.synchronize()

            return run

        def loop() -> None:
            for i in range(0, len(files), args.batch_size):
                some = [ours.preprocess(decode(file)) for file in files[i : i + args.batch_size]]
                with torch.inference_mode(), ours._precision():
                    library(ours)(default_collate(some).to(args.device)).cpu()

        jobs: dict[str, Callable[[], object]] = {
            "library": each(library(ours)),
            "streams": each(ours.encode_images),
            "blocks": each(lambda batch: ours.encode_images(batch, (half, half + 1))),
            "plain loop": loop,
            "build": lambda: built(files, ours, args.batch_size),
        }
        jobs["streams"]()
        found = in_turn(jobs, args.rounds)
        clock = "wall" if "cuda" in args.device else "cpu"
        rows = _rows(found, clock, len(files))
        in_order = [batch.contiguous(memory_format=torch.channels_last) for batch in batches]
        swapped = {
            "library": jobs["library"],
            "channels-last": each(ours.encode_images, in_order),
        }
        rows += _rows(in_turn(swapped, args.rounds), clock, len(files))[1:]
        if not args.no_compile:
            with backbone(name, **choice, compiled=True) as fast:
                run: Any = fast
                compiled = {"library": jobs["library"], "compiled": each(run.encode_images)}
                compiled["compiled"]()
                rows += _rows(in_turn(compiled, args.rounds), clock, len(files))[1:]
        print(
            f"\n{name}: {len(files)} pictures in batches of {args.batch_size}, {args.rounds} rounds, median (range)"
        )
        table(["", f"{clock} s", "images/s", "library / this"], rows)
        if args.peak:
            with FlopCounterMode(display=False) as counter:
                ours.encode_images(batches[0])
            flops = counter.get_total_flops() / args.batch_size * len(files)
            best = min(s.wall for s in found["streams"])
            print(f"model FLOP utilisation of streams: {flops / best / args.peak / 1e12:.1%}")


def _rows(found: Any, clock: str, n: int) -> list[list[str]]:
    times = {job: [getattr(s, clock) for s in runs] for job, runs in found.items()}
    return [
        [
            job,
            spread(seconds),
            spread([n / s for s in seconds], 1),
            spread(ratios(times["library"], seconds)),
        ]
        for job, seconds in times.items()
    ]


def library(ours: Any) -> Callable[[Any], torch.Tensor]:
    """The library's own call for a batch of pixels."""
    if ours.image.pools:
        return ours.model.encode_image
    return lambda pixels: ours.image.tower(pixels, output_hidden_states=True).hidden_states[-2]


def photos(n: int) -> list[bytes]:
    """Soft noise as JPEG files of 500 × 375."""
    random, files = np.random.default_rng(0), []
    for _ in range(n):
        file = io.BytesIO()
        coarse = Image.fromarray(random.integers(0, 255, (24, 32, 3), np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def built(files: list[bytes], model: Any, batch_size: int) -> None:
    images = [ImageRecord(f"i{i}", lambda file=file: decode(file)) for i, file in enumerate(files)]
    dataset = Dataset("noise", tuple(images), (), Tasks(), decode="noise")
    streams = [s for s in model.streams if s.startswith("image/")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "c.zarr")
        build(dataset, model, path, streams=streams, batch_size=batch_size, progress=False)


if __name__ == "__main__":
    main()
