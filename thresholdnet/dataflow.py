"""What a module computes, written down while a copy runs: convolutions, BatchNorms, activations and what they read.

The layers and links of a block are read off that, whatever its classes and attributes are called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from .activations import leaky_relu
from .layers import meta_copy

CONV, NORM, ACT, DROP, JOIN, INPUT, OTHER = "conv", "norm", "act", "drop", "join", "input", "other"
ADD, SCALE = "add", "scale"

BEHIND = (ACT, NORM, CONV)
"""A layer of Conv - BN - act, last step first."""

BARE = (ACT, CONV)
"""A layer of Conv3x3 - act."""

BEFORE = (CONV, ACT, NORM, CONV, ACT, NORM)
"""A bottleneck layer likewise, whose inner convolution is 1x1 (1x1x1); a layer of BN - act - Conv is its first half."""


class Step(NamedTuple):
    """One operation.

    Attributes:
        kind: one of the names above; OTHER is what no block of linked layers does.
        reads: numbers of the steps whose results it reads.
        what: path of a convolution's or a BatchNorm's module, an activation's name, a `Drop`, a factor.
        kernel: a convolution's.
    """

    kind: str
    reads: tuple[int, ...] = ()
    what: Any = None
    kernel: tuple[int, ...] = ()


class Drop(NamedTuple):
    """A dropout: its rate, and whether it drops whole channels of an image, a volume or a signal."""

    rate: float
    channels: bool


class Layer(NamedTuple):
    """One layer of a block.

    Attributes:
        unit: as in `BlockPlan`.
        modules: paths of its BatchNorms and convolutions, in forward order.
        activations: names.
        sources: nodes that it reads, in concatenation order; 0 is the block's input.
        drop: of its output.
    """

    unit: str
    modules: tuple[str, ...]
    activations: frozenset[str]
    sources: tuple[int, ...]
    drop: Drop


class Function(NamedTuple):
    """An activation in front of the layers or behind them that no module computes, by its name."""

    activation: str


class Flow(NamedTuple):
    """A block.

    Attributes:
        layers: in the order in which they ran.
        outputs: nodes that it joins in the end, in that order.
        before, behind: paths of modules, and functions, that run in front of node 0 and behind the join.
        residual: the factor of that, where the block's input is added in the end; 0 where it is not.
    """

    layers: tuple[Layer, ...]
    outputs: tuple[int, ...]
    before: tuple[str | Function, ...] = ()
    behind: tuple[str | Function, ...] = ()
    residual: float = 0.0


@torch.no_grad()
def flow_of(module: nn.Module, x: Tensor) -> Flow | None:
    """The layers of a module that joins what they made; None for one that does anything else with x.

    In front and behind others of its modules may run, one after the other, and x may be added in the end. A copy runs
    once, in eval mode, on the meta device, for a forward may write wherever it likes. x: on that device.
    """
    try:
        twin = meta_copy(module).eval()
    except Exception:  # what refuses to be copied
        return None
    watch = _Watch(twin, x)
    handles = register_module_forward_pre_hook(watch.begin), register_module_forward_hook(watch.end)
    try:
        with watch:
            result = twin.forward(x)
    except Exception:  # it may want something else than one batch of pixels
        return None
    finally:
        for handle in handles:
            handle.remove()
    return _flow(watch, watch.number(result))


class _Watch(TorchFunctionMode):
    """Notes what torch's functions do with x and with what was made of it."""

    def __init__(self, module: nn.Module, x: Tensor):
        super().__init__()
        self.steps = [Step(OTHER), Step(INPUT)]  # the first stands for what comes from elsewhere
        self._numbers = {id(x): 1}
        self._alive = [x]  # no other tensor takes the id of one of these
        self._paths = {
            id(tensor): path
            for path, each in module.named_modules()
            for tensor in (*each.parameters(recurse=False), *each.buffers(recurse=False))
        }
        self._leaves = {id(each): path for path, each in module.named_modules() if path and not each._modules}
        self._read = 0  # by the module that runs
        self.calls: dict[int, tuple[str, int]] = {}
        """By the number of what it returned: the path of a module without others inside, and what it read."""

    def begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A hook before a module runs."""
        if id(module) in self._leaves:
            self._read = self.number(args[0]) if len(args) == 1 else 0

    def end(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """A hook behind it."""
        made = self.number(result)
        if id(module) in self._leaves and self._read and made != self._read:
            self.calls[made] = self._leaves[id(module)], self._read

    def call(self, number: int) -> tuple[str | Function, int] | None:
        """The module or function that made the result of this step alone, and what it read."""
        step = self.steps[number]
        return self.calls.get(number) or ((Function(step.what), step.reads[0]) if step.kind == ACT else None)

    def number(self, value: Any) -> int:
        """Of the step that made a value."""
        return self._numbers.get(id(value), 0)

    def path(self, *tensors: Any) -> str | None:
        """The path of the module whose parameter or buffer is the first of these tensors that is there."""
        return next((self._paths.get(id(tensor)) for tensor in tensors if tensor is not None), None)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        step = _KNOWN[function](self, *args, **options) if function in _KNOWN else None  # before it writes in place
        result = function(*args, **options)
        for made in result if isinstance(result, list | tuple) else [result]:
            if isinstance(made, Tensor):
                self._numbers[id(made)] = len(self.steps)
                self._alive.append(made)
                self.steps.append(step if step is not None and made is result else Step(OTHER))
        return result


# The step of each function, which is given what torch's own is.


def _conv(watch: _Watch, input: Any, weight: Any, *_: Any, **__: Any) -> Step | None:
    path = watch.path(weight)
    return None if path is None else Step(CONV, (watch.number(input),), path, tuple(weight.shape[2:]))


def _norm(
    watch: _Watch, input: Any, running_mean: Any, running_var: Any, weight: Any = None, *_: Any, **__: Any
) -> Step | None:
    path = watch.path(running_mean, weight)
    return None if path is None else Step(NORM, (watch.number(input),), path)


def _relu(watch: _Watch, input: Any, *_: Any, **__: Any) -> Step:
    return Step(ACT, (watch.number(input),), "relu")


def _relu6(watch: _Watch, input: Any, *_: Any, **__: Any) -> Step:
    return Step(ACT, (watch.number(input),), "relu6")


def _leaky_relu(watch: _Watch, input: Any, negative_slope: float = 0.01, *_: Any, **__: Any) -> Step | None:
    known = 0 < negative_slope < 1
    return Step(ACT, (watch.number(input),), leaky_relu(float(negative_slope))) if known else None


def _hardtanh(watch: _Watch, input: Any, min_val: float = -1, max_val: float = 1, *_: Any, **__: Any) -> Step | None:
    return _relu6(watch, input) if (min_val, max_val) == (0, 6) else None


def _dropout(watch: _Watch, input: Any, p: float = 0.5, *_: Any, **__: Any) -> Step:
    return Step(DROP, (watch.number(input),), Drop(float(p), False))


def _dropout_of_channels(watch: _Watch, input: Any, p: float = 0.5, *_: Any, **__: Any) -> Step:
    return Step(DROP, (watch.number(input),), Drop(float(p), True))


def _cat(watch: _Watch, tensors: Any, dim: int = 0, **_: Any) -> Step | None:
    parts = [tensor for tensor in tensors if tensor.shape != (0,)]  # which torch leaves out, and some begin with
    channels = bool(parts) and dim in (1, 1 - parts[0].dim())
    return Step(JOIN, tuple(map(watch.number, parts))) if channels else None


def _add(watch: _Watch, input: Any, other: Any, *_: Any, alpha: float = 1, **__: Any) -> Step | None:
    return Step(ADD, (watch.number(input), watch.number(other))) if alpha == 1 else None


def _mul(watch: _Watch, input: Any, other: Any, *_: Any, **__: Any) -> Step | None:
    if isinstance(input, Tensor) and isinstance(other, int | float):
        return Step(SCALE, (watch.number(input),), float(other))
    return None


_KNOWN: dict[Any, Callable[..., Step | None]] = {
    F.batch_norm: _norm, F.dropout: _dropout, F.relu6: _relu6, F.hardtanh: _hardtanh,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _conv),
    **dict.fromkeys((F.dropout1d, F.dropout2d, F.dropout3d), _dropout_of_channels),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_), _leaky_relu),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__), _add),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__imul__, Tensor.__rmul__), _mul),
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), _relu),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _cat),
}  # fmt: skip


def _flow(watch: _Watch, last: int) -> Flow | None:
    """What the step `last` is made of: a join, what ran behind it, and the input where it was added."""
    steps = watch.steps
    residual = 0.0
    if steps[last].kind == ADD and len(sums := [n for n in steps[last].reads if steps[n].kind != INPUT]) == 1:
        residual, (last,) = 1.0, sums
        if steps[last].kind == SCALE:
            residual, (last,) = steps[last].what, steps[last].reads
    before: list[str | Function] = []
    behind: list[str | Function] = []
    while steps[last].kind != JOIN:
        if (call := watch.call(last)) is None:
            return None
        behind.insert(0, call[0])
        last = call[1]
    joined = [*_joined(steps, last)]
    found: dict[int, tuple[list[Step], list[int], Drop]] = {}
    waiting, bases = list(joined), set[int]()
    while waiting:
        number = waiting.pop()
        if number in found or number in bases:
            continue
        layer = _layer(steps, number)
        if layer is None:
            bases.add(number)
        else:
            found[number] = layer
            waiting += layer[1]
    if len(bases) != 1:
        return None
    (base,) = bases  # node 0
    order = sorted(found)  # as they ran
    nodes = {base: 0, **{number: node for node, number in enumerate(order, start=1)}}
    while steps[base].kind != INPUT:
        if (call := watch.call(base)) is None:
            return None
        before.insert(0, call[0])
        base = call[1]
    layers = [
        Layer(
            unit=_unit(chain),
            modules=tuple(step.what for step in reversed(chain) if step.kind != ACT),
            activations=frozenset(step.what for step in chain if step.kind == ACT),
            sources=tuple(nodes[source] for source in sources),
            drop=drop,
        )
        for chain, sources, drop in map(found.__getitem__, order)
    ]
    return Flow(tuple(layers), tuple(nodes[number] for number in joined), tuple(before), tuple(behind), residual)


def _layer(steps: Sequence[Step], number: int) -> tuple[list[Step], list[int], Drop] | None:
    """The steps of the layer that ends in this one, last one first; what it reads; its dropout."""
    drop = Drop(0.0, False)
    if steps[number].kind == DROP:
        drop, (number,) = steps[number].what, steps[number].reads
    pattern: tuple[str, ...] = BEFORE
    if steps[number].kind == ACT:
        pattern = BARE if steps[steps[number].reads[0]].kind == CONV else BEHIND
    chain: list[Step] = []
    for kind in pattern:
        while steps[number].kind == DROP and not steps[number].what.rate:  # which drops nothing
            (number,) = steps[number].reads
        step = steps[number]
        if step.kind != kind or (len(chain) == 3 and {*step.kernel} != {1}):
            break
        chain.append(step)
        (number,) = step.reads
    whole = len(chain) == len(pattern) or (pattern is BEFORE and len(chain) == 3)
    if not whole or (pattern is BARE and not _is_of_a_layer(chain[-1].kernel)):
        return None
    return chain, [*_joined(steps, number)], drop


def _is_of_a_layer(kernel: Sequence[int]) -> bool:
    """Whether a convolution of these taps, without BatchNorm, is a layer's and no stem's or fusion's."""
    return {*kernel} == {3} or (len(kernel) == 1 and kernel[0] > 1)


def _unit(chain: Sequence[Step]) -> str:
    if len(chain) == len(BARE):
        return "conv_relu"
    if len(chain) == len(BEFORE):
        return "bottleneck"
    return "conv_bn_relu" if chain[0].kind == ACT else "bn_relu_conv"


def _joined(steps: Sequence[Step], number: int) -> Iterator[int]:
    """The steps whose results lie side by side in that of this one."""
    if steps[number].kind == JOIN:
        for part in steps[number].reads:
            yield from _joined(steps, part)
    else:
        yield number
