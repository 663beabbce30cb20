"""Train a bundled two-tower backbone: ordinary contrastive learning on toy-world scenes and their alt-texts.

    python -m cache_builder.demo.train_towers siglip2 --out cache_builder/demo/siglip2 --checkpoint /tmp/s.safetensors

The classes are open_clip's own, and so are the losses: the symmetric cross-entropy over a batch (clip, pe), the
pairwise sigmoid (siglip2), nothing else.

timm draws every layer with a standard deviation of 0.02, which suits widths near 768. At 128, PE's loss stayed at that
of a constant embedding (learning rate 1e-3) or fell slowly (5e-4), and SigLIP2's fell slowly. So the trunks begin as
open_clip's own towers do, with one over the square root of the width. Earlier runs are not bundled.

The bundled CLIP (`clip/train_log.jsonl`) was started with 3,600 steps planned, on a machine that others were using, and
resumed once with `--steps 2700`: the learning rate jumps down there. A fresh run with `--steps 2700` has another
schedule and gives other weights.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor
from torch.nn.functional import normalize

# Registers trunks under their names.
from cache_builder.backbones import small_trunks  # noqa: F401  # pyright: ignore[reportUnusedImport]
from cache_builder.demo.draw import IMAGE_SIZE
from cache_builder.demo.pretraining import (
    PREPROCESS,
    TEXTS_PER_SCENE,
    Training,
    flags,
    half,
    render_scenes,
    replace_weights,
    run,
)
from cache_builder.demo.tokenizer import learn_clip_tokenizer, learn_gemma_tokenizer

TEXT: dict[str, Any] = {
    "context_length": 32,
    "vocab_size": 0,  # set from the tokenizer
    "hf_tokenizer_name": "toy_world",  # open_clip reads the files of its own folder for a local-dir checkpoint
    "width": 128,
    "heads": 4,
    "layers": 3,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "clip": {
        "embed_dim": 128,
        "quick_gelu": False,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "patch_size": 8,
            "width": 128,
            "layers": 4,
            "head_width": 32,
        },
        "text_cfg": TEXT,
    },
    "siglip2": {
        "embed_dim": 128,
        # SigLIP begins at b = -10, about the log-odds of a pair in its batches of 32 k; these are those of ours of 128.
        "init_logit_bias": -round(math.log(127), 2),
        "custom_text": True,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "timm_model_name": "vit_toy_patch8_siglip_56",
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            **TEXT,
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
            "act_kwargs": {"approximate": "tanh"},
        },
    },
    "pe": {
        "embed_dim": 128,
        "custom_text": True,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "timm_model_name": "vit_pe_core_toy_patch8_56",
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": None,
        },
        "text_cfg": TEXT,
    },
}
MAX_LOGIT_SCALE = math.log(100)


def encode_text(model: Any, ids: Tensor) -> Tensor:
    """What `model.encode_text` computes; a causal tower runs up to the longest text only, which changes nothing."""
    text = getattr(model, "text", model)
    if text.attn_mask is None:
        return model.encode_text(ids)
    ends = ids.argmax(dim=-1)
    length = int(ends.max()) + 1
    states = text.token_embedding(ids[:, :length]) + text.positional_embedding[:length]
    states = text.transformer(states, attn_mask=text.attn_mask[:length, :length])
    return text.ln_final(states)[torch.arange(len(ids)), ends] @ text.text_projection


def draw_by_width(trunk: torch.nn.Module) -> None:
    """Draw the matrices of a timm trunk again, each with a standard deviation of one over the root of its inputs."""
    for name, value in trunk.named_parameters():
        if value.ndim == 2 and "pos_embed" not in name:
            torch.nn.init.normal_(value, std=value.shape[1] ** -0.5)


def contrastive_loss(model: Any, pixels: Tensor, ids: Tensor) -> Tensor:
    """open_clip's loss for the class; equal texts within a batch stay negatives of each other, as on the web."""
    images = normalize(model.encode_image(pixels), dim=-1)
    texts = normalize(encode_text(model, ids), dim=-1)
    scale = model.logit_scale.exp()
    if model.logit_bias is None:
        return ClipLoss()(images, texts, scale)
    return SigLipLoss()(images, texts, scale, model.logit_bias)


def save_towers(model: torch.nn.Module, config: dict[str, Any], out: Path) -> None:
    """Write what `open_clip.create_model_and_transforms("local-dir:…")` reads; weights in fp16."""
    out.mkdir(parents=True, exist_ok=True)
    body = {"model_cfg": config, "preprocess_cfg": PREPROCESS}
    (out / "open_clip_config.json").write_text(json.dumps(body, indent=2) + "\n")
    replace_weights(half(model), out / "open_clip_model.safetensors")


def train(args: argparse.Namespace) -> None:
    """Render, learn the tokenizer, train, save."""
    started = time.time()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    scenes = render_scenes(args.seed, args.scenes)
    config = copy.deepcopy(FAMILIES[args.family])
    learn = learn_gemma_tokenizer if args.family == "siglip2" else learn_clip_tokenizer
    tokenizer = learn(scenes.all_texts, TEXT["context_length"])
    config["text_cfg"]["vocab_size"] = len(tokenizer)
    flat = tokenizer(scenes.all_texts, padding="max_length", truncation=True, return_tensors="np")
    ids = flat.input_ids.reshape(args.scenes, TEXTS_PER_SCENE, -1).astype(np.int16)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(args.out))
    model: Any = (CustomTextCLIP if config.get("custom_text") else CLIP)(
        **{k: v for k, v in config.items() if k != "custom_text"}
    )
    if "trunk" in dict(model.visual.named_children()):
        draw_by_width(model.visual.trunk)
    run(
        Training(
            model,
            loss=lambda rows, variant: contrastive_loss(
                model, scenes.pixels(rows), torch.from_numpy(ids[rows, variant].astype(np.int64))
            ),
            save=lambda: save_towers(model, config, args.out),
            after_step=lambda: model.logit_scale.data.clamp_(0, MAX_LOGIT_SCALE),
            measured=lambda: {"logit_scale": round(model.logit_scale.exp().item(), 2)},
        ),
        args,
        started,
    )


def main() -> None:
    """Read the flags and train."""
    parser = flags(__doc__, "train_towers.safetensors")
    parser.add_argument("family", choices=tuple(FAMILIES))
    train(parser.parse_args())


if __name__ == "__main__":
    main()
