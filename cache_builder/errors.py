"""What can be wrong with a cache or with a request to this room.

Every message says what was asked, what was found and what to do. Each class also inherits the built-in a stranger would
catch, so ordinary `except` clauses keep working.
"""


class CacheError(Exception):
    """Root of this room's errors: a user's error, shown as one sentence without a traceback."""

    def __str__(self) -> str:
        """The plain message; `KeyError` would quote it."""
        return str(self.args[0]) if self.args else ""


class UnknownName(CacheError, ValueError):
    """A backbone, data set, method, stream or option of that name does not exist; lists the known ones."""


class CacheNotFound(CacheError, FileNotFoundError):
    """There is no feature cache at the path."""


class CacheTooNew(CacheError):
    """The cache was written under a schema this version cannot read."""


class CacheTooOld(CacheError):
    """The cache was written under a schema that this version no longer reads."""


class CacheIncomplete(CacheError):
    """A chunk that should be there is not: the build has not finished, or a file was removed."""


class CacheMismatch(CacheError, ValueError):
    """The cache holds something else than was asked for; every differing field is named."""


class CacheCorrupt(CacheError, ValueError):
    """Stored bytes are not the bytes that were written."""


class CacheLocked(CacheError):
    """Another process is building this cache."""


class UnknownIds(CacheError, KeyError):
    """Ids that the cache does not hold, or whose image was quarantined."""


class BadInput(CacheError, ValueError):
    """An input file that cannot be used, in a build that was told to be strict."""


class BadOutput(CacheError, ValueError):
    """A backbone produced something that cannot be stored: not finite, out of range, or of another shape."""
