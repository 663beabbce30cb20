"""What a damage did to a cache: seen by readers, by verify, and by a repeated build, as findings that must not be."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from damages import Damage, Files, same, snapshot
from small_caches import is_clear, observe

from cache_builder import FeatureCache
from cache_builder.errors import CacheError


@dataclass(frozen=True)
class Finding:
    """Something that must not happen.

    Attributes:
        what: `silent` (another value and no error), `silent open` (the same under check="open", beyond a flip in a
            chunk of embeddings or token ids), `crash` (an error that is not ours), `unverified`, `build crash`,
            `build differs`, `build damage`.
        item: what was read; the file, for a build.
        detail: the error, or what differs.
    """

    what: str
    item: str
    detail: str


@dataclass
class Verdict:
    """All that a damage led to."""

    findings: list[Finding] = field(default_factory=list)
    harmless: bool = False
    error: bool = False
    unseen: bool = False
    verified: bool = False
    rebuilt: str = ""

    def add(self, what: str, item: str, detail: object) -> None:
        self.findings.append(Finding(what, item, repr(detail)[:200]))


class Judge:
    """Compares a damaged cache with the whole one it was.

    Attributes:
        whole: everything read from the undamaged cache.
    """

    def __init__(self, path: Path, build: Callable[[Path], FeatureCache]) -> None:
        self.path, self.build = path, build
        cache = build(path)
        self.files, self.digest = snapshot(path), cache.digest()
        self.unchecked = frozenset({*cache.streams, "text/ids", "word/ids"})
        self.whole = observe(path, "read")
        assert not [v for v in self.whole.values() if isinstance(v, Exception)]
        assert cache.verify().ok

    def judge(self, damage: Damage) -> Verdict:
        """Look at the cache as it lies there, then build it again; it is left as that build leaves it."""
        verdict, before = Verdict(), snapshot(self.path)
        # Of a sealed cache, the quarantine is compared as a file: a blank line counts.
        journal = "quarantine.jsonl"
        as_sealed = self.files[journal] == before.get(journal)
        verdict.harmless = as_sealed and not same(self.files, before)
        seen = self._read(damage, verdict)
        self._verify(verdict)
        self._rebuild(before, seen, verdict)
        return verdict

    def _read(self, damage: Damage, verdict: Verdict) -> dict[str, Any]:
        seen = observe(self.path, "read")
        for item, value in seen.items():
            if isinstance(value, Exception):
                verdict.error = True
                if not is_clear(value):
                    verdict.add("crash", item, value)
            elif value != self.whole[item]:
                verdict.add("silent", item, "another value")
        for item, value in observe(self.path, "open").items():
            if isinstance(value, Exception):
                if not is_clear(value) and not isinstance(seen.get(item), Exception):
                    verdict.add("crash", f"{item} (open)", value)
            elif value != self.whole[item]:
                if damage.part == "chunk" and item in self.unchecked:
                    verdict.unseen = True
                elif isinstance(seen[item], Exception):
                    verdict.add("silent open", item, "another value")
        return seen

    def _verify(self, verdict: Verdict) -> None:
        try:
            verdict.verified = bool(FeatureCache.open(self.path).verify().problems)
        except CacheError:
            verdict.verified = True
        except Exception as error:
            verdict.verified = True
            if not any(f.what == "crash" for f in verdict.findings):
                verdict.add("crash", "verify", error)
        if not verdict.verified and not verdict.harmless:
            verdict.add("unverified", "", "verify finds nothing")
        if verdict.verified and verdict.harmless:
            verdict.add("unverified", "", "verify complains about nothing")

    def _rebuild(self, before: Files, seen: dict[str, Any], verdict: Verdict) -> None:
        try:
            digest = self.build(self.path).digest()
        except CacheError as error:
            verdict.rebuilt = "refused"
            if not is_clear(error):
                verdict.add("build crash", "", error)
            # A torn last line is cut off by any builder; nothing else may be touched.
            for name in same(before, snapshot(self.path)):
                verdict.add("build damage", name, "a refused build changed it")
            return
        except Exception as error:
            verdict.rebuilt = "crashed"
            verdict.add("build crash", "", error)
            return
        verdict.rebuilt = "same digest"
        if digest != self.digest:
            verdict.add("build differs", "", digest)
        after = snapshot(self.path)
        # The digest compares the manifest; a line of an array that there is not may stay in it.
        for name in same(self.files, after, skip=frozenset({"manifest.jsonl"})):
            if name in same(before, after):
                verdict.add("build damage", name, "neither as it was nor as it was found")
        for item, value in observe(self.path, "read").items():
            if not isinstance(value, Exception) and value != self.whole[item]:
                if isinstance(seen.get(item), Exception):
                    verdict.add("build differs", item, "another value than before")
            elif isinstance(value, Exception) and not isinstance(seen.get(item, value), Exception):
                verdict.add("build damage", item, value)
