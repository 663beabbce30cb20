"""The bundled tiny CLIP over the same files, through headstart's build and through clip-retrieval's inference.

    python tests/benchmarks/peers.py
    python tests/benchmarks/peers.py --images 4096 --rounds 7 --threads 2

Both sides: `clip:demo` through open_clip, pictures and captions as files in one folder, the same batch size, torch
threads and number of decoding workers; pooled embeddings only, float32. clip-retrieval 2.22 runs as it is: its
`clip_inference` with its own reader (DataLoader over worker processes) and its own writer (.npy and .parquet). Only the
package `clip` that it asks for a model gives way, to one that returns the bundled model, transform and tokenizer:
nothing is downloaded, and both sides run the same forward pass.
`forward` is the encoders alone on a batch in memory.

What is not equal: its embeddings are normed to length 1 and not checksummed, fsynced or checked for NaN; nothing is
known of the model that made them. It holds every embedding in memory and writes them at the end, or every
`write_batch_size` (a million) rows: a kill loses all since, and a second call encodes everything again. A build loses
the chunks that are open, and the same call finishes it.

CPU seconds are of the process and its finished children, since clip-retrieval decodes in processes.
"""

import argparse
import contextlib
import importlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from build import photos
from measure import Seconds, backbone, pressure, ratios, spread, table

from cache_builder import build
from cache_builder.datasets.base import Dataset, ImageRecord, Tasks, TextRecord
from cache_builder.images import open_image


def write_files(folder: Path, n: int, size: tuple[int, int]) -> None:
    """Pictures, no two of the same bytes, and a caption beside each."""
    some = photos(min(n, 64), 0, size).images
    for i in range(n):
        picture = some[i % len(some)].open().copy()
        picture.putpixel((0, 0), (i % 256, i // 256 % 256, 0))
        file = folder / f"{i:06d}.jpg"
        picture.save(file, quality=90, comment=str(i).encode())
        file.with_suffix(".txt").write_text(f"a photo of thing number {i}")


def dataset(folder: Path) -> Dataset:
    """The same files for a build."""
    files = sorted(folder.glob("*.jpg"))
    images = [
        ImageRecord(f.stem, lambda f=f: open_image(f), path=lambda f=f: f)  # pyright: ignore[reportCallIssue]
        for f in files
    ]
    texts = [TextRecord(f.stem, f.with_suffix(".txt").read_text()) for f in files]
    return Dataset("files", tuple(images), tuple(texts), Tasks(), decode="PIL")


def stand_in_clip(model: Any) -> ModuleType:
    """The package `clip`, as far as clip-retrieval calls it, with one model."""
    module = ModuleType("clip")

    class Model:
        """With the two methods that are called."""

        encode_image = staticmethod(model.model.encode_image)
        encode_text = staticmethod(model.model.encode_text)

    module.load = lambda *_, **__: (Model, model.image.transform)  # type: ignore[attr-defined]
    module.tokenize = lambda texts, **_: model.tokenize(texts)  # type: ignore[attr-defined]
    return module


def seconds(job: Callable[[], object]) -> Seconds:
    wall, before = time.perf_counter(), os.times()
    job()
    after = os.times()
    return Seconds(time.perf_counter() - wall, sum(after[:4]) - sum(before[:4]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2048, help="and as many captions")
    parser.add_argument("--photo", type=int, nargs=2, default=(240, 180), metavar=("W", "H"))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with backbone("clip:demo") as model, tempfile.TemporaryDirectory() as folder:
        measure(model, Path(folder), args)


def measure(model: Any, folder: Path, args: argparse.Namespace) -> None:
    sys.modules["clip"] = stand_in_clip(model)
    peer: Any = importlib.import_module("clip_retrieval.clip_inference")
    peer = sys.modules["clip_retrieval.clip_inference"]
    importlib.import_module(
        "sentence_transformers"
    )  # it does so at every call; the first takes seconds
    source = folder / "files"
    source.mkdir()
    write_files(source, args.images, tuple(args.photo))
    ours = dataset(source)
    size = args.batch_size
    pixels = torch.stack([model.preprocess(r.open()) for r in ours.images[:size]])
    ids = model.tokenize([t.text for t in ours.texts[:size]])
    files: dict[str, int] = {}

    def forward() -> None:
        with torch.inference_mode():
            for _ in range(args.images // size):
                model.model.encode_image(pixels)
                model.model.encode_text(ids)

    def headstart() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            options: dict[str, Any] = {"batch_size": size, "workers": args.workers}
            streams = ["image/pooled", "text/pooled"]
            path = Path(out, "c.zarr")
            cache = build(
                ours, model, path, streams=streams, storage="fp32", progress=False, **options
            )
            assert cache.n_rows("image") == args.images
            files["headstart"] = count(path)

    def clip_retrieval() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            silent = io.StringIO()
            with contextlib.redirect_stderr(silent), contextlib.redirect_stdout(silent):
                peer.clip_inference(
                    str(source),
                    f"{out}/new",  # its writer makes the folder
                    batch_size=size,
                    num_prepro_workers=args.workers,
                    use_jit=False,
                )
            (written,) = Path(out, "new", "img_emb").iterdir()
            assert len(np.load(written)) == args.images
            files["clip-retrieval"] = count(Path(out))

    jobs = {"forward": forward, "headstart": headstart, "clip-retrieval": clip_retrieval}
    found: dict[str, list[Seconds]] = {name: [] for name in jobs}
    for name in jobs:
        seconds(jobs[name])
    for i in range(args.rounds):
        names = list(jobs)
        for name in names[i % 3 :] + names[: i % 3]:
            found[name].append(seconds(jobs[name]))
    print(
        f"clip:demo, {args.images} files of {args.photo[0]} × {args.photo[1]} with a caption each, batches of {size}, "
        f"{args.workers} workers, {args.threads} torch threads, {args.rounds} rounds, median (range); "
        f"/proc/pressure/cpu: {pressure()}\n"
    )
    heads = ["", "images/s", "images/CPU s", "wall: clip-retrieval / this"]
    heads += ["CPU: clip-retrieval / this", "files written"]
    rows = []
    for name, runs in found.items():
        row = [name]
        row += [spread([args.images / getattr(s, c) for s in runs], 0) for c in ("wall", "cpu")]
        for clock in ("wall", "cpu"):
            theirs = [getattr(s, clock) for s in found["clip-retrieval"]]
            row.append(spread(ratios(theirs, [getattr(s, clock) for s in runs])))
        rows.append([*row, str(files.get(name, ""))])
    table(heads, rows)


def count(folder: Path) -> int:
    return sum(file.is_file() for file in folder.rglob("*"))


if __name__ == "__main__":
    main()
