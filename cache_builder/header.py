"""The header: what a cache claims to be, in the attributes of its root group, and the checks on opening."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from cache_builder.durable import crc32c
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
from cache_builder.place import Place
from cache_builder.spec import CacheSpec, differences

FOREIGN = "foreign"
"""Family of features that no backbone of this project computed: they were imported."""

NO_DATASET = "none"
"""Name of the data set of imported features that belong to none."""


class StorageReport(BaseModel):
    """What a storage mode does to one stream, measured on a sample of its rows.

    Attributes:
        bytes_per_value: scales included.
        cosine: mean cosine of stored and original rows.
        white_mean, white_min: the same after every channel was brought to mean 0 and deviation 1, where a loss shows.
        rows: measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes_per_value: float
    cosine: float
    white_mean: float
    white_min: float
    rows: int


class Header(BaseModel):
    """Attributes of the root group: what the cache claims to be, and how it is cut.

    Attributes:
        batch_size: rows encoded together.
        arrays: layout of every array; verify compares their zarr.json with it.
        counts, root, options: what the data set's reader found, where, and with which options it was asked; to find the
            pictures again, not part of any fingerprint.
        report: stream → what its storage costs it, as measured on a sample; not part of any fingerprint.
        backbone_name: as it was asked for, e.g. with the path of a local checkpoint, of which the spec keeps only
            the name; empty if the builder was not told. Not part of any fingerprint.
        digest: of the content, once sealed.
        quarantine_sha256: of quarantine.jsonl, once sealed; not part of the digest, because reasons name places.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["headstart feature cache"] = FORMAT
    schema_version: Literal[4] = SCHEMA
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
    report: dict[str, StorageReport] = {}
    digest: str | None = None
    quarantine_sha256: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Header":
        """Arrays go by their names, and all that the spec promises is there."""
        misnamed = [key for key, layout in self.arrays.items() if key != layout.name]
        nested = [a for a in self.arrays if any(a.startswith(f"{b}/") for b in self.arrays)]
        lacking = [s for s in (*self.spec.streams, "image/id", "text/id") if s not in self.arrays]
        for what, names in (("misnames", misnamed), ("nests", nested), ("lacks", lacking)):
            if names:
                raise ValueError(f"it {what} the array {names[0]}")
        return self

    def attributes(self) -> dict[str, Any]:
        """All of them, as JSON, with their checksum."""
        claims = self.model_dump(mode="json")
        return {**claims, "crc32c": header_checksum(claims)}

    def embedded(self) -> frozenset[str]:
        """Arrays that hold embeddings: the streams, and the scales of those that have them."""
        scales = {f"{stream}_scale" for stream in self.spec.streams} & set(self.arrays)
        return frozenset({*self.spec.streams, *scales})

    def command(self, path: object, streams: Sequence[str] = ()) -> str:
        """The command line that builds this cache at `path`, quoted for a shell; --device is the user's choice.

        Args:
            path: where.
            streams: others than it holds.
        """
        spec = self.spec
        if spec.backbone.family == FOREIGN:
            words = ["headstart", "import", self.backbone_name]
            words += ["--dataset", spec.dataset.name] if spec.dataset.name != NO_DATASET else []
            return shlex.join([*words, *self._where(), "--out", str(path)])
        named = self.backbone_name or f"{spec.backbone.family}:{spec.backbone.checkpoint}"
        words = ["headstart", "build", "--backbone", named, "--dataset", spec.dataset.name]
        words += self._where()
        words += ["--streams", *(streams or spec.streams)]
        # e.g. "bfloat16 autocast, sdpa, torch.compile"
        dtype = re.match(r"\w+", spec.backbone.compute)
        words += ["--dtype", dtype.group()] if dtype else []
        words += ["--compile"] if "torch.compile" in spec.backbone.compute else []
        words += ["--crops", spec.rules["crop"].partition(":")[0]] if "crop" in spec.rules else []
        words += ["--order-seed", str(spec.order_seed), "--store", spec.storage]
        words += ["--append"] if spec.generations else []
        return shlex.join([*words, "--out", str(path)])

    def _where(self) -> list[str]:
        """Where the data set lies, and its options, as arguments."""
        options = [f"{key}={json.dumps(value)}" for key, value in self.options.items()]
        root = ["--root", self.root] if self.root else []
        return [*root, *(word for option in options for word in ("--set", option))]


def write_header(place: Place, header: Header) -> None:
    """Write the root group with its attributes, atomically."""
    root = {"zarr_format": 3, "node_type": "group", "attributes": header.attributes()}
    place.write("zarr.json", json.dumps(root, ensure_ascii=False, indent=1).encode())


def header_checksum(claims: Mapping[str, Any]) -> str:
    """CRC-32C of all other attributes, as JSON with sorted keys."""
    text = json.dumps(claims, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return crc32c(text.encode())


def read_header(place: Place) -> Header:
    """The attributes of a cache's root group, checked for version first."""
    file = f"{place}/zarr.json"
    try:
        found = json.loads(place.read("zarr.json"))["attributes"]
        known = found.get("format") == FORMAT
    except (FileNotFoundError, NotADirectoryError):
        found, known = {}, False
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CacheCorrupt(f"{file} is not the header of a zarr group ({error})") from error
    if not known:
        if has_embeddings(place):
            raise CacheCorrupt(
                f"{place} holds encoded chunks, but its header {file} is lost, so nobody knows what they are; restore "
                "that file from a backup or the original, or remove the folder and build again. Nothing was changed"
            )
        if is_remnant(place):
            raise CacheIncomplete(
                f"{place} holds the remains of a build that was stopped while it began: 0 chunks; repeat the build"
            )
        what = "holds something else" if place.exists() else "does not exist"
        raise CacheNotFound(
            f"no feature cache at {place}: the path {what}; make one with: headstart build --backbone … --dataset … "
            f"--out {place}"
        )
    return checked_header(found, place, file)


def checked_header(found: dict[str, Any], place: object, file: object) -> Header:
    """A header as read from `file`, of the cache at `place`: version first, then every field, then the fingerprint."""
    version = found.get("schema_version", 0)
    if not isinstance(version, int) or isinstance(version, bool):
        raise CacheCorrupt(f"{file} has the schema_version {version!r}, which is no number")
    if version > SCHEMA:
        raise CacheTooNew(
            f"{place} has schema {version}, this headstart reads up to {SCHEMA}; install a newer "
            "headstart, or build the cache again with this one"
        )
    if version < SCHEMA:
        raise CacheTooOld(
            f"{place} has schema {version}, from a headstart before this one, which reads schema "
            f"{SCHEMA}; remove it and build again"
        )
    said = found.get("crc32c")
    claims = {key: value for key, value in found.items() if key != "crc32c"}
    if said != header_checksum(claims):
        raise CacheCorrupt(
            f"{file} was edited or damaged: its attributes have the crc32c {header_checksum(claims)}, it says {said}; "
            "restore the file from a backup, or remove the cache and build it again"
        )
    try:
        header = Header.model_validate(claims)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CacheCorrupt(
            f"the header of {place} is not understood: {where}: {first['msg']}"
        ) from error
    if header.spec.fingerprint() != header.fingerprint:
        raise CacheCorrupt(
            f"{file} was edited: its fields have the fingerprint {header.spec.fingerprint()[:12]}, it says "
            f"{header.fingerprint[:12]}"
        )
    return header


def check_spec(place: Place, found: CacheSpec, expected: CacheSpec) -> None:
    """Refuse a cache that holds something else.

    Raises:
        CacheMismatch: with every differing field, what was expected and what was found.
    """
    fields = [
        "{}: expected {}, found {}".format(name, *_short(repr(a), repr(b)))
        for name, a, b in differences(expected, found)
    ]
    samples = all(field.startswith(("dataset.", "generations")) for field in fields)
    grown = (
        "If samples were added to what it holds, repeat the command with --append. Otherwise choose"
    )
    if fields:
        raise CacheMismatch(
            f"{place} holds something else than is asked for: {'; '.join(fields)}. {grown if samples else 'Choose'} "
            "another --out, or remove the cache to build it again"
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
