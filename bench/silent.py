"""Triton without a GPU: kernels are compiled and launched into a driver that does nothing (silent_driver.c)."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class Silent:
    """The driver that does nothing, in Triton's place of a GPU."""

    def __init__(self, folder: Path):
        library = folder / "libcuda.so.1"
        command = [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
        source = Path(__file__).with_name("silent_driver.c")
        subprocess.run([*command, "-o", str(library), str(source)], check=True)
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        self.library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # found by its name from now on
        self.library.silent_launches.restype = self.library.silent_graphs.restype = ctypes.c_long

    def install(self, capability: tuple[int, int] = (9, 0)) -> None:
        """Let Triton compile for a GPU of this capability and launch here, whatever the machine has."""
        import torch
        from thresholdnet.kernels import gathered_readers, launch, weight_gradients
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
        from triton.compiler.compiler import CompiledKernel
        from triton.runtime.driver import driver

        from thresholdnet import replay
        from thresholdnet.replay import overlap

        class Driver:
            launcher_cls = CudaLauncher
            utils = CudaUtils()

            def get_current_target(self) -> Any:
                return GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

            def get_current_device(self) -> int:
                return 0

            def get_current_stream(self, device: int) -> int:
                return 0

            def get_device_interface(self) -> Any:
                return torch.cuda

        driver.set_active(Driver())
        way = functools.partial(os.environ.get, "THRESHOLDNET_REPLAY")
        instead: list[tuple[Any, str, Callable[..., Any]]] = [
            (replay, "_wanted", lambda arguments: way() != "0"),
            (replay, "wanted", lambda device: way() == "graph"),
            (overlap, "able", lambda device: capability >= (9, 0)),
        ]
        for module in (launch, gathered_readers, weight_gradients):
            instead.append((module, "check_device", lambda name, tensor: None))
            instead.append((module, "capability_of", lambda device: capability))
        for module, name, function in instead:
            setattr(module, name, function)
        load = CompiledKernel._init_handles

        def loaded(kernel: Any) -> None:
            fresh = kernel.module is None
            load(kernel)
            if fresh:
                sizes = list(_sizes(kernel.src.signature.values()))
                given = (ctypes.c_int * len(sizes))(*sizes)
                if self.library.silent_sizes(ctypes.c_long(kernel.function), len(sizes), given):
                    raise RuntimeError(f"{kernel.name} must have at most 128 parameters, got {len(sizes)}")

        CompiledKernel._init_handles = loaded

    def launches_of(self, step: Callable[[], None], folder: Path) -> list[list[str]]:
        """Every launch of a step: function, grid, threads, shared memory, whether it overlaps, parameters."""
        log = folder / "launches"
        self.library.silent_log(str(log).encode())
        step()
        self.library.silent_log(None)
        return [line.split() for line in log.read_text().splitlines()]


def _sizes(types: Any) -> Iterator[int]:
    """Bytes of each parameter that a kernel takes, tuples in a row, constants left out."""
    for kind in types:
        if isinstance(kind, tuple | list):
            yield from _sizes(kind)
        elif kind != "constexpr":
            yield 8 if kind[0] == "*" or kind in ("i64", "u64", "fp64") else 4
