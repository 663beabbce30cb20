"""Which attributes and objects a table gets right, and which attributes of one object it takes for each other.

Definition: ours. An accuracy per attribute (object) is the share of the images with that true attribute whose predicted
pair has it, at one calibration bias. A confusion between attributes is read *given the object*: an image of object o is
put against the candidate pairs of o alone, so that only the attribute is asked.

    true pair   candidates of its object        best      cell
    wet dog     wet dog · dry dog · old dog     dry dog   (wet, dry | dog)

The bias is that of the best harmonic mean (`best_hm_bias`): without one, most heads predict seen pairs nearly always,
and an attribute that is met in unseen pairs only reads as unknown. It is tuned on the labels it is measured on, as all
of the curve is: for finding out what goes wrong, not for judging deployed accuracy. Always k = 1.

Ties: inside a side the lowest column wins, between sides the seen pair at bias = margin, as on the exact curve; without
a bias the lowest column of all.
Letters: `Q` images, `C` candidate pairs, `P` primitives, `A` attributes, `T` cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from eval.composition import Composition, CompositionScores
from eval.curve import best_point, harmonic_mean, trace
from eval.errors import ScoreTableError
from eval.sides import Sides

Kind = Literal["attr", "obj"]


def best_hm_bias(scores: Composition) -> float | None:
    """The bias of the first best harmonic mean on the exact curve: the middle of its interval, infinite at an open end.

    None where no bias gets images of both kinds right, or there are none of one kind: then nothing is to be balanced.
    """
    if not all(scores.counts):
        return None
    points = trace(scores.thresholds())
    seen, unseen = points.seen[None], points.unseen[None]
    at = int(best_point(seen, unseen)[0])
    if harmonic_mean(seen, unseen)[0, at] == 0:
        return None
    if np.isnan(points.bias[at]):
        return -np.inf if at == 0 else np.inf
    return float(points.bias[at])


@dataclass(frozen=True, slots=True, eq=False)
class Accuracy:
    """How often each attribute, or each object, is right; only those that some image has.

    Attributes:
        names: (P,) sorted.
        n: (P, 2) seen- and unseen-labelled images with it.
        right: (P, 2) those whose predicted pair has it too.

    """

    names: tuple[str, ...]
    n: Int[np.ndarray, "p 2"]
    right: Int[np.ndarray, "p 2"]

    def share(self) -> Float[np.ndarray, "p 3"]:
        """Of all, of seen- and of unseen-labelled images, as fractions; NaN where there is no such image."""
        n = np.column_stack([self.n.sum(1), self.n])
        right = np.column_stack([self.right.sum(1), self.right])
        return np.divide(right, n, out=np.full(n.shape, np.nan), where=n > 0)


def accuracy(scores: Composition, kind: Kind, bias: float | None) -> Accuracy:
    """Accuracy of every attribute or object over the whole label space.

    Args:
        scores: the table; of an open world also the one that keeps the best pairs only.
        kind: "attr" or "obj".
        bias: added to unseen pairs, usually `best_hm_bias(scores)`; None is the prediction without bias.

    """
    names, label = _labels(scores, kind)
    predicted = scores.sides().at(bias)
    truth = label[scores.target]
    hit = (predicted >= 0) & (label[predicted] == truth)
    n, right = np.zeros((2, len(names), 2), dtype=np.int64)
    side = (~scores.seen_labelled).astype(int)
    np.add.at(n, (truth, side), 1)
    np.add.at(right, (truth, side), hit)
    shown = np.flatnonzero(n.sum(1))
    return Accuracy(tuple(names[i] for i in shown), n[shown], right[shown])


class Confused(NamedTuple):
    """`taken` of the `n` images of pair (attr, obj) were taken for (guess, obj); means where tables were joined."""

    attr: str
    guess: str
    obj: str
    taken: float
    n: float


@dataclass(frozen=True, slots=True, eq=False)
class Confusion:
    """Attributes taken for attributes, given the object.

    Attributes:
        attrs, objs: names, sorted; of all candidates.
        cells: (T, 3) attr, guess and obj as indices; attr = guess where it is right. Sorted, none twice.
        count: (T,) images in the cell, at least one in some table; a mean where tables were joined.
        silent: (A,) images of each attribute without any candidate of their object.
        alone: images whose object has one candidate: right without a choice, where it is the true pair.
        chance: share of right ones where a candidate of the object is drawn at random.

    """

    attrs: tuple[str, ...]
    objs: tuple[str, ...]
    cells: Int[np.ndarray, "t 3"]
    count: Float[np.ndarray, " t"]
    silent: Float[np.ndarray, " a"]
    alone: float
    chance: float

    def matrix(self) -> Float[np.ndarray, "a a"]:
        """Images by true and predicted attribute, summed over objects."""
        table = np.zeros((len(self.attrs),) * 2)
        np.add.at(table, (self.cells[:, 0], self.cells[:, 1]), self.count)
        return table

    def right(self) -> float:
        """Share of images whose attribute is right given their object."""
        hit = self.cells[:, 0] == self.cells[:, 1]
        return float(self.count[hit].sum() / (self.count.sum() + self.silent.sum()))

    def most(self) -> list[Confused]:
        """What was taken for something else, most often first; on equality by attr, guess, obj."""
        pair = self.cells[:, [0, 2]]
        off = np.flatnonzero(self.cells[:, 0] != self.cells[:, 1])
        order = off[np.lexsort((*self.cells[off].T[::-1], -self.count[off]))]
        found: list[Confused] = []
        for i in order:
            attr, guess, obj = (int(x) for x in self.cells[i])
            taken, n = float(self.count[i]), float(self.count[(pair == pair[i]).all(1)].sum())
            found.append(Confused(self.attrs[attr], self.attrs[guess], self.objs[obj], taken, n))
        return found


def confusion(scores: Composition, bias: float | None) -> Confusion:
    """Attributes taken for attributes, given the object; O(Q·C / objects).

    Args:
        scores: every score, of a closed or an open world.
        bias: as for `accuracy`.

    Raises:
        ScoreTableError: the table keeps the best pairs of each image only, which need not have its object.

    """
    if not isinstance(scores, CompositionScores):
        raise ScoreTableError(
            "confusion given the object looks at all pairs of an object, and this table keeps the best pairs of each "
            "image only; score again with every score kept (headstart score … --dense)"
        )
    (attrs, attr), (objs, obj) = _labels(scores, "attr"), _labels(scores, "obj")
    silent, cells = np.zeros(len(attrs)), np.zeros((0, 3), dtype=np.int64)
    alone = chance = 0.0
    for o in range(len(objs)):
        rows, columns = np.flatnonzero(obj[scores.target] == o), np.flatnonzero(obj == o)
        if not len(rows):
            continue
        part = scores.scores[np.ix_(rows, columns)]
        chosen = Sides.of(part, scores.seen[columns]).at(bias)
        truth, guess = attr[scores.target[rows]], attr[columns[chosen]]
        some = chosen >= 0
        np.add.at(silent, truth[~some], 1)
        cells = np.vstack([cells, np.column_stack([truth, guess, np.full(len(rows), o)])[some]])
        competing = (part > -np.inf).sum(1)
        alone += float((competing == 1).sum())
        own = scores.scores[rows, scores.target[rows]] > -np.inf
        chance += float((1 / competing[own]).sum())
    cells, count = np.unique(cells, axis=0, return_counts=True)
    return Confusion(
        attrs, objs, cells, count.astype(np.float64), silent, alone, chance / len(scores.target)
    )


def mean_confusion(found: Sequence[Confusion]) -> Confusion:
    """Of the tables of several seeds on the same images and candidates: mean counts.

    Raises:
        ScoreTableError: their attributes or objects differ.

    """
    first = found[0]
    if any((f.attrs, f.objs) != (first.attrs, first.objs) for f in found):
        raise ScoreTableError(
            "confusions of other attributes or objects have no mean; give tables of one question"
        )
    joined = np.concatenate([f.cells for f in found])
    cells, place = np.unique(joined, axis=0, return_inverse=True)
    total = np.bincount(
        place.ravel(), np.concatenate([f.count for f in found]), minlength=len(cells)
    )
    return Confusion(
        first.attrs,
        first.objs,
        cells,
        total / len(found),
        np.mean([f.silent for f in found], axis=0),
        float(np.mean([f.alone for f in found])),
        float(np.mean([f.chance for f in found])),
    )


def most_confused(matrix: Float[np.ndarray, "a a"], k: int) -> Int[np.ndarray, " k2"]:
    """The k attributes with the most confusions, in an order that puts those taken for each other side by side.

    A chain that starts at the pair confused most and grows at either end by the attribute confused most with it; the
    lowest index on equality. Attributes without any confusion are left out.

    Args:
        matrix: of `Confusion.matrix`.
        k: how many at most.

    """
    both = matrix + matrix.T
    np.fill_diagonal(both, 0)
    total = both.sum(1)
    left = [int(i) for i in np.argsort(-total, kind="stable")[:k] if total[i] > 0]
    if not left:
        return np.zeros(0, dtype=np.int64)
    left.sort()
    inside = both[np.ix_(left, left)]
    start, second = divmod(int(inside.argmax()), len(left))
    chain = [left[start]] + ([left[second]] if second != start else [])
    rest = [i for i in left if i not in chain]
    while rest:
        ends = both[np.ix_([chain[-1], chain[0]], rest)]
        end, place = divmod(int(ends.argmax()), len(rest))
        chain.insert(0 if end else len(chain), rest.pop(place))
    return np.array(chain)


def _labels(scores: Composition, kind: Kind) -> tuple[tuple[str, ...], Int[np.ndarray, " c"]]:
    """Names, sorted, and of each column the index of its own."""
    pairs = np.asarray(scores.pairs)
    names, label = np.unique(pairs[:, ("attr", "obj").index(kind)], return_inverse=True)
    return tuple(str(name) for name in names), label.reshape(-1)
