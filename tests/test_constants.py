"""Tables on a device: where they are made, and who keeps them."""

import contextlib
import threading

import pytest
import torch
from on_gpu import needs_gpu
from test_blocks import UNITS
from test_replay import block_of, trained

from thresholdnet import constants


def made_by(device, capturing, monkeypatch):
    """The thread that made a table, and whether it was in inference mode as the caller was."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the caller's")
    entered = []

    @contextlib.contextmanager
    def stream(which):
        entered.append(which)
        yield

    monkeypatch.setattr(torch.cuda, "stream", stream)
    calls = []

    @constants.device_constant(maxsize=2)
    def table(size, where):
        calls.append(size)
        return threading.current_thread(), torch.is_inference_mode_enabled()

    with torch.inference_mode():
        made = table(3, where=device)
        assert table(3, where=device) is made and calls == [3]
    return made, entered


def test_tables_of_a_gpu_are_made_aside(monkeypatch):
    (thread, inference), entered = made_by(torch.device("cuda", 0), False, monkeypatch)
    assert thread is not threading.current_thread() and not inference and entered == ["the caller's"]


@pytest.mark.parametrize(("device", "capturing"), (("cpu", False), ("cuda", True)))
def test_other_tables_are_made_here(device, capturing, monkeypatch):
    """Within a capture as well: no thread may ask CUDA for memory meanwhile."""
    (thread, inference), entered = made_by(torch.device(device), capturing, monkeypatch)
    assert thread is threading.current_thread() and inference and not entered


def test_an_error_comes_through(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda which: contextlib.nullcontext())

    @constants.device_constant(maxsize=2)
    def table(device):
        raise ValueError("no table")

    with pytest.raises(ValueError, match="no table"):
        table(torch.device("cuda"))


@needs_gpu
@pytest.mark.parametrize("unit", UNITS)
def test_compiled_with_graphs(unit):
    """torch.compile's own CUDA graphs: their pool holds results alone, and no table that stays."""
    block = block_of("threshold_ab", unit, "triton", torch.bfloat16).cuda()
    x = torch.randn(4, 7, 12, 10, dtype=torch.bfloat16, device="cuda")
    wanted = trained(block, x)
    compiled = torch.compile(block, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        block.zero_grad()
        own = x.clone().requires_grad_()
        y = compiled(own)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).reshape(y.shape))
        found = [y.detach().clone(), own.grad, *(p.grad for p in block.parameters())]
        torch.testing.assert_close(found, wanted[: len(found)])
