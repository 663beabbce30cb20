"""Every method on every family: it works, or its refusal names the stream and the command that adds it, which helps.

`EXPECTED` is what must happen on a cache with the streams that `headstart build` writes unless told otherwise:

    yes       it trains a step and scores
    adds X    it is refused for want of X, with a command; that command run, it works
    no X      it is refused for want of X, which this backbone cannot make; the refusal says what else to choose
"""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kinds import KINDS, directory
from PIL import Image

from cache_builder import FeatureCache, build, load_backbone, load_dataset
from eval import score_io
from eval.composition import CompositionScores
from eval.retrieval import RetrievalScores
from heads import load_method
from heads.cli import main
from heads.errors import MissingStream
from heads.runs import score_run, train_run
from heads.source import Source, context_of
from heads.sweep_grid import trained_by
from heads.tasks import load_task

BACKBONES = ("clip", "siglip2", "siglip2-naflex", "pe", "llava")
SMALL: dict[str, Any] = {"layers": 2, "dim": 16, "heads": 2, "ffn": 16}
SLOTS: dict[str, Any] = {"n_local": 2, "n_global": 1}
EXPERTS: dict[str, Any] = {"rank": 2, "n_experts": 3}
CLIP_WORDS = {**SLOTS, "words": "clip_text"}

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "`zero_shot`": ("zero_shot", {}),
    "`linear_probe`": ("linear_probe", {}),
    "`tf_local`": ("tf_local", SMALL),
    "`tf_local`, `variant=late_maxsim`": ("tf_local", {**SMALL, "variant": "late_maxsim"}),
    "`tf_local`, `variant=global`": ("tf_local", {**SMALL, "variant": "global"}),
    "`tf_local`, `residual_global=true`": ("tf_local", {**SMALL, "residual_global": True}),
    "`sgi`": ("sgi", {}),
    "`csp`": ("csp", {}),
    "`simfp`": ("simfp", {}),
    "`branch_blocks`": ("branch_blocks", {}),
    "`eva_head`": ("eva_head", {}),
    "`eva_head`, `base=csp`": ("eva_head", {"base": "csp"}),
    "`eva`": ("eva", EXPERTS),
    "`eva`, `cut=1`": ("eva", {**EXPERTS, "cut": 1}),
    "`finetune`": ("finetune", {}),
    "`trident`": ("trident", SLOTS),
    "`trident`, `words=clip_text`": ("trident", CLIP_WORDS),
    "… and `global_stream=pooled`": ("trident", {**CLIP_WORDS, "global_stream": "pooled"}),
}
POOLED = ("yes", "yes", "yes", "yes", "no image/pooled")
ADDS = "adds image/pixels"
PIXELS = (ADDS, ADDS, "no image/pixels", ADDS, "no image/pixels")
EXPECTED: dict[str, tuple[str, ...]] = {
    "`zero_shot`": POOLED,
    "`linear_probe`": POOLED,
    "`tf_local`": ("yes",) * 5,
    "`tf_local`, `variant=late_maxsim`": ("yes",) * 5,
    "`tf_local`, `variant=global`": POOLED,
    "`tf_local`, `residual_global=true`": POOLED,
    "`sgi`": ("adds crop/pooled",) * 4 + ("no text/pooled",),
    "`csp`": POOLED,
    "`simfp`": POOLED,
    "`branch_blocks`": POOLED,
    "`eva_head`": POOLED,
    "`eva_head`, `base=csp`": POOLED,
    "`eva`": PIXELS,
    "`eva`, `cut=1`": (*("adds image/block_1",) * 4, "no image/block"),
    "`finetune`": PIXELS,
    "`trident`": ("no word/states", *("no image/prefix",) * 3, "yes"),
    "`trident`, `words=clip_text`": (*("adds words", *("no image/prefix",) * 3, "no text/pooled"),),
    "… and `global_stream=pooled`": (*("adds words",) * 4, "no image/pooled"),
}
COMPOSED = {"inversion", "mota"}
"""Methods of composed retrieval: their own table (test_heads_methods_composed.py)."""

CELLS = [(m, b) for m, row in EXPECTED.items() for b, _ in zip(BACKBONES, row, strict=True)]


@pytest.fixture(scope="module")
def photos(fast_folder: Path) -> dict[str, Path]:
    """A few pictures in three shapes: two attrs × two objs, or a caption each."""
    rng, roots = np.random.default_rng(0), {}
    for kind in ("czsl", "retrieval"):
        root = roots[kind] = fast_folder / f"matrix-{kind}"
        (root / "images").mkdir(parents=True)
        lines = ["image,attr,obj,split" if kind == "czsl" else "image,caption,split"]
        for i in range(10 if kind == "czsl" else 4):
            shape = [(40, 60), (64, 64), (30, 120)][i % 3]
            pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"images/{i}.png")
            attr, obj = ["red", "blue"][i % 2], ["cup", "hat"][i // 2 % 2]
            text = f"{attr},{obj}" if kind == "czsl" else f"a {attr} {obj} on table {i}"
            lines.append(
                f"{i}.png,{text},{[*('val', 'test') * (1 + (kind == 'czsl')), *['train'] * 6][i]}"
            )
        (root / "data.csv").write_text("\n".join(lines))
    return roots


Made = Callable[..., FeatureCache]


@pytest.fixture(scope="module")
def made(photos: dict[str, Path], fast_folder: Path) -> Made:
    """The cache of a kind of backbone, by task and streams; made once."""
    found: dict[Any, FeatureCache] = {}

    def make(kind: str, task: str, streams: tuple[str, ...] | None = None) -> FeatureCache:
        key = (kind, task, streams)
        if key not in found:
            name = f"{KINDS[kind].family}:{directory(kind)}"
            path = fast_folder / f"matrix-{len(found)}.zarr"
            found[key] = build(
                load_dataset("folder", photos[task]), load_backbone(name), path,
                streams=streams, backbone_name=name, progress=False,
            )  # fmt: skip
        return found[key]

    return make


def attempt(cache: FeatureCache, method: str, config: dict[str, Any], out: Path) -> None:
    """Train a step and score the test split; every score must be finite."""
    task = "retrieval" if method == "sgi" else "czsl"
    settings = {"head": config, "train": {"steps": 1}}
    if trained_by(method, config) != "gradient":
        settings["train"] = {}
    train_run(cache, method, out, task=task, settings=settings, progress=False)
    for path in score_run(out, split="test", cache=cache):
        table = score_io.load(path)
        assert isinstance(table, CompositionScores | RetrievalScores)
        assert np.isfinite(table.scores).all()


def obeyed(refusal: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> FeatureCache:
    """The cache that the command at the end of a refusal makes."""
    (command,) = re.findall(r"headstart (build .*)$", refusal)
    words = shlex.split(command)
    monkeypatch.chdir(folder)
    assert main(words) == 0
    return FeatureCache.open(folder / words[words.index("--out") + 1])


@pytest.mark.parametrize(("method", "kind"), CELLS)
def test_a_method_works_or_says_what_it_lacks_and_how_to_get_it(
    made: Made, method: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, config = METHODS[method]
    cache = made(kind, "retrieval" if name == "sgi" else "czsl")
    verdict, _, what = EXPECTED[method][BACKBONES.index(kind)].partition(" ")
    if verdict == "yes":
        attempt(cache, name, config, tmp_path / "run")
        return
    with pytest.raises(MissingStream) as caught:
        attempt(cache, name, config, tmp_path / "run")
    refusal = str(caught.value)
    assert not (tmp_path / "run").exists()
    assert re.search(rf"(reads|lacks) .*{what}", refusal)
    if verdict == "no":
        assert "headstart build" not in refusal  # no command would help
        assert re.search(r"choose|another backbone", refusal)
        return
    assert verdict == "adds"
    better = obeyed(refusal, tmp_path, monkeypatch)
    attempt(better, name, config, tmp_path / "run")


BARE = {
    "pooled": ("image/pooled", "text/pooled"),
    "tokens": ("image/patches", "text/tokens"),
}


@pytest.mark.parametrize(("kind", "bare"), [("clip", "pooled"), ("pe", "tokens")])
def test_a_cache_with_too_few_streams_is_told_the_command_that_adds_them(
    made: Made, kind: str, bare: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, refused, commands = made(kind, "czsl", BARE[bare]), set(), {}
    for method, (name, config) in METHODS.items():
        if EXPECTED[method][BACKBONES.index(kind)] != "yes":
            continue
        try:
            attempt(cache, name, config, tmp_path / method)
            continue
        except MissingStream as error:
            refusal = str(error)
        command = refusal[refusal.index("headstart build") :]
        if command not in commands:
            (folder := tmp_path / f"built{len(commands)}").mkdir()
            commands[command] = obeyed(refusal, folder, monkeypatch)
        attempt(commands[command], name, config, tmp_path / method)
        refused.add(method)
    with_pooled = {"`zero_shot`", "`linear_probe`", "`csp`", "`tf_local`, `variant=global`"}
    with_pooled |= {"`eva_head`", "`eva_head`, `base=csp`"}
    with_tokens = {"`tf_local`", "`tf_local`, `variant=late_maxsim`"}
    yes = {m for m in METHODS if EXPECTED[m][BACKBONES.index(kind)] == "yes"}
    assert refused == yes - (with_pooled if bare == "pooled" else with_tokens)


@pytest.mark.parametrize("kind", ["clip", "siglip2", "siglip2-naflex", "pe", "pe-bare"])
def test_rows_become_the_pooled_image_by_the_backbones_own_pooling_and_not_by_row_0(
    made: Made, kind: str
) -> None:
    """A branch without blocks and residual leads to `image/pooled`; on an attention pool, row 0 alone would not."""
    cache = made(kind, "czsl")
    module = load_method("branch_blocks")
    head = module.Head(module.Config(branches=(), residual=False), context_of(cache)).eval()
    data: Any = load_task(cache, "czsl", "test")
    queries = Source(cache, head.needs(head.config), data.images, data.prompts).images(data.images)
    mask, rows = queries.streams.get("image/mask"), queries["image/patches"]
    if "image/prefix" in queries.streams:
        rows = torch.cat([queries["image/prefix"], rows], 1)
    want = torch.from_numpy(cache.read("image/pooled", data.images).astype(np.float32))
    with torch.no_grad():
        for branch in head.branches.values():
            got = head.readout.image(branch.row(head.readout, rows, mask))
            assert torch.nn.functional.cosine_similarity(got, want).min() > 0.999
        assert head.readout.pools_all_rows() == (kind != "clip")
        noise = torch.randn_like(rows)
        branch = head.branches["pair"]
        one, all_rows = (branch.row(head.readout, x) for x in (noise[:, :1], noise))
        assert torch.allclose(one, all_rows, atol=1e-3) == (kind == "clip")


def test_the_table_in_the_documentation_is_the_expected_one() -> None:
    root = Path(__file__).parent.parent
    page = root / "docs/methods.md"
    assert list(METHODS) == list(EXPECTED)
    assert {name for name, _ in METHODS.values()} | COMPOSED == {
        p.stem for p in (root / "heads/methods").glob("[a-z]*.py")
    }
    table = "\n".join(f"| {m} | {' | '.join(row)} |" for m, row in EXPECTED.items())
    assert table in page.read_text(), f"the table of methods and backbones should be\n{table}"
