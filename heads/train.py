"""fit(): the one training loop, read top to bottom.

Every optimised method of this project is trained by this loop, alone or beside others that take the same batches;
`closed_form` heads are solved on the whole set instead, and heads without parameters pass through. The defaults follow
the released fine-tuning code of BiVLC (arXiv 2406.09952) where it gives a value; each field of `TrainConfig` names its
source.

    batches ──▶ batch ──▶ head 1: loss, step     each with its own optimiser and random numbers (training.py):
                    ├──▶ head 2: loss, step      the same bits as alone
                    └──▶ …                       read, gathered, widened and moved to the device once
"""

from collections.abc import Sequence
from itertools import islice
from statistics import fmean

from tqdm import tqdm

from heads.base import Head
from heads.errors import ConfigError, TrainingDiverged
from heads.loader import Loader
from heads.train_config import TrainConfig
from heads.training import FitResult, Training, Validate


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
    (result,) = fit_together([Training(head, config, validate)], batches, progress=progress)
    if isinstance(result, TrainingDiverged):
        raise result
    return result


def fit_together(
    trainings: Sequence[Training], batches: Loader | None, *, progress: bool = True
) -> list[FitResult | TrainingDiverged]:
    """Train several heads in one pass over the batches; each ends in the same bits as alone on the same batches.

    Args:
        trainings: one a head, on one device; a head sees of a batch the streams it declares.
        batches: the training data, with the streams of all of them; None for heads without training.
        progress: show one bar for all.

    Returns:
        What each did, in order; a training that diverged is its error, and does not hold up the others.

    Raises:
        ConfigError: as for `fit`.
    """
    for training in trainings:
        if batches is None and training.head.training_kind != "none":
            how = "trained by gradient" if training.head.training_kind == "gradient" else "solved"
            raise ConfigError(f"{type(training.head).__module__} is {how}, but got no batches")
    if batches is not None:
        learning = [t for t in trainings if t.head.training_kind == "gradient"]
        for training in learning:
            training.begin(len(batches))
        _descend(learning, batches, progress=progress)
    _solve([t for t in trainings if t.head.training_kind != "gradient"], batches)
    return [t.failure or t.result() for t in trainings]


def _descend(trainings: Sequence[Training], batches: Loader, *, progress: bool) -> None:
    total = max((t.total for t in trainings), default=0)
    with tqdm(total=total, desc="fit", unit="step", disable=not progress or not total) as bar:
        epoch, waited = 0, batches.waited
        while running := [t for t in trainings if t.runs]:
            left = max(t.total - t.step for t in running)
            for batch in islice(batches.epoch(epoch), left):
                wait, waited = batches.waited - waited, batches.waited
                for training in running:
                    if training.runs:
                        training.take(batch, epoch, wait)
                bar.update()
                bar.set_postfix_str(_standing(running), refresh=False)
            for training in running:
                training.end_epoch(epoch)
            epoch += 1


def _solve(trainings: Sequence[Training], batches: Loader | None) -> None:
    wanted = any(t.head.training_kind == "closed_form" for t in trainings)
    whole = batches.all() if wanted and batches is not None else None
    for training in trainings:
        training.solve(whole if training.head.training_kind == "closed_form" else None)


def _standing(trainings: Sequence[Training]) -> str:
    """Loss, share of waiting and best validation, of all that are running."""
    steps = [t.history[-1] for t in trainings if t.history and "loss" in t.history[-1]]
    if not steps:
        return ""
    losses = [step["loss"] for step in steps]
    ends = dict.fromkeys(f"{end:.3f}" for end in (min(losses), max(losses)))
    wait = fmean(step["data_wait"] for step in steps)
    found = [f"loss {'–'.join(ends)}", f"waits {wait:.0%}"]
    best = [t.best for t in trainings if t.best.record]
    if best:
        found.append(f"best {best[0].metric} {max(b.value for b in best):.4f}")
    return " · ".join(found)
