"""Weights that their owner declared constant: for serving on a CPU, folded and laid out for their convolutions once.

In eval mode a fused block multiplies its BatchNorms into its weights, and oneDNN copies every weight into an order of
its own, both at each call: work that does not shrink with the batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

Made = TypeVar("Made")
Model = TypeVar("Model", bound=nn.Module)

Forms = dict[Hashable, tuple[list[Any], Any]]
"""Form -> what it was made of, and the result."""

# by the weight's id, which the reference proves to be this weight's
_declared: dict[int, tuple[weakref.ref[Tensor], Forms]] = {}


def prepack(model: Model, packed: bool = True) -> Model:
    """Keep the weights of a model's fused blocks as inference on a CPU reads them, BatchNorms folded in.

    Made at the next call in eval mode without gradients, and made again after a weight or statistic was written in
    place, loaded, replaced or moved, or an optimizer has made a step. A write through `.data`, or through memory shared
    with numpy, is not noticed: call this again behind it. Copies and pickles of the model are not prepacked, and
    training is as before.

    It takes about the bytes of the blocks' weights once more, with Winograd's form four times those of wide 3x3 layers.

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
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]
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

    _declared[key] = weakref.ref(weight, forget), {}


@lru_cache(maxsize=1)
def _watch_optimizers() -> None:
    """Fused optimizers write weights and do not say so to their version counters."""
    register_optimizer_step_post_hook(_forget_stepped)


def _forget_stepped(optimizer: Optimizer, *_: Any) -> None:
    """Let go of what was made of weights that an optimizer has written."""
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for declared in [*_declared.values()]:
        forms = declared[1]
        for form, (stamps, _) in [*forms.items()]:
            if any(id(reference()) in stepped for reference, _ in stamps):
                forms.pop(form, None)


def forms_of(weight: Tensor) -> Forms | None:
    """What was made of a weight whose owner asked for `prepack`, for `once`; None for any other."""
    found = _declared.get(id(weight))
    ours = found is not None and found[0]() is weight and weight.device.type == "cpu"  # it may have moved since
    return found[1] if found is not None and ours else None


def any_declared() -> bool:
    """Whether any weight of the process is declared constant."""
    return bool(_declared)


def once(forms: Forms, form: Hashable, sources: Sequence[Tensor], make: Callable[[], Made]) -> Made:
    """`make()`, which reads these tensors, or its last result if none of them has been written since."""
    if form in forms:
        stamps, result = forms[form]
        pairs = zip(stamps, sources, strict=True)
        if all(ref() is source and state == _state(source) for (ref, state), source in pairs):
            known: Made = result
            return known
    result = make()
    if any(source.is_inference() for source in sources):  # statistics that were loaded there: nothing counts writes
        return result
    forms[form] = [(weakref.ref(source), _state(source)) for source in sources], result
    return result


def _state(tensor: Tensor) -> tuple[int, int]:
    """Its memory, and how often it was written in place."""
    return tensor.data_ptr(), tensor._version
