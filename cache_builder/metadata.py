"""The zarr.json files below the root: written by us, and equal to what the header says in every key, or damaged."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, cast

from cache_builder.format import Layout
from cache_builder.place import Place


def groups(arrays: Mapping[str, Layout]) -> list[str]:
    """Folders above the arrays, the root excepted: each is a zarr group."""
    above = {name.rpartition("/")[0] for name in arrays}
    nested = {
        "/".join(home.split("/")[: i + 1]) for home in above for i in range(home.count("/") + 1)
    }
    return sorted(nested - {""})


GROUP: dict[str, Any] = {"zarr_format": 3, "node_type": "group", "attributes": {}}
"""What zarr.json of such a group says."""


def metadata_files(arrays: Mapping[str, Layout]) -> Iterator[tuple[str, bytes]]:
    """Name and content of every zarr.json below the root."""
    for group in groups(arrays):
        yield f"{group}/zarr.json", json.dumps(GROUP, indent=1).encode()
    for layout in arrays.values():
        yield f"{layout.name}/zarr.json", json.dumps(layout.metadata(), indent=1).encode()


def metadata_problem(place: Place, layout: Layout) -> str | None:
    """In what an array's zarr.json differs from its layout, as words; None if it does not."""
    return _problem(place, f"{layout.name}/zarr.json", layout.metadata())


def group_problem(place: Place, group: str) -> str | None:
    """In what a group's zarr.json differs from a group's, as words; None if it does not."""
    return _problem(place, f"{group}/zarr.json", GROUP)


def _problem(place: Place, name: str, expected: Mapping[str, Any]) -> str | None:
    try:
        found: Any = json.loads(place.read(name))
    except (OSError, ValueError, RecursionError) as error:
        return f"{place}/{name} cannot be read ({error})"
    if not isinstance(found, dict):
        return f"{place}/{name} is no object"
    said = cast("dict[str, Any]", found)
    for key in (*expected, *said):
        if json.dumps(said.get(key)) != json.dumps(expected.get(key)):
            return f"{place}/{name} says {key} = {str(said.get(key))[:200]}, but the header says {expected.get(key)}"
    return None
