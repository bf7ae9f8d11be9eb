"""Offline compilation of a handful of launch forms, with bench/compile_report.py's checks of their machine code."""

from dataclasses import replace

import compile_report
import pytest


@pytest.mark.parametrize("form", compile_report.quick_forms(), ids=lambda form: form.name)
def test_form(form):
    report = compile_report.compile_form(form)
    assert report.faults == []
    if form.tensor_core:
        assert report.loop and report.registers <= 255


def test_each_fault_is_named():
    form = next(form for form in compile_report.quick_forms() if form.tensor_core and form.async_copies)
    limit = compile_report.SHARED_LIMIT[form.architecture]
    right = compile_report.Report(255, compile_report.STACK_LIMIT, limit, 900, 300, {"LDGSTS.128": 4})
    assert list(compile_report._faults(form, right)) == []
    for change, fault in (
        ({"stack": 193}, "stack of 193 bytes"),
        ({"shared": limit + 1}, f"{limit + 1} bytes of shared memory"),
        ({"loop": 0}, "no tensor-core instruction in a loop"),
        ({"loop_counts": {"LDGSTS.128": 4, "LDL": 1}}, "1 LDL and 0 STL in the main loop"),
        ({"loop_counts": {"LDGSTS.128": 4, "STL": 2}}, "0 LDL and 2 STL in the main loop"),
        ({"loop_counts": {"LDGSTS.64": 4}}, "no 16-byte asynchronous copy in the main loop"),
    ):
        assert list(compile_report._faults(form, replace(right, **change))) == [fault]
    assert f"{compile_report.STACK_LIMIT} bytes of stack" in compile_report.__doc__


WAIT = 'tt.elementwise_inline_asm "griddepcontrol.wait; // dummy $0" {constraints = "=r"} -> i32 loc(#loc2)'
TABLE, DATA = (f"%x = tt.load %p : tensor<8x!tt.ptr<{kind}>> loc(#loc3)" for kind in ("i32", "f32"))
MACHINE = ["S2R", "LDG.E", "ACQBULK", "PREEXIT", "LDG.E.128", "STG.E"]


def overlap_faults(*lines, machine=MACHINE):
    kernel = ["module {", "tt.func public @f(%p: !tt.ptr<f32> loc(#loc1)) {", *lines, "} loc(#loc)", "} loc(#loc)"]
    ptx = "ld.global.b32 {%r1}, [%rd1];\ngriddepcontrol.wait;\nld.global.b32 {%r2}, [%rd2];"
    return list(compile_report.overlap_faults({"ttir": "\n".join(kernel), "ptx": ptx}, machine))


def test_tables_alone_are_read_before_the_wait():
    assert overlap_faults(TABLE, WAIT, DATA, "tt.store %p, %x loc(#loc4)") == []
    for wrong in (DATA, "tt.store %p, %x : !tt.ptr<i32> loc(#loc4)", "%y = tt.atomic_rmw fadd, %p, %x loc(#loc5)"):
        (fault,) = overlap_faults(TABLE, wrong, WAIT)
        assert fault.startswith("before the wait: ") and "loc" not in fault


def test_a_wait_in_a_branch_counts_there_alone():
    branch = ("scf.if %0 {", WAIT, DATA, "} loc(#loc6)")
    assert overlap_faults(*branch) == []
    assert overlap_faults("scf.if %0 {", WAIT, "} else {", DATA, "} loc(#loc6)") and overlap_faults(*branch, DATA)


def test_machine_code_before_the_wait():
    for ahead in ("STG.E", "LDGSTS.E.BYPASS.128", "RED.E.ADD", "PREEXIT"):
        (fault,) = overlap_faults(WAIT, machine=[ahead, *MACHINE])
        assert fault == f"{ahead.split('.')[0]} before the wait in machine code"
    assert overlap_faults(WAIT, machine=["LDG.E", *MACHINE]) == ["2 loads before the wait in machine code, 1 in PTX"]
    assert overlap_faults(WAIT, machine=["LDG.E", "STG.E"]) == ["no wait, or nothing that lets the next kernel start"]
