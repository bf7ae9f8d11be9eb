"""Small blocks of each unit, forward and backward in bf16 on a GPU: what compute-sanitizer watches in seconds.

compute-sanitizer --tool memcheck python bench/one_block.py triton
"""

from __future__ import annotations

import sys

SIZES = ((2, 8, 8), (1, 7, 5), (3, 1, 1))  # images, rows, columns


def main() -> int:
    """Command line: the backend's name."""
    import torch

    from thresholdnet import ThresholdBlock, links, replay

    (backend,) = sys.argv[1:]
    dense, leaky = links.dense(3), "leaky_relu(0.2)"
    cases = (
        ("conv_bn_relu", links.harmonic(4), "relu"), ("conv_relu", dense, leaky), ("bn_relu_conv", dense, "relu"),
        ("bottleneck", dense, "relu"), ("bottleneck", dense, leaky),
    )  # fmt: skip
    for unit, rows, activation in cases:
        block = ThresholdBlock(20, rows, 12, unit=unit, activation=activation, fused=True, backend=backend)
        block.cuda().bfloat16()
        for images, high, wide in SIZES:
            x = torch.randn(images, 20, high, wide, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(replay.FIRST["cuda"]):  # run, recorded, replayed
                y = block.train()(x)
                y.backward(torch.ones_like(y))
                with torch.no_grad():
                    block.eval()(x)
        torch.cuda.synchronize()
        if block.backend != backend:
            print(f"error: {backend} was asked for, {block.backend} ran", file=sys.stderr)
            return 1
        print(f"{unit}, {activation}, on {backend}: done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
