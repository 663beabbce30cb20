"""Weights of φ that others have published, as the state of a network of `inversion`.

    family       the network lies below       its keys                                                       kind
    Pic2Word     state_dict_img2text          layers.0.0 layers.1.0 fc_out                                   pic2word
    SEARLE       Phi                          layers.0 layers.3 layers.6                                     searle
    LinCIR       Phi                          the same: nothing in the file tells it from SEARLE's           searle
    Context-I2W  state_dict_img2text          to_c W_R.weight_g W_R.weight_v VT_Extractor.… local_gate …     context_i2w

with .weight and .bias, and often `module.` before each (several GPUs). A .safetensors file, or a torch file of tensors
alone, may hold the keys of the network without anything around.

Where this comes from: the code that writes and reads the files, google-research/composed_image_retrieval at 2f15afc
(src/main.py), miccunifi/SEARLE at 9afa4f3 (hubconf.py), navervision/lincir at 0df25c2 (train_phi.py, demo.py) and
Pter61/context-i2w at 254bc31 (src/main.py). The published files themselves were not at hand, so none of them has been
read here; of Context-I2W's link it is not even known that it still leads to a file of that code.

Nothing is unpickled but tensors, plain containers and numbers. Pic2Word's training saves its optimizer too, whose
learning rate is likely to be a number of numpy: those are let through (`NUMBERS`), and no other object is.
"""

import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import safe_globals

from heads.blocks.inversion import HIDDEN
from heads.errors import CheckpointMismatch

Published = Literal["pic2word", "searle", "context_i2w"]

_NUMBER = np.float64(0).__reduce__()[0]
NUMBERS: list[Any] = [
    (_NUMBER, "numpy.core.multiarray.scalar"),
    (_NUMBER, "numpy._core.multiarray.scalar"),
    np.dtype,
    type(np.dtype(np.float64)),
]
"""What a number of numpy is made of, by the names of numpy 1 and 2."""

INSIDE = ("state_dict_img2text", "Phi")
"""Where the network lies in a file that holds more."""

CONVERT = (
    "python -c \"import torch, safetensors.torch as s; m = torch.load('{path}', map_location='cpu', "
    "weights_only=False); m = m.get('state_dict_img2text', m.get('Phi', m)); "
    "s.save_file({{k: v.contiguous() for k, v in m.items()}}, '{out}')\""
)
"""Runs whatever code the file holds, so for people who trust it."""

Shape = tuple[int, ...]
Layout = dict[str, tuple[str, Shape]]
"""Their name of a tensor → ours, and its shape."""


def read_phi(path: str | Path, d: int, v: int) -> tuple[Published, dict[str, Tensor]]:
    """The kind of network in a published file, and its state for `inversion.network(kind, d, v)`, in float32.

    Args:
        path: .safetensors, or a torch file.
        d: width D of the backbone's pooled embeddings.
        v: width V of its words.

    Raises:
        FileNotFoundError: no such file.
        CheckpointMismatch: unreadable without running code, of no known network, or of one for another backbone.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}")
    found = _network(_read(path), path)
    kind, layout = _recognise(found, d, v, path)
    wrong = [
        f"{name} is {tuple(found[name].shape)} and not {shape}"
        for name, (_, shape) in layout.items()
        if tuple(found[name].shape) != shape
    ]
    if wrong:
        raise CheckpointMismatch(
            f"{path} holds a {kind} network that does not fit a backbone with D = {d} and V = {v}: "
            f"{_some(wrong)}; choose the weights that belong to this backbone, or train a network for it"
        )
    for name, value in found.items():
        if value.is_meta or value.layout != torch.strided or not value.is_floating_point():
            raise CheckpointMismatch(f"{path}: {name} holds no plain numbers; fetch the file again")
        if not bool(value.isfinite().all()):
            raise CheckpointMismatch(
                f"{path}: {name} holds values that are not finite; fetch the file again"
            )
    return kind, {ours: found[name].float().clone() for name, (ours, _) in layout.items()}


def _read(path: Path) -> Mapping[Any, Any]:
    """What is in the file. A torch file is mapped, so that a whole CLIP beside the network is never in memory."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with safe_globals(NUMBERS):
            held = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # damaged and hostile files raise nearly anything
        raise CheckpointMismatch(_refusal(path, error)) from error
    if not isinstance(held, Mapping):
        raise CheckpointMismatch(f"{path} holds a {type(held).__name__}, not tensors by name")
    return held


def _refusal(path: Path, error: Exception) -> str:
    """Why a file is not read, and what to do: nobody is told to run what no weights need."""
    said = " ".join(str(error).split())
    wanted = re.search(r"unsupported global:? (?:GLOBAL )?(\S+)", said, re.IGNORECASE)
    if wanted is None:
        reason = f"{type(error).__name__}: {said[:200]}"
        return f"{path} is not a readable weights file ({reason}); fetch the file again"
    if "is blocked" in said:
        return (
            f"{path} wants to run {wanted[1]} when it is read, which no weights need; it was not run. Take the file "
            "from its authors"
        )
    command = CONVERT.format(path=path, out=path.with_suffix(".safetensors"))
    return (
        f"{path} holds {wanted[1]} beside its tensors, which is not read here because such a file can run code; if you "
        f"trust whoever made it, convert it with: {command}"
    )


def _network(held: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """The tensors of the network, by their keys without `module.`."""
    inside = [held[name] for name in INSIDE if isinstance(held.get(name), Mapping)]
    tensors = inside[0] if inside else held
    if not tensors or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise CheckpointMismatch(
            f"{path} holds {_some(map(str, held))}, and neither {' nor '.join(INSIDE)}, where published weights of φ "
            "lie, nor tensors alone; choose the file that its authors call the checkpoint"
        )
    return {str(name).removeprefix("module."): value for name, value in tensors.items()}


def _recognise(found: Mapping[str, Tensor], d: int, v: int, path: Path) -> tuple[Published, Layout]:
    """The kind whose keys these are."""
    layouts: dict[Published, Layout] = {"pic2word": _pic2word(d, v), "searle": _searle(d, v)}
    if "VT_Extractor.latents" in found:
        layouts["context_i2w"] = _context_i2w(found, d, v)
    for kind, layout in layouts.items():
        if layout.keys() == found.keys():
            return kind, layout
    near, layout = max(layouts.items(), key=lambda item: len(item[1].keys() & found.keys()))
    too_many, too_few = sorted(found.keys() - layout.keys()), sorted(layout.keys() - found.keys())
    raise CheckpointMismatch(
        f"{path} holds no known network: compared with {near}, it has {_some(too_many)} more and lacks "
        f"{_some(too_few)}; known are pic2word, searle (lincir is the same) and context_i2w, as published"
    )


def _linear(theirs: str, ours: str, out: int, into: int) -> Layout:
    return {
        f"{theirs}.weight": (f"{ours}.weight", (out, into)),
        f"{theirs}.bias": (f"{ours}.bias", (out,)),
    }


def _norm(theirs: str, ours: str, width: int) -> Layout:
    return {f"{theirs}.{part}": (f"{ours}.{part}", (width,)) for part in ("weight", "bias")}


def _pic2word(d: int, v: int, tail: str = "", ours: str = "") -> Layout:
    return {
        **_linear(f"layers{tail}.0.0", f"{ours}layers.0", HIDDEN, d),
        **_linear(f"layers{tail}.1.0", f"{ours}layers.3", HIDDEN, HIDDEN),
        **_linear(f"fc_out{tail}", f"{ours}layers.6", v, HIDDEN),
    }


def _searle(d: int, v: int) -> Layout:
    return {
        **_linear("layers.0", "layers.0", 4 * d, d),
        **_linear("layers.3", "layers.3", 4 * d, 4 * d),
        **_linear("layers.6", "layers.6", v, 4 * d),
    }


def _context_i2w(found: Mapping[str, Tensor], d: int, v: int) -> Layout:
    """For the image width W that its latents have; 4 latents, 6 blocks of 8 heads of 64, as `ContextI2W` has them."""
    shape, seen = found["VT_Extractor.latents"].shape, 8 * 64
    w = shape[-1] if shape else 0
    layout: Layout = {
        "to_c.weight": ("context.weight", (w, d)),
        "W_R.weight_g": ("turn_length", (w, 1)),
        "W_R.weight_v": ("turn", (w, w)),
        **_norm("ln_post", "global_norm", w),
        **_norm("ln_post_local", "local_norm", w),
        "proj": ("global_proj", (w, d)),
        "proj_local": ("local_proj", (w, d)),
        "VT_Extractor.latents": ("latents", (4, w)),
        **_norm("VT_Extractor.norm", "latents_norm", w),
        **_pic2word(d, v, "", "global_phi."),
        **_pic2word(d, v, "_local", "local_phi."),
        "local_gate": ("gate", (1,)),
    }
    for i in range(6):
        theirs, ours = f"VT_Extractor.layers.{i}", f"blocks.{i}"
        layout |= {
            **_norm(f"{theirs}.0.norm_media", f"{ours}.norm_rows", w),
            **_norm(f"{theirs}.0.norm_latents", f"{ours}.norm_latents", w),
            f"{theirs}.0.to_q.weight": (f"{ours}.q.weight", (seen, w)),
            f"{theirs}.0.to_kv.weight": (f"{ours}.kv.weight", (2 * seen, w)),
            f"{theirs}.0.to_out.weight": (f"{ours}.out.weight", (w, seen)),
            **_norm(f"{theirs}.1.0", f"{ours}.norm_ffn", w),
            f"{theirs}.1.1.weight": (f"{ours}.fc1.weight", (4 * w, w)),
            f"{theirs}.1.3.weight": (f"{ours}.fc2.weight", (w, 4 * w)),
        }
    return layout


def _some(names: Iterable[str]) -> str:
    """The first three, and how many more."""
    every = list(names)
    rest = f" and {len(every) - 3} more" if len(every) > 3 else ""
    return ", ".join(every[:3]) + rest if every else "nothing"
