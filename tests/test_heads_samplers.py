"""Partners: always of the right kind, uniform, the same under one seed, and read with their batch."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import make_drawn
from hypothesis import given
from hypothesis import strategies as st

from cache_builder import FeatureCache
from heads.base import Needs
from heads.errors import ConfigError
from heads.features import Batch
from heads.loader import Loader
from heads.samplers import PARTNERS, PartnerSampler
from heads.tasks import load_task

TRIPLETS = Needs(
    frozenset({"image/patches", "image/pooled"}),
    frozenset(),
    partners=frozenset({"same_attr", "same_obj"}),
)
SEVERAL_POOLS: dict[str, Any] = {"ram_limit": 30_000}
LABELS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=25)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    return make_drawn(tmp_path_factory.mktemp("samplers") / "drawn.zarr")


def loader(cache: FeatureCache, needs: Needs = TRIPLETS, **options: Any) -> Loader:
    data = load_task(cache, "czsl", "train")
    return Loader(data, needs, **{"batch_size": 5, "seed": 3, **options})


def possible(attr: np.ndarray, obj: np.ndarray, i: int, kind: str, among: set[int]) -> set[int]:
    """The definition: everybody who shares one primitive, and not the other."""
    if kind == "same_attr":
        return {j for j in among if attr[j] == attr[i] and obj[j] != obj[i]}
    return {j for j in among if obj[j] == obj[i] and attr[j] != attr[i]}


@given(LABELS, st.integers(0, 9), st.data())
def test_a_partner_shares_one_primitive_and_never_the_other(
    labels: list[tuple[int, int]], seed: int, data: st.DataObject
) -> None:
    attr, obj = np.array(labels).T
    everyone = range(len(labels))
    some = sorted(data.draw(st.sets(st.sampled_from(everyone), min_size=1)))
    sampler = PartnerSampler(attr, obj, seed=seed, epoch=1)
    for near in (None, sampler.among(np.array(some))):
        drawn = sampler.draw(np.arange(len(labels)), near)
        for i in everyone:
            for k, kind in enumerate(PARTNERS):
                wanted = possible(attr, obj, i, kind, set(everyone))
                close = possible(attr, obj, i, kind, set(some)) if near else wanted
                assert drawn.valid[i, k] == bool(wanted)
                assert drawn.elsewhere[i, k] == bool(wanted and not close)
                if wanted:
                    assert drawn.example[i, k] in (close or wanted)
                else:
                    assert drawn.example[i, k] in (some if near else everyone)


def test_partners_are_uniform() -> None:
    """Chi-squared over 4,000 epochs; 31 is the 99.9 % point of 11 degrees of freedom."""
    attr = np.array([0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0])
    obj = np.array([0, 0, 1, 1, 1, 2, 2, 0, 2, 2, 3, 3, 3, 3, 0])
    found: Counter[int] = Counter()
    for epoch in range(4000):
        sampler = PartnerSampler(attr, obj, seed=0, epoch=epoch)
        found[int(sampler.draw(np.array([1])).example[0, 0])] += 1
    wanted = possible(attr, obj, 1, "same_attr", set(range(len(attr))))
    assert set(found) == wanted
    expected = 4000 / len(wanted)
    assert sum((n - expected) ** 2 / expected for n in found.values()) < 31


def test_partners_depend_on_seed_and_epoch_alone() -> None:
    rng = np.random.default_rng(0)
    attr, obj = rng.integers(0, 3, 60), rng.integers(0, 4, 60)

    def drawn(seed: int, epoch: int, examples: np.ndarray) -> np.ndarray:
        return PartnerSampler(attr, obj, seed=seed, epoch=epoch).draw(examples).example

    whole = drawn(0, 0, np.arange(60))
    assert np.array_equal(drawn(0, 0, np.array([7, 3])), whole[[7, 3]])
    assert not np.array_equal(drawn(1, 0, np.arange(60)), whole)
    assert not np.array_equal(drawn(0, 1, np.arange(60)), whole)


def triplets(batch: Batch) -> list[tuple[tuple[int, int], ...]]:
    """(attr, obj) of each query and of its partners, with what their targets say."""
    rows = []
    parts = [(batch.queries, batch.target)]
    parts += [(batch.partners[k].features, batch.partners[k].target) for k in PARTNERS]
    for features, target in parts:
        attr, obj = (features.labels[name].tolist() for name in ("attr", "obj"))
        labels = list(zip(attr, obj, strict=True))
        columns = zip(
            *(batch.candidates.labels[name][target].tolist() for name in ("attr", "obj")),
            strict=True,
        )
        assert labels == list(columns)
        rows.append(labels)
    return list(zip(*rows, strict=True))


@pytest.mark.parametrize("options", [{}, SEVERAL_POOLS], ids=["memory", "pools"])
def test_every_batch_brings_the_values_of_its_partners(
    cache: FeatureCache, options: dict[str, Any]
) -> None:
    made = loader(cache, **options)
    assert (made.pools is not None) == bool(options)
    image_of = {
        tuple(cache.read("image/pooled", np.array([row]))[0].astype(np.float32).tolist()): row
        for row in made.plan.images[:, 0].tolist()
    }
    n = 0
    for batch in made.epoch(0):
        assert set(batch.partners) == set(PARTNERS)
        for main, same_attr, same_obj in zip(
            triplets(batch), *(batch.partners[k].valid.tolist() for k in PARTNERS), strict=True
        ):
            (a, o), of_attr, of_obj = main
            assert not same_attr or (of_attr[0] == a and of_attr[1] != o)
            assert not same_obj or (of_obj[1] == o and of_obj[0] != a)
            n += 1
        for features in (batch.queries, *(p.features for p in batch.partners.values())):
            rows = [image_of[tuple(v.tolist())] for v in features["image/pooled"]]
            patches = cache.read("image/patches", np.array(rows)).astype(np.float32)
            assert torch.equal(features["image/patches"], torch.from_numpy(patches))
    assert n == 37


def test_partners_of_a_quantised_cache_come_widened(tmp_path: Path) -> None:
    cache = make_drawn(tmp_path / "int8.zarr", storage="int8-channel")
    one, two = (loader(cache, **options) for options in ({}, SEVERAL_POOLS))
    assert two.pools is not None
    rows = one.plan.images[:, 0]
    for made in (one, two):
        for batch in made.epoch(0):
            partner = batch.partners["same_attr"]
            found = partner.features["image/patches"]
            stored = torch.from_numpy(cache.read("image/patches", rows))
            near = (found[:, None] - stored[None]).abs().flatten(2).amax(2)
            assert (near.min(1).values < 1e-5).all()
            attr = torch.from_numpy(made.plan.labels["attr"])[near.argmin(1)]
            assert torch.equal(attr, partner.features.labels["attr"])


def test_in_memory_partners_are_those_of_the_sampler(cache: FeatureCache) -> None:
    made = loader(cache)
    labels = made.plan.labels
    sampler = PartnerSampler(labels["attr"], labels["obj"], seed=3, epoch=2)
    order = np.random.default_rng([3, 2]).permutation(37)
    drawn = sampler.draw(order)
    for k, kind in enumerate(PARTNERS):
        found = torch.cat([b.partners[kind].features.labels["attr"] for b in made.epoch(2)])
        assert found.tolist() == labels["attr"][drawn.example[:, k]].tolist()


@pytest.mark.parametrize("options", [{}, SEVERAL_POOLS], ids=["memory", "pools"])
def test_an_epoch_taken_up_in_the_middle_has_the_same_partners(
    cache: FeatureCache, options: dict[str, Any]
) -> None:
    whole = [triplets(b) for b in loader(cache, **options).epoch(1)]
    for start in (1, 3, 7):
        assert [triplets(b) for b in loader(cache, **options).epoch(1, start)] == whole[start:]


def test_pools_read_each_chunk_once_and_a_row_only_where_a_pool_has_no_partner(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = loader(cache, **SEVERAL_POOLS)
    assert made.pools is not None
    chunks: list[int] = []
    rows: list[int] = []
    read_chunk, dense = made.pools.reader.read_chunk, made.source.dense
    monkeypatch.setattr(
        made.pools.reader, "read_chunk", lambda c, out: (chunks.append(c), read_chunk(c, out))[1]
    )
    monkeypatch.setattr(
        made.source, "dense", lambda s, r: (rows.extend(r.tolist()), dense(s, r))[1]
    )
    n_valid = sum(int(p.valid.sum()) for b in made.epoch(0) for p in b.partners.values())
    assert sorted(chunks) == made.pools.chunks.tolist()
    assert 0 < len(rows) < n_valid / 2


def test_a_head_without_partners_pays_nothing(cache: FeatureCache) -> None:
    batch = next(loader(cache, Needs(TRIPLETS.queries, frozenset())).epoch(0))
    assert batch.partners == {}
    only = next(
        loader(cache, Needs(TRIPLETS.queries, frozenset(), partners=frozenset({"same_obj"}))).epoch(
            0
        )
    )
    assert list(only.partners) == ["same_obj"]


def test_partners_travel_with_their_batch(cache: FeatureCache) -> None:
    batch = next(loader(cache).epoch(0)).to("meta")
    partner = batch.partners["same_attr"]
    tensors = [partner.target, partner.valid, partner.features["image/patches"]]
    assert {t.device.type for t in tensors} == {"meta"}


def test_only_labelled_pairs_have_partners(cache: FeatureCache) -> None:
    data = load_task(cache, "retrieval", "train")
    with pytest.raises(ConfigError, match=r"partners \(same_attr, same_obj\).*this is retrieval"):
        Loader(data, TRIPLETS, batch_size=4, seed=0)


def test_an_impossible_partner_is_masked() -> None:
    """One attr, one obj: everybody stands in for everybody, and nobody is valid."""
    sampler = PartnerSampler(np.zeros(4, np.int64), np.zeros(4, np.int64), seed=0, epoch=0)
    drawn = sampler.draw(np.arange(4))
    assert not drawn.valid.any()
    assert set(drawn.example.ravel().tolist()) <= {0, 1, 2, 3}
