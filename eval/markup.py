"""Small pieces of HTML: escaped text, a dot in a series' colour, files and pictures inside the page."""

import base64
import html
import io
from collections.abc import Iterable
from math import isfinite

from jaxtyping import UInt8
from matplotlib.image import imsave
from numpy import ndarray

from eval import plots
from eval.table import plain

MANY = 10
"""Columns above which a table is printed smaller, so that paper is wide enough."""


def text(value: object) -> str:
    """Escaped, without control characters."""
    return html.escape(plain(str(value)))


def data_link(name: str, content: str) -> str:
    """A link that saves `content` as a CSV file, without a server."""
    code = base64.b64encode(content.encode()).decode()
    return f'<a class="csv" download="{text(name)}.csv" href="data:text/csv;base64,{code}">CSV</a>'


def data_image(png: bytes) -> str:
    """A PNG inside the page."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def png(pixels: UInt8[ndarray, "h w c"]) -> bytes:
    """Pixels as a PNG file."""
    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png")
    return buffer.getvalue()


def chip(number: int) -> str:
    """A dot in the colour of a series."""
    return f'<span class="chip" style="background:{plots.colour(number)}"></span>'


def cell(shown: str, value: float | int | None = None, *classes: str) -> str:
    """A cell of a table: HTML, the number that it is sorted by, and its classes."""
    named = f' class="{" ".join(classes)}"' if classes else ""
    number = "" if value is None or not isfinite(value) else f' data-value="{value:.12g}"'
    return f"<td{named}{number}>{shown}</td>"


def table(
    head: Iterable[str], body: Iterable[str], says: str, foot: str = "", *, sorts: bool = True
) -> str:
    """A table that scrolls inside its own box, and whose columns can be sorted where scripts run.

    Args:
        head: the cells of the first row, `<th>` each.
        body: rows, `<tr>` each; `foot` stays below them in any order.
        says: what the table is, for those who do not see it.
        foot: rows that are no part of what is sorted.
        sorts: may its rows stand in another order?

    """
    heads = list(head)
    kinds = ["sorts"] * sorts + ["many"] * (len(heads) > MANY)
    kind = f' class="{" ".join(kinds)}"' if kinds else ""
    below = f"<tfoot>{foot}</tfoot>" if foot else ""
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{text(says)}"><table{kind}><thead><tr>'
        f"{''.join(heads)}</tr></thead><tbody>{''.join(body)}</tbody>{below}</table></div>"
    )
