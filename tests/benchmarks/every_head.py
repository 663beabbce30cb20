"""Every head that trains: its size, an epoch from the cache beside the same epoch through the live backbone, and what
reduced precision and compiling do to its step on this machine.

    python tests/benchmarks/every_head.py                                      about five minutes on one core
    python tests/benchmarks/every_head.py --pictures 512 --rounds 5 --compiled tf_local simfp trident

cache, live  as in epoch.py: the same batches, head, steps and optimiser; live, every picture of a batch, partners too,
             is decoded, preprocessed and encoded anew. Candidate texts do not change, so both sides read them once. The
             losses of a first batch, without dropout, must agree.
waits        share of the epoch from the cache that goes into waiting for batches
bf16, compiled  loss and gradients of one cached batch under bf16 autocast, or with `torch.compile` around the loss,
             divided by those in fp32 as they stand: below 1 it pays

Data are czsl pictures of toy_world as JPEG files in memory, with the prompts of their pairs. One torch thread.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from epoch import SAME, SCORER, Live, trainer
from measure import Seconds, backbone, in_turn, pressure, ratios, spread, table

from cache_builder import FeatureCache, build, load_backbone, load_dataset
from cache_builder.datasets.base import Dataset, ImageRecord, Tasks
from cache_builder.images import decode
from heads import Head, load_method
from heads.base import Context
from heads.live import LiveBackbone
from heads.loader import Loader
from heads.source import Source, context_of
from heads.tasks import load_task


@dataclass(frozen=True)
class Case:
    """A head under a backbone."""

    method: str
    backbone: str
    config: dict[str, Any]


CASES = {
    "linear_probe": Case("linear_probe", "clip:demo", {}),
    "tf_local": Case("tf_local", "clip:demo", {**SCORER, "layers": 2}),
    "late_maxsim": Case("tf_local", "clip:demo", {**SCORER, "variant": "late_maxsim", "layers": 4}),
    "tf_global": Case("tf_local", "clip:demo", {**SCORER, "variant": "global", "layers": 2}),
    "csp": Case("csp", "clip:demo", {}),
    "simfp": Case("simfp", "clip:demo", {}),
    "branch_blocks": Case("branch_blocks", "clip:demo", {}),
    "trident": Case("trident", "llava:demo", {"n_local": 4, "n_global": 2}),
}
"""The methods under the demo's configurations; zero_shot and sgi train nothing."""

BIG = {"late_maxsim": CASES["late_maxsim"], "tf_global": CASES["tf_global"]}
"""Heads measured on a ViT-B/32 too."""

W, V, D, A, O = 1024, 768, 768, 115, 245
"""ViT-L/14 and MIT-States: image and text widths, joint dimension, attrs, objs."""


def pictures(n: int, size: tuple[int, int]) -> Dataset:
    """The first n czsl training pictures of toy_world as JPEG files, and the prompts of their pairs alone."""
    whole = load_dataset("toy_world", scale=max(0.05, n / 2000))
    task = whole.tasks.czsl
    assert task is not None
    examples = [e for e in task.examples if e.split == "train"][:n]
    if len(examples) < n:
        raise SystemExit(f"toy_world of this size has {len(examples)} pictures, not {n}")
    pairs = tuple(sorted({(e.attr, e.obj) for e in examples}))
    prompts = {pair: task.prompts[pair] for pair in pairs}
    names = {e.image for e in examples}

    def filed(record: ImageRecord) -> ImageRecord:
        file = io.BytesIO()
        record.open().resize(size).save(file, "JPEG", quality=90)
        return ImageRecord(record.id, lambda: decode(file.getvalue()))

    czsl = replace(task, examples=tuple(examples), pairs={"train": pairs}, prompts=prompts)
    return replace(
        whole,
        images=tuple(filed(r) for r in whole.images if r.id in names),
        texts=tuple(t for t in whole.texts if t.id in set(prompts.values())),
        tasks=Tasks(czsl=czsl),
    )


def n_at_published_size(case: Case) -> int:
    """Trained numbers of the method's default on MIT-States and ViT-L/14; trident: LLaVA-1.5-7B, no auxiliary words."""
    module = load_method(case.method)
    keep = {k: case.config[k] for k in ("variant",) if k in case.config}
    config = module.Config(**keep)
    shapes = {"image/pooled": (D,), "text/pooled": (D,), "text/tokens": (77, V)}
    shapes |= {"image/prefix": (1, W), "image/patches": (256, W)}
    norms = {
        f"{s}/norm.{p}": (n,) for s, n in (("image", W), ("text", V)) for p in ("weight", "bias")
    }
    sizes = {**norms, "image/eps": (), "text/eps": (), "image/proj": (W, D), "text/proj": (V, D)}
    tables: dict[str, torch.Tensor] = {}
    if case.method == "trident":
        shapes["image/patches"], model = (576, W), 4096
        projector = {"image/projector.fc1": (model, W), "image/projector.fc2": (model, model)}
        sizes = {f"{k}.weight": v for k, v in projector.items()}
        sizes |= {f"{k}.bias": v[:1] for k, v in projector.items()}
        sizes |= {"text/norm.weight": (model,), "text/eps": ()}
        tables["words"] = torch.zeros(A + O, model)
        tables["auxiliary"] = torch.zeros(1, 5, dtype=torch.long)
    readout = {k: torch.zeros(v) for k, v in sizes.items()} | {"logit_scale": torch.zeros(())}
    small: Any = load_backbone("clip:demo")
    dims = {**small.spec.dims, "image_width": W, "text_width": V, "joint": D}
    spec = small.spec.model_copy(update={"dims": dims})
    context = Context(
        shapes, readout, tuple(f"a{i}" for i in range(A)), tuple(f"o{i}" for i in range(O)), tables,
        spec, "clip:demo",
    )  # fmt: skip
    wide = copy(small)
    wide.embed_tokens = lambda ids: torch.zeros(*ids.shape, V)
    with patch.object(LiveBackbone, "on", lambda self, device: wide):
        head: Head = module.Head(config, context)
    return head.n_trained()


class Run:
    """One head on one cache, fed from the cache or live."""

    def __init__(
        self,
        case: Case,
        cache: FeatureCache,
        batch_size: int,
        live: Callable[[Source], Live] | None,
    ) -> None:
        module, data = load_method(case.method), load_task(cache, "czsl", "train")
        config = module.Config(**case.config)
        torch.manual_seed(0)
        self.head: Head = module.Head(config, module.Head.prepare(config, context_of(cache), cache))
        self.batches = Loader(data, self.head.needs(config), batch_size=batch_size, seed=0)
        if live is not None:
            self.batches.source = live(self.batches.source)
        closed = module.Head.training_kind == "closed_form"
        self.epoch = self._solve if closed else trainer(self.head, self.batches)
        self.closed = closed

    def _solve(self) -> None:
        self.head.solve(self.batches.all(), 0)

    def first_loss(self) -> float:
        """Of the first batch, without dropout; of a closed form, the mean of the features it would see."""
        if self.closed:
            return float(self.batches.all().queries["image/pooled"].mean())
        self.head.eval()
        torch.manual_seed(1)
        with torch.no_grad():
            return float(self.head.loss(next(self.batches.epoch(0)))[0])


def compare(
    cases: dict[str, Case], name: str, n: int, photo: tuple[int, int], args: argparse.Namespace
) -> tuple[list[list[str]], dict[str, dict[str, Run]], ExitStack]:
    """Rows of the first table for the cases of one backbone, and the runs."""
    stack, dataset = ExitStack(), pictures(n, photo)
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    model = stack.enter_context(backbone(name))
    cache = build(dataset, model, Path(folder, "c.zarr"), progress=False)
    maker = partial(Live, dataset=dataset, model=model)
    runs = {
        label: {
            side: Run(case, cache, min(n, args.batch_size), maker if side == "live" else None)
            for side in ("cache", "live")
        }
        for label, case in cases.items()
    }
    jobs: dict[str, Callable[[], object]] = {}
    for label, both in runs.items():
        cached, live = (both[side].first_loss() for side in ("cache", "live"))
        if not abs(live - cached) <= SAME * abs(cached) + 1e-3:
            raise SystemExit(
                f"{label}: the loss is {cached:.4f} from the cache, but {live:.4f} live"
            )
        both["cache"].epoch()  # warm; live, the first loss has been that
        both["cache"].batches.waited = 0.0
        jobs |= {f"{label} {side}": run.epoch for side, run in both.items()}
    times = in_turn(jobs, args.rounds)
    rows = [row(label, cases[label], name, n, runs[label], times) for label in cases]
    return rows, runs, stack


def row(
    label: str, case: Case, name: str, n: int, both: dict[str, Run], times: dict[str, list[Seconds]]
) -> list[str]:
    """Of the first table."""
    cached, live = (times[f"{label} {side}"] for side in ("cache", "live"))
    wall = sum(s.wall for s in cached)
    return [
        f"{label}, {name}",
        f"{n_at_published_size(case):,}",
        f"{both['cache'].head.n_trained():,}",
        f"{n}",
        spread([s.wall for s in cached], 3),
        spread([s.wall for s in live]),
        spread(ratios([s.wall for s in live], [s.wall for s in cached]), 1),
        "–" if both["cache"].closed else f"{100 * both['cache'].batches.waited / wall:.1f} %",
    ]


def step(head: Head, loss: Callable[[Any], Any], batch: Any, bf16: bool) -> Callable[[], None]:
    """Loss and gradients of one batch."""

    def once() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value, _ = loss(batch)
        head.zero_grad(set_to_none=True)
        value.backward()

    return once


def precision(runs: dict[str, dict[str, Run]], args: argparse.Namespace) -> Iterator[list[str]]:
    """Rows of the second table."""
    for label, both in runs.items():
        run = both["cache"]
        if run.closed:
            continue
        head, batch = run.head.train(), next(run.batches.epoch(0))
        jobs: dict[str, Callable[[], object]] = {
            "fp32": step(head, head.loss, batch, False),
            "bf16": step(head, head.loss, batch, True),
        }
        compiling = "–"
        if label in args.compiled:
            jobs["compiled"] = step(head, torch.compile(head.loss), batch, False)
            started = time.perf_counter()
            jobs["compiled"]()
            compiling = f"{time.perf_counter() - started:.0f}"
        for job in jobs.values():
            job()
        times = {k: [s.wall for s in v] for k, v in in_turn(jobs, max(args.rounds, 5)).items()}
        yield [
            label,
            f"{1e3 * statistics.median(times['fp32']):.1f}",
            spread(ratios(times["bf16"], times["fp32"])),
            spread(ratios(times["compiled"], times["fp32"])) if "compiled" in times else "–",
            compiling,
        ]


@contextmanager
def closing(stacks: list[ExitStack]) -> Generator[None]:
    try:
        yield
    finally:
        for stack in stacks:
            stack.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--big-pictures", type=int, default=16, help="through the ViT-B/32")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--compiled", nargs="*", default=["tf_global"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, runs, stacks = [], {}, []
    with closing(stacks):
        for name in ("clip:demo", "llava:demo"):
            cases = {k: CASES[k] for k in args.only if CASES[k].backbone == name}
            if cases:
                more, found, stack = compare(cases, name, args.pictures, (56, 56), args)
                rows, runs = rows + more, runs | found
                stacks.append(stack)
        if args.big_pictures:
            big = {k: v for k, v in BIG.items() if k in args.only}
            more, _, stack = compare(big, "random:ViT-B-32", args.big_pictures, (500, 375), args)
            rows += more
            stacks.append(stack)
        print(
            f"one torch thread, batches of {args.batch_size}, {args.rounds} rounds, median (range); "
            f"/proc/pressure/cpu: {pressure()}\n"
        )
        table(
            ["head", "trained, L/14, MIT-States", "trained here", "pictures", "cache, s an epoch",
             "live, s", "live / cache", "waits"],
            rows,
        )  # fmt: skip
        print()
        table(
            ["head", "fp32 step, ms", "bf16 / fp32", "compiled / fp32", "compiling, s"],
            list(precision(runs, args)),
        )


if __name__ == "__main__":
    main()
