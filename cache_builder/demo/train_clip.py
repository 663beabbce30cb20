"""Train the bundled tiny CLIP: ordinary contrastive learning on toy-world scenes and their alt-texts.

    python -m cache_builder.demo.train_clip --seed 0 --out cache_builder/demo/clip --checkpoint /tmp/clip.safetensors

The class is open_clip's own `CLIP`; the loss is the symmetric cross-entropy over a batch and
nothing else. It sees training combinations only, and of each picture one partial, noisy alt-text a
visit (`alt_text.py`). No complete caption is forced, no hard negative is mined, and no choice here
looked at the accuracy of a head.

The bundled run (`clip/train_log.jsonl`) was started with 3,600 steps planned, on a machine that others
were using, and resumed once with `--steps 2700`: the learning rate jumps down there. A fresh run
with `--steps 2700` has another schedule and gives other weights.
"""

import argparse
import json
import math
import os
import time
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import PIL
import torch
from open_clip.model import CLIP
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from tqdm import tqdm

from cache_builder.demo.alt_text import WRONG_SHARE, alt_text
from cache_builder.demo.draw import IMAGE_SIZE, render
from cache_builder.demo.tokenizer import learn_tokenizer, save_tokenizer
from cache_builder.demo.world import (
    RELATIONS,
    WORLD_VERSION,
    Scene,
    key_rng,
    pairs_of,
    sample_scene,
    sample_two,
)

MODEL = {
    "embed_dim": 128,
    "quick_gelu": False,
    "vision_cfg": {
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "width": 128,
        "layers": 4,
        "head_width": 32,
    },
    "text_cfg": {
        "context_length": 32,
        "vocab_size": 0,  # set from the tokenizer
        "hf_tokenizer_name": "toy_world",  # open_clip reads the files of its own folder for a local-dir checkpoint
        "width": 128,
        "heads": 4,
        "layers": 3,
    },
}
PREPROCESS = {
    "size": IMAGE_SIZE,
    "mode": "RGB",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "interpolation": "bicubic",
    "resize_mode": "squash",
}
TEXTS_PER_SCENE = 4
ONE_THING_SHARE = 0.4
MAX_LOGIT_SCALE = math.log(100)
SAVE_EVERY_SECONDS = 120


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


def render_scenes(seed: int, n_scenes: int) -> tuple[np.ndarray, list[list[str]]]:
    """Pictures as uint8 `(n, 56, 56, 3)`, and the alt-texts of each."""
    images = np.empty((n_scenes, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    texts = []
    with Pool(os.cpu_count()) as pool:
        rows = pool.imap(_render_one, ((seed, i) for i in range(n_scenes)), chunksize=256)
        for i, (image, variants) in enumerate(tqdm(rows, total=n_scenes, desc="rendering")):
            images[i] = image
            texts.append(variants)
    return images, texts


def encode_text(model: CLIP, tokens: Tensor) -> Tensor:
    """What `model.encode_text` computes, on columns up to the longest text: the tower is causal, so nothing changes."""
    text: Any = model  # this class keeps the text tower's parts in itself, untyped
    ends = tokens.argmax(dim=-1)
    length = int(ends.max()) + 1
    states = text.token_embedding(tokens[:, :length]) + text.positional_embedding[:length]
    states = text.transformer(states, attn_mask=text.attn_mask[:length, :length])
    return text.ln_final(states)[torch.arange(len(tokens)), ends] @ text.text_projection


def contrastive_loss(model: CLIP, pixels: Tensor, tokens: Tensor) -> Tensor:
    """Symmetric cross-entropy; equal texts within a batch stay negatives of each other, as on the web."""
    images = normalize(model.encode_image(pixels), dim=-1)
    texts = normalize(encode_text(model, tokens), dim=-1)
    logits = model.logit_scale.exp() * images @ texts.T
    labels = torch.arange(len(logits))
    return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2


def save_clip(model: CLIP, config: dict, out: Path) -> None:
    """Write what `open_clip.create_model_and_transforms("local-dir:…")` reads; weights in fp16."""
    out.mkdir(parents=True, exist_ok=True)
    body = {"model_cfg": config, "preprocess_cfg": PREPROCESS}
    (out / "open_clip_config.json").write_text(json.dumps(body, indent=2) + "\n")
    state = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    part = (
        out / "open_clip_model.part"
    )  # a reader meanwhile sees the old file or the new one, never half
    save_file(state, str(part), metadata={"format": "pt"})
    part.chmod(0o644)
    part.replace(out / "open_clip_model.safetensors")


def save_checkpoint(
    path: Path,
    model: CLIP,
    optimizer: torch.optim.Optimizer,
    rng: np.random.Generator,
    step: int,
    log: list[dict],
) -> None:
    """Everything a later `resume` needs: tensors as safetensors, the rest as JSON in its header."""
    state = {
        f"model.{name}": value.detach().contiguous() for name, value in model.state_dict().items()
    }
    for i, moments in optimizer.state_dict()["state"].items():
        state |= {
            f"optimizer.{i}.{name}": value.detach().contiguous() for name, value in moments.items()
        }
    rest = {"step": step, "log": log, "rng": rng.bit_generator.state}
    save_file(state, str(path.with_suffix(".part")), metadata={"json": json.dumps(rest)})
    path.with_suffix(".part").replace(path)


def resume(
    path: Path, model: CLIP, optimizer: torch.optim.Optimizer, rng: np.random.Generator
) -> tuple[int, list[dict]]:
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


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then half a cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(args: argparse.Namespace) -> None:
    """Render, learn the tokenizer, train, save; continues from `--checkpoint` if that file exists."""
    started = time.time()
    torch.manual_seed(args.seed)
    images, texts = render_scenes(args.seed, args.scenes)
    tokenizer = learn_tokenizer(
        (t for variants in texts for t in variants), MODEL["text_cfg"]["context_length"]
    )
    config = json.loads(json.dumps(MODEL))
    config["text_cfg"]["vocab_size"] = len(tokenizer)
    flat = tokenizer(
        [t for variants in texts for t in variants],
        padding="max_length",
        truncation=True,
        return_tensors="np",
    ).input_ids
    tokens = flat.reshape(args.scenes, TEXTS_PER_SCENE, -1).astype(np.int16)
    args.out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, args.out)

    model = CLIP(**config)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": args.wd},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), eps=1e-6)
    rng = np.random.default_rng([args.seed, 1])
    first, log = resume(args.checkpoint, model, optimizer, rng)
    spent = max((row.get("seconds", 0.0) for row in log), default=0.0)
    if first:
        log.append({"resumed_at": first, "steps": args.steps})
    last_save = time.time()
    trained = last_save - spent  # a resumed run goes on counting
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc="training")
    for step in bar:
        rows = rng.choice(args.scenes, args.batch_size, replace=False)
        variant = rng.integers(TEXTS_PER_SCENE, size=args.batch_size)
        pixels = torch.from_numpy(images[rows]).permute(0, 3, 1, 2).float() / 127.5 - 1
        lr = learning_rate(step, args.steps, args.lr, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = contrastive_loss(
            model, pixels, torch.from_numpy(tokens[rows, variant].astype(np.int64))
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.logit_scale.data.clamp_(0, MAX_LOGIT_SCALE)
        if step % 20 == 0 or step == args.steps - 1:
            row = {"step": step, "loss": round(loss.item(), 4), "lr": float(f"{lr:.3g}")}
            row |= {
                "logit_scale": round(model.logit_scale.exp().item(), 2),
                "seconds": round(time.time() - trained, 1),
            }
            log.append(row)
            bar.set_postfix(loss=row["loss"])
        if time.time() - last_save > SAVE_EVERY_SECONDS:
            last_save = time.time()
            save_checkpoint(args.checkpoint, model, optimizer, rng, step + 1, log)
            save_clip(model, config, args.out)
    save_clip(model, config, args.out)
    log.append(_summary(args, model, config, spent + time.time() - started))
    (args.out / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))


def _summary(args: argparse.Namespace, model: CLIP, config: dict, seconds: float) -> dict:
    return {
        "summary": {
            **{
                key: getattr(args, key)
                for key in ("seed", "scenes", "steps", "batch_size", "lr", "wd", "warmup")
            },
            "parameters": sum(p.numel() for p in model.parameters()),
            "vocab_size": config["text_cfg"]["vocab_size"],
            "seconds_in_all": round(seconds),
            "threads": torch.get_num_threads(),
            "world_version": WORLD_VERSION,
            "versions": {
                "torch": torch.__version__,
                "open_clip": open_clip.__version__,
                "numpy": np.__version__,
                "pillow": PIL.__version__,
            },
        }
    }


def main() -> None:
    """Read the flags and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=Path("train_clip.safetensors"),
        help="resumed if it exists",
    )
    parser.add_argument("--scenes", type=int, default=60_000)
    parser.add_argument("--steps", type=int, default=3_600)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--wd", type=float, default=0.1)
    parser.add_argument("--warmup", type=int, default=200)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
