"""Replayed calls against the same calls run: equal to the bit, whatever changed in between; and what isn't replayed."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from on_gpu import needs_gpu
from test_blocks import PATTERNS, UNITS
from tolerances import RELATIVE, largest_error
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from twins import pair

import thresholdnet as tn
from thresholdnet import ThresholdBlock, constants, engine, functional, packing, replay
from thresholdnet.backends import csrc, native
from thresholdnet.backends.winograd import use as use_winograd
from thresholdnet.replay.pooling import ALIGNMENT
from thresholdnet.replay.recording import Launch, Operation, Recording, tensors_in
from thresholdnet.replay.straight import BOUND

BACKENDS = [name for name, reason in tn.backends().items() if reason is None and name != "reference"]

Step = Callable[[], list[Tensor]]


@pytest.fixture(autouse=True)
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the third call on, in Triton's interpreter too."""
    monkeypatch.setenv("THRESHOLDNET_REPLAY", "1")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    return request.param


class Noting(TorchDispatchMode):
    """Tells of each of torch's operations what it made."""

    def __init__(self, note: Callable[[Any, Any], object]):
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.note(function, made)
        return made


@pytest.mark.skipif(csrc.reason() is not None, reason=f"needs the C++ library: {csrc.reason()}")
def test_descriptions_in_cpp_tell_the_same_apart() -> None:
    """As those in Python, of all lists of one and two tensors out of these."""
    room = torch.randn(2, 33, 4, 4)
    tensors = [
        room, room.double(), room.bfloat16(), room.contiguous(memory_format=torch.channels_last), room[:, :1],
        room[:, :32], room[0], room[1], room.view(-1)[1:67], room.view(-1)[4:70], room[:, :, ::2], room.mT,
        torch.randn(66, requires_grad=True), nn.Parameter(torch.randn(66)), torch.empty(0), torch.empty(0, 3),
        torch.ones(()), torch.ones(1), torch.randn(1, 33).expand(2, 33), torch.randn(31),
        torch.randn(32), torch.arange(66),
    ]  # fmt: skip
    lists = [[each] for each in tensors] + [[first, second] for first in tensors for second in tensors]
    python, cpp = ([describe(each) for each in lists] for describe in (replay.described, csrc.described))
    assert [shared for _, shared in cpp] == [shared for _, shared in python]
    pairs = {(key, text) for (key, _), (text, _) in zip(python, cpp, strict=True)}
    assert len(pairs) == len({key for key, _ in pairs}) == len({text for _, text in pairs}) > 300


def test_bindings_are_those_of_their_operators() -> None:
    for operator, binding in BOUND.items():
        assert binding.__name__ == operator._schema.name.removeprefix("aten::")


def recordings() -> list[Recording]:
    return [found for found in replay._known.values() if isinstance(found, Recording)]


def block_of(pattern: str, unit: str, backend: str, dtype: torch.dtype = torch.float32, **arguments: Any) -> Any:
    torch.manual_seed(0)
    block = ThresholdBlock(7, PATTERNS[pattern], 5, unit=unit, fused=True, backend=backend, dtype=dtype, **arguments)
    for module in block.modules():  # away from the identity that BatchNorm starts as
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return block


def trained(block: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, all gradients and buffers of one step; the block's own state but for its weights stays as it was."""
    buffers = [buffer.clone() for buffer in block.buffers()]
    block.zero_grad()
    own = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = block(own)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).reshape(y.shape))
    found = [y.detach(), own.grad, *(p.grad for p in block.parameters()), *(b.clone() for b in block.buffers())]
    for buffer, before in zip(block.buffers(), buffers, strict=True):
        buffer.copy_(before)
    return found


def assert_replays(step: Step, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times the step as without replay, and the last two from `calls` recordings alone."""
    monkeypatch.setenv("THRESHOLDNET_REPLAY", "0")
    expected = step()
    monkeypatch.setenv("THRESHOLDNET_REPLAY", "1")
    for time in range(4):
        if time == 2:  # what would run now is gone
            assert len(recordings()) == calls and len(replay._known) == calls
            for name in ("forward", "backward"):
                for unit in (engine.ConvBNReLU, engine.Bottleneck):
                    monkeypatch.setattr(unit, name, None)
        for ours, theirs in zip(step(), expected, strict=True):
            assert ours.stride() == theirs.stride() and torch.equal(ours, theirs), f"call {time + 1}"


@pytest.mark.parametrize("mode", ("train", "eval", "recompute"))
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_replays_are_equal_to_the_bit(pattern, unit, mode, backend, monkeypatch):
    if mode == "recompute" and unit != "bottleneck":
        pytest.skip("only bottleneck outputs are made again")
    if backend == "triton" and pattern != "custom":
        pytest.skip("minutes in Triton's interpreter, for the same kernels")
    block = block_of(pattern, unit, backend, recompute="bottleneck" if mode == "recompute" else None)
    block.train(mode != "eval")
    x = torch.randn(2, 7, 4, 3)
    assert_replays(lambda: trained(block, x), 2, monkeypatch)


class Cycle:
    """Something that only the collector of cycles lets go, and that counts it with an operation of torch's."""

    def __init__(self, gone: Tensor):
        self.gone, self.own = gone, self

    def __del__(self) -> None:
        self.gone.add_(1)


def test_what_a_finaliser_does_is_no_part_of_a_recording(monkeypatch):
    block, x, gone = block_of("harmonic", "conv_bn_relu", "native").eval(), torch.randn(2, 7, 4, 3), torch.zeros(())
    enter, made = native.Verbs.enter, []

    def leaving_a_cycle(verbs: Any, pixels: Tensor) -> Tensor:
        made.append(id(Cycle(gone)))
        return enter(verbs, pixels)

    def step() -> list[Tensor]:
        thresholds = gc.get_threshold()
        gc.set_threshold(1)  # collected at once
        try:
            with torch.no_grad():
                return [block(x)]
        finally:
            gc.set_threshold(*thresholds)

    monkeypatch.setattr(native.Verbs, "enter", leaving_a_cycle)
    assert_replays(step, 1, monkeypatch)
    gc.collect()
    assert float(gone) == len(made) == 3 and gc.isenabled()


@pytest.mark.parametrize("unit", UNITS)
def test_inference_without_gradients(unit, monkeypatch):
    block = block_of("custom", unit, "native").eval()
    x = torch.randn(2, 7, 4, 4)

    def step() -> list[Tensor]:
        with torch.inference_mode():
            made = block(x)
        assert made.is_inference()
        return [made]

    assert_replays(step, 1, monkeypatch)


@pytest.mark.parametrize("size", ((1, 1, 1), (1, 3, 1), (3, 2, 4)), ids=str)
def test_odd_sizes(size, backend, monkeypatch):
    block = block_of("custom", "bottleneck", backend)
    x = torch.randn(size[0], 7, *size[1:])
    assert_replays(lambda: trained(block.eval() if x.numel() == 7 else block, x), 2, monkeypatch)


def test_dropout_draws_anew():
    block = block_of("sparse_dense", "bottleneck", "native", drop_rate=0.5)
    x = torch.randn(2, 7, 4, 4)
    made = []
    for _ in range(4):
        torch.manual_seed(3)
        made.append(trained(block, x))
    assert recordings() and all(map(torch.equal, made[0], made[3]))
    assert not torch.equal(trained(block, x)[0], made[0][0])


def test_every_operator_replays(monkeypatch):
    _, model = pair("densenet")
    replay.forget()  # the conversion tried the model
    x = torch.randn(2, 5, 8, 8)
    sources = [torch.randn(2, c, 5, 6) for c in (3, 8)]
    weight = torch.randn(4, 11, 3, 3, requires_grad=True)

    def step() -> list[Tensor]:
        weight.grad = None
        y = functional.linked_conv2d(sources, weight, backend="native")
        y.sum().backward()
        return [y.detach(), weight.grad, *trained(model, x)]

    monkeypatch.setenv("THRESHOLDNET_REPLAY", "0")
    expected = step()
    monkeypatch.setenv("THRESHOLDNET_REPLAY", "1")
    for _ in range(4):
        assert all(map(torch.equal, step(), expected))
    operators = {function.__name__ for function, *_ in replay._known}
    assert operators == {"forward", "backward", "_transition_gradients", "_linked_forward", "_linked_gradients"}
    assert len(recordings()) == len(replay._known)


def test_values_are_read_anew(monkeypatch):
    """Weights, statistics and inputs are arguments: a recording holds none of them."""
    block = block_of("custom", "conv_bn_relu", "native")
    for _ in range(3):
        trained(block, torch.randn(2, 7, 4, 4))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(0.5)
    other = torch.randn(2, 7, 4, 4)
    ours = trained(block, other)
    monkeypatch.setenv("THRESHOLDNET_REPLAY", "0")
    assert all(map(torch.equal, ours, trained(block, other)))
    assert len(recordings()) == 2


def test_two_forward_passes_before_backward(monkeypatch):
    """Nothing is overwritten that a pending backward pass needs: memory is new at every call."""
    block = block_of("sparse_dense", "bottleneck", "native")
    inputs = [torch.randn(2, 7, 4, 4) for _ in range(3)]
    for x in inputs:
        trained(block, x)

    def step() -> list[Tensor]:
        block.zero_grad()
        outputs = [block(x) for x in inputs]
        for y, factor in zip(reversed(outputs), (1.0, 2.0, 3.0), strict=True):
            (y * factor).sum().backward()
        return [p.grad for p in block.parameters()]

    ours = step()
    monkeypatch.setenv("THRESHOLDNET_REPLAY", "0")
    assert all(map(torch.equal, ours, step()))


def test_memory_ends_with_its_last_use():
    """A replay keeps no more than what its caller keeps."""
    block = block_of("dense", "conv_bn_relu", "native").requires_grad_(False)
    x = torch.randn(2, 7, 4, 4)
    for _ in range(3):
        block(x)
    (recording,) = recordings()
    ended = [number for _, numbers in recording.steps for number in numbers]
    made = [number for step, _ in recording.steps for number in step.makes]
    assert len(set(ended)) == len(ended)
    # statistics and output are returned; all else ended, in the pool or by itself
    returned = 1 + len(PATTERNS["dense"])
    assert len(made) - len(ended) == returned
    y = block(x)
    gone = weakref.ref(y.untyped_storage())
    del y
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("change", ("strides", "shape", "dtype", "alignment", "frozen", "aliases"))
def test_another_kind_is_recorded_for_itself(change, monkeypatch):
    block = block_of("sparse_dense", "conv_bn_relu", "native")
    x = torch.randn(2, 7, 4, 4)
    for _ in range(3):
        trained(block, x)
    before = len(replay._known)
    if change == "strides":
        x = x.to(memory_format=torch.channels_last)
    elif change == "shape":
        x = torch.randn(2, 7, 4, 6)
    elif change == "dtype":
        block, x = block.double(), x.double()
    elif change == "frozen":
        next(block.parameters()).requires_grad_(False)
    else:
        taken = next(p for p in block.parameters() if p.dim() == 1)  # of Triton's pointers, 16-byte aligned so far
        room = torch.empty(len(taken) + 4)
        odd = nn.Parameter(room[1 if change == "alignment" else 4 :][: len(taken)].copy_(taken.detach()))
        owner = next(m for m in block.modules() if any(p is taken for p in m.parameters(recurse=False)))
        owner.weight = odd
        if change == "aliases":
            owner.bias = odd
    frozen = [p for p in block.parameters() if not p.requires_grad]

    def step() -> list[Tensor]:
        made = trained(block, x)
        return [tensor for tensor in made if tensor is not None]

    monkeypatch.setenv("THRESHOLDNET_REPLAY", "0")
    expected = step()
    monkeypatch.setenv("THRESHOLDNET_REPLAY", "1")
    for _ in range(4):
        assert all(map(torch.equal, step(), expected))
    assert len(replay._known) > before and len(frozen) == (change == "frozen")


def test_autocast_is_part_of_the_kind():
    block = block_of("sparse_dense", "conv_bn_relu", "native")
    x = torch.randn(2, 7, 4, 4)
    for _ in range(3):
        assert block(x).dtype == torch.float32
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            assert block(x).dtype == torch.bfloat16
    assert block(x).dtype == torch.float32


def test_switched_off(monkeypatch):
    monkeypatch.setenv("THRESHOLDNET_REPLAY", "0")
    for _ in range(4):
        trained(block_of("dense", "conv_bn_relu", "native"), torch.randn(1, 7, 3, 3))
    monkeypatch.delenv("THRESHOLDNET_REPLAY")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which is there to see kernels run
    for _ in range(4):
        trained(block_of("dense", "conv_bn_relu", "native"), torch.randn(1, 7, 3, 3))
    assert not replay._known


def test_recording_imports_no_compiler():
    """Which would take a second of the first call that is recorded, and memory ever after."""
    code = """
import sys, torch, thresholdnet as tn
from thresholdnet import replay
from thresholdnet.replay.recording import Recording
block = tn.ThresholdBlock(8, tn.links.dense(3), 4, fused=True, backend="native")
x = torch.randn(2, 8, 6, 6)
for _ in range(3):
    block(x).sum().backward()
tn.prepack(block.eval())
with torch.no_grad():
    for _ in range(4):
        block(x)
print(sum(isinstance(found, Recording) for found in replay._known.values()), "torch._dynamo" in sys.modules)
"""
    environment = os.environ | {"THRESHOLDNET_REPLAY": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "False"]


def test_a_cpu_waits_for_the_tenth_call(monkeypatch):
    monkeypatch.delenv("THRESHOLDNET_REPLAY")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    block, x = block_of("dense", "bottleneck", "native").eval(), torch.randn(1, 7, 3, 3)
    with torch.no_grad():
        expected = block(x)
        for number in range(2, 10):
            assert torch.equal(block(x), expected) and [*replay._known.values()] == [number]
        block(x)
        assert len(recordings()) == 1
        monkeypatch.setattr(engine.Bottleneck, "forward", None)
        assert torch.equal(block(x), expected)


def test_fake_tensors_are_not_replayed():
    block = block_of("dense", "conv_bn_relu", "native").to("meta")
    for _ in range(3):
        assert block(torch.empty(2, 7, 3, 3, device="meta")).shape[0] == 2
    assert not replay._known


def forms_in(forms: packing.Forms) -> list[Tensor]:
    return list(tensors_in([made for _, made in forms._made.values()]))


@pytest.mark.parametrize("winograd", (False, True))
@pytest.mark.parametrize("unit", UNITS)
def test_packed_weights(unit, winograd, monkeypatch):
    """A recording asks for them at every replay, whichever block of its kind they belong to, and holds none."""
    use_winograd(winograd)
    try:
        first, second = (tn.prepack(block_of("sparse_dense", unit, "native").eval()) for _ in range(2))
        x, made = torch.randn(2, 7, 20, 20), []
        with torch.no_grad():
            next(second.parameters()).mul_(2)
            monkeypatch.setenv("THRESHOLDNET_REPLAY", "0")
            expected = [block(x) for block in (first, second)]
            monkeypatch.setenv("THRESHOLDNET_REPLAY", "1")
            for block, wanted in zip(
                (first, first, first, second, first), (*expected[:1] * 3, *expected[::-1]), strict=True
            ):
                assert torch.equal(block(x), wanted)
            (recording,) = recordings()
            assert recording.late
            for parameter in (*first.parameters(), *(b for b in first.buffers() if b.is_floating_point())):
                parameter.add_(0.5)
                for _ in range(2):  # it is packed again, and then replayed
                    made.append(first(x))
                    assert torch.equal(made[-1], tn.prepack(copy.deepcopy(first))(x))
            assert not torch.equal(made[-1], expected[0])
            assert torch.equal(second(x), expected[1])
            tn.prepack(first, False)
            assert largest_error(first(x), made[-1]) <= RELATIVE[torch.float32]
            gone = [weakref.ref(parameter) for parameter in second.parameters()]
            gone += [weakref.ref(tensor) for forms in packing._declared.values() for tensor in forms_in(forms)]
            assert len(gone) > len(list(second.parameters()))
            del second, block
            gc.collect()
            assert recordings() and not any(reference() is not None for reference in gone)
    finally:
        use_winograd(False)


def test_the_last_used_kinds_are_kept(monkeypatch):
    monkeypatch.setattr(replay, "MOST", 3)
    block = block_of("dense", "conv_bn_relu", "native").requires_grad_(False)
    inputs = [torch.randn(1, 7, 3, width) for width in (2, 3, 4, 5, 6)]
    expected = [block(x) for x in inputs]
    for _ in range(4):
        assert all(torch.equal(block(x), y) for x, y in zip(inputs, expected, strict=True))
        assert len(replay._known) == 3
    for _ in range(3):
        block(inputs[0])
    assert len(recordings()) == 1


def test_threads_share_recordings():
    block = block_of("threshold_ab", "bottleneck", "native").eval().requires_grad_(False)
    inputs = [torch.randn(1, 7, 5, 5) for _ in range(4)]
    expected = [block(x) for x in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            if not torch.equal(block(inputs[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(recordings()) == 1


class TestFunctions:
    """`replay.call` with functions made for one thing each."""

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        return [replay.call(function, *arguments) for _ in range(4)]

    def test_a_tensor_from_elsewhere_is_refused(self):
        elsewhere = [torch.ones(3)]

        def function(x: Tensor) -> Tensor:
            return x + elsewhere[0]

        self.run(function, torch.zeros(3))
        elsewhere[0] = torch.full((3,), 7.0)
        assert torch.equal(replay.call(function, torch.zeros(3)), elsewhere[0])
        assert list(replay._known.values()) == ["a tensor from elsewhere, torch.float32 (3,)"]

    def test_a_value_read_by_the_host_is_refused(self):
        def function(x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0 else x * 3

        assert [made.item() for made in self.run(function, torch.ones(1))] == [2.0] * 4
        assert replay.call(function, -torch.ones(1)).item() == -3.0
        (reason,) = replay._known.values()
        assert isinstance(reason, str) and reason.endswith(", whose result is no tensor")

    def test_constants_are_kept_and_noted_for_graphs(self):
        @constants.device_constant(maxsize=1)
        def table(number: int) -> tuple[Tensor, int]:
            return torch.full((3,), float(number)), number

        def function(x: Tensor, number: int) -> Tensor:
            return x + table(number)[0][1:]

        x = torch.zeros(2)
        assert all(torch.equal(made, torch.full((2,), 5.0)) for made in self.run(function, x, 5))
        table(6)  # the other one falls out of its cache
        with constants.holding() as held:
            assert torch.equal(replay.call(function, x, 5), torch.full((2,), 5.0))
        assert len(recordings()) == 1
        assert any(isinstance(kept, tuple) and kept[1] == 5 for kept in held.values())

    def test_an_error_leaves_nothing_behind(self):
        fails = [False]

        def function(x: Tensor) -> Tensor:
            made = torch.empty_like(x)
            if fails[0]:
                raise RuntimeError("out of memory, say")
            return made.copy_(x)

        replay.call(function, torch.ones(2))
        fails[0] = True
        with pytest.raises(RuntimeError, match="out of memory, say"):
            replay.call(function, torch.ones(2))
        fails[0] = False
        for _ in range(3):
            assert torch.equal(replay.call(function, torch.ones(2)), torch.ones(2))
        assert len(recordings()) == 1
        with pytest.raises(TypeError):  # what the first call says
            replay.call(lambda x: x + "", torch.ones(2))

    def test_subclasses_run(self):
        class Own(Tensor):
            pass

        self.run(lambda x: x + 1, torch.ones(2).as_subclass(Own))
        assert not replay._known

    def test_what_nothing_needs_is_left_out(self):
        def function(x: Tensor) -> Tensor:
            torch.empty(100), x.exp()
            return x.mul(2)

        self.run(function, torch.ones(3))
        (recording,) = recordings()
        assert [str(step.function) for step, _ in recording.steps] == ["aten.mul.Tensor"]

    def test_small_memories_share_places(self):
        """Each is written in full and read once, the next one takes its place; two at a time do not meet."""

        def function(x: Tensor) -> Tensor:
            total = torch.zeros_like(x)
            for i in range(20):
                a, b = torch.empty(1000), torch.empty(30, dtype=torch.float64)
                a.fill_(i)
                b.copy_(a[:30]).mul_(2)
                total.add_(a[:30]).add_(b)
            return total

        for made in self.run(function, torch.zeros(30)):
            assert torch.equal(made, torch.full((30,), 3.0 * sum(range(20))))
        (recording,) = recordings()
        large, small = (-(-size // ALIGNMENT) * ALIGNMENT for size in (4000, 240))
        assert recording.pool.size == large + small

    def test_views_of_inputs_and_results(self):
        def function(x: Tensor, parts: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            room = torch.empty(2, 4)
            room[0].copy_(x[1:5])
            room[1].copy_(parts[1].t()[0])
            return room[:, 1:3], [room.sum(0)]

        x, parts = torch.arange(9.0), [torch.zeros(1), torch.arange(8.0).reshape(4, 2)]
        for view, (total,) in self.run(function, x[1:], parts):
            assert view.tolist() == [[3.0, 4.0], [2.0, 4.0]] and total.tolist() == [2.0, 5.0, 8.0, 11.0]
        moved = torch.arange(20.0)[11:]  # its memory begins elsewhere, which is no other kind
        view, _ = replay.call(function, moved[1:], parts)
        assert view.tolist() == [[14.0, 15.0], [2.0, 4.0]] and len(recordings()) == 1

    def test_memories_end_with_their_last_reader(self):
        """So do the views of them, which are made once for all who read them."""
        made: dict[str, Any] = {}
        alive: dict[str, set[str]] = {}

        def note(operation: Any, result: Any) -> None:
            name = operation.overloadpacket.__name__
            alive[name] = {name for name, each in made.items() if each() is not None}
            made[name] = weakref.ref(next(tensors_in(result)))

        def function(x: Tensor) -> list[Tensor]:
            large = torch.empty(1 << 19).copy_(x)
            first, _ = torch.aminmax(large[1:])
            second = large[1:].exp()
            del large
            values, order = second.sort()
            return [first, values, order.sum(0, keepdim=True).to(torch.float64)]

        x = torch.linspace(0, 1, 1 << 19)
        expected = function(x)
        for found in self.run(function, x):
            assert all(map(torch.equal, found, expected))
        with Noting(note):
            assert all(map(torch.equal, replay.call(function, x), expected))
        assert alive["aminmax"] >= {"empty_strided", "as_strided"} and alive["exp"] >= {"as_strided", "aminmax"}
        assert alive["sort"] & {"empty_strided", "as_strided", "exp"} == {"exp"} and "exp" not in alive["sum"]

    def test_numbers_of_all_kinds(self):
        """Some of which code cannot spell."""

        def function(x: Tensor, numbers: list[float]) -> list[Tensor]:
            made = [torch.clamp(x, *numbers[:2]), x * numbers[2], torch.full_like(x, numbers[3], dtype=torch.complex64)]
            return [*made, x.to(torch.float16, memory_format=torch.preserve_format), x.sum(()), x.sum(dim=(0, 1))]

        x, numbers = torch.randn(2, 3), [-float("inf"), 1e-300, float("nan"), 2.5]
        for found in self.run(function, x, numbers):
            for ours, theirs in zip(found, function(x, numbers), strict=True):
                assert ours.dtype == theirs.dtype and torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7))
        assert len(recordings()) == 1

    def test_two_inputs_in_one_memory(self):
        """How inputs lie to each other is part of the kind: written through one, read through the other."""

        def function(x: Tensor, y: Tensor) -> Tensor:
            x.add_(1)
            return y * 1

        room = torch.zeros(6)
        for i in range(4):
            assert replay.call(function, room[:4], room[2:]).tolist() == [i + 1.0, i + 1.0, 0.0, 0.0]
        assert replay.call(function, torch.zeros(4), torch.zeros(4)).tolist() == [0.0] * 4
        assert replay.call(function, torch.zeros(6)[:4], torch.zeros(6)[2:]).tolist() == [0.0] * 4

    def test_a_call_within_a_recorded_one_is_part_of_it(self):
        def inner(x: Tensor) -> Tensor:
            return x * 2

        self.run(inner, torch.ones(2))

        def outer(x: Tensor) -> Tensor:
            return replay.call(inner, x) + 1

        assert all(made.tolist() == [3.0, 3.0] for made in self.run(outer, torch.ones(2)))
        assert all(isinstance(step, Operation) for found in recordings() for step, _ in found.steps)


class Kernel:
    """A Triton kernel whose launcher notes what it is handed."""

    arg_names = ("out", "x", "weights", "rows", "FLAG", "TILE", "PDL")
    params = (
        SimpleNamespace(name="x", has_default=False),
        SimpleNamespace(name="PDL", has_default=True, default=False),
    )

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return lambda *arguments, num_warps, **constants: Compiled(self)


class Compiled:
    """What a launch returns, and what starts it again."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *values, stream: self.kernel.launched.append((grid, values, stream))


def test_compiled_kernels_take_addresses():
    kernel = Kernel()
    made: list[list[int]] = []

    def function(x: Tensor, weights: list[Tensor]) -> Tensor:
        out = torch.empty(4)
        for rows in (1, 16):
            parts = (*weights, x[2:])
            replay.start(kernel, (3,), out[1:], x, parts, rows, TILE=16, FLAG=True, num_warps=4)
            made.append([t.data_ptr() for t in (out[1:], x, *parts)])
        return out

    weights = [torch.ones(2), torch.ones(5)[1:]]
    for _ in range(2):
        replay.call(function, torch.zeros(9), weights)
    assert not kernel.launched and len(made) == 4
    x, others = torch.zeros(9), [torch.zeros(2), torch.zeros(5)[1:]]
    out = replay.call(function, x, others)
    assert len(made) == 4 and len(kernel.launched) == 2
    for (grid, values, stream), rows in zip(kernel.launched, (1, 16), strict=True):
        weights_at = (others[0].data_ptr(), others[1].data_ptr(), x.data_ptr() + 8)
        assert grid == (3, 1, 1) and stream == 0
        assert values == (out.data_ptr() + 4, x.data_ptr(), weights_at, rows, True, 16, False)
        assert [type(value) for value in values[3:]] == [int, bool, int, bool]
    (recording,) = recordings()
    assert all(isinstance(step, Launch) for step, _ in recording.steps[1:])


@needs_gpu
@pytest.mark.parametrize("backend", ("triton", "native"))
@pytest.mark.parametrize("unit", UNITS)
def test_on_a_gpu(unit, backend, monkeypatch):
    block = block_of("threshold_ab", unit, backend, torch.bfloat16).cuda()
    x = torch.randn(4, 7, 12, 10, dtype=torch.bfloat16, device="cuda")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # "native" may convolve by torch's library
    assert_replays(lambda: trained(block, x), 2, monkeypatch)
