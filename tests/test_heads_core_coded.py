"""Heads read caches of every storage mode: held in memory, on the device, in pools or on disk, the same numbers."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from stand_in import KeptStandIn, StandIn, dataset

from cache_builder import FeatureCache, build
from cache_builder.storage import MODES
from heads.base import Needs
from heads.coded import Coded, read_stored
from heads.loader import Loader
from heads.source import Source
from heads.tasks import load_task

NEEDS = Needs(frozenset({"image/patches", "image/pooled"}), frozenset({"text/pooled"}))
STORAGES = sorted(set(MODES) - {"pool2x2"})


def make(path: Path, storage: str, backbone: StandIn | None = None) -> FeatureCache:
    given = {"batch_size": 4, "chunk_bytes": 200, "progress": False}
    return build(dataset(40), backbone or StandIn(), path, storage=storage, **given)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    "limits", [(1 << 30, 0), (0, 0), (1 << 30, 1 << 30)], ids=["ram", "pools", "device"]
)
def test_a_batch_holds_what_the_cache_reads(
    storage: str, limits: tuple[int, int], fast_path: Path
) -> None:
    cache = make(fast_path / "c.zarr", storage)
    data = load_task(cache, "czsl", "train")
    ram, device = limits
    loader = Loader(data, NEEDS, batch_size=7, seed=0, ram_limit=ram, device_limit=device)
    assert (loader.pools is not None) == (ram == 0)
    parts = loader._order(np.random.default_rng([0, 0]), 0, None)
    order = np.concatenate([part.index for part in parts])
    seen = 0
    for batch in loader.epoch(0):
        n = len(batch.queries)
        rows = data.images[order[seen : seen + n]]
        seen += n
        for stream in NEEDS.queries:
            expected = cache.read(stream, rows).astype(np.float32)
            np.testing.assert_allclose(
                batch.queries[stream].numpy(), expected, rtol=1e-6, atol=1e-6
            )
    assert seen == 40


@pytest.mark.parametrize("storage", STORAGES)
def test_ragged_rows_are_padded_as_read(storage: str, fast_path: Path) -> None:
    cache = make(fast_path / "c.zarr", storage, KeptStandIn())
    needs = Needs(frozenset({"image/patches"}), frozenset())
    rows = np.array([3, 0, 3, 17])
    for ram in (1 << 30, 0):
        source = Source(cache, needs, np.arange(40), np.arange(0), ram_limit=ram)
        found = source.images(rows)
        values, offsets = cache.read_ragged("image/patches", rows)
        for i, (start, stop) in enumerate(pairwise(offsets.tolist())):
            got = found["image/patches"][i]
            np.testing.assert_allclose(
                got[: stop - start], values[start:stop], rtol=1e-6, atol=1e-6
            )
            assert not got[stop - start :].any()


def test_eight_bits_stay_eight_bits_until_a_batch_is_made(fast_path: Path) -> None:
    cache = make(fast_path / "c.zarr", "int8-channel")
    held = read_stored(cache, "image/patches", np.arange(40))
    assert isinstance(held, Coded)
    assert held.values.dtype == torch.int8
    moved = held.to("cpu")
    assert moved.mean is not None
    rows = torch.tensor([4, 1])
    expected = cache.read("image/patches", rows.numpy())
    np.testing.assert_allclose(moved.take(rows, torch.device("cpu")).numpy(), expected, rtol=1e-6)
    bf16 = read_stored(make(fast_path / "b.zarr", "bf16"), "image/patches", np.arange(40))
    assert isinstance(bf16, torch.Tensor)
    assert bf16.dtype == torch.bfloat16
