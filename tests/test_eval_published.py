"""Published numbers: all that were verified and no others, and beside ours only where both measure the same."""

import csv
import io
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval import cli, published, score_io
from eval.comparison import Comparison, compare
from eval.composition import CompositionScores
from eval.czsl_summary import summarise
from eval.matching import MatchingScores
from eval.published import Beside, beside, rows
from eval.published_format import as_html, as_markdown
from eval.reduction import Layout
from eval.retrieval import RetrievalScores
from eval.runs import Run

FILES = sorted(published.FOLDER.glob("*.toml"))

TOTALS = {
    ("czsl", "closed", "mit_states"): (57, 2220.7),
    ("czsl", "closed", "ut_zappos"): (57, 3135.2),
    ("czsl", "closed", "cgqa"): (57, 1529.7),
    ("czsl", "open", "mit_states"): (44, 1031.6),
    ("czsl", "open", "ut_zappos"): (44, 2106.8),
    ("czsl", "open", "cgqa"): (44, 625.4),
    ("czsl", "closed", "vaw_czsl"): (6, 176.8),
    ("matching", "", "sugarcrepe"): (52, 953.34 + 1051.64 + 1183.04 + 1115.81),
    ("matching", "", "bivlc"): (54, 754.56 + 725.76 + 693.61 + 831.54),
    ("retrieval", "", "coco"): (4, 55.8 + 74.8 + 61.1 + 79.2),
    ("retrieval", "", "flickr30k"): (4, 83.4 + 94.9 + 87.2 + 97.4),
}
"""Figures and their sum in percent, added up in the verified list and not in these files."""


def test_every_verified_figure_is_there_and_no_other():
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for row in rows():
        found[row.task, row.facts["world"], row.dataset] += [100 * v for v in row.values.values()]
    assert {key: len(v) for key, v in found.items()} == {key: n for key, (n, _) in TOTALS.items()}
    for key, (_, total) in TOTALS.items():
        assert sum(found[key]) == pytest.approx(total, abs=1e-6), key


def row(method, dataset, **facts) -> published.PublishedRow:
    """The one row of a method and data set with these facts."""
    (found,) = [
        r
        for r in rows()
        if (r.method, r.dataset) == (method, dataset)
        and all(r.facts[name] == value for name, value in facts.items())
    ]
    return found


@pytest.mark.parametrize(
    ("method", "dataset", "world", "metric", "percent"),
    [
        ("CLIP", "mit_states", "closed", "auc", 11.0),
        ("CLIP", "cgqa", "open", "auc", 0.3),
        ("CSP", "ut_zappos", "closed", "best_seen", 64.2),
        ("DFSP (t2i)", "ut_zappos", "closed", "auc", 36.0),  # 36.9 is a copying error
        ("DFSP (t2i)", "cgqa", "closed", "best_unseen", 32.0),  # 32.9 likewise
        ("TOMCAT", "cgqa", "closed", "best_hm", 34.0),
        ("CLEAR", "mit_states", "open", "best_unseen", 21.5),
        ("PLID", "mit_states", "open", "best_hm", 20.4),
        ("DSCNet", "vaw_czsl", "closed", "best_hm", 32.6),
        ("CLIP", "sugarcrepe", "", "accuracy/mean_of_types", 73.04),
        ("TROHN-Img", "sugarcrepe", "", "accuracy/swap_obj", 69.11),
        ("CLIP", "bivlc", "", "group_score/swap_att", 14.75),
        ("TROHN-Text", "bivlc", "", "t2i/add", 55.37),
    ],
)
def test_figures_stand_where_they_belong(method, dataset, world, metric, percent):
    assert row(method, dataset, world=world).values[metric] == pytest.approx(percent / 100)


def test_every_row_has_source_model_and_a_fact_of_each_kind():
    for r in rows():
        assert len(r.source) > 20
        assert ("README of" in r.source) <= (" at " in r.source)
        assert r.backbone.startswith("CLIP ViT-")
        assert r.backbone.endswith("(OpenAI)")
        assert all(name.endswith("/openai") for name in r.names)
        assert set(r.facts) == set(published.FACTS)
        assert r.facts["split"] == "test"
        if r.task == "czsl":
            assert r.facts["curve"] == "legacy"
            assert r.facts["k"] == ("5" if r.dataset == "vaw_czsl" else "1")
            assert (r.facts["feasibility filter"] == "none") == (r.facts["world"] == "closed")
    notes = {r.method: r.note for r in rows() if r.facts["world"] == "closed"}
    assert "adapts on test images" in notes["TOMCAT"]
    assert notes["DSCNet"] == "frozen CLIP"
    assert row("CDS-CZSL", "cgqa", world="open").facts["feasibility filter"] == "own"


def test_what_nobody_verified_is_not_in_the_files():
    methods = {r.method for r in rows()}
    banned = ["RAPR", "EVA", "TRIDENT", "Trident", "SIMFP", "VP-CMJL", "TFLocal", "MoTa"]
    banned += ["Pic2Word", "SEARLE", "Context-I2W", "LinCIR", "BiSCoR"]
    for name in banned:
        assert not [m for m in methods if m.startswith(name)]
        assert name == "EVA" or name not in "".join(f.read_text() for f in FILES)
    for r in rows():
        if r.method.startswith("CAILA"):
            assert set(r.values) == {"auc"}
    aucs = {
        (r.facts["world"], r.dataset, round(100 * r.values["auc"], 1))
        for r in rows()
        if "auc" in r.values
    }
    unverified = {
        "closed": {
            "mit_states": (22.5, 14.2),
            "ut_zappos": (44.5, 50.2, 36.9),
            "cgqa": (14.4, 18.8, 8.0),
            "vaw_czsl": (8.3, 17.2, 20.7),
        },
        "open": {"mit_states": (8.2,), "ut_zappos": (33.3, 40.2), "cgqa": (4.4, 5.6)},
    }
    listed = {(w, d, v) for w, sets in unverified.items() for d, vs in sets.items() for v in vs}
    assert not aucs & listed
    assert all(round(100 * v, 2) not in (7.33, 20.35) for r in rows() for v in r.values.values())
    assert {r.task for r in rows()} == {"czsl", "matching", "retrieval"}


# ── beside ours ──────────────────────────────────────────────────────────────────────────────────────────────────────

L14, B32 = "clip:ViT-L-14/openai", "clip:ViT-B-32/openai"


def run(table, dataset, backbone=L14, method="zero_shot", seed=0) -> Run:
    facts = {"method": method, "seed": seed, "backbone": backbone, "dataset": dataset}
    return Run(Path(f"{method}{seed}"), facts, {"t": table})


def czsl_table(n_seen=1262, world="closed", split="test", space="logit", seed=0, **meta) -> Any:
    pairs = [(f"a{i}", "o") for i in range(n_seen + 8)]
    target = np.array([0, 1, 2, n_seen, n_seen + 1, n_seen + 2])
    scores = np.random.default_rng(seed).normal(size=(6, len(pairs))) + 3 * np.eye(len(pairs))[target]  # fmt: skip
    seen = np.arange(len(pairs)) < n_seen
    return CompositionScores(scores, target, pairs, seen, split, space, world, meta=meta)


def legacy(*runs, k=1) -> Comparison:
    return compare(runs, k=k)[-1]


def found(c: Comparison) -> Beside:
    b = beside(c)
    assert b is not None
    return b


def test_rows_of_the_same_question_stand_beside_ours():
    c = legacy(run(czsl_table(), "mit_states"))
    b = found(c)
    assert (b.why, b.backbone) == ("", "CLIP ViT-L/14 (OpenAI)")
    assert [r.method for r in b.published][:3] == ["CLIP", "CoOp", "CSP"]
    assert len(b.published) == 15
    assert b.metrics(c) == ["auc", "best_hm", "best_seen", "best_unseen"]
    shown = as_markdown(c, b)
    assert "closed world · k = 1 · legacy curve · CLIP ViT-L/14 (OpenAI)" in shown
    assert "| CSP | – | 19.4 | 36.3 | 46.6 | 49.9 | tables of ClusPro" in shown
    assert (
        "| CAILA | – | 23.4 | – | – | – | README of zhaohengz/CAILA at 81d4dcd; arXiv 2305.16681 |"
        in shown
    )
    assert "adapts on test images" in shown
    assert "| ours: zero_shot | 1 |" in shown
    assert "| chance |" in shown
    assert beside(replace(c, curve="exact")) is None
    assert as_markdown(c, None) == as_html(c, None) == ""


def test_beside_a_table_that_keeps_the_best_scores_it_is_said_what_published_numbers_need():
    table = czsl_table(world="open")
    layout = Layout.of(table.seen, None, ())
    given = ([table.scores], layout, table.target, table.pairs)
    summary = summarise(*given, keep=1, split="test", space="logit")
    (c,) = compare([run(summary, "mit_states")])
    b = found(c)
    assert not b.published
    assert "keeps the best ones; score again with --dense" in b.why


OFFICIAL = czsl_table()


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        (czsl_table(split="val"), {}, "they have split test, this table has split val"),
        (czsl_table(world="open"), {}, "filter feasibility or own, this table has feasibility filter none"),
        (czsl_table(n_seen=1261), {}, "mit_states has 1,262 seen pairs, this table 1,261"),
        (czsl_table(partial=True), {}, "examples were left out"),
        (OFFICIAL, {"backbone": B32}, r"they are of CLIP ViT-L/14 \(OpenAI\), this table of clip:ViT-B-32/openai"),
        (OFFICIAL, {"backbone": "clip:ViT-L-14-336/openai"}, "this table of clip:ViT-L-14-336/openai"),
        (OFFICIAL, {"backbone": "clip:ViT-L-14/laion2b_s32b_b82k"}, "this table of"),
        (OFFICIAL, {"dataset": "photos"}, "no number of czsl on photos is shown: none that was published is verified"),
        (OFFICIAL, {"k": 3}, "they have k 1, this table has k 3"),
    ],
)  # fmt: skip
def test_nothing_is_shown_beside_what_measures_something_else(table, options, message):
    k, dataset = options.pop("k", 1), options.pop("dataset", "mit_states")
    c = legacy(run(table, dataset, **options), k=k)
    b = found(c)
    assert not b.published
    with pytest.raises(ValueError, match=message):
        raise ValueError(b.why)
    assert as_markdown(c, b) == f"Published: {b.why}.\n"


def test_open_worlds_agree_only_under_the_standard_filter():
    t = czsl_table(world="open", feasibility={"rule": "neg_inf", "threshold": 0.4})
    methods = [r.method for r in found(legacy(run(t, "mit_states"))).published]
    assert len(methods) == 10
    assert "CDS-CZSL" not in methods


def test_k_3_and_k_5_of_vaw_are_never_in_one_table():
    t = czsl_table(n_seen=11175)
    c = legacy(run(t, "vaw_czsl"), k=5)
    assert [r.method for r in found(c).published] == [
        "DSCNet", "CAILA, vision adapters", "CAILA, vision and language adapters",
    ]  # fmt: skip
    assert "auc@5" in as_markdown(c, found(c))
    assert "they have k 5, this table has k 3" in found(replace(c, k=3)).why


def test_only_our_rows_of_the_same_model_are_repeated():
    """A local file of the same tag is the same model; QuickGELU is a spelling of it."""
    models = [L14 + "@w.safetensors", "clip:ViT-L-14-quickgelu/openai", B32, "pe:PE-Core-L-14-336/meta"]  # fmt: skip
    c = legacy(*(run(OFFICIAL, "mit_states", m) for m in models))
    assert [r.group.backbone for r in found(c).ours] == models[:2]


def matching_table(n=7511, shape=(2,)) -> Any:
    names = ["add_att", "swap_obj", "replace_rel"]
    scores = np.random.default_rng(0).normal(size=(n, *shape))
    return MatchingScores(scores, [names[i % 3] for i in range(n)], "cosine")


def test_matching_sizes_and_forms_have_to_agree():
    c = compare([run(matching_table(), "sugarcrepe", B32)])[0]
    b = found(c)
    assert [r.method for r in b.published] == ["CLIP", "fine-tuned COCO", "TROHN-Text", "TROHN-Img"]
    assert b.metrics(c)[0] == "accuracy/mean_of_types"
    assert "| 73.04 |" in as_markdown(c, b)
    assert "7,512 items" in as_markdown(c, b)
    few = compare([run(matching_table(900), "sugarcrepe", B32)])[0]
    assert "sugarcrepe has 7,511 or 7,512 items, this table 900" in found(few).why
    form = compare([run(matching_table(30, (2, 2)), "sugarcrepe", B32)])[0]
    assert "they have form 1×2, this table has form 2×2" in found(form).why


def test_retrieval_is_by_direction_and_never_reranked():
    scores = np.random.default_rng(0).normal(size=(1000, 20))
    t = RetrievalScores(scores, scores > 1, "cosine", "test", meta={"direction": "i2t"})
    c = compare([run(t, "flickr30k", B32)])[0]
    b = found(c)
    assert [(r.method, r.values) for r in b.published] == [("CLIP", {"recall@5": 0.949})]
    both = compare([run(t, "flickr30k", m) for m in (L14, B32)])[0]
    assert [len(x) for x in (found(both).ours, found(both).published)] == [1, 1]
    assert found(both).backbone == "CLIP ViT-L/14 (OpenAI)"
    part = replace(t, meta={"direction": "i2t", "rerank": 16})
    assert "reranks" in found(compare([run(part, "flickr30k", B32)])[0]).why
    unsaid = replace(t, meta={})
    assert "this table has form not stated" in found(compare([run(unsaid, "flickr30k", B32)])[0]).why  # fmt: skip


def test_the_report_prints_them_in_every_form(tmp_path, capsys):
    for seed in (0, 1):
        folder = tmp_path / f"run{seed}"
        folder.mkdir()
        facts = {"method": "a", "seed": seed, "backbone": L14, "dataset": "mit_states"}
        (folder / "run.json").write_text(json.dumps(facts))
        score_io.save(czsl_table(seed=seed), folder / "scores-test.zarr")
    out = tmp_path / "r.html"
    runs = [str(tmp_path / f"run{seed}") for seed in (0, 1)]
    assert cli.main(["report", *runs, "-o", str(out)]) == 0
    assert "Troika" not in capsys.readouterr().out
    assert cli.main(["report", *runs, "-o", str(out), "--published"]) == 0
    text = out.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out
    assert text.count("| Troika |") == 1
    assert text.index("legacy curve") < text.index("| Troika |")
    page = out.read_text()
    assert page.count("<th scope=row>Troika</th>") == 1
    assert (
        "<h4>Published beside ours · czsl · mit_states · test · closed world · k = 1 · legacy curve"
        in page
    )
    lines = list(csv.DictReader(io.StringIO(out.with_suffix(".csv").read_text())))
    (troika,) = [r for r in lines if (r["method"], r["metric"]) == ("Troika", "auc")]
    assert (troika["mean"], troika["curve"], troika["k"], troika["seeds"]) == (
        "0.221",
        "legacy",
        "1",
        "",
    )
    assert troika["backbone"] == "CLIP ViT-L/14 (OpenAI)"
    assert troika["source"].startswith("tables of ClusPro")
    assert all(r["source"] == "" for r in lines if r["method"] == "a")
    assert "Troika" not in out.with_suffix(".json").read_text()


def test_an_empty_reason_is_not_a_block():
    c = legacy(run(OFFICIAL, "mit_states"))
    assert "Published:" in as_html(c, Beside(why="no <b>"))
    assert "&lt;b&gt;" in as_html(c, Beside(why="no <b>"))
