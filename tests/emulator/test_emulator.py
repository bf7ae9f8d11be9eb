"""The emulator itself: what it computes, and that it ends the process where a GPU would fault, hang or go wrong."""

import re
import signal
import subprocess
from pathlib import Path

import emulated_library
import pytest

FAULTS = {
    "misaligned_load": r"misaligned load: address 0x[0-9a-f]+ is not a multiple of 16 bytes \(block 0, thread 0\)",
    "misaligned_store": "misaligned store: .* not a multiple of 16 bytes",
    "misaligned_pack": "misaligned load: .* not a multiple of 8 bytes",
    "misaligned_copy": "misaligned asynchronous copy, source",
    "misaligned_copy_target": "misaligned asynchronous copy, destination",
    "misaligned_matrix": "misaligned ldmatrix row",
    "copy_to_global": "the destination of an asynchronous copy must lie in shared memory",
    "copy_without_wait": r"the thread ended while asynchronous copies were in flight \(block 0, thread 0\)",
    "barrier_for_some": "threads never meet: 40 of 64 wait at __syncthreads, 24 ended",
    "warp_divided": "lanes of a warp are at different operations, shuffle_xor and __syncwarp",
    "warp_without_a_lane": "threads never meet: 31 lanes of warp 0 wait at shuffle_xor",
    "too_much_shared": "a block takes 52000 bytes of shared memory, 52000 of them static: at most 166912 and 49152",
}


@pytest.fixture(scope="module")
def program(emulated_compiler, tmp_path_factory):
    """faults.cu: runs the case that is named."""
    target = tmp_path_factory.mktemp("emulator") / "faults"
    emulated_library.make_program(emulated_compiler, Path(__file__).parent / "faults.cu", target)
    return lambda name: subprocess.run([str(target), name], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", FAULTS)
def test_faults_end_the_process_with_a_sentence(program, name):
    done = program(name)
    assert done.returncode == -signal.SIGABRT, done.stdout
    assert re.search(rf"^emulator: {FAULTS[name]}", done.stderr, re.MULTILINE), done.stderr


def test_tensor_core_products_are_exact_for_small_integers(program):
    assert program("mma").stdout == "0 0\n"


def test_asynchronous_copies_arrive_at_the_wait_for_their_group(program):
    """NaN (0xff bytes) before, then the values; zeros where the copy was not valid."""
    assert program("copies").stdout == "1 5 1 0\n"


def test_a_block_of_too_many_threads_is_refused(program):
    assert program("too_many_threads").stdout == "a block takes 1 to 1024 threads\n"
