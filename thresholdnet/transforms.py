"""How a call of one of the package's operators runs: through torch.library, or as a torch.autograd.Function.

torch.library's operator is what compilers, exporters, modes and tensor subclasses see, and takes its time for each of a
block's tensors. Where nobody looks on, the operator's body is called, in a Function where somebody differentiates.

A Function it is under torch.func and forward mode as well, where torch.library's autograd fails: grad, vjp and jacrev
are right, vmap calls the operator once a sample, forward mode raises.

Lists of arguments are flattened on the way in and put together again inside, because a list handed to a Function loses
its gradients.

And what else surrounds a call, and wants plain torch instead.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.profiler import record_function
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from .replay import PLAIN

_BODIES: dict[Any, tuple[str, Callable[..., Any]]] = {}  # with the operators' names
_RULES: dict[Any, tuple[Callable[..., None], Callable[..., Any]]] = {}

FORWARD_MODE = (
    "a fused block has no forward-mode derivative (jvp, jacfwd, torch.autograd.forward_ad): "
    "use fused=False or tn.to_reference(model)"
)


def operator(name: str, body: Callable[..., Any]) -> Any:
    """The functional operator `thresholdnet::name` in torch.library."""
    qualified = f"thresholdnet::{name}"
    made = torch.library.custom_op(qualified, body, mutates_args=())
    _BODIES[made] = qualified, body
    return made


def differentiable(operator: Any, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Register an operator's backward, for autograd and for `call`; arguments as register_autograd takes them."""
    operator.register_autograd(backward, setup_context=setup)
    _RULES[operator] = setup, backward


def active() -> bool:
    """Whether a transform of torch.func or a level of forward-mode differentiation surrounds this call."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def counted() -> bool:
    """Whether torch's FlopCounterMode surrounds this call: it knows torch's operations, so plain torch should run."""
    counter = sys.modules.get("torch.utils.flop_counter")
    if counter is None or torch.compiler.is_compiling():
        return False
    return any(type(mode).__module__ == counter.__name__ for mode in _get_current_dispatch_mode_stack())


def call(operator: Any, *arguments: Any) -> Any:
    """operator(*arguments), differentiable whatever surrounds it.

    Raises:
        RuntimeError: a forward-mode derivative is asked for.
    """
    if active():
        return _Function.run(operator, operator, arguments)
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return operator(*arguments)
    tensors = [leaf for leaf in _flat(arguments) if isinstance(leaf, Tensor)]
    return _direct(operator, arguments, tensors) if _lie_bare(tensors) else operator(*arguments)


def _lie_bare(tensors: Sequence[Tensor]) -> bool:
    """Whether torch's dispatcher would do nothing with these tensors but call an operator's body."""
    if not PLAIN.issuperset(map(type, tensors)) or tensors[0].device.type not in ("cpu", "cuda"):
        return False
    read = tensors if tensors[0].is_cuda or os.environ.get("TRITON_INTERPRET") == "1" else ()  # by kernels, as they lie
    return not any(map(Tensor.is_neg, read)) and not any(map(Tensor._is_zerotensor, read))  # the dispatcher copies them


def _direct(operator: Any, arguments: Sequence[Any], tensors: Sequence[Tensor]) -> Any:
    """The operator's body, under the operator's name in a profile; `tensors`: those among the arguments."""
    name, body = _BODIES[operator]
    with record_function(name) if torch._C._autograd._profiler_enabled() else nullcontext():
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return _Direct.run(operator, body, arguments)
        return body(*arguments)


class _Call:
    """One call's operator, and how its flat arguments and results are put together."""

    def __init__(self, operator: Any, body: Callable[..., Any], arguments: Sequence[Any]):
        self.operator, self.body, self.arguments = operator, body, _lengths(arguments)
        self.results: list[int | None] = []  # known once it has run
        self.form: type = tuple

    def results_of(self, flat: Sequence[Any]) -> Any:
        """What the operator itself returned."""
        parts = _nested(flat, self.results)
        return tuple(parts) if self.form is tuple else parts[0]


class _Function(torch.autograd.Function):
    """An operator, or its body, with flat arguments and results."""

    @classmethod
    def run(cls, operator: Any, body: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        made = _Call(operator, body, arguments)
        return made.results_of(cls.apply(made, *_flat(arguments)))

    @staticmethod
    def forward(made: _Call, *flat: Any) -> tuple[Tensor, ...]:
        found = made.body(*_nested(flat, made.arguments))
        made.form = type(found) if isinstance(found, tuple | list) else Tensor
        parts = found if made.form is tuple else [found]
        made.results = _lengths(parts)
        return tuple(_flat(parts))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        made, *flat = inputs
        ctx.made = made
        setup, _ = _RULES[made.operator]
        setup(ctx, tuple(_nested(flat, made.arguments)), made.results_of(output))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        made: _Call = ctx.made
        _, backward = _RULES[made.operator]
        needs = ctx.needs_input_grad
        try:
            ctx.needs_input_grad = _nested(needs[1:], made.arguments)
            results = made.results_of(grads)
            found = backward(ctx, *(results if made.form is tuple else [results]))
        finally:
            ctx.needs_input_grad = needs
        spread = (
            [None] * (n or 0) if g is None and n is not None else g for g, n in zip(found, made.arguments, strict=True)
        )
        return None, *_flat(spread)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], made: _Call, *flat: Any) -> tuple[Any, Any]:
        samples = []
        for i in range(info.batch_size):
            own = (t if dim is None else t.select(dim, i) for t, dim in zip(flat, in_dims[1:], strict=True))
            samples.append(_Function.apply(made, *own))
        return tuple(torch.stack(parts) for parts in zip(*samples, strict=True)), 0

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(FORWARD_MODE)


class _Direct(_Function):
    """The same in one function, for calls that no transform sees.

    Of a forward without `ctx` torch reads the signature at every call, which takes three times as long as the rest.
    """

    setup_context = torch.autograd.Function.setup_context  # as if there were none

    @staticmethod
    def forward(ctx: Any, made: _Call, *flat: Any) -> tuple[Tensor, ...]:  # type: ignore[override]  # its other form
        found = _Function.forward(made, *flat)
        _Function.setup_context(ctx, (made, *flat), found)
        return found


def _flat(values: Iterable[Any]) -> list[Any]:
    return [leaf for value in values for leaf in (value if isinstance(value, list) else [value])]


def _lengths(values: Iterable[Any]) -> list[int | None]:
    """Per value the length of a list, None for anything else."""
    return [len(value) if isinstance(value, list) else None for value in values]


def _nested(flat: Iterable[Any], lengths: Sequence[int | None]) -> list[Any]:
    leaves = iter(flat)
    return [next(leaves) if n is None else [next(leaves) for _ in range(n)] for n in lengths]
