"""branch_blocks: equal to its equations, slowly computed; only the rows that are read; to itself whatever the cut."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drawn import LIVE_FAMILIES, PAIRS, drawn
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cache_builder import FeatureCache, build, load_backbone
from cache_builder.readout import pool_image, project_tokens
from eval.composition import CompositionScores
from eval.feasibility import Feasibility
from heads import load_method, miniature, score, testing
from heads.base import Context
from heads.blocks.attention import Block
from heads.blocks.branches import Branch, ConditionedView, ConditionedWords, quick_gelu
from heads.blocks.fusion import CrossBlock
from heads.checkpoint import load
from heads.errors import ConfigError, MissingStream
from heads.features import Batch, Features
from heads.live import tiny
from heads.loader import Loader
from heads.methods import branch_blocks
from heads.methods.branch_blocks import PARTNER, Config, Gathered, Head
from heads.runs import train_run
from heads.score import score_open
from heads.source import context_of
from heads.tasks import load_task

VARIANTS: list[dict[str, Any]] = [
    {},
    {"conditional": "semantic", "n_blocks": 2, "branches": ("obj",)},
    {"conditional": "visual", "residual": False, "weight_pair": 0.0},
    {"conditional": "none", "branches": (), "weight_conditional": 0.0},
    {"chunk": 2, "weight_primitive": 0.0},
]


def head_of(context: Context, seed: int = 0, **config: Any) -> Any:
    torch.manual_seed(seed)
    return Head(Config(**config), context)


def stirred(module: Any, by: float = 0.1) -> Any:
    """With every parameter moved, so that nothing is zero or one by chance."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(by * torch.randn(p.shape, generator=g))
    return module.eval()


def batch_of(head: Head, n: int = 5) -> Batch:
    """Images of the pairs 0, 1, 2, …; candidates are four of the six pairs, out of order."""
    labels = {"attr": torch.tensor([2, 0, 1, 0]), "obj": torch.tensor([1, 0, 1, 1])}
    target = torch.arange(n) % 4
    rows = miniature.small_features(n, 1, head.needs(head.config).queries, head.context)
    queries = Features(rows.streams, {k: v[target] for k, v in labels.items()})
    ignore = torch.zeros(n, 4, dtype=torch.bool)
    none = torch.empty(n, 0, dtype=torch.long)
    return Batch(queries, Features({}, labels), target, ignore, none)


# --- the equations, one image and one candidate at a time ---------------------------------------------------------


def slow_attention(block: Any, q: Tensor, kv: Tensor) -> Tensor:
    """Rows `q` look at rows `kv`, both normed; a head at a time."""
    dim = q.shape[-1]
    wq, wk, wv = block.qkv.weight.split(dim)
    bq, bk, bv = block.qkv.bias.split(dim)
    q, k, v = q @ wq.T + bq, kv @ wk.T + bk, kv @ wv.T + bv
    size, parts = dim // block.heads, []
    for h in range(block.heads):
        at = slice(h * size, (h + 1) * size)
        parts.append((q[:, at] @ k[:, at].T / size**0.5).softmax(1) @ v[:, at])
    return block.out(torch.cat(parts, 1))


def slow_block(block: Any, q: Tensor, kv: Tensor | None = None) -> Tensor:
    """All rows of a pre-LN block of self- or cross-attention."""
    normed = block.norm1(q)
    h = q + slow_attention(block, normed, normed if kv is None else block.norm1(kv))
    hidden = block.fc1(block.norm2(h))
    return h + block.fc2(hidden * torch.sigmoid(1.702 * hidden))


def slow_text(head: Any, template: str, attr: int, obj: int) -> tuple[Tensor, Tensor]:
    """Token states up to the pooled row, and the pooled text, of one prompt; words are one letter a token here."""
    prompts = head.prompts
    backbone, table = prompts.live.on("cpu"), prompts.primitives
    written = {"pair": "a photo ofzz", "attr": "a photo ofz object", "obj": "a photo ofz"}
    ids = backbone.tokenize([written[template]])
    (letter,) = {int(t) for t in backbone.tokenize(["a photo ofz"])[0]} - {
        int(t) for t in backbone.tokenize(["a photo of"])[0]
    }
    slots = (ids[0] == letter).nonzero().flatten().tolist()
    roles = {"pair": ("attr", "obj"), "attr": ("attr",), "obj": ("obj",)}[template]
    at = {"attr": attr, "obj": len(head.context.attrs) + obj}
    rows = list(backbone.embed_tokens(ids)[0])
    for slot, role in zip(slots, roles, strict=True):
        rows[slot] = table[at[role]]
    rows[slots[0] - 10 : slots[0]] = list(prompts.contexts[template])
    end = backbone.ends(ids)
    found = backbone.encode_embedded(torch.stack(rows)[None], end)
    return found["tokens"][0, : int(end) + 1], found["pooled"][0]


def slow(head: Any, queries: Features, candidates: Features) -> dict[str, Tensor]:
    """Scores and cosines from the equations: whole blocks of every image for every candidate."""
    config, context = head.config, head.context
    readout, pools = context.readout, "image/pool.latent" in context.readout
    plain = {k: v for k, v in readout.items() if "image/proj" not in k}
    plain["image/proj"] = torch.eye(context.shapes["image/patches"][1])
    n = {"attr": len(context.attrs), "obj": len(context.objs)}
    texts = {k: [slow_text(head, k, i, i) for i in range(n[k])] for k in n}
    labels = [candidates.labels[k].tolist() for k in n]
    pair_texts = [slow_text(head, "pair", i, j)[1] for i, j in zip(*labels, strict=True)]

    def cos(a: Tensor, b: Tensor) -> Tensor:
        return (a / a.norm()) @ (b / b.norm())

    def r_t(rows: Tensor) -> Tensor:
        return project_tokens(readout, rows[None])[0]

    found: dict[str, list[Tensor]] = {
        k: [] for k in ("score", "pair", "q_attr", "q_obj", "z_attr", "z_obj")
    }
    for i in range(len(queries)):
        prefix, patches = queries["image/prefix"][i], queries["image/patches"][i]
        p, x = len(prefix), torch.cat([prefix, patches])
        own, view = {}, {}
        for k in ("attr", "obj", "pair"):
            rows = x
            if k in config.branches:
                for block in head.branches[k].blocks:
                    rows = slow_block(block, rows)
            sides = (rows[None, :p] if p else None), rows[None, p:]
            own[k] = pool_image(readout, *sides)[0]
            view[k] = pool_image(plain, *sides)[0] if pools else rows[0]
        pooled = queries["image/pooled"][i] if config.residual else torch.zeros(())
        v = {k: own[k] + pooled for k in n}
        v["pair"] = (v["attr"] + v["obj"] + own["pair"]) / 3 + pooled
        q = {k: torch.stack([cos(v[k], text[1]) for text in texts[k]]) for k in n}
        z = {}
        for k, other in PARTNER.items():
            partner = texts[other][int(q[other].argmax())][0]
            one, many = v[k], [text[1] for text in texts[k]]
            if config.conditional in ("both", "visual"):
                m = head.views[k]
                one = r_t(slow_block(m.cross, m.down(view[k][None]), partner))[0]
            if config.conditional in ("both", "semantic"):
                m = head.words[k]
                condition = slow_block(m.mix, torch.cat([partner, m.down(x)]))
                many = [r_t(slow_block(m.cross, text[0], condition))[-1] for text in texts[k]]
            z[k] = torch.stack([cos(one, text) for text in many])
        pair = torch.stack([cos(v["pair"], text) for text in pair_texts])
        cells, a1 = [], config.weight_conditional
        for c, (a, o) in enumerate(zip(*labels, strict=True)):
            first = (1 + z["attr"][a]) / 2 * (1 + q["obj"][o]) / 2
            second = (1 + z["obj"][o]) / 2 * (1 + q["attr"][a]) / 2
            cells.append((1 - a1) * (1 + pair[c]) / 2 + a1 / 2 * (first + second))
        found["score"].append(torch.stack(cells))
        found["pair"].append(pair)
        for k in n:
            found[f"q_{k}"].append(q[k])
            found[f"z_{k}"].append(z[k])
    return {k: torch.stack(rows) for k, rows in found.items()}


def slow_loss(head: Any, batch: Batch, found: dict[str, Tensor]) -> Tensor:
    """The weighted sum, by hand."""
    config = head.config
    s, total = head.context.readout["logit_scale"].exp(), torch.zeros(())
    terms = (
        (1.0, "score", batch.target),
        (config.weight_primitive, "z_attr", batch.queries.labels["attr"]),
        (config.weight_primitive, "z_obj", batch.queries.labels["obj"]),
        (config.weight_pair, "pair", batch.target),
    )
    for weight, name, target in terms:
        for row, right in zip(found[name], target.tolist(), strict=True):
            total = total + weight * ((s * row).logsumexp(0) - s * row[right]) / len(target)
    return total


@pytest.mark.parametrize(
    ("family", "values"),
    [*((f, VARIANTS[0]) for f in LIVE_FAMILIES), *(("clip", v) for v in VARIANTS[1:4])],
)
def test_score_and_loss_follow_the_equations_at_the_start_and_after_a_step(
    contexts: dict[str, Context], family: str, values: dict[str, Any]
) -> None:
    head = head_of(contexts[family], head_width=20, **values).eval()
    batch = batch_of(head, 3)
    sides = batch.queries, batch.candidates
    params = dict(head.named_parameters())
    for step in range(2):
        found = slow(head, *sides)
        with torch.no_grad():
            assert torch.allclose(head(*sides), found["score"], atol=2e-5)
            logits = head._logits(batch.queries, head.gather([batch.candidates]))
            for k in PARTNER:
                assert torch.allclose(logits.q[k], found[f"q_{k}"], atol=2e-5)
                assert torch.allclose(logits.z[k], found[f"z_{k}"], atol=2e-5)
        want = slow_loss(head, batch, found)
        slopes = torch.autograd.grad(want, list(params.values()), allow_unused=True)
        head.zero_grad()
        loss, parts = head.loss(batch)
        loss.backward()
        assert torch.allclose(loss, want, rtol=1e-4), (step, float(loss), float(want))
        assert set(parts) == {
            *("score_loss", "attr_loss", "obj_loss", "pair_loss"),
            "batch_accuracy",
        }
        largest = max(float(s.abs().max()) for s in slopes if s is not None)
        for (name, p), slope in zip(params.items(), slopes, strict=True):
            assert p.grad is not None, name
            assert slope is not None, name
            assert torch.allclose(p.grad, slope, rtol=2e-3, atol=2e-4 * largest), name
        with torch.no_grad():
            for p in params.values():
                assert p.grad is not None
                p.sub_(0.1 * p.grad / largest)


@pytest.mark.parametrize(
    ("family", "values"),
    [*((f, VARIANTS[0]) for f in LIVE_FAMILIES), *(("clip", v) for v in VARIANTS[1:4])],
)
def test_branch_blocks_keeps_the_promises_of_a_head(
    contexts: dict[str, Context], family: str, values: dict[str, Any]
) -> None:
    testing.check_head(branch_blocks, Config(**values), contexts[family])


# --- only the rows that are read ----------------------------------------------------------------------------------


def assert_same(
    one: Callable[..., Tensor], other: Callable[..., Tensor], module: nn.Module, *inputs: Tensor
) -> None:
    """Two ways to one value agree to 1e-6 of its size, and so do all gradients."""
    found = []
    for way in (one, other):
        given = [x.clone().requires_grad_() for x in inputs]
        module.zero_grad()
        value = way(*given)
        (value * torch.linspace(-1, 1, value.numel()).view(value.shape)).sum().backward()
        grads = [p.grad for p in (*module.parameters(), *given)]
        found.append([value.detach(), *(torch.zeros(()) if g is None else g for g in grads)])
    for a, b in zip(*found, strict=True):
        assert a.shape == b.shape
        assert float((a - b).abs().max()) <= 1e-6 * max(1.0, float(a.abs().max())), (a - b).abs()


@pytest.mark.parametrize("n_blocks", [0, 1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_row_0_alone_is_row_0_of_the_whole_block(n_blocks: int, masked: bool) -> None:
    torch.manual_seed(0)
    branch = stirred(Branch(12, 3, n_blocks, 0.3))
    mask = torch.arange(7) < torch.tensor([[7], [4], [5]]) if masked else None
    x = torch.randn(3, 7, 12)
    assert_same(lambda x: branch.first(x, mask), lambda x: branch(x, mask)[:, 0], branch, x)
    if masked and n_blocks:
        cut = branch.first(x[1:2, :4])
        assert torch.allclose(branch.first(x, mask)[1:2], cut, atol=1e-6)


def test_the_last_row_of_a_word_alone_is_that_of_the_whole_cross_block() -> None:
    torch.manual_seed(0)
    words = stirred(ConditionedWords(12, 10, 2, 0.3))
    tokens, partner, x = torch.randn(4, 6, 10), torch.randn(3, 5, 10), torch.randn(3, 7, 12)

    def whole(tokens: Tensor, partner: Tensor, x: Tensor) -> Tensor:
        rows = words.mix(torch.cat([partner, words.down(x)], 1))
        q = tokens.flatten(0, 1)[None].expand(3, -1, -1)
        return (q + words.cross(q, rows)).unflatten(1, (4, 6))[:, :, -1]

    assert_same(lambda t, p, x: words(t[:, -1], p, x), whole, words, tokens, partner, x)
    mask = torch.arange(7) < torch.tensor([[7], [4], [5]])
    cut = words(tokens[:, -1], partner[1:2], x[1:2, :4])
    assert torch.allclose(words(tokens[:, -1], partner, x, mask)[1:2], cut, atol=1e-6)


def test_row_0_of_a_view_alone_is_that_of_the_whole_cross_block() -> None:
    torch.manual_seed(0)
    view = stirred(ConditionedView(12, 10, 2, 0.3))
    x, partner = torch.randn(3, 7, 12), torch.randn(3, 5, 10)

    def whole(x: Tensor, partner: Tensor) -> Tensor:
        q = view.down(x)
        return (q + view.cross(q, partner))[:, 0]

    assert_same(lambda x, p: view(x[:, 0], p), whole, view, x, partner)


def test_blocks_whose_outputs_are_zero_change_nothing() -> None:
    branch, words, view = Branch(12, 3, 2, 0.0), ConditionedWords(12, 10, 2, 0.0), None
    view = ConditionedView(12, 10, 2, 0.0)
    for module in (branch, words, view):
        silence(stirred(module))
    x, partner, ends = torch.randn(3, 7, 12), torch.randn(3, 5, 10), torch.randn(4, 10)
    assert torch.equal(branch(x), x)
    assert torch.equal(branch.first(x), x[:, 0])
    assert torch.equal(words(ends, partner, x), ends.expand(3, -1, -1))
    assert torch.equal(view(x[:, 0], partner), view.down(x[:, 0]))


def silence(module: nn.Module) -> None:
    """Zero the output projections of every block."""
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, Block | CrossBlock):
                for p in (*m.out.parameters(), *m.fc2.parameters()):
                    p.zero_()


@pytest.mark.parametrize("family", LIVE_FAMILIES)
def test_with_identity_blocks_the_pair_branch_is_parallel_to_the_image(
    contexts: dict[str, Context], family: str
) -> None:
    """On the backbone's own streams: the readout of X is x. And conditioned words are then the words."""
    context = contexts[family]
    backbone: Any = load_backbone(context.backbone_name)
    size = backbone.spec.dims["image_size"]
    found = backbone.encode_images(torch.randn(3, 3, size, size))
    found.setdefault("prefix", torch.empty(3, 0, found["patches"].shape[-1]))
    streams = {f"image/{k}": found[k] for k in ("prefix", "patches", "pooled")}
    queries, x = Features(streams), found["pooled"]
    head = head_of(context, conditional="semantic").eval()
    silence(head)
    with torch.no_grad():
        rows = torch.cat([found["prefix"], found["patches"]], 1)
        row = {k: b.row(head.readout, rows) for k, b in head.branches.items()}
        v = head._seen(row, queries)
        logits = head._logits(queries, head.gather([batch_of(head).candidates]))
    for k, times in (("attr", 2.0), ("obj", 2.0), ("pair", 8 / 3)):
        assert torch.allclose(v[k], times * x, atol=1e-4 * float(x.abs().max())), k
    for k in PARTNER:
        assert torch.allclose(logits.z[k], logits.q[k], atol=1e-5)
    without = head_of(context, residual=False).eval()
    silence(without)
    with torch.no_grad():
        v = without._seen(row, Features({k: streams[k] for k in streams if "pooled" not in k}))
    assert torch.allclose(v["pair"], x, atol=1e-4 * float(x.abs().max()))


def test_the_activation_is_quick_gelu() -> None:
    x = torch.linspace(-3, 3, 7)
    assert torch.allclose(quick_gelu(x), x / (1 + (-1.702 * x).exp()))
    block = Branch(4, 1, 1, 0.0).blocks[0]
    assert getattr(block, "activation", None) is quick_gelu
    assert ConditionedView(4, 4, 1, 0.0).cross.activation is quick_gelu


# --- sizes --------------------------------------------------------------------------------------------------------


def test_parameters_and_cost_at_the_size_of_the_published_backbone() -> None:
    w, v, a, o = 1024, 768, 115, 245

    def count(*modules: nn.Module) -> int:
        return sum(p.numel() for m in modules for p in m.parameters())

    def block(dim: int) -> int:
        return 12 * dim * dim + 13 * dim

    with torch.device("meta"):
        branches = [Branch(w, 16, 1, 0.3).eval() for _ in range(3)]
        words = [ConditionedWords(w, v, 12, 0.3).eval() for _ in PARTNER]
        views = [ConditionedView(w, v, 12, 0.3).eval() for _ in PARTNER]
        x, partner = torch.empty(1, 257, w), torch.empty(1, 7, v)
        with FlopCounterMode(display=False) as counter:
            row, *_ = [b.first(x) for b in branches]
            for m, n in zip(words, (a, o), strict=True):
                m(torch.empty(n, v), partner, x)
            for m in views:
                m(row, partner)
    down = w * v + v + 2 * v
    assert count(*branches) == 3 * block(w)
    assert count(*words) == 2 * (2 * block(v) + down)
    assert count(*views) == 2 * (block(v) + down)
    prompts = (a + o) * v + 3 * 3 * v
    assert count(*branches) + prompts == 38_072_064  # METHODS: 38.1 M without conditions
    assert count(*branches, *words, *views) + prompts == 83_754_240  # 83.8 M
    assert counter.get_total_flops() == 17_855_010_816  # METHODS: 17 GFLOP


def test_the_counts_of_a_head(contexts: dict[str, Context]) -> None:
    w, v, letters = 48, 40, 10  # "a photo of", a token a letter

    def block(dim: int) -> int:
        return 12 * dim * dim + 13 * dim

    down, base = w * v + 3 * v, (3 + 2) * v + 3 * letters * v
    semantic, visual = 2 * (2 * block(v) + down), 2 * (block(v) + down)
    counts: list[tuple[dict[str, Any], int]] = [
        ({}, 3 * block(w) + semantic + visual),
        ({"conditional": "semantic"}, 3 * block(w) + semantic),
        ({"conditional": "visual"}, 3 * block(w) + visual),
        ({"conditional": "none"}, 3 * block(w)),
        ({"conditional": "none", "branches": ("pair",), "n_blocks": 3}, 3 * block(w)),
        ({"conditional": "none", "branches": ()}, 0),
    ]
    for config, want in counts:
        assert head_of(contexts["clip"], **config).n_trained() == base + want


# --- around the equations -----------------------------------------------------------------------------------------


def test_neither_chunks_nor_other_candidates_change_a_score(contexts: dict[str, Context]) -> None:
    context = contexts["pe"]
    head = stirred(head_of(context))
    batch = batch_of(head)
    with torch.no_grad():
        want = head(batch.queries, batch.candidates)
        for chunk in (1, 3, 99):
            other = Head(Config(chunk=chunk), context).eval()
            other.load_state_dict(head.state_dict())
            assert torch.allclose(other(batch.queries, batch.candidates), want, atol=2e-6)
        alone = head(batch.queries, batch.candidates.take(torch.tensor([2])))
    assert torch.allclose(alone, want[:, 2:3], atol=2e-6)
    assert bool(((want >= 0) & (want <= 1)).all())


def test_images_are_scored_without_a_loop_over_candidates_or_images(
    contexts: dict[str, Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    head = head_of(contexts["clip"]).eval()
    calls: list[str] = []
    for kind in (ConditionedWords, ConditionedView, Branch):
        for name in ("forward", "first"):
            if (own := getattr(kind, name, None)) is not None:

                def counted(self: Any, *args: Any, own: Any = own, **given: Any) -> Tensor:
                    calls.append(type(self).__name__)
                    return own(self, *args, **given)

                monkeypatch.setattr(kind, name, counted)
    sides = batch_of(head, n=7).queries, batch_of(head).candidates
    head(*sides)
    assert sorted(calls) == ["Branch"] * 3 + ["ConditionedView"] * 2 + ["ConditionedWords"] * 2


def test_the_condition_is_the_partner_found_in_the_image_and_takes_no_gradient(
    contexts: dict[str, Context],
) -> None:
    head = stirred(head_of(contexts["clip"]))
    batch = batch_of(head)
    gathered = head.gather([batch.candidates])
    before = head._logits(batch.queries, gathered)
    best = before.q["obj"].argmax(1)
    moved = gathered.tokens["obj"].clone()
    moved[0] += torch.randn(moved[0].shape)  # read by images of the first obj alone
    after = head._logits(batch.queries, replace(gathered, tokens={**gathered.tokens, "obj": moved}))
    changed = ((after.z["attr"] - before.z["attr"]).abs() > 1e-5).any(1)
    assert changed.tolist() == (best == 0).tolist()
    assert 0 < int(changed.sum()) < len(best), "both kinds must occur, or nothing is tested"


def test_a_causal_tower_does_not_see_how_long_a_prompt_is(contexts: dict[str, Context]) -> None:
    heads = [head_of(contexts["clip"], context_length=n).eval() for n in (None, 30, 77)]
    batch = batch_of(heads[0])
    with torch.no_grad():
        found = [head(batch.queries, batch.candidates) for head in heads]
    assert torch.allclose(found[0], found[1], atol=2e-6)
    assert torch.allclose(found[0], found[2], atol=2e-6)


def test_prompts_give_the_states_that_the_readout_pools(contexts: dict[str, Context]) -> None:
    for family in LIVE_FAMILIES:
        head = head_of(contexts[family]).eval()
        gathered: Gathered = head.gather([batch_of(head).candidates])
        for k in PARTNER:
            pooled = head.readout.joint("text", gathered.tokens[k])[:, -1]
            assert torch.allclose(pooled, gathered.text[k], atol=2e-5), (family, k)


def test_padded_patches_are_not_seen(contexts: dict[str, Context]) -> None:
    """Pictures that keep their shape."""
    for family in ("siglip2", "clip"):
        head = stirred(head_of(contexts[family]))
        batch = batch_of(head, 2)
        patches = batch.queries["image/patches"].clone()
        mask = torch.arange(patches.shape[1]) < torch.tensor([[9], [16]])
        patches[0, 9:] = 50.0
        streams = {**batch.queries.streams, "image/patches": patches, "image/mask": mask}
        short = {**batch.queries.streams, "image/patches": patches[:, :9]}
        with torch.no_grad():
            got = head(Features(streams), batch.candidates)[0]
            want = head(Features(short), batch.candidates)[0]
        assert torch.allclose(got, want, atol=2e-5), family


def test_dropout_acts_in_training_alone(contexts: dict[str, Context]) -> None:
    head = head_of(contexts["clip"], dropout=0.5)
    batch = batch_of(head)
    torch.manual_seed(0)
    noisy = [head.loss(batch)[0].item() for _ in range(2)]
    head.eval()
    still = [head.loss(batch)[0].item() for _ in range(2)]
    assert noisy[0] != noisy[1]
    assert still[0] == still[1]
    rates = {m.p for m in head.modules() if isinstance(m, nn.Dropout)}
    assert rates == {0.5}


def test_settings_that_cannot_work_are_refused(contexts: dict[str, Context]) -> None:
    with pytest.raises(ValueError, match="attrs and objs are never trained"):
        Config(weight_conditional=0, weight_primitive=0)
    with pytest.raises(ValueError, match="names one twice: obj, obj"):
        Config(branches=("obj", "obj"))
    with pytest.raises(ConfigError, match="makes 9 heads, and they do not divide the image tower"):
        head_of(contexts["clip"], head_width=5)
    clip = contexts["clip"]
    shapes = {k: v for k, v in clip.shapes.items() if k != "image/prefix"}
    with pytest.raises(ConfigError, match="reads the class token of clip"):
        head_of(replace(clip, shapes=shapes))


# --- on caches ----------------------------------------------------------------------------------------------------


def test_a_cache_without_its_streams_is_refused_with_the_command(tmp_path: Path) -> None:
    for family, kept, missing in (
        ("clip", ["image/patches", "image/pooled"], "image/prefix"),
        ("siglip2", ["image/pooled", "text/pooled"], "image/patches"),
    ):
        backbone = tiny(family, tmp_path / f"{family}-files")
        named = {"backbone_name": f"{family}:{tmp_path / f'{family}-files'}", "progress": False}
        cache = build(drawn(), backbone, tmp_path / f"{family}.zarr", streams=kept, **named)  # type: ignore[arg-type]
        with pytest.raises(MissingStream, match=f"branch_blocks reads {missing}, but") as refused:
            train_run(cache, "branch_blocks", tmp_path / "run", task="czsl")
        assert f"headstart build --backbone {family}:" in str(refused.value)


def test_a_backbone_without_prefix_rows_needs_none(
    live_cache: Callable[[str], FeatureCache],
) -> None:
    cache = live_cache("siglip2")
    assert "image/prefix" not in cache.streams
    head = head_of(context_of(cache))
    data = load_task(cache, "czsl", "val")
    table = score(head, data)
    assert isinstance(table, CompositionScores)
    assert np.isfinite(table.scores).all()


def test_a_trained_head_comes_back_bit_for_bit(
    live_cache: Callable[[str], FeatureCache], fast_path: Path
) -> None:
    cache = live_cache("clip")
    train = {"steps": 3, "batch_size": 16, "lr": 0.01, "optimizer": "adam"}
    options: dict[str, Any] = {"task": "czsl", "settings": {"train": train}, "progress": False}
    run = train_run(cache, "branch_blocks", fast_path / "run", **options)
    again = train_run(cache, "branch_blocks", fast_path / "again", **options)
    data: Any = load_task(cache, "czsl", "test", "open")
    assert len(data.pairs) == len(PAIRS)
    tables = [score(h, data) for h in (run.head, again.head, load(run.path))]
    tables.append(score(run.head, data, block=4))
    found = [table.scores for table in tables if isinstance(table, CompositionScores)]
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])
    assert np.allclose(found[0], found[3], atol=1e-5)
    assert tables[0].space == "cosine"
    assert run.record["parameters"] == run.head.n_trained()
    losses = [line["loss"] for line in run.result.history if "loss" in line]
    assert losses[-1] != losses[0]


def test_feasibility_may_prune_its_candidates(live_cache: Callable[[str], FeatureCache]) -> None:
    """A pair's score is its own; simfp's, a probability over all pairs, is not, and is refused."""
    cache = live_cache("clip")
    data: Any = load_task(cache, "czsl", "val", "open")
    attrs, objs = len(data.attrs), len(data.objs)
    rho = np.random.default_rng(0).random((attrs, objs))
    feasible = Feasibility(rho.reshape(-1), data.attrs, data.objs)
    head = head_of(context_of(cache))
    assert not head.relative
    assert load_method("simfp").Head.relative
    assert score_open(head, data, feasibility=feasible)


def test_training_lowers_the_loss_on_its_own_images(
    live_cache: Callable[[str], FeatureCache],
) -> None:
    cache = live_cache("pe")
    head = head_of(context_of(cache), dropout=0.0)
    batch = Loader(
        load_task(cache, "czsl", "train"), head.needs(head.config), batch_size=64, seed=0
    ).all()
    optimizer = torch.optim.Adam(head.parameters(), lr=0.003)
    losses = []
    for _ in range(8):
        loss = head.loss(batch)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
