"""The zoo's blocks and what they are fed with, found by a run on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..blocks import ThresholdBlock
from ..models import create_model
from ..plan import BlockPlan
from .cases import Case


@dataclass(frozen=True)
class Stage:
    """The block of one stage of a network.

    Attributes:
        name: "stages.3"; the block is its child "block".
        plan, activation: the block's.
        side: height and width of what it is fed with, in pixels.
    """

    name: str
    plan: BlockPlan
    activation: str
    side: int

    def flops(self, batch: int, train: bool) -> int:
        """2 per multiply-accumulate of the block's convolutions; in training of both gradients too, as many each."""
        plan = self.plan
        if plan.unit == "bottleneck":
            layers = zip(plan.link_widths, plan.bottleneck_widths, plan.widths, strict=True)
            macs = sum(inner * (read + 9 * written) for read, inner, written in layers)
        else:
            macs = sum(9 * read * written for read, written in zip(plan.link_widths, plan.widths, strict=True))
        return 2 * macs * batch * self.side**2 * (3 if train else 1)


def stages(case: Case) -> tuple[Stage, ...]:
    """The blocks of a case's network, first to last; the one block of a case that names it.

    Raises:
        ValueError: there is none; or images too small for the network.
    """
    found = _stages(case.network, case.image)
    if not found:
        raise ValueError(f"model must have linked blocks where they are measured alone, got {case.network!r}")
    if case.stage is None:
        return found
    named = tuple(stage for stage in found if stage.name == case.stage)
    if not named:
        known = ", ".join(stage.name for stage in found)
        raise ValueError(f"model {case.network} has the blocks {known}, got {case.stage!r}")
    return named


@lru_cache(maxsize=64)
def _stages(network: str, image: int) -> tuple[Stage, ...]:
    name, arguments = Case(network, image, 1, "fp32", "infer").architecture()
    twin = create_model(name, device="meta", **arguments).eval()
    found: list[Stage] = []

    def note(path: str) -> Callable[..., None]:
        def hook(block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(block, ThresholdBlock)
            found.append(Stage(path.removesuffix(".block"), block.plan, block.activation, inputs[0].shape[2]))

        return hook

    for path, module in twin.named_modules():
        if isinstance(module, ThresholdBlock):
            module.register_forward_hook(note(path))
    with torch.no_grad():
        twin(torch.empty(1, 3, image, image, device="meta"))
    return tuple(found)
