"""linear_probe and zero_shot against scikit-learn, algebra and the readout."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from heads.base import Context
from heads.errors import ConfigError
from heads.features import Batch, Features
from heads.methods import linear_probe, zero_shot

A, O, D = 3, 2, 7
CONTEXT = Context({"image/pooled": (D,)}, attrs=("red", "wet", "old"), objs=("cup", "dog"))
EVERY_PAIR = Features(
    {}, {"attr": torch.arange(A).repeat_interleave(O), "obj": torch.arange(O).repeat(A)}
)


def additive(pairs: list[tuple[int, int]], n: int = 6, noise: float = 0.05) -> Batch:
    """Images whose embedding is the sum of their attr's and their obj's direction, plus noise."""
    g = torch.Generator().manual_seed(3)
    directions = torch.linalg.qr(torch.randn(D, D, generator=g)).Q
    attr = torch.tensor([a for a, _ in pairs]).repeat_interleave(n)
    obj = torch.tensor([o for _, o in pairs]).repeat_interleave(n)
    x = directions[attr] + directions[A + obj] + noise * torch.randn(len(attr), D, generator=g)
    queries = Features({"image/pooled": x}, {"attr": attr, "obj": obj})
    b = len(attr)
    return Batch(
        queries,
        EVERY_PAIR,
        attr * O + obj,
        torch.zeros(b, A * O, dtype=torch.bool),
        torch.empty(b, 0, dtype=torch.int64),
    )


def solved(batch: Batch, **values: Any) -> linear_probe.Head:
    head = linear_probe.Head(linear_probe.Config(**values), CONTEXT)
    head.solve(batch, seed=0)
    return head


ALL = [(a, o) for a in range(A) for o in range(O)]


@pytest.mark.parametrize("normalise", ["none", "unit", "standardise"])
@pytest.mark.parametrize("target", ["factorised", "pair"])
def test_a_separable_toy_is_solved_completely(target: str, normalise: str) -> None:
    batch = additive(ALL)
    head = solved(batch, target=target, normalise=normalise)
    assert (head(batch.queries, EVERY_PAIR).argmax(1) == batch.target).all()


@pytest.mark.parametrize("target", ["factorised", "pair"])
def test_an_unseen_pair_of_seen_primitives_is_recognised(target: str) -> None:
    head = solved(additive([p for p in ALL if p != (2, 1)]), target=target)
    unseen = additive([(2, 1)])
    assert (head(unseen.queries, EVERY_PAIR).argmax(1) == 5).all()


def test_factorised_scores_are_the_librarys_log_probabilities() -> None:
    batch = additive(ALL, noise=0.5)
    head = solved(batch, normalise="none", C=0.7)
    x = batch.queries["image/pooled"].numpy()
    parts = [
        LogisticRegression(C=0.7, max_iter=1000)
        .fit(x, batch.queries.labels[k].numpy())
        .predict_log_proba(x)
        for k in ("attr", "obj")
    ]
    want = parts[0][:, :, None] + parts[1][:, None, :]
    got = head(batch.queries, EVERY_PAIR).numpy()
    np.testing.assert_allclose(got, want.reshape(len(x), -1), rtol=1e-4, atol=1e-4)


def test_pair_scores_are_the_librarys_decision_function_on_seen_pairs() -> None:
    batch = additive(ALL[:4], noise=0.5)
    head = solved(batch, target="pair", normalise="none", C=0.7)
    x = batch.queries["image/pooled"].numpy()
    model = LogisticRegression(C=0.7, max_iter=1000).fit(x, batch.target.numpy())
    got = head(batch.queries, EVERY_PAIR).numpy()[:, :4]
    np.testing.assert_allclose(got, model.decision_function(x), rtol=1e-4, atol=1e-4)


def test_inputs_have_unit_length_or_mean_0_and_variance_1() -> None:
    batch = additive(ALL)
    scaled = dataclasses.replace(
        batch, queries=Features({"image/pooled": 9 * batch.queries["image/pooled"]})
    )
    unit = solved(batch, normalise="unit")
    torch.testing.assert_close(unit(scaled.queries, EVERY_PAIR), unit(batch.queries, EVERY_PAIR))
    standard = solved(batch, normalise="standardise")
    x = standard._inputs(batch.queries["image/pooled"])
    torch.testing.assert_close(x.mean(0), torch.zeros(D), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(D))


def test_compose_reproduces_every_weight_of_a_complete_additive_grid() -> None:
    g = torch.Generator().manual_seed(0)
    of_attr, of_obj = torch.randn(A, D, generator=g), torch.randn(O, D, generator=g)
    weight = (of_attr[:, None] + of_obj[None]).reshape(A * O, D)
    bias = (torch.arange(A)[:, None] + 10.0 * torch.arange(O)).reshape(-1)
    attr, obj = EVERY_PAIR.labels["attr"], EVERY_PAIR.labels["obj"]
    table = torch.arange(A * O).reshape(A, O)
    got_weight, got_bias, known = linear_probe.compose(weight, bias, table, attr, obj)
    torch.testing.assert_close(got_weight, weight)
    torch.testing.assert_close(got_bias, bias)
    assert known.all()


def test_compose_is_mean_with_attr_plus_mean_with_obj_minus_mean_of_all() -> None:
    weight, bias = torch.tensor([[1.0], [2.0], [5.0]]), torch.zeros(3)
    table = torch.tensor([[0, 1], [2, -1], [-1, -1]])
    attr, obj = torch.tensor([1, 2]), torch.tensor([1, 0])
    got, _, known = linear_probe.compose(weight, bias, table, attr, obj)
    assert got[0, 0].item() == pytest.approx(5 + 2 - 8 / 3)
    assert known.tolist() == [True, False]


def test_permuting_labels_permutes_columns() -> None:
    batch = additive(ALL, noise=0.3)
    to = torch.tensor([2, 0, 1])
    labels = {"attr": to[batch.queries.labels["attr"]], "obj": batch.queries.labels["obj"]}
    renamed = dataclasses.replace(batch, queries=Features(batch.queries.streams, labels))
    columns = to[EVERY_PAIR.labels["attr"]] * O + EVERY_PAIR.labels["obj"]
    for target in ("factorised", "pair"):
        before = solved(batch, target=target)(batch.queries, EVERY_PAIR)
        after = solved(renamed, target=target)(batch.queries, EVERY_PAIR)
        torch.testing.assert_close(after[:, columns], before, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("target", ["factorised", "pair"])
def test_a_primitive_without_images_gets_the_smallest_score_of_the_row(target: str) -> None:
    batch = additive([(a, o) for a, o in ALL if a != 1], noise=0.3)
    head = solved(batch, target=target)
    scores = head(batch.queries, EVERY_PAIR)
    assert torch.isfinite(scores).all()
    if target == "factorised":
        torch.testing.assert_close(
            scores[:, 2:4], scores[:, [0, 1, 4, 5]].reshape(-1, 2, 2).amin(1)
        )
    else:
        lowest = scores[:, [0, 1, 4, 5]].amin(1, keepdim=True)
        torch.testing.assert_close(scores[:, 2:4], lowest.expand(-1, 2))


def test_training_says_how_many_primitives_had_no_image() -> None:
    head = linear_probe.Head(linear_probe.Config(), CONTEXT)
    report = head.solve(additive([(0, 0), (2, 1)]), seed=0)
    assert report["attrs_without_images"] == 1
    assert report["objs_without_images"] == 0
    assert report["train_attr_acc"] == 1


def test_a_single_object_has_probability_one() -> None:
    head = solved(additive([(0, 1), (1, 1), (2, 1)]))
    x = torch.randn(2, D)
    assert head.obj.log_probability(x).tolist() == [[0.0, 0.0]] * 2


def test_without_composition_unseen_pairs_are_out() -> None:
    batch = additive(ALL[:4])
    scores = solved(batch, target="pair", unseen="none")(batch.queries, EVERY_PAIR)
    assert torch.isneginf(scores[:, 4:]).all()
    assert torch.isfinite(scores[:, :4]).all()


def test_a_pair_head_rebuilt_from_its_own_config_takes_its_state() -> None:
    batch = additive(ALL[:4])
    head = solved(batch, target="pair")
    assert head.config.n_pairs == 4
    twin = linear_probe.Head(head.config, CONTEXT)
    twin.load_state_dict(head.state_dict())
    assert torch.equal(twin(batch.queries, EVERY_PAIR), head(batch.queries, EVERY_PAIR))


@pytest.mark.parametrize(
    ("target", "count"), [("factorised", (D + 1) * (A + O)), ("pair", (D + 1) * 4)]
)
def test_the_parameter_count_is_the_documented_one(target: str, count: int) -> None:
    head = solved(additive(ALL[:4]), target=target)
    stored = sum(
        t.numel() for name, t in head.state_dict().items() if name.endswith(("weight", "bias"))
    )
    assert stored == count


def test_a_task_without_primitives_is_refused() -> None:
    with pytest.raises(ConfigError, match="czsl"):
        linear_probe.Head(linear_probe.Config(), Context({"image/pooled": (D,)}))


def test_zero_shot_is_the_scaled_cosine_plus_the_backbones_bias() -> None:
    readout = {"logit_scale": torch.tensor(3.0), "logit_bias": torch.tensor(-10.0)}
    shapes = {"image/pooled": (D,), "text/pooled": (D,)}
    head = zero_shot.Head(zero_shot.Config(), Context(shapes, readout))
    image, text = torch.randn(3, D), 5 * torch.randn(2, D)
    got = head(Features({"image/pooled": image}), Features({"text/pooled": text}))
    for i in range(3):
        for j in range(2):
            cosine = image[i] @ text[j] / (image[i].norm() * text[j].norm())
            assert got[i, j].item() == pytest.approx(20.085537 * cosine.item() - 10, rel=1e-5)


def test_zero_shot_without_a_scale_is_the_plain_cosine() -> None:
    head = zero_shot.Head(zero_shot.Config(), Context({}))
    x = Features({"image/pooled": torch.tensor([[3.0, 4.0]])})
    y = Features({"text/pooled": torch.tensor([[2.0, 0.0]])})
    assert head(x, y).item() == pytest.approx(0.6)
    assert not list(head.parameters())
    assert not head.state_dict()
