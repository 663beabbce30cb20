"""What storage modes cost: bytes, whitened cosine, and what heads lose by them, on the bundled backbones.

    python tests/benchmarks/storage.py                                    all of them, whole toy_world
    python tests/benchmarks/storage.py --backbones clip --scale 0.3       a quick look

The pictures are encoded once, as fp32; the other modes are built from that (replay.py), so that they differ in nothing
but the storage. Heads are those of `headstart demo`, trained on each cache under the same seeds; weights are selected
on val, scored on test. A difference is mode minus fp32, paired: both sides share the items and the seeds of every draw,
so its 95 % interval is over items and seeds. `retrained` was trained on the mode's own cache, where other last bits are
enough to send training elsewhere; `as trained` is the head of the fp32 cache, scored on the mode's: the storage alone.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measure import in_turn, pressure, spread, table
from replay import numbered, replayed
from torch import Tensor

from cache_builder import FeatureCache, build, load_backbone, load_dataset
from cache_builder.datasets.base import Dataset
from cache_builder.quantise import dequantised, quantised
from cache_builder.request import cache_spec
from cache_builder.sample import sampled
from cache_builder.storage import MODES, Mode
from eval import bootstrap, score_io
from eval.bootstrap import Interval
from eval.comparison import evaluate
from heads.compare import Entry, compare
from heads.compare_engines import Processes
from heads.demo import entries
from heads.errors import CheckpointMismatch
from heads.runs import score_run

Jobs = dict[str, Callable[[], object]]

PATCHES = "image/patches"
LABELS = ("late_maxsim", "tf_local", "zero_shot", "linear_probe")
METRICS = {"late_maxsim": "group_score", "tf_local": "group_score"}
"""Of those that read patches; the others are asked for labels: auc."""

COMPUTED_BF16 = "lossless of bf16"

UNTRAINED = (COMPUTED_BF16, "lossless")
"""Nothing is trained on these: the one is another backbone, the other holds what fp16 holds, bit for bit."""


def built(name: str, dataset: Dataset, folder: Path) -> dict[str, FeatureCache]:
    """Mode → cache, the exact one first; and lossless of activations that were computed in bfloat16."""
    given: dict[str, Any] = {"batch_size": 256, "progress": False}
    backbone = load_backbone(name)
    exact = build(dataset, backbone, folder / "fp32.zarr", storage="fp32", **given)
    pictures, replay = numbered(dataset, exact), replayed(backbone, exact)
    caches = {"fp32": exact}
    for mode in MODES:
        if mode == "pool2x2" and "patches" not in backbone.spec.dims:
            print(f"{name}: no pool2x2, as pictures keep their shape")
        elif mode != "fp32":
            caches[mode] = build(pictures, replay, folder / f"{mode}.zarr", storage=mode, **given)
    half = load_backbone(name, dtype="bfloat16")
    caches[COMPUTED_BF16] = build(
        dataset, half, folder / "bf16-computed.zarr", storage="lossless", **given
    )
    return caches


def whitened(exact: Tensor, found: Tensor, mean: Tensor, std: Tensor) -> tuple[float, float, float]:
    """Mean cosine as it is, and mean and minimum where every channel has mean 0 and deviation 1."""
    white = F.cosine_similarity((exact - mean) / std, (found - mean) / std, dim=-1)
    return (
        float(F.cosine_similarity(exact, found, dim=-1).mean()),
        float(white.mean()),
        float(white.min()),
    )


def image_bytes(cache: FeatureCache) -> int:
    """Of all streams of images, scales included; without the padding of a last chunk, except what is compressed."""
    files, total = list(cache.chunks.manifest.values()), 0
    for name, layout in cache.header.arrays.items():
        if name.startswith("image/") and name.removesuffix("_scale") in cache.streams:
            packed = sum(e.bytes for e in files if e.array == name)
            total += packed if layout.compressed else layout.row_bytes * layout.shape[0]
    return total


def costs(caches: dict[str, FeatureCache], rounds: int) -> None:
    """Bytes, cosines of all patches, and how fast they are read."""
    n = len(caches["fp32"].image_ids)
    jobs: Jobs = {m: partial(c.stored, PATCHES, np.arange(n)) for m, c in caches.items()}
    decode: Jobs = {m: partial(c.read, PATCHES) for m, c in caches.items()}
    read, decoded = in_turn(jobs, rounds), in_turn(decode, rounds)
    exact = torch.from_numpy(caches["fp32"].read(PATCHES)).flatten(0, 1)
    mean, std = exact.mean(0), exact.std(0)
    rows: list[list[str]] = []
    for mode, cache in caches.items():
        sample = min(cache.header.report.values(), key=lambda r: r.white_min, default=None)
        found = torch.from_numpy(cache.read(PATCHES)).float()
        if mode == "pool2x2":  # every patch beside the mean that stands for it
            found = _spread(found, round((len(exact) / n) ** 0.5))
        measured = whitened(exact, found.flatten(0, 1), mean, std)
        rows.append(
            [
                mode,
                f"{image_bytes(cache) / n / 1024:.2f}",
                "–" if sample is None else f"{sample.white_mean:.5f} / {sample.white_min:.5f}",
                f"{measured[0]:.5f}",
                f"{measured[1]:.5f} / {measured[2]:.5f}",
                *(
                    spread([n / s[mode][i].cpu / 1000 for i in range(rounds)], 0)
                    for s in (read, decoded)
                ),
            ]
        )
    heads = [
        "",
        "KiB an image",
        "sample, whitened mean / min",
        "cosine",
        "all patches, whitened mean / min",
    ]
    table([*heads, "1000 images/s as stored", "as numbers"], rows)


def _spread(pooled: Tensor, side: int) -> Tensor:
    """Windows of 2 × 2 back on the grid of patches."""
    b, m, w = pooled.shape
    half = round(m**0.5)
    grid = pooled.reshape(b, half, half, w).repeat_interleave(2, 1).repeat_interleave(2, 2)
    return grid[:, :side, :side].flatten(1, 2)


def plain_int8(name: str, dataset: Dataset) -> None:
    """Eight bits with a scale per token, with and without bringing channels to one size first."""
    backbone = load_backbone(name)
    sample = sampled(cache_spec(dataset, backbone), dataset, backbone)
    rows: list[list[str]] = []
    for stream, (mean, std) in sample.moments.found().items():
        tokens, numbers = sample.rows[stream], []
        for centre in ((None, None), (mean, std)):
            mode = Mode("int8", scaled=True, centred=centre[0] is not None)
            stored = quantised(tokens, mode, *centre)
            back = dequantised(stored[""], "", stored["_scale"], *centre)
            numbers += [f"{v:.5f}" for v in whitened(tokens, back, mean, std)]
        size = (mean.square() + std.square()).sqrt()
        rows.append([stream, f"{float(size.max() / size.median()):.1f}", *numbers])
    heads = ["cosine", "whitened", "worst"]
    table(["stream", "largest ÷ median channel", *heads, *(f"centred: {h}" for h in heads)], rows)


def tables_of(runs: Sequence[Path], suffix: str = "") -> list[Any]:
    """Score tables of the seeds of one entry."""
    return [score_io.load(next(iter(sorted(run.glob(f"scores-{suffix}*.zarr"))))) for run in runs]


def accuracy(caches: dict[str, FeatureCache], rows: Sequence[Entry], seeds: int, out: Path) -> None:
    """Every entry on every mode, and its difference to fp32."""
    same = np.array_equal(caches["lossless"].read(PATCHES), caches["fp16"].read(PATCHES))
    print(f"lossless holds what fp16 holds: {same}")
    caches = {m: c for m, c in caches.items() if m not in UNTRAINED}
    compare(caches, rows, range(seeds), out, engine=Processes(os.cpu_count() or 1))
    lines: list[list[str]] = []
    for entry in rows:
        metric = METRICS.get(entry.label, "auc")
        exact_runs = sorted((out / "fp32").glob(f"{entry.label}-seed*"))
        exact = tables_of(exact_runs, "test")
        for mode, cache in caches.items():
            mine = tables_of(sorted((out / mode).glob(f"{entry.label}-seed*")), "test")
            retrained = bootstrap.difference(mine, exact)[metric]
            level = bootstrap.intervals(mine)[metric]
            each = ", ".join(f"{100 * evaluate(t)[metric]:.1f}" for t in mine)
            line = [f"{entry.label} {metric}", mode, _percent(level), each]
            if mode == "fp32":
                lines.append([*line, "–", "–", "–"])
                continue
            line.append(_percent(retrained, sign=True))
            try:
                asked = entry.asked[0]
                for run in exact_runs:
                    score_run(run, task=asked.task, world=asked.world, cache=cache)
            except CheckpointMismatch:  # fewer patches than it was trained on
                lines.append([*line, "–", "–"])
                continue
            theirs = tables_of(exact_runs, f"{mode}-")
            as_trained = bootstrap.difference(theirs, exact)[metric]
            lines.append(
                [*line, _percent(as_trained, sign=True), f"{100 * moved(theirs, exact):.2f}"]
            )
        print(f"{entry.label}: {len(exact[0].scores)} test items")
    heads = ["head, metric", "mode", "retrained", "seeds", "retrained − fp32", "as trained − fp32"]
    table([*heads, "its scores move by"], lines)


def moved(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """Standard deviation of what changes in scores, as a share of their own; the mean over seeds."""
    pairs = [(a.scores - b.scores, b.scores) for a, b in zip(ours, theirs, strict=True)]
    return float(np.mean([np.std(change) / np.std(scores) for change, scores in pairs]))


def _percent(value: Interval, *, sign: bool = False) -> str:
    form = "{:+.1f}" if sign else "{:.1f}"
    low, middle, high = (form.format(100 * v) for v in (value.low, value.estimate, value.high))
    return f"{middle} [{low}, {high}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--backbones", nargs="+", default=["clip", "siglip2", "pe", "llava"])
    parser.add_argument("--scale", type=float, default=1.0, help="of toy_world (default: 1)")
    parser.add_argument("--epochs", type=int, default=20, help="of the heads (default: 20)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="of reading (default: 3)")
    parser.add_argument("--heads", nargs="+", default=list(LABELS), choices=LABELS)
    args = parser.parse_args()
    dataset = load_dataset("toy_world", scale=args.scale)
    print(f"{args}; {len(dataset.images):,} images; /proc/pressure/cpu: {pressure()}")
    for name in args.backbones:
        with tempfile.TemporaryDirectory() as folder:
            caches = built(f"{name}:demo", dataset, Path(folder))
            print(f"\n{name}: bytes, cosines, reading\n", flush=True)
            costs(caches, args.rounds)
            print(f"\n{name}: int8 with a scale per token, without and with centred channels\n")
            plain_int8(f"{name}:demo", dataset)
            joint = "image/pooled" in caches["fp32"].streams
            rows = [
                replace(e, asked=e.asked[:1])
                for e in entries(args.epochs, joint=joint)
                if e.label in args.heads
            ]
            print(f"\n{name}: accuracy in percent, test split\n", flush=True)
            accuracy(caches, rows, args.seeds, Path(folder, "runs"))
            print(f"\n/proc/pressure/cpu: {pressure()}", flush=True)


if __name__ == "__main__":
    main()
