"""The package's operators under torch.func and forward-mode differentiation, where torch.library's autograd fails.

There an operator runs as a torch.autograd.Function with the same two functions, `setup` and `backward`. grad, vjp and
jacrev are right; vmap calls the operator once a sample; forward mode raises. Lists of arguments are flattened on the
way in and put together again inside, because a list handed to a Function loses its gradients.

And what else surrounds a call, and wants plain torch instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_RULES: dict[Any, tuple[Callable[..., None], Callable[..., Any]]] = {}

FORWARD_MODE = (
    "a fused block has no forward-mode derivative (jvp, jacfwd, torch.autograd.forward_ad): "
    "use fused=False or tn.to_reference(model)"
)


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
    return _Transformed.run(operator, arguments) if active() else operator(*arguments)


class _Call:
    """One call's operator, and how its flat arguments and results are put together."""

    def __init__(self, operator: Any, arguments: Sequence[Any]):
        self.operator, self.arguments = operator, _lengths(arguments)
        self.results: list[int | None] = []  # known once it has run
        self.form: type = tuple

    def results_of(self, flat: Sequence[Any]) -> Any:
        """What the operator itself returned."""
        parts = _nested(flat, self.results)
        return tuple(parts) if self.form is tuple else parts[0]


class _Transformed(torch.autograd.Function):
    """An operator with flat arguments and results."""

    @staticmethod
    def run(operator: Any, arguments: Sequence[Any]) -> Any:
        made = _Call(operator, arguments)
        return made.results_of(_Transformed.apply(made, *_flat(arguments)))

    @staticmethod
    def forward(made: _Call, *flat: Any) -> tuple[Tensor, ...]:
        found = made.operator(*_nested(flat, made.arguments))
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
            samples.append(_Transformed.apply(made, *own))
        return tuple(torch.stack(parts) for parts in zip(*samples, strict=True)), 0

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(FORWARD_MODE)


def _flat(values: Iterable[Any]) -> list[Any]:
    return [leaf for value in values for leaf in (value if isinstance(value, list) else [value])]


def _lengths(values: Iterable[Any]) -> list[int | None]:
    """Per value the length of a list, None for anything else."""
    return [len(value) if isinstance(value, list) else None for value in values]


def _nested(flat: Iterable[Any], lengths: Sequence[int | None]) -> list[Any]:
    leaves = iter(flat)
    return [next(leaves) if n is None else [next(leaves) for _ in range(n)] for n in lengths]
