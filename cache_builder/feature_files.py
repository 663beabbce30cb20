"""Arrays in files from strangers: .npy, .npz and .h5, without pickle, within the size of what is really there.

What comes out is a memory map, whatever went in: members of .npz and .h5 are first unpacked into a file without a name
beside the cache, so that any row can be read in any order and memory stays flat. It takes as much disk as the array.
"""

import math
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
from numpy.typing import NDArray

from cache_builder.errors import CacheError
from cache_builder.records import read_text

BLOCK = 16 << 20
"""Bytes unpacked at once."""

DENSE = 200
"""A packed array that claims to be more than so many times larger is no features: numbers do not compress so well."""

MOST_STRINGS = 1 << 30
"""Bytes of all ids, or of all strings."""

BUILT_IN = {
    "gzip": h5py.h5z.FILTER_DEFLATE,
    "shuffle": h5py.h5z.FILTER_SHUFFLE,
    "fletcher32": h5py.h5z.FILTER_FLETCHER32,
    "lzf": h5py.h5z.FILTER_LZF,
}
"""Filters of HDF5 that are undone here; all others would run a plug-in."""


UNREADABLE = (
    *(ValueError, KeyError, TypeError, RuntimeError, EOFError, MemoryError),
    *(zipfile.BadZipFile, zlib.error),
)
"""What numpy, zipfile and h5py raise at a file that is not what it seems."""


class ForeignError(CacheError, ValueError):
    """A foreign feature file, or its mapping, cannot be used; names file, array and row."""


@dataclass(frozen=True, slots=True)
class FeatureArray:
    """An array and where it came from.

    Attributes:
        where: file and name, for messages.
        values: a memory map, or plain values.
    """

    where: str
    values: NDArray[Any]


def open_array(name: str, file: Path | None, folder: Path, spool: Path) -> FeatureArray:
    """Numbers by the name that a mapping gives.

    Args:
        name: an array inside `file`, or a .npy file of its own.
        file: .h5, .hdf5 or .npz (or a .npy, whose one array has any name); None where the mapping names none.
        folder: the mapping's, which paths are relative to.
        spool: an existing folder with room to unpack in.

    Raises:
        ForeignError: no such file or array, objects, a pointer elsewhere, a size that the file cannot hold.
    """
    if name.endswith(".npy"):
        file = folder / name
    if file is None:
        raise ForeignError(
            f"the array {name!r} is in no file: give `file`, or a name that ends in .npy"
        )
    where = f"{file}: {name}" if file.suffix != ".npy" else str(file)
    with _readable(file, where):
        kind = _kind(file)
        if kind == "npy":
            return FeatureArray(where, _mapped(file))
        if kind == "npz":
            return FeatureArray(where, _from_npz(file, name, spool))
        with h5py.File(file, "r", locking=False) as h5:
            dataset = _found(h5, name, file)
            if dataset.dtype.kind not in "fiub":
                raise ForeignError(f"{where} holds {dataset.dtype}, not numbers")
            return FeatureArray(where, _unpacked(dataset, where, spool))


def open_strings(given: str | list[str], file: Path | None, folder: Path, spool: Path) -> list[str]:
    """Ids or strings: a list as it is, a .txt file by lines, or an array of strings or whole numbers."""
    if isinstance(given, list):
        return given
    if given.endswith(".txt"):
        text = read_text(folder / given, MOST_STRINGS) if (folder / given).is_file() else None
        if text is None:
            raise ForeignError(f"{folder / given} does not exist")
        return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    where = f"{file}: {given}"
    if file is not None and not given.endswith(".npy"):
        with _readable(file, where):
            if _kind(file) == "h5":
                with h5py.File(file, "r", locking=False) as h5:
                    dataset = _found(h5, given, file)
                    if h5py.check_string_dtype(dataset.dtype) is not None:
                        return _strings(dataset, where)
    found = open_array(given, file, folder, spool)
    values = found.values
    if values.ndim != 1 or values.dtype.kind not in "USiu":
        raise ForeignError(
            f"{found.where} is {values.dtype} {values.shape}, not one string or whole number a row"
        )
    if values.nbytes > MOST_STRINGS:
        raise ForeignError(
            f"{found.where} has {values.nbytes:,} bytes of strings, {MOST_STRINGS:,} are allowed"
        )
    try:
        return [v.decode() if isinstance(v, bytes) else str(v) for v in values.tolist()]
    except UnicodeDecodeError as error:
        raise ForeignError(f"{found.where} is not UTF-8 ({error})") from error


@contextmanager
def _readable(file: Path, where: str) -> Generator[None]:
    """What numpy, zipfile and HDF5 say of a bad file, in one sentence; a full disk is no fault of the file."""
    if not file.is_file():
        raise ForeignError(f"{file} does not exist" if not file.exists() else f"{file} is no file")
    try:
        yield
    except (CacheError, PermissionError):
        raise
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise ForeignError(f"{where} cannot be read: {reason}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise ForeignError(
            f"{where} cannot be read: {' '.join(str(error).split())[:200]}"
        ) from error


def _kind(file: Path) -> str:
    with file.open("rb") as opened:
        begin = opened.read(8)
    if begin.startswith(b"\x93NUMPY"):
        return "npy"
    if begin.startswith(b"PK"):
        return "npz"
    if h5py.is_hdf5(file):
        return "h5"
    raise ForeignError(f"{file} is neither .npy, .npz nor .h5 by its first bytes")


def _mapped(file: Path) -> NDArray[Any]:
    """A .npy file as a memory map; pickled objects are refused by numpy."""
    found = np.lib.format.open_memmap(file, mode="r")
    if found.dtype.hasobject or found.dtype.fields:
        raise ForeignError(f"{file} holds {found.dtype}, not plain values")
    return found


def _from_npz(file: Path, name: str, spool: Path) -> NDArray[Any]:
    with zipfile.ZipFile(file) as members:
        names = [n.removesuffix(".npy") for n in members.namelist()]
        if name not in names:
            raise ForeignError(
                f"{file} holds no array {name!r} (it holds: {', '.join(names[:20])})"
            )
        info = members.getinfo(f"{name}.npy")
        _check_ratio(f"{file}: {name}", info.file_size, info.compress_size)
        _check_room(spool, info.file_size, f"{file}: {name}")
        with members.open(info) as source, tempfile.TemporaryFile(dir=spool) as out:
            shutil.copyfileobj(source, out, BLOCK)
            return _mapped_again(out, f"{file}: {name}")


def _found(h5: h5py.File, name: str, file: Path) -> h5py.Dataset:
    """A data set that lies in this very file, packed with nothing but the built-in filters."""
    found: Any = h5
    for part in filter(None, name.split("/")):
        if not isinstance(found, h5py.Group) or part not in found.keys():  # noqa: SIM118
            names: list[str] = []
            h5.visit(names.append)
            raise ForeignError(
                f"{file} holds no array {name!r} (it holds: {', '.join(names[:20])})"
            )
        if not isinstance(found.get(part, getlink=True), h5py.HardLink):
            raise ForeignError(
                f"{file}: {name} is a link that leads elsewhere, which is not followed"
            )
        found = found[part]
    if not isinstance(found, h5py.Dataset) or found.is_virtual or found.external:
        raise ForeignError(f"{file}: {name} is no array that lies in this file itself")
    plist = found.id.get_create_plist()
    filters = [plist.get_filter(i) for i in range(plist.get_nfilters())]
    if other := [f for f in filters if f[0] not in BUILT_IN.values()]:
        what = other[0][3].decode(errors="replace") or other[0][0]
        raise ForeignError(
            f"{file}: {name} is packed with {what}; pack it with one of {', '.join(BUILT_IN)}"
        )
    if found.shape is None:
        raise ForeignError(f"{file}: {name} is empty")
    each = math.prod(found.chunks) * found.dtype.itemsize if found.chunks else 0
    if each > MOST_STRINGS:
        raise ForeignError(
            f"{file}: {name} has chunks of {each:,} bytes; rewrite it in smaller ones"
        )
    text = h5py.check_string_dtype(found.dtype)
    if text is None or text.length is not None:
        _check_ratio(
            f"{file}: {name}", found.size * found.dtype.itemsize, found.id.get_storage_size()
        )
    return found


def _check_ratio(where: str, size: int, stored: int) -> None:
    if size > DENSE * stored + (1 << 20):
        raise ForeignError(
            f"{where} claims {size:,} bytes, but only {stored:,} are stored: not unpacked"
        )


def _unpacked(dataset: h5py.Dataset, where: str, spool: Path) -> NDArray[Any]:
    """A data set of numbers, copied block by block into a nameless .npy file."""
    shape = dataset.shape
    if not shape or not dataset.size:
        return np.asarray(dataset[()])
    _check_room(spool, dataset.nbytes, where)
    rows = max(1, BLOCK // max(1, dataset.nbytes // shape[0]))
    if dataset.chunks:
        rows = max(dataset.chunks[0], rows // dataset.chunks[0] * dataset.chunks[0])
    head = {"descr": dataset.dtype.str, "fortran_order": False, "shape": shape}
    with tempfile.TemporaryFile(dir=spool) as out:
        np.lib.format.write_array_header_1_0(out, head)
        for start in range(0, shape[0], rows):
            out.write(np.ascontiguousarray(dataset[start : start + rows]).data)
        return _mapped_again(out, where)


def _strings(dataset: h5py.Dataset, where: str) -> list[str]:
    if len(dataset.shape) != 1:
        raise ForeignError(f"{where} has the shape {dataset.shape}, not one string a row")
    found, size = list[str](), 0
    for start in range(0, dataset.shape[0], 256):
        for value in dataset[start : start + 256].tolist():
            size += len(value)
            found.append(value.decode())
        if size > MOST_STRINGS:
            raise ForeignError(f"{where} has more than {MOST_STRINGS:,} bytes of strings")
    return found


def _mapped_again(out: BinaryIO, where: str) -> NDArray[Any]:
    """A memory map of a .npy file that has no name: the kernel forgets it with its last reader, however that ends."""
    out.flush()
    out.seek(0)
    version = np.lib.format.read_magic(out)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ForeignError(f"{where} is of .npy version {version}, which holds no plain values")
    shape, fortran, dtype = readers[version](out)
    if dtype.hasobject or dtype.fields:
        raise ForeignError(f"{where} holds {dtype}, not plain values")
    if not math.prod(shape):
        return np.zeros(shape, dtype)
    order = "F" if fortran else "C"
    return np.memmap(out, dtype, "r", out.tell(), shape, order)


def _check_room(spool: Path, size: int, where: str) -> None:
    free = shutil.disk_usage(spool).free
    if size > free:
        raise ForeignError(
            f"{where} has to be unpacked into {size:,} bytes of {spool}, where {free:,} are free; make room there"
        )
