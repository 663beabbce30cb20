"""The block shuffle against other readers of the same rows: zarr libraries on the same store, and other formats.

    python tests/benchmarks/readers.py                      needs zarrs, tensorstore, webdataset, litdata, h5py:
    python tests/benchmarks/readers.py --storage fp32       pip install 'headstart[dev,peers]'; nothing to widen

Every job is one shuffled epoch that ends in float32 batches; every row comes once. On the same store, in the same pools
and kept buffers, with the same two threads, only the call that reads a chunk differs:

ours           PoolReader: preadv into the pool                         target: >= 1.4 x the best of the next three
zarr-python    get_basic_selection(out=)
zarrs          the same call through its codec pipeline
tensorstore    read into the pool

Other formats hold the same rows in their own layout and shuffle in their own way, with no worker and with two
that are started before, the better of which counts. Targets: >= 3 x each.

FeatureDataset torch's DataLoader over our own map-style data set, exact global shuffle, for comparison
webdataset     tar files of 64 MB; shard shuffle, and a buffer as large as a pool; raw bytes, no decoder
litdata        optimize() with chunks of 64 MB; StreamingDataset(shuffle=True), StreamingDataLoader
h5py, rows     chunks of one row, exact global shuffle, read_direct row by row into a kept batch
h5py, blocks   chunks of 64 rows; blocks of a pool's length in random order into a kept pool, shuffled within

Files are in the page cache. The clock counts where workers are; their CPU time is not this process's.
"""

import argparse
import os
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import litdata  # pyright: ignore[reportMissingImports]
import numpy as np
import tensorstore
import torch
import webdataset  # pyright: ignore[reportMissingImports]
import zarr
from measure import in_turn, pressure, ratios, spread, table
from random_cache import make_cache
from torch import Tensor
from torch.utils.data import DataLoader
from zarr.core.buffer.cpu import NDBuffer

from cache_builder import FeatureCache
from cache_builder.reader import ChunkReader
from heads.dataset import FeatureDataset
from heads.pools import PoolReader

SHARD = 64 << 20
STREAM = "image/patches"
Jobs = dict[str, Callable[[], object]]


class LibraryReader(ChunkReader):
    """Reads a chunk by a library's call."""

    def __init__(self, cache: FeatureCache, read: Callable[[slice, np.ndarray], object]) -> None:
        super().__init__(cache, STREAM)
        self.read = read

    def read_chunk(self, chunk: int, out: np.ndarray) -> int:
        start, stop = self.layout.bounds(chunk)
        self.read(slice(start, stop), out[: stop - start])
        return stop - start


def libraries(cache: FeatureCache) -> dict[str, ChunkReader]:
    def through_zarr(pipeline: str | None) -> ChunkReader:
        with zarr.config.set({"codec_pipeline.path": pipeline} if pipeline else {}):
            array: Any = zarr.open_array(str(cache.path), path=STREAM, mode="r")

        def read(rows: slice, out: np.ndarray) -> None:
            array.get_basic_selection(rows, out=NDBuffer.from_numpy_array(out))

        return LibraryReader(cache, read)

    place = {"driver": "file", "path": f"{cache.path}/{STREAM}/"}
    store = tensorstore.open({"driver": "zarr3", "kvstore": place}, open=True, read=True).result()

    def through_tensorstore(rows: slice, out: np.ndarray) -> None:
        tensorstore.array(out).write(store[rows]).result()

    return {
        "ours": ChunkReader(cache, STREAM),
        "zarr-python": through_zarr(None),
        "zarrs": through_zarr("zarrs.ZarrsCodecPipeline"),
        "tensorstore": LibraryReader(cache, through_tensorstore),
    }


def pooled(cache: FeatureCache, reader: ChunkReader, args: argparse.Namespace) -> Iterator[Tensor]:
    pools = PoolReader(cache, STREAM, np.arange(args.images), args.pool_mb << 20)
    pools.reader = reader
    while True:
        for read in pools.epoch(args.batch_size, np.random.default_rng(0)):
            yield read.values
        yield torch.empty(0)  # the epoch is over; buffers stay


def epoch_of(batches: Iterator[Tensor]) -> int:
    """Rows of one epoch."""
    rows = 0
    while n := len(next(batches)):
        rows += n
    return rows


def write_webdataset(values: Tensor, folder: Path) -> list[str]:
    folder.mkdir()
    pattern = str(folder / "%06d.tar")
    with webdataset.ShardWriter(pattern, maxsize=SHARD, maxcount=10**6, verbose=0) as sink:
        for i, row in enumerate(values):
            sink.write({"__key__": f"i{i}", "bin": row.numpy().tobytes()})
    return sorted(str(path) for path in folder.glob("*.tar"))


def epoch(batches: Iterable[Tensor]) -> int:
    """Rows of one epoch; every batch ends in float32."""
    return sum(len(batch.float()) for batch in batches)


def webdataset_loader(
    files: list[str], like: np.ndarray, buffer: int, batch: int, workers: int
) -> Iterable[Tensor]:
    data = (
        webdataset.WebDataset(files, shardshuffle=len(files), seed=0, empty_check=False)
        .shuffle(buffer)
        .map(partial(_array, shape=like.shape, dtype=like.dtype))
        .batched(batch, collation_fn=_stacked)
    )
    kept = workers > 0
    return webdataset.WebLoader(data, batch_size=None, num_workers=workers, persistent_workers=kept)


def _array(sample: dict[str, Any], shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    return np.frombuffer(sample["bin"], dtype).reshape(shape)


def _stacked(rows: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(rows))


def write_litdata(values: Tensor, folder: Path) -> None:
    litdata.optimize(
        fn=partial(_row, values=values),
        inputs=list(range(len(values))),
        output_dir=str(folder),
        chunk_bytes=SHARD,
        num_workers=1,
        verbose=False,
    )


def _row(i: int, values: Tensor) -> Tensor:
    return values[i].clone()


def litdata_loader(folder: Path, batch: int, workers: int) -> Iterable[Tensor]:
    data = litdata.StreamingDataset(str(folder), shuffle=True, drop_last=False, seed=0)
    kept = workers > 0
    return litdata.StreamingDataLoader(
        data, batch_size=batch, num_workers=workers, persistent_workers=kept
    )


def dataset_loader(cache: FeatureCache, batch: int, workers: int) -> Iterable[Tensor]:
    data = FeatureDataset(cache, [STREAM])
    loader = DataLoader(
        data,
        batch,
        shuffle=True,
        collate_fn=data.collate,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return _Column(loader)


class _Column:
    """The batches of one stream, as often as asked."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Tensor]:
        return (batch[STREAM] for batch in self.loader)


def write_h5py(values: Tensor, file: Path, rows: int) -> None:
    with h5py.File(file, "w") as out:
        out.create_dataset("x", data=values.numpy(), chunks=(rows, *values.shape[1:]))


def read_h5py_rows(file: Path, batch: int) -> int:
    with h5py.File(file) as found:
        data: Any = found["x"]
        kept = np.empty((batch, *data.shape[1:]), data.dtype)
        order = np.random.default_rng(0).permutation(len(data))
        rows = 0
        for start in range(0, len(order), batch):
            index = order[start : start + batch].tolist()
            for place, row in enumerate(index):
                data.read_direct(kept, np.s_[row], np.s_[place])
            rows += len(torch.from_numpy(kept[: len(index)]).float())
    return rows


def read_h5py_blocks(file: Path, batch: int, pool: int) -> int:
    with h5py.File(file) as found:
        data: Any = found["x"]
        kept = np.empty((pool, *data.shape[1:]), data.dtype)
        source = torch.from_numpy(kept)
        starts = list(range(0, len(data), pool))
        random.Random(0).shuffle(starts)
        rows = 0
        for start in starts:
            n = min(pool, len(data) - start)
            data.read_direct(kept, np.s_[start : start + n], np.s_[:n])
            order = torch.randperm(n)
            for i in range(0, n, batch):
                rows += len(source.index_select(0, order[i : i + batch]).float())
    return rows


def formats(cache: FeatureCache, folder: Path, args: argparse.Namespace) -> Jobs:
    values = torch.from_numpy(cache.read(STREAM))
    row, batch = values[0].numpy(), args.batch_size
    pool = PoolReader(cache, STREAM, np.arange(1), args.pool_mb << 20)
    buffer = pool.pool_chunks * pool.reader.chunk_rows
    files = write_webdataset(values, folder / "webdataset")
    write_litdata(values, folder / "litdata")
    write_h5py(values, folder / "rows.h5", 1)
    write_h5py(values, folder / "blocks.h5", 64)
    jobs: Jobs = {}
    for n in (0, 2):
        jobs[f"FeatureDataset, {n}"] = partial(epoch, dataset_loader(cache, batch, n))
        loader = webdataset_loader(files, row, buffer, batch, n)
        jobs[f"webdataset, {n}"] = partial(epoch, loader)
        jobs[f"litdata, {n}"] = partial(epoch, litdata_loader(folder / "litdata", batch, n))
    jobs["h5py, rows"] = partial(read_h5py_rows, folder / "rows.h5", batch)
    jobs["h5py, blocks"] = partial(read_h5py_blocks, folder / "blocks.h5", batch, buffer)
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=4000, help="75 kB each, even")
    parser.add_argument("--storage", choices=["fp16", "fp32"], default="fp16")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--pool-mb", type=int, default=200, help="memory of the block shuffle")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="on the disk in question (default: temporary)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("DATA_OPTIMIZER_GLOBAL_RANK", "0")
    with tempfile.TemporaryDirectory(dir=args.out) as made:
        folder = Path(made)
        cache = make_cache(folder / "c.zarr", args.images, storage=args.storage)
        jobs: Jobs = {
            name: partial(epoch_of, pooled(cache, reader, args))
            for name, reader in libraries(cache).items()
        }
        jobs |= formats(cache, folder, args)
        for name, job in jobs.items():
            rows = job()
            assert rows == args.images, f"{name} gave {rows} of {args.images} rows"
        report(jobs, args)


def report(jobs: Jobs, args: argparse.Namespace) -> None:
    times = in_turn(jobs, args.rounds)
    wall = {name: [s.wall for s in runs] for name, runs in times.items()}
    cpu = {name: [s.cpu for s in runs] for name, runs in times.items()}
    size = args.images * 49 * 768 * (2 if args.storage == "fp16" else 4) / 1e9
    print(
        f"{args.images} images of 49 x 768 {args.storage} ({size:.2f} GB), batches of {args.batch_size}, "
        f"{args.rounds} rounds, median (range); /proc/pressure/cpu: {pressure()}\n"
    )
    rows = []
    for name in wall:
        row = [name, spread([size / s for s in wall[name]])]
        if not name.endswith(", 2"):
            row.append(spread([size / s for s in cpu[name]]))
        rows.append([*row, *[""] * (3 - len(row))])
    table(["", "GB per wall s", "GB per CPU s"], rows)
    print()

    def against(names: list[str], seconds: dict[str, list[float]]) -> str:
        best = [min(times) for times in zip(*(seconds[n] for n in names), strict=True)]
        return spread(ratios(best, seconds["ours"]))

    libraries = ["zarr-python", "zarrs", "tensorstore"]
    rows = [
        [
            "the best of the three on the same store",
            against(libraries, wall),
            against(libraries, cpu),
        ]
    ]
    for name in ("webdataset", "litdata", "h5py, rows", "h5py, blocks", "FeatureDataset"):
        family = [n for n in wall if n.startswith(name)]
        alone = [n for n in family if not n.endswith(", 2")]
        rows.append([name, against(family, wall), against(alone, cpu)])
    table(["ours, round by round, faster than", "by the clock", "per CPU second"], rows)


if __name__ == "__main__":
    main()
