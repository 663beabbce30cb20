"""The words of a compositional task, as encoders are asked for them: attributes, objects, pairs, auxiliary attributes.

    id                       parts
    attr:chain-link          chain · link         a compound is encoded part by part, split at `_` and `-`
    obj:fence                fence
    pair:chain-link fence    chain link fence     a pair is one phrase of its own
    aux:shiny                shiny                an auxiliary attribute (auxiliary.py), where a build is given some

Whoever reads a compound averages over its parts, as TRIDENT does. Ids carry the role, because "orange" is both an
attribute and an object. Encoders without `word/states` get bare words as further texts, under the same ids:

    headstart build … --set words=vocabulary              attributes and objects
    headstart build … --set words=auxiliary.jsonl         and the auxiliary attributes of that file
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cache_builder.auxiliary import read_auxiliary
from cache_builder.datasets.base import Dataset, Tasks, TextRecord
from cache_builder.errors import UnknownName

RULE = "compounds split at _ and -; a pair is one phrase"
"""As canonical text, for specs."""


@dataclass(frozen=True, slots=True)
class Word:
    """One word or phrase: its id, and the strings that are encoded apart."""

    id: str
    parts: tuple[str, ...]


VOCABULARY = "vocabulary"
"""Value of the option `words` that adds no auxiliary attributes."""


def words_of(tasks: Tasks, auxiliary: Sequence[str] = ()) -> list[Word]:
    """Attributes, objects and pairs of the czsl task, in its order, then auxiliary attributes; none without a task."""
    task = tasks.czsl
    if task is None:
        return []
    pairs = sorted({pair for found in task.pairs.values() for pair in found})
    words = [
        *(Word(f"attr:{a}", split(a)) for a in task.attrs),
        *(Word(f"obj:{o}", split(o)) for o in task.objs),
        *(Word(f"pair:{a} {o}", (" ".join((*split(a), *split(o))),)) for a, o in pairs),
        *(Word(f"aux:{x}", split(x)) for x in auxiliary),
    ]
    return list(dict.fromkeys(words))  # "dark red" + "cup" and "dark" + "red cup" are one phrase


def with_words(dataset: Dataset, source: str) -> Dataset:
    """The data set with bare words among its texts, and auxiliary attributes among its words.

    Args:
        dataset: with a czsl task.
        source: a file of auxiliary attributes, or "vocabulary" for none.

    Raises:
        UnknownName: there is no czsl task, whose words these would be.
        DatasetError, FileNotFoundError: the file cannot be read.
    """
    task = dataset.tasks.czsl
    if task is None:
        raise UnknownName(
            f"words={source} adds words of a czsl task, and {dataset.name} has none; leave it out"
        )
    found = {} if source == VOCABULARY else read_auxiliary(Path(source))
    auxiliary = tuple(sorted({word for words in found.values() for word in words} - {*task.attrs}))
    named = [("attr", task.attrs), ("obj", task.objs), ("aux", auxiliary)]
    texts = [
        TextRecord(f"{role}:{name}", " ".join(split(name)).replace(".", " ").lower())
        for role, names in named
        for name in names
    ]
    return replace(dataset, texts=(*dataset.texts, *texts), words=auxiliary)


def split(name: str) -> tuple[str, ...]:
    """Parts of a compound name, without empty ones.

    >>> split("chain-link")
    ('chain', 'link')
    """
    return tuple(part for part in re.split(r"[_-]+", name) if part) or (name,)
