"""Vectors of a czsl task's words, and of auxiliary attributes, from a cache or a file: what trained tables start from.

    table       attributes │ objects │ auxiliary words          rows 0 … A-1 │ A … A+O-1 │ A+O …, (rows, V)
    auxiliary   attr obj │ row row row                          one line a train pair, -1 where it has fewer words

An auxiliary word that is an attribute of the task has that attribute's row; one that is an object's name has a row of
its own, because "orange" the colour is not the fruit.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from cache_builder import FeatureCache
from cache_builder.auxiliary import KEPT, Auxiliary, read_auxiliary
from cache_builder.datasets.base import Pair
from cache_builder.readout import pool_words
from cache_builder.words import VOCABULARY
from eval.errors import ScoreTableError
from eval.glove import glove as glove_vectors
from eval.glove import parts_of
from heads.base import Context
from heads.errors import ConfigError, MissingStream

K_AUXILIARY = KEPT
"""Auxiliary words of a pair, at most."""

Word = tuple[str, str]
"""(role, name), the role one of attr, obj, aux."""


def word_tables(
    context: Context,
    cache: FeatureCache,
    *,
    words: str,
    glove: str | None = None,
    auxiliary: str = "nearest",
) -> Context:
    """`context` with the tables `words` (A+O+Aux, V) and `auxiliary` (P, 2+3), drawn above.

    Args:
        context: to add them to.
        cache: of a czsl task.
        words, glove: where vectors come from, as of `word_vectors`.
        auxiliary: a file of auxiliary attributes, "nearest", or "none".

    Raises:
        ConfigError: no czsl task, a file that cannot be used, or of other pairs.
        MissingStream: the cache lacks the words; names the command that adds them.
    """
    task = cache.tasks.czsl
    if task is None:
        raise ConfigError(f"{cache.place} has no czsl task, so no words of attributes and objects")
    pairs = task.pairs["train"]
    found: Auxiliary = {}
    if auxiliary not in ("nearest", "none"):
        found = read_auxiliary(Path(auxiliary))
        if foreign := [pair for pair in found if pair not in set(pairs)]:
            raise ConfigError(
                f"{len(foreign)} of the {len(found)} pairs in {auxiliary} are no train pairs of {cache.place}, "
                f"the first: {' '.join(foreign[0])}; make the file for this data set with `headstart words`"
            )
    named: list[Word] = [
        *(("attr", attr) for attr in task.attrs),
        *(("obj", obj) for obj in task.objs),
    ]
    extra = sorted({word for some in found.values() for word in some} - {*task.attrs})
    named += [("aux", word) for word in extra]
    vectors = word_vectors(cache, words, named, glove, auxiliary)
    if auxiliary == "nearest":
        found = nearest(vectors[: len(task.attrs)], task.attrs, pairs)
    # An attribute's own row comes before an auxiliary row of the same name: there is none.
    row = {name: i for i, (role, name) in enumerate(named) if role != "obj"}
    objs = {name: i for i, name in enumerate(task.objs)}
    lines = [
        [row[a], objs[o], *(row[w] for w in some), *[-1] * (KEPT - len(some))]
        for (a, o), some in found.items()
    ]
    others = torch.tensor(lines, dtype=torch.int64).reshape(-1, 2 + KEPT)
    return replace(context, tables={**context.tables, "words": vectors, "auxiliary": others})


def nearest(
    vectors: Float[Tensor, "a v"], attrs: Sequence[str], pairs: Sequence[Pair]
) -> dict[Pair, tuple[str, ...]]:
    """The lexical stand-in for a language model: of every pair, the attributes closest to its own, whatever the object.

    Args:
        vectors: one row an attribute.
        attrs: their names.
        pairs: of train.
    """
    unit = F.normalize(vectors.float(), dim=-1)
    cosine = (unit @ unit.T).fill_diagonal_(-torch.inf)
    # Stable, so that ties go to the earlier attribute on every machine.
    order = cosine.sort(dim=1, descending=True, stable=True).indices[:, : min(KEPT, len(attrs) - 1)]
    closest: dict[str, tuple[str, ...]] = {
        attr: tuple(attrs[int(i)] for i in row)
        for attr, row in zip(attrs, order.tolist(), strict=True)
    }
    return {(attr, obj): closest[attr] for attr, obj in pairs if closest[attr]}


def word_vectors(
    cache: FeatureCache,
    source: str,
    named: Sequence[Word],
    glove: str | None = None,
    auxiliary: str = "nearest",
) -> Float[Tensor, "r v"]:
    """Vectors of words, in their order.

    Args:
        cache: of a czsl task.
        source: llava: `word/states` behind the language model's last norm, mean over tokens, then over a compound's
            parts. clip_text: `text/pooled` of the bare word. glove: mean over a compound's parts.
        named: (role, name).
        glove: file, one word a line and its numbers after it.
        auxiliary: file that the auxiliary words are from, for messages.
    """
    if source == "glove":
        if glove is None:
            raise ConfigError("head.words is 'glove': name the file of its vectors (head.glove)")
        return _glove(Path(glove), named)
    ids = [f"{role}:{name}" for role, name in named]
    stream = "word/states" if source == "llava" else "text/pooled"
    held: Sequence[str] = ()
    if stream in cache.streams:
        held = cache.word_ids if source == "llava" else cache.text_ids
    _refuse_missing(cache, stream, source, ids, set(held), auxiliary)
    if source == "clip_text":
        return torch.from_numpy(cache.read(stream, cache.rows("text", ids))).float()
    return word_states(cache, ids)


def word_states(cache: FeatureCache, ids: Sequence[str]) -> Float[Tensor, "n v"]:
    """One vector a word from a language model's states in `word/states`; only the words asked for are read."""
    numbers = cache.rows("word", ids)
    first, last = cache.word_parts[numbers], cache.word_parts[numbers + 1]
    parts = np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])
    states, offsets = cache.read_ragged("word/states", parts)
    bounds = np.append(0, np.cumsum(last - first))
    readout = {name: torch.from_numpy(value) for name, value in cache.readout().items()}
    given = (torch.from_numpy(x) for x in (states.astype(np.float32), offsets, bounds))
    return pool_words(readout, *given)


def _refuse_missing(
    cache: FeatureCache,
    stream: str,
    source: str,
    ids: Sequence[str],
    held: set[str],
    auxiliary: str,
) -> None:
    """A `MissingStream` that names the command which would add what is missing."""
    if stream not in cache.streams:
        other = "clip_text, with a cache built with --set words=…" if source == "llava" else "llava"
        raise MissingStream(
            f"head.words={source} reads {stream}, but {cache.place} holds {', '.join(cache.streams)}; build a cache "
            f"that has it ({'llava with its language model' if source == 'llava' else 'a family with a joint space'}), "
            f"or choose head.words={other}, or head.words=glove"
        )
    missing = [name for name in ids if name not in held]
    if missing:
        value = auxiliary if any(name.startswith("aux:") for name in ids) else VOCABULARY
        options = {**cache.header.options, "words": value}
        command = cache.header.model_copy(update={"options": options}).command(cache.place)
        append = (
            "" if command.endswith("--append") or "--append" in command.split() else " --append"
        )
        raise MissingStream(
            f"{cache.place} lacks {len(missing)} of the {len(ids)} words that head.words={source} reads, the first: "
            f"{missing[0]}; add them: {command}{append}"
        )


def _glove(path: Path, named: Sequence[Word]) -> Float[Tensor, "r v"]:
    """Vectors of a GloVe text file; every part of every word must be in it."""
    try:
        found = glove_vectors(path, [name for _, name in named], parts=_parts)
    except ScoreTableError as error:
        raise ConfigError(
            f"{error}; the file is named by head.glove, and head.words=llava or clip_text needs none"
        ) from error
    return torch.from_numpy(found).float()


def _parts(name: str) -> tuple[str, ...]:
    """Split as for feasibility, and at the dots of UT-Zappos' names, which nothing replaces here."""
    found = tuple(word for part in parts_of(name) for word in part.split(".") if word)
    return found or (name.lower(),)
