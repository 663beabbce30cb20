"""Where every number comes from: a block a run, with the commands, digests and settings behind it."""

import json
from collections.abc import Sequence

from eval.costs import COSTS, cost_of, inside
from eval.markup import text
from eval.runs import Run
from eval.tables_html import Anchors


def anchors_of(runs: Sequence[Run]) -> dict[Run, str]:
    """A place on the page for each run, by its number."""
    return {run: f"run-{number}" for number, run in enumerate(runs, 1)}


def runs_of(runs: Sequence[Run], anchors: Anchors) -> str:
    """All runs, in their order."""
    return _SAYS + "".join(_run(run, anchors[run]) for run in runs)


_SAYS = (
    '<p class="soft">Names and seeds in the tables above lead here. A fingerprint is of what a cache claims to be, its '
    "digest of what it holds; the weights' digest is of the tensors that were loaded.</p>"
)


def _run(run: Run, anchor: str) -> str:
    """One run: facts, commands, tables, the whole record."""
    cache = inside(run.facts, "cache")
    fingerprint = str(run.facts.get("fingerprint") or cache.get("fingerprint") or "–")
    facts = [("data set", text(run.dataset)), ("directory", _code(run.path))]
    facts += [("cache", _code(cache["path"]))] if cache.get("path") else []
    facts += [("fingerprint", _code(fingerprint))]
    facts += [("digest", _code(cache["digest"]))] if cache.get("digest") else []
    weights = inside(cache, "backbone").get("weights")
    facts += [("weights", _code(weights))] if weights else []
    for cost in COSTS:
        value = cost_of(run, cost.name)
        shown = "–" if value is None else f"{cost.shown(value)} {cost.unit}"
        facts.append((cost.title, shown))
    facts.append(("trained by", _command(run.facts.get("command"))))
    for name, table in run.tables.items():
        facts.append((f"scores {text(name)}", _command(table.meta.get("command"))))
    if not run.tables:
        facts.append(("scores", "none"))
    listed = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts)
    record = text(json.dumps(dict(run.facts), indent=1, ensure_ascii=False))
    record = record.replace("\\x0a", "\n")
    return (
        f'<article class="run" id="{anchor}"><h3>{text(run.name)} · {text(run.backbone)}, seed {run.seed}</h3>'
        f"<dl>{listed}</dl>"
        f"<details><summary>run.json</summary><pre><code>{record}</code></pre></details></article>"
    )


def _code(value: object) -> str:
    return f"<code>{text(value)}</code>"


def _command(value: object) -> str:
    """The exact command, or that nothing recorded it."""
    return _code(value) if isinstance(value, str) and value else "– (not recorded)"
