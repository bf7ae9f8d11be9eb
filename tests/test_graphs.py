"""CUDA graphs: what is refused, what a capture leaves alone, when the model itself runs; on a GPU, the results too.

Without a GPU an imitation stands in for the capture: one static input, one static output, gradients in static memory
that every backward pass overwrites, as torch.cuda.make_graphed_callables has them.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from on_gpu import needs_gpu
from test_blocks import UNITS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import thresholdnet as tn
from thresholdnet import constants, engine, graphs
from thresholdnet.backends import engine_for
from thresholdnet.train import TrainConfig, classifier, train
from thresholdnet.train import run as run_module


def imitated(model: nn.Module, own: torch.Tensor) -> graphs.Call:
    """What a capture does to a model, and a call that reads and writes memory of its own, without a GPU."""
    for _ in range(graphs.WARMUP):
        model(own)
    if not model.training:
        out = torch.empty_like(model(own))
        return lambda x: out.copy_(model(own.copy_(x)).detach())
    parameters = list(model.parameters())
    shape = model(own)
    out, grads = torch.empty_like(shape), [torch.empty_like(p) for p in parameters]

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
            own.copy_(x)
            with torch.enable_grad():
                ctx.made = model(own)
            out.copy_(ctx.made.detach())
            return out.detach()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            for static, found in zip(grads, torch.autograd.grad(ctx.made, parameters, grad), strict=True):
                static.copy_(found)
            return (None, *(static.detach() for static in grads))

    return lambda x: Replay.apply(x, *parameters)


def imitation(model: nn.Module, sample: torch.Tensor) -> graphs.Graphed:
    graphs.check_model(model)
    return graphs.Graphed(model, sample, imitated)


def small(momentum: float | None = 0.1, drop: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    links = tn.links.threshold_ab(3, 2)
    block = tn.ThresholdBlock(
        8, links, growth_rate=4, unit="bottleneck", norm_momentum=momentum, drop_rate=drop, fused=True
    )
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(block.out_channels, 5))
    return nn.Sequential(stem, block, head)


def steps(model: nn.Module, call: nn.Module, batches: list[torch.Tensor], each: int = 1) -> list[torch.Tensor]:
    """Losses of SGD steps, one after `each` batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for i, x in enumerate(batches, start=1):
        torch.manual_seed(i)
        loss = call(x).square().mean()
        loss.backward()
        losses.append(loss.detach())
        if i % each == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def batches(count: int = 4, device: str = "cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 6, 6, generator=generator).to(device) for _ in range(count)]


def same_state(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, w) for v, w in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_what_cannot_be_captured_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 6, 6)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        tn.graphed(3, x)
    with pytest.raises(TypeError, match=r"sample must be a torch.Tensor, got list"):
        tn.graphed(small(), [1])
    hooks = small()
    hooks[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"model must have no hooks, which a graph does not call, got some on '1'"):
        tn.graphed(hooks, x)
    averaging = small()
    averaging[0][1].momentum = None
    with pytest.raises(ValueError, match=r"momentum of a BatchNorm outside fused blocks .* got None at '0.1'"):
        tn.graphed(averaging, x)
    graphs.check_model(averaging.eval())  # nothing is counted there
    graphs.check_model(small(momentum=None))  # the fused block's own bookkeeping stays on the device
    with pytest.raises(ValueError, match="outside fused blocks"):
        graphs.check_model(tn.to_reference(small(momentum=None)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="graphed needs a CUDA device, got none: torch sees no GPU here"):
        tn.graphed(small(), x)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="model and sample must lie on one CUDA device, got cpu"):
        tn.graphed(small(), x)
    with pytest.raises(RuntimeError, match="model and sample must lie on one CUDA device, got cpu, meta"):
        tn.graphed(small(), x.to("meta"))


def test_a_failed_capture_leaves_the_model_and_says_which() -> None:
    model = small()
    before = copy.deepcopy(model)

    def make(model: nn.Module, own: torch.Tensor) -> graphs.Call:
        model(own)
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    with pytest.raises(RuntimeError, match=r"^graphed could not capture Sequential: operation not permitted [a-z ]*$"):
        graphs.Graphed(model, batches(1)[0], lambda m, own: graphs._made(make, m, own))
    assert same_state(model, before)
    with pytest.raises(TypeError, match="model must return one tensor to be graphed, got list"):
        graphs._one_tensor([1])


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_a_capture_changes_nothing_and_steps_are_the_models(momentum: float | None, drop: float) -> None:
    model, data = small(momentum, drop), batches()
    plain, sample = copy.deepcopy(model), batches(1)[0]
    state, kept = torch.get_rng_state(), sample.clone()
    fast = imitation(model, sample)
    assert same_state(model, plain) and torch.equal(torch.get_rng_state(), state)
    assert [id(p) for p in fast.parameters()] == [id(p) for p in model.parameters()]
    assert fast.state_dict().keys() == {f"model.{key}" for key in model.state_dict()}
    assert all(p.grad is None for p in model.parameters())
    wanted = steps(plain, plain, data)
    assert torch.equal(torch.stack(steps(model, fast, data)), torch.stack(wanted)) and fast.ran == "graph"
    assert same_state(model, plain) and torch.equal(sample, kept)
    assert int(model[0][1].num_batches_tracked) == len(data)


def test_gradients_accumulate() -> None:
    """The graph's backward overwrites its memory, which .grad may be."""
    model, data = small(), batches(6)
    plain = copy.deepcopy(model)
    wanted = steps(plain, plain, data, each=3)
    assert torch.equal(torch.stack(steps(model, imitation(model, data[0]), data, each=3)), torch.stack(wanted))
    assert same_state(model, plain)


def test_what_a_graph_does_not_fit_runs_the_model() -> None:
    model = small()
    x = batches(1)[0]
    fast = imitation(model, x)

    def ran(x: torch.Tensor = x) -> str:
        assert fast(x).shape[0] == x.shape[0]
        return fast.ran

    assert fast.ran == "" and ran() == "graph"
    assert ran(x[:3]) == "model" and ran(x.contiguous(memory_format=torch.channels_last)) == "graph"
    wanting = x.clone().requires_grad_()
    fast(wanting).sum().backward()
    assert fast.ran == "model" and wanting.grad is not None
    with torch.no_grad():
        assert ran(wanting) == "graph"
    with torch.autocast("cpu", torch.bfloat16):
        assert ran() == "model"
    model[0][1].eval()
    assert ran() == "model" and not model[0][1].training and model[1].training
    model.train()
    assert ran() == "graph"
    model[2][2].weight.requires_grad_(False)
    assert ran() == "model"
    model[2][2].weight.requires_grad_()
    fast.eval()
    assert not model.training and ran() == "model"
    fast.train()
    with torch.no_grad():
        kept = model[2][2].weight.data
        model[2][2].weight.data = kept.clone()  # new memory, which the graph does not know
        assert ran() == "model"
        model[2][2].weight.data = kept
        assert ran() == "graph"
    own = model[2][2].weight
    model[2][2].weight = torch.nn.Parameter(own.detach().clone())  # another parameter
    assert ran() == "model"
    model[2][2].weight = own
    assert ran() == "graph"
    head = model[2][2]
    model[2][2] = copy.deepcopy(head)  # another module
    assert ran() == "model"
    model[2][2] = head
    assert ran() == "graph"
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)  # other parameters, too
    assert ran() == "model"


def test_a_module_in_a_mode_of_its_own_stays_in_it() -> None:
    model = small()
    model[0].eval()
    fast = imitation(model, batches(1)[0])
    assert fast.training and not model[0].training and not model[0][1].training and model[1].training


def test_results_of_inference_are_not_overwritten() -> None:
    model, data = small().eval(), batches(3)
    fast = imitation(model, data[0])
    with torch.no_grad():
        found = [fast(x) for x in data]
        assert fast.ran == "graph" and all(torch.equal(y, model(x)) for y, x in zip(found, data, strict=True))


def test_autocast_is_captured_without_its_cache() -> None:
    seen = []

    def make(model: nn.Module, own: torch.Tensor) -> graphs.Call:
        seen.append(
            (torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled())
        )
        return imitated(model, own)

    model, x = small().eval(), batches(1)[0]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        fast = graphs.Graphed(model, x, make)
        assert torch.is_autocast_cache_enabled()
        assert fast(x).dtype == torch.bfloat16 and fast.ran == "graph"
    assert seen == [(torch.bfloat16, True, False)]
    with torch.no_grad():
        assert fast(x).dtype == torch.float32 and fast.ran == "model"


class Table:
    """Something that a weak reference can follow."""


def test_tables_that_a_graph_reads_outlive_their_cache() -> None:
    import weakref

    @constants.device_constant(maxsize=1)
    def table(key: int) -> Table:
        return Table()

    first = weakref.ref(table(1))
    assert table(1) is first()
    with constants.holding() as held, constants.holding() as other:
        table(1)
    table(2)
    gc.collect()
    assert first() is not None and list(held.values()) == list(other.values()) == [first()]
    del held, other
    gc.collect()
    assert first() is None, "nobody holds it longer than it is needed"


class NoHostWork(TorchDispatchMode):
    """Fails where a value is read on the host, or a tensor is made from a list: what a capture does not allow."""

    NAMES = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not func.__name__.startswith(self.NAMES), func
        by_mask = func.__name__.startswith("index.") and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert not by_mask, func
        return func(*args, **(kwargs or {}))


def test_the_watch_sees_what_it_watches_for() -> None:
    for work in (lambda: torch.ones(1).item(), lambda: torch.tensor([1, 2]), lambda: torch.ones(2)[torch.ones(2) > 0]):
        with pytest.raises(AssertionError), NoHostWork():
            work()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("recompute", [False, True])
def test_the_engine_does_nothing_on_the_host_after_its_first_call(unit: str, recompute: bool) -> None:
    block = tn.ThresholdBlock(8, tn.links.threshold_bc(4, 2), growth_rate=6, compression=1.5, unit=unit)
    x = torch.randn(2, 8, 6, 6)
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    parameters = [p.detach() for p in block.parameters()]
    spec = engine.Spec(
        block.plan, [n.eps for n in norms], [False] * len(norms), "relu", engine_for("native", block.plan, x), True,
        recompute and unit == "bottleneck",
    )  # fmt: skip

    def step() -> None:
        y, statistics, saved = engine.forward(spec, x, parameters, [x.new_empty(0)] * (2 * len(norms)))
        kept = [y, *saved] if spec.keeps_output else saved
        engine.backward(spec, torch.ones_like(y), x, parameters, statistics, kept, [True] * (1 + len(parameters)))

    step()  # makes the tables
    with NoHostWork():
        step()


TINY: dict[str, Any] = {
    "model": "thresholdnet_ab", "model_args": {"width_mult": 0.25}, "data": "digits", "limit": 92, "epochs": 2,
    "batch_size": 20, "save_every": 2, "quiet": True, "accelerator": "cpu",
}  # fmt: skip
FIGURES = ("epoch", "step", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy")


class Cut(Exception):
    pass


@pytest.fixture
def unpictured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training without its pictures, which take longest."""
    monkeypatch.setattr(run_module._Run, "_draw", lambda self, device, with_images: {})


@pytest.fixture
def ran(unpictured: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, str]]:
    """Training on a CPU as with graphs, a capture imitated, which runs nothing; lists (step, images, what ran)."""
    made: list[tuple[str, int, str]] = []
    call = graphs.GraphedStep.__call__

    def imitated_capture(step: Callable[[], None], warmup: int) -> tuple[Callable[[], None], None]:
        assert warmup == 0
        return step, None

    def noted(self: graphs.GraphedStep, *tensors: torch.Tensor) -> None:
        call(self, *tensors)
        made.append((self._step.__name__, len(tensors[0]), "step" if self._replay is None else "graph"))

    monkeypatch.setattr(graphs, "capture", imitated_capture)
    monkeypatch.setattr(graphs.GraphedStep, "__call__", noted)
    monkeypatch.setattr(run_module, "process_counts", lambda config: (1, 0, 0))
    return made


def history(result: dict[str, Any]) -> list[list[float]]:
    return [[row[key] for key in FIGURES] for row in result["history"]]


def test_train_captures_each_batch_size_and_resumes_exactly(
    tmp_path: Path, ran: list[tuple[str, int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(TrainConfig(**TINY, ema=0.9, out_dir=tmp_path / "plain"))
    assert not ran and not plain["cuda_graph"]
    whole = train(TrainConfig(**TINY, ema=0.9, cuda_graph=True, out_dir=tmp_path / "whole"))
    first = [("learn", count, "step") for count in (19, 19, 18, 18, 18)]  # three of a size run before a capture
    second = [("learn", count, how) for count, how in zip((19, 19, 18, 18, 18), ("step", *["graph"] * 4), strict=True)]
    judged = [[("judge", *batch) for _, *batch in epoch] for epoch in (first, second)]
    assert ran == [*first, *judged[0], *second, *judged[1]] and whole["cuda_graph"]
    assert history(whole) == history(plain)
    original = classifier.Classifier.on_train_batch_start

    def cut(self: classifier.Classifier, batch: Any, batch_idx: int) -> None:
        original(self, batch, batch_idx)
        if self.global_step == 7:
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(classifier.Classifier, "on_train_batch_start", cut)
        with pytest.raises(Cut):
            train(TrainConfig(**TINY, ema=0.9, cuda_graph=True, out_dir=tmp_path / "cut"))
    ran.clear()
    saved = TrainConfig.saved_in(tmp_path / "cut")
    assert saved is not None and saved.cuda_graph
    resumed = train(saved)  # from step 6, in the second epoch
    assert ran == [*first[1:], *judged[0]]
    assert history(resumed) == history(whole)
    a, b = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "cut")
    )
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert not [key for key in a if "graph" in key]


def test_train_says_what_a_graph_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^cuda_graph needs a CUDA GPU, got none to train on$"):
        train(TrainConfig(accelerator="cpu", cuda_graph=True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"^cuda_graph needs one process, got 2$"):
        train(TrainConfig(devices=2, cuda_graph=True))


# --- on a GPU


@needs_gpu
@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_step_is_the_eager_step(drop: float, dtype: torch.dtype) -> None:
    model, data = small(drop=drop).cuda().to(dtype), [x.to(dtype) for x in batches(6, "cuda")]
    plain = copy.deepcopy(model)
    fast = tn.graphed(model, data[0])
    assert same_state(model, plain)
    wanted, found = steps(plain, plain, data), steps(model, fast, data)
    assert fast.ran == "graph"
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=tolerance, atol=tolerance)
    assert int(model[0][1].num_batches_tracked) == len(data)


@needs_gpu
def test_captured_gradients_accumulate() -> None:
    model, data = small().cuda(), batches(6, "cuda")
    plain = copy.deepcopy(model)
    wanted = steps(plain, plain, data, each=3)
    torch.testing.assert_close(
        torch.stack(steps(model, tn.graphed(model, data[0]), data, each=3)), torch.stack(wanted), rtol=1e-4, atol=1e-4
    )


@needs_gpu
def test_a_captured_average_of_momentum_none() -> None:
    model, data = small(momentum=None).cuda(), batches(4, "cuda")
    plain = copy.deepcopy(model)
    steps(plain, plain, data), steps(model, tn.graphed(model, data[0]), data)
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@needs_gpu
def test_captured_inference_and_autocast() -> None:
    model, data = small().cuda().eval(), batches(3, "cuda")
    with torch.no_grad():
        fast = tn.graphed(model, data[0])
        found = [fast(x) for x in data]
        assert fast.ran == "graph"
        for x, y in zip(data, found, strict=True):
            torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-4)
    model.train()
    plain = copy.deepcopy(model)
    with torch.autocast("cuda", torch.bfloat16):
        fast = tn.graphed(model, data[0])
        wanted, made = plain(data[1]), fast(data[1])
    assert fast.ran == "graph" and made.dtype == wanted.dtype
    made.float().square().mean().backward()
    wanted.float().square().mean().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=5e-2, atol=5e-2)


STILL = TINY | {"lr": 1e-9}  # weights that stay: five steps of so small a network at another rate magnify rounding


def optimizer_state(folder: Path) -> dict[str, torch.Tensor]:
    """What an optimizer keeps, all parameters side by side."""
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")
    states = saved["optimizer_states"][0]["state"]
    return {key: torch.cat([state[key].double().flatten() for state in states.values()]) for key in states[0]}


def assert_same_run(one: Path, other: Path, histories: list[list[dict[str, float]]], tolerance: float) -> None:
    """The same steps, losses, and averages of gradients."""
    for a, b in zip(*histories, strict=True):
        assert (a["step"], a["lr"]) == (b["step"], b["lr"])
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=tolerance)
        assert a["test_loss"] == pytest.approx(b["test_loss"], rel=tolerance)
    for (key, first), second in zip(optimizer_state(one).items(), optimizer_state(other).values(), strict=True):
        assert (first - second).norm() <= 3 * tolerance * first.norm(), key


@needs_gpu
@pytest.mark.parametrize("recipe", ["released", "modern"])
@pytest.mark.parametrize("precision", ["32", "bf16", "16"])
def test_graphed_training_on_a_gpu(recipe: str, precision: str, unpictured: None, tmp_path: Path) -> None:
    settings = STILL | {"accelerator": "gpu", "recipe": recipe, "precision": precision, "ema": 0.9}
    settings["fused"] = precision != "32"
    folders = [tmp_path / "plain", tmp_path / "quick"]
    histories = [
        train(TrainConfig(**settings, cuda_graph=graph, out_dir=folder))["history"]
        for graph, folder in zip((False, True), folders, strict=True)
    ]
    assert_same_run(*folders, histories, 1e-3 if precision == "32" else 2e-2)


@needs_gpu
@pytest.mark.parametrize("first", [True, False])
def test_a_run_on_a_gpu_goes_on_with_graphs_and_without(first: bool, unpictured: None, tmp_path: Path) -> None:
    settings = STILL | {"accelerator": "gpu", "recipe": "released", "fused": False}
    whole = train(TrainConfig(**settings | {"epochs": 3}, out_dir=tmp_path / "whole"))
    train(TrainConfig(**settings, cuda_graph=first, out_dir=tmp_path / "cut"))
    saved = TrainConfig.saved_in(tmp_path / "cut")
    assert saved is not None
    went_on = train(replace(saved, epochs=3, cuda_graph=not first))
    assert_same_run(tmp_path / "whole", tmp_path / "cut", [whole["history"], went_on["history"]], 1e-3)


@needs_gpu
@pytest.mark.parametrize("recipe", ["released", "modern"])
def test_graphed_steps_on_a_gpu_are_as_long(recipe: str, unpictured: None, tmp_path: Path) -> None:
    weights = []
    for graph, epochs in ((False, 2), (True, 2), (False, 1)):
        settings = TINY | {
            "accelerator": "gpu",
            "recipe": recipe,
            "epochs": epochs,
            "ema": 0.0,
            "recipe_args": {"schedule": "constant"},
        }
        folder = tmp_path / f"{graph}{epochs}"
        train(TrainConfig(**settings, cuda_graph=graph, out_dir=folder))
        state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")["state_dict"]
        weights.append(torch.cat([value.flatten() for name, value in state.items() if name.endswith("weight")]))
    plain, quick, earlier = weights
    assert float((quick - earlier).norm()) == pytest.approx(float((plain - earlier).norm()), rel=0.3)


@needs_gpu
def test_graphed_training_stops_at_a_loss_that_is_none(tmp_path: Path) -> None:
    settings = TINY | {"accelerator": "gpu", "recipe": "released", "lr": 1e30, "epochs": 5, "cuda_graph": True}
    with pytest.raises(ValueError, match=r"the loss is no finite number at epoch 1, step [1-4] "):
        train(TrainConfig(**settings, out_dir=tmp_path))


@needs_gpu
def test_a_model_that_reads_on_the_host_is_refused() -> None:
    class Reads(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * float(x.sum())

    with pytest.raises(RuntimeError, match="graphed could not capture Reads"):
        tn.graphed(Reads().eval(), torch.ones(1, 3, 4, 4, device="cuda"))
