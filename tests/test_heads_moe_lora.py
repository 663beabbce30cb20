"""Experts that every token chooses among: equal to a loop over tokens and experts, values and gradients."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heads.blocks.moe import MoELoRA, Router, isolation
from heads.errors import ConfigError

W, R, E = 12, 3, 5


def made(*, n_shared: int = 1, top_k: int = 2, scale: float = 1.0, dropout: float = 0.0) -> MoELoRA:
    torch.manual_seed(0)
    moe = MoELoRA(
        W, n_experts=E, n_shared=n_shared, rank=R, top_k=top_k, scale=scale, dropout=dropout
    )
    nn.init.normal_(moe.up)
    nn.init.normal_(moe.router.weight)
    return moe


def by_loop(moe: MoELoRA, u: Tensor, top_k: int) -> Tensor:
    """G = softmax(TopK(W_r u)); Σ_s B_s A_s u + Σ_e G_e B_e A_e u, token by token."""
    out = []
    for token in u.reshape(-1, W):
        logits = moe.router.weight @ token
        kept = logits.argsort(descending=True)[:top_k]
        gate = logits[kept].softmax(0)
        total = torch.zeros(W)
        for s in range(moe.n_shared):
            total = total + moe.up[s].T @ (moe.down[s] @ token)
        for g, e in zip(gate, kept.tolist(), strict=True):
            n = moe.n_shared + e
            total = total + g * (moe.up[n].T @ (moe.down[n] @ token))
        out.append(moe.scale * total)
    return torch.stack(out).view_as(u)


@pytest.mark.parametrize("n_shared", [0, 1, 2])
@pytest.mark.parametrize("top_k", [1, 2, E])
def test_two_matrix_products_are_the_loop_over_experts(n_shared: int, top_k: int) -> None:
    moe, u = made(n_shared=n_shared, top_k=top_k, scale=0.7), torch.randn(3, 4, W)
    got, want = moe(u), by_loop(moe, u, top_k)
    assert torch.allclose(got, want, atol=1e-5)
    grads = [
        torch.autograd.grad(out.pow(2).sum(), [*moe.parameters()], allow_unused=True)
        for out in (got, want)
    ]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, torch.zeros_like(a) if b is None else b, atol=1e-3, rtol=1e-4)


def test_shares_are_of_top_k_experts_and_sum_to_one() -> None:
    share = made(top_k=2).router(torch.randn(50, W))
    assert torch.equal((share > 0).sum(-1), torch.full((50,), 2))
    assert torch.allclose(share.sum(-1), torch.ones(50))


def test_the_router_reads_the_state_as_it_is_or_normed() -> None:
    u = 5 + 3 * torch.randn(4, W)
    plain, normed = Router(E, W, normed=False), Router(E, W)
    assert torch.allclose(plain(u), (u @ plain.weight.T).softmax(-1))
    assert torch.allclose(normed(u), (F.layer_norm(u, (W,)) @ normed.weight.T).softmax(-1))


def test_nothing_at_first_and_every_router_row_learns_where_all_experts_are_kept() -> None:
    moe = MoELoRA(W, n_experts=E, n_shared=1, rank=R, top_k=E)
    u = torch.randn(6, W)
    assert torch.equal(moe(u), torch.zeros(6, W))
    nn.init.normal_(moe.up)
    moe(u).pow(2).sum().backward()
    assert moe.router.weight.grad is not None
    assert bool((moe.router.weight.grad != 0).any(-1).all())


def test_each_expert_by_itself() -> None:
    moe, u = made(scale=0.5), torch.randn(2, 3, W)
    each = moe.each(u)
    assert each.shape == (2, 3, 1 + E, W)
    for e in range(1 + E):
        assert torch.allclose(each[:, :, e], 0.5 * (u @ moe.down[e].T @ moe.up[e]), atol=1e-5)


def test_dropout_is_of_training_alone() -> None:
    moe, u = made(dropout=0.5), torch.randn(8, W)
    assert not torch.equal(moe(u), moe(u))
    moe.eval()
    assert torch.equal(moe(u), moe(u))


def test_half_precision_keeps_the_shares_in_full() -> None:
    moe, u = made(), torch.randn(8, W)
    with torch.autocast("cpu", torch.bfloat16):
        assert moe.router(u).dtype == torch.float32
        assert torch.allclose(moe(u).float(), moe(u.clone()).float())
    assert torch.allclose(moe(u), by_loop(moe, u, 2), atol=1e-5)


def test_parameters_of_a_block_of_vit_l() -> None:
    moe = MoELoRA(1024, n_experts=8, n_shared=1, rank=16, top_k=2)
    assert sum(p.numel() for p in moe.parameters()) == 303_104


def test_experts_that_read_nothing_in_common_are_isolated() -> None:
    apart = torch.eye(6).view(3, 2, 6)
    assert float(isolation(apart)) == 0.0
    alike = torch.ones(3, 1, 6)
    assert float(isolation(alike)) == pytest.approx(1.0)
    some, total = torch.randn(3, 2, 6), 0.0
    for i in range(3):
        for j in range(3):
            if i != j:
                cosines = [
                    float(F.cosine_similarity(a, b, dim=0)) ** 2 for a in some[i] for b in some[j]
                ]
                total += sum(cosines) / 4
    assert float(isolation(some)) == pytest.approx(total / 6, rel=1e-4)


def test_more_experts_kept_than_there_are() -> None:
    with pytest.raises(ConfigError, match="top_k is 6, but there are 5"):
        made(top_k=6)
