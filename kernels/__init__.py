"""Triton kernels of the fused engine, their tables and launchers; imported as `thresholdnet.kernels`; no autograd.

`tables` (numpy alone) says where every operand lies, `slots` allocates them, `operands` checks what is given,
`device_tables` keeps the tables on the device, `configs` chooses tile sizes, and `tuned` reads what a GPU measured in
their place: these do without Triton, and all but `configs` serve the CUDA kernels in csrc/ too. `conv`, `pack`, `norm`,
`weight_gradient` and `readers` hold the device code, `device` says where it runs, `tiles` what a program of the small
kernels takes, `packed_weights` packs what `conv` reads, `launch` holds the functions to call. Importing this package
loads none of them.
"""

if __name__ != "thresholdnet.kernels":
    raise ImportError(
        f"this folder must be imported as thresholdnet.kernels, got {__name__!r}, the name of another package"
    )
