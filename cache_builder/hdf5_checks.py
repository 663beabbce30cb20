"""Whether an exported file is built as an export builds it: names, types, shapes and sizes, before anything is read."""

import math
import os
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from cache_builder.codec import file_bytes
from cache_builder.format import Layout, is_stream
from cache_builder.hdf5_access import damaged, dataset_of, inside

if TYPE_CHECKING:
    from cache_builder.hdf5_reading import Exported

MOST_STRINGS = 1 << 30
"""Bytes of one array of strings."""

TEXTS = ("header.json", "tasks.json", "manifest.jsonl", "quarantine.jsonl")


def stored_dtype(layout: Layout) -> np.dtype[Any]:
    """How numbers lie in the file: as in a chunk."""
    return np.dtype(layout.dtype).newbyteorder("<")


def check_structure(found: "Exported") -> None:
    """Exactly what an export holds, and every array stored as an export stores it.

    Raises:
        CacheCorrupt: names what differs.
    """
    _check_names(found)
    for layout in found.header.arrays.values():
        _check_layout(dataset_of(found.h5, layout.name, found.file), layout, found)


def check_claims(found: "Exported", n_lines: int) -> None:
    """The header's arrays against its counts and the manifest; what single arrays may be, `Header` has checked."""
    arrays = found.header.arrays
    rows = {"image/id": found.header.spec.dataset.n_images}
    rows |= dict.fromkeys(("text/id", "text/string"), found.header.spec.dataset.n_texts)
    if lacking := [s for s in rows if s not in arrays]:
        raise damaged(found.file, f"its header does not list {', '.join(lacking)}")
    if wrong := [name for name, n in rows.items() if arrays[name].shape != (n,)]:
        raise damaged(found.file, f"{wrong[0]} has another length than its header says")
    if wrong := [s for s in found.streams if not is_stream(s) or arrays[s].dtype == "string"]:
        raise damaged(found.file, f"its header lists a stream that no cache has, {wrong[0]!r}")
    # Counted by multiplication first: a header may claim more chunks than anybody should enumerate.
    total = sum(layout.n_chunks for layout in arrays.values())
    if not total == n_lines == len(found.entries) or any(
        (la.name, c) not in found.entries for la in arrays.values() for c in range(la.n_chunks)
    ):
        raise damaged(found.file, f"its manifest lists {n_lines} chunks, its header has {total}")


def _check_names(found: "Exported") -> None:
    """Exactly the arrays and texts of an export: anything else was added by somebody."""
    expected = {*TEXTS, *found.header.arrays}
    homes = {name.rpartition("/")[0] for name in found.header.arrays}
    homes = {"/".join(h.split("/")[:i]) for h in homes for i in range(1, h.count("/") + 2)} | {""}
    present: set[str] = set()
    for home in homes:
        group = inside(found.h5, home, found.file)
        if not isinstance(group, h5py.Group):
            raise damaged(found.file, f"{home or 'its root'} is no group")
        present |= {f"{home}/{name}".lstrip("/") for name in group}
    if extra := sorted(present - expected - homes):
        raise damaged(found.file, f"it holds {extra[0]!r}, which no export writes")
    if lost := sorted(expected - present):
        raise damaged(found.file, f"it lacks {lost[0]}")


def _check_layout(dataset: h5py.Dataset, layout: Layout, found: "Exported") -> None:
    """An array's type, shape, chunks and stored size, before anything is allocated for it."""
    text = layout.dtype == "string"
    info = h5py.check_string_dtype(dataset.dtype)
    if text:
        good = info is not None and info.length is not None and info.encoding == "utf-8"
    else:
        good = info is None and dataset.dtype == stored_dtype(layout)
    if not good or dataset.shape != layout.shape:
        raise damaged(
            found.file,
            f"{layout.name} is {dataset.dtype} {dataset.shape}, its header says {layout.dtype} {layout.shape}",
        )
    plist = dataset.id.get_create_plist()
    filters = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
    entries = [found.entries[layout.name, c] for c in range(layout.n_chunks)]
    most = sum(e.bytes for e in entries)
    stored = dataset.id.get_storage_size()
    if text:
        least = 4 * (1 + layout.shape[0]) if layout.n_chunks else 0
        block = dataset.chunks[0] * dataset.dtype.itemsize if dataset.chunks else 0
        bounded = least <= most <= MOST_STRINGS and dataset.dtype.itemsize <= max(1, most)
        bounded = bounded and (block <= max(1 << 20, dataset.dtype.itemsize))
        right = filters == ([h5py.h5z.FILTER_DEFLATE] if layout.n_chunks else []) and bounded
    else:
        each = math.prod(layout.chunk_shape) * dataset.dtype.itemsize
        chunks = layout.chunk_shape if layout.shape and layout.n_chunks and each else None
        size = file_bytes(layout)
        right = not filters and dataset.chunks == chunks
        right = right and (size is None or all(e.bytes == size for e in entries))
        right = right and stored == each * layout.n_chunks
    if not right or stored > os.path.getsize(found.file):
        raise damaged(found.file, f"{layout.name} is not stored as an export stores it")
