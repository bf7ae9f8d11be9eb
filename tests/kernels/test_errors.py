"""Bad input gets one sentence, never garbage."""

import pytest
import torch
from poisoned import fill, rows
from thresholdnet.kernels import launch, operands
from thresholdnet.kernels.configs import ConvolutionConfig

WEIGHT = torch.ones(8, 8, 3, 3)


@pytest.fixture
def slots():
    _, slots = rows(2, 4, 4, (8, 8, 8), torch.float32)
    for slot in slots:
        fill(slot)
    return slots


def other(shape=(2, 8, 4, 4), dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    (
        (lambda a: {"sources": [a[0].contiguous()]}, ValueError, "must be a slot"),
        (lambda a: {"sources": [a[0].expand(2, 8, 4, 4)[:, :1].expand(2, 8, 4, 4)]}, ValueError, "must be a slot"),
        (lambda a: {"sources": [a[0].double()]}, TypeError, "dtype and device of out"),
        (lambda a: {"sources": [a[0][:1]]}, ValueError, "batch and image size of out"),
        (lambda a: {"sources": [a[0][:, :, :2]]}, ValueError, "must be a slot"),
        (lambda a: {"sources": [a[0], other()], "weight": torch.ones(8, 16, 3, 3)}, ValueError, "one allocation"),
        (lambda a: {"sources": []}, ValueError, "weight must have the shape"),
        (lambda a: {"sources": [3]}, TypeError, r"sources\[0\] must be a torch.Tensor"),
        (lambda a: {"out": other((2, 6, 4, 4))}, ValueError, "must be a slot"),
        (lambda a: {"out": a[2].long()}, TypeError, "float32, bfloat16, float16 or float64"),
        (lambda a: {"out": a[2][0]}, ValueError, r"shape \[N, C, H, W\]"),
        (lambda a: {"weight": torch.ones(8, 7, 3, 3)}, ValueError, "weight must have the shape"),
        (lambda a: {"weight": torch.ones(8, 8, 5, 5)}, ValueError, "k 1 or 3"),
        (lambda a: {"weight": WEIGHT.long()}, TypeError, "floating-point"),
        (lambda a: {"bias": torch.ones(7)}, ValueError, r"bias must have the shape \(8,\)"),
        (lambda a: {"bias": torch.ones(8), "statistics": True}, ValueError, "statistics must be False"),
        (lambda a: {"affine": (torch.ones(8), torch.ones(9))}, ValueError, r"affine\[1\] must have the shape"),
        (lambda a: {"affine": (1, 2)}, TypeError, r"affine\[0\] must be a torch.Tensor"),
        (lambda a: {"activation": "gelu"}, ValueError, "activation must be 'relu', 'relu6', 'leaky_relu"),
        (lambda a: {"config": ConvolutionConfig(16, 16, 16, 16, group=(3, 1))}, ValueError, "config.group"),
        (lambda a: {"config": ConvolutionConfig(16, 16, splits=0)}, ValueError, "config.splits must be 1 to 32, got 0"),
        (lambda a: {"config": ConvolutionConfig(16, 16, splits=33)}, ValueError, "config.splits .* got 33"),
    ),
)
def test_conv(slots, change, error, words):
    arguments = {"sources": [slots[0]], "weight": WEIGHT, "out": slots[2]} | change(slots)
    with pytest.raises(error, match=words) as caught:
        launch.conv(arguments.pop("sources"), arguments.pop("weight"), arguments.pop("out"), **arguments)
    assert "\n" not in str(caught.value)


def test_misaligned_address():
    buffer = torch.zeros(2 * 4 * 4 * 8 + 1)
    slot = buffer.as_strided((2, 8, 4, 4), (128, 1, 32, 8), 1)
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        launch.slot_statistics(slot)


def test_no_room_for_the_padding():
    slot = torch.zeros(2 * 4 * 4 * 8 - 3).as_strided((2, 5, 4, 4), (128, 1, 32, 8))
    with pytest.raises(ValueError, match="room for 8 channels"):
        launch.slot_statistics(slot)


def test_too_large(slots, monkeypatch):
    monkeypatch.setattr(operands, "MAX_ELEMENTS", 2 * 4 * 4 * 32)
    launch.slot_statistics(slots[0])
    monkeypatch.setattr(operands, "MAX_ELEMENTS", 2 * 4 * 4 * 32 - 24)
    with pytest.raises(ValueError, match=r"fewer than 2\^31 elements"):
        launch.slot_statistics(slots[0])


def test_other_devices():
    with pytest.raises(RuntimeError, match="CUDA device"):
        launch.slot_statistics(torch.empty(2, 8, 4, 4, device="meta"))


def test_gradient(slots):
    a, z, out = slots
    one = torch.ones(8)
    for dz, weights, mask, words in (
        ([a], [], None, "one weight for each of the 1 readers"),
        ([a], [torch.ones(7, 8, 3, 3)], None, r"weights\[0\] must have the shape"),
        ([a, a], [WEIGHT, torch.ones(8, 8, 1, 1)], None, "one kernel size"),
        ([a], [WEIGHT], (z[:, :5], one, one, one, one), "mask.z must have the shape"),
        ([a], [WEIGHT], (z, one, one, one, torch.ones(3)), r"mask\[4\] must have the shape"),
    ):
        with pytest.raises(ValueError, match=words):
            launch.gradient(dz, weights, out, mask=mask)
    with pytest.raises(ValueError, match="with a mask"):
        launch.gradient([a], [WEIGHT], out, mask=(z, one, one, one, one), activation=None)


def test_weight_gradient(slots):
    with pytest.raises(ValueError, match="kernel_size must be 1 or 3"):
        launch.weight_gradient([slots[0]], slots[2], 5)
    with pytest.raises(ValueError, match="at least one slot"):
        launch.weight_gradient([], slots[2], 3)
