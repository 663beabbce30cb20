"""Training inside the encoder: what a cut, a pixel store, experts as two products and recomputation gain.

    python tests/benchmarks/encoder.py                               the bundled CLIP: a minute, to see that all works
    python tests/benchmarks/encoder.py --scale b32 --threads 2       ViT-B/32's architecture on two cores: minutes
    python tests/benchmarks/encoder.py --scale l14 --device cuda     ViT-L/14, MIT-States' pairs, C-GQA's prompts

epochs   an epoch of eva on stored pixels, of eva on JPEG files, of eva's last k blocks on stored states (`head.cut`),
         and of csp and tf_local on pooled vectors. Pictures are JPEG files in memory, of soft noise, their labels pairs
         of invented names. From files, pictures are decoded and resized by `--workers` threads, a batch ahead of the
         step. The losses of a first batch must agree: files with pixels, and a cut with pixels.
experts  tokens a second through `MoELoRA` (encoder_experts.py)
memory   peak memory of a text batch of C-GQA's size, in parts and at once (encoder_memory.py)

Architectures are the true ones with random weights. `gain` is how many times faster, or smaller, a row is than the
first of its part, by the clock and in CPU seconds: round by round, all jobs of a part in turn, median (range).
"""

import argparse
import gc
import io
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import encoder_experts
import encoder_memory
import numpy as np
import torch
from epoch import SAME, SCORER
from measure import in_turn, placed, pressure, ratios, spread, table
from PIL import Image
from torch import Tensor

from cache_builder import FeatureCache, build, load_backbone
from cache_builder.datasets.base import (
    CompositionExample,
    CompositionTask,
    Dataset,
    ImageRecord,
    Tasks,
    TextRecord,
)
from cache_builder.images import decode
from heads import Head, load_method
from heads.features import Batch, Features
from heads.learner import seed_everything
from heads.loader import Loader
from heads.source import Source, context_of
from heads.tasks import load_task

PARTS = ("epochs", "experts", "memory")

CGQA = 5592
"""Train pairs of C-GQA."""


@dataclass(frozen=True)
class Scale:
    """How large everything is; each may be given as an option.

    Attributes:
        backbone: of the epochs, as measure.py names them.
        pictures, batch_size: of an epoch, and of a step.
        attrs, objs, pairs: names, and the train pairs among them.
        photo: width and height of the pictures' files.
        tokens: through the experts.
        prompts: of the memory's text batch; `largest` of them may be run, more are extrapolated.
    """

    backbone: str
    pictures: int
    batch_size: int
    attrs: int
    objs: int
    pairs: int
    photo: tuple[int, int]
    tokens: int
    prompts: int
    largest: int


SCALES = {
    "tiny": Scale("clip:demo", 32, 16, 4, 3, 9, (56, 56), 2048, 512, 512),
    "b32": Scale("random:ViT-B-32", 32, 16, 8, 8, 24, (500, 375), 8192, CGQA, 1536),
    "l14": Scale("random:ViT-L-14", 512, 64, 115, 245, 1262, (500, 375), 65536, CGQA, CGQA),
}


def labelled(scale: Scale) -> Dataset:
    """Pictures of soft noise as JPEG files in memory, each of a train pair of invented names."""
    random = np.random.default_rng(0)
    chosen = random.permutation(scale.attrs * scale.objs)[: scale.pairs]
    pairs = tuple((f"attr{p % scale.attrs}", f"obj{p // scale.attrs}") for p in chosen)

    def photo(i: int) -> ImageRecord:
        coarse = Image.fromarray(random.integers(0, 255, (24, 32, 3), np.uint8))
        file = io.BytesIO()
        coarse.resize(scale.photo, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        return ImageRecord(f"i{i}", lambda: decode(file.getvalue()))

    images = tuple(photo(i) for i in range(scale.pictures))
    prompts = {pair: f"t{i}" for i, pair in enumerate(pairs)}
    task = CompositionTask(
        tuple(
            CompositionExample(image.id, *pairs[i % len(pairs)], "train")
            for i, image in enumerate(images)
        ),
        {"train": pairs},
        prompts,
    )
    texts = tuple(TextRecord(prompts[pair], f"a photo of {' '.join(pair)}") for pair in pairs)
    return Dataset("labelled", images, texts, Tasks(czsl=task), "JPEG files in memory")


class Files(Source):
    """A source of pixels that decodes and resizes the files of what is asked for, each time."""

    def __init__(
        self, source: Source, dataset: Dataset, model: Any, pool: ThreadPoolExecutor
    ) -> None:
        self.queries, self.candidates = source.queries, source.candidates
        self.cache, self.device, self.take = source.cache, source.device, source.take
        self.records = {record.id: record for record in dataset.images}
        self.model, self.pool = model, pool

    def images(
        self,
        rows: np.ndarray,
        given: Mapping[str, Tensor] | None = None,
        texts: np.ndarray | None = None,
    ) -> Features:
        del given, texts
        records = [self.records[self.cache.image_ids[row]] for row in rows]
        pixels = self.pool.map(lambda record: self.model.preprocess(record.open()), records)
        levels = self.model.levels(torch.stack(list(pixels)))
        return Features({"image/pixels": levels.to(self.device)})


def ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same, each made by a thread while the one before is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


class Training:
    """A head, its batches and its optimiser."""

    def __init__(
        self, method: str, config: dict[str, Any], cache: FeatureCache, args: argparse.Namespace
    ) -> None:
        module, data = load_method(method), load_task(cache, "czsl", "train")
        chosen = module.Config(**config)
        seed_everything(0)
        context = module.Head.prepare(chosen, context_of(cache), cache)
        self.head: Head = module.Head(chosen, context).to(args.device)
        self.batches = Loader(
            data,
            self.head.needs(chosen),
            batch_size=args.scale.batch_size,
            seed=0,
            device=args.device,
        )
        self.from_files, self.device, self.bf16 = False, torch.device(args.device), args.bf16
        trained = [p for p in self.head.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def decoding(self, dataset: Dataset, model: Any, pool: ThreadPoolExecutor) -> "Training":
        """The same from files."""
        self.batches.source = Files(self.batches.source, dataset, model, pool)
        self.from_files = True
        return self

    def first_loss(self) -> float:
        """Of the first batch, without dropout, in float32."""
        self.head.eval()
        with torch.no_grad():
            return float(self.head.loss(next(self.batches.epoch(0)))[0])

    def step(self, batch: Batch) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss, _ = self.head.loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def warm(self) -> None:
        self.head.train()
        self.step(next(self.batches.epoch(0)))

    def epoch(self) -> None:
        self.head.train()
        batches = self.batches.epoch(0)
        for batch in ahead(batches) if self.from_files else batches:
            self.step(batch)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def cuts(depth: int) -> list[int]:
    """All blocks, half of them, a quarter, and one."""
    return sorted({depth, depth // 2, math.ceil(depth / 4), 1}, reverse=True)


def epochs(args: argparse.Namespace) -> Iterator[list[str]]:
    """Rows of the table."""
    scale: Scale = args.scale
    dataset = labelled(scale)
    with ExitStack() as held:
        folder = held.enter_context(tempfile.TemporaryDirectory())
        pool = held.enter_context(ThreadPoolExecutor(args.workers))
        name = held.enter_context(placed(scale.backbone))
        model: Any = load_backbone(name, device=args.device)
        depth = model.depth["image"]
        streams = [f"image/block_{depth - k}" for k in cuts(depth)]
        streams += ["image/pooled", "image/pixels", "text/pooled"]
        options = {"streams": streams, "progress": False, "backbone_name": name}
        cache = build(dataset, model, Path(folder, "c.zarr"), **options)
        chunks = {"image_chunk": scale.batch_size}
        runs = {
            "eva, pixels": Training("eva", chunks, cache, args),
            "eva, JPEG files": Training("eva", chunks, cache, args).decoding(dataset, model, pool),
        }
        for k in cuts(depth):
            which = f"eva, cut {k}" if k < depth else f"eva, cut {k}, all blocks"
            runs[which] = Training("eva", {**chunks, "cut": k}, cache, args)
        losses = {name: run.first_loss() for name, run in runs.items()}
        for name, loss in losses.items():
            allowed = SAME if "cut" in name else 1e-4
            if not abs(loss - losses["eva, pixels"]) <= allowed * losses["eva, pixels"]:
                raise SystemExit(f"the first loss of {name} is {loss:.4f}, others: {losses}")
        runs["csp, pooled"] = Training("csp", {}, cache, args)
        scorer = {**SCORER, "variant": "global", "layers": 2}
        runs["tf_local, global, pooled"] = Training("tf_local", scorer, cache, args)
        for run in runs.values():
            run.warm()
        found = in_turn({name: run.epoch for name, run in runs.items()}, args.rounds)
        steps = len(runs["eva, pixels"].batches)
        first = found["eva, pixels"]
        for name, times in found.items():
            yield [
                f"{scale.backbone}, an epoch of {steps} steps: {name}",
                spread([s.wall for s in times], 3),
                "s",
                spread(ratios([s.wall for s in first], [s.wall for s in times])),
                spread(ratios([s.cpu for s in first], [s.cpu for s in times])),
            ]


def memory(args: argparse.Namespace) -> Iterator[list[str]]:
    """Rows of the table; what the other parts held is let go first."""
    gc.collect()
    torch.cuda.empty_cache()
    how = {"device": args.device, "bf16": args.bf16, "threads": args.threads}
    with tempfile.TemporaryDirectory() as folder:
        small = args.scale.backbone == SCALES["tiny"].backbone
        if not small:
            encoder_memory.write_text_tower(Path(folder))
        name = args.scale.backbone if small else f"clip:{folder}"
        n, largest = args.scale.prompts, args.scale.largest
        chunks = (128, 32) if small else (512, 128)
        yield from encoder_memory.rows(name, n, chunks, largest, **how)


def experts(args: argparse.Namespace) -> Iterator[list[str]]:
    """Rows of the table, of ViT-L/14's image and text widths."""
    for width in (1024, 768):
        yield from encoder_experts.rows(
            width, args.scale.tokens, args.device, args.bf16, args.rounds
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scale", choices=SCALES, default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: bf16 on CUDA alone")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--workers", type=int, default=2, help="threads that decode files")
    sizes = [f.name for f in fields(Scale) if f.type is int]
    for name in sizes:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="of the scale, changed")
    args = parser.parse_args()
    given = {name: getattr(args, name) for name in sizes if getattr(args, name) is not None}
    chosen = args.scale
    args.scale = replace(SCALES[chosen], **given)
    cuda = "cuda" in args.device
    args.bf16 = args.precision == "bf16" or (cuda and args.precision is None)
    torch.set_num_threads(args.threads)
    where = (
        torch.cuda.get_device_name(args.device) if cuda else f"CPU, {args.threads} torch threads"
    )
    print(
        f"scale {chosen} on {where}, {'bf16' if args.bf16 else 'fp32'}, torch {torch.__version__}: "
        f"{args.scale.pictures} pictures in batches of {args.scale.batch_size}, {args.scale.pairs} pairs of "
        f"{args.scale.attrs} attrs and {args.scale.objs} objs; {args.scale.tokens:,} tokens; {args.workers} threads "
        f"decode; {args.rounds} rounds, median (range); /proc/pressure/cpu: {pressure()}\n"
    )
    makers: dict[str, Callable[[argparse.Namespace], Iterator[list[str]]]] = {
        "epochs": epochs,
        "experts": experts,
        "memory": memory,
    }
    rows = [row for part in args.parts for row in makers[part](args)]
    if cuda:
        rows = [[*row[:-1], "–"] for row in rows]  # what the GPU does is no CPU time
    print()
    table(["", "measured", "unit", "gain, by the clock", "gain, CPU"], rows)


if __name__ == "__main__":
    main()
