"""fit(): the one training loop, read top to bottom.

Every optimised method of this project is trained by this loop, alone or beside others that take the same batches;
`closed_form` heads are solved on the whole set instead, and heads without parameters pass through. The defaults follow
the released fine-tuning code of BiVLC (arXiv 2406.09952) where it gives a value; each field of `TrainConfig` names its
source.

    batches ──▶ batch ──▶ head 1: loss, step     each with its own optimiser and random numbers (learner.py):
                    ├──▶ head 2: loss, step      the same bits as alone
                    └──▶ …                       read, gathered, widened and moved to the device once

Between two steps the state of all may be written, to go on from it in the same bits (keeper.py).
"""

from collections.abc import Sequence
from functools import reduce
from operator import or_
from statistics import fmean

from tqdm import tqdm

from heads.base import Head
from heads.errors import ConfigError, HeadError
from heads.keeper import Keeper
from heads.learner import FitResult, Learner, Validate
from heads.loader import Loader
from heads.train_config import TrainConfig


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
    (result,) = fit_together([Learner(head, config, validate)], batches, progress=progress)
    if isinstance(result, HeadError):
        raise result
    return result


def fit_together(
    learners: Sequence[Learner],
    batches: Loader | None,
    *,
    progress: bool = True,
    keeper: Keeper | None = None,
) -> list[FitResult | HeadError]:
    """Train several heads in one pass over the batches; each ends in the same bits as alone on the same batches.

    Args:
        learners: one a head, on one device; a head sees of a batch the streams it declares.
        batches: the training data, with the streams of all of them; None for heads without training.
        progress: show one bar for all.
        keeper: of those that are trained by gradient; None starts at the beginning, and writes nothing.

    Returns:
        What each did, in order; a learner that failed, as by a loss that is not finite, is its error, and does not
        hold up the others.

    Raises:
        ConfigError: there are no batches for a head that learns from data.
        KeyboardInterrupt: the keeper was asked to stop, and has written the state.
    """
    for learner in learners:
        if batches is None and learner.head.training_by != "none":
            how = "trained by gradient" if learner.head.training_by == "gradient" else "solved"
            raise ConfigError(f"{type(learner.head).__module__} is {how}, but got no batches")
    if batches is not None:
        by_gradient = [x for x in learners if x.head.training_by == "gradient"]
        _descend(by_gradient, batches, progress, keeper or Keeper())
    _solve([x for x in learners if x.head.training_by != "gradient"], batches)
    return [learner.failure or learner.result() for learner in learners]


def _descend(learners: Sequence[Learner], batches: Loader, progress: bool, keeper: Keeper) -> None:
    for learner in learners:
        learner.begin(batches)
    epoch, used = keeper.resume()
    total = max((learner.total for learner in learners), default=0)
    done = max((learner.step for learner in learners), default=0)
    shown = progress and total > 0
    with tqdm(total=total, initial=done, desc="fit", unit="step", disable=not shown) as bar:
        waited = batches.waited
        while running := [learner for learner in learners if learner.runs or learner.in_epoch]:
            keeper.keep(epoch, used)
            for batch in batches.epoch(epoch, used):
                wait, waited = batches.waited - waited, batches.waited
                used += 1
                for learner in running:
                    if learner.runs:
                        learner.take(batch, epoch, wait, last=used == len(batches))
                bar.update(max(learner.step for learner in learners) - bar.n)
                bar.set_postfix_str(_standing(running), refresh=False)
                if not any(learner.runs for learner in running):
                    break
                keeper.keep(epoch, used)
            for learner in running:
                learner.end_epoch(epoch)
            epoch, used = epoch + 1, 0


def _solve(learners: Sequence[Learner], batches: Loader | None) -> None:
    solved = [learner for learner in learners if learner.head.training_by == "closed_form"]
    whole = None
    if solved and batches is not None:
        whole = batches.all(reduce(or_, (learner.needs for learner in solved)))
    for learner in learners:
        learner.solve(whole if learner in solved else None)


def _standing(learners: Sequence[Learner]) -> str:
    """Loss, share of waiting and best validation, of all that are running."""
    steps = [x.history[-1] for x in learners if x.history and "loss" in x.history[-1]]
    if not steps:
        return ""
    losses = [step["loss"] for step in steps]
    ends = dict.fromkeys(f"{end:.3f}" for end in (min(losses), max(losses)))
    wait = fmean(step["data_wait"] for step in steps)
    found = [f"loss {'–'.join(ends)}", f"waits {wait:.0%}"]
    best = [learner.best for learner in learners if learner.best.record]
    if best:
        found.append(f"best {best[0].metric} {max(b.value for b in best):.4f}")
    return " · ".join(found)
