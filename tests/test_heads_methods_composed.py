"""inversion and mota: against their equations, from triplets to a score, and what is refused."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cache_builder import FeatureCache, build, load_backbone, load_dataset, plugins
from cache_builder.datasets.base import Tasks
from eval.composed import evaluate
from heads import checkpoint, load_method
from heads.ablation import plan, read
from heads.base import Context
from heads.blocks.pseudo_words import pieces_of
from heads.cli import main
from heads.errors import ConfigError, TaskError
from heads.features import Batch
from heads.losses import entropy_weights, products, weighted_contrastive
from heads.methods.inversion import keyword_pieces
from heads.miniature import small_batch, small_features
from heads.run_files import Trained
from heads.score import score
from heads.strings import STREAM, pack, unpack
from heads.sweep import train_runs
from heads.tasks import ComposedData, load_task
from heads.testing import check_head
from heads.wanted import Wanted

FAMILIES = ("clip", "siglip2", "pe")
INVERSION: list[dict[str, Any]] = [
    {"kind": kind} for kind in ("pic2word", "searle", "lincir", "context_i2w")
]
MOTA: list[dict[str, Any]] = [
    {"mdm": "full", "n_prompts": 0},
    {"mdm": "none", "n_prompts": 2, "n_experts": 1, "depth": 1},
    {"router": "both", "top_k": 2, "balance": 0.1, "n_prompts": 2, "recompute": True, "chunk": 2},
    {"phi_kind": "context_i2w", "n_prompts": 2},
    {"baseline": "rtd"},
    {"baseline": "lora_text"},
    {"mdm": "none", "n_prompts": 0},
]


def head_of(name: str, context: Context, **config: Any) -> Any:
    torch.manual_seed(0)
    method = load_method(name)
    given = method.Config(**config)
    return method.Head(given, method.Head.miniature(given, context)).eval()


def name_of(config: dict[str, Any]) -> str:
    return "-".join(f"{k}={v}" for k, v in config.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", INVERSION, ids=name_of)
def test_every_kind_keeps_the_promises_of_a_head(
    contexts: dict[str, Context], family: str, config: dict[str, Any]
) -> None:
    method = load_method("inversion")
    check_head(method, method.Config(**config), contexts[family])


@pytest.mark.parametrize("config", MOTA, ids=name_of)
def test_every_part_keeps_the_promises_of_a_head(
    contexts: dict[str, Context], config: dict[str, Any]
) -> None:
    method = load_method("mota")
    family = FAMILIES[MOTA.index(config) % 3]
    check_head(method, method.Config(**config), contexts[family])


def one_by_one(head: Any, words: Tensor, said: list[Any]) -> Tensor:
    """Unit texts, each alone in the tower."""
    rows = [head.texts.encode(w[None], [p])[0] for w, p in zip(words, said, strict=True)]
    return F.normalize(torch.stack(rows), dim=-1)


def photo(head: Any, words: Tensor) -> Tensor:
    return one_by_one(head, words, [pieces_of("a photo of $")] * len(words))


def test_pic2word_and_searle_learn_by_their_equations(contexts: dict[str, Context]) -> None:
    head = head_of("inversion", contexts["clip"])
    batch = small_batch(head)
    text = photo(head, head.phi.net(batch.queries["image/pooled"]))
    image = F.normalize(batch.candidates["image/pooled"], dim=-1)
    s = contexts["clip"].readout["logit_scale"].exp()
    rows, columns = [], []
    for i in range(len(text)):
        counted = [j for j in range(len(image)) if not batch.ignore[i, j]]
        logits = [s * text[i] @ image[j] for j in counted]
        rows.append(torch.stack(logits).logsumexp(0) - s * text[i] @ image[i])
        theirs = [s * text[k] @ image[i] for k in range(len(text)) if not batch.ignore[k, i]]
        columns.append(torch.stack(theirs).logsumexp(0) - s * text[i] @ image[i])
    want = (torch.stack(rows).mean() + torch.stack(columns).mean()) / 2
    assert torch.allclose(head.loss(batch)[0], want, rtol=1e-4)
    other = head_of("inversion", contexts["clip"], kind="searle")
    text = photo(other, other.phi.net(batch.queries["image/pooled"]))
    apart = [1 - text[i] @ image[i] for i in range(len(text))]
    assert torch.allclose(other.loss(batch)[0], torch.stack(apart).mean(), rtol=1e-4)


def test_lincir_rebuilds_a_caption_from_itself(contexts: dict[str, Context]) -> None:
    head = head_of("inversion", contexts["clip"], kind="lincir")
    batch = small_batch(head)
    pooled = batch.candidates["text/pooled"]
    total = torch.zeros(())
    for f, caption in zip(pooled, unpack(batch.candidates[STREAM]), strict=True):
        pieces = keyword_pieces(caption)
        if len(pieces) > 1:  # what nothing is replaced in is what it was
            text = head.texts.encode(head.phi.net(f[None]), [pieces])[0]
            total = total + (text - f).square().sum()
    assert torch.allclose(head.loss(batch)[0], total / pooled.numel(), rtol=1e-4)
    noisy = head.train().loss(batch)[0]
    assert not torch.isclose(noisy, total / pooled.numel(), rtol=1e-3)


def test_a_caption_without_keywords_costs_nothing(contexts: dict[str, Context]) -> None:
    head = head_of("inversion", contexts["clip"], kind="lincir")
    batch = small_batch(head)
    plain = batch.candidates.take(torch.tensor([0, 0, 0]))
    assert unpack(plain[STREAM])[0] == "is red"
    streams = {**plain.streams, STREAM: pack(["there it is"] * 3)}
    assert head.loss(replace(batch, candidates=replace(plain, streams=streams)))[0] == 0


def test_searle_finds_words_first_where_it_is_asked_to(contexts: dict[str, Context]) -> None:
    head = head_of("inversion", contexts["clip"], kind="searle", oti=True)
    images = small_features(3, 1, frozenset({"image/pooled"}), contexts["clip"])
    with torch.no_grad():
        words = head.before_training([images])["target/word"]
    unit = F.normalize(images["image/pooled"], dim=-1)
    found = (photo(head, words) * unit).sum(-1)
    start = (photo(head, 0.02 * torch.randn_like(words)) * unit).sum(-1)
    assert (found > start + 0.2).all()


def test_mota_is_its_base_until_it_is_trained(contexts: dict[str, Context]) -> None:
    context = contexts["clip"]
    base = head_of("mota", context, mdm="none", n_prompts=0)
    queries = small_features(4, 3, base.needs(base.config).queries, context)
    for config in ({"n_prompts": 0}, {"mdm": "full", "n_prompts": 0}, {"baseline": "lora_text"}):
        head = head_of("mota", context, **config)
        head.phi.load_state_dict(base.phi.state_dict())
        assert torch.allclose(head.embed_queries(queries), base.embed_queries(queries), atol=1e-5)


def unsure(base: Tensor, barred: Tensor, strength: float) -> list[float]:
    """Entropy weights by the definition."""
    n, grown = len(base), []
    for i in range(n):
        cells = [j for j in range(n) if j == i or not barred[i, j]]
        p = torch.stack([base[i, j] for j in cells]).softmax(0)
        entropy = -sum(float(q) * math.log(float(q)) for q in p)
        grown.append(math.exp(strength * entropy / math.log(n)))
    return [g / (sum(grown) / n) for g in grown]


def test_the_loss_of_mota_is_its_equation(contexts: dict[str, Context]) -> None:
    head = head_of("mota", contexts["clip"], n_prompts=2, entropy_weight=2.0)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.05 * torch.randn_like(p) if p.requires_grad else 0)
    batch = small_batch(head)
    barred = batch.ignore[:, batch.target].clone()
    barred[1, 2] = True
    ignore = batch.ignore.clone()
    ignore[1, 2] = True
    batch = Batch(batch.queries, batch.candidates, batch.target, ignore, batch.negative)
    t = F.normalize(batch.candidates["text/pooled"], dim=-1)[:5]
    words = head.phi.net(batch.queries["image/pooled"])
    said = [pieces_of(head.template, text) for text in unpack(batch.queries[STREAM])]
    base = F.normalize(
        torch.stack([head.plain.encode(w[None], [p])[0] for w, p in zip(words, said, strict=True)]),
        dim=-1,
    )
    weight = unsure(base @ t.T / 0.07, barred, 2.0)
    moved = head.phi.net(head.mdm.gain * batch.queries["image/pooled"] + head.mdm.shift)
    q = torch.cat(
        [
            F.normalize(head.texts.prompted(w[None], [p], head.prompts)[0], dim=-1)
            for w, p in zip(moved, said, strict=True)
        ]
    )
    total = torch.zeros(())
    for i in range(5):
        row = [q[i] @ t[j] / 0.07 for j in range(5) if i == j or not barred[i, j]]
        column = [q[j] @ t[i] / 0.07 for j in range(5) if i == j or not barred[j, i]]
        own = q[i] @ t[i] / 0.07
        both = torch.stack(row).logsumexp(0) - own + torch.stack(column).logsumexp(0) - own
        total = total + weight[i] * both
    assert torch.allclose(head.loss(batch)[0], total / 10, rtol=1e-4)


def test_entropy_weights_are_of_mean_1_and_rise_with_doubt() -> None:
    torch.manual_seed(0)
    base, barred = torch.randn(6, 6), torch.rand(6, 6) < 0.2
    got = entropy_weights(base, barred, 1.5)
    assert torch.allclose(got, torch.tensor(unsure(base, barred, 1.5)), atol=1e-5)
    assert torch.equal(entropy_weights(base, barred, 0.0), torch.ones(6))
    doubt = entropy_weights(
        torch.cat([torch.zeros(1, 6), 9 * torch.eye(6)[1:]]), barred & False, 1.0
    )
    assert (doubt[0] > doubt[1:]).all()
    plain = weighted_contrastive(base, barred & False, torch.ones(6))[0]
    target = torch.arange(6)
    want = (F.cross_entropy(base, target) + F.cross_entropy(base.T, target)) / 2
    assert torch.allclose(plain, want)


def test_scores_of_a_loss_are_not_rounded_under_autocast() -> None:
    a, b = torch.randn(3, 8), torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(products(a, b), a @ b.T) is False
        assert torch.allclose(products(a, b), (a[:, None] * b).sum(-1), atol=1e-6)


def test_rtd_cannot_make_words_of_captions_by_a_network_that_reads_pictures() -> None:
    with pytest.raises(ValueError, match="captions"):
        load_method("mota").Config(baseline="rtd", phi_kind="context_i2w")


def test_rtd_pairs_queries_with_targets_and_references_with_themselves(
    contexts: dict[str, Context],
) -> None:
    head = head_of("mota", contexts["clip"], baseline="rtd")
    batch = small_batch(head)
    pooled = batch.candidates["text/pooled"]
    target, reference = pooled[batch.target], pooled[batch.negative[:, 0]]
    words = head.phi.net(reference)
    said = [pieces_of(head.template, text) for text in unpack(batch.queries[STREAM])]
    q = torch.cat([one_by_one(head, words, said), photo(head, words)])
    t = F.normalize(torch.cat([target, reference]), dim=-1)
    s, n = q @ t.T / 0.07, 10
    same = torch.tensor(
        [[i != j and bool(torch.equal(t[i], t[j])) for j in range(n)] for i in range(n)]
    )
    s = s.masked_fill(same, -torch.inf)
    want = (F.cross_entropy(s, torch.arange(n)) + F.cross_entropy(s.T, torch.arange(n))) / 2
    assert torch.allclose(head.loss(batch)[0], want, rtol=1e-4)
    bare = Batch(batch.queries, batch.candidates, batch.target, batch.ignore, batch.negative[:, :0])
    with pytest.raises(ConfigError, match=r"train\.negatives=text"):
        head.loss(bare)


def test_the_gallery_is_as_it_was_cached(contexts: dict[str, Context]) -> None:
    head = head_of("mota", contexts["clip"])
    torch.nn.init.normal_(head.mdm.gain)
    gallery = small_features(4, 2, frozenset({"image/pooled"}), contexts["clip"])
    assert torch.equal(head.embed_candidates(gallery), F.normalize(gallery["image/pooled"], dim=-1))


@pytest.fixture(scope="module")
def toy(fast_folder: Path) -> FeatureCache:
    return build(
        load_dataset("toy_world", scale=0.02, triplets="rules"),
        load_backbone("clip:demo"),
        fast_folder / "mota-triplets.zarr",
        streams=("image/pooled", "text/pooled"),
        backbone_name="clip:demo",
        progress=False,
    )


SHORT = ["--set", "train.steps=2", "--set", "train.batch_size=8", "--set", "train.device=cpu"]


def trained(cache: FeatureCache, method: str, out: Path, *sets: str) -> int:
    given = [part for text in sets for part in ("--set", text)]
    return main(["train", method, "--cache", str(cache.path), "--out", str(out), *SHORT, *given])


@pytest.fixture(scope="module")
def phi(toy: FeatureCache, fast_folder: Path) -> Path:
    assert trained(toy, "inversion", fast_folder / "mota-phi", "head.kind=lincir") == 0
    return fast_folder / "mota-phi"


def test_from_triplets_to_a_score(
    toy: FeatureCache, phi: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "mota"
    assert trained(toy, "mota", run, f"head.phi={phi}", "head.n_prompts=2") == 0
    said = capsys.readouterr().out
    assert "of the dual encoder" in said
    record = json.loads((run / "run.json").read_text())
    assert record["task"] == "composed"
    assert record["learned"] == "triplets"
    assert record["examples"]["train"] == len(load_task(toy, "triplets", "train"))  # type: ignore[arg-type]
    assert 0 < record["remarks"]["of the dual encoder"] < 0.02
    assert record["selected_on"] == "val recall@1"
    n = sum(e.split == "train" for e in toy.tasks.triplets)
    assert sum(record["filtered"].values()) == n - record["examples"]["train"] > 0
    assert "train triplets: captions unrelated" in said
    assert main(["score", str(run)]) == 0
    # Loaded without φ's run, it scores the same.
    data = load_task(toy, "composed", "test")
    before = score(checkpoint.load(run), data).scores  # type: ignore[union-attr]
    phi.rename(phi.with_name("elsewhere"))
    try:
        after = score(checkpoint.load(run), data).scores  # type: ignore[union-attr]
    finally:
        phi.with_name("elsewhere").rename(phi)
    assert (before == after).all()


def test_captions_alone_are_enough_to_train_and_another_cache_asks_the_queries(
    toy: FeatureCache, phi: Path, tmp_path: Path, fast_folder: Path
) -> None:
    whole = load_dataset("toy_world", scale=0.02, triplets="rules")
    tasks = Tasks(retrieval=whole.tasks.retrieval, triplets=whole.tasks.triplets)
    cache = build(
        replace(whole, tasks=tasks),
        load_backbone("clip:demo"),
        fast_folder / "mota-captions.zarr",
        streams=("image/pooled", "text/pooled"),
        backbone_name="clip:demo",
        progress=False,
    )
    run = tmp_path / "mota"
    assert trained(cache, "mota", run, f"head.phi={phi}") == 0
    record = json.loads((run / "run.json").read_text())
    assert record["selected_on"] == "val recall@1 of triplets"
    assert 0 < record["best"]["recall@1"] <= 1
    assert main(["score", str(run), "--cache", str(toy.path), "--split", "val"]) == 0
    assert (run / "scores-mota-triplets-val.zarr").exists()


@pytest.mark.parametrize("name", ["cirr", "fashioniq", "circo", "genecis"])
def test_an_adapted_network_answers_the_queries_of_official_sets(
    toy: FeatureCache, phi: Path, tmp_path: Path, fast_path: Path, name: str
) -> None:
    plugins.find("cache_builder.datasets", name).miniature(fast_path / name)
    cache = build(
        load_dataset(name, fast_path / name),
        load_backbone("clip:demo"),
        fast_path / f"{name}.zarr",
        streams=("image/pooled", "text/pooled"),
        backbone_name="clip:demo",
        progress=False,
    )
    split = next(s for s in ("val", "test") if any(e.split == s for e in cache.tasks.composed))
    head: Any = checkpoint.load(phi)
    data = load_task(cache, "composed", split)
    table: Any = score(head, data)
    found = evaluate(table, ks=(1, 2))
    assert found
    # One cell by hand, of the first query: its wordings one by one, then their mean direction.
    example = next(e for e in cache.tasks.composed if e.split == split)
    row = cache.rows("image", [example.reference, table.names(0)[-1] or table.names(0)[0]])
    image = torch.from_numpy(cache.read("image/pooled", row)).float()
    strings = dict(zip(cache.text_ids, cache.texts, strict=True))
    said = [pieces_of(head.template, strings[m]) for m in example.modifications]
    with torch.no_grad():
        words = head.phi.net(image[:1]).expand(len(said), -1)
        query = F.normalize(one_by_one(head, words, said).sum(0), dim=0)
    cell = float(query @ F.normalize(image[1], dim=0))
    column = list(table.names(0)).index(table.names(0)[-1] or table.names(0)[0])
    if table.scores[0, column] > -np.inf:
        assert table.scores[0, column] == pytest.approx(cell, abs=1e-4)


def test_every_row_of_the_ablation_trains_a_step(
    toy: FeatureCache, phi: Path, tmp_path: Path
) -> None:
    settings = {"head": {"phi": str(phi)}, "train": {"steps": 1, "batch_size": 8}}
    made = plan(read("mota"), {"it": toy}, settings=settings)
    assert made.left_out == []
    rows = made.entries["it"]
    assert [entry.label for entry in rows] == read("mota").labels
    wanted = [
        Wanted(entry.method, tmp_path / entry.label, {"head": entry.head, "train": entry.train})
        for entry in rows
    ]
    runs = train_runs(toy, wanted, task="composed", progress=False)
    assert all(isinstance(run, Trained) for run in runs)


def test_all_parts_off_is_the_inversion_network(
    toy: FeatureCache, phi: Path, tmp_path: Path
) -> None:
    off = ("head.mdm=none", "head.n_prompts=0")
    assert trained(toy, "mota", tmp_path / "off", f"head.phi={phi}", *off) == 0
    assert json.loads((tmp_path / "off" / "run.json").read_text())["steps"] == 0
    data = load_task(toy, "composed", "test")
    one, two = (score(checkpoint.load(run), data) for run in (phi, tmp_path / "off"))
    assert np.allclose(one.scores, two.scores, atol=1e-5)  # type: ignore[union-attr]


def test_base_queries_are_those_of_the_untrained_head_in_the_order_of_the_data(
    toy: FeatureCache, phi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = load_method("mota")
    seen: list[tuple[Tensor, Tensor]] = []
    loss = method.Head.loss

    def watched(self: Any, batch: Batch) -> Any:
        fresh = self.before_training([batch.queries])["base/pooled"]
        seen.append((batch.queries["base/pooled"], fresh))
        return loss(self, batch)

    monkeypatch.setattr(method.Head, "loss", watched)
    assert trained(toy, "mota", tmp_path / "m", f"head.phi={phi}", "train.epochs=1") == 0
    assert seen
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in seen)


def test_an_edit_longer_than_the_tower_keeps_its_end_and_is_counted(
    toy: FeatureCache, phi: Path
) -> None:
    head: Any = checkpoint.load(phi)
    data = load_task(toy, "composed", "test")
    assert isinstance(data, ComposedData)
    assert head.remarks()["texts cut"] == 0
    head.texts.encode(
        torch.zeros(1, head.phi.width), [pieces_of("$ {modification}", "a bow " * 60)]
    )
    assert head.remarks()["texts cut"] == 1


def refused(capsys: pytest.CaptureFixture[str], status: int) -> str:
    assert status == 1
    return capsys.readouterr().err


def test_what_cannot_be_trained_is_told_before_anything_starts(
    toy: FeatureCache,
    phi: Path,
    tmp_path: Path,
    fast_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    attempt: Callable[..., int] = partial(trained, toy, "mota", out)
    assert "name its run" in refused(capsys, attempt())
    assert "no trained run" in refused(capsys, attempt(f"head.phi={tmp_path}"))
    assert "head.depth" in refused(capsys, attempt(f"head.phi={phi}", "head.depth=99"))
    assert "one $" in refused(capsys, attempt(f"head.phi={phi}", "head.template=a photo"))
    assert "of kind lincir" in refused(capsys, attempt(f"head.phi={phi}", "head.phi_kind=searle"))
    wrong = refused(capsys, attempt(f"head.phi={phi}", "head.baseline=rtd"))
    assert "train.negatives=text" in wrong
    bare = build(
        load_dataset("toy_world", scale=0.01),
        load_backbone("clip:demo"),
        fast_folder / "mota-no-triplets.zarr",
        streams=("image/pooled", "text/pooled"),
        backbone_name="clip:demo",
        progress=False,
    )
    told = refused(capsys, trained(bare, "mota", out, f"head.phi={phi}"))
    assert "--set triplets=rules" in told
    other = build(
        load_dataset("toy_world", scale=0.01, triplets="rules"),
        load_backbone("siglip2:demo"),
        fast_folder / "mota-siglip2.zarr",
        streams=("image/pooled", "text/pooled"),
        backbone_name="siglip2:demo",
        progress=False,
    )
    told = refused(capsys, trained(other, "mota", out, f"head.phi={phi}"))
    assert "another backbone" in told or "does not fit" in told
    assert not out.exists()


def test_a_published_network_scores_without_training(
    toy: FeatureCache, phi: Path, tmp_path: Path
) -> None:
    """SEARLE's file layout (`layers.0`, `layers.3`, `layers.6`), with weights of our own."""
    head: Any = checkpoint.load(phi)
    torch.save(
        {f"module.{n}": v for n, v in head.phi.net.state_dict().items()}, tmp_path / "phi.pt"
    )
    given = (f"head.weights={tmp_path / 'phi.pt'}", "head.kind=lincir")
    assert trained(toy, "inversion", tmp_path / "published", *given) == 0
    data = load_task(toy, "composed", "test")
    one, two = (score(checkpoint.load(run), data) for run in (phi, tmp_path / "published"))
    assert np.allclose(one.scores, two.scores, atol=1e-5)  # type: ignore[union-attr]


def test_triplets_without_a_usable_pair_of_captions_are_refused(
    toy: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heads.composed_tasks.COSINES", (2.0, 3.0))
    with pytest.raises(TaskError, match="none has captions whose cosine"):
        load_task(toy, "triplets", "train")
