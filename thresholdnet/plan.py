"""From a link pattern to a block plan: widths, what each layer reads, what the block returns, where each node lies.

A plan is frozen, hashable and validated once, when it is made; everything else is derived from it. Pure Python: nothing
here needs torch or a device. Channels are counted per pixel; bytes come from channels x height x width x item size.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache

from . import links as link_patterns
from .checks import integer, number, one_of
from .links import Links

UNITS = ("conv_bn_relu", "conv_relu", "bn_relu_conv", "bottleneck")
WIDTH_RULES = ("harmonic", "even", "constant")
OUTPUT_RULES = ("auto", "all", "layers")
SLOT_ALIGN = 8  # channels; 16 bytes of bf16, so that every slot starts and ends on a whole vector load
ROW_ALIGN = 16  # channels; a pixel's row of all slots, in bf16 whole sectors of 32 bytes


@dataclass(frozen=True)
class Slot:
    """Where a node lies in a row of channels: `width` true channels from `offset`, followed by zeros up to `padded`."""

    offset: int
    width: int

    @property
    def padded(self) -> int:
        """Channels that the slot takes: its width rounded up to SLOT_ALIGN."""
        return _round_up(self.width, SLOT_ALIGN)

    @property
    def end(self) -> int:
        """First channel behind the slot."""
        return self.offset + self.padded


@dataclass(frozen=True)
class BlockPlan:
    """The structure of one block; build it with `plan_block`.

    Attributes:
        links: sources of every layer, in concatenation order.
        node_widths: channels of node 0 (the block's input) to node L.
        outputs: nodes that the block returns, in this order; ascending where `plan_block` made them.
        unit: "conv_bn_relu" (Conv3x3-BN-ReLU), "conv_relu" (Conv3x3 with bias-ReLU: residual dense networks),
            "bn_relu_conv" (BN-ReLU-Conv3x3, DenseNet without bottlenecks) or "bottleneck"
            (BN-ReLU-Conv1x1-BN-ReLU-Conv3x3, DenseNet-BC).
        bottleneck_widths: channels between the two convolutions of each layer; empty for the other units.
        spatial_dims: 2 for images; 3 for volumes, whose kernels have a third side; 1 for signals, whose have one.
        dilations: pixels between two taps of each layer's 3x3 convolution; empty where that is 1 in all of them.
        kernel_size: taps of that convolution in a row; of signals alone others than 3.
    """

    links: Links
    node_widths: tuple[int, ...]
    outputs: tuple[int, ...]
    unit: str
    bottleneck_widths: tuple[int, ...] = ()
    spatial_dims: int = 2
    dilations: tuple[int, ...] = ()
    kernel_size: int = 3

    @property
    def num_layers(self) -> int:
        """L, the number of layers."""
        return len(self.links)

    @property
    def widths(self) -> tuple[int, ...]:
        """Output channels of layers 1..L."""
        return self.node_widths[1:]

    @property
    def in_channels(self) -> int:
        """Channels of the block's input."""
        return self.node_widths[0]

    @cached_property
    def out_channels(self) -> int:
        """Channels of the block's output."""
        return sum(self.output_widths)

    @cached_property
    def output_widths(self) -> tuple[int, ...]:
        """Channels of each node that the block returns."""
        return tuple(self.node_widths[node] for node in self.outputs)

    @property
    def returns_features(self) -> bool:
        """Whether the output is all that backward reads: every node as it is, side by side."""
        return self.reads_nodes_back and len(self.outputs) == len(self.node_widths)

    @property
    def pre_activation(self) -> bool:
        """Whether BatchNorm and activation stand in front of what a layer reads: nodes are raw features then."""
        return self.unit in ("bn_relu_conv", "bottleneck")

    @property
    def normalises(self) -> bool:
        """Whether its layers have a BatchNorm."""
        return self.unit != "conv_relu"

    def dilation(self, layer: int) -> int:
        """Of the 3x3 convolution of layer 1..L."""
        return self.dilations[layer - 1] if self.dilations else 1

    @property
    def reads_nodes_back(self) -> bool:
        """Whether backward reads the nodes, and no raw convolution output in front of a BatchNorm and an activation."""
        return self.unit != "conv_bn_relu"

    @cached_property
    def link_widths(self) -> tuple[int, ...]:
        """Input channels of each layer: the summed widths of its sources."""
        return tuple(sum(self.node_widths[k] for k in sources) for sources in self.links)

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """The layers that read each node, ascending: the transposed link table."""
        readers: list[list[int]] = [[] for _ in self.node_widths]
        for layer, sources in enumerate(self.links, start=1):
            for node in sources:
                readers[node].append(layer)
        return tuple(map(tuple, readers))

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """One slot a node, side by side in node order: the layout of the training buffers."""
        slots, offset = [], 0
        for width in self.node_widths:
            slots.append(Slot(offset, width))
            offset = slots[-1].end
        return tuple(slots)

    @property
    def buffer_channels(self) -> int:
        """Channels of a row that holds every slot, rounded up to ROW_ALIGN."""
        return row_of(self.node_widths)

    @property
    def widest_row(self) -> int:
        """Channels of the widest row of slots that a pass holds: the nodes' or the bottlenecks'."""
        return max(self.buffer_channels, row_of(self.bottleneck_widths))

    @cached_property
    def lifetimes(self) -> tuple[tuple[int, int], ...]:
        """(step that writes a node, last step that reads it); step i runs layer i, step L + 1 is the output."""
        end = self.num_layers + 1
        return tuple(
            (node, end if node in self.outputs else max(layers, default=node))
            for node, layers in enumerate(self.readers)
        )

    @cached_property
    def inference_slots(self) -> tuple[Slot, ...]:
        """Slots of an inference workspace: a node takes the lowest gap that no living node overlaps (first fit)."""
        slots: list[Slot] = []
        for node, width in enumerate(self.node_widths):
            start = self.lifetimes[node][0]
            living = sorted(
                (slot for slot, (_, last) in zip(slots, self.lifetimes, strict=False) if last >= start),
                key=lambda slot: slot.offset,
            )
            slot = Slot(0, width)
            for taken in living:
                if slot.end <= taken.offset:
                    break
                slot = Slot(max(slot.offset, taken.end), width)
            slots.append(slot)
        return tuple(slots)

    @property
    def inference_channels(self) -> int:
        """Channels of the inference workspace, rounded up to ROW_ALIGN."""
        return _round_up(max(slot.end for slot in self.inference_slots), ROW_ALIGN)

    def to_text(self) -> str:
        """The plan as JSON, for places that take only text, such as an operator's schema; `from_text` reads it."""
        fields = asdict(self) | {"links": [list(row) for row in self.links]}
        return json.dumps(fields, separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=1024)
    def from_text(text: str) -> BlockPlan:
        """The plan that `to_text` wrote, before there were volumes, dilations and kernel sizes too."""
        fields = json.loads(text)
        sequences = {key: tuple(fields[key]) for key in ("node_widths", "outputs", "bottleneck_widths")}
        return BlockPlan(
            links=Links(fields["links"]), unit=fields["unit"], spatial_dims=fields.get("spatial_dims", 2),
            dilations=tuple(fields.get("dilations", ())), kernel_size=fields.get("kernel_size", 3), **sequences,
        )  # fmt: skip

    def kept_channels(self, fused: bool, recompute_bottleneck: bool = False) -> int:
        """Channels per pixel that backward needs, the block's input included.

        Eager autograd keeps every concatenation, every BatchNorm input and every ReLU result. A fused block keeps the
        raw convolution outputs once (of conv_relu the nodes), in padded slots; `recompute_bottleneck` drops the
        bottleneck outputs from them.
        Per-channel statistics do not grow with the image and are not counted.
        """
        if fused:
            inner = 0 if recompute_bottleneck else sum(_round_up(w, SLOT_ALIGN) for w in self.bottleneck_widths)
            return sum(slot.padded for slot in self.slots) + inner
        joined = sum(width for sources, width in zip(self.links, self.link_widths, strict=True) if len(sources) > 1)
        alone = {sources[0] for sources in self.links if len(sources) == 1}  # read in place: the node itself is kept
        if self.pre_activation:
            inner = sum(self.link_widths) + 2 * sum(self.bottleneck_widths)
            return joined + sum(self.node_widths[node] for node in alone) + inner
        kept = 2 if self.normalises else 1  # what BatchNorm reads, and the activation's result
        return joined + (self.node_widths[0] if 0 in alone else 0) + kept * sum(self.widths)

    def kept_bytes(
        self, height: int, width: int, item_size: int, *, fused: bool, recompute_bottleneck: bool = False
    ) -> int:
        """Bytes that one sample of height x width pixels keeps for backward; `item_size` in bytes (4 for fp32).

        A volume's height is depth * height.
        """
        return self.kept_channels(fused, recompute_bottleneck) * height * width * item_size


def plan_block(
    in_channels: int,
    links: Iterable[Iterable[int]],
    growth_rate: int | Sequence[int],
    *,
    compression: float = 1.7,
    unit: str = "conv_bn_relu",
    width_rule: str = "harmonic",
    outputs: str | Iterable[int] = "auto",
    bottleneck_factor: int = 4,
    spatial_dims: int = 2,
    dilation: int | Sequence[int] = 1,
    kernel_size: int = 3,
) -> BlockPlan:
    """Plan a block.

    Args:
        in_channels: channels of the block's input.
        links: a pattern from `thresholdnet.links`, or any tuple of source tuples.
        growth_rate: k, or one width a layer (then `width_rule` and `compression` are not used).
        compression: m, the width multiplier of layers that many later ones read (HarDNet's multiplier), above 0.
        unit: "conv_bn_relu", "conv_relu", "bn_relu_conv" or "bottleneck".
        width_rule: "harmonic" (k up to the threshold, above it k m^e for the largest 2^e dividing i), "even" (k for odd
            layers, k m for even ones: the paper's wording) or "constant" (k). k m^e is rounded to an even number, k
            itself (e = 0) too.
        outputs: "all" nodes, all "layers", a tuple of nodes, or "auto": for conv_bn_relu the layers up to the
            threshold, the odd layers above it, and the last one; for the other units all nodes.
        bottleneck_factor: a bottleneck layer of width k computes bottleneck_factor * k channels inside.
        spatial_dims: 2 for images; 3 for volumes: 3x3x3 and 1x1x1 convolutions; 1 for signals.
        dilation: of the 3x3 convolutions, in pixels, which pad as much; or one a layer.
        kernel_size: 3; of signals' longer convolutions any odd number of taps from 3 on.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range, named in the message.
    """
    in_channels = integer("in_channels", in_channels, 1)
    pattern = link_patterns.custom(links)
    unit = one_of("unit", unit, UNITS)
    factor = integer("bottleneck_factor", bottleneck_factor, 1)
    widths = layer_widths(pattern, growth_rate, compression, width_rule)
    dims, taps = integer("spatial_dims", spatial_dims, 1, 3), integer("kernel_size", kernel_size, 3)
    if taps % 2 == 0 or (taps > 3 and dims > 1):
        raise ValueError(f"kernel_size must be 3, or odd where spatial_dims is 1, got {taps} with spatial_dims {dims}")
    return BlockPlan(
        links=pattern,
        node_widths=(in_channels, *widths),
        outputs=_output_nodes(pattern, unit, outputs),
        unit=unit,
        bottleneck_widths=tuple(factor * w for w in widths) if unit == "bottleneck" else (),
        spatial_dims=dims,
        dilations=dilations_of(_one_a_layer("dilation", "number", dilation, len(pattern))),
        kernel_size=taps,
    )


def dilations_of(layers: Iterable[int]) -> tuple[int, ...]:
    """`BlockPlan.dilations` of layers with these."""
    found = tuple(layers)
    return found if {*found} - {1} else ()


def layer_widths(
    links: Links, growth_rate: int | Sequence[int], compression: float = 1.7, width_rule: str = "harmonic"
) -> tuple[int, ...]:
    """Output channels of layers 1..L by one of the width rules (see `plan_block`)."""
    rule = one_of("width_rule", width_rule, WIDTH_RULES)
    m = number("compression", compression)
    if not 0 < m < 100:
        raise ValueError(f"compression must lie above 0 and below 100, got {compression}")
    layers = range(1, len(links) + 1)
    if isinstance(growth_rate, Sequence):
        return _one_a_layer("growth_rate", "width", growth_rate, len(links))
    k = integer("growth_rate", growth_rate, 1)
    if rule == "constant":
        return (k,) * len(links)
    if rule == "even":
        return tuple(_harmonic_width(k, m, 0 if i % 2 else 1) for i in layers)
    return tuple(k if i <= links.threshold else _harmonic_width(k, m, _twos(i)) for i in layers)


def _one_a_layer(name: str, kind: str, value: int | Sequence[int], layers: int) -> tuple[int, ...]:
    """A number for each layer: one for all, or one each; `kind`: what it is, for people."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return (integer(name, value, 1),) * layers
    if len(value) != layers:
        raise ValueError(f"{name} must hold one {kind} for each of the {layers} layers, got {len(value)}")
    return tuple(integer(f"{name} of layer {i}", each, 1) for i, each in enumerate(value, start=1))


def _harmonic_width(k: int, m: float, exponent: int) -> int:
    """2 floor(floor(k m^e + 1) / 2): k m^e rounded to an even number, as the released networks round it."""
    width = float(k)
    for _ in range(exponent):
        width *= m  # one factor at a time: m ** e may round to another integer than the released code's product
    return max(2, int(width + 1) // 2 * 2)


def _twos(i: int) -> int:
    return (i & -i).bit_length() - 1  # exponent of the largest power of two that divides i


def _output_nodes(links: Links, unit: str, outputs: str | Iterable[int]) -> tuple[int, ...]:
    last = len(links)
    if isinstance(outputs, str):
        rule = one_of("outputs", outputs, OUTPUT_RULES)
        if rule == "all" or (rule == "auto" and unit != "conv_bn_relu"):
            return tuple(range(last + 1))
        if rule == "layers":
            return tuple(range(1, last + 1))
        return tuple(i for i in range(1, last + 1) if i <= links.threshold or i % 2 or i == last)
    if not isinstance(outputs, Iterable):
        raise TypeError(f"outputs must be one of {', '.join(OUTPUT_RULES)} or a tuple of nodes, got {outputs!r}")
    nodes = tuple(sorted(integer("output node", node, 0, last) for node in outputs))
    if not nodes or len(set(nodes)) < len(nodes):
        raise ValueError(f"outputs must name at least one node and each once, got {nodes}")
    return nodes


def row_of(widths: Iterable[int]) -> int:
    """Channels of a row that holds a slot for each of these widths, rounded up to ROW_ALIGN."""
    return _round_up(sum(_round_up(width, SLOT_ALIGN) for width in widths), ROW_ALIGN)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
