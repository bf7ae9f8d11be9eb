"""Calls of prepacked blocks: nothing is asked again while nothing changed, and any change is seen."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from test_packing import CHANGES, UNITS, _assigned, _block
from tolerances import RELATIVE, largest_error
from torch import Tensor, nn

import thresholdnet as tn
from thresholdnet import ThresholdBlock, linked, links, replay
from thresholdnet.operands import Operands
from thresholdnet.replay import steady


@pytest.fixture(autouse=True)
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the third call on, which notes what the fourth one uses."""
    monkeypatch.setenv("THRESHOLDNET_REPLAY", "1")
    replay.forget()


@pytest.fixture
def finds(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Per call whether something was known."""
    made: list[bool] = []
    find = steady.find

    def noted(*arguments: Any) -> Any:
        found = find(*arguments)
        made.append(found is not None)
        return found

    monkeypatch.setattr(steady, "find", noted)
    return made


@torch.no_grad()
def run(module: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch, calls: int = 4) -> None:
    """Calls, each held against a copy's that is neither prepacked nor replayed."""
    with monkeypatch.context() as patch:
        patch.setenv("THRESHOLDNET_REPLAY", "0")
        wanted = copy.deepcopy(module)(x)
    for _ in range(calls):
        assert largest_error(module(x), wanted) <= RELATIVE[x.dtype]


def _transposed(block):
    """Values in other places of the same memory, which no counter tells."""
    weight = block.layers[0].conv1.weight
    assert weight.shape[0] == weight.shape[1]
    weight.data = weight.data.transpose(0, 1)


def _buffer_replaced(block):
    block.layers[1].norm.running_var = block.layers[1].norm.running_var * 2


def _double(block):
    block.double().float()


def _batch_statistics(block):
    block.train()


def _forms_let_go(block):
    tn.prepack(block, False)


@pytest.mark.parametrize(
    "change", (*CHANGES, _buffer_replaced, _double, _batch_statistics, _forms_let_go, tn.prepack, _transposed)
)
def test_what_changes_is_seen(change, finds, monkeypatch):
    block = _block("bottleneck", 6) if change is _transposed else _block()
    block, x = tn.prepack(block), torch.randn(2, 24, 8, 8)
    run(block, x, monkeypatch)
    assert finds == [False] * 3 + [True]
    change(block)
    run(block, x, monkeypatch, 5)
    if change is _batch_statistics:  # whose calls write the running ones, and are not looked up
        assert len(finds) == 4
    else:
        assert not finds[4] and finds[-1] is (change not in (_forms_let_go, _assigned))  # those end it


def test_blocks_of_a_network(finds, monkeypatch):
    torch.manual_seed(0)
    network = tn.create_model("densenet40", num_classes=5, fused=True, backend="native").eval()
    images = [torch.randn(1, 3, 32, 32), torch.randn(2, 3, 29, 30)]
    run(network, images[0], monkeypatch)
    assert not any(finds) and not steady._known  # the weights are read as they are
    tn.prepack(network)
    for x in (*images, images[0]):
        run(network, x, monkeypatch, 5)
        assert finds[-3:] == [True] * 3
    assert len(steady._known) == 2 * 3


def test_what_lies_in_a_weights_memory(monkeypatch):
    block = tn.prepack(_block())
    for x in (block.layers[0].conv.weight.detach()[:2], torch.randn(2, 24, 3, 3), block.layers[0].conv.weight[2:4]):
        run(block, x.detach(), monkeypatch, 5)


def test_blocks_without_affine_parameters(finds, monkeypatch):
    """Ones and zeros in their place are made at each call."""
    block = tn.prepack(_block())
    for layer in block.layers:
        layer.norm.weight = layer.norm.bias = None
    run(block, torch.randn(2, 24, 8, 8), monkeypatch, 5)
    assert finds == [False] * 5


@pytest.mark.parametrize("unit", UNITS)
def test_biases_of_some_layers_in_inference_mode(unit, monkeypatch):
    """Zeros in the place of the others are made there at each call, and have no stamp."""
    block = _block(unit)
    for index, layer in enumerate(block.layers):
        conv = layer.conv2 if unit == "bottleneck" else layer.conv
        conv.bias = nn.Parameter(torch.randn(conv.out_channels)) if index == 1 else None
    with torch.inference_mode():
        run(tn.prepack(block), torch.randn(2, 24, 8, 8), monkeypatch, 5)


def test_the_last_used_are_kept(finds, monkeypatch):
    monkeypatch.setattr(steady, "MOST", 2)
    blocks, x = [tn.prepack(_block()) for _ in range(3)], torch.randn(2, 24, 8, 8)
    for block in (*blocks, blocks[0]):
        run(block, x, monkeypatch)
        assert finds[-1] and len(steady._known) <= 2


def test_nothing_is_held(monkeypatch):
    block = tn.prepack(_block())
    run(block, torch.randn(2, 24, 8, 8), monkeypatch)
    gone = [weakref.ref(tensor) for tensor in (*block.parameters(), *block.buffers())]
    (kept,) = steady._known.values()
    assert kept.forms
    del block
    gc.collect()
    assert not any(reference() is not None for reference in (*gone, *kept.forms.values()))


def test_modules_are_read_once(monkeypatch):
    """And tensors of a functional call, which may hold a graph, are let go with it."""
    made: list[Operands] = []

    def noted(units):
        made.append(Operands(units))
        return made[-1]

    monkeypatch.setattr(linked, "Operands", noted)
    block = ThresholdBlock(5, links.dense(3), 4, fused=True, backend="native")
    x = torch.randn(2, 5, 6, 6)
    for _ in range(3):
        block(x).sum().backward()
    assert len(made) == 1
    fast = {name: parameter * 2 for name, parameter in block.named_parameters()}
    gone = [weakref.ref(tensor) for tensor in fast.values()]
    with torch.no_grad():
        expected = torch.func.functional_call(copy.deepcopy(block).fuse(False), fast, (x,))
        assert largest_error(torch.func.functional_call(block, fast, (x,)), expected) <= RELATIVE[torch.float32]
    del fast, made[:]
    gc.collect()
    assert not any(reference() is not None for reference in gone)


class _Computed(nn.Conv2d):
    """A weight that a class computes, though torch's own has registered one."""

    @property
    def weight(self):
        return self.raw * self.factor


def test_what_a_class_computes_is_read_at_each_call():
    block = ThresholdBlock(5, links.dense(3), 4, fused=True, backend="native")
    conv = block.layers[1].conv
    conv.__class__, conv.raw, conv.factor = _Computed, nn.Parameter(conv.weight.detach().clone()), 1.0
    x = torch.randn(2, 5, 6, 6)
    with torch.no_grad():
        for factor in (1.0, 2.0, 3.0):
            conv.factor = factor
            found = block(x)
            assert block.backend == "native"
            assert largest_error(found, copy.deepcopy(block).fuse(False)(x)) <= RELATIVE[torch.float32]
