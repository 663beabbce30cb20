"""What CZSL rows get right attribute by attribute, and what they take for what, in words, plots and CSV."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from eval import diagnostic_plots
from eval.comparison import Comparison, Row
from eval.composition import Composition, CompositionScores
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
from eval.formats import csv_table
from eval.markup import chip, data_link, text

SHOWN = 30
"""Attributes drawn with their accuracy, at most; the CSV has all."""

CONFUSED = 24
"""Attributes drawn on a map of confusions, at most: as many as can still be read in a column of the page."""

LISTED = 8
"""Confusions in words under each map."""

NOUNS: Mapping[Kind, str] = {"attr": "attribute", "obj": "object"}


def diagnostics_of(c: Comparison, series: Mapping[str, int]) -> str:
    """All of it for one CZSL table on the exact curve; nothing for others."""
    if c.curve != "exact":
        return ""
    figures = [_accuracies(c, kind, series) for kind in NOUNS]
    maps = [_confusion(row, series) for row in c.rows if _is_whole(row)]
    note = ""
    if len(maps) < len(c.rows):
        note = (
            '<p class="soft">Confusion given the object needs every score of a table; tables that keep the best pairs '
            "of each image only are left out.</p>"
        )
    return (
        "<h3>Attributes and objects one by one</h3>"
        f'<p class="soft">{_WHERE}</p><div class="plots">{"".join(figures)}</div>'
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


def _accuracies(c: Comparison, kind: Kind, series: Mapping[str, int]) -> str:
    """Marks of every row on the hardest primitives, all rows of the table in one plot a kind and backbone."""
    lines: list[Sequence[object]] = [
        ("row", "seed", kind, "bias", "n", "right", "n_seen", "right_seen", "n_unseen", "right_unseen")
    ]  # fmt: skip
    shares: dict[str, NDArray[np.float64]] = {}
    first = accuracy(_tables(c.rows[0])[0], kind, None)
    for row in c.rows:
        found: list[Accuracy] = []
        for run, table in zip(row.group.runs, _tables(row), strict=True):
            best = best_hm_bias(table)
            found.append(accuracy(table, kind, best))
            for bias in dict.fromkeys((best, None)):
                lines += _lines(row.group.label, run.seed, bias, accuracy(table, kind, bias))
        shares[row.group.label] = np.mean([f.share()[:, 0] for f in found], axis=0)
    mean = np.mean(list(shares.values()), axis=0)
    hardest = np.argsort(mean, kind="stable")[:SHOWN]
    drawn = [int(i) for i in hardest]
    names, counts = [first.names[i] for i in drawn], [int(first.n[i].sum()) for i in drawn]
    noun = NOUNS[kind]
    backbones = list(dict.fromkeys(row.group.backbone for row in c.rows))
    cut = ""
    if len(first.names) > SHOWN:
        cut = f" The {SHOWN} of {len(first.names)} with the lowest mean over the rows are drawn."
    figures: list[str] = []
    for backbone in backbones:
        mine = {
            row.group.label: shares[row.group.label][hardest]
            for row in c.rows
            if row.group.backbone == backbone
        }
        svg = diagnostic_plots.primitive_dots(
            names, mine, series, counts, f"Accuracy by {noun}, {backbone}, {c.title}"
        )
        keys = ", ".join(_key(series[row], row.partition(" · ")[0]) for row in mine)
        link = "" if figures else data_link(f"accuracy-{kind}", csv_table(lines))
        figures.append(
            f"<figure>{svg}<figcaption><b>Accuracy by {noun}</b>, {text(backbone)}: {keys}.{cut} {link}</figcaption>"
            "</figure>"
        )
    return "".join(figures)


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


def _confusion(row: Row, series: Mapping[str, int]) -> str:
    """The map of one row, its most frequent confusions in words, and all of them as CSV."""
    group = row.group
    found = mean_confusion([confusion(table, best_hm_bias(table)) for table in _tables(row)])
    matrix = found.matrix()
    order = most_confused(matrix, CONFUSED)
    seeds = f", mean of {len(group.runs)} seeds" if len(group.runs) > 1 else ""
    alone = f"; {found.alone:.4g} images without a choice" if found.alone else ""
    heading = (
        f"<b>{chip(series[group.label])}{text(group.label)}</b>{seeds}: {100 * found.right():.1f} % right given the "
        f"object (chance {100 * found.chance:.1f} %{alone})."
    )
    if not len(order):
        return f"<figure><figcaption>{heading} No attribute was taken for another.</figcaption></figure>"
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
    label = f"Attributes taken for each other given the object, {group.label}"
    svg = diagnostic_plots.confusion_map(names, shares[some], matrix[some], label)
    most = found.most()
    listed = "".join(
        f"<li>{text(m.obj)}: {text(m.attr)} taken for {text(m.guess)}, {m.taken:.4g} of {m.n:.4g}</li>"
        for m in most[:LISTED]
    )
    link = data_link("confusion", csv_table([("attr", "taken_for", "obj", "images", "of"), *most]))
    return f"<figure>{svg}<figcaption>{heading}{cut} {link}<ol>{listed}</ol></figcaption></figure>"


def _shares(matrix: Float[np.ndarray, "a a"], found: Confusion) -> Float[np.ndarray, "a a"]:
    """Rows as shares of the images of their attribute; 0 where there is none."""
    n = (matrix.sum(1) + found.silent)[:, None]
    return np.divide(matrix, n, out=np.zeros_like(matrix), where=n > 0)
