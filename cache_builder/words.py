"""The words of a compositional task, as language models are asked for them: attributes, objects, and pairs.

    id                       parts
    attr:chain-link          chain · link         a compound is encoded part by part, split at `_` and `-`
    obj:fence                fence
    pair:chain-link fence    chain link fence     a pair is one phrase of its own

Whoever reads a compound averages over its parts, as TRIDENT does. Ids carry the role, because "orange" is both an
attribute and an object.
"""

import re
from dataclasses import dataclass

from cache_builder.datasets.base import Tasks

RULE = "compounds split at _ and -; a pair is one phrase"
"""As canonical text, for specs."""


@dataclass(frozen=True, slots=True)
class Word:
    """One word or phrase: its id, and the strings that are encoded apart."""

    id: str
    parts: tuple[str, ...]


def words_of(tasks: Tasks) -> list[Word]:
    """Attributes, objects and pairs of the czsl task, in its order; none without one."""
    task = tasks.czsl
    if task is None:
        return []
    pairs = sorted({pair for found in task.pairs.values() for pair in found})
    words = [
        *(Word(f"attr:{a}", split(a)) for a in task.attrs),
        *(Word(f"obj:{o}", split(o)) for o in task.objs),
        *(Word(f"pair:{a} {o}", (" ".join((*split(a), *split(o))),)) for a, o in pairs),
    ]
    return list(dict.fromkeys(words))  # "dark red" + "cup" and "dark" + "red cup" are one phrase


def split(name: str) -> tuple[str, ...]:
    """Parts of a compound name, without empty ones.

    >>> split("chain-link")
    ('chain', 'link')
    """
    return tuple(part for part in re.split(r"[_-]+", name) if part) or (name,)
