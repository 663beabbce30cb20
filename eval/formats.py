"""A comparison as markdown (percent, for people) and as CSV (fractions, for programs)."""

import csv
import io
from collections.abc import Iterable, Sequence

from eval.bootstrap import Interval
from eval.comparison import Comparison, Row
from eval.table import plain

CSV_HEAD = (
    *(
        "dataset",
        "task",
        "variant",
        "split",
        "world",
        "k",
        "curve",
        "backbone",
        "method",
        "space",
        "metric",
    ),
    *(
        "seeds",
        "mean",
        "std",
        "low",
        "high",
        "chance",
        "minus_zero_shot",
        "minus_low",
        "minus_high",
        "seed_values",
    ),
    *("source", "note"),
)

BELOW = "▼"
"""Marks a value below chance."""


def percent(value: float, digits: int = 1) -> str:
    """A fraction as percent, with more digits where it would else read 0.0."""
    shown = f"{100 * value:.{digits}f}"
    return shown if float(shown) or not value else f"{100 * value:.2g}"


def signed(gain: Interval) -> str:
    """A difference in points with its interval."""
    return f"{100 * gain.estimate:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"


def markdown(comparisons: Sequence[Comparison]) -> str:
    """All comparisons as markdown, in percent."""
    return "\n".join(_markdown(comparison) for comparison in comparisons)


def _markdown(comparison: Comparison) -> str:
    """One table with its title, chance row and notes."""
    gains = any(row.gain for row in comparison.rows)
    names = [comparison.name(m) for m in comparison.columns]
    head = ["backbone", "method", "space", "seeds", *names]
    head += [f"{comparison.name(comparison.headline)} − zero_shot"] if gains else []
    body: list[list[str]] = []
    for row in comparison.rows:
        cells = [_cell(comparison, row, m) for m in comparison.columns]
        group = row.group
        line = [group.backbone, group.method, group.space, str(len(group.runs)), *cells]
        body.append(line + ([signed(row.gain) if row.gain else "–"] if gains else []))
    lines = [
        percent(comparison.chance[m]) if m in comparison.chance else "–" for m in comparison.columns
    ]
    body.append(["", "*chance*", "", "", *lines] + (["–"] if gains else []))
    body = [[plain(cell).replace("|", "\\|") for cell in line] for line in body]
    width = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    left = (0, 1, 2)

    def row_text(line: Sequence[str]) -> str:
        padded = [
            c.ljust(w) if i in left else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, width, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * w) if i in left else "-" * (w - 1) + ":" for i, w in enumerate(width)]
    text = [f"### {plain(comparison.title)}", "", f"{comparison.counts}; {comparison.seeds}", ""]
    text += [row_text(head), row_text(rule), *map(row_text, body), ""]
    if any(
        comparison.is_below_chance(row, m) for row in comparison.rows for m in comparison.columns
    ):
        text += [f"{BELOW} below chance", ""]
    return "\n".join(text + [f"Note: {plain(note)}\n" for note in comparison.notes])


def _cell(comparison: Comparison, row: Row, metric: str) -> str:
    """Mean, spread over seeds, interval; marked below chance."""
    cell = row.cells[metric]
    text = percent(cell.mean)
    if cell.std is not None:
        text += f" ± {100 * cell.std:.1f}"
    if cell.low is not None and cell.high is not None:
        text += f" [{percent(cell.low)}, {percent(cell.high)}]"
    return f"{text} {BELOW}" if comparison.is_below_chance(row, metric) else text


def to_csv(comparisons: Sequence[Comparison]) -> str:
    """Every metric of every row, one a line, as fractions."""
    rows: list[Sequence[object]] = [CSV_HEAD]
    for c in comparisons:
        q = c.question
        for row in c.rows:
            for metric, cell in row.cells.items():
                gain = row.gain if metric == c.headline else None
                facts = [q.dataset, q.kind, q.variant, q.split, q.world, c.k, c.curve]
                facts += [row.group.backbone, row.group.method, row.group.space, c.name(metric)]
                numbers = [cell.mean, cell.std, cell.low, cell.high, c.chance.get(metric)]
                numbers += [gain.estimate, gain.low, gain.high] if gain else [None] * 3
                seeds = " ".join(
                    f"{r.seed}:{v:.6g}" for r, v in zip(row.group.runs, cell.seeds, strict=True)
                )
                rows.append([*facts, len(cell.seeds), *numbers, seeds, "", ""])
    return csv_text(rows)


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Rows of values as CSV, a line each; see `csv_cell`."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(map(csv_cell, row) for row in rows)
    return buffer.getvalue()


def csv_cell(value: object) -> str:
    """A CSV cell; text that a spreadsheet would take for a formula is marked as text."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = plain(str(value))
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
