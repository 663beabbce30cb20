"""Model cards say what a run's files say; a pushed run comes back, whole, and a refusal is one sentence."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn import drawn, make_drawn
from hub_server import TOKEN, Hub, hub
from huggingface_hub import ModelCard

from cache_builder import FeatureCache, build
from cache_builder.plugins import find, names
from cache_builder.spec import BackboneSpec
from eval import comparison, score_io
from heads import checkpoint
from heads.cli import main
from heads.model_card import hub_name, model_card, paper_of
from heads.runs import score_run, train_run

ROOT = Path(__file__).parent.parent
SMALL = {"layers": 1, "dim": 8, "heads": 2, "ffn": 12}
TRAIN = {"steps": 2, "batch_size": 5, "device": "cpu"}
KINDS = {
    "cache alone": ("tf_local", SMALL),
    "live text tower": ("csp", {"train_candidates": 5}),
    "whole backbone": ("eva", {"rank": 2, "n_experts": 3}),
}


@pytest.fixture(scope="module")
def caches(
    fast_folder: Path, live_cache: Callable[[str], FeatureCache]
) -> Callable[[str], FeatureCache]:
    """The cache for a method."""
    files = fast_folder / "hub-files"
    backbone = find("cache_builder.backbones", "clip").tiny(files)
    seen = build(
        drawn(),
        backbone,
        fast_folder / "seen.zarr",
        streams=["image/pooled", "image/pixels", "text/pooled"],
        backbone_name=f"clip:{files}",
        progress=False,
    )
    plain = make_drawn(fast_folder / "hub.zarr")
    own: dict[str, FeatureCache] = {"csp": live_cache("clip"), "eva": seen}
    return lambda method: own.get(method, plain)


@pytest.fixture(scope="module")
def runs(caches: Callable[[str], FeatureCache], fast_folder: Path) -> dict[str, Path]:
    """A scored run of each kind."""
    made: dict[str, Path] = {}
    for kind, (method, config) in KINDS.items():
        made[kind] = fast_folder / "hub-runs" / method
        settings = {"head": config, "train": TRAIN}
        train_run(
            caches(method), method, made[kind], task="czsl", settings=settings, progress=False
        )
        score_run(made[kind])
    return made


def parsed(path: Path) -> tuple[Any, str]:
    """The head of a card as the hub reads it, and its text."""
    card = ModelCard.load(path)
    return card.data, card.text


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_head_has_a_card_and_comes_back(
    kind: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    head = checkpoint.load(runs[kind])
    checkpoint.Pretrained(head).save_pretrained(tmp_path)
    data, text = parsed(tmp_path / "README.md")
    method = KINDS[kind][0]
    assert (data.library_name, data.model_name) == ("headstart", method)
    assert {"headstart", method} <= set(data.tags or [])
    assert data.license is None
    assert data.base_model is None  # a miniature is no repository of the hub
    assert paper_of(method) in text
    back = checkpoint.Pretrained.from_pretrained(str(tmp_path)).head
    assert all(torch.equal(head.state_dict()[k], v) for k, v in back.state_dict().items())
    (tmp_path / "README.md").write_text("mine")
    checkpoint.Pretrained(head).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with hub() as found:
        yield found


def push(run: Path, repo: str, server: Hub | None, *words: str, **env: str) -> Any:
    """The command in a process of its own, since the hub's address is read when its client is imported."""
    address = server.address if server else "http://127.0.0.1:9"
    own = {"HF_ENDPOINT": address, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(run.parent)}
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "heads", "push", str(run), repo, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**{k: v for k, v in os.environ.items() if k != "HF_TOKEN"}, **own, **env},
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_pushed_run_is_whole_and_scores_from_what_was_pushed(
    kind: str,
    runs: dict[str, Path],
    server: Hub,
    caches: Callable[[str], FeatureCache],
    tmp_path: Path,
) -> None:
    run, method = runs[kind], KINDS[kind][0]
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    done = push(run, f"me/{method}", server, "--private", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"pushed {run}: {server.address}/me/{method}/commit/{'1' * 40}\n"
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    assert server.private[f"me/{method}"]
    files = server.repos[f"me/{method}"]
    expected = {"config.json", "model.safetensors", "run.json", "README.md", ".gitattributes"}
    assert set(files) == expected
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        if name not in ("README.md", ".gitattributes"):
            assert data == (run / name).read_bytes()
    _check_card(*parsed(tmp_path / "README.md"), run, method)
    (mine,) = score_run(tmp_path, cache=caches(method))
    (theirs,) = run.glob("scores-*.zarr")
    assert comparison.evaluate(score_io.load(mine)) == comparison.evaluate(score_io.load(theirs))


def _check_card(data: Any, text: str, run: Path, method: str) -> None:
    record = json.loads((run / "run.json").read_text())
    assert data.model_name == f"{method}-czsl"
    assert data.pipeline_tag == "zero-shot-image-classification"
    assert f'from_pretrained("me/{method}")' in text
    assert f"{record['parameters']:,} trained parameters" in text
    assert record["cache"]["backbone"]["weights"] in text
    table = score_io.load(next(run.glob("scores-*.zarr")))
    values = comparison.evaluate(table)
    found = data.eval_results or []
    assert {r.metric_type: r.metric_value for r in found} == values
    assert {r.dataset_split for r in found} == {"test"}
    assert f"| auc | {values['auc']:.4f} |" in text


def test_a_card_of_one_s_own_is_pushed_and_one_that_is_there_stays(
    runs: dict[str, Path], server: Hub, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.json", "model.safetensors", "run.json"):
        (run / name).write_bytes((runs["cache alone"] / name).read_bytes())
    (run / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    assert push(run, "me/own", server, HF_TOKEN=TOKEN).returncode == 0
    assert server.repos["me/own"]["README.md"].endswith(b"mine\n")
    assert not server.private["me/own"]
    (run / "README.md").unlink()
    done = push(run, "me/own", server, HF_TOKEN=TOKEN)
    assert done.returncode == 0
    assert "the README.md of me/own is not as headstart made it" in done.stdout
    assert server.repos["me/own"]["README.md"].endswith(b"mine\n")
    assert server.commits[-1]["summary"] == "tf_local on czsl, by headstart"


def test_a_card_that_a_push_made_is_made_anew_unless_it_was_edited(
    runs: dict[str, Path], server: Hub
) -> None:
    first, second = runs["cache alone"], runs["live text tower"]
    assert push(first, "me/again", server, HF_TOKEN=TOKEN).returncode == 0
    assert b"# tf_local-czsl\n" in server.repos["me/again"]["README.md"]
    done = push(second, "me/again", server, HF_TOKEN=TOKEN)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    made = server.repos["me/again"]["README.md"]
    assert b"# csp-czsl\n" in made
    edited = made.replace(b"---\n", b"---\nlicense: mit\n", 1)
    server.repos["me/again"]["README.md"] = edited
    done = push(first, "me/again", server, HF_TOKEN=TOKEN)
    assert (done.returncode, done.stdout.count("\n")) == (0, 2)
    assert server.repos["me/again"]["README.md"] == edited


def test_each_table_s_figures_stand_under_the_data_set_that_it_was_scored_on(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    run = runs["cache alone"]
    (path,) = run.glob("scores-*.zarr")
    record = json.loads((run / "run.json").read_text())
    other = {**record["cache"], "dataset": {**record["cache"]["dataset"], "name": "elsewhere"}}
    table = score_io.load(path)
    score_io.save(table, tmp_path / "scores-other-test.zarr", run={**record, "cache": other})
    card = model_card(checkpoint.describe(run), record, [path, tmp_path / "scores-other-test.zarr"])
    data: Any = card.data
    results = data.eval_results
    trained_on = record["cache"]["dataset"]["name"]
    assert {(r.dataset_config, r.dataset_name, r.dataset_type) for r in results} == {
        ("scores-test", trained_on, trained_on),
        ("scores-other-test", "elsewhere", "elsewhere"),
    }
    auc = f"{comparison.evaluate(table)['auc']:.4f}"
    assert f"| scores-test | {trained_on} | test | auc | {auc} |" in card.text
    assert f"| scores-other-test | elsewhere | test | auc | {auc} |" in card.text


@pytest.mark.parametrize(
    ("repo", "reachable", "env", "said"),
    [
        ("me/x", False, {"HF_TOKEN": TOKEN}, "was not pushed to me/x: "),
        ("me/x", True, {"HF_TOKEN": "wrong"}, "401"),
        ("me/x", True, {}, "was not pushed to me/x: "),
        ("me//x y", True, {"HF_TOKEN": TOKEN}, "Repo id must be"),
        ("me/x", True, {"HF_HUB_OFFLINE": "1"}, "offline mode is enabled"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    repo: str, reachable: bool, env: dict[str, str], said: str, runs: dict[str, Path], server: Hub
) -> None:
    done = push(runs["cache alone"], repo, server if reachable else None, **env)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("headstart push: the run was not pushed to ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert "me/x" not in server.repos


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(tmp_path), "me/x"]) == 1
    assert "is no run" in capsys.readouterr().err


def test_the_exact_command_stands_on_the_card_if_the_record_has_it(runs: dict[str, Path]) -> None:
    description = checkpoint.describe(runs["cache alone"])
    record = json.loads((runs["cache alone"] / "run.json").read_text())
    record.pop("command", None)
    assert "headstart train" not in model_card(description, record).text
    command = "headstart train tf_local --cache 'a b.zarr'"
    text = model_card(description, {**record, "command": command}).text
    assert f"```bash\n{command}\n```" in text


def test_the_paper_is_the_method_file_s(runs: dict[str, Path]) -> None:
    assert paper_of("trident").endswith("arXiv 2411.12584 (IJCAI 2025), section 3.")
    assert paper_of("tf_local").endswith("arXiv 2604.11496 v2.")
    for name in names("heads.methods"):
        assert paper_of(name)
        assert "Reference:" not in paper_of(name)
        assert "Baselines:" not in paper_of(name)


def test_only_a_name_of_the_hub_is_a_base_model(runs: dict[str, Path]) -> None:
    record = json.loads((runs["cache alone"] / "run.json").read_text())
    spec = BackboneSpec.model_validate(record["cache"]["backbone"])
    by_hub = {"torch": "2", "transformers": "5"}

    def of(checkpoint: str, versions: dict[str, str]) -> str | None:
        return hub_name(spec.model_copy(update={"checkpoint": checkpoint, "versions": versions}))

    assert of("llava-hf/llava-1.5-7b-hf@vision", by_hub) == "llava-hf/llava-1.5-7b-hf"
    assert of("demo", by_hub) is None
    assert of("ViT-B-32/openai", {**by_hub, "open_clip_torch": "3"}) is None
