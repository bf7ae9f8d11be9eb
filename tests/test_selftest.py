"""`thresholdnet selftest`: right backends pass, a broken one fails with exit code 1, and says where."""

import json
import math

import pytest
import torch
from test_cli import run

from thresholdnet import selftest
from thresholdnet.backends import csrc, native


@pytest.fixture
def two_blocks(monkeypatch):
    """A block of each unit."""
    chosen = ("thresholdnet_v1 dense", "hardnet68 harmonic")
    monkeypatch.setattr(selftest, "BLOCKS", {name: selftest.BLOCKS[name] for name in chosen})


NATIVE = ("selftest", "--quick", "--backend", "native", "--dtype")


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16", "fp16"])
def test_native_passes(dtype, two_blocks):
    rows = json.loads(run(*NATIVE, dtype, "--json")[0])
    assert len(rows) == 2 * (1 + torch.cuda.is_available())
    for row in rows:
        assert row["ok"] and row["dtype"] == dtype and row["backend"] == "native" and row["cause"] is None
        assert set(row["errors"]) == {
            "output", "statistics", "gradient of x", "gradients of parameters", "inference",
        }  # fmt: skip
        assert all(0 < float(entry["error"]) <= entry["bound"] for entry in row["errors"].values())


def test_table(two_blocks):
    stdout, _ = run(*NATIVE, "fp32")
    assert "hardnet68 harmonic, 4 layers, 2x4x3" in stdout and " ok " in stdout and "FAIL" not in stdout
    assert "checks passed" in stdout and "native: on a CPU" in stdout


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_broken_verb_fails(dtype, two_blocks, monkeypatch):
    factor = {"fp32": 1.001, "bf16": 1.05}[dtype]
    original = native.Verbs.normalise
    monkeypatch.setattr(native.Verbs, "normalise", lambda *args, **named: original(*args, **named) * factor)
    rows = {row["block"]: row for row in json.loads(run(*NATIVE, dtype, "--json", code=1)[0])}
    assert not rows["hardnet68 harmonic"]["ok"]
    stdout, _ = run(*NATIVE, dtype, code=1)
    assert "FAIL" in stdout


def test_one_wrong_element_in_one_gradient_fails(two_blocks, monkeypatch):
    original = native.Verbs.weight_gradient

    def wrong(*arguments, **named):
        grad = original(*arguments, **named)
        grad[0, 0, 0, 0] += 1e-3 * grad.abs().max()
        return grad

    monkeypatch.setattr(native.Verbs, "weight_gradient", wrong)
    for row in json.loads(run(*NATIVE, "fp32", "--json", code=1)[0]):
        assert row["cause"] is None
        missed = [name for name, entry in row["errors"].items() if float(entry["error"]) > entry["bound"]]
        assert missed == ["gradients of parameters"]


def test_nan_and_exceptions_are_misses(two_blocks, monkeypatch):
    monkeypatch.setattr(native.Verbs, "leave", lambda self, nodes: torch.cat(list(nodes), 1) * math.nan)
    rows = json.loads(run(*NATIVE, "fp32", "--json", code=1)[0])
    assert not any(row["ok"] for row in rows) and rows[0]["errors"]["output"]["error"] == "nan"
    stdout, _ = run(*NATIVE, "fp32", code=1)
    assert "nan" in stdout and "FAIL" in stdout

    def refuse(*arguments, **named):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(native.Verbs, "leave", refuse)
    stdout, _ = run(*NATIVE, "fp32", code=1)
    assert "RuntimeError: no such kernel" in stdout and "and more" not in stdout and "FAIL" in stdout


def test_no_argument_of_an_activation_lies_near_zero():
    """What makes gradients comparable per element: the reference's own pre-activations keep away from the kink."""
    block, x, _, _ = selftest._operands_and_truth("hardnet68 harmonic", 4, (2, 4, 3), "fp32")
    nearest = []
    for norm in selftest._norms(block):
        norm.register_forward_hook(lambda norm, inputs, y: nearest.append(y.abs().min().item()))
    block(x)
    assert min(nearest) > 1e-3


def test_cases_and_their_limits(monkeypatch):
    full = selftest.cases("native")
    assert {case.dtype for case in full} == {"fp64", "fp32", "bf16", "fp16"}
    assert {case.block for case in full} == set(selftest.BLOCKS) and all(case.layers is None for case in full)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    interpreted = [case for case in selftest.cases() if case.backend == "triton"]
    assert interpreted and all(case.layers == 2 and case.dtype != "bf16" for case in interpreted)
    with pytest.raises(ValueError, match="dtype must be one that triton can be tested in here, got bf16"):
        selftest.cases("triton", ["bf16"])
    for arguments, sentence in (
        (["--dtype", "int8"], "dtype 'int8' is unknown"),
        (["--backend", "reference"], "backend 'reference' is unknown"),
    ):
        assert sentence in run("selftest", *arguments, code=2)[1]


def test_the_library_is_what_is_tested(two_blocks, monkeypatch):
    """A wrong pass in C++ is found, where the library is there."""
    if csrc.reason() is not None:
        pytest.skip(csrc.reason())
    original = csrc.moments
    monkeypatch.setattr(csrc, "moments", lambda z: tuple(t * 1.001 for t in original(z)))
    assert "FAIL" in run(*NATIVE, "fp32", code=1)[0]
