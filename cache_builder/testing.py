"""Conformance suites: a new backbone or data set file is tested by existing. Shipped, for your own files too.

    check_backbone(my_family.tiny())          → {"image batch": 2.4e-07, …}, the largest differences found
    check_dataset(my_dataset, tmp_path)       a module with `load` and `miniature`, or a loaded `Dataset`

A failed check raises `NonConformance`, an `AssertionError` that says which rule was broken, where, and by how much.
"""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from cache_builder.datasets.base import Dataset, Tasks

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

SPLITS = ("train", "val", "test")

BATCH_TOLERANCE = 1e-5
"""Largest absolute difference of an item alone and in a batch, float32: matrix kernels are tiled by shape, so equality
across batch sizes cannot be promised; measured 4e-6 on values of order 1-10."""

EXACT = 0.0
"""Same rows, same batch, same operations: nothing may differ."""

CAPTIONS = ("a red mug", "A photo of two ancient buildings!", "!!", "ripe orange", "it")
"""Differing lengths, capitals, and "!!", whose ids look like CLIP's padding."""


class NonConformance(AssertionError):
    """A plugin breaks its contract."""


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
        if any(s.startswith("text/") for s in backbone.streams):
            found |= _check_texts(backbone)
        if hasattr(backbone, "resume_from"):
            found |= _check_entering(backbone)
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
    _must(bool(dataset.decode), "decode does not say how pixels are obtained")
    for record in dataset.images:
        picture = record.open()
        _must(picture.mode == "RGB", f"image {record.id!r} opens as {picture.mode}, not RGB")
    for text in dataset.texts:
        _must(bool(text.text.strip()), f"text {text.id!r} is empty")
    _check_tasks(dataset)
    _must(Tasks.from_json(dataset.tasks.to_json()) == dataset.tasks, "tasks change through JSON")
    return dataset


def _load_miniature(module: ModuleType, folder: Path) -> Dataset:
    root = module.miniature(folder)
    dataset = module.load(root)
    _must(dataset.digest() == module.load(root).digest(), "two loads of the same files differ")
    _must(bool(dataset.images), "the miniature has no images")
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


def _must(holds: bool, otherwise: str) -> None:
    if not holds:
        raise NonConformance(otherwise)


def _near(name: str, got: Any, expected: Any, tolerance: float) -> dict[str, float]:
    _must(
        got.shape == expected.shape, f"{name}: {tuple(got.shape)} against {tuple(expected.shape)}"
    )
    difference = float((got.float() - expected.float()).abs().max())
    _must(difference <= tolerance, f"{name}: differs by {difference:.3g}, more than {tolerance:g}")
    return {name: difference}


def _sample_pixels(backbone: Any) -> Any:
    """Three pictures of differing shapes through the backbone's own transform."""
    import torch

    rng = np.random.default_rng(0)
    shapes = [(45, 61, 3), (80, 33, 3), (64, 64, 3)]
    images = [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]
    pixels = torch.stack([backbone.preprocess(image) for image in images])
    again = torch.stack([backbone.preprocess(image) for image in images])
    _must(torch.equal(pixels, again), "preprocess: two calls on one picture differ")
    return pixels


def _check_streams(backbone: Any, side: str, out: dict[str, Any], rows: int) -> None:
    declared = {s.removeprefix(f"{side}/") for s in backbone.streams if s.startswith(f"{side}/")}
    extra = {"length"} if side == "text" else set()
    _must(
        set(out) == declared | extra,
        f"{side} streams are {sorted(out)}, declared are {sorted(declared | extra)}",
    )
    dims = backbone.spec.dims
    expected = {
        "image": {
            "pooled": (rows, dims.get("joint")),
            "patches": (rows, dims.get("patches"), dims.get("image_width")),
            "prefix": (rows, dims.get("prefix"), dims.get("image_width")),
        },
        "text": {
            "pooled": (rows, dims.get("joint")),
            "tokens": (rows, dims.get("context"), dims.get("text_width")),
            "length": (rows,),
        },
    }[side]
    for name, value in out.items():
        if name in expected:
            _must(
                tuple(value.shape) == expected[name],
                f"{side}/{name} is {tuple(value.shape)}, the spec says {expected[name]}",
            )
        _must(not value.requires_grad, f"{side}/{name} carries a gradient")
        _must(bool(value.isfinite().all()), f"{side}/{name} is not finite")


def _check_images(backbone: Any) -> dict[str, float]:
    import torch

    from cache_builder.readout import pool_image

    pixels = _sample_pixels(backbone)
    out = backbone.encode_images(pixels)
    _check_streams(backbone, "image", out, len(pixels))
    found: dict[str, float] = {}
    again = backbone.encode_images(pixels)
    alone = [backbone.encode_images(row[None]) for row in pixels]
    for name, value in out.items():
        found |= _near(f"image/{name} repeated", again[name], value, EXACT)
        single = torch.cat([one[name] for one in alone])
        found |= _near(f"image/{name} single = batched", single, value, BATCH_TOLERANCE)
    if "image/pooled" in backbone.streams:
        r = {k: v.to(backbone.device) for k, v in backbone.readout().items()}
        pooled = pool_image(r, out["prefix"], out["patches"])
        found |= _near("image readout = pooled", pooled, out["pooled"], EXACT)
    return found


def _check_texts(backbone: Any) -> dict[str, float]:
    import torch

    from cache_builder.readout import pool_text

    ids = backbone.tokenize(CAPTIONS)
    _must(torch.equal(ids, backbone.tokenize(CAPTIONS)), "tokenize: two calls differ")
    _must(
        torch.equal(backbone.tokenize(["A Red MUG"]), backbone.tokenize(["a red mug"])),
        "tokenize: capitals change the ids; the normaliser of the published tokenizer is missing",
    )
    _must(backbone.truncated(CAPTIONS) == 0, "truncated: counts a short caption")
    long = " ".join(["word"] * 500)
    _must(backbone.truncated(["a", long]) == 1, "truncated: misses a 500-word caption")
    out = backbone.encode_texts(ids)
    _check_streams(backbone, "text", out, len(ids))
    lengths = out["length"].tolist()
    _must(all(0 < n <= ids.shape[1] for n in lengths), f"text/length {lengths} leaves the tokens")
    known = backbone.lengths(ids).tolist()
    _must(known == lengths, f"lengths: says {known} before the pass, which then gives {lengths}")
    found: dict[str, float] = {}
    again = backbone.encode_texts(ids)
    alone = [backbone.encode_texts(row[None]) for row in ids]
    for name in ("pooled", "tokens"):
        found |= _near(f"text/{name} repeated", again[name], out[name], EXACT)
        for i, n in enumerate(lengths):  # rows after `length` are nobody's
            rows = slice(None, n) if name == "tokens" else slice(None)
            key = f"text/{name} single = batched"
            worst = _near(key, alone[i][name][0, rows], out[name][i, rows], BATCH_TOLERANCE)
            found[key] = max(found.get(key, 0.0), worst[key])
    rows = out["tokens"][torch.arange(len(ids)), out["length"] - 1]
    r = {k: v.to(backbone.device) for k, v in backbone.readout().items()}
    found |= _near("text last stored row = pooled", pool_text(r, rows), out["pooled"], EXACT)
    return found


def _check_entering(backbone: Any) -> dict[str, float]:
    """Embedded tokens give the same as ids; resuming at any block gives the raw tokens of the whole pass."""
    ids = backbone.tokenize(CAPTIONS)
    whole = backbone.encode_texts(ids)
    embedded = backbone.encode_embedded(backbone.embed_tokens(ids), whole["length"] - 1)
    found = {
        **_near("embedded = ids, pooled", embedded["pooled"], whole["pooled"], EXACT),
        **_near("embedded = ids, tokens", embedded["tokens"], whole["tokens"], EXACT),
    }
    runs = {
        "image": lambda: backbone.encode_images(_sample_pixels(backbone)),
        "text": lambda: backbone.encode_texts(ids),
    }
    for side, run in runs.items():
        blocks = backbone.tower(side).resblocks
        entering: list[Any] = []
        hooks = [
            block.register_forward_pre_hook(lambda _, args, kept=entering: kept.append(args[0]))
            for block in blocks
        ]
        out = run()
        for hook in hooks:
            hook.remove()
        raw = out["tokens"] if side == "text" else _joined(out)
        for k, states in enumerate([*entering, raw]):
            resumed = backbone.resume_from(side, k, states)
            found |= _near(f"{side} resumed at block {k}", resumed, raw, EXACT)
    return found


def _joined(out: dict[str, Any]) -> Any:
    import torch

    return torch.cat([out["prefix"], out["patches"]], 1) if "prefix" in out else out["patches"]


def _check_frozen(backbone: Any) -> None:
    model = backbone.model
    training = [name for name, module in model.named_modules() if module.training]
    _must(not training, f"module {training[:1]} is in training mode")
    loose = [name for name, p in model.named_parameters() if p.requires_grad]
    _must(not loose, f"{len(loose)} parameters want a gradient, {loose[:1]} first")
    for name, value in backbone.readout().items():
        _must(
            str(value.dtype) == "torch.float32" and value.device.type == "cpu",
            f"readout {name} is {value.dtype} on {value.device}, not float32 on the CPU",
        )


def _check_ids(side: str, found: Sequence[str]) -> None:
    seen: set[str] = set()
    for one in found:
        _must(one not in seen, f"{side} id {one!r} occurs twice")
        seen.add(one)


def _check_tasks(dataset: Dataset) -> None:
    """Every id a task names exists, every split is one, and pairs are those the task lists."""
    images, texts = {i.id for i in dataset.images}, {t.id for t in dataset.texts}
    tasks = dataset.tasks
    uses: list[tuple[str, tuple[str, ...], tuple[str, ...], str]] = []
    if tasks.czsl is not None:
        task = tasks.czsl
        _must(bool(task.pairs.get("train")), "czsl: no train pairs, so nothing is seen")
        uses += [(f"czsl {e.image!r}", (e.image,), (), e.split) for e in task.examples]
        for example in task.examples:
            pair = (example.attr, example.obj)
            listed = pair in task.candidates(example.split)
            _must(listed, f"czsl {example.image!r}: {pair} is no candidate of {example.split}")
        for split in task.pairs:
            for pair in task.candidates(split):
                _must(task.prompts.get(pair) in texts, f"czsl: no text for the prompt of {pair}")
        unknown = set(task.prompts.values()) - texts
        _must(not unknown, f"czsl: prompt id {next(iter(unknown), None)!r} is no text")
    for kind, examples, n in (("matching", tasks.matching, 1), ("two_by_two", tasks.two_by_two, 2)):
        uses += [(f"{kind} {e.id!r}", e.images, e.captions, e.split) for e in examples]
        for e in examples:
            _must(len(e.images) == n, f"{kind} {e.id!r}: {len(e.images)} images, not {n}")
    uses += [(f"retrieval {e.image!r}", (e.image,), e.captions, e.split) for e in tasks.retrieval]
    uses += [
        (f"composed {e.id!r}", (e.reference, *e.targets), (e.modification,), e.split)
        for e in tasks.composed
    ]
    for place, image_ids, text_ids, split in uses:
        _must(split in SPLITS, f"{place}: split {split!r} is not one of {', '.join(SPLITS)}")
        for one in image_ids:
            _must(one in images, f"{place}: image {one!r} is not in the data set")
        for one in text_ids:
            _must(one in texts, f"{place}: text {one!r} is not in the data set")
