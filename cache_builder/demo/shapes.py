"""Outlines of the toy world's objects, and the states that change them.

An outline is a list of parts in the unit square [-1, 1]², y downwards: filled polygons and holes,
painted in order. A state is a geometric operation on the object's *own* outline, so "bent" or
"broken" has no look of its own: a broken ring has a gap, a broken star has lost a point, a broken
house has a fallen gable.
"""

from functools import cache

import numpy as np

Points = np.ndarray
Part = tuple[int, Points]
"""255 fills, 0 makes a hole."""

_STEP = 0.12

BREAKS: dict[str, tuple[float, float, float]] = {
    "circle": (0.45, -0.55, -50.0),
    "square": (0.4, -0.4, -45.0),
    "triangle": (0.0, -0.25, -90.0),
    "star": (0.42, -0.12, -18.0),
    "ring": (0.5, 0.3, 30.0),
    "cross": (0.42, 0.0, 0.0),
    "heart": (0.3, -0.25, -50.0),
    "moon": (0.0, -0.45, -70.0),
    "arrow": (0.25, 0.0, 0.0),
    "house": (0.0, -0.2, -90.0),
    "tree": (0.0, -0.25, -90.0),
    "fish": (0.3, 0.0, 0.0),
    "cup": (0.3, 0.0, 0.0),
    "key": (0.0, 0.0, 0.0),
    "leaf": (0.25, -0.25, -45.0),
}
"""Object → where it breaks (x, y) and the direction, in degrees, in which the smaller piece falls off."""


def arc(
    radius_x: float, radius_y: float, start: float, stop: float, x: float = 0.0, y: float = 0.0
) -> Points:
    """Points on an ellipse from `start` to `stop` degrees (0 is right, 90 is down)."""
    t = np.radians(np.linspace(start, stop, max(3, int(abs(stop - start) / 9))))
    return np.stack([x + radius_x * np.cos(t), y + radius_y * np.sin(t)], axis=1)


def box(left: float, top: float, right: float, bottom: float) -> Points:
    """The four corners of a rectangle."""
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def _moon() -> Points:
    return np.concatenate([arc(0.95, 0.95, 50.0, 310.0, 0.15), arc(0.7, 0.74, 296.0, 64.0, 0.5)])


def _heart() -> Points:
    t = np.radians(np.arange(0, 360, 8))
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x / 16.5, -(y + 2.4) / 15], axis=1)


def _star() -> Points:
    t = np.radians(np.arange(-90, 270, 36))
    radius = np.where(np.arange(10) % 2 == 0, 1.05, 0.44)
    return np.stack([radius * np.cos(t), radius * np.sin(t)], axis=1)


def _leaf() -> Points:
    t = np.linspace(0, 1, 16)
    half = 0.6 * np.sin(np.pi * t) ** 0.8
    along = 1.0 - 1.75 * t
    blade = np.concatenate(
        [np.stack([half, -along + 0.2], 1), np.stack([-half, -along + 0.2], 1)[::-1]]
    )
    turn = np.radians(45)
    return blade @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]).T


@cache
def outline(obj: str) -> tuple[Part, ...]:
    """The object's parts with edges cut into short steps, so that a warp can bend them."""
    return tuple((fill, _densify(np.asarray(points, dtype=float))) for fill, points in _parts(obj))


def _parts(obj: str) -> list[tuple[int, Points | list[tuple[float, float]]]]:
    match obj:
        case "circle":
            return [(255, arc(0.92, 0.92, 0.0, 351.0))]
        case "square":
            return [(255, box(-0.82, -0.82, 0.82, 0.82))]
        case "triangle":
            return [(255, [(0.0, -0.95), (0.98, 0.78), (-0.98, 0.78)])]
        case "star":
            return [(255, _star())]
        case "ring":
            return [(255, arc(0.95, 0.95, 0.0, 351.0)), (0, arc(0.52, 0.52, 0.0, 351.0))]
        case "cross":
            return [(255, box(-0.3, -0.95, 0.3, 0.95)), (255, box(-0.95, -0.3, 0.95, 0.3))]
        case "heart":
            return [(255, _heart())]
        case "moon":
            return [(255, _moon())]
        case "arrow":
            head = [(0.05, -0.72), (1.0, 0.0), (0.05, 0.72)]
            return [(255, [(-1.0, -0.25), (0.05, -0.25), *head, (0.05, 0.25), (-1.0, 0.25)])]
        case "house":
            walls = [
                (-0.7, -0.1),
                (-0.95, -0.1),
                (0.0, -0.98),
                (0.95, -0.1),
                (0.7, -0.1),
                (0.7, 0.92),
                (-0.7, 0.92),
            ]
            return [
                (255, walls),
                (0, box(-0.2, 0.35, 0.2, 0.93)),
                (0, box(-0.16, -0.3, 0.16, 0.02)),
            ]
        case "tree":
            tiers = [
                (255, [(0.0, top - 0.62), (half, top), (-half, top)])
                for top, half in ((-0.35, 0.5), (0.1, 0.66), (0.55, 0.8))
            ]
            return [*tiers, (255, box(-0.16, 0.5, 0.16, 1.0))]
        case "fish":
            tail = [(-0.3, 0.0), (-1.0, -0.5), (-0.85, 0.0), (-1.0, 0.5)]
            return [
                (255, arc(0.72, 0.5, 0.0, 351.0, 0.28)),
                (255, tail),
                (0, arc(0.1, 0.1, 0.0, 351.0, 0.62, -0.12)),
            ]
        case "cup":
            handle = [
                (255, arc(0.42, 0.45, 0.0, 351.0, 0.5, -0.1)),
                (0, arc(0.22, 0.25, 0.0, 351.0, 0.5, -0.1)),
            ]
            return [*handle, (255, [(-0.85, -0.75), (0.5, -0.75), (0.35, 0.8), (-0.7, 0.8)])]
        case "key":
            bow = [
                (255, arc(0.44, 0.5, 0.0, 351.0, -0.54)),
                (0, arc(0.18, 0.22, 0.0, 351.0, -0.54)),
            ]
            teeth = [(255, box(0.36, 0.1, 0.58, 0.52)), (255, box(0.76, 0.1, 0.98, 0.52))]
            return [*bow, (255, box(-0.2, -0.17, 0.98, 0.17)), *teeth]
        case "leaf":
            stem = [(-0.98, 0.9), (-0.88, 1.0), (-0.3, 0.42), (-0.4, 0.32)]
            vein = [(-0.42, 0.36), (-0.36, 0.42), (0.42, -0.36), (0.36, -0.42)]
            return [(255, _leaf()), (255, stem), (0, vein)]
        case _:
            raise ValueError(f"no object {obj!r} in the toy world; known: {sorted(BREAKS)}")


def _densify(points: Points) -> Points:
    pieces = []
    for start, stop in zip(points, np.roll(points, -1, axis=0), strict=True):
        n = max(1, int(np.ceil(np.abs(stop - start).max() / _STEP)))
        pieces.append(start + (stop - start) * (np.arange(n) / n)[:, None])
    return np.concatenate(pieces)


def bend(points: Points, wobble: float) -> Points:
    """Curl the object around a centre above or below it, as if its long axis were an arch."""
    curl = 0.85 + 0.25 * wobble
    angle = points[:, 0] * curl
    radius = 1 / curl - points[:, 1] * 0.7
    return np.stack(
        [radius * np.sin(angle) * 1.15, 1.2 / curl - radius * np.cos(angle) * 1.15], axis=1
    )


def melt(points: Points, wobble: float, bottom: float) -> Points:
    """Let what is below the middle sag into drips, down to `bottom` (the object's own); the top keeps its form."""
    x, y = points[:, 0], points[:, 1]
    depth = np.clip((y + 0.2) / (bottom + 0.2), 0, 1)
    drip = depth * (0.1 + 0.34 * np.sin(8.5 * x + 6.28 * wobble))
    return np.stack([x * (0.84 + 0.42 * depth**2), y * 0.78 + drip + 0.05], axis=1)


def cut_line(x: float, y: float, degrees: float, jagged: bool) -> Points:
    """The region beyond a line through (x, y), on its side towards `degrees`; a jagged line zigzags."""
    across = np.linspace(-3, 3, 25)
    tooth = np.where(np.arange(25) % 2 == 0, 0.13, -0.13) if jagged else np.zeros(25)
    edge = np.concatenate([np.stack([tooth, across], 1), [(4.0, 3.0), (4.0, -3.0)]])
    turn = np.radians(degrees)
    return edge @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) + (x, y)
