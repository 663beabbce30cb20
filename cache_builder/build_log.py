"""How long a cache took to build: `builds.jsonl`, a line for every time that somebody built at it.

No digest, checksum or check knows of it: what a cache holds does not depend on how long it took. A build that is killed
leaves no line, so the sum is what was spent at least; a cache that was imported has none.
"""

import time
from collections.abc import Generator
from contextlib import contextmanager, suppress

from pydantic import BaseModel, ConfigDict, ValidationError

from cache_builder.errors import CacheError
from cache_builder.place import Place

STEM = "builds"


class Session(BaseModel):
    """One time of building, from laying the cache out to its last chunk.

    Attributes:
        seconds: by the clock.
        device: of the backbone, in the process that held the lock.
        workers: threads that decoded in that process.
        helped: did other processes help?
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    seconds: float
    device: str
    workers: int
    helped: bool


@contextmanager
def timed(
    place: Place, begun: float, *, device: str, workers: int, helped: bool
) -> Generator[None]:
    """Record what was spent from `begun` (`time.monotonic`) until the context ends, however it does."""
    try:
        yield
    finally:
        spent = round(time.monotonic() - begun, 3)
        # A full disk, or a bucket that is gone, has its own message.
        with suppress(OSError, CacheError):
            _add(place, Session(seconds=spent, device=device, workers=workers, helped=helped))


def continued(place: Place, previous: Place) -> None:
    """What the generation before has cost is part of what this one costs."""
    for session in sessions(previous):
        _add(place, session)


def sessions(place: Place) -> list[Session]:
    """All that is known, in no order; a line that cannot be read counts as a killed build."""
    found: list[Session] = []
    for name in place.names():
        if name == f"{STEM}.jsonl" or (name.startswith(f"{STEM}-") and name.endswith(".jsonl")):
            for line in place.read(name).splitlines():
                with suppress(ValidationError):
                    found.append(Session.model_validate_json(line))
    return found


def build_seconds(place: Place) -> float | None:
    """Seconds spent at building, at least; None where nobody knows."""
    found = sessions(place)
    return sum(session.seconds for session in found) if found else None


def _add(place: Place, session: Session) -> None:
    place.append(f"{STEM}.jsonl", session.model_dump_json().encode())
