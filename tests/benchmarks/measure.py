"""What the benchmarks share: jobs timed in turn, their spread, and backbones that need no download."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

from cache_builder import load_backbone
from cache_builder.backbones.base import Backbone


@dataclass(frozen=True, slots=True)
class Seconds:
    """What one run of a job took.

    Attributes:
        wall: by the clock; depends on how busy the machine is.
        cpu: of this process, all threads together.
    """

    wall: float
    cpu: float


def seconds(job: Callable[[], object]) -> Seconds:
    wall, cpu = time.perf_counter(), time.process_time()
    job()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def in_turn(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[Seconds]]:
    """Every job once a round, each round beginning with another one: noise hits all of them alike."""
    names = list(jobs)
    found: dict[str, list[Seconds]] = {name: [] for name in names}
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(seconds(jobs[name]))
    return found


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`median (smallest – largest)`."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} ({low:,.{digits}f} – {high:,.{digits}f})"


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print markdown: the first column to the left, numbers to the right."""
    widths = [max(3, *map(len, column)) for column in zip(heads, *rows, strict=True)]
    ruler = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    for first, *rest in (heads, ruler, *rows):
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        print(f"| {' | '.join([first.ljust(widths[0]), *cells])} |")


def pressure() -> str:
    """How busy the machine is, in the kernel's words: share of time that something waited for a core."""
    try:
        return Path("/proc/pressure/cpu").read_text().splitlines()[0]
    except OSError:
        return "unknown"


@contextmanager
def backbone(name: str, *, dtype: str = "float32", device: str = "cpu") -> Iterator[Backbone]:
    """A backbone by `family:checkpoint`, or `random:ARCH`: open_clip's architecture of true size, random weights."""
    family, _, arch = name.partition(":")
    if family != "random":
        yield load_backbone(name, dtype=dtype, device=device)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_random(arch, Path(folder))
        yield load_backbone(f"clip:{folder}", dtype=dtype, device=device)


def write_random(arch: str, folder: Path) -> None:
    """An open_clip directory as it is published, with random weights."""
    torch.manual_seed(0)
    model = open_clip.create_model(arch, load_weights=False)
    visual: Any = model.visual
    config = {
        "model_cfg": open_clip.get_model_config(arch),
        "preprocess_cfg": visual.preprocess_cfg,
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
