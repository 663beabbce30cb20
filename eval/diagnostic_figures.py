"""What CZSL rows get right attribute by attribute, and what they take for what, in words, plots and CSV."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from eval import diagnostic_plots
from eval.breakdown_html import side_by_side
from eval.comparison import Comparison, Row
from eval.composition import Composition, CompositionScores
from eval.czsl_summary import summarise
from eval.diagnostics import (
    Accuracy,
    Confusion,
    Kind,
    accuracy,
    best_hm_bias,
    confusion,
    mean_confusion,
    most_confused,
)
from eval.figures import figure, names_of, numbers_of
from eval.formats import csv_table
from eval.markup import chip, data_link, text
from eval.reduction import Layout
from eval.table import blocks

SHOWN = 30
"""Attributes drawn with their accuracy, at most; the CSV has all."""

CONFUSED = 24
"""Attributes drawn on a map of confusions, at most: as many as can still be read in a column of the page."""

LISTED = 8
"""Confusions in words under each map."""

NOUNS: Mapping[Kind, str] = {"attr": "attribute", "obj": "object"}


class _Line(NamedTuple):
    """A row of the table, drawn.

    Attributes:
        row: as it is in the table.
        name, number: of it on the page, and of its colour and mark.
        best: of each seed, its table with the best pairs of each image alone: all that accuracies need.
        bias: of each seed, that of the best harmonic mean.

    """

    row: Row
    name: str
    number: int
    best: list[Composition]
    bias: list[float | None]


def diagnostics_of(c: Comparison, series: Mapping[str, int]) -> str:
    """All of it for one CZSL table on the exact curve; nothing for others."""
    if c.curve != "exact":
        return ""
    names = names_of(c)
    numbers = numbers_of(names, series)
    rows: list[_Line] = []
    for row in c.rows:
        best = [_best_pairs(table) for table in _tables(row)]
        name = names[row.group]
        rows.append(_Line(row, name, numbers[name], best, [best_hm_bias(t) for t in best]))
    figures, tables = zip(*[_accuracies(c, rows, kind, series) for kind in NOUNS], strict=True)
    maps = [_confusion(line) for line in rows if _is_whole(line.row)]
    note = ""
    if len(maps) < len(c.rows):
        note = (
            '<p class="soft">Confusion given the object needs every score of a table; tables that keep the best pairs '
            "of each image only are left out.</p>"
        )
    return (
        "<h3>Attributes and objects one by one</h3>"
        f'<p class="soft">{_WHERE}</p><div class="plots">{"".join(figures)}</div>{"".join(tables)}'
        + (f'<h3>Attributes of one object taken for each other</h3><p class="soft">{_GIVEN}</p>' if maps else "")
        + note
        + (f'<div class="plots">{"".join(maps)}</div>' if maps else "")
    )  # fmt: skip


_WHERE = (
    "Share of the images of each attribute (object) whose predicted pair has it, at the calibration bias of the best "
    "harmonic mean: k = 1, each seed at its own bias, the mean over seeds. The number beside a name is its images. "
    "That bias is tuned on these very images; the CSV has the shares without bias too, of seen and of unseen pairs, "
    "seed by seed."
)
_GIVEN = (
    "Each image is put against the pairs of its true object only, at the same bias: rows are the true attribute, "
    "columns what it was taken for, as a share of the row over all objects. Off the diagonal the darkest square is the "
    "largest share of that map; on the diagonal a bar shows what is right."
)


def _tables(row: Row) -> list[Composition]:
    return [table for table in row.group.tables if isinstance(table, Composition)]


def _is_whole(row: Row) -> bool:
    return all(isinstance(table, CompositionScores) for table in row.group.tables)


def _best_pairs(table: Composition) -> Composition:
    """The same images with their best seen and best unseen pair alone: the scores are gone through once."""
    if not isinstance(table, CompositionScores):
        return table
    rows = (table.scores[b] for b in blocks(*table.shape))
    facts: dict[str, Any] = {"split": table.split, "space": table.space, "world": table.world}
    return summarise(rows, Layout.of(table.seen), table.target, table.pairs, keep=1, **facts)


def _accuracies(
    c: Comparison, rows: Sequence[_Line], kind: Kind, series: Mapping[str, int]
) -> tuple[str, str]:
    """Marks of every row on the hardest primitives, one plot a kind and backbone; and the table of all rows."""
    lines: list[Sequence[object]] = [
        ("row", "seed", kind, "bias", "n", "right", "n_seen", "right_seen", "n_unseen", "right_unseen")
    ]  # fmt: skip
    at_best: list[list[Accuracy]] = []
    for line in rows:
        at_best.append([])
        for run, table, best in zip(line.row.group.runs, line.best, line.bias, strict=True):
            found = {bias: accuracy(table, kind, bias) for bias in dict.fromkeys((best, None))}
            at_best[-1].append(found[best])
            for bias, measured in found.items():
                lines += _lines(line.name, run.seed, bias, measured)
    first = at_best[0][0]
    shares = [np.mean([f.share()[:, 0] for f in found], axis=0) for found in at_best]
    hardest = np.argsort(np.mean(shares, axis=0), kind="stable")[:SHOWN]
    drawn = [int(i) for i in hardest]
    names, counts = [first.names[i] for i in drawn], [int(first.n[i].sum()) for i in drawn]
    noun = NOUNS[kind]
    cut = ""
    if len(first.names) > SHOWN:
        cut = f" The {SHOWN} of {len(first.names)} with the lowest mean over the rows are drawn."
    numbers = {line.name: line.number for line in rows}
    figures: list[str] = []
    for backbone in dict.fromkeys(line.row.group.backbone for line in rows):
        mine = {
            line.name: share[hardest]
            for line, share in zip(rows, shares, strict=True)
            if line.row.group.backbone == backbone
        }
        svg = diagnostic_plots.primitive_dots(
            names, mine, numbers, counts, f"Accuracy by {noun}, {backbone}, {c.title}"
        )
        keys = ", ".join(_key(numbers[row], row.removesuffix(f" · {backbone}")) for row in mine)
        link = "" if figures else data_link(f"accuracy-{kind}", csv_table(lines))
        caption = f"<b>Accuracy by {noun}</b>, {text(backbone)}: {keys}.{cut} {link}"
        figures.append(figure(svg, caption))
    return "".join(figures), _table(c, series, first, shares, drawn, noun)


def _table(
    c: Comparison,
    series: Mapping[str, int],
    first: Accuracy,
    shares: Sequence[Float[np.ndarray, " p"]],
    drawn: Sequence[int],
    noun: str,
) -> str:
    """The same numbers, all rows side by side; nothing for one row."""
    if len(shares) < 2:
        return ""
    made = side_by_side(
        c, series, [first.names[i] for i in drawn], np.array(shares).T[list(drawn)], noun,
        counts=[int(first.n[i].sum()) for i in drawn],
    )  # fmt: skip
    return f"<details><summary>{noun.capitalize()} by {noun}, all rows side by side</summary>{made}</details>"


def _lines(label: str, seed: int, bias: float | None, found: Accuracy) -> list[Sequence[object]]:
    shown = "none" if bias is None else bias
    return [
        (label, seed, name, shown, int(n.sum()), int(right.sum()), int(n[0]), int(right[0]), int(n[1]), int(right[1]))
        for name, n, right in zip(found.names, found.n, found.right, strict=True)
    ]  # fmt: skip


def _key(number: int, name: str) -> str:
    """The mark of a series, as in the plot, and its name."""
    mark = diagnostic_plots.MARKS[number % len(diagnostic_plots.MARKS)]
    fill = diagnostic_plots.colour(number)
    return (
        f'<span class="key"><svg viewBox="-7 -7 14 14" aria-hidden="true"><path d="{mark}" fill="{fill}"/></svg> '
        f"{text(name)}</span>"
    )


def _confusion(line: _Line) -> str:
    """The map of one row, its most frequent confusions in words, and all of them as CSV."""
    tables, seeds = _tables(line.row), ""
    if len(tables) > 1:
        seeds = f", mean of {len(tables)} seeds"
    found = mean_confusion([confusion(t, b) for t, b in zip(tables, line.bias, strict=True)])
    matrix = found.matrix()
    order = most_confused(matrix, CONFUSED)
    alone = f"; {found.alone:.4g} images without a choice" if found.alone else ""
    heading = (
        f"<b>{chip(line.number)}{text(line.name)}</b>{seeds}: {100 * found.right():.1f} % right given the "
        f"object (chance {100 * found.chance:.1f} %{alone})."
    )
    if not len(order):
        return figure("", f"{heading} No attribute was taken for another.")
    shares = _shares(matrix, found)
    some = np.ix_(order, order)
    names = [found.attrs[int(i)] for i in order]
    confused = int(((matrix + matrix.T - 2 * np.diag(np.diag(matrix))).sum(1) > 0).sum())
    cut = (
        f" The {len(order)} attributes with the most confusions, of {confused} with any, those taken for each other "
        "side by side."
        if confused > len(order)
        else " Attributes taken for each other stand side by side; those never confused are left out."
    )
    label = f"Attributes taken for each other given the object, {line.name}"
    svg = diagnostic_plots.confusion_map(names, shares[some], matrix[some], label)
    most = found.most()
    listed = "".join(
        f"<li>{text(m.obj)}: {text(m.attr)} taken for {text(m.guess)}, {m.taken:.4g} of {m.n:.4g}</li>"
        for m in most[:LISTED]
    )
    link = data_link("confusion", csv_table([("attr", "taken_for", "obj", "images", "of"), *most]))
    return figure(svg, f"{heading}{cut} {link}<ol>{listed}</ol>")


def _shares(matrix: Float[np.ndarray, "a a"], found: Confusion) -> Float[np.ndarray, "a a"]:
    """Rows as shares of the images of their attribute; 0 where there is none."""
    n = (matrix.sum(1) + found.silent)[:, None]
    return np.divide(matrix, n, out=np.zeros_like(matrix), where=n > 0)
