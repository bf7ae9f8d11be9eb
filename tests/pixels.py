"""Tensors of pixels for tests of the C++ library's loops."""

import torch


def pixels(*shape, dtype=torch.float64):
    """Random values in channels_last order."""
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def among_others(x):
    """The same values as a slice of channels whose neighbours are NaN."""
    n, c, h, w = x.shape
    wide = torch.full((n, c + 7, h, w), float("nan"), dtype=x.dtype).contiguous(memory_format=torch.channels_last)
    wide[:, 3 : 3 + c] = x
    return wide[:, 3 : 3 + c]
