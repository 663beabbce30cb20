"""What goes wrong most, with its pictures and words: written by a comparison, shown by its page and by later ones."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageOps

from cache_builder import FeatureCache, build, load_backbone, load_dataset
from cache_builder.datasets import mit_states
from eval.comparison import compare
from eval.failures import hardest
from eval.report import report
from eval.retrieval import RetrievalScores
from eval.runs import read_runs
from heads.cli import main
from heads.failure_pictures import SIDE, save_failures

TASKS = ("czsl", "two_by_two", "matching", "composed", "retrieval")
FILES = {
    "czsl": "failures.npz",
    "two_by_two": "failures-2_2.npz",
    "matching": "failures-1_2.npz",
    "composed": "failures.npz",
}


@pytest.fixture(scope="module")
def cache(fast_folder: Path) -> FeatureCache:
    return build(
        load_dataset("toy_world", scale=0.02),
        load_backbone("clip:demo"),
        fast_folder / "failing" / "clip.zarr",
        streams=["image/pooled", "text/pooled"],
        backbone_name="clip:demo",
        progress=False,
    )


@pytest.fixture(scope="module")
def made(cache: FeatureCache, fast_folder: Path) -> dict[str, Path]:
    """A comparison of each task, with pictures."""
    out = {task: fast_folder / "failing" / task for task in TASKS}
    asked = fast_folder / "failing" / "asked.toml"
    asked.write_text('[head]\nquery = "sum"\n')
    for task, place in out.items():
        words = ["--caches", str(cache.path), "--methods", "zero_shot", "--task", task]
        more = {
            "czsl": ["--world", "closed", "open"],
            "composed": ["--config", f"zero_shot={asked}"],
        }
        words += more.get(task, [])
        assert main(["compare", *words, "--pictures", "2", "--out", str(place)]) == 0
    return out


@pytest.mark.parametrize("task", FILES)
def test_every_failure_that_is_shown_has_its_pictures_and_words(
    task: str, made: dict[str, Path], cache: FeatureCache
) -> None:
    run = made[task] / "clip" / "zero_shot-seed0"
    found = dict(np.load(run / "pictures" / FILES[task]))
    shown = {
        f.name: f for c in compare(read_runs([run])) if c.curve != "legacy" for f in hardest(c)
    }
    assert list(found["items"]) == list(shown)
    assert len(shown) >= 2

    dataset = load_dataset("toy_world", scale=0.02)
    pixels = {record.id: record for record in dataset.images}
    assert found["images"].shape == (len(found["names"]), SIDE, SIDE, 3)
    for name, image in zip(found["names"], found["images"], strict=True):
        want = ImageOps.pad(pixels[str(name)].open().convert("RGB"), (SIDE, SIDE))
        assert np.array_equal(image, np.asarray(want))

    tasks, texts = dataset.tasks, {t.id: t.text for t in dataset.texts}
    assert {str(name) for name in found["shows"].ravel()} <= set(found["names"].tolist())
    for item, shows, says in zip(
        *(found[k].tolist() for k in ("items", "shows", "says")), strict=True
    ):
        if task == "czsl":
            assert (shows, says) == ([item], [])
        elif task == "composed":
            (query,) = [e for e in tasks.composed if e.id == item]
            assert shows == [query.reference, query.targets[0]]
            assert says == [texts[query.modifications[0]]]
            assert {a.image for a in shown[item].answers} <= set(found["names"].tolist())
        else:
            (example,) = [e for e in getattr(tasks, task) if e.id == item]
            assert shows == list(example.images)
            assert says == [texts[i] for i in example.captions]


@pytest.mark.parametrize("task", TASKS)
def test_a_page_shows_them_also_when_it_is_made_again(
    task: str, made: dict[str, Path], tmp_path: Path
) -> None:
    first = (made[task] / "report.html").read_text()
    again = report([made[task] / "clip"], tmp_path / "r.html")[0].read_text()
    for page in (first, again):
        parts = page.split("What goes wrong most</h3>")[1:]
        assert len(parts) == (2 if task in ("czsl", "retrieval") else 1)
        for part in parts:
            body = part[: part.index("</table>")]
            defined = set(re.findall(r"--shot-(\d+):url\(data:image/png", body))
            assert defined == set(re.findall(r"var\(--shot-(\d+)\)", body))
            rows = body[body.index("<tbody>") :].split("<tr>")[1:]
            assert all('role="img"' in row for row in rows)
            assert "holds them" not in body
            if task == "two_by_two":
                assert all("caption 2: “" in row and "image 2" in row for row in rows)
            if task == "matching":
                assert all("true caption: “" in row and "false caption: “" in row for row in rows)


def test_retrieval_shows_what_is_ranked_first_in_both_directions(
    made: dict[str, Path], cache: FeatureCache
) -> None:
    run = made["retrieval"] / "clip" / "zero_shot-seed0"
    dataset = load_dataset("toy_world", scale=0.02)
    texts = {t.id: t.text for t in dataset.texts}
    own = {e.image: e.captions for e in dataset.tasks.retrieval if e.split == "test"}
    for c in compare(read_runs([run])):
        direction, table = c.question.variant, c.rows[0].group.tables[0]
        assert isinstance(table, RetrievalScores)
        found = dict(np.load(run / "pictures" / f"failures-{direction}.npz"))
        asked, ranked = (list(own), list(dict.fromkeys(t for ts in own.values() for t in ts)))
        if direction == "t2i":
            asked, ranked = ranked, asked
        shown = hardest(c)
        assert shown
        assert found["items"].tolist() == [f.name for f in shown]
        for failure, says, shows in zip(shown, found["says"], found["shows"], strict=True):
            row = dict(zip(ranked, table.scores[asked.index(failure.name)], strict=True))
            (answer,) = failure.answers
            best = [name for name in ranked if row[name] == max(row.values())]
            assert (answer.image or answer.caption) in best
            if direction == "i2t":
                right = own[failure.name]
                assert (says.tolist(), shows.tolist()) == ([texts[right[0]]], [failure.name])
                assert not answer.image
            else:
                right = [image for image, captions in own.items() if failure.name in captions]
                assert (says.tolist(), shows.tolist()) == ([texts[failure.name]], [right[0]])
                assert answer.image in found["names"]
            rank = min(
                1 + sum(row[wrong] >= row[r] for wrong in ranked if wrong not in right)
                for r in right
            )
            assert answer.words == f"right one: rank {rank} of {len(ranked)}"
            assert not answer.is_right
        strings = dict(zip(found["texts"].tolist(), found["strings"].tolist(), strict=True))
        assert strings == {
            a.caption: texts[a.caption] for f in shown for a in f.answers if a.caption
        }
    page = (made["retrieval"] / "report.html").read_text()
    assert "A cell is what is ranked first" in page


def test_composed_queries_are_drawn_of_the_first_seed(made: dict[str, Path]) -> None:
    names = [p.name for p in (made["composed"] / "clip" / "zero_shot-seed0" / "pictures").iterdir()]
    assert sum(name.startswith("query-") for name in names) == 2


def test_without_pictures_the_page_says_how_to_get_them(
    cache: FeatureCache, tmp_path: Path
) -> None:
    words = ["--caches", str(cache.path), "--methods", "zero_shot", "--task", "czsl"]
    assert main(["compare", *words, "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "headstart compare … --pictures N" in page
    assert not list((tmp_path / "out").rglob("pictures"))


def test_a_plan_that_asks_two_things_of_a_run_has_the_failures_of_both(
    cache: FeatureCache, tmp_path: Path
) -> None:
    words = ["--caches", str(cache.path), "--plan", "two_by_two", "--rows", "zero_shot"]
    assert main(["compare", *words, "--pictures", "1", "--out", str(tmp_path / "out")]) == 0
    folder = tmp_path / "out" / "clip" / "zero_shot-seed0" / "pictures"
    assert {p.name for p in folder.iterdir()} == {FILES["matching"], FILES["two_by_two"]}
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("caption 2: “") > 0
    assert page.count("false caption: “") > 0
    assert "--pictures 1" in page


def test_pictures_that_are_gone_cost_the_page_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = mit_states.miniature(tmp_path / "photos")
    built = build(
        mit_states.load(root),
        load_backbone("clip:demo"),
        tmp_path / "clip.zarr",
        backbone_name="clip:demo",
        progress=False,
    )
    root.rename(tmp_path / "elsewhere")
    words = ["--caches", str(built.path), "--methods", "zero_shot", "--task", "czsl"]
    assert main(["compare", *words, "--pictures", "1", "--out", str(tmp_path / "out")]) == 0
    assert "What goes wrong most is shown without pictures: " in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "What goes wrong most is shown without pictures: " in page


def test_a_row_that_gets_everything_right_has_no_file(cache: FeatureCache) -> None:
    assert save_failures([], {"clip": cache}) == []
