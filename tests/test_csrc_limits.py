"""The C++ and CUDA libraries where numbers or machines end: long windows, GPUs for which nothing was built."""

import pytest
import torch
from operator_calls import OPERATORS, Call, OperatorCase
from torch._subclasses.fake_tensor import FakeTensorMode

from thresholdnet.backends import csrc


@pytest.mark.skipif(csrc.reason() is not None, reason=f"needs the C++ library: {csrc.reason()}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_max_pooling_tells_all_pixels_of_a_long_window_apart(dtype):
    """A float has no number for 2^24 + 1: of one row, which is one window, the pixels behind were taken for one."""
    length = 2**24 + 8
    x = torch.zeros(1, 1, 1, length, dtype=dtype)
    x[..., 2**24 + 1] = 1
    window = [[2 * length] * 2, [4 * length] * 2, [length] * 2, False]
    y = csrc.max_pool2d(x, *window)
    assert y.tolist() == [[[[1.0]]]]
    assert csrc.max_pool2d_backward(y, x, *window).nonzero().tolist() == [[0, 0, 0, 2**24 + 1]]


@pytest.mark.skipif(csrc.reason() is not None, reason=f"needs the C++ library: {csrc.reason()}")
@pytest.mark.parametrize(
    "name", sorted({*OPERATORS} - {"moments", "max_pool2d"})
)  # of one tensor: torch finds no kernel
def test_an_operand_that_is_missing_is_named(name):
    """None in a tensor's place; torch's own words for it end in its C interface and a trace on stderr."""
    case = OperatorCase(name, (8,), (2, 4, 6), torch.float32, 1, ((0, 0),), False, 0, False, (2, 2, 0), 0)
    places = [place for place, argument in enumerate(Call(case).arguments) if isinstance(argument, torch.Tensor)]
    assert places
    for place in places:
        call = Call(case)
        call.arguments[place] = None
        with pytest.raises(RuntimeError, match=f"^{name}: [a-z]+ must ") as refused:
            call.run()
        assert "API call failed" not in str(refused.value)


class Refusing:
    """Operators without code for the device."""

    def moments(self, z):
        """As launched.h refuses."""
        assert type(z) is torch.Tensor
        raise RuntimeError("moments: it could not be launched: no kernel image is available")


def test_a_gpu_without_kernels_gets_torchs_operations(monkeypatch):
    monkeypatch.setattr(csrc, "cuda_reason", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(csrc, "_operators", Refusing)
    runs_on = csrc._runs_on.__wrapped__
    with FakeTensorMode(), pytest.warns(RuntimeWarning, match=r"does not run on cpu \(moments: .* no kernel image"):
        assert not runs_on(torch.device("cpu"))
    monkeypatch.setattr(csrc, "_operators", lambda: torch.ops.aten)  # has no operator of that name
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not runs_on(torch.device("cpu"))


@pytest.mark.skipif(csrc.reason() is not None, reason=f"needs the C++ library: {csrc.reason()}")
def test_a_gpu_with_kernels_takes_them(monkeypatch):
    """The CPU's operator answers for the GPU's."""
    monkeypatch.setattr(csrc, "cuda_reason", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with FakeTensorMode():
        assert csrc._runs_on.__wrapped__(torch.device("cpu"))
