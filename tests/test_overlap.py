"""Kernels that start while their predecessors end: who asks for it, and on a GPU the same bits.

`bench/compile_report.py` reads in the compiled code that nothing is touched before the wait, and `bench/host_time.py`
that every launch says so.
"""

import pytest
import torch
from on_gpu import needs_gpu
from test_blocks import UNITS
from test_replay import block_of, recordings, trained

from thresholdnet import replay
from thresholdnet.replay import overlap
from thresholdnet.replay.recording import Launch

BOTH = {"PDL": True, "launch_pdl": True}


def launched(monkeypatch, capability, argument):
    """What a kernel is launched with on a device of this compute capability, None for a CPU."""
    found = []
    monkeypatch.setattr(overlap, "able", lambda device: capability is not None and capability >= overlap.OLDEST)

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: found.append(options)

    replay.start(Kernel(), (1,), argument, 3, num_warps=4)
    return found[0]


@pytest.mark.parametrize("several", (False, True), ids=("one", "several"))
def test_who_overlaps(several, monkeypatch):
    argument = (torch.zeros(2), torch.zeros(2)) if several else torch.zeros(2)
    monkeypatch.delenv("THRESHOLDNET_PDL", raising=False)
    assert launched(monkeypatch, (9, 0), argument) == {"num_warps": 4}
    monkeypatch.setenv("THRESHOLDNET_PDL", "0")
    assert launched(monkeypatch, (9, 0), argument) == {"num_warps": 4}
    monkeypatch.setenv("THRESHOLDNET_PDL", "1")
    assert launched(monkeypatch, (9, 0), argument) == {"num_warps": 4, **BOTH}
    assert launched(monkeypatch, (12, 0), argument) == {"num_warps": 4, **BOTH}
    assert launched(monkeypatch, (8, 9), argument) == {"num_warps": 4}
    assert launched(monkeypatch, None, argument) == {"num_warps": 4}


def test_no_cpu_is_able():
    assert not overlap.able(torch.device("cpu"))


def test_calls_of_both_kinds_are_recorded_apart(monkeypatch):
    monkeypatch.setenv("THRESHOLDNET_REPLAY", "1")
    replay.forget()
    x = torch.ones(3)
    for switch in ("0", "1"):
        monkeypatch.setenv("THRESHOLDNET_PDL", switch)
        for _ in range(2):
            replay.call(torch.Tensor.add, x, 1)
    assert len(recordings()) == 2
    replay.forget()


@needs_gpu
@pytest.mark.parametrize("way", ("0", "1", "graph"))
@pytest.mark.parametrize("unit", UNITS)
def test_the_same_bits(unit, way, monkeypatch):
    """Small and large images, run, replayed and as graphs: a kernel that did not wait would read old values."""
    if torch.cuda.get_device_capability() < overlap.OLDEST:
        pytest.skip("the GPU has no programmatic dependent launch")
    block = block_of("threshold_ab", unit, "triton", torch.bfloat16).cuda()
    for size in ((4, 7, 12, 10), (32, 7, 56, 56)):
        x = torch.randn(size, dtype=torch.bfloat16, device="cuda")
        monkeypatch.setenv("THRESHOLDNET_REPLAY", "1")
        for switch in ("0", "1"):  # the kernels, some thirty a time, compiled side by side: `replay/ahead.py`
            monkeypatch.setenv("THRESHOLDNET_PDL", switch)
            trained(block, x)
        monkeypatch.setenv("THRESHOLDNET_REPLAY", way)
        monkeypatch.setenv("THRESHOLDNET_PDL", "0")
        wanted = trained(block, x)
        monkeypatch.setenv("THRESHOLDNET_PDL", "1")
        replay.forget()
        for _ in range(10):
            assert all(map(torch.equal, trained(block, x), wanted))
    if way == "1":
        steps = [step for found in recordings() for step, _ in found.steps]
        assert any(isinstance(step, Launch) for step in steps)
    replay.forget()


@needs_gpu
@pytest.mark.parametrize("unit", UNITS)
def test_a_captured_step(unit, monkeypatch):
    """A whole step as one CUDA graph, whose kernels overlap, a hundred times."""
    if torch.cuda.get_device_capability() < overlap.OLDEST:
        pytest.skip("the GPU has no programmatic dependent launch")
    block = block_of("threshold_ab", unit, "triton", torch.bfloat16).cuda()
    x = torch.randn(8, 7, 28, 28, dtype=torch.bfloat16, device="cuda")
    monkeypatch.setenv("THRESHOLDNET_PDL", "0")
    wanted = trained(block, x)
    monkeypatch.setenv("THRESHOLDNET_PDL", "1")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            trained(block, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = trained(block, x)
    for _ in range(100):
        for each in found:
            each.zero_()
        graph.replay()
        assert all(map(torch.equal, found, wanted))
