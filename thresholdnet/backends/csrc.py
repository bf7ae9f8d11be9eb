"""The native backend's passes over pixels in C++ and CUDA, with the results of `elementwise.py`.

On a CPU for float32, float64 and bfloat16; on a GPU of compute capability 8.0 or newer for float16 as well. Both
libraries are optional: `reason` and `cuda_reason` say why one is missing. THRESHOLDNET_CSRC=0 leaves them unused.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .. import replay
from ..activations import number
from ..pixels import count
from . import elementwise, libraries
from .elementwise import Affine, Averages

DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16),
    "cuda": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
}
LONGEST = 31
"""Taps in a row that `weight_gradient` takes."""

AVERAGING = ("cuda",)
"""Devices whose library averages; torch's loops for CPUs are as good."""


@lru_cache(maxsize=1)
def reason() -> str | None:
    """None where the CPU's library, which has all schemas, is loaded, else why it is not; the first call loads it."""
    if os.environ.get("THRESHOLDNET_CSRC") == "0":
        return "THRESHOLDNET_CSRC=0 is set"
    return libraries.load("_csrc")


@lru_cache(maxsize=1)
def cuda_reason() -> str | None:
    """None where CUDA's library is loaded behind the CPU's, else why it is not; the first call loads both."""
    if reason() is not None:
        return f"it needs the CPU's library: {reason()}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return libraries.load("_csrc_cuda")


def takes(x: Tensor) -> bool:
    """Whether a library computes on tensors like this one."""
    if x.numel() == 0 or x.dtype not in DTYPES.get(x.device.type, ()):
        return False
    return reason() is None if x.device.type == "cpu" else _runs_on(x.device)


@lru_cache(maxsize=64)
def _runs_on(device: torch.device) -> bool:
    """Whether CUDA's library runs on a GPU, which is tried: it may have no code for it, or need a newer driver."""
    if cuda_reason() is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    with _disable_current_modes():  # a fake tensor would launch nothing
        pixel = torch.zeros(1, 1, 1, 1, device=device)
        try:
            _operators().moments(pixel)
        except RuntimeError as error:
            warnings.warn(
                f"the CUDA library does not run on {device} ({error}), and torch's operations take its place: install "
                "thresholdnet again, with TORCH_CUDA_ARCH_LIST naming this GPU's compute capability",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
    return True


def instructions() -> str:
    """The CPU's instructions that the loaded library uses here: "avx512_bf16", "avx512", "avx2" or "baseline"."""
    name: str = _operators().instructions()
    return name


def described(tensors: Sequence[Tensor]) -> tuple[Hashable, bool]:
    """See `replay.described`."""
    if reason() is not None:
        return replay.described(tensors)
    found: tuple[str, bool] = torch.ops.thresholdnet_csrc.described(tensors)
    return found


def gather(sources: Sequence[Tensor], affine: Affine | None, activation: str, scratch: Tensor | None = None) -> Tensor:
    """See `elementwise.gather`; `scratch` is a vector long enough for the result."""
    read = [_rows(source) for source in sources]
    first = read[0]
    if affine is None and len(read) == 1 and first.is_contiguous(memory_format=torch.channels_last):
        return first
    batch, _, height, width = first.shape
    channels = sum(source.shape[1] for source in read)
    if scratch is None:
        out = _pixels((batch, channels, height, width), first)
    else:
        row = channels * width
        out = scratch.as_strided((batch, channels, height, width), (height * row, 1, row, channels))
    scale, shift = (None, None) if affine is None else affine
    _operators().gather(read, scale, shift, number(activation), out)
    return out


def batch_norm_affine(gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Affine:
    """See `elementwise.batch_norm_affine`."""
    made = batch_norm_vectors(gamma, beta, mean, variance, eps, 1)
    return made[2], made[3]


def batch_norm_vectors(
    gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor, eps: float | Tensor, pixels: int | Tensor
) -> Tensor:
    """See `batchnorm.batch_norm_vectors`."""
    wide = torch.float64 if gamma.dtype == torch.float64 else torch.float32
    alike = gamma.dtype == beta.dtype and mean.dtype == variance.dtype == wide
    if isinstance(eps, Tensor) or isinstance(pixels, Tensor) or not alike or not takes(gamma):
        return elementwise.batch_norm_vectors(gamma, beta, mean, variance, eps, pixels)
    vectors = [vector.contiguous() for vector in (gamma, beta, mean, variance)]
    made: Tensor = _operators().batch_norm_vectors(*vectors, eps, pixels)
    return made


def moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """See `elementwise.moments`."""
    mean, variance = _operators().moments(_rows(z))
    return mean, variance


def mask_sums(
    g: Tensor,
    add: Tensor | None,
    z: Tensor,
    affine: Affine,
    mean: Tensor,
    rstd: Tensor,
    activation: str,
    owned: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `elementwise.mask_sums`."""
    g = _rows(g)
    out = g if owned else _pixels(g.shape, g)
    also = None if add is None else _rows(add)
    sums = _operators().mask_sums(g, also, _rows(z), *affine, mean, rstd, number(activation), out)
    return out, *sums


def send(
    g: Tensor,
    features: Sequence[Tensor],
    affine: Affine,
    mean: Tensor,
    rstd: Tensor,
    before: Sequence[Tensor | None],
    owned: Sequence[bool],
    activation: str,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """See `elementwise.send`."""
    nothing = g.new_empty(0)
    arrived = [nothing if so_far is None else _rows(so_far) for so_far in before]
    out = [
        so_far if mine and so_far.numel() else _pixels(feature.shape, feature)
        for feature, so_far, mine in zip(features, arrived, owned, strict=True)
    ]
    sums = _operators().send(
        _rows(g), [_rows(f) for f in features], *affine, mean, rstd, arrived, number(activation), out
    )
    return out, *sums


def linear(g: Tensor, z: Tensor, a: Tensor | None, b: Tensor, c: Tensor, mean: Tensor | None, owned: bool) -> Tensor:
    """See `elementwise.linear`."""
    g = _rows(g)
    out = g if owned else _pixels(g.shape, g)
    _operators().linear(g, _rows(z), a, b, c, mean, out)
    return out


def correlates(dz: Tensor, kernel_size: int) -> bool:
    """Whether `weight_gradient` has loops for such a convolution and is worth it.

    Measured against gathering and the library's: 1.2 to 2.9 times as fast for 3x3, 1.0 to 1.6 for 1x1 up to 128
    outputs, 0.8 to 1.1 beyond; in bfloat16 0.9 to 5 times, 1.1 to 5, and 0.9 to 1.6. Of single pixels one tap alone
    counts: `taps.py`.
    """
    pays = max(dz.shape[2:]) > 1 and (kernel_size > 1 or dz.shape[1] <= 128) and kernel_size <= LONGEST
    return dz.device.type == "cpu" and pays and takes(dz) and (dz.dtype != torch.bfloat16 or _multiplies_bfloat16())


@lru_cache(maxsize=1)
def _multiplies_bfloat16() -> bool:
    """Whether the loops have instructions for it, and the library none for tiles (AMX), which are faster still."""
    return instructions() == "avx512_bf16" and not torch.cpu._is_amx_tile_supported()


def weight_gradient(
    sources: Sequence[Tensor], dz: Tensor, kernel: tuple[int, int], affine: Affine | None, activation: str,
    dilation: int = 1,
) -> Tensor:  # fmt: skip
    """See `native.Verbs.weight_gradient`: the sources are read where they lie, nothing is gathered.

    kernel: its height and width.
    """
    scale, shift = (None, None) if affine is None else affine
    made: Tensor = _operators().weight_gradient(
        [_rows(source) for source in sources], scale, shift, number(activation), _rows(dz), *kernel, dilation
    )
    return made


def convolves(x: Tensor, weight: Tensor, dilation: int = 1) -> bool:
    """Whether `linked_conv2d` has loops for such a convolution, of sources like x, and is worth it.

    Measured against gathering and the library's convolution of a weight as it lies: 1.0 to 10 times as fast, 0.8 to 1
    for some wide layers of 36 pixels and more; of a weight packed for it 0.9 to 3.
    """
    exact = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    pixels = count(x)
    products = pixels * weight.numel()
    few = (pixels <= 16 and products <= 2**24) or (pixels <= 64 and products <= 2**22)
    return exact and few and products > 0 and dilation == 1 and takes(x)


def linked_conv2d(
    sources: Sequence[Tensor], weight: Tensor, affine: Affine | None, bias: Tensor | None, activation: str
) -> Tensor:
    """See `native.Verbs.conv`, with a weight in channels_last order: nothing is gathered but pixels of one layer."""
    scale, shift = (None, None) if affine is None else affine
    made: Tensor = _operators().linked_conv2d(
        [_rows(source) for source in sources], scale, shift, number(activation), weight, bias
    )
    return made


def max_pool2d(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil: bool) -> Tensor:
    """See `elementwise.max_pool2d`."""
    if not _square(kernel, stride, padding, ceil):
        return elementwise.max_pool2d(x, kernel, stride, padding, ceil)
    made: Tensor = _operators().max_pool2d(_whole(x), kernel[0], stride[0], padding[0])
    return made


def max_pool2d_backward(
    grad: Tensor, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil: bool
) -> Tensor:
    """See `elementwise.max_pool2d_backward`."""
    if not _square(kernel, stride, padding, ceil):
        return elementwise.max_pool2d_backward(grad, x, kernel, stride, padding, ceil)
    made: Tensor = _operators().max_pool2d_backward(_whole(grad), _whole(x), kernel[0], stride[0], padding[0])
    return made


def avg_pool2d(x: Tensor, window: Averages, affine: Affine | None = None, activation: str = "relu") -> Tensor:
    """See `elementwise.avg_pool2d`."""
    if not _side_by_side(x, window):
        return elementwise.avg_pool2d(x if affine is None else gather([x], affine, activation), window)
    scale, shift = (None, None) if affine is None else affine
    act = 0 if affine is None else number(activation)
    made: Tensor = _operators().avg_pool2d(_whole(x), scale, shift, act, window[0][0])
    return made


def avg_mask_sums(
    grad: Tensor,
    window: Averages,
    z: Tensor,
    affine: Affine,
    mean: Tensor,
    rstd: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `elementwise.avg_mask_sums`."""
    if not _side_by_side(z, window):
        g = torch.ops.aten.avg_pool2d_backward(grad, z, *window, None)
        return mask_sums(g, None, z, affine, mean, rstd, activation, owned=True)
    out, act = _pixels(z.shape, z), number(activation)
    sums = _operators().spread_mask_sums(_whole(grad), _whole(z), *affine, mean, rstd, act, window[0][0], out)
    return out, *sums


def _side_by_side(x: Tensor, window: Averages) -> bool:
    """Whether the library averages such windows of x, each behind the other: on devices that gain by it."""
    kernel, stride, padding, ceil, _ = window
    apart = _square(kernel, stride, padding, ceil) and kernel[0] == stride[0] and padding[0] == 0
    return apart and x.device.type in AVERAGING and x.numel() < 2**31 * x.shape[1]


def _square(kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil: bool) -> bool:
    """Whether the library has such a pooling."""
    return not ceil and all(side[0] == side[1] for side in (kernel, stride, padding))


def _whole(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _operators() -> Any:
    return torch.ops.thresholdnet_csrc


def _pixels(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _rows(x: Tensor) -> Tensor:
    """x itself if its pixels lie in rows of channels, as in channels_last tensors and their channel slices."""
    batch, channels, height, width = x.shape
    n, c, h, w = x.stride()
    row = w if width > 1 else h if height > 1 else n if batch > 1 else channels
    lined_up = (
        (channels == 1 or c == 1) and (height == 1 or h == width * row) and (batch == 1 or n == height * width * row)
    )
    return x if lined_up and row >= channels else x.contiguous(memory_format=torch.channels_last)
