"""Is a cache whole, and is every byte the byte that was written?"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tqdm import tqdm

from cache_builder.chunks import Chunks
from cache_builder.errors import CacheCorrupt, CacheError
from cache_builder.format import Entry
from cache_builder.header import Header
from cache_builder.metadata import group_problem, groups, metadata_problem


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        chunks, bytes: read and compared.
        problems: one sentence each, what and where; empty if the cache is whole and intact.
    """

    chunks: int
    bytes: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """No problem at all."""
        return not self.problems


def verify(chunks: Chunks, header: Header, digest: str, progress: bool) -> VerifyReport:
    """Read every chunk and compare it with what was written; also metadata, tasks, completeness and digest.

    Args:
        chunks, header: of the cache.
        digest: of the content, as computed now.
        progress: show a tqdm bar.
    """
    problems = [
        f"chunk {chunk} of {array} was never finished" for array, chunk in chunks.unlisted()
    ]
    found = [metadata_problem(chunks.place, layout) for layout in header.arrays.values()]
    found += [group_problem(chunks.place, group) for group in groups(header.arrays)]
    problems += [problem for problem in found if problem]
    problems += _file_problems(chunks, header, digest)

    def check(entry: Entry) -> str | None:
        try:
            file = chunks.open_chunk(entry.array, entry.chunk)
            try:
                chunks.compare(file, entry)
            finally:
                file.close()
        except (CacheError, OSError) as error:
            return str(error)
        return None

    entries = [entry for _, entry in sorted(chunks.manifest.items())]
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(check, entries)
        bar = tqdm(results, total=len(entries), desc="verify", unit="chunk", disable=not progress)
        problems += [problem for problem in bar if problem]
    return VerifyReport(len(entries), sum(e.bytes for e in entries), tuple(problems))


def read_tasks(chunks: Chunks, header: Header) -> str:
    """The text of `tasks.json`, compared with the header first: an edited one would ask something else.

    Raises:
        CacheCorrupt: it is gone, or not the file that was written.
    """
    file = f"{chunks.place}/tasks.json"
    remedy = "restore it from a backup, or remove the cache and rebuild"
    try:
        data = chunks.place.read("tasks.json")
    except FileNotFoundError:
        raise CacheCorrupt(f"{file} is gone; {remedy}") from None
    if hashlib.sha256(data).hexdigest() != header.tasks_sha256:
        chunks.check_unchanged()
        raise CacheCorrupt(f"{file} is not the file that was written; {remedy}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise CacheCorrupt(f"{file} is no UTF-8 ({error}); {remedy}") from error


def quarantine_problem(chunks: Chunks, header: Header) -> str | None:
    """In what the quarantine of a sealed cache is not the one that was sealed, as words; None if it is."""
    if header.state != "sealed":
        return None
    file = f"{chunks.place}/quarantine.jsonl"
    try:
        found = chunks.place.read("quarantine.jsonl")
    except FileNotFoundError:
        return f"{file} is gone"
    same = hashlib.sha256(found).hexdigest() == header.quarantine_sha256
    return None if same else f"{file} is not the file that was sealed"


def _file_problems(chunks: Chunks, header: Header, digest: str) -> list[str]:
    """What is wrong with the files that are not chunks."""
    problems: list[str] = []
    try:
        read_tasks(chunks, header)
    except CacheCorrupt as error:
        problems.append(str(error))
    if problem := quarantine_problem(chunks, header):
        problems.append(problem)
    if header.state != "sealed":
        problems.append(f"{chunks.place} was never sealed; repeat the build: {chunks.command}")
    elif header.digest != digest:
        problems.append(
            f"{chunks.place}: its content digest is {digest[:12]}, but {str(header.digest)[:12]} was sealed: the "
            "manifest or the quarantine was edited"
        )
    return problems
