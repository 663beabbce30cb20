"""Published numbers as data (`eval/published/*.toml`), and which of them may stand beside a table of ours.

    [[row]]                                  a file: one task, split, world, curve and backbone; names = ours of it
    method = "CSP"                           a row: one method, with its source, k and filter
    source = "tables of …"                   where the numbers were read; rows that nobody verified are not in the files
    mit_states = { auc = 19.4, … }           metric → percent, as printed

A row is shown only where data set, task, form, split, world, k, curve, feasibility filter, backbone and the number of
items (or of seen pairs) all agree; otherwise one sentence says what does not. Numbers of another k, world or backbone
measure something else. CDS-CZSL's open-world rows use a filter of their own, so they agree with nothing here.
No composed-retrieval number is in the files, as none was verified.
"""

import functools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eval.comparison import Comparison, Row
from eval.remarks import filtered

FOLDER = Path(__file__).parent / "published"

FACTS = ("form", "split", "world", "k", "curve", "feasibility filter")
"""What has to agree besides data set, task, backbone and size, in the order in which it is looked at."""


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """Numbers of one method on one data set.

    Attributes:
        dataset: its name, as the reader of it is called.
        task: czsl, matching or retrieval.
        facts: name of `FACTS` → value; "" where a task has no such fact.
        backbone: the frozen model, in full.
        names: what that model is called on our command line.
        sizes: numbers of items (czsl: of seen candidates) that the whole split has.
        method: as it is called in print.
        source: where the numbers were read.
        values: metric → fraction.
        note: what a reader must know of the row.

    """

    dataset: str
    task: str
    facts: Mapping[str, str]
    backbone: str
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    method: str
    source: str
    values: Mapping[str, float]
    note: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Beside:
    """What may be printed beside a table.

    Attributes:
        backbone: the model that rows share, in full; "" without any.
        ours: our rows on it.
        published: theirs, in the order of the file; none where `why` says so.
        why: one sentence if nothing is shown.

    """

    backbone: str = ""
    ours: tuple[Row, ...] = ()
    published: tuple[PublishedRow, ...] = field(default=())
    why: str = ""

    def metrics(self, c: Comparison) -> list[str]:
        """Metrics of the published rows that ours have too, in the order of our columns."""
        theirs = dict.fromkeys(m for row in self.published for m in row.values)
        mine = [m for m in theirs if any(m in row.cells for row in self.ours)]
        return sorted(mine, key=lambda m: c.columns.index(m) if m in c.columns else len(c.columns))


@functools.cache
def rows() -> tuple[PublishedRow, ...]:
    """Every published row, by file and in the file's order."""
    return tuple(row for path in sorted(FOLDER.glob("*.toml")) for row in _read(path))


def _read(path: Path) -> Iterator[PublishedRow]:
    """The rows of a file."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    known = {"method", "source", "paper", "k", "filter", "note", "variant"}
    for row in table["row"]:
        variant = row.get("variant", table.get("variant", ""))
        facts = {
            "form": variant,
            "split": table["split"],
            "world": table.get("world", ""),
            "k": str(row["k"]) if "k" in row else "",
            "curve": table.get("curve", ""),
            "feasibility filter": row.get("filter", ""),
        }
        sizes: Mapping[str, Any] = table.get("seen") or table["items"]
        sizes = sizes.get(variant, sizes)
        for dataset, numbers in row.items():
            if dataset in known:
                continue
            yield PublishedRow(
                dataset,
                table["task"],
                facts,
                table["backbone"],
                tuple(table["names"]),
                tuple(int(n) for n in np.atleast_1d(sizes[dataset])),
                row["method"],
                row["source"] + (f"; {row['paper']}" if "paper" in row else ""),
                {metric: round(value / 100, 6) for metric, value in numbers.items()},
                row.get("note", ""),
            )


def beside(c: Comparison) -> Beside | None:
    """The published rows that answer a comparison's question on one of its backbones.

    None for the exact curve: its legacy twin is what published numbers are compared with.
    """
    if c.curve == "exact":
        kept = [table.kind for row in c.rows for table in row.group.tables]
        if "czsl_summary" not in kept:
            return None
        return Beside(
            why="no published row is shown: they are of the legacy curve, which looks at every score, and this table "
            "keeps the best ones; score again with --dense"
        )
    asked = c.question
    found = [r for r in rows() if (r.dataset, r.task) == (asked.dataset, asked.kind)]
    if not found:
        return Beside(
            why=f"no number of {asked.kind} on {asked.dataset} is shown: none that was published is verified"
        )
    if "partial" in asked.variant.split():
        return Beside(why="no published row is shown: examples were left out of this table")
    for name, mine in _facts(c).items():
        theirs = list(dict.fromkeys(r.facts[name] for r in found))
        found = [r for r in found if r.facts[name] == mine]
        if not found:
            return Beside(
                why=f"no published row is shown: on {asked.dataset} they have {name} {_or(theirs)}, this table has "
                f"{name} {mine or 'not stated'}"
            )
    size, what = _size(c)
    if size not in found[0].sizes:
        return Beside(
            why=f"no published row is shown: {asked.dataset} has {_or([f'{n:,}' for n in found[0].sizes])} {what}, "
            f"this table {size:,}"
        )
    names = {name: r.backbone for r in found for name in r.names}
    whole = [row for row in c.rows if not row.group.tables[0].meta.get("rerank")]
    if not whole:
        return Beside(why="no published row is shown: they rank everything, this table reranks")
    ours = [row for row in whole if _model(row.group.backbone) in names]
    if not ours:
        models = list(dict.fromkeys(r.backbone for r in found))
        return Beside(
            why=f"no published row is shown: they are of {_or(models)}, this table of "
            f"{_or(list(dict.fromkeys(row.group.backbone for row in c.rows)))}"
        )
    model = names[_model(ours[0].group.backbone)]
    return Beside(
        model,
        tuple(row for row in ours if names[_model(row.group.backbone)] == model),
        tuple(r for r in found if r.backbone == model),
    )


def _facts(c: Comparison) -> dict[str, str]:
    """Our side of `FACTS`."""
    is_czsl = c.question.kind == "czsl"
    is_filtered = any(filtered(table) for row in c.rows for table in row.group.tables)
    values = (
        "" if is_czsl else c.question.variant,
        c.question.split,
        c.question.world,
        str(c.k) if is_czsl else "",
        c.curve or "",
        ("feasibility" if is_filtered else "none") if is_czsl else "",
    )
    return dict(zip(FACTS, values, strict=True))


def _size(c: Comparison) -> tuple[int, str]:
    """How much of the split there is, and of what: items, or the seen pairs of CZSL."""
    table: Any = c.rows[0].group.tables[0]
    return (int(table.seen.sum()), "seen pairs") if c.curve else (len(table.scores), "items")


def _model(backbone: str) -> str:
    """The name without the local file that its weights came from."""
    return backbone.partition("@")[0]


def _or(words: Sequence[str]) -> str:
    return " or ".join(word or "none" for word in words)
