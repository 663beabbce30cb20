"""What TensorBoard reads is what the history says, also after interruptions, and a run is the same with it."""

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn import make_drawn
from kill_builds import ending, in_child
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_heads_resume import SMALL, After, result, wanted

from cache_builder import FeatureCache
from heads import training_state
from heads.cli import main
from heads.errors import RunExists, TrainingDiverged
from heads.run_files import Failed, Trained, taken
from heads.sweep import train_runs
from heads.tensorboard import FOLDER, Events, scalars
from heads.wanted import Wanted

Read = dict[str, list[tuple[int, float]]]


@pytest.fixture(scope="module")
def cache(fast_folder: Path) -> FeatureCache:
    return make_drawn(fast_folder / "told.zarr")


def train(cache: FeatureCache, runs: Sequence[Wanted], **options: Any) -> list[Trained | Failed]:
    given: dict[str, Any] = {"task": "czsl", "progress": False, "tensorboard": True}
    return train_runs(cache, runs, **{**given, **options})


def read(run: Path) -> Read:
    """Tag → (step, value) of all that the files of a folder hold, in order."""
    found = EventAccumulator(str(run / FOLDER), size_guidance={"scalars": 0})
    found.Reload()
    tags: Any = found.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in tags}


def history(run: Path) -> Read:
    """The same by the run's own record; events are of single precision."""
    found: Read = {}
    for line in map(json.loads, (run / "history.jsonl").read_text().splitlines()):
        told = line.get("validation", line)
        side = "val" if "validation" in line else "train"
        told = {**told, **{k: v for k, v in line.items() if k in ("epoch", "seconds")}}
        for name, value in told.items():
            if name != "step":
                found.setdefault(f"{side}/{name}", []).append(
                    (line["step"], float(np.float32(value)))
                )
    return found


def test_every_run_of_a_sweep_is_told_beside_its_history(
    cache: FeatureCache, fast_path: Path
) -> None:
    runs = [
        wanted(fast_path / "one", "tf_local", SMALL, seed=1),
        wanted(fast_path / "gathers", "tf_local", SMALL, seed=1, accumulate=2),
        wanted(fast_path / "solved", "linear_probe", {}),
        wanted(fast_path / "cosine", "zero_shot", {}),
    ]
    for run in train(cache, runs):
        assert isinstance(run, Trained)
        assert read(run.path) == history(run.path)
    one = read(runs[0].out)
    assert len(one["train/loss"]) > len(read(runs[1].out)["train/loss"]) > 1
    assert {"train/lr", "val/auc", "val/epoch"} <= set(one)


def test_a_run_is_the_same_with_it(cache: FeatureCache, fast_path: Path) -> None:
    plain, told = (
        train(cache, [wanted(fast_path / name, "tf_local", SMALL)], tensorboard=name == "told")
        for name in ("plain", "told")
    )
    assert isinstance(plain[0], Trained)
    assert isinstance(told[0], Trained)
    *expected, names = result(plain[0])
    *found, more = result(told[0])
    assert found == expected
    assert more == sorted([*names, FOLDER])


def test_interrupted_after_every_step_nothing_is_told_twice_or_not_at_all(
    cache: FeatureCache, fast_path: Path
) -> None:
    asked = [wanted(fast_path / "run", "tf_local", SMALL, accumulate=2)]
    stops = 0
    for _ in range(100):
        try:
            train(cache, asked, resume=True, stop=After(2))
            break
        except KeyboardInterrupt:
            stops += 1
            if stops > 1:  # what was told by then is there to be looked at
                assert read(asked[0].out)["train/loss"]
    assert stops > 3
    assert read(asked[0].out) == history(asked[0].out)
    assert len([*(asked[0].out / FOLDER).iterdir()]) == 1


@pytest.mark.parametrize("at", [1, 4, 11, 16])
def test_a_killed_training_goes_on_in_the_same_curves(
    cache: FeatureCache, fast_path: Path, at: int
) -> None:
    """Killed as it tells its `at`-th line; states are written after every third step."""
    out = fast_path / "run"
    asked = [wanted(out, "tf_local", SMALL, epochs=3)]

    def work() -> None:
        tell, seen = Events.tell, [0]

        def dying(self: Events, history: Any) -> None:
            tell(self, history)
            if self.told >= at:
                self.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            seen[0] += 1

        Events.tell = dying
        train(cache, asked, save_every=1e-9 if at > 4 else 0.0)

    assert ending(in_child(work)) == -signal.SIGKILL
    assert bool(training_state.numbers(out)) == (at > 4)
    (run,) = train(cache, asked, resume=True)
    assert isinstance(run, Trained)
    assert read(out) == history(out)


def test_what_fails_or_stops_without_a_state_leaves_no_events(
    cache: FeatureCache, fast_path: Path
) -> None:
    runs = [
        wanted(fast_path / "diverges", "tf_local", SMALL, lr=1e30, clip=1e30),
        wanted(fast_path / "fine", "tf_local", SMALL),
    ]
    failed, fine = train(cache, runs)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, TrainingDiverged)
    assert not failed.path.exists()
    assert isinstance(fine, Trained)


def test_an_interruption_without_a_state_leaves_nothing(
    cache: FeatureCache, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell = Events.tell

    def interrupted(self: Events, history: Any) -> None:
        tell(self, history)
        if self.told:
            raise KeyboardInterrupt

    monkeypatch.setattr(Events, "tell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(cache, [wanted(fast_path / "run", "tf_local", SMALL)])
    assert not (fast_path / "run").exists()


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("beside", [(), ("events.out.tfevents.1.theirs",)])
def test_a_folder_of_somebody_else_is_kept(
    cache: FeatureCache, fast_path: Path, resume: bool, beside: Sequence[str]
) -> None:
    out = fast_path / "run"
    folder = out / FOLDER
    folder.mkdir(parents=True)
    for name in ("mine", *beside):
        (folder / name).write_text("mine")
    with pytest.raises(RunExists, match="already exists"):
        train(cache, [wanted(out, "tf_local", SMALL)], resume=resume)
    assert {p.name for p in folder.iterdir()} == {"mine", *beside}


def test_events_of_a_training_that_is_held_by_another_are_kept(
    cache: FeatureCache, fast_path: Path
) -> None:
    out = fast_path / "run"
    with taken([out]):
        (out / FOLDER).mkdir()
        told = out / FOLDER / "events.out.tfevents.1.theirs"
        told.write_text("theirs")
        with pytest.raises(RunExists, match="another process is training"):
            train(cache, [wanted(out, "tf_local", SMALL)], resume=True)
        assert told.read_text() == "theirs"


def test_only_numbers_are_told() -> None:
    line = {"step": 3, "epoch": 0, "loss": 0.5, "chosen": "C=1", "several": [1, 2]}
    assert dict(scalars(line)) == {"train/epoch": 0.0, "train/loss": 0.5}
    told = {"step": 3, "epoch": 1, "validation": {"auc": 0.25}, "seconds": 2}
    assert dict(scalars(told)) == {"val/epoch": 1.0, "val/seconds": 2.0, "val/auc": 0.25}


def command(cache: FeatureCache, out: Path) -> list[str]:
    words = ["train", "zero_shot", "--cache", str(cache.path), "--task", "czsl", "--out", str(out)]
    return [*words, "--set", "train.device=cpu", "--tensorboard"]


def test_the_shell_tells_it(cache: FeatureCache, fast_path: Path) -> None:
    assert main(command(cache, fast_path / "run")) == 0
    assert read(fast_path / "run") == history(fast_path / "run") != {}


def test_without_tensorboard_one_sentence_and_nothing_written(
    cache: FeatureCache,
    fast_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert main(command(cache, fast_path / "run")) == 1
    assert "pip install 'headstart[tensorboard]'" in capsys.readouterr().err
    assert not (fast_path / "run").exists()
