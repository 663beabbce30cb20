"""fit(): the one training loop, read top to bottom.

Every optimised method of this project is trained by this loop; `closed_form` heads are solved on the whole set instead,
and heads without parameters pass through. The defaults follow the released fine-tuning code of BiVLC (arXiv 2406.09952)
where it gives a value; each field of `TrainConfig` names its source.
"""

import math
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from heads.base import Head
from heads.errors import ConfigError, TrainingDiverged
from heads.loader import Loader
from heads.optimizer import optimizer_of, rate_of
from heads.train_config import TrainConfig

Validate = Callable[[Head], dict[str, float]]


@dataclass(frozen=True, slots=True)
class FitResult:
    """What training did.

    Attributes:
        history: one record a step (step, epoch, loss, lr, data_wait, parts), and one a validation (step, epoch,
            validation, seconds), in order; `data_wait` is the share of the step's time spent waiting for its batch.
        best: the selected validation record's metrics with its step and epoch; empty without validation.
        seconds: wall time of the whole fit.
        steps: optimiser steps made.

    """

    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, float | int] = field(default_factory=dict)
    seconds: float = 0.0
    steps: int = 0


def seed_everything(seed: int) -> None:
    """Seed Python's and torch's global generators; call it before building a head, `fit` calls it again."""
    random.seed(seed)
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        # Atomic adds would make two CUDA runs of one seed differ; kernels without a deterministic form only warn.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(mode=True, warn_only=True)


def fit(
    head: Head,
    batches: Loader | None,
    config: TrainConfig,
    *,
    validate: Validate | None = None,
    progress: bool = True,
) -> FitResult:
    """Train a head in place; with validation it ends with the best weights, else with the last.

    Args:
        head: freshly built under `seed_everything(config.seed)`, so that the same seed gives the same weights.
        batches: the training data; None for a head without training.
        config: the recipe.
        validate: metrics of the head on held-out data, larger is better; called after every epoch and at the end.
        progress: show a bar.

    Raises:
        TrainingDiverged: a loss or gradient is not finite; names the step. Nothing is skipped.
        ConfigError: the head has no trainable parameter or no data, `select` is no metric that validation returns, or
            there is `patience` but no validation to wait for.
    """
    started = time.perf_counter()
    seed_everything(config.seed)
    device = config.torch_device()
    head.to(device)
    if head.training_kind != "gradient":
        return _fit_without_gradient(head, batches, config, validate, started)
    if batches is None:
        raise ConfigError(f"{type(head).__module__} is trained by gradient, but got no batches")
    if config.patience is not None and validate is None:
        raise ConfigError(
            f"train.patience is {config.patience}, but there is no validation to wait for; give the data set a val "
            "split, or leave patience out"
        )

    optimizer = optimizer_of(head, config)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    total = config.steps or config.epochs * len(batches)
    history: list[dict[str, Any]] = []
    best = _Best(config.select)
    step, epoch = 0, 0
    bar = tqdm(total=total, desc="fit", unit="step", disable=not progress)
    mark, waited = time.perf_counter(), batches.waited
    while step < total:
        head.train()
        for batch in islice(batches.epoch(epoch), total - step):
            lr = rate_of(config, step, total, epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["share"]
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss, parts = head.loss(batch.to(device))
            if not torch.isfinite(loss):
                raise TrainingDiverged(_diverged("loss", loss, parts, step, lr))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, config.clip)
            if not torch.isfinite(norm):
                raise TrainingDiverged(_diverged("gradient norm", norm, parts, step, lr))
            optimizer.step()
            step += 1
            now = time.perf_counter()
            wait = (batches.waited - waited) / max(now - mark, 1e-9)
            mark, waited = now, batches.waited
            history.append(
                {
                    "step": step,
                    "epoch": epoch,
                    "loss": loss.item(),
                    "lr": lr,
                    "data_wait": round(wait, 4),
                    **{name: float(value) for name, value in parts.items()},
                }
            )
            bar.update()
            bar.set_postfix(loss=f"{history[-1]['loss']:.3f}", wait=f"{wait:.0%}", refresh=False)
        epoch += 1
        if validate is not None:
            history.append(_validation(head, validate, step, epoch - 1))
            best.offer(head, history[-1])
            bar.set_postfix_str(f"best {best.metric} {best.value:.4f}")
            mark = time.perf_counter()
            if config.patience is not None and best.stale >= config.patience:
                break
    bar.close()
    best.restore(head)
    head.eval()
    return FitResult(history, best.record, time.perf_counter() - started, step)


def _fit_without_gradient(
    head: Head,
    batches: Loader | None,
    config: TrainConfig,
    validate: Validate | None,
    started: float,
) -> FitResult:
    """Solve a closed-form head on the whole set, under each configuration it offers if there is validation to choose.

    A head without parameters is left as it is. `step` counts the configurations.
    """
    history: list[dict[str, Any]] = []
    best = _Best(config.select)
    offered = [head.config] if validate is None else head.candidates()
    whole = None
    if head.training_kind == "closed_form":
        if batches is None:
            raise ConfigError(f"{type(head).__module__} is solved on data, but got no batches")
        whole = batches.all().to(config.torch_device())
    for step, head.config in enumerate(offered):
        if whole is not None:
            history.append({"step": step, **head.solve(whole, config.seed)})
        if validate is not None:
            history.append(_validation(head, validate, step, 0))
            best.offer(head, history[-1])
    best.restore(head)
    head.eval()
    return FitResult(history, best.record, time.perf_counter() - started, 0)


def _validation(head: Head, validate: Validate, step: int, epoch: int) -> dict[str, Any]:
    started = time.perf_counter()
    head.eval()
    metrics = validate(head)
    seconds = round(time.perf_counter() - started, 3)
    return {"step": step, "epoch": epoch, "validation": metrics, "seconds": seconds}


class _Best:
    """The weights with the best validation so far, on the CPU."""

    def __init__(self, metric: str | None) -> None:
        self.metric, self.value, self.stale = metric, -math.inf, 0
        self.record: dict[str, float | int] = {}
        self.state: dict[str, Tensor] = {}
        self.config: Any = None

    def offer(self, head: Head, record: dict[str, Any]) -> None:
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
        if self.record:
            head.config = self.config
            head.load_state_dict(self.state)


def _diverged(what: str, value: Tensor, parts: dict[str, Tensor], step: int, lr: float) -> str:
    terms = ", ".join(f"{name} {float(part):.4g}" for name, part in parts.items())
    return (
        f"the {what} of step {step + 1} is {value.item()} (lr {lr:.3g}{', ' if terms else ''}{terms}); try a smaller "
        "train.lr, a smaller train.clip or train.precision=fp32"
    )
