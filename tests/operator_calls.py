"""Random calls of the operators of csrc/, for test_fuzz.py: right ones with what they must give, and spoiled ones.

Operands are multiples of 1/8 up to 4. So are their products of 1/64, exact in float32 as in float64: results may differ
from `elementwise.py` in float64 by the one rounding to their dtype alone, and masks not at all, at 0 and 6 neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from strategies import F64, LAST, seeds, sides, widths
from torch import Tensor
from torch.nn.grad import conv2d_weight

from thresholdnet.activations import activate_
from thresholdnet.backends import elementwise

OPERATORS = (
    "gather", "moments", "mask_sums", "send", "linear", "batch_norm_vectors", "max_pool2d", "max_pool2d_backward",
    "weight_gradient", "linked_conv2d",
)  # fmt: skip
WINOGRAD_OPERATORS = ("winograd_transform", "winograd_weights", "winograd_conv", "winograd_weight_gradient")


@dataclass(frozen=True)
class OperatorCase:
    """A call of one operator of the C++ library."""

    name: str
    widths: tuple[int, ...]
    size: tuple[int, int, int]
    dtype: torch.dtype
    activation: float
    sliced: tuple[tuple[int, int], ...]  # channels before and behind every tensor of pixels, used in turn
    optional: bool  # scale and shift, `add`, `a`
    into: int  # where the result goes: 0 a tensor of its own, else over an operand
    special: bool  # NaN, infinities and negative zeros among the values
    window: tuple[int, int, int]  # kernel, stride, padding
    seed: int


@st.composite
def operator_cases(draw: Any, names: Sequence[str] = OPERATORS) -> OperatorCase:
    """Any call that is right."""
    name = draw(st.sampled_from(names))
    kernel = draw(st.integers(1, 5))
    padding = draw(st.integers(0, kernel // 2))
    side = st.one_of(sides, st.integers(1, 24)).map(lambda size: max(size, kernel - 2 * padding))
    sums = name in ("weight_gradient", "linked_conv2d")
    channels = tuple(draw(st.lists(st.one_of(widths, st.integers(0, 80)), min_size=1, max_size=5)))
    return OperatorCase(
        name=name,
        widths=channels if any(channels) or not sums else (1,),
        size=(draw(st.integers(1 if sums or name == "moments" else 0, 3)), draw(side), draw(side)),
        dtype=draw(st.sampled_from([torch.float32, F64, *([] if name == "linked_conv2d" else [torch.bfloat16])])),
        activation=draw(st.sampled_from([1, 2, 0.25])),
        sliced=tuple(draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4))),
        optional=draw(st.booleans()),
        into=draw(st.integers(0, 2)),
        special=draw(st.booleans()),
        window=(kernel, draw(st.integers(1, 6)), padding),
        seed=draw(seeds),
    )


FEW, ALL = [float("nan"), -0.0], [float("nan"), -0.0, float("inf")]  # infinite values of z close C++ masks alone


def on_grid(shape: tuple[int, ...], seed: int, dtype: torch.dtype, special: Sequence[float] = ()) -> Tensor:
    """Multiples of 1/8 in [-4, 4]: exact in every dtype, and so is what is computed from them but for its sums."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-32, 33, shape, generator=generator).to(F64) / 8
    if special and values.numel():
        places = torch.randint(values.numel(), (len(special),), generator=generator)
        values.view(-1)[places] = torch.tensor(special, dtype=F64)
    return values.to(dtype)


ACTIVATIONS = {0: "relu", 1: "relu", 2: "relu6", 0.25: "leaky_relu(0.25)"}  # by the operators' numbers; exact


def double(tensors: list[Tensor]) -> list[Tensor]:
    """Copies in float64."""
    return [t.to(F64, copy=True) for t in tensors]


def xhat(z: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """The normalised values."""
    return (z.double() - mean.view(1, -1, 1, 1)) * rstd.view(1, -1, 1, 1)


class Call:
    """An operator with its operands, which may be slices of channels, and what it must give."""

    def __init__(self, case: OperatorCase):
        self.case = case
        self.total = sum(case.widths)
        self.made = 0
        self.slices: list[tuple[Tensor, Tensor, Tensor]] = []  # whole tensors, what they held, their slices
        self.arguments, self.results, self.expected, self.sums = getattr(self, case.name)()

    def pixels(self, channels: int, special: Sequence[float] = (), size: tuple[int, int] | None = None) -> Tensor:
        """A tensor of pixels among other channels."""
        before, behind = self.case.sliced[self.made % len(self.case.sliced)]
        return self.slice_of(self.values(channels, special, size), before, behind)

    def values(self, channels: int, special: Sequence[float] = (), size: tuple[int, int] | None = None) -> Tensor:
        """The values of pixels."""
        self.made += 1
        shape = (self.case.size[0], channels, *(size or self.case.size[1:]))
        special = special if self.case.special else ()
        return on_grid(shape, self.case.seed + self.made, self.case.dtype, special).contiguous(memory_format=LAST)

    def slice_of(self, values: Tensor, before: int, behind: int) -> Tensor:
        """The values as a slice of a wider tensor."""
        n, c, h, w = values.shape
        wide = values.new_full((n, before + c + behind, h, w), 77).contiguous(memory_format=LAST)
        part = wide[:, before : before + c]
        part.copy_(values)
        self.slices.append((wide, wide.clone(), part))
        return part

    def vectors(self, count: int) -> list[Tensor]:
        """Vectors of all channels."""
        wide = F64 if self.case.dtype == F64 else torch.float32
        self.made += count
        return [on_grid((self.total,), self.case.seed + 1000 + self.made + j, wide) for j in range(count)]

    def gather(self) -> Any:
        sources = [self.pixels(width, ALL) for width in self.case.widths]
        affine = self.vectors(2) if self.case.optional else None
        out = self.pixels(self.total)
        act = self.case.activation if affine else 0
        expected = elementwise.gather(double(sources), tuple(double(affine)) if affine else None, ACTIVATIONS[act])
        return [sources, *(affine or [None, None]), act, out], [out], [expected], None

    def moments(self) -> Any:
        z = self.pixels(self.total)
        # of values up to 4 and squares up to 16
        bound = torch.full((2, self.total), 16.0, dtype=F64)
        return [z], [], [], (torch.stack(elementwise.moments(z.double())), bound)

    def weight_gradient(self) -> Any:
        sources, dz = [self.pixels(width, ALL) for width in self.case.widths], self.pixels(5 * self.case.window[1] - 4)
        affine = self.vectors(2) if self.case.optional else None
        act, kernel = self.case.activation if affine else 0, [side | 1 for side in self.case.window[:2]]
        read = elementwise.gather(double(sources), tuple(double(affine)) if affine else None, ACTIVATIONS[act])
        read = read.to(self.case.dtype).double()
        shape, dilation = (dz.shape[1], self.total, *kernel), self.case.into + 1
        form = {"padding": [dilation * (side // 2) for side in kernel], "dilation": dilation}
        wanted = conv2d_weight(read, shape, dz.double(), **form)
        bound = conv2d_weight(read.abs(), shape, dz.double().abs(), **form)
        return [sources, *(affine or [None, None]), act, dz, *kernel, dilation], [], [], (wanted, bound)

    def linked_conv2d(self) -> Any:
        special = FEW if self.case.into else ALL  # the end makes a finite value of an infinite one
        sources, outputs = [self.pixels(width, special) for width in self.case.widths], 5 * self.case.window[1] - 4
        affine, kernel = self.vectors(2) if self.case.optional else None, [side | 1 for side in self.case.window[:2]]
        shape, padding = (outputs, self.total, *kernel), [side // 2 for side in kernel]
        weight = on_grid(shape, self.case.seed + 500, self.case.dtype).contiguous(memory_format=LAST)
        bias = on_grid((outputs,), self.case.seed + 501, self.case.dtype) if self.case.into else None
        act = 0 if affine is None and bias is None else self.case.activation
        read = elementwise.gather(double(sources), tuple(double(affine)) if affine else None, ACTIVATIONS[act])
        wanted = F.conv2d(read, weight.double(), None if bias is None else bias.double(), padding=padding)
        bound = F.conv2d(read.abs(), weight.double().abs(), padding=padding) + 4
        if bias is not None:
            wanted = activate_(wanted, ACTIVATIONS[act])
        return [sources, *(affine or [None, None]), act, weight, bias], [], [], (wanted, bound)

    def mask_sums(self) -> Any:
        g, z = self.pixels(self.total), self.pixels(self.total, FEW)
        add = self.pixels(self.total) if self.case.optional else None
        out = [self.pixels(self.total), g, g if add is None else add][self.case.into]
        norm, act = self.vectors(4), self.case.activation
        scale, shift, mean, rstd = double(norm)
        masked, *sums = elementwise.mask_sums(
            g.double(), None if add is None else add.double(), z.double(), (scale, shift), mean, rstd,
            ACTIVATIONS[act], owned=False,
        )  # fmt: skip
        bound = [(masked * f).abs().sum((0, 2, 3)) for f in (1, xhat(z, mean, rstd))]
        return [g, add, z, *norm, act, out], [out], [masked], (torch.stack(sums), torch.stack(bound))

    def send(self) -> Any:
        g, sources = self.pixels(self.total), [self.pixels(width, FEW) for width in self.case.widths]
        norm, act = self.vectors(4), self.case.activation
        scale, shift, mean, rstd = double(norm)
        arrived = [self.pixels(w) if self.case.optional or j % 2 else None for j, w in enumerate(self.case.widths)]
        out = [
            self.pixels(width) if so_far is None or (self.case.into + j) % 3 == 0 else so_far
            for j, (width, so_far) in enumerate(zip(self.case.widths, arrived, strict=True))
        ]
        before = [None if so_far is None else so_far.double() for so_far in arrived]
        owned = [False] * len(before)
        masked = elementwise.mask_sums(
            g.double(), None, torch.cat(double(sources), 1), (scale, shift), mean, rstd, ACTIVATIONS[act], owned=False
        )[0]
        expected, *sums = elementwise.send(
            *double([g]), double(sources), (scale, shift), mean, rstd, before, owned, ACTIVATIONS[act]
        )
        bound = [(masked * f).abs().sum((0, 2, 3)) for f in (1, xhat(torch.cat(sources, 1), mean, rstd))]
        given_before = [g.new_empty(0) if so_far is None else so_far for so_far in arrived]
        return (
            [g, sources, *norm, given_before, act, out], out, expected, (torch.stack(sums), torch.stack(bound)),
        )  # fmt: skip

    def linear(self) -> Any:
        g, z = self.pixels(self.total, ALL), self.pixels(self.total, ALL)
        a, b, c, mean = self.vectors(4)
        a, mean = (a, mean) if self.case.optional else (None, None)
        out = g if self.case.into == 1 else self.pixels(self.total)
        wide = [None if v is None else v.double() for v in (g, z, a, b, c, mean)]
        return [g, z, a, b, c, mean, out], [out], [elementwise.linear(*wide, False)], None

    def batch_norm_vectors(self) -> Any:
        gamma, beta = (on_grid((self.total,), self.case.seed + j, self.case.dtype) for j in (1, 2))
        mean, variance = self.vectors(2)
        operands = [gamma, beta, mean, variance.abs_().add_(0.125)]
        eps, pixels = 1 / 64, 1 + self.case.seed % 1000
        wanted = elementwise.batch_norm_vectors(*double(operands), eps, pixels)
        bound = wanted.abs() + (mean.double() * wanted[2]).abs()  # shift is a difference
        return [*operands, eps, float(pixels)], [], [], (wanted, bound)

    def max_pool2d(self) -> Any:
        x = self.values(self.total or 1, ALL)  # torch refuses images of no channels
        return [x, *self.case.window], [], [F.max_pool2d(x.double(), *self.case.window)], None

    def max_pool2d_backward(self) -> Any:
        x = self.values(self.total or 1, ALL)
        wanted = x.double().requires_grad_()
        pooled = F.max_pool2d(wanted, *self.case.window)
        grad = self.values(x.shape[1], size=tuple(pooled.shape[2:])).round()  # sums of few integers are exact in bf16
        pooled.backward(grad.double())
        return [grad, x, *self.case.window], [], [wanted.grad], None

    # Winograd's operators: operands alone, test_winograd.py has what they must give

    def transformed(self, channels: int) -> Tensor:
        """Room for the transform of pixels: [blocks of 24 tiles of 4 x 4, 36, 24, channels]."""
        n, h, w = self.case.size
        tiles = n * -(-h // 4) * -(-w // 4)
        return torch.zeros(-(-tiles // 24), 36, 24, channels)

    def winograd_transform(self) -> Any:
        x, gradient = self.pixels(self.total).float(), self.case.optional
        x = x.contiguous(memory_format=LAST)
        return [x, gradient, self.transformed(-(-self.total // 16) * 16 if gradient else self.total)], [], [], None

    def winograd_weights(self) -> Any:
        fixed, transposed = 5, self.case.optional
        shapes = [(w, fixed, 3, 3) if transposed else (fixed, w, 3, 3) for w in self.case.widths]
        return [[torch.zeros(shape) for shape in shapes], transposed], [], [], None

    def winograd_conv(self) -> Any:
        out = self.pixels(self.total).float().contiguous(memory_format=LAST)
        weights = [torch.zeros(self.total, w, 3, 3) for w in self.case.widths]
        packed = torch.ops.thresholdnet_csrc.winograd_weights(weights, False)
        sources = [self.transformed(w) for w in self.case.widths]
        bias, add = (torch.zeros(self.total), out.clone()) if self.case.optional else (None, None)
        return [sources, packed, bias, add, self.case.activation, out], [], [], None

    def winograd_weight_gradient(self) -> Any:
        sources = [self.transformed(w) for w in self.case.widths]
        return [sources, self.transformed(-(-self.total // 16) * 16), self.total], [], [], None

    def run(self) -> Any:
        """The operator's own result."""
        return getattr(torch.ops.thresholdnet_csrc, self.case.name)(*self.arguments)


WRONG_NUMBERS = (-1, 0, 3, 2**31, 2**62, 2**63 - 1, -(2**63), 2**64, 1.5, None, "relu", True)
WRONG_TENSORS = (
    "float16", "int64", "bool", "complex64", "other dtype", "rank 3", "rank 5", "rank 0", "one channel less", "NCHW",
    "transposed", "no elements", "one image repeated", "every second channel", "every second column", "no rows",
    "no images", "meta", "sparse", "requires grad", "negative view", "longer", "doubled", "None", "number",
)  # fmt: skip
WRONG_LISTS = ("empty", "shorter", "longer", "None", "a tensor", "None inside", "numbers")


@dataclass(frozen=True)
class WrongCase:
    """A right call with some of its arguments spoiled: (position, what was done to it, member of a list)."""

    right: OperatorCase
    spoiled: tuple[tuple[int, int, int], ...]


@st.composite
def wrong_cases(draw: Any) -> WrongCase:
    """Spoils one to three arguments."""
    spoiled = st.tuples(st.integers(0, 8), st.integers(0, 1000), st.integers(0, 4))
    return WrongCase(
        draw(operator_cases(OPERATORS + WINOGRAD_OPERATORS)), tuple(draw(st.lists(spoiled, min_size=1, max_size=3)))
    )


def spoil(argument: Any, way: int, member: int) -> Any:
    """An argument made wrong, or different at least, in one of many ways."""
    if isinstance(argument, list):
        how = [*WRONG_LISTS, *["member"] * len(WRONG_LISTS)][way % (2 * len(WRONG_LISTS))]
        if how == "member" and argument:
            place = member % len(argument)
            return [spoil(a, way // 14, 0) if i == place else a for i, a in enumerate(argument)]
        ways = {
            "empty": [], "shorter": argument[:-1], "longer": argument + argument[:1], "None": None,
            "a tensor": argument[0] if argument else torch.zeros(2), "None inside": [None, *argument[1:]],
            "numbers": [1.0],
        }  # fmt: skip
        return ways.get(how, argument)
    if isinstance(argument, Tensor):
        return _spoiled_tensor(argument, WRONG_TENSORS[way % len(WRONG_TENSORS)])
    if argument is None:
        return [torch.zeros(3), torch.zeros(2, 3, 4, 4), 1.0][way % 3]
    return WRONG_NUMBERS[way % len(WRONG_NUMBERS)]


def _spoiled_tensor(t: Tensor, how: str) -> Any:
    if t.dim() == 0 or t.is_meta or t.layout != torch.strided:  # spoiled before
        return t
    if how in ("float16", "int64", "bool", "complex64"):
        return t.to(getattr(torch, how))
    ways: dict[str, Any] = {
        "other dtype": lambda: t.to(F64 if t.dtype == torch.float32 else torch.float32),
        "rank 3": lambda: t[0] if t.shape[0] else t.new_zeros(3, 4, 5),
        "rank 5": lambda: t[None],
        "rank 0": lambda: t.new_zeros(()),
        "one channel less": lambda: t[:, :-1] if t.dim() > 1 else t[:-1],
        "NCHW": lambda: t.contiguous(),
        "transposed": lambda: t.transpose(-1, -2) if t.dim() > 1 else t,
        "no elements": lambda: t.new_empty(0),
        "one image repeated": lambda: t.new_ones(1, *t.shape[1:]).expand(5, *t.shape[1:]),
        "every second channel": lambda: t[:, ::2] if t.dim() > 1 else t[::2],
        "every second column": lambda: t[..., ::2],
        "no rows": lambda: t[:, :, :0] if t.dim() > 2 else t[:0],
        "no images": lambda: t[:0],
        "meta": lambda: t.to("meta"),
        "sparse": lambda: t.to_sparse(),
        "requires grad": lambda: t.detach().requires_grad_() if t.is_floating_point() else t,
        "negative view": lambda: torch._neg_view(t),
        "longer": lambda: torch.cat([t, t]),
        "doubled": lambda: torch.cat([t, t], 1) if t.dim() > 1 else t,
        "None": lambda: None,
        "number": lambda: 2.5,
    }
    return ways[how]()
