"""What goes wrong most, side by side: an item a row, what each row of the comparison answers to it in a column.

Pictures and words stand where a run of the comparison holds them (`headstart compare … --pictures N`); ids elsewhere.
"""

from collections.abc import Mapping, Sequence

from eval.album import Album, album_of
from eval.comparison import Comparison
from eval.correctness import RULES
from eval.failures import SHOWN, Answer, Failure, hardest
from eval.figures import names_of
from eval.formats import csv_table, percent
from eval.markup import cell, chip, data_link, table, text

LISTED = 200
"""Items in the CSV, at most."""


def failures_of(c: Comparison, series: Mapping[str, int]) -> str:
    """The hardest items in a table; nothing where nothing goes wrong, and for other tasks."""
    found = hardest(c, LISTED) if c.curve != "legacy" else []
    if not found:
        return ""
    names = names_of(c)
    shown = found[:SHOWN]
    album = album_of(c, shown)
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
        ("item", "asked", "row", "right", "answer", "first", "wrong_share")
    ]
    csv += [
        (f.name, f.asked, names[row.group], int(a.is_right), a.words, a.image or a.caption, f.wrong)
        for f in found
        for row, a in zip(c.rows, f.answers, strict=True)
    ]
    return (
        f'<h3>What goes wrong most</h3><p class="soft">{_says(c, len(shown), album)} '
        f"{data_link('failures', csv_table(csv))} of the first {len(found)}</p>"
        f'<div class="asked" style="{album.style()}">{table(head, lines, f"What goes wrong most, {c.title}")}</div>'
    )


_ASKED = {"czsl": "true pair", "matching": "item", "retrieval": "query", "composed": "query"}
_ANSWERS = {
    "czsl": "A cell is the pair that is predicted.",
    "matching": "A cell says which comparisons are lost or tied: “image 1 → caption 2” where image 1 does not prefer "
    "its own caption.",
    "retrieval": "A cell is what is ranked first, and where the best right one ranks.",
    "composed": "A cell is the image ranked first, and where the best right one ranks.",
}
_CAPTIONS = ("true caption", "false caption")
_NO_PICTURES = " Pictures are shown where a run holds them (headstart compare … --pictures N)."
_ONE_IMAGE = "A cell says whether the true caption is preferred; where both are alike it is not."


def _says(c: Comparison, n: int, album: Album) -> str:
    """How the items were chosen, and how to read a cell."""
    pairs = c.question.kind == "matching" and not c.question.variant.startswith("2×2")
    reads = _ONE_IMAGE if pairs else _ANSWERS[c.question.kind]
    return (
        f"The {n} items that are wrong most often, over the seeds of each row and then over rows; of equal ones those "
        f"whose answers are furthest off, then the first. Right: {RULES[c.question.kind]}. "
        f"{reads} Cells are of each row’s first seed.{'' if album.images else _NO_PICTURES}"
    )


def _line(failure: Failure, album: Album) -> str:
    """One item: what is asked, how often it is wrong, and all answers."""
    cells = [
        f"<th scope=row>{_asked(failure, album)}</th>",
        cell(percent(failure.wrong, 0), failure.wrong),
    ]
    cells += [_answer(answer, album) for answer in failure.answers]
    return f"<tr>{''.join(cells)}</tr>"


def _asked(failure: Failure, album: Album) -> str:
    """What is asked, in words and pictures, and the item's id."""
    words = text(failure.asked)
    says, shows = album.says.get(failure.name, ()), album.shows.get(failure.name, ())
    if failure.reference:
        words = f"“{text(says[0])}”" if says else words
        pictures = album.thumb(failure.reference, "reference")
        pictures += album.thumb(failure.target, "right")
    elif failure.target:
        words = f"“{text(says[0])}”" if says else ""
        pictures = album.thumb(failure.target, "right")
    else:
        names = [f"image {n}" for n in range(1, len(shows) + 1)] if len(shows) > 1 else [""]
        pictures = "".join(map(album.thumb, shows, names))
        captions = _CAPTIONS if len(shows) == 1 else ("caption 1", "caption 2")
        words += "".join(
            f"<small>{name}: “{text(said)}”</small>"
            for name, said in zip(captions, says, strict=False)
        )
    pictures = f'<span class="thumbs">{pictures}</span>' if pictures else ""
    return f"{words}{pictures}<small class=soft>{text(failure.name)}</small>"


def _answer(answer: Answer, album: Album) -> str:
    """What a row says, with a mark that is more than a colour."""
    mark = '<span class="up">✓</span>' if answer.is_right else '<span class="down">✗</span>'
    if not (first := answer.image or answer.caption):
        return cell(f"{mark} {text(answer.words)}", None, "words")
    shown = album.thumb(answer.image, "")
    name = "" if shown else f" {text(first)}"
    if said := album.texts.get(answer.caption):
        name = f" “{text(said)}”"
    return cell(f"{mark}{name}{shown}<small class=soft>{text(answer.words)}</small>", None, "words")
