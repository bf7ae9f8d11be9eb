"""Random blocks, convolutions, transitions (strategies.py) and operator calls (operator_calls.py) against plain torch.

Each call of a fused operator is held against its replay as well. The suite runs a few of each, the same every time. New
ones, for ten minutes of a core:

    THRESHOLDNET_FUZZ_MINUTES=10 pytest tests/test_fuzz.py -k minutes

A failure prints the smallest case found: `check_block(BlockCase(...))` runs it again. The case that runs also stands in
the file that the first line names, should it end the process.

What may differ: two orders of summation. A BatchNorm over a few pixels amplifies rounding without bounds, so plain
torch runs a second time with the last bits of its input, its parameters and the results of its convolutions shaken:
what that moves, rounding may move. (The results, since neither a library's convolution nor its matrix product sums all
rows in one order: where dead channels make all pixels equal, their results need not be, and the variance is rounding.)
"""

from __future__ import annotations

import copy
import math
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_calls import Call, OperatorCase, WrongCase, operator_cases, spoil, wrong_cases
from replayed import checked
from strategies import (
    F64,
    BlockCase,
    ChainCase,
    ConvCase,
    block_cases,
    chain_cases,
    conv_cases,
    halves,
    laid_out,
    random,
)  # fmt: skip
from tolerances import PASS_ABSOLUTE, PASS_RELATIVE, RELATIVE, WINOGRAD_BLOCK
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from thresholdnet import ThresholdBlock, chain, prepack, replay
from thresholdnet.backends import csrc, winograd
from thresholdnet.functional import linked_conv2d
from thresholdnet.pixels import CONVOLUTIONS

MINUTES = float(os.environ.get("THRESHOLDNET_FUZZ_MINUTES", 0))
AMPLIFIED = 100  # times what shaking the last bit moves: the rounding of some hundred operations, one behind the other
CANCELLED = 1e-12  # of the largest gradient, or of 1: what rounding leaves of gradients that a BatchNorm cancels
TINY = 1e-24  # a variance that is 0 but for the square of its rounding
UNIT = {F64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
LARGEST_RATIO = 8  # our error over plain torch's, or over what shaking moves, in one case
NO_DIGIT = 0.9  # torch's error where zeros are as near, as gradients of 10^10 behind layers without variance
MEAN_RATIO = 0.5  # the mean of its base-2 logarithm over many cases
SHAKES = 40  # at most, to find what a case's rounding may move


@pytest.fixture(autouse=True)
def held_against_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a fused operator computes here, its replay computes too."""
    monkeypatch.setattr(replay, "call", checked)


Found = dict[str, Any]
"""Output, gradients and buffers by name; None for the gradient of what wants none."""


@contextmanager
def passes_in(language: str) -> Iterator[None]:
    """The native backend's passes over pixels: "C++", where the library is there, "torch", or "Winograd".

    The last is C++ with every 3x3 convolution in Winograd's form that has one, whether it pays or not.
    """
    forced, before = language == "Winograd", winograd.enabled()
    takes = (lambda x: False) if language == "torch" else csrc.takes

    def pays(read: int, written: int, *images: int) -> bool:
        return forced and min(read, written) > 0

    winograd._choose.cache_clear()  # it asks `pays`
    winograd.use(forced)
    try:
        with (
            mock.patch.object(csrc, "takes", takes),
            mock.patch.object(winograd, "pays", pays),
            mock.patch.object(winograd, "ALONE", dict.fromkeys(winograd.ALONE, 1)),
        ):
            yield
    finally:
        winograd.use(before)
        winograd._choose.cache_clear()


def shaken(tensor: Tensor, unit: float, seed: int) -> Tensor:
    """The tensor with every element moved by up to `unit` times itself."""
    return tensor * (1 + unit * random(tuple(tensor.shape), seed).clamp(-1, 1)).to(tensor.dtype)


class Arriving(torch.autograd.Function):
    """The identity behind a BatchNorm: notes the largest gradient that arrives in each channel."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, noted: dict[str, Tensor]) -> Tensor:
        ctx.noted = noted
        return z.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        ctx.noted["largest"] = g.abs().amax((0, *range(2, g.dim())), keepdim=True) if g.numel() else g.new_zeros(1)
        return g, None


class Leaving(torch.autograd.Function):
    """The identity before it: the gradient is a difference of such terms, scaled, and has the rounding of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, noted: dict[str, Tensor], unit: float, seed: int) -> Tensor:
        ctx.noted, ctx.unit, ctx.seed = noted, unit, seed
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        rounding = ctx.unit * random(tuple(g.shape), ctx.seed).clamp(-1, 1).to(g.dtype)
        return g + rounding * ctx.noted["scale"] * ctx.noted["largest"], None, None, None


def shake_norm(norm: Any, unit: float, seed: int) -> None:
    """From now on the gradients that leave a BatchNorm are shaken."""
    noted: dict[str, Tensor] = {}

    def before(module: Any, inputs: tuple[Tensor]) -> Tensor:
        return Leaving.apply(inputs[0], noted, unit, seed)

    def behind(module: Any, inputs: tuple[Tensor], z: Tensor) -> Tensor:
        given = not module.training and module.running_var is not None
        pixels = (0, *range(2, z.dim()))
        variance = module.running_var if given else inputs[0].detach().var(pixels, correction=0)
        gamma = torch.ones_like(variance) if module.weight is None else module.weight.detach().abs()
        noted["scale"] = (gamma * (variance + module.eps).rsqrt()).view(-1, *[1] * (z.dim() - 2))
        return Arriving.apply(z, noted)

    norm.register_forward_pre_hook(before)
    norm.register_forward_hook(behind)


def shake(module: nn.Module, unit: float, seed: int) -> Any:
    """Shake all parameters, and from now on what convolutions give and BatchNorms send back; returns the module."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters(), start=1):
            parameter.copy_(shaken(parameter, unit, seed + number))
    for number, child in enumerate(module.modules(), start=1000):
        if isinstance(child, CONVOLUTIONS):
            child.register_forward_hook(lambda m, x, z, number=number: shaken(z, unit, seed + number))
        elif isinstance(child, _BatchNorm):
            shake_norm(child, unit, seed + number)
    return module


def run(call: Callable[[], Tensor], leaves: dict[str, Tensor], module: nn.Module | None, cotangent: str) -> Found:
    """What a call gives, forward and backward."""
    y = call()
    found: Found = {"output": y.detach()}
    if torch.is_grad_enabled() and y.requires_grad:  # a block may return its input itself
        y.backward(laid_out(random(tuple(y.shape), 7).to(y.dtype), cotangent))
    for name, leaf in leaves.items():
        # where nothing depends on a leaf, autograd leaves None and an operator zeros
        zeros = torch.zeros_like(leaf) if leaf.requires_grad else None
        found[f"gradient of {name}"] = zeros if leaf.grad is None else leaf.grad
    if module is not None:
        found.update((name, buffer.clone()) for name, buffer in module.named_buffers())
    return found


def assert_same(ours: Found, theirs: Found, moved: Found) -> None:
    """Within the tolerance of float64, or AMPLIFIED times what shaking moved."""
    assert ours.keys() == theirs.keys()
    gradients = [t for name, t in theirs.items() if name.startswith("gradient") and t is not None and t.numel()]
    cancelled = CANCELLED * max([1.0, *(t.abs().max().item() for t in gradients)])
    for name, wanted in theirs.items():
        got = ours[name]
        assert (got is None) == (wanted is None), name
        if wanted is None:
            continue
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype), name
        if wanted.numel():
            largest, noise, error = (t.abs().max().item() for t in (wanted, moved[name] - wanted, got - wanted))
            floor = cancelled if name.startswith("gradient") else TINY
            allowed = max(RELATIVE[F64] * largest, AMPLIFIED * noise, floor)
            assert error <= allowed, f"{name}: {error:.2e} off, {allowed:.2e} allowed, the largest is {largest:.2e}"


# Blocks ---------------------------------------------------------------------------------------------------------------


def run_block(case: BlockCase, block: ThresholdBlock, dtype: torch.dtype, x: Tensor | None = None) -> Found:
    """One step of a block on the case's input, or on `x`."""
    x = (case.x().to(dtype) if x is None else x).detach().requires_grad_(case.needs_x)
    kept, tail = x.detach().clone(), None
    leaves = {"x": x, **dict(block.named_parameters())}
    if case.tail:
        point = [1] * block.plan.spatial_dims
        tail = random((case.tail, block.out_channels, *point), case.seed + 2).to(case.dtype).to(dtype).requires_grad_()
        leaves["tail"] = tail
    with torch.set_grad_enabled(case.grad):
        found = run(partial(block, x, tail), leaves, block, case.cotangent)
    assert torch.equal(x.detach(), kept)
    return found


def run_shaken(case: BlockCase, block: ThresholdBlock, unit: float, seed: int = 0) -> Found:
    """One step of the plain block in float64, its input and parameters shaken."""
    return run_block(case, shake(copy.deepcopy(block), unit, seed), F64, shaken(case.x().double(), unit, seed))


def run_fused(case: BlockCase, block: ThresholdBlock) -> Found:
    """One step in the engine; with an odd seed prepacked, in inference after a call that packed."""
    fused = copy.deepcopy(block).to(case.dtype).fuse(True, "native", case.recompute)
    with passes_in(case.passes):
        if case.seed % 2:
            prepack(fused)
            if not (case.grad or case.training):
                run_block(case, fused, case.dtype)
        found = run_block(case, fused, case.dtype)
    assert fused.backend == "native"
    assert found["output"].movedim(1, -1).is_contiguous()
    return found


def refused(case: BlockCase, block: ThresholdBlock) -> bool:
    """Whether torch refuses the case, as the engine must."""
    if case.too_small:
        for step in (lambda: run_block(case, block.to(case.dtype), case.dtype), lambda: run_fused(case, block)):
            with pytest.raises(ValueError, match=r"more than (1|one) value per channel when training"):
                step()
    return case.too_small


def check_block(case: BlockCase) -> None:
    """In float64."""
    block = case.block()
    if not refused(case, block):
        ours = run_fused(case, block)
        moved = run_shaken(case, block, UNIT[F64])
        assert_same(ours, run_block(case, block, F64), moved)


GROUPS = ("output", "gradient of x", "gradient of ", "")  # by the beginnings of names; the last has running statistics
RATIOS: dict[tuple[torch.dtype, str], list[float]] = {}
"""Base-2 logarithms of our error over plain torch's, of all cases so far."""


def group_error(found: Found, truth: Found, group: str) -> float:
    """Root mean square of the difference over all tensors of a group, relative to that of the tensors themselves."""
    names = [n for n, t in truth.items() if t is not None and t.is_floating_point() and n.startswith(group)]
    names = [n for n in names if next(g for g in GROUPS if n.startswith(g)) == group]
    difference = sum((found[n].double() - truth[n]).square().sum().item() for n in names)
    return (difference / max(sum(truth[n].square().sum().item() for n in names), 1e-30)) ** 0.5


def check_half(case: BlockCase) -> None:
    """In float32 and half formats: next to plain torch, both against float64 of the same rounded operands."""
    block = case.block()
    if refused(case, block):
        return
    ours = run_fused(case, block)
    theirs = run_block(case, copy.deepcopy(block).to(case.dtype), case.dtype)
    truth = run_block(case, copy.deepcopy(block), F64)
    unit = WINOGRAD_BLOCK if case.passes == "Winograd" else UNIT[case.dtype]
    for name, got in ours.items():
        assert (got is None) == (truth[name] is None), name
        assert got is None or (got.dtype, got.shape) == (theirs[name].dtype, truth[name].shape), name
    for group in GROUPS:
        own, plain = group_error(ours, truth, group), group_error(theirs, truth, group)
        if not math.isfinite(plain) or plain >= NO_DIGIT:  # an overflow of float16, or a gradient that exploded
            continue
        noise = unit
        for seed in range(SHAKES):  # seldom more than one: where a mask flipped near 0 in our run alone
            if own <= LARGEST_RATIO * max(plain, noise):
                break
            noise = max(noise, group_error(run_shaken(case, block, 8 * unit, seed), truth, group))
        assert own <= LARGEST_RATIO * max(plain, noise), f"{group}: {own:.1e}, torch {plain:.1e}, shaken {noise:.1e}"
        if own and case.passes != "Winograd":  # one rounding is always allowed
            RATIOS.setdefault((case.dtype, group), []).append(math.log2(own / max(plain, unit)))


def assert_no_worse_than_torch() -> None:
    """Over all cases so far; masks that flip near 0 move single cases, on either side."""
    for (dtype, group), found in RATIOS.items():
        if len(found) >= 30:
            mean = sum(found) / len(found)
            assert mean <= MEAN_RATIO, f"{group} in {dtype}: 2^{mean:.2f} times torch's error over {len(found)} cases"


# The convolution of a list, and what stands between blocks -----------------------------------------------------------


def plain_conv(sources: list[Tensor], weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """What linked_conv2d stands for."""
    padding = dilation * (weight.shape[2] // 2)
    return F.conv2d(torch.cat(sources, 1), weight, bias, padding=padding, dilation=dilation)


def run_conv(case: ConvCase, call: Callable[..., Tensor], unit: float = 0.0) -> Found:
    """One step of a convolution; `unit`: how far to shake its operands."""
    n, h, w = case.size
    tensors = [laid_out(random((n, c, h, w), case.seed + j), case.layouts[j]) for j, c in enumerate(case.widths)]
    shape = (case.outputs, sum(case.widths), case.kernel_size, case.kernel_size)
    tensors.append(laid_out(random(shape, case.seed + 99), case.weight_layout))
    tensors += [random((case.outputs,), case.seed + 100)] * case.bias
    tensors = [shaken(t, unit, j) if unit else t for j, t in enumerate(tensors)]
    tensors = [t.detach().requires_grad_(need) for t, need in zip(tensors, case.needs, strict=False)]
    kept, count = [t.detach().clone() for t in tensors], len(case.widths)
    leaves = {f"operand {j}": t for j, t in enumerate(tensors)}
    bias = tensors[-1] if case.bias else None
    step = partial(call, tensors[:count], tensors[count], bias, dilation=case.dilation)
    found = run(step, leaves, None, case.cotangent)
    assert all(torch.equal(t.detach(), old) for t, old in zip(tensors, kept, strict=True))
    return found


def check_conv(case: ConvCase) -> None:
    """linked_conv2d against the convolution of the concatenation."""
    with passes_in(case.passes):
        ours = run_conv(case, partial(linked_conv2d, backend="native"))
    assert_same(ours, run_conv(case, plain_conv), run_conv(case, plain_conv, UNIT[F64]))


def run_chain(case: ChainCase, call: Callable[[nn.Sequential, Tensor], Tensor], unit: float = 0.0) -> Found:
    """One step of the modules; `unit`: how far to shake their input and parameters."""
    net = shake(case.modules(), unit, 0)
    values = laid_out(random((case.size[0], case.channels, *case.size[1:]), case.seed + 1), case.layout)
    x = (shaken(values, unit, 0) if unit else values).detach().requires_grad_(case.needs_x)
    return run(partial(call, net, x), {"x": x, **dict(net.named_parameters())}, net, case.cotangent)


def check_chain(case: ChainCase) -> None:
    """A transition against its modules one by one; what torch refuses is refused."""
    try:
        theirs = run_chain(case, nn.Sequential.forward)
    except (ValueError, RuntimeError) as refusal:
        with passes_in(case.passes), pytest.raises(type(refusal)):
            run_chain(case, chain.run)
        return
    with passes_in(case.passes):
        ours = run_chain(case, chain.run)
    assert_same(ours, theirs, run_chain(case, nn.Sequential.forward, UNIT[F64]))


# The operators of csrc/ ----------------------------------------------------------------------------------------------


def check_operator(case: OperatorCase) -> None:
    """An operator in C++ against elementwise.py or torch in float64: exact but for sums; nothing else is written."""
    call = Call(case)
    made = call.run()
    results = call.results if call.results else [made] if call.expected else []
    for got, wanted in zip(results, call.expected, strict=True):
        assert got.dtype == case.dtype
        torch.testing.assert_close(got.double(), wanted.to(case.dtype).double(), rtol=0, atol=0, equal_nan=True)
    if call.sums is not None:
        wanted, bound = call.sums
        wide = F64 if case.dtype == F64 else torch.float32
        assert made.dtype == (case.dtype if case.name == "weight_gradient" else wide)
        finite = wanted.isfinite() & bound.isfinite()
        allowed = PASS_ABSOLUTE[wide] * bound[finite]
        if made.dtype == torch.bfloat16:
            allowed += PASS_RELATIVE[torch.bfloat16] * wanted[finite].abs()
        assert ((made.double()[finite] - wanted[finite]).abs() <= allowed).all()
        assert not made[~finite].isfinite().any()
    for wide, held, part in call.slices:
        if any(part is result for result in call.results):
            held.as_strided(part.shape, part.stride(), part.storage_offset()).copy_(part)
        assert torch.equal(wide.nan_to_num(99), held.nan_to_num(99))


def check_wrong(case: WrongCase) -> None:
    """Spoiled arguments are refused in a sentence, or make another right call."""
    call = Call(case.right)
    for position, way, member in case.spoiled:
        place = position % len(call.arguments)
        call.arguments[place] = spoil(call.arguments[place], way, member)
    try:
        call.run()
    except (RuntimeError, TypeError, ValueError) as error:
        assert "API call failed" not in str(error), f"torch had to refuse in our place: {error}"


# Running them --------------------------------------------------------------------------------------------------------

PROPERTIES: dict[str, tuple[Callable[[Any], None], st.SearchStrategy[Any], int]] = {
    "blocks": (check_block, block_cases(st.just(F64)), 60),
    "half": (check_half, block_cases(halves), 60),
    "Winograd": (check_half, block_cases(st.just(torch.float32), ["Winograd"]), 60),
    "conv": (check_conv, conv_cases(), 60),
    "chain": (check_chain, chain_cases(), 100),
    "volumes": (check_block, block_cases(st.just(F64), dims=3), 60),
    "half volumes": (check_half, block_cases(halves, dims=3), 40),
    "chain of volumes": (check_chain, chain_cases(dims=3), 60),
    "signals": (check_block, block_cases(st.just(F64), dims=1), 60),
    "half signals": (check_half, block_cases(halves, dims=1), 40),
    "chain of signals": (check_chain, chain_cases(dims=1), 60),
    "operators": (check_operator, operator_cases(), 150),
    "wrong": (check_wrong, wrong_cases(), 200),
}
"""Check, cases, and how many of them the suite runs."""


def explore(name: str, seed: int | None = None, note: Callable[[Any], None] = lambda case: None) -> None:
    """Run a property's cases: the same every time, or those of a seed; `note` hears of each before it runs."""
    check, cases, examples = PROPERTIES[name]

    def noted(case: Any) -> None:
        note(case)
        check(case)

    noted.__name__ = check.__name__
    test = settings(
        max_examples=examples, deadline=None, derandomize=seed is None, database=None,
        suppress_health_check=list(HealthCheck),
    )(given(case=cases)(noted))  # fmt: skip
    (test if seed is None else hypothesis.seed(seed)(test))()
    assert_no_worse_than_torch()


def skip_without_library(name: str) -> bool:
    """Whether a property has nothing to run on."""
    return name in ("Winograd", "operators", "wrong") and csrc.reason() is not None


@pytest.mark.parametrize("name", PROPERTIES)
def test_fuzz(name):
    if skip_without_library(name):
        pytest.skip(f"no C++ library: {csrc.reason()}")
    explore(name)


@pytest.mark.skipif(not MINUTES, reason="set THRESHOLDNET_FUZZ_MINUTES")
@pytest.mark.timeout(0)
def test_fuzz_for_minutes(capsys, tmp_path):
    start, counts, running = time.process_time(), Counter(), Path(tmp_path, "case")
    names = [name for name in PROPERTIES if not skip_without_library(name)]

    def say(text: str) -> None:
        with capsys.disabled():
            print(f"{(time.process_time() - start) / 60:5.1f} min: {text}", flush=True)

    say(f"the case that runs stands in {running}")
    while time.process_time() - start < 60 * MINUTES:
        for name in names:

            def note(case: Any, name: str = name) -> None:
                counts[name] += 1
                running.write_text(repr(case))

            explore(name, secrets.randbits(32), note)
        say(", ".join(f"{count} {name}" for name, count in counts.items()))
