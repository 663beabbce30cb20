"""A lock file that its holder removes: whoever waited with the old one open does not hold the new one."""

import os
from pathlib import Path

import pytest

from cache_builder.flock import takes
from heads.errors import RunExists
from heads.run_files import alone


def opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


def test_one_holds_it_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first, second = opened(path), opened(path)
    assert takes(first, path)
    assert not takes(second, path)
    os.close(first)
    assert takes(second, path)
    os.close(second)


@pytest.mark.parametrize("made_again", [False, True])
def test_a_file_that_lost_its_name_is_no_lock(tmp_path: Path, made_again: bool) -> None:
    """A holds it, B opens it, A removes it and lets go, C makes it anew: B must not hold what nobody else sees."""
    path = tmp_path / "lock"
    a, b = opened(path), opened(path)
    assert takes(a, path)
    path.unlink()
    os.close(a)
    c = opened(path) if made_again else None
    assert not takes(b, path)
    if c is not None:
        assert takes(c, path)
        os.close(c)
    os.close(b)


def test_a_directory_is_held_and_left_as_it_was(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with alone(out, "somebody is at work in"):
        with (
            pytest.raises(RunExists, match=r"somebody is at work in .*deep/out; wait"),
            alone(out, "somebody is at work in"),
        ):
            pytest.fail("two hold it")
        assert [p.name for p in out.iterdir()] == ["lock"]
    assert not out.exists()
