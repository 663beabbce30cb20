"""Composed queries of a run with their best images, the experts that are used by what, and what a modulation moves.

reference │ edit │ 1 │ 2 ✓ │ 3 │ 4 │ 5       right images have a frame and a tick: colour alone is not enough
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.composed_plots import before_and_after, usage_map
from eval.errors import RunError, ScoreTableError
from eval.figures import figure
from eval.formats import csv_table
from eval.markup import data_image, data_link, png, text
from eval.npz import read_npz
from eval.runs import Run

Found = Mapping[str, NDArray[Any]]

QUERY = re.compile(r"query-\d{2,}(-\w*)?\.npz")
NEEDS = {
    "query": ("reference", "edit", "images", "names", "scores", "hits", "rank", "competing"),
    "routing": ("kinds", "counts", "shares", "reads", "split"),
    "modality": (
        *("mean", "covariance", "to_mean", "pairs", "edges"),
        *("n_images", "n_texts", "n_pairs", "text_of", "split"),
    ),
}

ROUTED = {"by": "kind of edit", "of": "queries", "tower": "text", "drawn": "mean"}
"""What routing.npz may say of itself, and what is meant where it does not."""

MOST_KINDS = 41
"""Rows of a map of experts, all together included."""

STATES = ("before", "after")
BLIND = (
    " The routers read the state at the pseudo-word, which in a causal text tower cannot see the modification: there, "
    "rows differ by their reference images only."
)


def is_composed(path: Path) -> bool:
    """Is it a file of these, by its name?"""
    return bool(QUERY.fullmatch(path.name)) or path.name in ("routing.npz", "modality.npz")


def composed_of(run: Run) -> str:
    """Queries of a run, and below them the parts of its head; nothing where it has neither."""
    mine = [path for path in run.pictures if is_composed(path)]
    if not mine:
        return ""
    queries = [(path, read_query(path)) for path in mine if QUERY.fullmatch(path.name)]
    parts: list[str] = []
    for name, drawn in {"routing.npz": _routing, "modality.npz": _modality}.items():
        parts += [
            drawn(path, _read(path, path.stem), run.name) for path in mine if path.name == name
        ]
    split = next((str(found["split"]) for _, found in queries if "split" in found), "")
    of = f" of split {text(split)}" if split else ""
    n = f"{len(queries)} queries" if len(queries) > 1 else "1 query"
    says = f'<p class="soft">{n}{of}.</p>' if queries else ""
    name = f"{run.name} · {run.backbone}, {run.dataset}, seed {run.seed}"
    plots = f'<div class="plots">{"".join(parts)}</div>' if parts else ""
    rows = "".join(_query(path, found) for path, found in queries)
    return f"<h3>{text(name)}</h3>{says}{rows}{plots}"


def _read(path: Path, what: str) -> Found:
    """The arrays of a file, all of `NEEDS`."""
    try:
        found = read_npz(path)
    except ScoreTableError as error:
        raise RunError(f"{path} holds no {what}: {error}") from error
    if missing := [name for name in NEEDS[what] if name not in found]:
        raise RunError(
            f"{path} holds no {what}: {', '.join(missing)} is missing; it must hold {', '.join(NEEDS[what])}"
        )
    return found


def _refuse(path: Path, must: str, found: Found, names: Sequence[str]) -> RunError:
    """What is wrong with the shapes of a file."""
    shapes = ", ".join(f"{name} {found[name].dtype} {found[name].shape}" for name in names)
    return RunError(f"{path} must hold {must}, but it holds {shapes}")


# ── queries ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_query(path: Path) -> Found:
    """A query with its best images.

    Raises:
        RunError: it is no such file, or its arrays are not of one query; names the file.

    """
    found = _read(path, "query")
    images, reference = found["images"], found["reference"]
    k = len(images) if images.ndim == 4 else -1
    lists = [found[name] for name in ("names", "scores", "hits")]
    pictures = (images.dtype, reference.dtype) == (np.uint8, np.uint8)
    if not pictures or reference.ndim != 3 or any(values.shape != (k,) for values in lists):
        raise _refuse(
            path,
            "reference (H, W, 3) and images (K, H, W, 3) uint8, and names, scores and hits (K,)",
            found,
            ("reference", "images", "names", "scores", "hits"),
        )
    return found


def _query(path: Path, found: Found) -> str:
    """A row: reference, edit, and the best images, the right ones marked."""
    images, reference = found["images"], found["reference"]
    lists = [found[name] for name in ("names", "scores", "hits")]
    edit = " / ".join(str(words) for words in np.atleast_1d(found["edit"]))
    rank, competing = int(found["rank"]), int(found["competing"])
    kinds = ", ".join(str(kind) for kind in np.atleast_1d(found.get("kinds", np.array([], str))))
    verdict = f"best right image: rank {rank:,} of {competing:,}"
    if not rank:
        verdict = f"right images are not published; {competing:,} compete"
    facts = " · ".join(filter(None, [kinds, verdict]))
    small = " pixels" if max(reference.shape[:2]) < 160 else ""
    said = str(found.get("id", path.stem))
    items = [
        f'<li><span class="frame{small}"><img src="{data_image(png(reference))}" '
        f'alt="reference picture of {text(said)}"></span><small>reference</small></li>',
        f'<li class="edit">“{text(edit)}”</li>',
    ]
    for place, (image, name, score, hit) in enumerate(zip(images, *lists, strict=True), 1):
        alt = f"place {place}{', right' if hit else ''}: {name}, score {score:.3f}"
        tick = '<span class="tick">✓</span>' if hit else ""
        items.append(
            f'<li><span class="frame{" hit" if hit else ""}{small}"><img src="{data_image(png(image))}" '
            f'alt="{text(alt)}" title="{text(name)}">{tick}</span><small>{place} · {score:.3f}</small></li>'
        )
    return f'<div class="shot"><p class="soft">{text(facts)}</p><ul class="answers">{"".join(items)}</ul></div>'


# ── parts of the head ────────────────────────────────────────────────────────────────────────────────────────────────


def _routing(path: Path, found: Found, name: str) -> str:
    """The map of experts by kind of edit, with the numbers of each block as CSV."""
    kinds, counts, shares = found["kinds"], found["counts"], found["shares"]
    if shares.ndim != 3 or not shares.size or not kinds.shape == counts.shape == shares.shape[:1]:
        raise _refuse(
            path,
            "shares (kinds, blocks, experts), with kinds and counts of as many",
            found,
            ("shares", "kinds", "counts"),
        )
    _, depth, experts = shares.shape
    named = [str(kind) for kind in kinds]
    lines: list[Sequence[object]] = [("kind", "n", "block", "expert", "share")]
    for kind, n, blocks in zip(named, counts.tolist(), shares, strict=True):
        for b, row in enumerate([blocks.mean(0), *blocks]):
            where = b or "mean"
            lines += [(kind, n, where, e, float(share)) for e, share in enumerate(row, 1)]
    split, reads = str(found["split"]), str(found["reads"])
    by, of, tower, drawn = (str(found.get(key, usual)) for key, usual in ROUTED.items())
    where = f"over the {depth} routed block{'s' * (depth != 1)}"
    where = where if drawn == "mean" else f"in the last of {depth} routed blocks"
    left = ""
    if len(named) > MOST_KINDS:
        first = [*np.argsort(-counts[:-1], kind="stable")[: MOST_KINDS - 1], len(named) - 1]
        left = f" The {MOST_KINDS - 1} of most {of} are drawn, of {len(named) - 1}."
        named, counts, shares = [named[i] for i in first], counts[first], shares[first]
    caption = (
        f"<b>Experts by {text(by)}</b>, split {text(split)}, {counts[-1]:,} {text(of)}: mean share of each expert "
        f"{where} of the {text(tower)} tower. Beside a name stands its number of {text(of)}.{left} "
        f"If all were used alike, each had {100 / experts:.1f} %.{BLIND if reads == 'pseudo_word' else ''} "
        f"{data_link('experts', csv_table(lines))}, block by block too"
    )
    what = f"Share of {experts} experts by {by}, {name}, {split}"
    shown = shares.mean(1) if drawn == "mean" else shares[:, -1]
    return figure(usage_map(named, counts, shown, what), caption)


def _modality(path: Path, found: Found, name: str) -> str:
    """Two histograms, and a table of the distances, before and after."""
    edges, bins = found["edges"], len(found["edges"]) - 1
    shapes = [found[k].shape for k in ("mean", "covariance", "to_mean", "pairs")]
    if edges.ndim != 1 or bins < 1 or shapes != [(2,), (2,), (2, bins), (2, bins)]:
        raise _refuse(
            path,
            "edges (bins + 1), to_mean and pairs (2, bins), mean and covariance (2,)",
            found,
            ("edges", "to_mean", "pairs", "mean", "covariance"),
        )
    split, of = str(found["split"]), str(found["text_of"])
    images, texts, pairs = (int(found[f"n_{k}"]) for k in ("images", "texts", "pairs"))
    against = f"{images:,} reference images of split {text(split)}, {texts:,} texts ({text(of)})"
    lines: list[Sequence[object]] = [("what", "from", "to", *STATES)]
    lines += [(k, None, None, *found[k].astype(float).tolist()) for k in ("mean", "covariance")]
    for k in ("to_mean", "pairs"):
        spans = zip(edges[:-1].tolist(), edges[1:].tolist(), found[k].T.tolist(), strict=True)
        lines += [(k, low, high, *counted) for low, high, counted in spans]
    key = "Filled: before the modulation; dashed line: after."
    link = data_link("modality", csv_table(lines))
    titles = {
        "to_mean": "Cosine of each image with the mean direction of the texts",
        "pairs": f"Cosine of {pairs:,} random image–text pairs",
    }
    figures = [
        figure(
            before_and_after(edges, found[k], f"{title}, before and after, {name}, {split}"),
            f"<b>{title}</b>: {against}. {key} Share of {'images' if k == 'to_mean' else 'pairs'} in each of {bins} "
            f"bins from −1 to 1; bins outside the plot are empty. {link}",
        )
        for k, title in titles.items()
    ]
    rows = {
        "distance of the means<small class=soft>in mean lengths of a text</small>": found["mean"],
        "distance of the covariances<small class=soft>Frobenius, in norms of the texts’</small>": found[
            "covariance"
        ],
    }
    body = "".join(
        f"<tr><th scope=row>{what}</th>{''.join(f'<td>{_number(value)}</td>' for value in values)}</tr>"
        for what, values in rows.items()
    )
    table = (
        f'<div class="wide" tabindex="0"><table><thead><tr><th>images to texts</th><th>before</th><th>after</th></tr>'
        f"</thead><tbody>{body}</tbody></table></div>"
    )
    caption = (
        f"<b>Images and texts before and after the modulation</b>: {against}. 0 is equal means, or equal covariances. "
        f"{link}"
    )
    return "".join([figure(table, caption), *figures])


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.3f}"
