"""Activations by name: what is accepted, what is computed, and how they are told from modules."""

import pytest
import torch
from activated import FUNCTIONS, NAMES, derivative
from torch import nn

from thresholdnet import ThresholdBlock, activations, links

VALUES = torch.tensor([float("nan"), -float("inf"), -7.0, -0.5, -0.0, 0.0, 0.5, 6.0, 7.0], dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_torchs(name):
    wanted = FUNCTIONS[name](VALUES)
    for got in (activations.activate_(VALUES.clone(), name), activations.module(name)(VALUES.clone())):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
    x, g = VALUES[1:], torch.arange(1.0, 9.0, dtype=torch.float64)  # a comparison with NaN decides for itself
    for owned in (False, True):
        got = activations.masked(g.clone(), x, name, owned)
        assert torch.equal(got, g * derivative(x, name))
    before = g.clone()
    activations.masked(g, x, name, False)
    assert torch.equal(g, before)


@pytest.mark.parametrize("name", ["relu", "relu6"])
def test_a_closed_activation_stops_infinity(name):
    got = activations.masked(torch.tensor([float("inf")]), torch.tensor([-1.0]), name, False)
    assert got.item() == 0


@pytest.mark.parametrize("name", [*NAMES, "leaky_relu(0.01)"])
def test_names_and_modules(name):
    assert activations.name_of(activations.module(name)) == name
    assert activations.checked("activation", name) == name


def test_names_are_read():
    assert activations.checked("activation", "leaky_relu") == "leaky_relu(0.01)"
    assert activations.checked("activation", "leaky_relu(2e-1)") == "leaky_relu(0.2)"
    assert [activations.number(name) for name in (None, *NAMES)] == [0, 1, 2, 0.2]
    block = ThresholdBlock(4, links.dense(2), 4, activation="leaky_relu(.2)")
    assert block.activation == "leaky_relu(0.2)" and block.layers[0].act.negative_slope == 0.2


@pytest.mark.parametrize("slope", [-0.1, 0.0, 1.0, 2.0])
def test_slopes_that_no_kernel_has(slope):
    assert activations.name_of(nn.LeakyReLU(slope)) is None


@pytest.mark.parametrize("slope", ["(1)", "(0)", "(-0.1)", "(x)", "(0.1", "()"])
def test_bad_slopes(slope):
    name = f"leaky_relu{slope}"
    with pytest.raises(ValueError, match=r"act must be leaky_relu\(SLOPE\) with 0 < SLOPE < 1, got"):
        activations.checked("act", name)
    with pytest.raises(ValueError, match="activation must be 'relu', 'relu6', 'leaky_relu"):
        activations.number(name)


def test_other_names():
    with pytest.raises(ValueError, match=r"activation must be .* got 3"):
        activations.number(3)
    with pytest.raises(TypeError, match="act must be a string, one of relu, relu6, leaky_relu, got 3"):
        activations.checked("act", 3)
    with pytest.raises(ValueError, match="act 'gelu' is unknown"):
        activations.checked("act", "gelu")
    assert activations.name_of(nn.GELU()) is None and activations.name_of(None) is None
