"""The steps of a recording as one Python function without loops or choices: what is left of a call costs the least so.

A step's memories are items of a list, views of them are made for their first reader and let go behind their last, and
what never changes is a name of the function's module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .recording import Call, Operation, View, tensors_in, views_in

aten = torch.ops.aten
BOUND: dict[Any, Any] = {
    aten.add.Tensor: torch.add, aten.add_.Tensor: Tensor.add_, aten.addcmul.default: torch.addcmul,
    aten.addcmul_.default: Tensor.addcmul_, aten.addmm_.default: Tensor.addmm_, aten.cat.default: torch.cat,
    aten.clamp_.default: Tensor.clamp_, aten.clone.default: torch.clone, aten.convolution.default: torch.convolution,
    aten.copy_.default: Tensor.copy_, aten.index_select.default: torch.index_select, aten.mul.Tensor: torch.mul,
    aten.relu_.default: Tensor.relu_, aten.rsqrt.default: torch.rsqrt, aten.stack.default: torch.stack,
}  # fmt: skip
"""Operators as Python's bindings of the same arguments, which take half the time of a call through torch.ops."""


def straight(steps: Sequence[tuple[Any, tuple[int, ...]]], addressed: Collection[int]) -> Callable[[Call], None]:
    """What runs steps in order, each with the memories that nothing behind it needs.

    addressed: memories of which launches take the address.
    """
    writer = _Writer(Counter(view for step, _ in steps for view in _made_views(step)), addressed)
    for step, ended in steps:
        writer.write(step)
        writer.end(ended)
    return writer.function()


def _made_views(step: Any) -> Iterator[View]:
    """The views that have to be made for a step."""
    if isinstance(step, Operation):
        yield from (view for view in views_in([*step.arguments, *step.options.values()]) if not view.whole)


class _Writer:
    def __init__(self, readers: Counter[View], addressed: Collection[int]):
        self.lines = ["def run(call):", "    m = call.memory"]
        self.names: dict[str, Any] = {"tensors": tensors_in}
        self._known: dict[int, str] = {}  # by id, of values that `names` keeps
        self._views: dict[View, str] = {}
        self._readers, self._addressed = readers, frozenset(addressed)
        self._done: list[str] = []  # what ends behind the step that is written

    def write(self, step: Any) -> None:
        """One step."""
        if isinstance(step, Operation):
            given = [self._written(value) for value in step.arguments]
            given += [f"{name}={self._written(value)}" for name, value in step.options.items()]
            made = f"{self._name(BOUND.get(step.function, step.function))}({', '.join(given)})"
            targets = ", ".join(f"m[{number}]" for number in step.makes)
            if not step.makes:
                self._line(made)
            elif step.single:
                self._line(f"{targets} = {made}")
            else:
                self._line(f"{targets}, = tensors({made})")
            for number in self._addressed.intersection(step.makes):
                self._line(f"call.put({number}, m[{number}])")
        else:
            self._line(f"{self._name(step.run)}(call)")

    def end(self, ended: Collection[int]) -> None:
        """Let go of memories, and of views that nothing reads any more."""
        names = [*self._done, *(f"m[{number}]" for number in ended)]
        self._done.clear()
        if names:
            self._line(" = ".join([*names, "None"]))

    def function(self) -> Callable[[Call], None]:
        """All that was written."""
        exec("\n".join(self.lines), self.names)  # of numbers and names that this class made
        run: Callable[[Call], None] = self.names.pop("run")  # which holds the names, and they nothing of it
        return run

    def _line(self, text: str) -> None:
        self.lines.append("    " + text)

    def _written(self, value: Any) -> str:
        if type(value) is View:
            return f"m[{value.memory}]" if value.whole else self._view(value)
        if type(value) in (list, tuple):
            inside = ", ".join(map(self._written, value))
            return f"[{inside}]" if type(value) is list else f"({inside},)" if value else "()"
        if value is None or type(value) in (bool, int):
            return repr(value)
        return self._name(value)

    def _view(self, view: View) -> str:
        if view not in self._views:
            name, tensor = f"v{len(self.lines)}_{len(self._views)}", f"m[{view.memory}]"
            start = f"{tensor}.storage_offset() + {view.offset}"
            self._line(f"{name} = {tensor}.as_strided({view.shape}, {view.strides}, {start})")
            self._views[view] = name
        self._readers[view] -= 1
        if not self._readers[view]:
            self._done.append(self._views[view])
        return self._views[view]

    def _name(self, value: Any) -> str:
        """The name of a value that never changes."""
        if id(value) not in self._known:
            self._known[id(value)] = f"k{len(self.names)}"
            self.names[self._known[id(value)]] = value
        return self._known[id(value)]
