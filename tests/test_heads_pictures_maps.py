"""What heads show on pictures: gates and attention from the equations, one number at a time; and what has no maps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import drawn
from torch import Tensor

from cache_builder import FeatureCache
from eval.composition import CompositionScores
from eval.score_io import load as load_table
from heads import load_method, miniature
from heads.base import Context
from heads.errors import ConfigError
from heads.features import Features
from heads.maps import Mapped, Maps
from heads.pictures import save_pictures
from heads.runs import score_run, train_run


def grown(head: Any, by: float = 0.3) -> Any:
    """In evaluation mode, with every parameter and running mean moved: nothing is 0 or 1 by chance."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in [*head.parameters(), *(b for n, b in head.named_buffers() if "running_mean" in n)]:
            p.add_(by * torch.randn(p.shape, generator=g))
    return head.eval()


def trident_of(**values: Any) -> Any:
    method = load_method("trident")
    small = miniature.small_context()
    shapes = {**small.shapes, "image/patches": (16, miniature.W), "image/prefix": (1, miniature.W)}
    config = method.Config(**{"n_local": 3, "n_global": 2, "words": "clip_text", **values})
    context = Context(shapes, small.readout, small.attrs, small.objs)
    torch.manual_seed(0)
    return grown(method.Head(config, method.Head.miniature(config, context)))


def rows_of(head: Any, n: int = 1) -> Features:
    return miniature.small_features(n, 4, head.needs(head.config).queries, head.context)


def labelled(attr: int, obj: int) -> Features:
    return Features({}, {"attr": torch.tensor([attr]), "obj": torch.tensor([obj])})


def maps_of(head: Any, query: Features, candidate: Features) -> Maps:
    assert isinstance(head, Mapped)
    with torch.no_grad():
        return head.maps(query, candidate)


# ── trident ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def by_hand(head: Any, patch: Tensor) -> tuple[Tensor, list[float]]:
    """z of one patch and the gate of every slot, from the weights: sigmoid(w·z + b) (or relu)."""
    local, norm = head.local, head.local.norm
    x = head.readout.norm("image", patch[None])[0]
    y = local.projection.conv.weight @ x + local.projection.conv.bias
    z = (y - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    z = z.clamp(min=0)
    gates = []
    for w, b in zip(local.gates.weight, local.gates.bias, strict=True):
        logit = float(w @ z + b)
        sigmoid = 1 / (1 + np.exp(-logit))
        gates.append(sigmoid if head.config.gate == "sigmoid" else max(0.0, logit))
    return z, gates


@pytest.mark.parametrize("gate", ["sigmoid", "relu"])
def test_a_gate_is_what_the_weights_say_and_its_weighted_mean_is_the_slot(gate: str) -> None:
    head = trident_of(gate=gate)
    query = rows_of(head)
    found = maps_of(head, query, labelled(0, 0))
    assert found.names == ("slot 1", "slot 2", "slot 3")
    with torch.no_grad():
        hand = [by_hand(head, patch) for patch in query["image/patches"][0]]
        z, gates = torch.stack([z for z, _ in hand]), torch.tensor([g for _, g in hand]).T
        torch.testing.assert_close(found.looks, gates.float())
        local, _ = head._slots(query)
    means = (found.looks[:, :, None] * z).mean(
        1
    )  # l_i = mean over n of gate · z, not divided by the gates
    torch.testing.assert_close(means, local[0])


def test_pooled_patches_have_a_quarter_of_the_gates() -> None:
    head = trident_of(pool_patches=True)
    query = rows_of(head)
    found = maps_of(head, query, labelled(0, 0))
    assert found.looks.shape == (3, 4)
    patches = head.readout.norm("image", query["image/patches"])[0].unflatten(0, (4, 4))
    plain = trident_of()
    mean = patches[2:, :2].mean((0, 1))  # below, left: the third of four
    with torch.no_grad():
        want = plain.local.weights(mean[None, None])[0, :, 0]
    torch.testing.assert_close(found.looks[:, 2], want)


@pytest.mark.parametrize(("mask", "rows"), [("relu", 2), ("softplus", 2), ("ones", 0)])
def test_the_strip_is_what_the_global_vector_is_multiplied_by(mask: str, rows: int) -> None:
    head = trident_of(mask=mask)
    found = maps_of(head, rows_of(head), labelled(0, 0))
    assert list(found.strip) == [f"mask {i + 1}" for i in range(rows)]
    vector = torch.full((1, miniature.W), 2.0)
    slots = head.masks(vector)[0]
    for row, strip in zip(slots, found.strip.values(), strict=bool(rows)):
        torch.testing.assert_close(row, 2 * strip)
        assert not strip.requires_grad


def without_patches(**values: Any) -> Any:
    """A trident without local slots, from a cache that holds no patches."""
    method, small = load_method("trident"), miniature.small_context()
    shapes = {"image/prefix": (1, miniature.W)}
    config = method.Config(n_local=0, n_global=2, words="clip_text", **values)
    context = Context(shapes, small.readout, small.attrs, small.objs)
    return grown(method.Head(config, method.Head.miniature(config, context)))


def test_without_local_slots_there_are_masks_and_no_maps() -> None:
    head = without_patches()
    found = maps_of(head, rows_of(head), labelled(0, 0))
    assert (found.looks.shape[0], found.names) == (0, ())
    assert list(found.strip) == ["mask 1", "mask 2"]


def test_without_local_slots_and_masks_there_is_nothing_to_show() -> None:
    head = without_patches(mask="ones")
    with pytest.raises(ConfigError, match=r"n_local=0, mask='ones'.*train one with local slots"):
        head.maps(rows_of(head), labelled(0, 0))


# ── simfp, branch_blocks ─────────────────────────────────────────────────────────────────────────────────────────────


def live_head(name: str, directory: Path, **values: Any) -> Any:
    method = load_method(name)
    torch.manual_seed(0)
    return grown(
        method.Head(method.Config(**values), miniature.live_context("clip", directory / "files")),
        0.1,
    )


def softmax_attention(block: Any, q: Tensor, kv: Tensor) -> Tensor:
    """Mean over heads of softmax(q·k / √d) of one row with rows, a head at a time."""
    dim = q.shape[-1]
    size = dim // block.heads
    wq, wk, _ = block.qkv.weight.split(dim)
    bq, bk, _ = block.qkv.bias.split(dim)
    a, b = wq @ block.norm1(q) + bq, block.norm1(kv) @ wk.T + bk
    heads = [slice(h * size, (h + 1) * size) for h in range(block.heads)]
    return torch.stack([(b[:, at] @ a[at] / size**0.5).softmax(0) for at in heads]).mean(0)


@pytest.mark.parametrize("fusion", ["inter", "inter_intra", "intra_inter"])
@pytest.mark.parametrize("shared", [True, False])
def test_words_of_simfp_look_where_the_inter_modal_weights_say(
    fusion: str, shared: bool, tmp_path: Path
) -> None:
    head = live_head("simfp", tmp_path, fusion=fusion, share_branches=shared, heads=2)
    query = rows_of(head)
    found = maps_of(head, query, labelled(2, 1))
    assert found.names == ("old", "dog")
    with torch.no_grad():
        gathered = head.gather([Features(miniature_texts(head).streams, labelled(2, 1).labels)])
        x = head.readout.joint("image", query["image/patches"])[0]
        t = dict(gathered.text)
        f = head.fusion
        if fusion == "intra_inter":
            other = {"attr": t["obj"], "obj": t["attr"]}
            change = {k: f.intra_text[f.place[k]](t[k][None], other[k][None])[0] for k in t}
            t = {k: t[k] + change[k] for k in t}
        for row, (k, i) in zip(found.looks, (("attr", 2), ("obj", 1)), strict=True):
            block = f.inter_text[f.place[k]]
            torch.testing.assert_close(row, softmax_attention(block, t[k][i], x))
    torch.testing.assert_close(found.looks.sum(1), torch.ones(2))


def miniature_texts(head: Any) -> Features:
    return miniature.small_features(1, 5, head.needs(head.config).candidates, head.context)


def test_what_simfp_shows_is_what_its_forward_pass_weighs(tmp_path: Path) -> None:
    """out(Σ weights · values) of a cross block, from `weights`, is its own u."""
    block = live_head("simfp", tmp_path, heads=2).fusion.inter_text[0]
    dim = block.out.in_features
    q, kv = torch.randn(1, 3, dim), torch.randn(2, 5, dim)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    with torch.no_grad():
        weights = block.weights(q, kv, mask)
        v = block.norm1(kv) @ block.qkv.weight[2 * dim :].T + block.qkv.bias[2 * dim :]
        rows = weights @ v.unflatten(-1, (2, -1)).transpose(1, 2)
        u = block.out(rows.transpose(1, 2).flatten(2))
        want = u + block.fc2(block.activation(block.fc1(block.norm2(q + u))))
        torch.testing.assert_close(block(q, kv, mask), want)
    assert (weights[1, ..., 2] == 0).all()


def test_without_an_inter_modal_exchange_simfp_has_nothing_to_show(tmp_path: Path) -> None:
    head = live_head("simfp", tmp_path, fusion="intra", heads=2)
    assert head.fusion.looks({}, torch.zeros(1, 1, 1)) == {}
    with pytest.raises(ConfigError, match="fusion='intra'; train one with fusion=inter"):
        head.maps(rows_of(head), labelled(0, 0))


def test_branches_look_where_their_last_block_looks(tmp_path: Path) -> None:
    head = live_head("branch_blocks", tmp_path, n_blocks=2, branches=("pair", "obj"))
    query = rows_of(head)
    found = maps_of(head, query, labelled(0, 0))
    assert found.names == ("obj branch", "pair branch")
    rows = torch.cat([query["image/prefix"], query["image/patches"]], 1)
    with torch.no_grad():
        for row, k in zip(found.looks, ("obj", "pair"), strict=True):
            first, last = head.branches[k].blocks
            x = first(rows)[0]
            torch.testing.assert_close(row, softmax_attention(last, x[0], x)[1:])


def test_branches_without_blocks_have_nothing_to_show(tmp_path: Path) -> None:
    head = live_head("branch_blocks", tmp_path, branches=())
    with pytest.raises(ConfigError, match="no branch with a block"):
        head.maps(rows_of(head), labelled(0, 0))


# ── pictures of czsl ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def cache(live_cache: Callable[[str], FeatureCache]) -> FeatureCache:
    return live_cache("clip")


def test_a_picture_of_czsl_shows_the_pair_predicted_and_whether_it_is_right(
    cache: FeatureCache, tmp_path: Path
) -> None:
    settings = {"head": {"heads": 2}, "train": {"steps": 2, "batch_size": 4, "device": "cpu"}}
    run = tmp_path / "run"
    train_run(cache, "simfp", run, task="czsl", settings=settings, progress=False)
    (table,) = (load_table(path) for path in score_run(run))
    assert isinstance(table, CompositionScores)
    *paths, last = save_pictures(run, cache, drawn(), task="czsl", n=3)
    assert last.name[:2] == f"{len(paths):02d}"  # simfp has no strip
    first = {int(t): q for q, t in reversed(list(enumerate(table.target)))}
    shown = sorted(first.values())[:3]
    for path, q in zip([*paths, last], shown, strict=True):
        column = table.predicted()[q]
        attr, obj = table.pairs[column]
        with np.load(path, allow_pickle=False) as found:
            assert found["words"].tolist() == [attr, obj]
            assert found["caption"] == f"a photo of {attr} {obj}"
            assert found["score"] == pytest.approx(table.scores[q, column], rel=1e-5)
            assert bool(found["right"]) == (column == table.target[q])
            truth = " ".join(table.pairs[table.target[q]])
            if found["right"]:
                assert found["verdict"] == "predicted, which is right"
            else:
                assert f"it is {truth}, with a score of" in str(found["verdict"])
            assert found["weights"].shape[0] == 2
            assert "inter-modal" in str(found["says"])


def test_masks_are_kept_once_beside_the_pictures(cache: FeatureCache, tmp_path: Path) -> None:
    czsl = cache.tasks.czsl
    assert czsl is not None
    lines = [f"{word} {i}.5 {i % 3} 1\n" for i, word in enumerate((*czsl.attrs, *czsl.objs))]
    (tmp_path / "glove.txt").write_text("".join(lines))
    head = {"n_local": 2, "n_global": 3, "words": "glove", "glove": str(tmp_path / "glove.txt")}
    settings = {
        "head": {**head, "auxiliary": "none"},
        "train": {"steps": 1, "batch_size": 4, "device": "cpu"},
    }
    run = tmp_path / "run"
    trained = train_run(cache, "trident", run, task="czsl", settings=settings, progress=False).head
    paths = save_pictures(run, cache, drawn(), task="czsl", n=2)
    assert [path.name for path in paths[2:]] == ["strip.npz"]
    with np.load(paths[2], allow_pickle=False) as found:
        assert found["words"].tolist() == ["mask 1", "mask 2", "mask 3"]
        want = trained.get_parameter("masks.masks").detach().clamp(min=0)
        np.testing.assert_array_equal(found["strip"], want)
        assert (str(found["task"]), str(found["split"])) == ("czsl", "test")
    with np.load(paths[0], allow_pickle=False) as found:
        assert found["words"].tolist() == ["slot 1", "slot 2"]


def test_a_head_without_maps_is_named_with_those_that_have_them(
    cache: FeatureCache, tmp_path: Path
) -> None:
    train_run(cache, "zero_shot", tmp_path / "run", task="czsl", progress=False)
    with pytest.raises(
        ConfigError,
        match=r"zero_shot has no maps.*these have: branch_blocks, simfp, tf_local, trident",
    ):
        save_pictures(tmp_path / "run", cache, drawn(), task="czsl")
