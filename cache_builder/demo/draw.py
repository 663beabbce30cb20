"""Scene → picture: 56 × 56 RGB, drawn four times larger and averaged down. Same scene, same bytes.

Numpy and Pillow only. Coordinates are rounded to whole super-sampled pixels before anything is
painted, so that the last bit of a sine cannot move an edge.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from cache_builder.demo.shapes import BREAKS, Points, bend, cut_line, melt, outline
from cache_builder.demo.world import Scene, Thing

IMAGE_SIZE = 56
"""Seven by seven patches of eight pixels."""

_FINE = 4
_SIDE = IMAGE_SIZE * _FINE
_COPIES = {
    "double": (0.51, ((-0.56, 0.0), (0.56, 0.0))),
    "triple": (0.5, ((-0.54, 0.46), (0.54, 0.46), (0.0, -0.5))),
}


def render(scene: Scene) -> Image.Image:
    """Draw background, distractors and things, in this order."""
    rng = np.random.default_rng(scene.grain)
    canvas = Image.fromarray(_background(scene, rng)).resize(
        (_SIDE, _SIDE), Image.Resampling.NEAREST
    )
    draw = ImageDraw.Draw(canvas)
    for mark in scene.marks:
        _draw_mark(draw, scene, *mark)
    for thing in scene.things:
        mask = _thing_mask(thing)
        canvas.paste(_fill(thing), (0, 0), mask)
    return canvas.reduce(_FINE)


def _background(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    first, second = (np.asarray(shade, dtype=np.float64) for shade in scene.ground)
    if scene.background == "gradient":
        turn = rng.uniform(0, 2 * np.pi)
        axis = np.linspace(-0.7, 0.7, IMAGE_SIZE)
        mix = np.clip(axis[None, :] * np.cos(turn) + axis[:, None] * np.sin(turn) + 0.5, 0, 1)
    elif scene.background == "blotches":
        coarse = Image.fromarray((rng.random((6, 6)) * 255).astype(np.uint8))
        mix = np.asarray(coarse.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)) / 255
    else:
        mix = np.zeros((IMAGE_SIZE, IMAGE_SIZE))
    ground = first + mix[..., None] * (second - first)
    if scene.background == "noise":
        ground = ground + rng.normal(0, 9, (IMAGE_SIZE, IMAGE_SIZE, 1))
    return np.clip(ground, 0, 255).astype(np.uint8)


def _draw_mark(
    draw: ImageDraw.ImageDraw,
    scene: Scene,
    x: float,
    y: float,
    size: float,
    angle: float,
    shade: int,
) -> None:
    red, green, blue = (int(np.clip(v + shade, 0, 255)) for v in scene.ground[0])
    dx, dy = size * np.cos(np.radians(angle)), size * np.sin(np.radians(angle))
    ends = [round(v * _SIDE) for v in (x - dx, y - dy, x + dx, y + dy)]
    draw.line(ends, fill=(red, green, blue), width=2 * _FINE)


def _place(
    points: Points, thing: Thing, scale: float = 1.0, dx: float = 0.0, dy: float = 0.0
) -> list[tuple[int, int]]:
    """Unit square → super-sampled pixels: mirror, turn, scale, shift."""
    turn = np.radians(thing.angle)
    x = points[:, 0] * (-1 if thing.flip else 1)
    y = points[:, 1]
    across = (x * np.cos(turn) - y * np.sin(turn)) * scale + dx
    down = (x * np.sin(turn) + y * np.cos(turn)) * scale + dy
    columns = np.rint((thing.x + across * thing.radius) * _SIDE).astype(int)
    rows = np.rint((thing.y + down * thing.radius) * _SIDE).astype(int)
    return list(zip(columns.tolist(), rows.tolist(), strict=True))


def _outline_mask(
    thing: Thing,
    warp: Callable[[Points], Points] | None = None,
    scale: float = 1.0,
    dx: float = 0.0,
    dy: float = 0.0,
) -> Image.Image:
    mask = Image.new("L", (_SIDE, _SIDE))
    draw = ImageDraw.Draw(mask)
    for fill, points in outline(thing.obj):
        draw.polygon(
            _place(points if warp is None else warp(points), thing, scale, dx, dy), fill=fill
        )
    return mask


def _thing_mask(thing: Thing) -> Image.Image:
    match thing.attr:
        case "double" | "triple":
            scale, places = _COPIES[thing.attr]
            masks = [_outline_mask(thing, None, scale, dx, dy) for dx, dy in places]
            mask = masks[0]
            for other in masks[1:]:
                mask = ImageChops.lighter(mask, other)
            return mask
        case "bent":
            return _outline_mask(thing, lambda points: bend(points, thing.wobble))
        case "melted":
            bottom = max(float(points[:, 1].max()) for _, points in outline(thing.obj))
            return _outline_mask(thing, lambda points: melt(points, thing.wobble, bottom))
        case "broken":
            x, y, degrees = BREAKS[thing.obj]
            return _split_mask(
                thing, cut_line(x, y, degrees, jagged=True), degrees, (0.34, 0.22), 24.0
            )
        case "sliced":
            degrees = -60 + 30 * thing.wobble
            return _split_mask(
                thing, cut_line(0.0, 0.05, degrees, jagged=False), degrees, (0.2, 0.4), 0.0
            )
        case _:
            return _outline_mask(thing)


def _split_mask(
    thing: Thing, beyond: Points, degrees: float, shift: tuple[float, float], spin: float
) -> Image.Image:
    """Cut the object in two; the far piece moves by `shift` (across, along), turns by `spin` degrees."""
    turn, twist = np.radians(degrees), np.radians(spin)
    away = (
        np.array([np.cos(turn), np.sin(turn)]) * shift[0]
        + np.array([-np.sin(turn), np.cos(turn)]) * shift[1]
    )
    pivot = beyond[:25].mean(axis=0)
    rotation = np.array([[np.cos(twist), np.sin(twist)], [-np.sin(twist), np.cos(twist)]])

    def fallen(points: Points) -> Points:
        return (points - pivot) @ rotation + pivot + away

    def stay(points: Points) -> Points:
        return points - away * 0.3

    masks = []
    for warp, inside in ((stay, 0), (fallen, 255)):
        region = Image.new("L", (_SIDE, _SIDE), 255 - inside)
        ImageDraw.Draw(region).polygon(_place(warp(beyond), thing), fill=inside)
        masks.append(ImageChops.darker(_outline_mask(thing, warp), region))
    return ImageChops.lighter(*masks)


def _fill(thing: Thing) -> Image.Image | tuple[int, int, int]:
    """One hue, or a texture of the hue and a shade far from it; the texture turns with the thing."""
    if thing.attr not in {"striped", "dotted", "checkered"}:
        return thing.hue
    step = 84 if sum(thing.hue) < 3 * 128 else -84
    other = tuple(int(np.clip(v + step, 0, 255)) for v in thing.hue)
    period = max(4.6 * _FINE, thing.radius * _SIDE * 0.52)
    turn = np.radians(
        thing.angle + (45 if thing.attr != "checkered" else 0) * (-1 if thing.flip else 1)
    )
    axis = np.arange(_SIDE) / period
    x, y = axis[None, :] - thing.x * _SIDE / period, axis[:, None] - thing.y * _SIDE / period
    u = np.rint((x * np.cos(turn) - y * np.sin(turn)) * 64) / 64 + thing.wobble
    v = np.rint((x * np.sin(turn) + y * np.cos(turn)) * 64) / 64 + thing.wobble
    if thing.attr == "striped":
        marked = (u % 1 < 0.5) | np.zeros_like(v, dtype=bool)
    elif thing.attr == "dotted":
        marked = (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.085
    else:
        marked = (u % 1 < 0.5) ^ (v % 1 < 0.5)
    return Image.fromarray(
        np.where(marked[..., None], np.array(other, np.uint8), np.array(thing.hue, np.uint8))
    )
