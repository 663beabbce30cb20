"""finetune: zero_shot or csp at its start, merged equal to attached, peft's LoRA where that fits, Troika's mode."""

from pathlib import Path
from typing import Any

import kinds
import open_clip
import peft
import pytest
import torch
from drawn import LIVE_FAMILIES
from torch import Tensor, nn
from torch.nn import functional as F

from cache_builder import load_backbone
from cache_builder.backbones.checkpoints import CheckpointError
from heads import load_method, losses, testing
from heads.base import Context
from heads.blocks.lora import LINEAR, QUERY_VALUE, LoRA, under
from heads.checkpoint import save
from heads.cli import main
from heads.errors import ConfigError
from heads.features import Batch, Features
from heads.live import LiveBackbone, write_backbone
from heads.methods import csp, finetune
from heads.miniature import small_features
from heads.strings import STREAM, pack

B = 4
SAID = ["a red cup", "a wet dog on a mat", "cup", "two old dogs and a cup"]
KINDS: list[dict[str, Any]] = [
    {"kind": "full"},
    {"kind": "lora"},
    {"kind": "lora", "targets": "linear", "rank": 3, "alpha": 6.0, "towers": ("text",)},
    {"kind": "bottleneck", "width": 12},
    {"kind": "bottleneck", "width": 3, "towers": ("image",), "blocks": 1},
]

families = pytest.mark.parametrize("family", LIVE_FAMILIES)
every = pytest.mark.parametrize("config", KINDS)


@pytest.fixture
def context(family: str, contexts: dict[str, Context]) -> Context:
    return contexts[family]


def head_of(context: Context, **config: Any) -> finetune.Head:
    torch.manual_seed(0)
    return finetune.Head(finetune.Config(**config), context)


def moved(head: finetune.Head) -> finetune.Head:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    return head


def pixels(context: Context) -> Tensor:
    return small_features(B, 3, frozenset({"image/pixels"}), context)["image/pixels"]


def batch_of(context: Context) -> Batch:
    """Four images with a caption each, and a hard negative for each."""
    none = torch.zeros(B, 2 * B, dtype=torch.bool)
    said = pack([*SAID, *(f"{text} not" for text in SAID)])
    target = torch.arange(B)
    return Batch(
        Features({"image/pixels": pixels(context)}),
        Features({STREAM: said}),
        target,
        none,
        (target + B)[:, None],
    )


@families
@every
@torch.no_grad()
def test_at_its_start_it_scores_as_the_frozen_backbone(
    context: Context, config: dict[str, Any]
) -> None:
    head = head_of(context, **config).eval()
    backbone = LiveBackbone(context, "test").on("cpu")
    image = backbone.encode_images(backbone.normalised(pixels(context)))["pooled"]
    text = backbone.encode_texts(backbone.tokenize(SAID))["pooled"]
    want = head.readout.scale() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    got = head(Features({"image/pixels": pixels(context)}), Features({STREAM: pack(SAID)}))
    assert torch.allclose(got, want + head.readout.bias(), atol=2e-5)


@families
@torch.no_grad()
def test_with_soft_prompts_it_starts_as_csp(context: Context) -> None:
    labels = {"attr": torch.tensor([0, 1, 2]), "obj": torch.tensor([1, 0, 1])}
    head = head_of(context, kind="lora", prompts="soft", learn_context=True).eval()
    plain = csp.Head(csp.Config(learn_context=True), context).eval()
    got, want = (h.embed_candidates(Features({}, labels)) for h in (head, plain))
    assert torch.allclose(got, want, atol=1e-6)


@families
@every
def test_it_keeps_the_promises_of_a_head(context: Context, config: dict[str, Any]) -> None:
    testing.check_head(load_method("finetune"), finetune.Config(**config), context)


def test_soft_prompts_keep_them_too(contexts: dict[str, Context]) -> None:
    config = finetune.Config(kind="bottleneck", width=3, prompts="soft", learn_context=True)
    testing.check_head(load_method("finetune"), config, contexts["clip"])


@families
@every
def test_the_loss_is_contrastive_with_hard_negatives(
    context: Context, config: dict[str, Any]
) -> None:
    head, batch = moved(head_of(context, **config)).eval(), batch_of(context)
    loss, _ = head.loss(batch)
    scores = head(batch.queries, batch.candidates)
    rows = torch.stack([-scores[i].log_softmax(0)[i] for i in range(B)]).mean()
    columns = torch.stack([-scores[:, i].log_softmax(0)[i] for i in range(B)]).mean()
    assert torch.allclose(loss, (rows + columns) / 2, atol=1e-5)
    assert torch.equal(loss, losses.contrastive(scores, batch)[0])


@families
@pytest.mark.parametrize("config", KINDS[:3])
@torch.no_grad()
def test_weights_merged_into_the_model_score_as_attached(
    context: Context, config: dict[str, Any]
) -> None:
    head = moved(head_of(context, **config)).eval()
    live = LiveBackbone(context, "test")
    backbone = live._load("cpu")  # one of its own, that may be changed
    levels = pixels(context)
    want = head.images.images(levels), head.texts.texts(backbone.tokenize(SAID), levels.device)
    for trained in head.trained.values():
        for name, value in trained.weights(backbone.model).items():
            backbone.model.get_parameter(name).data.copy_(value)
    got = (
        backbone.encode_images(backbone.normalised(levels))["pooled"],
        backbone.encode_texts(backbone.tokenize(SAID))["pooled"],
    )
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=2e-5)


@families
def test_images_and_texts_in_parts_are_the_same_step(context: Context) -> None:
    found = []
    for chunks in ({}, {"chunk": 3, "image_chunk": 2}):
        head = moved(head_of(context, kind="bottleneck", width=3, adapter_dropout=0.0, **chunks))
        loss, _ = head.loss(batch_of(context))
        loss.backward()
        found.append((loss.detach(), [p.grad for p in head.parameters()]))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert a is not None
        assert b is not None
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-3)


def test_the_train_mode_of_troika(contexts: dict[str, Context]) -> None:
    """Evaluation before training counts as nothing; the first one behind it ends dropout for good, also when saved."""
    head = head_of(contexts["clip"], kind="bottleneck", width=3, parity_train_mode=True)
    head.eval()
    assert head.train().training
    assert head.train().training
    head.eval()
    assert not head.train().training
    other = head_of(contexts["clip"], kind="bottleneck", width=3, parity_train_mode=True)
    other.load_state_dict(head.state_dict())
    assert not other.train().training
    usual = head_of(contexts["clip"], kind="bottleneck", width=3)
    usual.train().eval()
    assert usual.train().training


def test_soft_prompts_need_labels(contexts: dict[str, Context]) -> None:
    head = head_of(contexts["clip"], kind="lora", prompts="soft")
    with pytest.raises(ConfigError, match="only czsl has"):
        head.embed_candidates(Features({STREAM: pack(SAID)}))


def test_more_blocks_than_the_tower_has(contexts: dict[str, Context]) -> None:
    with pytest.raises(ConfigError, match=r"head\.blocks is 5, but the image tower"):
        head_of(contexts["clip"], kind="bottleneck", blocks=5)


def test_a_tower_is_trained_once() -> None:
    both: list[Any] = [(), ("text", "text")]
    for towers in both:
        with pytest.raises(ValueError, match="image, text or both"):
            finetune.Config(towers=towers)


def matrices(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.ndim == 2]


@pytest.mark.parametrize(
    ("kind", "targets", "of_peft"),
    [
        ("siglip2-hub", QUERY_VALUE, r".*layers\.\d+\.self_attn\.(q|v)_proj"),
        ("siglip2", LINEAR, r".*blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc\d)"),
    ],
)
def test_it_is_peft_s_lora_where_that_fits(kind: str, targets: str, of_peft: str) -> None:
    """The same updates in both: the same pooled images, and gradients of the updates."""
    model, other = kinds.load(kind, kinds.directory(kind)), kinds.load(kind, kinds.directory(kind))
    side = model.tower("image")
    prefix = next(n for n, m in model.model.named_modules() if m is side)
    names = [name for name in matrices(model.model) if name.startswith(prefix)]
    lora = LoRA(model.model, names, rank=2, alpha=3.0, targets=targets)
    for up in lora.up:
        nn.init.normal_(up, std=0.1)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=of_peft, lora_dropout=0.0)
    peft.inject_adapter_in_model(config, other.tower("image"))
    theirs = dict(other.model.named_parameters())
    placed: list[tuple[str, int]] = []
    for i, name in enumerate(lora.names):
        stem = name.removesuffix(".weight")
        for part, value in (("A", lora.down[i]), ("B", lora.up[i])):
            theirs[f"{stem}.lora_{part}.default.weight"].data.copy_(value.data)
        placed.append((stem, i))
    assert sum("lora_A" in name for name in theirs) == len(placed) > 0

    def pooled(backbone: Any) -> Tensor:
        states, mask = backbone.embed_pixels(kinds.stacked(backbone))
        return backbone.resume_from("image", 0, states, mask=mask)["pooled"]

    with under(model.model, lora.weights(model.model)):
        ours = pooled(model)
    want = pooled(other)
    assert torch.allclose(ours, want, atol=1e-5)
    ours.pow(2).sum().backward()
    want.pow(2).sum().backward()
    for stem, i in placed:
        for part, value in (("A", lora.down[i]), ("B", lora.up[i])):
            grad = theirs[f"{stem}.lora_{part}.default.weight"].grad
            assert value.grad is not None
            assert torch.allclose(value.grad, grad, atol=1e-3, rtol=1e-3), stem


@pytest.fixture(scope="module")
def large() -> nn.Module:
    """ViT-L/14 without its numbers."""
    with torch.device("meta"):
        return open_clip.create_model("ViT-L-14", load_weights=False, device="meta")


def test_parameters_at_vit_l(large: nn.Module) -> None:
    lora = LoRA(large, matrices(large), rank=16, targets=QUERY_VALUE)
    assert sum(p.numel() for p in lora.parameters()) == 24 * 65_536 + 12 * 49_152 == 2_162_688
    assert all(name.endswith("in_proj_weight") for name in lora.names)


def test_q_and_v_alone_are_updated_where_they_are_fused_with_k() -> None:
    model = kinds.model("clip")
    lora = LoRA(model.model, matrices(model.model), rank=2, targets=QUERY_VALUE)
    for up in lora.up:
        nn.init.normal_(up)
    for name, value in lora.weights(model.model).items():
        before, third = model.model.get_parameter(name), len(value) // 3
        changed = [bool((value != before)[i : i + third].any()) for i in (0, third, 2 * third)]
        assert changed == [True, False, True], name


@families
@pytest.mark.parametrize("config", KINDS[:3])
def test_a_merged_run_is_a_backbone(
    context: Context, config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line: what is written loads as any checkpoint, and pools as the adapted towers do."""
    head = moved(head_of(context, **config)).eval()
    save(head, tmp_path / "run")
    out = tmp_path / "merged"
    assert main(["merge", str(tmp_path / "run"), "--out", str(out)]) == 0
    family = context.backbone_name.partition(":")[0]
    assert f"--backbone {family}:{out}" in capsys.readouterr().out
    merged: Any = load_backbone(f"{family}:{out}")
    levels = pixels(context)
    with torch.no_grad():
        want = head.images.images(levels), head.texts.texts(merged.tokenize(SAID), levels.device)
        scale = head._scale().log()
    got = (
        merged.encode_images(merged.normalised(levels))["pooled"],
        merged.encode_texts(merged.tokenize(SAID))["pooled"],
    )
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, atol=2e-5)
    assert torch.allclose(merged.readout()["logit_scale"], scale, atol=1e-6)
    assert main(["merge", str(tmp_path / "run"), "--out", str(out)]) == 1
    assert "already exists" in capsys.readouterr().err


def test_what_cannot_be_merged_says_why(
    contexts: dict[str, Context], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(head_of(contexts["clip"], kind="bottleneck"), tmp_path / "run")
    out = ["--out", str(tmp_path / "merged")]
    assert main(["merge", str(tmp_path / "run"), *out]) == 1
    assert "cannot be merged into weights" in capsys.readouterr().err
    save(csp.Head(csp.Config(), contexts["clip"]), tmp_path / "csp")
    assert main(["merge", str(tmp_path / "csp"), *out]) == 1
    assert "csp trains no weights of a backbone" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="is no directory"):
        write_backbone("clip:ViT-B-32/openai", {}, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
