"""Head × data → score tables: equal to the obvious loop, in blocks, and refused where they would mean nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from drawn import make_drawn

import heads.score
from cache_builder import FeatureCache
from eval.czsl import CompositionScores
from eval.matching import MatchingScores
from eval.retrieval import RetrievalScores
from heads import load_method, score
from heads.base import CrossHead, Head, HeadConfig, Needs
from heads.errors import CheckpointMismatch, MissingStream, TaskError
from heads.features import Features
from heads.learner import seed_everything
from heads.loader import Loader
from heads.score import Direction, _below, _cosines, score_both
from heads.source import Source, context_of
from heads.tasks import CompositionData, MatchingData, RetrievalData, TaskData, load_task

SMALL = {"layers": 2, "dim": 8, "heads": 2, "ffn": 12}
HEADS = [
    ("zero_shot", {}),
    ("tf_local", SMALL),
    ("tf_local", {**SMALL, "variant": "late_maxsim"}),
    ("tf_local", {**SMALL, "variant": "global"}),
    ("cross", {}),
]


class Cross(CrossHead):
    """A user's head that writes only `paired`: overlap of the best patch with the mean word."""

    score_space = "logit"

    def __init__(self, config, context) -> None:
        super().__init__(config, context)
        seed_everything(3)
        self.matrix = torch.nn.Parameter(torch.randn(48, 40))

    @classmethod
    def needs(cls, config) -> Needs:
        return Needs(frozenset({"image/patches"}), frozenset({"text/tokens"}))

    def paired(self, queries: Features, candidates: Features) -> torch.Tensor:
        mask = candidates["text/mask"][..., None]
        words = (candidates["text/tokens"] * mask).sum(1) / mask.sum(1)
        return torch.einsum("bnw,wv,bv->bn", queries["image/patches"], self.matrix, words).amax(1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    return make_drawn(tmp_path_factory.mktemp("score") / "drawn.zarr")


def build(cache: FeatureCache, method: str, config: dict) -> Head:
    seed_everything(5)
    if method == "cross":
        return Cross(HeadConfig(), context_of(cache))
    module = load_method(method)
    return module.Head(module.Config(**config), context_of(cache)).eval()


def loop(head: Head, data: TaskData) -> np.ndarray:
    """The slow obvious scores: one image with one text at a time."""
    assert isinstance(data, CompositionData | MatchingData | RetrievalData)
    images = data.images.reshape(-1)
    texts = (data.prompts if isinstance(data, CompositionData) else data.captions).reshape(-1)
    source = Source(data.cache, head.needs(head.config), images, texts)
    alone = [source.texts(texts[j : j + 1]) for j in range(len(texts))]
    with torch.no_grad():
        return np.array(
            [
                [float(head.eval().paired(image, text)) for text in alone]
                for image in (source.images(images[i : i + 1]) for i in range(len(images)))
            ]
        )


@pytest.mark.parametrize(("method", "config"), HEADS)
def test_compositions_equal_the_loop_for_any_block(
    cache: FeatureCache, method: str, config: dict
) -> None:
    head, data = build(cache, method, config), load_task(cache, "czsl", "test")
    assert isinstance(data, CompositionData)
    expected = loop(head, data)
    for block in (5, 1024):
        scores = score(head, data, block=block)
        assert isinstance(scores, CompositionScores)
        assert scores.scores.dtype == np.float32
        np.testing.assert_allclose(scores.scores, expected, rtol=1e-4, atol=1e-4)
    assert [tuple(scores.pairs[t]) for t in scores.target] == [data.pairs[t] for t in data.target]
    assert (scores.split, scores.space, scores.world) == ("test", "logit", "closed")
    assert scores.ids == data.image_ids


@pytest.mark.parametrize(("method", "config"), HEADS)
def test_matching_equals_the_loop_as_image_by_caption(
    cache: FeatureCache, method: str, config: dict
) -> None:
    head, data = build(cache, method, config), load_task(cache, "two_by_two", "test")
    assert isinstance(data, MatchingData)
    scores = score(head, data, block=3)
    assert isinstance(scores, MatchingScores)
    every = loop(head, data)
    expected = [every[2 * k : 2 * k + 2, 2 * k : 2 * k + 2] for k in range(5)]
    np.testing.assert_allclose(scores.scores, expected, rtol=1e-4, atol=1e-4)
    assert list(scores.category) == ["swap", "add", "swap", "add", "swap"]


def test_matching_with_one_image_puts_the_true_caption_first(cache: FeatureCache) -> None:
    head = build(cache, "zero_shot", {})
    whole = score(head, load_task(cache, "two_by_two", "test"))
    one = score(head, load_task(cache, "matching", "test"))
    assert one.scores.shape == (5, 2)
    np.testing.assert_array_equal(one.scores, whole.scores[:, 0])


@pytest.mark.parametrize(("method", "config"), HEADS)
def test_retrieval_equals_the_loop_in_both_directions(
    cache: FeatureCache, method: str, config: dict
) -> None:
    head, data = build(cache, method, config), load_task(cache, "retrieval", "test")
    assert isinstance(data, RetrievalData)
    t2i = score(head, data, block=4, direction="t2i")
    i2t = score(head, data, block=4, direction="i2t")
    assert isinstance(t2i, RetrievalScores)
    assert isinstance(i2t, RetrievalScores)
    np.testing.assert_allclose(i2t.scores, loop(head, data), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(t2i.scores, i2t.scores.T)
    np.testing.assert_array_equal(t2i.positives, i2t.positives.T)
    assert i2t.positives.sum() == 15
    assert (len(t2i.ids), len(i2t.ids)) == (11, 5)
    assert t2i.meta["direction"] == "t2i"
    both = score_both(head, data, block=4)
    for mine, theirs in ((both.t2i, t2i), (both.i2t, i2t)):
        np.testing.assert_array_equal(mine.scores, theirs.scores)
        assert (mine.ids, mine.meta) == (theirs.ids, theirs.meta)


def test_a_direction_is_for_retrieval_and_must_be_one(cache: FeatureCache) -> None:
    head = build(cache, "zero_shot", {})
    wrong: list[tuple[str, Direction | None]] = [("retrieval", None), ("czsl", "t2i")]
    for task, direction in wrong:
        with pytest.raises(TaskError, match="retrieval is scored in one of t2i, i2t"):
            score(head, load_task(cache, task, "test"), direction=direction)


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
@pytest.mark.parametrize(("method", "config"), [HEADS[1], HEADS[4]])
def test_reranking_scores_the_best_by_cosine_and_keeps_the_others_below_in_order(
    cache: FeatureCache, method: str, config: dict, direction: Direction
) -> None:
    head, data = build(cache, method, config), load_task(cache, "retrieval", "test")
    full = score(head, data, direction=direction).scores
    assert isinstance(data, RetrievalData)
    cosine = _cosines(data, torch.device("cpu"))
    cosine = cosine.T if direction == "t2i" else cosine
    got = score(head, data, direction=direction, rerank=3)
    assert got.meta["rerank"] == 3
    for q in range(len(full)):
        order = np.argsort(-cosine[q], kind="stable")
        inside = cosine[q, order] > cosine[q, order[3]]  # a tie across the cut stays outside
        best, rest = order[inside], order[~inside]
        np.testing.assert_allclose(got.scores[q, best], full[q, best], rtol=1e-4, atol=1e-4)
        assert got.scores[q, rest].max() < got.scores[q, best].min()
        falls = np.diff(cosine[q, rest]) < -1e-4  # closer ones may be rounded either way
        assert (np.diff(got.scores[q, rest])[falls] < 0).all()


def test_equal_cosines_stay_ties_below_the_reranked() -> None:
    cosine = np.array([[0.1, 0.9, 0.5, 0.1, 0.5]], dtype=np.float32)
    table = _below(cosine, np.array([[1]]), np.array([[-7.0]], dtype=np.float32))
    assert table[0, 1] == -7
    assert table[0, 2] == table[0, 4] < -7
    assert table[0, 0] == table[0, 3] < table[0, 2]


def test_reranking_everything_is_the_full_ranking(cache: FeatureCache) -> None:
    head, data = build(cache, "tf_local", SMALL), load_task(cache, "retrieval", "test")
    full, reranked = (score(head, data, direction="t2i", rerank=k) for k in (None, 99))
    np.testing.assert_allclose(reranked.scores, full.scores, rtol=1e-4, atol=1e-4)


def test_rerank_is_for_retrieval(cache: FeatureCache) -> None:
    with pytest.raises(TaskError, match="rerank=5 is for retrieval"):
        score(build(cache, "zero_shot", {}), load_task(cache, "matching", "test"), rerank=5)


def test_a_probe_scores_pairs_by_their_labels_alone(cache: FeatureCache) -> None:
    head, data = build(cache, "linear_probe", {}), load_task(cache, "czsl", "test")
    train = Loader(load_task(cache, "czsl", "train"), head.needs(head.config), batch_size=4, seed=0)
    head.solve(train.all(), 0)
    assert score(head, data, block=4).scores.shape == (13, 13)
    with pytest.raises(TaskError, match="linear_probe scores czsl, not matching"):
        score(head, load_task(cache, "matching", "test"))
    assert isinstance(data, CompositionData)
    with pytest.raises(CheckpointMismatch, match=r"3 attrs × 5 objs .* by number"):
        score(head, replace(data, attrs=("other", *data.attrs[1:])))


def test_scoring_leaves_the_head_in_its_mode_and_uses_no_dropout(cache: FeatureCache) -> None:
    head = build(cache, "tf_local", {**SMALL, "dropout": 0.9}).train()
    data = load_task(cache, "matching", "test")
    first, again = score(head, data), score(head, data)
    assert head.training
    np.testing.assert_array_equal(first.scores, again.scores)


def test_another_backbone_s_cache_is_refused(cache: FeatureCache) -> None:
    head = build(cache, "zero_shot", {})
    head.context.readout["logit_scale"].add_(1)
    with pytest.raises(CheckpointMismatch, match=r"another backbone than clip:.*'logit_scale'"):
        score(head, load_task(cache, "matching", "test"))


def test_a_cache_without_the_stream_is_refused(
    cache: FeatureCache, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("poor") / "c.zarr"
    poor = make_drawn(path, streams=["image/pooled", "text/pooled"])
    head = build(cache, "tf_local", SMALL)
    with pytest.raises(MissingStream, match="tf_local reads image/patches, text/tokens"):
        score(head, load_task(poor, "matching", "test"))


def test_dropped_examples_mark_the_table_partial(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    cache = make_drawn(tmp_path_factory.mktemp("broken") / "c.zarr", broken=("test3",))
    data = load_task(cache, "czsl", "test", allow_missing=True)
    meta = score(build(cache, "zero_shot", {}), data).meta
    assert (meta["partial"], meta["dropped"]) == (True, ["test3"])


def test_the_package_s_score_is_the_function_whatever_was_imported() -> None:
    assert heads.score is score
    assert callable(heads.score)


def test_candidates_tied_across_the_cut_of_a_rerank_stay_tied_below_it() -> None:
    cosine = np.array([[0.9, 0.5, 0.5, 0.1]], dtype=np.float32)
    best = np.array([[0, 1]])
    fresh = np.array([[2.0, 7.0]], dtype=np.float32)
    (row,) = _below(cosine, best, fresh)
    assert row[0] == 2.0
    assert row[0] > row[1] == row[2] > row[3]
    (kept,) = _below(cosine[:, :2], best, fresh)
    np.testing.assert_array_equal(kept, [2.0, 7.0])
