"""The training loop: reproducible, honest about what it did, and loud when something breaks."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import make_drawn
from safetensors.torch import load_file
from torch import Tensor, nn

from cache_builder import FeatureCache
from heads import fit, load_method
from heads.base import Context, EmbeddingHead, Head, HeadConfig, Needs
from heads.config import parse
from heads.errors import ConfigError, TrainingDiverged
from heads.features import Batch, Features
from heads.learner import seed_everything
from heads.loader import Loader
from heads.optimizer import cosine_share, optimizer_of, parameter_groups, rate_of
from heads.source import context_of
from heads.tasks import load_task
from heads.train_config import TrainConfig

SMALL = {"layers": 1, "dim": 8, "heads": 2, "ffn": 12}
TOY = TrainConfig(epochs=3, batch_size=4, lr=1e-2, device="cpu", seed=7)


class Linear(EmbeddingHead):
    """A user's own head: one matrix on pooled image embeddings."""

    score_space = "logit"

    def __init__(self, config: HeadConfig, context: Context) -> None:
        super().__init__(config, context)
        (d,) = context.shapes["image/pooled"]
        self.matrix = nn.Linear(d, d)
        self.poison = float("inf")

    @classmethod
    def needs(cls, config: Any) -> Needs:
        return Needs(frozenset({"image/pooled"}), frozenset({"text/pooled"}))

    def embed_queries(self, queries: Features) -> Tensor:
        return self.matrix(queries["image/pooled"])

    def embed_candidates(self, candidates: Features) -> Tensor:
        return candidates["text/pooled"]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        scores = self(batch.queries, batch.candidates)
        loss = nn.functional.cross_entropy(scores, batch.target)
        self.poison -= 1
        return loss * (torch.nan if self.poison == 0 else 1), {"part": loss.detach()}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    return make_drawn(tmp_path_factory.mktemp("train") / "drawn.zarr")


def loader(cache: FeatureCache, head: Head, config: TrainConfig, **options: Any) -> Loader:
    data = load_task(cache, "two_by_two", "train")
    needs = head.needs(head.config)
    return Loader(data, needs, batch_size=config.batch_size, seed=config.seed, **options)


def linear(cache: FeatureCache, seed: int = 7) -> Linear:
    seed_everything(seed)
    return Linear(HeadConfig(), context_of(cache))


def trained_tf_local(cache: FeatureCache, config: TrainConfig) -> dict[str, Tensor]:
    module = load_method("tf_local")
    seed_everything(config.seed)
    head = module.Head(module.Config(**SMALL), context_of(cache))
    fit(head, loader(cache, head, config, negatives="image_text"), config, progress=False)
    return head.state_dict()


def test_the_same_seed_gives_the_same_weights_bit_for_bit(cache: FeatureCache) -> None:
    first, again = trained_tf_local(cache, TOY), trained_tf_local(cache, TOY)
    other = trained_tf_local(cache, TOY.model_copy(update={"seed": 8}))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_training_lowers_the_loss_and_records_every_step(cache: FeatureCache) -> None:
    head = linear(cache)
    config = TOY.model_copy(update={"epochs": 12})
    batches = loader(cache, head, config)
    result = fit(head, batches, config, progress=False)
    losses = [record["loss"] for record in result.history]
    assert [record["step"] for record in result.history] == list(range(1, 49))
    assert result.steps == 12 * len(batches) == 48
    assert sum(losses[-4:]) < sum(losses[:4])
    assert all(record["part"] == record["loss"] for record in result.history)
    assert all(0 <= record["data_wait"] <= 1 for record in result.history)
    assert not head.training


def test_steps_override_epochs_and_may_end_within_one(cache: FeatureCache) -> None:
    head = linear(cache)
    config = TOY.model_copy(update={"steps": 5})
    calls: list[int] = []
    result = fit(
        head,
        loader(cache, head, config),
        config,
        validate=lambda _: calls.append(1) or {"score": 0.0},
        progress=False,
    )
    assert result.steps == 5
    assert len(calls) == 2


def test_the_best_weights_are_restored_and_ties_go_to_the_earliest(cache: FeatureCache) -> None:
    head = linear(cache)
    values = iter([0.2, 0.9, 0.9])
    states: list[Tensor] = []

    def validate(head: Head) -> dict[str, float]:
        states.append(head.get_parameter("matrix.weight").detach().clone())
        return {"score": next(values), "other": 1.0}

    result = fit(head, loader(cache, head, TOY), TOY, validate=validate, progress=False)
    assert result.best == {"step": 8, "epoch": 1, "score": 0.9, "other": 1.0}
    assert torch.equal(head.matrix.weight, states[1])
    assert not torch.equal(head.matrix.weight, states[2])


def test_patience_stops_after_validations_without_a_new_best(cache: FeatureCache) -> None:
    head = linear(cache)
    config = TOY.model_copy(update={"epochs": 9, "patience": 2})
    values = iter([0.5, 0.4, 0.3, 0.9])
    result = fit(
        head,
        loader(cache, head, config),
        config,
        validate=lambda _: {"score": next(values)},
        progress=False,
    )
    assert result.steps == 3 * 4


def test_patience_without_validation_is_refused(cache: FeatureCache) -> None:
    head = linear(cache)
    config = TOY.model_copy(update={"patience": 2})
    with pytest.raises(ConfigError, match=r"train\.patience is 2, but there is no validation"):
        fit(head, loader(cache, head, config), config, progress=False)


def test_only_a_head_without_training_goes_without_batches(cache: FeatureCache) -> None:
    with pytest.raises(ConfigError, match="got no batches"):
        fit(linear(cache), None, TOY, progress=False)


def test_an_unknown_selection_metric_names_those_there_are(cache: FeatureCache) -> None:
    head = linear(cache)
    config = TOY.model_copy(update={"select": "auc"})
    with pytest.raises(ConfigError, match="'auc', but validation returns score, other"):
        fit(
            head,
            loader(cache, head, config),
            config,
            validate=lambda _: {"score": 0.0, "other": 0.0},
            progress=False,
        )


def test_a_loss_that_is_not_finite_names_its_step(cache: FeatureCache) -> None:
    head = linear(cache)
    head.poison = 3
    with pytest.raises(TrainingDiverged, match=r"loss of step 3 is nan .*part"):
        fit(head, loader(cache, head, TOY), TOY, progress=False)


def test_biases_and_norms_do_not_decay() -> None:
    head = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5))
    decayed, kept = parameter_groups(head, 0.1)
    assert [tuple(p.shape) for p in decayed["params"]] == [(5, 3)]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert len(kept["params"]) == 3


def test_adam_decays_every_parameter_and_a_named_one_learns_at_its_share() -> None:
    head = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5))
    slow, rest = parameter_groups(head, 0.2, {"0.weight": 0.25}, everywhere=True)
    assert [tuple(p.shape) for p in slow["params"]] == [(5, 3)]
    assert (slow["share"], slow["weight_decay"]) == (0.25, 0.2)
    assert (rest["share"], rest["weight_decay"], len(rest["params"])) == (1.0, 0.2, 3)


def test_a_share_reaches_the_optimiser(cache: FeatureCache) -> None:
    """One step of Adam moves every weight by its rate: here a tenth of it for the matrix."""
    head = linear(cache)
    head.lr_shares = lambda: {"matrix.weight": 0.1}
    before = {name: p.detach().clone() for name, p in head.named_parameters()}
    config = TOY.model_copy(update={"steps": 1, "weight_decay": 0.0, "eps": 1e-12, "clip": 1e9})
    fit(head, loader(cache, head, config), config, progress=False)
    moved = {name: (p - before[name]).abs().max().item() for name, p in head.named_parameters()}
    assert moved["matrix.weight"] == pytest.approx(0.1 * config.lr, rel=1e-3)
    assert moved["matrix.bias"] == pytest.approx(config.lr, rel=1e-3)


def test_the_step_schedule_is_torch_s_multi_step_lr(cache: FeatureCache) -> None:
    head = linear(cache)
    config = TrainConfig(
        **TOY.model_dump(exclude={"epochs", "schedule", "milestones", "gamma", "warmup_steps"}),
        epochs=5,
        schedule="step",
        milestones=(1, 3),
        gamma=0.5,
        warmup_steps=0,
    )
    result = fit(head, loader(cache, head, config), config, progress=False)
    optimizer = torch.optim.SGD(head.parameters(), lr=config.lr)
    theirs = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(config.milestones), gamma=0.5)
    expected = []
    for _ in range(5):
        expected += 4 * [theirs.get_last_lr()[0]]
        optimizer.step()
        theirs.step()
    assert [record["lr"] for record in result.history] == pytest.approx(expected)


def test_adam_and_adamw_are_torch_s(cache: FeatureCache) -> None:
    for name, form in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        config = TrainConfig(**{**TOY.model_dump(), "optimizer": name, "steps": 1})
        optimizer = optimizer_of(linear(cache), config)
        assert type(optimizer) is form
        assert optimizer.defaults["betas"] == config.betas
        assert optimizer.defaults["eps"] == config.eps
        decays = sorted({group["weight_decay"] for group in optimizer.param_groups})
        assert decays == ([0.1] if name == "adam" else [0.0, 0.1])


def test_a_constant_rate_stays_where_the_warm_up_ends() -> None:
    config = TOY.model_copy(update={"schedule": "constant", "warmup_steps": 4})
    rates = [rate_of(config, step, 100, step // 10) for step in range(100)]
    assert rates[:4] == pytest.approx([config.lr * share for share in (0.25, 0.5, 0.75, 1)])
    assert set(rates[4:]) == {config.lr}


@pytest.mark.parametrize(
    "values",
    [{"schedule": "step"}, {"milestones": (3,)}, {"schedule": "step", "milestones": (3, 2)}],
)
def test_milestones_and_the_step_schedule_need_each_other(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="milestones"):
        parse(TrainConfig, values, "train")


def test_the_learning_rate_rises_linearly_and_falls_to_zero() -> None:
    shares = [cosine_share(step, 2, 12) for step in range(12)]
    assert shares[:3] == [0.5, 1.0, 1.0]
    assert shares == sorted(shares[:2]) + sorted(shares[2:], reverse=True)
    assert 0 < shares[-1] < 0.03
    assert cosine_share(12, 2, 12) == 0


def test_warm_up_takes_at_most_a_tenth(cache: FeatureCache) -> None:
    head = linear(cache)
    config = TOY.model_copy(update={"steps": 20})
    result = fit(head, loader(cache, head, config), config, progress=False)
    rates = [record["lr"] for record in result.history]
    assert rates[0] == pytest.approx(config.lr / 2)
    assert rates[1] == rates[2] == pytest.approx(config.lr)


def test_a_head_without_parameters_passes_through(cache: FeatureCache) -> None:
    module = load_method("zero_shot")
    head = module.Head(module.Config(), context_of(cache))
    result = fit(
        head, loader(cache, head, TOY), TOY, validate=lambda _: {"score": 0.5}, progress=False
    )
    assert (result.steps, result.best["score"]) == (0, 0.5)


def test_a_closed_form_head_is_solved_on_the_whole_set(cache: FeatureCache) -> None:
    module = load_method("linear_probe")
    head = module.Head(module.Config(), context_of(cache))
    data = load_task(cache, "czsl", "train")
    batches = Loader(data, head.needs(head.config), batch_size=4, seed=0)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    result = fit(head, batches, TOY, progress=False)
    assert result.steps == 0
    assert any(not torch.equal(before[name], value) for name, value in head.state_dict().items())


def test_a_probe_keeps_the_penalty_that_is_best_on_validation(cache: FeatureCache) -> None:
    module = load_method("linear_probe")
    data = load_task(cache, "czsl", "train")
    values = iter([0.1, 0.2, 0.9, 0.9, 0.3, 0.2, 0.1])
    states: list[Tensor] = []

    def validate(head: Head) -> dict[str, float]:
        states.append(head.state_dict()["attr.weight"].clone())
        return {"score": next(values)}

    head = module.Head(module.Config(max_iter=9999), context_of(cache))
    batches = Loader(data, head.needs(head.config), batch_size=4, seed=0)
    result = fit(head, batches, TOY, validate=validate, progress=False)
    solved = [record["C"] for record in result.history if "C" in record]
    assert solved == [0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0]
    assert (head.config.C, result.best["step"]) == (1.0, 2)
    assert torch.equal(head.state_dict()["attr.weight"], states[2])
    assert not torch.equal(states[2], states[3])


def test_a_penalty_that_is_set_is_not_searched(cache: FeatureCache) -> None:
    module = load_method("linear_probe")
    head = module.Head(module.Config(C=0.5), context_of(cache))
    batches = Loader(
        load_task(cache, "czsl", "train"), head.needs(head.config), batch_size=4, seed=0
    )
    result = fit(head, batches, TOY, validate=lambda _: {"score": 0.0}, progress=False)
    assert [record["C"] for record in result.history if "C" in record] == [0.5]
    assert head.config.C == 0.5


def test_nothing_to_train_is_said(cache: FeatureCache) -> None:
    head = linear(cache)
    head.requires_grad_(requires_grad=False)
    with pytest.raises(ConfigError, match="no trainable parameter"):
        fit(head, loader(cache, head, TOY), TOY, progress=False)


def test_bf16_trains_to_finite_weights(cache: FeatureCache) -> None:
    module = load_method("tf_local")
    seed_everything(0)
    head = module.Head(module.Config(**SMALL), context_of(cache))
    config = TOY.model_copy(update={"precision": "bf16"})
    result = fit(head, loader(cache, head, config), config, progress=False)
    assert result.steps == 3 * 4
    assert all(torch.isfinite(p).all() for p in head.parameters())


@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU: install g++"
)
def test_a_compiled_loss_trains_to_the_same_weights_up_to_rounding(
    cache: FeatureCache, tmp_path: Path
) -> None:
    """In a process of its own, where no types are checked: the checks would be compiled along."""
    words = [sys.executable, "-m", "heads.cli", "train", "tf_local", "--task", "two_by_two"]
    sets = [*(f"head.{k}={v}" for k, v in SMALL.items()), "head.dropout=0", "train.steps=3"]
    sets += ["train.device=cpu", "train.batch_size=4"]
    words += ["--cache", str(cache.path), *(word for s in sets for word in ("--set", s))]
    words += ["--out", str(tmp_path / "runs"), "--sweep", "train.compile=false,true"]
    subprocess.run(words, check=True, capture_output=True)
    plain, other = (
        load_file(tmp_path / "runs" / f"tf_local-compile={name}" / "model.safetensors")
        for name in ("false", "true")
    )
    for name in plain:
        torch.testing.assert_close(other[name], plain[name], rtol=1e-3, atol=1e-4)
