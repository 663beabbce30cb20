"""Any damage to a sealed cache is seen: by who reads it, by `verify`, and by a repeated build; 1,050 drawn damages.

Another seed draws others: `HEADSTART_FAULT_SEED=7 pytest tests/test_cache_faults.py`. The table is printed at the end.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from damages import Damage, Files, draw, parts, restore, same, snapshot
from faults import SEED, count
from judging import Judge, Verdict
from small_caches import BUILDS, is_clear, observe

from cache_builder import FeatureCache
from cache_builder.errors import CacheCorrupt

CASES = 175
"""Of each kind of cache."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A thousand builds need not say what they cut."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module", params=BUILDS)
def judge(request: pytest.FixtureRequest, fast_folder: Path) -> Judge:
    """A cache of every kind, and what it was when it was whole."""
    logging.disable(logging.WARNING)
    path = fast_folder / f"fault-{request.param}.zarr"
    try:
        return Judge(path, BUILDS[request.param])
    finally:
        logging.disable(logging.NOTSET)


def tell(damage: Damage, verdict: Verdict) -> None:
    """Into the table."""
    outcomes = {
        "same result": verdict.harmless
        or not (verdict.error or verdict.findings or verdict.unseen),
        "clear error": verdict.error,
        "found by verify": verdict.verified,
        "unseen by design": verdict.unseen,
        "silent wrong": any(f.what == "silent" for f in verdict.findings),
    }
    count(f"damaged: {damage.part}", *(o for o, yes in outcomes.items() if yes))


def test_no_drawn_damage_is_read_as_if_it_were_the_cache(judge: Judge) -> None:
    by_part = parts(FeatureCache.open(judge.path), judge.files)
    wrong: list[str] = []
    kind = list(BUILDS.values()).index(judge.build)
    outcomes = {"same digest": 0, "refused": 0, "crashed": 0}
    for case in range(CASES):
        damage, after = draw(judge.files, by_part, np.random.default_rng([SEED, kind, case]))
        restore(judge.path, after)
        verdict = judge.judge(damage)
        restore(judge.path, judge.files)
        tell(damage, verdict)
        outcomes[verdict.rebuilt] += 1
        wrong += [f"seed [{SEED}, {kind}, {case}], {damage}: {f}" for f in verdict.findings]
    assert not wrong, "\n".join(wrong[:20])
    # The draw reaches every ending, or nothing was tried.
    assert outcomes["same digest"] > 40
    assert outcomes["refused"] > 8


def hit(judge: Judge, name: str, data: bytes | None) -> Files:
    """The cache with one file changed, and what it then holds."""
    after = {**judge.files, name: data or b""}
    if data is None:
        del after[name]
    restore(judge.path, after)
    return after


def test_what_the_message_says_mends_every_chunk_of_embeddings(judge: Judge) -> None:
    cache = FeatureCache.open(judge.path)
    embedded = [key for key in cache.chunks.manifest if key[0] in cache.header.embedded()]
    for i, (array, chunk) in enumerate(embedded):
        name = cache.layout(array).file(chunk)
        data = judge.files[name]
        damaged = (data[:-1] + bytes([data[-1] ^ 0x55]), data[:-1], None)[i % 3]
        hit(judge, name, damaged)
        found = observe(judge.path, "read")[array.removesuffix("_scale")]
        assert isinstance(found, Exception), (name, i)
        assert "repeat the build" in str(found)
        if damaged is not None:
            assert f"remove {judge.path / name}" in str(found)
            (judge.path / name).unlink()
        assert judge.build(judge.path).digest() == judge.digest
        assert not same(judge.files, snapshot(judge.path))
        restore(judge.path, judge.files)


def test_a_flip_in_a_chunk_of_embeddings_is_what_check_open_cannot_see(judge: Judge) -> None:
    """By design: sizes are compared at open, checksums at check="read" and by verify."""
    cache = FeatureCache.open(judge.path)
    for stream in cache.streams:
        name = cache.layout(stream).file(0)
        data = judge.files[name]
        hit(judge, name, bytes([data[0] ^ 1]) + data[1:])
        unseen = not isinstance(found := observe(judge.path, "open")[stream], Exception)
        assert unseen or (cache.layout(stream).compressed and is_clear(found))
        assert "is damaged" in str(observe(judge.path, "read")[stream])
        assert (
            f"chunk 0 of {stream} is damaged" in FeatureCache.open(judge.path).verify().problems[0]
        )
        restore(judge.path, judge.files)


EDITS = (
    ("zarr.json", b'"batch_size": 4', b'"batch_size": 5', "was edited or damaged"),
    ("zarr.json", b'"root": "nowhere"', b'"root": "somewhere"', "was edited or damaged"),
    ("quarantine.jsonl", b"cut off", b"cut of!", "is not the file that was sealed"),
    ("quarantine.jsonl", b'"row":', b'"row":1', "is not the file that was sealed"),
)
"""What no draw need hit: a file, what is in it, what it becomes, and the refusal."""


@pytest.mark.parametrize(("name", "old", "new", "message"), EDITS)
def test_an_edit_that_makes_sense_is_refused_too(
    name: str, old: bytes, new: bytes, message: str, fast_path: Path
) -> None:
    path = fast_path / "a.zarr"
    BUILDS["fixed"](path)
    data = (path / name).read_bytes()
    assert old in data
    (path / name).write_bytes(data.replace(old, new))
    for work in (FeatureCache.open, BUILDS["fixed"]):
        with pytest.raises(CacheCorrupt, match=message):
            work(path)
