"""torch.utils.checkpoint around fused blocks, stages and converted models: equal, and statistics updated once."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential, set_checkpoint_early_stop

import thresholdnet as tn
from thresholdnet import ThresholdBlock, links

F64 = torch.float64
REENTRANT = [False, True]


def _norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def _step(model, run, x):
    """Output, gradients and buffers of one training step, the model called through `run`."""
    x = x.clone().requires_grad_()
    y = run(model, x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def _assert_same(model, run, x):
    """`run` against a plain call, in values, gradients and buffers."""
    expected = _step(copy.deepcopy(model), lambda module, x: module(x), x)
    found = _step(model, run, x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert all(norm.num_batches_tracked == 1 for norm in _norms(model))


@pytest.mark.parametrize("early_stop", [False, True])
@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.parametrize("recompute", [None, "bottleneck"])
@pytest.mark.parametrize("unit", ["conv_bn_relu", "bottleneck"])
def test_around_a_block(unit, recompute, reentrant, early_stop):
    torch.manual_seed(0)
    block = ThresholdBlock(7, links.threshold_ab(4, 2), 5, unit=unit, dtype=F64, norm_momentum=None)
    with set_checkpoint_early_stop(early_stop):
        _assert_same(
            block.fuse(True, "native", recompute),
            lambda module, x: checkpoint(module, x, use_reentrant=reentrant),
            torch.randn(2, 7, 5, 4, dtype=F64),
        )


def _dense(drop_rate=0.0):
    torch.manual_seed(0)
    settings = {"growth_rate": 8, "block_config": (3, 2), "num_init_features": 12, "bn_size": 2, "num_classes": 4}
    return torchvision.models.DenseNet(**settings, drop_rate=drop_rate).double()


@pytest.mark.parametrize("reentrant", REENTRANT)
def test_around_a_stage_of_a_converted_densenet(reentrant):
    """A dense block with its transition, which runs fused as well."""
    features = _dense().features
    stage = tn.convert(nn.Sequential(features.denseblock1, features.transition1), report=None)
    _assert_same(
        stage,
        lambda module, x: checkpoint(module, x, use_reentrant=reentrant),
        torch.randn(2, 12, 6, 5, dtype=F64),
    )


@pytest.mark.parametrize("reentrant", REENTRANT)
def test_checkpoint_sequential_over_a_converted_densenet(reentrant):
    """Stem, blocks and transitions in segments; BatchNorms that run outside of fused operators are torch's own."""
    features = tn.convert(_dense(), report=None).features
    outside = [features.norm0, features.norm5]
    x = torch.randn(2, 3, 40, 40, dtype=F64)
    expected = _step(copy.deepcopy(features), lambda module, x: module(x), x)
    found = _step(features, lambda module, x: checkpoint_sequential(module, 2, x, use_reentrant=reentrant), x)
    values = 2 + len(list(features.parameters()))
    for a, b in zip(found[:values], expected[:values], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert all(norm.num_batches_tracked == 1 for norm in _norms(features) if norm not in outside)


def test_dropout_draws_the_same_masks_again():
    block = tn.convert(_dense(drop_rate=0.5).features.denseblock1, report=None)
    x, results = torch.randn(2, 12, 6, 5, dtype=F64), []
    for reentrant in (None, *REENTRANT):
        torch.manual_seed(3)

        def run(module, x, reentrant=reentrant):
            return module(x) if reentrant is None else checkpoint(module, x, use_reentrant=reentrant)

        results.append(_step(copy.deepcopy(block), run, x))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_plain_torch_counts_twice():
    """What the rule spares: nn.BatchNorm2d itself cannot tell a recomputation from a forward."""
    block = ThresholdBlock(7, links.dense(2), 5)
    checkpoint(block, torch.randn(2, 7, 4, 4, requires_grad=True), use_reentrant=False).sum().backward()
    assert all(norm.num_batches_tracked == 2 for norm in _norms(block))


def test_statistics_between_backward_passes_count():
    """A backward pass that has ended leaves nothing behind: the next forward is a forward."""
    block = ThresholdBlock(7, links.dense(2), 5, fused=True, backend="native")
    x = torch.randn(2, 7, 4, 4, requires_grad=True)
    for _ in range(2):
        checkpoint(block, x, use_reentrant=False).sum().backward()
    assert all(norm.num_batches_tracked == 2 for norm in _norms(block))


def _compiled_inside(module, x):
    return torch.compile(lambda x: checkpoint(module, x, use_reentrant=False), backend="aot_eager")(x)


def _compiled_around(module, x):
    return checkpoint(torch.compile(module, backend="aot_eager"), x, use_reentrant=False)


@pytest.mark.parametrize(("run", "updates"), [(_compiled_inside, 1), (_compiled_around, 2)])
def test_compiled(run, updates):
    """A checkpoint inside of what is compiled counts once; around it twice, since a graph cannot tell."""
    torch.manual_seed(0)
    block = ThresholdBlock(7, links.threshold_ab(4, 2), 5, dtype=F64, fused=True, backend="native")
    x = torch.randn(2, 7, 5, 4, dtype=F64)
    expected = _step(copy.deepcopy(block), lambda module, x: module(x), x)
    found = _step(block, run, x)
    values = 2 + len(list(block.parameters()))
    for a, b in zip(found[:values], expected[:values], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert all(norm.num_batches_tracked == updates for norm in _norms(block))
