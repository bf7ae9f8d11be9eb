"""Counts: small modules by hand, the paper's networks to the unit."""

import pytest
import torch
from torch import nn

import thresholdnet as tn
from thresholdnet.counting import Count, count

# parameters, plain MACs, #FLOPS, #MAdds of one 224x224 image
EXACT = {
    "thresholdnet_v1": (15_323_248, 3_424_057_664, 3_458_096_690, 6_897_860_304),
    "thresholdnet_v2": (17_140_592, 4_028_214_336, 4_070_149_810, 8_118_592_208),
}
# parameters, #FLOPS, #MAdds in 10^9
ROUNDED = {
    "densenet121": (7_978_856, 2.883, 5.742),
    "densenet169": (14_149_480, 3.418, 6.810),
    "densenet201": (20_013_928, 4.367, 8.701),
    "densenet161": (28_681_000, 7.818, 15.595),
    "hardnet68": (17_565_348, 4.260, 8.511),
    "resnet50": (25_557_032, 4.119, 8.220),
    "resnet101": (44_549_160, 7.844, 15.663),
    "resnext50_32x4d": (25_028_904, 4.266, 8.512),
    "resnext101_32x8d": (88_791_336, 16.487, 32.933),
    "wide_resnet50_2": (68_883_240, 11.434, 22.847),
    "wide_resnet101_2": (126_886_696, 22.806, 45.581),
}


@pytest.mark.parametrize("name", EXACT)
def test_thresholdnet_to_the_unit(name):
    assert count(tn.create_model(name, device="meta")) == Count(*EXACT[name])


@pytest.mark.parametrize("name", ROUNDED)
def test_the_other_systems_to_three_decimals(name):
    if name.startswith(("res", "wide")):
        pytest.importorskip("torchvision")
    parameters, flops, madds = ROUNDED[name]
    got = count(tn.create_model(name, device="meta"))
    assert got.parameters == parameters
    assert (round(got.flops / 1e9, 3), round(got.madds / 1e9, 3)) == (flops, madds)
    assert got.macs < got.flops < got.madds


def test_hardnet85():
    got = count(tn.create_model("hardnet85", device="meta"))
    assert (round(got.parameters / 1e6, 2), round(got.flops / 1e9, 2)) == (36.67, 9.10)
    assert round(got.madds / 1e9, 2) == 18.18


SHAPE = (1, 8, 6, 4)  # 192 elements
HAND = [
    # 12 outputs channels of 6 x 4 pixels, each the sum of (8 / 4) * 3 * 3 = 18 products
    (nn.Conv2d(8, 12, 3, padding=1, groups=4, bias=False), 288 * 18, 288 * 18, 288 * 35),
    (nn.Conv2d(8, 12, 3, padding=1, groups=4), 288 * 18, 288 * 19, 288 * 36),
    # stride 2, 3 x 1 kernel without padding: 2 x 2 pixels of 5 channels, 24 products each
    (nn.Conv2d(8, 5, (3, 1), stride=2, bias=False), 20 * 24, 20 * 24, 20 * 47),
    (nn.Linear(4, 7), 8 * 6 * 7 * 4, 8 * 6 * 7 * 4, 8 * 6 * 7 * 7),
    (nn.BatchNorm2d(8), 0, 2 * 192, 4 * 192),
    (nn.BatchNorm2d(8, affine=False), 0, 192, 4 * 192),
    (nn.ReLU(inplace=True), 0, 192, 192),
    (nn.ReLU6(), 0, 192, 192),
    (nn.MaxPool2d(3, 2, 1), 0, 192, 8 * 3 * 2 * 8),
    (nn.MaxPool2d((2, 1)), 0, 192, 8 * 3 * 4 * 1),
    (nn.AvgPool2d(2), 0, 192, 8 * 3 * 2 * 4),
    (nn.AdaptiveAvgPool2d(1), 0, 0, 0),
    (nn.Dropout(0.5), 0, 0, 0),
]


@pytest.mark.parametrize(("module", "macs", "flops", "madds"), HAND, ids=lambda v: type(v).__name__)
def test_small_modules_by_hand(module, macs, flops, madds):
    parameters = sum(p.numel() for p in module.parameters())
    assert count(module, SHAPE) == Count(parameters, macs, flops, madds)


def test_the_figures_are_per_image():
    module = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    assert count(module, (32, *SHAPE[1:])) == count(module, SHAPE)


class Shared(nn.Module):
    """One ReLU and one convolution, each run twice: at 8 x 8 and at 4 x 4 pixels."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        self.act = nn.ReLU()
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        x = self.pool(self.act(self.conv(x)))
        return self.act(self.conv(x))


def test_a_shared_module_counts_by_its_last_run_but_all_its_macs_count():
    got = count(Shared(), (1, 3, 8, 8))
    assert got.macs == 9 * 64 + 9 * 16
    assert got.flops == 9 * 16 + 3 * 16 + 3 * 64  # convolution and ReLU at 4 x 4, the pool's input at 8 x 8
    assert got.madds == 3 * 16 * 5 + 3 * 16 + 3 * 16 * 3


def test_the_callers_model_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.ReLU())).double().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    count(model, (1, 3, 8, 8))
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.device.type == "cpu" and p.dtype == torch.float64 for p in model.parameters())


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    assert count(model, (1, 4)) == Count(16, 32, 32, 2 * 4 * 7)


def test_pyramids_and_low_precision_are_counted():
    whole = tn.create_model("thresholdnet_v1", 0, device="meta", dtype=torch.bfloat16)
    pyramid = tn.create_model("thresholdnet_v1", features_only=True, device="meta")
    assert count(whole) == count(pyramid)


@pytest.mark.parametrize(
    ("model", "shape", "error", "words"),
    [
        ("resnet50", SHAPE, TypeError, "model must be a torch.nn.Module"),
        (nn.ReLU(), 224, TypeError, "input_shape must be a sequence"),
        (nn.ReLU(), "1,3", TypeError, "input_shape must be a sequence"),
        (nn.ReLU(), (), ValueError, "input_shape must hold"),
        (nn.ReLU(), (1, 0), ValueError, "input_shape entry must be at least 1, got 0"),
        (nn.ReLU(), (1, 2.5), TypeError, "input_shape entry must be an integer"),
    ],
)
def test_bad_input_gets_one_sentence(model, shape, error, words):
    with pytest.raises(error, match=words) as caught:
        count(model, shape)
    assert "\n" not in str(caught.value)
