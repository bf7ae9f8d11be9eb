"""Blocks and networks in other people's class layouts, written here from their public attribute names and shapes."""

import itertools

import torch
import torch.nn.functional as F
from released import harmonic_sources, harmonic_width
from torch import nn


class ConvLayer(nn.Sequential):
    """HarDNet's layer: children conv, norm, relu."""

    def __init__(self, read, out, kernel=3, stride=1, act=nn.ReLU6):
        super().__init__()
        self.add_module("conv", nn.Conv2d(read, out, kernel, stride, kernel // 2, bias=False))
        self.add_module("norm", nn.BatchNorm2d(out))
        self.add_module("relu", act(True))


class HarDBlock(nn.Module):
    """HarDNet's block: attributes links, keepBase, layers."""

    def __init__(self, read, k, m, depth, keep_base=False, act=nn.ReLU6):
        super().__init__()
        self.keepBase, self.links, layers = keep_base, [], []
        widths = [read]
        self.out_channels = read if keep_base else 0
        for i in range(1, depth + 1):
            self.links.append(harmonic_sources(i))
            widths.append(harmonic_width(i, k, m))
            layers.append(ConvLayer(sum(widths[s] for s in self.links[-1]), widths[-1], act=act))
            if i % 2 or i == depth:
                self.out_channels += widths[-1]
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        made = [x]
        for row, layer in zip(self.links, self.layers, strict=True):
            made.append(layer(torch.cat([made[s] for s in row], 1) if len(row) > 1 else made[row[0]]))
        last = len(made) - 1
        return torch.cat([y for i, y in enumerate(made) if (i == 0 and self.keepBase) or i == last or i % 2], 1)


class HarDNet68(nn.Module):
    """HarDNet68 in its authors' layout: a flat ModuleList `base`, the classifier its last entry."""

    def __init__(self, classes=10):
        super().__init__()
        base, width = [ConvLayer(3, 32, 3, 2), ConvLayer(32, 64), nn.MaxPool2d(3, 2, 1)], 64
        stages = ((14, 8, 128, 1), (16, 16, 256, 0), (20, 16, 320, 1), (40, 16, 640, 1), (160, 4, 1024, 0))
        for k, depth, out, pool in stages:
            block = HarDBlock(width, k, 1.7, depth)
            base += [block, ConvLayer(block.out_channels, out, 1)]
            width = out
            if pool:
                base.append(nn.MaxPool2d(2, 2))
        base.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.0), nn.Linear(width, classes)))
        self.base = nn.ModuleList(base)

    def forward(self, x):
        for layer in self.base:
            x = layer(x)
        return x


class Gate(nn.Module):
    """Channels weighed by a hard sigmoid of their means."""

    def __init__(self, channels):
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x * F.hardsigmoid(self.fc(x.mean((2, 3), keepdim=True)))


class Aggregation(nn.Module):
    """VoVNet's block in vovnet-detectron2's layout: layers, concat, ese, identity."""

    def __init__(self, read, width, out, depth, identity=False):
        super().__init__()
        self.identity = identity
        widths = [read, *[width] * depth]
        self.layers = nn.ModuleList(ConvLayer(a, b, act=nn.ReLU) for a, b in itertools.pairwise(widths))
        self.concat = ConvLayer(sum(widths), out, 1, act=nn.ReLU)
        self.ese = Gate(out)

    def forward(self, x):
        made = [x]
        for layer in self.layers:
            made.append(layer(made[-1]))
        y = self.ese(self.concat(torch.cat(made, 1)))
        return y + x if self.identity else y


class Encoder(nn.Module):
    """A segmentation network's manner: ReLU, the block's input among its outputs, skips and upsampling around."""

    def __init__(self):
        super().__init__()
        self.stem = ConvLayer(3, 16, 3, 2, nn.ReLU)
        self.down = HarDBlock(16, 10, 1.6, 4, keep_base=True, act=nn.ReLU)
        self.up = HarDBlock(self.down.out_channels + 16, 8, 1.7, 8, act=nn.ReLU)
        self.head = nn.Conv2d(self.up.out_channels, 5, 1)

    def forward(self, x):
        skip = self.stem(x)
        low = F.interpolate(self.down(F.avg_pool2d(skip, 2)), size=skip.shape[2:])
        return self.head(self.up(torch.cat([low, skip], 1)))
