"""Work killed at any moment and repeated ends in the cache of uninterrupted work: real SIGKILL, all along."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from faults import SEED, count

ROOT = Path(__file__).parent.parent
POINTS, MOMENTS, TEARS = 16, 9, 7
WORKS = (
    *(
        "build fixed",
        "build ragged",
        "build words",
        "build eight bits",
        "build compressed",
        "build together",
    ),
    *("repair", "append"),
)
NAMED = {
    "point": "killed at a file operation",
    "moment": "killed at a drawn moment",
    "torn": "killed amid a write",
}
KILLS = (-signal.SIGKILL, -signal.SIGXFSZ)


@pytest.fixture(scope="module")
def trials(fast_folder: Path) -> list[dict]:
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests/kill_builds.py"),
            str(fast_folder),
            *map(str, (SEED, POINTS, MOMENTS, TEARS)),
        ],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert not [t for t in found if t["finish"]], done.stderr
    return found


@pytest.mark.parametrize("work", WORKS)
def test_what_was_killed_ends_in_the_result_of_the_whole(trials: list[dict], work: str) -> None:
    of = [t for t in trials if t["work"] == work]
    whole = next(t for t in of if t["kind"] == "whole")
    for trial in of:
        assert trial["result"] == whole["result"], trial
        if trial["killed"] in KILLS:
            count(f"{NAMED[trial['kind']]}: {work}", "same result")
        if trial["kind"] == "chain":
            count(f"killed again and again: {work}", "same result", times=trial["deaths"])


def test_everything_that_can_be_killed_was_killed_all_along(trials: list[dict]) -> None:
    assert {t["work"] for t in trials} == set(WORKS)
    for work in WORKS:
        of = [t for t in trials if t["work"] == work]
        points = [t for t in of if t["kind"] == "point"]
        # Threads interleave differently from run to run: it may be over before the very last point is reached.
        assert {t["killed"] for t in points} <= {-signal.SIGKILL, 0}
        assert [t["killed"] for t in points].count(-signal.SIGKILL) >= POINTS - 2
        assert max(t["at"] for t in points) == of[0]["total"]
        assert [t["killed"] for t in of if t["kind"] == "torn"].count(-signal.SIGXFSZ) >= 2
    kills = sum(t["killed"] in KILLS for t in trials) + sum(t.get("deaths", 0) for t in trials)
    assert kills >= 120, kills


def test_what_is_killed_again_and_again_still_ends(trials: list[dict]) -> None:
    for trial in (t for t in trials if t["kind"] == "chain"):
        assert trial["deaths"] >= 3, trial
