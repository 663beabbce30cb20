"""Feasibility of pairs: rho against loops over its definition, the three modes, the search, word vectors, the public
vectors."""

import csv
import gzip
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.errors import ScoreTableError
from eval.feasibility import Feasibility, feasibility, filtered, grid, kept, search
from eval.glove import UT_ZAPPOS, glove, parts_of

quick = settings(derandomize=True, deadline=None, max_examples=60)


def slow_rho(attr_vectors, obj_vectors, train):
    """Pair by pair, from the definition."""

    def cos(x, y):
        return float(x @ y / np.sqrt((x @ x) * (y @ y)))

    known = {tuple(p) for p in train.tolist()}
    found = []
    for a in range(len(attr_vectors)):
        for o in range(len(obj_vectors)):
            if (a, o) in known:
                found.append(1.0)
                continue
            objs = [p for b, p in known if b == a and p != o]
            attrs = [b for b, p in known if p == o and b != a]
            rho_o = max([-1.0, *(cos(obj_vectors[o], obj_vectors[p]) for p in objs)])
            rho_a = max([-1.0, *(cos(attr_vectors[a], attr_vectors[b]) for b in attrs)])
            found.append((rho_o + rho_a) / 2)
    return found


@quick
@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 999))
def test_rho_equals_the_loop_over_its_definition(a, o, seed):
    rng = np.random.default_rng(seed)
    attrs, objs = rng.normal(size=(a, 3)), rng.normal(size=(o, 2)).astype(np.float32)
    n = rng.integers(1, a * o + 1)
    train = np.stack(np.divmod(rng.choice(a * o, n, replace=False), o), 1)
    got = feasibility(attrs, objs, train)
    assert got == pytest.approx(slow_rho(attrs, objs, train), abs=1e-6)


def test_rho_by_hand():
    """Wet occurs with dog only, old with dog and car: a wet car is as feasible as dogs are like cars, wet like old."""
    attrs, objs = np.eye(2), np.array([[1.0, 0], [0.6, 0.8], [0.0, 1]])
    rho = feasibility(attrs, objs, np.array([[0, 0], [1, 0], [1, 1]])).reshape(2, 3)
    assert rho[0, 1] == pytest.approx((0.6 + 0.0) / 2)
    assert rho[0, 2] == pytest.approx((0.0 + -1) / 2)  # nobody has object 2 in training
    assert rho[1, 2] == pytest.approx((0.8 + -1) / 2)
    assert (rho[[0, 1, 1], [0, 0, 1]] == 1).all()


def test_scaling_word_vectors_changes_no_feasibility():
    rng = np.random.default_rng(0)
    attrs, objs, train = (
        rng.normal(size=(3, 4)),
        rng.normal(size=(5, 4)),
        np.array([[0, 1], [2, 3]]),
    )
    scaled = feasibility(attrs * rng.uniform(0.1, 9, (3, 1)), objs * 7, train)
    assert scaled == pytest.approx(feasibility(attrs, objs, train))


@pytest.mark.parametrize(
    ("attrs", "train", "message"),
    [
        (np.ones((2, 2)), np.zeros((0, 2), dtype=int), r"below \(2, 3\), but got 0 pairs"),
        (np.ones((2, 2)), np.array([[2, 0]]), r"got 1 pairs with largest indices \[2, 0\]"),
        (np.ones((2, 2)), np.array([[-1, 0]]), "got 1 pairs"),
        (np.array([[1.0, 0], [0, 0]]), np.array([[0, 0]]), "vector of attribute 1 is zero"),
        (
            np.array([[np.nan, 0], [0, 1]]),
            np.array([[0, 0]]),
            "vector of attribute 0 is zero or not f",
        ),
    ],
)
def test_vectors_and_pairs_that_give_no_feasibility_are_refused(attrs, train, message):
    with pytest.raises(ScoreTableError, match=message):
        feasibility(attrs, np.ones((3, 2)), train)


def test_a_vocabulary_of_cgqas_size_takes_seconds():
    rng = np.random.default_rng(1)
    train = np.stack(np.divmod(rng.choice(413 * 674, 5592, replace=False), 674), 1)
    assert feasibility(rng.normal(size=(413, 30)), rng.normal(size=(674, 30)), train).shape == (
        278_362,
    )


# ── what is done with it ─────────────────────────────────────────────────────────────────────────────────────────────

SEEN = np.array([True, False, False, False])
RHO = np.array([0.9, -0.2, 0.3, 0.5])
SCORES = np.array([[-2.0, 3.0, -4.0, -np.inf], [1.0, -1.0, 2.0, 0.5]], dtype=np.float32)


def test_infeasible_pairs_are_no_candidates_by_default():
    expected = SCORES.copy()
    expected[:, 1] = -np.inf
    assert np.array_equal(filtered(SCORES, RHO, SEEN, 0.3), expected)
    assert filtered(SCORES, RHO, SEEN, 2.0)[:, 0].tolist() == [
        -2,
        1,
    ]  # seen pairs stay at any threshold


def test_csp_multiplies_infeasible_scores_to_zero_and_doubles_seen_ones_from_zero_down():
    plain = filtered(SCORES, RHO, SEEN, 0.3, "csp_multiply")
    assert plain.tolist() == [[-2, 0, -4, -np.inf], [1, 0, 2, 0.5]]
    doubled = filtered(SCORES, RHO, SEEN, -0.2, "csp_multiply")
    assert doubled.tolist() == [[-4, 3, -4, -np.inf], [2, -1, 2, 0.5]]


def test_compcos_sets_infeasible_scores_to_minus_one():
    found = filtered(SCORES, RHO, SEEN, 0.4, "compcos_minus_one")
    assert found.tolist() == [[-2, -1, -1, -np.inf], [1, -1, -1, 0.5]]


@pytest.mark.parametrize("mode", ["neg_inf", "csp_multiply", "compcos_minus_one"])
def test_no_mode_changes_the_precision_of_scores(mode):
    assert filtered(SCORES, RHO, SEEN, 0.3, mode).dtype == np.float32


def test_the_grid_has_fifty_plain_floats_from_the_least_to_the_most_feasible_unseen_pair():
    found = grid(RHO, SEEN)
    assert len(found) == 50
    assert (found[0], found[-1]) == (-0.2, 0.5)
    assert {type(t) for t in found} == {float}
    assert kept(RHO, SEEN, found[0]).all()
    assert kept(RHO, SEEN, found[-1]).sum() == 2
    with pytest.raises(ScoreTableError, match="all pairs are seen"):
        grid(RHO, np.ones(4, dtype=bool))


@pytest.mark.parametrize(
    ("aucs", "threshold", "auc"),
    [([0.1, 0.3, 0.3, 0.2], 1, 0.3), ([0.2, 0.2, 0.1, 0.0], 0, 0.2), ([0.0] * 4, -np.inf, 0)],
)
def test_the_first_strictly_better_threshold_wins(aucs, threshold, auc):
    found = search(lambda t: aucs[int(t)], [0.0, 1.0, 2.0, 3.0])
    assert (found.threshold, found.auc, found.aucs) == (threshold, auc, aucs)


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_feasibility_file_gives_every_pair_by_name(tmp_path):
    made = Feasibility(np.arange(6.0), ("old", "wet"), ("car", "cat", "dog"), "by hand")
    found = Feasibility.load(made.save(tmp_path / "new" / "f.npz"))
    assert found.of([("wet", "cat"), ("old", "dog")]).tolist() == [4, 2]
    assert (found.attrs, found.objs, found.source) == (made.attrs, made.objs, "by hand")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["f.npz"]
    with pytest.raises(
        ScoreTableError, match="2 attrs × 3 objs does not know obj 'bus' and 0 others"
    ):
        found.of([("wet", "bus")])


@pytest.mark.parametrize(
    ("rho", "message"),
    [
        (np.zeros(5), r"2 attrs × 3 objs = 6 finite floats, but is float64 of shape \(5,\)"),
        (np.array([0, 1, 2, 3, 4, np.nan]), "with 5 finite ones"),
        (np.arange(6), "but is int64"),
    ],
)
def test_a_vector_that_is_no_feasibility_is_refused(rho, message):
    with pytest.raises(ScoreTableError, match=message):
        Feasibility(rho, ("old", "wet"), ("car", "cat", "dog"))


def test_what_is_no_feasibility_file_is_refused(tmp_path):
    path = tmp_path / "f.npz"
    with pytest.raises(ScoreTableError, match=r"f\.npz is no feasibility file \(no arrays at"):
        Feasibility.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ScoreTableError, match="is no feasibility file"):
        Feasibility.load(path)
    np.savez(path, rho=np.zeros(2))
    with pytest.raises(ScoreTableError, match=r"is no feasibility file.*format"):
        Feasibility.load(path)
    np.savez(path, format="word vectors", rho=np.zeros(2))
    with pytest.raises(ScoreTableError, match=r"\(its format is .*'word vectors'.*, not '"):
        Feasibility.load(path)
    np.savez(path, format=np.array([{"a": 1}], dtype=object))
    with pytest.raises(
        ScoreTableError, match=r"is no feasibility file.*would have to be unpickled"
    ):
        Feasibility.load(path)


# ── words ────────────────────────────────────────────────────────────────────────────────────────────────────────────

GLOVE = "the 1 2 3\nfake 0 1 0\nfur 0 0 -1e0\nchain 2 0 0\nlink 0 4 0\nfur 9 9 9\nnubuck 5 5 5\n"


@pytest.fixture
def vectors(tmp_path):
    (tmp_path / "glove.txt").write_text(GLOVE)
    return tmp_path / "glove.txt"


def test_a_compound_is_the_mean_of_its_parts_and_the_first_line_of_a_word_counts(vectors):
    found = glove(vectors, ["Chain-link", "fur", "The_chain link"])
    assert found.tolist() == [[1, 2, 0], [0, 0, -1], [1, 2, 1]]
    assert glove(vectors, ["Faux.Fur"], UT_ZAPPOS).tolist() == [[0, 0.5, -0.5]]


def test_ut_zappos_names_are_replaced_and_others_left():
    assert len(UT_ZAPPOS) == 16
    assert parts_of("Boots.Mid-Calf", UT_ZAPPOS) == ("midcalf", "boots")
    assert parts_of("Nubuck", UT_ZAPPOS) == ("grainy", "leather")
    assert parts_of("Nubuck") == ("nubuck",)
    assert parts_of("_") == ("_",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"fur 1 2\nchain 1\n", "line 2 has 1 numbers behind its word, but line 1 has 2"),
        (b"fur 1 2\n\nchain 1 2\n", "line 2 has -1 numbers|line 2 has 0 numbers"),
        (b"400000 300\nfur 1 2\n", "line 1 has 2 fields.*remove the header"),
        (b"fur 1 x\n", "line 1 is not a word and 2 numbers.*'x'"),
        (b"fur 1 nan\n", "line 1 holds a number that is not finite"),
        (b"fur 1 2\n\xff 1 2\n", "line 2 is not a word and 2 numbers"),
        (b"a 1 2\n", "no vector for 1 of 1 words: fur .*'Fur'.*larger vocabulary"),
        (b"", "no vector for 1 of 1 words"),
        (b"fur 1 2\nchain 1 2 3\n", "line 2 has 3 numbers behind its word, but line 1 has 2"),
        (b"fur" + b" 1" * (1 << 20), "line 1 is longer than 1048576 bytes"),
    ],
)
def test_a_bad_file_of_word_vectors_is_refused_by_line(tmp_path, text, message):
    (tmp_path / "g.txt").write_bytes(text)
    with pytest.raises(ScoreTableError, match=message):
        glove(tmp_path / "g.txt", ["Fur"])


def test_a_word_may_hold_blanks_as_some_of_glove_840b_do(tmp_path):
    lines = ("the 1 2", ". . . 3 4", "at name@domain.com 5 6", " fur  7 8 ")
    (tmp_path / "g.txt").write_text("\n".join(lines))
    assert glove(tmp_path / "g.txt", ["fur", "the"]).tolist() == [[7, 8], [1, 2]]
    with pytest.raises(ScoreTableError, match="no vector for 1 of 1 words: at"):
        glove(tmp_path / "g.txt", ["at"])


def test_who_asks_may_say_how_a_name_falls_apart(vectors):
    found = glove(vectors, ["fake.fur"], parts=lambda name: name.split("."))
    assert found.tolist() == [[0, 0.5, -0.5]]


def test_a_byte_order_mark_is_no_part_of_the_first_word(tmp_path):
    (tmp_path / "g.txt").write_bytes(b"\xef\xbb\xbffur 1 2\n")
    assert glove(tmp_path / "g.txt", ["fur"]).tolist() == [[1, 2]]
    with pytest.raises(ScoreTableError, match=r"read from .*h\.txt: No such file"):
        glove(tmp_path / "h.txt", ["fur"])


# ── the public vectors ───────────────────────────────────────────────────────────────────────────────────────────────

OFFICIAL = Path(os.environ.get("HEADSTART_OFFICIAL_DATA", "/nowhere"))


@pytest.mark.skipif(
    not (OFFICIAL / "feasibility").is_dir(),
    reason="HEADSTART_OFFICIAL_DATA must name a folder with feasibility/feasibility_{mit-states,ut-zappos,cgqa}.pt, "
    "as in github.com/bighuang624/Troika (data/), and czsl_pairs/{mit-states,ut-zappos,cgqa}.tsv.gz (lines attr, obj, "
    "1 if the pair is seen), which can be made from the pair files that github.com/ExplainableML/czsl points to",
)
@pytest.mark.parametrize(
    ("name", "point", "threshold", "n_kept", "n_unseen"),
    [
        ("mit-states", 29, 0.4069, 1_727, 26_913),
        ("ut-zappos", 18, 0.5299, 66, 109),
        ("cgqa", 34, 0.4994, 4_933, 272_770),
    ],
)
def test_csps_published_thresholds_are_grid_points_of_the_public_vectors(
    name, point, threshold, n_kept, n_unseen
):
    import torch

    path = OFFICIAL / "feasibility" / f"feasibility_{name}.pt"
    rho = torch.load(path, map_location="cpu", weights_only=True)["feasibility"].numpy().ravel()
    with gzip.open(OFFICIAL / "czsl_pairs" / f"{name}.tsv.gz", "rt") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    attrs, objs = (sorted({row[i] for row in rows}) for i in (0, 1))
    seen = np.zeros((len(attrs), len(objs)), dtype=bool)
    for attr, obj, flag, *_ in rows:
        seen[attrs.index(attr), objs.index(obj)] |= flag == "1"
    seen = seen.ravel()
    assert (rho[seen] == 0).all()
    assert int((~seen).sum()) == n_unseen
    chosen = grid(rho, seen)[point]
    assert round(chosen, 4) == threshold
    assert int(kept(rho, seen, chosen).sum() - seen.sum()) == n_kept
    if name == "mit-states":
        assert grid(rho, seen)[0] == pytest.approx(-0.045, abs=5e-4)
