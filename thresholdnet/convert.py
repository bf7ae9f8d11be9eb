"""Put fused blocks into models that were not made here, in place, with the weights and the state dict they have.

A block keeps its own modules under their own names; only the way from its input to its output changes. Blocks are found
by structure or by what they do (`recognise.py`), then held against the original on random pixels before they take its
place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import activations
from .backends import CHOICES
from .chain import Chain, run
from .checks import one_of
from .dataflow import Function
from .layers import RATES, Unlike, channels_read, forms_inside
from .linked import NOTHING, Checked, LinkedBlock, sharded
from .models import fuse_blocks
from .pixels import CONVOLUTIONS
from .recognise import Found, by_rules, few_pixels, recognise

Self = TypeVar("Self", bound="ConvertedBlock")

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Largest difference that the check lets pass, of the largest value; 0.1 in half formats, whose errors add up over a
block's layers. A wrong structure differs by about 1, a BatchNorm folded wrongly (`export.py`) by 0.01 and more."""


class ConvertedBlock(LinkedBlock):
    """A foreign block, run by the engine: the same modules under the same names, the same state dict and results.

    Where a module inside has hooks, the original computes, so that they are called. Made by `of`, it is an instance of
    the original's class as well, for whoever asks.
    """

    def __init__(self, original: nn.Module, found: Found):
        nn.Module.__init__(self)  # not the foreign class's, which comes next
        self._modules = original._modules  # one dict for both: what is put into it later is in either
        self._original = [original]  # in a list: no second registration of its modules
        self.plan, self.activation = found.plan, found.activation
        self.drop_rate, self.drop_channels = found.drop_rate, found.drop_channels
        self._found = found
        for name, value in vars(original).items():
            if "_hook" in name:  # of every kind, and today's handles go on removing them
                setattr(self, name, value)
        self.training = original.training
        self.fuse(True)

    @staticmethod
    def of(original: nn.Module, found: Found) -> ConvertedBlock:
        """The block in the place of the original."""
        container = isinstance(original, nn.ModuleDict | nn.ModuleList | nn.Sequential)
        block = _empty(ConvertedContainer if container else ConvertedBlock, type(original))
        ConvertedBlock.__init__(block, original, found)
        return block

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Classes that `of` has made are made again where a copy or a pickle is read."""
        kind = ConvertedContainer if isinstance(self, ConvertedContainer) else ConvertedBlock
        return _empty, (kind, type(self._original[0])), self.__getstate__()

    def train(self: Self, mode: bool = True) -> Self:
        """As nn.Module's; the original, which somebody may hold in a list of their own, goes along."""
        self._original[0].training = mode
        return super().train(mode)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # what the foreign class has beside its modules
            if "_original" not in self.__dict__ or name.startswith("__"):
                raise
            return getattr(self.original(), name)

    def original(self) -> nn.Module:
        """The block as it was, with today's modules and mode."""
        block = self._original[0]
        if block._modules is not self._modules:  # this one is a replica of nn.DataParallel's
            block = copy.copy(block)
            block._modules = self._modules
        block.training = self.training
        return block

    @property
    def takes_tail(self) -> bool:
        """See `LinkedBlock`; a block that ends in a convolution of its own takes no other."""
        ends = self._found.tail or self._found.behind
        return self.plan.unit == "conv_bn_relu" and not ends  # torch 2.11 can't compile super().takes_tail

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        reads = [m for m in self._modules_at(self._found.before) if isinstance(m, (*CONVOLUTIONS, _BatchNorm))]
        return channels_read(reads[0]) if reads else self.plan.in_channels

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        ends = [self._found.tail] if self._found.tail else []
        convolutions = [m for m in self._modules_at([*ends, *self._found.behind]) if isinstance(m, CONVOLUTIONS)]
        return convolutions[-1].out_channels if convolutions else self.plan.out_channels

    def forward(self, x: Tensor, *others: Any, tail: Tensor | None = None, **named: Any) -> Tensor:
        """See `LinkedBlock`; with other arguments than the pixels the original runs."""
        if others or named:
            self._ran = "reference"
            return self._plain_forward(x, *others, **named)
        return super().forward(x, tail)

    def _fused_forward(self, x: Tensor, backend: str, tail: Tensor | None, known: Checked = NOTHING) -> Tensor:
        found, y = self._found, x
        if found.before:
            y = run(self._modules_at(found.before), y)
        if found.tail:
            conv = self.get_submodule(found.tail)
            assert isinstance(conv, CONVOLUTIONS)  # it was when it was recognised
            tail = conv.weight
        y = super()._fused_forward(y, backend, tail, known)
        if found.behind:
            y = run(self._modules_at(found.behind), y)
        if found.residual:
            y = x + (y if found.residual == 1 else y * found.residual)
        return y

    def _modules_at(self, paths: Sequence[str | Function]) -> list[nn.Module]:
        """The modules that run in front of the linked layers, or behind them; some for functions."""
        return [_of_function(path) if isinstance(path, Function) else self.get_submodule(path) for path in paths]

    def _units(self) -> Sequence[Sequence[nn.Module]]:
        return [[self.get_submodule(path) for path in unit] for unit in self._found.units]

    def _fits(self) -> bool:
        block = self.original()
        if self._found.forms:
            whole = [m for m in block.modules() if not isinstance(m, (*CONVOLUTIONS, _BatchNorm))]
            modes = {m.training for m in whole} if self.drop_rate else {self.training}
            return forms_inside(block) == self._found.forms and modes == {self.training}
        try:
            found = by_rules(block)
        except Unlike:
            return False
        if found is None or replace(found, drop_rate=0.0) != replace(self._found, drop_rate=0.0):
            return False
        self.drop_rate = found.drop_rate
        modes = {layer.training for layer in block.modules() if hasattr(layer, "drop_rate")}
        return not self.drop_rate or modes == {self.training}  # a layer drops in its own mode

    def _plain_forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        block = self.original()
        y: Tensor = type(block).forward(block, x, *others, **named)  # its hooks were called around this one
        return y


@lru_cache(maxsize=16)
def _of_function(function: Function) -> nn.Module:
    """A module that computes the same, and leaves what it reads as it is."""
    made: Any = activations.module(function.activation)
    made.inplace = False
    return made


class ConvertedContainer(ConvertedBlock):
    """A block whose class is one of torch's containers, as DenseNet's nn.ModuleDict: parts of it are parts of that."""

    def __getitem__(self, key: Any) -> Any:
        return self.original()[key]  # type: ignore[index]  # a container; a slice is of its class


@lru_cache(maxsize=1024)
def _class_of(kind: Any, original: Any) -> Any:
    """A class that is both, the former first."""
    try:
        return type(f"Converted{original.__name__}", (kind, original), {"__module__": __name__})
    except TypeError:  # its metaclass does not allow it
        return kind


def _empty(kind: Any, original: Any) -> ConvertedBlock:
    """An instance before anything is in it, without the foreign class's own ways to make one."""
    block: ConvertedBlock = object.__new__(_class_of(kind, original))
    return block


def convert(
    model: nn.Module,
    backend: str = "auto",
    recompute: str | None = None,
    report: Callable[[str], Any] | None = print,
) -> nn.Module:
    """Fuse what can be fused in a model, in place: same weights, same state dict, same outputs and gradients.

    DenseNet blocks of torchvision and timm (any growth rate, depth, eps, drop_rate; memory_efficient is not needed any
    more), HarDNet's blocks and VoVNet's become `ConvertedBlock`s, and so do blocks of the same layers in any other
    layout, which are run once to see what they do; blocks of our own plain models are switched on. Plain
    nn.Sequential containers around them become chains, whose transitions (BatchNorm - activation - convolution - pool)
    keep less for backward. Volumes are taken as images are. Everything else stays as it is; `to_reference` undoes it
    all.

    Args:
        model: any module.
        backend, recompute: see `ThresholdBlock`.
        report: called with one line per block replaced or left, with the reason; None for silence.

    Returns:
        The model itself; the new block, where the model is a block.

    Raises:
        TypeError: the model is no nn.Module, or TorchScript.
        ValueError, RuntimeError: `backend` or `recompute` is unknown, or the backend cannot run here.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model must not be TorchScript to be converted, got {type(model).__name__}")
    one_of("backend", backend, CHOICES)
    say = report or (lambda line: None)
    own = [module for module in model.modules() if isinstance(module, LinkedBlock) and not module.fused]
    lines: dict[str, str] = {}
    left: list[str] = []
    whole: list[str] = []  # blocks of several layers
    made: dict[int, ConvertedBlock] = {}  # one may stand in several places
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, LinkedBlock) or _inside_a_block(model, name):
            continue
        try:
            block = made.get(id(module)) or _replacement(module, backend, recompute)
        except Unlike as reason:
            if not any(_is_inside(name, other) for other in left):
                lines[name] = f"left {name or 'the model'}: {reason}"
            left.append(name)
            continue
        if block is not None:
            made[id(module)] = block
            model = _put(model, name, block)
            size = f"{block.plan.num_layers} layers, {block.links.total} links"
            lines[name] = f"fused {name or 'the model'}: {block._found.kind}, {size}"
            whole += [name] * (block.plan.num_layers > 1)
    for name, line in lines.items():
        if not any(_is_inside(block, name) for block in whole):  # whose fusion says enough of what is around it
            say(line)
    running = fuse_blocks(model, True, backend, recompute)
    if switched := sum(block.fused for block in own):
        say(f"fused {switched} blocks of thresholdnet's own")
    for name, module in model.named_modules():
        if type(module) is nn.Sequential and any(isinstance(child, ConvertedBlock) for child in module):
            _turn(module, Chain)
            say(f"fused {name or 'the model'}: transitions between its blocks")
    if not running:
        say("nothing to fuse: no block of linked layers (DenseNet's, HarDNet's, VoVNet's) was found")
    return model


def to_reference(model: nn.Module) -> nn.Module:
    """Undo `convert`, and switch the engine off in our own blocks: plain torch modules everywhere, for export.

    Returns the model itself; the original block, where the model is a converted one.

    Raises:
        TypeError: the model is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, ConvertedBlock):
            model = _put(model, name, module.original())
    fuse_blocks(model, False)
    for module in model.modules():
        if type(module) is Chain:
            module.__dict__.pop("fused", None)
            _turn(module, nn.Sequential)
    return model


def _turn(module: nn.Module, kind: type[nn.Sequential]) -> None:
    """Let a container run in another way; itself, its hooks and whoever holds it stay."""
    module.__class__ = kind


def _is_inside(name: str, other: str) -> bool:
    """Whether one module's name leads through another module."""
    return name != other and (not other or name.startswith(f"{other}."))


def _inside_a_block(model: nn.Module, name: str) -> bool:
    """Whether the name leads through a block that runs as a whole."""
    for end in [i for i, letter in enumerate(name) if letter == "."]:
        if isinstance(model.get_submodule(name[:end]), LinkedBlock):
            return True
    return isinstance(model, LinkedBlock) and bool(name)


def _put(model: nn.Module, name: str, block: nn.Module) -> nn.Module:
    """A module in the place of another, in lists that somebody keeps beside the registered modules too."""
    if not name:
        return block
    old = model.get_submodule(name)
    model.set_submodule(name, block)
    for module in model.modules():
        for held in [value for name, value in vars(module).items() if type(value) is list and name != "_original"]:
            if any(each is old for each in held):
                held[:] = [block if each is old else each for each in held]
    return model


def _replacement(module: nn.Module, backend: str, recompute: str | None) -> ConvertedBlock | None:
    made: ConvertedBlock | None = recognise(module, lambda found: _made(module, found, backend, recompute))
    return made


def _made(module: nn.Module, found: Found, backend: str, recompute: str | None) -> ConvertedBlock:
    """The block in place of a module that was recognised, once it has been checked."""
    if own := [name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]:
        raise Unlike(f"it has a tensor {own[0]!r} of its own")
    if any(sharded(parameter) for parameter in module.parameters()):
        raise Unlike("its weights are sharded: convert the model before fully_shard")
    block = ConvertedBlock.of(module, found).fuse(True, backend, recompute)
    _check(module, block)
    return block


@torch.no_grad()
def _check(original: nn.Module, block: ConvertedBlock) -> None:
    """Raise `Unlike` unless both compute the same: with these weights in eval mode, with any, and in training.

    Today's weights may hide what a block does: a branch that starts as zero, a scale of one.
    """
    weight = next(original.parameters())
    if weight.device.type == "meta":
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(few_pixels(block.in_channels, block.plan.spatial_dims), generator=generator).to(weight)
    try:  # on a copy: some write where they run
        own, twin = copy.deepcopy(original), _twin(original, generator)
    except (RuntimeError, TypeError):  # what makes a weight from others at every call may refuse to be copied
        own, twin = original, None
    with _evaluating(block), _evaluating(own):
        _compare(_ran(own, x), block._fused_forward(x, "native", None))
    if twin is None:
        return
    with torch.random.fork_rng(devices=[]):  # a layer may drop something
        for training in (False, True):
            _check_twin(twin.train(training), block, x.cpu().double())


def _check_twin(twin: nn.Module, block: ConvertedBlock, x: Tensor) -> None:
    """The same of a copy of a block, in its mode, in which it runs once; `block` says what was found."""
    if twin.training and any(isinstance(module, nn.SyncBatchNorm) for module in twin.modules()):
        return  # which may wait for other processes
    for module in twin.modules():  # all but what they drop
        for name in RATES:
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)
    fused, again = copy.deepcopy(twin), copy.deepcopy(twin) if twin.training else None
    expected = _ran(twin, x)
    if again is not None and not torch.equal(expected, _ran(again, x)):
        if not (block.drop_rate or block._found.before or block._found.behind):
            raise Unlike("in training its forward drops something that its structure does not show")
        return
    ours = ConvertedBlock(fused, block._found)
    ours.drop_rate = 0.0
    _compare(expected, ours._fused_forward(x, "native", None), "in training" if twin.training else "with other weights")
    buffers = dict(twin.named_buffers())
    for name, buffer in ours.named_buffers():
        _compare(buffers[name].double(), buffer.double(), f"in what it writes to {name}")


def _ran(module: nn.Module, x: Tensor) -> Any:
    """What its forward makes of pixels."""
    try:
        return type(module).forward(module, x)
    except Exception as error:  # whatever it is that it wants
        said = next(iter(str(error).splitlines()), "")
        raise Unlike(
            f"its forward cannot be checked on a few random pixels ({type(error).__name__}: {said})"
        ) from error


def _compare(expected: Any, got: Tensor, where: str = "") -> None:
    if not isinstance(expected, Tensor) or expected.shape != got.shape:
        shape = tuple(expected.shape) if isinstance(expected, Tensor) else type(expected).__name__
        raise Unlike(f"its forward must return a tensor of shape {tuple(got.shape)}, got {shape}")
    if error := difference(got, expected):
        said = f"its forward computes something else than its structure says{where and ', ' + where}"
        raise Unlike(f"{said}: it differs by {error:.1e}")


def difference(got: Tensor, expected: Tensor) -> float:
    """The largest difference of two results, of the largest value; 0 where rounding alone may have made it."""
    ours, theirs = got.cpu().double(), expected.cpu().double()  # not every GPU has fp64
    error = (ours - theirs).abs().max().item() / max(theirs.abs().max().item(), 1e-30)
    return 0.0 if error <= _TOLERANCE.get(expected.dtype, 0.1) else error  # NaN is no rounding


def _twin(original: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy with random weights and statistics, in fp64 on the CPU, without hooks."""
    twin = copy.deepcopy(original).cpu().double()
    for tensor in (*twin.parameters(), *twin.buffers()):
        if tensor.is_floating_point():
            scale = tensor[0].numel() ** -0.5 if tensor.dim() > 1 else 0.5
            tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64).sub_(0.5).mul_(2 * scale))
            if tensor.dim() < 2:  # variances are positive
                tensor.add_(1)
    for module in twin.modules():
        for name, hooks in vars(module).items():
            if name.endswith("_hooks"):
                hooks.clear()
    return twin


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """A module and all inside in eval mode, and then in the modes that they had."""
    modes = {m: m.training for m in module.modules()}
    try:
        for m in modes:
            m.training = False
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode
