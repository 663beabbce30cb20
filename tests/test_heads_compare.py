"""`headstart compare` as it is typed: methods or a plan, on shared samples, by any engine, to the same results."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from cache_builder import FeatureCache, build, load_backbone, load_dataset
from eval import score_io
from heads import compare as comparing
from heads import source
from heads.cli import main
from heads.compare import Entry, Question, compare
from heads.compare_engines import Processes, Ray
from heads.errors import ConfigError, HeadError, RunExists
from heads.run_files import read_run

ROOT = Path(__file__).parent.parent
SMALL = "[head]\nlayers = 1\ndim = 16\nheads = 2\nffn = 16\nn_sampled = 1\n[train]\nsteps = 2\n"
ENTRIES = (
    Entry("zero_shot", "zero_shot", "czsl", (Question("czsl"),)),
    Entry(
        "coop",
        "csp",
        "czsl",
        (Question("czsl"),),
        {"learn_primitives": False, "learn_context": True},
        {"steps": 2},
    ),
    Entry("csp", "csp", "czsl", (Question("czsl"),), {}, {"steps": 2}),
)


@pytest.fixture(scope="module")
def caches(fast_folder: Path) -> dict[str, Path]:
    """Two backbones on the same samples, and a third cache that lacks some of them."""
    dataset = load_dataset("toy_world", scale=0.01)
    found: dict[str, Path] = {}
    for name in ("clip", "pe"):
        found[name] = fast_folder / "comparing" / f"{name}.zarr"
        build(
            dataset,
            load_backbone(f"{name}:demo"),
            found[name],
            progress=False,
            backbone_name=f"{name}:demo",
        )
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "small.toml"
    path.write_text(SMALL)
    return path


def ran(*words: object) -> int:
    return main(["compare", *map(str, words)])


def weights(folder: Path) -> dict[str, bytes]:
    return {
        p.parent.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("model.safetensors"))
    }


def tables(folder: Path) -> dict[str, np.ndarray]:
    return {
        p.relative_to(folder).as_posix(): np.asarray(score_io.load(p).scores)  # pyright: ignore[reportAttributeAccessIssue]
        for p in sorted(folder.glob("*/*/scores-*.zarr"))
    }


def test_methods_on_two_backbones_in_one_command(
    caches: dict[str, Path], small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--caches", *caches.values(), "--methods", "zero_shot", "tf_local"]
    words += [
        "--task",
        "two_by_two",
        "--config",
        f"tf_local={small}",
        "--seeds",
        2,
        "--pictures",
        1,
        "--out",
        out,
        "--workers",
        2,
    ]
    assert ran(*words) == 0
    said = capsys.readouterr().out
    assert {p.name for p in (out / "pe").iterdir()} == {
        "zero_shot-seed0",
        "tf_local-seed0",
        "tf_local-seed1",
    }
    assert "zero_shot" in said
    assert "report.html" in said
    page = (out / "report.html").read_text()
    assert "Made by: headstart compare --caches" in page.replace("&#x27;", "'")
    drawn = [p.parents[1].name for p in out.glob("*/*/pictures/0*.npz")]
    assert set(drawn) == {"tf_local-seed0"}, "of the first seed of what has maps"
    failed = [str(p.relative_to(out)) for p in out.rglob("failures*.npz")]
    assert failed == ["clip/zero_shot-seed0/pictures/failures-2_2.npz"], "of the first row"
    assert "What heads look at" in page
    record = read_run(out / "clip" / "tf_local-seed1")
    assert record["head"]["dim"] == 16
    assert record["costs"]["bytes_per_image"] > 0
    line = shlex.split(record["command"])
    assert line[1:4] == ["headstart", "train", "tf_local"]
    before = {p: p.stat().st_mtime_ns for p in out.rglob("model.safetensors")}
    assert ran(*words) == 0, "a second time nothing is left to do but the report"
    assert {p: p.stat().st_mtime_ns for p in out.rglob("model.safetensors")} == before


def test_a_plan_names_caches_seeds_and_what_a_family_needs_otherwise(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    plan = tmp_path / "both.toml"
    listed = ", ".join(f'"{path}"' for path in caches.values())
    plan.write_text(
        f'task = "czsl"\ncaches = [{listed}]\nseeds = 2\nasked = [{{ task = "czsl" }}]\n'
        '[[row]]\nlabel = "words"\nmethod = "csp"\ntrain = { steps = 1 }\n'
        'family.pe = { dropout = 0.5 }\n[[row]]\nlabel = "cosine"\nmethod = "zero_shot"\n'
    )
    assert ran("--plan", plan, "--out", tmp_path / "out", "--workers", 1) == 0
    got = {
        name: read_run(tmp_path / "out" / name / "words-seed1")["head"]["dropout"]
        for name in caches
    }
    assert got["pe"] == 0.5 != got["clip"]


def test_processes_and_devices_change_no_bit(caches: dict[str, Path], tmp_path: Path) -> None:
    opened = {name: FeatureCache.open(path, check="read") for name, path in caches.items()}
    compare(opened, ENTRIES, (0, 1), tmp_path / "one")
    made = compare(
        opened, ENTRIES, (0, 1), tmp_path / "many", engine=Processes(devices=("cpu", "cpu"))
    )
    assert not made.failures
    assert weights(tmp_path / "one") == weights(tmp_path / "many")
    one, many = tables(tmp_path / "one"), tables(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(np.array_equal(one[name], many[name]) for name in one)
    # where it was trained is no part of what it is: both are taken as they are by the other
    again = compare(opened, ENTRIES, (0, 1), tmp_path / "many")
    assert again.runs == made.runs


@pytest.mark.slow
def test_a_ray_cluster_gives_what_one_process_gives(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    opened = {name: FeatureCache.open(path, check="read") for name, path in caches.items()}
    compare(opened, ENTRIES, (0,), tmp_path / "one")
    made = compare(opened, ENTRIES, (0,), tmp_path / "ray", engine=Ray())
    assert not made.failures
    assert weights(tmp_path / "one") == weights(tmp_path / "ray")
    one, ray = tables(tmp_path / "one"), tables(tmp_path / "ray")
    assert all(np.array_equal(one[name], ray[name]) for name in one)


@pytest.mark.slow
def test_a_cluster_works_in_the_folder_of_the_command_and_its_errors_are_those_of_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def where(jobs: Any, device: str | None = None) -> dict[Path, str]:
        del device
        if jobs == ["wrong"]:
            raise ConfigError("said as it is")
        free = source.quarter_of_free_memory()
        source.share_memory(1)
        return {Path.cwd(): str(source.quarter_of_free_memory() / free)}

    monkeypatch.chdir(tmp_path)
    for _, found in Ray().run(where, [[1], [2]]):
        assert list(found) == [tmp_path]
        (ratio,) = found.values()
        assert float(ratio) == pytest.approx(min(2, os.cpu_count() or 1), rel=0.3)
    with pytest.raises(ConfigError, match=r"^said as it is$"):
        list(Ray().run(where, [["wrong"]]))


def _first_fails(jobs: Any, device: str | None = None) -> dict[Path, str]:
    del device
    (place,) = jobs
    if place.name == "0":
        raise ConfigError("said at once")
    time.sleep(1)
    place.touch()
    return {}


def test_what_was_not_begun_is_not_begun_after_an_error(tmp_path: Path) -> None:
    passes = [[tmp_path / str(n)] for n in range(8)]
    with pytest.raises(ConfigError, match="said at once"):
        list(Processes(2).run(_first_fails, passes))
    assert len(list(tmp_path.iterdir())) <= 2


def test_nothing_to_compare_is_refused(caches: dict[str, Path], tmp_path: Path) -> None:
    opened = {"clip": FeatureCache.open(caches["clip"], check="read")}
    with pytest.raises(ConfigError, match="nothing to compare"):
        compare(opened, (), (0,), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _share(jobs: Any, device: str | None = None) -> dict[Path, str]:
    del jobs, device
    mine = source.quarter_of_free_memory()
    source.share_memory(1)
    return {Path("ratio"): str(source.quarter_of_free_memory() / mine)}


def test_workers_share_the_memory_and_one_pass_has_all_of_it() -> None:
    for passes, share in (([[1], [2]], 2), ([[1]], 1)):
        ((_, found), *_) = Processes(3).run(_share, passes)
        assert float(found[Path("ratio")]) == pytest.approx(share, rel=0.3)


def test_caches_of_other_samples_are_compared_on_what_they_share_if_asked(
    caches: dict[str, Path], fast_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = load_dataset("toy_world", scale=0.01)
    assert lost.tasks.czsl is not None
    gone = next(e.image for e in lost.tasks.czsl.examples if e.split == "test")

    def broken() -> Any:
        raise ValueError("cut off")

    images = tuple(
        replace(i, open=broken, measure=None, path=None) if i.id == gone else i for i in lost.images
    )
    other = fast_folder / "comparing" / "lossy.zarr"
    build(replace(lost, images=images), load_backbone("siglip2:demo"), other, progress=False)
    words = [
        "--caches",
        caches["clip"],
        other,
        "--methods",
        "zero_shot",
        "csp",
        "--task",
        "czsl",
    ]
    words += ["--seeds", 1, "--workers", 1, "--set", "train.steps=1", "--out", tmp_path / "out"]
    assert ran(*words) == 1
    said = capsys.readouterr().err
    assert "do not hold the same samples" in said
    assert repr(gone) in said
    assert "--intersect" in said
    assert not (tmp_path / "out").exists()
    assert ran(*words, "--intersect") == 0
    found = [score_io.load(p) for p in sorted((tmp_path / "out").glob("*/*/scores-test.zarr"))]
    assert len(found) == 4
    assert len({tuple(t.ids) for t in found}) == 1  # pyright: ignore[reportAttributeAccessIssue]
    assert gone not in found[0].ids  # pyright: ignore[reportAttributeAccessIssue]
    record = read_run(tmp_path / "out" / "clip" / "csp-seed0")
    assert record["cache"]["asked"]
    assert "--intersect" in record["command"]
    assert "compare" in record["command"]
    capsys.readouterr()
    # the same place without it is another comparison
    assert ran(*[w for w in words if w != other], "--intersect") == 1
    assert "was begun otherwise: cache.asked was" in capsys.readouterr().err


def test_ctrl_c_keeps_what_is_done_and_the_command_goes_on(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    """One worker: the first backbone is done and the second is being trained when the signal comes."""
    config, out = tmp_path / "csp.toml", tmp_path / "out"
    config.write_text("[train]\nsteps = 25\n")

    def command(file: Path = config, place: Path = out) -> list[str]:
        words = [
            sys.executable,
            "-m",
            "heads.cli",
            "compare",
            "--caches",
            *map(str, caches.values()),
        ]
        words += [
            "--methods",
            "zero_shot",
            "csp",
            "--task",
            "czsl",
            "--seeds",
            "1",
            "--workers",
            "1",
        ]
        return [*words, "--config", f"csp={file}", "--out", str(place)]

    def state(place: Path) -> dict[str, str]:
        names = ("run.json", "model.safetensors")
        return {name: sha256((place / name).read_bytes()).hexdigest() for name in names}

    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    going = {"env": env, "cwd": tmp_path, "text": True}
    running = subprocess.Popen(
        command(),
        **going,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    first, second = (out / name / "csp-seed0" for name in caches)
    begun = time.monotonic()
    while not second.exists():
        assert running.poll() is None, "it ended before it could be interrupted"
        assert time.monotonic() < begun + 180
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGINT)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 130, said
    assert "Traceback" not in said, said
    assert (first / "scores-test.zarr").exists()
    assert not (second / "run.json").exists()
    kept = {path.name for path in second.iterdir()}
    assert any(name.startswith("training-") for name in kept), kept
    done = state(first)

    # where the interrupted training stood is there, so a changed request is refused, and the same one goes on
    other = tmp_path / "other.toml"
    other.write_text("[train]\nsteps = 3\n")
    changed = subprocess.run(command(other), **going, capture_output=True, timeout=300)
    assert changed.returncode == 1
    assert "was begun otherwise" in changed.stderr
    assert "Traceback" not in changed.stderr
    assert {path.name for path in second.iterdir()} == kept

    again = subprocess.run(command(), **going, capture_output=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert state(first) == done
    whole = subprocess.run(
        command(place=tmp_path / "whole"), **going, capture_output=True, timeout=300
    )
    assert whole.returncode == 0, whole.stderr
    of_whole = tmp_path / "whole" / second.relative_to(out)
    assert state(second)["model.safetensors"] == state(of_whole)["model.safetensors"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "csp"], "no cache is named"),
        (["--caches", "A", "--methods", "csp", "inversion"], "have no task in common"),
        (["--caches", "A", "--methods", "csp", "--set", "head.dropout=0"], "--config METHOD=FILE"),
        (["--caches", "A", "--methods", "csp", "--rows", "csp"], "--rows chooses"),
        (["--caches", "A", "--methods", "csp", "--pictures", "-1"], "--pictures -1"),
        (
            ["--caches", "A", "--methods", "csp", "--config", "cspx=x.toml"],
            "is not METHOD=FILE for one of the methods named (csp)",
        ),
        (
            ["--caches", "A", "--methods", "zero_shot", "--task", "retrieval", "--world", "open"],
            "--world is of czsl",
        ),
        (
            ["--caches", "A", "--methods", "csp", "--task", "czsl", "--rerank", "3"],
            "--rerank is of retrieval",
        ),
        (["--caches", "A", "--methods", "csp", "csp"], "two rows called csp"),
        (["--caches", "A", "A", "--methods", "csp"], "two caches are called clip"),
        (["--caches", "A", "--methods", "csp", "--seeds", "0"], "numbers from 1"),
        (["--caches", "A", "--methods", "csp", "--address", "x"], "add --engine ray"),
        (
            ["--caches", "A", "--methods", "csp", "--engine", "ray", "--workers", "2"],
            "of this machine",
        ),
        (
            ["--caches", "A", "--methods", "csp", "--devices", "cpu", "--workers", "2"],
            "a process each",
        ),
        (["--caches", "A", "--methods", "no_such"], "no_such"),
        (["--caches", "A", "--methods", "csp", "--config", "tf_local=x.toml"], "x.toml"),
        (["--caches", "A", "--plan", "no_such"], "no plan 'no_such'"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(
    caches: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    named = [str(caches["clip"]) if word == "A" else word for word in words]
    assert ran(*named, "--out", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_worker_that_dies_is_told_in_one_sentence(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(HeadError, match="a process died while it trained"):
        list(Processes(2).run(_dies, [[1]]))
    _ = caches, tmp_path


def _dies(jobs: Any, device: str | None = None) -> dict[Path, str]:
    del jobs, device
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_the_records_of_a_comparison_are_those_of_runs_made_alone(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    """The command in a record makes the same weights."""
    opened = {"clip": FeatureCache.open(caches["clip"], check="read")}
    compare(opened, ENTRIES[2:], (1,), tmp_path / "out")
    run = tmp_path / "out" / "clip" / "csp-seed1"
    words = shlex.split(json.loads((run / "run.json").read_text())["command"])
    threads, *command = words
    assert threads == "OMP_NUM_THREADS=1"
    command[command.index("--out") + 1] = str(tmp_path / "alone")
    assert main(command[1:]) == 0
    assert (tmp_path / "alone" / "model.safetensors").read_bytes() == (
        run / "model.safetensors"
    ).read_bytes()


def test_a_test_image_in_quarantine_is_refused_before_training_or_left_out(
    caches: dict[str, Path], fast_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where every cache has the same one there, so that the samples do not differ."""
    found: list[Path] = []
    for name in ("clip", "pe"):
        path = fast_folder / "quarantined" / f"{name}.zarr"
        build(without_one(), load_backbone(f"{name}:demo"), path, progress=False)
        found.append(path)
    words = ["--caches", *found, "--methods", "zero_shot", "--task", "czsl", "--workers", 1]
    assert ran(*words, "--out", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "1 images of czsl's test split are quarantined in" in said
    assert "--intersect" in said
    assert not (tmp_path / "out").exists()
    assert ran(*words, "--intersect", "--out", tmp_path / "out") == 0
    _ = caches


def without_one() -> Any:
    """A small world in which one test picture is cut off."""
    whole = load_dataset("toy_world", scale=0.01)
    assert whole.tasks.czsl is not None
    gone = next(e.image for e in whole.tasks.czsl.examples if e.split == "test")

    def broken() -> Any:
        raise ValueError("cut off")

    images = tuple(
        replace(i, open=broken, measure=None, path=None) if i.id == gone else i
        for i in whole.images
    )
    return replace(whole, images=images)


class Here:
    """Does passes in this process, where things can be replaced."""

    def run(self, work: Any, passes: Any) -> Any:
        return ((jobs, work(jobs)) for jobs in passes)


class After(Event):
    """Set once it was asked so often."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.left = times

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_what_was_interrupted_goes_on_to_the_same_bits_on_another_device(
    caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = {"clip": FeatureCache.open(caches["clip"], check="read")}
    longer = tuple(replace(e, train={**e.train, "steps": 6}) if e.train else e for e in ENTRIES)
    compare(opened, longer, (0, 1), tmp_path / "whole", engine=Here())
    monkeypatch.setattr(comparing, "STOP", After(4))
    with pytest.raises(KeyboardInterrupt):
        compare(opened, longer, (0, 1), tmp_path / "again", engine=Here())
    monkeypatch.undo()
    assert list((tmp_path / "again").rglob("training-*.json")), "nothing was interrupted"
    made = compare(opened, longer, (0, 1), tmp_path / "again", engine=Processes(devices=("cpu:0",)))
    assert not made.failures
    assert weights(tmp_path / "whole") == weights(tmp_path / "again")
    whole, again = tables(tmp_path / "whole"), tables(tmp_path / "again")
    assert whole.keys() == again.keys()
    assert all(np.array_equal(whole[name], again[name]) for name in whole)


def test_ctrl_c_between_two_scorings_keeps_what_is_scored(
    caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = {"clip": FeatureCache.open(caches["clip"], check="read")}
    stop, score = Event(), comparing._score

    def once(*given: Any) -> None:
        score(*given)
        stop.set()

    monkeypatch.setattr(comparing, "STOP", stop)
    monkeypatch.setattr(comparing, "_score", once)
    with pytest.raises(KeyboardInterrupt):
        compare(opened, ENTRIES, (0,), tmp_path / "out", engine=Here())
    monkeypatch.undo()
    (first,) = (tmp_path / "out").rglob("scores-test.zarr")
    before = {p: p.stat().st_mtime_ns for p in first.rglob("*")}
    assert not compare(opened, ENTRIES, (0,), tmp_path / "out", engine=Here()).failures
    assert {p: p.stat().st_mtime_ns for p in first.rglob("*")} == before
    compare(opened, ENTRIES, (0,), tmp_path / "whole", engine=Here())
    whole, again = tables(tmp_path / "whole"), tables(tmp_path / "out")
    assert whole.keys() == again.keys()
    assert all(np.array_equal(whole[name], again[name]) for name in whole)


def test_one_comparison_at_a_time_works_in_a_place(caches: dict[str, Path], tmp_path: Path) -> None:
    opened = {"clip": FeatureCache.open(caches["clip"], check="read")}
    inner: list[str] = []

    class Meanwhile:
        def run(self, work: Any, passes: Any) -> Any:
            with pytest.raises(RunExists, match="another comparison is at work") as caught:
                compare(opened, ENTRIES[:1], (0,), tmp_path / "out", engine=Here())
            inner.append(str(caught.value))
            return Here().run(work, passes)

    assert compare(opened, ENTRIES[:1], (0,), tmp_path / "out", engine=Meanwhile()).runs
    assert inner
