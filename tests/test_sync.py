"""Several processes: fused blocks in DDP, with SyncBatchNorm and without, against one process on the joined batch."""

import copy
import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import densenet

from thresholdnet import ThresholdBlock, chain, convert, links
from thresholdnet.pixels import KINDS

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
F64 = torch.float64
UNITS = ["conv_bn_relu", "conv_relu", "bn_relu_conv", "bottleneck"]
DIMS = {"signals": 1, "volumes": 3}


class Chained(nn.Sequential):
    """Two blocks, and a transition as `thresholdnet.chain` runs it."""

    def __init__(self, *blocks):
        width, kinds = blocks[-1].out_channels, KINDS[blocks[-1].plan.spatial_dims]
        transition = [kinds.norm(width), nn.ReLU(), kinds.conv(width, 3, 1, bias=False), kinds.avg_pool(2)]
        super().__init__(*blocks, *(module.to(F64) for module in transition))

    def forward(self, x):
        return chain.run(self, x)


def _network(unit, momentum=0.1):
    torch.manual_seed(0)
    if unit == "converted":
        layers = densenet._DenseBlock(3, 5, 2, 4, 0.0), densenet._Transition(17, 3)
        network = convert(nn.Sequential(*layers).to(F64), report=None)
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = momentum
        return network
    shape = {"unit": unit, "norm_momentum": momentum, "fused": True, "backend": "native", "dtype": F64}
    if unit in DIMS:
        shape |= {"unit": "bottleneck", "spatial_dims": DIMS[unit]}
    first = ThresholdBlock(5, links.harmonic(4), 6, **shape)
    second = ThresholdBlock(first.out_channels, links.threshold_ab(5, 3), 4, **shape)
    return Chained(first, second)


def _data(batch, dims=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 5, 4, *(3, 2)[: dims - 1], dtype=F64, generator=generator)
    return x, torch.randn(batch, 3, 2, *[1] * (dims - 1), dtype=F64, generator=generator)


def _step(model, x, weights):
    x = x.clone().requires_grad_()
    y = model(x)
    (y * weights).sum().backward()
    return y.detach(), x.grad


def _close(actual, expected, what):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10, msg=lambda text: f"{what}: {text}")


def _worker(rank, shares, store, work, *args):
    torch.set_num_threads(1)
    file = f"file://{store}"
    dist.init_process_group("gloo", init_method=file, rank=rank, world_size=len(shares), timeout=timedelta(seconds=60))
    try:
        work(rank, shares, *args)
    finally:
        dist.destroy_process_group()


def _in_processes(shares, tmp_path, work, *args):
    mp.spawn(_worker, (shares, os.fspath(tmp_path / "store"), work, *args), nprocs=len(shares))


def _equals_the_joined_batch(rank, shares, unit, momentum, freeze):
    network = _network(unit, momentum)
    joined = copy.deepcopy(network)
    parallel = DistributedDataParallel(network)
    nn.SyncBatchNorm.convert_sync_batchnorm(parallel)  # in this order, since DDP refuses SyncBatchNorm on a CPU
    for model in (network, joined):
        if freeze:  # one BatchNorm keeps the statistics it has, on every rank
            next(m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)).eval()
    x, weights = _data(sum(shares), DIMS.get(unit, 2))
    y, dx = _step(joined, x, weights)
    mine = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
    own_y, own_dx = _step(parallel, x[mine], weights[mine])
    _close(own_y, y[mine], "output")
    _close(own_dx, dx[mine], "gradient of x")
    for (name, a), b in zip(network.named_parameters(), joined.parameters(), strict=True):
        _close(a.grad * len(shares), b.grad, name)  # DDP averages
    for (name, a), b in zip(network.named_buffers(), joined.buffers(), strict=True):
        _close(a, b, name)


def _each(rank, shares, cases):
    for case in cases:
        _equals_the_joined_batch(rank, *case)


TWO = [
    ([2, 2], "conv_bn_relu", 0.1, False), ([2, 2], "bottleneck", 0.1, False), ([2, 0], "conv_bn_relu", 0.1, False),
    ([0, 2], "bottleneck", 0.1, True), ([2, 2], "converted", 0.1, False),
    ([2, 2], "volumes", 0.1, False), ([2, 2], "signals", 0.1, False),
]  # fmt: skip
THREE = [
    ([3, 1, 2], "conv_bn_relu", None, False),
    ([3, 1, 2], "bottleneck", None, True),
    ([3, 1, 2], "converted", None, False),
]


@pytest.mark.parametrize("cases", [TWO, THREE], ids=["two", "three"])
def test_shared_statistics_equal_one_process_on_the_joined_batch(cases, tmp_path):
    """Outputs, gradients of x and of every parameter, running statistics; uneven and empty shares of the batch."""
    _in_processes(cases[0][0], tmp_path, _each, cases)


def _without_sharing(rank, shares, unit):
    network = _network(unit)
    alone = copy.deepcopy(network)
    x, weights = _data(sum(shares))
    grads = []
    start = 0
    for share in shares:
        model = copy.deepcopy(alone)
        _step(model, x[start : start + share], weights[start : start + share])
        grads.append([p.grad for p in model.parameters()])
        start += share
    mine = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
    _step(DistributedDataParallel(network), x[mine], weights[mine])
    for parameter, *parts in zip(network.parameters(), *grads, strict=True):
        _close(parameter.grad, sum(parts) / len(shares), "gradient")
    assert all(m.num_batches_tracked == 1 for m in network.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("unit", [*UNITS, "converted"])
def test_plain_batch_norm_stays_with_its_process(unit, tmp_path):
    _in_processes([2, 3], tmp_path, _without_sharing, unit)


def _compiled(rank, shares):
    for unit in ("bottleneck", "converted"):
        parallel = DistributedDataParallel(_network(unit))
        nn.SyncBatchNorm.convert_sync_batchnorm(parallel)
        x, weights = _data(sum(shares))
        expected = _step(copy.deepcopy(parallel.module), x, weights)
        found = _step(torch.compile(parallel, backend="aot_eager"), x, weights)
        for a, b in zip(found, expected, strict=True):
            _close(a, b, f"compiled {unit}")


def test_compile_around_ddp(tmp_path):
    _in_processes([2, 2], tmp_path, _compiled)


def _half_shared(rank, shares):
    block = ThresholdBlock(5, links.dense(2), 4, fused=True, backend="native")
    block.layers[0].norm = nn.SyncBatchNorm.convert_sync_batchnorm(block.layers[0].norm)
    with pytest.raises(ValueError, match=r"must all be nn.SyncBatchNorm .* or none of them, got 1 of 2"):
        block(torch.randn(2, 5, 4, 4))


def test_half_of_the_norms_shared_is_an_error(tmp_path):
    _in_processes([1, 1], tmp_path, _half_shared)


def test_one_process_needs_no_group():
    """nn.SyncBatchNorm without a process group is plain BatchNorm; torch's own refuses the CPU, ours does not."""
    for unit in UNITS:
        plain = _network(unit)
        shared = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
        x, weights = _data(3)
        for a, b in zip(_step(shared, x, weights), _step(plain, x, weights), strict=True):
            assert torch.equal(a, b)
