"""Replays whose launches are submitted together: against a driver in Python, and on a GPU against calls that ran.

`bench/host_time.py` holds them against a driver in C through Triton's own launcher.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partialmethod
from typing import Any

import pytest
import torch
from on_gpu import needs_gpu
from test_blocks import UNITS
from test_replay import Noting, block_of, recordings, trained
from torch import Tensor

from thresholdnet import replay
from thresholdnet.replay import together
from thresholdnet.replay.recorder import ALLOCATIONS

OWN = 77  # the stream that is captured


class Driver:
    """What `together` calls of CUDA's driver; kernels that ran are in `ran`."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.ran: list[Any] = []
        self.graphs: dict[int, list[Any]] = {}
        self.capture: list[Any] | None = None
        self.refuses: dict[str, int] = {}

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            return self.refuses.get(name, 0) or getattr(self, f"_{name}")(*arguments) or 0

        return call

    def launch(self, kernel: Any, stream: int) -> None:
        if stream == OWN:
            assert self.capture is not None
            self.capture.append(kernel)
        else:
            self.ran.append(kernel)

    def _cuStreamCreate(self, made: Any, flags: int) -> None:
        assert flags == 1
        made._obj.value = OWN

    def _cuStreamBeginCapture_v2(self, stream: int, mode: int) -> None:
        assert (stream, mode, self.capture) == (OWN, 2, None)
        self.capture = []

    def _cuStreamEndCapture(self, stream: int, graph: Any) -> None:
        assert stream == OWN and self.capture is not None
        graph._obj.value, self.capture = self._new(self.capture), None

    def _cuGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: int) -> None:
        executable._obj.value = self._new(self.graphs[graph.value])

    def _cuGraphExecUpdate_v2(self, executable: Any, graph: Any, found: Any) -> None:
        self.graphs[executable.value] = self.graphs[graph.value]

    def _cuGraphLaunch(self, executable: Any, stream: int) -> None:
        assert stream != OWN
        self.ran += self.graphs[executable.value]

    def _cuGraphDestroy(self, graph: Any) -> None:
        del self.graphs[graph.value]

    _cuGraphExecDestroy = _cuGraphDestroy

    def _new(self, kernels: list[Any]) -> int:
        number = 1000 + len(self.calls)
        self.graphs[number] = kernels
        return number


class Kernel:
    """A Triton kernel that a driver runs."""

    arg_names, params = ("x", "number"), ()

    def __init__(self, driver: Driver):
        self.driver = driver
        self.fails = False

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return lambda *arguments: Compiled(self)


class Compiled:
    """What a launch returns, and what starts it again."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._start

    def _start(self, *values: Any, stream: int) -> None:
        if self.kernel.fails:
            raise RuntimeError("out of registers")
        self.kernel.driver.launch(values, stream)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    made = Driver()
    monkeypatch.setattr(together, "_driver", lambda: made)
    monkeypatch.setattr(together, "_free_streams", {})
    monkeypatch.setattr(replay, "wanted", lambda device: True)
    monkeypatch.setenv("THRESHOLDNET_REPLAY", "1")
    replay.forget()
    yield made
    replay.forget()
    assert not made.graphs and made.capture is None  # nothing is left behind


@pytest.fixture
def kernel(driver: Driver) -> Kernel:
    return Kernel(driver)


ADD = torch.ops.aten.add.Tensor


def launches(kernel: Kernel, x: Tensor, count: int = together.SMALLEST) -> Tensor:
    for number in range(count):
        replay.start(kernel, (1,), x, number)
    return x


def expected(x: Tensor, count: int = together.SMALLEST) -> list[Any]:
    return [(x.data_ptr(), number) for number in range(count)]


def call(kernel: Kernel, x: Tensor, count: int = together.SMALLEST) -> list[str]:
    """Launch, and what that asked of the driver."""
    driver = kernel.driver
    driver.ran, driver.calls = [], []
    replay.call(launches, kernel, x, count)
    return driver.calls


NEW = [
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
    "cuGraphInstantiateWithFlags",
    "cuGraphDestroy",
    "cuGraphLaunch",
]
UPDATED = [name.replace("cuGraphInstantiateWithFlags", "cuGraphExecUpdate_v2") for name in NEW]


def test_launches_are_one_graph_for_each_of_the_last_addresses(driver, kernel):
    first, second, third = (torch.zeros(1) for _ in range(3))
    assert not call(kernel, first) and not call(kernel, first)  # the first run, the recorded one
    for x, wanted in (
        (first, ["cuStreamCreate", *NEW]), (first, ["cuGraphLaunch"]), (second, NEW), (first, ["cuGraphLaunch"]),
        (second, ["cuGraphLaunch"]), (third, UPDATED), (second, ["cuGraphLaunch"]), (first, UPDATED),
    ):  # fmt: skip
        assert call(kernel, x) == wanted
        assert driver.ran == expected(x)


def test_few_launches_are_submitted_one_by_one(driver, kernel):
    few = together.SMALLEST - 1
    x = torch.zeros(1)
    for _ in range(4):
        assert not call(kernel, x, few)
    assert driver.ran == expected(x, few)


def test_an_operation_parts_graphs_and_sees_what_ran_before(driver, kernel):
    seen: list[int] = []

    def function(x: Tensor) -> Tensor:
        launches(kernel, x)
        y = x + 1
        launches(kernel, y)
        return y

    x = torch.zeros(1)
    for _ in range(2):
        replay.call(function, x)
    with Noting(lambda function, made: function is ADD and seen.append(len(driver.ran))):
        y = replay.call(function, x)
    assert seen == [together.SMALLEST] and driver.ran == [*expected(x), *expected(y)]


def test_memory_ends_when_the_graph_is_submitted(driver, kernel):
    """Not before: what lay there, an operation's result or made between the launches, is yet to be read."""
    made: list[Any] = []
    alive: list[list[bool]] = []

    def function(x: Tensor) -> Tensor:
        launches(kernel, y := x + 1)
        launches(kernel, torch.empty(1 << 19))  # more than a call's pool takes
        launches(kernel, out := torch.empty(3))
        launches(kernel, torch.empty(1 << 19))
        del y
        return out

    def noted(function: Any, tensor: Tensor) -> None:
        if function in (ADD, *ALLOCATIONS):
            made.append(weakref.ref(tensor))

    def submitted(self: Any, *arguments: Any, run: Any) -> Any:
        alive.append([each() is not None for each in made])
        return run(self, *arguments)

    for _ in range(2):
        replay.call(function, torch.zeros(1))
    with pytest.MonkeyPatch.context() as patch, Noting(noted):
        patch.setattr(Driver, "_cuGraphLaunch", partialmethod(submitted, run=Driver._cuGraphLaunch))
        out = replay.call(function, torch.zeros(1))
    assert alive == [[True] * len(made)] and len(made) == 4  # pools of the call and the part, x + 1, out
    assert sorted(each() is not None for each in made) == [False, False, False, True]
    first, large, third, again = (driver.ran[together.SMALLEST * i :][: together.SMALLEST] for i in range(4))
    assert third == expected(out) and again == large != first  # what is never there at once shares a place


def test_memory_that_is_filled_when_it_is_made(driver, kernel):
    """Deterministic algorithms fill it at once, ahead of the graph: nothing that the graph reads may lie there."""

    def function(x: Tensor) -> Tensor:
        launches(kernel, y := x + 1)
        del y
        launches(kernel, torch.empty(1 << 19))
        return torch.empty(3)

    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            replay.call(function, torch.zeros(1 << 19))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel, "seen", [], raising=False)
            patch.setattr(Driver, "_cuGraphLaunch", lambda self, executable, stream: kernel.seen.append(
                ctypes.c_float.from_address(self.graphs[executable.value][0][0]).value
            ))  # fmt: skip
            replay.call(function, torch.zeros(1 << 19))
            assert kernel.seen == [1.0]
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_graph_that_cannot_be_updated_is_made_anew(driver, kernel):
    driver.refuses["cuGraphExecUpdate_v2"] = 910
    kept = [torch.zeros(1) for _ in range(4)]
    for x in (kept[0], *kept):
        found = call(kernel, x)
    refused = ["cuGraphExecDestroy", "cuGraphInstantiateWithFlags"]
    assert found == [*UPDATED[:3], *refused, *UPDATED[3:]] and driver.ran == expected(kept[-1])


def test_a_failing_launch_ends_the_capture(driver, kernel):
    x = torch.zeros(1)
    for _ in range(2):
        call(kernel, x)
    kernel.fails = True
    with pytest.raises(RuntimeError, match="out of registers"), pytest.warns(UserWarning, match="one by one"):
        call(kernel, x)
    assert driver.capture is None and not driver.ran
    driver.graphs.clear()
    kernel.fails = False
    call(kernel, x)
    assert driver.ran == expected(x)


@pytest.mark.parametrize(
    "name", ("cuStreamCreate", "cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphInstantiateWithFlags")
)
def test_a_driver_without_graphs_launches_one_by_one(name, driver, kernel):
    """Full memory, an old driver: nothing was submitted, so nothing is lost."""
    x = torch.zeros(1)
    for _ in range(2):
        call(kernel, x)
    driver.refuses[name] = 2
    with pytest.warns(UserWarning, match=f"one by one: {name} must return 0, got CUDA error 2"):
        call(kernel, x)
    assert driver.ran == expected(x)
    driver.capture, _ = None, driver.graphs.clear()
    assert not call(kernel, x) and driver.ran == expected(x)  # and no graph is tried again


def test_streams_are_used_again(driver, kernel):
    """As by the threads that nn.DataParallel starts at every call."""
    inputs = [torch.zeros(1) for _ in range(5)]
    driver.calls = []
    for x in (inputs[0], *inputs):
        thread = threading.Thread(target=replay.call, args=(launches, kernel, x, together.SMALLEST))
        thread.start()
        thread.join()
    assert driver.calls.count("cuStreamBeginCapture_v2") == 4 and driver.calls.count("cuStreamCreate") == 1


def test_a_failing_driver_is_one_sentence(driver, kernel):
    x = torch.zeros(1)
    for _ in range(2):
        call(kernel, x)
    driver.refuses["cuGraphLaunch"] = 719
    with pytest.raises(
        RuntimeError, match="cuGraphLaunch must return 0, got CUDA error 719: THRESHOLDNET_REPLAY=1 does"
    ):
        call(kernel, x)


def test_when_it_is_wanted(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda.memory, "get_allocator_backend", lambda: "native")
    assert not together.wanted(cuda)
    monkeypatch.setenv("THRESHOLDNET_REPLAY", "graph")
    assert together.wanted(cuda) and not together.wanted(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda.memory, "get_allocator_backend", lambda: "cudaMallocAsync")
    assert not together.wanted(cuda)
    monkeypatch.setattr(torch.cuda.memory, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not together.wanted(cuda)


@needs_gpu
@pytest.mark.parametrize("unit", UNITS)
def test_on_a_gpu(unit, monkeypatch):
    """The same bits, on inputs anywhere, with two steps' memory alive, and where the whole is captured."""
    block = block_of("threshold_ab", unit, "triton", torch.bfloat16).cuda()
    inputs = [torch.randn(4, 7, 12, 10, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
    monkeypatch.setenv("THRESHOLDNET_REPLAY", "0")
    wanted = [trained(block, x) for x in inputs]
    monkeypatch.setenv("THRESHOLDNET_REPLAY", "graph")
    replay.forget()
    alive = []
    for _ in range(3):
        for x, before in zip(inputs, wanted, strict=True):
            alive.append(trained(block, x))
            assert all(map(torch.equal, alive[-1], before))
        alive = alive[-2:]
    graphs = [step for found in recordings() for step, _ in found.steps if isinstance(step, together.Together)]
    assert len(graphs) >= 2 and all(step._graphs for step in graphs)
    replay.forget()
