"""fit(): the one training loop, read top to bottom.

Every optimised method of this project is trained by this loop; `closed_form` heads are solved on the whole set instead,
and heads without parameters pass through. The defaults follow the released fine-tuning code of BiVLC (arXiv 2406.09952)
where it gives a value; each field of `TrainConfig` names its source.
"""

import math
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from tqdm import tqdm

from heads.base import Head
from heads.errors import ConfigError, TrainingDiverged
from heads.loader import Loader

Validate = Callable[[Head], dict[str, float]]


class TrainConfig(BaseModel):
    """How a head is trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(
        default=10, ge=1, description="passes over the training data (released code of BiVLC)"
    )
    steps: int | None = Field(
        default=None,
        ge=1,
        description="optimiser steps; overrides `epochs` when given (our choice: none)",
    )
    batch_size: int = Field(
        default=64,
        ge=1,
        description="rows (images) of a batch; the last of an epoch may be smaller (our choice)",
    )
    negatives: Literal["auto", "none", "text", "image_text"] = Field(
        default="auto",
        description="hard negatives in a batch; auto: image_text for two_by_two, text for matching, else none (our "
        "choice)",
    )
    optimizer: Literal["adamw", "adam"] = Field(
        default="adamw",
        description="adamw: weight decay apart from the gradient; adam: as L2 penalty within it, as released CZSL code "
        "has it (released code of BiVLC)",
    )
    lr: float = Field(
        default=1e-4,
        gt=0,
        description="peak learning rate; a method may train some parameters at a share of it (our choice)",
    )
    weight_decay: float = Field(
        default=0.1,
        ge=0,
        description="adamw: not on biases, norms and scalars; adam: on all parameters (released code of BiVLC)",
    )
    betas: tuple[float, float] = Field(
        default=(0.9, 0.98), description="moment decays of Adam (released code of BiVLC)"
    )
    eps: float = Field(default=1e-6, gt=0, description="epsilon of Adam (released code of BiVLC)")
    schedule: Literal["cosine", "step", "constant"] = Field(
        default="cosine",
        description="learning rate after warm-up: cosine to 0, times `gamma` at each of `milestones`, or constant "
        "(released code of BiVLC)",
    )
    milestones: tuple[int, ...] = Field(
        default=(),
        description="schedule step: epochs, counted from 0, that begin with the next rate (our choice: none)",
    )
    gamma: float = Field(
        default=0.1,
        gt=0,
        description="schedule step: factor at a milestone (our choice: torch's default)",
    )
    warmup_steps: int = Field(
        default=500,
        ge=0,
        description="linear warm-up, before `schedule`; at most a tenth of all steps is used (our choice)",
    )
    clip: float = Field(
        default=1.0, gt=0, description="largest gradient norm; larger ones are scaled (our choice)"
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="bf16: autocast inside, float32 scores and losses (our choice: safe on any CPU)",
    )
    seed: int = Field(
        default=42,
        ge=0,
        description="initialisation, order, dropout and sampling (released code of BiVLC)",
    )
    device: str = Field(
        default="auto",
        description="torch device; auto: cuda when there is one, else cpu (our choice)",
    )
    select: str | None = Field(
        default=None,
        description="validation metric whose best weights are kept, earliest on equality; none: the first that "
        "validation returns (our choice)",
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="validations without a new best before stopping early (our choice: none)",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError(
                f"milestones belong to schedule 'step', and it needs some; schedule is {self.schedule!r} and "
                f"milestones {list(self.milestones)}"
            )
        if (
            list(self.milestones) != sorted({*self.milestones})
            or min(self.milestones, default=1) < 1
        ):
            raise ValueError(
                f"milestones rise from 1 on, without repeats, not {list(self.milestones)}"
            )
        return self

    def torch_device(self) -> torch.device:
        """The device meant by `device`."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return torch.empty(0, device=self.device).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"train.device {self.device!r} cannot be used here: {reason}"
            ) from error


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

    optimizer = _optimizer(head, config)
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
            lr = _rate(config, step, total, epoch)
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


def _optimizer(head: Head, config: TrainConfig) -> torch.optim.Optimizer:
    """Adam in the form asked for; every group knows its share of the learning rate."""
    adam = config.optimizer == "adam"
    form = torch.optim.Adam if adam else torch.optim.AdamW
    groups = _parameter_groups(head, config.weight_decay, head.lr_shares(), everywhere=adam)
    return form(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def _parameter_groups(
    head: nn.Module,
    weight_decay: float,
    shares: Mapping[str, float] | None = None,
    *,
    everywhere: bool = False,
) -> list[dict[str, Any]]:
    """Trained parameters by their share of the rate and by decay: matrices, or `everywhere` also what has fewer axes.

    Biases, norms and scalars, all below two axes, otherwise do not decay.
    """
    trained = {name: p for name, p in head.named_parameters() if p.requires_grad}
    if not trained:
        raise ConfigError(
            f"{type(head).__module__} has no trainable parameter under this configuration"
        )
    shares = shares or {}
    unknown = sorted(set(shares) - set(trained))
    assert not unknown, f"lr_shares names {unknown}, which are no trained parameters"
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for decays in (True, False):
        for name, p in trained.items():
            if decays == (everywhere or p.ndim >= 2):
                key = shares.get(name, 1.0), weight_decay if decays else 0.0
                groups.setdefault(key, []).append(p)
    return [
        {"params": members, "weight_decay": decay, "share": share}
        for (share, decay), members in groups.items()
    ]


def _rate(config: TrainConfig, step: int, total: int, epoch: int) -> float:
    """Learning rate of a step and its epoch, both counted from 0."""
    warmup = min(config.warmup_steps, total // 10)
    if config.schedule == "cosine":
        return config.lr * _schedule(step, warmup, total)
    rise = min(1.0, (step + 1) / max(1, warmup))
    return config.lr * rise * config.gamma ** sum(epoch >= at for at in config.milestones)


def _schedule(step: int, warmup: int, total: int) -> float:
    """Share of the peak learning rate at a step counted from 0: linear up, cosine down to 0 after the last step."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _diverged(what: str, value: Tensor, parts: dict[str, Tensor], step: int, lr: float) -> str:
    terms = ", ".join(f"{name} {float(part):.4g}" for name, part in parts.items())
    return (
        f"the {what} of step {step + 1} is {value.item()} (lr {lr:.3g}{', ' if terms else ''}{terms}); try a smaller "
        "train.lr, a smaller train.clip or train.precision=fp32"
    )
