"""Measure launch choices on this GPU and write the table that the launchers read: kernels/tuned/<gpu>.json.

    python bench/tune.py                        the models and images of `thresholdnet bench --preset gpu`
    python bench/tune.py --dry-run              list the shapes, measure nothing
    python bench/tune.py --budget 300           stop after so many seconds; the same command goes on there
    python bench/tune.py --filter 'weight.*3x3' shapes whose text holds this regular expression
    python bench/tune.py --interpreter          three tiny shapes in Triton's interpreter: a trial of the tool, no times

For every distinct shape of the models' linked convolutions (forward, data gradient, weight gradient, and the gradient
that a group of readers sends) a handful of tiles of the Triton kernels, and for half formats the forms of the CUDA
kernels with gather + library among them. A candidate whose result is not the rule's is out, and so is one less than 2 %
faster than the rule, or not so when the two are timed again in turn: noise must not pick. The file is written whole
after every shape. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fused_calls import fused_calls

MODELS = ("thresholdnet_v1", "thresholdnet_v2", "hardnet68", "densenet121")
SIZES = ((128, 224), (100, 32))  # batch, side
MARGIN = 0.98  # of the rule's time that another choice must stay below
REPEATS = 20
CODE = ("torch", "triton", "commit", "changes", "libraries")  # that all rows of a file are of


@dataclass(frozen=True)
class Work:
    """A shape with what its first convolution reads: widths of its sources, "rows" or "arena", mask and sums."""

    shape: Any
    widths: tuple[int, ...]
    layout: str
    masked: bool = False

    def __str__(self) -> str:
        s = self.shape
        affine = " affine" if s.affine else ""
        size = f"{s.kernel_size}x{s.kernel_size} {s.in_channels}->{s.out_channels}"
        return f"{s.kind} {size} {s.batch}x{s.height}x{s.width} {s.dtype}{affine}"


def works_of(model: str, batch: int, side: int, dtype: str) -> Iterator[Work]:
    """What a training step of a fused model convolves, recorded from its operators on the meta device."""
    from thresholdnet import create_model, engine
    from thresholdnet.plan import BlockPlan

    network = create_model(model, num_classes=10, fused=True, backend="native", device="meta")
    for (images, _, height, width), parameters, text in fused_calls(network, (batch, 3, side, side)):
        plan = BlockPlan.from_text(text)
        tail = parameters[-1][0] if len(parameters) > engine.parameters_a_layer(plan) * plan.num_layers else 0
        for kind, size, affine, read, wrote, masked in _convolutions(plan, tail):
            shape = (kind, dtype, size, affine, sum(read), wrote, images, height, width)
            dense = plan.pre_activation or all(w % 32 == 0 for w in (*read, wrote))
            rows = dense and kind != "readers"
            yield Work(_shape(*shape), tuple(read), "rows" if rows else "arena", masked)


def _convolutions(plan: Any, tail: int) -> Iterator[tuple[str, int, bool, list[int], int, bool]]:
    """(kind, kernel size, affine, widths read, width written, masked) of a block's convolutions."""
    widths = plan.node_widths
    linked = [[widths[k] for k in sources] for sources in plan.links]
    if plan.unit == "bottleneck":
        for read, inner, width in zip(linked, plan.bottleneck_widths, plan.widths, strict=True):
            for kind in ("forward", "weight"):
                yield kind, 1, True, read, inner, False
                yield kind, 3, False, [inner], width, False
            yield "gradient", 3, False, [width], inner, True
        yield from _sent(plan, plan.bottleneck_widths, 1)
        return
    if plan.pre_activation:
        for read, width in zip(linked, plan.widths, strict=True):
            yield "forward", 3, True, read, width, False
            yield "weight", 3, len(read) > 1, read, width, False  # one source is normalised once, not for every tap
        yield from _sent(plan, plan.widths, 3)
        return
    for read, width in zip(linked, plan.widths, strict=True):
        yield "forward", 3, False, read, width, False
        yield "weight", 3, False, read, width, False
    for node, readers in enumerate(plan.readers):
        if readers:
            yield "gradient", 3, False, [widths[r] for r in readers], widths[node], node > 0
    if tail:
        read = list(plan.output_widths)
        yield "forward", 1, False, read, tail, False
        yield "weight", 1, False, read, tail, False
        for width in read:
            yield "gradient", 1, False, [tail], width, False


def _sent(plan: Any, sent: Sequence[int], kernel_size: int) -> Iterator[tuple[str, int, bool, list[int], int, bool]]:
    """What the engine's groups of readers send, in the form of `_convolutions`: to each layer of the group, then on."""
    from thresholdnet.backends.slotted import readers_at_once

    layers = plan.num_layers
    at_once = readers_at_once(plan) if len(set(sent)) == 1 else 1
    arriving, waiting = set(plan.outputs), list[int]()

    def send(targets: set[int]) -> Iterator[tuple[str, int, bool, list[int], int, bool]]:
        readers = [reader for reader in waiting if not targets.isdisjoint(plan.links[reader - 1])]
        reached = targets.intersection(node for reader in readers for node in plan.links[reader - 1])
        arriving.update(reached)
        if readers:
            read = [sent[reader - 1] for reader in readers]
            yield "readers", kernel_size, False, read, sum(plan.node_widths[node] for node in reached), False

    for layer in range(layers, 0, -1):
        yield from send({layer})
        if layer in arriving:  # else a dead end
            waiting.append(layer)
        if (layers - layer + 1) % at_once == 0 or layer == 1:
            yield from send(set(range(layer)))
            waiting.clear()


def _shape(*fields: Any) -> Any:
    from thresholdnet.kernels.tuned import Shape

    return Shape(*fields)


def distinct(works: Iterator[Work], pattern: str = "") -> list[Work]:
    """One work a shape, a masked one where there is one."""
    found: dict[Any, Work] = {}
    for work in works:
        if re.search(pattern, str(work)) and (work.shape not in found or work.masked > found[work.shape].masked):
            found[work.shape] = work
    return list(found.values())


def tiles(work: Work, capability: Any) -> list[Any]:
    """The rule's tile first, then others that the kernels can run; see `_others`."""
    from thresholdnet.kernels import configs, tuned

    s = work.shape
    pixels = s.batch * s.height * s.width
    if s.kind == "weight":
        rule: Any = configs.weight_gradient_config(
            capability, s.dtype, s.out_channels, s.in_channels * s.kernel_size**2, s.affine
        )
        others = [replace(rule, swapped=not rule.swapped), replace(rule, rows=rule.rows // 2, stages=rule.stages + 1)]
        others += [replace(rule, rows=rule.rows // 2), replace(rule, stages=2)]
        others += [replace(rule, chunk=chunk, warps=8 if chunk == 128 else 4) for chunk in (64, 128)]
        others += [replace(rule, programs=programs) for programs in (1, 2, 6)]
        others += [replace(rule, registers=128)]
        widest = -(-s.out_channels // 8) * 8
        others += [  # a wide tile reads the pixels, nine taps each, less often
            replace(rule, chunk=chunk, columns=columns, warps=8 if chunk * columns > 8192 else 4, stages=stages)
            for chunk in (64, 128) for columns in (64, 128, 256) for stages in (2, 3)
            if columns < 2 * widest and widest > 32
        ]  # fmt: skip
    elif s.kind == "readers":
        rule = configs.readers_config(capability, s.dtype, s.out_channels, s.kernel_size)
        others = [
            configs.ReadersConfig(rows, columns, 4 if rows * columns <= 4096 else 8, stages, registers)
            for rows, columns in ((64, 64), (128, 64), (64, 32), (128, 32), (32, 64))
            for stages, registers in ((2, 0), (3, 0), (2, 168), (2, 128))
        ]
    else:
        choose = (capability, s.dtype, s.out_channels, s.kernel_size, pixels)
        gradient = s.kind == "gradient"
        rule = configs.convolution_config(*choose, s.height, s.width, s.affine, gradient, s.in_channels)
        odd = configs.convolution_config(
            *choose, 1, 1, s.affine, gradient, s.in_channels
        )  # what the rule takes where grouping does not fit
        others = [odd, *(each for tile in dict.fromkeys((rule, odd)) for each in _smaller(tile))]
        others += [replace(rule, stages=rule.stages + 1), replace(rule, warps=12 - rule.warps)]
        if s.kernel_size == 3 and s.dtype in configs.HALF:  # copies of 8 bytes pass through L1, as 16 bytes' do not
            others += [replace(tile, vector=4) for tile in (rule, odd)]
        if pixels <= 8192:  # more have tiles for every multiprocessor
            others += [replace(rule, splits=splits) for splits in (1, 2, 4, 8, 16)]
    kept = [rule]
    for tile in others:
        try:
            tuned.check(s, tuned.Choice(tile))
        except ValueError:
            continue
        kept += [tile] if tile not in kept else []
    return kept


def _smaller(tile: Any) -> list[Any]:
    """Tiles that leave room for more programs on a multiprocessor: what memory and epilogues are waited for with."""
    half = replace(tile, rows=tile.rows // 2, warps=4)
    made = [half, replace(half, registers=128), replace(half, chunk=tile.chunk // 2, stages=tile.stages + 1)]
    made += [replace(half, stages=2), replace(half, rows=half.rows // 2) if half.rows >= 64 else half]
    made += [replace(tile, registers=128), replace(tile, registers=96 if tile.warps == 8 else 168)]
    made += [replace(tile, chunk=tile.chunk // 2), replace(tile, stages=2)]
    if tile.columns >= 64 and tile.columns2 == 0 and tile.group == (1, 1):
        narrow = replace(tile, columns=tile.columns // 2, warps=4)
        made += [narrow, replace(narrow, rows=64), replace(narrow, registers=128)]
    return made


def forms(work: Work) -> list[str]:
    """The CUDA kernels' forms, the rule's first; none where they cannot run or have no choice."""
    from thresholdnet.kernels import configs

    from thresholdnet.backends import csrc, cuda_launch

    s = work.shape
    if (
        s.kind in ("weight", "readers")
        or (s.affine and s.kernel_size == 3)
        or s.dtype not in configs.HALF
        or csrc.cuda_reason() is not None
    ):
        return []
    rule = cuda_launch.convolution_form(s.kernel_size, s.out_channels, s.height, s.width)
    thin = s.kernel_size == 3 and s.out_channels <= 32
    return list(dict.fromkeys([rule, "gemm", *(("wide", "upright") if thin else ()), "library"]))


class Bench:
    """The operands of one work, and calls on them."""

    def __init__(self, work: Work, device: Any):
        import torch
        from thresholdnet.kernels import slots

        s, self.work = work.shape, work
        torch.manual_seed(0)
        self.dtype = getattr(torch, s.dtype)
        made = (s.height, s.width)
        common: dict[str, Any] = {"dtype": self.dtype, "device": device, "layout": work.layout}
        self.sources = slots.allocate(s.batch, work.widths, *made, **common)
        self.out, self.z = slots.allocate(s.batch, (s.out_channels, s.out_channels), *made, **common)
        for slot in (*self.sources, self.out, self.z):
            slots.write(slot, torch.randn(slot.shape, device=device))
        shape = (s.out_channels, s.in_channels, s.kernel_size, s.kernel_size)
        self.weight = (torch.randn(shape, device=device) / (s.in_channels * s.kernel_size**2) ** 0.5).to(self.dtype)
        self.affine = tuple(torch.rand(2, s.in_channels, device=device)) if s.affine else None
        self.vectors = torch.rand(4, s.out_channels, device=device)
        self.mask = (self.z, *self.vectors) if work.masked else None
        self.parts = [part.transpose(0, 1) for part in self.weight.split(work.widths, dim=1)]

    def call(self, launch: Any, **options: Any) -> Callable[[], Any]:
        """A call of one launcher's function; it returns what was computed."""
        kind = self.work.shape.kind
        if kind == "readers":
            scale, shift, mean, rstd = self.vectors
            each = [scale] * len(self.parts), [shift] * len(self.parts)
            sent = self.sources, self.parts, [self.out], [self.z]
            return lambda: launch.gradient_of_readers(*sent, *each, mean, rstd, add=True, **options)
        if kind == "weight":
            size = self.work.shape.kernel_size
            return lambda: launch.weight_gradient(self.sources, self.out, size, affine=self.affine, **options)
        if kind == "gradient":
            return lambda: launch.gradient(self.sources, self.parts, self.out, mask=self.mask, **options)
        return lambda: launch.conv(self.sources, self.weight, self.out, affine=self.affine, statistics=True, **options)

    def result(self, call: Callable[[], Any]) -> Any:
        """The tensor that a call makes, in float32."""
        if self.work.shape.kind == "weight":
            return call().float().clone()
        self.out.zero_()  # readers add to it
        call()
        return self.out.float().clone()


def measure(work: Work, device: Any, tell: Callable[[str], None]) -> dict[str, Any]:
    """One row of the table: times of every candidate that is right, and the choices."""
    import torch
    from thresholdnet.kernels import launch, tuned
    from thresholdnet.kernels.device import capability_of

    from thresholdnet import graphs
    from thresholdnet.backends import cuda_launch
    from thresholdnet.bench.clock import clock_for

    bench, clock = Bench(work, device), clock_for(device)
    repeats = REPEATS if device.type == "cuda" else 1

    def captured(call: Callable[[], Any]) -> Callable[[], Any]:
        """As a graph: the launchers' work on the host would hide what the GPU does."""
        return graphs.capture(call, warmup=1)[0] if device.type == "cuda" else call

    def choose(times: dict[Any, float | None], call_of: Callable[[Any], Callable[[], Any]]) -> Any:
        found, rule = pick(times), next(iter(times), None)
        if found is None or found == rule or times[rule] is None:
            return found
        before, after = (captured(call_of(candidate)) for candidate in (rule, found))
        return found if stays_faster(before, after, clock, repeats) else rule

    def formed(form: str) -> Callable[[], Any]:
        call = bench.call(cuda_launch)

        def run() -> Any:
            with forced(cuda_launch, form):
                return call()

        return run

    def timed(label: str, call: Callable[[], Any], truth: Any) -> tuple[float | None, Any]:
        try:
            found = bench.result(call)
            bound = 1e-4 if bench.dtype == torch.float32 else 2e-2
            if truth is not None and float((found - truth).norm() / truth.norm().clamp(min=1e-30)) > bound:
                raise ValueError("its result is not the rule's")
            step = captured(call)
            return statistics.median(clock(step) for _ in range(repeats)), found
        except Exception as error:  # a tile that needs too much of the GPU is no candidate, and no reason to stop
            tell(f"  {label}: out, {type(error).__name__}: {next(iter(str(error).splitlines()), '')[:120]}")
            return None, None

    by_tile: dict[Any, float | None] = {}
    truth = None
    for candidate in tiles(work, capability_of(device)):
        label = "tile " + json.dumps(asdict(candidate), separators=(",", ":"))
        by_tile[candidate], found = timed(label, bench.call(launch, config=candidate), truth)
        truth = found if truth is None else truth
    by_form: dict[Any, float | None] = {}
    for form in forms(work):
        by_form[form], _ = timed(f"form {form}", formed(form), truth)
    tile = choose(by_tile, lambda candidate: bench.call(launch, config=candidate))
    row = tuned.as_row(work.shape, tuned.Choice(tile, choose(by_form, formed)))
    times = {"tile": [{**asdict(tile), "ms": ms} for tile, ms in by_tile.items()]}
    return row | {"times": times | {"form": [{"form": form, "ms": ms} for form, ms in by_form.items()]}}


def pick(times: dict[Any, float | None]) -> Any:
    """The fastest candidate, or the first one, the rule's, where no other is clearly faster; None where all are out."""
    ran = {candidate: ms for candidate, ms in times.items() if ms is not None}
    if not ran:
        return None
    best, rule = min(ran, key=lambda candidate: ran[candidate]), next(iter(times))
    return rule if rule in ran and ran[best] >= MARGIN * ran[rule] else best


def stays_faster(rule: Callable[[], Any], other: Callable[[], Any], clock: Any, repeats: int) -> bool:
    """Whether a candidate is below `MARGIN` of the rule's time in turn with it, too.

    The first of many candidates meets another clock of the GPU than the last, and the best of many is partly luck.
    """
    from thresholdnet.bench.arithmetic import order, paired_ratio

    steps = (other, rule)
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(repeats):
        for place in order(len(steps), index):
            times[place].append(clock(steps[place]))
    return paired_ratio(*times)["median"] < MARGIN


@contextmanager
def forced(module: Any, form: str) -> Iterator[None]:
    """`cuda_launch` takes this form within."""
    before = module._form
    module._form = lambda *_: form
    try:
        yield
    finally:
        module._form = before


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="a model of the zoo; may repeat")
    parser.add_argument("--size", action="append", metavar="BATCHxSIDE", help="such as 128x224; may repeat")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--filter", default="", help="regular expression of shapes, as --dry-run prints them")
    parser.add_argument("--limit", type=int, help="at most so many shapes")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds; no shape is begun after them")
    parser.add_argument("--out", type=Path, help="the file; by default that which the launchers read")
    parser.add_argument("--again", action="store_true", help="measure shapes that the file holds, too")
    parser.add_argument(
        "--interpreter", action="store_true", help="three tiny shapes on the CPU in Triton's interpreter"
    )
    parser.add_argument("--dry-run", action="store_true", help="list what would be measured and stop")
    parser.add_argument("--json", action="store_true", help="print a summary as JSON on stdout")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        return tune(options, started)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def tune(options: argparse.Namespace, started: float) -> int:
    """Measure what is missing; returns the exit code."""
    if options.interpreter:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch
    from thresholdnet.kernels import tuned

    from thresholdnet.bench.results import machine
    from thresholdnet.checkpoint import write_atomic
    from thresholdnet.checks import output_file

    if not (options.interpreter or options.dry_run or torch.cuda.is_available()):
        raise RuntimeError("tune needs a CUDA device, got none: --interpreter tries the tool without, --dry-run lists")
    device = torch.device("cpu" if options.interpreter or not torch.cuda.is_available() else "cuda")
    gpu, capability = tuned.identity(device)
    path = options.out or tuned.FOLDER / tuned.file_name(gpu, capability)
    if options.interpreter and options.out is None:
        raise ValueError("out must be given with --interpreter, got none: its times say nothing about a GPU")
    works = distinct(_works(options), options.filter)[: options.limit]
    rows: list[dict[str, Any]] = []
    here = machine(device=device.type)
    head = {"gpu": gpu, "capability": capability, "interpreter": options.interpreter}
    head |= {key: here[key] for key in CODE}
    if path.exists():
        tuned.read(path, gpu, capability)  # a damaged file, or another GPU's, is not written over
        found = json.loads(path.read_text())
        for key in CODE:
            if found.get(key) != head[key]:
                raise ValueError(
                    f"{path} was measured with {key} {found.get(key)!r}, now it is {head[key]!r}: give another --out"
                )
        rows = found["rows"]
    done = {tuple(row[name] for name in tuned.Shape._fields) for row in rows}
    waiting = [work for work in works if options.again or tuple(work.shape) not in done]

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if options.dry_run:
        shapes = [str(work) for work in waiting]
        listed = {"file": str(path), "shapes": shapes, "of": len(works)}
        print(json.dumps(listed, indent=2) if options.json else "\n".join(shapes))
        tell(f"{len(waiting)} of {len(works)} shapes to measure, file: {path}")
        return 0
    output_file("out", path)
    measured, faster = 0, 0
    for index, work in enumerate(waiting, start=1):
        if time.monotonic() - started > options.budget:
            tell(f"the budget of {options.budget:g} s is spent: the same command goes on here")
            break
        row = measure(work, device, tell)
        rows = [old for old in rows if tuple(old[name] for name in tuned.Shape._fields) != tuple(work.shape)] + [row]
        write_atomic(path, (json.dumps({**head, "rows": rows}, indent=1) + "\n").encode())
        measured += 1
        gains = {kind: gain for kind, found in row["times"].items() if (gain := gain_of(found)) is not None}
        faster += any(gain > 1 / MARGIN for gain in gains.values())
        told = ", ".join(f"best {kind} x{gain:.2f} of the rule's speed" for kind, gain in gains.items())
        tell(f"{index}/{len(waiting)} {work}: {told or 'nothing ran'}")
    summary = {"file": str(path), "measured": measured, "left": len(waiting) - measured, "better_than_rule": faster}
    if options.json:
        print(json.dumps(summary, indent=2))
    tell(f"{measured} shapes measured, {faster} with something better than the rule, {summary['left']} left; {path}")
    return 0


def gain_of(found: list[dict[str, Any]]) -> float | None:
    """Time of the first entry, the rule's, over that of the fastest; None where the rule's is missing."""
    times = [entry["ms"] for entry in found if entry["ms"] is not None]
    return found[0]["ms"] / min(times) if times and found[0]["ms"] is not None else None


def _works(options: argparse.Namespace) -> Iterator[Work]:
    if options.interpreter:
        yield Work(_shape("forward", "float32", 3, False, 12, 8, 1, 4, 4), (8, 4), "arena")
        yield Work(_shape("weight", "float32", 1, True, 12, 8, 1, 4, 4), (8, 4), "rows")
        yield Work(_shape("readers", "float32", 1, False, 16, 12, 1, 4, 4), (8, 8), "arena")
        return
    sizes = [_size(text) for text in options.size] if options.size else SIZES
    for batch, side in sizes:
        for model in options.model or MODELS:
            yield from works_of(model, batch, side, options.dtype)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise ValueError(f"size must be BATCHxSIDE, such as 128x224, got {text!r}")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    sys.exit(main())
