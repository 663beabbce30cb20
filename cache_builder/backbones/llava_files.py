"""LLaVA's vision tower and projector out of its files, without reading the language model. No family itself."""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from cache_builder.backbones.checkpoints import CheckpointError, first_line
from cache_builder.backbones.hub_files import HARMLESS

OURS = ("vision_tower.", "multi_modal_projector.")
"""Beginnings of the names of what is loaded without the language model."""


class _TowerAlone(nn.Module):
    """Vision tower and projector, without the language model."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers import AutoModel
        from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)


def tower_alone(source: str, config: Any) -> nn.Module:
    """Tower and projector, filled from the files; the rest of them is not read."""
    model = _TowerAlone(config)
    wanted = model.state_dict()
    found: dict[str, Tensor] = {}
    extra: list[str] = []
    for file in _weight_files(source):
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (not a dict)
                    # Old and new names: (model.)vision_tower.(vision_model.)encoder…
                    bare = re.sub(r"^model\.", "", key).replace(
                        "vision_tower.vision_model.", "vision_tower."
                    )
                    if bare in wanted:
                        found[bare] = tensors.get_tensor(key).float()
                    elif bare.startswith(OURS) and not bare.endswith(HARMLESS):
                        extra.append(bare)
        except Exception as error:
            raise CheckpointError(
                f"{file} is not a readable weights file: {first_line(error)}"
            ) from error
    for name in sorted({*wanted, *extra}):
        if name not in found:
            what = "the model has no place for" if name in extra else "there is no tensor"
            fault = f"{what} {name}"
        elif found[name].shape != wanted[name].shape:
            a, b = tuple(found[name].shape), tuple(wanted[name].shape)
            fault = f"{name} has shape {a}, not {b}"
        else:
            continue
        raise CheckpointError(
            f"llava:{source}: the weights do not fit the configuration beside them: {fault}"
        )
    model.load_state_dict(found)
    return model.eval().requires_grad_(False)


def _weight_files(source: str) -> list[Path]:
    """The safetensors files of a directory, or of the hub's cache."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        wanted = ["*.safetensors", "*.json"]
        folder = Path(snapshot_download(source, allow_patterns=wanted))
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    files = [folder / name for name in sorted(names)]
    if missing := [file for file in files if not file.is_file()]:
        raise CheckpointError(f"llava:{source}: there is no weights file {missing[0]}")
    return files
