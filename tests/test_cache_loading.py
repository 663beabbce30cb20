"""Files that are not what they should be: one sentence that names the fault, and nothing is written.

`test_cache_clip.py` has what concerns open_clip's tags and its own configuration.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import kinds
import pytest
import torch
from kinds import HUB, KINDS
from refusals import SOURCES, State, change, refusal, weights
from safetensors.torch import load_file

from cache_builder import load_backbone
from cache_builder.backbones.checkpoints import CheckpointError
from cache_builder.cli import main
from cache_builder.datasets import folder
from cache_builder.errors import UnknownName


@pytest.fixture(scope="module")
def made() -> dict[str, Path]:
    return {kind: kinds.directory(kind) for kind in KINDS}


@pytest.fixture
def copy(source: str, made: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copytree(made[source.partition("@")[0]], tmp_path / "tiny")
    return tmp_path / "tiny"


every = pytest.mark.parametrize("source", SOURCES)


def some_tensor(state: State, directory: Path) -> str:
    """A norm's bias of the vision tower."""
    del directory
    return next(
        n
        for n in sorted(state)
        if n.endswith("bias") and ("norm" in n or "ln_" in n) and "vis" in n
    )


@every
def test_missing_weights_are_named(source: str, copy: Path) -> None:
    name = weights(copy).name
    weights(copy).unlink()
    assert name in refusal(source, copy)


@every
@pytest.mark.parametrize("damage", ["cut", "empty", "zeros", "text"])
def test_a_damaged_file_is_said_to_be_one(source: str, copy: Path, damage: str) -> None:
    content = weights(copy).read_bytes()
    weights(copy).write_bytes(
        {"cut": content[:-100], "empty": b"", "zeros": b"\0" * 100, "text": b"<html>" * 50}[damage]
    )
    message = refusal(source, copy)
    assert "not a readable weights file" in message or "could not be loaded" in message
    assert "header" in message


@every
def test_a_missing_tensor_is_named(source: str, copy: Path) -> None:
    name = some_tensor(load_file(weights(copy)), copy)
    change(copy, lambda state: state.pop(name))
    assert name.removeprefix("model.") in refusal(source, copy)


@every
def test_a_tensor_of_another_shape_is_named_with_both_shapes(source: str, copy: Path) -> None:
    name = some_tensor(load_file(weights(copy)), copy)
    change(copy, lambda state: state.update({name: torch.zeros(7)}))
    message = refusal(source, copy)
    assert name.removeprefix("model.") in message
    assert "7" in message
    assert "48" in message


@every
def test_a_tensor_too_many_is_named(source: str, copy: Path) -> None:
    """As when the configuration says fewer blocks than the file holds."""
    name = some_tensor(load_file(weights(copy)), copy)
    extra = name.replace(".0.", ".9.") if ".0." in name else f"{name}s"
    change(copy, lambda state: state.update({extra: torch.zeros(48)}))
    assert extra.removeprefix("model.") in refusal(source, copy)


@every
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_named(source: str, copy: Path, value: float) -> None:
    name = some_tensor(load_file(weights(copy)), copy)
    change(copy, lambda state: state[name].index_fill_(0, torch.tensor([5]), value))
    message = refusal(source, copy)
    assert name.removeprefix("model.") in message
    assert "not finite" in message


@pytest.mark.parametrize("source", ["siglip2", *HUB])
@pytest.mark.parametrize("name", ["logit_bias", "logit_scale"])
def test_a_missing_scale_or_bias_is_named(source: str, copy: Path, name: str) -> None:
    """open_clip would put zero in the place of the bias."""
    change(copy, lambda state: state.pop(name))
    assert name in refusal(source, copy)


@pytest.mark.parametrize("source", ["clip", "pe"])
def test_a_bias_without_a_place_is_named(source: str, copy: Path) -> None:
    change(copy, lambda state: state.update(logit_bias=torch.tensor(-10.0)))
    assert "a tensor logit_bias, which only an architecture with init_logit_bias needs" in refusal(
        source, copy
    )


# --- names ---


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "siglip2:ViT-B-16-SigLIP3/webli",
            "no architecture 'ViT-B-16-SigLIP3'; nearest: ViT-B-16-",
        ),
        ("siglip2:ViT-B-16-SigLIP2-256/weblu", "has no tag 'weblu'; did you mean 'webli'?"),
        ("siglip2:ViT-B-16-SigLIP2-256", "add a tag, siglip2:ViT-B-16-SigLIP2-256/webli"),
        ("pe:PE-Core-B-17/meta", "nearest: PE-Core-B-16"),
        ("pe:PE-Core-B-16/mata", "did you mean 'meta'?"),
        ("pe:ViT-B-32/openai", "built on a native open_clip tower"),
        ("siglip2:PE-Core-B-16/meta", "built on vit_pe_core_base_patch16_224"),
        ("llava:demo@visoin", "no option 'visoin' (known: crop, vision)"),
        ("llava:demo@vision,pad", "no option 'pad' (known: crop, vision)"),
        ("lava:demo", "did you mean 'llava'?"),
        ("siglip:demo", "did you mean 'siglip2'?"),
    ],
)
def test_an_unknown_name_gets_the_nearest(name: str, message: str) -> None:
    with pytest.raises((UnknownName, CheckpointError)) as caught:
        load_backbone(name)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_dtype_lists_the_known(kind: str, made: dict[str, Path]) -> None:
    with pytest.raises(UnknownName, match="float32, bfloat16, float16"):
        kinds.load(kind, made[kind], dtype="int8")


ABSENT = {
    "siglip2:google/siglip2-base-patch16-naflx": "google/siglip2-base-patch16-naflex",
    "llava:llava-hf/llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "siglip2:ViT-B-16-SigLIP2-256/webli": "timm/ViT-B-16-SigLIP2-256",
    "pe:PE-Core-T-16-384/meta": "pe:PE-Core-T-16-384/meta@FILE",
}


def test_without_network_a_name_that_is_not_in_the_cache_is_one_sentence(tmp_path: Path) -> None:
    """In a process of its own, as libraries read HF_HUB_OFFLINE when they are imported."""
    code = (
        "import sys; from cache_builder import load_backbone\n"
        "from cache_builder.errors import CacheError\n"
        "for name in sys.argv[1:]:\n"
        "    try: load_backbone(name)\n"
        "    except CacheError as e: print(e)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", code, *ABSENT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    lines = done.stdout.strip().splitlines()
    assert len(lines) == len(ABSENT)
    for line, (name, hint) in zip(lines, ABSENT.items(), strict=True):
        assert name in line
        assert hint in line
    assert not done.stderr.strip()


# --- nothing is written ---


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("clip", "open_clip_model.safetensors"),
        ("siglip2-naflex", "config.json"),
        ("llava", "model.safetensors"),
    ],
)
def test_a_build_of_a_damaged_model_is_one_sentence_and_leaves_no_cache(
    source: str, name: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / name).write_bytes(b"{" * 20)
    root = folder.miniature(tmp_path / "photos")
    backbone = f"{KINDS[source].family}:{copy}"
    options = ["--backbone", backbone, "--dataset", "folder", "--root", str(root)]
    out = tmp_path / "c.zarr"
    assert main(["build", *options, "--out", str(out)]) == 1
    shown = capsys.readouterr()
    assert len(shown.err.strip().splitlines()) == 1
    assert name in shown.err or "could not be loaded" in shown.err
    assert "Traceback" not in shown.err + shown.out
    assert not out.exists()
