"""What a machine can do at most in one dtype, for the roofline: a known card's data sheet, else measured here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..memory import dtype_of
from .clock import clock_for

COPIED = {"cpu": 2**27, "cuda": 2**30}  # bytes, beyond the caches
SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices that are multiplied
CONVOLVED = {"cpu": (8, 256, 28), "cuda": (64, 512, 28)}  # batch, channels, side
REPEATS = 7


@dataclass(frozen=True)
class Peak:
    """The roof over one dtype.

    Attributes:
        tflops: 10^12 floating-point operations a second.
        gbs: 10^9 bytes a second from and to memory.
        source: where the two are from.
    """

    tflops: float
    gbs: float
    source: str

    def bound_ms(self, flops: float, bytes: float) -> float:
        """The least time: of the arithmetic, or of the memory traffic."""
        return max(flops / self.tflops / 1e9, bytes / self.gbs / 1e6)

    @property
    def fields(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet: dense rates (no sparsity) of its tensor cores, and of plain fp32, in TFLOP/s."""

    names: tuple[str, ...]  # beginnings of what torch calls it
    half: float
    tf32: float
    fp32: float
    fp64: float
    gbs: float
    sheet: str


CARDS = (
    Card(("NVIDIA A100-SXM4-80GB",), 312, 156, 19.5, 19.5, 2039, "A100"),
    Card(("NVIDIA A100 80GB PCIe",), 312, 156, 19.5, 19.5, 1935, "A100"),
    Card(("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 312, 156, 19.5, 19.5, 1555, "A100"),
    Card(("NVIDIA H100 80GB HBM3",), 989.4, 494.7, 66.9, 66.9, 3350, "H100"),
    Card(("NVIDIA H100 PCIe",), 756.5, 378, 51, 51, 2000, "H100"),
    Card(("NVIDIA H200",), 989.4, 494.7, 66.9, 66.9, 4800, "H200"),
)
"""NVIDIA's data sheets of the A100 (2021), H100 (2023) and H200 (2024); what they print with sparsity, halved."""


def peak(device: str, dtype: str) -> Peak:
    """The roof over a dtype on a device: from `CARDS` where the GPU stands there, else measured.

    fp32 on a GPU is TF32's where torch lets convolutions use it.
    """
    place = torch.device(device)
    if place.type == "cuda":
        known = of_card(torch.cuda.get_device_name(place), dtype, torch.backends.cudnn.allow_tf32)
        if known is not None:
            return known
    return measured(place, dtype)


def of_card(name: str, dtype: str, tf32: bool) -> Peak | None:
    """The roof over a dtype on a card by its name, None for one that is not in `CARDS`."""
    for card in CARDS:
        if name.startswith(card.names):
            rates = {"bf16": card.half, "fp16": card.half, "fp64": card.fp64, "fp32": card.tf32 if tf32 else card.fp32}
            return Peak(rates[dtype], card.gbs, f"NVIDIA's data sheet of the {card.sheet}, dense")
    return None


def measured(
    place: torch.device,
    dtype: str,
    copied: int | None = None,
    side: int | None = None,
    images: tuple[int, int, int] | None = None,
) -> Peak:
    """The best of a few large copies, and of square matrix products and wide 3x3 convolutions: either may be faster.

    Args:
        copied: bytes of the copy.
        side: of the matrices.
        images: batch, channels (read and written) and side of the convolution; all three the device's own by default.
    """
    side = side or SIDE[place.type]
    batch, channels, pixels = images or CONVOLVED[place.type]
    source = torch.ones(copied or COPIED[place.type], dtype=torch.int8, device=place)
    target = torch.empty_like(source)
    gbs = 2 * source.numel() / _best(place, lambda: target.copy_(source)) / 1e6

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=place).to(dtype_of(dtype))

    a, b = random(side, side), random(side, side)
    x, weight = (
        t.contiguous(memory_format=torch.channels_last)
        for t in (random(batch, channels, pixels, pixels), random(channels, channels, 3, 3))
    )
    with torch.no_grad():
        product = 2 * side**3 / _best(place, lambda: torch.mm(a, b)) / 1e9
        convolution = 18 * x.numel() * channels / _best(place, lambda: F.conv2d(x, weight, padding=1)) / 1e9
    how = (
        f"the faster of a product of {side} x {side} matrices and a 3x3 convolution of {channels} channels on "
        f"{batch} x {pixels}²; a copy of {source.numel() >> 20} MiB"
    )
    return Peak(max(product, convolution), gbs, f"measured: {how}")


def _best(place: torch.device, call: Callable[[], Any]) -> float:
    """Milliseconds."""
    clock = clock_for(place)
    call()
    return min(clock(call) for _ in range(REPEATS))
