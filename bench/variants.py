"""The questions of `bench/questions.py`: for each the layers, and the variants that do the same work on them.

A variant is a call of the package's own launchers on the same values; the first one of a case is the base of its
ratios. The truth is plain torch in float64; a variant may be off by twice what plain torch in the case's dtype is off
by, or by a floor (`thresholdnet/bench/check.py`).

Import it after TRITON_INTERPRET is set: Triton reads that where a kernel is decorated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from thresholdnet.kernels import configs, launch, slots
from thresholdnet.kernels.device import capability_of
from torch import Tensor
from tune import forced

from thresholdnet.backends import csrc, cuda_launch
from thresholdnet.batchnorm import batch_norm
from thresholdnet.bench import Case, Operation, micro
from thresholdnet.bench.baselines import Unavailable
from thresholdnet.bench.forms import EPS, Form, Operands, operands, plain
from thresholdnet.bench.stages import Stage, stages
from thresholdnet.memory import dtype_of
from thresholdnet.plan import plan_block

Variants = dict[str, Form]


class Size(NamedTuple):
    """Of everything that is asked: images of a step, the side of the network's images, dtype, bytes that are read.

    shrunk: blocks have their first layers alone, and widths and sides are divided by this.
    """

    batch: int
    image: int
    dtype: str
    bytes: int
    shrunk: int = 1


GPU = (Size(128, 224, "bf16", 2**30),)
TINY = (Size(2, 32, "fp32", 2**13, shrunk=8), Size(1, 128, "fp32", 2**12, shrunk=8))


class Asked(NamedTuple):
    """A case on a device: the truth, the error that each result may have, and the variants, the base first."""

    truth: list[Tensor]
    allowed: list[float]
    variants: Variants


class Comparison(NamedTuple):
    """One case of a question: `work` of `unit` times milliseconds, and what makes its operands."""

    question: str
    case: str
    unit: str
    work: float
    ask: Callable[[torch.device], Asked]

    def __str__(self) -> str:
        return f"{self.question}: {self.case}"


# ---------------------------------------------------------------- layers


class Activated(Operation):
    """A bottleneck's 3x3 convolution, with the BatchNorm and the activation that stand in front of it."""

    activates = True


def block_of(size: Size, model: str, growth: int = 0) -> Stage:
    """A block of the zoo, of another growth where one is given."""
    (stage,) = stages(Case(model, size.image, size.batch, size.dtype, "train"))
    if size.shrunk == 1 and not growth:
        return stage
    first = 6 if stage.plan.unit == "bottleneck" else 8
    layers = stage.plan.links[: first if size.shrunk > 1 else None]
    widths = [(growth or width) // size.shrunk for width in stage.plan.widths[: len(layers)]]
    plan = plan_block(stage.plan.in_channels // size.shrunk, layers, widths, unit=stage.plan.unit)
    return replace(stage, plan=plan, side=max(2, stage.side // size.shrunk))


def of(size: Size, model: str, layer: int, kernel: int, name: str, growth: int = 0, kind: Any = Operation) -> Operation:
    """An operation of a layer of a block."""
    named = f"{model} growth {growth}" if growth else model
    return kind(named, block_of(size, model, growth), layer, kernel, name, size.image, size.batch, size.dtype)


V1, DENSE, HAR = "thresholdnet_v1/stages.0", "densenet121/stages.2", "hardnet68/stages.0"


def compare(question: str, op: Operation, variants: Callable[[Operation, Operands], Variants]) -> Comparison:
    """An operation as a case: plain torch is its truth."""

    def ask(device: torch.device) -> Asked:
        dtype = dtype_of(op.dtype)
        given = operands(op, dtype, device)
        truth = plain(op, given.to(torch.float64, False))()
        given = given.to(dtype, True)
        return Asked(truth, micro.bounds(plain(op, given)(), truth, op.dtype), variants(op, given))

    read = "+".join(map(str, op.widths))
    return Comparison(
        question, f"{op} on {op.stage.side}x{op.stage.side}, {read} to {op.written}", "TFLOP/s", op.flops / 1e9, ask
    )


# ---------------------------------------------------------------- operands and calls


def lie(op: Operation, o: Operands, layout: str = "", multiple: int = 8) -> list[Tensor]:
    """What is read in slots that start at, and step by, a multiple of so many channels, among the block's others.

    layout: "rows" or "arena", by default what the engine takes for the block.
    """
    layout = layout or ("rows" if op.stage.plan.pre_activation else "arena")
    widths = op.stage.plan.node_widths if op.nodes else op.widths
    padded = [-(-width // multiple) * multiple for width in widths]
    made = slots.allocate(op.batch, padded, *o.z.shape[2:], dtype=o.z.dtype, device=o.z.device, layout=layout)
    return [slots.write(made[i][:, : t.shape[1]], t) for i, t in zip(op.nodes or (0,), o.read, strict=True)]


def dense(tensor: Tensor, multiple: int = 8) -> Tensor:
    """A slot of its own with these values."""
    batch, channels, *side = tensor.shape
    padded = -(-channels // multiple) * multiple
    (slot,) = slots.allocate(batch, [padded], *side, dtype=tensor.dtype, device=tensor.device, layout="arena")
    return slots.write(slot[:, :channels], tensor)


def unwritten(tensor: Tensor, multiple: int = 8) -> Tensor:
    """A slot of its own full of NaN: an element that nobody writes is found."""
    return dense(torch.full_like(tensor, float("nan")), multiple)


def affine_of(op: Operation, o: Operands) -> Any:
    """What an operation applies on load."""
    return batch_norm(o.gamma, o.beta, o.mean, o.variance, EPS, True).affine if op.activates else None


def call(launcher: Any, op: Operation, o: Operands, read: Sequence[Tensor], multiple: int = 8, **options: Any) -> Form:
    """The launcher's function for an operation, as a training step calls it."""
    if op.operation == "weight_gradient":
        dz = dense(o.gradient, multiple)
        options |= {"affine": affine_of(op, o), "activation": op.stage.activation}
        return lambda: [launcher.weight_gradient(read, dz, op.kernel, **options)]
    out = unwritten(o.z, multiple)

    def form() -> list[Tensor]:
        if op.from_readers:
            launcher.gradient(read, o.weights, out, **options)
        else:
            given = {"affine": affine_of(op, o), "activation": op.stage.activation, **options}
            launcher.conv(read, o.weights[0], out, statistics=True, **given)
        return [out]

    return form


def tile(op: Operation, o: Operands, grouped: bool = True) -> configs.ConvolutionConfig:
    """The rule's tile, or the one that it takes where 2x2 pixels do not fit."""
    size = (op.stage.side,) * 2 if grouped else (1, 1)
    what = capability_of(o.z.device), launch.dtype_name(o.z), op.written, op.kernel, op.pixels
    return configs.convolution_config(*what, *size, op.activates, op.from_readers, op.read)


# ---------------------------------------------------------------- questions


@triton.jit
def read_blocks(source, sums, blocks, total, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton's to type
    """sums[program]: over every programs-th of `total` blocks, round a source of `blocks`, past the L1 cache."""
    found = tl.zeros((BLOCK,), tl.int32)
    for number in range(tl.program_id(0), total, tl.num_programs(0)):
        at = (number % blocks) * BLOCK + tl.arange(0, BLOCK)
        found += tl.load(source + at, cache_modifier=".cg")
    tl.store(sums + tl.program_id(0), tl.sum(found, 0))


def cache(size: Size) -> Iterator[Comparison]:
    """How fast do the multiprocessors read out of L2, and how fast out of memory? The same values from 16 MiB, of which
    the first of 64 rounds comes from memory, and from 1 GiB."""
    block, repeats = min(2048, size.bytes // 512), 64

    def ask(device: torch.device) -> Asked:
        count = 8 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
        total = size.bytes // 4 // block
        small = torch.randint(0, 4, (total // repeats, block), dtype=torch.int32, device=device)
        number = torch.arange(total, device=device)
        truth = torch.zeros(count, dtype=torch.int64, device=device)
        truth.index_add_(0, number % count, small.sum(1)[number % len(small)])
        sums = torch.zeros(2, count, dtype=torch.int32, device=device)

        def form(row: Tensor, source: Tensor) -> Form:
            def run() -> list[Tensor]:
                read_blocks[(count,)](source, row, len(source), total, BLOCK=block, num_warps=4)
                return [row]

            return run

        sources = {"L2": small, "memory": small.repeat(repeats, 1)}
        forms = {name: form(row, source) for row, (name, source) in zip(sums, sources.items(), strict=True)}
        return Asked([truth], [0.0], forms)

    yield Comparison("l2", f"{size.bytes >> 10} KiB read in all", "GB/s", size.bytes / 1e6, ask)


def vector(size: Size) -> Iterator[Comparison]:
    """Copies of 16 bytes past L1 (8 elements) against copies of 8 bytes through it (4), grouped or not."""

    def variants(op: Operation, o: Operands) -> Variants:
        read, found = lie(op, o), {}
        for grouped in (True, False):
            taken = tile(op, o, grouped)
            if grouped or taken.group != tile(op, o).group:
                for elements in (8, 4):
                    name = f"{elements}{'' if grouped else ', not grouped'}"
                    found[name] = call(launch, op, o, read, config=replace(taken, vector=elements))
        return found

    for model, layer, kernel in ((V1, 1, 3), (V1, 6, 1), (HAR, 2, 3), (HAR, 8, 3)):
        yield compare("vector", of(size, model, layer, kernel, "convolution"), variants)


def grouping(size: Size) -> Iterator[Comparison]:
    """One row of the product for 2x2 pixels (a pixel is read 4 times) or for one (9 times), by growth."""

    def variants(op: Operation, o: Operands) -> Variants:
        read = lie(op, o)
        tiles = {"2x2": tile(op, o), "none": tile(op, o, grouped=False)}
        return {name: call(launch, op, o, read, config=taken) for name, taken in tiles.items()}

    for growth in (16, 24, 32):
        yield compare("grouping", of(size, "densenet121/stages.0", 1, 3, "convolution", growth), variants)


def halo(size: Size) -> Iterator[Comparison]:
    """CUDA's tiles with their border in shared memory ("wide", "upright"), its implicit product and the library's
    convolution of gathered slots, against Triton."""

    def variants(op: Operation, o: Operands) -> Variants:
        read = lie(op, o)
        found = {"triton": call(launch, op, o, read)}
        for name in ("wide", "upright", "gemm", "library"):
            found[f"cuda {name}"] = own(name, call(cuda_launch, op, o, read))
        return found

    def own(name: str, run: Form) -> Form:
        def form() -> list[Tensor]:
            if csrc.cuda_reason() is not None:
                raise Unavailable(f"the CUDA kernels cannot run here: {csrc.cuda_reason()}")
            with forced(cuda_launch, name):
                return run()

        return form

    yield compare("halo", of(size, V1, 1, 3, "convolution"), variants)
    yield compare("halo", of(size, HAR, 2, 3, "convolution"), variants)
    yield compare("halo", of(size, HAR, 1, 3, "data_gradient"), variants)


def layout(size: Size) -> Iterator[Comparison]:
    """One dense tensor for every slot ("arena") against all slots side by side in a pixel's row ("rows")."""

    def variants(op: Operation, o: Operands) -> Variants:
        both = ("rows", "arena") if op.stage.plan.pre_activation else ("arena", "rows")
        return {name: call(launch, op, o, lie(op, o, name)) for name in both}

    for name in ("convolution", "weight_gradient"):
        yield compare("layout", of(size, V1, 6, 1, name), variants)
        yield compare("layout", of(size, HAR, 8, 3, name), variants)


def alignment(size: Size) -> Iterator[Comparison]:
    """Dense slots padded to 8, to 16 (in bf16 a sector of 32 bytes) or to 64 channels (a line)."""

    def variants(op: Operation, o: Operands) -> Variants:
        return {str(multiple): call(launch, op, o, lie(op, o, multiple=multiple), multiple) for multiple in (8, 16, 64)}

    for layer, name in ((2, "convolution"), (8, "convolution"), (8, "weight_gradient")):
        yield compare("alignment", of(size, HAR, layer, 3, name), variants)


def readers(size: Size) -> Iterator[Comparison]:
    """What all 1x1 layers of a block send back, in the engine's order, in groups of 1, 2 and 4 for one pass."""
    for model in (V1, DENSE):
        last = block_of(size, model).plan.num_layers
        ops = [of(size, model, layer, 1, "data_gradient") for layer in range(1, last + 1)]
        work = sum(op.flops for op in ops) / 1e9
        case = f"{model} {size.batch}x{size.image}x{size.image} {size.dtype} {last} layers"
        yield Comparison("readers", case, "TFLOP/s", work, partial(_sent, ops))


def _sent(ops: Sequence[Operation], device: torch.device) -> Asked:
    """The readers of a dense block; layer r reads the nodes before it, all readers with the same statistics."""
    whole, dtype, plan = ops[-1], dtype_of(ops[-1].dtype), ops[-1].stage.plan
    given = [operands(op, dtype, device) for op in ops]
    mean, rstd = given[-1].mean, (given[-1].variance + EPS).rsqrt()
    at = [sum(plan.node_widths[:node]) for node in range(len(ops) + 1)]

    def by_torch(dtype: torch.dtype) -> list[Tensor]:
        features = torch.cat(given[-1].read, 1).to(dtype)
        total, wide = torch.zeros_like(features), torch.promote_types(dtype, torch.float32)
        for op, o in zip(ops, given, strict=True):
            vectors = (o.gamma, o.beta, mean, rstd)
            scale, shift, center, width = (v[: op.read, None, None].to(wide) for v in vectors)
            passes = (features[:, : op.read] - center) * width * scale + shift > 0
            g = F.conv_transpose2d(o.gradient.to(dtype), o.weights[0].to(dtype))
            total[:, : op.read] += (torch.where(passes, g, 0.0) * scale * width).to(dtype)
        return list(total.split(whole.widths, dim=1))

    image = {"height": whole.stage.side, "width": whole.stage.side, "dtype": dtype, "device": device}
    features = lie(whole, given[-1])
    dz = slots.allocate(whole.batch, [whole.written] * len(ops), **image, layout="arena")
    for slot, o in zip(dz, given, strict=True):
        slots.write(slot, o.gradient)

    def sender(group: int) -> Form:
        grads = slots.allocate(whole.batch, plan.node_widths, **image)[:-1]
        for grad in grads:
            slots.whole(grad).zero_()

        def send(waiting: Sequence[int], first: int, end: int) -> None:
            """To the nodes from `first` on, before `end`."""
            columns = slice(at[first], at[end])
            some = [given[layer - 1] for layer in waiting]
            launch.gradient_of_readers(
                [dz[layer - 1] for layer in waiting], [o.weights[0][:, columns] for o in some], grads[first:end],
                features[first:end], [o.gamma[columns] for o in some], [o.beta[columns] for o in some],
                mean[columns], rstd[columns], add=True, activation=whole.stage.activation,
            )  # fmt: skip

        def form() -> list[Tensor]:
            waiting: list[int] = []
            for layer in range(len(ops), 0, -1):
                if waiting:
                    send(waiting, layer, layer + 1)
                waiting.append(layer)
                if len(waiting) == group or layer == 1:
                    send(waiting, 0, layer)
                    waiting = []
            return grads

        return form

    truth = by_torch(torch.float64)
    allowed = micro.bounds(by_torch(dtype), truth, whole.dtype)
    return Asked(truth, allowed, {str(group): sender(group) for group in (1, 2, 4)})


def activated(size: Size) -> Iterator[Comparison]:
    """BatchNorm and activation before a 3x3: a pass of their own into a workspace, or on load, 4 or 9 times a pixel."""

    def variants(op: Operation, o: Operands) -> Variants:
        (read,), between, out = lie(op, o), unwritten(o.read[0]), unwritten(o.z)
        scale, shift = affine_of(op, o)

        def apart() -> list[Tensor]:
            launch.normalise(read, scale, shift, between, op.stage.activation)
            launch.conv([between], o.weights[0], out, statistics=True)
            return [out]

        return {
            "pass": apart,
            "on load": call(launch, op, o, [read], config=tile(op, o)),
            "on load, not grouped": call(launch, op, o, [read], config=tile(op, o, grouped=False)),
        }

    yield compare("activated", of(size, V1, 1, 3, "convolution", kind=Activated), variants)


QUESTIONS = (cache, vector, grouping, halo, readers, layout, alignment, activated)
"""In order of value."""
