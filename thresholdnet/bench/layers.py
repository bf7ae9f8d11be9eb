"""Operations of single layers: which there are in the zoo's blocks, and the least that each has to compute and move.

Letters: M = N H W pixels, C channels read (of all sources together), O channels written, k side of the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..memory import dtype_of
from .cases import Case
from .stages import Stage, stages

PRODUCTS = ("convolution", "data_gradient", "weight_gradient")
OPERATIONS = {
    "convolution": "over the linked sources, with BatchNorm and activation first where the layer has them in front",
    "data_gradient": "of a layer's output, gathered from all its readers; of a layer with BatchNorm and activation in "
    "front, of what it reads, through both, added to what arrived before",
    "weight_gradient": "over the linked sources, activated as in the convolution",
    "gather": "the linked sources side by side, activated as in the convolution",
    "statistics": "mean and variance of a layer's output",
    "normalise": "BatchNorm with given statistics, and activation",
    "norm_backward": "from the gradient behind BatchNorm and activation to that before them, with BatchNorm's sums",
}
"""Every operation, in words."""


@dataclass(frozen=True)
class Operation:
    """One operation of one layer.

    Attributes:
        model: with its block, as in `Case`: "thresholdnet_v1/stages.3".
        stage: the block.
        layer: 1..L.
        kernel: 3, or 1 for the first convolution of a bottleneck layer.
        operation: one of `OPERATIONS`.
        image: side of the network's images in pixels.
        batch: images.
        dtype: of pixels and weights.
    """

    table: ClassVar[str] = "layers"
    """Where a file of results keeps its rows."""

    model: str
    stage: Stage
    layer: int
    kernel: int
    operation: str
    image: int
    batch: int
    dtype: str

    @property
    def activates(self) -> bool:
        """Whether a BatchNorm and an activation stand in front of the convolution."""
        return self.stage.plan.pre_activation and not self.within

    @property
    def within(self) -> bool:
        """Whether it is a bottleneck's 3x3 convolution, which reads what the layer has made itself."""
        return self.stage.plan.unit == "bottleneck" and self.kernel == 3

    @property
    def from_readers(self) -> bool:
        """Whether it reads the gradients of the layers that read this one, and not what this one reads."""
        return self.operation == "data_gradient" and self.stage.plan.unit == "conv_bn_relu"

    @property
    def nodes(self) -> tuple[int, ...]:
        """Nodes of the block that are read; none by a convolution `within`."""
        plan = self.stage.plan
        if self.from_readers:
            return plan.readers[self.layer]
        return () if self.within else plan.links[self.layer - 1]

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of every tensor that is read side by side."""
        plan = self.stage.plan
        return tuple(plan.node_widths[node] for node in self.nodes) or (plan.bottleneck_widths[self.layer - 1],)

    @property
    def read(self) -> int:
        """C."""
        return sum(self.widths)

    @property
    def written(self) -> int:
        """O."""
        plan = self.stage.plan
        return (plan.widths if self.within else plan.bottleneck_widths or plan.widths)[self.layer - 1]

    @property
    def normalised(self) -> int:
        """Channels of the BatchNorm: of the one in front of the convolution, or of the one behind it."""
        in_front = self.activates and self.operation in (*PRODUCTS, "gather")
        return self.read if in_front else self.written

    @property
    def pixels(self) -> int:
        """M."""
        return self.batch * self.stage.side**2

    @property
    def flops(self) -> int:
        """2 M C O k^2 for products, 0 for passes over pixels, which memory bounds."""
        return 2 * self.pixels * self.read * self.written * self.kernel**2 if self.operation in PRODUCTS else 0

    @property
    def bytes(self) -> int:
        """Operands and results, each moved once: no implementation can do with less."""
        read, written = self.read, self.written
        channels = {
            "convolution": read + written,
            "data_gradient": 3 * read + written if self.activates else read + written,
            "weight_gradient": read + written,
            "gather": 2 * read,
            "statistics": written,
            "normalise": 2 * written,
            "norm_backward": 3 * written,
        }
        weight = read * written * self.kernel**2 if self.operation in PRODUCTS else 0
        return (channels[self.operation] * self.pixels + weight) * dtype_of(self.dtype).itemsize

    @property
    def fields(self) -> dict[str, Any]:
        """What a row of the results says of it."""
        return {
            "model": self.model, "image": self.image, "batch": self.batch, "dtype": self.dtype, "layer": self.layer,
            "kernel": self.kernel, "operation": self.operation,
        }  # fmt: skip

    def __str__(self) -> str:
        case = f"{self.model} {self.batch}x{self.image}x{self.image} {self.dtype}"
        return f"{case} layer {self.layer} {self.kernel}x{self.kernel} {self.operation}"


def operations(case: Case, every: bool = False) -> list[Operation]:
    """The operations of a case's block, or of all blocks of its network; one of those that are the same work.

    Args:
        every: of every layer, not of the first, the middle and the last one of each block alone.

    Raises:
        ValueError: as `stages.stages`.
    """
    distinct: dict[tuple[Any, ...], Operation] = {}
    for stage in stages(case):
        last = stage.plan.num_layers
        for layer in range(1, last + 1) if every else sorted({1, (1 + last) // 2, last}):
            for kernel, name in _of_layer(stage, layer):
                made = Operation(
                    f"{case.network}/{stage.name}", stage, layer, kernel, name, case.image, case.batch, case.dtype
                )
                work = (name, made.pixels, stage.activation, *_shape(made))
                distinct.setdefault(work, made)
    return list(distinct.values())


def _shape(made: Operation) -> tuple[Any, ...]:
    """The channels that an operation depends on."""
    if made.operation in PRODUCTS:
        return made.widths, made.written, made.kernel, made.activates
    return (made.widths, made.activates) if made.operation == "gather" else (made.written,)


def _of_layer(stage: Stage, layer: int) -> list[tuple[int, str]]:
    """Kernels and operations of a layer."""
    plan = stage.plan
    if plan.unit == "bottleneck":  # the 3x3 convolution's output is normalised by those who read it
        first = [(1, name) for name in OPERATIONS]
        return first + [(3, name) for name in (*PRODUCTS, "statistics")]
    if plan.pre_activation:
        return [(3, name) for name in (*PRODUCTS, "gather", "statistics")]
    absent = set() if plan.readers[layer] else {"data_gradient"}
    if len(plan.links[layer - 1]) == 1:
        absent.add("gather")  # a single source is read where it lies
    return [(3, name) for name in OPERATIONS if name not in absent]
