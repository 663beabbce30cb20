"""How near do the loaders come to what memory, kernel and disk allow? On a cache of ViT-B/32's sizes.

    python tests/benchmarks/loader.py
    python tests/benchmarks/loader.py --storage fp32                          nothing to widen
    python tests/benchmarks/loader.py --images 20000 --out /mnt/disk          a larger cache, on the disk in question

memcpy         np.copyto of batches
gather         torch.index_select(out=) of shuffled batches, as stored: the limit of a loader in memory
+ float32      the same, widened into a fresh float32 batch, which is what every head gets: twice the bytes again
in one pass    rows widened one by one into a kept float32 batch: the fastest way known here to make such a batch
chunks         os.preadv of whole chunk files into one kept, page-aligned buffer; the files are in the page cache
RAM            Loader with the patches in memory                target: >= 90 % of gather
block          Loader with a block shuffle from disk            target: >= 80 % of 1 / (1 / chunks + 1 / gather)
chunks, cold   the same read in stored order after fsync and POSIX_FADV_DONTNEED
block, cold    the same epoch, evicted likewise                 target: >= 90 % of chunks, cold, by the clock

Rates count stored bytes once. The loaders' batches hold float32; so each has three limits: as stored (the target's own
words; out of reach where half precision must be widened, as `in one pass` shows), with the two passes of + float32,
and in one pass. With --storage fp32 the three are one. Last, training: the share of an epoch's time that the step waits
for its batch (target: <= 5 %); on a CPU nothing of gathering is hidden.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Seconds, in_turn, pressure, ratios, spread, table
from random_cache import evict, make_cache

from cache_builder import FeatureCache
from cache_builder.reader import ChunkReader, aligned_empty
from heads import fit, load_method
from heads.base import Needs
from heads.learner import seed_everything
from heads.loader import Loader
from heads.source import context_of
from heads.tasks import load_task
from heads.train_config import TrainConfig

NEEDS = Needs(frozenset({"image/patches"}), frozenset({"text/pooled"}))
SCORER = {"dim": 64, "heads": 4, "ffn": 128, "n_sampled": 2}
HEADS: dict[str, dict[str, Any]] = {
    "tf_local": {**SCORER, "layers": 2},
    "late_maxsim": {**SCORER, "variant": "late_maxsim", "layers": 4},
}
Jobs = dict[str, Callable[[], object]]


def limits(cache: FeatureCache, batch: int) -> Jobs:
    """What copying, gathering and reading cost by themselves."""
    reader = ChunkReader(cache, "image/patches")
    chunk = aligned_empty((reader.chunk_rows, *reader.row_shape), reader.dtype)
    source = torch.from_numpy(cache.read("image/patches"))
    out = torch.empty((batch, *source.shape[1:]), dtype=source.dtype)
    kept = torch.empty(out.shape)
    order = torch.randperm(len(source))

    def copies() -> None:
        for start in range(0, len(source), batch):
            part = source[start : start + batch]
            np.copyto(out[: len(part)].numpy(), part.numpy())

    def gathers(*, widen: bool) -> None:
        for start in range(0, len(source), batch):
            index = order[start : start + batch]
            torch.index_select(source, 0, index, out=out[: len(index)])
            if widen:
                out[: len(index)].float()

    def rows() -> None:
        for start in range(0, len(source), batch):
            index = order[start : start + batch]
            for place, row in zip(kept.unbind(0), index.tolist(), strict=False):
                place.copy_(source[row])

    def chunks() -> None:
        for i in range(reader.n_chunks):
            reader.read_chunk(i, chunk)

    return {
        "memcpy": copies,
        "gather": lambda: gathers(widen=False),
        "+ float32": lambda: gathers(widen=True),
        "in one pass": rows,
        "chunks": chunks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=4000, help="75 kB each in fp16, even")
    parser.add_argument("--storage", choices=["fp16", "fp32"], default="fp16")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--pool-mb", type=int, default=200, help="memory of the block shuffle")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cold-rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="of training; 0 for none")
    parser.add_argument("--out", type=Path, help="on the disk in question (default: temporary)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        cache = make_cache(Path(folder, "c.zarr"), args.images, storage=args.storage)
        rates(cache, args)
        if args.steps:
            waits(cache, args)


def loader(cache: FeatureCache, needs: Needs, kind: str, args: argparse.Namespace) -> Loader:
    limit = {"RAM": 1 << 40, "block": args.pool_mb << 20}[kind]
    data = load_task(cache, "two_by_two", "train")
    found = Loader(data, needs, batch_size=args.batch_size, seed=0, ram_limit=limit)
    assert (found.pools is not None) == (kind == "block"), f"{kind}: wrong mode for {limit} bytes"
    return found


def rates(cache: FeatureCache, args: argparse.Namespace) -> None:
    jobs = limits(cache, args.batch_size)
    for kind in ("RAM", "block"):
        batches = loader(cache, NEEDS, kind, args)
        jobs[kind] = lambda batches=batches: sum(1 for _ in batches.epoch(0))
    for job in jobs.values():
        job()
    times = in_turn(jobs, args.rounds)
    times |= cold(cache, {name: jobs[name] for name in ("chunks", "block")}, args.cold_rounds)
    cpu = {name: [s.cpu for s in runs] for name, runs in times.items()}
    wall = {name: [s.wall for s in runs] for name, runs in times.items()}
    size = args.images * cache.layout("image/patches").row_bytes / 1e9

    def plus(*names: str) -> list[float]:
        return [sum(parts) for parts in zip(*(cpu[n] for n in names), strict=True)]

    gathers = ("gather", "+ float32", "in one pass")
    shares = {
        "gather": [ratios(cpu["memcpy"], cpu["gather"])],
        "RAM": [ratios(cpu[g], cpu["RAM"]) for g in gathers],
        "block": [ratios(plus("chunks", g), cpu["block"]) for g in gathers],
        "block, cold": [ratios(wall["chunks, cold"], wall["block, cold"])],
    }
    rows = [
        [
            name,
            spread([size / s for s in wall[name]]),
            spread([size / s for s in cpu[name]]),
            *(spread(share) for share in shares.get(name, ())),
        ]
        for name in times
    ]
    print(
        f"{args.images} images of {cache.shape('image/patches')} {args.storage} ({size:.2f} GB), batches of "
        f"{args.batch_size}, {args.threads} torch threads, {args.rounds} rounds ({args.cold_rounds} cold), median "
        f"(range); /proc/pressure/cpu: {pressure()}\n"
    )
    heads = [
        "",
        "GB per wall s",
        "GB per CPU s",
        "share of limit",
        "limit + float32",
        "in one pass",
    ]
    table(heads, [row + [""] * (len(heads) - len(row)) for row in rows])
    print()


def cold(cache: FeatureCache, jobs: Jobs, rounds: int) -> dict[str, list[Seconds]]:
    """The jobs with their files evicted before each."""
    found: dict[str, list[Seconds]] = {f"{name}, cold": [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            evict(cache)
            found[f"{name}, cold"] += in_turn({name: job}, 1)[name]
    return found


def waits(cache: FeatureCache, args: argparse.Namespace) -> None:
    method = load_method("tf_local")
    rows = []
    for name, fields in HEADS.items():
        config = method.Config(**fields)
        for kind in ("RAM", "block"):
            seed_everything(0)
            head = method.Head(config, context_of(cache))
            batches = loader(cache, head.needs(config), kind, args)
            train = TrainConfig(steps=args.steps, batch_size=args.batch_size, device="cpu")
            result = fit(head, batches, train, progress=False)
            share = [step["data_wait"] * 100 for step in result.history]
            rows.append(
                [
                    name,
                    kind,
                    f"{result.seconds / result.steps * 1e3:,.0f}",
                    spread(share, 1),
                    f"{batches.waited / result.seconds:.1%}",
                ]
            )
    table(["head", "loader", "ms a step", "waiting, % of a step", "of the epoch"], rows)


if __name__ == "__main__":
    main()
