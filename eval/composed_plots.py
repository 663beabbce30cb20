"""Plots of what the parts of a composed head do, as SVG text in the page's colours; by hand, as `diagnostic_plots`.

edit         expert 1   2   3   4          cosine    ▁▂▅▇▅▂       filled: before
add             ▓ 31    ░ 22 …                     ┄┄╮  ╭┄┄       dashed line: after
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from eval.diagnostic_plots import WIDE, opened
from eval.markup import text

STEPS = (0.02, 0.05, 0.1, 0.2, 0.25, 0.5)
"""Distances of marks on the axis of cosines."""


def usage_map(
    kinds: Sequence[str],
    counts: Int[np.ndarray, " g"],
    shares: Float[np.ndarray, "g e"],
    label: str,
) -> str:
    """A square for each kind of edit and expert, the darker the larger the share, which stands in it in percent.

    Args:
        kinds: from top to bottom; the last, of all queries, is set apart.
        counts: queries of each kind.
        shares: means, fractions; a row sums to 1.
        label: what the picture shows, for those who do not see it.
    """
    experts = shares.shape[1]
    longest = max(len(f"{_short(kind)} {n}") for kind, n in zip(kinds, counts, strict=True))
    left = min(210, 16 + 7 * longest)
    wide, high, top, apart = min(76.0, (WIDE - left - 8) / experts), 30, 40, 6
    bottom = top + high * len(kinds) + apart
    most = float(shares.max()) or 1.0
    font = min(12.0, wide * 0.36)
    parts = [
        opened(bottom + 6, label),
        f'<text x="{left + wide * experts / 2:.5g}" y="14" text-anchor="middle">expert, share in %</text>',
    ]
    for e in range(experts):
        x = left + wide * (e + 0.5)
        parts.append(
            f'<text x="{x:.5g}" y="33" text-anchor="middle" font-size="{font:.3g}">{e + 1}</text>'
        )
    for g, kind in enumerate(kinds):
        y = top + high * g + apart * (g == len(kinds) - 1)
        parts.append(
            f'<text x="{left - 8}" y="{y + high / 2 + 4}" text-anchor="end">{text(_short(kind))} '
            f'<tspan fill="var(--soft)">{counts[g]}</tspan></text>'
        )
        for e in range(experts):
            share = float(shares[g, e])
            x = left + wide * e
            parts.append(
                f'<rect x="{x:.5g}" y="{y}" width="{wide:.5g}" height="{high}" fill="var(--s0)" '
                f'fill-opacity="{0.6 * share / most:.3f}" stroke="var(--grid)"><title>{text(kind)}, expert {e + 1}: '
                f"{100 * share:.2f} %, {counts[g]} queries</title></rect>"
                f'<text x="{x + wide / 2:.5g}" y="{y + high / 2 + 4}" text-anchor="middle" font-size="{font:.3g}">'
                f"{100 * share:.1f}</text>"
            )
    return "".join([*parts, "</svg>"])


def before_and_after(
    edges: Float[np.ndarray, " bins_plus_1"], counts: Int[np.ndarray, "2 bins"], label: str
) -> str:
    """Shares of cosines in bins, before as a filled shape and after as a dashed line, over the bins that hold any.

    Args:
        edges: of the bins.
        counts: in each bin, before and after; each row is drawn as shares of its sum.
        label: what the picture shows, for those who do not see it.
    """
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    held = np.flatnonzero(counts.sum(0))
    first = max(int(held.min(initial=len(edges))) - 1, 0) if len(held) else 0
    last = min(int(held.max(initial=0)) + 1, len(edges) - 2) if len(held) else len(edges) - 2
    low, high = float(edges[first]), float(edges[last + 1])
    left, top, floor = 40, 12, 172
    width = WIDE - left - 16
    most = float(shares.max()) or 1.0

    def x(cosine: float) -> float:
        return left + width * (cosine - low) / (high - low)

    def y(share: float) -> float:
        return floor - (floor - top) * share / most

    parts = [opened(floor + 44, label)]
    step = next((s for s in STEPS if (high - low) / s <= 7), STEPS[-1])
    for k in range(int(np.ceil(low / step - 1e-9)), int(np.floor(high / step + 1e-9)) + 1):
        at = x(k * step)
        parts.append(f'<path d="M{at:.5g} {top}V{floor}" stroke="var(--grid)"/>')
        parts.append(
            f'<text x="{at:.5g}" y="{floor + 16}" text-anchor="middle">{k * step:g}</text>'
        )
    parts.append(
        f'<text x="{left + width / 2}" y="{floor + 34}" text-anchor="middle">cosine</text>'
    )
    parts += [
        f'<text x="{left - 6}" y="{y(share) + 4:.5g}" text-anchor="end">{100 * share:.0f} %</text>'
        for share in (0.0, most)
    ]
    for row, shape in zip(
        shares,
        (
            'fill="var(--s0)" fill-opacity=".45" stroke="var(--s0)"',
            'fill="none" stroke="var(--s1)" stroke-width="2" stroke-dasharray="5 3"',
        ),
        strict=True,
    ):
        path = f"M{x(low):.5g} {floor}"
        for b in range(first, last + 1):
            path += f"V{y(float(row[b])):.5g}H{x(float(edges[b + 1])):.5g}"
        parts.append(f'<path d="{path}V{floor}" {shape}/>')
    parts.append(f'<path d="M{left} {floor}H{left + width}" stroke="var(--ink)"/>')
    return "".join([*parts, "</svg>"])


def _short(kind: str) -> str:
    return kind if len(kind) <= 24 else f"{kind[:23]}…"
