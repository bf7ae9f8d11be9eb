"""torch.amp.GradScaler with fp16 and bf16 autocast around fused blocks and converted models."""

import copy

import pytest
import torch
from torch import nn
from twins import MODELS, pair

HALVES = [torch.float16, torch.bfloat16]


def _train(model, half, poison=None, steps=4):
    """Losses, weights and the scaler after some steps; an infinite loss at step `poison`."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(1)
    losses, taken = [], []
    for step in range(steps):
        x = torch.randn(8, 5, 8, 8, generator=generator)
        with torch.autocast("cpu", half):
            y = model(x)
        target = torch.randn(y.shape, generator=generator)
        loss = nn.functional.mse_loss(y.float(), target)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        scaler.scale(loss * float("inf") if step == poison else loss).backward()
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        scaler.step(optimizer)
        scaler.update()
        taken.append(any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)))
        losses.append(loss.item())
    return losses, [p.detach() for p in model.parameters()], taken, scaler.get_scale()


def _gradient(model, half):
    """Of one scaled step, unscaled; float32 throughout for None."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=half is not None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x = torch.randn(8, 5, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", half, enabled=half is not None):
        y = model(x)
    scaler.scale((y.float() - torch.linspace(-1, 1, y.numel()).view(y.shape)).square().mean()).backward()
    scaler.unscale_(optimizer)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", MODELS)
def test_unscaled_gradients_are_as_near_to_float32_as_plain_ones(name, half):
    plain, fused = pair(name)
    exact = _gradient(copy.deepcopy(plain), None)
    theirs, ours = ((_gradient(m, half) - exact).norm() / exact.norm() for m in (plain, fused))
    print(f"{name} {half}: off by {ours:.4f}, plain by {theirs:.4f}")
    assert theirs < 0.5  # else the bound would say nothing
    assert ours < 2 * theirs + 0.02


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", MODELS)
def test_steps_are_taken_and_the_scale_grows(name, half):
    plain, fused = pair(name)
    losses, _, taken, scale = _train(fused, half)
    assert taken == [True] * 4 and scale == 2.0**11  # once, after three good steps
    assert losses[0] == pytest.approx(_train(plain, half)[0][0], rel=0.02)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", MODELS)
def test_an_infinite_loss_skips_its_step(name, half):
    _, fused = pair(name)
    losses, weights, taken, scale = _train(fused, half, poison=1)
    assert taken == [True, False, True, True] and scale == 2.0**9
    assert all(weight.isfinite().all() for weight in weights)
    assert torch.tensor(losses).isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_gradients_beyond_half_precision_skip_their_step(name):
    """A scale that takes the block's own float16 gradients over 65504: found, halved, and training goes on."""
    _, model = pair(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, backoff_factor=2.0**-14)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x, skipped = torch.randn(8, 5, 8, 8), []
    for _ in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        with torch.autocast("cpu", torch.float16):
            loss = model(x).float().square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        skipped.append(all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)))
    assert skipped[0] and not skipped[-1]
    assert all(p.isfinite().all() for p in model.parameters())
