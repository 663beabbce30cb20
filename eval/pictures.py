"""Pictures of a run: where in an image a head looks for each word of a caption."""

import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from matplotlib.image import imsave  # pyright: ignore[reportUnknownVariableType]
from numpy.typing import NDArray

from eval.errors import RunError
from eval.markup import data_image, text
from eval.runs import Run


def pictures_of(run: Run) -> str:
    """All pictures of a run."""
    if not run.pictures:
        return ""
    shots = [_attention(path) if path.suffix == ".npz" else _picture(path) for path in run.pictures]
    name = f"{run.name} · {run.backbone}, {run.dataset}, seed {run.seed}"
    return f"<h3>{text(name)}</h3>{''.join(shots)}"


def _picture(path: Path) -> str:
    """A finished picture, as it is."""
    return (
        f'<div class="shot"><img src="{data_image(path.read_bytes())}" alt="{text(path.stem)}">'
        f"<p><small>{text(path.stem)}</small></p></div>"
    )


def _attention(path: Path) -> str:
    """One image with its caption, and once a word, darkened where the word does not look."""
    try:
        with np.load(path, allow_pickle=False) as data:
            image, weights = (
                np.asarray(data["image"]),
                np.asarray(data["weights"], dtype=np.float64),
            )
            words = [str(word) for word in np.atleast_1d(data["words"])]
            caption = str(data["caption"]) if "caption" in data else None
            score = f" · score {float(data['score']):.3f}" if "score" in data else ""
    except (KeyError, ValueError, OSError) as error:
        raise RunError(
            f"{path} holds no picture: {error}; it must hold image, words and weights"
        ) from error
    if (
        image.dtype != np.uint8
        or image.ndim != 3
        or weights.shape[:1] != (len(words),)
        or weights.ndim != 3
    ):
        raise RunError(
            f"{path} must hold image (H, W, 3) uint8 and weights (words, rows, columns), but they are {image.dtype} "
            f"{image.shape} and {weights.shape} for {len(words)} words"
        )
    caption = caption or " ".join(words)
    height, width = image.shape[:2]
    small = " pixels" if max(height, width) < 160 else ""
    looks = [
        f'<li><span class="look{small}" style="aspect-ratio:{width}/{height}"></span><small>image</small></li>'
    ]
    for word, weight in zip(words, weights, strict=True):
        veil = f'<img src="{data_image(_png(_veil(weight)))}" alt="where “{text(word)}” looks">'
        look = f'<span class="look{small}" style="aspect-ratio:{width}/{height}">{veil}</span>'
        looks.append(f"<li>{look}{text(word)}</li>")
    return (
        f'<div class="shot" style="--picture:url({data_image(_png(image))})"><b>{text(caption)}</b>'
        f'<span class="soft">{text(score)}</span><ul class="looks">{"".join(looks)}</ul></div>'
    )


def _veil(weight: NDArray[np.float64]) -> UInt8[np.ndarray, "h w 4"]:
    """Black, the more opaque the smaller the weight; clear at the word's largest weight."""
    top = float(weight.max())
    share = np.clip(weight / top, 0, 1) if top > 0 else np.zeros_like(weight)
    veil = np.zeros((*weight.shape, 4), dtype=np.uint8)
    veil[..., 3] = np.round(255 * 0.82 * (1 - share)).astype(np.uint8)
    return veil


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """Pixels as a PNG file."""
    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png")
    return buffer.getvalue()
