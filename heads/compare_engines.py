"""Who trains the passes of a comparison: processes of this machine, each with a device or without, or a Ray cluster.

A pass is trained in one process with one thread, wherever that is, so who does it changes no result.
"""

import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from multiprocessing.queues import Queue
from pathlib import Path
from threading import Event
from typing import Any, Protocol, runtime_checkable

import torch

from heads.errors import ConfigError, HeadError
from heads.source import share_memory

Pass = Sequence[Any]
"""Jobs of `heads.compare`, as another process understands them."""

Work = Callable[[Pass, str | None], dict[Path, str]]
"""Trains and scores a pass, on a device if one is named; run directory → why it failed."""

STOP = Event()
"""In a worker: set by Ctrl-C; the step in hand is finished, and where the training stands is kept."""

LIVES = 3
"""Times that a pass is begun again on a cluster when its process died."""

_device: str | None = None


@runtime_checkable
class Engine(Protocol):
    """Runs passes somewhere."""

    def run(self, work: Work, passes: Sequence[Pass]) -> Iterator[tuple[Pass, dict[Path, str]]]:
        """What came of each pass, as they end.

        A pass is never cut, though workers may then have nothing to do: what is read together decides where rows are
        held, and that decides the order of batches where they do not all fit into memory.
        """
        ...


@dataclass(frozen=True, slots=True)
class Processes:
    """Processes of this machine.

    Attributes:
        workers: how many, where no devices are named; they share the CPU's cores.
        devices: one process each, e.g. ("cuda:0", "cuda:1").
    """

    workers: int = 1
    devices: tuple[str, ...] = ()

    def run(self, work: Work, passes: Sequence[Pass]) -> Iterator[tuple[Pass, dict[Path, str]]]:
        """Fresh processes, as a forked one would inherit torch's thread pools in whatever state they are; one is this.

        Raises:
            HeadError: a process died.
        """
        width = len(self.devices) or self.workers
        if width == 1:
            with _until_ctrl_c(), _same_threads():
                for jobs in passes:
                    yield jobs, work(jobs, *self.devices)
                    if STOP.is_set():
                        raise KeyboardInterrupt
            return
        context = multiprocessing.get_context("spawn")
        devices: Queue[str] = context.Queue()
        for device in self.devices:
            devices.put(device)
        given = (devices if self.devices else None, min(width, len(passes)))
        pool = ProcessPoolExecutor(width, mp_context=context, initializer=_begin, initargs=given)
        with pool:
            waiting, running = iter(passes), dict[Future[dict[Path, str]], Pass]()

            def fill() -> None:
                """No more than can be worked on: what waits inside the pool cannot all be taken back."""
                for jobs in islice(waiting, width - len(running)):
                    running[pool.submit(_on_mine, work, jobs)] = jobs

            try:
                fill()
                while running:
                    for one in wait(running, return_when=FIRST_COMPLETED).done:
                        yield running.pop(one), one.result()
                    fill()
            except BrokenProcessPool as error:
                raise HeadError(
                    "a process died while it trained, perhaps for want of memory; what is finished is kept: repeat the "
                    "command, with fewer --workers"
                ) from error
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _until_ctrl_c() -> Generator[None]:
    """Let Ctrl-C end the step in hand instead of the process; outside the main thread nobody hears it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        STOP.clear()


@contextmanager
def _same_threads() -> Generator[None]:
    """Give this process back the threads that a pass takes from it."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _begin(devices: "Queue[str] | None", beside: int) -> None:
    """Of a worker: take a device and a part of the memory, and let Ctrl-C end the step instead of the process."""
    global _device
    _device = None if devices is None else devices.get()
    share_memory(beside)
    signal.signal(signal.SIGINT, _stop)


def _stop(*_: object) -> None:
    STOP.set()


def _on_mine(work: Work, jobs: Pass) -> dict[Path, str]:
    return work(jobs, _device)


@dataclass(frozen=True, slots=True)
class Ray:
    """A Ray cluster: a task a pass, with a GPU each where the cluster has some.

    Caches, runs and this package must lie at the same paths on every machine of it.

    Attributes:
        address: of the cluster; None starts one on this machine.
    """

    address: str | None = None

    def run(self, work: Work, passes: Sequence[Pass]) -> Iterator[tuple[Pass, dict[Path, str]]]:
        """A pass whose process dies is begun again elsewhere, from where it stood.

        Raises:
            ConfigError: Ray is not installed.
            HeadError: the cluster cannot be reached or failed.
        """
        try:
            import ray
            from ray.exceptions import RayError, RayTaskError
        except ImportError:
            raise ConfigError("--engine ray needs Ray: pip install 'headstart[ray]'") from None
        here = ray.is_initialized()
        try:
            if not here:
                ray.init(address=self.address, log_to_driver=False, include_dashboard=False)
            has = ray.cluster_resources()
            gpus, here_now = int(has.get("GPU", 0)), Path.cwd()
            options: dict[str, Any] = {
                "num_cpus": 1,
                "num_gpus": min(1, gpus),
                "max_retries": LIVES,
            }
            task: Any = ray.remote(**options)(_there)
            slots = gpus or int(has.get("CPU", 1))
            beside = min(len(passes), math.ceil(slots / len(ray.nodes())))
            running = {task.remote(work, jobs, here_now, beside): jobs for jobs in passes}
            while running:
                (done,), _ = ray.wait(list(running), num_returns=1)
                yield running.pop(done), ray.get(done)
        except (RayError, ConnectionError, ValueError) as error:
            if isinstance(error, RayTaskError):  # what was raised there is told as if it were here
                raise error.cause from None
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise HeadError(
                f"the Ray cluster failed: {reason}; what is finished is kept: repeat the command"
            ) from error
        finally:
            if not here:
                ray.shutdown()


def _there(work: Work, jobs: Pass, folder: Path, beside: int) -> dict[Path, str]:
    """Of a cluster's task: paths in settings are told from where the comparison was started."""
    os.chdir(folder)
    share_memory(beside)
    return work(jobs, None)
