"""Damaging a copy of a model's files, and what loading then says."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kinds import FAMILIES, KINDS, LLAVA
from safetensors.torch import load_file, save_file

from cache_builder.backbones.checkpoints import CheckpointError
from cache_builder.errors import UnknownName

State = dict[str, torch.Tensor]

SOURCES = {**dict.fromkeys(KINDS, ""), **{f"{kind}@vision": "@vision" for kind in LLAVA}}
"""How to load each kind: LLaVA's tower alone reads the files by itself."""


def weights(directory: Path) -> Path:
    (file,) = directory.glob("*.safetensors")
    return file


def change(directory: Path, edit: Callable[[State], object]) -> None:
    state = load_file(weights(directory))
    edit(state)
    save_file(state, weights(directory), {"format": "pt"})


def refusal(source: str, directory: Path, family: str = "") -> str:
    """What loading says; the directory is as it was."""
    kind, _, option = source.partition("@")
    before = {p: p.stat().st_mtime_ns for p in directory.rglob("*")}
    with pytest.raises((CheckpointError, UnknownName)) as caught:
        FAMILIES[family or KINDS[kind].family].load(f"{directory}{'@' * bool(option)}{option}")
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    assert {p: p.stat().st_mtime_ns for p in directory.rglob("*")} == before
    return message
