"""Who builds besides this process: one rank per device of this machine, ranks of torchrun, or a Ray cluster.

All of them build units (units.py) of a cache that this process has laid out and will seal.
"""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from cache_builder.errors import CacheError, CacheIncomplete, CacheNotFound, UnknownName
from cache_builder.filler import SIDES
from cache_builder.header import check_spec, read_header
from cache_builder.passes import Passes
from cache_builder.place import Place
from cache_builder.spec import CacheSpec
from cache_builder.units import PAUSE, units

LAST_CHUNK = 120.0
"""Seconds that a rank has to finish the chunk in hand."""

LIVES = 8
"""How often Ray starts an actor again that died, and gives its unit to another."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """What another process needs to know to help: names and numbers only.

    Attributes:
        backbone, dtype, device, compiled: as `load_backbone` takes them.
        dataset, root, options: as `load_dataset` takes them.
        workers: threads that decode.
        threads: torch's; equal numbers make equal bits likely.
        cache, previous: where the cache is, and the one that it continues.
        rank, world: which of how many.
    """

    backbone: str
    dataset: str
    root: str = ""
    options: dict[str, Any] | None = None
    dtype: str = "float32"
    device: str = "cpu"
    compiled: bool = False
    workers: int = 2
    threads: int = 1
    cache: str = ""
    previous: str = ""
    rank: int = 0
    world: int = 1

    def of(self, passes: Passes) -> "Job":
        """The same for the cache of a build that has begun."""
        before = passes.previous.place.absolute() if passes.previous else ""
        return replace(self, cache=passes.cache.place.absolute(), previous=before)


class Ranks:
    """One process for each device but the first, which is this process's own.

    Args:
        job: what they do.
        devices: torch's names, e.g. cuda:0, cuda:1; or cpu, cpu.
    """

    def __init__(self, job: Job, devices: Sequence[str]) -> None:
        self.job, self.devices = job, devices

    @contextmanager
    def helping(self, passes: Passes) -> Generator[None]:
        """Start them; they end soon after this process does, however it ends: their standard input closes."""
        job = replace(self.job.of(passes), world=len(self.devices))
        running = [
            _process(replace(job, rank=rank, device=device))
            for rank, device in enumerate(self.devices)
            if rank
        ]
        try:
            yield
            for rank, process in enumerate(running, 1):
                code = process.wait()
                if code:
                    log.warning("rank %d ended with status %d; others did its share", rank, code)
        finally:
            for process in running:
                assert process.stdin is not None
                process.stdin.close()
            for process in running:
                try:
                    process.wait(LAST_CHUNK)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _process(job: Job) -> "subprocess.Popen[bytes]":
    # A session of its own: Ctrl-C is for the process that seals.
    process = subprocess.Popen(
        [sys.executable, "-m", "cache_builder.rank"], stdin=subprocess.PIPE, start_new_session=True
    )
    assert process.stdin is not None
    process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
    process.stdin.flush()
    return process


class Torchrun:
    """Rank 0 of processes that somebody else has started, e.g. torchrun on several machines; it lays out and seals."""

    @contextmanager
    def helping(self, passes: Passes) -> Generator[None]:
        """The others find the cache by themselves, see `join`."""
        yield


def torchrun_rank() -> tuple[int, int]:
    """(rank, world) of this process by the variables that torchrun sets; (0, 1) without."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def join(place: Place, spec: CacheSpec) -> bool:
    """Wait until rank 0 has laid out the cache; False if it is finished already.

    Raises:
        CacheMismatch: it holds something else.
    """
    while True:
        try:
            header = read_header(place)
        except (CacheIncomplete, CacheNotFound):
            time.sleep(PAUSE)
            continue
        check_spec(place, header.spec, spec)
        return header.state == "building"


class Ray:
    """Actors of a Ray cluster, which gives units of a dead one to another.

    Args:
        job: what they do.
        address: of the cluster; None starts one on this machine.
        actors: how many; None for one per accelerator of the cluster, or per two CPUs without.
    """

    def __init__(self, job: Job, address: str | None = None, actors: int | None = None) -> None:
        self.job, self.address, self.actors = job, address, actors

    @contextmanager
    def helping(self, passes: Passes) -> Generator[None]:
        """Build everything on the cluster.

        Raises:
            CacheError: the cluster cannot be reached, or an actor failed for a reason that another would fail for too.
        """
        try:
            import ray
            from ray.exceptions import RayError, RayTaskError
            from ray.util.actor_pool import ActorPool
        except ImportError:
            raise UnknownName("--engine ray needs Ray: pip install 'headstart[ray]'") from None
        here = ray.is_initialized()
        try:
            if not here:
                ray.init(address=self.address, log_to_driver=False, include_dashboard=False)
            job = self.job.of(passes)
            on_gpu = job.device.startswith("cuda")
            has = ray.cluster_resources()
            n = self.actors or max(1, int(has.get("GPU", 0) if on_gpu else has.get("CPU", 2) // 2))
            asked: dict[str, Any] = {"num_gpus": 1 if on_gpu else 0, "num_cpus": 1}
            asked |= {"max_restarts": LIVES, "max_task_retries": LIVES}
            made: Any = ray.remote(**asked)(Actor)
            actors = [made.remote(asdict(job)) for _ in range(n)]
            ray.get([actor.ready.remote() for actor in actors])
            pool = ActorPool(actors)
            for side in SIDES:
                todo = list(units(passes.cache, side).values())

                def begun(actor: Any, unit: Any, side: str = side) -> Any:
                    return actor.run.remote(side, unit)

                for count, _ in enumerate(pool.map_unordered(begun, todo), 1):
                    log.info("%s: %d of %d units", side, count, len(todo))
                    if passes.stop is not None and passes.stop.is_set():
                        raise KeyboardInterrupt
                passes.cache.chunks.refresh()
        except (RayError, ConnectionError, ValueError) as error:
            cause = error.cause if isinstance(error, RayTaskError) else None
            reason = cause or str(error).strip().splitlines()[-1]
            raise CacheError(
                f"the Ray cluster failed: {reason}; what is finished is kept: repeat the command"
            ) from error
        finally:
            if not here:
                ray.shutdown()
        yield


class Actor:
    """A helper in a process of Ray's.

    Args:
        job: the fields of a `Job`.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        from cache_builder.rank import passes_of

        self.passes = passes_of(Job(**job))

    def ready(self) -> None:
        """Nothing; an answer says that the backbone is loaded."""

    def run(self, side: Any, unit: Sequence[tuple[str, int]]) -> None:
        """Build one unit, or what is missing of it."""
        chunks = self.passes.cache.chunks
        with chunks.place.helping():
            chunks.refresh()
            todo = [(array, chunk) for array, chunk in unit if chunks.is_pending(array, chunk)]
            self.passes.run(side, todo)
