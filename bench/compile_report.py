"""Compile every launch form for GPUs that need not be there, and read off the machine code what was promised.

    python bench/compile_report.py             every tile for sm_80, sm_90 and sm_100 (minutes), JSON and a comparison
    python bench/compile_report.py --all       in every epilogue and layout too
    python bench/compile_report.py --quick     a handful

Per form: registers, stack and shared memory from cuobjdump, and the instructions of the loop that holds the tensor-core
instructions from nvdisasm; both tools ship inside Triton. A form fails if it uses local memory inside that loop, more
than 192 bytes of stack, more shared memory than the GPU gives a program, no tensor-core instruction of its generation,
or no 16-byte asynchronous copies where a convolution promises them. Forms with PDL start while their predecessor ends
(kernels/dependent.py): one fails if it writes, or reads anything but tables, before it has waited. Nothing here says
anything about time.
Results: bench/results/compile/<triton version>.json; the newest other file there is what is compared with.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "compile"

ARCHITECTURES = {80: (8, 0), 90: (9, 0), 100: (10, 0)}
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have
TENSOR_CORE = {80: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA", "UTCMMA", "UTCQMMA")}
STACK_LIMIT = 192  # bytes; outside of main loops, where an H100 showed no cost of 176
TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
SEVERAL = {"weights", "gammas", "betas", "shares_g", "shares_gx", "partials", "tables", "results"}  # tuples of pointers
SLOTS = {"source", "out", "raw", "dz", "z", "g", "feature", "packed"}
TABLES = {
    "entries", "entry_row8", "taps_inside", "first_pixel", "channel", "k_of_weight", "column", "tables", "gradients",
    "dz_at8", "out_at8", "layouts", "feature_at8", "column_channel", "programs", "matrices", "k_weight",
    "k_offset", "steps", "noted",
}  # fmt: skip


@dataclass(frozen=True)
class Form:
    """One kernel with all its compile-time arguments, for one GPU generation."""

    kernel: str  # "module.function" below thresholdnet.kernels
    architecture: int
    dtype: str
    constants: tuple[tuple[str, Any], ...]
    warps: int
    stages: int
    tensor_core: bool = True
    async_copies: bool = False
    registers: int = 0  # a thread's at most, 0: the compiler's choice

    @property
    def name(self) -> str:
        """Key of the JSON table."""
        constants = ",".join(f"{k}={int(v) if isinstance(v, bool) else v}" for k, v in self.constants)
        most = f" r{self.registers}" if self.registers else ""
        return f"sm_{self.architecture} {self.dtype} {self.kernel}[{constants}] w{self.warps} s{self.stages}{most}"


@dataclass
class Report:
    """What the machine code of a form holds."""

    registers: int
    stack: int
    shared: int
    instructions: int
    loop: int  # instructions of the smallest loop with a tensor-core instruction, 0 where there is none
    loop_counts: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def convolution_forms(architecture: int, dtype: str, ways: int = 2, tf32: bool = True) -> Iterator[Form]:
    """Every tile of the launch table in the first `ways` of the ways to run it."""
    from thresholdnet.kernels.configs import shipped_convolutions

    for kernel_size, affine, gradient, config in shipped_convolutions(ARCHITECTURES[architecture], dtype):
        grouped = config.group != (1, 1)
        # (epilogue, add, slot rows), see kernels/conv.py: the heaviest first
        if gradient:  # no mask behind a 1x1 kernel
            masks = [(3, True, False), (3, True, True)] if kernel_size == 3 else []
            uses, most = [*masks, (0, True, False)], ways // 2
        else:
            uses, most = [(1, False, False), (2, False, False), (1, False, True)], (ways + 1) // 2
        if affine:  # training and inference
            uses, most = [(1, False, False), (2, False, False), (0, False, False), (1, False, True)], max(ways, 2)
        split = [(4, False, False)] if config.splits > 1 else []
        for epilogue, add, slot_rows in (*uses[:most], *split):
            constants = {
                "TILE_ROWS": config.rows, "TILE_COLUMNS": config.columns, "TILE_COLUMNS2": config.columns2,
                "TILE_K": config.chunk, "GROUP_H": config.group[0], "GROUP_W": config.group[1],
                "GROUP_CHANNELS": {32: 8, 64: 16, 96: 24, 128: 32}[config.all_columns] if grouped else 0,
                "TAPS": kernel_size == 3, "SLOT_ROWS": slot_rows, "AFFINE": affine,
                "ACTIVATION": 1 if affine or epilogue in (2, 3) else 0, "EPILOGUE": epilogue, "ADD": add,
                "TF32": tf32 and dtype == "float32", "VECTOR": 4 if dtype == "float32" else 8,
            }  # fmt: skip
            yield Form(
                "conv.convolution", architecture, dtype, tuple(constants.items()), config.warps, config.stages,
                tensor_core=tf32, async_copies=True, registers=config.registers,
            )  # fmt: skip


def other_forms(architecture: int, dtype: str, quick: bool = False) -> Iterator[Form]:
    """Weight gradients, gathered readers and the small kernels."""
    from thresholdnet.kernels.configs import readers_config, shipped_weight_gradients

    capability = ARCHITECTURES[architecture]
    tf32, vector = dtype == "float32", 4 if dtype == "float32" else 8
    for affine, taps, tile in shipped_weight_gradients(capability, dtype):
        constants: dict[str, Any] = {
            "TILE_ROWS": tile.rows, "TILE_K": tile.chunk, "TILE_COLUMNS": tile.columns, "TAPS": taps,
            "SLOT_ROWS": False, "AFFINE": affine, "ACTIVATION": int(affine), "SWAPPED": tile.swapped,
            "TF32": tf32, "VECTOR": vector,
        }  # fmt: skip
        yield Form(
            "weight_gradient.weight_gradient", architecture, dtype, tuple(constants.items()), tile.warps, tile.stages,
            registers=tile.registers,
        )  # fmt: skip
    read = ((32, 128, 1, 1), (512, 128, 1, 1), (32, 16, 1, 9), (512, 16, 1, 9), (512, 32, 1, 9), (512, 32, 2, 9))
    for channels, depth, parts, taps in read:
        readers = readers_config(capability, dtype, channels, 3 if taps > 1 else 1)
        constants = {
            "TILE_ROWS": readers.rows, "TILE_COLUMNS": readers.columns, "DEPTH": depth, "PARTS": parts, "TAPS": taps,
            "ACTIVATION": 1, "ADD": True, "TF32": tf32, "STAGES": readers.stages,
        }  # fmt: skip
        yield Form(
            "readers.gather_readers", architecture, dtype, tuple(constants.items()), readers.warps, readers.stages,
            tensor_core=readers.columns >= 64,  # wgmma has 64 rows at least, and the tile is transposed
            registers=readers.registers,
        )  # fmt: skip
    merge = {"BANDS": 4096, "BLOCK": 4}
    end = {"TILE_COLUMNS": 32, "GROUP_H": 1, "GROUP_W": 1, "GROUP_CHANNELS": 0}
    end |= {"EPILOGUE": 3, "ACTIVATION": 1, "ADD": True}
    small: list[tuple[str, dict[str, Any]]] = [
        ("norm.merge_statistics", {**merge, "ONCE": True}),
        ("affine.batch_norm_affine", {"EPS": 1e-5, "BLOCK": 256}),
        ("norm.merge_sums", merge),
        ("affine.batch_norm_vectors", {"EPS": 1e-5, "BLOCK": 256}),
        ("affine.pack_affine", {"EPS": 1e-5, "BLOCK": 256}),
        ("norm.slot_statistics", {"TILE_ROWS": 64, "BLOCK": 64}),
        *(("norm.normalise", {"EPS": eps, "ACTIVATION": 1, "TILE_ROWS": 64, "BLOCK": 64}) for eps in (None, 1e-5)),
        ("norm.bn_backward", {"HAS_A": True, "HAS_MEAN": True, "HAS_SHARE": True, "TILE_ROWS": 64, "BLOCK": 64}),
        ("conv.finish_splits", {"SPLITS": 2, "TILE_ROWS": 64, **end}),
        ("conv.finish_splits", {"SPLITS": 32, "TILE_ROWS": 8, **end}),
        ("pack.pack_weights", {"TILE_COLUMNS": 8, "TILE_K": 256, "AFFINE": True}),
        ("readers.pack_readers", {"TILE_COLUMNS": 16, "TILE_DEPTH": 64, "TAPS": 1}),
        ("readers.pack_readers", {"TILE_COLUMNS": 16, "TILE_DEPTH": 16, "TAPS": 9}),
        ("readers.merge_readers", {"READERS": 2, "TERMS": True, "TILES": 1024, "BLOCK": 8}),
        ("weight_gradient.reduce_splits", {"SPLITS": 32, "WEIGHTS": 16, "COLUMNS": 16}),
        ("weight_gradient.reduce_splits", {"SPLITS": 256, "WEIGHTS": 2, "COLUMNS": 16}),
    ]
    for kernel, constants in small[:3] if quick else small:
        warps = {
            "merge_statistics": 32,
            "merge_sums": 32,
            "merge_readers": 8,
            "reduce_splits": 8,
        }.get(kernel.split(".")[1], 4)
        yield Form(kernel, architecture, dtype, tuple(constants.items()), warps, 3, tensor_core=False)


def overlapping(forms: Iterable[Form]) -> Iterator[Form]:
    """The same forms, started while their predecessors end, for the GPUs that can."""
    for form in forms:
        if form.architecture >= 90:
            yield replace(form, constants=(*form.constants, ("PDL", True)))


def leaky(forms: Iterable[Form]) -> Iterator[Form]:
    """The same forms with LeakyReLU in ReLU's place, of those that activate."""
    for form in forms:
        constants = dict(form.constants)
        if constants.get("ACTIVATION") == 1:
            yield replace(form, constants=tuple((constants | {"ACTIVATION": 0.2}).items()))


def all_forms(every_way: bool = False) -> list[Form]:
    """What the report covers: every tile of the launch table; with `every_way` in every epilogue and layout too."""
    forms: dict[str, Form] = {}
    for architecture in ARCHITECTURES:
        for dtype in ("bfloat16", "float32", "float16"):
            ways = 6 if every_way else {"bfloat16": 2, "float32": 1, "float16": 0}[dtype]
            # fp16 is bf16's machine code but for the type: a few tiles are enough
            some = convolution_forms(architecture, dtype, ways or 1)
            some = some if ways else itertools.islice(some, 2)
            for form in (*some, *other_forms(architecture, dtype, dtype != "bfloat16")):
                forms[form.name] = form
        slot_rows = [f for f in convolution_forms(architecture, "bfloat16", 4) if dict(f.constants)["SLOT_ROWS"]]
        ieee = [*convolution_forms(architecture, "float32", 1, tf32=False)][::8]  # FFMA: minutes to compile them all
        forms |= {form.name: form for form in (*slot_rows[::4], *ieee)}
        early = (*[*convolution_forms(architecture, "bfloat16")][::6], *other_forms(architecture, "bfloat16"))
        forms |= {form.name: form for form in overlapping(early)}
        sloped = (
            *[*leaky(convolution_forms(architecture, "bfloat16", 4))][::12],
            *leaky(other_forms(architecture, "bfloat16")),
        )
        forms |= {form.name: form for form in sloped}
    return list(forms.values())


def quick_forms() -> list[Form]:
    """A handful that touches every kernel and generation; the compile tests run these."""
    picked: dict[tuple[str, int], Form] = {}
    for architecture in ARCHITECTURES:
        for form in (*convolution_forms(architecture, "bfloat16"), *other_forms(architecture, "bfloat16")):
            picked.setdefault((form.kernel, architecture), form)
    keep = [form for form in picked.values() if form.architecture == 90 or form.tensor_core]
    gradient = [form for form in convolution_forms(90, "bfloat16") if dict(form.constants)["EPILOGUE"] == 3][:3]
    normalised = [form for form in convolution_forms(90, "bfloat16") if dict(form.constants)["AFFINE"]]
    affine = [next(f for f in normalised[::-1] if dict(f.constants)["TAPS"] == taps) for taps in (False, True)]
    taps = [form for form in other_forms(90, "bfloat16") if dict(form.constants).get("TAPS") == 9][1:]
    split = [form for form in convolution_forms(90, "bfloat16") if dict(form.constants)["EPILOGUE"] == 4][::12]
    fp32 = [*convolution_forms(90, "float32", 2)][4:5]
    early = [*overlapping(form for form in keep if form.architecture == 90), *leaky([*gradient[:1], *taps[:1]])]
    return [*keep, *gradient, *affine, *taps, *split, *fp32, *early]


def compile_form(form: Form) -> Report:
    """Compile one form and check its machine code."""
    import importlib

    import triton
    from thresholdnet.kernels.packed_weights import MOST_WEIGHTS
    from thresholdnet.kernels.weight_gradients import MOST_GRADIENTS
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, function = form.kernel.split(".")
    kernel = getattr(importlib.import_module(f"thresholdnet.kernels.{module}"), function)
    constants = {"PDL": False, **dict(form.constants)}
    signature: dict[str, Any] = {}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
        elif parameter.do_not_specialize:
            signature[name] = "i32"
        elif name in SEVERAL:
            several = {"pack_weights": MOST_WEIGHTS, "reduce_splits": MOST_GRADIENTS}.get(function, 2)
            signature[name] = ("*i32" if name in TABLES else "*fp32",) * several
            if not parameter.do_not_specialize_on_alignment:
                aligned |= {(index, i): [["tt.divisibility", 16]] for i in range(several)}
        else:
            slot = name in SLOTS or name == "weight"
            signature[name] = "*i32" if name in TABLES else f"*{TYPES[form.dtype]}" if slot else "*fp32"
            if not parameter.do_not_specialize_on_alignment:
                aligned[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", form.architecture, 32),
        options={
            "num_warps": form.warps, "num_stages": form.stages, "launch_pdl": constants["PDL"],
            "maxnreg": form.registers or None,
        },
    )  # fmt: skip
    report, operations = _read(compiled.asm["cubin"], TENSOR_CORE[form.architecture])
    report.shared = compiled.metadata.shared
    report.faults = [*_faults(form, report), *(overlap_faults(compiled.asm, operations) if constants["PDL"] else ())]
    return report


def _faults(form: Form, report: Report) -> Iterator[str]:
    counts = report.loop_counts
    if report.stack > STACK_LIMIT:
        yield f"stack of {report.stack} bytes"
    if report.shared > SHARED_LIMIT[form.architecture]:
        yield f"{report.shared} bytes of shared memory"
    if not form.tensor_core:
        return
    if not report.loop:
        yield "no tensor-core instruction in a loop"
    if counts.get("LDL", 0) + counts.get("STL", 0):
        yield f"{counts.get('LDL', 0)} LDL and {counts.get('STL', 0)} STL in the main loop"
    if form.async_copies and not counts.get("LDGSTS.128", 0):
        yield "no 16-byte asynchronous copy in the main loop"


def overlap_faults(asm: Mapping[str, str], operations: Sequence[str]) -> Iterator[str]:
    """What a program does before it has waited for its predecessor, and must not.

    asm: Triton's "ttir" and "ptx"; operations: the machine code's, in order.
    """
    waited = False  # here
    around: list[bool] = []  # in the regions around this one
    for line in asm["ttir"].splitlines():
        code = re.sub(r" loc\(#loc\w*\)$", "", line).strip()
        if code.startswith("}"):
            waited = around.pop()
        if code.endswith("{"):
            around.append(waited)
        waited |= "griddepcontrol.wait" in code
        reads = "tt.load" in code and not re.search(r"tt\.ptr<i32>", code)
        if not waited and (reads or "tt.store" in code or "tt.atomic" in code):
            yield f"before the wait: {code}"
    if not {"ACQBULK", "PREEXIT"}.issubset(operations):
        yield "no wait, or nothing that lets the next kernel start"
        return
    ahead = [name.split(".")[0] for name in operations[: operations.index("ACQBULK")]]
    if writes := {"STG", "LDGSTS", "ATOM", "ATOMG", "RED", "REDG", "PREEXIT"}.intersection(ahead):
        yield f"{', '.join(sorted(writes))} before the wait in machine code"
    loads = asm["ptx"].split("griddepcontrol.wait")[0].count("ld.global")
    if ahead.count("LDG") > loads:
        yield f"{ahead.count('LDG')} loads before the wait in machine code, {loads} in PTX"


def _read(cubin: bytes, tensor_core: tuple[str, ...]) -> tuple[Report, list[str]]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def run(*command: str | Path) -> str:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = run(tools / "cuobjdump", "--dump-resource-usage", file.name)
        code = run(tools / "nvdisasm", "-c", file.name)
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    registers, stack = (int(match[1]), int(match[2])) if match else (0, 0)
    labels: dict[str, int] = {}  # of its instruction
    operations: list[tuple[str, str | None]] = []  # with the target of a branch
    for line in code.splitlines():
        if match := re.match(r"\s*(\.L_\S+):", line):
            labels[match[1]] = len(operations)
        elif match := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)(.*);", line):
            label = re.search(r"`\((\.L_\S+?)\)", match[2]) if match[1].startswith("BRA") else None
            operations.append((match[1], label[1] if label else None))
    loops = []
    for end, (_, target) in enumerate(operations):
        start = labels.get(target, end + 1) if target else end + 1
        body = [name for name, _ in operations[start : end + 1]]
        if any(name.startswith(tensor_core) for name in body):
            loops.append(body)
    loop = min(loops, key=len, default=[])
    counts = Counter(_short(name) for name in loop)
    kept = {"LDGSTS.128", "LDGSTS.64", "LDGSTS.32", "LDG", "LDL", "STL", "LDS", "STS", "LDSM", "SHFL", "BAR", "FFMA"}
    kept |= set(tensor_core)
    report = Report(registers, stack, 0, len(operations), len(loop), {k: v for k, v in counts.items() if k in kept})
    return report, [name for name, _ in operations]


def _short(name: str) -> str:
    base, *rest = name.split(".")
    if base == "LDGSTS":
        return base + (".128" if "128" in rest else ".64" if "64" in rest else ".32")
    return base


def _compile_or_say(form: Form) -> tuple[str, Report]:
    try:
        return form.name, compile_form(form)
    except Exception as error:  # one form that does not compile must not hide the others
        return form.name, Report(0, 0, 0, 0, 0, {}, [f"does not compile: {type(error).__name__}: {str(error)[:300]}"])


def compare(rows: dict[str, dict[str, Any]], before: dict[str, dict[str, Any]]) -> list[str]:
    """Lines that say which forms changed, worst first."""
    changes = []
    for name, row in rows.items():
        old = before.get(name)
        if old is None:
            continue
        keys = ("registers", "stack", "shared", "loop")
        words = [f"{key} {old[key]} -> {row[key]}" for key in keys if old[key] != row[key]]
        if words:
            changes.append((row["loop"] / max(old["loop"], 1), f"{name}: {', '.join(words)}"))
    return [line for _, line in sorted(changes, reverse=True)]


def main() -> int:
    """Command line; 1 if a form fails."""
    import triton

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a handful of forms, nothing written")
    parser.add_argument("--all", action="store_true", help="every tile in every epilogue and layout (half an hour)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    forms = quick_forms() if options.quick else all_forms(options.all)
    with ProcessPoolExecutor(options.jobs) as pool:
        rows = {}
        for i, (name, report) in enumerate(pool.map(_compile_or_say, forms), start=1):
            rows[name] = vars(report)
            for fault in report.faults:
                print(f"FAIL {name}: {fault}", flush=True)
            if i % 50 == 0:
                print(f"{i} of {len(forms)}", flush=True)
    failed = sum(bool(row["faults"]) for row in rows.values())
    print(f"{len(rows)} forms, {failed} fail, triton {triton.__version__}")
    for architecture in ARCHITECTURES:
        mine = [row for name, row in rows.items() if name.startswith(f"sm_{architecture} ") and row["loop"]]
        if mine:
            most = {key: max(row[key] for row in mine) for key in ("registers", "shared", "stack")}
            print(
                f"sm_{architecture}: {len(mine)} main loops, at most {most['registers']} registers, "
                f"{most['shared'] // 1024} kB shared, {most['stack']} B stack"
            )
    if not options.quick:
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{triton.__version__}.json"
        others = sorted((p for p in RESULTS.glob("*.json") if p != path), key=lambda p: p.stat().st_mtime)
        last = path if path.exists() else others[-1] if others else None
        if last:
            lines = compare(rows, json.loads(last.read_text())["forms"])
            print(f"{len(lines)} forms changed since {last.name}", *lines[:20], sep="\n  ")
        path.write_text(json.dumps({"triton": triton.__version__, "forms": rows}, indent=1, sort_keys=True) + "\n")
        print(f"wrote {path.relative_to(ROOT)}")
    return 1 if failed else 0


def _make_importable() -> None:
    """`thresholdnet.kernels` from a source checkout that was installed before it had kernels."""
    import importlib.util

    import thresholdnet

    if importlib.util.find_spec("thresholdnet.kernels") is None:
        thresholdnet.__path__.append(str(ROOT))


if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("TRITON_INTERPRET must be unset to compile, got 1")
_make_importable()
if __name__ == "__main__":
    sys.exit(main())
