"""Whole blocks, forward and backward, through the launchers alone, against thresholdnet.reference and autograd."""

from dataclasses import replace

import pytest
import torch
from activated import NAMES
from poisoned import padding, rows, whole, write
from thresholdnet.kernels import launch
from tolerances import assert_near

from thresholdnet import links, reference
from thresholdnet.plan import plan_block

EPS = 1e-5


def problem(plan, dtype, size, activation):
    """Input, parameters and the output's gradient, rounded to `dtype`; output and all gradients in fp64."""

    def rounded(*shape):
        return torch.randn(*shape).to(dtype).double()

    x = rounded(size[0], plan.in_channels, *size[1:]).requires_grad_()
    parameters = []
    for read, width, inner in zip(
        plan.link_widths, plan.widths, plan.bottleneck_widths or (0,) * plan.num_layers, strict=True
    ):

        def norm(channels):
            return [torch.rand(channels) + 0.5, torch.randn(channels) * 0.3]

        if plan.unit == "bottleneck":
            parameters += [*norm(read), rounded(inner, read, 1, 1) / read**0.5, *norm(inner)]
            parameters += [rounded(width, inner, 3, 3) / (9 * inner) ** 0.5]
        elif plan.unit == "bn_relu_conv":
            parameters += [*norm(read), rounded(width, read, 3, 3) / (9 * read) ** 0.5]
        elif plan.unit == "conv_relu":
            parameters += [rounded(width, read, 3, 3) / (9 * read) ** 0.5, rounded(width) * 0.3]
        else:
            parameters += [rounded(width, read, 3, 3) / (9 * read) ** 0.5, *norm(width)]
    parameters = [p.to(dtype).double().requires_grad_() for p in parameters]
    y, _ = reference.block_forward(plan, x, parameters, eps=EPS, activation=activation)
    dy = rounded(*y.shape)
    y.backward(dy)
    return x, parameters, y, dy


def scale_shift(mean, variance, gamma, beta):
    rstd = torch.rsqrt(variance + EPS)
    return gamma * rstd, beta - mean * gamma * rstd, rstd


def arrived(plan, grads, dy):
    """The output's gradient in the slots of the nodes that the block returns."""
    for node, part in zip(plan.outputs, dy.split(plan.output_widths, dim=1), strict=True):
        write(grads[node], part)


def of_readers(plan, weights, node):
    """Of each layer that reads the node, the part of its weight that does."""
    parts = []
    for layer in plan.readers[node]:
        before = sum(plan.node_widths[k] for k in plan.links[layer - 1][: plan.links[layer - 1].index(node)])
        parts.append(weights[layer - 1].detach()[:, before : before + plan.node_widths[node]])
    return parts


def conv_bn_relu(plan, x, parameters, dy, dtype, activation):
    """(output slots, gradients of x and of all parameters): what an engine does, in the plainest order."""
    size = x.shape[0], *x.shape[2:]
    pixels = size[0] * size[1] * size[2]
    (_, raw), (_, active), (_, grads) = (rows(*size, plan.node_widths, dtype) for _ in range(3))

    def vector(p):
        return p.detach().to(torch.float64 if dtype == torch.float64 else torch.float32)

    write(active[0], x.detach())
    kept = [None]
    for layer, sources in enumerate(plan.links, start=1):
        weight, gamma, beta = (p.detach() for p in parameters[3 * layer - 3 : 3 * layer])
        mean, variance = launch.conv([active[k] for k in sources], weight, raw[layer], statistics=True)
        scale, shift, rstd = scale_shift(mean, variance, vector(gamma), vector(beta))
        launch.normalise(raw[layer], scale, shift, active[layer], activation)
        kept.append((scale, shift, mean, rstd))
    arrived(plan, grads, dy)
    gradients = [None] * len(parameters)
    for node in range(plan.num_layers, -1, -1):
        weights = of_readers(plan, parameters[::3], node)
        dz = [grads[layer] for layer in plan.readers[node]]
        mask = (raw[node], *kept[node]) if node else None
        sums = launch.gradient(dz, weights, grads[node], add=node in plan.outputs, mask=mask, activation=activation)
        if node:
            scale, _, mean, rstd = kept[node]
            gradients[3 * node - 1], gradients[3 * node - 2] = sums
            b = -scale * rstd * sums[1] / pixels
            launch.bn_backward(grads[node], raw[node], scale, b, -scale * sums[0] / pixels - b * mean)
    for layer, sources in enumerate(plan.links, start=1):
        gradients[3 * layer - 3] = launch.weight_gradient([active[k] for k in sources], grads[layer], 3)
    return [active[node] for node in plan.outputs], grads[0], gradients


def conv_relu(plan, x, parameters, dy, dtype, activation):
    """The same for layers without BatchNorm, whose weights are packed at once; the mask is that of the node itself."""
    size = x.shape[0], *x.shape[2:]
    (_, nodes), (_, grads) = (rows(*size, plan.node_widths, dtype) for _ in range(2))
    write(nodes[0], x.detach())
    weights = [weight.detach() for weight in parameters[::2]]
    packed = launch.pack(
        [[weight] for weight in weights], nodes[0], widths=[[plan.node_widths[k] for k in row] for row in plan.links]
    )
    for layer, sources in enumerate(plan.links, start=1):
        bias = parameters[2 * layer - 1].detach()
        launch.conv([nodes[k] for k in sources], packed[layer - 1], nodes[layer], bias=bias, activation=activation)
    arrived(plan, grads, dy)
    gradients = [None] * len(parameters)
    for node in range(plan.num_layers, -1, -1):
        ones = torch.ones(plan.node_widths[node], dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        mask = (nodes[node], ones, 0 * ones, 0 * ones, ones) if node else None
        dz = [grads[layer] for layer in plan.readers[node]]
        parts = of_readers(plan, weights, node)
        sums = launch.gradient(dz, parts, grads[node], add=node in plan.outputs, mask=mask, activation=activation)
        if node:
            gradients[2 * node - 1] = sums[0]
    for layer, sources in enumerate(plan.links, start=1):
        gradients[2 * layer - 2] = launch.weight_gradient([nodes[k] for k in sources], grads[layer], 3)
    return [nodes[node] for node in plan.outputs], grads[0], gradients


def bottleneck(plan, x, parameters, dy, dtype, activation, group):
    """The same for bottleneck units, data gradients gathered over `group` readers at a time."""
    size = x.shape[0], *x.shape[2:]
    pixels, depth = size[0] * size[1] * size[2], plan.bottleneck_widths[0]
    exact = torch.float64 if dtype == torch.float64 else torch.float32

    def vector(p):
        return p.detach().to(exact)

    (_, raw), (_, grads) = (rows(*size, plan.node_widths, dtype) for _ in range(2))
    (_, inner), (_, inner_grads) = (rows(*size, (depth,) * plan.num_layers, dtype) for _ in range(2))
    _, (active,) = rows(*size, (depth,), dtype)
    write(raw[0], x.detach())
    statistics = [launch.slot_statistics(raw[0])]

    def rstd_of(node):
        return torch.rsqrt(statistics[node][1] + EPS)

    kept = [None]

    def read_affine(layer):
        gamma, beta = (vector(p) for p in parameters[6 * layer - 6 : 6 * layer - 4])
        means = torch.cat([statistics[k][0] for k in plan.links[layer - 1]])
        variances = torch.cat([statistics[k][1] for k in plan.links[layer - 1]])
        return scale_shift(means, variances, gamma, beta)[:2]

    for layer, sources in enumerate(plan.links, start=1):
        _, _, w1, gamma2, beta2, w2 = parameters[6 * layer - 6 : 6 * layer]
        z = inner[layer - 1]
        mean, variance = launch.conv(
            [raw[k] for k in sources], w1, z, affine=read_affine(layer), activation=activation, statistics=True
        )
        scale, shift, rstd = scale_shift(mean, variance, vector(gamma2), vector(beta2))
        launch.normalise(z, scale, shift, active, activation)
        statistics.append(launch.conv([active], w2, raw[layer], statistics=True))
        kept.append((scale, shift, mean, rstd))

    start = 0
    for node, width in enumerate(plan.node_widths):
        write(grads[node], dy[:, start : start + width] if node in plan.outputs else torch.zeros(1, 1, 1, 1))
        start += width if node in plan.outputs else 0
    gradients = [None] * len(parameters)
    sums_g = [torch.zeros(width, dtype=exact) for width in plan.node_widths]  # sum over readers of gamma sum g
    sums_gx = [torch.zeros(width, dtype=exact) for width in plan.node_widths]
    for layer in range(1, plan.num_layers + 1):
        gradients[6 * layer - 6] = torch.zeros(plan.link_widths[layer - 1], dtype=exact)
        gradients[6 * layer - 5] = torch.zeros(plan.link_widths[layer - 1], dtype=exact)

    def contribute(readers, nodes):
        """Gather the gradients of `readers` into `nodes`; zeros where a reader has no link."""
        if not readers or not nodes:
            return
        channels = sum(plan.node_widths[node] for node in nodes)
        place, weights, gammas, betas = [], [], [], []
        for layer in readers:
            gamma, beta, w1 = parameters[6 * layer - 6 : 6 * layer - 3]
            weight, scale, shift = (
                torch.zeros(depth, channels, 1, 1, dtype=w1.dtype),
                torch.zeros(channels, dtype=exact),
                torch.zeros(channels, dtype=exact),
            )
            theirs, first = {}, 0
            for source in plan.links[layer - 1]:
                theirs[source] = slice(first, first := first + plan.node_widths[source])
            first = 0
            for node in nodes:
                ours = slice(first, first := first + plan.node_widths[node])
                if node in theirs:
                    weight[:, ours] = w1.detach()[:, theirs[node]]
                    scale[ours], shift[ours] = vector(gamma)[theirs[node]], vector(beta)[theirs[node]]
                    place.append((layer, node, ours, theirs[node]))
            weights.append(weight), gammas.append(scale), betas.append(shift)
        sums, sums_xhat = launch.gradient_of_readers(
            [inner_grads[layer - 1] for layer in readers], weights,
            [grads[node] for node in nodes], [raw[node] for node in nodes], gammas, betas,
            torch.cat([statistics[node][0] for node in nodes]), torch.cat([rstd_of(node) for node in nodes]),
            add=True, activation=activation,
        )  # fmt: skip
        for layer, node, ours, theirs in place:
            index = readers.index(layer)
            gradients[6 * layer - 5][theirs] = sums[index, ours]
            gradients[6 * layer - 6][theirs] = sums_xhat[index, ours]
            sums_g[node] += gammas[index][ours] * sums[index, ours]
            sums_gx[node] += gammas[index][ours] * sums_xhat[index, ours]

    def finish(node):
        """The statistics' share of the gradient, once a channel."""
        mean, rstd = statistics[node][0], rstd_of(node)
        b = -rstd * rstd * sums_gx[node] / pixels
        launch.bn_backward(grads[node], raw[node], None, b, -rstd * sums_g[node] / pixels - b * mean)

    last = plan.num_layers
    while last >= 1:
        first = max(1, last - group + 1)
        for layer in range(last, first - 1, -1):
            contribute(list(range(layer + 1, last + 1)), [layer])
            finish(layer)
            w2 = parameters[6 * layer - 1].detach()
            scale, shift, mean, rstd = kept[layer]
            launch.normalise(inner[layer - 1], scale, shift, active, activation)
            gradients[6 * layer - 1] = launch.weight_gradient([active], grads[layer], 3)
            mask = (inner[layer - 1], *kept[layer])
            sums = launch.gradient([grads[layer]], [w2], inner_grads[layer - 1], mask=mask, activation=activation)
            gradients[6 * layer - 2], gradients[6 * layer - 3] = sums
            b = -scale * rstd * sums[1] / pixels
            c = -scale * sums[0] / pixels - b * mean
            launch.bn_backward(inner_grads[layer - 1], inner[layer - 1], scale, b, c)
            sources = [raw[k] for k in plan.links[layer - 1]]
            gradients[6 * layer - 4] = launch.weight_gradient(
                sources, inner_grads[layer - 1], 1, affine=read_affine(layer), activation=activation
            )
        contribute(list(range(first, last + 1)), list(range(first)))
        last = first - 1
    finish(0)
    return [raw[node] for node in plan.outputs], grads[0], gradients


def bn_relu_conv(plan, x, parameters, dy, dtype, activation):
    """The same for BN - act - Conv3x3 units of dense links, each reader's gradient gathered into all it reads."""
    size = x.shape[0], *x.shape[2:]
    pixels, exact = size[0] * size[1] * size[2], torch.float64 if dtype == torch.float64 else torch.float32
    (_, raw), (_, grads) = (rows(*size, plan.node_widths, dtype) for _ in range(2))
    write(raw[0], x.detach())
    mean, variance = (v[:, None] for v in launch.slot_statistics(raw[0]))
    starts, start = [0], 0
    for node, width in enumerate(plan.node_widths):
        write(grads[node], dy[:, start : start + width])
        starts.append(start := start + width)
    shares = torch.zeros(2, start, dtype=exact)  # sums over readers of gamma sum g, and of gamma sum g xhat
    gradients, kept = [None] * len(parameters), [None]
    for layer in range(1, plan.num_layers + 1):
        gamma, beta, weight = (p.detach().to(exact) for p in parameters[3 * layer - 3 : 3 * layer])
        scale, shift, rstd = scale_shift(mean.flatten(), variance.flatten(), gamma, beta)
        kept.append((gamma, beta, weight, scale, shift, rstd))
        made = launch.conv(
            raw[:layer], weight, raw[layer], affine=(scale, shift), activation=activation, statistics=True
        )
        mean, variance = (torch.cat([known, new[:, None]]) for known, new in zip((mean, variance), made, strict=True))
    mean, variance = mean.flatten(), variance.flatten()

    def finish(node):
        """The statistics' share of the gradient, once a channel."""
        own = slice(starts[node], starts[node + 1])
        rstd = torch.rsqrt(variance[own] + EPS)
        b = -rstd * rstd * shares[1, own] / pixels
        launch.bn_backward(grads[node], raw[node], None, b, -rstd * shares[0, own] / pixels - b * mean[own])

    for layer in range(plan.num_layers, 0, -1):
        finish(layer)
        gamma, beta, weight, scale, shift, rstd = kept[layer]
        gradients[3 * layer - 1] = launch.weight_gradient(
            raw[:layer], grads[layer], 3, affine=(scale, shift), activation=activation
        )
        sums = launch.gradient_of_readers(
            [grads[layer]], [weight], grads[:layer], raw[:layer], [gamma], [beta], mean[: starts[layer]], rstd,
            add=True, activation=activation,
        )  # fmt: skip
        gradients[3 * layer - 2], gradients[3 * layer - 3] = sums[0][0], sums[1][0]
        shares[:, : starts[layer]] += gamma * torch.cat(sums)
    finish(0)
    return raw, grads[0], gradients


# Rounding errors grow from layer to layer and where BatchNorm's backward cancels sums: 10 times a kernel's.
CHAIN = 10


def compare(plan, run, dtype, size, activation):
    x, parameters, y, dy = problem(plan, dtype, size, activation)
    outputs, dx, gradients = run(plan, x, parameters, dy.to(dtype), dtype, activation)
    assert_near(torch.cat(outputs, 1), y, dtype, CHAIN)
    assert not any(padding(slot).any() for slot in (*outputs, dx))
    assert_near(dx, x.grad, dtype, CHAIN)
    for got, parameter in zip(gradients, parameters, strict=True):
        assert_near(got, parameter.grad, dtype, CHAIN)
    assert whole(dx).isfinite().all()


PLANS = {
    "pruned": plan_block(10, ((0,), (0, 1), (2, 0)), (14, 24, 6), outputs=(1, 3)),
    "dense": plan_block(8, ((0,), (1, 0), (2, 1, 0), (0, 1, 2, 3)), 12, outputs="all", width_rule="constant"),
    "harmonic": plan_block(16, ((0,), (1, 0), (2,), (3, 2, 0)), (14, 22, 6, 30)),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("size", ((2, 7, 5), (2, 6, 4)), ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_conv_bn_relu(name, size, dtype):
    compare(PLANS[name], conv_bn_relu, dtype, size, "relu6" if name == "pruned" else "relu")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("size", ((2, 7, 5), (2, 6, 4)), ids=str)
@pytest.mark.parametrize(("name", "activation"), zip(PLANS, NAMES, strict=True))
def test_conv_relu(name, activation, size, dtype):
    compare(replace(PLANS[name], unit="conv_relu"), conv_relu, dtype, size, activation)


BOTTLENECKS = {
    "dense": plan_block(10, ((0,), (1, 0), (2, 1, 0), (3, 2, 1, 0)), 6, unit="bottleneck", width_rule="constant"),
    "pruned": plan_block(10, ((0,), (0, 1), (2, 0)), 6, unit="bottleneck", width_rule="constant"),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("group", (1, 2, 4))
@pytest.mark.parametrize("name", BOTTLENECKS)
def test_bottleneck(name, group, dtype):
    def run(*arguments):
        return bottleneck(*arguments, group)

    compare(BOTTLENECKS[name], run, dtype, (2, 5, 7), "relu")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("size", ((2, 7, 5), (2, 6, 4)), ids=str)
@pytest.mark.parametrize("activation", NAMES)
def test_bn_relu_conv(activation, size, dtype):
    plan = plan_block(10, links.dense(4), 6, unit="bn_relu_conv", width_rule="constant", outputs="all")
    compare(plan, bn_relu_conv, dtype, size, activation)
