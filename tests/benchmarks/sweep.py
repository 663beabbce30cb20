"""Five seeds of a head in one pass over the cache against the same five one after another, in the same process.

    python tests/benchmarks/sweep.py
    python tests/benchmarks/sweep.py --images 20000 --seeds 8

Both sides train with the same fields, in the order of the first seed, without validation, and end in the same weights,
which is compared. In memory the rows are held once either way; a pass saves reading them again for each run, and
gathering and widening each batch again. From disk it saves reading every chunk again in every epoch. What a head's own
arithmetic costs is the same on both sides, so the gain is large where a head is cheap. Processes of their own, as five
calls of `headstart train` are, would also import torch five times; that is left out.
"""

import argparse
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measure import Seconds, in_turn, pressure, ratios, spread, table
from random_cache import make_cache
from safetensors.torch import load_file

from cache_builder import FeatureCache
from heads import loader, source
from heads.run_files import Trained
from heads.runs import train_run
from heads.sweep import train_runs
from heads.wanted import Wanted

SCORER = {"dim": 64, "heads": 4, "ffn": 128, "n_sampled": 2}
HEADS: dict[str, dict[str, Any]] = {
    "tf_local": {**SCORER, "layers": 2},
    "tf_global": {**SCORER, "variant": "global", "layers": 2},
}
"""The demo's, one with patches and one without."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2000, help="75 kB each in fp16, even")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=31, help="of each run; 31 are an epoch")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--pool-mb", type=int, default=40, help="memory, where read from disk")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cache = make_cache(Path(folder, "c.zarr"), args.images, storage="fp16")
        for where, limit in (("memory", 1 << 40), ("disk", args.pool_mb << 20)):
            for name, head in HEADS.items():
                if where == "disk" and name == "tf_global":
                    continue  # pooled embeddings always fit
                with memory(limit):
                    rows.append(
                        [name, where, *measure(cache, head, Path(folder, where, name), args)]
                    )
    print(f"{args.seeds} seeds, {args.images} images, {args.steps} steps · {pressure()}")
    heads = (
        "head",
        "rows in",
        "one after another, CPU s",
        "one pass, CPU s",
        "ratio, CPU",
        "by the clock",
    )
    table(heads, rows)


@contextmanager
def memory(limit: int) -> Generator[None]:
    """As if so many bytes were to be had for rows."""
    with (
        mock.patch.object(source, "quarter_of_free_memory", return_value=limit),
        mock.patch.object(loader, "quarter_of_free_memory", return_value=limit),
    ):
        yield


def measure(
    cache: FeatureCache, head: dict[str, Any], folder: Path, args: argparse.Namespace
) -> list[str]:
    calls = {"alone": 0, "together": 0}

    def wanted(kind: str) -> list[Wanted]:
        calls[kind] += 1
        train = {"steps": args.steps, "batch_size": args.batch_size, "order_seed": 0}
        return [
            Wanted(
                "tf_local",
                folder / f"{kind}{calls[kind]}" / str(seed),
                {"head": head, "train": {**train, "seed": seed}},
            )
            for seed in range(args.seeds)
        ]

    def alone() -> None:
        for run in wanted("alone"):
            train_run(
                cache, run.method, run.out, task="two_by_two", settings=run.settings, progress=False
            )

    def together() -> None:
        found = train_runs(cache, wanted("together"), task="two_by_two", progress=False)
        assert all(isinstance(run, Trained) for run in found)

    took = in_turn({"alone": alone, "together": together}, args.rounds)
    for seed in range(args.seeds):
        one, other = (
            load_file(folder / f"{kind}1" / str(seed) / "model.safetensors")
            for kind in ("alone", "together")
        )
        assert all(torch.equal(one[name], other[name]) for name in one), f"seed {seed} differs"
    return [
        *(spread([s.cpu for s in took[kind]], 1) for kind in ("alone", "together")),
        spread(ratios(_of(took["alone"], "cpu"), _of(took["together"], "cpu"))),
        spread(ratios(_of(took["alone"], "wall"), _of(took["together"], "wall"))),
    ]


def _of(took: list[Seconds], what: str) -> list[float]:
    return [getattr(one, what) for one in took]


if __name__ == "__main__":
    main()
