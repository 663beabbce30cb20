"""Kills exports and imports with SIGKILL and repeats them; a JSON line a trial. Run by test_cache_hdf5.py.

A trial forks: the child kills itself at its k-th file operation in the target's folder (Python's audit events; HDF5's
own writes are counted in `Disk`), another child repeats the work.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kill_builds import FILE_EVENTS, ending, in_child
from small_caches import BUILDS
from stand_in import dataset

from cache_builder import FeatureCache
from cache_builder.foreign import import_features
from cache_builder.hdf5 import export_hdf5, import_hdf5
from cache_builder.hdf5_writing import Disk

torch.set_num_threads(1)


def counted(work: Callable[[], object], folder: Path, at: int | None, count_file: Path) -> None:
    """Die at operation `at` below `folder`; with None, live and write how many there were."""
    seen = 0

    def step() -> None:
        nonlocal seen
        seen += 1
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in FILE_EVENTS and str(arguments[0]).startswith(str(folder)):
            step()

    plain = Disk.write

    def write(self: Disk, data: Any) -> int:
        step()
        done = plain(self, data)
        step()
        return done

    Disk.write = write
    sys.addaudithook(hook)
    work()
    if at is None:
        count_file.write_text(str(seen))


def tell(trial: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(trial) + "\n")


def trials(
    kind: str, folder: Path, n: int, work: Callable[[Path], None], proof: Callable[[Path], str]
) -> None:
    count = folder / f"{kind}.count"

    def target(name: str) -> Path:
        made = folder / kind / name
        made.mkdir(parents=True)
        return made

    place = target("whole")
    ending(in_child(lambda: counted(partial(work, place), place, None, count)))
    total = int(count.read_text())
    for i in range(n):
        at = 1 + i * (total - 1) // (n - 1)
        place = target(f"point{at}")
        killed = ending(in_child(lambda p=place, k=at: counted(partial(work, p), p, k, count)))
        names = sorted(p.name for p in place.iterdir())
        early = proof(place) if "c.h5" in names else None  # raises if half of it is there
        again = ending(in_child(partial(work, place)))
        found = proof(place) if again == 0 else None
        left = sorted(p.name for p in place.iterdir())
        trial = {"kind": kind, "at": at, "total": total, "killed": killed, "names": names}
        trial["early"] = early
        tell({**trial, "again": again, "proof": found, "left": left})


def main(folder: Path, n: int) -> None:
    source = folder / "source.zarr"
    in_child_done = ending(in_child(lambda: BUILDS["fixed"](source)))
    assert in_child_done == 0
    cache, whole = FeatureCache.open(source), folder / "whole.h5"
    export_hdf5(cache, whole)

    def same_file(place: Path) -> str:
        assert (place / "c.h5").read_bytes() == whole.read_bytes()
        return cache.digest()

    def same_cache(place: Path) -> str:
        back = FeatureCache.open(place / "c.zarr")
        assert back.verify().ok
        return back.digest()

    foreign = folder / "map.toml"
    rows = cache.rows("image", [i for i in cache.image_ids if i not in cache.quarantined])
    values: dict[str, Any] = {
        "feats": cache.read("image/pooled", rows),
        "grid": cache.read("image/patches", rows),
    }
    np.savez(folder / "f.npz", ids=[cache.image_ids[r] for r in rows], **values)
    table = '[image]\nfile = "f.npz"\nids = "ids"\npooled = "feats"\npatches = "grid"\n'
    foreign.write_text(f'[backbone]\nname = "x"\n{table}')
    data = dataset()
    expected = import_features(foreign, folder / "foreign.zarr", dataset=data).digest()

    def export(place: Path) -> None:
        export_hdf5(FeatureCache.open(source), place / "c.h5")

    def back(place: Path) -> None:
        import_hdf5(whole, place / "c.zarr")

    def features(place: Path) -> None:
        import_features(foreign, place / "c.zarr", dataset=data)

    trials("export", folder, n, export, same_file)
    trials("import", folder, n, back, same_cache)
    trials("foreign", folder, n, features, same_cache)
    tell({"kind": "foreign source", "proof": expected})
    assert cache.verify().ok
    tell({"kind": "source", "proof": cache.digest()})


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.write(json.dumps({"kind": "end"}) + "\n")
