"""What the bundled backbones have in common while they are trained: the scenes, the loop, the schedule, the log.

All of them see training combinations only, and of each picture one partial, noisy alt-text a visit (`alt_text.py`). No
complete caption is forced, no hard negative is mined, and no choice here looked at the accuracy of a head.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from cache_builder.demo.alt_text import WRONG_SHARE, alt_text
from cache_builder.demo.draw import IMAGE_SIZE, render
from cache_builder.demo.world import (
    RELATIONS,
    WORLD_VERSION,
    Scene,
    key_rng,
    pairs_of,
    sample_scene,
    sample_two,
)

TEXTS_PER_SCENE = 4
ONE_THING_SHARE = 0.4
SAVE_EVERY_SECONDS = 120

PREPROCESS = {
    "size": IMAGE_SIZE,
    "mode": "RGB",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "squash",
}
"""open_clip's words for what training does to a picture: nothing but scaling to -1 … 1."""


@dataclass(frozen=True)
class Scenes:
    """Pictures with their alt-texts.

    Attributes:
        images: uint8 (n, height, width, 3).
        texts: `TEXTS_PER_SCENE` of each.
    """

    images: np.ndarray
    texts: list[list[str]]

    @property
    def all_texts(self) -> list[str]:
        """Every alt-text, picture by picture."""
        return [text for variants in self.texts for text in variants]

    def pixels(self, rows: np.ndarray) -> Tensor:
        """Float pixels (B, 3, height, width) in -1 … 1, as the preprocessing gives them."""
        return torch.from_numpy(self.images[rows]).permute(0, 3, 1, 2).float() / 127.5 - 1


def training_scene(seed: int, index: int) -> tuple[Scene, list[str]]:
    """Scene `index` of the pretraining stream with its alt-texts; no held-out pair ever occurs."""
    rng = key_rng(seed, "pretrain", index)
    pool = pairs_of("train")

    def draw() -> Scene:
        if rng.random() < ONE_THING_SHARE:
            return sample_scene(rng, (pool[rng.integers(len(pool))],))
        return sample_scene(rng, sample_two(rng, pool), [*RELATIONS][rng.integers(len(RELATIONS))])

    scene = draw()
    return scene, [
        alt_text(rng, draw() if rng.random() < WRONG_SHARE else scene)
        for _ in range(TEXTS_PER_SCENE)
    ]


def _render_one(job: tuple[int, int]) -> tuple[np.ndarray, list[str]]:
    scene, texts = training_scene(*job)
    return np.asarray(render(scene)), texts


def render_scenes(seed: int, n_scenes: int) -> Scenes:
    """The first scenes of the pretraining stream, drawn by all cores."""
    images = np.empty((n_scenes, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    texts = []
    with Pool(os.cpu_count()) as pool:
        rows = pool.imap(_render_one, ((seed, i) for i in range(n_scenes)), chunksize=256)
        for i, (image, variants) in enumerate(tqdm(rows, total=n_scenes, desc="rendering")):
            images[i] = image
            texts.append(variants)
    return Scenes(images, texts)


@dataclass
class Training:
    """A run that can be stopped and resumed.

    Attributes:
        model: what is trained: its parameters that require a gradient.
        loss: rows of the scenes and the alt-text each shows this time → scalar loss.
        save: writes the model where it belongs; called now and then, and at the end.
        after_step: e.g. clamps a temperature.
        measured: extra columns of the log.
    """

    model: nn.Module
    loss: Callable[[np.ndarray, np.ndarray], Tensor]
    save: Callable[[], None]
    after_step: Callable[[], None] = lambda: None
    measured: Callable[[], dict[str, float]] = field(default=dict)


def flags(doc: str | None, checkpoint: str) -> argparse.ArgumentParser:
    """The command line that all training scripts share."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--checkpoint", type=Path, default=Path(checkpoint), help="resumed if it exists"
    )
    parser.add_argument("--scenes", type=int, default=60_000)
    parser.add_argument("--steps", type=int, default=2_700)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--wd", type=float, default=0.1)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    return parser


def run(training: Training, args: argparse.Namespace, started: float) -> None:
    """AdamW over the steps; continues from `args.checkpoint` if that file exists, and writes `train_log.jsonl`."""
    model = training.model
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": args.wd},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-6)
    rng = np.random.default_rng([args.seed, 1])
    first, log = resume(args.checkpoint, model, optimizer, rng)
    spent = max((row.get("seconds", 0.0) for row in log), default=0.0)
    if first:
        log.append({"resumed_at": first, "steps": args.steps})
    last_save = time.time()
    begun = last_save - spent  # a resumed run goes on counting
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="training")
    for step in bar:
        rows = rng.choice(args.scenes, args.batch_size, replace=False)
        variant = rng.integers(TEXTS_PER_SCENE, size=args.batch_size)
        lr = learning_rate(step, args.steps, args.lr, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = training.loss(rows, variant)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        training.after_step()
        if step % 20 == 0 or step == args.steps - 1:
            row = {"step": step, "loss": round(loss.item(), 4), "lr": float(f"{lr:.3g}")}
            row |= {**training.measured(), "seconds": round(time.time() - begun, 1)}
            log.append(row)
            bar.set_postfix(loss=row["loss"])
        if time.time() - last_save > SAVE_EVERY_SECONDS:
            last_save = time.time()
            save_checkpoint(args.checkpoint, model, optimizer, rng, step + 1, log)
            training.save()
    training.save()
    log.append({"summary": _summary(args, trained, spent + time.time() - started)})
    (args.out / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then half a cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rng: np.random.Generator,
    step: int,
    log: list[dict[str, Any]],
) -> None:
    """Everything a later `resume` needs: tensors as safetensors, the rest as JSON in its header."""
    # Copies: safetensors refuses tensors that share memory, as tied weights do.
    state = {f"model.{k}": v.detach().clone() for k, v in model.state_dict().items()}
    for i, moments in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{i}.{k}": v.detach().contiguous() for k, v in moments.items()}
    rest = {"step": step, "log": log, "rng": rng.bit_generator.state}
    save_file(state, str(path.with_suffix(".part")), metadata={"json": json.dumps(rest)})
    path.with_suffix(".part").replace(path)


def resume(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, rng: np.random.Generator
) -> tuple[int, list[dict[str, Any]]]:
    """Load what `save_checkpoint` wrote into the arguments; gives the step to go on with and the log so far."""
    if not path.exists():
        return 0, []
    with safe_open(str(path), "pt") as file:
        rest = json.loads(file.metadata()["json"])
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    model.load_state_dict(
        {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    )
    moments: dict[int, dict[str, Tensor]] = {}
    for name in (name for name in state if name.startswith("optimizer.")):
        _, i, part = name.split(".")
        moments.setdefault(int(i), {})[part] = state[name]
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    rng.bit_generator.state = rest["rng"]
    return rest["step"], rest["log"]


def half(model: nn.Module) -> dict[str, Tensor]:
    """The weights as they are bundled: fp16."""
    return {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}


def replace_weights(state: dict[str, Tensor], file: Path) -> None:
    """Write safetensors so that a reader meanwhile sees the old file or the new one, never half."""
    part = file.with_suffix(".part")
    save_file(state, str(part), metadata={"format": "pt"})
    part.chmod(0o644)
    part.replace(file)


def _summary(
    args: argparse.Namespace, trained: list[nn.Parameter], seconds: float
) -> dict[str, Any]:
    wanted = ("family", "seed", "scenes", "steps", "batch_size", "lr", "wd", "warmup")
    return {
        **{key: getattr(args, key) for key in wanted if hasattr(args, key)},
        "parameters": sum(p.numel() for p in trained),
        "seconds_in_all": round(seconds),
        "threads": torch.get_num_threads(),
        "world_version": WORLD_VERSION,
        "versions": {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
    }
