"""Slots lie where the launchers want them, in both layouts."""

import pytest
import torch
from thresholdnet.kernels import launch, slots


@pytest.mark.parametrize("layout", slots.LAYOUTS)
@pytest.mark.parametrize("size", ((2, 3, 5), (1, 1, 1), (0, 2, 2)), ids=str)
def test_slots_are_apart_and_padded(layout, size):
    batch, height, width = size
    made = slots.allocate(batch, (10, 16, 3), height, width, dtype=torch.float32, device="cpu", layout=layout)
    for i, slot in enumerate(made):
        assert slot.shape == (batch, (10, 16, 3)[i], height, width)
        slots.write(slot, torch.full((batch, slot.shape[1], height, width), float(i + 1)))
    for i, slot in enumerate(made):
        assert (slot == i + 1).all() and not slots.whole(slot)[:, slot.shape[1] :].any()
        launch.slot_statistics(slot)  # checks that it is a slot


def test_unknown_layout():
    with pytest.raises(ValueError, match="layout must be one of rows, arena, got 'planes'"):
        slots.allocate(1, (8,), 2, 2, dtype=torch.float32, device="cpu", layout="planes")
