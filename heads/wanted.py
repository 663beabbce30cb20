"""Runs that are asked for: what is wanted, and whether a cache can give it.

    Wanted       method, place and settings, as a command line or a plan says them
    Sound        the same, looked at: settings parsed, streams there, what its head is built from
    Batches      what runs must have in common to step side by side

Nothing is read here but the header of a cache, and nothing is written.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel

from cache_builder import FeatureCache
from heads import checkpoint, load_method
from heads.base import Context, Head, Needs
from heads.commands import train_command
from heads.config import check_section, parse
from heads.errors import ConfigError
from heads.learner import seed_everything
from heads.plans import Negatives
from heads.source import check_roles, check_streams, context_of
from heads.train_config import TrainConfig


@dataclass(frozen=True, slots=True)
class Wanted:
    """A run that is to be made; fields as the arguments of `heads.runs.train_run`.

    `command` is the command line that makes it, where it is not `headstart train` alone.
    """

    method: str
    out: Path
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    label: str | None = None
    backbone: str | None = None
    command: str = ""


class Batches(NamedTuple):
    """What runs must have in common to take the same batches; `learned` is what they are trained on."""

    learned: str
    batch_size: int
    negatives: Negatives
    order_seed: int
    device: str


@dataclass(frozen=True, slots=True)
class Sound:
    """A request that was looked at, and is in order.

    Attributes:
        wanted: the request.
        task: what it is trained for.
        kind: the method's head.
        head_config, train: its settings.
        context: what its head is built from.

    """

    wanted: Wanted
    task: str
    kind: type[Head]
    head_config: Any
    train: TrainConfig
    context: Context

    @property
    def learns(self) -> bool:
        """Does it want a train split?"""
        return self.kind.trained_by(self.head_config) != "none"

    @property
    def learned(self) -> str:
        """The task whose train split it is trained on."""
        return self.kind.learns_from(self.head_config) or self.task

    @property
    def needs(self) -> Needs:
        """Streams it reads when it scores."""
        return self.kind.needs(self.head_config)

    @property
    def training_needs(self) -> Needs:
        """Streams of its batches."""
        return self.kind.training_needs(self.head_config)

    @property
    def batches(self) -> Batches:
        """What it must have in common with others to take the same batches."""
        config = self.train
        order = config.seed if config.order_seed is None else config.order_seed
        device = str(config.torch_device())
        return Batches(self.learned, config.batch_size, config.negatives, order, device)

    def command(self, cache: FeatureCache) -> str:
        """The command that makes this run by itself; empty where none can say its settings."""
        wanted = self.wanted
        configs = {"head": self.head_config, "train": self.train}
        settings = {
            name: _without_defaults(configs[name], values)
            for name, values in wanted.settings.items()
        }
        return wanted.command or train_command(
            wanted.method,
            wanted.out.absolute(),
            cache=cache.place.absolute(),
            task=self.task,
            settings=settings,
            backbone=wanted.backbone,
            threads=torch.get_num_threads(),
        )

    def build(self) -> Head:
        """Its head, freshly drawn."""
        seed_everything(self.train.seed)
        return self.kind(self.head_config, self.context).to(self.train.torch_device())


def _without_defaults(config: BaseModel, values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings less those None that say what is so anyway, since no command line has a word for None."""
    fields = type(config).model_fields
    return {
        key: value
        for key, value in values.items()
        if value is not None or fields[key].get_default(call_default_factory=True) is not None
    }


def sound(cache: FeatureCache, wanted: Wanted, task: str) -> Sound:
    """Look at a request: its method, its settings, the streams it wants.

    Raises:
        ConfigError, MissingStream, CheckpointMismatch: what is wrong with it.
    """
    for section in wanted.settings:
        check_section(section, f"the settings of {wanted.method}")
    method, module = wanted.method, load_method(wanted.method)
    head = module.Head
    head_config = parse(module.Config, wanted.settings.get("head", {}), "head")
    train = parse(TrainConfig, wanted.settings.get("train", {}), "train")
    if task not in head.tasks:
        raise ConfigError(f"{method} works on {', '.join(sorted(head.tasks))}, not on {task}")
    needs = head.needs(head_config)
    if head.trained_by(head_config) != "none":
        check_streams(cache, head.training_needs(head_config), method)
    if task in cache.tasks.kinds:
        check_roles(needs, task, method)
        check_streams(cache, needs, method)
    if wanted.backbone is not None:
        checkpoint.refuse_unused(bool(needs.live), method)
    context = head.prepare(head_config, context_of(cache, wanted.backbone), cache)
    return Sound(wanted, task, head, head_config, train, context)
