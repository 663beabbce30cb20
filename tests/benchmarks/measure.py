"""What the benchmarks share: jobs timed in turn, their spread, and backbones that need no download."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

from cache_builder import load_backbone
from cache_builder.backbones.base import Backbone
from cache_builder.backbones.tiny_files import gemma_tokenizer


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
def backbone(
    name: str, *, dtype: str = "float32", device: str = "cpu", compiled: bool = False
) -> Generator[Backbone]:
    """A backbone by `family:checkpoint`, or `random:ARCH`: open_clip's architecture of true size, random weights.

    `random:llava` is LLaVA-1.5's vision tower and projector without its language model.
    """
    with placed(name) as where:
        yield load_backbone(where, dtype=dtype, device=device, compiled=compiled)


@contextmanager
def placed(name: str) -> Generator[str]:
    """The name under which a backbone loads: of `random:ARCH`, a folder for as long as the block lasts."""
    family, _, arch = name.partition(":")
    if family != "random":
        yield name
        return
    with tempfile.TemporaryDirectory() as folder:
        if arch == "llava":
            write_random_llava(Path(folder))
            yield f"llava:{folder}@vision"
            return
        write_random(arch, Path(folder))
        family = "siglip2" if "SigLIP" in arch else "pe" if arch.startswith("PE-") else "clip"
        yield f"{family}:{folder}"


def write_random(arch: str, folder: Path) -> None:
    """An open_clip directory as it is published, with random weights; a tokenizer from the hub gives way to bytes."""
    torch.manual_seed(0)
    model = open_clip.create_model(arch, load_weights=False)
    visual: Any = model.visual
    architecture: Any = open_clip.get_model_config(arch)
    if "hf_tokenizer_name" in architecture["text_cfg"]:
        gemma_tokenizer(architecture["text_cfg"]["context_length"]).save_pretrained(folder)
        architecture["text_cfg"]["hf_tokenizer_name"] = "beside this file"
    config = {"model_cfg": architecture, "preprocess_cfg": visual.preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")


def write_random_llava(folder: Path) -> None:
    """LLaVA-1.5's tower and projector with random weights, as far as `llava:…@vision` reads them."""
    from transformers import AutoModel, CLIPImageProcessor, LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    torch.manual_seed(0)
    config = LlavaConfig()
    tower, projector = AutoModel.from_config(config.vision_config), LlavaMultiModalProjector(config)
    state = {f"model.vision_tower.{k}": v for k, v in tower.state_dict().items()}
    state |= {f"model.multi_modal_projector.{k}": v for k, v in projector.state_dict().items()}
    config.save_pretrained(folder)
    size = {"height": 336, "width": 336}
    CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=size).save_pretrained(folder)
    save_file(
        {k: v.contiguous() for k, v in state.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
