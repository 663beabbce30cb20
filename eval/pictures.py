"""Pictures of a run: what a head looks at in an image, beside it, and what the head made of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy.typing import NDArray

from eval.album import FAILURES
from eval.composed_pictures import is_composed
from eval.errors import RunError, ScoreTableError
from eval.markup import data_image, png, text
from eval.npz import read_npz
from eval.runs import Run

NUMBERS = "fiu"
"""Kinds of dtype that are drawn."""


def pictures_of(run: Run) -> str:
    """All pictures of a run but those of composed queries and of failures, below what its maps are."""
    mine = [
        path for path in run.pictures if not (FAILURES.fullmatch(path.name) or is_composed(path))
    ]
    if not mine:
        return ""
    said: list[str] = []
    shots = [_drawn(path, said) if path.suffix == ".npz" else _picture(path) for path in mine]
    name = f"{run.name} · {run.backbone}, {run.dataset}, seed {run.seed}"
    says = "".join(f'<p class="soft">Shown: {text(says)}.</p>' for says in dict.fromkeys(said))
    return f"<h3>{text(name)}</h3>{says}{''.join(shots)}"


def _picture(path: Path) -> str:
    """A finished picture, as it is."""
    return (
        f'<div class="shot"><img src="{data_image(path.read_bytes())}" alt="{text(path.stem)}">'
        f"<p><small>{text(path.stem)}</small></p></div>"
    )


def _drawn(path: Path, said: list[str]) -> str:
    """The picture or the strip in a file; what its maps are is added to `said`."""
    try:
        found = read_npz(path)
    except ScoreTableError as error:
        raise RunError(f"{path} holds no picture: {error}") from error
    if "strip" in found:
        return _strip(path, found)
    missing = [name for name in ("image", "words", "weights") if name not in found]
    if missing:
        raise RunError(
            f"{path} holds no picture: {', '.join(missing)} is missing; it must hold image, words and weights"
        )
    if "says" in found:
        said.append(str(found["says"]))
    return _maps(path, found)


def _maps(path: Path, found: Mapping[str, NDArray[Any]]) -> str:
    """One image with its caption, and once a map, darkened where its weight is small."""
    image, weights = found["image"], found["weights"]
    words = [str(word) for word in np.atleast_1d(found["words"])]
    is_image = image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size
    if (
        not is_image
        or weights.shape[:1] != (len(words),)
        or weights.ndim != 3
        or not weights.size
        or weights.dtype.kind not in NUMBERS
    ):
        raise RunError(
            f"{path} must hold image (H, W, 3) uint8 and weights (words, rows, columns), but they are {image.dtype} "
            f"{image.shape} and {weights.dtype} {weights.shape} for {len(words)} words"
        )
    weights = weights.astype(np.float64)
    caption = str(found["caption"]) if "caption" in found else " ".join(words)
    score = f" · score {_score(path, found['score']):.3f}" if "score" in found else ""
    height, width = image.shape[:2]
    small = " pixels" if max(height, width) < 160 else ""
    looks = [
        f'<li><span class="look{small}" style="aspect-ratio:{width}/{height}"></span><small>image</small></li>'
    ]
    for word, weight in zip(words, weights, strict=True):
        span = f"{weight.min():.3g}–{weight.max():.3g}"
        alt = f"where “{text(word)}” looks: {span}"
        veil = f'<img src="{data_image(png(_veil(weight)))}" alt="{alt}">'
        look = f'<span class="look{small}" style="aspect-ratio:{width}/{height}">{veil}</span>'
        looks.append(f"<li>{look}{text(word)}<small>{span}</small></li>")
    return (
        f'<div class="shot" style="--picture:url({data_image(png(image))})"><b>{text(caption)}</b>'
        f'<span class="soft">{text(score)}</span>{_verdict(found)}<ul class="looks">{"".join(looks)}</ul></div>'
    )


def _score(path: Path, found: NDArray[Any]) -> float:
    """One number."""
    if found.ndim or found.dtype.kind not in NUMBERS:
        raise RunError(
            f"{path} must hold one number as score, but it is {found.dtype} of shape {found.shape}"
        )
    return float(found)


def _verdict(found: Mapping[str, NDArray[Any]]) -> str:
    """What the head made of the picture, where the file says it."""
    words = str(found.get("verdict", ""))
    if not words:
        return ""
    mark = (
        '<span class="up">✓</span>' if bool(found.get("right")) else '<span class="down">✗</span>'
    )
    return f'<p class="verdict">{mark} {text(words)}</p>'


def _strip(path: Path, found: Mapping[str, NDArray[Any]]) -> str:
    """Rows of numbers as rows of colour, clear at 0."""
    strip = found["strip"]
    names = [str(name) for name in np.atleast_1d(found.get("words", np.array([])))]
    usable = strip.ndim == 2 and strip.size and strip.dtype.kind in NUMBERS
    if not usable or len(names) != len(strip):
        raise RunError(
            f"{path} must hold strip (rows, numbers) and a word for each row, but they are {strip.dtype} "
            f"{strip.shape} and {len(names)} words"
        )
    strip = np.abs(strip.astype(np.float64))
    top = float(strip.max(initial=0)) or 1.0
    rows: list[str] = []
    for name, row in zip(names, strip, strict=True):
        pixels = np.zeros((1, len(row), 4), dtype=np.uint8)
        pixels[..., :3] = 128
        pixels[..., 3] = np.asarray(np.round(255 * row / top), dtype=np.uint8)
        says = f"{name}: {100 * (row == 0).mean():.0f} % closed, largest {row.max():.3g}"
        picture = f'<img class="strip" src="{data_image(png(pixels))}" alt="{text(says)}">'
        rows.append(f"<p>{picture}<small>{text(says)}</small></p>")
    says = text(str(found.get("says", "")))
    return f'<div class="shot"><span class="soft">{says}</span>{"".join(rows)}</div>'


def _veil(weight: NDArray[np.float64]) -> UInt8[np.ndarray, "h w 4"]:
    """Black, the more opaque the smaller the weight; clear at the map's largest, and all over where it is flat."""
    low, top = float(weight.min()), float(weight.max())
    share = (weight - low) / (top - low) if top > low else np.ones_like(weight)
    veil = np.zeros((*weight.shape, 4), dtype=np.uint8)
    veil[..., 3] = np.round(255 * 0.82 * (1 - share)).astype(np.uint8)
    return veil
