"""A cache on an object store: `s3://bucket/prefix` and the like, through obstore.

An object is put by one request, whole or not at all, so there is nothing to sync and nothing to sweep. obstore repeats
requests that a server or the network failed (5xx, dropped connections) with growing pauses. Nothing can be appended to
an object: a journal's writer puts its newest lines again and again under one name, until that is `ROLL` bytes long.

Credentials and endpoint come from the environment, by the names that AWS's own tools use: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL, AWS_ALLOW_HTTP=true for a server without TLS.
"""

import secrets
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_builder.bucket_errors import bucket_is_absent, check_endpoint, first_line, sentence
from cache_builder.errors import CacheCorrupt, CacheError, CacheLocked, UnknownName
from cache_builder.place import Place

ROLL = 64 << 10
"""Bytes of a journal's object before the next one is begun: bounds what is sent again for every line."""

RETRY: Any = {
    "max_retries": 8,
    "backoff": {
        "init_backoff": timedelta(milliseconds=100),
        "max_backoff": timedelta(seconds=10),
        "base": 2,
    },
    "retry_timeout": timedelta(minutes=3),
}
"""How a failed request is repeated."""


class Bucket:
    """A prefix of an object store.

    Args:
        store: an obstore store at the prefix.
        url: of the prefix, for messages.
    """

    def __init__(self, store: Any, url: str) -> None:
        self.store, self.url = store, url.rstrip("/")
        # A journal object is never continued by another process: its name is this one's.
        self.token = secrets.token_hex(4)
        self._lines: dict[str, tuple[int, bytes]] = {}
        # Whether another process has taken over the lock that this one held.
        self.lost = False

    @classmethod
    def named(cls, url: str) -> "Bucket":
        """The place a URL names.

        Raises:
            CacheError: obstore is not installed, or does not understand the URL or the endpoint.
        """
        try:
            from obstore.store import from_url
        except ImportError:
            raise UnknownName(
                f"{url} lies on an object store, which needs obstore: pip install 'headstart[s3]'"
            ) from None
        check_endpoint()
        try:
            return cls(from_url(url, retry_config=RETRY), url)
        except Exception as error:
            raise CacheError(f"{url} cannot be used: {first_line(error)}") from error

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """Its last part."""
        return self.url.rpartition("/")[2]

    def absolute(self) -> str:
        """The URL."""
        return self.url

    def exists(self) -> bool:
        """Is there any object below the prefix?"""
        return bool(self.names())

    def read(self, name: str) -> bytes:
        """All of an object."""
        return bytes(self.asked(name, lambda: self.store.get(name).bytes()))

    def open(self, name: str) -> "Object":
        """An object, to read parts of."""
        size = self.asked(name, lambda: self.store.head(name)["size"])
        return Object(self, name, size)

    def sizes(self, names: Sequence[str]) -> Mapping[str, int]:
        """Bytes of those of the named objects that are there: one listing of all there are."""
        wanted = set(names)
        if len(wanted) < 2:
            return {name: size for name in wanted if (size := self._size(name)) is not None}
        pages = self.asked("", lambda: list(self.store.list()))
        return {o["path"]: o["size"] for page in pages for o in page if o["path"] in wanted}

    def _size(self, name: str) -> int | None:
        try:
            return int(self.asked(name, lambda: self.store.head(name)["size"]))
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        """Objects at the top, and prefixes with a slash behind them."""
        found = self.asked("", self.store.list_with_delimiter)
        files = [o["path"] for o in found["objects"]]
        return sorted([*files, *(f"{p}/" for p in found["common_prefixes"])])

    def write(self, name: str, data: bytes | NDArray[np.uint8], *, sync: bool = True) -> None:
        """Put an object whole; `CacheLocked` if another process has taken over what this one was building."""
        if self.lost:
            raise CacheLocked(
                f"{self.url} was taken over by another process, because this one gave no sign of life; wait for it"
            )
        whole: Any = data
        if not isinstance(data, bytes):
            whole = memoryview(whole)
        self.asked(name, lambda: self.store.put(name, whole))

    def link(self, other: Place, name: str) -> bool:
        """An object is one name."""
        return False

    def append(self, name: str, line: bytes, *, sync: bool = True) -> None:
        """Add a line to this process's own part of a journal; with `sync=False` it waits for the next or `sync_all`."""
        part, lines = self._lines.get(name, (0, b""))
        if len(lines) > ROLL:
            self.write(self._part(name, part), lines)
            part, lines = part + 1, b""
        self._lines[name] = part, lines + line + b"\n"
        if sync:
            self.write(self._part(name, part), self._lines[name][1])

    def _part(self, name: str, part: int) -> str:
        stem = name.removesuffix(".jsonl")
        return f"{stem}-{self.token}.{part}.jsonl"

    def heal(self, name: str) -> None:
        """An object has no torn end."""

    def remove(self, name: str) -> None:
        """Remove an object, or all below a prefix that ends in a slash."""
        if name.endswith("/"):
            pages = self.asked(name, lambda: list(self.store.list(name)))
            gone = [o["path"] for page in pages for o in page]
        else:
            gone = [name]
        for name, (part, _) in list(self._lines.items()):
            if self._part(name, part) in gone:
                self._lines[name] = part + 1, b""  # or its old lines would come back with the next
        for one in gone:
            try:
                self.asked(one, lambda one=one: self.store.delete(one))
            except FileNotFoundError:
                continue

    @contextmanager
    def claimed(self, name: str) -> Generator[bool]:
        """Always: nothing here ends with its holder, and two who do the same do no harm."""
        yield True

    @contextmanager
    def helping(self) -> Generator[None]:
        """Nothing that ends with a process can be held here."""
        yield

    @contextmanager
    def alone(self) -> Generator[None]:
        """Nobody can be waited for here."""
        yield

    def sync_all(self) -> None:
        """Put the lines that wait."""
        for name, (part, lines) in self._lines.items():
            if lines:
                self.write(self._part(name, part), lines)

    def sweep(self) -> None:
        """Nothing half-written is ever visible."""

    def zarr_store(self) -> Any:
        """The same place for zarr."""
        from zarr.storage import ObjectStore

        return ObjectStore(self.store, read_only=True)

    def asked(self, name: str, request: Any) -> Any:
        """The answer to a request; what is not there is a `FileNotFoundError`, any other failure a `CacheError`."""
        from obstore.exceptions import BaseError

        try:
            return request()
        except (BaseError, OSError) as error:
            if isinstance(error, FileNotFoundError) and not bucket_is_absent(error):
                raise
            raise CacheError(f"{self.url}/{name}: {sentence(self.url, error)}") from error


class Object:
    """An object, read by ranges."""

    def __init__(self, bucket: Bucket, name: str, size: int) -> None:
        self.bucket, self.name, self.size = bucket, name, size

    def read_into(self, target: NDArray[np.uint8], offset: int) -> None:
        """One request for the range."""
        if not len(target):
            return
        store, size = self.bucket.store, len(target)
        ask = lambda: store.get_range(self.name, start=offset, length=size)  # noqa: E731
        data = self.bucket.asked(self.name, ask)
        if len(data) != size:
            raise CacheCorrupt(
                f"{self.bucket}/{self.name} ends at byte {offset + len(data)}, before what was written"
            )
        target[:] = np.frombuffer(data, np.uint8)

    def close(self) -> None:
        """There is nothing to let go of."""
