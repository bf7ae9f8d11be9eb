"""A kernel that starts while the one before it ends: programmatic dependent launch, on sm_90 and newer.

Launched with `launch_pdl`, a kernel's programs may start as soon as each program of its predecessor on the stream has
started and said so. What they do until they wait overlaps with the predecessor: their start itself, arithmetic, and
loads of tables, which were there before. The predecessor has itself waited before it said so, so that everything ahead
of it has ended; it alone may still run. So no program reads a tensor, nor writes anything, ahead of this wait.
bench/compile_report.py reads in the compiled code that none does.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_predecessor(PDL: tl.constexpr):
    """Until all that was launched before has ended and is visible; the next kernel may start from here on."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
