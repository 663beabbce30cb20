"""Score tables on disk: one self-contained zarr v3 group, readable with zarr alone.

    scores.zarr/            attributes: format, version, kind, split, space, world, ids, category, pairs, meta, run;
                            composed: queries (the fields of `ComposedQueries`) and candidates, in place of ids
      scores                float32 or float64, (Q, C) · (n, 2, 2) · (n, 2)
      target, seen          czsl: column of the true pair (Q,); 1 where a pair is seen (C,)
      own, best_*, …        czsl_summary, in place of scores: the fields of `CompositionSummary`; pairs (C, 2) index the
                            attributes attrs and objs; levels and threshold (null: none) are attributes too
      positives             retrieval: 1 where a candidate is right (Q, C)

Scores of composed retrieval (CIRCO: 800 × 123,403) are written and checked in blocks of rows, and read when used.

A missing chunk file would be read as the fill value, so every array has one that no valid table holds: it
is an error when loaded, never a zero. Chunks carry a crc32c.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from eval.any_table import Table
from eval.composed_queries import ComposedQueries
from eval.composed_table import ComposedScores
from eval.composition import Composition, CompositionScores
from eval.czsl_summary import CompositionSummary
from eval.errors import ScoreTableError, ScoreTableExists, ScoreTableNotFound
from eval.matching import MatchingScores
from eval.retrieval import RetrievalScores

FORMAT = "headstart scores"
VERSION = 1
CHUNK_CELLS = 1 << 22
"""Scores in one chunk (16 MB of float32)."""

KINDS: dict[str, type[Table]] = {
    cls.kind: cls
    for cls in (
        CompositionScores,
        MatchingScores,
        RetrievalScores,
        ComposedScores,
        CompositionSummary,
    )
}


SUMMARY_ARRAYS: dict[str, Any] = {
    "own": np.nan, "best_seen": np.nan, "seen_columns": -2, "best_unseen": np.nan, "unseen_columns": -2,
}  # fmt: skip
"""The kept scores of a summary and the fill value that none of them holds."""


def kind(scores: Table) -> str:
    """The task: czsl, matching, retrieval or composed."""
    return scores.kind.removesuffix("_summary")


def save(
    scores: Table,
    path: str | os.PathLike[str],
    *,
    run: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a table: to a new folder beside `path`, then renamed, so that a half-written one never bears the name.

    Args:
        scores: the table.
        path: where, usually `scores-<split>.zarr` in a run directory.
        run: what made the scores (method, seed, cache fingerprint …), as JSON values; comes back as `meta["run"]`.
        overwrite: replace a table that is there.

    Raises:
        ScoreTableExists: there is something at `path`.
        ScoreTableError: `run` or `meta` is not JSON; rows of a composed table that are not usable.

    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise ScoreTableExists(
            f"{path} was to be written, but is already there: choose another name, or say that it may be overwritten"
        )
    meta = dict(scores.meta)
    attributes = {
        "format": FORMAT,
        "version": VERSION,
        "kind": scores.kind,
        "split": scores.split,
        "space": scores.space,
        "ids": [] if isinstance(scores, ComposedScores) else list(scores.ids),
        "run": dict(run) if run is not None else meta.pop("run", {}),
        "meta": meta,
    }
    arrays: dict[str, tuple[Any, Any]] = {}
    if not isinstance(scores, CompositionSummary):
        arrays["scores"] = (scores.scores, np.nan)
    if isinstance(scores, Composition):
        attributes["world"] = scores.world
        arrays["target"] = (np.asarray(scores.target, dtype=np.int64), -1)
        arrays["seen"] = (scores.seen.astype(np.uint8), 255)
    if isinstance(scores, CompositionSummary):
        facts, more = _summarised(scores)
        attributes |= facts
        arrays |= more
    elif isinstance(scores, CompositionScores):
        attributes["pairs"] = np.asarray(scores.pairs).tolist()
    elif isinstance(scores, MatchingScores):
        attributes["category"] = np.asarray(scores.category).tolist()
    elif isinstance(scores, ComposedScores):
        for _ in scores.rows():  # refuses NaN, which the other tables refuse when they are made
            pass
        attributes["queries"] = scores.queries.facts()
        attributes["candidates"] = np.asarray(scores.candidates).tolist()
    else:
        arrays["positives"] = (scores.positives.astype(np.uint8), 255)
    try:
        json.dumps(attributes, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ScoreTableError(f"what is stored with a score table must be JSON: {error}") from error
    _write(path, attributes, arrays)
    return path


def _summarised(
    summary: CompositionSummary,
) -> tuple[dict[str, Any], dict[str, tuple[Any, Any]]]:
    """Attributes and arrays of a summary, besides those that every composition table has."""
    words, index = zip(
        *(np.unique(column, return_inverse=True) for column in np.asarray(summary.pairs).T),
        strict=True,
    )
    bounded = summary.threshold > -np.inf
    facts = {
        "attrs": words[0].tolist(),
        "objs": words[1].tolist(),
        "levels": list(summary.levels),
        "threshold": summary.threshold if bounded else None,
    }
    arrays = {name: (getattr(summary, name), fill) for name, fill in SUMMARY_ARRAYS.items()}
    arrays["pairs"] = (np.stack(index, axis=1).astype(np.int32), -1)
    arrays["candidates"] = (summary.candidates.astype(np.uint8), 255)
    if summary.rho is not None:
        arrays["rho"] = (summary.rho, np.nan)
    return facts, arrays


def _write(path: Path, attributes: dict[str, Any], arrays: dict[str, tuple[Any, Any]]) -> None:
    """The group, written aside and renamed into place; an old one goes only when the new one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        group = zarr.create_group(str(aside / "new"), attributes=attributes)
        for name, (values, fill) in arrays.items():
            n, cells = values.shape[0], max(1, math.prod(values.shape[1:]))
            rows = min(n, max(1, CHUNK_CELLS // cells))
            array = group.create_array(
                name,
                shape=values.shape,
                dtype=values.dtype,
                chunks=(rows, *values.shape[1:]),
                fill_value=fill,
                compressors=(ZstdCodec(), Crc32cCodec()),
            )
            for start in range(0, n, rows):
                array[start : start + rows] = values[start : start + rows]
        if path.exists():
            path.rename(aside / "old")
        (aside / "new").rename(path)
    finally:
        shutil.rmtree(aside)


def load(path: str | os.PathLike[str]) -> Table:
    """Read a table; `meta["run"]` says what made it.

    Raises:
        ScoreTableNotFound: nothing is there.
        ScoreTableError: not a score table, one of a later version, or one with missing or damaged parts.

    """
    path = Path(path)
    if not path.exists():
        raise ScoreTableNotFound(f"no score table at {path}; `headstart score RUN` writes one")
    try:
        group = zarr.open_group(str(path), mode="r")
    except Exception as error:
        raise ScoreTableError(
            f"{path} is not a score table: it is no zarr group ({error})"
        ) from error
    facts = group.attrs.asdict()
    if facts.get("format") != FORMAT:
        raise ScoreTableError(
            f"{path} is not a score table: its format is {facts.get('format')!r}, not {FORMAT!r}"
        )
    if facts.get("version") != VERSION or facts.get("kind") not in KINDS:
        raise ScoreTableError(
            f"{path} is a score table of version {facts.get('version')}, kind {facts.get('kind')!r}; this program "
            f"reads version {VERSION}, kinds {', '.join(KINDS)}: use the program that wrote it, or a newer one"
        )
    try:
        return _table(group, facts)
    except ScoreTableError as error:
        raise ScoreTableError(f"{path} does not hold a valid table: {error}") from error
    except Exception as error:
        raise ScoreTableError(
            f"{path} is damaged or incomplete ({type(error).__name__}: {error}); score the run again"
        ) from error


def _table(group: zarr.Group, facts: Mapping[str, Any]) -> Table:
    """The dataclass from arrays and attributes."""
    if facts["kind"] == "composed":
        return _composed(group, facts)
    common: dict[str, Any] = {
        "space": facts["space"],
        "split": facts["split"],
        "ids": tuple(facts["ids"]),
        "meta": {**facts["meta"], "run": facts["run"]},
    }
    if facts["kind"] == "czsl_summary":
        return _summary(group, facts, common)
    scores = _read(group, "scores")
    if facts["kind"] == "czsl":
        target, seen = _read(group, "target"), _flags(_read(group, "seen"), "seen")
        pairs = np.asarray(facts["pairs"])
        return CompositionScores(scores, target, pairs, seen, world=facts["world"], **common)
    if facts["kind"] == "matching":
        return MatchingScores(scores, np.asarray(facts["category"]), **common)
    return RetrievalScores(scores, _flags(_read(group, "positives"), "positives"), **common)


def _summary(
    group: zarr.Group, facts: Mapping[str, Any], common: Mapping[str, Any]
) -> CompositionSummary:
    """A summary; what it needs no feasibility for, it does not have."""
    pairs, target = _read(group, "pairs"), _read(group, "target")
    rho = _read(group, "rho") if "rho" in group else None
    if pairs.min() < 0 or (rho is not None and not np.isfinite(rho).all()):
        raise ScoreTableError("a chunk of pairs or rho is missing; score the run again")
    named = [np.asarray(facts[name])[pairs[:, i]] for i, name in enumerate(("attrs", "objs"))]
    return CompositionSummary(
        **{name: _read(group, name) for name in SUMMARY_ARRAYS},
        candidates=_flags(_read(group, "candidates"), "candidates"),
        target=target,
        pairs=np.stack(named, axis=1),
        seen=_flags(_read(group, "seen"), "seen"),
        world=facts["world"],
        rho=rho,
        levels=tuple(facts["levels"]),
        threshold=-np.inf if facts["threshold"] is None else facts["threshold"],
        **common,
    )


def _composed(group: zarr.Group, facts: Mapping[str, Any]) -> ComposedScores:
    """A table whose rows stay on disk, after they were all read once: a missing or damaged part is found here."""
    array: Any = group["scores"]
    table = ComposedScores(
        array,
        np.asarray(facts["candidates"]),
        ComposedQueries(**facts["queries"]),
        space=facts["space"],
        meta={**facts["meta"], "run": facts["run"]},
    )
    for _ in table.rows():
        pass
    return table


def _read(group: zarr.Group, name: str) -> NDArray[Any]:
    """One array of the group, whole."""
    return np.asarray(group[name])


def _flags(values: NDArray[Any], name: str) -> NDArray[np.bool_]:
    """0 and 1 as bool; anything else means that a part is missing."""
    if values.max(initial=0) > 1:
        raise ScoreTableError(
            f"{name} holds {values.max()}, so a chunk is missing; score the run again"
        )
    return values.astype(np.bool_)
