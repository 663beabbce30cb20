"""Plots of a comparison with what they show in words, and their numbers as CSV inside the page."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from eval import plots
from eval.comparison import Comparison, Row
from eval.composition import Composition
from eval.czsl import exact_curve
from eval.formats import csv_table
from eval.markup import chip, data_link, text
from eval.runs import Group, Run


def figure(svg: str, caption: str) -> str:
    """A plot with what it shows in words."""
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def names_of(c: Comparison) -> dict[Group, str]:
    """What each row is called: by its label, and by its score space too where two rows have one label."""
    labels = Counter(row.group.label for row in c.rows)
    return {
        g: g.label if labels[g.label] == 1 else f"{g.method} ({g.space}) · {g.backbone}"
        for g in (row.group for row in c.rows)
    }


def numbers_of(names: Mapping[Group, str], series: Mapping[str, int]) -> dict[str, int]:
    """Name → number of its colour: that of its label, and a new one for each further score space of a method."""
    first: dict[str, str] = {}
    more: dict[tuple[str, str], int] = {}
    numbers: dict[str, int] = {}
    for group, name in names.items():
        if group.space == first.setdefault(group.method, group.space) or name == group.label:
            numbers[name] = series[group.label]
        else:
            new = max(series.values()) + 1 + len(more)
            numbers[name] = more.setdefault((group.method, group.space), new)
    return numbers


def figures_of(c: Comparison, series: Mapping[str, int]) -> str:
    """The curve of CZSL, or bars by category: once a backbone, a method having one colour everywhere."""
    figures: list[str] = []
    names = names_of(c)
    numbers = numbers_of(names, series)
    for backbone in dict.fromkeys(row.group.backbone for row in c.rows):
        part = replace(c, rows=tuple(row for row in c.rows if row.group.backbone == backbone))
        if c.curve == "exact" and {"auc", "best_hm"} <= set(c.columns):
            figures.append(_curve_figure(part, names, numbers))
        if c.categories:
            figures += [
                _category_figure(part, m, c.categories, names, numbers)
                for m in c.columns
                if "/" not in m
            ]
    if not figures:
        return ""
    keys = {
        name.removesuffix(f" · {group.backbone}"): numbers[name] for group, name in names.items()
    }
    legend = "".join(f"<li>{chip(number)}{text(name)}</li>" for name, number in keys.items())
    return f'<ul class="legend">{legend}</ul><div class="plots">{"".join(figures)}</div>'


def _curve_figure(c: Comparison, names: Mapping[Group, str], numbers: Mapping[str, int]) -> str:
    """Seen–unseen curves of all rows and seeds."""
    curves = {
        names[row.group]: [
            exact_curve(t, c.k) for t in row.group.tables if isinstance(t, Composition)
        ]
        for row in c.rows
    }
    lines: list[Sequence[object]] = [("row", "seed", "bias", "seen", "unseen")]
    for row in c.rows:
        name = names[row.group]
        for run, points in zip(row.group.runs, curves[name], strict=True):
            steps = zip(points.bias, points.seen, points.unseen, strict=True)
            lines += [(name, run.seed, None if np.isnan(b) else b, s, u) for b, s, u in steps]
    what = f"Accuracy on seen pairs over accuracy on unseen pairs, {len(curves)} rows, {c.title}"
    caption = (
        f"<b>Seen–unseen curve</b>, {text(c.rows[0].group.backbone)}. Each line is one seed; the bias grows from left "
        f"to right. "
        f"{data_link('curve', csv_table(lines))}"
    )
    return figure(plots.seen_unseen(curves, numbers, what), caption)


def _category_figure(
    c: Comparison,
    metric: str,
    categories: Sequence[str],
    names: Mapping[Group, str],
    numbers: Mapping[str, int],
) -> str:
    """Bars of one metric by category."""
    values = {
        names[row.group]: np.array([_estimate(row, f"{metric}/{name}") for name in categories])
        for row in c.rows
    }
    chance = [c.chance.get(f"{metric}/{name}") for name in categories]
    lines: list[Sequence[object]] = [("row", "category", "estimate", "low", "high", "chance")]
    for name, found in values.items():
        lines += [
            (name, category, *line, line_chance)
            for category, line, line_chance in zip(categories, found, chance, strict=True)
        ]
    caption = (
        f"<b>{text(metric)} by category</b>, {text(c.rows[0].group.backbone)}, with 95 % intervals; dashed: chance. "
        f"{data_link(metric, csv_table(lines))}"
    )
    what = f"{metric} by category, {c.title}"
    return figure(plots.category_bars(categories, values, numbers, chance, what), caption)


def _estimate(row: Row, metric: str) -> tuple[float, float, float]:
    """Estimate, low and high."""
    cell = row.cells[metric]
    low, high = (cell.mean if v is None else v for v in (cell.low, cell.high))
    return cell.mean, low, high


def trained(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs with a history, the seeds of one method and configuration together."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.history:
            key = json.dumps(
                [run.name, run.backbone, run.dataset, run.config], sort_keys=True, default=str
            )
            groups.setdefault(key, []).append(run)
    return list(groups.values())


def training_figure(runs: Sequence[Run], series: Mapping[str, int]) -> str:
    """Loss and validation over steps for the seeds of one method; nothing where neither was recorded."""
    first = runs[0]
    train: dict[str, Any] = first.facts.get("train") or {}
    metric = str(train.get("select") or "")
    if not metric:
        found = (line["validation"] for line in first.history if line.get("validation"))
        metric = next(iter(next(found, {"": None})))
    losses = [
        [(float(line["step"]), float(line["loss"])) for line in run.history if "loss" in line]
        for run in runs
    ]
    checks = [
        [
            (float(line["step"]), float(line["validation"][metric]))
            for line in run.history
            if metric in (line.get("validation") or {})
        ]
        for run in runs
    ]
    if not any(losses) and not any(len(check) > 1 for check in checks):  # no curve in one point
        return ""
    label = f"{first.name} · {first.backbone}"
    number = series.get(
        label, next((n for name, n in series.items() if name.startswith(first.name)), 0)
    )
    task = first.facts.get("task")
    trained_on = f", {task}" if task else ""
    rows: list[Sequence[object]] = [("seed", "step", "loss", "validation")]
    for run, loss, check in zip(runs, losses, checks, strict=True):
        rows += [(run.seed, step, value, None) for step, value in loss]
        rows += [(run.seed, step, None, value) for step, value in check]
    caption = (
        f"{chip(number)}<b>{text(label)}</b>{text(trained_on)}, {text(first.dataset)}: one line a seed. "
        f"{data_link('training', csv_table(rows))}"
    )
    svg = plots.training(losses, checks, metric, number, f"Training of {label}{trained_on}")
    return figure(svg, caption)
