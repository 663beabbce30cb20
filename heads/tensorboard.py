"""What a training does, as TensorBoard shows it: the lines of its history as scalars, in RUN/tensorboard.

    {"step": 7, "loss": …, "lr": …}                  train/loss, train/lr … at step 7
    {"step": 8, "validation": {"auc": …}}            val/auc at step 8

The history is the truth: it lasts through an interruption, and a training that goes on writes its events anew from it,
so that nothing is there twice, and nothing is missing. Needs the extra `tensorboard`.
"""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from heads import training_state
from heads.errors import ConfigError

FOLDER = "tensorboard"
EVENTS = "events.out.tfevents.*"
"""What TensorBoard calls its files; nothing else in the folder is ever removed."""


class Events:
    """The events of one run.

    Args:
        out: the directory of the run; nothing is written there before the first line is told.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, out: Path) -> None:
        try:
            import_module("tensorboard")
        except ImportError as error:
            raise ConfigError(
                "--tensorboard needs TensorBoard, which is not installed: pip install 'headstart[tensorboard]'"
            ) from error
        self.out, self.told = out, 0
        self.writer: Any = None

    def tell(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write the lines that are new."""
        for line in history[self.told :]:
            if self.writer is None:
                self.writer = _writer(self.out / FOLDER)
            for tag, value in scalars(line):
                self.writer.add_scalar(tag, value, line["step"])
        self.told = len(history)

    def flush(self) -> None:
        """Let others see what was told."""
        if self.writer is not None:
            self.writer.flush()

    def end(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write what is left, and let go of the file."""
        self.tell(history)
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        if self.writer is not None:
            self.writer.close()

    def forget(self) -> None:
        """Remove the events of a run of which nothing is kept."""
        self.close()
        _remove(self.out / FOLDER)


def scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """What a line of history says, by the names that TensorBoard shows."""
    validation: Mapping[str, Any] | None = line.get("validation")
    side = "train" if validation is None else "val"
    for name, value in {**line, **(validation or {})}.items():
        if name != "step" and isinstance(value, int | float):
            yield f"{side}/{name}", float(value)


@contextmanager
def open_for(events: Iterable[Events], record: str) -> Generator[None]:
    """Close all of them whatever happens, and remove what an interruption leaves without anything to go on from."""
    try:
        yield
    finally:
        for one in events:
            one.close()
            remove_orphans(one.out, record)


def remove_orphans(out: Path, record: str) -> None:
    """Remove events of a training that left nothing to go on from, neither a state nor a `record`."""
    if not training_state.numbers(out) and not (out / record).exists():
        _remove(out / FOLDER)


def is_told(folder: Path) -> bool:
    """Is it a run's folder of events, with nothing else in it?"""
    if folder.name != FOLDER or folder.is_symlink() or not folder.is_dir():
        return False
    return all(file.match(EVENTS) and file.is_file() for file in folder.iterdir())


def _remove(folder: Path) -> None:
    """Remove the events in a folder, and the folder if nothing else is in it."""
    if folder.is_dir() and not folder.is_symlink():
        for file in folder.glob(EVENTS):
            file.unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()


def _writer(folder: Path) -> Any:
    from torch.utils.tensorboard.writer import SummaryWriter

    old = [*folder.glob(EVENTS)] if folder.is_dir() else []
    # A TensorBoard that is open has read what is replaced here; from this step on it forgets that.
    writer = SummaryWriter(str(folder), purge_step=0)
    for file in old:
        file.unlink()
    return writer
