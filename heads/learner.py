"""One head in training: its optimiser, its random numbers, what it has done, and its best weights so far.

`train.py` decides whose turn it is; what happens in a turn is here. Between turns a learner's random numbers stay
where it left them, so that it ends in the same bits beside others as alone.
"""

import math
import os
import random
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from eval.errors import ScoreTableError
from heads import ranks
from heads.base import Head
from heads.errors import ConfigError, HeadError, TrainingDiverged
from heads.features import Batch
from heads.loader import Loader
from heads.optimizer import optimizer_of, rate_of
from heads.train_config import TrainConfig

Validate = Callable[[Head], dict[str, float]]

LOSS = "loss"


@dataclass(frozen=True, slots=True)
class FitResult:
    """What training did.

    Attributes:
        history: one record a step (step, epoch, loss, lr, data_wait, parts), and one a validation (step, epoch,
            validation, seconds), in order; loss and parts are means over the rows of the step's batches, and
            `data_wait` the share of its time spent waiting for them.
        best: the selected validation record's metrics with its step and epoch; empty without validation.
        seconds: its own steps and validations, and the waiting for its batches.
        waited: seconds of that spent waiting.
        steps: optimiser steps made.

    """

    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, float | int] = field(default_factory=dict)
    seconds: float = 0.0
    waited: float = 0.0
    steps: int = 0


def seed_everything(seed: int) -> None:
    """Seed Python's and torch's global generators; call it before building a head, training calls it again."""
    random.seed(seed)
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        # Atomic adds would make two CUDA runs of one seed differ; kernels without a deterministic form only warn.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(mode=True, warn_only=True)


class Learner:
    """A head, how it is trained, and where it stands.

    Args:
        head: freshly built under `seed_everything(config.seed)`, so that the same seed gives the same weights.
        config: the recipe.
        validate: metrics of the head on held-out data, larger is better; called after every epoch and at the end.

    Attributes:
        step, total: optimiser steps made, and to be made; `total` may fall when patience ends.
        history, seconds, waited: as in `FitResult`.
        best: the weights with the best validation so far.
        random: where its generators of random numbers stand between turns.
        in_epoch: has it learned from an epoch whose end it has not seen yet?
        failure: why it ended early, if it did.

    What lasts from one turn to the next, `training_state.py` keeps on disk and gives back: whoever adds to it adds
    there.

    Raises:
        ConfigError: the head has no trainable parameter, or there is `patience` but no validation to wait for.
    """

    def __init__(self, head: Head, config: TrainConfig, validate: Validate | None = None) -> None:
        self.head, self.config, self.validate = head, config, validate
        self.device = config.torch_device()
        self.needs = head.training_needs(head.config)
        self.history: list[dict[str, Any]] = []
        self.best = Best(config.select)
        self.step, self.total, self.seconds, self.waited = 0, 0, 0.0, 0.0
        self.in_epoch, self.gathered = False, _Gathered()
        self.failure: HeadError | None = None
        self.constant: dict[str, Tensor] = {}
        head.to(self.device)
        if head.training_by == "gradient":
            if config.patience is not None and validate is None:
                raise ConfigError(
                    f"train.patience is {config.patience}, but there is no validation to wait for; give the data set "
                    "a val split, or leave patience out"
                )
            self.optimizer = optimizer_of(head, config)
            self.parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
            loss = torch.compile(head.loss) if config.compile else head.loss
            self.loss = ranks.averaged(head, loss)
        seed_everything(config.seed)
        self.random = _random_state(self.device)

    def begin(self, batches: Loader) -> None:
        """Take up training by gradient: what no step changes is computed now, once."""
        steps_an_epoch = math.ceil(len(batches) / self.config.accumulate)
        self.total = self.config.steps or self.config.epochs * steps_an_epoch
        with self._turn(), torch.no_grad():
            self.head.eval()
            only = (x.only(self.needs.queries).to(self.device) for x in batches.examples())
            self.constant = {**self.head.before_training(only)}

    @property
    def runs(self) -> bool:
        """Are there steps left?"""
        return self.step < self.total

    @property
    def in_step(self) -> bool:
        """Does it hold gradients of batches that wait for more before they make a step?"""
        return self.runs and self.gathered.batches > 0

    def take(self, batch: Batch, epoch: int, waited: float, *, last: bool) -> None:
        """Learn from a batch, and step if that was enough of them; a failure ends this learner alone.

        Args:
            batch, epoch: what comes, in which epoch.
            waited: seconds that it took to come.
            last: no batch follows in this epoch, so that what is gathered makes a step.
        """
        self.waited += waited
        self.seconds += waited
        self.in_epoch = True
        with self._turn():
            started = time.perf_counter()
            lr = rate_of(self.config, self.step, self.total, epoch)
            self._gather(batch, lr)
            steps = last or self.gathered.batches == self.config.accumulate
            if steps:
                self._step(lr)
            self.gathered.waited += waited
            self.gathered.seconds += waited + time.perf_counter() - started
            if steps:
                found = self.gathered
                means = found.means()
                self.history.append(
                    {
                        "step": self.step,
                        "epoch": epoch,
                        "loss": means.pop(LOSS),
                        "lr": lr,
                        "data_wait": round(found.waited / found.seconds, 4),
                        **means,
                    }
                )
                self.gathered = _Gathered()

    def end_epoch(self, epoch: int) -> None:
        """Validate, keep the best weights, and stop early where patience ends."""
        self.in_epoch = False
        if self.validate is None or self.failure:
            return
        with self._turn():
            self._measure(self.validate, self.step, epoch)
        if self.config.patience is not None and self.best.stale >= self.config.patience:
            self.total = self.step

    def solve(self, whole: Batch | None) -> None:
        """Fit in closed form, under each configuration the head offers if there is validation to choose.

        A head without parameters is left as it is. `step` counts the configurations.
        """
        with self._turn():
            offered = [self.head.config] if self.validate is None else self.head.candidates()
            for step, self.head.config in enumerate(offered):
                if whole is not None:
                    report = self.head.solve(self._seen(whole), self.config.seed)
                    self.history.append({"step": step, **report})
                if self.validate is not None:
                    self._measure(self.validate, step, 0)

    def result(self) -> FitResult:
        """What was done; the head is left with its best weights, or else its last, in evaluation mode."""
        self.best.restore(self.head)
        self.head.eval()
        return FitResult(self.history, self.best.record, self.seconds, self.waited, self.step)

    def _seen(self, batch: Batch) -> Batch:
        """Of a batch what the head declares."""
        needs = self.needs
        seen = batch.to(self.device).only(needs.queries, needs.candidates, needs.partners)
        if not self.constant:
            return seen
        assert seen.index is not None
        beside = {name: values[seen.index] for name, values in self.constant.items()}
        queries = replace(seen.queries, streams={**seen.queries.streams, **beside})
        return replace(seen, queries=queries)

    def _gather(self, batch: Batch, lr: float) -> None:
        """Add the gradient of a batch to those since the last step, by its rows as against the first one's."""
        self.head.train()
        bf16 = self.config.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            loss, parts = self.loss(self._seen(batch))
        if not torch.isfinite(loss):
            raise TrainingDiverged(_diverged("loss", loss, parts, self.step, lr))
        weight = self.gathered.add(len(batch.target), {LOSS: loss, **parts})
        if self.gathered.batches == 1:
            self.optimizer.zero_grad(set_to_none=True)
        (loss if weight == 1 else weight * loss).backward()

    def _step(self, lr: float) -> None:
        """Make the gathered gradients a mean over rows, and step."""
        if self.gathered.weight != 1:
            for p in self.parameters:
                if p.grad is not None:
                    p.grad /= self.gathered.weight
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        if not torch.isfinite(norm):
            parts = {name: mean for name, mean in self.gathered.means().items() if name != LOSS}
            raise TrainingDiverged(_diverged("gradient norm", norm, parts, self.step, lr))
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["share"]
        self.optimizer.step()
        self.step += 1

    def _measure(self, validate: Validate, step: int, epoch: int) -> None:
        started = time.perf_counter()
        self.head.eval()
        try:
            metrics = validate(self.head)
        except ScoreTableError as error:
            raise TrainingDiverged(
                f"after step {step}, validation could not use the scores: {error}"
            ) from error
        record: dict[str, Any] = {"step": step, "epoch": epoch, "validation": metrics}
        self.history.append({**record, "seconds": round(time.perf_counter() - started, 3)})
        self.best.offer(self.head, record)

    @contextmanager
    def _turn(self) -> Generator[None]:
        """Own random numbers and clock; what goes wrong ends this learner, and is kept."""
        started = time.perf_counter()
        _resume_random(self.random)
        try:
            yield
        except HeadError as error:
            self.failure, self.total = error, self.step
        self.random = _random_state(self.device)
        self.seconds += time.perf_counter() - started


@dataclass(slots=True)
class _Gathered:
    """The batches since the last step; their gradients lie in the parameters.

    Attributes:
        batches: how many they are.
        rows: of the first.
        weight: rows of all, as against the first's: 1 for one batch.
        sums: name → loss or part, each batch by its weight; and the weight of those that had one.
        waited, seconds: for them, and altogether.

    """

    batches: int = 0
    rows: int = 0
    weight: float = 0.0
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    waited: float = 0.0
    seconds: float = 0.0

    def add(self, rows: int, values: dict[str, Tensor]) -> float:
        """Count a batch; returns its weight."""
        self.rows = self.rows or rows
        weight = rows / self.rows
        for name, value in values.items():
            total, of = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = total + weight * float(value.detach()), of + weight
        self.batches, self.weight = self.batches + 1, self.weight + weight
        return weight

    def means(self) -> dict[str, float]:
        """Loss and parts over all rows."""
        return {name: total / of for name, (total, of) in self.sums.items()}


class Best:
    """The weights with the best validation so far, on the CPU."""

    def __init__(self, metric: str | None) -> None:
        self.metric, self.value, self.stale = metric, -math.inf, 0
        self.record: dict[str, float | int] = {}
        self.state: dict[str, Tensor] = {}
        self.config: Any = None

    def offer(self, head: Head, record: dict[str, Any]) -> None:
        """Take the weights of a validation if they are the best so far."""
        metrics: dict[str, float] = record["validation"]
        self.metric = self.metric or next(iter(metrics), None)
        if self.metric not in metrics:
            raise ConfigError(
                f"train.select is {self.metric!r}, but validation returns {', '.join(metrics) or 'nothing'}"
            )
        self.stale += 1
        if not self.record or metrics[self.metric] > self.value:
            self.value, self.stale = metrics[self.metric], 0
            self.record = {"step": record["step"], "epoch": record["epoch"], **metrics}
            self.state = {k: v.detach().cpu().clone() for k, v in head.state_dict().items()}
            self.config = head.config

    def restore(self, head: Head) -> None:
        """Give a head the best weights, if there are any."""
        if self.record:
            head.config = self.config
            head.load_state_dict(self.state)


def _random_state(device: torch.device) -> tuple[Any, ...]:
    """Where Python's and torch's generators stand, that of a CUDA device too."""
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return random.getstate(), torch.get_rng_state(), device, on_device


def _resume_random(state: tuple[Any, ...]) -> None:
    python, cpu, device, on_device = state
    random.setstate(python)
    torch.set_rng_state(cpu)
    if on_device is not None:
        torch.cuda.set_rng_state(on_device, device)


def _diverged(
    what: str, value: Tensor, parts: Mapping[str, Tensor | float], step: int, lr: float
) -> str:
    terms = ", ".join(f"{name} {float(part):.4g}" for name, part in parts.items())
    return (
        f"the {what} of step {step + 1} is {value.item()} (lr {lr:.3g}{', ' if terms else ''}{terms}); try a smaller "
        "train.lr, a smaller train.clip or train.precision=fp32"
    )
