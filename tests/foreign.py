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


class HarDMSEG(HarDNet68):
    """HarDNet-MSEG's manner: the encoder without its head gives four branches, three of which meet in one map."""

    def __init__(self):
        super().__init__()
        self.rfb = nn.ModuleList(nn.Conv2d(width, 8, 1, bias=False) for width in (320, 640, 1024))

    def forward(self, x):
        branches = []
        for i in range(len(self.base) - 1):
            x = self.base[i](x)
            if i in (4, 9, 12, 15):
                branches.append(x)
        maps = [conv(branch) for conv, branch in zip(self.rfb, branches[1:], strict=True)]
        size = maps[0].shape[2:]
        return maps[0] * F.interpolate(maps[1], size=size) + F.interpolate(maps[2], size=size)


class TransitionUp(nn.Module):
    """FC-HarDNet's: no parameters, bilinear to the skip's size, then both together."""

    def forward(self, x, skip):
        up = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=True)
        return torch.cat([up, skip], 1)


class FCHarDNet(nn.Module):
    """FC-HarDNet-70: base, transUpBlocks, denseBlocksUp, conv1x1_up, finalConv; blocks on the way down are skips."""

    def __init__(self, classes=3):
        super().__init__()
        growth, depths, widths, act = (10, 16, 18, 24, 32), (4, 4, 8, 8, 8), (64, 96, 160, 224, 320), nn.ReLU
        stem = [(3, 16, 3, 2), (16, 24, 3, 1), (24, 32, 3, 2), (32, 48, 3, 1)]
        base, skips, self.shortcut_layers = [ConvLayer(*shape, act) for shape in stem], [], []
        width = 48
        for i, (k, depth, out) in enumerate(zip(growth, depths, widths, strict=True)):
            base.append(HarDBlock(width, k, 1.7, depth, act=act))
            skips.append(base[-1].out_channels)
            if i < 4:
                self.shortcut_layers.append(len(base) - 1)
            base.append(ConvLayer(skips[-1], out, 1, act=act))
            width = out
            if i < 4:
                base.append(nn.AvgPool2d(2, 2))
        self.base = nn.ModuleList(base)
        self.transUpBlocks, self.denseBlocksUp, self.conv1x1_up = (nn.ModuleList() for _ in range(3))
        for i in (3, 2, 1, 0):
            joined = width + skips[i]
            self.transUpBlocks.append(TransitionUp())
            self.conv1x1_up.append(ConvLayer(joined, joined // 2, 1, act=act))
            self.denseBlocksUp.append(HarDBlock(joined // 2, growth[i], 1.7, depths[i], act=act))
            width = self.denseBlocksUp[-1].out_channels
        self.finalConv = nn.Conv2d(width, classes, 1)

    def forward(self, x):
        size, skips = x.shape[2:], []
        for i, layer in enumerate(self.base):
            x = layer(x)
            if i in self.shortcut_layers:
                skips.append(x)
        for up, conv, block in zip(self.transUpBlocks, self.conv1x1_up, self.denseBlocksUp, strict=True):
            x = block(conv(up(x, skips.pop())))
        return F.interpolate(self.finalConv(x), size=size, mode="bilinear", align_corners=True)


class ThreshLayer(nn.Sequential):
    """ThreshNet's dense layer, alone in the network's flat list: what it read comes out in front of what it made."""

    def __init__(self, read, k):
        super().__init__()
        self.add_module("norm1", nn.BatchNorm2d(read))
        self.add_module("relu1", nn.ReLU(True))
        self.add_module("conv1", nn.Conv2d(read, 128, 1, bias=False))
        self.add_module("norm2", nn.BatchNorm2d(128))
        self.add_module("relu2", nn.ReLU(True))
        self.add_module("conv2", nn.Conv2d(128, k, 3, padding=1, bias=False))

    def forward(self, x):
        return torch.cat([x, super().forward(x)], 1)


class ThreshNet79(nn.Module):
    """ThreshNet79 in its authors' layout: a flat ModuleList `base`, the classifier its last entry."""

    def __init__(self, classes=10):
        super().__init__()
        base = [ConvLayer(3, 32, 3, 2, nn.ReLU), ConvLayer(32, 64, act=nn.ReLU), nn.MaxPool2d(3, 2, 1)]
        width = 64
        for depth, out, pool in ((6, 128, 1), (8, 192, 1), (12, 288, 0)):
            base += [ThreshLayer(width + 32 * i, 32) for i in range(depth)]
            base.append(ConvLayer(width + 32 * depth, out, 1, act=nn.ReLU))
            width = out
            base += [nn.MaxPool2d(2, 2)] * pool
        for k, depth, out, pool in ((40, 16, 480, 1), (160, 4, 960, 0)):
            block = HarDBlock(width, k, 1.7, depth, act=nn.ReLU)
            base += [block, ConvLayer(block.out_channels, out, 1, act=nn.ReLU)]
            width = out
            base += [nn.MaxPool2d(2, 2)] * pool
        base.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)))
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


class NewFirst(nn.Module):
    """A dense layer in pytorch-cifar's manner: activations are functions, and what it made stands in front."""

    def __init__(self, read, k, inner=4):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(read)
        self.conv1 = nn.Conv2d(read, inner * k, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner * k)
        self.conv2 = nn.Conv2d(inner * k, k, 3, padding=1, bias=False)

    def forward(self, x):
        made = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return torch.cat([made, x], 1)


class InOneRow(nn.Module):
    """A dense layer in pytorch-cifar100's manner: all of it in one Sequential; with MONAI's dropout at the end."""

    def __init__(self, read, k, drop=0.0):
        super().__init__()
        first = nn.BatchNorm2d(read), nn.ReLU(inplace=True), nn.Conv2d(read, 4 * k, 1, bias=False)
        second = nn.BatchNorm2d(4 * k), nn.ReLU(inplace=True), nn.Conv2d(4 * k, k, 3, padding=1, bias=False)
        self.bottle_neck = nn.Sequential(*first, *second, *([nn.Dropout(drop)] if drop else []))

    def forward(self, x):
        return torch.cat([x, self.bottle_neck(x)], 1)


class DropsByRate(nn.Module):
    """A dense layer in densenet-pytorch's manner: one activation for both places, and a rate of its own name."""

    def __init__(self, read, k, droprate=0.0):
        super().__init__()
        self.bn1, self.bn2, self.relu = nn.BatchNorm2d(read), nn.BatchNorm2d(2 * k), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(read, 2 * k, 1, bias=False)
        self.conv2 = nn.Conv2d(2 * k, k, 3, padding=1, bias=False)
        self.droprate = droprate

    def forward(self, x):
        made = self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x))))))
        if self.droprate > 0:
            made = F.dropout(made, p=self.droprate, training=self.training)
        return torch.cat([x, made], 1)


def dense_row(layer, read, k, depth, **options):
    """A Sequential of layers that each join what they read and what they made."""
    return nn.Sequential(*(layer(read + i * k, k, **options) for i in range(depth)))


class PowersOfTwoBack(nn.Module):
    """A sparse block whose links are nowhere but in its forward; Conv-BN-ReLU6, or bottlenecks."""

    def __init__(self, read, k, depth, bottleneck=True):
        super().__init__()
        widths = [read, *[k] * depth]
        self.units = nn.ModuleList()
        for i in range(1, depth + 1):
            wide = sum(widths[s] for s in self.sources(i))
            self.units.append(NewFirst(wide, k, 2) if bottleneck else ConvLayer(wide, k))
        self.bottleneck = bottleneck

    @staticmethod
    def sources(i):
        return [i - 2**e for e in range(i.bit_length()) if i >= 2**e]

    def forward(self, x):
        made = [x]
        for i, unit in enumerate(self.units, start=1):
            y = torch.cat(tuple(made[s] for s in self.sources(i)), dim=-3)
            made.append(unit.conv2(unit.bn2(unit.conv1(unit.bn1(y).relu())).relu_()) if self.bottleneck else unit(y))
        return torch.cat([x.new_empty(0), torch.cat(made[2:], 1), made[0]], 1)


class PlainLayer(nn.Module):
    """A layer of DenseNet without bottlenecks: BN, ReLU, 3x3 convolution, dropout."""

    def __init__(self, read, k, drop=0.0):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(read), nn.Conv2d(read, k, 3, padding=1, bias=False)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return torch.cat((x, self.drop(self.conv(F.relu(self.norm(x))))), 1)


class ResidualDense(nn.Module):
    """ESRGAN's residual dense block: five convolutions, LeakyReLU behind all but the last, whose share is scaled."""

    def __init__(self, read, k):
        super().__init__()
        for i in range(4):
            self.add_module(f"conv{i + 1}", nn.Conv2d(read + i * k, k, 3, 1, 1))
        self.conv5 = nn.Conv2d(read + 4 * k, read, 3, 1, 1)
        self.act = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x):
        made = [x]
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            made.append(self.act(conv(torch.cat(made, 1))))
        return self.end(x, self.conv5(torch.cat(made, 1)))

    def end(self, x, made):
        return made * 0.2 + x


class ResidualFused(nn.Module):
    """RDN's residual dense block: dense layers of convolution and ReLU, a 1x1 convolution of all, and the input."""

    def __init__(self, read, k, depth):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(read + i * k, k, 3, padding=1) for i in range(depth))
        self.fusion = nn.Conv2d(read + depth * k, read, 1)

    def forward(self, x):
        made = x
        for conv in self.convs:
            made = torch.cat([made, F.relu(conv(made))], 1)
        return x + self.end(self.fusion(made))

    def end(self, made):
        return made


class ResidualActivated(ResidualFused):
    """DCMPNet's: a function behind the 1x1 convolution, which no module computes."""

    def end(self, made):
        return F.leaky_relu(made, 0.1)


class Stage(nn.Sequential):
    """A block in pytorchcv's manner: the transition in front of it is its first child."""

    def __init__(self, read, k, depth, layer=InOneRow):
        super().__init__()
        self.trans = nn.Sequential(
            nn.BatchNorm2d(2 * read), nn.ReLU(), nn.Conv2d(2 * read, read, 1, bias=False), nn.AvgPool2d(2)
        )
        for i in range(depth):
            self.add_module(f"unit{i + 1}", layer(read + i * k, k))


class HarDUnit(nn.Module):
    """HarDNet's block in pytorchcv's manner: the 1x1 layer and the pooling behind it are part of it."""

    def __init__(self, read, k, m, depth):
        super().__init__()
        block = HarDBlock(read, k, m, depth)
        self.wired, self.blocks = block.links, nn.Sequential(*block.layers)
        self.conv, self.downsample = ConvLayer(block.out_channels, 3 * k, 1), nn.MaxPool2d(2)

    def forward(self, x):
        made = [x]
        for row, layer in zip(self.wired, self.blocks, strict=True):
            made.append(layer(torch.cat([made[s] for s in row], 1)))
        y = torch.cat([y for i, y in enumerate(made) if i % 2 or i == len(made) - 1], 1)
        return self.downsample(self.conv(y))


def with_biases(model):
    """The same, its convolutions with random biases."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(torch.randn(module.out_channels))
    return model
