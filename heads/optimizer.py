"""What takes the steps: Adam or AdamW over groups of parameters, and the learning rate of a step."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from heads.base import Head
from heads.errors import ConfigError
from heads.train_config import TrainConfig


def optimizer_of(head: Head, config: TrainConfig) -> torch.optim.Optimizer:
    """Adam in the form asked for; every group knows its share of the learning rate."""
    adam = config.optimizer == "adam"
    form = torch.optim.Adam if adam else torch.optim.AdamW
    groups = parameter_groups(
        head, config.weight_decay, head.lr_shares(), everywhere=adam, spared=head.undecayed()
    )
    return form(groups, lr=config.lr, betas=config.betas, eps=config.eps)


def parameter_groups(
    head: nn.Module,
    weight_decay: float,
    shares: Mapping[str, float] | None = None,
    *,
    everywhere: bool = False,
    spared: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Trained parameters by their share of the rate and by decay: matrices, or `everywhere` also what has fewer axes.

    Biases, norms and scalars, all below two axes, otherwise do not decay; nor does what is `spared`, by name.
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
            if decays == ((everywhere or p.ndim >= 2) and name not in spared):
                key = shares.get(name, 1.0), weight_decay if decays else 0.0
                groups.setdefault(key, []).append(p)
    return [
        {"params": members, "weight_decay": decay, "share": share}
        for (share, decay), members in groups.items()
    ]


def rate_of(config: TrainConfig, step: int, total: int, epoch: int) -> float:
    """Learning rate of a step and its epoch, both counted from 0."""
    warmup = min(config.warmup_steps, total // 10)
    if config.schedule == "cosine":
        return config.lr * cosine_share(step, warmup, total)
    rise = min(1.0, (step + 1) / max(1, warmup))
    return config.lr * rise * config.gamma ** sum(epoch >= at for at in config.milestones)


def cosine_share(step: int, warmup: int, total: int) -> float:
    """Share of the peak learning rate at a step counted from 0: linear up, cosine down to 0 after the last step."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
