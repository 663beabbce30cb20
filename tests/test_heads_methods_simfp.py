"""simfp: equal to its equations written as a loop, to no fusion where fusion is nothing, exact for any cut."""

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import LIVE_FAMILIES
from torch import Tensor, nn
from torch.nn import functional as F

from cache_builder import FeatureCache
from eval.composition import CompositionScores
from eval.czsl import evaluate
from heads import miniature, score, testing
from heads.base import Context
from heads.blocks.fusion import Branch, CrossBlock, Fusion
from heads.blocks.prompts import encode_texts
from heads.checkpoint import load
from heads.errors import ConfigError
from heads.features import Batch, Features
from heads.live import LiveBackbone
from heads.methods import simfp
from heads.runs import score_run, train_run
from heads.score import score_open
from heads.source import Source, context_of
from heads.tasks import CompositionData, load_task

VARIANTS: list[dict[str, Any]] = [
    {},
    {"fusion": "intra_inter", "fuse_pairs": 2, "share_branches": False, "chunk": 2},
    {"fusion": "none", "prompts": ("soft", "hard", "soft")},
    {"fusion": "intra", "prompts": ("hard", "hard", "hard")},
    {"fusion": "inter", "prompts": ("soft", "soft", "hard"), "learn_context": False},
]


@pytest.fixture(params=LIVE_FAMILIES)
def cache(
    request: pytest.FixtureRequest, live_cache: Callable[[str], FeatureCache]
) -> FeatureCache:
    return live_cache(request.param)


def head_of(context: Context, seed: int = 0, **config: Any) -> simfp.Head:
    torch.manual_seed(seed)
    return simfp.Head(simfp.Config(**config), context)


def stirred(head: simfp.Head, by: float = 0.2) -> simfp.Head:
    """With every parameter moved, so that nothing is zero or one by chance."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(by * torch.randn_like(p))
    return head.eval()


def untyped(module: Any) -> Any:
    """A module whose parts torch's stubs know nothing about."""
    return module


def batch_of(head: simfp.Head, n: int = 4, skip: int = 1) -> Batch:
    """Images of the pairs 0, 1, 2, …; candidates are all pairs but the last few."""
    context, needs = head.context, head.needs(head.config)
    sizes = len(context.attrs), len(context.objs)
    index = torch.cartesian_prod(*(torch.arange(k) for k in sizes))[: -skip or None]
    labels = {"attr": index[:, 0], "obj": index[:, 1]}
    candidates = miniature.small_features(len(index), 2, needs.candidates, context)
    candidates = Features(candidates.streams, labels)
    target = torch.arange(n) % len(index)
    queries = miniature.small_features(n, 1, needs.queries, context)
    queries = Features(queries.streams, {k: v[target] for k, v in labels.items()})
    ignore = torch.zeros(n, len(index), dtype=torch.bool)
    return Batch(queries, candidates, target, ignore, torch.empty(n, 0, dtype=torch.long))


@pytest.mark.parametrize(
    ("family", "values"),
    [("clip", v) for v in VARIANTS] + [(f, VARIANTS[1]) for f in LIVE_FAMILIES[1:]],
)
def test_simfp_keeps_the_promises_of_a_head(
    contexts: dict[str, Context], family: str, values: dict[str, Any]
) -> None:
    testing.check_head(simfp, simfp.Config(**values), contexts[family])


def test_the_seed_decides_the_start(contexts: dict[str, Context]) -> None:
    one, same, other = (head_of(contexts["clip"], seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["branches.attr.linear.weight"], other["branches.attr.linear.weight"])


def test_parameters_at_the_size_of_the_published_backbone() -> None:
    d, a, o = 768, 115, 245

    def count(*modules: nn.Module) -> int:
        return sum(p.numel() for m in modules for p in m.parameters())

    with torch.device("meta"):
        fusion, branch = Fusion(d, 8, 0.1, order="inter_intra"), Branch(d, 0.5)
        apart = Fusion(d, 8, 0.1, order="intra_inter", shared=False)
    block = 12 * d * d + 13 * d
    assert count(fusion) == 4 * block + 2 * d
    assert count(apart) == 8 * block + 4 * d
    assert count(branch) == d * d + 3 * d
    whole = count(fusion) + 2 * count(branch) + (a + o) * d + 2 * 3 * d
    assert whole == 29_818_368  # METHODS: 29.8 M


def test_the_counts_of_a_head(contexts: dict[str, Context]) -> None:
    d, v, letters = 24, 40, 10  # "a photo of", a token a letter
    table, branches, block = (3 + 2) * v, 2 * (d * d + 3 * d), 12 * d * d + 13 * d
    counts = {
        "none": table + 2 * letters * v + branches,
        "inter": table + 2 * letters * v + branches + 2 * block + 2 * d,
        "intra": table + 2 * letters * v + branches + 2 * block,
        "inter_intra": table + 2 * letters * v + branches + 4 * block + 2 * d,
    }
    for fusion, want in counts.items():
        assert head_of(contexts["clip"], fusion=fusion).n_trained() == want
    hard = head_of(contexts["clip"], fusion="none", prompts=("hard", "hard", "hard"))
    assert hard.n_trained() == branches
    plain = head_of(contexts["clip"], fusion="none", learn_context=False)
    assert plain.n_trained() == table + branches


@pytest.mark.parametrize("order", ["inter", "intra", "inter_intra", "intra_inter"])
def test_fusion_that_is_nothing_is_no_fusion(contexts: dict[str, Context], order: str) -> None:
    """λ at 0, and intra blocks whose outputs are zero, as they start."""
    fused, plain = (head_of(contexts["pe"], fusion=f).eval() for f in (order, "none"))
    with torch.no_grad():
        for name, p in fused.named_parameters():
            if "lambda" in name:
                p.zero_()
    missing = plain.load_state_dict(fused.state_dict(), strict=False).missing_keys
    assert not missing
    batch = batch_of(fused)
    # Fused words are one matrix an image, un-fused ones one for all: only the order of sums differs.
    assert torch.allclose(fused.loss(batch)[0], plain.loss(batch)[0], rtol=1e-6)
    sides = batch.queries, batch.candidates
    assert torch.allclose(fused(*sides), plain(*sides), rtol=1e-5, atol=1e-6)
    if "inter" in order:
        started = head_of(contexts["pe"], fusion=order).eval()
        assert not torch.allclose(started.loss(batch)[0], plain.loss(batch)[0], atol=1e-6)


def test_the_order_of_the_stages_matters(contexts: dict[str, Context]) -> None:
    """Two heads of the same numbers: only the order tells them apart."""
    one = stirred(head_of(contexts["clip"], fusion="inter_intra"))
    other = head_of(contexts["clip"], fusion="intra_inter").eval()
    other.load_state_dict(one.state_dict())
    batch = batch_of(one)
    sides = batch.queries, batch.candidates
    assert not torch.allclose(one(*sides), other(*sides), atol=1e-5)


def attention(block: CrossBlock, q: Tensor, kv: Tensor) -> Tensor:
    """CA of one item by torch's own attention: (M, D) and (N, D)."""
    n1, n2, d = block.norm1, block.norm2, q.shape[-1]
    a, b = (F.layer_norm(x, (d,), n1.weight, n1.bias) for x in (q, kv))
    options: dict[str, Any] = {"need_weights": False}
    u, _ = F.multi_head_attention_forward(
        a[:, None], b[:, None], b[:, None], d, block.heads, block.qkv.weight, block.qkv.bias,
        None, None, False, 0.0, block.out.weight, block.out.bias, **options,
    )  # fmt: skip
    u = u[:, 0]
    return u + block.fc2(F.gelu(block.fc1(F.layer_norm(q + u, (d,), n2.weight, n2.bias))))


def plain_parts(head: simfp.Head, batch: Batch) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Logits of one image after the other, from METHODS' equations (inter, then intra)."""
    s, f = head.context.readout["logit_scale"].exp(), untyped(head.fusion)
    gathered = head.gather([batch.candidates])
    joint = head.readout.joint("image", batch.queries["image/patches"])
    for i, x in enumerate(joint):
        v = batch.queries["image/pooled"][i]
        t = dict(gathered.text)
        w = {}
        for k in ("attr", "obj"):
            branch = untyped(head.branches[k])
            y = branch.linear(v) - branch.norm.running_mean
            y = y / (branch.norm.running_var + branch.norm.eps).sqrt()
            w[k] = (y * branch.norm.weight + branch.norm.bias).clamp(min=0)[None]
        t1 = {k: t[k] + f.lambda_text[0] * attention(f.inter_text[0], t[k], x) for k in t}
        w1 = {k: w[k] + f.lambda_image[0] * attention(f.inter_image[0], w[k], t[k]) for k in t}
        other = {"attr": "obj", "obj": "attr"}
        t2 = {k: t1[k] + attention(f.intra_text[0], t1[k], t1[other[k]]) for k in t}
        w2 = {k: w1[k] + attention(f.intra_image[0], w1[k], w1[other[k]]) for k in t}
        z = {k: s * F.cosine_similarity(w2[k], t2[k]) for k in t}
        z["pair"] = s * F.cosine_similarity(v[None], gathered.pair)
        yield i, z


@pytest.mark.parametrize("family", LIVE_FAMILIES)
def test_scores_and_loss_follow_the_equations_before_and_after_a_step(
    contexts: dict[str, Context], family: str
) -> None:
    weights: dict[str, Any] = {"weight_pair": 0.7, "weight_attr": 0.3, "weight_obj": 1.9}
    head = stirred(head_of(contexts[family], **weights))
    batch = batch_of(head, skip=2)  # of the last attr no pair is left
    labels = batch.candidates.labels
    optimizer = torch.optim.SGD(head.parameters(), lr=1e-3)
    for _ in range(2):
        loss, parts = head.loss(batch)
        got = head(batch.queries, batch.candidates)
        total = torch.zeros(())
        for i, z in plain_parts(head, batch):
            present = {k: sorted(set(labels[k].tolist())) for k in ("attr", "obj")}
            assert (len(present["attr"]), len(present["obj"])) == (2, 2)
            p = {k: z[k][present[k]].softmax(0) for k in present}
            pair = z["pair"].softmax(0)
            for c, (a, o) in enumerate(
                zip(labels["attr"].tolist(), labels["obj"].tolist(), strict=True)
            ):
                want = (
                    pair[c]
                    + p["attr"][present["attr"].index(a)] * p["obj"][present["obj"].index(o)]
                )
                assert torch.allclose(got[i, c], want, atol=1e-5)
            total = total - weights["weight_pair"] * pair[batch.target[i]].log() / len(got)
            for k in present:
                true = present[k].index(int(batch.queries.labels[k][i]))
                total = total - weights[f"weight_{k}"] * p[k][true].log() / len(got)
        assert torch.allclose(loss, total, rtol=1e-4)
        assert set(parts) == {"pair_loss", "attr_loss", "obj_loss", "batch_accuracy"}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_probabilities_are_over_exactly_the_candidates(contexts: dict[str, Context]) -> None:
    head = stirred(head_of(contexts["clip"]))
    everything = batch_of(head, skip=0)
    sums = head(everything.queries, everything.candidates).sum(1)
    assert torch.allclose(
        sums, torch.full_like(sums, 2.0), atol=1e-5
    )  # all pairs: both parts sum to 1
    fewer = everything.candidates.take(torch.arange(4))
    some = head(everything.queries, fewer)
    assert bool((some > head(everything.queries, everything.candidates)[:, :4]).all())
    one = head(everything.queries, everything.candidates.take(torch.tensor([2])))
    assert torch.allclose(one, torch.full_like(one, 2.0))


def test_pair_texts_that_see_patches_are_the_best_of_each_image(
    contexts: dict[str, Context],
) -> None:
    plain = stirred(head_of(contexts["clip"]))
    batch = batch_of(plain)
    before = plain._logits(batch.queries, plain.gather([batch.candidates]))
    n = len(batch.candidates)
    for m in (1, 3, n, n + 5):
        head = head_of(contexts["clip"], fuse_pairs=m).eval()
        head.load_state_dict(plain.state_dict())
        z = head._logits(batch.queries, head.gather([batch.candidates]))
        changed = z["pair"] != before["pair"]
        best = before["pair"].argsort(1, descending=True)[:, :m]
        assert torch.equal(changed, torch.zeros_like(changed).scatter(1, best, True))
        assert torch.equal(z["attr"], before["attr"])
    s, gathered = head.context.readout["logit_scale"].exp(), head.gather([batch.candidates])
    x = head.readout.joint("image", batch.queries["image/patches"])
    f, v = untyped(head.fusion), batch.queries["image/pooled"]
    for i in range(len(v)):
        t = gathered.pair + f.lambda_text[0] * attention(f.inter_text[0], gathered.pair, x[i])
        want = s * F.cosine_similarity(v[i][None], t)
        assert torch.allclose(z["pair"][i], want, atol=1e-4)


def test_hard_prompts_are_the_strings(cache: FeatureCache) -> None:
    context = context_of(cache)
    head = simfp.Head(simfp.Config(prompts=("hard", "hard", "hard")), context)
    live = LiveBackbone(context, "test")
    assert torch.allclose(
        head.get_buffer("hard_attr"),
        encode_texts(live, [f"a photo of {a}" for a in context.attrs]),
        atol=1e-5,
    )
    assert not any("hard" in name for name in head.state_dict())
    data = load_task(cache, "czsl", "test", "open")
    assert isinstance(data, CompositionData)
    direct = encode_texts(live, [f"a photo of {a} {o}" for a, o in data.pairs], chunk=4)
    source = Source(cache, head.needs(head.config), data.images, data.prompts)
    gathered = head.gather(
        [
            Features(
                source.texts(data.prompts).streams,
                {
                    "attr": torch.from_numpy(data.pair_index[:, 0].copy()),
                    "obj": torch.from_numpy(data.pair_index[:, 1].copy()),
                },
            )
        ]
    )
    assert torch.allclose(gathered.pair, direct, rtol=2e-3, atol=2e-3)  # fp16 on disk


@pytest.mark.parametrize("family", LIVE_FAMILIES)
def test_soft_prompts_of_primitives_are_their_own_rows_in_their_own_context(
    contexts: dict[str, Context], family: str
) -> None:
    head = stirred(head_of(contexts[family], fusion="none"), by=0.01)
    prompts = untyped(head.prompts)
    gathered = head.gather([batch_of(head).candidates])
    backbone = prompts.live.on("cpu")
    ids = backbone.tokenize(
        ["a photo ofz"]
    )  # the last letter stands where the word goes: a letter is a token
    (letter,) = {int(t) for t in ids[0]} - {int(t) for t in backbone.tokenize(["a photo of"])[0]}
    slot = ids[0].tolist().index(letter)
    for branch, first, n in (("attr", 0, 3), ("obj", 3, 2)):
        for i in range(n):
            rows = backbone.embed_tokens(ids)
            rows[0, slot - 10 : slot] = prompts.contexts[branch]
            rows[0, slot] = prompts.primitives[first + i]
            want = backbone.encode_embedded(rows, backbone.ends(ids))["pooled"][0]
            assert torch.allclose(gathered.text[branch][i], want, atol=1e-5)


def test_what_a_configuration_reads(contexts: dict[str, Context]) -> None:
    def needs(**config: Any) -> tuple[set[str], set[str]]:
        found = simfp.Head.needs(simfp.Config(**config))
        assert found.live == {"text"}
        return set(found.queries), set(found.candidates)

    assert needs() == ({"image/pooled", "image/patches"}, {"text/pooled"})
    assert needs(fusion="intra") == ({"image/pooled"}, {"text/pooled"})
    assert needs(fusion="none", prompts=("soft", "soft", "soft")) == ({"image/pooled"}, set())


def test_a_block_projects_what_items_share_once_and_hides_masked_rows() -> None:
    torch.manual_seed(0)
    block = CrossBlock(16, 4, 0.0)
    q, kv = torch.randn(1, 3, 16), torch.randn(5, 7, 16)
    want = torch.stack([attention(block, q[0], rows) for rows in kv])
    assert torch.allclose(block(q, kv), want, atol=1e-6)
    assert torch.allclose(block(q.expand(5, -1, -1), kv), want, atol=1e-6)
    swapped = torch.stack([attention(block, rows, q[0]) for rows in kv])
    assert torch.allclose(block(kv, q), swapped, atol=1e-6)
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2, 4:] = False
    hidden = block(q, kv, mask)
    assert torch.allclose(hidden[2], attention(block, q[0], kv[2, :4]), atol=1e-6)
    assert torch.allclose(hidden[3], want[3], atol=1e-6)
    assert torch.equal(CrossBlock(16, 4, 0.0, zero_output=True)(q, kv), torch.zeros(5, 3, 16))


def test_a_batch_of_one_can_be_trained_on(contexts: dict[str, Context]) -> None:
    head = head_of(contexts["clip"]).train()
    before = untyped(head.branches["attr"]).norm.running_mean.clone()
    head.loss(batch_of(head, 1))[0].backward()
    assert torch.equal(untyped(head.branches["attr"]).norm.running_mean, before)
    head.loss(batch_of(head, 3))[0].backward()
    assert not torch.equal(untyped(head.branches["attr"]).norm.running_mean, before)


def test_settings_that_cannot_work_are_refused(contexts: dict[str, Context]) -> None:
    with pytest.raises(ValueError, match="fuse_pairs needs an inter stage, but fusion is 'intra'"):
        simfp.Config(fuse_pairs=3, fusion="intra")
    with pytest.raises(ConfigError, match=r"head.heads is 7, which does not divide the joint 24"):
        head_of(contexts["clip"], heads=7)
    clip = contexts["clip"]
    names: dict[str, Any] = {"backbone": clip.backbone, "backbone_name": clip.backbone_name}
    with pytest.raises(ConfigError, match="has branches for attrs and objs"):
        head_of(Context(clip.shapes, clip.readout, **names))


def test_a_table_is_the_same_for_any_cut_and_a_head_comes_back_bit_for_bit(
    cache: FeatureCache, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"head": {"chunk": 5, "fuse_pairs": 2}, "train": {"steps": 3, "batch_size": 12}}
    options: dict[str, Any] = {"task": "czsl", "settings": settings, "progress": False}
    run = train_run(cache, "simfp", fast_path / "run", **options)
    again = train_run(cache, "simfp", fast_path / "again", **options)
    assert score_run(run.path)
    for world in ("closed", "open"):
        data = load_task(cache, "czsl", "test", world)
        assert isinstance(data, CompositionData)
        tables = [score(h, data) for h in (run.head, again.head, load(run.path))]
        first, *others = [t.scores for t in tables if isinstance(t, CompositionScores)]
        assert len(others) == 2
        assert all(np.array_equal(first, other) for other in others)
        monkeypatch.setattr(import_module("heads.grid"), "SET_CELLS", 20)  # one image at a time
        small = score(run.head, data, block=4)
        reduced = score_open(run.head, data, block=4)  # rows are never whole
        monkeypatch.undo()
        assert isinstance(small, CompositionScores)
        assert np.allclose(small.scores, first, atol=1e-5)
        assert reduced.space == small.space == "probability"
        want, have = evaluate(small), evaluate(reduced)
        assert have["auc"] == pytest.approx(want["auc"])
        assert have["pair_acc"] == pytest.approx(want["pair_acc"])
