"""Files that the servers of CIRR and CIRCO take, written and read with the same checks.

    CIRR    {"version":"rc2","metric":"recall","12063":["test1-233-3-img1", … 50 names], …}
            {"version":"rc2","metric":"recall_subset","12063":[… 3 of the five others of the subset], …}
    CIRCO   {"0":[9761,489535, … 50 COCO numbers], …}

The keys are exactly the split's queries; of equal scores the earlier image of the gallery is listed first. A list never
holds an image twice, one that is not in the gallery, or, in CIRR, its own reference. Nothing is written before all is
checked; a table that lacks images or queries (`partial`) is refused, since a smaller gallery is another test.
"""

import json
import os
import re
import stat
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from eval.composed_lists import Lists, check_lists, ranked, ranked_subset
from eval.composed_queries import ComposedQueries
from eval.composed_table import ComposedScores
from eval.errors import ScoreTableError, ScoreTableExists, ScoreTableNotFound
from eval.remarks import is_partial

LENGTHS = {"recall": 50, "recall_subset": 3}
"""Images in each list; CIRCO's are as long as CIRR's recall."""

QUERIES = {("cirr", "test"): 4148, ("circo", "val"): 220, ("circo", "test"): 800}
"""Published numbers of queries; other splits have no submission."""

LIMIT = 5_000_000
"""Largest file, bytes; CIRR's server takes no more, and a full recall file has about four million."""

VERSION = "rc2"
BIGGEST = 10**12
"""Image numbers of CIRCO are below this."""

Metric = Literal["recall", "recall_subset"]
Check = Literal["official", "none"]
PathLike = str | os.PathLike[str]


def submit_cirr(
    scores: ComposedScores,
    recall: PathLike,
    subset: PathLike,
    *,
    check: Check = "official",
    overwrite: bool = False,
) -> tuple[Path, Path]:
    """Write both files of CIRR test1: neither, unless both are right.

    Args:
        scores: of the test queries, with their subsets.
        recall, subset: where to.
        check: "official" demands the published number of queries; "none" is for miniatures.
        overwrite: replace files that are there.

    Raises:
        ScoreTableError: the table is partial or of another benchmark, or a list cannot be right.
        ScoreTableExists: a file is there.

    """
    _refuse_partial(scores)
    queries, gallery = scores.queries, _gallery(scores)
    texts = [
        _cirr_text(lists, queries, gallery, metric, check)
        for metric, lists in (
            ("recall", ranked(scores, 50)),
            ("recall_subset", ranked_subset(scores, 3)),
        )
    ]
    paths = [Path(recall), Path(subset)]
    if paths[0] == paths[1]:
        raise ScoreTableError(f"the two files of CIRR cannot both be {recall}; name two")
    for path in paths:
        _refuse_existing(path, overwrite)
    for path, text in zip(paths, texts, strict=True):
        _write(path, text)
    return paths[0], paths[1]


def submit_circo(
    scores: ComposedScores, path: PathLike, *, check: Check = "official", overwrite: bool = False
) -> Path:
    """Write the file of CIRCO test (or val, which its server does not take, but the same tools read).

    Args and errors as for `submit_cirr`.
    """
    _refuse_partial(scores)
    lists = ranked(scores, LENGTHS["recall"])
    return write_circo(
        lists, path, scores.queries, _gallery(scores), check=check, overwrite=overwrite
    )


def write_cirr(
    lists: Lists,
    path: PathLike,
    queries: ComposedQueries,
    candidates: Collection[str],
    *,
    metric: Metric,
    check: Check = "official",
    overwrite: bool = False,
) -> Path:
    """Write one file of CIRR from ranked lists; arguments and errors as elsewhere here."""
    text = _cirr_text(lists, queries, candidates, metric, check)
    _refuse_existing(Path(path), overwrite)
    return _write(Path(path), text)


def write_circo(
    lists: Lists,
    path: PathLike,
    queries: ComposedQueries,
    candidates: Collection[str],
    *,
    check: Check = "official",
    overwrite: bool = False,
) -> Path:
    """Write the file of CIRCO from ranked lists of image ids, which are COCO numbers as text."""
    _check("circo", queries, lists, candidates, LENGTHS["recall"], check)
    text = _json({name: [_number(image, name) for image in lists[name]] for name in queries.ids})
    _refuse_existing(Path(path), overwrite)
    return _write(Path(path), text)


def read_cirr(
    path: PathLike,
    queries: ComposedQueries,
    candidates: Collection[str] | None = None,
    *,
    metric: Metric,
    check: Check = "official",
    limit: int = LIMIT,
) -> dict[str, tuple[str, ...]]:
    """Lists of a CIRR file, by pairid.

    Args:
        path: the file.
        queries: whose ids must be its keys.
        candidates: the gallery; None leaves unknown names unnoticed.
        metric: which of the two files it must be.
        check: as for `submit_cirr`.
        limit: largest size in bytes.

    Raises:
        ScoreTableError: not a file that the server would take; says why.

    """
    content = _read(path, limit)
    stated = {name: content.pop(name, None) for name in ("version", "metric")}
    if stated != {"version": VERSION, "metric": metric}:
        raise ScoreTableError(
            f"{path} says {stated}, but must say version {VERSION!r} and metric {metric!r}"
        )
    lists = {name: _texts(images, f"{path}: {name!r}") for name, images in content.items()}
    _check("cirr", queries, lists, candidates, LENGTHS[metric], check, subset=metric != "recall")
    return lists


def read_circo(
    path: PathLike,
    queries: ComposedQueries,
    candidates: Collection[str] | None = None,
    *,
    check: Check = "official",
    limit: int = LIMIT,
) -> dict[str, tuple[str, ...]]:
    """Lists of a CIRCO file, by query id, the numbers as text; else as `read_cirr`."""
    lists = {
        name: _numbers(images, f"{path}: {name!r}") for name, images in _read(path, limit).items()
    }
    _check("circo", queries, lists, candidates, LENGTHS["recall"], check)
    return lists


def _cirr_text(
    lists: Lists,
    queries: ComposedQueries,
    candidates: Collection[str],
    metric: Metric | str,
    check: Check,
) -> bytes:
    """A checked file of CIRR."""
    _check("cirr", queries, lists, candidates, LENGTHS[metric], check, subset=metric != "recall")
    body = {name: list(lists[name]) for name in queries.ids}
    return _json({"version": VERSION, "metric": metric} | body)


def _check(
    protocol: str,
    queries: ComposedQueries,
    lists: Lists,
    candidates: Collection[str] | None,
    length: int,
    check: Check,
    *,
    subset: bool = False,
) -> None:
    """What writing and reading both demand."""
    if queries.protocol != protocol:
        raise ScoreTableError(
            f"the queries are of {queries.protocol}, but the file is of {protocol}; use its own"
        )
    if check == "official":
        published = QUERIES.get((protocol, queries.split))
        if published is None:
            raise ScoreTableError(f"{protocol} has no submission for split {queries.split!r}")
        if len(queries.ids) != published:
            raise ScoreTableError(
                f"{protocol} {queries.split} has {published} queries, but here are {len(queries.ids)}; give all "
                "of them (check='none' is for miniatures)"
            )
    if subset:
        short = [name for i, name in enumerate(queries.ids) if len(queries.others(i)) != 5]
        if short and check == "official":
            raise ScoreTableError(
                f"{len(short)} queries, the first is {short[0]!r}, do not have five others in their subset; read the "
                "official annotations"
            )
    check_lists(queries, lists, candidates, subset=subset, length=length)


def _refuse_partial(scores: ComposedScores) -> None:
    """A table that lacks images or queries answers another question."""
    if is_partial(scores):
        dropped = scores.meta.get("dropped") or ()
        count = f"{len(dropped)} examples were left out" if len(dropped) else "some were left out"
        raise ScoreTableError(
            f"the table is partial ({count}), so it is no submission; score the whole split"
        )


def _gallery(scores: ComposedScores) -> frozenset[str]:
    """Every image that has a column."""
    return frozenset(np.unique(np.asarray(scores.candidates)).tolist()) - {""}


def _json(body: Mapping[str, Any]) -> bytes:
    """Compact UTF-8, small enough."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    if len(text) > LIMIT:
        raise ScoreTableError(
            f"the file would have {len(text)} bytes, but at most {LIMIT} are taken; are the image names right?"
        )
    return text


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise ScoreTableExists(
            f"{path} was to be written, but is already there: choose another name, or say that it may be overwritten"
        )


def _write(path: Path, text: bytes) -> Path:
    """To a new file beside it, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_bytes(text)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def _read(path: PathLike, limit: int) -> dict[str, Any]:
    """A JSON object of a regular file of bounded size."""
    path = Path(path)
    if not path.exists():
        raise ScoreTableNotFound(f"no submission file at {path}")
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode) or facts.st_size > limit:
        raise ScoreTableError(
            f"{path} must be a file of at most {limit} bytes, but has {facts.st_size} or is no regular file"
        )
    content = path.read_bytes()
    if content.startswith(b"version https://git-lfs"):
        raise ScoreTableError(f"{path} is a Git LFS pointer, not the data; fetch it with git lfs")
    try:
        body = json.loads(
            content.decode("utf-8-sig"), object_pairs_hook=_once, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise ScoreTableError(f"{path} is not JSON as it should be: {error}") from error
    if not isinstance(body, dict):
        raise ScoreTableError(f"{path} must hold a JSON object, but holds a {type(body).__name__}")
    return cast("dict[str, Any]", body)


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys all differ."""
    body = dict(pairs)
    if len(body) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is there twice")
    return body


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _texts(images: Any, where: str) -> tuple[str, ...]:
    """A list of names."""
    listed: list[Any] = cast("list[Any]", images) if isinstance(images, list) else [None]
    if not all(type(image) is str for image in listed):
        raise ScoreTableError(f"{where} must be a list of image names, as text")
    return tuple(listed)


def _numbers(images: Any, where: str) -> tuple[str, ...]:
    """A list of COCO numbers, as text; true and false are none."""
    listed: list[Any] = cast("list[Any]", images) if isinstance(images, list) else [None]
    if not all(type(image) is int and 0 <= image < BIGGEST for image in listed):
        raise ScoreTableError(
            f"{where} must be a list of image numbers between 0 and {BIGGEST - 1}"
        )
    return tuple(str(image) for image in listed)


def _number(image: str, query: str) -> int:
    """A COCO number from an image id."""
    if not re.fullmatch(r"0|[1-9][0-9]{0,11}", image):
        raise ScoreTableError(
            f"the list of query {query!r} holds {image!r}, but CIRCO's image ids are COCO numbers such as '9761'"
        )
    return int(image)
