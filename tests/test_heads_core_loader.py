"""Tasks joined with rows, and the batches made of them."""

from collections import Counter
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import make_drawn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache_builder import FeatureCache
from cache_builder.errors import CacheError
from heads.base import Needs
from heads.errors import ConfigError, MissingStream, TaskError
from heads.features import Batch
from heads.loader import Loader
from heads.source import Source
from heads.tasks import CompositionData, MatchingData, RetrievalData, TaskData, load_task

TOKENS = Needs(frozenset({"image/patches"}), frozenset({"text/tokens", "text/ids"}))
POOLED = Needs(frozenset({"image/pooled"}), frozenset({"text/pooled"}))
BOTH = Needs(POOLED.queries | TOKENS.queries, POOLED.candidates | TOKENS.candidates)
TOO_LITTLE = 30_000
"""Bytes of memory in which pooled embeddings fit and patches do not."""

KINDS = [
    ("czsl", "none"),
    ("matching", "none"),
    ("matching", "text"),
    ("two_by_two", "none"),
    ("two_by_two", "text"),
    ("two_by_two", "image_text"),
    ("retrieval", "none"),
]
lightly = settings(
    derandomize=True,
    deadline=None,
    max_examples=10,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    return make_drawn(tmp_path_factory.mktemp("loader") / "drawn.zarr")


def rows_of(values: torch.Tensor, cache: FeatureCache, stream: str) -> list[int]:
    """Cache rows whose values these are."""
    stored = cache.read(stream).astype(np.float32).reshape(len(cache.image_ids), -1)
    index = {row.tobytes(): i for i, row in enumerate(stored)}
    assert len(index) == len(stored)
    return [index[row.tobytes()] for row in values.flatten(1).numpy()]


def image_rows(data: TaskData, negatives: str) -> Counter[int]:
    """Rows that one epoch must show."""
    if isinstance(data, MatchingData):
        return Counter(data.images.reshape(-1).tolist())
    return Counter(data.images.tolist())


@pytest.mark.parametrize(("task", "negatives"), KINDS)
@lightly
@given(
    half=st.integers(1, 20),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
    ram=st.sampled_from([None, 0]),
)
def test_every_example_comes_once_an_epoch_with_its_own_values(
    cache: FeatureCache,
    task: str,
    negatives: str,
    half: int,
    seed: int,
    epoch: int,
    ram: int | None,
) -> None:
    data = load_task(cache, task, "train")
    loader = Loader(
        data,
        BOTH,
        batch_size=2 * half,
        seed=seed,
        negatives=negatives,  # pyright: ignore[reportArgumentType]
        ram_limit=ram,
    )
    assert ("image/patches" in loader.source.on_disk) == (ram is not None)
    batches = list(loader.epoch(epoch))
    assert len(batches) == len(loader)
    seen: Counter[int] = Counter()
    for batch in batches:
        assert len(batch.queries) <= 2 * half
        rows = rows_of(batch.queries["image/patches"], cache, "image/patches")
        assert rows == rows_of(batch.queries["image/pooled"], cache, "image/pooled")
        seen.update(rows)
        check_truth(batch, rows, data)
    assert seen == image_rows(data, negatives)


def check_truth(batch: Batch, rows: list[int], data: TaskData) -> None:
    """Targets are true, nothing true counts as a negative, nothing false is ignored."""
    cache = data.cache
    words = [row[row > 0].tolist() for row in batch.candidates["text/ids"]]
    true: dict[int, set[str]] = {}
    if isinstance(data, CompositionData):
        for row, target in zip(data.images, data.target, strict=True):
            true[int(row)] = {cache.texts[data.prompts[target]]}
    elif isinstance(data, MatchingData):
        own = data.captions[:, : data.images.shape[1]]
        for image, caption in zip(data.images.flat, own.flat, strict=True):
            true.setdefault(int(image), set()).add(cache.texts[caption])
    else:
        assert isinstance(data, RetrievalData)
        for image, caption in data.matches:
            true.setdefault(int(data.images[image]), set()).add(cache.texts[data.captions[caption]])
    values, offsets = cache.read_ragged("text/ids")
    stored = [values[a:b].tolist() for a, b in pairwise(offsets.tolist())]
    text_of = {tuple(ids): text for ids, text in zip(stored, cache.texts, strict=True)}
    texts = [text_of[tuple(w)] for w in words]
    for i, row in enumerate(rows):
        target = int(batch.target[i])
        for j, text in enumerate(texts):
            assert bool(batch.ignore[i, j]) == (text in true[row] and j != target)
        assert texts[target] in true[row]
        for j in batch.negative[i].tolist():
            assert texts[j] not in true[row]


@pytest.mark.parametrize("ram", [None, TOO_LITTLE])
def test_the_order_is_a_function_of_seed_and_epoch(cache: FeatureCache, ram: int | None) -> None:
    data = load_task(cache, "czsl", "train")

    def order(seed: int, epoch: int) -> list[int]:
        loader = Loader(data, BOTH, batch_size=5, seed=seed, ram_limit=ram)
        return [
            row
            for batch in loader.epoch(epoch)
            for row in rows_of(batch.queries["image/pooled"], cache, "image/pooled")
        ]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_block_shuffle_permutes_the_chunks_anew_every_epoch(cache: FeatureCache) -> None:
    data = load_task(cache, "czsl", "train")
    loader = Loader(data, BOTH, batch_size=1, seed=1, ram_limit=TOO_LITTLE)
    assert loader.pools is not None
    assert loader.pools.pool_chunks == 1
    length = loader.pools.reader.chunk_rows

    def chunks(epoch: int) -> list[int]:
        rows = [
            rows_of(batch.queries["image/pooled"], cache, "image/pooled")[0] // length
            for batch in loader.epoch(epoch)
        ]
        return [row for row, _ in groupby(rows)]

    found = [chunks(epoch) for epoch in range(3)]
    stored = sorted(found[0])
    assert len(stored) >= 4
    assert all(sorted(order) == stored for order in found)  # each chunk in one piece
    assert stored not in found
    assert found[0] != found[1] != found[2] != found[0]


def test_a_flipped_byte_is_found_by_block_shuffle(tmp_path: Path) -> None:
    path = make_drawn(tmp_path / "c.zarr").path
    cache = FeatureCache.open(path, check="read")
    file = cache.chunks.file("image/patches", 1)
    damaged = bytearray(file.read_bytes())
    damaged[7] ^= 1
    file.write_bytes(damaged)
    data = load_task(cache, "czsl", "train")
    loader = Loader(data, TOKENS, batch_size=4, seed=0, ram_limit=TOO_LITTLE)
    with pytest.raises(CacheError, match="chunk 1 of image/patches is damaged"):
        list(loader.epoch(0))


def test_streams_are_taken_into_memory_up_to_their_exact_size(cache: FeatureCache) -> None:
    rows = cache.rows("text", ["shared", "train echo 2"])
    needs = Needs(frozenset(), frozenset({"text/tokens"}))
    size = cache.read_ragged("text/tokens", rows)[0].nbytes
    for limit, on_disk in ((size, ()), (size - 1, ("text/tokens",))):
        source = Source(cache, needs, np.empty(0, np.int64), rows, ram_limit=limit)
        assert source.on_disk == on_disk


def test_compositions_compete_over_all_train_pairs_with_labels(cache: FeatureCache) -> None:
    data = load_task(cache, "czsl", "train")
    assert isinstance(data, CompositionData)
    batch = next(Loader(data, POOLED, batch_size=5, seed=0).epoch(0))
    assert len(batch.candidates) == 11
    assert not batch.ignore.any()
    labels = batch.candidates.labels
    assert torch.equal(labels["attr"][batch.target], batch.queries.labels["attr"])
    assert torch.equal(labels["obj"][batch.target], batch.queries.labels["obj"])


def test_a_pair_s_hard_negatives_share_exactly_one_primitive(cache: FeatureCache) -> None:
    data = load_task(cache, "czsl", "train")
    batch = next(Loader(data, POOLED, batch_size=5, seed=0, negatives="text").epoch(0))
    labels = batch.candidates.labels
    for i, target in enumerate(batch.target.tolist()):
        expected = {
            j
            for j in range(11)
            if (labels["attr"][j] == labels["attr"][target])
            != (labels["obj"][j] == labels["obj"][target])
        }
        assert {j for j in batch.negative[i].tolist() if j >= 0} == expected


def test_image_text_negatives_stand_side_by_side(cache: FeatureCache) -> None:
    data = load_task(cache, "two_by_two", "train")
    batch = next(Loader(data, POOLED, batch_size=6, seed=0, negatives="image_text").epoch(0))
    assert batch.target.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.negative[:, 0].tolist() == [1, 0, 3, 2, 5, 4]


@pytest.mark.parametrize("task", ["matching", "two_by_two"])
def test_text_negatives_follow_the_positives(cache: FeatureCache, task: str) -> None:
    data = load_task(cache, task, "train")
    batch = next(Loader(data, POOLED, batch_size=5, seed=0, negatives="text").epoch(0))
    assert batch.target.tolist() == [0, 1, 2, 3, 4]
    assert batch.negative[:, 0].tolist() == [5, 6, 7, 8, 9]
    assert len(batch.candidates) == 10


def test_retrieval_draws_captions_anew_every_epoch(cache: FeatureCache) -> None:
    data = load_task(cache, "retrieval", "train")
    loader = Loader(data, TOKENS, batch_size=7, seed=0)
    drawn = {
        tuple(b.candidates["text/ids"].flatten().tolist())
        for e in range(4)
        for b in loader.epoch(e)
    }
    assert len(drawn) > 1


def test_identical_captions_are_not_negatives_of_each_other(cache: FeatureCache) -> None:
    """Every train image has its own caption `echo`, under ids of its own, with the same words."""
    data = load_task(cache, "retrieval", "train")
    loader = Loader(data, TOKENS, batch_size=7, seed=0)
    same = 0
    for batch in loader.epoch(0):
        ids = batch.candidates["text/ids"]
        equal = (ids[:, None] == ids[None]).all(-1)
        equal[range(len(ids)), range(len(ids))] = False
        assert bool(batch.ignore[equal].all())
        same += int(equal.sum())
    assert same > 0


def test_only_declared_streams_are_there(cache: FeatureCache) -> None:
    data = load_task(cache, "matching", "train")
    batch = next(Loader(data, POOLED, batch_size=5, seed=0).epoch(0))
    assert set(batch.queries.streams) == {"image/pooled"}
    assert set(batch.candidates.streams) == {"text/pooled"}
    tokens = next(
        Loader(data, Needs(frozenset(), frozenset({"text/tokens"})), batch_size=5, seed=0).epoch(0)
    )
    assert set(tokens.candidates.streams) == {"text/tokens", "text/mask"}


@pytest.mark.parametrize("ram", [None, 0])
def test_text_is_padded_to_the_longest_row_asked_for(cache: FeatureCache, ram: int | None) -> None:
    rows = cache.rows("text", ["shared", "train echo 2", "prompt red toy", "shared"])
    source = Source(cache, TOKENS, np.empty(0, np.int64), rows, ram_limit=ram)
    found = source.texts(rows)
    values, offsets = cache.read_ragged("text/tokens", rows)
    lengths = np.diff(offsets)
    assert found["text/mask"].shape == (4, lengths.max())
    assert found["text/mask"].sum(1).tolist() == lengths.tolist()
    for i, length in enumerate(lengths):
        expected = torch.from_numpy(values[offsets[i] : offsets[i + 1]]).float()
        assert torch.equal(found["text/tokens"][i, :length], expected)
        assert not found["text/tokens"][i, length:].any()
        assert not found["text/ids"][i, length:].any()


def test_a_failed_read_reaches_the_consumer(tmp_path: Path) -> None:
    cache = make_drawn(tmp_path / "c.zarr")
    data = load_task(cache, "czsl", "train")
    loader = Loader(data, TOKENS, batch_size=4, seed=0, ram_limit=TOO_LITTLE)
    (cache.path / "image/patches/c/1/0/0").unlink()
    with pytest.raises(CacheError, match="chunk 1 of image/patches is missing"):
        list(loader.epoch(0))


def test_abandoning_an_epoch_leaves_the_next_one_whole(cache: FeatureCache) -> None:
    data = load_task(cache, "czsl", "train")
    loader = Loader(data, TOKENS, batch_size=4, seed=0, ram_limit=TOO_LITTLE)
    whole = [b.target.tolist() for b in loader.epoch(1)]
    unfinished = loader.epoch(0)
    next(unfinished)
    assert [b.target.tolist() for b in loader.epoch(1)] == whole


def test_waiting_is_counted(cache: FeatureCache) -> None:
    loader = Loader(load_task(cache, "czsl", "train"), TOKENS, batch_size=4, seed=0)
    assert loader.waited == 0
    list(loader.epoch(0))
    assert 0 < loader.waited < 60


def test_the_whole_set_is_one_batch_in_the_data_s_order(cache: FeatureCache) -> None:
    data = load_task(cache, "czsl", "train")
    assert isinstance(data, CompositionData)
    batch = Loader(data, POOLED, batch_size=5, seed=0).all()
    assert batch.target.tolist() == data.target.tolist()
    assert batch.queries.labels["attr"].tolist() == data.attr.tolist()


def test_image_text_negatives_need_an_even_batch(cache: FeatureCache) -> None:
    data = load_task(cache, "two_by_two", "train")
    with pytest.raises(ConfigError, match=r"batch_size 5 .* must be even"):
        Loader(data, POOLED, batch_size=5, seed=0, negatives="image_text")


@pytest.mark.parametrize(
    ("task", "negatives"),
    [("czsl", "image_text"), ("matching", "image_text"), ("retrieval", "text")],
)
def test_negatives_that_a_task_lacks_are_refused(
    cache: FeatureCache, task: str, negatives: str
) -> None:
    with pytest.raises(ConfigError, match=negatives):
        Loader(load_task(cache, task, "train"), POOLED, batch_size=4, seed=0, negatives=negatives)  # pyright: ignore[reportArgumentType]


def test_a_missing_stream_names_the_command_that_adds_it(
    tmp_path: Path,
) -> None:
    cache = make_drawn(tmp_path / "c.zarr", streams=["image/pooled", "text/pooled"])
    data = load_task(cache, "matching", "train")
    with pytest.raises(
        MissingStream,
        match=r"reads image/patches, text/tokens.*headstart build .*--streams image/patches",
    ):
        Loader(data, TOKENS, batch_size=4, seed=0)


def test_several_tasks_must_be_told_apart(cache: FeatureCache) -> None:
    with pytest.raises(TaskError, match="czsl, matching, two_by_two, retrieval"):
        load_task(cache)
    with pytest.raises(TaskError, match="no task 'composed'"):
        load_task(cache, "composed")


def test_an_unknown_split_lists_those_there_are(cache: FeatureCache) -> None:
    with pytest.raises(TaskError, match=r"'dev'; it has test \(5\), train \(7\), val \(3\)"):
        load_task(cache, "matching", "dev")


def test_the_open_world_is_every_attr_with_every_obj(cache: FeatureCache) -> None:
    closed, opened = (load_task(cache, "czsl", "test", w) for w in ("closed", "open"))
    assert isinstance(closed, CompositionData)
    assert isinstance(opened, CompositionData)
    assert (len(closed.pairs), closed.seen.sum()) == (13, 11)
    assert (len(opened.pairs), opened.seen.sum()) == (15, 11)
    assert [opened.pairs[t] for t in opened.target] == [closed.pairs[t] for t in closed.target]


def test_quarantined_images_are_refused_or_dropped_by_name(
    tmp_path: Path,
) -> None:
    cache = make_drawn(tmp_path / "c.zarr", broken=("test1", "test4"))
    for task in ("czsl", "two_by_two", "retrieval"):
        with pytest.raises(TaskError, match=r"2 images .*test1: .*; test4: "):
            load_task(cache, task, "test")
    czsl, two_by_two, retrieval = (
        load_task(cache, task, "test", allow_missing=True)
        for task in ("czsl", "two_by_two", "retrieval")
    )
    assert (len(czsl), czsl.dropped) == (11, ("test1", "test4"))
    assert (len(two_by_two), two_by_two.dropped) == (3, ("test 0", "test 2"))
    assert (len(retrieval), retrieval.dropped) == (3, ("test1", "test4"))
    assert isinstance(retrieval, RetrievalData)
    assert retrieval.positives().sum() == 9
