"""What a reader of a table's numbers must know, and the numbers do not say: from `meta` of the table, as sentences.

    partial, dropped       examples were left out: a smaller gallery, or fewer items, than the split that others measure
    train_overlap          benchmark images that were trained on, or that nobody can tell apart
    selected_on            the split and metric that chose the checkpoint; not held out, where it is the split scored
    rerank                 only the K' best of every query were scored by the head
    order_seed             training took the batches of another seed than its own (`train` of the run's record)
    feasibility            pairs of the open world that were pruned, by which rule and threshold
    notes                  what an importer found (`eval.importers`)

`selected_on` and `feasibility` may also stand in the record of the run (`meta["run"]`). A table that says none of these
has no remark: that it is whole, held out and unfiltered is then its maker's claim.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from eval.any_table import Table
from eval.table import plain

SHOWN = 3
"""Names listed of many."""

SEARCHED = {"threshold", "kept", "unseen", "mode", "selected_by", "selected_value", "selected_on"}
"""What `eval.open_world` notes of a threshold that it searched."""


def remarks(table: Table) -> list[str]:
    """Sentences about a table, without control characters; none where there is nothing to say."""
    meta: Mapping[str, Any] = table.meta
    found = [*_partial(meta), *_overlap(meta), *_selected(meta, table.split)]
    if k := meta.get("rerank"):
        found.append(f"reranked: the head scored only the {k} best by cosine; not a full ranking")
    found += [*_order(meta), *_feasibility(meta), *(str(note) for note in meta.get("notes") or ())]
    return [plain(sentence) for sentence in found]


def is_partial(table: Table) -> bool:
    """Were examples left out of the split?"""
    return bool(table.meta.get("partial") or table.meta.get("dropped"))


def filtered(table: Table) -> Any:
    """What the table says of a feasibility filter; None where it names none."""
    return said(table.meta, "feasibility")


def said(meta: Mapping[str, Any], name: str) -> Any:
    """A fact of the table, or of the run that made it; None where neither says it."""
    value = meta.get(name)
    if value is not None:
        return value
    run: Mapping[str, Any] = meta.get("run") or {}
    return run.get(name)


def _partial(meta: Mapping[str, Any]) -> list[str]:
    dropped: Sequence[Any] = meta.get("dropped") or ()
    if not meta.get("partial") and not dropped:
        return []
    if not dropped:
        return ["partial: examples were left out, so this is not the split that others measure"]
    more = ", …" if len(dropped) > SHOWN else ""
    names = ", ".join(str(name) for name in dropped[:SHOWN])
    return [
        f"partial: {len(dropped):,} examples were left out ({names}{more}), so this is not the split that others "
        "measure"
    ]


def _overlap(meta: Mapping[str, Any]) -> list[str]:
    """Where some images were trained on, or nobody can tell."""
    found: Mapping[str, Any] = meta.get("train_overlap") or {}
    return [str(found["says"])] if found and found["count"] != 0 else []


def _selected(meta: Mapping[str, Any], split: str) -> list[str]:
    chosen = said(meta, "selected_on")
    if not chosen:
        return []
    if split in str(chosen).split():
        return [f"the checkpoint was selected on {chosen}, the split scored: no held-out number"]
    return [f"the checkpoint was selected on {chosen}"]


def _order(meta: Mapping[str, Any]) -> list[str]:
    """Where seeds of a sweep shared one order."""
    run: Mapping[str, Any] = meta.get("run") or {}
    train: Mapping[str, Any] = run.get("train") or {}
    order = train.get("order_seed")
    if order is None or order == run.get("seed"):
        return []
    return [
        f"trained on the batches of seed {order}, whatever the seed: the spread over seeds leaves out the order of "
        "the data"
    ]


def _feasibility(meta: Mapping[str, Any]) -> list[str]:
    found = said(meta, "feasibility")
    if not found:
        return []
    facts = cast("dict[str, Any]", found) if isinstance(found, dict) else {"by": found}
    if facts.keys() >= SEARCHED:
        threshold = facts["threshold"]
        words = (
            f"{'every pair is kept' if threshold is None else f'T = {threshold:.4f}'}, {facts['kept']:,} of "
            f"{facts['unseen']:,} unseen pairs, {facts['mode']}; T by {facts['selected_by']} "
            f"{100 * facts['selected_value']:.1f} % on {facts['selected_on']}"
        )
    else:
        words = ", ".join(f"{name} {_number(value)}" for name, value in facts.items())
    return [f"feasibility filter: {words}; not comparable with another filter or with none"]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
