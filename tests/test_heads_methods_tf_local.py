"""tf_local and its controls against their equations, written out as loops over tokens and heads."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from heads import miniature
from heads.base import Context, Needs
from heads.blocks.attention import Block
from heads.blocks.readout import Readout
from heads.errors import ConfigError
from heads.features import Batch, Features
from heads.methods import tf_local, zero_shot

SMALL: dict[str, Any] = {"layers": 2, "dim": 8, "heads": 2, "ffn": 12}
CONTEXT = miniature.small_context()
VARIANTS = [
    {},
    {"layers": 1},
    {"layers": 3, "pos": "none"},
    {"space": "joint", "keep_prefix": True},
    {"residual_global": True},
    {"variant": "global"},
    {"variant": "late_maxsim", "layers": 4},
]


def head_of(seed: int = 0, **values: Any) -> tf_local.Head:
    """A head in evaluation mode whose norms, biases and outputs are not at their special starting values."""
    torch.manual_seed(seed)
    head = tf_local.Head(tf_local.Config(**{**SMALL, **values}), CONTEXT)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return head.eval()


def sides(head: tf_local.Head, n: int = 3, m: int = 5) -> tuple[Features, Features]:
    needs = head.needs(head.config)
    queries = miniature.small_features(n, 1, needs.queries, CONTEXT)
    candidates = miniature.small_features(m, 2, needs.candidates, CONTEXT)
    return queries, Features(candidates.streams)


def batch_of(head: tf_local.Head) -> Batch:
    queries, candidates = sides(head)
    ignore = torch.zeros(3, 5, dtype=torch.bool)
    ignore[1, 4] = True
    return Batch(queries, candidates, torch.arange(3), ignore, torch.tensor([[3], [3], [4]]))


def test_joint_space_reads_a_linear_layer_as_well_as_a_matrix() -> None:
    """SigLIP-like text towers project with weight (D, V) and bias (D,) instead of a matrix (V, D)."""
    readout = dict(CONTEXT.readout)
    readout["text/proj.weight"] = readout.pop("text/proj").T.contiguous()
    head = head_of(space="joint")
    torch.manual_seed(0)
    other = tf_local.Head(head.config, replace(CONTEXT, readout=readout)).eval()
    other.load_state_dict(head.state_dict())
    torch.testing.assert_close(other(*sides(head)), head(*sides(head)))
    raw = sides(head)[1]["text/tokens"]
    shift = torch.arange(float(miniature.D))
    plain = other.readout.joint("text", raw)
    shifted = Readout({**readout, "text/proj.bias": shift}).joint("text", raw)
    torch.testing.assert_close(shifted, plain + shift)


def test_joint_space_without_a_projection_is_refused() -> None:
    readout = {name: value for name, value in CONTEXT.readout.items() if name != "image/proj"}
    with pytest.raises(ConfigError, match=r"needs readout/image/proj\.weight, but"):
        tf_local.Head(tf_local.Config(space="joint"), replace(CONTEXT, readout=readout))


# The equations, one token and one head at a time ---------------------------------------------------------------------


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean()
    return (x - mean) / ((x - mean).square().mean() + 1e-5).sqrt() * weight + bias


def normed(x: Tensor, p: Mapping[str, Tensor], name: str) -> Tensor:
    return layer_norm(x, p[f"{name}.weight"], p[f"{name}.bias"])


def linear(x: Tensor, p: Mapping[str, Tensor], name: str) -> Tensor:
    return p[f"{name}.weight"] @ x + p[f"{name}.bias"]


def slow_block(
    rows: list[Tensor], p: Mapping[str, Tensor], name: str, n_heads: int
) -> list[Tensor]:
    dim = len(rows[0])
    size = dim // n_heads
    qkv = [linear(normed(x, p, f"{name}.norm1"), p, f"{name}.qkv") for x in rows]
    out = []
    for i, x in enumerate(rows):
        read = []
        for h in range(n_heads):
            part = slice(h * size, (h + 1) * size)
            q = qkv[i][:dim][part]
            logits = [q @ other[dim : 2 * dim][part] / math.sqrt(size) for other in qkv]
            weights = torch.stack(logits).softmax(0)
            read.append(sum(w * v[2 * dim :][part] for w, v in zip(weights, qkv, strict=True)))
        y = x + linear(torch.cat(read), p, f"{name}.out")
        hidden = linear(normed(y, p, f"{name}.norm2"), p, f"{name}.fc1")
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        out.append(y + linear(hidden, p, f"{name}.fc2"))
    return out


def slow_inputs(head: tf_local.Head, row: dict[str, Tensor], side: str) -> list[Tensor]:
    """Z of one item: after the backbone's final norm, perhaps projected; for global the pooled embedding."""
    if head.config.variant == "global":
        return [row[f"{side}/pooled"]]
    r = CONTEXT.readout
    raw = (
        list(row["image/patches"])
        if side == "image"
        else list(row["text/tokens"][row["text/mask"]])
    )
    if side == "image" and head.config.keep_prefix:
        raw = [*row["image/prefix"], *raw]
    z = [layer_norm(x, r[f"{side}/norm.weight"], r[f"{side}/norm.bias"]) for x in raw]
    return [x @ r[f"{side}/proj"] for x in z] if head.config.space == "joint" else z


def slow_embed(z: list[Tensor], p: Mapping[str, Tensor], side: str) -> list[Tensor]:
    """X = W·LN(Z) + e + p[1..], of whatever terms the head has."""
    out = []
    for i, token in enumerate(z):
        x = linear(normed(token, p, f"scorer.{side}.norm"), p, f"scorer.{side}.linear")
        x = x + p.get(f"scorer.{side}.kind", 0)
        out.append(x + (p[f"scorer.{side}.position"][i] if f"scorer.{side}.position" in p else 0))
    return out


def slow_score(head: tf_local.Head, image: dict[str, Tensor], text: dict[str, Tensor]) -> Tensor:
    p = dict(head.named_parameters())
    n_heads, late = head.config.heads, head.config.variant == "late_maxsim"
    xv = slow_embed(slow_inputs(head, image, "image"), p, "image")
    xt = slow_embed(slow_inputs(head, text, "text"), p, "text")
    if late:
        for i in range(head.config.layers // 2):
            xv = slow_block(xv, p, f"scorer.image_blocks.{i}", n_heads)
            xt = slow_block(xt, p, f"scorer.text_blocks.{i}", n_heads)
        xv = [normed(x, p, "scorer.image_norm") for x in xv]
        xt = [normed(x, p, "scorer.text_norm") for x in xt]
        cosines = [[t @ v / (t.norm() * v.norm()) for v in xv] for t in xt]
        best = [max(row, key=Tensor.item) for row in cosines]
        return p["scorer.a"].exp() * sum(best) / len(best)
    x = [p["scorer.c"], *xv, *xt]
    for i in range(head.config.layers):
        x = slow_block(x, p, f"scorer.blocks.{i}", n_heads)
    score = linear(normed(x[0], p, "scorer.norm"), p, "scorer.output")[0]
    if head.config.residual_global:
        v, t = image["image/pooled"], text["text/pooled"]
        score = score + p["a"] * (v @ t) / (v.norm() * t.norm())
    return score


def slow_grid(head: tf_local.Head, queries: Features, candidates: Features) -> Tensor:
    def rows(features: Features) -> list[dict[str, Tensor]]:
        return [{k: v[i] for k, v in features.streams.items()} for i in range(len(features))]

    return torch.stack(
        [torch.stack([slow_score(head, q, c) for c in rows(candidates)]) for q in rows(queries)]
    )


def gradients(head: nn.Module, scores: Tensor) -> dict[str, Tensor]:
    """Of a fixed random mix of all scores."""
    mix = torch.randn(scores.shape, generator=torch.Generator().manual_seed(4))
    head.zero_grad()
    (scores * mix).sum().backward()
    return {n: p.grad.clone() for n, p in head.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("values", VARIANTS, ids=str)
def test_scores_and_gradients_are_those_of_the_equations(values: dict[str, Any]) -> None:
    head = head_of(**values)
    queries, candidates = sides(head)
    fast, slow = head(queries, candidates), slow_grid(head, queries, candidates)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)
    got, want = gradients(head, fast), gradients(head, slow)
    assert set(got) == set(want) == {name for name, _ in head.named_parameters()}
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("values", [{}, {"variant": "late_maxsim"}], ids=str)
def test_after_an_optimiser_step_they_still_are(values: dict[str, Any]) -> None:
    head = head_of(**values)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    batch = batch_of(head)
    before = head(batch.queries, batch.candidates).detach()
    head.loss(batch)[0].backward()
    optimizer.step()
    after = head(batch.queries, batch.candidates)
    assert (after - before).abs().max() > 1e-2
    want = slow_grid(head, batch.queries, batch.candidates)
    torch.testing.assert_close(after, want, atol=1e-5, rtol=1e-5)


# Parameters and inputs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ({}, 13_336_065),
        ({"variant": "global"}, 13_139_969),
        ({"variant": "late_maxsim"}, 13_335_041),
        ({"residual_global": True}, 13_336_066),
        ({"layers": 6, "ffn": 1024}, 13_343_233),
    ],
    ids=str,
)
def test_parameter_counts_for_clip_b32(values: dict[str, Any], count: int) -> None:
    """As counted from the equations; six thin layers agree with four wide ones to 0.05 %: 13.3 M both."""
    shapes = {
        "image/patches": (49, 768),
        "image/pooled": (512,),
        "text/pooled": (512,),
        "text/tokens": (77, 512),
    }
    with torch.device("meta"):
        scorer = tf_local._scorer(tf_local.Config(**values), Context(shapes))
    found = sum(p.numel() for p in scorer.parameters()) + bool(values.get("residual_global"))
    assert found == count


def test_each_variant_declares_only_what_it_reads() -> None:
    def needs(**values: Any) -> Needs:
        return tf_local.Head.needs(tf_local.Config(**values))

    patches, words = frozenset({"image/patches"}), frozenset({"text/tokens"})
    pooled = (frozenset({"image/pooled"}), frozenset({"text/pooled"}))
    assert needs() == needs(variant="late_maxsim") == Needs(patches, words)
    assert needs(keep_prefix=True).queries == patches | {"image/prefix"}
    assert needs(residual_global=True) == Needs(patches | pooled[0], words | pooled[1])
    assert needs(n_sampled=14) == Needs(patches | pooled[0], words | pooled[1])
    assert needs(variant="global", keep_prefix=True) == Needs(*pooled)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dim": 10, "heads": 4}, "heads must divide dim, but dim is 10 and heads 4"),
        (
            {"variant": "late_maxsim", "layers": 3},
            "halves its layers between the sides; layers is 3",
        ),
        ({"variant": "late_maxsim", "residual_global": True}, "start at zero"),
        ({"layer": 3}, "layer"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_work_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        tf_local.Config(**values)


def test_a_readout_without_the_tensors_it_needs_is_refused() -> None:
    head = tf_local.Head(tf_local.Config(**SMALL), Context(CONTEXT.shapes))
    with pytest.raises(ConfigError, match=r"readout/image/norm\.weight"):
        head(*sides(head))


# Properties ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["local", "late_maxsim"])
def test_without_positions_the_order_of_patches_is_invisible(variant: str) -> None:
    order = torch.randperm(miniature.N, generator=torch.Generator().manual_seed(1))

    def change(pos: str) -> float:
        head = head_of(variant=variant, pos=pos)
        queries, candidates = sides(head)
        shuffled = Features({"image/patches": queries["image/patches"][:, order]})
        moved = head(shuffled, candidates) - head(queries, candidates)
        return moved.abs().max().item()

    assert change("none") < 1e-5
    assert change("learned") > 1e-3


@pytest.mark.parametrize("variant", ["local", "global"])
def test_the_residual_starts_at_zero_shot(variant: Any) -> None:
    config = tf_local.Config(**SMALL, variant=variant, residual_global=True)
    head = tf_local.Head(config, CONTEXT).eval()
    queries, candidates = sides(head)
    want = zero_shot.Head(zero_shot.Config(), CONTEXT)(queries, candidates)
    # Not bit for bit: s multiplies before the inner product in one, after it in the other.
    torch.testing.assert_close(head(queries, candidates), want, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        head.paired(queries, candidates.take(torch.arange(3))), want.diagonal()
    )


@pytest.mark.parametrize("values", [{}, {"variant": "global"}, {"n_sampled": 2}], ids=str)
def test_scoring_in_small_chunks_changes_neither_scores_nor_gradients(
    values: dict[str, Any],
) -> None:
    whole, parts = head_of(**values), head_of(**values, chunk=4)

    def loss(head: tf_local.Head) -> Tensor:
        torch.manual_seed(1)
        return head.loss(batch_of(head))[0]

    queries, candidates = sides(whole)
    torch.testing.assert_close(
        parts(queries, candidates), whole(queries, candidates), atol=1e-5, rtol=1e-5
    )
    got, want = gradients(parts, loss(parts)), gradients(whole, loss(whole))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_chunked_training_draws_the_same_dropout_again_when_it_recomputes() -> None:
    """With other masks in the second pass, the gradient would not be the loss's slope."""
    head = head_of(chunk=4, dropout=0.5).train()
    queries, candidates = sides(head)
    output = head.get_parameter("scorer.output.weight")

    def total(shift: float) -> Tensor:
        torch.manual_seed(2)
        with torch.no_grad():
            output.add_(shift)
        result = head(queries, candidates).sum()
        with torch.no_grad():
            output.sub_(shift)
        return result

    slope = (total(0.5) - total(-0.5)).item()  # the scores are linear in the output weights
    total(0.0).backward()
    assert output.grad is not None
    assert output.grad.sum().item() == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("variant", ["local", "global", "late_maxsim"])
def test_the_sampled_loss_is_the_full_loss_when_every_candidate_is_drawn(variant: str) -> None:
    full, sampled = head_of(variant=variant), head_of(variant=variant, n_sampled=5, top_sampled=5)
    batch = batch_of(sampled)
    want, got = full.loss(batch)[0], sampled.loss(batch)[0]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients(sampled, got), gradients(full, want), atol=1e-4, rtol=1e-4)


def test_a_learned_temperature_is_capped_at_100() -> None:
    head = head_of(variant="late_maxsim")
    with torch.no_grad():
        head.get_parameter("scorer.a").fill_(9.0)
    assert head(*sides(head)).abs().max() <= 100.001


def two_object_scenes() -> tuple[Features, Features, Batch, Context]:
    """Scenes "a o b p": patch 1 is a + o, patch 2 is b + p. The mean of all tokens hides which belongs to which."""
    w, n_attrs = 8, 3
    word = torch.linalg.qr(torch.randn(w, w, generator=torch.Generator().manual_seed(0))).Q
    scenes = [(a, o, b, 7 - o) for a in range(3) for b in range(3) if a != b for o in (n_attrs, 4)]
    patches = [[word[a] + word[o], word[b] + word[p]] for a, o, b, p in scenes]
    image = torch.stack([torch.stack(rows) for rows in patches])
    text = torch.stack([word[list(scene)] for scene in scenes])
    n = len(scenes)
    readout: dict[str, Tensor] = {}
    for side in ("image", "text"):
        readout |= {f"{side}/norm.weight": torch.ones(w), f"{side}/norm.bias": torch.zeros(w)}
        readout[f"{side}/eps"] = torch.tensor(1e-5)
    shapes = {
        "image/patches": (2, w),
        "text/tokens": (4, w),
        "image/pooled": (w,),
        "text/pooled": (w,),
    }
    queries = Features({"image/patches": image, "image/pooled": image.sum(1)})
    mask = torch.ones(n, 4, dtype=torch.bool)
    candidates = Features({"text/tokens": text, "text/mask": mask, "text/pooled": text.sum(1)})
    # A scene told in the other order is true as well.
    told_twice = [[{i[:2], i[2:]} == {j[:2], j[2:]} for j in scenes] for i in scenes]
    ignore = torch.tensor(told_twice) & ~torch.eye(n).bool()
    batch = Batch(queries, candidates, torch.arange(n), ignore, torch.empty(n, 0).long())
    return queries, candidates, batch, Context(shapes, readout)


def test_the_transformer_learns_a_binding_that_the_global_cosine_cannot_see() -> None:
    queries, candidates, batch, context = two_object_scenes()
    cosine = zero_shot.Head(zero_shot.Config(), context)(queries, candidates)
    told = cosine.diagonal()[:, None] - cosine
    assert (told.abs() < 1e-6).sum() >= 4 * len(
        cosine
    )  # own, told again, and both swaps: all the same

    torch.manual_seed(0)
    head = tf_local.Head(tf_local.Config(layers=2, dim=32, heads=4, ffn=64, dropout=0.0), context)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    for _ in range(120):
        optimizer.zero_grad()
        head.loss(batch)[0].backward()
        optimizer.step()
    assert head.loss(batch)[1]["batch_accuracy"] == 1


# Attention -----------------------------------------------------------------------------------------------------------


def reference_layer(block: Block, dim: int, heads: int, ffn: int) -> nn.TransformerEncoderLayer:
    """torch's own pre-LN layer with the weights of `block`."""
    layer = nn.TransformerEncoderLayer(
        dim, heads, ffn, dropout=0.0, activation="gelu", norm_first=True, batch_first=True
    )
    state = block.state_dict()
    renamed = {
        "qkv.weight": "self_attn.in_proj_weight",
        "qkv.bias": "self_attn.in_proj_bias",
        "out.weight": "self_attn.out_proj.weight",
        "out.bias": "self_attn.out_proj.bias",
        "fc1.weight": "linear1.weight",
        "fc1.bias": "linear1.bias",
        "fc2.weight": "linear2.weight",
        "fc2.bias": "linear2.bias",
    }
    layer.load_state_dict({renamed.get(name, name): value for name, value in state.items()})
    return layer.train()  # training mode: no fused fast path, gradients as usual


def test_a_block_is_torchs_own_pre_norm_layer() -> None:
    torch.manual_seed(0)
    block = Block(6, 3, 10, dropout=0.0)
    layer = reference_layer(block, 6, 3, 10)
    x = torch.randn(2, 5, 6)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    want = layer(x, src_key_padding_mask=~mask)
    torch.testing.assert_close(block(x, mask), want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(block(x, mask, block.project(x)), want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(block.first(x, mask), want[:, 0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(block(x), layer(x), atol=1e-6, rtol=1e-5)
    normed_x = layer.norm1(x)
    _, weights = layer.self_attn(
        normed_x, normed_x, normed_x, key_padding_mask=~mask, average_attn_weights=False
    )
    torch.testing.assert_close(block.weights(x, mask), weights, atol=1e-6, rtol=1e-5)


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    block = Block(6, 2, 10, dropout=0.5)
    x = torch.randn(1, 3, 6)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_attention_maps_are_the_weights_of_the_block_before_the_last(layers: int) -> None:
    head = head_of(layers=layers, keep_prefix=True)
    queries, candidates = sides(head, 5, 5)
    maps = tf_local.attention(head, queries, candidates)
    assert maps.shape == (5, miniature.L, miniature.N)
    assert (maps > 0).all()

    blocks = list(head.get_submodule("scorer.blocks").children())
    shown = blocks[max(0, layers - 2)]
    seen: list[Tensor] = []
    hook = shown.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[:2]))
    if layers == 1:  # its only block is read through `first`, which runs no hooks
        hook.remove()
        return
    head.paired(queries, candidates)
    hook.remove()
    assert isinstance(shown, Block)
    full = shown.weights(seen[0], seen[1]).mean(1)
    torch.testing.assert_close(full.sum(-1), torch.ones(full.shape[:2]))
    torch.testing.assert_close(maps, full[:, 2 + miniature.N :, 2 : 2 + miniature.N])


def test_maps_of_late_maxsim_are_cosines_whose_largest_make_the_score() -> None:
    head = head_of(variant="late_maxsim")
    queries, candidates = sides(head, 5, 5)
    maps = tf_local.attention(head, queries, candidates)
    mask = candidates["text/mask"]
    mean = (maps.amax(-1) * mask).sum(-1) / mask.sum(-1)
    want = head.get_parameter("scorer.a").exp() * mean
    torch.testing.assert_close(head.paired(queries, candidates), want)


def test_there_are_no_maps_without_patches() -> None:
    head = head_of(variant="global")
    with pytest.raises(ConfigError, match="global"):
        tf_local.attention(head, *sides(head, 3, 3))
