"""A training that is interrupted, anywhere, and goes on ends in the bits of one that nobody disturbed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from drawn import make_drawn
from torch import Tensor, nn

from cache_builder import FeatureCache
from heads import loader as loader_file
from heads import pools as pools_file
from heads import source as source_file
from heads import training_state
from heads.base import Context, EmbeddingHead, HeadConfig, Needs
from heads.cli import main
from heads.compare import Entry, Question, _run
from heads.compare import Job as Compared
from heads.errors import CheckpointMismatch, HeadError, RunExists, TrainingDiverged
from heads.features import Batch, Features
from heads.keeper import Keeper, Kept
from heads.learner import Learner, seed_everything
from heads.loader import Loader
from heads.run_files import Trained
from heads.source import context_of
from heads.sweep import train_runs
from heads.tasks import load_task
from heads.train import fit_together
from heads.train_config import TrainConfig
from heads.wanted import Wanted

ROOT = Path(__file__).parent.parent
SEED, POINTS, MOMENTS = 5, 7, 2
SMALL = {"layers": 1, "dim": 8, "heads": 2, "ffn": 12, "dropout": 0.3}
LEARNED = {"learn_context": True, "dropout": 0.2, "train_candidates": 5}
TRAIN = {"epochs": 2, "batch_size": 5, "lr": 1e-2, "device": "cpu"}
TIMES = ("command", "data_wait", "seconds", "data_wait_seconds")


class After(Event):
    """Set from the n-th look at it on."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def is_set(self) -> bool:
        self.looks -= 1
        return self.looks < 0


@pytest.fixture(scope="module")
def cache(fast_folder: Path) -> FeatureCache:
    return make_drawn(fast_folder / "to-resume.zarr")


@pytest.fixture
def caches(
    cache: FeatureCache, live_cache: Callable[[str], FeatureCache]
) -> Callable[[str], FeatureCache]:
    """The cache for a method: one whose backbone is there, if it runs a side of it."""
    return lambda method: live_cache("clip") if method == "csp" else cache


@pytest.fixture
def from_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Set a limit of memory in bytes; with 0 every stream is read in a block shuffle."""

    def limit(size: int) -> None:
        for file in (loader_file, source_file):
            monkeypatch.setattr(file, "quarter_of_free_memory", lambda: size)

    return limit


def trained(cache: FeatureCache, runs: Sequence[Wanted], task: str, **options: Any) -> list[Any]:
    found = train_runs(cache, runs, task=task, progress=False, **options)
    assert all(isinstance(run, Trained) for run in found)
    return [result(run) for run in found if isinstance(run, Trained)]


def result(run: Trained) -> tuple[Any, ...]:
    """All of a run but for the clock."""
    history = [{k: v for k, v in line.items() if k not in TIMES} for line in run.result.history]
    record = {k: v for k, v in run.record.items() if k not in TIMES}
    weights = {name: value.numpy().tobytes() for name, value in run.head.state_dict().items()}
    return weights, history, record, run.result.best, sorted(p.name for p in run.path.iterdir())


def wanted(out: Path, method: str, head: Mapping[str, Any], **train: Any) -> Wanted:
    return Wanted(method, out, {"head": dict(head), "train": {**TRAIN, **train}})


def stopped(cache: FeatureCache, runs: Sequence[Wanted], task: str, looks: int) -> bool:
    """Go on until the n-th look; was it not finished by then?"""
    options: dict[str, Any] = {"task": task, "progress": False, "resume": True}
    try:
        train_runs(cache, runs, stop=After(looks), **options)
    except KeyboardInterrupt:
        return True
    return False


CASES: list[tuple[str, str, dict[str, Any], int | None, dict[str, Any]]] = [
    ("csp", "czsl", LEARNED, None, {"optimizer": "adam", "batch_size": 9}),
    ("csp", "czsl", LEARNED, 0, {"accumulate": 3}),
    ("tf_local", "two_by_two", SMALL, 0, {"batch_size": 4, "patience": 1, "epochs": 3}),
    ("tf_local", "czsl", SMALL, None, {"optimizer": "adam", "accumulate": 2, "steps": 7}),
]


@pytest.mark.parametrize(("method", "task", "head", "room", "train"), CASES)
def test_interrupted_after_every_single_step_it_ends_in_the_same_bits(
    caches: Callable[[str], FeatureCache],
    from_disk: Callable[[int], None],
    fast_path: Path,
    method: str,
    task: str,
    head: dict[str, Any],
    room: int | None,
    train: dict[str, Any],
) -> None:
    """Before the first step, amid an epoch, between an epoch's last step and its validation, and after it."""
    if room is not None:
        from_disk(room)
    whole, again = (
        [wanted(fast_path / name, method, head, **train)] for name in ("whole", "again")
    )
    expected = trained(caches(method), whole, task)
    assert stopped(caches(method), again, task, 1)  # at the beginning
    stops = 0
    while stopped(caches(method), again, task, 2):
        stops += 1
        assert len(training_state.numbers(again[0].out)) == 1
    steps = expected[0][2]["steps"]
    assert stops >= steps - 1 > 3
    assert trained(caches(method), again, task, resume=True) == expected


def test_runs_side_by_side_stop_and_go_on_together(cache: FeatureCache, fast_path: Path) -> None:
    """One of them ends amid an epoch, and one gathers batches: states are written where none is within a step."""

    def runs(folder: Path) -> list[Wanted]:
        return [
            wanted(folder / "one", "tf_local", SMALL, seed=1),
            wanted(folder / "short", "tf_local", SMALL, seed=1, steps=2),
            wanted(folder / "gathers", "tf_local", SMALL, seed=1, accumulate=2),
            wanted(folder / "cosine", "zero_shot", {}),
            wanted(folder / "other-batches", "tf_local", SMALL, seed=1, batch_size=10),
        ]

    expected = trained(cache, runs(fast_path / "whole"), "czsl")
    for looks in (2, 5, 9):
        asked = runs(fast_path / str(looks))
        assert stopped(cache, asked, "czsl", looks)
        assert trained(cache, asked, "czsl", resume=True) == expected


def test_what_is_new_or_was_removed_starts_beside_what_goes_on(
    cache: FeatureCache, fast_path: Path
) -> None:
    def runs(folder: Path) -> list[Wanted]:
        return [wanted(folder / str(s), "tf_local", SMALL, seed=s, order_seed=0) for s in range(3)]

    expected = trained(cache, runs(fast_path / "whole"), "czsl")
    asked = runs(fast_path / "again")
    assert stopped(cache, asked[:1], "czsl", 5)
    assert stopped(cache, asked[1:2], "czsl", 3)
    assert len(training_state.find([run.out for run in asked])) == 2
    assert trained(cache, asked, "czsl", resume=True) == expected


@pytest.mark.parametrize(("then", "now"), [(0, 1 << 30), (1 << 30, 0)])
def test_the_order_is_that_of_the_memory_there_was(
    cache: FeatureCache, from_disk: Callable[[int], None], fast_path: Path, then: int, now: int
) -> None:
    whole, again = (
        [wanted(fast_path / name, "tf_local", SMALL, accumulate=2)] for name in ("whole", "again")
    )
    from_disk(then)
    expected = trained(cache, whole, "czsl")
    assert stopped(cache, again, "czsl", 4)
    from_disk(now)
    assert trained(cache, again, "czsl", resume=True) == expected


def test_another_order_is_refused(
    cache: FeatureCache,
    from_disk: Callable[[int], None],
    fast_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = [wanted(fast_path / "run", "tf_local", SMALL)]
    from_disk(0)
    monkeypatch.setattr(loader_file, "quarter_of_free_memory", lambda: 1 << 30)
    monkeypatch.setattr(pools_file, "POOL_CHUNKS", 1)
    assert stopped(cache, runs, "czsl", 4)
    monkeypatch.setattr(pools_file, "POOL_CHUNKS", 2)
    with pytest.raises(
        RunExists, match=r"order was 'within 1 .* and is 'within 2 chunks of image/p"
    ):
        trained(cache, runs, "czsl", resume=True)


class Anchored(EmbeddingHead):
    """Its loss holds on to what it made of the images before training."""

    score_space = "logit"

    def __init__(self, config: HeadConfig, context: Context, fails: int = 0) -> None:
        super().__init__(config, context)
        (d,) = context.shapes["image/pooled"]
        self.matrix, self.dropout = nn.Linear(d, d), nn.Dropout(0.4)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.fails, self.sizes = fails, set[str]()

    @classmethod
    def needs(cls, config: Any) -> Needs:
        return Needs(frozenset({"image/pooled"}), frozenset({"text/pooled"}))

    def noticed(self) -> set[str]:
        return self.sizes

    def before_training(self, examples: Iterable[Features]) -> Mapping[str, Tensor]:
        return {"own/start": torch.cat([self.embed_queries(part) for part in examples])}

    def embed_queries(self, queries: Features) -> Tensor:
        return self.matrix(self.dropout(queries["image/pooled"]))

    def embed_candidates(self, candidates: Features) -> Tensor:
        return candidates["text/pooled"]

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen += 1
        self.sizes.add(f"{int(self.seen)}: {len(batch.queries)} rows")
        moved = self.embed_queries(batch.queries) - batch.queries["own/start"]
        fit = nn.functional.cross_entropy(self(batch.queries, batch.candidates), batch.target)
        loss = fit + moved.square().mean()
        return loss * (torch.nan if int(self.seen) == self.fails else 1), {"fit": fit.detach()}


def anchored(
    cache: FeatureCache, out: Path, *, stop: Event | None = None, fails: int = 0
) -> list[Any]:
    """Two such heads on the same batches, the second of which may fail; with what is in `out` gone on with."""
    config = TrainConfig(seed=3, epochs=3, batch_size=9, lr=1e-2, device="cpu")
    learners: list[Learner] = []
    for n in (0, fails):
        seed_everything(config.seed)
        learners.append(Learner(Anchored(HeadConfig(), context_of(cache), n), config))
    data = load_task(cache, "czsl", "train")
    batches = Loader(data, learners[0].needs, batch_size=config.batch_size, seed=config.seed)
    kept = [Kept(learner, out / str(i)) for i, learner in enumerate(learners)]
    found = training_state.find([one.out for one in kept])
    keeper = Keeper(kept, stop=stop, found=found[0] if found else None)
    results = fit_together(learners, batches, progress=False, keeper=keeper)
    ends: list[Any] = []
    for learner, done in zip(learners, results, strict=True):
        if isinstance(done, HeadError):
            ends.append((type(done), str(done)))
            continue
        weights = {k: v.numpy().tobytes() for k, v in learner.head.state_dict().items()}
        lines = [{k: v for k, v in line.items() if k not in TIMES} for line in done.history]
        ends.append((weights, lines, done.steps, sorted(learner.head.noticed())))
    return ends


@pytest.mark.parametrize("looks", [0, 1, 6, 8, 13])
def test_what_was_computed_before_training_and_failures_come_back(
    cache: FeatureCache, fast_path: Path, looks: int
) -> None:
    expected = anchored(cache, fast_path / "whole", fails=7)
    assert expected[1][0] is TrainingDiverged
    for name in ("0", "1"):
        (fast_path / "again" / name).mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        anchored(cache, fast_path / "again", fails=7, stop=After(looks))
    assert anchored(cache, fast_path / "again", fails=7) == expected


class Precise(Anchored):
    """Without dropout, and in float64: what is left of a difference is not rounding."""

    def __init__(self, context: Context) -> None:
        super().__init__(HeadConfig(), context)
        self.dropout = nn.Identity()
        self.double()

    def embed_queries(self, queries: Features) -> Tensor:
        return self.matrix(queries["image/pooled"].double())

    def forward(self, queries: Features, candidates: Features) -> Tensor:
        return self.embed_queries(queries) @ self.embed_candidates(candidates).double().T


def stepped(cache: FeatureCache, **train: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Weights and history of that head."""
    config = TrainConfig(seed=3, epochs=3, lr=1e-2, device="cpu", **train)
    seed_everything(config.seed)
    learner = Learner(Precise(context_of(cache)), config)
    data = load_task(cache, "czsl", "train")
    batches = Loader(data, learner.needs, batch_size=config.batch_size, seed=config.seed)
    (done,) = fit_together([learner], batches, progress=False)
    assert not isinstance(done, Exception)
    return learner.head.state_dict(), done.history


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize("clip", [0.05, 1e9])
def test_batches_that_make_one_step_are_one_large_batch(
    cache: FeatureCache, optimizer: str, clip: float
) -> None:
    """37 rows: 5 + 5, 5 + 5, 5 + 5 and 5 + 2 are 10, 10, 10 and 7; a clip that bites acts on their mean."""
    train = {"optimizer": optimizer, "clip": clip}
    mine, history = stepped(cache, batch_size=10, **train)
    theirs, pieces = stepped(cache, batch_size=5, accumulate=2, **train)
    other, _ = stepped(cache, batch_size=5, **train)
    assert [line["step"] for line in history] == list(range(1, 13))
    for name in {*mine} - {"seen"}:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1e-9)
        assert not torch.allclose(mine[name], other[name], rtol=0, atol=1e-4)
    for a, b in zip(history, pieces, strict=True):
        assert a.keys() == b.keys()
        for name in set(a) - {*TIMES}:
            assert a[name] == pytest.approx(b[name], abs=1e-9), name


def test_prompts_too_learn_the_same_from_batches_in_pieces(
    live_cache: Callable[[str], FeatureCache], fast_path: Path
) -> None:
    """An epsilon of 1e-2 keeps Adam from making steps of gradients that are rounding alone."""
    plain = {"learn_context": True, "dropout": 0.0}
    large, small = (
        wanted(fast_path / f"{size}", "csp", plain, batch_size=size, accumulate=k, eps=1e-2)
        for size, k in ((10, 1), (5, 2))
    )
    one, other = train_runs(live_cache("clip"), [large, small], task="czsl", progress=False)
    assert isinstance(one, Trained)
    assert isinstance(other, Trained)
    assert one.result.steps == other.result.steps == 2 * 4
    mine, theirs = one.head.state_dict(), other.head.state_dict()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1e-6)


# The command.


def train(cache: FeatureCache, out: Path, *more: str, **sets: Any) -> int:
    given = {f"head.{k}": v for k, v in SMALL.items()} | {f"train.{k}": v for k, v in TRAIN.items()}
    given |= {name.replace("__", "."): value for name, value in sets.items()}
    words = [word for k, v in given.items() for word in ("--set", f"{k}={v}")]
    words += ["--cache", str(cache.path), "--out", str(out), "--task", "czsl", *more]
    return main(["train", "tf_local", *words])


@pytest.fixture
def ctrl_c(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Press Ctrl-C while a head learns from its n-th batch, and once more, if asked to."""
    real, seen = Learner.take, [0]

    def press(at: int, times: int = 1) -> None:
        seen[0] = 0

        def take(self: Learner, *args: Any, **options: Any) -> None:
            seen[0] += 1
            for _ in range(times if seen[0] == at else 0):
                signal.raise_signal(signal.SIGINT)
            real(self, *args, **options)

        monkeypatch.setattr(Learner, "take", take)

    return press


def files(out: Path) -> list[str]:
    return sorted(p.name for p in out.iterdir())


def test_ctrl_c_says_how_to_go_on_and_resume_does(
    cache: FeatureCache,
    fast_path: Path,
    capsys: pytest.CaptureFixture[str],
    ctrl_c: Callable[..., None],
) -> None:
    run, before = fast_path / "run", signal.getsignal(signal.SIGINT)
    ctrl_c(5)
    assert train(cache, run) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert "stopped; where the training stands lies in" in said
    assert "with --resume" in said
    assert files(run) == ["training-1.json", "training-1.safetensors"]
    assert signal.getsignal(signal.SIGINT) is before
    assert train(cache, run) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "was interrupted; go on with the same command and --resume, or remove it" in said
    ctrl_c(3)
    assert train(cache, run, "--resume") == 130
    assert f"{run} goes on after step 5" in capsys.readouterr().out
    assert json.loads((run / "training-2.json").read_text())["state"]["step"] == 8
    assert train(cache, run, "--resume") == 0
    assert f"wrote {run}; next" in capsys.readouterr().out
    assert train(cache, fast_path / "whole") == 0
    assert files(run) == files(fast_path / "whole")
    for name in ("model.safetensors", "config.json"):
        assert (run / name).read_bytes() == (fast_path / "whole" / name).read_bytes()
    capsys.readouterr()
    assert train(cache, run, "--resume") == 0
    out = capsys.readouterr().out
    assert f"{run} is finished already" in out
    assert "wrote nothing anew" in out


def test_a_second_ctrl_c_stops_at_once_and_leaves_nothing_half(
    cache: FeatureCache,
    fast_path: Path,
    capsys: pytest.CaptureFixture[str],
    ctrl_c: Callable[..., None],
) -> None:
    ctrl_c(5, times=2)
    assert train(cache, fast_path / "run", "--resume") == 130
    found = capsys.readouterr()
    assert "starts from the beginning" in found.out
    assert "stopped before anything was written" in found.err
    assert not (fast_path / "run").exists()


def test_the_state_is_written_as_often_as_asked(
    cache: FeatureCache, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers: list[int] = []
    real = training_state.save

    def counted(out: Path, number: int, *rest: Any) -> None:
        real(out, number, *rest)
        numbers.append(number)

    monkeypatch.setattr(training_state, "save", counted)
    for name, every, expected in (("no", "10", 0), ("off", "0", 0), ("all", "1e-9", 16)):
        numbers.clear()
        assert train(cache, fast_path / name, "--save-every", every) == 0
        assert len(numbers) >= expected >= 0
        assert expected or not numbers
    assert train(cache, fast_path / "x", "--save-every", "-1") == 1


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        ({"train__lr": 0.02}, "train.lr was 0.01 and is 0.02"),
        ({"head__dropout": 0.1, "train__seed": 4}, "head.dropout was 0.3 and is 0.1; train.seed"),
        ({"train__accumulate": 1}, "asked.train.accumulate was not given and is 1"),
    ],
)
def test_other_settings_are_refused_by_name(
    cache: FeatureCache,
    fast_path: Path,
    capsys: pytest.CaptureFixture[str],
    ctrl_c: Callable[..., None],
    sets: dict[str, Any],
    says: str,
) -> None:
    run = fast_path / "run"
    ctrl_c(2)
    assert train(cache, run) == 130
    before = files(run)
    capsys.readouterr()
    for _ in range(2):  # interrupted, and then finished
        assert train(cache, run, "--resume", **sets) == 1
        said = capsys.readouterr().err.strip()
        assert says in said
        assert "lr was" not in said.replace(says, "")
        assert "\n" not in said
        assert files(run) == before
        assert train(cache, run, "--resume") == 0
        before = files(run)
        capsys.readouterr()


def test_a_method_that_is_solved_does_not_take_the_place_of_one_in_training(
    cache: FeatureCache, fast_path: Path
) -> None:
    assert stopped(cache, [wanted(fast_path / "run", "tf_local", SMALL)], "czsl", 4)
    probe = wanted(fast_path / "run", "linear_probe", {})
    with pytest.raises(RunExists, match="method was 'tf_local' and is 'linear_probe'"):
        trained(cache, [probe], "czsl", resume=True)


def test_another_cache_is_refused(
    cache: FeatureCache,
    fast_path: Path,
    capsys: pytest.CaptureFixture[str],
    ctrl_c: Callable[..., None],
) -> None:
    ctrl_c(2)
    assert train(cache, fast_path / "run") == 130
    other = make_drawn(fast_path / "other.zarr", order_seed=1)
    assert train(other, fast_path / "run", "--resume") == 1
    said = capsys.readouterr().err
    assert f"cache.digest was '{cache.digest()}' and is '{other.digest()}'" in said


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)


def digit(file: Path) -> None:
    text = file.read_text()
    file.write_text(text.replace('"step": 2', '"step": 3'))


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        ("json", cut),
        ("json", flip),
        ("json", digit),
        ("safetensors", cut),
        ("safetensors", flip),
        ("safetensors", Path.unlink),
    ],
)
def test_a_damaged_state_is_said_in_a_sentence(
    cache: FeatureCache,
    fast_path: Path,
    capsys: pytest.CaptureFixture[str],
    ctrl_c: Callable[..., None],
    suffix: str,
    damage: Callable[[Path], Any],
) -> None:
    run = fast_path / "run"
    ctrl_c(2)
    assert train(cache, run) == 130
    damage(run / f"training-1.{suffix}")
    before = files(run)
    capsys.readouterr()
    assert train(cache, run, "--resume") == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"headstart train: {run}/training-1.{suffix} is damaged" in said
    assert f"remove {run} to start anew" in said
    assert files(run) == before


def test_a_state_that_does_not_fit_the_method_is_said(cache: FeatureCache, fast_path: Path) -> None:
    """As when the method's code has changed meanwhile."""
    for name in ("0", "1"):
        (fast_path / name).mkdir()
    with pytest.raises(KeyboardInterrupt):
        anchored(cache, fast_path, stop=After(3))
    (found,) = training_state.find([fast_path / "0"])
    config = TrainConfig(device="cpu")
    head = Anchored(HeadConfig(), context_of(cache))
    head.more = nn.Linear(2, 3)
    with pytest.raises(CheckpointMismatch, match=r"does not fit what its method builds now .*more"):
        training_state.restore(Learner(head, config), fast_path / "0", found)


def test_other_files_beside_a_state_stay_and_unfinished_ones_are_cleared(
    cache: FeatureCache, fast_path: Path, ctrl_c: Callable[..., None]
) -> None:
    run = fast_path / "run"
    ctrl_c(2)
    assert train(cache, run) == 130
    (run / "notes.txt").touch()
    (run / "training-2.safetensors.0a1b.part").touch()
    assert train(cache, run, "--resume") == 0
    assert "notes.txt" in files(run)
    assert not [name for name in files(run) if name.startswith("training")]


def test_a_comparison_refuses_what_was_begun_otherwise_and_keeps_it(
    cache: FeatureCache, fast_path: Path, ctrl_c: Callable[..., None]
) -> None:
    run = fast_path / "run"
    ctrl_c(2)
    assert train(cache, run) == 130
    before = {name: (run / name).read_bytes() for name in files(run)}
    entry = Entry("local", "tf_local", "czsl", (Question("czsl"),), SMALL, TRAIN)
    with pytest.raises(RunExists, match=r"train\.seed was 42 and is 4"):
        _run([Compared(str(cache.path), entry, 4, run)])
    assert {name: (run / name).read_bytes() for name in files(run)} == before


@pytest.fixture(scope="module")
def trials(fast_folder: Path) -> list[dict[str, Any]]:
    folder = fast_folder / f"kill-training-{os.getpid()}"
    folder.mkdir()
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests/kill_training.py"),
            str(folder),
            *map(str, (SEED, POINTS, MOMENTS)),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.partition("TRIAL ") for line in done.stdout.splitlines()]
    return [json.loads(told) for _, mark, told in lines if mark]


def test_killed_anywhere_the_command_goes_on_to_the_same_files(
    trials: list[dict[str, Any]],
) -> None:
    """Real SIGKILLs of a sweep of two runs, at file operations and at moments, and again while it resumes."""
    assert len(trials) == POINTS + MOMENTS
    for trial in trials:
        assert trial["equal"], trial
        assert not trial["at"] or trial["killed"] == -signal.SIGKILL
    assert any(trial["steps"] for trial in trials)
