"""From a loaded open_clip model and the image tower of its family to a backbone. No family itself."""

from typing import Any

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
        compute=compute_text(loaded.dtype, "; ".join(dict.fromkeys(kernels)), compiled),
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


def compute_text(dtype: str, kernels: str, compiled: bool) -> str:
    """How a forward pass computes, as canonical text: it begins with the dtype that the command line takes."""
    how = dtype if dtype == "float32" else f"{dtype} autocast"
    return f"{how}, {kernels}{', torch.compile' if compiled else ''}"
