"""FSDP2 (fully_shard) around fused blocks and converted models, two processes, against unsharded copies."""

import copy

import pytest
import torch
import torch.distributed as dist
from test_sync import _in_processes, _network
from tolerances import assert_close
from torch import nn
from torchvision.models import DenseNet

from thresholdnet import ThresholdBlock, convert, links
from thresholdnet.linked import LinkedBlock

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
F64 = torch.float64


def _densenet():
    torch.manual_seed(0)
    return DenseNet(4, (2, 2), 6, 2, num_classes=4).double()


MODELS = {
    "converted": (lambda: convert(_densenet(), report=None), (3, 3, 24, 24)),
    "own": (lambda: _network("conv_bn_relu"), (3, 5, 4, 3)),
}


def _model(name):
    """A fused model, and this process's data for it."""
    make, shape = MODELS[name]
    return make(), lambda rank: torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(10 + rank))


WRAPPED = {  # which modules below the model are sharded on their own
    "whole": lambda name, module: False,
    "blocks": lambda name, module: isinstance(module, LinkedBlock),
    "stages": lambda name, module: name.count(".") == 1,
    "layers": lambda name, module: name.count(".") == 2 and ".denselayer" in name,
}


def _shard(model, which, **options):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for name, module in list(model.named_modules()):
        if WRAPPED[which](name, module) and any(True for _ in module.parameters()):
            try:
                fully_shard(module, mesh=mesh, **options)
            except ValueError as error:  # torch 2.11 takes no ModuleDict, as torchvision's dense blocks are
                assert isinstance(module, nn.ModuleDict) and "containers" in str(error)
                assert torch.__version__.startswith(("2.11.", "2.12.", "2.13."))
    return fully_shard(model, mesh=mesh, **options)


def _loss(y):
    return (y.to(F64) * torch.linspace(-1, 1, y.numel(), dtype=F64).view(y.shape)).sum()


def _full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _step(model, x):
    """One step of SGD: the output, then the weights gathered, and the buffers of this process."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    y = model(x)
    _loss(y).backward()
    optimizer.step()
    return [y.detach(), *(_full(p.detach()) for p in model.parameters()), *(b.clone() for b in model.buffers())]


def _expected(model, data, ranks, rank):
    """The same without sharding: gradients of every process's data, averaged."""
    copies = [copy.deepcopy(model) for _ in range(ranks)]
    outputs = [twin(data(r)) for r, twin in enumerate(copies)]
    for y in outputs:
        _loss(y).backward()
    own = copies[rank]
    for parts in zip(*(twin.parameters() for twin in copies), strict=True):
        parts[rank].grad = torch.stack([p.grad for p in parts]).mean(0)
    torch.optim.SGD(own.parameters(), lr=0.1).step()
    return [outputs[rank].detach(), *(p.detach() for p in own.parameters()), *own.buffers()]


def _equal_steps(rank, shares):
    for name, which in (
        ("converted", "whole"), ("converted", "blocks"), ("converted", "stages"), ("converted", "layers"),
        ("own", "blocks"),
    ):  # fmt: skip
        model, data = _model(name)
        expected = _expected(model, data, len(shares), rank)
        found = _step(_shard(model, which), data(rank))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda text, c=(name, which): f"{c}: {text}")


def _checkpointed(rank, shares):
    """Weights are gathered again for the recomputation, and statistics count once."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    model, data = _model("converted")
    expected = _expected(model, data, len(shares), rank)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LinkedBlock))
    found = _step(_shard(model, "blocks"), data(rank))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def _shared_statistics(rank, shares):
    """SyncBatchNorm below fully_shard: the parts of a batch behave as the whole."""
    model, data = _model("own")
    x = torch.cat([data(r) for r in range(len(shares))])
    whole = copy.deepcopy(model)
    expected = whole(x)
    cotangent = torch.randn(expected.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    (expected * cotangent).sum().backward()
    _shard(nn.SyncBatchNorm.convert_sync_batchnorm(model), "blocks")
    mine = slice(3 * rank, 3 * rank + 3)
    y = model(x[mine])
    torch.testing.assert_close(y, expected[mine], rtol=1e-9, atol=1e-10)
    (y * cotangent[mine]).sum().backward()
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a.grad.full_tensor() * len(shares), b.grad, rtol=1e-9, atol=1e-9)


def _state(rank, shares):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    model, data = _model("converted")
    _shard(model, "blocks")
    plain = _densenet()
    assert list(model.state_dict()) == list(plain.state_dict())
    _step(model, data(0))
    options = StateDictOptions(full_state_dict=True)
    state = get_model_state_dict(model, options=options)
    plain.load_state_dict(state)
    y = model.eval()(data(2))
    torch.testing.assert_close(y, plain.eval()(data(2)), rtol=1e-9, atol=1e-9)
    other = _shard(_model("converted")[0], "stages").eval()
    set_model_state_dict(other, state, options=options)
    torch.testing.assert_close(other(data(2)), y, rtol=1e-9, atol=1e-9)


def _mixed(rank, shares):
    """Blocks in bfloat16, BatchNorm's weights included; torch's own BatchNorm on a CPU would refuse those."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
    for unit in ("conv_bn_relu", "bottleneck"):
        torch.manual_seed(0)
        block = ThresholdBlock(5, links.dense(3), 4, unit=unit, fused=True, backend="native")
        x = torch.randn(4, 5, 6, 6)
        exact = copy.deepcopy(block)(x)
        _shard(block, "whole", mp_policy=policy)
        y = block(x)
        y.square().sum().backward()
        assert y.dtype == torch.float32 and not torch.equal(y, exact)
        assert (y - exact).abs().max() < 0.05 * exact.abs().max()
        for parameter in block.parameters():
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            assert parameter.grad.full_tensor().isfinite().all()


def _errors(rank, shares):
    torch.manual_seed(0)
    block, x = ThresholdBlock(5, links.dense(3), 4, fused=True, backend="native"), torch.randn(2, 5, 4, 4)
    expected = block(x)
    block.layers[1] = _shard(block.layers[1], "whole")  # whose hooks gather its weights when it runs
    with pytest.raises(RuntimeError, match="apply fully_shard to the block or to a module around it"):
        block._fused_forward(x, "native", None)
    assert_close(block(x).detach(), expected.detach(), what="a sharded layer")
    assert block.backend == "reference"
    lines = []
    convert(_shard(_densenet(), "whole"), report=lines.append)
    assert lines[0] == "left features.denseblock1: its weights are sharded: convert the model before fully_shard"


def _each(rank, shares):
    for work in (_equal_steps, _checkpointed, _shared_statistics, _state, _mixed, _errors):
        work(rank, shares)


def test_two_processes(tmp_path):
    """Steps, checkpoints, shared statistics, state dicts, mixed precision and errors, in one pair of processes."""
    _in_processes([1, 1], tmp_path, _each)
