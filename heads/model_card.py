"""The page that stands beside a published head: what it is, what it was trained on and by, and what it scores.

Everything on it comes from the files of a run, so nothing is claimed that they do not say: without a record there is no
command, without score tables no figure. A licence is for whoever publishes to state.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from cache_builder.spec import BackboneSpec
from eval import comparison, score_io
from eval.any_table import Table
from eval.remarks import remarks
from eval.runs import recorded_dataset
from heads import load_method

LIBRARY = "headstart"

SCORED = ("czsl", "matching", "two_by_two", "retrieval")
"""Tasks in which images are scored against texts that nobody trained on."""

MADE = "<!-- made by headstart; pushed again, it is made anew unless it was edited: sha256 {} -->\n"
"""Ends a card that is made here, with the digest of all that stands before."""

PIPELINE = "zero-shot-image-classification"
"""What the hub calls the tasks of `SCORED`; it has no name for composed queries."""


def model_card(
    description: Mapping[str, Any],
    record: Mapping[str, Any] | None = None,
    scores: Sequence[Path] = (),
    *,
    backbone: BackboneSpec | None = None,
    repo: str = "OWNER/NAME",
) -> ModelCard:
    """The card of a head.

    Args:
        description: its `config.json`.
        record: its `run.json`, if it has one.
        scores: score tables of the run.
        backbone: what its streams come from, where there is no record.
        repo: where it will lie, for the lines that load it.
    """
    tables = {path.stem: score_io.load(path) for path in scores}
    values = {stem: comparison.evaluate(table) for stem, table in tables.items()}
    if record is not None:
        backbone = BackboneSpec.model_validate(record["cache"]["backbone"])
    method: str = description["method"]
    task: str | None = None if record is None else record["task"]
    name = f"{method}-{task}" if task else method
    trained_on = record and record["cache"]["dataset"]["name"]
    datasets = {stem: str(recorded_dataset(of) or trained_on) for stem, of in tables.items()}
    results = [
        EvalResult(
            task_type=PIPELINE
            if score_io.kind(tables[stem]) in SCORED
            else score_io.kind(tables[stem]),
            dataset_type=datasets[stem],
            dataset_name=datasets[stem],
            dataset_config=stem,
            dataset_split=tables[stem].split,
            metric_type=metric,
            metric_value=value,
        )
        for stem, of in values.items()
        for metric, value in of.items()
    ]
    data = ModelCardData(
        library_name=LIBRARY,
        tags=[LIBRARY, method, *([task] if task else []), "vision-language", "compositionality"],
        pipeline_tag=PIPELINE if task in SCORED else None,
        base_model=backbone and hub_name(backbone),
        model_name=name,
        eval_results=results or None,
    )
    parts = [
        _what(method, backbone),
        _how_to(repo, whole=record is not None),
        *([_training(record)] if record else []),
        *([_figures(tables, values, datasets)] if tables else []),
        _citation(method),
        "## Licence\n\nNone is stated here. Whoever publishes this head adds `license:` to the head of this page.",
    ]
    page = f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n" + "\n\n".join(parts) + "\n\n"
    return ModelCard(page + MADE.format(_digest(page)))


def is_made(page: str) -> bool:
    """Is it a card as it was made here, which nobody has edited?"""
    page = page.replace("\r\n", "\n")
    text = page.rpartition(MADE.partition("{}")[0])[0]
    return page == text + MADE.format(_digest(text))


def _digest(page: str) -> str:
    return hashlib.sha256(page.encode()).hexdigest()


def hub_name(backbone: BackboneSpec) -> str | None:
    """The backbone's repository on the hub; None where its name is a tag of open_clip, a file or a folder."""
    name = backbone.checkpoint.partition("@")[0]
    by_hub = "transformers" in backbone.versions and "open_clip_torch" not in backbone.versions
    return name if by_hub and re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None


def paper_of(method: str) -> str:
    """What the method's file says of its paper, as one line; empty if it says nothing."""
    text = load_method(method).__doc__ or ""
    found = re.search(r"^Paper:\s*(.*?)(?=^\w[\w ,]*:\s|\Z)", text, re.M | re.S)
    return " ".join(found[1].split()) if found else ""


def _what(method: str, backbone: BackboneSpec | None) -> str:
    first = (load_method(method).__doc__ or method).split("\n\n")[0]
    lines = [" ".join(first.split()), ""]
    if backbone is not None:
        lines += [
            f"It reads what the frozen backbone `{backbone.family}:{backbone.checkpoint}` makes of images and texts "
            f"(weights sha256 `{backbone.weights}`), and works with no other. The backbone itself is not in this "
            "repository.",
        ]
    return "\n".join(lines).rstrip()


def _how_to(repo: str, *, whole: bool) -> str:
    """Lines that load it, and of a whole run those that score it."""
    lines = [
        "## Use",
        "",
        "```python",
        "from heads.checkpoint import Pretrained",
        "",
        f'head = Pretrained.from_pretrained("{repo}").head',
        "```",
    ]
    if whole:
        lines += [
            "",
            "```bash",
            f"hf download {repo} --local-dir RUN",
            "headstart score RUN --cache CACHE      # a cache of the same backbone: headstart build",
            "```",
        ]
    return "\n".join(lines)


def _training(record: Mapping[str, Any]) -> str:
    dataset, best = record["cache"]["dataset"], record["best"]
    lines = [
        "## Training",
        "",
        f"On `{dataset['name']}`, task `{record['task']}`, seed {record['seed']}: {record['parameters']:,} trained "
        f"parameters, {record['steps']} steps.",
    ]
    if best and record["train"].get("select"):
        metric = record["train"]["select"]
        lines += [f"The weights are those of the best {metric} on val, {best[metric]:.4f}."]
    if command := record.get("command"):
        lines += ["", "```bash", command, "```"]
    lines += ["", "`run.json` has every setting, the versions and the cache's digest."]
    return "\n".join(lines)


def _figures(
    tables: Mapping[str, Table],
    values: Mapping[str, Mapping[str, float]],
    datasets: Mapping[str, str],
) -> str:
    lines = ["## Scores", "", "Fractions in [0, 1], one run.", ""]
    lines += ["| table | data set | split | metric | value |", "|---|---|---|---|---|"]
    for stem, table in tables.items():
        where = f"{stem} | {datasets[stem]} | {table.split}"
        lines += [f"| {where} | {m} | {v:.4f} |" for m, v in values[stem].items()]
    notes = [f"{stem}: {said}" for stem, table in tables.items() for said in remarks(table)]
    return "\n\n".join(["\n".join(lines), *notes])


def _citation(method: str) -> str:
    paper = paper_of(method)
    said = f"The method: {paper}" if paper else "The method's file names no paper."
    return f"## Citation\n\n{said}"
