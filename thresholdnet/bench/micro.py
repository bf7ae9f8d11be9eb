"""One operation of a layer, measured like a step: checked first, then timed in rounds beside the others, caches cold.

The truth is plain torch in float64, on operands that the dtype under test holds. Each result is held on its own against
what plain torch in channels_last does in that dtype: at most `check.FACTOR` times its error, or the floor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import graphs
from ..memory import dtype_of
from . import check, rounds
from .baselines import Unavailable
from .clock import clock_for
from .forms import Form, Operands, operands, ours, plain
from .layers import Operation
from .peaks import Peak
from .rounds import Entry, Row, Settings, Tell

PROVIDERS: dict[str, str | None] = {
    "eager": None, "eager_channels_last": None, "fused_native": "native", "fused_triton": "triton",
}  # fmt: skip
"""Providers of whole steps that do single operations too, and the backends behind them."""


def measure_operation(
    op: Operation, providers: Sequence[str], settings: Settings, peak: Peak, tell: Tell | None = None
) -> list[Row]:
    """Check and time one operation.

    Args:
        providers: names of `PROVIDERS`.
        peak: what the machine can do in the operation's dtype.

    Returns:
        One row for each provider, see `results.py`; without times where it cannot run or is wrong.
    """
    tell = tell or (lambda text, share: None)
    device, dtype = torch.device(settings.device), dtype_of(op.dtype)
    entries = rounds.entries_of(providers, settings)
    tell("plain torch's results", 0.0)
    try:
        given = operands(op, dtype, device)
        truth = plain(op, given.to(torch.float64, False))()
        allowed = bounds(plain(op, given.to(dtype, True))(), truth, op.dtype)
    except Exception as error:  # such as memory that runs out: nobody can be checked
        for entry in entries:
            entry.said["reason"] = f"plain torch itself: {rounds.reason(error)}"
    else:
        for entry in entries:
            tell(f"checks {entry.label}", 0.1)
            try:
                with torch.no_grad():
                    admit(entry, _form(op, given.to(dtype, entry.provider != "eager"), entry.provider), truth, allowed)
            except Exception as error:  # whatever a compiler raises is the reason in that row, not the end of the run
                entry.said["reason"] = rounds.reason(error)
        del given, truth
    with torch.no_grad():
        conditions = rounds.run(entries, settings, clock_for(device, cold=True), tell)
    common = {
        **op.fields, "side": op.stage.side, "sources": list(op.widths), "read": op.read, "written": op.written,
        "device": device.type, "threads": torch.get_num_threads(), **conditions, "flops": op.flops,
        "bytes": op.bytes, "bound_ms": peak.bound_ms(op.flops, op.bytes),
    }  # fmt: skip
    rows = [common | entry.row(entries) for entry in entries]
    for row in rows:
        ms = row["ms_median"]
        if ms is not None:
            row |= {"tflops": op.flops / ms / 1e9, "gbs": op.bytes / ms / 1e6, "roofline_share": row["bound_ms"] / ms}
    return rows


def _form(op: Operation, o: Operands, provider: str) -> Form:
    backend = PROVIDERS[provider]
    return plain(op, o) if backend is None else ours(backend, op, o)


def bounds(own: Sequence[Tensor], truth: Sequence[Tensor], dtype: str) -> list[float]:
    """What error each result may have where plain torch's `own` in a dtype are these."""
    return [max(check.FACTOR * error, check.FLOORS[dtype]["operation"]) for error in check_each(own, truth)]


def check_each(made: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    """The relative error of every result."""
    return [check.rms([a], [b]) for a, b in zip(made, truth, strict=True)]


def admit(entry: Entry, form: Form, truth: Sequence[Tensor], allowed: Sequence[float]) -> None:
    """Run and check an entry's form; it may be timed afterwards. Raises what stands against it."""
    found = check_each(form(), truth)
    entry.said["check"] = [{"error": error, "bound": bound} for error, bound in zip(found, allowed, strict=True)]
    _hold(found, allowed, f"of {len(found)}", "plain torch's root mean square")
    entry.step = _captured(form, allowed) if entry.graph else form


def _captured(form: Form, allowed: Sequence[float]) -> Callable[[], None]:
    """What replays a form as a graph, which was seen to do what the form does where both find zeros in the results.

    Raises:
        Unavailable: it does something else, such as nothing.
    """
    replay, made = graphs.capture(form)

    def zeros() -> None:  # forms may add to what is there
        for tensor in made:
            tensor.zero_()

    zeros()
    wanted = [tensor.clone() for tensor in form()]
    zeros()
    replay()
    _hold(check_each(made, wanted), allowed, "of the graph", "what was captured")
    return replay


def _hold(errors: Sequence[float], allowed: Sequence[float], where: str, truth: str) -> None:
    """Raise Unavailable with the first result that is off by more than is allowed; a NaN is, too."""
    for index, (error, bound) in enumerate(zip(errors, allowed, strict=True)):
        if not error <= bound:
            raise Unavailable(
                f"wrong: result {index + 1} {where} off by {error:.1e} of {truth}, {bound:.1e} is allowed"
            )
