"""3x3 convolutions of images of at most 2 x 2 pixels on a CPU: products with those taps alone that meet the image.

Of an output's nine taps only four meet 2 x 2 pixels, and only one meets a single pixel; the library multiplies all, and
takes longest for the weight's gradient, up to 60 times what it takes here (912 to 462 channels, one pixel). Here

    out[p] = sum_y w[y, p] x[y],    dx[y] = sum_p w[y, p]^T dout[p],    dw[y, p] += dout[p]^T x[y]

p: an output's pixel; y: a row of the input, its W * C values side by side; w[y, p]: the W neighbouring taps with which
p sees y, [O, W * C]. In channels_last order all of them are matrices where they lie: nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

LARGEST = 2
"""Pixels in height and width up to which every output sees every input."""


def takes(x: Tensor, kernel_size: int, dilation: int = 1) -> bool:
    """Whether a convolution of x, or a gradient of it, has this form.

    bfloat16 would be rounded at every product, so of single pixels alone, whose results are one product each.
    """
    largest = 1 if x.dtype == torch.bfloat16 else LARGEST
    small = max(x.shape[2:]) <= largest and x.numel() > 0 and (kernel_size, dilation) == (3, 1)
    return small and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64, torch.bfloat16)


def conv(x: Tensor, weight: Tensor) -> Tensor:
    """conv2d(x, weight, padding=1) of x [N, C, H, W] and weight [O, C, 3, 3]; everything is channels_last."""
    out = _empty(x, weight.shape[0])
    written, rows = _pixels(out), _rows(x)
    for pixel, row, taps in _products(x, weight):
        written[:, pixel].addmm_(rows[:, row], taps.t(), beta=int(row > 0))
    return out


def data_gradient(dz: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x from that of the result."""
    dx = _empty(dz, weight.shape[1])
    written, arriving = _rows(dx), _pixels(dz)
    for pixel, row, taps in _products(dx, weight):
        written[:, row].addmm_(arriving[:, pixel], taps, beta=int(pixel > 0))
    return dx


def weight_gradient(x: Tensor, dz: Tensor) -> Tensor:
    """The gradient of the weight, [O, C, 3, 3]."""
    dw = torch.zeros(dz.shape[1], 3, 3, x.shape[1], dtype=x.dtype).permute(0, 3, 1, 2)
    rows, arriving = _rows(x), _pixels(dz)
    for pixel, row, taps in _products(x, dw):
        taps.addmm_(arriving[:, pixel].t(), rows[:, row])
    return dw


def _products(x: Tensor, weight: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Every output's pixel with every row of x, and the taps between them, [O, W * C] in the weight's memory."""
    height, width = x.shape[2:]
    by_tap = weight.permute(0, 2, 3, 1)
    for pixel in range(height * width):
        down, across = divmod(pixel, width)
        for row in range(height):
            yield pixel, row, by_tap[:, row - down + 1, 1 - across : 1 - across + width].flatten(1)


def _pixels(x: Tensor) -> Tensor:
    """[N, H * W, C], the same memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _rows(x: Tensor) -> Tensor:
    """[N, H, W * C], the same memory."""
    return x.permute(0, 2, 3, 1).flatten(2)


def _empty(x: Tensor, channels: int) -> Tensor:
    shape = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
