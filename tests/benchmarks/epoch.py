"""One epoch of training from the cache against the same epoch through the live backbone. Target: >= 50 times fewer
seconds for a backbone of ViT-L's size (a smaller backbone is a smaller gain: most of what is left is the head itself).

    python tests/benchmarks/epoch.py                                                      ViT-B-32, random weights
    python tests/benchmarks/epoch.py --backbone clip:demo --items 128 --photo 56 56 --batch-size 32 --rounds 5
    python tests/benchmarks/epoch.py --backbone random:ViT-L-14 --items 8 --batch-size 8

cache      Loader (in memory) → head.loss → backward → AdamW step
live       the same batches, head and steps, but every picture decoded, preprocessed and encoded, every caption encoded

Items are two_by_two ones of toy_world, pictures JPEG files in memory. The live side has no handicap: no gradient in the
backbone, texts cut to the longest of their batch, nothing written. The losses of both are compared first, so that both
really do the same work. `pays after` is the number of epochs at which building and then training from the cache has
taken fewer seconds than training live. One torch thread by default, as waiting OpenMP threads count as CPU seconds.
"""

import argparse
import io
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import backbone, in_turn, pressure, ratios, seconds, spread, table
from torch import Tensor

from cache_builder import FeatureCache, build, load_dataset
from cache_builder.backbones.base import Backbone
from cache_builder.datasets.base import Dataset, ImageRecord, Tasks
from cache_builder.images import decode
from heads import Head, load_method
from heads.features import Features
from heads.learner import seed_everything
from heads.loader import Loader
from heads.source import Source, context_of
from heads.tasks import load_task

SCORER = {"dim": 64, "heads": 4, "ffn": 128, "n_sampled": 2}
HEADS: dict[str, dict[str, Any]] = {
    "tf_local": {**SCORER, "layers": 2},
    "late_maxsim": {**SCORER, "variant": "late_maxsim", "layers": 4},
    "tf_global": {**SCORER, "variant": "global", "layers": 2},
}
"""The demo's configurations of tf_local, from expensive to cheap."""

SAME = 0.02
"""Largest relative difference of the two losses: fp16 in the cache against float32 live."""


def photos(items: int, size: tuple[int, int]) -> Dataset:
    """The first training items of toy_world, their pictures as JPEG files in memory."""
    whole = load_dataset("toy_world", scale=items / 1200)
    examples = [e for e in whole.tasks.two_by_two if e.split == "train"][:items]
    images = {name for e in examples for name in e.images}
    texts = {name for e in examples for name in e.captions}
    return with_files(whole, images, texts, Tasks(two_by_two=tuple(examples)), size)


def with_files(
    whole: Dataset, images: set[str], texts: set[str], tasks: Tasks, size: tuple[int, int]
) -> Dataset:
    """These images and texts alone, pictures as JPEG files in memory."""

    def filed(record: ImageRecord) -> ImageRecord:
        file = io.BytesIO()
        record.open().resize(size).save(file, "JPEG", quality=90)
        return ImageRecord(record.id, lambda: decode(file.getvalue()))

    return replace(
        whole,
        images=tuple(filed(r) for r in whole.images if r.id in images),
        texts=tuple(t for t in whole.texts if t.id in texts),
        tasks=tasks,
    )


class Live(Source):
    """A source that encodes what is asked for, each time."""

    def __init__(self, source: Source, dataset: Dataset, model: Backbone) -> None:
        self.queries, self.candidates = source.queries, source.candidates
        self.cache, self.device, self.model = source.cache, source.device, model
        self.records = {record.id: record for record in dataset.images}

    def images(
        self,
        rows: np.ndarray,
        given: Mapping[str, Tensor] | None = None,
        texts: np.ndarray | None = None,
    ) -> Features:
        names = [self.cache.image_ids[row] for row in rows]
        pixels = torch.stack([self.model.preprocess(self.records[n].open()) for n in names])
        found = self.model.encode_images(pixels)
        return Features({s: found[s.removeprefix("image/")].float() for s in self.queries})

    def texts(self, rows: np.ndarray) -> Features:
        ids = self.model.tokenize([self.cache.texts[row] for row in rows])
        ids = ids[:, : int(self.model.lengths(ids).max())]
        found = self.model.encode_texts(ids)
        out = {s: found[s.removeprefix("text/")].float() for s in self.candidates}
        mask = torch.arange(ids.shape[1], device=self.device) < found["length"][:, None]
        return Features({**out, "text/mask": mask})


def trainer(head: Head, batches: Loader) -> Callable[[], None]:
    """Trains a head by one epoch a call."""
    optimizer = torch.optim.AdamW([p for p in head.parameters() if p.requires_grad], lr=1e-4)

    def epoch() -> None:
        head.train()
        for batch in batches.epoch(0):
            loss, _ = head.loss(batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return epoch


def first_loss(head: Head, batches: Loader) -> float:
    """Loss of the first batch, over the full matrix."""
    head.eval()
    batch = next(batches.epoch(0))
    with torch.no_grad():
        scores = head(batch.queries, batch.candidates)
    return float(torch.nn.functional.cross_entropy(scores, batch.target))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--backbone", default="random:ViT-B-32", help="%(default)s, or any name")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--items", type=int, default=16, help="of two pictures and captions each")
    parser.add_argument("--photo", type=int, nargs=2, default=(500, 375), metavar=("W", "H"))
    parser.add_argument("--batch-size", type=int, default=16, help="pictures")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dataset = photos(args.items, tuple(args.photo))
    with (
        tempfile.TemporaryDirectory() as folder,
        backbone(args.backbone, device=args.device) as model,
    ):
        path = Path(folder, "c.zarr")
        building = seconds(lambda: build(dataset, model, path, progress=False)).wall
        measure(FeatureCache.open(path), dataset, model, building, args)


def measure(
    cache: FeatureCache,
    dataset: Dataset,
    model: Backbone,
    building: float,
    args: argparse.Namespace,
) -> None:
    data = load_task(cache, "two_by_two", "train")
    method = load_method("tf_local")
    jobs: dict[str, Callable[[], object]] = {}
    losses: dict[tuple[str, str], float] = {}
    for name, fields in HEADS.items():
        config = method.Config(**fields)
        for side in ("cache", "live"):
            seed_everything(0)
            head: Head = method.Head(config, context_of(cache)).to(args.device)
            batches = Loader(
                data,
                head.needs(config),
                batch_size=args.batch_size,
                seed=0,
                negatives="image_text",
                device=args.device,
            )
            if side == "live":
                batches.source = Live(batches.source, dataset, model)
            jobs[f"{name} {side}"] = trainer(head, batches)
            losses[name, side] = first_loss(head, batches)
        cached, live = losses[name, "cache"], losses[name, "live"]
        if abs(live - cached) > SAME * abs(cached):
            raise SystemExit(
                f"{name}: the loss is {cached:.4f} from the cache, but {live:.4f} live"
            )
    for name in HEADS:
        jobs[f"{name} cache"]()  # warm; live, the first loss has been that
    times = in_turn(jobs, args.rounds)

    print(
        f"{args.backbone} on {args.device}, {args.threads} torch threads: {len(dataset.images)} pictures in batches of "
        f"{args.batch_size}, {args.rounds} rounds, median (range); build {building:.2f} s; "
        f"/proc/pressure/cpu: {pressure()}\n"
    )
    rows = []
    for name in HEADS:
        cached, live = times[f"{name} cache"], times[f"{name} live"]
        saved = statistics.median(b.wall - a.wall for a, b in zip(cached, live, strict=True))
        rows.append(
            [
                name,
                spread([s.wall for s in cached], 3),
                spread([s.wall for s in live]),
                spread(ratios([s.wall for s in live], [s.wall for s in cached]), 1),
                spread(ratios([s.cpu for s in live], [s.cpu for s in cached]), 1),
                f"{building / saved:.1f}",
            ]
        )
    heads = ["head", "cache, s", "live, s", "live / cache, wall", "live / cache, CPU", "pays after"]
    table(heads, rows)


if __name__ == "__main__":
    main()
