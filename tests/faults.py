"""Counts of all faults tried in a test run, and the table that pytest prints of them at its end (conftest.py)."""

import os
from collections import Counter

SEED = int(os.environ.get("HEADSTART_FAULT_SEED", "0"))
"""Of every drawn fault; another one draws others: HEADSTART_FAULT_SEED=7 pytest tests/test_cache_faults.py."""

OUTCOMES = (
    "same result",
    "clear error",
    "found by verify",
    "unseen by design",
    "silent wrong",
)
"""Columns. A case may be several of them; a silent wrong reading fails its test."""

TALLY: dict[str, Counter[str]] = {}
"""Kind of fault → outcome → how often."""


def count(kind: str, *outcomes: str, times: int = 1) -> None:
    """Note cases of a kind, and how they ended."""
    found = TALLY.setdefault(kind, Counter())
    found["cases"] += times
    for outcome in outcomes:
        assert outcome in OUTCOMES, outcome
        found[outcome] += times


def table() -> list[str]:
    """Markdown, one row a kind."""
    head = ["fault", "cases", *OUTCOMES]
    rows = [
        [kind, *(f"{n[c]:,}" for c in ("cases", *OUTCOMES))] for kind, n in sorted(TALLY.items())
    ]
    total = Counter[str]()
    for n in TALLY.values():
        total += n
    rows.append(["**all**", *(f"{total[c]:,}" for c in ("cases", *OUTCOMES))])
    return ["| " + " | ".join(r) + " |" for r in (head, ["---"] * len(head), *rows)]
