"""A checkpoint's directory once more, with other weights in it: what a merged fine-tuning is loaded from."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from cache_builder.backbones.checkpoints import CheckpointError
from cache_builder.backbones.hub_files import is_hub_directory, save_model
from cache_builder.plugins import find

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json")
"""How files end that hold weights, or say where they are."""

OPEN_CLIP = "open_clip_model.safetensors"


def rewrite(name: str, weights: Mapping[str, Tensor], out: Path) -> None:
    """Write the checkpoint of a backbone into `out`, with `weights` in place of its parameters of these names.

    Args:
        name: `family:directory`, or `family:demo`.
        weights: by the names that the library's module has.
        out: a directory that is not there yet.

    Raises:
        CheckpointError: the name leads to no directory, or `out` is there.
    """
    family, _, checkpoint = name.partition(":")
    module = find("cache_builder.backbones", family)
    source = Path(module.DEMO if checkpoint == "demo" else checkpoint).expanduser()
    if not source.is_dir():
        raise CheckpointError(
            f"{name} is no directory, and only a directory can be written anew: download the checkpoint into one "
            "(hf download NAME --local-dir DIR), and name it with --backbone "
            f"{family}:DIR"
        )
    if out.exists():
        raise CheckpointError(f"{out} already exists; choose another --out, or remove it")
    model: Any = module.load(str(source)).model
    for parameter, value in weights.items():
        own = model.get_parameter(parameter)
        own.data.copy_(value.reshape(own.shape) if value.numel() == 1 else value)
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.endswith(WEIGHTS):
            shutil.copy2(file, part / file.name)
    if is_hub_directory(source):
        save_model(model, part)
    else:
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, part / OPEN_CLIP)
    part.rename(out)
