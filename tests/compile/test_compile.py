"""Offline compilation of a handful of launch forms, with bench/compile_report.py's checks of their machine code."""

import compile_report
import pytest


@pytest.mark.parametrize("form", compile_report.quick_forms(), ids=lambda form: form.name)
def test_form(form):
    report = compile_report.compile_form(form)
    assert report.faults == []
    if form.tensor_core:
        assert report.loop and report.registers <= 255
