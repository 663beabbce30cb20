"""Peak memory of all prompts of C-GQA through a text tower with experts, some at a time; a part of encoder.py.

    python tests/benchmarks/encoder_memory.py clip:demo --prompts 256 --chunk 64

One forward and backward pass of `--prompts` prompts of 8 rows through eva's text tower, experts in every block, at most
`--chunk` prompts in the tower at once. Printed as JSON: bytes at the peak beyond what stood before the pass (weights,
gradients, libraries), and seconds. On the CPU these are pages in memory as the kernel counts them, in a process of its
own; its high-water mark is set back first, as `ru_maxrss` would still hold that of the parent and of loading. On CUDA
they are bytes of tensors.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

from cache_builder import load_backbone
from cache_builder.backbones import clip
from heads.base import Context
from heads.features import Features
from heads.methods import eva

ALL_AT_ONCE = (64, 128)
"""Prompts from which the peak of any number at once is estimated."""


@dataclass(frozen=True)
class Pass:
    """What one pass took, in a process of its own: bytes at its peak, seconds."""

    n: int
    bytes: float
    seconds: float


def write_text_tower(folder: Path) -> None:
    """ViT-L/14's text tower, V 768 and 12 blocks, with random weights, beside an image tower of no size."""
    torch.manual_seed(0)
    architecture: Any = open_clip.get_model_config("ViT-L-14")
    architecture["vision_cfg"] = clip.TINY["vision_cfg"]
    config = {"model_cfg": architecture, "preprocess_cfg": {"resize_mode": "shortest"}}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(open_clip.CLIP(**architecture).state_dict(), folder / "open_clip_model.safetensors")


def head_of(name: str, n: int, chunk: int) -> tuple[eva.Head, Features]:
    """eva with experts in the text tower alone, and labels of n pairs."""
    side = round(n**0.5 + 0.5)
    spec: Any = load_backbone(name)
    context = Context(
        {},
        spec.readout(),
        tuple(f"attr{i}" for i in range(side)),
        tuple(f"obj{i}" for i in range(side)),
        backbone=spec.spec,
        backbone_name=name,
    )
    nothing = {"image_blocks": 0, "image_to_text": False, "text_to_image": False}
    torch.manual_seed(0)
    head = eva.Head(eva.Config(chunk=chunk, **nothing), context)
    index = torch.arange(n)
    return head, Features({}, {"attr": index % side, "obj": index // side})


def peak(device: str) -> int:
    """Bytes held at most since `start`, when all work is done."""
    if "cuda" in device:
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    return _kernel("VmHWM")


def start(device: str) -> int:
    """Set the high-water mark back; bytes that are held now."""
    gc.collect()
    if "cuda" in device:
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return _kernel("VmRSS")


def _kernel(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def free(device: str) -> int:
    """Bytes that may still be taken."""
    if "cuda" in device:
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def measured(name: str, n: int, chunk: int, device: str, bf16: bool, threads: int) -> Pass:
    """One pass in a fresh process."""
    command = [sys.executable, __file__, name, "--prompts", n, "--chunk", chunk]
    command += ["--device", device, "--threads", threads, *(["--bf16"] if bf16 else [])]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment())
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr}")
    return Pass(n, **json.loads(done.stdout.splitlines()[-1]))


def environment() -> dict[str, str]:
    """Every tensor above 256 KiB is a mapping of its own: freed ones do not stay, and do not hide those that follow."""
    return {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 18)}


def line(passes: Sequence[Pass], n: int) -> float:
    """Bytes of n prompts, on the line through two passes."""
    a, b = passes
    return b.bytes + (n - b.n) * (b.bytes - a.bytes) / (b.n - a.n)


def rows(name: str, n: int, chunks: Sequence[int], largest: int, **how: Any) -> Iterator[list[str]]:
    """Of the table.

    Args:
        name: the backbone.
        n: prompts.
        chunks: parts to compare with all at once.
        largest: prompts that may be run; more are extrapolated from two passes.
        how: device, bf16, threads.
    """
    few = [measured(name, size, size, **how) for size in ALL_AT_ONCE]
    whole, how_known = line(few, n), f"extrapolated from {few[0].n} and {few[1].n}"
    if n <= largest and 1.2 * whole < free(how["device"]):
        few = [measured(name, n, n, **how)]
        whole, how_known = few[0].bytes, "measured"
    title = f"{n:,} prompts with experts"
    yield [f"{title}: all at once, {how_known}", f"{whole / 1e9:,.2f}", "GB", "1.0", "–"]
    seconds = [f"all at once {few[-1].seconds / few[-1].n:.4f}"]
    for chunk in chunks:
        sizes = [n] if n <= largest else [2 * chunk, max(3 * chunk, largest)]
        found = [measured(name, size, chunk, **how) for size in sizes]
        needed = found[0].bytes if n <= largest else line(found, n)
        how_known = (
            f"extrapolated from {sizes[0]:,} and {sizes[-1]:,}" if n > largest else "measured"
        )
        yield [
            f"{title}: {chunk} at once, recomputed, {how_known}",
            f"{needed / 1e9:,.2f}",
            "GB",
            f"{whole / needed:.1f}",
            "–",
        ]
        seconds.append(f"{chunk} at once {found[-1].seconds / found[-1].n:.4f}")
    print(f"{title}: seconds a prompt, of one run each: {', '.join(seconds)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("backbone", help="family:checkpoint")
    parser.add_argument("--prompts", type=int, required=True)
    parser.add_argument("--chunk", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    head, labels = head_of(args.backbone, args.prompts, args.chunk)
    head, labels = head.to(args.device), labels.to(args.device)

    def once(labels: Features) -> None:
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
            text = head.gather([labels]).text
        text.sum().backward()

    once(Features({}, {name: value[:8] for name, value in labels.labels.items()}))
    before, began = start(args.device), time.perf_counter()
    once(labels)
    highest = peak(args.device) - before
    print(json.dumps({"bytes": highest, "seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main()
