"""What lies in an .h5 file itself, and one sentence for all that can be wrong with it."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from cache_builder.errors import CacheCorrupt, CacheError

REMEDY = "export the cache again, or fetch the file again"


def inside(h5: h5py.File, name: str, file: Path) -> Any:
    """What the file itself holds under a name; links that lead elsewhere are refused, not followed."""
    found: Any = h5
    for part in filter(None, name.split("/")):
        if not isinstance(found, h5py.Group) or part not in found.keys():  # noqa: SIM118
            raise damaged(file, f"it lacks {name}")
        link = found.get(part, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise damaged(file, f"{name} is a link that leads elsewhere, which is not followed")
        found = found[part]
    return found


def dataset_of(h5: h5py.File, name: str, file: Path) -> h5py.Dataset:
    """An array whose values lie in the file."""
    found = inside(h5, name, file)
    if not isinstance(found, h5py.Dataset) or found.is_virtual or found.external:
        raise damaged(file, f"{name} does not lie in the file itself")
    return found


def damaged(file: Path, what: str) -> CacheCorrupt:
    """The error that says so."""
    return CacheCorrupt(f"{file} is damaged, or was changed: {what}; {REMEDY}")


@contextmanager
def careful(file: Path) -> Generator[None]:
    """Whatever HDF5 says of a file it cannot read is said in one sentence."""
    try:
        yield
    except (CacheError, PermissionError):
        raise
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CacheCorrupt(
            f"{file} cannot be read as HDF5 ({reason}): it is damaged, cut short, or something else; {REMEDY}"
        ) from error
