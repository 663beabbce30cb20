"""Conformance suites: a new backbone or data set file is tested by existing. Shipped, for your own files too.

    check_backbone(my_family.tiny())          → {"image batch": 2.4e-07, …}, the largest differences found
    check_dataset(my_dataset, tmp_path)       a module with `load` and `miniature`, or a loaded `Dataset`

A failed check raises `NonConformance`, an `AssertionError` that says which rule was broken, where, and by how much.
"""

import math
from collections.abc import Callable, Mapping, Sequence
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
"""Largest difference of an item alone and in a batch, float32, of values up to 1 (larger ones: times the largest):
matrix kernels are tiled by shape, so equality across batch sizes cannot be promised; measured 4e-6."""

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
            _check_levels(backbone)
        if any(s.startswith("text/") for s in backbone.streams):
            found |= _check_texts(backbone)
        if "word/states" in backbone.streams:
            found |= _check_words(backbone)
        if hasattr(backbone, "resume_from"):
            found |= _check_entering(backbone)
            found |= _check_branches(backbone)
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
    # An official test split of CIRR holds an empty modification, which its server wants answered.
    edits = {text for example in dataset.tasks.composed for text in example.modifications}
    for text in dataset.texts:
        _must(bool(text.text.strip()) or text.id in edits, f"text {text.id!r} is empty")
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
    tolerance *= max(1.0, float(expected.float().abs().max()))
    _must(difference <= tolerance, f"{name}: differs by {difference:.3g}, more than {tolerance:g}")
    return {name: difference}


def _sample_pixels(backbone: Any) -> Any:
    """Three pictures of differing shapes through the backbone's own transform, stacked."""
    import torch
    from torch.utils.data import default_collate

    rng = np.random.default_rng(0)
    shapes = [(45, 61, 3), (80, 33, 3), (64, 64, 3)]
    images = [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]
    pixels, again = (default_collate([backbone.preprocess(i) for i in images]) for _ in range(2))
    same = _tensors(pixels).items()
    _must(
        all(torch.equal(value, _tensors(again)[name]) for name, value in same),
        "preprocess: two calls on one picture differ",
    )
    if "length" in backbone.encode_images(pixels):
        counts = [math.prod(backbone.grid(*image.size)) for image in images]
        real = backbone.encode_images(pixels)["length"].tolist()
        _must(counts == real, f"grid: promises {counts} patches, encode_images gives {real}")
    return pixels


def _tensors(pixels: Any) -> dict[str, Any]:
    return dict(pixels) if isinstance(pixels, Mapping) else {"": pixels}


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
    _must(
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
    n = len(out["patches"])
    _check_streams(backbone, "image", out, n)
    found: dict[str, float] = {}
    again = backbone.encode_images(pixels)
    alone = [backbone.encode_images(_row(pixels, i)) for i in range(n)]
    real = out.get("length")
    for name, value in out.items():
        found |= _near(f"image/{name} repeated", again[name], value, EXACT)
        single = torch.cat([one[name] for one in alone])
        if real is not None and name == "patches":  # rows behind a picture's own are nobody's
            mine = torch.arange(value.shape[1], device=value.device) < real[:, None]
            single, value = single[mine], value[mine]
        found |= _near(f"image/{name} single = batched", single, value, BATCH_TOLERANCE)
    r = {k: v.to(backbone.device) for k, v in backbone.readout().items()}
    if "image/pooled" in backbone.streams:
        prefix, mask = out.get("prefix"), None
        if real is not None:
            mask = torch.arange(out["patches"].shape[1], device=backbone.device) < real[:, None]
        pooled = pool_image(r, prefix, out["patches"], mask)
        found |= _near("image readout = pooled", pooled, out["pooled"], EXACT)
        if real is not None:  # what a reader of ragged rows does
            rows = [pool_image(r, None, out["patches"][i : i + 1, :k]) for i, k in enumerate(real)]
            key = "image readout of unpadded rows = pooled"
            found |= _near(key, torch.cat(rows), out["pooled"], BATCH_TOLERANCE)
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
    _must(
        levels.dtype == torch.uint8 and tuple(levels.shape) == (len(images), 3, size, size),
        f"levels: {levels.dtype} {tuple(levels.shape)}, the spec says uint8 {(len(images), 3, size, size)}",
    )
    wrong = (backbone.normalised(levels) != pixels).flatten(1).any(1).nonzero().flatten().tolist()
    _must(
        not wrong,
        f"normalised(levels(preprocess(image))) is not preprocess(image) of {len(wrong)} of {len(images)} pictures, "
        f"the first {images[wrong[0]].size if wrong else ()}",
    )
    every = torch.arange(256, dtype=torch.uint8, device=levels.device).expand(1, 3, 1, 256)
    again = backbone.levels(backbone.normalised(every))
    _must(torch.equal(again, every), "levels(normalised(levels)) changes a level")


def _check_texts(backbone: Any) -> dict[str, float]:
    import torch

    from cache_builder.readout import pool_text

    ids = backbone.tokenize(CAPTIONS)
    _must(torch.equal(ids, backbone.tokenize(CAPTIONS)), "tokenize: two calls differ")
    _must(
        torch.equal(backbone.tokenize(["A Red MUG"]), backbone.tokenize(["a red mug"]))
        or "text/pooled" not in backbone.streams,
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
    full, most = int(backbone.lengths(backbone.tokenize([long]))[0]), backbone.spec.dims["context"]
    _must(full == most, f"lengths: a caption cut to {most} tokens has {full}")
    found: dict[str, float] = {}
    again = backbone.encode_texts(ids)
    alone = [backbone.encode_texts(backbone.tokenize([text])) for text in CAPTIONS]
    for name in sorted({"pooled", "tokens"} & set(out)):
        found |= _near(f"text/{name} repeated", again[name], out[name], EXACT)
        for i, n in enumerate(lengths):  # rows after `length` are nobody's
            rows = slice(None, n) if name == "tokens" else slice(None)
            key = f"text/{name} single = batched"
            worst = _near(key, alone[i][name][0, rows], out[name][i, rows], BATCH_TOLERANCE)
            found[key] = max(found.get(key, 0.0), worst[key])
    if "pooled" in out:
        rows = out["tokens"][torch.arange(len(ids)), out["length"] - 1]
        r = {k: v.to(backbone.device) for k, v in backbone.readout().items()}
        found |= _near("text last stored row = pooled", pool_text(r, rows), out["pooled"], EXACT)
    return found


def _check_words(backbone: Any) -> dict[str, float]:
    """A phrase alone and among longer ones: padding is invisible."""
    import torch

    phrases = ["red", "ancient building", "cup"]
    ids = backbone.tokenize_words(phrases)
    out = backbone.encode_words(ids)
    _must(set(out) == {"states", "length"}, f"word streams are {sorted(out)}")
    found = {"words single = batched": 0.0}
    for i, phrase in enumerate(phrases):
        one = backbone.encode_words(backbone.tokenize_words([phrase]))["states"]
        n = int(out["length"][i])
        _must(one.shape[1] == n, f"word {phrase!r} has {one.shape[1]} tokens alone, {n} in a batch")
        worst = _near("words single = batched", out["states"][i : i + 1, :n], one, BATCH_TOLERANCE)
        found = {key: max(value, worst[key]) for key, value in found.items()}
    _must(bool(torch.isfinite(out["states"]).all()), "word/states is not finite")
    return found


def _check_entering(backbone: Any) -> dict[str, float]:
    """Embedded tokens give the same as ids; resuming at any block gives the whole pass; prompts act."""
    pixels, found = _sample_pixels(backbone), dict[str, float]()
    depth = backbone.depth["image"]
    _must(depth == len(backbone.blocks("image")), "depth: is not the number of blocks")
    out = backbone.encode_images(pixels, range(depth + 1))
    entering, mask = backbone.embed_pixels(pixels)
    found |= _near("image embedded = block_0", entering, out["block_0"], EXACT)
    for k in range(depth + 1):
        resumed = backbone.resume_from("image", k, out[f"block_{k}"], mask=mask)
        for name, value in resumed.items():
            found |= _near(f"image/{name} resumed at block {k}", value, out[name], EXACT)
    found |= _check_prompts(
        backbone,
        "image",
        entering,
        lambda given, p: backbone.resume_from("image", 0, given, mask=mask, prompts=p),
    )
    if "text/tokens" in backbone.streams:
        ids = backbone.tokenize(CAPTIONS)
        whole, embedded = backbone.encode_texts(ids), backbone.embed_tokens(ids)
        end = backbone.ends(ids)
        again = backbone.encode_embedded(embedded, end)
        if "pooled" in whole:
            found |= _near("embedded = ids, pooled", again["pooled"], whole["pooled"], EXACT)
        states: list[Any] = []
        hooks = [
            block.register_forward_pre_hook(lambda _, args, kept=states: kept.append(args[0]))
            for block in backbone.blocks("text")
        ]
        backbone.encode_embedded(embedded, end)
        for hook in hooks:
            hook.remove()
        for k, entered in enumerate([*states, again["tokens"]]):
            resumed = backbone.resume_from("text", k, entered, end=end)
            for name, value in resumed.items():
                found |= _near(f"text/{name} resumed at block {k}", value, again[name], EXACT)
        room = backbone.spec.dims["context"] - 2
        cut, last = embedded[:, :room], end.clamp(max=min(room, embedded.shape[1]) - 1)
        found |= _check_prompts(
            backbone, "text", cut, lambda given, p: backbone.encode_embedded(given, last, prompts=p)
        )
    return found


def _check_branches(backbone: Any) -> dict[str, float]:
    """What is added behind the end of a block's last branch is added to what the block returns: adapters fit there."""
    import torch

    found: dict[str, float] = {}
    for side, depth in backbone.depth.items():
        width = backbone.spec.dims[f"{side}_width"]
        branches = backbone.branches(side)
        _must(len(branches) == depth, f"branches: {len(branches)} of {depth} {side} blocks")
        moved = torch.linspace(-1, 1, width, device=backbone.device)
        seen: dict[str, Any] = {}
        last, branch = backbone.blocks(side)[-1], branches[-1].feed_forward

        def told(_module: Any, _args: Any, out: Any, seen: dict[str, Any] = seen) -> None:
            seen["out"] = out[0] if isinstance(out, tuple) else out

        def entered(_module: Any, args: Any, seen: dict[str, Any] = seen) -> None:
            seen["stream"] = args[0]

        hooks = [
            last.register_forward_hook(told),
            branch.norm.register_forward_pre_hook(entered),
        ]
        _run_side(backbone, side)
        plain = dict(seen)
        hooks.append(branch.end.register_forward_hook(_adds(moved)))
        _run_side(backbone, side)
        for hook in hooks:
            hook.remove()
        name = f"{side} block under an addition to its last branch"
        found |= _near(name, seen["out"], plain["out"] + moved, BATCH_TOLERANCE)
        found |= _near(f"{side} stream into that branch", seen["stream"], plain["stream"], EXACT)
    return found


def _run_side(backbone: Any, side: str) -> None:
    if side == "image":
        backbone.encode_images(_sample_pixels(backbone))
    else:
        backbone.encode_texts(backbone.tokenize(CAPTIONS))


def _adds(moved: Any) -> Callable[..., Any]:
    def hook(_module: Any, _args: Any, out: Any) -> Any:
        first, *rest = out if isinstance(out, tuple) else (out,)
        return (first + moved, *rest) if rest else first + moved

    return hook


def _check_prompts(
    backbone: Any, side: str, states: Any, run: Callable[[Any, Any], dict[str, Any]]
) -> dict[str, float]:
    """Prompts change what comes out, keep its shape, and get a gradient; nothing frozen does."""
    import torch

    depth, width = min(2, backbone.depth[side]), states.shape[-1]
    name = "patches" if side == "image" else "tokens"
    with torch.enable_grad():
        prompts = torch.randn(depth, 2, width, device=states.device).requires_grad_()
        last = run(states, prompts)[name]
        last.float().pow(3).mean().backward()
    grad = prompts.grad
    if grad is None:
        raise NonConformance(f"{side} prompts get no gradient")
    _must(bool((grad.abs().sum((1, 2)) > 0).all()), f"{side} prompts of one block get no gradient")
    touched = [n for n, p in backbone.model.named_parameters() if p.grad is not None]
    _must(not touched, f"{side} prompts: a gradient reached the frozen {touched[:1]}")
    other = run(states, prompts.detach() + 1)[name]
    _must(last.shape == other.shape == states.shape[:1] + last.shape[1:], f"{side} prompts: shape")
    _must(not torch.equal(last, other), f"{side} prompts change nothing")
    rows = states.shape[1] - (last.shape[1] if side == "image" else 0)
    expected = backbone.spec.dims.get("prefix", 0)
    _must(rows == expected or side == "text", f"{side} prompts are not taken out again")
    again = run(states, prompts.detach())[name]
    found = _near(f"{side} prompted, with and without gradients", again, last, BATCH_TOLERANCE)
    return found | _check_prompt_functions(backbone, side, states, prompts.detach(), run)


def _check_prompt_functions(
    backbone: Any,
    side: str,
    states: Any,
    prompts: Any,
    run: Callable[[Any, Any], dict[str, Any]],
) -> dict[str, float]:
    """Prompts made by a function are those of a tensor; it sees the states alone, once a block, with their gradient."""
    import torch

    depth, name = len(prompts), "patches" if side == "image" else "tokens"
    seen: list[Any] = []
    entered: list[Any] = []

    def made(j: int, given: Any) -> Any:
        _must(j == len(seen), f"{side} prompts: asked for block {j} after {len(seen)} blocks")
        seen.append(given)
        return prompts[j].expand(len(given), -1, -1) if j < depth else None

    hooks = [
        block.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        for block in backbone.blocks(side)[:depth]
    ]
    got = run(states, made)[name]
    for hook in hooks:
        hook.remove()
    key = f"{side} prompts by a function = by a tensor"
    found = _near(key, got, run(states, prompts)[name], EXACT)
    _must(
        all(one.shape == states.shape for one in seen),
        f"{side} prompts: a function is shown {[tuple(one.shape) for one in seen]} instead of the states without "
        f"prompts, {tuple(states.shape)}",
    )
    found |= _near(f"{side} states shown before block 0", seen[0], states, EXACT)
    m = prompts.shape[1]
    for j in range(1, depth):  # behind which rows the prompts stand is the tower's own affair
        whole = entered[j]
        rows = prompts[j].expand(len(whole), -1, -1)
        at = next(
            (i for i in range(whole.shape[1] - m + 1) if torch.equal(whole[:, i : i + m], rows)),
            None,
        )
        if at is None:
            raise NonConformance(f"{side} prompts are not among the rows that enter block {j}")
        bare = torch.cat([whole[:, :at], whole[:, at + m :]], 1)
        found |= _near(f"{side} states shown before block {j}", seen[j], bare, EXACT)

    slopes = [_slope(states, prompts, lambda g, p: run(g, p)[name], kept) for kept in (True, False)]
    _must(
        not torch.equal(*slopes),
        f"{side} prompts: no gradient passes through the states that a function is shown",
    )
    return found


def _slope(states: Any, prompts: Any, run: Callable[[Any, Any], Any], kept: bool) -> Any:
    """How what comes out moves with `states`; through those shown before the last prompts too, if that is kept."""
    import torch

    depth = len(prompts)
    with torch.enable_grad():
        given = states.detach().clone().requires_grad_()

        def made(j: int, shown: Any) -> Any:
            if j >= depth:
                return None
            shown = shown if kept or j < depth - 1 else shown.detach()
            return prompts[j] + shown.mean(1, keepdim=True)

        run(given, made).float().pow(3).mean().backward()
        return given.grad


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
        listed = {split: task.candidates(split) for split in task.pairs}
        among = {split: set(pairs) for split, pairs in listed.items()}
        for example in task.examples:
            pair, split = (example.attr, example.obj), example.split
            known = pair in among.get(split, ())
            _must(known, f"czsl {example.image!r}: {pair} is no candidate of {split}")
        for pairs in listed.values():
            for pair in pairs:
                _must(task.prompts.get(pair) in texts, f"czsl: no text for the prompt of {pair}")
        unknown = set(task.prompts.values()) - texts
        _must(not unknown, f"czsl: prompt id {next(iter(unknown), None)!r} is no text")
    for kind, examples, n in (("matching", tasks.matching, 1), ("two_by_two", tasks.two_by_two, 2)):
        uses += [(f"{kind} {e.id!r}", e.images, e.captions, e.split) for e in examples]
        for e in examples:
            _must(len(e.images) == n, f"{kind} {e.id!r}: {len(e.images)} images, not {n}")
    uses += [(f"retrieval {e.image!r}", (e.image,), e.captions, e.split) for e in tasks.retrieval]
    uses += [
        (f"composed {e.id!r}", (e.reference, *e.targets, *e.subset), e.modifications, e.split)
        for e in tasks.composed
    ]
    _check_ids("triplet", [e.id for e in tasks.triplets])
    for e in tasks.triplets:
        uses.append(
            (f"triplet {e.id!r}", (e.image,), (e.reference, e.modification, e.target), e.split)
        )
        _must(e.split != "test", f"triplet {e.id!r}: of split test, and triplets are trained on")
    for name, gallery in tasks.galleries.items():
        _check_ids(f"gallery {name!r}", gallery.images)
        uses.append((f"gallery {name!r}", gallery.images, (), SPLITS[0]))
    members = {name: set(gallery.images) for name, gallery in tasks.galleries.items()}
    for e in tasks.composed:
        place = f"composed {e.id!r}"
        _must(bool(e.gallery or e.subset), f"{place}: neither a gallery nor a subset to rank")
        _must(not e.gallery or e.gallery in members, f"{place}: no gallery {e.gallery!r}")
        within = members[e.gallery] if e.gallery else set(e.subset)
        _must(set(e.targets) <= within, f"{place}: a target is no candidate")
        _must(bool(e.modifications), f"{place}: no modification")
    for place, image_ids, text_ids, split in uses:
        _must(split in SPLITS, f"{place}: split {split!r} is not one of {', '.join(SPLITS)}")
        for one in image_ids:
            _must(one in images, f"{place}: image {one!r} is not in the data set")
        for one in text_ids:
            _must(one in texts, f"{place}: text {one!r} is not in the data set")
