"""Whether every backend of this machine computes what `reference.py` does: on blocks of the zoo, cut to few pixels.

The truth is the reference in float64 on the CPU, on operands rounded to the dtype under test. float64 and float32 are
held per element against it, relative to the largest element. A half format rounds each layer's output, so it is held
against plain torch in the same format: root mean square errors, the fused block's at most `HALF` times plain
torch's, or one rounding.

Gradients jump where a rounding error carries an activation's argument over 0. So every BatchNorm's shift is moved into
the widest gap between its channel's values: no argument lies near 0, and one wrong element is a wrong element.

`python -m thresholdnet.selftest` prints JSON, where the command's own packages are not installed.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .backends import backends, candidates, refusal
from .blocks import ThresholdBlock
from .checks import one_of
from .memory import DTYPES
from .models import create_model
from .pixels import CONVOLUTIONS, count
from .reference import Statistics, block_forward
from .replay import FIRST


class Kind(NamedTuple):
    """Links and widths of a network's block, with layers of a unit, of images, signals or volumes, dilated in turn."""

    model: str
    path: str
    unit: str
    dims: int = 2
    dilations: tuple[int, ...] = (1,)


BLOCKS = {
    "thresholdnet_v1 dense": Kind("thresholdnet_v1", "stages.0.block", "bottleneck"),
    "thresholdnet_v1 harmonic": Kind("thresholdnet_v1", "stages.3.block", "conv_bn_relu"),
    "thresholdnet_bc threshold": Kind("thresholdnet_bc", "stages.2.block", "conv_bn_relu"),
    "hardnet68 harmonic": Kind("hardnet68", "stages.1.block", "conv_bn_relu"),
    "densenet121 dense": Kind("densenet121", "stages.1.block", "bottleneck"),
    "densenet121 dense, without bottlenecks": Kind("densenet121", "stages.1.block", "bn_relu_conv"),
    "densenet121 dense, without BatchNorm": Kind("densenet121", "stages.1.block", "conv_relu"),
    "densenet121 dense, dilated": Kind("densenet121", "stages.0.block", "bottleneck", 2, (2,)),
    "densenet121 dense, dilated, without bottlenecks": Kind("densenet121", "stages.0.block", "bn_relu_conv", 2, (1, 2)),
    "hardnet68 harmonic, dilated": Kind("hardnet68", "stages.0.block", "conv_bn_relu", 2, (1, 2, 3)),
    "densenet121 dense, volumes": Kind("densenet121", "stages.0.block", "bottleneck", 3),
    "hardnet68 harmonic, volumes": Kind("hardnet68", "stages.0.block", "conv_bn_relu", 3),
    "densenet121 dense, signals": Kind("densenet121", "stages.0.block", "bottleneck", 1),
    "hardnet68 harmonic, signals": Kind("hardnet68", "stages.0.block", "conv_bn_relu", 1, (1, 2)),
}
SMALL = (
    "thresholdnet_v1 dense", "hardnet68 harmonic", "densenet121 dense, without bottlenecks",
    "densenet121 dense, without BatchNorm",
)  # fmt: skip
"""A block of each unit, for Triton's interpreter."""

RELATIVE = {"fp64": 1e-10, "fp32": 5e-5}
"""Largest error over largest element: orders of summation, through up to 16 layers of BatchNorm over few pixels."""
HALF = 1.5
"""Of plain torch's error: as many roundings in other places, such as of weights with BatchNorm folded in."""
FULL, QUICK, INTERPRETED = (None, (2, 7, 5)), (4, (2, 4, 3)), (2, (1, 3, 3))
"""Layers of a block, and images, rows, columns."""
DEPTH = 3
"""Slices of volumes."""


@dataclass(frozen=True)
class Case:
    """One block on one backend, device and dtype; layers: None for all of them."""

    backend: str
    device: str
    dtype: str
    block: str
    layers: int | None
    shape: tuple[int, ...]

    @property
    def text(self) -> str:
        """The block and its pixels, for a table."""
        sides = "x".join(map(str, self.shape))
        return f"{self.block}{'' if self.layers is None else f', {self.layers} layers'}, {sides}"


@dataclass
class Result:
    """What a case gave: per quantity its error and bound; `cause` where the backend raised instead."""

    case: Case
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    cause: str | None = None
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether every quantity is within its bound; NaN is not."""
        return self.cause is None and all(error <= bound for error, bound in self.errors.values())

    @property
    def worst(self) -> tuple[str, float, float]:
        """The quantity nearest to its bound or furthest beyond: name, error, bound."""
        name = max(self.errors, key=lambda key: _share(*self.errors[key]))
        return name, *self.errors[name]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        errors = {name: {"error": repr(error), "bound": bound} for name, (error, bound) in self.errors.items()}
        return asdict(self.case) | {"ok": self.ok, "errors": errors, "cause": self.cause, "seconds": self.seconds}


def cases(backend: str = "all", dtypes: Sequence[str] = (), quick: bool = False) -> list[Case]:
    """What there is to check: every engine that can run here, each device and dtype that it takes.

    Args:
        backend: "all", or one engine.
        dtypes: of fp64, fp32, bf16, fp16; all by default.
        quick: the first layers of each block only. Triton's interpreter always gets less: two layers of each unit, and
            no bf16, which it computes wrongly (it multiplies bit patterns).

    Raises:
        ValueError: unknown backend or dtype, or nothing to check.
        RuntimeError: a backend asked for by name that cannot run here.
    """
    engines = [name for name in backends() if name != "reference"]
    if one_of("backend", backend, ("all", *engines)) == "all":
        usable = [name for name in engines if backends()[name] is None]
    else:
        usable = list(candidates(backend))
    chosen = [one_of("dtype", name, DTYPES) for name in dtypes] or list(DTYPES)
    made = []
    for name in usable:
        for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
            interpreted = name == "triton" and device == "cpu"
            layers, (images, *sides) = INTERPRETED if interpreted else QUICK if quick else FULL
            for block in SMALL if interpreted else BLOCKS:
                shape = (images, *{1: [prod(sides)], 2: sides, 3: [DEPTH, *sides]}[BLOCKS[block].dims])
                for dtype in chosen:
                    pixels = torch.empty(0, 1, *shape[1:], dtype=DTYPES[dtype], device=device)
                    if refusal(name, pixels) is None and not (interpreted and dtype == "bf16"):
                        made.append(Case(name, device, dtype, block, layers, shape))
    if not made:
        raise ValueError(f"dtype must be one that {' or '.join(usable)} can be tested in here, got {', '.join(chosen)}")
    return made


def check(case: Case) -> Result:
    """Run one case: output, statistics, gradients of input and parameters, inference. Never raises for the backend."""
    started = time.perf_counter()
    result = Result(case)
    exact, x, cotangent, truth = _operands_and_truth(case.block, case.layers, case.shape, case.dtype)
    with full_precision():
        try:
            for _ in range(FIRST["cuda"] if case.device == "cuda" else 1):  # what a user's later steps compute
                ours = _run(copy.deepcopy(exact).fuse(True, case.backend), x, cotangent, case)
        except Exception as error:  # whatever it is, it is a finding
            result.cause = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['without a message'])[0]}"
        else:
            plain = None if case.dtype in RELATIVE else _run(copy.deepcopy(exact), x, cotangent, case)
            for name, wanted in truth.items():
                if plain is None:
                    result.errors[name] = (_largest(ours[name], wanted), RELATIVE[case.dtype])
                else:
                    bound = max(HALF * _rms(plain[name], wanted), torch.finfo(DTYPES[case.dtype]).eps / 2)
                    result.errors[name] = (_rms(ours[name], wanted), bound)
    result.seconds = time.perf_counter() - started
    return result


@lru_cache(maxsize=len(BLOCKS))
def _template(name: str) -> ThresholdBlock:
    """A block of the zoo, without memory."""
    block = create_model(BLOCKS[name].model, device="meta").get_submodule(BLOCKS[name].path)
    assert isinstance(block, ThresholdBlock)  # the table names blocks
    return block


@lru_cache(maxsize=len(BLOCKS) * len(DTYPES))
def _operands_and_truth(
    name: str, layers: int | None, shape: tuple[int, ...], dtype: str
) -> tuple[ThresholdBlock, Tensor, Tensor, dict[str, list[Tensor]]]:
    """A block with parameters that the dtype holds exactly, an input, a gradient of the output, and what the reference
    makes of them; in fp64 on the CPU.
    """
    template, kind, narrow = _template(name), BLOCKS[name], DTYPES[dtype]
    plan = template.plan
    depth = layers or plan.num_layers
    dilations = [kind.dilations[i % len(kind.dilations)] for i in range(depth)]
    generator = torch.Generator().manual_seed(0)
    block = ThresholdBlock(
        plan.in_channels, plan.links[:depth], plan.widths[:depth], unit=kind.unit, dilation=dilations,
        activation=template.activation, norm_momentum=1.0, spatial_dims=kind.dims, device="meta", dtype=torch.float64,
    ).to_empty(device="cpu")  # fmt: skip
    with torch.no_grad():
        for module in block.modules():
            if isinstance(module, CONVOLUTIONS):
                module.weight.normal_(0, (2 / module.weight[0].numel()) ** 0.5, generator=generator)
        for norm in _norms(block):
            norm.reset_running_stats()
            norm.weight.uniform_(0.5, 1.0, generator=generator)
        for module in _shifting(block):
            module.bias.uniform_(-0.5, 0.5, generator=generator)
    images, *sides = shape
    x, cotangent = (
        torch.randn(images, channels, *sides, dtype=torch.float64, generator=generator).to(narrow).double()
        for channels in (plan.in_channels, block.out_channels)
    )
    block.to(narrow).double()
    _clear_of_zero(block, x, narrow)
    return block, x, cotangent, _reference(block, x, cotangent)


def _norms(block: ThresholdBlock) -> list[Any]:
    return [module for module in block.modules() if isinstance(module, _BatchNorm)]


def _shifting(block: ThresholdBlock) -> list[Any]:
    """Modules whose bias is the last that is added in front of an activation."""
    return _norms(block) or [module for module in block.modules() if isinstance(module, CONVOLUTIONS)]


@torch.no_grad()
def _clear_of_zero(block: ThresholdBlock, x: Tensor, dtype: torch.dtype) -> None:
    """Move every shift so that 0 lies in the middle of a wide gap between its channel's values."""

    def move(module: Any, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        ordered = y.transpose(0, 1).flatten(1).sort(dim=1).values
        quarter = ordered.shape[1] // 4
        middle = ordered[:, quarter : ordered.shape[1] - quarter]
        gap = middle.diff(dim=1).argmax(dim=1, keepdim=True)
        centre = (middle.gather(1, gap) + middle.gather(1, gap + 1)).flatten() / 2
        bias = (module.bias - centre).to(dtype).double()
        moved = y + (bias - module.bias).view(-1, *[1] * (y.dim() - 2))
        module.bias.copy_(bias)
        return moved

    handles = [module.register_forward_hook(move) for module in _shifting(block)]
    block(x)
    for handle in handles:
        handle.remove()


def _reference(block: ThresholdBlock, x: Tensor, cotangent: Tensor) -> dict[str, list[Tensor]]:
    x = x.clone().requires_grad_()
    parameters = list(block.parameters())
    y, used = block_forward(block.plan, x, parameters, activation=block.activation)
    grads = torch.autograd.grad((y * cotangent).sum(), [x, *parameters])
    pixels = count(x)
    running = [Statistics(s.mean.detach(), s.variance.detach() * pixels / (pixels - 1)) for s in used]
    with torch.no_grad():
        inferred, _ = block_forward(block.plan, x, parameters, running, activation=block.activation)
    return {
        "output": [y.detach()],
        **({"statistics": [tensor for pair in running for tensor in pair]} if running else {}),
        "gradient of x": [grads[0]],
        "gradients of parameters": list(grads[1:]),
        "inference": [inferred],
    }


def _run(block: ThresholdBlock, x: Tensor, cotangent: Tensor, case: Case) -> dict[str, list[Tensor]]:
    """What `_reference` returns, by the block itself on the case's device in its dtype."""
    place: dict[str, Any] = {"device": case.device, "dtype": DTYPES[case.dtype]}
    block.to(**place)
    own = x.to(**place).requires_grad_()
    y = block(own)
    grads = torch.autograd.grad(y, [own, *block.parameters()], cotangent.to(**place))
    block.eval()
    with torch.no_grad():
        inferred = block(own)
    found = {
        "output": [y],
        "statistics": [buffer for norm in _norms(block) for buffer in (norm.running_mean, norm.running_var)],
        "gradient of x": [grads[0]],
        "gradients of parameters": list(grads[1:]),
        "inference": [inferred],
    }
    return {name: [tensor.detach().cpu().double() for tensor in tensors] for name, tensors in found.items()}


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 convolutions and products in fp32 on a GPU as well."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def _largest(ours: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest error of an element over the largest element of its tensor."""
    return torch.stack([(a - b).abs().max() / b.abs().max() for a, b in zip(ours, wanted, strict=True)]).max().item()


def _rms(ours: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Root mean square error over that of all elements of all tensors."""
    errors = torch.stack([(a - b).square().sum() for a, b in zip(ours, wanted, strict=True)]).sum()
    return (errors / torch.stack([b.square().sum() for b in wanted]).sum()).sqrt().item()


def _share(error: float, bound: float) -> float:
    return error / bound if error == error else float("inf")


def main() -> None:
    """Everything, as JSON; exit code 1 on a miss."""
    results = [check(case) for case in cases()]
    print(json.dumps([result.as_dict() for result in results], indent=2))
    sys.exit(not all(result.ok for result in results))


if __name__ == "__main__":
    main()
