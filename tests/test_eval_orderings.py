"""Claimed orderings: the paired interval against a loop, verdicts where the truth is known, what a reader sees."""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eval import bootstrap, formats, orderings_format, score_io
from eval.comparison import compare
from eval.composition import CompositionScores
from eval.draws import draws, strata
from eval.errors import ScoreTableError
from eval.matching import MatchingScores
from eval.orderings import Ordering, Verdict, judge, unmeasured
from eval.report import report
from eval.runs import Run, read_runs
from heads.ablation import read

N, Q, C = 90, 60, 6
CACHE = {
    "fingerprint": "f00dcafe1234",
    "backbone": {"family": "clip", "checkpoint": "demo"},
    "dataset": {"name": "toy_world"},
}


def items(right: np.ndarray) -> MatchingScores:
    """2×2 items of which those in `right` are all right and the others all wrong."""
    scores = np.where(right[:, None, None], np.eye(2), 1 - np.eye(2))
    return MatchingScores(
        scores, np.array(["swap", "add", "add"] * (len(right) // 3)), "logit", "test"
    )


def share(p: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(N) < p


def images(strength: float, seed: int, world: str = "closed") -> CompositionScores:
    target = np.arange(Q) % C
    scores = np.random.default_rng(seed).normal(size=(Q, C)) + strength * np.eye(C)[target]
    pairs = np.stack([np.arange(C) // 2, np.arange(C) % 2], 1)
    return CompositionScores(scores, target, pairs, np.arange(C) < 4, "test", "logit", world)


def run(label: str, seed: int, *tables, checkpoint: str = "demo", **more) -> Run:
    backbone = {"family": "clip", "checkpoint": checkpoint}
    facts = {"method": "m", "label": label, "seed": seed, "cache": {**CACHE, "backbone": backbone}}
    facts |= more
    named = {str(i): table for i, table in enumerate(tables)}
    return Run(Path(f"{label}-{seed}"), facts, named)


def one(
    runs: list[Run], metric: str = "group_score", better: str = "a", than: str = "b"
) -> Verdict:
    (found,) = judge(compare(runs), [Ordering(better, than, metric, "somebody (P)")])
    return found


def test_the_interval_is_that_of_a_loop_over_draws_of_items_and_seeds() -> None:
    ours, theirs = ([share(p, 10 * i + s) for s in range(3)] for i, p in enumerate((0.6, 0.5)))
    runs = [run("a", s, items(x)) for s, x in enumerate(ours)]
    runs += [run("b", s, items(x)) for s, x in enumerate(theirs)]
    found = one(runs)
    chosen = np.random.default_rng((0, 1)).multinomial(3, [1 / 3] * 3, size=1000)
    weights = np.concatenate(list(draws(strata(items(ours[0])), 1000, 0)))
    differences = []
    for w, seeds in zip(weights, chosen, strict=True):
        total = 0.0
        for s, times in enumerate(seeds):
            for _ in range(times):
                mine = sum(w[i] for i in range(N) if ours[s][i]) / sum(w)
                other = sum(w[i] for i in range(N) if theirs[s][i]) / sum(w)
                total += (mine - other) / 3
        differences.append(total)
    assert found.interval.low == pytest.approx(np.percentile(differences, 2.5))
    assert found.interval.high == pytest.approx(np.percentile(differences, 97.5))
    assert found.interval.estimate == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert found.seeds == (3, 3)
    assert found.backbone == "clip:demo"


def test_a_curve_s_interval_is_the_paired_one_of_the_bootstrap() -> None:
    ours, theirs = ([images(x, s) for s in (3, 4)] for x in (1.5, 1.0))
    runs = [run(n, s, t) for n, ts in (("a", ours), ("b", theirs)) for s, t in enumerate(ts)]
    expected = bootstrap.difference(ours, theirs)["best_hm"]
    assert one(runs, "best_hm").interval == expected


def test_what_is_known_to_be_better_holds_and_the_other_way_round_does_not() -> None:
    runs = [run("a", s, items(share(0.8, s))) for s in range(3)]
    runs += [run("b", s, items(share(0.4, 50 + s))) for s in range(3)]
    holds, fails = one(runs), one(runs, better="b", than="a")
    assert holds.decision == "holds"
    assert fails.decision == "does not hold"
    mine, other = holds.interval, fails.interval
    assert (other.low, other.high) == pytest.approx((-mine.high, -mine.low))
    assert other.estimate == pytest.approx(-mine.estimate)


def test_rows_that_are_equally_good_are_not_decided_and_equal_ones_neither() -> None:
    runs = [run("a", s, items(share(0.5, s))) for s in range(3)]
    runs += [run("b", s, items(share(0.5, 50 + s))) for s in range(3)]
    assert one(runs).decision == "not decided"
    twins = [run(name, 0, items(share(0.5, 7))) for name in "ab"]
    same = one(twins)
    assert same.interval == bootstrap.Interval(0.0, 0.0, 0.0)
    assert same.words() == "not decided"


def test_a_gain_of_one_lucky_seed_is_not_decided() -> None:
    """Items alone would decide it: pooled over seeds the gain is far larger than what items vary."""
    base = share(0.5, 1)
    up, down = base | share(0.8, 2), base & share(0.75, 3)
    runs = [run("b", s, items(base)) for s in range(3)]
    runs += [run("a", s, items(x)) for s, x in enumerate((up, down, base))]
    assert one(runs).interval.estimate > 0
    assert one([*runs[:1], *runs[3:]]).seeds == (3, 1)
    assert one(runs).decision == "not decided"
    assert one([run("b", 0, items(base)), run("a", 0, items(up))]).decision == "holds"


def test_every_backbone_and_world_is_judged_and_a_missing_row_is_none() -> None:
    def tables(seed: int):
        return images(1.0, seed), images(1.0, seed, "open")

    runs = [run(n, 0, *tables(i)) for i, n in enumerate("ab")]
    runs += [run(n, 0, *tables(i), checkpoint="other") for i, n in enumerate("abc")]
    claims = [Ordering("a", "b", "auc", "x"), Ordering("c", "a", "auc", "x")]
    claims += [Ordering("c", "z", "auc", "x"), Ordering("a", "b", "group_score", "x")]
    found = judge(compare(runs), claims)
    seen = [(v.ordering.better, v.comparison.question.world, v.backbone) for v in found]
    both = ("clip:demo", "clip:other")
    assert seen[:4] == [("a", w, b) for w in ("closed", "open") for b in both]
    assert seen[4:] == [("c", w, "clip:other") for w in ("closed", "open")]
    assert {v.comparison.curve for v in found} == {"exact"}  # the legacy curve has no intervals
    assert unmeasured(claims, found) == claims[2:]


def test_one_seed_of_each_of_two_trained_rows_never_reads_as_plain_holds() -> None:
    good, bad = items(share(0.9, 1)), items(share(0.3, 2))

    def words(*runs: Run, **rows: str) -> str:
        return one(list(runs), **rows).words()

    assert words(run("a", 0, good), run("b", 0, bad)) == "holds (one seed)"
    assert words(run("a", 0, bad), run("b", 0, good)) == "does not hold (one seed)"
    assert words(run("a", 0, good), run("b", 0, bad), run("b", 1, bad)) == "holds"
    untrained = run("b", 0, bad, method="zero_shot"), run("b", 0, bad, parameters=0)
    for other in untrained:
        assert words(run("a", 0, good), other) == "holds"
    text = orderings_format.as_markdown([one([run("a", 0, good), run("b", 0, bad)])])
    assert "the claim holds in 1, does not hold in 0" in text
    assert "| holds (one seed) |" in text


def test_claims_that_nothing_measures_leave_the_sentences_alone() -> None:
    notes = ["Not measured: <a> over b."]
    assert (
        orderings_format.as_markdown([], notes)
        == "### Claimed orderings\n\nNote: Not measured: <a> over b.\n"
    )
    assert orderings_format.as_html([], notes) == (
        '<p class="note">Not measured: &lt;a&gt; over b.</p>'
    )


def test_seeds_of_one_row_vary_beside_a_row_of_one_seed() -> None:
    """Five seeds against one: the five are drawn, as if the one had no variation of its own."""
    ours, theirs = [items(share(0.5 + s / 20, s)) for s in range(5)], items(share(0.4, 9))
    runs = [run("a", s, t) for s, t in enumerate(ours)] + [run("b", 0, theirs)]
    found = one(runs)
    assert found.seeds == (5, 1)
    assert found.interval == bootstrap.difference(ours, [theirs])["group_score"]
    text = orderings_format.as_markdown([found])
    assert "a row of one seed adds no variation of its own" in text
    head = next(csv.reader(io.StringIO(formats.to_csv([]))))
    (cells,) = csv.reader(io.StringIO(orderings_format.csv_lines([found])))
    line = dict(zip(head, cells, strict=True))
    assert (line["seeds"], line["seeds_other"]) == ("5", "1")


def test_every_line_of_the_report_s_csv_has_all_columns() -> None:
    head, short = csv.reader(io.StringIO(formats.to_csv([]) + formats.csv_text([["toy_world"]])))
    assert short == ["toy_world", *[""] * (len(head) - 1)]


def test_a_claim_of_one_world_is_judged_there_alone() -> None:
    runs = [run(n, 0, images(1.0, i), images(1.0, i, "open")) for i, n in enumerate("ab")]
    claims = [Ordering("a", "b", "auc", "x", world) for world in (None, "open", "closed")]
    worlds = [
        [v.comparison.question.world for v in judge(compare(runs), [claim])] for claim in claims
    ]
    assert worlds == [["closed", "open"], ["open"], ["closed"]]
    alone = compare([run(n, 0, images(1.0, i)) for i, n in enumerate("ab")])
    found = judge(alone, claims)
    assert unmeasured(claims, found) == [claims[1]]
    (says,) = orderings_format.sentences(claims, found)
    assert says.startswith("Not measured: a above b in auc, open world (x)")


def test_packaged_claims_of_simfp_are_of_the_open_world_and_csp_s_of_both() -> None:
    worlds = {n: [o.world for o in read(n).orderings()] for n in ("simfp", "csp")}
    assert set(worlds["simfp"]) == {"open"}
    assert set(worlds["csp"]) == {None}


def test_rows_of_one_name_in_two_score_spaces_are_each_judged() -> None:
    good, bad = items(share(0.9, 1)), items(share(0.2, 2))
    both = [replace(good, space="cosine"), bad]  # the row a is good by its cosines alone
    runs = [run("a", s, *both) for s in (0, 1)] + [
        run("b", s, items(share(0.5, 3))) for s in (0, 1)
    ]
    found = judge(compare(runs), [Ordering("a", "b", "group_score", "x")])
    assert {v.spaces: v.decision for v in found} == {
        ("cosine", "logit"): "holds",
        ("logit", "logit"): "does not hold",
    }
    page, text = orderings_format.as_html(found), orderings_format.as_markdown(found)
    assert page.count("<tr><th scope=row>") == 2
    assert "cosine − logit" in text
    spaces = [line[9] for line in csv.reader(io.StringIO(orderings_format.csv_lines(found)))]
    assert sorted(spaces) == ["cosine minus logit", "logit"]


def test_rows_on_other_items_are_never_subtracted() -> None:
    other = replace(items(share(0.5, 2)), category=np.array(["swap", "add", "swap"] * (N // 3)))
    claim = Ordering("a", "b", "group_score", "x")
    comparisons = compare([run("a", 0, items(share(0.5, 1))), run("b", 0, other)])
    assert judge(comparisons, [claim]) == []  # two questions, two comparisons
    first, second = comparisons
    forged = replace(first, rows=(*first.rows, *second.rows))
    with pytest.raises(ScoreTableError, match="differ in category"):
        judge([forged], [claim])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two labels of two seeds, the first far better."""
    root = tmp_path_factory.mktemp("runs")
    for label, p in (("good", 0.9), ("bad", 0.2)):
        for seed in (0, 1):
            path = root / f"{label}-{seed}"
            path.mkdir()
            record = {"method": "m", "label": label, "seed": seed, "cache": CACHE}
            (path / "run.json").write_text(json.dumps(record))
            score_io.save(items(share(p, seed)), path / "scores-test.zarr", run=record)
    return root


def test_a_report_says_plainly_what_holds_and_what_does_not(folder: Path, tmp_path: Path) -> None:
    claims = [
        Ordering("good", "bad", "group_score", "a <paper> (P)"),
        Ordering("bad", "good", "group_score", "a seed"),
        Ordering("good", "gone", "i2t", "nobody"),
    ]
    notes = ["clip: row 'gone' is left out, as it reads <words>"]
    page, md, table, _ = report([folder], tmp_path / "r.html", orderings=claims, notes=notes)
    html, text = page.read_text(), md.read_text()
    assert '<section id="orderings"><h2>Claimed orderings</h2>' in html
    assert '<span class="up">holds</span>' in html
    assert '<span class="down">does not hold</span>' in html
    assert "a &lt;paper&gt; (P)" in html
    assert "it reads &lt;words&gt;" in html
    assert re.search(r"good above bad<small.*?</th><td.*?group_score.*?2 seeds", html)
    assert (
        "2 differences measured: the claim holds in 1, does not hold in 1, and is not decided in 0."
        in text
    )
    lines = [line.split(" | ") for line in text.splitlines() if "points" not in line]
    (holds,) = (line for line in lines if line[0].startswith("| good above bad"))
    assert [holds[5].strip(), holds[6].strip()] == ["2", "holds"]
    assert "Not measured: good above gone in i2t (nobody)" in text
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    found = {r["method"]: r for r in rows if r["metric"] == "difference of group_score"}
    assert {m: r["note"] for m, r in found.items()} == {
        "good minus bad": "holds",
        "bad minus good": "does not hold",
    }
    (verdict, _) = judge(compare(read_runs([folder])), claims)
    numbers = [float(found["good minus bad"][k]) for k in ("mean", "low", "high")]
    assert numbers == pytest.approx(
        [verdict.interval.estimate, verdict.interval.low, verdict.interval.high], rel=1e-5
    )
    assert found["bad minus good"]["source"] == "a seed"


def test_an_end_of_an_interval_never_reads_as_zero_unless_it_is() -> None:
    verdict = one([run("a", 0, items(share(0.5, 1))), run("b", 0, items(share(0.5, 2)))])
    narrow = replace(verdict, interval=bootstrap.Interval(0.0012, 0.00002, 0.0025))
    assert narrow.decision == "holds"
    assert "+0.12 [+0.002, +0.25]" in orderings_format.as_markdown([narrow])
    zero = replace(verdict, interval=bootstrap.Interval(0.0, 0.0, 0.0))
    assert "+0.00 [+0.00, +0.00]" in orderings_format.as_markdown([zero])


def test_a_report_without_claims_has_no_such_section(folder: Path, tmp_path: Path) -> None:
    page, md, table, _ = report([folder], tmp_path / "r.html")
    assert "rderings" not in page.read_text() + md.read_text() + table.read_text()
