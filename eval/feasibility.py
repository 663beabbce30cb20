"""How plausible an unseen pair is, from word vectors and training pairs alone, and what is done with the implausible.

Paper: Mancini et al., "Open world compositional zero-shot learning" (CompCos, arXiv 2101.12609), section 3.3; Nayak et
al. (CSP, arXiv 2204.03574) for the multiplied mode and the search for the threshold on validation.

    rho(a, o) = (rho_o + rho_a) / 2          an unseen pair is kept where rho >= T; a seen pair always is
    rho_o = largest cos(o, o') over the other objects o' that a has in training; -1 if it has none
    rho_a = largest cos(a, a') over the other attributes a' that o has in training; -1 if it has none

Letters: `A` attributes, `O` objects, `C` = A·O pairs, attribute-major (column a·O + o), `Q` images, `T` the threshold.
numpy only, and nothing of the other rooms: usable with any scores. Not for: choosing T on the split it is used on.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from eval.errors import ScoreTableError
from eval.npz import read_npz

Mode = Literal["neg_inf", "csp_multiply", "compcos_minus_one"]

POINTS = 50
"""Thresholds tried (CSP's release)."""

FORMAT = "headstart feasibility 1"


def feasibility(
    attr_vectors: Float[np.ndarray, "a d"],
    obj_vectors: Float[np.ndarray, "o d2"],
    train_pairs: Int[np.ndarray, "n 2"],
) -> Float[np.ndarray, " c"]:
    """Feasibility of every attr × obj, attribute-major; 1 at training pairs, whose value nothing reads.

    Args:
        attr_vectors, obj_vectors: word vectors of any length and scale; the two need not share a space.
        train_pairs: (attr, obj) as indices.

    Raises:
        ScoreTableError: no training pair, an index out of range, or a vector that is zero or not finite.

    """
    a, o = len(attr_vectors), len(obj_vectors)
    if not len(train_pairs) or (train_pairs < 0).any() or (train_pairs >= [a, o]).any():
        raise ScoreTableError(
            f"feasibility needs training pairs as indices below ({a}, {o}), but got {len(train_pairs)} pairs with "
            f"largest indices {train_pairs.max(0, initial=-1).tolist()}"
        )
    seen = np.zeros((a, o), dtype=bool)
    seen[train_pairs[:, 0], train_pairs[:, 1]] = True
    of_objs = _nearest_other(_cosines(obj_vectors, "object"), seen)
    of_attrs = _nearest_other(_cosines(attr_vectors, "attribute"), seen.T).T
    return np.where(seen, 1.0, (of_objs + of_attrs) / 2).ravel()


def _cosines(vectors: Float[np.ndarray, "n d"], what: str) -> Float[np.ndarray, "n n"]:
    """Of every word with every other, in float64."""
    exact = vectors.astype(np.float64)
    norm = np.linalg.norm(exact, axis=1, keepdims=True)
    bad = np.flatnonzero(~(norm[:, 0] > 0) | ~np.isfinite(norm[:, 0]))
    if len(bad):
        raise ScoreTableError(
            f"the vector of {what} {bad[0]} is zero or not finite, and so are {len(bad) - 1} others; a word without a "
            "usable vector has no feasibility"
        )
    unit = exact / norm
    return unit @ unit.T


def _nearest_other(
    cosine: Float[np.ndarray, "o o"], seen: Bool[np.ndarray, "a o"]
) -> Float[np.ndarray, "a o"]:
    """Of each row's own words in training, how near the nearest one other than o is to o; -1 if there is none."""
    others = cosine.copy()
    np.fill_diagonal(others, -np.inf)
    return np.stack([others[:, np.flatnonzero(row)].max(1, initial=-1.0) for row in seen])


def grid(
    rho: Float[np.ndarray, " c"], seen: Bool[np.ndarray, " c"], points: int = POINTS
) -> list[float]:
    """Thresholds to try: evenly spaced from the smallest to the largest rho of unseen pairs, ends included.

    Raises:
        ScoreTableError: there is no unseen pair.

    """
    if seen.all():
        raise ScoreTableError("all pairs are seen, so there is no feasibility threshold to choose")
    unseen = rho[~seen].astype(np.float64)
    even: NDArray[np.float64] = np.linspace(float(unseen.min()), float(unseen.max()), points)
    return even.tolist()


def kept(
    rho: Float[np.ndarray, " c"], seen: Bool[np.ndarray, " c"], threshold: float
) -> Bool[np.ndarray, " c"]:
    """True where a pair is feasible: seen, or rho >= threshold."""
    return seen | (rho.astype(np.float64) >= threshold)


def filtered(
    scores: Float[np.ndarray, "q c"],
    rho: Float[np.ndarray, " c"],
    seen: Bool[np.ndarray, " c"],
    threshold: float,
    mode: Mode = "neg_inf",
) -> Float[np.ndarray, "q c"]:
    """Scores after the infeasible pairs are dealt with; what is -inf already stays so.

    Args:
        scores: a block of rows.
        rho, seen: of the columns.
        threshold: T.
        mode: `neg_inf`, the default: infeasible pairs are no candidates, whatever bias, sign and scale the scores have.
            `csp_multiply`, the release of CSP: scores times ([rho >= T] + seen) with rho = 0 at seen pairs, so an
            infeasible pair scores 0 and beats a negative score, and T <= 0 doubles the seen scores.
            `compcos_minus_one`, the release of CompCos: an infeasible pair scores -1, which is meant for cosines;
            rho = 1 at seen pairs. In the last two a bias is still added to infeasible pairs.

    """
    if mode == "neg_inf":
        return np.where(kept(rho, seen, threshold), scores, scores.dtype.type(-np.inf))
    if mode == "csp_multiply":
        factor = (np.where(seen, 0.0, rho.astype(np.float64)) >= threshold).astype(
            scores.dtype
        ) + seen
        gone = np.isneginf(scores)
        return np.where(gone, scores, np.where(gone, scores.dtype.type(0), scores) * factor)
    plausible = np.where(seen, 1.0, rho.astype(np.float64)) >= threshold
    return np.where(plausible | np.isneginf(scores), scores, scores.dtype.type(-1))


@dataclass(frozen=True, slots=True)
class Search:
    """What a search for the threshold found.

    Attributes:
        threshold: T; -inf where no grid point has an area above 0, which keeps every pair.
        auc: area on the split searched, at T.
        grid, aucs: what was tried, in order.

    """

    threshold: float
    auc: float
    grid: Sequence[float]
    aucs: Sequence[float]


def search(auc_at: Callable[[float], float], thresholds: Sequence[float]) -> Search:
    """The first threshold whose area is strictly the best, starting from area 0 and every pair kept.

    Args:
        auc_at: area of the validation split with the pairs below a threshold pruned.
        thresholds: what to try, usually `grid`.

    """
    aucs = [auc_at(t) for t in thresholds]
    best, threshold = 0.0, -np.inf
    for value, t in zip(aucs, thresholds, strict=True):
        if value > best:
            best, threshold = value, t
    return Search(float(threshold), best, list(thresholds), aucs)


@dataclass(frozen=True, slots=True, eq=False)
class Feasibility:
    """rho with the words it belongs to, as kept in a file.

    Attributes:
        rho: (A·O,), attribute-major; finite. Values at seen pairs are ignored.
        attrs, objs: the words.
        source: where the word vectors came from, in words.

    """

    rho: NDArray[Any]
    attrs: Sequence[str]
    objs: Sequence[str]
    source: str = ""
    _place: Mapping[str, Mapping[Any, int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        rho = np.asarray(self.rho)
        expected = len(self.attrs) * len(self.objs)
        finite = int(np.isfinite(rho).sum()) if rho.dtype.kind == "f" else 0
        if rho.shape != (expected,) or finite != expected:
            raise ScoreTableError(
                f"feasibility must be {len(self.attrs)} attrs × {len(self.objs)} objs = {expected} finite floats, but "
                f"is {rho.dtype} of shape {rho.shape} with {finite} finite ones"
            )
        object.__setattr__(self, "rho", rho)
        named = {"attr": self.attrs, "obj": self.objs}
        place = {role: {w: i for i, w in enumerate(words)} for role, words in named.items()}
        object.__setattr__(self, "_place", place)

    def of(self, pairs: Any) -> Float[np.ndarray, " c"]:
        """Feasibility of candidate pairs, given by name.

        Raises:
            ScoreTableError: a word is not among those of this vector; names it.

        """
        columns = [np.asarray(pairs)[:, i].tolist() for i in range(2)]
        for role, words in zip(("attr", "obj"), columns, strict=True):
            unknown = sorted({str(w) for w in words if w not in self._place[role]})
            if unknown:
                raise ScoreTableError(
                    f"feasibility of {len(self.attrs)} attrs × {len(self.objs)} objs does not know {role} "
                    f"{unknown[0]!r} and {len(unknown) - 1} others; make it anew from the data set that was scored"
                )
        attr = np.array([self._place["attr"][w] for w in columns[0]])
        obj = np.array([self._place["obj"][w] for w in columns[1]])
        return np.asarray(self.rho[attr * len(self.objs) + obj], dtype=np.float64)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write an .npz, readable with numpy alone: rho, attrs, objs, source; an old file gives way last."""
        path = Path(path)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as file:
            np.savez(
                file,
                format=np.array(FORMAT),
                rho=self.rho,
                attrs=np.array(list(self.attrs), dtype=np.str_),
                objs=np.array(list(self.objs), dtype=np.str_),
                source=np.array(self.source, dtype=np.str_),
            )
        aside.replace(path)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Feasibility":
        """Read what `save` wrote; nothing in the file is executed.

        Raises:
            ScoreTableError: no such file, or not such a file.

        """
        try:
            found = read_npz(Path(path))
            if str(found["format"]) != FORMAT:
                raise ScoreTableError(f"its format is {found['format']!r}, not {FORMAT!r}")
            words = (tuple(found[name].tolist()) for name in ("attrs", "objs"))
            return cls(found["rho"], *words, source=str(found["source"]))
        except (KeyError, ScoreTableError) as error:
            what = f"no array {error}" if isinstance(error, KeyError) else error
            raise ScoreTableError(
                f"{path} is no feasibility file ({what}); `headstart feasibility` writes one"
            ) from error
