"""One number by category, attribute or object, all rows of a comparison side by side, whatever their backbone."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from eval.comparison import Comparison
from eval.formats import percent
from eval.markup import cell, chip, table, text


def categories_of(c: Comparison, series: Mapping[str, int]) -> str:
    """Categories × rows, for every metric that is given by category; nothing for one row or without categories."""
    if len(c.rows) < 2 or not c.categories:
        return ""
    tables: list[str] = []
    for metric in [m for m in c.columns if "/" not in m]:
        keys = [f"{metric}/{name}" for name in c.categories]
        names = [n for n, key in zip(c.categories, keys, strict=True) if _all_have(c, key)]
        if not names:
            continue
        values = np.array([[row.cells[f"{metric}/{n}"].mean for row in c.rows] for n in names])
        chance = [c.chance.get(f"{metric}/{n}") for n in names]
        tables.append(
            side_by_side(c, series, names, values, f"{c.name(metric)} by category", chance)
        )
    return f"<h3>Category by category</h3>{_folded(tables)}" if tables else ""


def _all_have(c: Comparison, key: str) -> bool:
    return all(key in row.cells for row in c.rows)


def _folded(tables: Sequence[str]) -> str:
    """The first open, the others a click away."""
    first, *others = tables
    more = f"<details><summary>By other metrics</summary>{''.join(others)}</details>"
    return first + more * bool(others)


def side_by_side(
    c: Comparison,
    series: Mapping[str, int],
    names: Sequence[str],
    values: Float[np.ndarray, "p m"],
    what: str,
    chance: Sequence[float | None] = (),
    counts: Sequence[int] = (),
) -> str:
    """A table of shares: names down, rows of the comparison across, the best of each name in bold.

    Args:
        c: whose rows they are.
        series: row → number of its colour.
        names: categories, attributes or objects.
        values: fractions, one row a name.
        what: heads the first column.
        chance: of each name, if there is one.
        counts: items of each name, if they are known.

    """
    head = [f"<th>{text(what)}</th>"]
    head += ["<th>items</th>"] * bool(counts)
    head += [
        f"<th>{chip(series[row.group.label])}{text(row.group.method)}"
        f"<small class=soft>{text(row.group.backbone)}</small></th>"
        for row in c.rows
    ]
    head.append("<th>largest<small class=soft>minus smallest</small></th>")
    head += ["<th>chance</th>"] * bool(chance)
    lines: list[str] = []
    for i, name in enumerate(names):
        cells = [f"<th scope=row>{text(name)}</th>"]
        cells += [cell(str(counts[i]), counts[i])] if counts else []
        best, least = float(values[i].max()), float(values[i].min())
        for value in values[i].tolist():
            classes = ["best"] if value == best > least else []
            cells.append(cell(percent(value), value, *classes))
        cells.append(cell(percent(best - least), best - least))
        line = chance[i] if chance else None
        cells += [cell("–" if line is None else percent(line), line)] * bool(chance)
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return table(head, lines, f"{what}, {c.title}")
