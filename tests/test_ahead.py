"""Kernels compiled before a call launches them: against a compiler in Python, and Triton's own into a silent driver."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from thresholdnet import ahead, replay

HOST_TIME = Path(__file__).resolve().parents[1] / "bench" / "host_time.py"


class Compiled:
    """A compiled kernel."""


class Kernel:
    """A Triton kernel: whether it is there, and what was launched and compiled of all of them."""

    def __init__(self, name: str, log: list[str], there: bool = False, broken: bool = False):
        self.name, self.log, self.there, self.broken = name, log, there, broken

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


@pytest.mark.skipif(not HOST_TIME.is_file(), reason="run outside a checkout")
@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler")
def test_tritons_compiler_runs_in_threads(tmp_path):
    """From an empty cache: the first step compiles in threads alone, the second nothing, and both launch as much."""
    pytest.importorskip("triton")
    code = f"""
import pathlib, sys, threading
sys.path.insert(0, {str(HOST_TIME.parent)!r})
import host_time
silent = host_time.Silent(pathlib.Path({str(tmp_path)!r}))
silent.install()
import triton
by_the_call, compile = [], triton.compiler.compile
def noted(*arguments, **options):
    by_the_call.append(threading.current_thread() is threading.main_thread())
    return compile(*arguments, **options)
triton.compiler.compile = noted
step = host_time.step_of(host_time.blocks_of("")[:1], "relu")
launches = []
for _ in range(2):
    before = silent.library.silent_launches()
    step()
    launches.append(silent.library.silent_launches() - before)
print(len(by_the_call), sum(by_the_call), *launches)
"""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "THRESHOLDNET_REPLAY": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    compiled, by_the_call, first, second = map(int, done.stdout.split())
    assert compiled >= 8 and by_the_call == 0 and first >= second > 8
