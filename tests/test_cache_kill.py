"""A build killed at any moment and repeated ends in the cache of an uninterrupted one: real SIGKILL, all along."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trials(fast_folder: Path) -> list[dict]:
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests/kill_builds.py"),
            str(fast_folder),
            *("32", "3", "12"),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert not [t for t in found if t["finish"]], done.stderr
    return found


def test_killed_builds_end_in_the_digest_of_the_whole_one(trials: list[dict]) -> None:
    whole = next(t for t in trials if t["kind"] == "whole")
    for trial in trials:
        assert trial["digest"] == whole["digest"], trial


def test_the_builds_really_were_killed_all_along(trials: list[dict]) -> None:
    points = [t for t in trials if t["kind"] == "point"]
    assert len({t["at"] for t in points}) == 32
    # Threads interleave differently from run to run: a build may be over before the very last point is reached.
    ends = [t["killed"] for t in points]
    assert set(ends) <= {-signal.SIGKILL, 0}
    assert ends.count(-signal.SIGKILL) >= 30
    assert max(t["at"] for t in points) == trials[0]["total"]


def test_a_build_killed_again_and_again_still_ends(trials: list[dict]) -> None:
    chain = next(t for t in trials if t["kind"] == "chain")
    assert chain["deaths"] >= 3
