"""What `tn.convert` gains in somebody's model: the model as it is beside its converted copies, on the same images."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..convert import convert
from ..linked import LinkedBlock
from ..memory import dtype_of
from ..packing import prepack
from ..pixels import channels_last
from ..replay import first_replay
from . import check, footprint, rounds
from .baselines import Unavailable
from .clock import clock_for
from .providers import Runner, winograd_refusal, with_winograd, without_winograd
from .rounds import Entry, Row, Settings, Tell

AS_IT_IS = "eager_channels_last"
"""The model in plain torch, and its images, in channels_last order."""

SIGNALS_AS_THEY_ARE = "eager"
"""The same of signals, for which torch has no such order."""


def load(name: str, arguments: Mapping[str, Any] | None = None, path: Path | None = None) -> nn.Module:
    """The model that "MODULE:FACTORY" makes of these arguments.

    Args:
        path: a folder in which modules are looked for first.

    Raises:
        TypeError, ValueError: no such name; what it makes is no nn.Module; or it does not take the arguments.
    """
    module, colon, factory = name.partition(":")
    if not (module and colon and factory):
        raise ValueError(f"model must be MODULE:FACTORY, such as torchvision.models:densenet121, got {name!r}")
    if path is not None:
        sys.path.insert(0, str(path))
    try:
        make = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model must be one that can be imported, got {name!r} ({error})") from error
    if not callable(make):
        raise TypeError(f"model must be a class or a function that makes one, got a {type(make).__name__} at {name!r}")
    model = make(**(arguments or {}))
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__} from {name}")
    return model


def compare(
    model: nn.Module, shape: Sequence[int], dtype: str, settings: Settings, tell: Tell | None = None
) -> dict[str, Any]:
    """What `convert` says, and training and inference steps of the model and of its converted copies, in rounds.

    A training step is forward and the gradients of all parameters of the output's mean.

    Args:
        model: takes images and returns tensors; it is not changed.
        shape: [N, C, H, W] of the images, [N, C, D, H, W] of volumes or [N, C, L] of signals.
        dtype: of weights and images: fp32, bf16, fp16 or fp64.
        tell: called with what happens now and the share that is done.

    Returns:
        {"report": lines, "blocks": how many run fused, "rows": as in `results.py`, of no providers where that is 0}.

    Raises:
        TypeError, ValueError: as `convert`; or the model does not take such images.
    """
    device, tell = torch.device(settings.device), tell or (lambda text, share: None)
    images = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    order = channels_last(images)
    images = images.to(device, dtype_of(dtype)).to(memory_format=order)
    plain = copy.deepcopy(model).to(device, images.dtype).to(memory_format=order)
    lines: list[str] = []
    converted = convert(copy.deepcopy(plain), report=lines.append)
    fused = [block for block in converted.modules() if isinstance(block, LinkedBlock) and block.fused]
    rows: list[Row] = []
    for number, train in enumerate((True, False) if fused else ()):
        mode = "train" if train else "infer"

        def say(text: str, share: float, number: int = number, mode: str = mode) -> None:
            tell(f"{mode}: {text}", (number + share) / 2)

        steps = dict(_steps(plain, converted, images, train, any(b.plan.unit == "bottleneck" for b in fused)))
        rows += _rows(steps, settings, say, {"mode": mode, "dtype": dtype, "shape": list(shape)})
    return {"report": lines, "blocks": len(fused), "rows": rows}


class _Step(Runner):
    """A step of a model that may return several tensors, from the mean of each."""

    def returned(self, out: Any) -> Any:
        """All of it."""
        return out

    def backward(self, out: Any) -> None:
        """From the mean of every tensor in the output that can be differentiated."""
        torch.autograd.backward([leaf.float().mean() for leaf in _leaves(out) if leaf.requires_grad])


def _leaves(out: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _steps(
    plain: nn.Module, converted: nn.Module, images: Tensor, train: bool, bottlenecks: bool
) -> Iterator[tuple[str, Callable[[], _Step]]]:
    """What makes each provider's step; every one has a model of its own."""

    def of(
        model: nn.Module,
        change: Callable[[nn.Module], Any] = lambda twin: None,
        within: Callable[[], AbstractContextManager[None]] = without_winograd,
    ) -> Callable[[], _Step]:
        def make() -> _Step:
            twin = copy.deepcopy(model).train(train)
            change(twin)
            return _Step(twin, images, train, within=within)

        return make

    yield AS_IT_IS if images.dim() > 3 else SIGNALS_AS_THEY_ARE, of(plain)
    yield "converted", of(converted)
    if winograd_refusal(images) is None:
        yield "converted_winograd", of(converted, within=with_winograd)
    if train and bottlenecks:
        yield "converted_recompute", of(converted, lambda twin: convert(twin, recompute="bottleneck", report=None))
    if not train and images.device.type == "cpu":
        yield "converted_prepacked", of(converted, prepack)


def _rows(steps: Mapping[str, Callable[[], _Step]], settings: Settings, tell: Tell, case: Row) -> list[Row]:
    entries = [Entry(name, False) for name in steps]
    truth: list[Tensor] = []
    for index, (entry, make) in enumerate(zip(entries, steps.values(), strict=True)):
        tell(f"checks {entry.provider}", 0.3 * index / len(entries))
        try:
            runner = make()
            found = _output(runner)
            truth = truth or found
            error, bound = check.rms(found, truth), check.FLOORS[case["dtype"]]["output"]
            entry.said["check"] = {"output": {"error": error, "bound": bound}}
            complaint = check.complaint({"output": error}, {"output": bound})
            if complaint is not None:
                raise Unavailable(complaint)
            for _ in range(first_replay(runner.images.device) or 0):  # every later step of a run is a replay
                runner.step()
            entry.said["saved_bytes"] = footprint.saved_bytes(runner)
            entry.said["peak_bytes"], entry.said["peak_by"] = footprint.peak_bytes(runner)
            entry.step = runner.step
        except Exception as error:
            if entry is entries[0]:
                raise ValueError(
                    f"model must take images of shape {tuple(case['shape'])}: {rounds.reason(error)}"
                ) from error
            entry.said["reason"] = rounds.reason(error)
    place = torch.device(settings.device)
    conditions = rounds.run(
        entries, settings, clock_for(place), lambda text, share: tell(text, 0.3 + 0.7 * share), True
    )
    common = {**case, "device": place.type, "threads": torch.get_num_threads(), **conditions}
    return [common | {"peak_bytes": None, "saved_bytes": None} | entry.row(entries) for entry in entries]


@torch.no_grad()
def _output(runner: _Step) -> list[Tensor]:
    """Of the model in eval mode, in which nothing is dropped."""
    runner.model.eval()
    with runner.within():
        made = _leaves(runner.call(runner.images))
    runner.model.train(runner.train)
    return made
