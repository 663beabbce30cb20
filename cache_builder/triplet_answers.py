r"""Triplets by a language model that somebody else runs: prompts out, answers in.

    prompts.jsonl  {"id": "a.jpg/a.jpg#0", "image": "a.jpg", "reference_caption": "a red mug", "prompt": "Here is …"}
    answers.jsonl  {"id": "a.jpg/a.jpg#0", "answer": "Sure! {\"modification\": …, \"target_caption\": …}"}

An answer is a text with one JSON object in it, perhaps fenced or with words around it, or the object itself. Every row
is taken, or counted under exactly one reason. The wording of the prompt is ours.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_builder.records import (
    MAX_JSON,
    DatasetError,
    DatasetNotFound,
    check_unicode,
    parse_json,
    read_text,
)
from cache_builder.triplet_files import Caption, Triplet, fault, write_rows

WANTED = ("modification", "target_caption")
"""Keys of the object that is asked for."""

MOST_CHARACTERS = 10_000
"""Length of an answer; the object takes some hundred characters."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What was made of a model's answers.

    Attributes:
        triplets: taken, in the order of the rows.
        rejected: reason → how many rows.
        unanswered: captions without a triplet.

    """

    triplets: tuple[Triplet, ...]
    rejected: Counter[str]
    unanswered: int


def prompt(caption: str) -> str:
    """What a language model is asked about a caption.

    >>> prompt("a red mug")[:33]
    'Here is the caption of a picture:'
    """
    return (
        f"Here is the caption of a picture: {json.dumps(caption, ensure_ascii=False)}\n"
        "Think of one visible change to that picture: something in it becomes another thing or looks different, goes "
        'away, or comes in. Answer with one JSON object and nothing else. Its key "modification" holds the change as '
        'a short instruction of at most fifteen words, which does not repeat the caption. Its key "target_caption" '
        "holds the caption of the changed picture; it keeps every word of the caption above that stays true."
    )


def write_prompts(captions: Sequence[Caption], path: Path) -> int:
    """One line a caption; a file that is there is not overwritten. Returns their number."""
    rows = [
        {"id": c.name, "image": c.image, "reference_caption": c.text, "prompt": prompt(c.text)}
        for c in captions
    ]
    write_rows(rows, path)
    return len(rows)


def read_answers(path: Path, captions: Sequence[Caption]) -> Answers:
    """The triplets that can be used of a language model's answers, and what became of the other rows.

    Args:
        path: the lines of `write_prompts`, with `answer` in them.
        captions: those that were asked about.

    Raises:
        DatasetError: the file is no UTF-8 or too large, or no row could be used; then names every reason.
        DatasetNotFound: no such file.
    """
    if not path.is_file():
        raise DatasetNotFound(f"there is no file {path} of answers")
    asked = {c.name: c for c in captions}
    found: dict[str, Triplet] = {}
    rejected = Counter[str]()
    n = 0
    for line in read_text(path, MAX_JSON).split("\n"):
        if not line.strip():
            continue
        n += 1
        triplet = _taken(line, asked, found)
        if isinstance(triplet, str):
            rejected[triplet] += 1
        else:
            found[triplet.id] = triplet
    if not found:
        reasons = "; ".join(f"{reason} ({k:,})" for reason, k in rejected.most_common())
        raise DatasetError(
            f"{path} has no answer that can be used in {n:,} rows: {reasons or 'it is empty'}; a row is a line of the "
            'prompts with "answer" in it'
        )
    return Answers(tuple(found.values()), rejected, len(asked) - len(found))


def _taken(line: str, asked: dict[str, Caption], found: dict[str, Triplet]) -> Triplet | str:
    """The triplet of a row, or the one reason why there is none."""
    try:
        row = parse_json(line, "row")
    except DatasetError:
        return "row is not JSON"
    if not isinstance(row, dict):
        return "row is no JSON object"
    name = row.get("id")
    if not isinstance(name, str) or name not in asked:
        return "unknown id"
    if name in found:
        return "answered before"
    caption = asked[name]
    if row.get("reference_caption", caption.text) != caption.text:
        return "asked about another caption"
    answer = _object(row.get("answer"))
    if isinstance(answer, str):
        return answer
    if not all(isinstance(answer.get(key), str) for key in WANTED):
        return f"no text under {' or '.join(WANTED)}"
    modification, target = (" ".join(answer[key].split()) for key in WANTED)
    reason = fault(caption.text, modification, target)
    return reason or Triplet(name, caption.image, caption.text, modification, target, caption.split)


def _object(answer: Any) -> dict[str, Any] | str:
    """The one JSON object of an answer, or why there is none."""
    if answer is None or answer == "":
        return "no answer"
    if isinstance(answer, str):
        if len(answer) > MOST_CHARACTERS:
            return f"answer longer than {MOST_CHARACTERS:,} characters"
        objects = _objects(answer)
        if not objects:
            return "no JSON object in the answer"
        if len(objects) > 1:
            return "several JSON objects in the answer"
        answer = objects[0]
    if not isinstance(answer, dict):
        return "answer is neither a text nor an object"
    return answer


def _objects(text: str) -> list[dict[str, Any]]:
    """All different outermost JSON objects in a text."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    found: list[dict[str, Any]] = []
    stop = 0
    for brace in re.finditer(r"\{", text):
        if brace.start() < stop:
            continue
        try:
            value, stop = decoder.raw_decode(text, brace.start())
            check_unicode(value, "answer")
        except (ValueError, RecursionError):
            continue
        if value not in found:
            found.append(value)
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice")
    return found
