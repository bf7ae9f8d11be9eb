"""The bench's single operations on slots: what the engine's verbs give in the interpreter is what plain torch gives."""

import pytest
import torch

from thresholdnet.bench import OPERATIONS, Operation, forms, layers, micro
from thresholdnet.bench.stages import Stage
from thresholdnet.plan import plan_block

LINKS, WIDTHS = [[0], [1, 0], [2, 0]], [6, 3, 9]
EVERY = [("conv_bn_relu", name, 2, 3) for name in OPERATIONS if name != "gather"]
EVERY += [("bottleneck", name, 3, 1) for name in OPERATIONS if name != "gather"]
EVERY += [("bottleneck", name, 3, 3) for name in (*layers.PRODUCTS, "statistics")]


@pytest.mark.parametrize(("unit", "name", "layer", "kernel"), EVERY)
def test_triton_does_what_plain_torch_does(unit, name, layer, kernel):
    plan = plan_block(5, LINKS, WIDTHS, unit=unit, outputs="all", bottleneck_factor=1)
    op = Operation("some/stages.0", Stage("stages.0", plan, "relu", 3), layer, kernel, name, 32, 1, "fp32")
    given = forms.operands(op, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        plain = forms.plain(op, given.to(torch.float64, False))
        triton = forms.ours("triton", op, given.to(torch.float32, True))
        for _ in range(2):  # twice: gradients of pixels are added to what arrived
            assert max(micro.check_each(triton(), plain())) < 5e-6
