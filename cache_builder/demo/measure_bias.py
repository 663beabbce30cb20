"""Measure what a bundled backbone's global cosine can and cannot tell apart, and write the figures beside its weights.

    python -m cache_builder.demo.measure_bias cache_builder/demo/siglip2 --seeds 5

The tool exists because a global cosine often behaves like a bag of words: good when a word is
replaced, poor when two are exchanged. This states, over several evaluation worlds, how far that
holds here; whatever comes out is written down.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import open_clip
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

# Registers trunks under their names.
from cache_builder.backbones import small_trunks  # noqa: F401  # pyright: ignore[reportUnusedImport]
from cache_builder.datasets import toy_world
from cache_builder.datasets.base import Dataset, MatchingExample

Record = TypeVar("Record")

CHANCE = {"i2t": 1 / 4, "t2i": 1 / 4, "group_score": 1 / 6}


@dataclass(frozen=True)
class Embeddings:
    """Unit vectors of one data set under one model, by id."""

    images: dict[str, Tensor]
    texts: dict[str, Tensor]

    def of_images(self, ids: Iterable[str]) -> Tensor:
        """Rows in the order given."""
        return torch.stack([self.images[name] for name in ids])

    def of_texts(self, ids: Iterable[str]) -> Tensor:
        """Rows in the order given."""
        return torch.stack([self.texts[name] for name in ids])


@torch.inference_mode()
def embed(folder: Path, dataset: Dataset, split: str, batch_size: int = 256) -> Embeddings:
    """Run both towers of an open_clip folder once over what the split's tasks need."""
    loaded: tuple[Any, ...] = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model, _, transform = loaded
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    tasks = dataset.tasks
    wanted = {e.image for e in (*tasks.examples("czsl"), *tasks.retrieval) if e.split == split}
    wanted |= {
        image
        for e in (*tasks.matching, *tasks.two_by_two)
        if e.split == split
        for image in e.images
    }
    said = {
        text
        for e in (*tasks.matching, *tasks.two_by_two, *tasks.retrieval)
        if e.split == split
        for text in e.captions
    }
    said |= {*tasks.czsl.prompts.values()} if tasks.czsl else set()
    pictures = [record for record in dataset.images if record.id in wanted]
    texts = [record for record in dataset.texts if record.id in said]
    images, strings = {}, {}
    for batch in _batches(pictures, batch_size):
        rows = model.encode_image(torch.stack([transform(record.open()) for record in batch]))
        images |= zip((record.id for record in batch), normalize(rows, dim=-1), strict=True)
    for batch in _batches(texts, batch_size):
        rows = model.encode_text(tokenizer([record.text for record in batch]))
        strings |= zip((record.id for record in batch), normalize(rows, dim=-1), strict=True)
    return Embeddings(images, strings)


def _batches(rows: list[Record], size: int) -> list[list[Record]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def measure(folder: Path, seed: int, split: str, scale: float = 1.0) -> dict[str, float | int]:
    """Zero-shot accuracy of the global cosine on one evaluation world; keys end in the number of items, `…/n`."""
    dataset = toy_world.load(seed=seed, scale=scale)
    embeddings = embed(folder, dataset, split)
    return (
        _compositions(dataset, embeddings, split)
        | _matching(dataset, embeddings, split)
        | _retrieval(dataset, embeddings, split)
    )


def _compositions(dataset: Dataset, embeddings: Embeddings, split: str) -> dict[str, float | int]:
    task = dataset.tasks.czsl
    assert task is not None
    examples = [e for e in task.examples if e.split == split]
    images = embeddings.of_images([e.image for e in examples])
    seen = set(task.pairs["train"])
    found: dict[str, float | int] = {}
    for world in ("closed", "open"):
        candidates = task.candidates(split, world)
        best = (images @ embeddings.of_texts([task.prompts[pair] for pair in candidates]).T).argmax(
            dim=1
        )
        guesses = [candidates[i] for i in best.tolist()]
        hits = {
            "pair": [guess == (e.attr, e.obj) for guess, e in zip(guesses, examples, strict=True)],
            "attr": [guess[0] == e.attr for guess, e in zip(guesses, examples, strict=True)],
            "obj": [guess[1] == e.obj for guess, e in zip(guesses, examples, strict=True)],
        }
        known = np.array([(e.attr, e.obj) in seen for e in examples])
        for name, row in hits.items():
            found[f"czsl/{world}/{name}_acc"] = float(np.mean(row))
        found[f"czsl/{world}/pair_acc_seen"] = float(np.array(hits["pair"])[known].mean())
        found[f"czsl/{world}/pair_acc_unseen"] = float(np.array(hits["pair"])[~known].mean())
        found[f"czsl/{world}/chance"] = 1 / len(candidates)
    return found | {"czsl/n": len(examples)}


def _matching(dataset: Dataset, embeddings: Embeddings, split: str) -> dict[str, float | int]:
    groups: dict[str, list[MatchingExample]] = defaultdict(list)
    for example in (*dataset.tasks.matching, *dataset.tasks.two_by_two):
        if example.split == split:
            form = "2x2" if len(example.images) == 2 else "1x2"
            family = example.category.split("_")[0]
            part = "unseen" if "/unseen/" in example.id else "seen"
            for name in (example.category, family, f"{family}_{part}"):
                groups[f"{form}/{name}"].append(example)
    found: dict[str, float | int] = {}
    for name, examples in sorted(groups.items()):
        captions = [embeddings.of_texts([e.captions[i] for e in examples]) for i in (0, 1)]
        images = [
            embeddings.of_images([e.images[i] for e in examples])
            for i in range(len(examples[0].images))
        ]
        scores = torch.stack(
            [torch.stack([(x * t).sum(-1) for t in captions], -1) for x in images], 1
        )
        i2t = scores[:, 0, 0] > scores[:, 0, 1]
        if len(images) == 1:
            found[f"{name}/accuracy"] = i2t.double().mean().item()
        else:
            other = scores[:, 1, 1] > scores[:, 1, 0]
            t2i = (scores[:, 0, 0] > scores[:, 1, 0], scores[:, 1, 1] > scores[:, 0, 1])
            found[f"{name}/i2t"] = (i2t & other).double().mean().item()
            found[f"{name}/t2i"] = (t2i[0] & t2i[1]).double().mean().item()
            found[f"{name}/group_score"] = (i2t & other & t2i[0] & t2i[1]).double().mean().item()
        found[f"{name}/n"] = len(examples)
    return found


def _retrieval(dataset: Dataset, embeddings: Embeddings, split: str) -> dict[str, float | int]:
    examples = [e for e in dataset.tasks.retrieval if e.split == split]
    images = embeddings.of_images([e.image for e in examples])
    texts = embeddings.of_texts([e.captions[0] for e in examples])
    scores = texts @ images.T
    rank = (scores >= scores.diagonal()[:, None]).sum(dim=1) - 1  # a tie counts against
    return {
        "retrieval/t2i_recall@1": (rank < 1).double().mean().item(),
        "retrieval/t2i_recall@5": (rank < 5).double().mean().item(),
        "retrieval/chance@1": 1 / len(examples),
        "retrieval/n": len(examples),
    }


def summarise(rows: list[dict[str, float | int]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation (over worlds) of every figure; sizes are summed."""
    found = {}
    for key in rows[0]:
        values = np.array([row[key] for row in rows], dtype=float)
        if key.endswith("/n"):
            found[key] = {"sum": float(values.sum())}
        else:
            found[key] = {
                "mean": round(float(values.mean()), 4),
                "std": round(float(values.std(ddof=min(1, len(rows) - 1))), 4),
            }
    return found


def main() -> None:
    """Measure on the test split of worlds 0, 1, … and write `bias.json`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="a bundled backbone in open_clip's format")
    parser.add_argument("--seeds", type=int, default=5, help="how many evaluation worlds")
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=Path, help="default: bias.json beside the weights")
    args = parser.parse_args()
    rows = [
        measure(args.folder, seed, args.split) for seed in tqdm(range(args.seeds), desc="worlds")
    ]
    body = {
        "what": "zero-shot accuracy of the global cosine; mean and std over evaluation worlds",
        "split": args.split,
        "worlds": list(range(args.seeds)),
        "chance": {
            "1x2 accuracy": 0.5,
            **{f"2x2 {name}": round(value, 4) for name, value in CHANCE.items()},
        },
        "figures": summarise(rows),
    }
    out = args.out or args.folder / "bias.json"
    out.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
