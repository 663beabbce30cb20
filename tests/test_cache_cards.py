"""The table of `headstart list backbones`: what it says is what `load` gives, and what a cache holds."""

import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import open_clip
import pytest
import torch
from open_clip.pretrained import get_pretrained_cfg
from PIL.Image import new
from torch.utils.data import default_collate

from cache_builder.backbones import clip, llava, pe, siglip2
from cache_builder.backbones.cards import Card
from cache_builder.backbones.checkpoints import CheckpointError
from cache_builder.errors import UnknownName
from cache_builder.plugins import find, names
from heads.cli import main

FAMILIES: dict[str, Any] = {"clip": clip, "llava": llava, "pe": pe, "siglip2": siglip2}
PUBLISHED = [(family, name) for family, module in FAMILIES.items() for name in module.PUBLISHED]


def fixed_resolution(directory: Path) -> Any:
    return siglip2.tiny_hub(directory, naflex=False)


TINY: dict[str, tuple[ModuleType, Callable[[Path], Any]]] = {
    "clip": (clip, clip.tiny),
    "pe": (pe, pe.tiny),
    "siglip2": (siglip2, siglip2.tiny),
    "siglip2 of transformers": (siglip2, fixed_resolution),
    "siglip2 naflex": (siglip2, siglip2.tiny_hub),
    "llava": (llava, llava.tiny),
}


@pytest.mark.parametrize("model", TINY)
def test_a_card_says_what_the_loaded_backbone_says(model: str, tmp_path: Path) -> None:
    family, tiny = TINY[model]
    backbone = tiny(tmp_path / "tiny")
    found = family.card(str(tmp_path / "tiny"))
    assert found == Card(backbone.spec.dims, backbone.depth)


@pytest.mark.parametrize("model", TINY)
def test_a_card_needs_no_weights(model: str, tmp_path: Path) -> None:
    family, tiny = TINY[model]
    tiny(tmp_path / "tiny")
    before = family.card(str(tmp_path / "tiny"))
    for file in (tmp_path / "tiny").glob("*.safetensors"):
        file.unlink()
    assert family.card(str(tmp_path / "tiny")) == before


@pytest.mark.parametrize("model", TINY)
def test_the_bytes_of_a_card_are_those_of_the_streams(model: str, tmp_path: Path) -> None:
    backbone = TINY[model][1](tmp_path / "tiny")
    found = backbone.encode_images(default_collate([backbone.preprocess(new("RGB", (64, 64)))]))
    rows = [found[kind] for kind in ("prefix", "patches") if kind in found]
    held = sum(row.to(torch.float16).nbytes for row in rows)
    assert Card(backbone.spec.dims, backbone.depth).image_bytes == held


def test_llava_s_tower_alone_has_no_text_on_its_card(tmp_path: Path) -> None:
    llava.tiny(tmp_path / "tiny")
    backbone = llava.load(f"{tmp_path / 'tiny'}@vision")
    assert llava.card(f"{tmp_path / 'tiny'}@vision") == Card(backbone.spec.dims, backbone.depth)


REFERENCE = {  # px, N, W, prefix, D, L, V, blocks, KiB: written down from the published architectures, once
    "clip:ViT-B-32/openai": (224, 49, 768, 1, 512, 77, 512, (12, 12), 75),
    "clip:ViT-B-16/laion2b_s34b_b88k": (224, 196, 768, 1, 512, 77, 512, (12, 12), 296),
    "clip:ViT-L-14/openai": (224, 256, 1024, 1, 768, 77, 768, (24, 12), 514),
    "clip:ViT-L-14-336/openai": (336, 576, 1024, 1, 768, 77, 768, (24, 12), 1154),
    "clip:ViT-L-14-quickgelu/metaclip_fullcc": (224, 256, 1024, 1, 768, 77, 768, (24, 12), 514),
    "clip:ViT-H-14-378-quickgelu/dfn5b": (378, 729, 1280, 1, 1024, 77, 1024, (32, 24), 1825),
    "siglip2:ViT-B-32-SigLIP2-256/webli": (256, 64, 768, 0, 768, 64, 768, (12, 12), 96),
    "siglip2:ViT-B-16-SigLIP2-256/webli": (256, 256, 768, 0, 768, 64, 768, (12, 12), 384),
    "siglip2:ViT-L-16-SigLIP2-256/webli": (256, 256, 1024, 0, 1024, 64, 1024, (24, 24), 512),
    "siglip2:ViT-L-16-SigLIP2-384/webli": (384, 576, 1024, 0, 1024, 64, 1024, (24, 24), 1152),
    "siglip2:ViT-SO400M-14-SigLIP2-378/webli": (378, 729, 1152, 0, 1152, 64, 1152, (27, 27), 1640),
    "siglip2:ViT-SO400M-16-SigLIP2-512/webli": (
        (512, 1024, 1152, 0, 1152, 64, 1152, (27, 27), 2304)
    ),
    "siglip2:ViT-gopt-16-SigLIP2-384/webli": (384, 576, 1536, 0, 1536, 64, 1152, (40, 27), 1728),
    "siglip2:google/siglip2-base-patch16-naflex": (None, 256, 768, 0, 768, 64, 768, (12, 12), 384),
    "siglip2:google/siglip2-so400m-patch16-naflex": (
        (None, 256, 1152, 0, 1152, 64, 1152, (27, 27), 576)
    ),
    "pe:PE-Core-T-16-384/meta": (384, 576, 192, 1, 512, 32, 512, (12, 12), 216),
    "pe:PE-Core-S-16-384/meta": (384, 576, 384, 1, 512, 32, 512, (12, 12), 433),
    "pe:PE-Core-B-16/meta": (224, 196, 768, 1, 1024, 32, 1024, (12, 24), 296),
    "pe:PE-Core-L-14-336/meta": (336, 576, 1024, 1, 1024, 32, 1024, (24, 24), 1154),
    "pe:PE-Core-bigG-14-448/meta": (448, 1024, 1536, 0, 1280, 72, 1280, (50, 24), 3072),
    # Its tower has 24 blocks; the last one comes behind the layer that is read.
    "llava:llava-hf/llava-1.5-7b-hf": (336, 576, 1024, 1, None, 128, 4096, (23, 32), 1154),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_a_published_checkpoint_has_the_shapes_on_record(name: str) -> None:
    family, _, checkpoint = name.partition(":")
    found = FAMILIES[family].card(checkpoint)
    dims, depth = found.dims, (found.depth["image"], found.depth["text"])
    patches = dims["patches"] if "patches" in dims else dims["most_patches"]
    keys = ("image_width", "prefix", "joint", "context", "text_width")
    shapes = (dims.get("image_size"), patches, *(dims.get(key) for key in keys), depth)
    assert (*shapes, round(found.image_bytes / 1024)) == REFERENCE[name]
    assert checkpoint in FAMILIES[family].PUBLISHED


@pytest.mark.parametrize(
    ("name", "n_patches", "width", "kib"),
    [
        ("ViT-B-16-SigLIP2/webli", 196, 768, 294),
        ("ViT-B-16-SigLIP2-512/webli", 1024, 768, 1536),
        ("ViT-SO400M-14-SigLIP2/webli", 256, 1152, 576),
        ("ViT-gopt-16-SigLIP2-256/webli", 256, 1536, 768),
    ],
)
def test_a_checkpoint_that_is_not_listed_has_a_card_as_well(
    name: str, n_patches: int, width: int, kib: int
) -> None:
    found = siglip2.card(name)
    assert (found.dims["patches"], found.dims["image_width"]) == (n_patches, width)
    assert found.image_bytes == kib * 1024


@pytest.mark.parametrize(("family", "name"), PUBLISHED)
def test_a_listed_tag_is_one_that_open_clip_has_and_load_takes(family: str, name: str) -> None:
    arch, _, tag = name.partition("/")
    if arch not in open_clip.list_models():
        assert name in (*llava.PUBLISHED, *siglip2.HUB), f"{family}: no such architecture {arch}"
        return
    entry = get_pretrained_cfg(arch, tag)
    assert entry, f"{arch} has no tag {tag}"
    config = open_clip.get_model_config(arch) or {}
    assert entry.get("quick_gelu", False) or not config.get("quick_gelu", False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_lists_half_a_dozen_checkpoints(family: str) -> None:
    listed = list(FAMILIES[family].PUBLISHED)
    assert len(set(listed)) == len(listed)
    if family == "pe":  # all that open_clip has
        cores = {m for m in open_clip.list_models() if m.startswith("PE-Core")}
        assert {name.partition("/")[0] for name in listed} == cores
    else:
        assert len(listed) >= 6


def hub_cache_of(directory: Path, name: str, hub: Path, *, files: tuple[str, ...]) -> None:
    """Put files where huggingface_hub looks for those of `name`."""
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("f00d")
    (repository / "snapshots" / "f00d").mkdir(parents=True)
    for file in files:
        shutil.copy(directory / file, repository / "snapshots" / "f00d" / file)


@pytest.mark.parametrize("family", ["llava", "siglip2"])
def test_a_configuration_in_the_hub_s_cache_goes_before_what_the_file_says(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = FAMILIES[family]
    make = siglip2.tiny_hub if family == "siglip2" else llava.tiny
    name = next(n for n in module.PUBLISHED if "naflex" in n or family == "llava")
    backbone = make(tmp_path / "tiny")
    published = module.card(name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    files = ("config.json", "preprocessor_config.json" if family == "siglip2" else "config.json")
    hub_cache_of(tmp_path / "tiny", name, tmp_path / "hub", files=files)
    assert module.card(name) == Card(backbone.spec.dims, backbone.depth)
    assert module.card(name) != published


def test_a_name_of_no_architecture_is_an_error_that_says_so() -> None:
    with pytest.raises(UnknownName, match="pe:PE-Core-XXL/meta names no architecture"):
        pe.card("PE-Core-XXL/meta")
    with pytest.raises(UnknownName, match="llava:me/mine is not on this machine"):
        llava.card("me/mine")


def test_a_model_that_the_family_refuses_has_no_card() -> None:
    with pytest.raises(CheckpointError, match="ResNet"):
        clip.card("RN50/openai")


def test_the_whole_list_opens_no_connection(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the list went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert main(["list", "backbones"]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    for name in names("cache_builder.backbones"):
        assert [line for line in lines if line.startswith(f"{name} ")], f"no line for {name}"
    for family, name in PUBLISHED:
        found = [line.split() for line in lines if line.startswith(f"  {name} ")]
        assert len(found) == 1, f"{family}:{name} stands on {len(found)} lines"
    row = next(line for line in lines if "PE-Core-B-16/meta" in line)
    assert (
        " ".join(row.split()) == "PE-Core-B-16/meta 224 196 × 768 1 1024 32 × 1024 12/24 296 28.2"
    )
    row = " ".join(next(line for line in lines if "siglip2-base-patch16-naflex" in line).split())
    assert row.endswith("any ≤ 256 × 768 0 768 64 × 768 12/12 ≤ 384 ≤ 36.6")
    assert not shown.err


def test_one_family_is_listed_with_its_facts_and_its_table(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["list", "backbones", "llava"]) == 0
    shown = capsys.readouterr().out
    assert "arXiv 2310.03744" in shown
    row = " ".join(next(line for line in shown.splitlines() if "-13b-" in line).split())
    assert row == "llava-hf/llava-1.5-13b-hf 336 576 × 1024 1 – 128 × 5120 23/40 1154 110.1"
    assert "PE-Core" not in shown


def test_the_columns_of_the_table_stand_below_their_titles(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["list", "backbones", "llava"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("  checkpoint"))
    assert len({len(line) for line in lines[at : at + 1 + len(llava.PUBLISHED)]}) == 1
    assert all(len(line) <= 120 for line in lines[at:])


@pytest.mark.parametrize(
    "body", ["", "PUBLISHED = ('a',)\n", "PUBLISHED = ()\ndef card(name): ...\n"]
)
def test_a_family_of_one_s_own_is_listed_without_a_table(
    body: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"my_family_{len(body)}"
    text = f'"""My own."""\n{body}def load(checkpoint): ...\ndef tiny(): ...\n'
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find("cache_builder.backbones", f"my.{name}").load
    assert main(["list", "backbones", f"my.{name}"]) == 0
    assert capsys.readouterr().out.split() == ["My", "own."]
