"""Run by abi.sh in an environment of another torch: the library as it is, the engine on it, against the plain block."""

import copy

import torch

import thresholdnet as tn
from thresholdnet.backends import csrc, libraries

print(f"torch {torch.__version__} runs thresholdnet {tn.__version__} in {tn.__path__[0]}")
if csrc.reason() is not None:
    raise SystemExit(f"error: {csrc.reason()}")
print(f"_csrc is loaded; it was built against torch {libraries.record('_csrc')['torch']}")

for unit in ("conv_bn_relu", "conv_relu", "bottleneck"):
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 5e-5)):
        torch.manual_seed(0)
        plain = tn.ThresholdBlock(16, tn.links.threshold_ab(8, 4), 12, unit=unit, dtype=dtype)
        fused = copy.deepcopy(plain).fuse(True, "native")
        x = torch.randn(2, 16, 9, 7, dtype=dtype, requires_grad=True)
        results = []
        for block in (plain, fused):
            y = block(x)
            results.append((y, torch.autograd.grad(y.sin().sum(), x)[0]))
        (y, g), (ours, grad) = results
        errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in ((ours, y), (grad, g))]
        print(
            f"{unit}, {dtype}: output {errors[0]:.1e}, gradient {errors[1]:.1e} from the plain block, bound {bound:.0e}"
        )
        if not max(errors) <= bound:
            raise SystemExit("error: the fused block differs from the plain one")
