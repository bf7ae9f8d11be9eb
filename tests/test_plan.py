"""Widths, outputs, slots, lifetimes and kept bytes of block plans."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from released import harmonic_width
from saved import saved_tensors, storage_bytes

from thresholdnet import ThresholdBlock, links, plan_block
from thresholdnet.plan import ROW_ALIGN, SLOT_ALIGN, UNITS


def test_widths_of_v1_blocks_4_and_5():
    four = plan_block(288, links.harmonic(16), 40)
    assert four.widths == (40, 68, 40, 116, 40, 68, 40, 196, 40, 68, 40, 116, 40, 68, 40, 334)
    assert four.link_widths == (
        288, 328, 68, 396, 116, 156, 68, 512, 196, 236, 68, 304, 116, 156, 68, 708,
    )  # fmt: skip
    assert four.out_channels == 654
    five = plan_block(480, links.harmonic(4), 160)
    assert (five.widths, five.link_widths, five.out_channels) == (
        (160, 272, 160, 462),
        (480, 640, 272, 912),
        782,
    )


def test_v2_block_4_reads_96_more_where_node_0_is_linked():
    one, two = plan_block(288, links.harmonic(16), 40), plan_block(384, links.harmonic(16), 40)
    more = [b - a for a, b in zip(one.link_widths, two.link_widths, strict=True)]
    assert [i for i in range(1, 17) if more[i - 1]] == [1, 2, 4, 8, 16]
    assert {m for m in more if m} == {96}


def test_threshold_widths_are_k_up_to_the_threshold_and_harmonic_above():
    plan = plan_block(64, links.threshold_ab(16, 8), 20, compression=1.7)
    assert plan.widths[:8] == (20,) * 8
    assert plan.widths[8:] == plan_block(64, links.harmonic(16), 20).widths[8:]


def test_other_width_rules():
    rows = links.threshold_ab(6, 2)
    assert plan_block(8, rows, 20, width_rule="even").widths == (20, 34, 20, 34, 20, 34)
    assert plan_block(8, rows, 21, width_rule="constant").widths == (21,) * 6
    assert plan_block(8, rows, (1, 2, 3, 4, 5, 6)).widths == (1, 2, 3, 4, 5, 6)
    assert plan_block(8, links.harmonic(3), 15).widths == (16, 26, 16)  # k itself is rounded to even
    assert plan_block(8, rows, 15, width_rule="even").widths == (16, 26, 16, 26, 16, 26)
    assert plan_block(8, links.harmonic(4), 1, compression=0.1).widths == (2,) * 4  # a layer has channels


@pytest.mark.parametrize("m", [1.6, 1.7])
def test_harmonic_widths_round_as_the_released_code_does(m):
    """It multiplies by m once for every factor 2: 100 x 1.7 x 1.7 stays below 289, which 100 x 1.7^2 does not."""
    for k in range(1, 300):
        assert plan_block(8, links.harmonic(16), k, compression=m).widths == tuple(
            harmonic_width(i, k, m) for i in range(1, 17)
        )


def test_output_nodes():
    assert plan_block(8, links.threshold_ab(10, 4), 8).outputs == (1, 2, 3, 4, 5, 7, 9, 10)
    assert plan_block(8, links.harmonic(6), 8).outputs == (1, 3, 5, 6)
    assert plan_block(8, links.dense(3), 8, unit="bottleneck").outputs == (0, 1, 2, 3)
    assert plan_block(8, links.dense(3), 8, outputs="all").outputs == (0, 1, 2, 3)
    assert plan_block(8, links.dense(3), 8, outputs="layers").outputs == (1, 2, 3)
    assert plan_block(8, links.dense(3), 8, outputs=(3, 0)).outputs == (0, 3)


def test_plans_are_frozen_and_hashable():
    one, two = (
        plan_block(8, links.dense(3), 8),
        plan_block(8, tuple(links.dense(3)), 8, width_rule="constant"),
    )
    assert plan_block(8, links.dense(3), 8) == one and len({one, plan_block(8, links.dense(3), 8)}) == 1
    assert one != two  # the plain tuple has threshold 0 and so another output set
    with pytest.raises(AttributeError):
        one.unit = "bottleneck"


def test_readers_transpose_the_links():
    plan = plan_block(8, links.harmonic(8), 8)
    pairs = {(node, layer) for node, layers in enumerate(plan.readers) for layer in layers}
    assert pairs == {(node, layer) for layer, row in enumerate(plan.links, start=1) for node in row}


custom_links = st.integers(1, 12).flatmap(
    lambda depth: st.tuples(
        *(st.sets(st.integers(0, i - 1), min_size=1).map(lambda s: tuple(sorted(s))) for i in range(1, depth + 1))
    )
)


@given(custom_links, st.integers(1, 40), st.lists(st.integers(1, 70), min_size=12, max_size=12), st.data())
def test_slots_never_overlap(rows, in_channels, widths, data):
    depth = len(rows)
    outputs = data.draw(st.sets(st.integers(0, depth), min_size=1))
    plan = plan_block(in_channels, rows, widths[:depth], outputs=tuple(outputs))
    assert all(slot.offset % SLOT_ALIGN == 0 and slot.padded % SLOT_ALIGN == 0 for slot in plan.slots)
    assert [slot.width for slot in plan.slots] == list(plan.node_widths)
    assert all(a.end == b.offset for a, b in zip(plan.slots, plan.slots[1:], strict=False))
    assert plan.buffer_channels % ROW_ALIGN == 0 and plan.buffer_channels - plan.slots[-1].end < ROW_ALIGN
    # inference: run the schedule and see that no write destroys what is still to be read
    held = {}
    for step in range(depth + 1):
        held[step] = plan.inference_slots[step]
        reads = plan.links[step - 1] if step else ()
        for node in reads:
            assert node in held, f"layer {step} reads node {node} after its slot was reused"
        written = held[step]
        for node in [n for n in held if n != step]:
            if held[node].offset < written.end and written.offset < held[node].end:
                assert node not in reads
                del held[node]
    assert set(plan.outputs) <= set(held)
    assert plan.inference_channels <= plan.buffer_channels


def test_inference_reuses_slots():
    plan = plan_block(128, links.harmonic(16), 16)
    assert plan.inference_channels < 0.85 * plan.buffer_channels


@settings(max_examples=25, deadline=None)
@given(custom_links, st.sampled_from(UNITS))
def test_eager_kept_bytes_are_what_autograd_saves(rows, unit):
    block = ThresholdBlock(5, rows, 3, unit=unit, width_rule="constant", outputs="all")
    x = torch.randn(2, 5, 6, 7)
    activations = [t for t in saved_tensors(block, x) if t.dim() == 4]  # per-channel statistics are not counted
    assert storage_bytes(activations) == 2 * block.plan.kept_bytes(6, 7, 4, fused=False)


def test_fused_kept_bytes_of_v1_blocks():
    dense = plan_block(64, links.dense(6), 32, unit="bottleneck")
    assert dense.kept_channels(fused=True) == 64 + 6 * 32 + 6 * 128
    assert dense.kept_channels(fused=True, recompute_bottleneck=True) == 64 + 6 * 32
    harmonic = plan_block(288, links.harmonic(16), 40)
    assert harmonic.kept_channels(fused=True) == sum(-(-w // 8) * 8 for w in harmonic.node_widths)
    assert harmonic.kept_bytes(14, 14, 2, fused=True) == harmonic.kept_channels(fused=True) * 14 * 14 * 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_channels": 0}, ValueError, "in_channels must be at least 1, got 0"),
        (
            {"growth_rate": (8, 8)},
            ValueError,
            "growth_rate must hold one width for each of the 3 layers, got 2",
        ),
        ({"growth_rate": (8, 8, 0)}, ValueError, "growth_rate of layer 3 must be at least 1, got 0"),
        ({"growth_rate": "8"}, TypeError, "growth_rate must be an integer, got '8'"),
        ({"compression": 0}, ValueError, "compression must lie above 0 and below 100, got 0"),
        ({"compression": float("nan")}, ValueError, "compression must lie above 0"),
        ({"unit": "bottelneck"}, ValueError, "did you mean bottleneck?"),
        ({"width_rule": "harmonik"}, ValueError, "did you mean harmonic?"),
        ({"outputs": "al"}, ValueError, "outputs 'al' is unknown"),
        ({"outputs": (4,)}, ValueError, "output node must be from 0 to 3, got 4"),
        ({"outputs": ()}, ValueError, "outputs must name at least one node"),
        ({"outputs": 3}, TypeError, "outputs must be one of"),
        ({"bottleneck_factor": 0}, ValueError, "bottleneck_factor must be at least 1, got 0"),
        ({"dilation": 0}, ValueError, "dilation must be at least 1, got 0"),
        ({"dilation": (1, 2)}, ValueError, "dilation must hold one number for each of the 3 layers, got 2"),
        ({"dilation": (1, 2, 0)}, ValueError, "dilation of layer 3 must be at least 1, got 0"),
        ({"dilation": 1.5}, TypeError, "dilation must be an integer, got 1.5"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error) as caught:
        plan_block(**{"in_channels": 8, "links": links.dense(3), "growth_rate": 8, **arguments})
    assert message in str(caught.value)
