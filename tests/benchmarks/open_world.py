"""An open world the size of C-GQA's, scored and reduced in blocks, beside the procedure that needs every score.

    python tests/benchmarks/open_world.py                          5,098 images × 278,362 pairs, 512 dimensions
    python tests/benchmarks/open_world.py --images 512 --keep 1    a quick look

product      the inner products alone, in the same blocks: what any evaluation of these scores has to pay
reduced      the same rows, made and reduced as `heads.score` does it, with 50 feasibility levels and the best K kept;
             then the exact curve at all 50 thresholds
relative     a few images by p(pair) + p(attr)·p(obj), as simfp scores: every threshold's kept pairs as a set of their
             own, their softmaxes made anew; without what a head spends on its logits
whole        a table of as many images as fit --limit-gib, every score kept: its exact curve, and the legacy procedure

CPU seconds, one torch thread; what is compared is time an image. Each runs in a process of its own, whose largest
resident memory (getrusage) counts everything, Python and torch too.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from eval import czsl
from eval.composition import CompositionScores
from eval.czsl_summary import Layout, summarise, summarise_levels
from eval.feasibility import grid
from eval.legacy import legacy_curve
from eval.open_world import search_threshold
from heads.base import Context, EmbeddingHead, HeadConfig, Needs, SetHead
from heads.blocks.nested import nested_mixture
from heads.features import Features
from heads.grid import by_levels, by_rows, whole

ATTRS, OBJS, SEEN = 413, 674, 5_592
"""C-GQA."""


class Synthetic(EmbeddingHead):
    """Embeddings made from row numbers: of an image, that of its true pair among noise."""

    score_space = "logit"
    training_kind = "none"

    @classmethod
    def needs(cls, config: Any) -> Needs:
        return Needs(frozenset(), frozenset())

    def embed_queries(self, queries: Features) -> Float[Tensor, "q d"]:
        return queries["x"]

    def embed_candidates(self, candidates: Features) -> Float[Tensor, "c d"]:
        return candidates["x"]


class Mixture(SetHead):
    """Pair logits by inner products, those of words as large as random ones of their number."""

    score_space = "probability"
    training_kind = "none"

    def __init__(self, world: "World") -> None:
        super().__init__(HeadConfig(), Context(shapes={}))
        order = torch.from_numpy(world.layout.order)
        self.attr, self.obj, self.words = order // OBJS, order % OBJS, world.words

    @classmethod
    def needs(cls, config: Any) -> Needs:
        return Needs(frozenset(), frozenset())

    def gather(self, parts: Iterable[Features]) -> Tensor:
        return torch.cat([part["x"] for part in parts])

    def against(self, queries: Features, gathered: Any) -> Float[Tensor, "q c"]:
        return next(self.nested(queries, gathered, [len(gathered)]))

    def nested(
        self, queries: Features, gathered: Any, sizes: Sequence[int]
    ) -> Iterator[Float[Tensor, "q n"]]:
        q = queries["x"]
        attr, obj = (q @ w.T for w in self.words)
        return nested_mixture(10 * (q @ gathered.T), attr, obj, self.attr, self.obj, sizes)


class World:
    """Labels, feasibility and features of a synthetic open world."""

    def __init__(self, images: int, dim: int) -> None:
        rng = np.random.default_rng(0)
        c = ATTRS * OBJS
        self.dim = dim
        self.seen = np.zeros(c, dtype=bool)
        self.seen[rng.choice(c, SEEN, replace=False)] = True
        self.rho = rng.normal(size=c).astype(np.float64)
        plausible = np.flatnonzero(~self.seen & (self.rho > 1))
        half = images // 2
        self.target = np.concatenate(
            [
                rng.choice(np.flatnonzero(self.seen), half),
                rng.choice(plausible, images - half),
            ]
        )
        self.words = [torch.randn(n, dim, generator=seeded(i)) for i, n in ((1, ATTRS), (2, OBJS))]
        self.layout = Layout.of(self.seen, self.rho, grid(self.rho, self.seen))
        self.pairs = np.stack(np.divmod(np.arange(c), OBJS), axis=1)

    def of_pairs(self, columns: np.ndarray) -> Tensor:
        attr, obj = np.divmod(columns, OBJS)
        return (self.words[0][attr] + self.words[1][obj]) / self.dim**0.5

    def candidates(self, part: slice) -> Features:
        return Features({"x": self.of_pairs(self.layout.order[part])})

    def queries(self, part: slice) -> Features:
        mine = self.target[part]
        noise = torch.randn(len(mine), self.dim, generator=seeded(100 + part.start))
        return Features({"x": self.of_pairs(mine) + 0.4 * noise})


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One part, in this process."""
    torch.set_num_threads(1)
    head = Synthetic(HeadConfig(), Context(shapes={}))
    world = World(args.images, args.dim)
    found: dict[str, float] = {}
    given = (head, world.queries, world.candidates, (args.images, ATTRS * OBJS))
    clock = Clock(found)
    with torch.inference_mode():
        if args.part == "whole":
            measure_whole(world, whole(*given, 64), clock)
        elif args.part == "relative":
            mixture = by_levels(Mixture(world), *given[1:], 1024, world.layout.sizes())
            with clock("all"):
                summarise_levels(
                    mixture, world.layout, world.target, world.pairs,
                    split="test", space="probability", keep=args.keep,
                )  # fmt: skip
        elif args.part == "product":
            with clock("all"):
                for _ in by_rows(*given, 1024):
                    pass
        else:
            with clock("all"):
                summary = summarise(
                    by_rows(*given, 1024), world.layout, world.target, world.pairs,
                    split="test", space="logit", arranged=True, keep=args.keep,
                )  # fmt: skip
            with clock("search"):
                search = search_threshold(summary, world.rho)
            found["auc"] = czsl.evaluate(summary.at(search.threshold))["auc"]
    return found | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def measure_whole(world: World, scores: np.ndarray, clock: "Clock") -> None:
    """The exact and the legacy curve of a table of every score, its columns in the layout's order."""
    order = world.layout.order
    target = np.argsort(order)[world.target]
    table = CompositionScores(scores, target, world.pairs, world.seen[order], "test", "logit")
    with clock("exact"):
        czsl.exact_curve(table)
    with clock("legacy"):
        clock.found["biases"] = len(legacy_curve(table).bias)


class Clock:
    """CPU seconds of this process, by name; the wall clock too of what is called `all`."""

    def __init__(self, found: dict[str, float]) -> None:
        self.found = found

    @contextmanager
    def __call__(self, name: str) -> Generator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.found[name] = time.process_time() - cpu
        self.found[f"{name} wall"] = time.perf_counter() - wall


def apart(args: argparse.Namespace, part: str, images: int) -> dict[str, float]:
    """One part, in a process of its own."""
    words = ["--part", part, "--images", images, "--dim", args.dim, "--keep", args.keep]
    command = [sys.executable, __file__, *map(str, words)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=5_098)
    parser.add_argument("--relative", type=int, default=120, help="images of the part relative")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--keep", type=int, default=5)
    parser.add_argument("--limit-gib", type=float, default=2.0)
    parser.add_argument(
        "--part", choices=["product", "reduced", "relative", "whole"], help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.part:
        print(json.dumps(measure(args)))
        return
    c = ATTRS * OBJS
    product, reduced = (apart(args, part, args.images) for part in ("product", "reduced"))
    print(f"{args.images:,} images × {c:,} pairs = {args.images * c / 1e9:.2f} billion scores")
    for name, found in (("product", product), ("reduced", reduced)):
        print(
            f"{name}  {found['all']:.1f} CPU s ({found['all wall']:.1f} s by the clock), "
            f"{args.images * c / found['all'] / 1e6:,.0f} million scores a CPU s, peak {found['peak']:.2f} GiB"
        )
    print(f"reduced ÷ product: {reduced['all'] / product['all']:.2f}")
    print(f"50 thresholds: {reduced['search']:.2f} CPU s; auc at the best {reduced['auc']:.4f}")
    found = apart(args, "relative", args.relative)
    print(
        f"relative {args.relative} images: {found['all'] / args.relative * 1e3:.0f} CPU ms an image for all 51 sets of "
        f"candidates, peak {found['peak']:.2f} GiB"
    )
    fits = largest_slice(args)
    found = apart(args, "whole", fits)
    per_image = (reduced["all"] - product["all"] + reduced["search"]) / args.images
    exact, legacy = found["exact"] / fits, found["legacy"] / fits
    print(
        f"whole    {fits} images, peak {found['peak']:.2f} GiB: exact {exact * 1e3:.2f} CPU ms an image, legacy with "
        f"{found['biases']:.0f} biases {legacy * 1e3:.2f}"
    )
    print(
        f"reduced  {per_image * 1e3:.2f} CPU ms an image beyond the product, all 50 thresholds included; legacy for "
        f"one is {legacy / per_image:.0f} times that"
    )


def largest_slice(args: argparse.Namespace) -> int:
    """Images whose whole table, legacy procedure included, stays below the limit; found by doubling and halving."""
    fits, step = 16, 512
    while step >= 16:
        if apart(args, "whole", fits + step)["peak"] < args.limit_gib:
            fits += step
        step //= 2
    return fits


if __name__ == "__main__":
    main()
