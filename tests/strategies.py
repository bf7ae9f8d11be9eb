"""Random cases for test_fuzz.py: what makes up a case, and how hypothesis draws one.

A case is a small frozen record whose repr builds it again; the numbers in its tensors follow from its seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from thresholdnet import ThresholdBlock, links
from thresholdnet.pixels import CONVOLUTIONS, KINDS, channels_last
from thresholdnet.plan import UNITS

F64 = torch.float64
LAST = torch.channels_last
LAYOUTS = (
    "NCHW", "channels_last", "channels of a wider tensor", "channels of a wider NCHW tensor", "strided", "transposed",
    "flipped", "one image repeated", "one channel repeated",
)  # fmt: skip

seeds = st.integers(0, 2**32 - 1)
layouts = st.sampled_from(LAYOUTS)
widths = st.one_of(st.integers(1, 12), st.integers(1, 40))
sides = st.integers(1, 9)
short_sides = st.integers(1, 5)  # of volumes
lengths = st.integers(1, 40)  # of signals
dilations = st.sampled_from([1, 2, 3, 8])  # the last beyond most images
halves = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
norm_eps = st.one_of(st.sampled_from([1e-5, 1e-3]), st.floats(1e-6, 1.0))
momenta = st.one_of(st.none(), st.sampled_from([0.0, 0.1, 1.0]))
PASSES = ("C++", "torch")


def _channels_beside(values: Tensor) -> Tensor:
    if values.dim() == 3:  # signals, of whose order torch has no name
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    return values.contiguous(memory_format=channels_last(values))


def laid_out(values: Tensor, layout: str) -> Tensor:
    """`values` [N, C, ...] in memory as a caller may have it, between NaN where it has gaps; some layouts repeat."""
    n, c, *rest = values.shape
    if layout == "channels_last":
        return _channels_beside(values)
    if layout.startswith("channels of"):
        wide = values.new_full((n, c + 5, *rest), float("nan"))
        wide = wide if "NCHW" in layout else _channels_beside(wide)
        wide[:, 3 : 3 + c] = values
        return wide[:, 3 : 3 + c]
    if layout == "strided":
        wide = values.new_full((2 * n, c, *rest[:-1], 3 * rest[-1]), float("nan"))
        wide[::2, ..., ::3] = values
        return wide[::2, ..., ::3]
    if layout == "transposed":
        return values.transpose(-2, -1).contiguous().transpose(-2, -1)
    if layout == "flipped":
        return values.flip(1, -1)
    if layout == "one image repeated":
        return values[:1].expand(n, c, *rest)
    if layout == "one channel repeated":
        return values[:, :1].expand(n, c, *rest)
    return values.contiguous()


# A block -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockCase:
    """A ThresholdBlock in some state, its input, and what is asked of it."""

    rows: tuple[tuple[int, ...], ...]
    threshold: int
    in_channels: int
    growth_rate: int | tuple[int, ...]
    width_rule: str
    compression: float
    unit: str
    outputs: str | tuple[int, ...]
    bottleneck_factor: int
    dilation: int | tuple[int, ...]
    activation: str
    eps: float
    own_eps: bool  # another for every BatchNorm
    momentum: float | None
    training: bool
    frozen: frozenset[int]  # BatchNorms in eval mode, by number
    bare: frozenset[int]  # without affine
    untracked: frozenset[int]  # without running statistics
    size: tuple[int, ...]  # N, H, W, or of volumes N, D, H, W, or of signals N, L
    dtype: torch.dtype
    layout: str
    weights_last: bool  # convolution weights in channels_last
    spread: float
    offset: float
    rectified: bool  # x holds many zeros
    tail: int  # channels of a 1x1 convolution behind the block; 0: none
    grad: bool
    needs_x: bool
    frozen_parameters: frozenset[int]  # that want no gradient
    cotangent: str  # its layout
    recompute: str | None
    passes: str
    seed: int

    def links(self) -> links.Links:
        """The pattern with its threshold."""
        return links.Links(self.rows, "custom", self.threshold)

    def block(self) -> ThresholdBlock:
        """The plain block in float64, its values rounded to the case's dtype."""
        block = ThresholdBlock(
            self.in_channels, self.links(), self.growth_rate, self.compression, self.unit, width_rule=self.width_rule,
            outputs=self.outputs, bottleneck_factor=self.bottleneck_factor, dilation=self.dilation,
            activation=self.activation, norm_eps=self.eps, norm_momentum=self.momentum, drop_rate=0.0,
            spatial_dims=len(self.size) - 1, dtype=F64,
        )  # fmt: skip
        replace_norms(block, self.bare, self.untracked)
        fill(block, self.seed)
        block.to(self.dtype).to(F64)
        if self.weights_last:
            block.to(memory_format=channels_last(self.x()))
        block.train(self.training)
        for number, norm in enumerate(norms_of(block)):
            norm.eps *= 1 + number * self.own_eps
            if number in self.frozen:
                norm.eval()
        for number, parameter in enumerate(block.parameters()):
            parameter.requires_grad_(number not in self.frozen_parameters)
        return block

    def x(self) -> Tensor:
        """The input, in the case's dtype."""
        values = self.spread * random((self.size[0], self.in_channels, *self.size[1:]), self.seed + 1) + self.offset
        return laid_out((values.relu() if self.rectified else values).to(self.dtype), self.layout)

    @property
    def too_small(self) -> bool:
        """Whether batch statistics are asked of one value a channel, which torch refuses."""
        count = len(self.rows) * (2 if self.unit == "bottleneck" else 1)
        return (
            prod(self.size) == 1
            and self.unit != "conv_relu"
            and any(self._uses_batch(number) for number in range(count))
        )

    def _uses_batch(self, number: int) -> bool:
        return number in self.untracked or (self.training and number not in self.frozen)


def sides_of(dims: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Of images, volumes or signals."""
    return st.tuples(*[{1: lengths, 2: sides, 3: short_sides}[dims]] * dims)


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    """Normal values in float64."""
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed % 2**63))


def norms_of(module: nn.Module) -> list[_BatchNorm]:
    """The BatchNorms in forward order."""
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]


def replace_norms(module: nn.Module, bare: frozenset[int], untracked: frozenset[int]) -> None:
    """Give some BatchNorms, by number, no affine or no running statistics."""
    number = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm):
                if number in bare or number in untracked:
                    made = type(child)(
                        child.num_features, child.eps, child.momentum, number not in bare, number not in untracked,
                        dtype=F64,
                    )  # fmt: skip
                    setattr(parent, name, made)
                number += 1


def fill(module: nn.Module, seed: int) -> None:
    """Parameters and running statistics from a seed, away from the identity that BatchNorm starts as."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, CONVOLUTIONS):
                child.weight.normal_(0, child.weight[0].numel() ** -0.5, generator=generator)
            elif isinstance(child, _BatchNorm):
                if child.affine:
                    child.weight.uniform_(-0.5, 1.5, generator=generator)
                    child.bias.uniform_(-0.5, 0.5, generator=generator)
                if child.track_running_stats:
                    child.running_mean.uniform_(-0.5, 0.5, generator=generator)
                    child.running_var.uniform_(0.3, 2.0, generator=generator)


@st.composite
def link_rows(draw: Any) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Rows of a pattern of up to 8 layers, and its threshold: by name, by hand, or one row repeated."""
    depth = draw(st.integers(1, 8))
    kind = draw(st.sampled_from([*links.PATTERNS, "by hand", "repeated"]))
    if kind == "by hand":
        rows = [draw(st.permutations(range(i)).map(tuple)) for i in range(1, depth + 1)]
        return tuple(row[: draw(st.integers(1, len(row)))] for row in rows), draw(st.integers(0, depth))
    if kind == "repeated":
        back = draw(st.lists(st.integers(1, 8), min_size=1, max_size=4, unique=True))
        return tuple(tuple(i - b for b in back if b <= i) or (i - 1,) for i in range(1, depth + 1)), 0
    made = links.make(
        kind, depth, threshold=draw(st.integers(0, depth + 1)), above=draw(st.sampled_from(list(links.ABOVE))),
        n=draw(st.integers(1, 4)),
    )  # fmt: skip
    return tuple(made), made.threshold


def some_of(count: int) -> st.SearchStrategy[frozenset[int]]:
    """Mostly none of the numbers below `count`, else any set of them."""
    return st.one_of(st.just(frozenset()), st.just(frozenset()), st.frozensets(st.integers(0, count - 1)))


@st.composite
def block_cases(
    draw: Any, dtypes: st.SearchStrategy[torch.dtype], passes: Sequence[str] = PASSES, dims: int = 2
) -> BlockCase:
    """Any block."""
    rows, threshold = draw(link_rows())
    depth = len(rows)
    unit = draw(st.sampled_from(UNITS))
    norms = depth * (2 if unit == "bottleneck" else 1)
    bare, untracked = draw(some_of(norms)), draw(some_of(norms))
    # untracked BatchNorms use the batch's statistics in eval mode too
    training = draw(st.booleans())
    batch = draw(st.integers(1 if training or untracked else 0, 4))
    dtype = draw(dtypes)
    return BlockCase(
        rows=rows,
        threshold=threshold,
        in_channels=draw(widths),
        growth_rate=draw(st.one_of(widths, st.tuples(*[widths] * depth))),
        width_rule=draw(st.sampled_from(["harmonic", "even", "constant"])),
        compression=draw(st.sampled_from([0.5, 1.0, 1.7])),
        unit=unit,
        outputs=draw(
            st.one_of(
                st.sampled_from(["auto", "all", "layers"]),
                st.sets(st.integers(0, depth), min_size=1).map(lambda nodes: tuple(sorted(nodes))),
            )
        ),
        bottleneck_factor=draw(st.integers(1, 4)),
        dilation=draw(st.one_of(st.just(1), st.just(1), dilations, st.tuples(*[dilations] * depth))),
        activation=draw(st.sampled_from(["relu", "relu6", "leaky_relu(0.125)"])),
        eps=draw(norm_eps),
        own_eps=draw(st.booleans()),
        momentum=draw(momenta),
        training=training,
        frozen=draw(some_of(norms)) if training else frozenset(),
        bare=bare,
        untracked=untracked,
        size=(batch, *draw(sides_of(dims))),
        dtype=dtype,
        layout=draw(layouts),
        weights_last=draw(st.booleans()),
        spread=draw(st.sampled_from([1.0, 0.01, 20.0])),
        offset=draw(st.sampled_from([0.0, 3.0, -30.0] if dtype == F64 else [0.0, 1.0])),
        rectified=draw(st.booleans()),
        tail=draw(st.one_of(st.just(0), widths)) if unit == "conv_bn_relu" else 0,
        grad=draw(st.sampled_from([True, True, True, False])),
        needs_x=draw(st.booleans()),
        frozen_parameters=draw(some_of(3 * norms - len(bare) * 2)),
        cotangent=draw(layouts),
        recompute=draw(st.sampled_from([None, "bottleneck"])),
        passes=draw(st.sampled_from(passes)),
        seed=draw(seeds),
    )


# The convolution of a list, and what stands between blocks -----------------------------------------------------------


@dataclass(frozen=True)
class ConvCase:
    """A call of linked_conv2d."""

    widths: tuple[int, ...]
    outputs: int
    kernel_size: int
    dilation: int
    size: tuple[int, int, int]
    layouts: tuple[str, ...]
    weight_layout: str
    bias: bool
    needs: tuple[bool, ...]  # of the sources, weight and bias
    cotangent: str
    passes: str
    seed: int


@st.composite
def conv_cases(draw: Any) -> ConvCase:
    """Any such call."""
    read = draw(st.lists(widths, min_size=1, max_size=6).map(tuple))
    return ConvCase(
        widths=read,
        outputs=draw(widths),
        kernel_size=draw(st.sampled_from([1, 3])),
        dilation=draw(st.one_of(st.just(1), dilations)),
        size=(draw(st.integers(0, 4)), draw(sides), draw(sides)),
        layouts=tuple(draw(layouts) for _ in read),
        weight_layout=draw(layouts),
        bias=draw(st.booleans()),
        needs=tuple(draw(st.booleans()) for _ in range(len(read) + 2)),
        cotangent=draw(layouts),
        passes=draw(st.sampled_from(PASSES)),
        seed=draw(seeds),
    )


@dataclass(frozen=True)
class ChainCase:
    """BatchNorm - activation [- convolution] [- pooling]."""

    channels: int
    eps: float
    momentum: float | None
    affine: bool
    tracked: bool
    activation: str
    inplace: bool
    conv: tuple[int, int, int, int, int, int] | None  # outputs, kernel, stride, padding, dilation, groups
    pool: tuple[str, int, int, int, bool] | None  # kind, kernel, stride, padding, ceil_mode
    count_padding: bool
    training: bool
    size: tuple[int, ...]
    layout: str
    needs_x: bool
    frozen_parameters: frozenset[int]
    cotangent: str
    passes: str
    seed: int

    def modules(self) -> nn.Sequential:
        """The modules, filled."""
        act, kinds = nn.ReLU if self.activation == "relu" else nn.ReLU6, KINDS[len(self.size) - 1]
        norm = kinds.norm(self.channels, self.eps, self.momentum, self.affine, self.tracked, dtype=F64)
        net = nn.Sequential(norm, act(self.inplace))
        if self.conv is not None:
            outputs, kernel, stride, padding, dilation, groups = self.conv
            net.append(
                kinds.conv(self.channels, outputs, kernel, stride, padding, dilation, groups, bias=False, dtype=F64)
            )
        if self.pool is not None:
            kind, kernel, stride, padding, ceil = self.pool
            if kind == "max":
                net.append(kinds.max_pool(kernel, stride, padding, ceil_mode=ceil))
            else:
                net.append(kinds.avg_pool(kernel, stride, padding, ceil, self.count_padding))
        fill(net, self.seed)
        for number, parameter in enumerate(net.parameters()):
            parameter.requires_grad_(number not in self.frozen_parameters)
        return net.train(self.training)


@st.composite
def chain_cases(draw: Any, dims: int = 2) -> ChainCase:
    """Any such row of modules, also where torch refuses it."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = groups * draw(st.integers(1, 13))
    conv = None
    if draw(st.booleans()):
        kernel = draw(st.integers(1, 3))
        rest = draw(st.integers(1, 3)), draw(st.integers(0, 2)), draw(st.integers(1, 2))
        conv = groups * draw(st.integers(1, 13)), kernel, *rest, groups
        if draw(st.booleans()):
            conv = conv[0], 1, 1, 0, 1, 1  # the form that a pooling may follow
    window = draw(st.integers(1, 4))
    return ChainCase(
        channels=channels,
        eps=draw(norm_eps),
        momentum=draw(momenta),
        affine=draw(st.booleans()),
        tracked=draw(st.booleans()),
        activation=draw(st.sampled_from(["relu", "relu6", "leaky_relu(0.125)"])),
        inplace=draw(st.booleans()),
        conv=conv,
        pool=draw(
            st.one_of(
                st.none(),
                st.tuples(
                    st.sampled_from(["max", "avg"]), st.just(window), st.integers(1, 3), st.integers(0, window // 2),
                    st.booleans(),
                ),
            )
        ),
        count_padding=draw(st.booleans()),
        training=draw(st.booleans()),
        size=(draw(st.integers(0, 4)), *draw(sides_of(dims))),
        layout=draw(layouts),
        needs_x=draw(st.booleans()),
        frozen_parameters=draw(some_of(3)),
        cotangent=draw(layouts),
        passes=draw(st.sampled_from(PASSES)),
        seed=draw(seeds),
    )  # fmt: skip
