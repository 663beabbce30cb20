"""Losses against the slow obvious loop, and the sampled form against the full one."""

import math

import pytest
import torch
from torch import Tensor

from heads import losses
from heads.features import Batch, Features

D = 4


def batch_of(kind: str, b: int = 3) -> Batch:
    """The three batches of heads/losses.py, and a czsl one in which two images share a pair."""
    g = torch.Generator().manual_seed(5)
    target = torch.arange(b)
    negative = torch.empty(b, 0, dtype=torch.int64)
    labels = {}
    n, m = b, b
    if kind == "txt":
        m, negative = 2 * b, (target + b)[:, None]
    elif kind == "img+txt":
        n = m = 2 * b
        target = torch.arange(n)
        negative = (target ^ 1)[:, None]
    elif kind == "czsl":
        m, target = 7, torch.tensor([4, 1, 4])
        negative = torch.tensor([[0, 6], [3, -1], [0, 6]])
        labels = {"attr": torch.arange(m) % 3, "obj": torch.arange(m) % 2}
    ignore = torch.zeros(n, m, dtype=torch.bool)
    if kind != "czsl":
        ignore[0, 2] = ignore[1, 2] = True
    return Batch(
        Features({"image/pooled": torch.randn(n, D, generator=g)}),
        Features({"text/pooled": torch.randn(m, D, generator=g)}, labels),
        target,
        ignore,
        negative,
    )


def scores_for(batch: Batch) -> Tensor:
    g = torch.Generator().manual_seed(11)
    return (
        2 * torch.randn(len(batch.queries), len(batch.candidates), generator=g)
    ).requires_grad_()


def slow_rows(s: list[list[float]], batch: Batch) -> float:
    """Mean over queries of -log softmax of the own positive among the cells that count."""
    total = 0.0
    for i, row in enumerate(s):
        t = int(batch.target[i])
        counted = [j for j in range(len(row)) if j == t or not batch.ignore[i, j]]
        total += math.log(sum(math.exp(row[j]) for j in counted)) - row[t]
    return total / len(s)


def slow_columns(s: list[list[float]], batch: Batch) -> float:
    """The same down the columns that are some query's positive: which image does this text belong to?"""
    total = 0.0
    for i in range(len(s)):
        t = int(batch.target[i])
        counted = [j for j in range(len(s)) if j == i or not batch.ignore[j, t]]
        total += math.log(sum(math.exp(s[j][t]) for j in counted)) - s[i][t]
    return total / len(s)


@pytest.mark.parametrize("kind", ["plain", "txt", "img+txt"])
def test_a_contrastive_loss_is_the_mean_of_both_directions(kind: str) -> None:
    batch = batch_of(kind)
    scores = scores_for(batch)
    loss, parts = losses.contrastive(scores, batch)
    rows, columns = (f(scores.tolist(), batch) for f in (slow_rows, slow_columns))
    assert loss.item() == pytest.approx((rows + columns) / 2, rel=1e-6)
    assert parts["image_to_text_loss"].item() == pytest.approx(rows, rel=1e-6)
    assert parts["text_to_image_loss"].item() == pytest.approx(columns, rel=1e-6)


def test_with_labelled_candidates_only_images_ask_for_pairs() -> None:
    batch = batch_of("czsl")
    scores = scores_for(batch)
    loss, parts = losses.contrastive(scores, batch)
    assert loss.item() == pytest.approx(slow_rows(scores.tolist(), batch), rel=1e-6)
    assert "text_to_image_loss" not in parts


def test_the_gradient_is_softmax_minus_one_hot() -> None:
    batch = batch_of("czsl")
    scores = scores_for(batch)
    losses.contrastive(scores, batch)[0].backward()
    want = scores.detach().softmax(1)
    want[torch.arange(3), batch.target] -= 1
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, want / 3)


def test_an_ignored_cell_gets_no_gradient_in_either_direction() -> None:
    batch = batch_of("plain")
    scores = scores_for(batch)
    losses.contrastive(scores, batch)[0].backward()
    assert scores.grad is not None
    assert scores.grad[0, 2] == 0
    assert scores.grad[1, 2] == 0
    assert scores.grad[2, 0] != 0


def test_a_query_whose_own_cell_is_marked_ignored_still_has_its_positive() -> None:
    batch = batch_of("plain")
    marked = Batch(
        batch.queries,
        batch.candidates,
        batch.target,
        batch.ignore | torch.eye(3).bool(),
        batch.negative,
    )
    scores = scores_for(batch)
    assert losses.contrastive(scores, marked)[0] == losses.contrastive(scores, batch)[0]


def test_hard_negatives_of_txt_are_never_asked_for_an_image() -> None:
    batch = batch_of("txt")
    scores = scores_for(batch)
    _, parts = losses.contrastive(scores, batch)
    moved = scores.detach().clone()
    moved[:, 3:] += 1.5
    _, after = losses.contrastive(moved, batch)
    assert after["text_to_image_loss"] == parts["text_to_image_loss"]
    assert after["image_to_text_loss"] > parts["image_to_text_loss"]


def test_batch_accuracy_counts_ties_as_wrong() -> None:
    batch = batch_of("czsl")
    scores = torch.zeros(3, 7)
    scores[0, 4] = scores[1, 1] = 1.0
    assert losses.contrastive(scores, batch)[1]["batch_accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("kind", ["plain", "txt", "img+txt", "czsl"])
def test_the_sampled_loss_is_the_full_one_when_every_candidate_is_drawn(kind: str) -> None:
    batch = batch_of(kind)
    full, sampled = scores_for(batch), scores_for(batch)
    want, want_parts = losses.contrastive(full, batch)
    want.backward()
    drawn = losses.draw(batch, n_sampled=99, top_sampled=99)
    cells = sampled.gather(1, drawn.columns)
    width = len(batch.candidates)
    got, got_parts = losses.contrastive(losses.scatter(cells, drawn, width), batch, drawn=drawn)
    got.backward()
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    torch.testing.assert_close(got_parts, want_parts)
    assert full.grad is not None
    assert sampled.grad is not None
    torch.testing.assert_close(sampled.grad, full.grad)


@pytest.mark.parametrize("kind", ["txt", "czsl"])
def test_a_draw_holds_the_positive_all_own_negatives_and_others_once_each(kind: str) -> None:
    batch = batch_of(kind)
    torch.manual_seed(0)
    drawn = losses.draw(batch, n_sampled=2, top_sampled=9)
    for i in range(len(batch.queries)):
        columns = drawn.columns[i][drawn.valid[i]].tolist()
        own = {int(batch.target[i]), *(int(j) for j in batch.negative[i] if j >= 0)}
        assert own <= set(columns)
        assert len(columns) == len(set(columns)) == len(own) + 2
        assert not any(batch.ignore[i, j] for j in columns)


def test_others_come_from_the_closest_candidates() -> None:
    batch = batch_of("czsl")
    cosine = torch.nn.functional.cosine_similarity(
        batch.queries["image/pooled"][:, None], batch.candidates["text/pooled"][None], dim=-1
    )
    drawn = losses.draw(batch, n_sampled=2, top_sampled=2)
    for i in range(3):
        own = {int(batch.target[i]), *batch.negative[i].tolist()}
        free = [j for j in cosine[i].argsort(descending=True).tolist() if j not in own]
        others = set(drawn.columns[i][drawn.valid[i]].tolist()) - own
        assert others == set(free[:2])


def test_which_others_are_drawn_depends_on_the_seed_alone() -> None:
    batch = batch_of("img+txt", b=5)

    def draw(seed: int) -> list:
        torch.manual_seed(seed)
        return losses.draw(batch, n_sampled=2, top_sampled=8).columns.tolist()

    assert draw(1) == draw(1)
    assert len({str(draw(seed)) for seed in range(5)}) > 1


def test_a_query_with_too_few_candidates_gets_fewer() -> None:
    batch = batch_of("plain")  # queries 0 and 1 ignore column 2, so each has one other left
    drawn = losses.draw(batch, n_sampled=2, top_sampled=64)
    assert drawn.valid.sum(1).tolist() == [2, 2, 3]


def test_cells_that_were_not_drawn_have_no_say() -> None:
    batch = batch_of("czsl")
    drawn = losses.draw(batch, n_sampled=0, top_sampled=1)
    cells = scores_for(batch).detach().gather(1, drawn.columns)
    loss, _ = losses.contrastive(losses.scatter(cells, drawn, 7), batch, drawn=drawn)
    s = scores_for(batch).tolist()
    counted = [[4, 0, 6], [1, 3], [4, 0, 6]]
    want = [
        math.log(sum(math.exp(s[i][j]) for j in columns)) - s[i][columns[0]]
        for i, columns in enumerate(counted)
    ]
    assert loss.item() == pytest.approx(sum(want) / 3, rel=1e-6)
