"""Single operations of layers: which there are, what they count, each form against autograd, and how they are timed."""

import json

import pytest
import torch
import torch.nn.functional as F
from test_bench import ONCE, TINY
from test_cli import run

from thresholdnet import bench
from thresholdnet.backends import native
from thresholdnet.bench import check, forms, layers, micro, peaks
from thresholdnet.bench.baselines import Unavailable
from thresholdnet.bench.clock import ProcessorClock
from thresholdnet.bench.rounds import Entry
from thresholdnet.bench.stages import Stage
from thresholdnet.plan import plan_block

CPU = torch.device("cpu")
PLANS = {
    "conv_bn_relu": plan_block(5, [[0], [1, 0], [2, 0, 1]], [6, 3, 9], unit="conv_bn_relu", outputs="all"),
    "bn_relu_conv": plan_block(5, [[0], [1, 0], [2, 0, 1]], [6, 3, 9], unit="bn_relu_conv"),
    "bottleneck": plan_block(5, [[0], [1, 0], [2, 0, 1]], [6, 3, 9], unit="bottleneck"),
}


def operation(unit, name, layer=2, kernel=3, activation="relu", dtype="fp64"):
    stage = Stage("stages.0", PLANS[unit], activation, 4)
    return bench.Operation("some/stages.0", stage, layer, kernel, name, 32, 2, dtype)


EVERY = [
    ("conv_bn_relu", name, layer, 3)
    for layer in (2, 3)
    for name in bench.OPERATIONS
    if (layer, name) != (3, "data_gradient")  # no layer reads the last one
]
EVERY += [("bn_relu_conv", name, 3, 3) for name in (*layers.PRODUCTS, "gather", "statistics")]
EVERY += [("bottleneck", name, 3, 1) for name in bench.OPERATIONS]
EVERY += [("bottleneck", name, 3, 3) for name in (*layers.PRODUCTS, "statistics")]


def by_autograd(op, o):
    """The results of an operation from their definitions."""

    def vector(v):
        return v.view(1, -1, 1, 1)

    def activated(x):
        y = (x - vector(o.mean)) / torch.sqrt(vector(o.variance) + forms.EPS) * vector(o.gamma) + vector(o.beta)
        return y.clamp(0, 6 if op.stage.activation == "relu6" else None)

    def read(sources):
        return activated(torch.cat(sources, 1)) if op.activates else torch.cat(sources, 1)

    def convolved(sources, weight):
        return F.conv2d(read(sources), weight, padding=op.kernel // 2)

    leaves = [t.clone().requires_grad_() for t in o.read]
    if op.operation == "convolution":
        return [convolved(o.read, o.weights[0])]
    if op.operation == "weight_gradient":
        weight = o.weights[0].clone().requires_grad_()
        return list(torch.autograd.grad(convolved(o.read, weight), weight, o.gradient))
    if op.operation == "gather":
        return [read(o.read)]
    if op.operation == "statistics":
        return [o.z.mean((0, 2, 3)), o.z.var((0, 2, 3), unbiased=False)]
    if op.operation == "normalise":
        return [activated(o.z)]
    if op.operation == "norm_backward":
        z, gamma, beta = (t.clone().requires_grad_() for t in (o.z, o.gamma, o.beta))
        normal = (z - vector(z.mean((0, 2, 3)))) / torch.sqrt(vector(z.var((0, 2, 3), unbiased=False)) + forms.EPS)
        y = (normal * vector(gamma) + vector(beta)).clamp(0, 6 if op.stage.activation == "relu6" else None)
        return list(torch.autograd.grad(y, [z, gamma, beta], o.gradient))
    if op.from_readers:  # every reader is a convolution of its own, of which this node is a part of the input
        node = torch.zeros_like(o.z).requires_grad_()
        sent = sum((F.conv2d(node, w, padding=1) * dz).sum() for w, dz in zip(o.weights, o.read, strict=True))
        return list(torch.autograd.grad(sent, node))
    if not op.activates:
        return list(torch.autograd.grad(convolved(leaves, o.weights[0]), leaves, o.gradient))
    o.gamma.requires_grad_(), o.beta.requires_grad_()
    return list(torch.autograd.grad(convolved(leaves, o.weights[0]), [*leaves, o.gamma, o.beta], o.gradient))


@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize(("unit", "name", "layer", "kernel"), EVERY)
def test_every_form_gives_what_autograd_does(unit, name, layer, kernel, activation):
    op = operation(unit, name, layer, kernel, activation)
    given = forms.operands(op, torch.float64, CPU)
    truth = by_autograd(op, given.to(torch.float64, False))
    with torch.no_grad():
        made = [forms.plain(op, given.to(torch.float64, channels_last)) for channels_last in (False, True)]
        made.append(forms.ours("native", op, given.to(torch.float64, True)))
        for form in made:
            results = form()
            assert len(results) == len(truth)
            assert max(micro.check_each(results, truth)) < 1e-13
        again = [form() for form in made]  # what an operation adds to, it adds to in place; and the rest is repeatable
        sent = op.activates and name == "data_gradient"
        for results in again:
            times = [2.0] * (len(truth) - 2) + [1.0] * 2 if sent else [1.0] * len(truth)
            for a, b, factor in zip(results, truth, times, strict=True):
                torch.testing.assert_close(a.reshape(b.shape), factor * b, rtol=1e-12, atol=1e-12)


def test_counts_of_a_bottleneck_layer():
    found = {(op.layer, op.kernel, op.operation): op for op in layers.operations(
        bench.Case("thresholdnet_v1/stages.0", 224, 8, "fp32", "train"))}  # fmt: skip
    pixels = 8 * 56 * 56
    first = found[6, 1, "convolution"]
    assert (first.widths, first.written, first.stage.side) == ((64, 32, 32, 32, 32, 32), 128, 56)
    assert first.flops == 2 * pixels * 224 * 128 and first.bytes == 4 * (pixels * (224 + 128) + 224 * 128)
    assert found[6, 1, "gather"].flops == 0 and found[6, 1, "gather"].bytes == 4 * 2 * pixels * 224
    # dz in; what is read, what arrived before and what is sent, all of 224 channels
    assert found[6, 1, "data_gradient"].bytes == 4 * (pixels * (128 + 3 * 224) + 224 * 128)
    second = found[1, 3, "weight_gradient"]
    assert (second.widths, second.written) == ((128,), 32) and second.flops == 2 * pixels * 128 * 32 * 9
    assert found[1, 1, "statistics"].bytes == 4 * pixels * 128 and found[1, 3, "statistics"].bytes == 4 * pixels * 32
    assert found[1, 1, "norm_backward"].bytes == 3 * 4 * pixels * 128
    assert (3, 3, "convolution") not in found  # the same work as in layer 1
    assert first.fields.items() <= {"model": "thresholdnet_v1/stages.0", "layer": 6, "kernel": 1, "batch": 8,
                                    "image": 224, "dtype": "fp32", "operation": "convolution"}.items()  # fmt: skip


def test_counts_of_a_harmonic_layer():
    case = bench.Case("thresholdnet_v1/stages.3", 224, 8, "bf16", "train")
    found = {(op.layer, op.operation): op for op in layers.operations(case, every=True)}
    pixels = 8 * 14 * 14
    assert found[2, "convolution"].widths == (40, 328 - 40) and found[2, "convolution"].written == 68
    assert "gather" not in {name for layer, name in found if layer == 3}  # reads layer 2 alone
    gradient = found[4, "data_gradient"]  # of layer 4, which layers 5, 6, 8 read
    assert gradient.nodes == (5, 6, 8) and gradient.widths == (40, 68, 196) and gradient.written == 116
    assert gradient.flops == 2 * pixels * (40 + 68 + 196) * 116 * 9
    assert gradient.bytes == 2 * (pixels * (304 + 116) + 304 * 116 * 9)
    assert (16, "data_gradient") not in found  # nobody reads the last layer
    assert len(layers.operations(case)) < len(found)


def test_the_work_of_all_layers_is_the_work_of_the_block():
    for model in ("hardnet68/stages.1", "densenet121/stages.1", "densenet40/stages.1"):
        (stage,) = bench.stages.stages(bench.Case(model, 224, 2, "fp32", "train"))
        ops = [
            bench.Operation(model, stage, layer, kernel, "convolution", 224, 2, "fp32")
            for layer in range(1, stage.plan.num_layers + 1)
            for kernel in ((1, 3) if stage.plan.unit == "bottleneck" else (3,))
        ]
        assert stage.flops(2, train=False) == sum(op.flops for op in ops)
        assert stage.flops(2, train=True) == 3 * sum(op.flops for op in ops)


# ---------------------------------------------------------------- measuring

PEAK = bench.Peak(tflops=0.1, gbs=10.0, source="a test")


def test_rows_hold_rates_and_the_share_of_the_roofline():
    op = operation("bottleneck", "convolution", 3, 1, dtype="fp32")
    providers = ("eager", "eager_channels_last", "fused_native", "fused_triton")
    settings = bench.Settings(rounds=3, warmup=1)
    rows = {row["provider"]: row for row in bench.measure_operation(op, providers, settings, PEAK)}
    for name in providers[:3]:
        row = rows[name]
        assert op.fields.items() <= row.items() and row["runs"] == 3 and row["side"] == 4
        assert row["sources"] == [3, 5, 6] and (row["read"], row["written"]) == (14, 36)
        assert row["tflops"] == pytest.approx(op.flops / row["ms_median"] / 1e9)
        assert row["gbs"] == pytest.approx(op.bytes / row["ms_median"] / 1e6)
        assert row["bound_ms"] == pytest.approx(max(op.flops / 0.1e9, op.bytes / 10e6))
        assert row["roofline_share"] == pytest.approx(row["bound_ms"] / row["ms_median"])
        assert all(result["error"] <= result["bound"] for result in row["check"])
    assert set(rows["fused_native"]["ratios"]) == {"eager", "eager_channels_last"}
    if not torch.cuda.is_available():
        assert rows["fused_triton"]["reason"].startswith("backend triton cannot run here: ")
        assert "tflops" not in rows["fused_triton"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp64"])
def test_other_dtypes_pass_the_check(dtype, monkeypatch):
    monkeypatch.setattr(micro, "clock_for", lambda device, cold: ProcessorClock())  # warm caches: quicker
    for unit, name, layer, kernel in EVERY:
        op = operation(unit, name, layer, kernel, dtype=dtype)
        for row in bench.measure_operation(op, ("eager", "eager_channels_last", "fused_native"), ONCE, PEAK):
            assert row["ms_median"] is not None, (str(op), row["reason"])


VERBS = {
    "convolution": "conv", "data_gradient": "gradient", "weight_gradient": "weight_gradient", "statistics": "moments",
    "normalise": "normalise", "norm_backward": "linear",
}  # fmt: skip


@pytest.mark.parametrize("name", VERBS)
def test_a_wrong_operation_gets_no_time(name, monkeypatch):
    right = getattr(native.Verbs, VERBS[name])

    def wrong(*arguments, **named):
        made = right(*arguments, **named)
        first = made if isinstance(made, torch.Tensor) else made[0]
        first[(0,) * first.dim()] += 3 * first.abs().max()  # one element
        return made

    monkeypatch.setattr(native.Verbs, VERBS[name], wrong)
    op = operation("conv_bn_relu", name, dtype="fp32")
    plain, ours = bench.measure_operation(op, ("eager_channels_last", "fused_native"), ONCE, PEAK)
    assert plain["ms_median"] > 0 and ours["ms_median"] is None and "tflops" not in ours
    assert ours["reason"].startswith("wrong: result 1 of ")


@pytest.mark.parametrize("adds", [False, True])
def test_a_graph_is_checked_as_its_form_is(adds, monkeypatch):
    total = torch.zeros(3)

    def form():
        return [total.add_(1.0)] if adds else [torch.ones(3)]

    def right(form):
        made = form()
        return lambda: [out.copy_(new) for out, new in zip(made, form(), strict=True)], made

    for capture, reason in ((right, None), (lambda form: ((lambda: None), form()), "wrong: result 1 of the graph off")):
        total.zero_()
        monkeypatch.setattr(micro.graphs, "capture", capture)
        entry = Entry("fused_triton", graph=True)
        if reason is None:
            micro.admit(entry, form, [torch.ones(3)], [1e-6])
        else:
            with pytest.raises(Unavailable, match=reason):
                micro.admit(entry, form, [torch.ones(3)], [1e-6])
        assert (entry.step is None) == (reason is not None)


def test_triton_gathers_nothing(monkeypatch):
    monkeypatch.setattr(forms, "backends", lambda: {"triton": None})
    monkeypatch.setattr(forms, "refusal", lambda backend, x: None)
    (row,) = bench.measure_operation(operation("conv_bn_relu", "gather"), ["fused_triton"], ONCE, PEAK)
    assert row["reason"] == "backend triton reads links where they lie and gathers nothing"


def test_the_command_measures_draws_and_goes_on(tmp_path):
    file = tmp_path / "layers.json"
    arguments = ("bench", "--level", "layer", "--model", f"{TINY}/stages.1", "--rounds", 2,
                 "--warmup", 0, "--out", file)  # fmt: skip
    stdout, _ = run(*arguments)
    content = json.loads(file.read_text())
    assert content["rows"] == [] and content["peaks"]["fp32"]["gbs"] > 0 and content["peaks"]["fp32"]["tflops"] > 0
    timed = [row for row in content["layers"] if row["ms_median"] is not None]
    assert {row["operation"] for row in timed} == set(bench.OPERATIONS)
    assert {row["provider"] for row in timed} == {"eager", "eager_channels_last", "fused_native"}
    assert "### Operations of single layers" in stdout and "| data_gradient | fused_native | " in stdout
    assert "Roofline of fp32: " in stdout and "(measured: the faster of a product of 1024 x 1024 matr" in stdout
    before = file.read_text()
    run(*arguments)
    assert file.read_text() == before
    stdout, _ = run("bench", "--report", file)
    assert f"written: {tmp_path / 'layers.md'}, {tmp_path / 'layers-roofline.png'}" in stdout
    assert (tmp_path / "layers.md").read_text() in stdout and (tmp_path / "layers-roofline.png").stat().st_size > 10_000


# ---------------------------------------------------------------- the roofline


def test_peaks_of_known_cards():
    sxm = peaks.of_card("NVIDIA H100 80GB HBM3", "bf16", tf32=True)
    assert (sxm.tflops, sxm.gbs) == (989.4, 3350) and "data sheet of the H100" in sxm.source
    assert peaks.of_card("NVIDIA H100 PCIe", "fp16", True).gbs == 2000
    assert peaks.of_card("NVIDIA H200", "fp32", True).tflops == 494.7
    assert peaks.of_card("NVIDIA H200", "fp32", False).tflops == 66.9
    assert peaks.of_card("NVIDIA A100-SXM4-80GB", "bf16", True).gbs == 2039
    assert peaks.of_card("NVIDIA GeForce RTX 3090", "bf16", True) is None


def test_the_bound_is_the_slower_of_arithmetic_and_memory():
    assert PEAK.bound_ms(flops=2e9, bytes=1e6) == pytest.approx(20.0)
    assert PEAK.bound_ms(flops=1e6, bytes=1e8) == pytest.approx(10.0)


def test_peaks_are_measured_here():
    found = peaks.measured(CPU, "fp32", copied=2**22, side=128, images=(1, 16, 8))
    assert 0.1 < found.gbs < 10_000 and 1e-4 < found.tflops < 1000
    assert "product of 128 x 128 matrices" in found.source and found.source.endswith("; a copy of 4 MiB")


def test_floors_are_there_for_every_dtype():
    assert all(0 < floors["operation"] < floors["output"] for floors in check.FLOORS.values())
