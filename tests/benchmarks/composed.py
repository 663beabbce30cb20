"""Training mota from the cache against the same training with the image tower live: seconds per 1,000 triplets.

    python tests/benchmarks/composed.py                                      ViT-B-32, random weights
    python tests/benchmarks/composed.py --backbone clip:demo --triplets 512 --batch-size 128 --photo 56 56
    python tests/benchmarks/composed.py --backbone random:ViT-L-14 --triplets 16 --batch-size 8

cache      pooled images and target captions are cached; the text tower runs once a step, on the modifications
live       the same batches, head and steps, but every reference decoded, preprocessed and encoded, and every target
           caption encoded; no gradient in the image tower. Base queries, for the entropies, are given to both.
bucketed   a step's texts sorted by length, in parts, each as long as its longest, against all as long as the tower
recompute  activations of the text tower computed again in the backward pass: peak memory and seconds of a step

Texts are those of toy_world's rules, pictures JPEG files in memory. One torch thread. The first losses must agree.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from epoch import SAME, trainer, with_files
from measure import backbone, in_turn, pressure, ratios, spread, table
from torch.nn.functional import pad

from cache_builder import FeatureCache, build, load_dataset
from cache_builder.backbones.base import Backbone
from cache_builder.datasets.base import Dataset, Tasks
from heads import Head, load_method
from heads.base import Context
from heads.blocks.phi import small_weights
from heads.features import Features
from heads.learner import seed_everything
from heads.loader import Loader
from heads.source import Source, context_of
from heads.tasks import load_task

PARTS: dict[str, dict[str, Any]] = {
    "mdm": {"n_prompts": 0},
    "moe_tpt": {"mdm": "none"},
    "both": {},
    "lora_text": {"baseline": "lora_text"},
}


def photos(n: int, size: tuple[int, int]) -> Dataset:
    """Triplets of toy_world by rule, an image each, their pictures as JPEG files in memory."""
    whole = load_dataset("toy_world", scale=max(0.01, n / 1500), triplets="rules")
    chosen = {e.image: e for e in whole.tasks.triplets if e.split == "train"}
    triplets = list(chosen.values())[:n]
    images = {e.image for e in triplets}
    texts = {t for e in triplets for t in (e.reference, e.modification, e.target)}
    return with_files(whole, images, texts, Tasks(triplets=tuple(triplets)), size)


class LiveImages(Source):
    """A source that encodes references and target captions each time; modifications are strings anyway."""

    def __init__(self, source: Source, dataset: Dataset, model: Backbone) -> None:
        self.queries, self.candidates = source.queries, source.candidates
        self.cache, self.device, self.model, self.take = (
            source.cache,
            source.device,
            model,
            source.take,
        )
        self.records = {record.id: record for record in dataset.images}

    def images(
        self, rows: np.ndarray, given: Any = None, texts: np.ndarray | None = None
    ) -> Features:
        names = [self.cache.image_ids[row] for row in rows]
        pixels = torch.stack([self.model.preprocess(self.records[n].open()) for n in names])
        pooled = self.model.encode_images(pixels)["pooled"].float()
        assert texts is not None
        said, _ = self.take["text/string"](texts)
        return Features({"image/pooled": pooled, "text/string": said})

    def texts(self, rows: np.ndarray) -> Features:
        ids = self.model.tokenize([self.cache.texts[row] for row in rows])
        ids = ids[:, : int(self.model.lengths(ids).max())]
        return Features({"text/pooled": self.model.encode_texts(ids)["pooled"].float()})


def ready(head: Head, batches: Loader) -> Loader:
    """Batches with the base queries beside them, computed once."""
    head.eval()
    with torch.no_grad():
        constant = head.before_training(batches.examples())
    plain = batches.epoch

    def epoch(number: int, start: int = 0) -> Any:
        for batch in plain(number, start):
            assert batch.index is not None
            beside = {name: values[batch.index] for name, values in constant.items()}
            streams = {**batch.queries.streams, **beside}
            yield replace(batch, queries=replace(batch.queries, streams=streams))

    batches.epoch = epoch  # type: ignore[method-assign]
    return batches


def stretch(head: Any) -> None:
    """Let every text of a head be as long as the tower."""
    plain, context = head.texts._laid_out, head.texts.context

    def padded(texts: Any) -> list[Any]:
        rows = plain(texts)
        more = [(0, context - len(row.ids)) for row in rows]
        return [
            replace(row, ids=pad(row.ids, m), slot=pad(row.slot, m))
            for row, m in zip(rows, more, strict=True)
        ]

    head.texts._laid_out = padded


def first_loss(head: Head, batches: Loader) -> float:
    head.eval()
    with torch.no_grad():
        return float(head.loss(next(batches.epoch(0)))[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--backbone", default="random:ViT-B-32", help="%(default)s, or any name")
    parser.add_argument("--triplets", type=int, default=48)
    parser.add_argument("--photo", type=int, nargs=2, default=(500, 375), metavar=("W", "H"))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dataset = photos(args.triplets, tuple(args.photo))
    with (
        tempfile.TemporaryDirectory() as folder,
        backbone(args.backbone) as model,
        patch("heads.live.load_backbone", lambda *_, **__: model),
    ):
        path = Path(folder, "c.zarr")
        streams = ("image/pooled", "text/pooled")
        build(dataset, model, path, streams=streams, progress=False)
        measure(FeatureCache.open(path), dataset, model, args)


def measure(
    cache: FeatureCache, dataset: Dataset, model: Backbone, args: argparse.Namespace
) -> None:
    data, method = load_task(cache, "triplets", "train"), load_method("mota")
    found = context_of(cache)
    jobs: dict[str, Callable[[], object]] = {}
    losses: dict[tuple[str, str], float] = {}

    def made(config: Any, context: Context, live: bool) -> tuple[Head, Loader]:
        seed_everything(0)
        head: Head = method.Head(config, context)
        needs = head.training_needs(config)
        batches = Loader(data, needs, batch_size=args.batch_size, seed=0)
        if live:
            batches.source = LiveImages(batches.source, dataset, model)
        return head, ready(head, batches)

    seed_everything(0)
    context = small_weights(found, "pic2word")
    for part, fields in PARTS.items():
        for side in ("cache", "live"):
            head, batches = made(method.Config(**fields), context, side == "live")
            jobs[f"{part} {side}"] = trainer(head, batches)
            losses[part, side] = first_loss(head, batches)
        cached, live = losses[part, "cache"], losses[part, "live"]
        if abs(live - cached) > SAME * abs(cached):
            raise SystemExit(
                f"{part}: the loss is {cached:.4f} from the cache, but {live:.4f} live"
            )
    head, batches = made(method.Config(), context, live=False)
    stretch(head)
    jobs["both padded"] = trainer(head, batches)
    head, batches = made(method.Config(recompute=True), context, live=False)
    jobs["both recompute"] = trainer(head, batches)
    for part in PARTS:
        jobs[f"{part} cache"]()  # warm; live, the first loss has been that
    times = in_turn(jobs, args.rounds)

    n = len(data)
    print(
        f"{args.backbone}, one torch thread: {n} triplets in batches of {args.batch_size}, {args.rounds} rounds, "
        f"median (range); seconds per 1,000 triplets; /proc/pressure/cpu: {pressure()}\n"
    )
    rows = []
    for part in PARTS:
        cached, live = (times[f"{part} {side}"] for side in ("cache", "live"))
        rows.append(
            [
                part,
                spread([1000 * s.wall / n for s in cached], 2),
                spread([1000 * s.wall / n for s in live], 2),
                spread(ratios([s.wall for s in live], [s.wall for s in cached]), 2),
                spread(ratios([s.cpu for s in live], [s.cpu for s in cached]), 2),
            ]
        )
    table(["trained", "cache, s", "live, s", "live / cache, wall", "live / cache, CPU"], rows)
    base = [s.cpu for s in times["both cache"]]
    for what in ("padded", "recompute"):
        share = ratios([s.cpu for s in times[f"both {what}"]], base)
        print(
            f"both, {what} / as it is, CPU: {statistics.median(share):.2f} ({min(share):.2f}–{max(share):.2f})"
        )


if __name__ == "__main__":
    main()
