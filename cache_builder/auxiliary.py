"""Auxiliary attributes: for every train pair a few other adjectives that also fit its object, for attribute smoothing.

    prompts.jsonl    {"attr": "ripe", "obj": "apple", "prompt": "Name five adjectives …"}     one line a train pair
    answers.jsonl    {"attr": "ripe", "obj": "apple", "answer": "red, juicy, Sweet, ripe, …"}    any language model's
    auxiliary.jsonl  {"attr": "ripe", "obj": "apple", "auxiliary": ["red", "juicy", "sweet"], "source": "answers"}

A model is asked for five words, and the first three that can be used are kept: a word may repeat the pair, or be no
word. Every word and row that is not used is counted under its reason, and a pair left with fewer than three is listed.
`source` is "answers", or "nearest" for the lexical stand-in, which knows no language model. After TRIDENT, arXiv
2411.12584; the wording of the prompt is ours.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache_builder.datasets.base import Pair
from cache_builder.records import DatasetError, read_jsonl

KEPT = 3
"""Words kept of the five asked for, some of which cannot be used (the paper keeps three; five is our choice)."""

SOURCES = ("answers", "nearest")

Auxiliary = Mapping[Pair, tuple[str, ...]]
"""Train pair → its other adjectives, best first."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What was made of a model's answers.

    Attributes:
        found: pair → at most `KEPT` words; pairs without any are left out.
        rejected: reason → how many words or rows.
        short: train pairs with fewer than `KEPT` words, in the order of the pairs.

    """

    found: Auxiliary
    rejected: Mapping[str, int]
    short: tuple[Pair, ...]


def prompt(attr: str, obj: str) -> str:
    """What a language model is asked about a pair.

    >>> prompt("ripe", "apple")[:56]
    'Name five adjectives, of one word each, that often descr'
    """
    shown = {"attr": _spoken(attr), "obj": _spoken(obj)}
    return (
        "Name five adjectives, of one word each, that often describe the look of this object: {obj}. It is already "
        'known to be "{attr}", so do not repeat that word or a form of it, and do not name the object. Answer with the '
        "five words in lower case, separated by commas, and with nothing else."
    ).format(**shown)


def write_prompts(pairs: Iterable[Pair], path: Path) -> int:
    """One line a pair; a file that is there is not overwritten. Returns their number."""
    rows = [{"attr": a, "obj": o, "prompt": prompt(a, o)} for a, o in pairs]
    _write(rows, path)
    return len(rows)


def read_answers(path: Path, pairs: Sequence[Pair]) -> Answers:
    """The words that can be used of a language model's answers, and what became of the others.

    Args:
        path: JSON lines with `attr`, `obj` and `answer`: a text, with words between commas or line breaks, perhaps
            numbered, or a list of words.
        pairs: the train pairs.

    Raises:
        DatasetError: a line is no JSON object, or no row could be used.
    """
    wanted, rejected = set(pairs), Counter[str]()
    found: dict[Pair, tuple[str, ...]] = {}
    n = 0
    for _, row in read_jsonl(path):
        n += 1
        attr, obj, words = row.get("attr"), row.get("obj"), _listed(row.get("answer"))
        pair = (attr, obj) if isinstance(attr, str) and isinstance(obj, str) else None
        if pair is None or pair not in wanted:
            rejected["row: no train pair"] += 1
        elif pair in found:
            rejected["row: pair answered before"] += 1
        elif words is None:
            rejected["row: no answer"] += 1
        else:
            found[pair] = tuple(_usable(words, pair, rejected))
    kept = {pair: found[pair] for pair in pairs if found.get(pair)}
    if not kept:
        reasons = ", ".join(f"{reason} ({k})" for reason, k in rejected.items()) or "it is empty"
        raise DatasetError(
            f'{path} has no answer that can be used in {n} rows: {reasons}; a row is {{"attr": …, "obj": …, "answer": '
            '"five, words, …"} about a train pair'
        )
    short = tuple(pair for pair in pairs if len(kept.get(pair, ())) < KEPT)
    return Answers(kept, dict(rejected), short)


def write_auxiliary(found: Auxiliary, source: str, path: Path) -> None:
    """Write a file that `read_auxiliary` reads; one that is there is not overwritten."""
    assert source in SOURCES
    _write(
        [
            {"attr": attr, "obj": obj, "auxiliary": list(words), "source": source}
            for (attr, obj), words in found.items()
        ],
        path,
    )


def read_auxiliary(path: Path) -> Auxiliary:
    """Train pair → at most three words, best first.

    Raises:
        DatasetError: a row has other keys or types, too many words, one twice, or a pair comes twice; names the line.
    """
    found: dict[Pair, tuple[str, ...]] = {}
    for number, row in read_jsonl(path):
        where = f"{path} line {number}"
        words = row.get("auxiliary")
        if (
            set(row) - {"attr", "obj", "auxiliary", "source"}
            or not all(isinstance(row.get(key), str) for key in ("attr", "obj"))
            or row.get("source", SOURCES[0]) not in SOURCES
            or not isinstance(words, list)
            or not all(isinstance(word, str) and word.strip() for word in words)
        ):
            raise DatasetError(
                f"{where}: {str(row)[:100]} is not of the form attr, obj, auxiliary (a list of words), source "
                f"({' or '.join(SOURCES)}); make the file with `headstart words`"
            )
        pair = (row["attr"], row["obj"])
        if not 1 <= len(words) <= KEPT or len(set(words)) < len(words):
            raise DatasetError(
                f"{where}: {' '.join(pair)} has the auxiliary attributes {', '.join(words) or '(none)'}; it takes 1 to "
                f"{KEPT} different ones"
            )
        if pair in found:
            raise DatasetError(f"{where}: {' '.join(pair)} was there before")
        found[pair] = tuple(words)
    return found


def _usable(words: Iterable[str], pair: Pair, rejected: Counter[str]) -> list[str]:
    """The first few that are one new word of letters."""
    said = {part for name in pair for part in (name.lower(), *_spoken(name).split())}
    kept: list[str] = []
    for word in words:
        reason = None
        if not re.fullmatch(r"[^\W\d_]+(-[^\W\d_]+)*", word):
            reason = "word: not one word of letters"
        elif word in said:
            reason = "word: repeats the pair"
        elif word in kept:
            reason = "word: said twice"
        elif len(kept) == KEPT:
            reason = f"word: beyond the first {KEPT}"
        if reason is None:
            kept.append(word)
        else:
            rejected[reason] += 1
    return kept


def _listed(answer: Any) -> list[str] | None:
    """The words of an answer, in lower case; None if it is neither text nor a list of texts."""
    if isinstance(answer, str):
        answer = re.split(r"[,;\n]+", answer)
    if not isinstance(answer, list) or not all(isinstance(word, str) for word in answer):
        return None
    # "1. Red", "- red", "red." and "**red**" all mean red.
    bare = [re.sub(r"^\W*(\d+\s*[.):])?\W*|\W+$", "", word).lower() for word in answer]
    return [word for word in bare if word]


def _spoken(name: str) -> str:
    """A name as people write it."""
    return " ".join(re.split(r"[_.\-\s]+", name.lower())).strip()


def _write(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    lines = [f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows]
    with path.open("x", encoding="utf-8") as file:
        file.writelines(lines)
