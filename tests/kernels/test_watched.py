"""The watcher of launches sees what it says it sees: one faulty kernel a fault, and the same without it."""

import pytest
import torch
import triton
import triton.language as tl
from watched import Fault


@triton.jit
def shift(x, y, step, COUNT: tl.constexpr, TWICE: tl.constexpr, ATOMIC: tl.constexpr):
    """y[p COUNT + i] = x[p COUNT + i + step], 0 behind the end; TWICE: and y again from itself."""
    at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    values = tl.load(x + at + step)
    if ATOMIC:
        tl.atomic_add(y + at, values)
    else:
        tl.store(y + at, values)
    if TWICE:
        tl.store(y + at, tl.load(y + at) + 1)


@triton.jit
def scatter(x, y, part, COUNT: tl.constexpr):
    """y[i // part] = x[i]"""
    at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    tl.store(y + at // part, tl.load(x + at))


def shifted(x, y, step=0, twice=False, atomic=False):
    shift[(2,)](x, y, step, 8, twice, atomic)
    return y


def test_sound_launches_pass():
    x = torch.arange(24.0)
    assert torch.equal(shifted(x, torch.empty(16)), x[:16])
    assert torch.equal(shifted(x, torch.empty(16), step=8), x[8:])
    y = x.clone()
    assert torch.equal(shifted(y, y), x)  # each program in its own place
    scatter[(2,)](x, y, 1, 8)


@pytest.mark.parametrize("step", (-1, 9, 10**6))
def test_a_step_past_the_tensors(step):
    with pytest.raises(Fault, match=r"shift: program \d loads \d elements outside of its tensors"):
        shifted(torch.arange(24.0), torch.empty(16), step)


def test_a_store_past_the_tensors():
    with pytest.raises(Fault, match="shift: program 1 stores 1 elements outside"):
        shifted(torch.arange(24.0), torch.empty(15))


@pytest.mark.parametrize("step", (8, -8))
def test_a_program_that_reads_what_another_one_writes(step):
    x = torch.arange(48.0)
    with pytest.raises(Fault, match=r"shift: program \d loads what another program stores"):
        shifted(x[16:], x[16:], step)


def test_a_program_that_reads_what_it_wrote():
    with pytest.raises(Fault, match="shift: program 0 loads what it stored before"):
        shifted(torch.arange(16.0), torch.empty(16), twice=True)


@pytest.mark.parametrize(("part", "fault"), ((2, "one store writes the same bytes twice"), (16, "two programs store")))
def test_bytes_that_are_written_twice(part, fault):
    with pytest.raises(Fault, match=fault):
        scatter[(2,)](torch.arange(16.0), torch.empty(16), part, 8)


def test_an_atomic_operation():
    with pytest.raises(Fault, match="atomic operation"):
        shifted(torch.arange(16.0), torch.zeros(16), atomic=True)


@pytest.mark.parametrize("dtype", (torch.int8, torch.float16, torch.float64))
def test_neighbours_of_any_size_do_not_meet(dtype):
    x = torch.arange(48).to(dtype)
    assert torch.equal(shifted(x[16:], x, step=0), x)
