"""HarDNet and ThreshNet as their authors lay them out, written here from the public key names and shapes alone.

Each network is a function over a flat state dict with the released keys: one torch.cat and one convolution per line, no
code of the package. `*_shapes` lists keys and shapes, `fill` draws random weights for them.
"""

import torch
import torch.nn.functional as F


def fill(shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes.items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(0)
        elif key.endswith("running_var"):
            state[key] = torch.rand(shape, generator=generator, dtype=dtype) + 0.5
        elif len(shape) == 4:
            fan_in = shape[1] * shape[2] * shape[3]
            state[key] = torch.randn(shape, generator=generator, dtype=dtype) * (2 / fan_in) ** 0.5
        else:
            state[key] = torch.randn(shape, generator=generator, dtype=dtype) * 0.1 + key.endswith("norm.weight")
    return state


def _norm(prefix, width):
    vectors = {f"{prefix}.{n}": (width,) for n in ("weight", "bias", "running_mean", "running_var")}
    return vectors | {f"{prefix}.num_batches_tracked": ()}


def _conv_norm(prefix, out, read, kernel):
    return {f"{prefix}.conv.weight": (out, read, kernel, kernel)} | _norm(f"{prefix}.norm", out)


def harmonic_sources(i):
    return [i - p for p in (1, 2, 4, 8, 16) if p <= i and i % p == 0]


def harmonic_width(i, k, m):
    width = k
    for p in (2, 4, 8, 16):
        if i % p == 0:
            width *= m
    return int(int(width + 1) / 2) * 2


HARDNETS = {  # stem, m, k, layers, transitions, pool after each transition
    "hardnet68": (
        [32, 64], 1.7, [14, 16, 20, 40, 160], [8, 16, 16, 16, 4], [128, 256, 320, 640, 1024], [1, 0, 1, 1, 0],
    ),
    "hardnet85": (
        [48, 96], 1.7, [24, 24, 28, 36, 48, 256], [8, 16, 16, 16, 16, 4], [192, 256, 320, 480, 720, 1280],
        [1, 0, 1, 0, 1, 0],
    ),
    "hardnet39ds": ([24, 48], 1.6, [16, 20, 64, 160], [4, 16, 8, 4], [96, 320, 640, 1024], [1, 1, 1, 0]),
}  # fmt: skip
HARDNETS["hardnet68ds"] = HARDNETS["hardnet68"]


def hardnet_shapes(name, classes=1000):
    stem, m, k, layers, transitions, pools = HARDNETS[name]
    light = name.endswith("ds")
    shapes = _conv_norm("base.0", stem[0], 3, 3) | _conv_norm("base.1", stem[1], stem[0], 1 if light else 3)
    if light:
        shapes |= {"base.2.dwconv.weight": (stem[1], 1, 3, 3)} | _norm("base.2.norm", stem[1])
    n, width = 3, stem[1]
    for b, depth in enumerate(layers):
        widths = [width] + [harmonic_width(i, k[b], m) for i in range(1, depth + 1)]
        for i in range(1, depth + 1):
            read, prefix = sum(widths[s] for s in harmonic_sources(i)), f"base.{n}.layers.{i - 1}"
            if light:
                shapes |= _conv_norm(f"{prefix}.layer1", widths[i], read, 1)
                shapes |= {f"{prefix}.layer2.dwconv.weight": (widths[i], 1, 3, 3)}
                shapes |= _norm(f"{prefix}.layer2.norm", widths[i])
            else:
                shapes |= _conv_norm(prefix, widths[i], read, 3)
        n += 1 + (name == "hardnet85" and b == len(layers) - 1)  # HarDNet85 has a dropout behind its last block
        out = sum(widths[i] for i in range(1, depth + 1) if i % 2 or i == depth)
        shapes |= _conv_norm(f"base.{n}", transitions[b], out, 1)
        n, width = n + 1, transitions[b]
        if pools[b]:
            if light:
                shapes |= {f"base.{n}.dwconv.weight": (width, 1, 3, 3)} | _norm(f"base.{n}.norm", width)
            n += 1
    return shapes | {f"base.{n}.3.weight": (classes, width), f"base.{n}.3.bias": (classes,)}


class _Run:
    """The handful of layers that both networks use, on a flat state dict; BatchNorm in training or inference mode."""

    def __init__(self, state, training, act):
        self.state, self.training, self.act = state, training, act

    def norm(self, x, prefix):
        s = self.state
        mean, var = (None, None) if self.training else (s[f"{prefix}.running_mean"], s[f"{prefix}.running_var"])
        return F.batch_norm(x, mean, var, s[f"{prefix}.weight"], s[f"{prefix}.bias"], training=self.training)

    def cbr(self, x, prefix, stride=1):
        weight = self.state[f"{prefix}.conv.weight"]
        z = F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)
        return self.act(self.norm(z, f"{prefix}.norm"))

    def depthwise(self, x, prefix, stride=1):
        weight = self.state[f"{prefix}.dwconv.weight"]
        return self.norm(F.conv2d(x, weight, stride=stride, padding=1, groups=x.shape[1]), f"{prefix}.norm")

    def harmonic_block(self, x, prefix, depth, light=False):
        nodes = [x]
        for i in range(1, depth + 1):
            joined = torch.cat([nodes[s] for s in harmonic_sources(i)], 1)
            layer = f"{prefix}.layers.{i - 1}"
            if light:
                nodes.append(self.depthwise(self.cbr(joined, f"{layer}.layer1"), f"{layer}.layer2"))
            else:
                nodes.append(self.cbr(joined, layer))
        return torch.cat([nodes[i] for i in range(1, depth + 1) if i % 2 or i == depth], 1)

    def linear(self, x, prefix):
        return F.linear(x.mean((2, 3)), self.state[f"{prefix}.weight"], self.state[f"{prefix}.bias"])


def hardnet_forward(name, state, x, training=False):
    """Logits of a released HarDNet without dropout."""
    _, _, _, layers, _, pools = HARDNETS[name]
    light = name.endswith("ds")
    run = _Run(state, training, F.relu6)
    x = run.cbr(run.cbr(x, "base.0", 2), "base.1")
    x = run.depthwise(x, "base.2", 2) if light else F.max_pool2d(x, 3, 2, 1)
    n = 3
    for b, depth in enumerate(layers):
        x = run.harmonic_block(x, f"base.{n}", depth, light)
        n += 1 + (name == "hardnet85" and b == len(layers) - 1)
        x = run.cbr(x, f"base.{n}")
        n += 1
        if pools[b]:
            x = run.depthwise(x, f"base.{n}", 2) if light else F.max_pool2d(x, 2, 2)
            n += 1
    return run.linear(x, f"base.{n}.3")


THRESHNETS = {  # layers of the five blocks, transitions
    "thresholdnet_v1": ([6, 8, 12, 16, 4], [128, 192, 288, 480, 960]),
    "thresholdnet_v2": ([6, 12, 16, 16, 4], [128, 256, 384, 480, 960]),
}
POOL_AFTER = [1, 1, 0, 1, 0]


def threshnet_shapes(name, classes=10):
    layers, transitions = THRESHNETS[name]
    shapes = _conv_norm("base.0", 32, 3, 3) | _conv_norm("base.1", 64, 32, 3)
    n, width = 3, 64
    for b in range(3):
        for i in range(layers[b]):
            read = width + 32 * i
            shapes |= _norm(f"base.{n}.norm1", read) | {f"base.{n}.conv1.weight": (128, read, 1, 1)}
            shapes |= _norm(f"base.{n}.norm2", 128) | {f"base.{n}.conv2.weight": (32, 128, 3, 3)}
            n += 1
        shapes |= _conv_norm(f"base.{n}", transitions[b], width + 32 * layers[b], 1)
        n, width = n + 1 + POOL_AFTER[b], transitions[b]
    for b, k in ((3, 40), (4, 160)):
        widths = [width] + [harmonic_width(i, k, 1.7) for i in range(1, layers[b] + 1)]
        for i in range(1, layers[b] + 1):
            read = sum(widths[s] for s in harmonic_sources(i))
            shapes |= _conv_norm(f"base.{n}.layers.{i - 1}", widths[i], read, 3)
        out = sum(widths[i] for i in range(1, layers[b] + 1) if i % 2 or i == layers[b])
        shapes |= _conv_norm(f"base.{n + 1}", transitions[b], out, 1)
        n, width = n + 2 + POOL_AFTER[b], transitions[b]
    return shapes | {f"base.{n}.2.weight": (classes, width), f"base.{n}.2.bias": (classes,)}


def threshnet_forward(name, state, x, training=False):
    """Logits of a released ThreshNet."""
    layers, _ = THRESHNETS[name]
    run = _Run(state, training, F.relu)
    x = F.max_pool2d(run.cbr(run.cbr(x, "base.0", 2), "base.1"), 3, 2, 1)
    n = 3
    for b, depth in enumerate(layers):
        if b < 3:
            for _ in range(depth):
                inner = F.conv2d(F.relu(run.norm(x, f"base.{n}.norm1")), state[f"base.{n}.conv1.weight"])
                inner = F.relu(run.norm(inner, f"base.{n}.norm2"))
                x = torch.cat([x, F.conv2d(inner, state[f"base.{n}.conv2.weight"], padding=1)], 1)
                n += 1
        else:
            x = run.harmonic_block(x, f"base.{n}", depth)
            n += 1
        x = run.cbr(x, f"base.{n}")
        n += 1
        if POOL_AFTER[b]:
            x = F.max_pool2d(x, 2, 2)
            n += 1
    return run.linear(x, f"base.{n}.2")
