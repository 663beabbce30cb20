"""φ networks against slow loops over the tensors that others publish; their targets; MDM; published files."""

import argparse
import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from heads.base import Context
from heads.blocks.inversion import (
    ContextI2W,
    image_rows,
    network,
    pic2word,
    searle,
    uniform_gaussian,
)
from heads.blocks.inversion_targets import distillation, invert, pair_contrastive
from heads.blocks.modulation import Modulation
from heads.blocks.published_phi import read_phi
from heads.blocks.readout import Readout
from heads.errors import CheckpointMismatch, ConfigError

B, N, D, V, W = 3, 5, 6, 7, 10


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- what others publish, with their keys (literal, from the code that writes the files) and our small widths ------

PIC2WORD = {
    "layers.0.0.weight": (512, D),
    "layers.0.0.bias": (512,),
    "layers.1.0.weight": (512, 512),
    "layers.1.0.bias": (512,),
    "fc_out.weight": (V, 512),
    "fc_out.bias": (V,),
}
SEARLE = {
    "layers.0.weight": (4 * D, D),
    "layers.0.bias": (4 * D,),
    "layers.3.weight": (4 * D, 4 * D),
    "layers.3.bias": (4 * D,),
    "layers.6.weight": (V, 4 * D),
    "layers.6.bias": (V,),
}
CONTEXT_I2W: dict[str, tuple[int, ...]] = {
    **PIC2WORD,
    **{
        k.replace("layers", "layers_local").replace("fc_out", "fc_out_local"): s
        for k, s in PIC2WORD.items()
    },
    "to_c.weight": (W, D),
    "W_R.weight_g": (W, 1),
    "W_R.weight_v": (W, W),
    "ln_post.weight": (W,),
    "ln_post.bias": (W,),
    "ln_post_local.weight": (W,),
    "ln_post_local.bias": (W,),
    "proj": (W, D),
    "proj_local": (W, D),
    "local_gate": (1,),
    "VT_Extractor.latents": (4, W),
    "VT_Extractor.norm.weight": (W,),
    "VT_Extractor.norm.bias": (W,),
    **{
        f"VT_Extractor.layers.{i}.{key}": shape
        for i in range(6)
        for key, shape in {
            "0.norm_media.weight": (W,),
            "0.norm_media.bias": (W,),
            "0.norm_latents.weight": (W,),
            "0.norm_latents.bias": (W,),
            "0.to_q.weight": (512, W),
            "0.to_kv.weight": (1024, W),
            "0.to_out.weight": (W, 512),
            "1.0.weight": (W,),
            "1.0.bias": (W,),
            "1.1.weight": (4 * W, W),
            "1.3.weight": (W, 4 * W),
        }.items()
    },
}
KEYS: dict[str, Any] = {"pic2word": PIC2WORD, "searle": SEARLE, "context_i2w": CONTEXT_I2W}


def published(kind: str, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of a published network; nothing is 0 or 1 by chance, the gate least of all."""
    g = torch.Generator().manual_seed(seed)
    return {
        k: torch.randn(s, generator=g) / math.sqrt(s[-1] if len(s) > 1 else 4)
        for k, s in KEYS[kind].items()
    }


def write(path: Path, kind: str, state: dict[str, Tensor], module: str = "") -> Path:
    """A file as the authors' code writes it, or the network alone as safetensors."""
    state = {module + k: v for k, v in state.items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif kind == "searle":
        torch.save({"epoch": 3, "Phi": state}, path)
    else:
        optimizer = {"state": {}, "param_groups": [{"lr": np.float64(1e-4), "params": [0]}]}
        clip = {"module.visual.proj": torch.ones(2, 3)}
        held = {"epoch": 3, "name": "run", "state_dict": clip, "state_dict_img2text": state}
        torch.save({**held, "optimizer": optimizer}, path)
    return path


def loaded(kind: Any, state: dict[str, Tensor], folder: Path) -> Any:
    """Our network with the weights of a published file, in float64, in evaluation mode."""
    found, ours = read_phi(write(folder / "phi.pt", kind, state, "module."), D, V)
    assert found == kind
    module = network(kind, D, V, W)
    module.load_state_dict(ours)
    return module.double().eval()


# --- the equations, one image at a time, on the published tensors ---------------------------------------------------


def slow_linear(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight, bias = p[f"{name}.weight"], p.get(f"{name}.bias")
    return weight @ x if bias is None else weight @ x + bias


def slow_norm(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    off = x - x.mean()
    return off / (off.square().mean() + 1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def slow_gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def slow_pic2word(p: dict[str, Tensor], f: Tensor, local: str = "") -> Tensor:
    for i in range(2):
        f = slow_linear(p, f"layers{local}.{i}.0", f)
        f = torch.where(f > 0, f, 0.0)
    return slow_linear(p, f"fc_out{local}", f)


def slow_searle(p: dict[str, Tensor], f: Tensor) -> Tensor:
    h = slow_gelu(slow_linear(p, "layers.0", f))
    return slow_linear(p, "layers.6", slow_gelu(slow_linear(p, "layers.3", h)))


def slow_look(p: dict[str, Tensor], at: str, z: list[Tensor], x: list[Tensor]) -> list[Tensor]:
    """4 latents after one block: each head of each latent over all patches and latents."""
    latents = [slow_norm(p, f"{at}.0.norm_latents", row) for row in z]
    keys = [slow_norm(p, f"{at}.0.norm_media", row) for row in x] + latents
    kv = [slow_linear(p, f"{at}.0.to_kv", row) for row in keys]
    out = []
    for row, normed in zip(z, latents, strict=True):
        q, heads = slow_linear(p, f"{at}.0.to_q", normed), []
        for h in range(8):
            part = slice(64 * h, 64 * h + 64)
            logits = torch.stack([q[part] @ k[:512][part] / 8 for k in kv])
            share = logits.exp() / logits.exp().sum()
            heads.append(sum(s * k[512:][part] for s, k in zip(share, kv, strict=True)))
        y = row + slow_linear(p, f"{at}.0.to_out", torch.cat(heads))
        hidden = slow_gelu(slow_linear(p, f"{at}.1.1", slow_norm(p, f"{at}.1.0", y)))
        out.append(y + slow_linear(p, f"{at}.1.3", hidden))
    return out


def slow_context(p: dict[str, Tensor], rows: Tensor, caption: Tensor) -> Tensor:
    c = slow_linear(p, "to_c", caption)
    lengths = [p["W_R.weight_v"][i].square().sum().sqrt() for i in range(W)]
    turn = torch.stack(
        [p["W_R.weight_g"][i, 0] * p["W_R.weight_v"][i] / lengths[i] for i in range(W)]
    )
    x = [(turn @ row) * c for row in rows]
    whole = slow_pic2word(p, slow_norm(p, "ln_post", x[0]) @ p["proj"])
    z = list(p["VT_Extractor.latents"])
    for i in range(6):
        z = slow_look(p, f"VT_Extractor.layers.{i}", z, x[1:])
    mean = torch.stack([slow_norm(p, "VT_Extractor.norm", row) for row in z]).mean(0)
    local = slow_pic2word(p, slow_norm(p, "ln_post_local", mean) @ p["proj_local"], "_local")
    return whole + torch.tanh(p["local_gate"]) * local


def slow(kind: str, p: dict[str, Tensor], *inputs: Tensor) -> Tensor:
    of_one = {"pic2word": slow_pic2word, "searle": slow_searle, "context_i2w": slow_context}[kind]
    return torch.stack([of_one(p, *row) for row in zip(*inputs, strict=True)])


@pytest.mark.parametrize("kind", KEYS)
def test_a_published_network_computes_its_equations(kind: str, tmp_path: Path) -> None:
    """Values and gradients, of inputs and of every published tensor, through the file."""
    state, b = published(kind), 2
    module = loaded(kind, state, tmp_path)
    inputs = [drawn(b, D)]
    if kind == "context_i2w":
        inputs = [drawn(b, 1 + N, W, seed=1), drawn(b, D)]
    wished, weights = drawn(b, V, seed=2), {k: v.double() for k, v in state.items()}
    for t in (*inputs, *weights.values()):
        t.requires_grad_()
    expected = slow(kind, weights, *inputs)
    slow_grads = torch.autograd.grad((expected * wished).sum(), [*inputs, *weights.values()])
    found = module(*inputs)
    torch.testing.assert_close(found, expected)
    ours = list(module.parameters())
    grads = torch.autograd.grad((found * wished).sum(), [*inputs, *ours])
    for ours_grad, slow_grad in zip(grads[: len(inputs)], slow_grads[: len(inputs)], strict=True):
        torch.testing.assert_close(ours_grad, slow_grad)
    # A published tensor and ours are the same one if their values are: all were drawn apart.
    by_value = {
        round(float(p.detach().sum()), 6): g
        for p, g in zip(ours, grads[len(inputs) :], strict=True)
    }
    assert len(by_value) == len(ours) == len(weights)
    for weight, grad in zip(weights.values(), slow_grads[len(inputs) :], strict=True):
        torch.testing.assert_close(by_value[round(float(weight.detach().sum()), 6)], grad)


# --- counts, starts, modes ------------------------------------------------------------------------------------------


def test_parameters_at_l14_are_the_papers() -> None:
    with torch.device("meta"):
        assert count(pic2word(768, 768)) == 1_050_368
        assert count(searle(768, 768)) == count(network("lincir", 768, 768)) == 14_162_688
        assert count(network("context_i2w", 768, 768, 1024)) == 68_471_297
        assert count(Modulation("diag", 768)) == 1_536
        assert count(Modulation("full", 768)) == 590_592


def test_context_i2w_starts_as_its_global_branch() -> None:
    module = ContextI2W(W, D, V).eval()
    tokens, caption = drawn(B, 1 + N, W).float(), drawn(B, D).float()
    torch.testing.assert_close(module(tokens, caption), module.global_branch(tokens, caption))
    with torch.no_grad():
        module.gate.fill_(0.5)
    assert not torch.allclose(module(tokens, caption), module.global_branch(tokens, caption))


def test_every_parameter_of_context_i2w_gets_a_gradient_once_the_gate_is_open() -> None:
    module = ContextI2W(W, D, V)
    wished = drawn(B, V).float()
    trained = {}
    for gate in (0.0, 0.3):
        with torch.no_grad():
            module.gate.fill_(gate)
        loss = (module(drawn(B, 1 + N, W).float(), drawn(B, D).float()) * wished).sum()
        grads = torch.autograd.grad(loss, list(module.parameters()))
        names = [name for name, _ in module.named_parameters()]
        trained[gate] = {n for n, g in zip(names, grads, strict=True) if bool((g != 0).any())}
    every = set(names)
    local = {n for n in every if n.startswith(("local_", "latents", "blocks."))}
    assert trained[0.3] == every
    assert trained[0.0] == every - local
    assert "gate" in trained[0.0]


def test_the_map_of_context_i2w_starts_as_a_linear_layer_and_keeps_the_lengths_it_learns() -> None:
    module = ContextI2W(W, D, V)
    with torch.no_grad():
        lengths = module.turn.norm(dim=1, keepdim=True)
        torch.testing.assert_close(module.turn_length, lengths)
        tokens, caption = drawn(B, 1 + N, W).float(), drawn(B, D).float()
        before = module.global_branch(tokens, caption) if module.eval() else None
        module.turn.mul_(3.0)
        torch.testing.assert_close(module.global_branch(tokens, caption), before)


def test_masked_rows_are_invisible() -> None:
    module = ContextI2W(W, D, V).eval()
    with torch.no_grad():
        module.gate.fill_(1.0)
    tokens, caption = drawn(B, 1 + N, W).float(), drawn(B, D).float()
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [True] + [False] * 5])
    dirty = torch.where(mask[..., None], tokens, 1e3)
    found = module(dirty, caption, mask)
    for i in range(B):
        alone = module(tokens[i : i + 1][:, mask[i]], caption[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], alone)
    assert not torch.allclose(found[1], module(tokens, caption)[1], rtol=1e-3)
    torch.testing.assert_close(
        module(tokens, caption, torch.ones_like(mask)), module(tokens, caption)
    )


@pytest.mark.parametrize("kind", ["pic2word", "searle", "lincir"])
def test_dropout_is_off_in_evaluation_and_rows_do_not_see_each_other(kind: Any) -> None:
    module, f = network(kind, D, V), drawn(B, D).float()
    assert not torch.equal(module(f), module(f))
    module.eval()
    assert torch.equal(module(f), module(f))
    torch.testing.assert_close(module(f)[1:], module(f[1:]))
    assert not torch.allclose(module(f), module(2 * f))  # it is not normalised on the way


@pytest.mark.parametrize(("kind", "dropped"), [("pic2word", 0.1), ("searle", 0.5)])
def test_dropout_leaves_out_the_papers_share(kind: Any, dropped: float) -> None:
    drop = [m for m in network(kind, D, V).modules() if isinstance(m, nn.Dropout)]
    assert [m.p for m in drop] == [dropped, dropped]


def test_context_i2w_needs_the_width_of_rows() -> None:
    with pytest.raises(ConfigError, match="width"):
        network("context_i2w", D, V)


# --- rows of an image -----------------------------------------------------------------------------------------------


def test_the_first_row_is_what_the_backbone_pools(contexts: dict[str, Context]) -> None:
    pooled = set()
    for family, context in contexts.items():
        readout = Readout(context.readout)
        p, w = context.shapes.get("image/prefix", (0, 0))[0], context.shapes["image/patches"][1]
        p += not readout.pools_all_rows()  # a register behind the class token
        prefix = drawn(B, p, w).float() if p else None
        patches = drawn(B, N, w, seed=1).float()
        mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] * 4 + [False]])
        rows, real = image_rows(readout, prefix, patches, mask)
        assert torch.equal(rows[:, 1:], patches), family
        assert real is not None
        assert torch.equal(real[:, 1:], mask)
        assert bool(real[:, 0].all())
        assert image_rows(readout, prefix, patches)[1] is None
        if not readout.pools_all_rows():
            assert prefix is not None
            assert torch.equal(rows[:, 0], prefix[:, 0])
            pooled.add("class")
            continue
        pooled.add("query")
        for i in range(B):
            own = patches[i : i + 1][:, mask[i]]
            own = own if prefix is None else torch.cat([prefix[i : i + 1], own], 1)
            torch.testing.assert_close(rows[i : i + 1, 0], readout.view(own))
    assert pooled == {"class", "query"}


def test_rows_without_a_class_token_or_a_query_are_refused() -> None:
    with pytest.raises(ConfigError, match="no prefix row"):
        image_rows(Readout({}), None, drawn(B, N, W).float())


# --- LinCIR's noise -------------------------------------------------------------------------------------------------


def test_noise_is_a_uniform_share_of_a_gaussian_for_every_item() -> None:
    f = drawn(400, 900).float()
    noise = uniform_gaussian(f, torch.Generator().manual_seed(3)) - f
    u = noise.std(1)  # of one item: its u
    assert float(u.min()) < 0.02
    assert 0.98 < float(u.max()) < 1.1
    assert float(u.mean()) == pytest.approx(0.5, abs=0.05)
    n = noise / u[:, None]
    assert float(n.mean()) == pytest.approx(0.0, abs=0.01)
    assert float((n.abs() < 1).float().mean()) == pytest.approx(0.6827, abs=0.01)
    again = uniform_gaussian(f, torch.Generator().manual_seed(3))
    assert torch.equal(again - f, noise)


# --- targets --------------------------------------------------------------------------------------------------------


def tower(seed: int = 0) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A small text tower, one to one from V to D, and pseudo-words that it is asked to find."""
    weight, bias = drawn(9, 4, seed=seed).float() / 2, drawn(9, seed=seed + 1).float() / 2
    return lambda v: torch.tanh(v @ weight.T + bias), drawn(B, 4, seed=seed + 2).float() / 2


def test_targets_reach_the_words_that_made_the_embeddings() -> None:
    encode, true = tower()
    images = 3.0 * encode(true)  # lengths do not matter
    found = invert(encode, images, 4, steps=1200, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, true, atol=0.02, rtol=0.0)
    assert not found.requires_grad


def test_more_steps_come_closer() -> None:
    encode, true = tower()
    images = encode(true)
    apart = []
    for steps in (0, 50, 350):
        g = torch.Generator().manual_seed(0)
        found = invert(encode, images, 4, steps=steps, generator=g)
        apart.append(float((1 - torch.cosine_similarity(encode(found), images)).mean()))
    assert apart[0] > 2 * apart[1] > 4 * apart[2]
    assert apart[2] < 0.01


def test_targets_follow_the_optimizer_written_out() -> None:
    """AdamW and the moving average by hand, over five steps, with phrases."""
    encode, true = tower()
    images, other = encode(true), encode(0.5 * true + 1)

    def phrases(v: Tensor) -> tuple[Tensor, Tensor]:
        return encode(-v), other

    found = invert(encode, images, 4, phrases, steps=5, generator=torch.Generator().manual_seed(7))
    v = 0.02 * torch.randn(B, 4, generator=torch.Generator().manual_seed(7))
    m, s, average = torch.zeros_like(v), torch.zeros_like(v), v.clone()
    for step in range(1, 6):
        v.requires_grad_()
        loss = torch.zeros(())
        for i in range(B):
            a, b = encode(v[i]), encode(-v[i])
            loss = loss + 1 - a @ images[i] / (a.norm() * images[i].norm())
            loss = loss + 0.5 * (1 - b @ other[i] / (b.norm() * other[i].norm()))
        (g,) = torch.autograd.grad(loss, [v])
        v = v.detach() * (1 - 2e-2 * 0.01)
        m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g * g
        v = v - 2e-2 * (m / (1 - 0.9**step)) / ((s / (1 - 0.999**step)).sqrt() + 1e-8)
        average = 0.99 * average + 0.01 * v
    torch.testing.assert_close(found, average, atol=1e-6, rtol=1e-4)


def test_a_target_does_not_hang_on_the_other_images_and_leaves_the_tower_alone() -> None:
    _, true = tower()
    linear = nn.Linear(4, 9)
    images = linear(true).detach()
    changed = torch.cat([images[:1], -images[1:]])
    with torch.no_grad():
        one, two = (
            invert(linear, x, 4, steps=20, generator=torch.Generator().manual_seed(0))
            for x in (images, changed)
        )
    torch.testing.assert_close(one[0], two[0])
    assert not torch.allclose(one[1:], two[1:])
    assert linear.weight.grad is None


def test_distillation_is_the_slow_loop() -> None:
    found, targets = drawn(B, V).float().requires_grad_(), drawn(B, V, seed=1).float()
    before, after = drawn(B, D, seed=2).float(), drawn(B, D, seed=3).float().requires_grad_()
    loss, parts = distillation(found, targets, (after, before))
    every = [*(t / t.norm() for t in targets), *(t / t.norm() for t in found)]
    contrast = torch.zeros(())
    for i in range(2 * B):
        partner = (i + B) % (2 * B)
        below = sum(torch.exp(every[i] @ every[j] / 0.25) for j in range(2 * B) if j != i)
        contrast = contrast - torch.log(torch.exp(every[i] @ every[partner] / 0.25) / below)
    contrast = contrast / (2 * B)
    phrase: Any = (
        sum(1 - a @ b / (a.norm() * b.norm()) for a, b in zip(after, before, strict=True)) / B
    )
    expected = contrast + 0.75 * phrase
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(parts["distillation_loss"], contrast.detach())
    torch.testing.assert_close(parts["phrase_loss"], phrase.detach())
    for a, b in zip(
        torch.autograd.grad(loss, [found, after]),
        torch.autograd.grad(expected, [found, after]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(distillation(found, targets)[0], contrast)


def test_a_single_pair_has_nothing_to_be_told_from() -> None:
    assert float(pair_contrastive(drawn(1, V), drawn(1, V, seed=1), 0.25)) == 0.0


# --- MDM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["diag", "full"])
def test_modulation_starts_as_the_identity_bit_for_bit(kind: Any) -> None:
    module = Modulation(kind, D)
    for f in (drawn(B, D).float(), 1e30 * drawn(B, N, D).float(), 1e-30 * drawn(B, D).float()):
        assert torch.equal(module(f), f)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(f), f)


def test_modulation_computes_its_equations() -> None:
    f = drawn(B, D).float()
    gain, shift, matrix = (drawn(*s, seed=i).float() for i, s in enumerate([(D,), (D,), (D, D)]))
    kinds: list[tuple[Any, Tensor]] = [("diag", gain), ("full", matrix)]
    for kind, weight in kinds:
        module = Modulation(kind, D)
        with torch.no_grad():
            module.gain.copy_(weight)
            module.shift.copy_(shift)
        whole = torch.diag(gain) if kind == "diag" else matrix
        expected = torch.stack([whole @ row + shift for row in f])
        found = module(f)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(module(f[:, None].expand(-1, 2, -1))[:, 1], expected)
        wished = drawn(B, D, seed=5).float()
        (found * wished).sum().backward()
        outer = wished.T @ f
        assert module.gain.grad is not None
        torch.testing.assert_close(module.gain.grad, outer.diagonal() if kind == "diag" else outer)
        torch.testing.assert_close(module.shift.grad, wished.sum(0))


# --- published files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("module", ["", "module."])
@pytest.mark.parametrize("kind", KEYS)
def test_published_files_are_read(kind: Any, module: str, suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"phi{suffix}", kind, published(kind), module)
    found, state = read_phi(path, D, V)
    assert found == kind
    fresh = network(kind, D, V, W)
    fresh.load_state_dict(state)  # strict: all of them, and no more
    path.write_bytes(b"")  # the state does not lean on the file
    assert all(bool(v.isfinite().all()) for v in state.values())


def test_a_half_precision_file_is_read_as_float32(tmp_path: Path) -> None:
    half = {k: v.half() for k, v in published("searle").items()}
    _, state = read_phi(write(tmp_path / "phi.pt", "searle", half), D, V)
    assert {v.dtype for v in state.values()} == {torch.float32}
    assert torch.equal(state["layers.6.bias"], half["layers.6.bias"].float())


def test_numbers_of_numpy_1_beside_the_network_are_let_through(tmp_path: Path) -> None:
    """Pic2Word's optimizer holds one; numpy 1 has another name for what makes it."""
    path = write(tmp_path / "new.pt", "pic2word", published("pic2word"))
    old = tmp_path / "old.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(old, "w") as out:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in data
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            out.writestr(name, data)
    assert read_phi(old, D, V)[0] == "pic2word"


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize(("d", "v"), [(D + 1, V), (D, V + 2)])
def test_another_backbones_weights_are_refused(kind: str, d: int, v: int, tmp_path: Path) -> None:
    path = write(tmp_path / "phi.pt", kind, published(kind))
    with pytest.raises(CheckpointMismatch, match=rf"{kind} .*D = {d} and V = {v}.* is \(.* not \("):
        read_phi(path, d, v)


def test_unknown_keys_are_named(tmp_path: Path) -> None:
    state = published("searle")
    state["layers.9.weight"] = state.pop("layers.6.weight")
    path = write(tmp_path / "phi.pt", "searle", state)
    with pytest.raises(
        CheckpointMismatch, match=r"layers\.9\.weight more .*lacks layers\.6\.weight"
    ):
        read_phi(path, D, V)


def test_a_file_of_something_else_says_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    torch.save({"epoch": 1, "model": {"a": torch.ones(2)}}, path)
    with pytest.raises(CheckpointMismatch, match=r"holds epoch, model, and neither"):
        read_phi(path, D, V)
    torch.save([torch.ones(2)], path)
    with pytest.raises(CheckpointMismatch, match="holds a list"):
        read_phi(path, D, V)
    torch.save({}, path)
    with pytest.raises(CheckpointMismatch, match="holds nothing"):
        read_phi(path, D, V)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    for name in ("phi.pt", "phi.safetensors"):
        path = write(tmp_path / name, "searle", published("searle"))
        path.write_bytes(path.read_bytes()[:300])
        with pytest.raises(CheckpointMismatch, match="fetch the file again"):
            read_phi(path, D, V)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        read_phi(tmp_path / "nowhere.pt", D, V)


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("bad", ["nan", "meta", "sparse", "int"])
def test_tensors_that_are_no_numbers_are_refused(bad: str, tmp_path: Path) -> None:
    state = published("searle")
    weight = state["layers.3.weight"]
    state["layers.3.weight"] = {
        "nan": weight.index_fill(1, torch.tensor([2]), torch.nan),
        "meta": weight.to("meta"),
        "sparse": weight.to_sparse(),
        "int": weight.long(),
    }[bad]
    with pytest.raises(CheckpointMismatch, match=r"layers\.3\.weight holds"):
        read_phi(write(tmp_path / "phi.pt", "searle", state), D, V)


class Evil:
    """Runs something when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_runs_something_is_refused_and_runs_nothing(
    zipped: bool, tmp_path: Path
) -> None:
    mark, path = tmp_path / "ran", tmp_path / "phi.pt"
    held = {"Phi": published("searle"), "more": Evil(mark)}
    torch.save(held, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointMismatch, match=r"wants to run \w+\.mkdir"):
        read_phi(path, D, V)
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["pic2word", "searle"])
def test_the_advice_for_a_refused_file_works(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "phi.pt", kind, published(kind), "module.")
    held = torch.load(path, weights_only=False)
    torch.save({**held, "args": argparse.Namespace(lr=1e-4)}, path)
    with pytest.raises(CheckpointMismatch, match="Namespace") as caught:
        read_phi(path, D, V)
    command = str(caught.value).partition('python -c "')[2].removesuffix('"')
    exec(command, {})
    assert read_phi(path.with_suffix(".safetensors"), D, V)[0] == kind
