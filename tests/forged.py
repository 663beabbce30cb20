"""Caches that somebody else made: consistent in their checksums, hostile in what they say; what opening one costs.

`forge` changes a sealed cache and mends all of its checksums, so that nothing but the claim itself can be refused.
"""

import hashlib
import json
import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from small_caches import is_clear, observe

from cache_builder.durable import crc32c
from cache_builder.spec import CacheSpec

MEMORY = 600 << 20
SECONDS = 4

Claims = dict[str, Any]
"""Attributes of the root group."""


def forge(
    path: Path,
    header: Callable[[Claims], object] = lambda _: None,
    chunks: dict[str, bytes] | None = None,
    line: Claims | None = None,
    journals: Callable[[Path], object] = lambda _: None,
    files: Callable[[Path], object] = lambda _: None,
) -> None:
    """Change a sealed cache and make all of its checksums agree with it again.

    Args:
        path: the cache.
        header: changes the claims.
        chunks: name of an array → all bytes of its chunk 0.
        line: one more of the manifest, but for its size and checksum.
        journals: changes anything that the checksums are then made to fit.
        files: last, changes anything.
    """
    root = json.loads((path / "zarr.json").read_bytes())
    claims = root["attributes"]
    header(claims)
    lines = [json.loads(text) for text in (path / "manifest.jsonl").read_bytes().splitlines()]
    for one in lines:
        data = (chunks or {}).get(one["array"])
        if data is not None and one["chunk"] == 0:
            one |= {"bytes": len(data), "crc32c": crc32c(data)}
            chunk_file(path / one["array"]).write_bytes(data)
    lines += [{**line, "bytes": 9, "crc32c": "0" * 8}] if line else []
    (path / "manifest.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    journals(path)
    mend(path, claims)
    (path / "zarr.json").write_text(json.dumps(root))
    files(path)


def chunk_file(array: Path) -> Path:
    """Of an array's chunk 0, of however many axes."""
    file = array / "c/0"
    while file.is_dir():
        file /= "0"
    return file


def mend(path: Path, claims: Claims) -> None:
    """Every checksum in the claims, as docs/cache-format.md has them."""
    claims["fingerprint"] = CacheSpec.model_validate(claims["spec"]).fingerprint()
    journals = [(path / f"{name}.jsonl").read_bytes() for name in ("manifest", "quarantine")]
    listed, bad = ([json.loads(text) for text in data.splitlines()] for data in journals)
    last = {(e["array"], e["chunk"]): [e["crc32c"], e["bytes"]] for e in listed}
    body = [
        claims["fingerprint"],
        claims["tasks_sha256"],
        [[*key, *said] for key, said in sorted(last.items())],
        sorted({e["id"] for e in bad}),
    ]
    claims["digest"] = hashlib.sha256(canonical(body)).hexdigest()
    claims["quarantine_sha256"] = hashlib.sha256(journals[1]).hexdigest()
    del claims["crc32c"]
    claims["crc32c"] = crc32c(canonical(claims, sort_keys=True))


def canonical(value: object, **options: Any) -> bytes:
    """JSON in one way."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), **options).encode()


def layout_of(array: str, **changes: Any) -> Callable[[Claims], object]:
    """Another layout in the header."""
    return lambda claims: claims["arrays"][array].update(changes)


def strings(count: int, *sizes: int) -> bytes:
    """A chunk of strings that claims a count and sizes, and holds a few bytes."""
    return struct.pack("<I", count) + b"".join(struct.pack("<I", s) + b"ab" for s in sizes)


def numbers(*values: int) -> bytes:
    """A chunk of int64."""
    return struct.pack(f"<{len(values)}q", *values)


def tasks(text: bytes) -> dict[str, Any]:
    """Other tasks, with the right checksum in the header."""
    return {
        "header": lambda claims: claims.update(tasks_sha256=hashlib.sha256(text).hexdigest()),
        "files": lambda path: (path / "tasks.json").write_bytes(text),
    }


def linked(name: str, target: str) -> Callable[[Path], object]:
    """A file of the cache that is a link."""
    return lambda path: ((path / name).unlink(), (path / name).symlink_to(target))


def piped(name: str) -> Callable[[Path], object]:
    """A file of the cache that is a pipe."""
    return lambda path: ((path / name).unlink(), os.mkfifo(path / name))


def sparse(name: str, size: int) -> Callable[[Path], object]:
    """A file of the cache that is huge, and empty on the disk."""
    return lambda path: os.truncate(path / name, size)


def look(path: Path, note: Path) -> None:
    """Read all of a cache with little memory and time, and write what was refused and how; for a child."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    found = observe(path, "read")
    errors = {k: v for k, v in found.items() if isinstance(v, Exception)}
    unclear = {k: repr(v)[:200] for k, v in errors.items() if not is_clear(v)}
    said = {k: str(v) for k, v in errors.items()}
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    note.write_text(json.dumps({"unclear": unclear, "refused": said}))
