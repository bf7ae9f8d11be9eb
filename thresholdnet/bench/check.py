"""Whether a provider's step is right, found before any time is taken.

The truth is plain torch in fp32 (fp64 for fp64 cases), TF32 off. Rounding errors grow through dozens of layers, and a
value that crosses an activation's kink moves whole gradients, so a provider is held against what plain torch itself
does in the case's dtype: at most `FACTOR` times the error of eager in channels_last, or the floor. This finds a wrong
layer, not a wrong digit: `thresholdnet selftest` and the tests hold single layers per element.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .providers import Runner

FACTOR = 2.0
FLOORS = {
    "fp64": {"output": 1e-9, "gradients": 1e-6, "operation": 1e-14},
    "fp32": {"output": 1e-3, "gradients": 2e-2, "operation": 5e-6},  # of gradients up to 4e-3 was seen: flipped masks
    "bf16": {"output": 2e-2, "gradients": 5e-2, "operation": 8e-3},
    "fp16": {"output": 5e-3, "gradients": 2e-2, "operation": 1e-3},
}
"""What rounding may do to whole steps, and to one "operation", whose results are rounded once or twice."""

BLIND = 0.7
"""No bound lies above: an answer that has nothing to do with the truth is off by 1.4."""

Result = dict[str, list[Tensor]]


def result(runner: Runner) -> Result:
    """What one step gives: its "output" and, in training, the "gradients" of all parameters."""
    made = {"output": [runner.step().clone()]}
    if runner.train:
        made["gradients"] = [grad.clone() for grad in runner.gradients()]
    return made


def errors(made: Result, truth: Result) -> dict[str, float]:
    """Root mean square of the difference over that of the truth, for each quantity.

    All gradients of parameters are one vector: a parameter whose own gradient is mere rounding is no reason to fail.
    """
    return {what: rms(tensors, truth[what]) for what, tensors in made.items()}


def rms(made: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Root mean square of the difference over that of the truth, all tensors as one vector."""
    difference = size = 0.0
    for a, b in zip(made, truth, strict=True):
        wide = b.double()
        difference += (a.double().view_as(wide) - wide).square().sum().item()
        size += wide.square().sum().item()
    return float((difference / max(size, 1e-300)) ** 0.5)


def bounds(own: dict[str, float], dtype: str) -> dict[str, float]:
    """What is allowed where eager's own errors are these."""
    return {what: min(BLIND, max(FACTOR * error, FLOORS[dtype][what])) for what, error in own.items()}


def complaint(found: dict[str, float], allowed: dict[str, float]) -> str | None:
    """What is wrong with these errors in one sentence, None where nothing is."""
    for what, bound in allowed.items():
        if not found[what] <= bound:  # a NaN is wrong as well
            return f"wrong: {what} off by {found[what]:.1e} of plain torch's root mean square, {bound:.1e} is allowed"
    return None
