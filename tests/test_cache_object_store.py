"""A cache on an object store, a real S3 protocol server on loopback: the same content, whatever the network does."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from object_store import BUCKET, answering, failing, s3_server, strict_about_keys
from stand_in import StandIn, WordStandIn, dataset

from cache_builder import FeatureCache, build, lock
from cache_builder.bucket import Bucket
from cache_builder.build_log import build_seconds
from cache_builder.errors import (
    CacheCorrupt,
    CacheError,
    CacheIncomplete,
    CacheLocked,
    CacheMismatch,
    CacheNotFound,
)
from cache_builder.place import Folder, at

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as where:
        yield where


@pytest.fixture(autouse=True)
def _account(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.3)
    for key, value in {
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ENDPOINT_URL": f"http://{server}",
    }.items():
        monkeypatch.setenv(key, value)


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    return f"s3://{BUCKET}/{request.node.name}/c.zarr"


def make(where: str | Path, **options: Any) -> FeatureCache:
    given = {"batch_size": 4, "chunk_bytes": 200, "progress": False, "inner_rows": 2}
    return build(dataset(40, 12, bad=(3, 8)), StandIn(), where, **{**given, **options})  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def local(fast_folder: Path) -> FeatureCache:
    return make(fast_folder / "local.zarr")


def test_a_cache_on_a_store_is_the_cache_in_a_folder(url: str, local: FeatureCache) -> None:
    cache = make(url)
    assert cache.digest() == local.header.digest
    assert cache.verify().ok
    assert cache.image_ids == local.image_ids
    assert cache.texts == local.texts
    assert cache.tasks == local.tasks
    for stream in cache.streams:
        rows = np.array([7, 0, 7, 3])
        if cache.is_ragged(stream):
            for a, b in zip(cache.read_ragged(stream), local.read_ragged(stream), strict=True):
                np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_array_equal(cache.read(stream), local.read(stream))
            np.testing.assert_array_equal(cache.read(stream, rows), local.read(stream, rows))
    names = cache.place.names()
    journals = [n for n in names if n.endswith(".jsonl")]
    assert [n for n in journals if not n.startswith("builds")] == [
        "manifest.jsonl",
        "quarantine.jsonl",
    ]
    assert build_seconds(cache.place) is not None
    assert "lock" not in names
    assert make(url).digest() == local.header.digest  # finished: nothing to do


def test_every_kind_of_array_lives_there(url: str) -> None:
    data = dataset(9, 5)
    for storage in ("int8-channel", "lossless"):
        cache = build(data, WordStandIn(), f"{url}-{storage}", storage=storage, progress=False)
        assert cache.verify().ok
        assert cache.read("image/patches").shape == (9, 5, 3)
        assert cache.read_ragged("word/states")[0].shape[1] == 4


def test_plain_zarr_reads_it_there(url: str, local: FeatureCache) -> None:
    cache = make(url)
    group: Any = zarr.open_group(cache.place.zarr_store(), mode="r")
    np.testing.assert_array_equal(group["image/patches"][:], local.read("image/patches"))
    np.testing.assert_array_equal(group["image/patches"][5:7], local.read("image/patches")[5:7])
    assert group["image/patches"].shards == local.layout("image/patches").chunk_shape


@pytest.mark.parametrize("seed", [0, 1])
def test_dropped_connections_and_busy_servers_change_nothing(
    url: str, server: str, local: FeatureCache, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with failing(server, 0.15, seed) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
        cache = make(url)
        assert cache.verify().ok
        assert cache.digest() == local.header.digest
        faults = proxy.faults
    assert faults.total() - faults["none"] > 20, faults
    assert min(faults[f] for f in ("busy", "dropped before", "dropped after")) > 3, faults


def test_a_store_that_is_gone_is_one_sentence_and_loses_nothing(
    url: str, server: str, local: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache_builder.bucket.RETRY", {"max_retries": 1})
    with failing(server, 0.0) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")

        def gone(outputs: Any) -> Any:
            if len(backbone.encoded) > 8:
                proxy.share = 1.0
            return outputs

        backbone = StandIn(gone)
        with pytest.raises(
            CacheError,
            match=r"(answered 503|cannot be reached).*, tried 2 times.* what is finished is kept",
        ):
            build(
                dataset(40, 12, bad=(3, 8)),
                backbone,
                url,
                batch_size=4,
                chunk_bytes=200,
                inner_rows=2,
                progress=False,
            )
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server}")
    half = FeatureCache.open(url, allow_building=True)
    assert 0 < len(half.chunks.unlisted()) < half.chunks.total
    with pytest.raises(CacheIncomplete):
        FeatureCache.open(url)
    again = StandIn()
    cache = build(
        dataset(40, 12, bad=(3, 8)),
        again,
        url,
        batch_size=4,
        chunk_bytes=200,
        inner_rows=2,
        progress=False,
    )
    assert cache.digest() == local.header.digest
    assert sum(again.encoded) < 52, "nothing was kept"


BUILD = ["build", "--backbone", "clip:demo", "--dataset", "toy_world", "--set", "scale=0.01"]


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command that fails says: one sentence."""
    from cache_builder.cli import main

    assert main(list(words)) == 1
    said = capsys.readouterr().err.splitlines()
    lines = [line for line in said if not line.startswith("127.0.0.1 - - ")]  # moto's own
    assert len(lines) == 1
    assert "<" not in lines[0]
    return lines[0]


def test_a_bucket_that_is_not_there_is_named(
    server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    where = f"there is no bucket 'no-such-bucket' at http://{server} (404 Not Found NoSuchBucket): create it"
    for words in ([*BUILD, "--out", "s3://no-such-bucket/x"], ["info", "s3://no-such-bucket/x"]):
        assert where in told(capsys, *words)


def test_wrong_credentials_are_one_sentence(
    server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with strict_about_keys(server):
        said = told(capsys, *BUILD, "--out", f"s3://{BUCKET}/x")
    assert f"bucket '{BUCKET}' at http://{server} refused the credentials (403 Forbidden" in said
    assert "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY" in said


def test_wrong_endpoints_are_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache_builder.bucket.RETRY", {"max_retries": 1})
    nobody = "http://127.0.0.1:9"
    for endpoint, sentence in {
        nobody: f"bucket 'b' at {nobody} cannot be reached, tried 2 times: check AWS_ENDPOINT_URL",
        "moon base": "AWS_ENDPOINT_URL is 'moon base', which is no address of an object store",
        "ftp://x": "AWS_ENDPOINT_URL is 'ftp://x', which is no address of an object store",
    }.items():
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        assert sentence in told(capsys, "info", "s3://b/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", nobody)
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    assert "set AWS_ALLOW_HTTP=true" in told(capsys, "info", "s3://b/x")


@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (404, "<html>no such page</html>", "is not there, nor any object store (404 Not Found)"),
        (
            400,
            "<Error><Code>AuthorizationHeaderMalformed</Code></Error>",
            "set AWS_REGION to its own",
        ),
        (
            403,
            "<Error><Code>AccessDenied</Code></Error>",
            "(403 Forbidden AccessDenied): check AWS_",
        ),
        (418, "<html>tea</html>", "answered 418 I'm a teapot; what is finished is kept"),
    ],
)
def test_whatever_a_server_answers_is_one_sentence(
    status: int,
    body: str,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with answering(status, f'<?xml version="1.0"?>\n{body}') as where:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{where}")
        said = told(capsys, "info", "s3://b/x")
    assert f"bucket 'b' at http://{where} " in said
    assert sentence in said


def test_a_killed_build_is_taken_over_when_its_lock_no_longer_beats(
    url: str, local: FeatureCache
) -> None:
    code = (
        "import sys, time\nsys.path.insert(0, 'tests')\nfrom stand_in import *\n"
        "from cache_builder import build, lock\nlock.BEAT = 0.3\n"
        "def slow(outputs): print('batch', flush=True); time.sleep(.2); return outputs\n"
        "build(dataset(40, 12, bad=(3, 8)), StandIn(slow), sys.argv[1], batch_size=4, chunk_bytes=200,"
        " inner_rows=2, progress=False)"
    )
    builder = subprocess.Popen(
        [sys.executable, "-c", code, url], stdout=subprocess.PIPE, cwd=ROOT, env=os.environ
    )
    assert builder.stdout is not None
    for _ in range(7):
        assert builder.stdout.readline() == b"batch\n"
    with pytest.raises(CacheLocked, match=f"pid {builder.pid} on "):
        make(url)
    builder.send_signal(signal.SIGKILL)
    builder.communicate()
    assert "lock" in at(url).names()
    started = time.monotonic()
    cache = make(url)
    assert time.monotonic() - started > 0.8, "it did not wait for a sign of life"
    assert cache.digest() == local.header.digest


ELSEWHERE = b"pid 1 on elsewhere 0badcafe 1234"
"""A lock as another process puts it."""


def test_who_lost_the_lock_writes_no_more_and_leaves_the_new_one(url: str) -> None:
    mine, other = Bucket.named(url), Bucket.named(url)
    with lock.locked(mine):
        mine.write("tasks.json", b"before")
        other.write("lock", ELSEWHERE)
        for _ in range(600):  # until the next beat
            if mine.lost:
                break
            time.sleep(0.05)
        with pytest.raises(CacheLocked, match=r"was taken over .* no sign of life"):
            mine.write("tasks.json", b"after")
    assert other.read("tasks.json") == b"before"
    assert other.read("lock") == ELSEWHERE


def test_a_lock_whose_holder_ends_while_it_is_watched_is_free(url: str) -> None:
    other = Bucket.named(url)
    other.write("lock", ELSEWHERE)
    ending = threading.Timer(0.4, other.remove, ["lock"])
    ending.start()
    with lock.locked(Bucket.named(url)):
        assert other.read("lock").startswith(f"pid {os.getpid()} on ".encode())
    ending.join()
    assert "lock" not in other.names()


@pytest.mark.parametrize("taken", [True, False], ids=["taken", "given back"])
def test_of_two_who_take_over_one_lock_the_later_is_refused(
    url: str, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    """The other one was there between the last look at the silent lock and the request that takes it."""
    other, watch = Bucket.named(url), lock._silent_holder
    other.write("lock", b"pid 2 on nowhere 0badcafe 1234")

    def watched(bucket: Bucket) -> str | None:
        tag = watch(bucket)
        if taken:
            other.write("lock", ELSEWHERE)
        else:
            other.remove("lock")
        return tag

    monkeypatch.setattr(lock, "_silent_holder", watched)
    with (
        pytest.raises(CacheLocked, match=r"was just taken over .* repeat the command"),
        lock.locked(Bucket.named(url)),
    ):
        pass
    assert ("lock" in other.names()) == taken
    if taken:
        assert other.read("lock") == ELSEWHERE


def test_bad_bytes_are_seen_there_too(url: str) -> None:
    cache = make(url)
    name = cache.chunks.name("image/patches", 1)
    data = bytearray(cache.place.read(name))
    data[10] ^= 1
    cache.place.write(name, bytes(data))
    with pytest.raises(CacheCorrupt, match="is damaged"):
        FeatureCache.open(url, check="read").read("image/patches")
    assert any("chunk 1 of image/patches is damaged" in p for p in cache.verify().problems)
    cache.place.write(name, bytes(data[:-3]))
    with pytest.raises(CacheCorrupt, match="232 were written"):
        FeatureCache.open(url).read("image/patches")
    cache.place.remove(name)
    with pytest.raises(CacheIncomplete, match="chunk 1 of image/patches is missing"):
        FeatureCache.open(url).read("image/patches")
    assert make(url).verify().ok  # repaired


def test_something_else_there_is_refused_and_not_touched(url: str) -> None:
    with pytest.raises(CacheNotFound, match=r"no feature cache at s3://"):
        FeatureCache.open(url)
    place = at(url)
    place.write("thesis.txt", b"mine")
    with pytest.raises(CacheNotFound, match="is not a feature cache"):
        make(url)
    assert place.read("thesis.txt") == b"mine"
    other = f"{url}-other"
    make(other)
    with pytest.raises(CacheMismatch, match="storage: expected 'fp32', found 'fp16'"):
        make(other, storage="fp32")
    with pytest.raises(CacheError, match="append to a cache in a folder"):
        make(other, append=True)


def test_nothing_is_linked_to_or_from_a_store(url: str, tmp_path: Path) -> None:
    folder, bucket = Folder(tmp_path), Bucket.named(url)
    bucket.write("tasks.json", b"{}")
    (tmp_path / "lock").touch()
    assert not folder.link(bucket, "tasks.json")
    assert not bucket.link(folder, "lock")
    assert (folder.names(), bucket.names()) == (["lock"], ["tasks.json"])


def test_a_url_names_a_bucket_and_anything_else_a_folder() -> None:
    assert isinstance(at("s3://b/x.zarr"), Bucket)
    assert str(at(Path("s3://b/x.zarr"))) == "s3://b/x.zarr"  # pathlib swallows a slash
    assert at("s3://b/deep/x.zarr/").name == "x.zarr"
    assert isinstance(at("caches/x.zarr"), Folder)
    with pytest.raises(CacheError, match="lies on an object store, not in a folder"):
        _ = FeatureCache.path.fget(type("C", (), {"place": at("s3://b/x")})())  # pyright: ignore[reportOptionalCall]


def test_the_command_line_takes_urls(
    url: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from pictures_on_disk import write_pictures

    from cache_builder.cli import main

    root = write_pictures(tmp_path / "p", {f"{i}.png": i for i in range(6)}, (40, 30))
    command = ["build", "--backbone", "clip:demo", "--dataset", "folder", "--root", str(root)]
    assert main([*command, "--streams", "image/pooled", "text/pooled", "--out", url]) == 0
    assert f"cache: {url}" in capsys.readouterr().out
    assert main(["verify", url]) == 0
    assert main(["info", url]) == 0
    assert f"{url}: sealed" in capsys.readouterr().out
