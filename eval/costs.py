"""What a row costs: bytes that it reads of every image, seconds of building and of training, parameters.

From run.json: `costs.bytes_per_image` (stored bytes of the image streams that the method reads), `costs.build_seconds`
(of the whole cache, whatever of it is read), `seconds` (training) and `parameters`. Older runs, and runs from
elsewhere, lack some: an unknown cost is None, never 0.

Not for: comparing seconds of different machines, or of runs that trained side by side in one process.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from eval.runs import Group, Run


@dataclass(frozen=True, slots=True)
class Cost:
    """One kind of cost.

    Attributes:
        name: of it in files.
        title, unit: for people.
        shown: a value as text.

    """

    name: str
    title: str
    unit: str
    shown: Callable[[float], str]


def size(value: float) -> str:
    """Bytes for people, with three digits."""
    if value < 1000:
        return f"{value:.0f} B"
    for unit in ("KiB", "MiB"):
        value /= 1024
        if value < 999.5:
            return f"{value:.3g} {unit}"
    value /= 1024
    return f"{value:.3g} GiB" if value < 999.5 else f"{value:,.0f} GiB"


def seconds(value: float) -> str:
    """Seconds for people; short times keep their digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


COSTS = (
    Cost("bytes_per_image", "read", "per image", size),
    Cost("build_seconds", "build", "seconds", seconds),
    Cost("training_seconds", "training", "seconds", seconds),
    Cost("parameters", "parameters", "trained", lambda value: f"{value:,.0f}"),
)
"""In the order of the columns."""


def inside(facts: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of a record; empty where it is none."""
    found = facts.get(name)
    return cast("Mapping[str, Any]", found) if isinstance(found, Mapping) else {}


def cost_of(run: Run, name: str) -> float | None:
    """A cost as run.json says it; None where it does not say a usable number."""
    said = inside(run.facts, "costs")
    places = {
        "bytes_per_image": said.get("bytes_per_image"),
        "build_seconds": said.get("build_seconds"),
        "training_seconds": run.facts.get("seconds"),
        "parameters": run.facts.get("parameters"),
    }
    value = places[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if np.isfinite(value) and value >= 0 else None


def costs_of(run: Run) -> dict[str, float]:
    """Every cost that run.json says."""
    found = {cost.name: cost_of(run, cost.name) for cost in COSTS}
    return {name: value for name, value in found.items() if value is not None}


def seed_costs(group: Group, name: str) -> tuple[float | None, ...]:
    """Of every seed, in their order."""
    return tuple(cost_of(run, name) for run in group.runs)


def mean_cost(group: Group, name: str) -> float | None:
    """Over the seeds that say it; None where none does."""
    known = [value for value in seed_costs(group, name) if value is not None]
    return float(np.mean(known)) if known else None


def is_untrained(group: Group) -> bool:
    """Has the row no trained parameter, so that a logarithmic axis has no place for it?"""
    return mean_cost(group, "parameters") == 0


def pareto(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Rows that no other row beats: none is as cheap and as good, and cheaper or better. By cost, then by value.

    Rows of equal cost and value beat each other in nothing: all of them are kept.
    """
    front: list[int] = []
    best, at = -np.inf, -np.inf
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -values[i])):
        if values[i] > best:
            best, at = values[i], costs[i]
            front.append(i)
        elif (values[i], costs[i]) == (best, at):
            front.append(i)
    return front
