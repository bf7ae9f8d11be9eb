"""Weights that their owner declared constant: for serving on a CPU, folded and laid out for their convolutions once.

In eval mode a fused block multiplies its BatchNorms into its weights, and oneDNN copies every weight into an order of
its own, both at each call: work that does not shrink with the batch.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils._python_dispatch import _disable_current_modes

from .pixels import CONVOLUTIONS
from .stamps import Stamp, stamp_of

Made = TypeVar("Made")
Model = TypeVar("Model", bound=nn.Module)


class Forms:
    """What was made of a weight that its owner declared constant."""

    def __init__(self, weight: Tensor, forget: Callable[[Any], None]):
        self.weight = weakref.ref(weight, forget)
        self._made: dict[Hashable, tuple[Stamp, Any]] = {}  # form -> what it was made of, as it was; the result

    def once(self, form: Hashable, sources: Sequence[Tensor], make: Callable[[], Made]) -> Made:
        """`make()`, which reads these tensors, or its last result if none of them has been written since."""
        result: Made | None = self.find(form, sources)
        if result is None:
            with _disable_current_modes():  # a recording must not take this for what every call does
                result = make()
            stamp = stamp_of(sources)
            if stamp is None:
                return result
            self._made[form] = stamp, result
        uses = getattr(_here, "uses", None)
        if uses is not None:
            uses.append(Use(self, form, sources, result))
        return result

    def find(self, form: Hashable, sources: Sequence[Tensor]) -> Any:
        """The last result of `once`, None if there is none or one of these tensors has been written since."""
        found = self._made.get(form)
        return found[1] if found is not None and found[0].holds(sources) else None

    def forget_of(self, tensors: set[int]) -> None:
        """Let go of what was made of any of the tensors with these ids."""
        for form, (stamp, _) in [*self._made.items()]:
            if stamp.has(tensors):
                self._made.pop(form, None)


class Use(NamedTuple):
    """A form that a call has read."""

    forms: Forms
    form: Hashable
    sources: Sequence[Tensor]
    result: Any


_declared: dict[int, Forms] = {}  # by the weight's id, which `Forms.weight` proves to be this weight's
_here = threading.local()  # `uses`: of the call that this thread notes


@contextmanager
def noting() -> Iterator[list[Use]]:
    """Note every form that this thread reads within."""
    uses: list[Use] = []
    _here.uses = uses
    try:
        yield uses
    finally:
        del _here.uses


def prepack(model: Model, packed: bool = True) -> Model:
    """Keep the weights of a model's fused blocks as inference on a CPU reads them, BatchNorms folded in.

    Made at the next call in eval mode without gradients, and made again after a weight or statistic was written in
    place, loaded, replaced or moved, or an optimizer has made a step. A write through `.data`, or through memory shared
    with numpy, is not noticed: call this again behind it. Copies and pickles of the model are not prepacked, and
    training is as before.

    Under autocast the weights are cast once as well. It takes about the bytes of the blocks' weights once more, with
    Winograd's form four times those of wide 3x3 layers.

    Args:
        model: with fused blocks, its weights on a CPU; changed in place.
        packed: False lets go of what was made.

    Returns:
        The model itself.

    Raises:
        TypeError: not a module.
        ValueError: no fused blocks, weights on another device, or made in torch.inference_mode.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    weights = [module.weight for module in model.modules() if isinstance(module, CONVOLUTIONS)]
    if not any(getattr(module, "fused", False) for module in model.modules()):
        raise ValueError(
            f"model must have fused blocks, got none in {type(model).__name__}: fused=True or tn.convert makes them"
        )
    if any(weight.is_inference() for weight in weights):
        raise ValueError("model must be made outside torch.inference_mode to be prepacked, got weights made inside")
    elsewhere = {str(weight.device) for weight in weights if weight.device.type != "cpu"}
    if elsewhere:
        raise ValueError(f"model must lie on a CPU to be prepacked, got weights on {', '.join(sorted(elsewhere))}")
    for weight in weights:
        _declared.pop(id(weight), None)
        if packed:
            _declare(weight)
    return model


def _declare(weight: Tensor) -> None:
    _watch_optimizers()
    key, pop = id(weight), _declared.pop  # by name the module's would be gone when the interpreter ends

    def forget(_: Any) -> None:
        pop(key, None)

    _declared[key] = Forms(weight, forget)


@lru_cache(maxsize=1)
def _watch_optimizers() -> None:
    """Fused optimizers write weights and do not say so to their version counters."""
    register_optimizer_step_post_hook(_forget_stepped)


def _forget_stepped(optimizer: Optimizer, *_: Any) -> None:
    """Let go of what was made of weights that an optimizer has written."""
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for forms in [*_declared.values()]:
        forms.forget_of(stepped)


def forms_of(weight: Tensor) -> Forms | None:
    """What was made of a weight whose owner asked for `prepack`; None for any other."""
    forms = _declared.get(id(weight))
    ours = forms is not None and forms.weight() is weight and weight.device.type == "cpu"  # it may have moved since
    return forms if ours else None


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in another dtype, as autocast wants it: a declared one is cast once, and is declared itself.

    Not where somebody may differentiate it, or compiles.
    """
    constant = weight.dtype != dtype and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    forms = forms_of(weight) if constant else None
    if forms is None:
        return weight.to(dtype)

    def make() -> Tensor:
        # a tensor of inference mode tells nobody that it was written
        with torch.inference_mode(False), torch.no_grad():
            made = weight.to(dtype)
        _declare(made)
        return made

    return forms.once(("cast", dtype), (weight,), make)


def declared(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """The positions of weights whose owner asked for `prepack`."""
    return tuple([at for at, tensor in enumerate(tensors) if forms_of(tensor) is not None]) if _declared else ()
