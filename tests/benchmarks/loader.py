"""How near do the loaders come to what memory and kernel allow? Figures per CPU second, on a cache of ViT-B/32's sizes.

    python tests/benchmarks/loader.py
    python tests/benchmarks/loader.py --images 20000 --out /mnt/disk          a larger cache, on the disk in question

memcpy     np.copyto of batches
gather     torch.index_select(out=) of shuffled batches, as stored (fp16): the limit of a loader in memory
+ float32  the same, widened into a fresh float32 batch, which is what every head gets: twice the bytes again
chunks     os.preadv of whole chunk files into one kept, page-aligned buffer; the files are in the page cache
RAM        Loader with the patches in memory                  target: >= 90 % of gather
block      Loader with a block shuffle of chunks from disk    target: >= 80 % of 1 / (1 / chunks + 1 / gather)

Rates count stored bytes once. The loaders' batches hold float32, so their share is also given of the limit that counts
the widening; without it, only streams stored as float32 could reach the target. The second table is training: the share
of an epoch's time that the step waits for its batch (target: <= 5 %); on a CPU nothing of gathering is hidden.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import in_turn, pressure, ratios, spread, table

from cache_builder import FeatureCache
from cache_builder.cache import Contents
from cache_builder.datasets.base import MatchingExample, Tasks
from cache_builder.reader import ChunkReader, aligned_empty
from cache_builder.spec import BackboneSpec, CacheSpec, DatasetSpec
from heads import fit, load_method
from heads.base import Needs
from heads.loader import Loader
from heads.source import context_of
from heads.tasks import load_task
from heads.train import TrainConfig, seed_everything

PATCHES, WIDTH, TEXT_WIDTH, JOINT, TOKENS = 49, 768, 512, 512, 9
NEEDS = Needs(frozenset({"image/patches"}), frozenset({"text/pooled"}))
SCORER = {"dim": 64, "heads": 4, "ffn": 128, "n_sampled": 2}
HEADS: dict[str, dict[str, Any]] = {
    "tf_local": {**SCORER, "layers": 2},
    "late_maxsim": {**SCORER, "variant": "late_maxsim", "layers": 4},
}


def make_cache(path: Path, n: int) -> FeatureCache:
    """Random embeddings of n images and n captions, without a backbone."""
    random = np.random.default_rng(0)
    images, texts = ([f"{kind}{i}" for i in range(n)] for kind in "it")
    examples = (
        MatchingExample(f"m{i}", tuple(images[i : i + 2]), (texts[i], texts[i + 1]), "any", "train")
        for i in range(0, n, 2)
    )
    width = {"image": WIDTH, "text": TEXT_WIDTH}
    readout: dict[str, Any] = {"logit_scale": np.float32(4.6)}
    for side, w in width.items():
        readout[f"{side}/norm.weight"], readout[f"{side}/norm.bias"] = np.ones(w), np.zeros(w)
        readout[f"{side}/proj"], readout[f"{side}/eps"] = random.normal(size=(w, JOINT)), 1e-5
    arrays: dict[str, Any] = {"image/id": images, "text/id": texts, "text/string": texts}
    arrays["text/ids"] = np.zeros(n * TOKENS, np.int32)
    arrays["text/offsets"] = np.arange(n + 1, dtype=np.int64) * TOKENS
    arrays |= {f"readout/{name}": np.asarray(v, np.float32) for name, v in readout.items()}
    contents = Contents(Tasks(two_by_two=tuple(examples)), arrays)
    dims = {
        "patches": PATCHES,
        "image_width": WIDTH,
        "text_width": TEXT_WIDTH,
        "joint": JOINT,
        "context": TOKENS,
    }
    words = (
        "checkpoint",
        "weights",
        "preprocessing",
        "tokenizer",
        "layer",
        "activation",
        "compute",
    )
    spec = CacheSpec(
        backbone=BackboneSpec(
            family="none", dims=dims, versions={}, **dict.fromkeys(words, "random")
        ),
        dataset=DatasetSpec(name="none", digest="random", decode="none", n_images=n, n_texts=n),
        streams=("image/patches", "image/pooled", "text/pooled", "text/tokens"),
    )
    cache = FeatureCache.create(path, spec, contents)
    for stream, chunk in cache.pending():
        shape = cache.layout(stream).chunk_shape
        values = random.standard_normal(shape, np.float32).astype(np.float16)
        cache.write_chunk(stream, chunk, values)
    cache.seal()
    return FeatureCache.open(path)


def limits(cache: FeatureCache, batch: int) -> dict[str, Callable[[], object]]:
    """What copying, gathering and reading cost by themselves."""
    reader = ChunkReader(cache, "image/patches")
    chunk = aligned_empty((reader.chunk_rows, *reader.row_shape), reader.dtype)
    source = torch.from_numpy(cache.read("image/patches"))
    out = torch.empty((batch, *source.shape[1:]), dtype=source.dtype)
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

    def chunks() -> None:
        for i in range(reader.n_chunks):
            reader.read_chunk(i, chunk)

    return {
        "memcpy": copies,
        "gather": lambda: gathers(widen=False),
        "+ float32": lambda: gathers(widen=True),
        "chunks": chunks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=4000, help="75 kB each, even")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--pool-mb", type=int, default=200, help="memory of the block shuffle")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=12, help="of training")
    parser.add_argument("--out", type=Path, help="on the disk in question (default: temporary)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        cache = make_cache(Path(folder, "c.zarr"), args.images)
        rates(cache, args)
        print()
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
    cpu = {name: [s.cpu for s in runs] for name, runs in times.items()}
    wall = {name: [s.wall for s in runs] for name, runs in times.items()}
    size = args.images * PATCHES * WIDTH * 2 / 1e9

    def plus(*names: str) -> list[float]:
        return [sum(parts) for parts in zip(*(cpu[n] for n in names), strict=True)]

    shares = {
        "gather": (cpu["memcpy"], cpu["memcpy"]),
        "RAM": (cpu["gather"], cpu["+ float32"]),
        "block": (plus("chunks", "gather"), plus("chunks", "+ float32")),
    }
    rows = [
        [
            name,
            spread([size / s for s in wall[name]]),
            spread([size / s for s in cpu[name]]),
            *(spread(ratios(limit, cpu[name])) for limit in shares.get(name, ())),
        ]
        for name in jobs
    ]
    print(
        f"{args.images} images of {PATCHES} x {WIDTH} fp16 ({size:.2f} GB), batches of {args.batch_size}, "
        f"{args.threads} torch threads, {args.rounds} rounds, median (range); /proc/pressure/cpu: {pressure()}\n"
    )
    heads = ["", "GB per wall s", "GB per CPU s", "share of limit", "limit with float32"]
    table(heads, [row + [""] * (len(heads) - len(row)) for row in rows])


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
