"""heads/live.py: the cache's own backbone inside the graph, frozen, shared, never the head's; or a clear refusal."""

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from drawn import drawn, make_live
from safetensors.torch import load_file, save_file

from cache_builder import FeatureCache, build
from cache_builder.backbones import clip, llava
from heads import cli, miniature, testing
from heads.base import Context, Needs
from heads.checkpoint import check_cache, load, save
from heads.errors import CheckpointMismatch, ConfigError, MissingStream
from heads.live import LiveBackbone
from heads.methods import csp
from heads.runs import score_run, train_run
from heads.source import context_of

FAMILIES = ("clip", "siglip2", "pe")


@pytest.fixture(scope="module", params=FAMILIES)
def cache(request: pytest.FixtureRequest, fast_folder: Path) -> FeatureCache:
    folder = fast_folder / f"live-{request.param}"
    folder.mkdir(exist_ok=True)
    return make_live(folder, request.param)


@pytest.fixture(scope="module")
def clip_cache(fast_folder: Path) -> FeatureCache:
    folder = fast_folder / "live-only-clip"
    folder.mkdir()
    return make_live(folder, "clip")


def elsewhere(cache: FeatureCache, folder: Path) -> Path:
    """A copy of the files of the cache's backbone."""
    _, _, source = cache.header.backbone_name.partition(":")
    return Path(shutil.copytree(source, folder / "copy"))


def head_of(cache: FeatureCache, backbone: str | None = None) -> csp.Head:
    return csp.Head(csp.Config(), context_of(cache, backbone))


def test_the_live_tower_is_the_one_that_filled_the_cache(cache: FeatureCache) -> None:
    live = LiveBackbone(context_of(cache), "test")
    backbone = live.on("cpu")
    ids = backbone.tokenize(cache.texts)
    got = live.encode(backbone.embed_tokens(ids), backbone.ends(ids))
    stored = torch.from_numpy(cache.read("text/pooled")).float()  # fp16 on disk
    assert torch.allclose(got, stored, rtol=2e-3, atol=2e-3)
    assert backbone.spec.weights == cache.spec.backbone.weights


def test_gradients_pass_through_the_tower_and_none_stay_in_it(cache: FeatureCache) -> None:
    live = LiveBackbone(context_of(cache), "test")
    backbone = live.on("cpu")
    ids = backbone.tokenize(["a photo of red cup", "a photo of blue toy"])
    embedded = backbone.embed_tokens(ids).requires_grad_()
    live.encode(embedded, backbone.ends(ids)).square().sum().backward()
    assert embedded.grad is not None
    assert bool((embedded.grad[:, 2] != 0).any())
    tower = backbone.tower("text")
    assert not tower.training
    assert all(not p.requires_grad and p.grad is None for p in tower.parameters())


def test_the_backbone_is_no_part_of_the_head(cache: FeatureCache, tmp_path: Path) -> None:
    head = head_of(cache)
    assert list(head.state_dict()) == ["prompts.primitives"]
    assert head.n_trained() == (3 + 5) * cache.spec.backbone.dims["text_width"]
    save(head, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {name for name in saved if not name.startswith("readout/")} == {
        "head/prompts.primitives"
    }
    stored = json.loads((tmp_path / "config.json").read_text())["context"]
    assert stored["backbone"]["weights"] == cache.spec.backbone.weights
    assert stored["backbone_name"] == cache.header.backbone_name


def test_heads_of_a_process_share_one_copy(clip_cache: FeatureCache) -> None:
    one, two = head_of(clip_cache), head_of(clip_cache)
    assert one.prompts.live.on("cpu") is two.prompts.live.on("cpu")
    assert copy.deepcopy(one).prompts.live.on("cpu") is one.prompts.live.on("cpu")


def test_loading_leaves_the_seed_alone(clip_cache: FeatureCache, tmp_path: Path) -> None:
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    backbone = LiveBackbone(context_of(clip_cache), "test")._load("cpu")
    assert torch.equal(torch.rand(4), want)
    assert backbone.device == "cpu"


def test_a_tower_first_loaded_while_scoring_serves_training_too(clip_cache: FeatureCache) -> None:
    live = LiveBackbone(context_of(clip_cache), "test")
    with torch.inference_mode():
        backbone = live._load("cpu")
    assert not any(p.is_inference() for p in backbone.tower("text").parameters())


def test_the_tower_computes_in_the_type_of_the_run(clip_cache: FeatureCache) -> None:
    live = LiveBackbone(context_of(clip_cache), "test")
    backbone = live.on("cpu")
    ids = backbone.tokenize(["a photo of red cup"])
    embedded, end = backbone.embed_tokens(ids), backbone.ends(ids)
    whole = live.encode(embedded, end)
    with torch.autocast("cpu", torch.bfloat16):
        half = live.encode(embedded, end)
    gap = (whole - half).abs().max() / whole.abs().max()
    assert 1e-5 < gap < 0.1
    assert torch.equal(live.encode(embedded, end), whole)  # the shared copy is as it was


def test_other_weights_are_refused_by_name(clip_cache: FeatureCache, tmp_path: Path) -> None:
    files = elsewhere(clip_cache, tmp_path)
    weights = files / "open_clip_model.safetensors"
    tensors = load_file(weights)
    tensors["ln_final.bias"] += 1e-3
    save_file(tensors, weights)
    with pytest.raises(CheckpointMismatch, match=r"another weights: .* instead of .*--backbone"):
        head_of(clip_cache, f"clip:{files}")


def test_another_activation_is_refused_by_name(clip_cache: FeatureCache, tmp_path: Path) -> None:
    files = elsewhere(clip_cache, tmp_path)
    config = files / "open_clip_config.json"
    config.write_text(config.read_text().replace('"quick_gelu": true', '"quick_gelu": false'))
    with pytest.raises(CheckpointMismatch, match=r"another activation: .*GELU"):
        head_of(clip_cache, f"clip:{files}")


def test_another_claim_is_refused_also_while_a_copy_is_shared(clip_cache: FeatureCache) -> None:
    context = context_of(clip_cache)
    held = head_of(clip_cache)
    assert context.backbone is not None
    claim = context.backbone.model_copy(update={"tokenizer": "another one"})
    with pytest.raises(CheckpointMismatch, match=r"another tokenizer: .* instead of another one"):
        csp.Head(csp.Config(), replace(context, backbone=claim))
    assert held.prompts.live.on("cpu").device == "cpu"


def test_a_method_with_a_live_side_imports_no_library_before_it_runs() -> None:
    code = (
        "import sys; from heads import load_method; [load_method(m) for m in ('csp', 'simfp')]\n"
        "assert not {'open_clip', 'transformers', 'timm', 'torchvision'} & set(sys.modules)"
    )
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=120)


def test_a_moved_checkpoint_can_be_pointed_to(
    clip_cache: FeatureCache, fast_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = replace(context_of(clip_cache), backbone_name="clip:/nowhere/tiny")
    with pytest.raises(CheckpointMismatch, match=r"no such directory; .*--backbone FAMILY"):
        csp.Head(csp.Config(), moved)
    name = f"clip:{elsewhere(clip_cache, fast_path)}"
    run = fast_path / "run"
    words = ["train", "csp", "--cache", str(clip_cache.place), "--task", "czsl", "--out", str(run)]
    assert cli.main([*words, "--backbone", name, "--set", "train.steps=1"]) == 0
    assert load(run).context.backbone_name == name
    assert cli.main(["score", str(run), "--backbone", clip_cache.header.backbone_name]) == 0
    assert "wrote" in capsys.readouterr().out
    shutil.rmtree(fast_path / "copy")
    assert load(run, backbone=clip_cache.header.backbone_name).context.backbone_name != name
    assert cli.main(["score", str(run), "--split", "val"]) == 1
    assert "where it is with --backbone" in capsys.readouterr().err


def test_pointing_a_cache_only_method_to_a_backbone_is_refused(
    clip_cache: FeatureCache, fast_path: Path
) -> None:
    name = clip_cache.header.backbone_name
    with pytest.raises(ConfigError, match="zero_shot reads its cache alone"):
        train_run(clip_cache, "zero_shot", fast_path / "run", task="czsl", backbone=name)
    train_run(clip_cache, "zero_shot", fast_path / "run", task="czsl", progress=False)
    with pytest.raises(ConfigError, match="already has its backbone"):
        score_run(fast_path / "run", head=head_of(clip_cache), backbone=name)
    with pytest.raises(ConfigError, match="zero_shot reads its cache alone"):
        score_run(fast_path / "run", cache=clip_cache, backbone=name)


def test_a_cache_of_another_backbone_is_refused(clip_cache: FeatureCache) -> None:
    head = head_of(clip_cache)
    check_cache(head, clip_cache)
    assert head.context.backbone is not None
    other = head.context.backbone.model_copy(update={"weights": "0" * 64})
    head.context = replace(head.context, backbone=other)
    with pytest.raises(CheckpointMismatch, match=r"weights 000000000000.*was made by clip:"):
        check_cache(head, clip_cache)


def test_a_backbone_without_joint_text_space_is_refused(fast_path: Path) -> None:
    with pytest.raises(ConfigError, match="names none; make it with"):
        LiveBackbone(Context({}), "csp")
    spec = llava.tiny().spec
    with pytest.raises(ConfigError, match=r"llava:.* has none \(no joint.*clip, siglip2 or pe"):
        LiveBackbone(Context({}, backbone=spec, backbone_name="llava:demo"), "csp")


def test_training_on_llava_says_why_not(fast_path: Path) -> None:
    options: dict[str, Any] = {"streams": ["image/prefix"], "progress": False}
    cache = build(drawn(), llava.tiny(), fast_path / "llava.zarr", **options)
    with pytest.raises(MissingStream, match="family llava has no joint space"):
        train_run(cache, "csp", fast_path / "run", task="czsl", progress=False)
    assert not (fast_path / "run").exists()


class Undeclared(csp.Head):
    """Runs a backbone and does not say so."""

    @classmethod
    def needs(cls, config: Any) -> Needs:
        return replace(super().needs(config), live=frozenset())


class Trained(csp.Head):
    """Makes the tower its own."""

    def __init__(self, config: csp.Config, context: Context) -> None:
        super().__init__(config, context)
        self.tower = self.prompts.live.on("cpu").tower("text")


@pytest.mark.parametrize(
    ("broken", "promise"),
    [(Undeclared, "declares a live side"), (Trained, "must not be a module of the head")],
)
def test_check_head_sees_a_live_side_that_is_not_as_declared(
    broken: type[csp.Head], promise: str, tmp_path: Path
) -> None:
    method = ModuleType("broken")
    vars(method).update(Head=broken, Config=csp.Config)
    context = miniature.live_context("clip", tmp_path / "clip")
    with pytest.raises(testing.NotConforming, match=promise):
        testing.check_head(method, csp.Config(), context)


def test_the_miniature_of_every_family_loads_again_from_its_files(tmp_path: Path) -> None:
    assert clip.tiny(tmp_path / "a").spec.weights == clip.load(str(tmp_path / "a")).spec.weights
