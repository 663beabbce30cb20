"""Measure what the bundled LLaVA's captions can and cannot tell apart, and write the figures beside its weights.

    python -m cache_builder.demo.measure_captions --seeds 3

It has no joint space, so a picture and a caption match as far as the caption is likely after the picture:
log p(caption | picture), summed over tokens. The items are the 2×2 ones of toy_world, the decisions those of
`measure_bias.py`.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cache_builder import load_backbone
from cache_builder.datasets import toy_world
from cache_builder.demo.measure_bias import CHANCE, summarise
from cache_builder.readout import project_patches

FOLDER = Path(__file__).parent / "llava"


@torch.inference_mode()
def log_likelihood(backbone: Any, patches: Tensor, texts: list[str]) -> Tensor:
    """Log-likelihood of caption and end of text after the picture, (B,), of patches (B, N, W) and a caption each."""
    tokens, model = backbone.text.tokens, backbone.model
    end = torch.full((len(texts), 1), tokens.tokenizer.eos_token_id)
    padded = torch.cat([tokens.tokenize(texts), torch.full_like(end, tokens.pad)], 1)
    ids = padded.scatter(1, tokens.lengths(padded)[:, None], end)
    words = backbone.embed_tokens(ids)
    shown = project_patches(backbone.readout(), patches)
    joined = torch.cat([words[:, :1], shown, words[:, 1:]], 1)
    # The language model itself: a picture and a caption are longer than the texts the tower stores.
    inner = model.model.language_model
    states = inner(inputs_embeds=joined, use_cache=False).last_hidden_state
    guesses = model.lm_head(states[:, -ids.shape[1] : -1]).log_softmax(-1)
    chosen = guesses.gather(2, ids[:, 1:, None])[..., 0]
    return (chosen * (ids[:, 1:] != tokens.pad)).sum(1)


def measure(seed: int, split: str, scale: float = 1.0) -> dict[str, float | int]:
    """Share of right decisions on one evaluation world; keys end in the number of items, `…/n`."""
    backbone: Any = load_backbone("llava:demo")
    dataset = toy_world.load(seed=seed, scale=scale)
    records = {record.id: record for record in dataset.images}
    strings = {text.id: text.text for text in dataset.texts}
    right: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    for example in (e for e in dataset.tasks.two_by_two if e.split == split):
        pixels = torch.stack([backbone.preprocess(records[i].open()) for i in example.images])
        patches = backbone.encode_images(pixels)["patches"]
        texts = [strings[c] for c in example.captions]
        cells = log_likelihood(backbone, patches.repeat_interleave(2, 0), texts * 2).view(2, 2)
        i2t = bool(cells[0, 0] > cells[0, 1]) and bool(cells[1, 1] > cells[1, 0])
        t2i = bool(cells[0, 0] > cells[1, 0]) and bool(cells[1, 1] > cells[0, 1])
        for name in (example.category, example.category.split("_")[0], "all"):
            right[name].append((i2t, t2i))
    found: dict[str, float | int] = {}
    for name, decisions in sorted(right.items()):
        i2t, t2i = np.array(decisions).T
        found |= {f"2x2/{name}/i2t": float(i2t.mean()), f"2x2/{name}/t2i": float(t2i.mean())}
        found |= {f"2x2/{name}/group_score": float((i2t & t2i).mean()), f"2x2/{name}/n": len(i2t)}
    return found


def main() -> None:
    """Measure on the test split of worlds 0, 1, … and write `captions.json`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many evaluation worlds")
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=Path, default=FOLDER / "captions.json")
    args = parser.parse_args()
    rows = [measure(seed, args.split) for seed in tqdm(range(args.seeds), desc="worlds")]
    body = {
        "what": "decisions by log p(caption | picture); mean and std over evaluation worlds",
        "split": args.split,
        "worlds": list(range(args.seeds)),
        "chance": {f"2x2 {name}": round(value, 4) for name, value in CHANCE.items()},
        "figures": summarise(rows),
    }
    args.out.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
