"""Kernels compiled before a call launches them: against a compiler in Python, and Triton's own into a silent driver."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from without_gpu import BENCH, python, require

from thresholdnet import replay
from thresholdnet.replay import ahead


class Compiled:
    """A compiled kernel."""


class Kernel:
    """A Triton kernel: whether it is there, and what was launched and compiled of all of them."""

    def __init__(self, name: str, log: list[str], there: bool = False, broken: bool = False):
        self.name, self.log, self.there, self.broken = name, log, there, broken
        self.device_caches: dict[int, Any] = {}

    def warmup(self, *arguments: Any, grid: tuple[int, ...], **options: Any) -> Any:
        mode = Mode.active
        assert mode is not None
        if not self.there:
            mode.waiting.append(self)
        return Compiled() if self.there else object()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self._launched

    def _launched(self, *arguments: Any, **options: Any) -> None:
        if not self.there:
            self.compile()  # what threads could not, or nobody was asked to
        self.log.append(self.name)

    def compile(self) -> None:
        if self.broken:
            raise ValueError(f"{self.name} does not compile")
        self.there = True
        self.log.append(f"{self.name} compiled")


class Mode:
    """`triton.AsyncCompileMode`."""

    active: Mode | None = None

    def __init__(self, executor: Executor | None, ignore_errors: bool = False):
        assert ignore_errors  # a mode that raises in its end stays active, in Triton 3.6
        self.executor = executor
        self.waiting: list[Kernel] = []

    def __enter__(self) -> Mode:
        if Mode.active is not None:
            raise RuntimeError("Another AsyncCompileMode is already active")
        Mode.active = self
        return self

    def __exit__(self, *error: Any) -> None:
        Mode.active = None
        for each in [self.executor.submit(kernel.compile) for kernel in dict.fromkeys(self.waiting)]:
            each.exception()


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = SimpleNamespace(JITFunction=Kernel, AsyncCompileMode=Mode, compiler=SimpleNamespace(CompiledKernel=Compiled))
    monkeypatch.setattr(ahead, "sys", SimpleNamespace(modules={"triton": made}))
    monkeypatch.setattr(Mode, "active", None)
    monkeypatch.setenv("THRESHOLDNET_REPLAY", "1")
    replay.forget()
    yield made
    replay.forget()


def launches(kernels: list[Kernel]) -> Callable[..., Tensor]:
    def function(x: Tensor) -> Tensor:
        for kernel in kernels:
            replay.start(kernel, (1,), x)
        return x + 1

    return function


def test_kernels_that_are_there_are_launched_at_once():
    log: list[str] = []
    function = launches([Kernel("a", log, there=True), Kernel("b", log, there=True)])
    assert replay.call(function, torch.ones(1)).item() == 2
    assert log == ["a", "b"]


def test_nothing_is_launched_from_the_first_missing_one_on_until_all_are_there():
    log: list[str] = []
    a, b, c = Kernel("a", log, there=True), Kernel("b", log), Kernel("c", log)
    assert replay.call(launches([a, b, a, c, b]), torch.ones(1)).item() == 2
    assert log[0] == "a" and sorted(log[1:3]) == ["b compiled", "c compiled"] and log[3:] == ["a", "b", "a", "c", "b"]


def test_a_kernel_that_does_not_compile_is_said_and_said_again():
    log: list[str] = []
    kernel = Kernel("a", log, broken=True)
    function = launches([kernel])
    for _ in range(2):
        with pytest.raises(ValueError, match="a does not compile"):
            replay.call(function, torch.ones(1))
    kernel.broken = False
    replay.call(function, torch.ones(1))
    assert log == ["a compiled", "a"] and replay._launcher() is None


def test_a_caller_that_compiles_by_itself_is_left_alone():
    log: list[str] = []
    with Mode(None, ignore_errors=True):
        replay.call(launches([Kernel("a", log, there=True)]), torch.ones(1))
    assert log == ["a"]


@pytest.mark.parametrize("modules", ({}, {"triton": SimpleNamespace()}), ids=("without Triton", "without threads"))
def test_calls_run_without(modules, monkeypatch):
    log: list[str] = []
    monkeypatch.setattr(ahead, "sys", SimpleNamespace(modules=modules))
    replay.call(launches([Kernel("a", log, there=True)]), torch.ones(1))
    assert log == ["a"]


def test_the_interpreter_compiles_nothing(triton):
    log: list[str] = []
    triton.JITFunction = int
    replay.call(launches([Kernel("a", log, there=True)]), torch.ones(1))
    assert log == ["a"]


def test_an_interrupt_ends_the_mode(triton, monkeypatch):
    """As Triton 3.6's does not by itself: where it is interrupted, it stays on in its context."""

    class Interrupted(Mode):
        active = ContextVar("active", default=None)

        def __enter__(self) -> Mode:
            if self.active.get() is not None:
                raise RuntimeError("Another AsyncCompileMode is already active")
            self.active.set(self)
            return self

        def __exit__(self, *error: Any) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(triton, "AsyncCompileMode", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        replay.call(lambda x: x + 1, torch.ones(1))
    assert Interrupted.active.get() is None


def test_what_was_made_without_kernels_does_not_wait_for_the_next_call():
    """A call's memory is there once, not twice."""
    made: list[Any] = []
    alive: list[bool] = []
    kernel = Kernel("a", [])

    def function(x: Tensor) -> Tensor:
        alive.extend(each() is not None for each in made)
        replay.start(kernel, (1,), x)
        made.append(weakref.ref(y := x + 1))
        return y

    y = replay.call(function, torch.ones(1))
    assert alive == [False] and made[1]() is y


def with_silent_driver(code: str, tmp_path: Path) -> list[int]:
    """The numbers that code prints in a process whose Triton launches into a driver that does nothing, cache empty."""
    require("host_time.py")
    head = f"""
import pathlib, sys, threading
sys.path.insert(0, {str(BENCH)!r})
import host_time
silent = host_time.Silent(pathlib.Path({str(tmp_path)!r}))
silent.install()
import triton
compile = triton.compiler.compile
step = host_time.step_of(host_time.blocks_of("")[:1], "relu")
def in_main_thread():
    return threading.current_thread() is threading.main_thread()
"""
    done = python("-c", head + code, TRITON_CACHE_DIR=str(tmp_path / "cache"), THRESHOLDNET_REPLAY="1")
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def test_tritons_compiler_runs_in_threads(tmp_path):
    """From an empty cache: the first step compiles in threads alone, the second nothing, and both launch as much."""
    code = """
by_the_call = []
def noted(*arguments, **options):
    by_the_call.append(in_main_thread())
    return compile(*arguments, **options)
triton.compiler.compile = noted
launches = []
for _ in range(2):
    before = silent.library.silent_launches()
    step()
    launches.append(silent.library.silent_launches() - before)
print(len(by_the_call), sum(by_the_call), *launches)
"""
    compiled, by_the_call, first, second = with_silent_driver(code, tmp_path)
    assert compiled >= 8 and by_the_call == 0 and first >= second > 8


def test_what_fails_in_threads_is_compiled_alone(tmp_path):
    """Sixteen compilers may want more memory than there is; Triton 3.8 remembers a failure for good."""
    code = """
failed = []
def starved(*arguments, **options):
    if not in_main_thread():
        failed.append(1)
        raise RuntimeError("ptxas was killed")
    return compile(*arguments, **options)
triton.compiler.compile = starved
step()
before = silent.library.silent_launches()
step()
print(len(failed), silent.library.silent_launches() - before)
"""
    failed, launches = with_silent_driver(code, tmp_path)
    assert failed >= 8 and launches > 8
