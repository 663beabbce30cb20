"""The header: what a cache claims to be, in the attributes of its root group, and the checks on opening."""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from cache_builder.durable import write_durably
from cache_builder.errors import (
    CacheCorrupt,
    CacheIncomplete,
    CacheMismatch,
    CacheNotFound,
    CacheTooNew,
    CacheTooOld,
)
from cache_builder.format import FORMAT, SCHEMA, Layout
from cache_builder.lock import has_embeddings, is_remnant
from cache_builder.spec import CacheSpec, differences


class Header(BaseModel):
    """Attributes of the root group: what the cache claims to be, and how it is cut.

    Attributes:
        batch_size: rows encoded together.
        arrays: layout of every array; verify compares their zarr.json with it.
        counts, root, options: what the data set's reader found, where, and with which options it was asked; to find the
            pictures again, not part of any fingerprint.
        backbone_name: as it was asked for, e.g. with the path of a local checkpoint, of which the spec keeps only
            the name; empty if the builder was not told. Not part of any fingerprint.
        digest: of the content, once sealed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["headstart feature cache"] = FORMAT
    schema_version: Literal[2] = SCHEMA
    state: Literal["building", "sealed"]
    fingerprint: str
    spec: CacheSpec
    batch_size: int
    arrays: dict[str, Layout]
    tasks_sha256: str
    counts: dict[str, str]
    root: str
    options: dict[str, Any]
    backbone_name: str = ""
    digest: str | None = None

    def command(self, path: Path, streams: Sequence[str] = ()) -> str:
        """The command line that builds this cache at `path`, quoted for a shell; --device is the user's choice.

        Args:
            path: where.
            streams: others than it holds.
        """
        spec = self.spec
        named = self.backbone_name or f"{spec.backbone.family}:{spec.backbone.checkpoint}"
        words = ["headstart", "build", "--backbone", named, "--dataset", spec.dataset.name]
        words += ["--root", self.root] if self.root else []
        for key, value in self.options.items():
            words += ["--set", f"{key}={json.dumps(value)}"]
        words += ["--streams", *(streams or spec.streams)]
        # e.g. "bfloat16 autocast, sdpa, torch.compile"
        dtype = re.match(r"\w+", spec.backbone.compute)
        words += ["--dtype", dtype.group()] if dtype else []
        words += ["--compile"] if "torch.compile" in spec.backbone.compute else []
        words += ["--crops", spec.rules["crop"].partition(":")[0]] if "crop" in spec.rules else []
        words += ["--order-seed", str(spec.order_seed), "--store", spec.storage]
        return shlex.join([*words, "--out", str(path)])


def write_header(path: Path, header: Header) -> None:
    """Write the root group with its attributes, atomically."""
    root = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": header.model_dump(mode="json"),
    }
    write_durably(path / "zarr.json", json.dumps(root, ensure_ascii=False, indent=1).encode())


def read_header(path: Path) -> Header:
    """The attributes of a cache's root group, checked for version first."""
    file = path / "zarr.json"
    try:
        found = json.loads(file.read_bytes())["attributes"]
    except (FileNotFoundError, NotADirectoryError):
        found = {}
    except (ValueError, KeyError, TypeError) as error:
        raise CacheCorrupt(f"{file} is not the header of a zarr group ({error})") from error
    if found.get("format") != FORMAT:
        if has_embeddings(path):
            raise CacheCorrupt(
                f"{path} holds encoded chunks, but its header {file} is lost, so nobody knows what they are; restore "
                "that file from a backup or the original, or remove the folder and build again. Nothing was changed"
            )
        if is_remnant(path):
            raise CacheIncomplete(
                f"{path} holds the remains of a build that was stopped while it began: 0 chunks; repeat the build"
            )
        what = "holds something else" if path.exists() else "does not exist"
        raise CacheNotFound(
            f"no feature cache at {path}: the path {what}; make one with: headstart build --backbone … --dataset … "
            f"--out {path}"
        )
    if found.get("schema_version", 0) > SCHEMA:
        raise CacheTooNew(
            f"{path} has schema {found['schema_version']}, this headstart reads up to {SCHEMA}; install a newer "
            "headstart, or build the cache again with this one"
        )
    if found.get("schema_version", 0) < SCHEMA:
        raise CacheTooOld(
            f"{path} has schema {found.get('schema_version')}, from a headstart before this one, which reads schema "
            f"{SCHEMA}; remove it and build again"
        )
    try:
        header = Header.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CacheCorrupt(
            f"the header of {path} is not understood: {where}: {first['msg']}"
        ) from error
    if header.spec.fingerprint() != header.fingerprint:
        raise CacheCorrupt(
            f"{file} was edited: its fields have the fingerprint {header.spec.fingerprint()[:12]}, it says "
            f"{header.fingerprint[:12]}"
        )
    return header


def check_spec(path: Path, found: CacheSpec, expected: CacheSpec) -> None:
    """Refuse a cache that holds something else.

    Raises:
        CacheMismatch: with every differing field, what was expected and what was found.
    """
    fields = [
        "{}: expected {}, found {}".format(name, *_short(repr(a), repr(b)))
        for name, a, b in differences(expected, found)
    ]
    if fields:
        raise CacheMismatch(
            f"{path} holds something else than is asked for: {'; '.join(fields)}. Choose another --out, or remove the "
            "cache to build it again"
        )


def _short(one: str, other: str) -> tuple[str, str]:
    """Two long texts from shortly before they first differ."""
    differs = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    same = next(differs, min(len(one), len(other)))
    begin = max(0, same - 30) if max(len(one), len(other)) > 120 else 0

    def part(text: str) -> str:
        rest = text[begin:]
        return f"{'…' * bool(begin)}{rest[:110]}{'…' * (len(rest) > 110)}"

    return part(one), part(other)
