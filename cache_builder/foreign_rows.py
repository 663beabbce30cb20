"""The rows of foreign features: which is whose, whether they can be stored, and how they are fetched.

Letters: N rows, P patches, W image width, L padded text length, V text width, D joint dimension.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_builder.feature_files import (
    BLOCK,
    FeatureArray,
    ForeignError,
    open_array,
    open_strings,
)
from cache_builder.mapping import ImageTable, TextTable

NUMBERS = ("float16", "float32", "float64")
"""Types of features; float64 is rounded."""

UNIT = 0.01
"""How far from 1 the length of an embedding may be that is said to be normalised."""


@dataclass(frozen=True)
class Side:
    """The features of pictures, or of texts, as the files hold them.

    Attributes:
        names: what rows are known by: ids, or strings.
        ids, strings: as given; empty where not.
        arrays: `pooled`, `patches`, `prefix`, `tokens` → its array, rows first.
        layout: axes of patches.
        offsets: (N + 1,): text i has entries offsets[i] … of `entries`.
        entries: token number → row of `tokens`.
    """

    names: Sequence[str] = ()
    ids: Sequence[str] = ()
    strings: Sequence[str] = ()
    arrays: Mapping[str, FeatureArray] = field(default_factory=dict)
    layout: str = "n p w"
    offsets: NDArray[np.int64] = field(default_factory=lambda: np.zeros(1, np.int64))
    entries: NDArray[np.int64] | None = None

    @property
    def tokens(self) -> FeatureArray | None:
        """The array of tokens, (all, V)."""
        return self.arrays.get("tokens")

    def row_shape(self, key: str) -> tuple[int, ...]:
        """Shape of one row as it is stored."""
        shape = self.arrays[key].values.shape
        if key != "patches":
            return shape[1:]
        sizes = dict(zip(self.layout.split(), shape, strict=True))
        if "p" in sizes:
            return sizes["p"], sizes["w"]
        return sizes["h"] * sizes["w"], sizes["c"]

    def at(self, key: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Rows as they are stored, NaN where a row is -1."""
        found = self._block(key, np.maximum(rows, 0))
        found[rows < 0] = np.nan
        return found

    def _block(self, key: str, rows: NDArray[np.int64] | slice) -> NDArray[Any]:
        values = np.array(self.arrays[key].values[rows])
        if key != "patches":
            return values
        axes = self.layout.split()
        wanted = ["n", "p", "w"] if "p" in axes else ["n", "h", "w", "c"]
        turned = values.transpose([axes.index(a) for a in wanted])
        return np.ascontiguousarray(turned).reshape(len(values), *self.row_shape(key))

    def tokens_at(
        self, rows: NDArray[np.int64], bounds: NDArray[np.int64], start: int, stop: int
    ) -> NDArray[Any]:
        """Tokens start … stop - 1 of the texts `rows` one after the other, which begin at `bounds`."""
        wanted = np.arange(start, stop)
        text = np.searchsorted(bounds, wanted, "right") - 1
        places = self.offsets[rows[text]] + wanted - bounds[text]
        if self.entries is not None:
            places = self.entries[places]
        return self.at("tokens", places)

    def digest(self, key: str, dtype: str, unit: bool) -> str:
        """sha256 of an array as it is read, after every number was found fit to be stored.

        Args:
            key: of `arrays`.
            dtype: it will be stored in.
            unit: is every row said to have length 1?

        Raises:
            ForeignError: a number is not finite or too large, or a row of another length; names the row.
        """
        array, most = self.arrays[key], float(np.finfo(dtype).max)
        n, each = len(array.values), max(1, array.values.nbytes // max(1, len(array.values)))
        real = self.entries
        found = hashlib.sha256(
            f"{array.values.dtype.str} {array.values.shape} {self.layout}".encode()
        )
        for start in range(0, n, max(1, BLOCK // each)):
            block = self._block(key, slice(start, start + max(1, BLOCK // each)))
            flat = block.reshape(len(block), -1)
            with np.errstate(invalid="ignore", over="ignore"):
                wrong = ~(np.abs(flat) <= most).all(1)
                if key == "tokens" and real is not None:
                    wrong &= _is_in(real, start, len(block))  # what is padded is not read
                    flat[~_is_in(real, start, len(block))] = 0
                length = (
                    np.sqrt((flat.astype(np.float64) ** 2).sum(1)) if unit else np.ones(len(flat))
                )
            self._refuse(
                array,
                start,
                np.flatnonzero(wrong),
                f"holds a value that is not finite, or beyond {dtype}",
            )
            other = np.flatnonzero(~(abs(length - 1) <= UNIT))
            what = (
                f"has length {length[other[0]]:.4g}, but the mapping says normalised"
                if len(other)
                else ""
            )
            self._refuse(array, start, other, what)
            found.update(np.ascontiguousarray(block).data)
        return found.hexdigest()

    def _refuse(self, array: FeatureArray, start: int, rows: NDArray[np.int64], what: str) -> None:
        if len(rows):
            row = start + int(rows[0])
            name = f" ({self.names[row]!r})" if array is not self.tokens else ""
            raise ForeignError(f"{array.where}: row {row}{name} {what}")

    def shape_digest(self) -> str:
        """sha256 of where texts begin, and of which tokens are real."""
        found = hashlib.sha256(self.offsets.tobytes())
        found.update(b"" if self.entries is None else self.entries.tobytes())
        return found.hexdigest()


def _is_in(entries: NDArray[np.int64], start: int, n: int) -> NDArray[np.bool_]:
    """Which of the rows start … start + n - 1 are among sorted entries."""
    low, high = np.searchsorted(entries, [start, start + n])
    out = np.zeros(n, bool)
    out[entries[low:high] - start] = True
    return out


@dataclass(frozen=True)
class Joined:
    """For every row of the data set, its row in the file, or -1.

    Attributes:
        rows: (n,)
        notes: what was left over, for people.
    """

    rows: NDArray[np.int64]
    notes: dict[str, str]


def read_side(table: ImageTable | TextTable | None, folder: Path, spool: Path) -> Side:
    """Open the arrays of one table of the mapping and check that they belong together.

    Args:
        table: None where the mapping has none.
        folder: of the mapping.
        spool: where to unpack.

    Raises:
        ForeignError: a file or array is missing, of a wrong type or shape, or ids occur twice.
    """
    if table is None:
        return Side()
    file = folder / table.file if table.file is not None else None
    strings = table.strings if isinstance(table, TextTable) else None
    found = {"ids": table.ids, "strings": strings}
    lists = {
        k: open_strings(v, file, folder, spool) if v is not None else [] for k, v in found.items()
    }
    names, where = lists["ids"] or lists["strings"], "ids" if table.ids is not None else "strings"
    if lists["ids"] and strings is not None and len(lists["strings"]) != len(names):
        raise ForeignError(
            f"{file or folder}: {len(names)} ids, but {len(lists['strings'])} strings"
        )
    if table.ids is not None:
        _check_names(names, f"{file or folder}: {where}")
    axes = {"pooled": 2}
    layout = table.layout if isinstance(table, ImageTable) else "n p w"
    if isinstance(table, ImageTable):
        axes |= {"patches": len(layout.split()), "prefix": 3}
    arrays: dict[str, FeatureArray] = {}
    for key, n_axes in axes.items():
        if (name := getattr(table, key)) is not None:
            arrays[key] = _numbers(open_array(name, file, folder, spool), n_axes, len(names))
    side = Side(names, lists["ids"], lists["strings"], arrays, layout)
    if isinstance(table, ImageTable) or table.tokens is None:
        return side
    return _with_tokens(side, table, file, folder, spool)


def _with_tokens(
    side: Side, table: TextTable, file: Path | None, folder: Path, spool: Path
) -> Side:
    """Tokens as one run of rows, and where each text begins."""
    n, entries = len(side.names), None
    tokens = open_array(str(table.tokens), file, folder, spool)
    if table.offsets is not None:
        given = open_array(table.offsets, file, folder, spool)
        tokens = _numbers(tokens, 2, None)
        if given.values.dtype.kind not in "iu" or given.values.shape != (n + 1,):
            raise ForeignError(
                f"{given.where} is {given.values.dtype} {given.values.shape}, but offsets of {n} texts are whole "
                f"numbers of the shape ({n + 1},)"
            )
        offsets = given.values.astype(np.int64)
        if offsets[0] != 0 or offsets[-1] != len(tokens.values) or (np.diff(offsets) < 0).any():
            raise ForeignError(
                f"{given.where} must rise from 0 to the {len(tokens.values)} rows of {tokens.where}"
            )
    else:
        given = open_array(str(table.mask), file, folder, spool)
        tokens = _numbers(tokens, 3, n)
        mask = np.asarray(given.values)
        if mask.shape != tokens.values.shape[:2] or not np.isin(mask, (0, 1)).all():
            raise ForeignError(
                f"{given.where} is {mask.dtype} {mask.shape}, but a mask of {tokens.where} holds 0 and 1 in the shape "
                f"{tokens.values.shape[:2]}"
            )
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(mask.astype(bool).sum(1))])
        entries = np.flatnonzero(mask.astype(bool))
        flat = np.ascontiguousarray(tokens.values).reshape(-1, tokens.values.shape[2])
        tokens = FeatureArray(tokens.where, flat)
    if len(empty := np.flatnonzero(np.diff(offsets) == 0)):
        raise ForeignError(f"{given.where}: row {empty[0]} ({side.names[empty[0]]!r}) has no token")
    arrays = {**side.arrays, "tokens": tokens}
    return Side(side.names, side.ids, side.strings, arrays, side.layout, offsets, entries)


def _numbers(array: FeatureArray, n_axes: int, n_rows: int | None) -> FeatureArray:
    values = array.values
    if values.dtype.name not in NUMBERS:
        raise ForeignError(f"{array.where} is {values.dtype}; features are {', '.join(NUMBERS)}")
    if values.ndim != n_axes or 0 in values.shape[1:]:
        raise ForeignError(
            f"{array.where} has the shape {values.shape}, but {n_axes} axes are expected"
        )
    if n_rows is not None and len(values) != n_rows:
        raise ForeignError(
            f"{array.where} has {len(values)} rows, but there are {n_rows} ids or strings"
        )
    return array


def _check_names(names: Sequence[str], where: str) -> None:
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        rows = [i for i, name in enumerate(names) if name == twice[0]]
        raise ForeignError(
            f"{where}: {len(twice)} occur more than once, the first is {twice[0]!r} in the rows {rows[0]} and {rows[1]}"
        )
    if "" in names:
        raise ForeignError(f"{where}: row {list(names).index('')} is empty")


def joined(
    side: Side, what: str, ids: Sequence[str], strings: Sequence[str] | None, dataset: str
) -> Joined:
    """Find every row of a data set in the file, by id, or texts without ids by their string.

    Raises:
        ForeignError: a text has no features, or another string; names the first.
    """
    if not side.arrays:
        return Joined(np.zeros(len(ids), np.int64), {})
    wanted = ids if side.ids or strings is None else strings
    index: dict[str, int] = {}
    for row, name in enumerate(side.names):
        index.setdefault(name, row)
    rows = np.fromiter((index.get(name, -1) for name in wanted), np.int64, len(wanted))
    known = set(wanted)
    lost, extra = np.flatnonzero(rows < 0), [n for n in index if n not in known]
    if what == "text" and len(lost):
        raise ForeignError(
            f"{len(lost)} of the {len(ids)} texts of {dataset} have no features, the first is {wanted[lost[0]]!r}"
        )
    if side.ids and side.strings and strings is not None:
        for i, row in enumerate(rows.tolist()):
            if side.strings[row] != strings[i]:
                raise ForeignError(
                    f"text {ids[i]!r} of {dataset} is {strings[i]!r}, but the features are of {side.strings[row]!r}"
                )
    notes = {f"{what}s without features": _named([wanted[i] for i in lost.tolist()])}
    notes[f"{what} features unused"] = _named(extra)
    if len(side.names) > len(index):
        notes[f"{what} strings repeated"] = (
            f"{len(side.names) - len(index)} (the first row of each is taken)"
        )
    return Joined(rows, notes)


def _named(names: Sequence[str]) -> str:
    return f"{len(names)}" + (
        f" ({', '.join(map(repr, names[:3]))}{', …' * (len(names) > 3)})" if names else ""
    )
