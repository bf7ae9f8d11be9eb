"""Small models in two forms, plain and fused, for the tests of torch's other tools."""

import copy

import torch
import torchvision
from torch import nn

import thresholdnet as tn
from thresholdnet import ThresholdBlock, links

MODELS = ["conv_bn_relu", "bottleneck", "densenet"]


def pair(name):
    """A model of `MODELS` of images [N, 5, 8, 8]: plain in training mode, and the same fused by the native backend."""
    torch.manual_seed(0)
    if name == "densenet":
        settings = {"growth_rate": 4, "block_config": (2, 2), "num_init_features": 6, "bn_size": 2, "num_classes": 3}
        plain = torchvision.models.DenseNet(**settings)
        plain.features.conv0 = nn.Conv2d(5, 6, 3, padding=1, bias=False)
        return plain, tn.convert(copy.deepcopy(plain), report=None)
    plain = ThresholdBlock(5, links.threshold_ab(4, 2), 4, unit=name)
    return plain, copy.deepcopy(plain).fuse(True, "native")
