"""Conformance suites: a new backbone or data set file is tested by existing. Shipped, for your own files too.

    check_backbone(my_family.tiny())          → {"image batch": 2.4e-07, …}, the largest differences found
    check_dataset(my_dataset, tmp_path)       a module with `load` and `miniature`, or a loaded `Dataset`

A failed check raises `NonConformance`, an `AssertionError` that says which rule was broken, where, and by how much.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from cache_builder.conforming import (
    BATCH_TOLERANCE,
    CAPTIONS,
    EXACT,
    NonConformance,
    must,
    near,
    sample_pixels,
)
from cache_builder.datasets.base import Dataset, Tasks
from cache_builder.testing_entering import check_branches, check_entering

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = ["NonConformance", "captions", "check_backbone", "check_dataset", "ids", "pictures"]

SPLITS = ("train", "val", "test")


def check_backbone(backbone: Any) -> dict[str, float]:
    """Hold a backbone to the contract of `cache_builder/backbones/base.py`.

    Args:
        backbone: loaded in float32, e.g. the family's `tiny()`; its network is the attribute `model`.

    Returns:
        check → largest absolute difference seen.
    """
    import torch

    found: dict[str, float] = {}
    with torch.no_grad():
        if any(s.startswith("image/") for s in backbone.streams):
            found |= _check_images(backbone)
            _check_levels(backbone)
        if any(s.startswith("text/") for s in backbone.streams):
            found |= _check_texts(backbone)
        if "word/states" in backbone.streams:
            found |= _check_words(backbone)
        if hasattr(backbone, "resume_from"):
            found |= check_entering(backbone)
            found |= check_branches(backbone)
    _check_frozen(backbone)
    return found


def check_dataset(dataset: Dataset | ModuleType, scratch: Path | None = None) -> Dataset:
    """Hold a data set to the contract of `cache_builder/datasets/base.py`; returns it.

    Args:
        dataset: a loaded one, or a plugin module, whose miniature is then written below `scratch` and loaded.
        scratch: an existing empty folder; needed for a module.
    """
    if isinstance(dataset, ModuleType):
        assert scratch is not None, "a module's miniature needs a folder to be written to"
        return check_dataset(_load_miniature(dataset, scratch / "miniature"))
    _check_ids("image", [i.id for i in dataset.images])
    _check_ids("text", [t.id for t in dataset.texts])
    must(bool(dataset.decode), "decode does not say how pixels are obtained")
    for record in dataset.images:
        picture = record.open()
        must(picture.mode == "RGB", f"image {record.id!r} opens as {picture.mode}, not RGB")
    # An official test split of CIRR holds an empty modification, which its server wants answered.
    edits = {text for example in dataset.tasks.composed for text in example.modifications}
    for text in dataset.texts:
        must(bool(text.text.strip()) or text.id in edits, f"text {text.id!r} is empty")
    _check_tasks(dataset)
    must(Tasks.from_json(dataset.tasks.to_json()) == dataset.tasks, "tasks change through JSON")
    return dataset


def _load_miniature(module: ModuleType, folder: Path) -> Dataset:
    root = module.miniature(folder)
    dataset = module.load(root)
    must(dataset.digest() == module.load(root).digest(), "two loads of the same files differ")
    must(bool(dataset.images), "the miniature has no images")
    return dataset


def pictures() -> "SearchStrategy[Image.Image]":
    """RGB pictures of awkward sizes: single rows, thin strips, leftovers that centre crops round differently."""
    from hypothesis import strategies as st

    sides = st.sampled_from([1, 2, 31, 32, 33, 35, 64])

    def paint(width: int, height: int, seed: int) -> Image.Image:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    return st.builds(paint, sides, sides, st.integers(0, 2**16))


def captions() -> "SearchStrategy[str]":
    """Texts as people write them: capitals, punctuation, accents, emoji, exclamation marks, very long ones."""
    from hypothesis import strategies as st

    words = st.sampled_from(
        ["a", "Red", "mug", "!!", "don't", "grün", "日本", "🙂", "x" * 90, "12"]
    )
    return st.lists(words, min_size=1, max_size=12).map(" ".join)


def ids(count: int) -> "SearchStrategy[list[str]]":
    """So many different ids of any printable characters, spaces and slashes included."""
    from hypothesis import strategies as st

    one = st.text(st.characters(exclude_categories=("C",)), min_size=1, max_size=12)
    return st.lists(one, min_size=count, max_size=count, unique=True)


def _row(pixels: Any, i: int) -> Any:
    """One item, still stacked."""
    if isinstance(pixels, Mapping):
        return {name: value[i : i + 1] for name, value in pixels.items()}
    return pixels[i : i + 1]


def _check_streams(backbone: Any, side: str, out: dict[str, Any], rows: int) -> None:
    declared = {s.removeprefix(f"{side}/") for s in backbone.streams if s.startswith(f"{side}/")}
    dims = backbone.spec.dims
    ragged = side == "image" and "patches" not in dims
    extra = {"length"} if side == "text" or ragged else set()
    must(
        set(out) == declared | extra,
        f"{side} streams are {sorted(out)}, declared are {sorted(declared | extra)}",
    )
    most = dims.get("patches", dims.get("most_patches"))
    expected = {
        "image": {
            "pooled": (rows, dims.get("joint")),
            "patches": (rows, most, dims.get("image_width")),
            "prefix": (rows, dims.get("prefix"), dims.get("image_width")),
            "length": (rows,),
        },
        "text": {
            "pooled": (rows, dims.get("joint")),
            "tokens": (
                rows,
                out["tokens"].shape[1] if side == "text" else 0,
                dims.get("text_width"),
            ),
            "length": (rows,),
        },
    }[side]
    for name, value in out.items():
        if name in expected:
            must(
                tuple(value.shape) == expected[name],
                f"{side}/{name} is {tuple(value.shape)}, the spec says {expected[name]}",
            )
        must(not value.requires_grad, f"{side}/{name} carries a gradient")
        must(bool(value.isfinite().all()), f"{side}/{name} is not finite")


def _check_images(backbone: Any) -> dict[str, float]:
    import torch

    from cache_builder.readout import pool_image

    pixels = sample_pixels(backbone)
    out = backbone.encode_images(pixels)
    n = len(out["patches"])
    _check_streams(backbone, "image", out, n)
    found: dict[str, float] = {}
    again = backbone.encode_images(pixels)
    alone = [backbone.encode_images(_row(pixels, i)) for i in range(n)]
    real = out.get("length")
    for name, value in out.items():
        found |= near(f"image/{name} repeated", again[name], value, EXACT)
        single = torch.cat([one[name] for one in alone])
        if real is not None and name == "patches":  # rows behind a picture's own are nobody's
            mine = torch.arange(value.shape[1], device=value.device) < real[:, None]
            single, value = single[mine], value[mine]
        found |= near(f"image/{name} single = batched", single, value, BATCH_TOLERANCE)
    r = {k: v.to(backbone.device) for k, v in backbone.readout().items()}
    if "image/pooled" in backbone.streams:
        prefix, mask = out.get("prefix"), None
        if real is not None:
            mask = torch.arange(out["patches"].shape[1], device=backbone.device) < real[:, None]
        pooled = pool_image(r, prefix, out["patches"], mask)
        found |= near("image readout = pooled", pooled, out["pooled"], EXACT)
        if real is not None:  # what a reader of ragged rows does
            rows = [pool_image(r, None, out["patches"][i : i + 1, :k]) for i, k in enumerate(real)]
            key = "image readout of unpadded rows = pooled"
            found |= near(key, torch.cat(rows), out["pooled"], BATCH_TOLERANCE)
    return found


def _check_levels(backbone: Any) -> None:
    """Pixels come back from their 8-bit levels bit for bit, of odd pictures too, and every level from its pixels."""
    import torch

    size = backbone.spec.dims.get("image_size")
    if size is None:  # pictures keep their shape
        return
    rng = np.random.default_rng(1)
    sizes = [(size, size), (1, 1), (1, 2 * size), (2 * size, 1), (33, 31), (3 * size + 1, 2 * size)]
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    images += [Image.new("RGB", (7, 5), colour) for colour in ("black", "white", (1, 128, 254))]
    pixels = torch.stack([backbone.preprocess(image) for image in images]).to(backbone.device)
    levels = backbone.levels(pixels)
    must(
        levels.dtype == torch.uint8 and tuple(levels.shape) == (len(images), 3, size, size),
        f"levels: {levels.dtype} {tuple(levels.shape)}, the spec says uint8 {(len(images), 3, size, size)}",
    )
    wrong = (backbone.normalised(levels) != pixels).flatten(1).any(1).nonzero().flatten().tolist()
    must(
        not wrong,
        f"normalised(levels(preprocess(image))) is not preprocess(image) of {len(wrong)} of {len(images)} pictures, "
        f"the first {images[wrong[0]].size if wrong else ()}",
    )
    every = torch.arange(256, dtype=torch.uint8, device=levels.device).expand(1, 3, 1, 256)
    again = backbone.levels(backbone.normalised(every))
    must(torch.equal(again, every), "levels(normalised(levels)) changes a level")


def _check_texts(backbone: Any) -> dict[str, float]:
    import torch

    from cache_builder.readout import pool_text

    ids = backbone.tokenize(CAPTIONS)
    must(torch.equal(ids, backbone.tokenize(CAPTIONS)), "tokenize: two calls differ")
    must(
        torch.equal(backbone.tokenize(["A Red MUG"]), backbone.tokenize(["a red mug"]))
        or "text/pooled" not in backbone.streams,
        "tokenize: capitals change the ids; the normaliser of the published tokenizer is missing",
    )
    must(backbone.truncated(CAPTIONS) == 0, "truncated: counts a short caption")
    long = " ".join(["word"] * 500)
    must(backbone.truncated(["a", long]) == 1, "truncated: misses a 500-word caption")
    out = backbone.encode_texts(ids)
    _check_streams(backbone, "text", out, len(ids))
    lengths = out["length"].tolist()
    must(all(0 < n <= ids.shape[1] for n in lengths), f"text/length {lengths} leaves the tokens")
    known = backbone.lengths(ids).tolist()
    must(known == lengths, f"lengths: says {known} before the pass, which then gives {lengths}")
    full, most = int(backbone.lengths(backbone.tokenize([long]))[0]), backbone.spec.dims["context"]
    must(full == most, f"lengths: a caption cut to {most} tokens has {full}")
    found: dict[str, float] = {}
    again = backbone.encode_texts(ids)
    alone = [backbone.encode_texts(backbone.tokenize([text])) for text in CAPTIONS]
    for name in sorted({"pooled", "tokens"} & set(out)):
        found |= near(f"text/{name} repeated", again[name], out[name], EXACT)
        for i, n in enumerate(lengths):  # rows after `length` are nobody's
            rows = slice(None, n) if name == "tokens" else slice(None)
            key = f"text/{name} single = batched"
            worst = near(key, alone[i][name][0, rows], out[name][i, rows], BATCH_TOLERANCE)
            found[key] = max(found.get(key, 0.0), worst[key])
    if "pooled" in out:
        rows = out["tokens"][torch.arange(len(ids)), out["length"] - 1]
        r = {k: v.to(backbone.device) for k, v in backbone.readout().items()}
        found |= near("text last stored row = pooled", pool_text(r, rows), out["pooled"], EXACT)
    return found


def _check_words(backbone: Any) -> dict[str, float]:
    """A phrase alone and among longer ones: padding is invisible."""
    import torch

    phrases = ["red", "ancient building", "cup"]
    ids = backbone.tokenize_words(phrases)
    out = backbone.encode_words(ids)
    must(set(out) == {"states", "length"}, f"word streams are {sorted(out)}")
    found = {"words single = batched": 0.0}
    for i, phrase in enumerate(phrases):
        one = backbone.encode_words(backbone.tokenize_words([phrase]))["states"]
        n = int(out["length"][i])
        must(one.shape[1] == n, f"word {phrase!r} has {one.shape[1]} tokens alone, {n} in a batch")
        worst = near("words single = batched", out["states"][i : i + 1, :n], one, BATCH_TOLERANCE)
        found = {key: max(value, worst[key]) for key, value in found.items()}
    must(bool(torch.isfinite(out["states"]).all()), "word/states is not finite")
    return found


def _check_frozen(backbone: Any) -> None:
    model = backbone.model
    training = [name for name, module in model.named_modules() if module.training]
    must(not training, f"module {training[:1]} is in training mode")
    loose = [name for name, p in model.named_parameters() if p.requires_grad]
    must(not loose, f"{len(loose)} parameters want a gradient, {loose[:1]} first")
    for name, value in backbone.readout().items():
        must(
            str(value.dtype) == "torch.float32" and value.device.type == "cpu",
            f"readout {name} is {value.dtype} on {value.device}, not float32 on the CPU",
        )


def _check_ids(side: str, found: Sequence[str]) -> None:
    seen: set[str] = set()
    for one in found:
        must(one not in seen, f"{side} id {one!r} occurs twice")
        seen.add(one)


def _check_tasks(dataset: Dataset) -> None:
    """Every id a task names exists, every split is one, and pairs are those the task lists."""
    images, texts = {i.id for i in dataset.images}, {t.id for t in dataset.texts}
    tasks = dataset.tasks
    uses: list[tuple[str, tuple[str, ...], tuple[str, ...], str]] = []
    if tasks.czsl is not None:
        task = tasks.czsl
        must(bool(task.pairs.get("train")), "czsl: no train pairs, so nothing is seen")
        uses += [(f"czsl {e.image!r}", (e.image,), (), e.split) for e in task.examples]
        listed = {split: task.candidates(split) for split in task.pairs}
        among = {split: set(pairs) for split, pairs in listed.items()}
        for example in task.examples:
            pair, split = (example.attr, example.obj), example.split
            known = pair in among.get(split, ())
            must(known, f"czsl {example.image!r}: {pair} is no candidate of {split}")
        for pairs in listed.values():
            for pair in pairs:
                must(task.prompts.get(pair) in texts, f"czsl: no text for the prompt of {pair}")
        unknown = set(task.prompts.values()) - texts
        must(not unknown, f"czsl: prompt id {next(iter(unknown), None)!r} is no text")
    for kind, examples, n in (("matching", tasks.matching, 1), ("two_by_two", tasks.two_by_two, 2)):
        uses += [(f"{kind} {e.id!r}", e.images, e.captions, e.split) for e in examples]
        for e in examples:
            must(len(e.images) == n, f"{kind} {e.id!r}: {len(e.images)} images, not {n}")
    uses += [(f"retrieval {e.image!r}", e.images, e.texts, e.split) for e in tasks.retrieval]
    uses += [(f"composed {e.id!r}", e.images, e.texts, e.split) for e in tasks.composed]
    _check_ids("triplet", [e.id for e in tasks.triplets])
    for e in tasks.triplets:
        uses.append((f"triplet {e.id!r}", e.images, e.texts, e.split))
        must(e.split != "test", f"triplet {e.id!r}: of split test, and triplets are trained on")
    for name, gallery in tasks.galleries.items():
        _check_ids(f"gallery {name!r}", gallery.images)
        uses.append((f"gallery {name!r}", gallery.images, (), SPLITS[0]))
    members = {name: set(gallery.images) for name, gallery in tasks.galleries.items()}
    for e in tasks.composed:
        place = f"composed {e.id!r}"
        must(bool(e.gallery or e.subset), f"{place}: neither a gallery nor a subset to rank")
        must(not e.gallery or e.gallery in members, f"{place}: no gallery {e.gallery!r}")
        within = members[e.gallery] if e.gallery else set(e.subset)
        must(set(e.targets) <= within, f"{place}: a target is no candidate")
        must(bool(e.modifications), f"{place}: no modification")
    for place, image_ids, text_ids, split in uses:
        must(split in SPLITS, f"{place}: split {split!r} is not one of {', '.join(SPLITS)}")
        for one in image_ids:
            must(one in images, f"{place}: image {one!r} is not in the data set")
        for one in text_ids:
            must(one in texts, f"{place}: text {one!r} is not in the data set")
