"""check_head: what every head must do, whatever it computes. A new method file is tested by existing.

    check_head(method, config)   on small random features; raises `NotConforming` with the promise that was broken

The checks follow the list in docs/design.md: reads only what it declares · every trainable parameter gets a
gradient and is saved · candidates permute · one query and one candidate work · `paired` is the diagonal of
`forward` · padding is invisible · rows do not see each other · state round-trips bit for bit · bf16 stays finite and
unrounded · frozen stays frozen, a live backbone too · same seed, same start.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from heads.base import Context, Head, HeadConfig, SetHead
from heads.features import Features
from heads.live import LiveBackbone
from heads.miniature import RAGGED, B, M, live_context, small_batch, small_context, small_features

TOLERANCE = 2e-5
"""Largest difference allowed where only the shape of a float32 matrix product changed, for scores of order 1 to 100."""

HALF_TOLERANCE = 2e-3
"""The same under bf16: half a step of bf16, so a final product in half precision is caught."""


class NotConforming(AssertionError):
    """A head breaks a promise of the contract; the message says which."""


def check_head(
    method: ModuleType, config: HeadConfig | None = None, context: Context | None = None
) -> None:
    """Run the whole suite on one method under one configuration.

    Args:
        method: a module with the handles `Config` and `Head`.
        config: None is the method's default.
        context: None is `small_context()`, or `live_context` of a tiny CLIP for a head with a live side.

    Raises:
        NotConforming: names the promise and the numbers.
    """
    config = method.Config() if config is None else config
    if context is None and method.Head.needs(config).live:
        with tempfile.TemporaryDirectory() as made:
            check_head(method, config, live_context("clip", Path(made, "clip")))
        return
    facts = method.Head.miniature(config, small_context() if context is None else context)

    def build(seed: int = 0) -> Head:
        torch.manual_seed(seed)
        return method.Head(config, facts)

    head = build()
    _live_stays_frozen(head)
    _same_seed_same_start(build)
    _frozen_stays_frozen(head)
    _train(head)
    _every_parameter_gets_a_gradient(head)
    head.eval()
    with torch.no_grad():
        _reads_only_what_it_declares(head)
        _paired_is_the_diagonal(head)
        _candidates_permute(head)
        _one_query_and_one_candidate_work(head)
        _rows_do_not_see_each_other(head)
        _padding_is_invisible(head)
        _state_round_trips(head, method, facts)
        _bf16_stays_finite(head)


def _require(condition: bool | Tensor, head: Head, promise: str) -> None:
    if not bool(condition):
        raise NotConforming(f"{type(head).__module__} under {head.config!r}: {promise}")


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)


def _sides(head: Head, n: int = B, m: int = M) -> tuple[Features, Features]:
    needs = head.needs(head.config)
    return (
        small_features(n, 3, needs.queries, head.context),
        small_features(m, 4, needs.candidates, head.context),
    )


def _train(head: Head) -> None:
    """Bring the head where a user would score it: solved, or with zero-initialised outputs moved off zero."""
    if head.training_by == "closed_form":
        head.solve(small_batch(head), seed=0)
    with torch.no_grad():
        for p in head.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))


def _same_seed_same_start(build: Callable[[int], Head]) -> None:
    one, two, other = build(0), build(0), build(1)
    same = all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    _require(same, one, "the same seed must give the same initial parameters")
    drawn = [p for p in one.parameters() if p.requires_grad and p.ndim >= 2]
    if drawn and not one.needs(one.config).live:  # word vectors start as the backbone has them
        pairs = zip(one.parameters(), other.parameters(), strict=True)
        _require(
            any(not torch.equal(a, b) for a, b in pairs),
            one,
            "another seed must give other initial parameters, or the seed is not used",
        )


def _frozen_stays_frozen(head: Head) -> None:
    """What comes from the readout is not trained and not saved with the head's own state."""
    trained = {p.data_ptr() for p in head.parameters() if p.requires_grad}
    for name, tensor in head.context.readout.items():
        _require(
            tensor.data_ptr() not in trained and not tensor.requires_grad,
            head,
            f"readout/{name} is frozen, but a trainable parameter shares its memory",
        )
    if head.training_by != "gradient":
        left = [name for name, p in head.named_parameters() if p.requires_grad]
        _require(not left, head, f"it is trained by {head.training_by}, yet {left} want gradients")


def _live_stays_frozen(head: Head) -> None:
    """A backbone in the graph gives gradients through and takes none; it is no part of the head."""
    found = [b for m in head.modules() for b in vars(m).values() if isinstance(b, LiveBackbone)]
    declared = head.needs(head.config).live
    _require(
        bool(found) == bool(declared),
        head,
        f"a head with a LiveBackbone declares a live side, and no other: {sorted(declared)} is declared",
    )
    if not found:
        return
    towers = [b.on("cpu").tower(side) for b in found for side in declared]
    mine = {id(m) for m in head.modules()} | {id(p) for p in head.parameters()}
    before = [p.clone() for t in towers for p in t.parameters()]
    head.train()
    if head.training_by == "gradient":
        head.loss(small_batch(head))[0].backward()
        head.zero_grad()
    for tower in towers:
        theirs = {id(m) for m in tower.modules()} | {id(p) for p in tower.parameters()}
        _require(not mine & theirs, head, "a live backbone must not be a module of the head")
        _require(not tower.training, head, "a live backbone must stay in evaluation mode")
        wants = any(p.requires_grad or p.grad is not None for p in tower.parameters())
        _require(not wants, head, "a live backbone must want and get no gradient")
    after = [p for t in towers for p in t.parameters()]
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    _require(same, head, "a live backbone must not change")


def _every_parameter_gets_a_gradient(head: Head) -> None:
    if head.training_by != "gradient":
        return
    head.eval()  # dropout may hide a parameter by chance
    head.zero_grad()
    before = {name: t.clone() for name, t in head.context.readout.items()}
    torch.manual_seed(0)
    loss, parts = head.loss(small_batch(head))
    _require(
        loss.ndim == 0 and torch.isfinite(loss), head, f"the loss must be one number, is {loss}"
    )
    _require(
        not any(part.requires_grad for part in parts.values()),
        head,
        "logged parts must be detached",
    )
    loss.backward()
    # A loss may be blind to a parameter that moves all scores alike (an output bias under softmax); the scores are not.
    sides = _sides(head)
    scores = head(*sides)
    (scores * torch.randn_like(scores)).sum().backward()
    saved = head.state_dict()
    trained = {name: p for name, p in head.named_parameters() if p.requires_grad}
    _require(len(trained) > 0, head, "a head trained by gradient needs a trainable parameter")
    strangers = sorted(set(head.lr_shares()) - set(trained))
    _require(not strangers, head, f"lr_shares names {strangers}, which are not trained")
    for name, p in trained.items():
        _require(p.grad is not None and bool((p.grad != 0).any()), head, f"{name} gets no gradient")
        _require(name in saved, head, f"{name} is trained but not in state_dict")
    for name, tensor in head.context.readout.items():
        _require(torch.equal(tensor, before[name]), head, f"readout/{name} changed in training")
    head.zero_grad()


def _reads_only_what_it_declares(head: Head) -> None:
    """Undeclared streams, present but full of NaN, change nothing; everywhere else here they are absent."""
    sides = _sides(head)
    want = head(*sides)
    needs = head.needs(head.config)
    composed = head.tasks == frozenset({"composed"})
    roles = {
        "queries": ("image/", "text/") if composed else ("image/",),
        "candidates": ("image/",) if composed else ("text/",),
    }
    for i, (role, of) in enumerate(roles.items()):
        others = frozenset(s for s in head.context.shapes if s.startswith(of))
        n = len(sides[i])
        extra = small_features(n, 5, others, head.context).streams
        spoiled = {
            k: torch.full_like(v, torch.nan) for k, v in extra.items() if v.is_floating_point()
        }
        offered = list(sides)
        offered[i] = Features({**extra, **spoiled, **sides[i].streams}, sides[i].labels)
        declared = sorted(needs.queries if i == 0 else needs.candidates)
        _require(
            torch.equal(want, head(*offered)),
            head,
            f"{role} read streams beyond those that `needs` declares, {declared}",
        )


def _paired_is_the_diagonal(head: Head) -> None:
    queries, candidates = _sides(head, B, B)
    grid, pairs = head(queries, candidates), head.paired(queries, candidates)
    _require(
        grid.shape == (B, B), head, f"forward of 5 and 5 must be (5, 5), is {tuple(grid.shape)}"
    )
    _require(
        _close(grid.diagonal(), pairs),
        head,
        f"`paired` must be the diagonal of `forward`; they differ by {_gap(grid.diagonal(), pairs)}",
    )


def _candidates_permute(head: Head) -> None:
    queries, candidates = _sides(head)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    want, got = head(queries, candidates)[:, order], head(queries, candidates.take(order))
    _require(
        _close(want, got),
        head,
        f"permuting candidates must permute columns; off by {_gap(want, got)}",
    )


def _one_query_and_one_candidate_work(head: Head) -> None:
    queries, candidates = _sides(head)
    first = torch.tensor([0])
    got = head(queries.take(first), candidates.take(first))
    want = head(queries, candidates)[:1, :1]
    if isinstance(head, SetHead):
        _a_set_may_come_in_parts(head, queries, candidates, got)
        _fewer_candidates_are_a_set_of_their_own(head, queries, candidates)
        if head.relative:
            return
    _require(
        got.shape == (1, 1) and _close(want, got),
        head,
        f"one query and one candidate must score as among others: {got.tolist()} instead of {want.tolist()}",
    )


def _a_set_may_come_in_parts(
    head: SetHead, queries: Features, candidates: Features, alone: Tensor
) -> None:
    _require(
        alone.shape == (1, 1) and torch.isfinite(alone),
        head,
        f"one query and one candidate must have a score, not {alone.tolist()}",
    )
    parts = [candidates.take(torch.tensor(some)) for some in ([0, 1, 2], [3], [4, 5])]
    want, got = head(queries, candidates), head.against(queries, head.gather(parts))
    _require(
        _close(want, got),
        head,
        f"scores depend on how the candidates are cut, by {_gap(want, got)}",
    )


def _fewer_candidates_are_a_set_of_their_own(
    head: SetHead, queries: Features, candidates: Features
) -> None:
    sizes = [6, 4, 1]
    nested = head.nested(queries, head.gather([candidates]), sizes)
    for n, got in zip(sizes, nested, strict=True):
        want = head(queries, candidates.take(torch.arange(n)))
        _require(
            _close(want, got),
            head,
            f"scores of the first {n} candidates must be theirs as a set of their own; off by {_gap(want, got)}",
        )


def _rows_do_not_see_each_other(head: Head) -> None:
    queries, candidates = _sides(head)
    some = torch.tensor([3, 1])
    want, got = head(queries, candidates)[some], head(queries.take(some), candidates)
    _require(
        _close(want, got),
        head,
        f"a query's scores depend on the other queries, by {_gap(want, got)}",
    )


def _padding_is_invisible(head: Head) -> None:
    """Garbage where the mask is False, and one more column of it, change nothing."""
    queries, candidates = _sides(head)
    want, got = head(queries, candidates), head(_spoiled(queries), _spoiled(candidates))
    _require(_close(want, got), head, f"padding changes scores, by {_gap(want, got)}")
    if "text/tokens" not in candidates.streams:
        return
    tokens, mask = candidates["text/tokens"], candidates["text/mask"]
    if bool(mask[:, -1].any()):  # leave room for one more column within the longest possible text
        mask = mask.clone()
        mask[:, -1] = False
    short = {"text/tokens": tokens[:, :-1], "text/mask": mask[:, :-1]}
    noisy = {"text/tokens": torch.where(mask[..., None], tokens, 50.0), "text/mask": mask}
    if "text/ids" in candidates.streams:
        short["text/ids"] = candidates["text/ids"][:, :-1]
        noisy["text/ids"] = candidates["text/ids"]
    want, got = (
        head(queries, replace(candidates, streams={**candidates.streams, **text}))
        for text in (short, noisy)
    )
    _require(_close(want, got), head, f"padding of texts changes scores, by {_gap(want, got)}")


def _spoiled(features: Features) -> Features:
    """The same rows with one more column in their ragged streams, and garbage wherever there is no entry."""
    streams = dict(features.streams)
    for name in set(RAGGED) & set(streams):
        home = name.partition("/")[0]
        mask = torch.nn.functional.pad(streams[f"{home}/mask"], (0, 1))
        values = torch.nn.functional.pad(streams[name], (0, 0, 0, 1))
        streams |= {name: torch.where(mask[..., None], values, 50.0), f"{home}/mask": mask}
    return replace(features, streams=streams)


def _state_round_trips(head: Head, method: ModuleType, context: Context) -> None:
    torch.manual_seed(99)  # another start than the head's own
    twin = method.Head(head.config, context)
    twin.load_state_dict(head.state_dict())
    twin.eval()
    sides = _sides(head)
    _require(
        torch.equal(head(*sides), twin(*sides)),
        head,
        "a head rebuilt from its config, context and state_dict must score the same, bit for bit",
    )


def _bf16_stays_finite(head: Head) -> None:
    sides = _sides(head)
    want = head(*sides)
    with torch.autocast("cpu", torch.bfloat16):
        got = head(*sides)
        pairs = _sides(head, B, B)
        diagonal, paired = head(*pairs).diagonal(), head.paired(*pairs)
    _require(
        torch.equal(torch.isfinite(want), torch.isfinite(got)),
        head,
        "scores under bf16 are not finite",
    )
    _require(
        torch.allclose(diagonal.float(), paired.float(), rtol=HALF_TOLERANCE, atol=HALF_TOLERANCE),
        head,
        f"under bf16 `paired` must be the diagonal of `forward`, within {HALF_TOLERANCE:g}; they differ by "
        f"{_gap(diagonal, paired)}, as scores that are rounded to bf16 do",
    )


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())
