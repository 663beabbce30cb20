"""What goes wrong most, side by side: an item a row, what each row of the comparison answers to it in a column.

Pictures and edits stand where a run of the comparison holds them (`headstart score … --pictures N`); ids elsewhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from eval.comparison import Comparison
from eval.composed_pictures import QUERY, Found, read_query
from eval.composed_table import ComposedScores
from eval.correctness import RULES
from eval.failures import SHOWN, Answer, Failure, hardest
from eval.figures import names_of
from eval.formats import csv_table, percent
from eval.markup import cell, chip, data_image, data_link, png, table, text

LISTED = 200
"""Items in the CSV, at most."""


@dataclass(frozen=True, slots=True)
class Album:
    """Pictures that runs hold of a comparison's queries.

    Attributes:
        images: image id → picture, as a data URI, each once.
        edits: query id → words.

    """

    images: dict[str, str] = field(default_factory=dict[str, str])
    edits: dict[str, str] = field(default_factory=dict[str, str])

    def style(self) -> str:
        """Every picture once, under the name that `thumb` uses."""
        return "".join(f"--shot-{n}:url({uri});" for n, uri in enumerate(self.images.values()))

    def thumb(self, image: str, says: str) -> str:
        """A small picture; the id alone where no run holds it, and nothing where `says` is empty then."""
        below = f"<small class=soft>{says}</small>" if says else ""
        if image not in self.images:
            return f"<small class=soft>{says}: {text(image)}</small>" if says else ""
        number = list(self.images).index(image)
        return (
            f'<span class="thumb"><span role="img" aria-label="{text(f"{says} {image}".strip())}" '
            f'title="{text(image)}" style="background-image:var(--shot-{number})"></span>{below}</span>'
        )


def failures_of(c: Comparison, series: Mapping[str, int]) -> str:
    """The hardest items in a table; nothing where nothing goes wrong, and for other tasks."""
    found = hardest(c, LISTED) if c.curve != "legacy" else []
    if not found:
        return ""
    names = names_of(c)
    shown = found[:SHOWN]
    album = _album(c, shown) if c.question.kind == "composed" else Album()
    head = [
        f"<th>{_ASKED[c.question.kind]}</th>",
        "<th>wrong<small class=soft>% of rows</small></th>",
    ]
    head += [
        f'<th class="words">{chip(series[row.group.label])}{text(row.group.method)}'
        f"<small class=soft>{text(row.group.backbone)}</small></th>"
        for row in c.rows
    ]
    lines = [_line(failure, album) for failure in shown]
    csv: list[Sequence[object]] = [
        ("item", "asked", "row", "right", "answer", "image", "wrong_share")
    ]
    csv += [
        (f.name, f.asked, names[row.group], int(a.is_right), a.words, a.image, f.wrong)
        for f in found
        for row, a in zip(c.rows, f.answers, strict=True)
    ]
    return (
        f'<h3>What goes wrong most</h3><p class="soft">{_says(c, len(shown))} '
        f"{data_link('failures', csv_table(csv))} of the first {len(found)}</p>"
        f'<div class="asked" style="{album.style()}">{table(head, lines, f"What goes wrong most, {c.title}")}</div>'
    )


_ASKED = {"czsl": "true pair", "matching": "item", "composed": "query"}
_ANSWERS = {
    "czsl": "A cell is the pair that is predicted.",
    "matching": "A cell says which comparisons are lost or tied: “image 1 → caption 2” where image 1 does not prefer "
    "its own caption.",
    "composed": "A cell is the image ranked first, and where the best right one ranks. Pictures are shown where a run "
    "holds them (headstart score … --pictures N).",
}
_ONE_IMAGE = "A cell says whether the true caption is preferred; where both are alike it is not."


def _says(c: Comparison, n: int) -> str:
    """How the items were chosen, and how to read a cell."""
    pairs = c.question.kind == "matching" and not c.question.variant.startswith("2×2")
    reads = _ONE_IMAGE if pairs else _ANSWERS[c.question.kind]
    return (
        f"The {n} items that are wrong most often, over the seeds of each row and then over rows; of equal ones those "
        f"whose answers are furthest off, then the first. Right: {RULES[c.question.kind]}. "
        f"{reads} Cells are of each row’s first seed."
    )


def _line(failure: Failure, album: Album) -> str:
    """One item: what is asked, how often it is wrong, and all answers."""
    asked = f"{text(failure.asked)}<small class=soft>{text(failure.name)}</small>"
    if failure.reference:
        edit = album.edits.get(failure.name)
        words = f"“{text(edit)}”" if edit else text(failure.asked)
        pictures = album.thumb(failure.reference, "reference")
        pictures += album.thumb(failure.target, "right")
        asked = f'{words}<span class="thumbs">{pictures}</span><small class=soft>{text(failure.name)}</small>'
    cells = [f"<th scope=row>{asked}</th>", cell(percent(failure.wrong, 0), failure.wrong)]
    cells += [_answer(answer, album) for answer in failure.answers]
    return f"<tr>{''.join(cells)}</tr>"


def _answer(answer: Answer, album: Album) -> str:
    """What a row says, with a mark that is more than a colour."""
    mark = '<span class="up">✓</span>' if answer.is_right else '<span class="down">✗</span>'
    if not answer.image:
        return cell(f"{mark} {text(answer.words)}", None, "words")
    shown = album.thumb(answer.image, "")
    name = "" if shown else f" {text(answer.image)}"
    return cell(f"{mark}{name}{shown}<small class=soft>{text(answer.words)}</small>", None, "words")


def _album(c: Comparison, shown: Sequence[Failure]) -> Album:
    """Pictures of the images that are shown, from the runs of the comparison that were scored on the same data set."""
    wanted = {f.reference for f in shown} | {f.target for f in shown}
    wanted |= {a.image for f in shown for a in f.answers}
    reference: dict[str, str] = {}
    scored = c.rows[0].group.tables[0]
    if isinstance(scored, ComposedScores):
        reference = dict(zip(scored.ids, scored.queries.reference, strict=True))
    album = Album()
    for run in (run for row in c.rows for run in row.group.runs):
        for path in run.pictures:
            if QUERY.fullmatch(path.name):
                _collect(read_query(path), wanted, reference, album)
    return album


def _collect(found: Found, wanted: set[str], reference: Mapping[str, str], album: Album) -> None:
    """Add what a file holds of the pictures wanted, and its edit."""
    query = str(found.get("id", ""))
    if query not in reference:
        return
    album.edits[query] = " / ".join(str(words) for words in np.atleast_1d(found["edit"]))
    images = [(reference[query], found["reference"])]
    images += zip(found["names"].tolist(), found["images"], strict=True)
    for name, pixels in images:
        if name in wanted and name not in album.images:
            album.images[name] = data_image(png(pixels))
