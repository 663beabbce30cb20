"""How a head is trained, as fields: each says meaning, unit and the source of its default."""

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from heads.errors import ConfigError


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
    accumulate: int = Field(
        default=1,
        ge=1,
        description="batches whose gradients are averaged over all their rows before an optimiser step; those left at "
        "the end of an epoch make a step of their own. For a loss that is a mean over rows as one large batch; other "
        "examples of a batch that a loss compares with are still those of the small one (our choice)",
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
        default=1.0,
        gt=0,
        description="largest norm of a step's gradient; larger ones are scaled (our choice)",
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="bf16: autocast inside, float32 scores and losses (our choice: safe on any CPU)",
    )
    seed: int = Field(
        default=42,
        ge=0,
        description="initialisation, dropout, sampling, and the order unless `order_seed` is given (released code of "
        "BiVLC)",
    )
    order_seed: int | None = Field(
        default=None,
        ge=0,
        description="order of the examples, and which of several captions is drawn; none: as `seed` (our choice)",
    )
    compile: bool = Field(
        default=False,
        description="torch.compile the loss: the first steps wait for the compiler; rounding and dropout differ (our "
        "choice)",
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
