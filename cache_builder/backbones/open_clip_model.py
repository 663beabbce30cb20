"""From a loaded open_clip model and the image tower of its family to a backbone. No family itself."""

from typing import Any

import torch

from cache_builder.backbones.checkpoints import Loaded
from cache_builder.backbones.open_clip_text import OpenClipText
from cache_builder.backbones.two_towers import TwoTowers
from cache_builder.spec import BackboneSpec


def assembled(
    family: str, checkpoint: str, loaded: Loaded, image: Any, *, compiled: bool
) -> TwoTowers:
    """A backbone of open_clip's parts.

    Args:
        family: its name.
        checkpoint: as it was asked for; `demo` stays, a path gives way to the directory's name.
        loaded: model, tokenizer, transform.
        image: the family's `ImageTower`, with `dims`, `activation` and `kernel`.
        compiled: run the blocks through torch.compile.
    """
    model: Any = loaded.model
    text = OpenClipText(model, loaded.tokenizer, f"{family}:{checkpoint}")
    kernels = [image.kernel, "nn.MultiheadAttention"]
    spec = BackboneSpec(
        family=family,
        checkpoint="demo" if checkpoint == "demo" else loaded.name,
        weights=loaded.weights,
        preprocessing=loaded.preprocessing,
        tokenizer=loaded.tokenizer_text,
        layer="last block, before the final norm",
        dims={**image.dims, **text.dims},
        architecture=loaded.architecture,
        activation=both_activations(image.activation, text.activation),
        compute=compute_text(
            loaded.dtype, "; ".join(dict.fromkeys(kernels)), compiled, loaded.device
        ),
        versions=loaded.versions,
    )
    scalars = {"logit_scale": model.logit_scale}
    if model.logit_bias is not None:
        scalars["logit_bias"] = model.logit_bias
    return TwoTowers(
        model,
        image,
        text,
        spec,
        device=loaded.device,
        dtype=loaded.dtype,
        scalars=scalars,
        compiled=compiled,
    )


def both_activations(image: str, text: str) -> str:
    """Of the two towers, as canonical text."""
    return text if image == text else f"image {image}, text {text}"


def compute_text(dtype: str, kernels: str, compiled: bool, device: str) -> str:
    """How a forward pass computes, as canonical text: it begins with the dtype that the command line takes.

    On CUDA torch rounds the inputs of float32 convolutions to TF32 unless told not to; a patch embedding is one.
    """
    how = dtype if dtype == "float32" else f"{dtype} autocast"
    if dtype == "float32" and torch.device(device).type == "cuda":
        how += ", TF32 convolutions" if torch.backends.cudnn.allow_tf32 else ""
        how += ", TF32 products" if torch.backends.cuda.matmul.allow_tf32 else ""
    return f"{how}, {kernels}{', torch.compile' if compiled else ''}"
