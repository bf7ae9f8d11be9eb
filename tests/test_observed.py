"""Who looks on sees torch.library's operators; where nobody does their bodies are called, with the same results."""

import copy

import pytest
import torch
from test_replay import Noting
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from twins import MODELS, pair

import thresholdnet as tn
from thresholdnet import transforms
from thresholdnet.functional import linked_conv2d


def dispatched(seen):
    return Noting(lambda function, _: seen.append(str(function)))


class Called(TorchFunctionMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def _ours(seen):
    return sum("thresholdnet" in name and "csrc" not in name for name in seen)


def _step(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]


@pytest.mark.parametrize(("mode", "least"), [(dispatched, 2), (Called, 1)])  # the latter are off in backward
@pytest.mark.parametrize("name", MODELS)
def test_a_mode_sees_operators_and_results_are_equal(name, mode, least):
    _, model = pair(name)
    observed = copy.deepcopy(model)
    x = torch.randn(3, 5, 8, 8)
    seen = []
    with mode(seen):
        there = _step(observed, x)
    assert _ours(seen) >= least
    for ours, theirs in zip(_step(model, x), there, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", MODELS)
def test_bodies_are_called_where_nobody_looks(name, monkeypatch):
    _, model = pair(name)
    ran = []

    def noting(name, body):
        return name, lambda *given: (ran.append(name), body(*given))[1]

    for operator, found in list(transforms._BODIES.items()):
        monkeypatch.setitem(transforms._BODIES, operator, noting(*found))
    _step(model, torch.randn(3, 5, 8, 8))
    assert {"thresholdnet::block", "thresholdnet::block_backward"} <= set(ran)
    ran.clear()
    with torch.inference_mode():
        model.eval()(torch.randn(3, 5, 8, 8))
    assert "thresholdnet::block" in ran


def test_a_profile_has_their_names():
    block = tn.ThresholdBlock(5, tn.links.harmonic(4), 4, fused=True, backend="native")
    x = torch.randn(2, 5, 6, 6)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        block(x).sum().backward()
    assert {"thresholdnet::block", "thresholdnet::block_backward"} <= {event.key for event in found.key_averages()}


def test_negative_views_are_read_as_what_they_mean():
    """Their memory holds the values with the other sign."""
    block = tn.ThresholdBlock(5, tn.links.harmonic(4), 4, fused=True, backend="native")
    x = torch.complex(*torch.randn(2, 2, 5, 6, 6)).conj().imag
    assert x.is_neg()
    with torch.no_grad():
        assert torch.equal(block.eval()(x), block(x.clone()))


class Scaled(torch.Tensor):
    """A subclass that wants to know what is done with it."""

    seen = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen += "thresholdnet" in str(function)
        return super().__torch_function__(function, types, args, kwargs)


def test_subclasses_see_operators():
    x, weight = torch.randn(2, 5, 6, 6), torch.randn(4, 5, 3, 3)
    found = linked_conv2d([x.as_subclass(Scaled)], weight, backend="native")
    assert type(found) is Scaled and Scaled.seen
    assert torch.equal(found.as_subclass(torch.Tensor), linked_conv2d([x], weight, backend="native"))
