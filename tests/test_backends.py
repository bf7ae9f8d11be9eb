"""The choice of a backend: reasons, choices by name, the fallback of "auto", and what libraries say of themselves."""

import copy
import importlib.util
import itertools
import sys
import warnings

import pytest
import torch
from tolerances import assert_close
from torch._subclasses.fake_tensor import FakeTensorMode

import thresholdnet as tn
from thresholdnet import ThresholdBlock, links
from thresholdnet.backends import libraries, native
from thresholdnet.plan import UNITS

backends = sys.modules["thresholdnet.backends"]  # tn.backends is the function of the same name


@pytest.fixture
def nothing_told(monkeypatch):
    """As in a fresh process: no cause of a fallback was told yet."""
    monkeypatch.setattr(backends, "_told", set())


@pytest.fixture
def narrow(monkeypatch, nothing_told):
    """Engines that take float32 alone."""
    monkeypatch.setattr(backends, "DTYPES", (torch.float32,))


def _sentence(text):
    return isinstance(text, str) and len(text) > 10 and "\n" not in text


def test_every_backend_is_usable_or_says_why():
    found = tn.backends()
    assert list(found) == ["triton", "native", "reference"]
    assert all(reason is None or _sentence(reason) for reason in found.values())
    assert found["native"] is None and found["reference"] is None
    details = backends.details()
    assert list(details) == [name for name in found if found[name] is None]
    assert all(map(_sentence, details.values()))
    assert ("C++ (" in details["native"]) == (backends.csrc.reason() is None)


def test_native_without_its_library_says_so(monkeypatch):
    monkeypatch.setattr(backends.csrc, "reason", lambda: "THRESHOLDNET_CSRC=0 is set")
    assert tn.backends()["native"] is None
    assert "torch operations (THRESHOLDNET_CSRC=0 is set)" in backends.details()["native"]


def test_reasons_of_triton(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert tn.backends()["triton"].startswith("triton is not installed")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in tn.backends()["triton"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(6, 1), (7, 5)][device])
    assert "8.0 or newer, got 7.5" in tn.backends()["triton"]
    with pytest.raises(RuntimeError, match=r"backend 'triton' cannot run here: .*got 7\.5"):
        backends.choose("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(6, 1), (9, 0)][device])
    assert tn.backends()["triton"] is None
    assert "on a GPU, got cpu" in backends.refusal("triton", torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.refusal("triton", torch.zeros(1)) is None
    assert "in its interpreter, got meta" in backends.refusal("triton", torch.zeros(1, device="meta"))


def test_choices():
    assert backends.choose() == backends.choose("auto") == "native"
    assert backends.choose("reference", torch.zeros(1).to_sparse()) == "reference"
    with pytest.raises(ValueError, match="did you mean native"):
        backends.choose("nativ")


def test_auto_takes_triton_where_a_gpu_has_measured_it(monkeypatch):
    monkeypatch.setattr(backends, "_reason", lambda name: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def chosen(device, dtype):
        with FakeTensorMode(allow_non_fake_inputs=True):
            return backends.choose("auto", torch.empty(2, 8, 4, 4, device=device, dtype=dtype))

    assert [chosen("cuda", dtype) for dtype in (torch.bfloat16, torch.float16)] == ["triton"] * 2
    assert chosen("cuda", torch.float32) == chosen("cpu", torch.bfloat16) == "native"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert chosen("cpu", torch.bfloat16) == "native"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_auto_leaves_to_native_what_tritons_offsets_cannot_hold(monkeypatch):
    """A block's allocation of 2^31 elements or more, and more tiles than a grid takes: on a GPU, in half formats."""
    monkeypatch.setattr(backends, "_reason", lambda name: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(32, 8, 256, 256, device="cuda", dtype=torch.bfloat16)  # 2^21 pixels
        assert backends.choose("auto", x, 1023) == "triton"
        assert backends.choose("auto", x, 1024) == "native"
        assert backends.choose("triton", x, 1024) == "triton"  # by name it says what is too large
        assert backends.choose("auto", torch.empty(2**16 - 1, 8, 8, 8, device="cuda", dtype=x.dtype)) == "triton"
        assert backends.choose("auto", torch.empty(2**16, 8, 8, 8, device="cuda", dtype=x.dtype)) == "native"
        sources = [x, x[:, :3]]
        seen = []
        monkeypatch.setattr(backends, "candidates", lambda choice: ("triton", "native"))
        monkeypatch.setattr(tn.functional, "choose", lambda *given: seen.append(given[2]) or "reference")
        tn.functional.linked_conv2d(sources, x.new_empty(40, 11, 1, 1))
    assert seen == [64]  # 8, 8 and 40 channels, in whole sectors


@pytest.mark.parametrize(("unit", "row"), (("conv_bn_relu", 48), ("bottleneck", 96)))
def test_blocks_tell_their_widest_row(unit, row, monkeypatch):
    """Nodes of 7 + 12 + 12 channels in slots of 8, or two bottlenecks of 48."""
    block = ThresholdBlock(7, links.dense(2), 12, unit=unit, fused=True)
    seen = []
    monkeypatch.setattr("thresholdnet.linked.pick", lambda names, choice, x, row: seen.append(row) or "reference")
    block(torch.randn(2, 7, 4, 4))
    assert seen == [row]


@pytest.mark.parametrize(
    ("x", "came"),
    [
        (torch.zeros(1).to_sparse(), "takes strided tensors, got layout torch.sparse_coo"),
        (torch.zeros(1).to(torch.float8_e4m3fn), "got torch.float8_e4m3fn"),
    ],
)
def test_inputs_that_no_engine_takes(x, came, nothing_told):
    assert came in backends.refusal("native", x)
    with pytest.raises(RuntimeError, match=f"backend 'native' cannot run here: it .*{came}"):
        backends.choose("native", x)
    with pytest.warns(RuntimeWarning, match=f"fused=True falls back to the plain modules: native .*{came}"):
        assert backends.choose("auto", x) == "reference"


def test_auto_falls_back_once_a_cause_aloud(narrow):
    plain = ThresholdBlock(4, links.threshold_ab(4, 2), 4, dtype=torch.float64)
    fused = copy.deepcopy(plain).fuse(True, "auto")
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="native takes .*, got torch.float64") as caught:
        assert torch.equal(fused(x), plain(x))
    assert len(caught) == 1 and fused.backend == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused(x)  # the cause was told
        fused.float()(x.float())
        assert fused.backend == "native"  # what a block falls back to for one input does not stay
    with pytest.warns(RuntimeWarning, match="got torch.bfloat16"):  # another cause
        fused.bfloat16()(x.bfloat16())


def test_a_choice_by_name_never_falls_back(narrow):
    block = ThresholdBlock(4, links.dense(2), 4, dtype=torch.float64, fused=True, backend="native")
    with pytest.raises(RuntimeError, match=r"backend 'native' cannot run here: it takes .*, got torch\.float64"):
        block(torch.randn(2, 4, 5, 5, dtype=torch.float64))


def test_a_function_falls_back_too(narrow):
    sources = [torch.randn(1, 2, 4, 4, dtype=torch.float64) for _ in range(2)]
    weight = torch.randn(3, 4, 3, 3, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="falls back"):
        y = tn.functional.linked_conv2d(sources, weight)
    assert torch.equal(y, torch.nn.functional.conv2d(torch.cat(sources, 1), weight, padding=1))


def test_the_fallback_compiles(narrow):
    block = ThresholdBlock(4, links.dense(2), 4, dtype=torch.float64, fused=True)
    compiled = torch.compile(copy.deepcopy(block), backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="falls back"):
        y = compiled(x)
    torch.testing.assert_close(y, block(x))


def test_a_library_for_another_torch_explains_itself(tmp_path, monkeypatch):
    record = b"thresholdnet build record\ntorch 9.9.9+cu999\ncompiler g++ 1.0\nflags -O3 -g0\n\0"
    (tmp_path / "_csrc.abi3.so").write_bytes(b"no library" + record + b"at all")
    (tmp_path / "_csrc_cuda.missing").write_text("nvcc was not found\n")
    monkeypatch.setattr(libraries, "_PACKAGE", tmp_path)
    load = libraries.load.__wrapped__
    assert libraries.record("_csrc") == {"torch": "9.9.9+cu999", "compiler": "g++ 1.0", "flags": "-O3 -g0"}
    reason = load("_csrc")
    assert _sentence(reason)
    assert reason.startswith(
        f"_csrc.abi3.so, built against torch 9.9.9+cu999, does not load in torch {torch.__version__}"
    )
    assert load("_csrc_cuda") == "it was not built: nvcc was not found"
    assert libraries.record("_csrc_cuda") == {}
    (tmp_path / "_csrc_cuda.missing").unlink()
    assert load("_csrc_cuda") == "it was not built: thresholdnet is not installed"


def test_the_library_here_has_its_record():
    if libraries.file_of("_csrc") is None:
        pytest.skip(f"no library: {libraries.load('_csrc')}")
    record = libraries.record("_csrc")
    assert {"torch", "compiler", "flags"} <= record.keys()
    assert record["torch"][0].isdigit() and "-O3" in record["flags"]


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_data_gradient_lies_in_channels_last_order(kernel):
    """One channel or one pixel is in both orders: the library may then answer in the other, which C++ refuses."""
    torch.manual_seed(0)
    for batch, read, wrote, height, width in itertools.product((1, 2), (1, 2, 40), (1, 3), (1, 5), (1, 2, 4)):
        weight, dz = torch.randn(wrote, read, kernel, kernel), torch.randn(batch, wrote, height, width)
        g = native.Verbs(None, dz)._data_gradient(dz.contiguous(memory_format=torch.channels_last), weight)
        assert g.is_contiguous(memory_format=torch.channels_last), (g.shape, g.stride())
        wanted = torch.nn.functional.conv_transpose2d(dz.double(), weight.double(), padding=kernel // 2)
        assert_close(g, wanted, torch.float32)


def test_where_all_can_run(monkeypatch):
    """Triton comes first, for blocks of every unit."""
    monkeypatch.setattr(backends, "_reason", lambda name: None)
    monkeypatch.setattr(backends, "_interpreted", lambda: False)
    assert backends.candidates("auto") == ("triton", "native")
    for unit in UNITS:
        block = ThresholdBlock(4, links.dense(2), 4, unit=unit).fuse(True)
        assert block._candidates == ("triton", "native")
        assert block.fuse(True, "triton")._candidates == ("triton",)
