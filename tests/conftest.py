"""Fixtures that several tests share."""

import functools
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can import `stand_in`

from drawn import LIVE_FAMILIES, make_live
from faults import SEED, TALLY, table
from stand_in import StandIn, dataset

from cache_builder import FeatureCache, build
from heads.base import Context
from heads.miniature import live_context

torch.set_num_threads(1)  # two threads spin on a busy two-core machine
settings.register_profile(
    "same", derandomize=True, deadline=None
)  # nor is a busy machine a failure
settings.load_profile("same")


@pytest.fixture(scope="session")
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: building a small cache is all fsync, which a disk takes a second for."""
    shared = Path("/dev/shm")
    usable = shared.is_dir() and os.access(shared, os.W_OK)
    with tempfile.TemporaryDirectory(dir=shared if usable else None) as made:
        yield Path(made)


@pytest.fixture(scope="module")
def fast_folder(memory: Path) -> Iterator[Path]:
    """A folder of a module's own; a new one where a worker comes back to the module and makes its fixtures again."""
    made = Path(tempfile.mkdtemp(dir=memory))
    yield made
    shutil.rmtree(
        made, ignore_errors=True
    )  # what a test made unreadable goes with the folder above


@pytest.fixture
def fast_path(fast_folder: Path) -> Path:
    """Like tmp_path, in memory."""
    return Path(tempfile.mkdtemp(dir=fast_folder))


@pytest.fixture
def make_cache(fast_path: Path) -> Callable[..., FeatureCache]:
    """Builds a small cache: several chunks in every stream, batches that straddle them."""

    def make(name: str = "demo.zarr", **options: Any) -> FeatureCache:
        given = {"dataset": dataset(), "backbone": StandIn(), "batch_size": 4, "chunk_bytes": 100}
        return build(path=fast_path / name, progress=False, **{**given, **options})

    return make


@pytest.fixture(scope="session")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Context]:
    """Family → the small context of a head that runs its miniature's text tower."""
    folder = tmp_path_factory.mktemp("contexts")
    return {family: live_context(family, folder / family) for family in LIVE_FAMILIES}


@pytest.fixture(scope="session")
def live_cache(memory: Path) -> Callable[[str], FeatureCache]:
    """The cache of `drawn()` under a family's miniature, built when first asked for."""
    return functools.cache(lambda family: make_live(memory / "drawn", family))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its counts to the process that prints."""
    handed: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if handed is not None:
        handed["faults"] = {kind: dict(found) for kind, found in TALLY.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add up what the workers counted."""
    for kind, found in getattr(node, "workeroutput", {}).get("faults", {}).items():
        TALLY.setdefault(kind, Counter()).update(found)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of all faults tried, for docs/guarantees.md."""
    if TALLY:
        terminalreporter.section(f"faults tried, seed {SEED}")
        for line in table():
            terminalreporter.write_line(line)
