"""The share of branches that the tests take, of `eval` and of the cache format; fails below 95 %.

    coverage json --quiet -o - | python tests/benchmarks/branch_coverage.py      (`make coverage` does this)

Coverage's own percent mixes lines and branches, and lines, being many, hide branches that were never taken; so its
counts are read and the share of branches alone is computed.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

LEAST = 0.95
"""Of all branches of a part."""

FORMAT = [
    *("build_log", "cache", "catalogue", "chunks", "codec", "format", "header", "journal", "lock"),
    *("metadata", "place", "reader", "rows", "spec", "storage", "takeup", "verify"),
]
"""Files of cache_builder that say what lies on disk, and read, write or check it."""


def main() -> None:
    """Print a table of each part, the least covered file first, and fail if a part has too few."""
    files: dict[str, Any] = json.load(sys.stdin)["files"]
    low: list[str] = []
    for part, names in parts(files).items():
        print(f"\n| {part} | branches | taken | % | not taken |\n|---|---|---|---|---|")
        gaps = [name for name in names if files[name]["missing_branches"]]
        for name in sorted(gaps, key=lambda name: share(*counts(files, [name]))):
            print(line(name, *counts(files, [name]), arrows(files[name]["missing_branches"])))
        whole = [name for name in names if name not in gaps]
        print(line(f"{len(whole)} files without a gap", *counts(files, whole)))
        print(line(f"**{part}**", *counts(files, names)))
        if share(*counts(files, names)) < LEAST:
            low.append(f"{part} {percent(*counts(files, names))} %")
    if low:
        raise SystemExit(
            f"too few branches are tested: {', '.join(low)}, and it should be {LEAST:.0%} at least; the tables say "
            "which are not"
        )


def parts(files: Mapping[str, Any]) -> dict[str, list[str]]:
    """What is held to the limit: part → its files, by their names in the report.

    Raises:
        SystemExit: the report lacks one, as after a run of something else, or once a file has another name.
    """
    wanted = {
        "eval": sorted({"eval/cli.py", *(file for file in files if file.startswith("eval/"))}),
        "cache format": [f"cache_builder/{name}.py" for name in FORMAT],
    }
    lacking = [file for names in wanted.values() for file in names if file not in files]
    if lacking:
        raise SystemExit(
            f"the coverage report has no {', '.join(lacking)}; make it with `make coverage`, and if a file got another "
            "name, say so in tests/benchmarks/branch_coverage.py"
        )
    return wanted


def counts(files: Mapping[str, Any], names: Sequence[str]) -> tuple[int, int]:
    """Branches of some files: taken, and all."""
    summaries = [files[name]["summary"] for name in names]
    return sum(s["covered_branches"] for s in summaries), sum(s["num_branches"] for s in summaries)


def share(taken: int, there: int) -> float:
    """Of branches taken; where there is none, all are."""
    return taken / there if there else 1.0


def percent(taken: int, there: int) -> str:
    """To a tenth, rounded down, so that 100.0 means all."""
    return f"{int(1000 * share(taken, there)) / 10:.1f}"


def arrows(branches: Sequence[tuple[int, int]]) -> str:
    """Branches as line → next line; 0 stands for the end of the function."""
    return ", ".join(f"{a} → {max(b, 0)}" for a, b in branches)


def line(name: str, taken: int, there: int, lacking: str = "") -> str:
    """Of a table."""
    return f"| {name} | {there} | {taken} | {percent(taken, there)} | {lacking} |"


if __name__ == "__main__":
    main()
