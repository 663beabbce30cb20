"""Many runs in one pass: each ends as it does alone, and what they share is read once."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import make_drawn

from cache_builder import FeatureCache
from cache_builder.reader import ChunkReader
from heads import loader as loader_file
from heads import pools as pools_file
from heads import source as source_file
from heads import sweep as sweep_file
from heads.cli import main
from heads.errors import ConfigError, RunExists, TrainingDiverged
from heads.loader import Loader
from heads.run_files import Failed, Trained, read_run, taken
from heads.runs import train_run
from heads.sweep import train_runs
from heads.wanted import Wanted

SMALL = {"layers": 1, "dim": 8, "heads": 2, "ffn": 12, "dropout": 0.3}
TRAIN = {"epochs": 2, "batch_size": 6, "lr": 1e-2, "device": "cpu"}
OWN = ("seconds", "data_wait_seconds", "beside", "commit", "command")
"""What of a record may differ between a run alone and the same run beside others."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    return make_drawn(tmp_path_factory.mktemp("sweep") / "drawn.zarr")


def wanted(out: Path, method: str, head: dict[str, Any] | None = None, **train: Any) -> Wanted:
    return Wanted(method, out, {"head": head or {}, "train": {**TRAIN, **train}})


def scorers(folder: Path) -> list[Wanted]:
    """Heads that read different streams, draw random numbers, and end at different steps."""
    return [
        wanted(folder / "local", "tf_local", SMALL, seed=1),
        wanted(folder / "twin", "tf_local", SMALL, seed=2, order_seed=1),
        wanted(folder / "global", "tf_local", {**SMALL, "variant": "global"}, seed=1, steps=3),
        wanted(folder / "cosine", "zero_shot"),
        wanted(folder / "own-order", "tf_local", SMALL, seed=2),
        wanted(folder / "small-batch", "tf_local", SMALL, seed=1, batch_size=2),
    ]


BESIDE = {"local": 2, "twin": 2, "global": 2, "cosine": 0, "own-order": 0, "small-batch": 0}
"""How many others take the same batches as each of them."""


def alone(cache: FeatureCache, run: Wanted, out: Path, task: str) -> Trained:
    return train_run(cache, run.method, out, task=task, settings=run.settings, progress=False)


def together(cache: FeatureCache, runs: list[Wanted], task: str) -> list[Trained]:
    found = train_runs(cache, runs, task=task, progress=False)
    assert all(isinstance(run, Trained) for run in found)
    return [run for run in found if isinstance(run, Trained)]


def plain_history(run: Trained) -> list[dict[str, Any]]:
    times = ("data_wait", "seconds")
    return [{k: v for k, v in line.items() if k not in times} for line in run.result.history]


@pytest.mark.parametrize("task", ["two_by_two", "retrieval"])
def test_each_run_ends_in_the_same_bits_as_alone(
    cache: FeatureCache, tmp_path: Path, task: str
) -> None:
    asked = scorers(tmp_path / "all")
    for run, beside in zip(asked, together(cache, asked, task), strict=True):
        single = alone(cache, run, tmp_path / "alone" / run.out.name, task)
        mine, theirs = beside.head.state_dict(), single.head.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), run.out.name
        assert plain_history(beside) == plain_history(single)
        assert beside.record["beside"] == BESIDE[run.out.name]
        mine, theirs = (
            {k: v for k, v in r.record.items() if k not in OWN} for r in (beside, single)
        )
        assert mine == theirs == {k: v for k, v in read_run(beside.path).items() if k not in OWN}


def test_a_probe_is_solved_beside_heads_that_are_trained(
    cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole set in one batch is made of its own streams alone."""
    seen: list[list[str]] = []
    real = Loader.all

    def watched(self: Loader, *args: Any) -> Any:
        batch = real(self, *args)
        seen.append(list(batch.queries.streams))
        return batch

    monkeypatch.setattr(Loader, "all", watched)
    probe = wanted(tmp_path / "all" / "probe", "linear_probe", {"C": 1.0}, seed=1)
    beside, _ = together(
        cache, [probe, wanted(tmp_path / "all" / "local", "tf_local", SMALL, seed=1)], "czsl"
    )
    single = alone(cache, probe, tmp_path / "alone", "czsl")
    assert seen == [["image/pooled"]] * 2
    mine, theirs = beside.head.state_dict(), single.head.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_rows_in_memory_are_read_once_for_all(
    cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[str] = Counter()
    real = source_file.read_stored

    def counted(cache: FeatureCache, stream: str, rows: np.ndarray) -> Any:
        reads[stream] += 1
        return real(cache, stream, rows)

    monkeypatch.setattr(source_file, "read_stored", counted)
    together(cache, scorers(tmp_path), "two_by_two")
    splits = 2
    assert reads == Counter(
        dict.fromkeys(("image/patches", "image/pooled", "text/tokens", "text/pooled"), splits)
    )


def test_from_disk_each_chunk_is_read_once_an_epoch_for_all(
    cache: FeatureCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No stream fits in memory: three heads read as many chunks of patches as one does."""
    for file in (loader_file, source_file):
        monkeypatch.setattr(file, "quarter_of_free_memory", lambda: 0)
    chunks: Counter[str] = Counter()

    class Counted(ChunkReader):
        def read_chunk(self, chunk: int, out: np.ndarray) -> int:
            chunks["read"] += 1
            return super().read_chunk(chunk, out)

    monkeypatch.setattr(pools_file, "ChunkReader", Counted)

    def runs(folder: Path) -> list[Wanted]:
        return [wanted(folder / str(s), "tf_local", SMALL, seed=s, order_seed=0) for s in range(3)]

    one = together(cache, runs(tmp_path / "one")[:1], "retrieval")
    alone_reads = chunks.pop("read")
    three = together(cache, runs(tmp_path / "three"), "retrieval")
    assert chunks["read"] == alone_reads > 0
    mine, theirs = one[0].head.state_dict(), three[0].head.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_run_that_diverges_does_not_hold_up_the_others(
    cache: FeatureCache, tmp_path: Path
) -> None:
    good = wanted(tmp_path / "good", "tf_local", SMALL, seed=1)
    bad = wanted(tmp_path / "bad", "tf_local", SMALL, seed=1, lr=1e30, warmup_steps=0)
    failed, run = train_runs(cache, [bad, good], task="two_by_two", progress=False)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, TrainingDiverged)
    assert isinstance(run, Trained)
    single = alone(cache, good, tmp_path / "alone", "two_by_two")
    mine, theirs = run.head.state_dict(), single.head.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert not (tmp_path / "bad" / "run.json").exists()


def test_nothing_is_written_if_one_request_is_wrong(cache: FeatureCache, tmp_path: Path) -> None:
    good = wanted(tmp_path / "good", "zero_shot")
    with pytest.raises(ConfigError, match=r"head\.layer; did you mean 'layers'"):
        train_runs(cache, [good, wanted(tmp_path / "x", "tf_local", {"layer": 1})], task="czsl")
    with pytest.raises(ConfigError, match="several runs would be kept in"):
        train_runs(cache, [good, good], task="czsl")
    assert not good.out.exists()
    good.out.mkdir()
    (good.out / "mine.txt").touch()
    with pytest.raises(RunExists, match="already exists"):
        train_runs(cache, [good], task="czsl")


def sweep(cache: FeatureCache, out: Path, *words: str) -> int:
    quick = [f"train.{key}={value}" for key, value in TRAIN.items()]
    sets = [word for text in quick for word in ("--set", text)]
    return main(["train", *words, "--cache", str(cache.path), "--out", str(out), *sets])


def test_the_command_sweeps_methods_settings_and_seeds(
    cache: FeatureCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small.toml"
    small.write_text("[head]\nlayers = 1\ndim = 8\nheads = 2\nffn = 12\n")
    words = ["tf_local", "--task", "two_by_two", "--config", str(small)]
    words += ["--sweep", "head.pos=learned,none", "--sweep", "train.seed=4,5"]
    assert sweep(cache, tmp_path / "runs", *words) == 0
    names = [f"tf_local-pos={p}-seed{s}" for p in ("learned", "none") for s in (4, 5)]
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == names
    for name in names:
        record = read_run(tmp_path / "runs" / name)
        assert (record["train"]["order_seed"], record["beside"]) == (4, 3)
        assert f"seed{record['seed']}" in name
        assert record["head"]["pos"] in name
    assert "wrote 4 runs" in capsys.readouterr().out
    assert sweep(cache, tmp_path / "own", *words, "--own-order") == 0
    record = read_run(tmp_path / "own" / names[1])
    assert (record["train"]["order_seed"], record["beside"]) == (None, 1)


def test_several_methods_take_a_file_each(cache: FeatureCache, tmp_path: Path) -> None:
    small = tmp_path / "small.toml"
    small.write_text("[head]\nlayers = 1\ndim = 8\nheads = 2\nffn = 12\n")
    words = ["zero_shot", "tf_local", "--task", "matching", "--config", f"tf_local={small}"]
    assert sweep(cache, tmp_path / "runs", *words) == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["tf_local", "zero_shot"]
    assert sweep(cache, tmp_path / "seeds", *words, "--sweep", "train.seed=2,3") == 0
    names = ["tf_local-seed2", "tf_local-seed3", "zero_shot-seed2"]
    assert sorted(p.name for p in (tmp_path / "seeds").iterdir()) == names


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tf_local", "tf_local"], "named twice"),
        (["tf_local", "--sweep", "train.seed"], "not of the form KEY=VALUE,VALUE"),
        (["tf_local", "--sweep", "train.seed=1,1"], "with values that differ"),
        (["tf_local", "--sweep", "seed=1,2"], "seed=1 is not of the form head.NAME=VALUE"),
        (["tf_local", "--sweep", "train.lr=1,2", "--sweep", "train.lr=3"], "given twice"),
        (["tf_local", "--own-order"], "there are no two"),
        (["tf_local", "--sweep", "train.lr=1e-3,0.001"], "with values that differ"),
        (["tf_local", "--seed", "1", "--sweep", "train.seed=1,2"], "both set and swept"),
        (["tf_local", "zero_shot", "--config", "a.toml"], "METHOD=FILE"),
        (["tf_local", "--config", "a.toml", "--config", "tf_local=b.toml"], "two --config files"),
        (["tf_local", "--sweep", "head.pos=learned,nowhere"], "'nowhere'"),
    ],
)
def test_what_cannot_be_swept_is_refused_in_a_sentence(
    cache: FeatureCache,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    says: str,
) -> None:
    assert sweep(cache, tmp_path / "runs", *words, "--task", "two_by_two") == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_values_in_brackets_are_one_value(cache: FeatureCache, tmp_path: Path) -> None:
    words = ["tf_local", "--task", "two_by_two", "--sweep", "train.betas=[0.9, 0.98],[0.9, 0.999]"]
    small = [f"head.{k}={v}" for k, v in SMALL.items()]
    words += [word for text in small for word in ("--set", text)]
    assert sweep(cache, tmp_path / "runs", *words) == 0
    found = {tuple(read_run(p)["train"]["betas"]) for p in (tmp_path / "runs").iterdir()}
    assert found == {(0.9, 0.98), (0.9, 0.999)}


def test_a_failure_before_any_step_writes_nothing(cache: FeatureCache, tmp_path: Path) -> None:
    good = wanted(tmp_path / "good", "tf_local", SMALL, seed=1, batch_size=4)
    odd = wanted(tmp_path / "odd", "tf_local", SMALL, seed=1, batch_size=5)
    with pytest.raises(ConfigError, match="batch_size 5"):
        train_runs(cache, [good, odd], task="two_by_two", progress=False)
    assert not good.out.exists()


def test_a_metric_that_is_not_there_fails_one_run_alone(
    cache: FeatureCache, tmp_path: Path
) -> None:
    good = wanted(tmp_path / "good", "tf_local", SMALL, seed=1)
    bad = wanted(tmp_path / "bad", "tf_local", SMALL, seed=1, select="aucc")
    failed, run = train_runs(cache, [bad, good], task="two_by_two", progress=False)
    assert isinstance(run, Trained)
    assert isinstance(failed, Failed)
    assert "'aucc', but validation returns" in str(failed.error)


def test_once_nobody_runs_no_batch_is_read(cache: FeatureCache, tmp_path: Path) -> None:
    """Waiting is counted by run: one that took a single batch has not waited for the others'."""
    short = wanted(tmp_path / "short", "tf_local", SMALL, seed=1, steps=1)
    long = wanted(tmp_path / "long", "tf_local", SMALL, seed=1)
    first, second = together(cache, [short, long], "retrieval")
    assert first.record["steps"] == 1
    assert 0 < first.record["data_wait_seconds"] < second.record["data_wait_seconds"]
    assert first.record["data_wait_seconds"] <= first.record["seconds"]
    assert set(first.record["held"]["memory"]) == {"image/patches", "text/tokens"}


def test_a_directory_with_an_equals_sign_is_no_method(cache: FeatureCache, tmp_path: Path) -> None:
    small = tmp_path / "lr=0.1" / "small.toml"
    small.parent.mkdir()
    small.write_text("[head]\nlayers = 1\ndim = 8\nheads = 2\nffn = 12\n")
    words = ["tf_local", "--task", "matching", "--config", str(small)]
    assert sweep(cache, tmp_path / "run", *words) == 0
    assert read_run(tmp_path / "run")["head"]["dim"] == 8


def test_two_processes_cannot_train_into_one_place(cache: FeatureCache, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with taken([out]), pytest.raises(RunExists, match="another process is training into"):
        together(cache, [wanted(out, "zero_shot")], "czsl")
    assert not out.exists()  # nothing was written, so nothing is left
    together(cache, [wanted(out, "zero_shot")], "czsl")
    assert not (out / "lock").exists()
    with pytest.raises(RunExists, match="already exists"), taken([out]):
        pass
    assert read_run(out)["method"] == "zero_shot"


def test_what_a_crash_left_of_a_lock_does_not_block(cache: FeatureCache, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").touch()
    together(cache, [wanted(tmp_path / "run", "zero_shot")], "czsl")


def test_a_run_that_is_stopped_leaves_nothing_and_says_so(
    cache: FeatureCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep_file, "fit_together", stop)
    small = [word for k, v in SMALL.items() for word in ("--set", f"head.{k}={v}")]
    words = ["tf_local", "--task", "two_by_two", *small]
    assert sweep(cache, tmp_path / "run", *words) == 130
    assert "stopped" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
