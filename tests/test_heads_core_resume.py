"""An interrupted epoch goes on with exactly the batches it had left; streams held on the device give the same ones."""

import numpy as np
import pytest
import torch
from drawn import make_drawn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache_builder import FeatureCache
from cache_builder.reader import ChunkReader
from heads.base import Needs
from heads.features import Batch
from heads.loader import Loader
from heads.tasks import load_task

STREAMS = Needs(
    frozenset({"image/pooled", "image/patches"}), frozenset({"text/tokens", "text/ids"})
)
KINDS = [
    ("czsl", "none"),
    ("matching", "text"),
    ("two_by_two", "image_text"),
    ("retrieval", "none"),
]
lightly = settings(
    derandomize=True,
    deadline=None,
    max_examples=12,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    return make_drawn(tmp_path_factory.mktemp("resume") / "drawn.zarr")


def equal(one: Batch, other: Batch) -> bool:
    pairs = [(one.queries, other.queries), (one.candidates, other.candidates)]
    return (
        all(a.streams.keys() == b.streams.keys() for a, b in pairs)
        and all(torch.equal(a[s], b[s]) for a, b in pairs for s in a.streams)
        and all(torch.equal(v, b.labels[n]) for a, b in pairs for n, v in a.labels.items())
        and torch.equal(one.target, other.target)
        and torch.equal(one.ignore, other.ignore)
        and torch.equal(one.negative, other.negative)
    )


@pytest.mark.parametrize(("task", "negatives"), KINDS)
@lightly
@given(
    half=st.integers(1, 9),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
    ram=st.sampled_from([None, 0, 40_000]),
    data=st.data(),
)
def test_an_epoch_resumed_at_any_batch_is_the_rest_of_it(
    cache: FeatureCache,
    task: str,
    negatives: str,
    half: int,
    seed: int,
    epoch: int,
    ram: int | None,
    data: st.DataObject,
) -> None:
    def loader() -> Loader:
        return Loader(
            load_task(cache, task, "train"),
            STREAMS,
            batch_size=2 * half,
            seed=seed,
            negatives=negatives,  # pyright: ignore[reportArgumentType]
            ram_limit=ram,
        )

    whole = list(loader().epoch(epoch))
    start = data.draw(st.integers(0, len(whole)))
    again = loader()
    rest = list(again.epoch(epoch, start))
    assert len(rest) == len(whole) - start
    assert all(equal(a, b) for a, b in zip(whole[start:], rest, strict=True))
    # Nor does the resumed epoch leave a trace in the next one.
    assert all(
        equal(a, b) for a, b in zip(loader().epoch(epoch + 1), again.epoch(epoch + 1), strict=True)
    )


@pytest.mark.parametrize("start", [-1, 38])
def test_a_start_outside_the_epoch_is_refused(cache: FeatureCache, start: int) -> None:
    loader = Loader(load_task(cache, "czsl", "train"), STREAMS, batch_size=1, seed=0)
    assert len(loader) == 37
    with pytest.raises(ValueError, match=rf"batches 0 … 36, cannot start at {start}"):
        next(loader.epoch(0, start))


def test_pools_before_the_start_are_not_read(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    true_read = ChunkReader.read_chunk

    def recorded(self: ChunkReader, chunk: int, out: np.ndarray) -> int:
        read.append(chunk)
        return true_read(self, chunk, out)

    monkeypatch.setattr(ChunkReader, "read_chunk", recorded)
    needs = Needs(frozenset({"image/patches"}), frozenset({"text/pooled"}))
    loader = Loader(
        load_task(cache, "czsl", "train"), needs, batch_size=2, seed=3, ram_limit=30_000
    )
    assert loader.pools is not None
    assert len(_pool_order(loader, epoch=0)) >= 4
    list(loader.epoch(0))
    assert sorted(read) == loader.pools.chunks.tolist()  # each chunk once
    for start in range(len(loader) + 1):
        read.clear()
        rest = sum(len(b.queries) for b in loader.epoch(0, start))
        order = _pool_order(loader, epoch=0)
        needed, before = set(), 37
        for chunks, members in reversed(order):
            before -= members
            needed |= set(chunks) if before + members > 37 - rest else set()
        assert set(read) == needed
        assert len(read) == len(needed)
    assert not read  # nothing is left to read at the end


def _pool_order(loader: Loader, epoch: int) -> list[tuple[list[int], int]]:
    """Chunks and number of examples of each pool, in the order of an epoch."""
    assert loader.pools is not None
    rng = np.random.default_rng([loader.seed, epoch])
    loader.plan.captions(rng)
    return [
        (loader.pools.chunks[pool].tolist(), len(members))
        for pool, members, _ in loader.pools._planned(rng, 0)
    ]


def test_two_epochs_at_once_do_not_disturb_each_other(cache: FeatureCache) -> None:
    def loader() -> Loader:
        data = load_task(cache, "czsl", "train")
        return Loader(data, STREAMS, batch_size=3, seed=0, ram_limit=30_000)

    shared = loader()
    alone = [list(loader().epoch(e)) for e in range(2)]
    for i, pair in enumerate(zip(shared.epoch(0), shared.epoch(1), strict=True)):
        assert equal(pair[0], alone[0][i])
        assert equal(pair[1], alone[1][i])


@pytest.mark.parametrize(("task", "negatives"), KINDS)
def test_streams_held_on_the_device_give_the_same_batches(
    cache: FeatureCache, task: str, negatives: str
) -> None:
    def loader(device_limit: int | None) -> Loader:
        return Loader(
            load_task(cache, task, "train"),
            STREAMS,
            batch_size=6,
            seed=1,
            negatives=negatives,  # pyright: ignore[reportArgumentType]
            device_limit=device_limit,
        )

    memory, device = loader(None), loader(1 << 30)
    assert memory.source.on_device == ()  # on the CPU, memory is the device's already
    assert set(device.source.on_device) == {*STREAMS.queries, *STREAMS.candidates}
    for one, other in zip(memory.epoch(0), device.epoch(0), strict=True):
        assert equal(one, other)


def test_what_the_device_cannot_hold_goes_to_memory_and_then_to_disk(
    cache: FeatureCache,
) -> None:
    data = load_task(cache, "czsl", "train")
    size = {s: 37 * cache.layout(s).row_bytes for s in ("image/pooled", "image/patches")}
    needs = Needs(frozenset(size), frozenset())
    small, large = size["image/pooled"], size["image/patches"]
    for device, ram, places in (
        (small + large, 0, (("image/pooled", "image/patches"), ())),
        (small + large - 1, large, (("image/pooled",), ())),
        (small, large - 1, (("image/pooled",), ("image/patches",))),
        (small - 1, small, ((), ("image/patches",))),
    ):
        source = Loader(
            data, needs, batch_size=4, seed=0, ram_limit=ram, device_limit=device
        ).source
        assert (source.on_device, source.on_disk) == places


def test_memory_of_batches_is_used_again(cache: FeatureCache) -> None:
    for ram in (None, 30_000):
        loader = Loader(
            load_task(cache, "czsl", "train"), STREAMS, batch_size=4, seed=0, ram_limit=ram
        )
        places = {b.queries["image/patches"].data_ptr() for e in range(3) for b in loader.epoch(e)}
        assert len(places) <= 3
