"""Several processes build one cache: the same content as one, also when one of them is killed half-way."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranked.photos import Slow, photos
from stand_in import KeptStandIn, StandIn, WordStandIn, dataset

from cache_builder import FeatureCache, build
from cache_builder.beside import Beside
from cache_builder.cache import FeatureCache as Cache
from cache_builder.engines import Job, Ranks, Ray
from cache_builder.errors import CacheError
from cache_builder.filler import SIDES, Filler
from cache_builder.loading import Loading
from cache_builder.passes import Passes
from cache_builder.units import share, units

ROOT = Path(__file__).parent.parent
N = 120
JOB = Job(backbone="ranked.photos:wait0.02", dataset="ranked.photos", root=str(N), workers=1)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    monkeypatch.setenv("HEADSTART_TEST_SIGNS", str(tmp_path))


def make(path: Path, *, wait: float = 0.0, **options: Any) -> FeatureCache:
    """Built at a speed that leaves others time to come."""
    given = {"batch_size": 4, "chunk_bytes": 100, "progress": False}
    return build(photos(N), Slow(wait), path, **{**given, **options})


@pytest.fixture(scope="module")
def alone(fast_folder: Path) -> FeatureCache:
    return make(fast_folder / "alone.zarr")


@pytest.mark.parametrize("kind", [StandIn, KeptStandIn, WordStandIn])
@pytest.mark.parametrize("storage", ["fp16", "int8-channel"])
def test_units_are_all_that_is_missing_each_chunk_in_one(
    kind: type[StandIn], storage: str, fast_path: Path
) -> None:
    cache = build(
        dataset(30, 20),
        kind(),
        fast_path / "c.zarr",
        storage=storage,
        batch_size=4,
        chunk_bytes=100,
        progress=False,
    )
    assert not any(units(cache, side) for side in SIDES)
    (fast_path / "c.zarr/manifest.jsonl").write_text("")
    cache.chunks.refresh()
    seen: list[tuple[str, int]] = []
    for side in SIDES:
        found = units(cache, side)
        seen += [key for unit in found.values() for key in unit]
        # Every unit can be built alone: the batches it asks for hold all rows of its chunks.
        for unit in found.values():
            filler = Filler(cache, side, unit)
            rows = {r for batch in filler.batches for r in batch}
            for name, chunk in unit:
                layout = cache.layout(name.removesuffix("_scale"))
                first, last = filler.rows_of(layout, *layout.bounds(chunk))
                assert set(range(first, last + 1)) <= rows
    streams = {*cache.streams, *(f"{s}_scale" for s in cache.streams)} & set(cache.header.arrays)
    every = [(name, c) for name in streams for c in range(cache.layout(name).n_chunks)]
    assert sorted(seen) == sorted(every)


def test_two_ranks_give_the_content_of_one_process(
    alone: FeatureCache, fast_path: Path, tmp_path: Path
) -> None:
    cache = make(fast_path / "c.zarr", wait=0.3, engine=Ranks(JOB, ["cpu", "cpu"]))
    assert cache.digest() == alone.header.digest
    assert cache.verify().ok
    assert len(list(tmp_path.glob("begun-*"))) == 2, "one of them did nothing"
    assert sorted(p.name for p in cache.path.glob("*.jsonl")) == [
        "builds.jsonl",
        "manifest.jsonl",
        "quarantine.jsonl",
    ]
    assert not (cache.path / "claims").exists()
    assert set(cache.quarantined) == {"i3", "i8"}


def killed_once_begun(signs: Path, mine: int) -> threading.Thread:
    """Kills the first process besides `mine` that says it has begun."""

    def watch() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for sign in signs.glob("begun-*"):
                pid = int(sign.name.partition("-")[2])
                if pid != mine:
                    time.sleep(0.1)
                    os.kill(pid, signal.SIGKILL)
                    (signs / "killed").touch()
                    return
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_killed_rank_costs_nothing_but_time(
    alone: FeatureCache, fast_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watcher = killed_once_begun(tmp_path, os.getpid())
    cache = make(fast_path / "c.zarr", wait=0.3, engine=Ranks(JOB, ["cpu", "cpu"]))
    watcher.join()
    assert (tmp_path / "killed").exists()
    assert cache.digest() == alone.header.digest
    assert cache.verify().ok
    assert "rank 1 ended with status -9; others did its share" in caplog.text


def test_ranks_end_with_the_process_that_started_them(fast_path: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom test_cache_engines import *\n"
        "job = replace(JOB, backbone='ranked.photos:wait0.3')\n"
        "make(Path(sys.argv[1]), wait=0.3, engine=Ranks(job, ['cpu', 'cpu']))"
    )
    main = subprocess.Popen([sys.executable, "-c", code, str(fast_path / "c.zarr")], cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("begun-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    main.kill()
    main.wait()
    pids = [int(s.name.partition("-")[2]) for s in tmp_path.glob("begun-*")]
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "a rank outlived its parent"
        time.sleep(0.05)


def test_a_rank_with_other_samples_is_refused_and_the_build_goes_on(
    alone: FeatureCache, fast_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = replace(JOB, root=str(N - 1))
    cache = make(fast_path / "c.zarr", wait=0.3, engine=Ranks(other, ["cpu", "cpu"]))
    assert cache.digest() == alone.header.digest
    assert "dataset.n_images: expected 119, found 120" in capfd.readouterr().err


def test_processes_that_share_without_claims_agree_all_the_same(
    alone: FeatureCache, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an object store, where two may build the same unit."""
    from contextlib import nullcontext

    path = fast_path / "c.zarr"

    class Helper:
        def helping(self, passes: Passes) -> Any:
            monkeypatch.setattr(type(passes.cache.place), "claimed", lambda *_: nullcontext(True))
            threads = [threading.Thread(target=help_out, args=(passes, i)) for i in (0, 0, 1)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return nullcontext()

    def help_out(passes: Passes, rank: int) -> None:
        writer = f"w{threading.get_ident()}"
        cache = Cache(passes.cache.place, passes.cache.header, writer=writer)
        share(replace(passes, cache=cache), rank, 2)

    cache = make(path, engine=Helper())
    assert cache.digest() == alone.header.digest
    assert cache.verify().ok


def test_a_picture_that_another_builder_has_refused_meanwhile_is_no_contradiction(
    alone: FeatureCache,
) -> None:
    cache = Cache(alone.place, alone.header, writer="late")
    records = {record.id: record for record in photos(N).images}
    mine = [records[image] for image in alone.image_ids]
    late: Any = Loading(cache, mine, Slow(0.0), 1, False, Beside("cpu"))
    for bad in alone.bad_images():
        late.bad = set()  # what was known when this builder began
        late._refuse(bad.row, "cut off")
        assert late.bad == {bad.id}
    assert len(alone.bad_images()) == len(cache.bad_images()) > 1
    good = next(row for row, image in enumerate(alone.image_ids) if image not in alone.quarantined)
    with pytest.raises(CacheError, match="could be when image/"):
        late._refuse(good, "cut off")


@pytest.mark.slow
def test_torchrun_starts_ranks_that_find_each_other(fast_path: Path) -> None:
    """Two ranks of one torchrun: rank 0 lays out and seals, rank 1 joins."""
    out = fast_path / "c.zarr"
    command = [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "cache_builder.cli", "build", "--backbone", "ranked.photos:wait0.05"),
        *(
            "--dataset",
            "ranked.photos",
            "--root",
            str(N),
            "--batch-size",
            "4",
            "--out",
            str(out),
        ),
    ]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "0")
        one = build(photos(N), Slow(0), fast_path / "one.zarr", batch_size=4, progress=False)
    assert FeatureCache.open(out).digest() == one.digest()


@pytest.mark.slow
def test_a_ray_cluster_gives_the_content_of_one_process_and_survives_an_actor(
    alone: FeatureCache, fast_path: Path, tmp_path: Path
) -> None:
    watcher = killed_once_begun(tmp_path, os.getpid())
    cache = make(fast_path / "c.zarr", engine=Ray(JOB, actors=2))
    watcher.join()
    assert (tmp_path / "killed").exists()
    assert cache.digest() == alone.header.digest
    assert cache.verify().ok
    assert len(list(tmp_path.glob("begun-*"))) >= 2, "one actor did everything"


def test_quarantine_of_all_helpers_is_one(fast_path: Path) -> None:
    cache = make(fast_path / "c.zarr", wait=0.3, engine=Ranks(JOB, ["cpu", "cpu"]))
    for stream in ("image/pooled", "image/patches", "image/prefix"):
        bad = np.isnan(cache.read(stream)).reshape(N, -1).all(1)
        assert {cache.image_ids[i] for i in np.flatnonzero(bad)} == {"i3", "i8"}


def test_where_two_disagree_the_file_decides_and_a_damaged_one_is_written_again(
    fast_path: Path,
) -> None:
    whole = build(photos(20), Slow(0), fast_path / "c.zarr", batch_size=4, progress=False)
    digest, key = whole.header.digest, ("image/patches", 0)
    true = whole.chunks.manifest[key]
    wrong = true.model_copy(update={"crc32c": "00000000"})

    def rebuilt(lines: list[Any], damage: bool) -> FeatureCache:
        whole.unseal()
        part = fast_path / "c.zarr/manifest-other.jsonl"
        part.write_text("".join(f"{line.model_dump_json()}\n" for line in lines))
        file = whole.chunks.file(*key)
        if damage:
            file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
        return build(photos(20), Slow(0), fast_path / "c.zarr", batch_size=4, progress=False)

    for lines in ([wrong], [wrong, true], [true, wrong]):
        for damage in (False, True):
            cache = rebuilt(lines, damage)
            assert cache.header.digest == digest
            assert cache.verify().ok


def test_a_builder_waits_for_helpers_of_one_that_died(fast_path: Path) -> None:
    cache = make(fast_path / "c.zarr")
    cache.unseal()
    order: list[str] = []
    begun = threading.Event()

    def orphan() -> None:
        with cache.place.helping():
            begun.set()
            time.sleep(1)
            order.append("helper")

    thread = threading.Thread(target=orphan)
    thread.start()
    begun.wait()
    make(fast_path / "c.zarr")
    order.append("builder")
    thread.join()
    assert order == ["helper", "builder"]
