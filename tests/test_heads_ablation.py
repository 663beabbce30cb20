"""Ablations as data: what is packaged is sound and trains, mistakes are named, what a backbone cannot do is said."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from drawn import drawn

from cache_builder import FeatureCache, build
from cache_builder.plugins import find
from cache_builder.words import with_words
from heads import load_method
from heads.ablation import Ablation, names, plan, read
from heads.cli import main
from heads.compare import Entry
from heads.config import parse
from heads.errors import ConfigError, TaskError
from heads.run_files import Trained
from heads.sweep import train_runs
from heads.train_config import TrainConfig
from heads.wanted import Wanted

MINE = """
method = "tf_local"
task = "czsl"
asked = [{ task = "czsl" }]
[head]
layers = 2
dim = 16
[train]
lr = 1e-3
[[row]]
label = "zero_shot"
method = "zero_shot"
[[row]]
label = "global"
head = { variant = "global" }
[[row]]
label = "local"
train = { lr = 2e-3 }
[[ordering]]
better = "local"
than = "global"
metric = "auc"
source = "me (O)"
"""


@pytest.fixture
def mine(tmp_path: Path) -> Callable[..., str]:
    """The path of the ablation above, with some text replaced."""

    def write(*swaps: tuple[str, str]) -> str:
        text = MINE
        for old, new in swaps:
            assert old in text
            text = text.replace(old, new, 1)
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture(scope="module")
def small(fast_folder: Path) -> Callable[[str], FeatureCache]:
    """`drawn()` with the words of its task under a family's miniature, whose files stay; built when first asked for."""

    def get(family: str) -> FeatureCache:
        files = fast_folder / f"ablation-{family}-files"
        backbone = find("cache_builder.backbones", family).tiny(files)
        named = {"backbone_name": f"{family}:{files}", "progress": False}
        path = fast_folder / f"ablation-{family}.zarr"
        return build(with_words(drawn(), "vocabulary"), backbone, path, **named)

    return functools.cache(get)


RIGHT = {"trident": ("llava", "clip")}
"""Backbones whose caches an ablation is for; clip where nothing is said."""
ELSEWHERE = {"mota", "eva"}
"""Needs triplets and a trained network (test_heads_methods_composed.py); four blocks (test_heads_encoder.py)."""
CASES = [
    (name, family)
    for name in names()
    if name not in ELSEWHERE
    for family in RIGHT.get(name, ("clip",))
]


def test_seven_methods_have_an_ablation_and_each_task_a_comparison() -> None:
    assert names() == ["branch_blocks", "csp", "eva", "mota", "simfp", "tf_local", "trident"]
    assert names("comparisons") == ["composed", "czsl", "czsl_heads", "two_by_two"]
    assert not set(names()) & set(names("comparisons")), "a name means one file"


@pytest.mark.parametrize("name", names())
def test_a_packaged_ablation_is_for_its_method_and_says_how_to_run_it(name: str) -> None:
    ablation = read(name)
    assert ablation.method == name
    text = (Path(__file__).parent.parent / "heads/ablations" / f"{name}.toml").read_text()
    header = text[: text.index("\n\n")]
    assert all(line.startswith("#") for line in header.splitlines())
    assert f"headstart compare --ablate {name} --cache " in header


@pytest.mark.parametrize("name", names())
def test_rows_of_a_packaged_ablation_differ_and_orderings_name_their_source(name: str) -> None:
    ablation = read(name)
    resolved = set()
    for row in ablation.row:
        config = load_method(row.method or ablation.method).Config
        shared = {} if row.method else ablation.head
        head = parse(config, {**shared, **row.head}, "head")
        train = parse(TrainConfig, {**ablation.train, **row.train}, "train")
        resolved.add((row.method, repr(head), repr(train)))
    assert len(resolved) == len(ablation.row)
    assert len(ablation.ordering) >= 4
    pairs = [(c.better, c.than, c.metric) for c in ablation.ordering]
    assert len(set(pairs)) == len(pairs)
    for claim in ablation.ordering:
        assert re.search(r"\([PCTDO]\)", claim.source), claim.source
        figures = re.sub(r"arXiv \d{4}\.\d{5}", "", claim.source)
        assert not re.search(r"\d[.,]\d|%", figures), "published figures are not printed here"


@pytest.mark.parametrize(("name", "family"), CASES)
def test_every_row_trains_a_step_on_its_backbone(
    name: str, family: str, small: Callable[[str], FeatureCache], fast_path: Path
) -> None:
    cache = small(family)
    made = plan(read(name), {"it": cache}, settings={"train": {"steps": 1}})
    assert made.left_out == []
    assert [entry.label for entry in made.entries["it"]] == read(name).labels
    wanted = [
        Wanted(entry.method, fast_path / entry.label, {"head": entry.head, "train": entry.train})
        for entry in made.entries["it"]
    ]
    runs = train_runs(cache, wanted, task=read(name).task, progress=False)
    assert all(isinstance(run, Trained) for run in runs)


def row_of(entries: list[Entry], label: str) -> Entry:
    (found,) = (entry for entry in entries if entry.label == label)
    return found


def test_what_a_backbone_cannot_do_is_left_out_with_a_reason(
    small: Callable[[str], FeatureCache],
) -> None:
    caches = {"one": small("clip"), "two": small("llava")}
    made = plan(read("tf_local"), caches)
    labels = {name: [e.label for e in entries] for name, entries in made.entries.items()}
    assert labels == {"one": read("tf_local").labels, "two": ["late_maxsim", "local"]}
    assert row_of(made.entries["two"], "local").head["top_sampled"] == 0
    assert "top_sampled" not in row_of(made.entries["one"], "local").head
    reasons = "\n".join(made.left_out)
    assert "two: row zero_shot is left out, as zero_shot reads image/pooled, text/pooled" in reasons
    assert "two: rows tf_global, residual_global are left out, as tf_local reads" in reasons
    assert "family llava has no joint space" in reasons
    assert len(made.left_out) == 2
    assert list(plan(read("csp"), caches).entries) == ["one"]
    with pytest.raises(ConfigError, match=r"no row can be trained; two: .* no joint space"):
        plan(read("csp"), {"two": caches["two"]})


def test_a_cache_without_what_is_asked_is_refused(
    mine: Callable[..., str], make_cache: Callable[..., FeatureCache]
) -> None:
    with pytest.raises(TaskError, match="two_by_two"):
        plan(
            read(
                mine(('[{ task = "czsl" }]', '[{ task = "two_by_two" }]'), ("auc", "group_score"))
            ),
            {"it": make_cache()},
        )


def test_the_command_line_goes_before_the_file_and_twins_are_left_out(
    mine: Callable[..., str], live_cache: Callable[[str], FeatureCache]
) -> None:
    caches, ablation = {"it": live_cache("clip")}, read(mine())
    plain = plan(ablation, caches).entries["it"]
    assert row_of(plain, "global").head == {"layers": 2, "dim": 16, "variant": "global"}
    assert [row_of(plain, label).train["lr"] for label in ("global", "local")] == [1e-3, 2e-3]
    settings = {"head": {"dim": 8}, "train": {"lr": 3e-3, "epochs": 1}}
    changed = plan(ablation, caches, settings=settings).entries["it"]
    assert [e.train for e in changed] == [{"lr": 3e-3, "epochs": 1}] * 3
    assert [e.head.get("dim") for e in changed] == [None, 8, 8]
    other = plan(ablation, caches, settings={"head": {"variant": "late_maxsim"}}).entries["it"]
    assert row_of(other, "global").head["variant"] == "late_maxsim"
    flat = {"head": {"variant": "global"}, "train": {"lr": 1e-3}}
    made = plan(ablation, caches, settings=flat)
    assert [e.label for e in made.entries["it"]] == ["zero_shot", "global"]
    (why,) = made.left_out
    assert why == (
        "it: row local is left out, as under these settings it is the same as row global"
    )


def test_some_rows_are_asked_for_by_label(
    mine: Callable[..., str], live_cache: Callable[[str], FeatureCache]
) -> None:
    ablation, caches = read(mine()), {"it": live_cache("clip")}
    made = plan(ablation, caches, rows=["local", "global"])
    assert [e.label for e in made.entries["it"]] == ["global", "local"]
    assert [o.words() for o in made.orderings] == ["local above global"]
    assert plan(ablation, caches, rows=["local"]).orderings == []
    with pytest.raises(ConfigError, match=r"no row 'locl'; did you mean 'local'\?.*zero_shot"):
        plan(ablation, caches, rows=["locl"])


MISTAKES: list[Any] = [
    pytest.param(
        ("[head]", "[haed]"), r"no key .*mine.toml.haed; did you mean 'head'\?", id="table"
    ),
    pytest.param(
        ('label = "local"', 'lable = "x"'), r"row\[2\].lable; did you mean 'label'", id="row"
    ),
    pytest.param(("source", "sorce"), r"ordering\[0\].sorce; did you mean 'source'", id="ordering"),
    pytest.param(
        ('{ task = "czsl" }', '{ tsk = "czsl" }'), r"asked\[0\].tsk; .*'task'", id="asked"
    ),
    pytest.param(('label = "local"', 'label = "global"'), "two rows called global", id="twice"),
    pytest.param(('label = "local"', 'label = "a/b"'), r"row\[2\].label is 'a/b'", id="label"),
    pytest.param(('than = "global"', 'than = "globl"'), r"no row 'globl'; .*'global'", id="than"),
    pytest.param(('"auc"', '"acu"'), r"orders rows by 'acu'; .*'auc'", id="metric"),
    pytest.param(('[{ task = "czsl" }]', '[{ task = "two_by_tow" }]'), "'two_by_two'", id="task"),
    pytest.param(('[{ task = "czsl" }]', "3"), "asked in .* must be a list of tables", id="list"),
    pytest.param(('[{ task = "czsl" }]', "[]"), "asked is", id="nothing"),
    pytest.param(("[train]", "[train"), "is not TOML", id="toml"),
]


@pytest.mark.parametrize(("swap", "message"), MISTAKES)
def test_a_mistake_in_a_file_is_named(
    swap: tuple[str, str], message: str, mine: Callable[..., str]
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(mine(swap))


def test_a_field_that_no_method_has_is_named_with_its_row(
    mine: Callable[..., str], live_cache: Callable[[str], FeatureCache]
) -> None:
    caches = {"it": live_cache("clip")}
    with pytest.raises(ConfigError, match=r"row global: no key head.varaint; .*'variant'"):
        plan(read(mine(("variant", "varaint"))), caches)
    with pytest.raises(ConfigError, match=r"row local: no key train.lrr; .*'lr'"):
        plan(read(mine(("{ lr =", "{ lrr ="))), caches)
    # A method of CZSL, asked of something else.
    other = Ablation.model_validate(
        {
            "method": "csp",
            "task": "retrieval",
            "asked": [{"task": "retrieval"}],
            "row": [{"label": "x"}],
        }
    )
    with pytest.raises(ConfigError, match="row x: csp works on czsl, not on retrieval"):
        plan(other, caches)


def test_what_is_asked_is_the_task_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text('task = "two_by_two"\n[[row]]\nlabel = "a"\nmethod = "zero_shot"\n')
    assert [asked.task for asked in read(str(file)).asked] == ["two_by_two"]
    file.write_text('task = "czsl"\n[[row]]\nmethod = "csp"\n')
    with pytest.raises(ConfigError, match=r"row\[0\].label is missing"):
        read(str(file))
    rows = '[[row]]\nlabel = "a"\nmethod = "csp"\n[[ordering]]\nbetter = "a"\nthan = "a"\n'
    file.write_text(f'task = "czsl"\n{rows}metric = "auc"\nsource = "nobody"\n')
    with pytest.raises(ConfigError, match="orders a above itself"):
        read(str(file))


def test_an_unknown_ablation_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no plan 'tridnet'; did you mean 'trident'\?.*csp"):
        read("tridnet")
    with pytest.raises(FileNotFoundError):
        read("nowhere.toml")


def test_one_command_trains_judges_and_reports(
    live_cache: Callable[[str], FeatureCache],
    mine: Callable[..., str],
    fast_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache, out = live_cache("clip").place.absolute(), fast_path / "out"
    words = ["compare", "--ablate", mine(), "--cache", cache, "--out", str(out), "--workers", "1"]
    small = [f"--set=head.{name}" for name in ("layers=1", "dim=8", "heads=2", "ffn=8")]
    assert main([*words, "--seeds", "2", *small, "--set", "train.steps=1"]) == 0
    shown = capsys.readouterr().out
    runs = {"zero_shot-seed0", *(f"{m}-seed{s}" for m in ("global", "local") for s in (0, 1))}
    assert {path.parent.name for path in out.glob("clip/*/run.json")} == runs
    assert re.search(
        r"\| local above global \| auc .* \| (holds|does not hold|not decided) ", shown
    )
    assert "1 difference measured" in shown
    for name in ("report.html", "report.md", "report.csv"):
        assert f"wrote {out / name}" in shown
        assert "local" in (out / name).read_text()
    assert "Claimed orderings" in (out / "report.html").read_text()
    assert main([*words, "--rows", "gone"]) == 1
    assert "no row 'gone'" in capsys.readouterr().err
    assert main([*words, "--cache", cache]) == 1
    assert "two caches are called clip" in capsys.readouterr().err
    assert main([*words, "--seeds", "0"]) == 1
    assert "numbers from 1" in capsys.readouterr().err
