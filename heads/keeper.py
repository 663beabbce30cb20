"""When the state of a training is written, and how it goes on: for learners that stand at the same batch.

step ── step ── step ── step ── step         looked at between steps: is the time up? did somebody ask to stop?
             ▲ written          ▲ written
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any
from warnings import warn

from heads import ranks, training_state
from heads.learner import Learner
from heads.tensorboard import Events


@dataclass(frozen=True, slots=True)
class Kept:
    """A learner whose state is kept.

    Attributes:
        learner: one that is trained by gradient.
        out: the directory of its run.
        belongs: what must be the same when it goes on.
        events: where its history is told, if anywhere.

    """

    learner: Learner
    out: Path
    belongs: Mapping[str, Any] = field(default_factory=dict)
    events: Events | None = None


class Keeper:
    """Keeps what learners need to go on after an interruption.

    Args:
        kept: the learners that are trained side by side.
        every: minutes between two writings; 0 writes only when `stop` is set.
        stop: once set, the step in hand is finished, the state written and `KeyboardInterrupt` raised.
        found: what to go on from; None is the beginning.
        room: limits of memory of their batches.
    """

    def __init__(
        self,
        kept: Sequence[Kept] = (),
        *,
        every: float = 0.0,
        stop: Event | None = None,
        found: training_state.Found | None = None,
        room: Mapping[str, int] | None = None,
    ) -> None:
        self.kept, self.every, self.stop, self.found = kept, every, stop, found
        self.room = dict(room or {})
        self.number = max((n for n, _ in found.states.values()), default=0) if found else 0
        self.written = time.monotonic()

    def resume(self) -> tuple[int, int]:
        """Put the learners, who have begun, where they stood: the epoch, and how many of its batches are used up.

        Raises:
            CheckpointMismatch: a file is damaged.
        """
        found = self.found
        for one in self.kept:
            if ranks.is_first():
                # Of two states, the newer one is of a writing that not all came to.
                training_state.clear(one.out, found and found.states[one.out][0])
            if found:
                training_state.restore(one.learner, one.out, found)
        self.written = time.monotonic()
        return (found.epoch, found.used) if found else (0, 0)

    def keep(self, epoch: int, used: int) -> None:
        """Write the state if it is time, or if somebody asked to stop; never within a step.

        Raises:
            KeyboardInterrupt: somebody asked to stop, and the state is written.
        """
        for one in self.kept:
            if one.events is not None:
                one.events.tell(one.learner.history)
        if any(one.learner.in_step for one in self.kept):
            return
        stops = ranks.anywhere(flag=self.stop is not None and self.stop.is_set())
        due = self.every > 0 and time.monotonic() - self.written >= 60 * self.every
        if (stops or due) and ranks.is_first():
            try:
                self._write(epoch, used)
            except OSError as error:
                if stops:
                    raise
                # The state before is whole, and the training worth more than this one.
                self.written = time.monotonic()
                warn(f"the state of the training could not be written: {error}", stacklevel=2)
        if stops:
            raise KeyboardInterrupt

    def _write(self, epoch: int, used: int) -> None:
        self.number += 1
        for one in self.kept:
            if one.events is not None:
                one.events.flush()
            training_state.save(
                one.out, self.number, one.learner, (epoch, used), one.belongs, self.room
            )
        for one in self.kept:
            training_state.clear(one.out, self.number)
        self.written = time.monotonic()
