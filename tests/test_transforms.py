"""torch.func over fused blocks and converted models against the same over plain ones, and what forward mode says."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from twins import MODELS, pair

import thresholdnet as tn
from thresholdnet.transforms import FORWARD_MODE

F64 = torch.float64


def _pair(name):
    """A plain model in eval mode, and the same fused; images [N, 5, 8, 8] in."""
    plain, fused = pair(name)
    for model in (plain, fused):
        torch.manual_seed(1)
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    return plain.double().eval(), fused.double().eval()


def _images(batch=3):
    return torch.randn(batch, 5, 8, 8, dtype=F64, generator=torch.Generator().manual_seed(2))


def _state(model):
    return {k: v.detach() for k, v in model.named_parameters()}, dict(model.named_buffers())


def _loss(model):
    """Of one image [C, H, W]."""
    return lambda parameters, x: functional_call(model, parameters, (x[None],)).square().sum()


def _assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_gradients_per_sample(name):
    results = []
    for model in _pair(name):
        parameters, _ = _state(model)
        x, loss = _images(), _loss(model)
        results.append([
            grad(loss)(parameters, x[0]),
            vmap(grad(loss), (None, 0))(parameters, x),  # the batch axis is mapped over
            grad(lambda p, loss=loss, x=x: vmap(loss, (None, 0))(p, x).mean())(parameters),
            vmap(grad(loss, argnums=1), (None, 0), chunk_size=2)(parameters, x),
        ])  # fmt: skip
    plain, fused = results
    _assert_same(fused, plain)


@pytest.mark.parametrize("name", MODELS)
def test_jacobians_by_reverse_mode(name):
    results = []
    for model in _pair(name):
        x = _images(2)
        y, pull = vjp(model, x)
        jacobian = jacrev(lambda x, model=model: model(x).reshape(2, -1)[:, :3], chunk_size=4)(x)
        results.append([y, pull(torch.ones_like(y))[0], jacobian])
    plain, fused = results
    _assert_same(fused, plain)


@pytest.mark.parametrize("name", MODELS)
def test_an_ensemble_under_vmap(name):
    """Parameters and statistics are mapped over; gradients arrive at the stacked ones, by plain autograd."""
    results = []
    for model in _pair(name):
        torch.manual_seed(3)
        twin = copy.deepcopy(model)
        for parameter in twin.parameters():
            nn.init.normal_(parameter, std=0.5)
        parameters, buffers = stack_module_state([model, twin])

        def run(p, b, x, model=model):
            return functional_call(model, (p, b), (x,))

        y = vmap(run, (0, 0, None))(parameters, buffers, _images())
        results.append([y, *torch.autograd.grad(y.square().sum(), list(parameters.values()))])
    plain, fused = results
    _assert_same(fused, plain)


@pytest.mark.parametrize("name", MODELS)
def test_training_mode_with_its_buffers_given(name):
    results = []
    for model in _pair(name):
        parameters, buffers = _state(model.train())

        def loss(p, b, x, model=model):
            return functional_call(model, (p, b), (x,)).square().sum()

        results.append([grad(loss)(parameters, buffers, _images()), dict(model.named_buffers())])
    plain, fused = results
    _assert_same(fused, plain)
    assert all(v == 1 for k, v in fused[1].items() if k.endswith("num_batches_tracked"))


def test_training_mode_per_sample_without_running_statistics():
    results = []
    for model in _pair("bottleneck"):
        parameters, _ = _state(torch.func.replace_all_batch_norm_modules_(model.train()))
        results.append(vmap(grad(_loss(model)), (None, 0))(parameters, _images()))
    _assert_same(results[1], results[0])


def test_training_mode_with_captured_buffers_raises_as_torch_does():
    for model in _pair("bottleneck"):
        with pytest.raises(RuntimeError, match="would mutate a captured Tensor"):
            grad(_loss(model.train()))(_state(model)[0], _images()[0])


def test_linked_conv2d():
    sources = [torch.randn(4, 2, c, 5, 4, dtype=F64) for c in (3, 2)]
    weight = torch.randn(6, 5, 3, 3, dtype=F64)

    def ours(a, b, w):
        return tn.functional.linked_conv2d([a, b], w, None, "native").square().sum()

    def theirs(a, b, w):
        return nn.functional.conv2d(torch.cat([a, b], 1), w, padding=1).square().sum()

    found, expected = (vmap(grad(f, argnums=(0, 1, 2)), (0, 0, None))(*sources, weight) for f in (ours, theirs))
    _assert_same(found, expected)


def _dual(model, x):
    with forward_ad.dual_level():
        return model(forward_ad.make_dual(x, torch.ones_like(x)))


FORWARD = {
    "jvp": lambda model, x: jvp(model, (x,), (x,)),
    "jacfwd": lambda model, x: jacfwd(model)(x),
    "dual numbers": _dual,
    "dual numbers, nothing requires grad": lambda model, x: _dual(copy.deepcopy(model).requires_grad_(False), x),
}


@pytest.mark.parametrize("way", FORWARD)
@pytest.mark.parametrize("name", MODELS)
def test_forward_mode_raises(name, way):
    _, fused = _pair(name)
    with pytest.raises(RuntimeError) as caught:
        FORWARD[way](fused, _images(2))
    assert str(caught.value) == FORWARD_MODE


def test_forward_mode_after_to_reference():
    plain, fused = _pair("densenet")
    x = _images(2)
    _assert_same(jvp(tn.to_reference(fused), (x,), (x,)), jvp(plain, (x,), (x,)))


def test_a_dual_level_alone_changes_nothing():
    _, fused = _pair("bottleneck")
    x = _images(2)
    with forward_ad.dual_level():
        y = fused(x)
    (first,) = torch.autograd.grad(y.square().sum(), fused.layers[0].conv1.weight)
    (second,) = torch.autograd.grad(fused(x).square().sum(), fused.layers[0].conv1.weight)
    assert torch.equal(first, second)


def test_second_derivatives_raise():
    _, fused = _pair("bottleneck")
    x = _images(1)
    with pytest.raises(
        RuntimeError, match=r"can be differentiated once: .* use fused=False or tn\.to_reference\(model\)"
    ):
        jacrev(grad(lambda x: fused(x).square().sum()))(x)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        hessian(lambda x: fused(x).square().sum())(x)


def test_a_step_that_no_transform_sees_reads_no_signature(monkeypatch):
    """torch does so at every call of a Function whose forward takes no `ctx`: much of a small call's time."""
    block = tn.ThresholdBlock(4, tn.links.dense(2), 4, fused=True, backend="native")
    x = torch.randn(2, 4, 3, 3)
    block(x)
    read = []
    monkeypatch.setattr(inspect, "signature", lambda *given, **options: read.append(given))
    block(x).sum().backward()
    assert not read and all(p.grad is not None for p in block.parameters())
