"""TRIDENT against its equations: the folded projector, smoothed targets, the whole loss by loops, every switch."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from heads import load_method, losses
from heads.base import Context
from heads.blocks.aggregation import (
    Aggregation,
    ConditionMasks,
    Projection,
    pool_grid,
)
from heads.blocks.readout import Readout
from heads.errors import ConfigError
from heads.features import Batch, Features, Partner

trident = load_method("trident")

W, PATCHES, V, H = 6, 4, 11, 10
"""Width of patches and slots, patches, width of word vectors, hidden width of the projector."""
ATTRS, OBJS = ("dry", "orange", "wet"), ("cup", "orange")
A, O, EXTRA = len(ATTRS), len(OBJS), 2
PLAIN = {"n_local": 3, "n_global": 2, "dropout": 0.0, "word_dropout": 0.0}


def projector(width: int = W, hidden: int = H, *, biased: bool = True) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    shapes = {"fc1.weight": (hidden, width), "fc2.weight": (hidden + 1, hidden)}
    shapes |= {"fc1.bias": (hidden,), "fc2.bias": (hidden + 1,)} if biased else {}
    return {
        f"image/projector.{name}": 0.4 * torch.randn(shape, generator=g)
        for name, shape in shapes.items()
    }


def context(readout: dict[str, Tensor] | None = None, n_patches: int = PATCHES) -> Context:
    g = torch.Generator().manual_seed(3)
    pairs = [(a, o) for a in range(A) for o in range(O)][:-1]
    # The last train pair has one auxiliary word, the one before none at all.
    rows = [[a, o, A + O, A + O + 1, (a + 1) % A] for a, o in pairs[:-2]]
    rows.append([*pairs[-1], A + O, -1, -1])
    return Context(
        shapes={"image/patches": (n_patches, W), "image/prefix": (1, W), "image/pooled": (W + 1,)},
        readout=projector() if readout is None else readout,
        attrs=ATTRS,
        objs=OBJS,
        tables={
            "words": torch.randn(A + O + EXTRA, V, generator=g),
            "auxiliary": torch.tensor(rows),
        },
    )


def head_of(facts: Context | None = None, **values: Any) -> Any:
    torch.manual_seed(0)
    return trident.Head(trident.Config(**{**PLAIN, **values}), facts or context())


def rows(attr: list[int], obj: list[int], seed: int, n_patches: int = PATCHES) -> Features:
    g = torch.Generator().manual_seed(seed)
    streams = {
        "image/patches": torch.randn(len(attr), n_patches, W, generator=g),
        "image/prefix": torch.randn(len(attr), 1, W, generator=g),
        "image/pooled": torch.randn(len(attr), W + 1, generator=g),
    }
    return Features(streams, {"attr": torch.tensor(attr), "obj": torch.tensor(obj)})


def batch_of(
    valid: tuple[list[bool], list[bool]] = ([True] * 3, [True, False, True]), **options: Any
) -> Batch:
    """Three triplets; the second has no partner of its own obj, unless `valid` says otherwise."""
    candidates = Features(
        {},
        {
            "attr": torch.arange(A).repeat_interleave(O),
            "obj": torch.arange(O).repeat(A),
        },
    )

    def column(features: Features) -> Tensor:
        return features.labels["attr"] * O + features.labels["obj"]

    main = rows([0, 1, 2], [0, 1, 0], 1, **options)
    same_attr = rows([0, 1, 2], [1, 0, 1], 2, **options)
    same_obj = rows([2, 0, 1], [0, 0, 0], 3, **options)
    partners = {
        kind: Partner(features, column(features), torch.tensor(real))
        for (kind, features), real in zip(
            {"same_attr": same_attr, "same_obj": same_obj}.items(), valid, strict=True
        )
    }
    ignore, negative = torch.zeros(3, A * O, dtype=torch.bool), torch.zeros(3, 0, dtype=torch.int64)
    return Batch(main, candidates, column(main), ignore, negative, partners)


# The folded projector.


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_folding_changes_neither_values_nor_gradients(activation: Any, biased: bool) -> None:
    readout = Readout(projector(biased=biased))
    one, two = (Projection(readout, W, 5, activation=activation, folded=f) for f in (True, False))
    two.load_state_dict(one.state_dict())
    x = torch.randn(7, W, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    a, b = one(x), two(y)
    assert torch.allclose(a, b, rtol=0, atol=1e-5)
    weights = torch.randn_like(a)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    for p, q in ((one.conv.weight, two.conv.weight), (one.conv.bias, two.conv.bias), (x, y)):
        assert p.grad is not None
        assert q.grad is not None
        assert p.grad.abs().max() > 0
        assert torch.allclose(p.grad, q.grad, rtol=0, atol=1e-5)


def test_the_projector_is_computed_as_it_stands_and_without_one_patches_are_read_as_they_are() -> (
    None
):
    tensors, x = projector(), torch.randn(7, W)
    plain = Projection(Readout({}), W, 5)
    assert torch.equal(plain(x), F.linear(x, plain.conv.weight, plain.conv.bias))
    folded = Projection(Readout(tensors), W, 5)
    hidden = F.gelu(F.linear(x, *(tensors[f"image/projector.fc1.{k}"] for k in ("weight", "bias"))))
    seen = F.linear(hidden, *(tensors[f"image/projector.fc2.{k}"] for k in ("weight", "bias")))
    assert torch.allclose(folded(x), folded.conv(seen), atol=1e-5)


def test_projecting_in_parts_is_projecting_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Projection(Readout(projector()), W, 5)
    x = torch.randn(11, W)
    at_once = module(x)
    monkeypatch.setattr("heads.blocks.aggregation.CHUNK", 3)
    with torch.no_grad():
        assert torch.allclose(module(x), at_once, atol=1e-6)


def test_folding_costs_a_third_of_the_multiplications_at_full_size() -> None:
    """The docstring's figures, counted for LLaVA-1.5-7B without computing anything."""

    def multiply_adds(tokens: int, *, folded: bool) -> int:
        with FakeTensorMode():  # shapes without values
            tensors = {
                "image/projector.fc1.weight": torch.empty(4096, 1024),
                "image/projector.fc2.weight": torch.empty(4096, 4096),
            }
            module = Projection(Readout(tensors), 1024, 1024, folded=folded)
            with FlopCounterMode(display=False) as counter:
                module(torch.empty(tokens, 1024))
        return counter.get_total_flops() // 2

    once = 1024 * 4096**2
    assert multiply_adds(2, folded=True) - multiply_adds(1, folded=True) == 8_388_608
    assert multiply_adds(2, folded=False) - multiply_adds(1, folded=False) == 25_165_824
    assert multiply_adds(1, folded=True) == once + 8_388_608
    assert once / (25_165_824 - 8_388_608) == 1024


def test_the_full_size_head_has_the_parameters_of_its_equations() -> None:
    """LLaVA-1.5-7B, MIT-States numbers: n_local 12, n_global 6; 115 attrs, 245 objs."""
    with torch.device("meta"):
        tensors = {
            "image/projector.fc1.weight": torch.empty(4096, 1024),
            "image/projector.fc2.weight": torch.empty(4096, 4096),
        }
        facts = Context(
            {"image/patches": (576, 1024), "image/prefix": (1, 1024)},
            tensors,
            tuple(map(str, range(115))),
            tuple(map(str, range(245))),
            {"words": torch.empty(360, 4096), "auxiliary": torch.empty(0, 5, dtype=torch.int64)},
        )
        head = trident.Head(trident.Config(), facts)
    w, v = 1024, 4096
    mlp = 2 * w * w + w + w + 1
    linear = (
        2 * w * w + w
    )  # image, pair, the disentangler's join, and the word network's second layer
    expected = v * w + w + 2 * w + 12 * (w + 1) + 6 * w + 2 * mlp + 4 * linear
    expected += v * 2 * w + 2 * w + 2 * 2 * w + 360 * v
    assert head.n_trained() == expected
    assert round((expected - 360 * v) / 1e6, 1) == 25.2


def test_without_local_slots_no_patch_is_read_and_nothing_is_kept_for_them() -> None:
    full = context()
    shapes = {k: v for k, v in full.shapes.items() if k != "image/patches"}
    facts = Context(shapes, full.readout, ATTRS, OBJS, full.tables)
    head = head_of(facts, n_local=0)
    assert head.needs(head.config).queries == {"image/prefix"}
    assert not [name for name, _ in head.named_parameters() if name.startswith("local")]
    with_slots = head_of(full)
    gone = W * (H + 1) + W + 2 * W + 3 * (W + 1) + W * W  # convolution, norm, gates, half of W_img
    assert with_slots.n_trained() - head.n_trained() == gone
    queries = rows([0, 1], [0, 1], 4)
    bare = Features({"image/prefix": queries["image/prefix"]}, queries.labels)
    g = queries["image/prefix"][:, 0]
    mean = torch.stack([m.clamp(min=0) * g for m in head.masks.masks]).mean(0)
    expected = F.normalize(mean @ head.image.weight.T + head.image.bias, dim=-1)
    assert torch.allclose(head.eval().embed_queries(bare), expected, atol=1e-6)


def test_patches_are_not_pooled_where_none_are_read() -> None:
    with pytest.raises(ValueError, match="with n_local 0 none are read"):
        trident.Config(n_local=0, pool_patches=True)


# Slots.


@pytest.mark.parametrize(("gate", "f"), [("sigmoid", torch.sigmoid), ("relu", torch.relu)])
def test_a_local_slot_is_a_gated_mean_over_patches(gate: Any, f: Any) -> None:
    module = Aggregation(
        Projection(Readout({}), W, 5), 3, gate=gate, train_gates=True, dropout=0.0
    ).eval()
    assert module.norm.running_mean is not None
    nn.init.normal_(module.norm.running_mean)
    x = torch.randn(2, PATCHES, W)
    slots = module(x)
    for b in range(2):
        z = F.relu(module.norm(module.projection.conv(x[b])))
        for i in range(3):
            weights = [f(module.gates.weight[i] @ zn + module.gates.bias[i]) for zn in z]
            each = [w * zn for w, zn in zip(weights, z, strict=True)]
            expected = torch.stack(each).sum(0) / PATCHES
            assert torch.allclose(slots[b, i], expected, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_patches_that_are_padding_do_not_count(training: bool) -> None:
    torch.manual_seed(0)
    facts = {"gate": "sigmoid", "train_gates": True, "dropout": 0.0}
    module = Aggregation(Projection(Readout(projector()), W, 5), 3, **facts).train(training)
    lengths = (4, 2, 3)
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    x = torch.randn(3, 4, W)
    slots = module(torch.where(mask[..., None], x, 99.0), mask)
    twin = Aggregation(module.projection, 3, **facts).train(training)
    twin.gates = module.gates
    # Statistics over real patches alone: all of them in one row, then each image by itself.
    z = F.relu(twin.norm(twin.projection(x[mask])))
    for b, own in enumerate(z.split(lengths)):
        expected = torch.sigmoid(twin.gates(own)).mT @ own / lengths[b]
        assert torch.allclose(slots[b], expected, atol=1e-5)


def test_channels_are_dropped_in_all_patches_of_an_image_together() -> None:
    torch.manual_seed(0)
    module = Aggregation(
        Projection(Readout({}), W, 400), 1, gate="relu", train_gates=True, dropout=0.3
    )
    nn.init.zeros_(module.gates.weight)
    nn.init.ones_(module.gates.bias)  # every patch weighs 1
    x = torch.randn(5, 3, W)
    z = F.relu(module.norm(module.projection.conv(x).flatten(0, 1))).unflatten(0, (5, 3)).mean(1)
    share = (module(x)[:, 0] / z)[z > 0.01]
    kept = share > 0.5
    assert torch.allclose(share[kept], torch.tensor(1 / 0.7), rtol=1e-4)
    assert (share[~kept] == 0).all()
    assert 0.6 < kept.float().mean() < 0.8


@pytest.mark.parametrize(
    ("kind", "f"),
    [("relu", torch.relu), ("softplus", F.softplus), ("ones", torch.ones_like)],
)
def test_a_condition_mask_multiplies_the_global_vector(kind: Any, f: Any) -> None:
    torch.manual_seed(0)
    module = ConditionMasks(2, W, kind)
    vector = torch.randn(3, W)
    drawn = torch.zeros(2, W) if module.masks is None else module.masks
    expected = torch.stack([f(m) * vector for m in drawn], dim=1)
    assert torch.equal(module(vector), expected)


def test_a_relu_mask_never_moves_what_starts_below_zero_and_softplus_does() -> None:
    torch.manual_seed(0)
    dead = {}
    for kind in ("relu", "softplus"):
        module = ConditionMasks(4, 50, kind)  # pyright: ignore[reportArgumentType]
        assert module.masks is not None
        module(torch.ones(1, 50)).sum().backward()
        assert module.masks.grad is not None
        dead[kind] = float((module.masks.grad == 0).float().mean())
    assert 0.4 < dead["relu"] < 0.6
    assert dead["softplus"] == 0


def test_pooled_patches_are_means_of_two_by_two() -> None:
    x = torch.randn(2, 16, W)
    pooled = pool_grid(x)
    for row in range(2):
        for column in range(2):
            cells = [(2 * row + i) * 4 + 2 * column + j for i in range(2) for j in range(2)]
            expected = x[:, cells].mean(1)
            assert torch.allclose(pooled[:, 2 * row + column], expected, atol=1e-6)


def test_pooling_needs_one_even_square_grid() -> None:
    with pytest.raises(ConfigError, match="even side, but there are 9 patches"):
        head_of(context(n_patches=9), pool_patches=True)
    head = head_of(pool_patches=True)
    queries = rows([0], [0], 1)
    masked = {**queries.streams, "image/mask": torch.ones(1, PATCHES, dtype=torch.bool)}
    with pytest.raises(ConfigError, match="keep their shapes"):
        head.embed_queries(Features(masked))


def test_pooled_patches_reach_the_score() -> None:
    head, queries = head_of(pool_patches=True).eval(), rows([0, 1], [0, 1], 4)
    plain = head_of(context(n_patches=1)).eval()
    streams = {**queries.streams, "image/patches": queries["image/patches"].mean(1, keepdim=True)}
    assert torch.allclose(head.embed_queries(queries), plain.embed_queries(Features(streams)))


# Targets and losses.


def test_a_smoothed_target_sums_to_one_and_is_plain_at_zero() -> None:
    target = torch.tensor([2, 0, 1])
    others = torch.tensor([[0, 4, 5], [4, -1, -1], [-1, -1, -1]])
    found = losses.smoothed(target, others, 0.09, 6)
    assert torch.allclose(found.sum(1), torch.ones(3))
    assert torch.allclose(found[0], torch.tensor([0.03, 0, 0.91, 0, 0.03, 0.03]))
    assert torch.allclose(found[1], torch.tensor([0.97, 0, 0, 0, 0.03, 0]))
    assert torch.equal(found[2], torch.tensor([0.0, 1, 0, 0, 0, 0]))
    logits, valid = torch.randn(3, 6), torch.ones(3, dtype=torch.bool)
    plain = losses.smoothed(target, others, 0.0, 6)
    assert torch.equal(plain, F.one_hot(target, 6).float())
    assert torch.allclose(
        losses.masked_cross_entropy(logits, plain, valid), F.cross_entropy(logits, target)
    )


def test_only_valid_rows_count_and_none_is_zero_and_not_nan() -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    target = torch.full((3, 4), 0.25)
    some, none = torch.tensor([True, False, True]), torch.zeros(3, dtype=torch.bool)
    each = -(target * logits.log_softmax(1)).sum(1)
    found = losses.masked_cross_entropy(logits, target, some)
    assert torch.allclose(found, (each[0] + each[2]) / 2)
    nothing = losses.masked_cross_entropy(logits, target, none)
    nothing.backward()
    assert nothing.item() == 0
    assert torch.equal(logits.grad, torch.zeros(3, 4))  # pyright: ignore[reportArgumentType]


def test_orthogonality_is_the_mean_square_of_the_gram_s_distance_to_one() -> None:
    slots = torch.randn(2, 3, W)
    total = 0.0
    for b in range(2):
        for i in range(3):
            for j in range(3):
                cosine = float(F.cosine_similarity(slots[b, i], slots[b, j], dim=0))
                total += (cosine - (i == j)) ** 2
    assert float(losses.orthogonality(slots)) == pytest.approx(total / 18, rel=1e-5)


def norm_of_training(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(0)
    variance = ((x - mean) ** 2).mean(0)
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def slow_loss(head: Any, facts: Context, batch: Batch) -> dict[str, Any]:
    """METHODS, chapter 4, line by line: in training mode, without dropout, one image and one slot at a time."""
    p = dict(head.named_parameters())
    config = head.config
    r = {k.removeprefix("image/projector."): v for k, v in facts.readout.items()}
    images = [
        (features, i)
        for features in (batch.queries, *(q.features for q in batch.partners.values()))
        for i in range(3)
    ]

    # Z: projector, 1x1 convolution, batch norm over items and patches, ReLU; none of it without local slots.
    tokens = []
    for features, i in images if config.n_local else ():
        for x in features["image/patches"][i]:
            h = F.gelu(r["fc1.weight"] @ x + r["fc1.bias"])
            projected = r["fc2.weight"] @ h + r["fc2.bias"]
            tokens.append(
                p["local.projection.conv.weight"] @ projected + p["local.projection.conv.bias"]
            )
    z = [torch.empty(0, W)] * len(images)
    if config.n_local:
        z = norm_of_training(torch.stack(tokens), p["local.norm.weight"], p["local.norm.bias"])
        z = z.clamp(min=0).reshape(len(images), PATCHES, W)

    slots, vectors, ortho = [], [], []
    for (features, i), zi in zip(images, z, strict=True):
        local = []
        for k in range(config.n_local):
            total = torch.zeros(W)
            for zn in zi:
                a = p["local.gates.weight"][k] @ zn + p["local.gates.bias"][k]
                total = total + zn / (1 + torch.exp(-a))
            local.append(total / PATCHES)
        g = features["image/prefix"][i, 0]
        whole = [m.clamp(min=0) * g for m in p["masks.masks"]]
        kinds = [some for some in (local, whole) if some]
        means = [torch.stack(some).mean(0) for some in kinds]
        v = p["image.weight"] @ torch.cat(means) + p["image.bias"]
        slots.append(local + whole)
        vectors.append(v)
        for some in kinds:
            squares = [
                (F.cosine_similarity(x, y, dim=0) - float(s == t)) ** 2
                for s, x in enumerate(some)
                for t, y in enumerate(some)
            ]
            ortho.append(sum(squares) / len(squares))
    l_ortho = sum(ortho) / len(ortho)

    # word(u) over the whole vocabulary.
    u = p["words.table"] @ p["words.layers.0.weight"].T + p["words.layers.0.bias"]
    u = norm_of_training(u, p["words.layers.1.weight"], p["words.layers.1.bias"]).clamp(min=0)
    e = u @ p["words.layers.4.weight"].T + p["words.layers.4.bias"]

    def cls(f: Tensor, table: Tensor, target: Tensor) -> Tensor:
        logits = torch.stack([F.cosine_similarity(f, t, dim=0) / 0.05 for t in table])
        logs = logits - torch.log(torch.exp(logits - logits.max()).sum()) - logits.max()
        return -(target * logs).sum()

    pairs = [(a, o) for a in range(A) for o in range(O)]
    t = torch.stack(
        [p["pair.weight"] @ torch.cat([e[A + o], e[a]]) + p["pair.bias"] for a, o in pairs]
    )

    def labels(k: int) -> tuple[int, int]:
        features, i = images[k]
        return int(features.labels["attr"][i]), int(features.labels["obj"][i])

    def hot(n: int, i: int) -> Tensor:
        return torch.eye(n)[i]

    comps = [cls(v, t, hot(len(pairs), pairs.index(labels(k)))) for k, v in enumerate(vectors)]
    l_comp = sum(comps) / len(comps)

    auxiliary = {tuple(row[:2]): row[2:] for row in facts.tables["auxiliary"].tolist()}

    def star(k: int) -> Tensor:
        a, o = labels(k)
        others = [x for x in auxiliary.get((a, o), []) if x >= 0]
        target = hot(len(e), a) * (1 - len(others) * config.smoothing / 3)
        for x in others:
            target = target + hot(len(e), x) * config.smoothing / 3
        return target

    terms = []
    for kind, offset in (("same_attr", 3), ("same_obj", 6)):
        real = [i for i in range(3) if batch.partners[kind].valid[i]]
        sums = [torch.zeros(())] * 5
        for i in real:
            m, q = slots[i], slots[offset + i]
            sh_m, ex_m, sh_r, ex_r = (torch.zeros(W) for _ in range(4))
            for fm, fr in zip(m, q, strict=True):
                both = torch.cat([fm, fr])
                weigh = {}
                for name in ("main", "partner"):
                    first = p[f"disentangler.{name}.0.weight"] @ both
                    first = (first + p[f"disentangler.{name}.0.bias"]).clamp(min=0)
                    last = p[f"disentangler.{name}.2.weight"] @ first
                    weigh[name] = torch.sigmoid(last + p[f"disentangler.{name}.2.bias"])
                sh_m, ex_m = sh_m + weigh["main"] * fm, ex_m + (1 - weigh["main"]) * fm
                sh_r, ex_r = sh_r + weigh["partner"] * fr, ex_r + (1 - weigh["partner"]) * fr
            sh_m, ex_m, sh_r, ex_r = (x / len(m) for x in (sh_m, ex_m, sh_r, ex_r))
            joined = torch.cat([sh_m, sh_r])
            sh = p["disentangler.join.weight"] @ joined + p["disentangler.join.bias"]
            (a, o), (_, o_r) = labels(i), labels(offset + i)
            if kind == "same_attr":
                wanted = [hot(len(e), a), star(i), star(offset + i)]
                wanted += [hot(len(e), A + o), hot(len(e), A + o_r)]
            else:
                wanted = [hot(len(e), A + o)] * 3 + [star(i), star(offset + i)]
            for k, (f, y) in enumerate(zip((sh, sh_m, sh_r, ex_m, ex_r), wanted, strict=True)):
                sums[k] = sums[k] + cls(f, e, y)
        terms += [s / max(1, len(real)) for s in sums]
    l_dis = sum(terms) / 10
    loss = l_comp + config.weight_ortho * l_ortho + config.weight_disentangle * l_dis
    return {"loss": loss, "comp_loss": l_comp, "ortho_loss": l_ortho, "dis_loss": l_dis}


@pytest.mark.parametrize("n_local", [3, 0])
@pytest.mark.parametrize("steps", [0, 1])
def test_the_loss_is_that_of_the_equations_at_the_start_and_after_a_step(
    steps: int, n_local: int
) -> None:
    facts, batch = context(), batch_of()
    head = head_of(facts, smoothing=0.3, n_local=n_local).train()
    if steps:
        optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
        head.loss(batch_of())[0].backward()
        optimizer.step()
        head.zero_grad()
    loss, parts = head.loss(batch)
    expected = slow_loss(head, facts, batch)
    for name, value in {"loss": loss, **parts}.items():
        if name != "with_partner":
            assert value.item() == pytest.approx(expected[name].item(), rel=2e-5), name
    assert float(parts["with_partner"]) == pytest.approx(5 / 6)
    mine = torch.autograd.grad(loss, list(head.parameters()))
    theirs = torch.autograd.grad(expected["loss"], list(head.parameters()))
    for (name, _), a, b in zip(head.named_parameters(), mine, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5), name


def test_without_any_partner_the_loss_is_finite_and_only_disentangling_is_gone() -> None:
    head = head_of()
    nobody = ([False] * 3, [False] * 3)
    loss, parts = head.loss(batch_of(nobody))
    _, full = head.loss(batch_of())
    loss.backward()
    assert float(parts["dis_loss"]) == 0
    assert torch.allclose(parts["comp_loss"], full["comp_loss"])
    for name, p in head.named_parameters():
        assert p.grad is None or torch.isfinite(p.grad).all(), name


def test_a_stand_in_is_classified_and_has_no_part_in_disentangling() -> None:
    """Another image in the place of the one that stands in changes comp, not dis."""
    head, batch = head_of().eval(), batch_of()
    other = rows([2, 2, 1], [0, 1, 0], 77)
    partner = batch.partners["same_obj"]
    streams = {
        name: torch.where(
            partner.valid.reshape(3, *(1,) * (value.ndim - 1)), value, other.streams[name]
        )
        for name, value in partner.features.streams.items()
    }
    changed = Partner(Features(streams, partner.features.labels), partner.target, partner.valid)
    swapped = Batch(
        batch.queries,
        batch.candidates,
        batch.target,
        batch.ignore,
        batch.negative,
        {**batch.partners, "same_obj": changed},
    )
    _, one = head.loss(batch)
    _, two = head.loss(swapped)
    assert torch.allclose(one["dis_loss"], two["dis_loss"], atol=1e-6)
    assert not torch.allclose(one["comp_loss"], two["comp_loss"], atol=1e-6)


# What is trained, and what a saved head knows.


def test_gates_are_trained_unless_parity_is_asked_for() -> None:
    for trained in (True, False):
        head = head_of(train_gates=trained)
        head.loss(batch_of())[0].backward()
        gates = head.local.gates
        assert {"local.gates.weight", "local.gates.bias"} <= set(head.state_dict())
        assert gates.weight.requires_grad == trained
        assert (gates.weight.grad is not None) == trained
        if trained:
            assert gates.weight.grad.abs().min(1).values.max() > 0


def test_the_score_is_the_cosine_of_image_and_pair() -> None:
    head, batch = head_of().eval(), batch_of()
    scores = head(batch.queries, batch.candidates)
    assert head.score_space == "cosine"
    assert (scores.abs() <= 1 + 1e-6).all()
    v = head._embed(head._slots(batch.queries))
    e = head.words()
    for i in range(3):
        for c, (a, o) in enumerate((a, o) for a in range(A) for o in range(O)):
            t = head.pair(torch.cat([e[A + o], e[a]]))
            cosine = F.cosine_similarity(v[i], t, dim=0)
            assert scores[i, c].item() == pytest.approx(cosine.item(), abs=1e-6)


def test_switches_reach_the_score_or_the_loss() -> None:
    batch = batch_of()
    base = head_of().eval()
    for name, value in (("gate", "relu"), ("mask", "softplus"), ("projector_activation", "relu")):
        other = head_of(None, **{name: value}).eval()
        other.load_state_dict(base.state_dict())
        assert not torch.allclose(
            other.embed_queries(batch.queries), base.embed_queries(batch.queries)
        )
    plain, parts = base.loss(batch)
    other = head_of(weight_ortho=0.0, weight_disentangle=0.0).eval()
    other.load_state_dict(base.state_dict())
    loss, _ = other.loss(batch)
    assert loss.item() == pytest.approx(float(parts["comp_loss"]))
    assert plain.item() == pytest.approx(
        float(parts["comp_loss"] + 0.1 * parts["ortho_loss"] + 0.25 * parts["dis_loss"])
    )


def test_another_family_goes_through_its_own_final_norm() -> None:
    readout = {
        "image/norm.weight": torch.rand(W) + 0.5,
        "image/norm.bias": torch.randn(W),
        "image/eps": torch.tensor(1e-5),
    }
    facts = context(readout)
    head, queries = head_of(facts).eval(), rows([0, 1], [0, 1], 4)

    def normed(x: Tensor) -> Tensor:
        return F.layer_norm(x, (W,), readout["image/norm.weight"], readout["image/norm.bias"])

    local = head.local(normed(queries["image/patches"]))
    whole = head.masks(normed(queries["image/prefix"][:, 0]))
    expected = F.normalize(head._embed((local, whole)), dim=-1)
    assert torch.allclose(head.embed_queries(queries), expected, atol=1e-6)


def test_word_vectors_learn_at_their_own_rate() -> None:
    head = head_of()
    assert head.lr_shares() == {"words.table": 0.0075}
    assert head.lr_shares()["words.table"] * 2e-4 == pytest.approx(1.5e-6)


def test_ragged_pictures_train_and_score() -> None:
    head = head_of().train()
    batch = batch_of()

    def ragged(features: Features, lengths: list[int]) -> Features:
        n = max(lengths)
        mask = torch.arange(n) < torch.tensor(lengths)[:, None]
        streams = {**features.streams, "image/patches": features["image/patches"][:, :n]}
        return Features({**streams, "image/mask": mask}, features.labels)

    sizes = {"same_attr": [2, 3, 1], "same_obj": [1, 1, 2]}
    partners = {
        kind: Partner(ragged(p.features, sizes[kind]), p.target, p.valid)
        for kind, p in batch.partners.items()
    }
    mixed = Batch(
        ragged(batch.queries, [4, 2, 3]),
        batch.candidates,
        batch.target,
        batch.ignore,
        batch.negative,
        partners,
    )
    loss, _ = head.loss(mixed)
    loss.backward()
    assert torch.isfinite(loss)
    head.eval()
    short = ragged(batch.queries, [2, 2, 2])
    alone = Features({**short.streams, "image/mask": torch.ones(3, 2, dtype=torch.bool)})
    assert torch.allclose(head.embed_queries(short), head.embed_queries(alone))


def test_a_head_without_word_vectors_says_who_makes_them() -> None:
    bare = Context({"image/patches": (4, W), "image/prefix": (1, W)}, {}, ATTRS, OBJS)
    with pytest.raises(ConfigError, match=r"Head\.prepare"):
        head_of(bare)
