"""Small pieces of HTML: escaped text, a dot in a series' colour, files and pictures inside the page."""

import base64
import html
import io

from jaxtyping import UInt8
from matplotlib.image import imsave  # pyright: ignore[reportUnknownVariableType]
from numpy import ndarray

from eval import plots
from eval.table import plain


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
