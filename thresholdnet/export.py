"""Models as files for other runtimes: ONNX, torch.export, AOTInductor, TorchScript.

What is exported is a copy in plain operations: blocks converted or fused go back to plain torch (`to_reference`),
weight norm, spectral norm, pruning and parametrisations become plain weights, every BatchNorm behind a convolution is
folded into it, and the batch stays a free dimension. Folding is held against the copy without it on random pixels.
"""

from __future__ import annotations

import copy
import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval, parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm
from torch.utils._pytree import tree_leaves

from .checks import integer, one_of, output_file
from .convert import difference, to_reference
from .layers import Unlike, hooked
from .recognise import Found, recognise

FORMATS = {"onnx": ".onnx", "pt2": ".pt2", "torchscript": ".pt", "aoti": ".pt2"}
"""What a file's name ends in. Where it alone decides, .pt2 is a torch.export program."""
OPSET = 18
"""Of ONNX files: the oldest that torch's exporter writes without converting."""


_PERMANENT: tuple[tuple[type, str, Callable[[nn.Module, str], Any]], ...] = (
    (WeightNorm, "name", remove_weight_norm),
    (SpectralNorm, "name", remove_spectral_norm),
    (prune.BasePruningMethod, "_tensor_name", prune.remove),
)
"""Hooks that make a weight at every call: their class, where they name it, and what makes it a plain weight."""


def plain(model: nn.Module, input_shape: Sequence[int] | None = None) -> nn.Module:
    """A copy of a model for inference: plain torch modules in eval mode, BatchNorms behind convolutions folded.

    A convolution or BatchNorm with hooks is left as it is. Given `input_shape` [N, C, H, W], the copy runs on random
    pixels with and without the folding; where the outputs differ, it is returned without, and a warning says so.
    """
    return _folded(_unfolded(model), input_shape)


def _unfolded(model: nn.Module) -> nn.Module:
    """The copy before folding."""
    memo: dict[int, Any] = {}  # deepcopy takes what it finds here in place of copying
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:  # a weight that a hook made, which torch does not copy
                memo[id(value)] = value.detach().clone()
    twin = to_reference(copy.deepcopy(model, memo)).eval()
    for module in list(twin.modules()):
        for hook in list(module._forward_pre_hooks.values()):
            for kind, attribute, remove in _PERMANENT:
                if isinstance(hook, kind):
                    remove(module, getattr(hook, attribute))
        if parametrize.is_parametrized(module):
            kind = type(module)  # made by torch for the original, shared by its copy, and emptied by what follows
            own = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
            module.__class__ = type(kind.__name__, kind.__bases__, own)
            for name in list(module.parametrizations):  # type: ignore[arg-type]  # a ModuleDict then
                parametrize.remove_parametrizations(module, name)
    return twin


def _folded(twin: nn.Module, input_shape: Sequence[int] | None) -> nn.Module:
    """The same module with its BatchNorms folded, in place; as it was where that changes what it computes."""
    expected = None if input_shape is None else _outputs(twin, input_shape)
    parts: list[tuple[nn.Module, str, nn.Module]] = []  # what was replaced, and where
    for module in list(twin.modules()):
        for names in _pairs(module):
            conv, norm = (module.get_submodule(name) for name in names)
            if _foldable(conv, nn.Conv2d) and _foldable(norm, nn.BatchNorm2d):
                parts += zip((module, module), names, (conv, norm), strict=True)
                module.set_submodule(names[0], fuse_conv_bn_eval(conv, norm))  # type: ignore[arg-type, type-var]  # as checked
                module.set_submodule(names[1], nn.Identity())
    if input_shape is None or expected is None or not parts:
        return twin
    if error := _difference(_outputs(twin, input_shape), expected):
        for module, name, part in parts:
            module.set_submodule(name, part)
        warnings.warn(
            f"the model is exported with its BatchNorms as they are: with them folded into convolutions {error}, "
            "as where a forward reads what lies between the two",
            stacklevel=3,
        )
    return twin


@torch.no_grad()
def _outputs(model: nn.Module, shape: Sequence[int]) -> list[Tensor]:
    """What the model makes of random pixels, always the same ones, as are its own random numbers."""
    weight = next(model.parameters(), torch.zeros(()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = torch.randn(tuple(shape)).to(weight)
        return [leaf for leaf in tree_leaves(model(images)) if isinstance(leaf, Tensor)]


def _difference(got: list[Tensor], expected: list[Tensor]) -> str:
    """What is wrong with the outputs, empty where they are the same to rounding."""
    if [t.shape for t in got] != [t.shape for t in expected]:
        return f"it returns shapes {[tuple(t.shape) for t in got]} and not {[tuple(t.shape) for t in expected]}"
    for ours, theirs in zip(got, expected, strict=True):
        if ours.numel() and (error := difference(ours, theirs)):
            return f"its outputs differ by {error:.1e} of the largest"
    return ""


def _foldable(part: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a part is torch's own of this kind, with statistics if it has any use for them, and nobody watches it."""
    return type(part) is kind and not hooked(part) and getattr(part, "running_mean", 0) is not None


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    to: str | None = None,
    *,
    image_size: int | tuple[int, int] = 224,
    channels: int = 3,
) -> Path:
    """Write a model for serving: images float32 [N, channels, H, W] -> its output, for any batch N.

    BatchNorms are folded into the convolutions in front of them; see `plain`.

    Args:
        model: any model of images; it is left alone.
        path: the file; its folder is made first.
        to: by default what the path ends in.
            "onnx" (.onnx): opset 18; runs in onnxruntime, OpenCV, TensorRT.
            "pt2" (.pt2): a program for `torch.export.load`.
            "torchscript" (.pt): a trace for `torch.jit.load` and for libtorch.
            "aoti" (.pt2, by name alone): an AOTInductor package, compiled for this machine's CPU and this torch; for
            `torch._inductor.aoti_load_package`, and libtorch's AOTIModelPackageLoader.
        image_size: side, or height and width, in pixels.
        channels: of the images.

    Returns:
        The path.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range; no place for the file.
        RuntimeError: ONNX without the packages for it; "aoti" without a C++ compiler.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    path = Path(path)
    if to is None:
        if path.suffix not in FORMATS.values():
            known = " or ".join(dict.fromkeys(FORMATS.values()))
            raise ValueError(f"path must end in {known} where no format is given, got {str(path)!r}")
        to = next(name for name, suffix in FORMATS.items() if suffix == path.suffix)
    one_of("to", to, FORMATS)
    if to == "aoti" and path.suffix != ".pt2":  # torch insists
        raise ValueError(f"path must end in .pt2 for an AOTInductor package, got {str(path)!r}")
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    shape = (2, integer("channels", channels, 1), integer("height", height, 1), integer("width", width, 1))
    output_file("path", path)
    twin = _folded(_unfolded(model).float().cpu(), shape)
    images = torch.zeros(shape)
    if to == "torchscript":
        _write_torchscript(twin, images, path)
        return path
    batch: Any = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(twin, (images,), dynamic_shapes=(batch,), strict=False)
    if to == "pt2":
        torch.export.save(program, path)
    elif to == "aoti":
        _write_package(program, path)
    else:
        _write_onnx(program, images, path)
    return path


def _write_torchscript(twin: nn.Module, images: Tensor, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.14 advises torch.export, which "pt2" is
        torch.jit.save(torch.jit.trace(twin, images), path)


def _write_package(program: Any, path: Path) -> None:
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()  # the compilation would fail after a while, and at length
    except RuntimeError as error:
        raise RuntimeError(f"an AOTInductor package needs a C++ compiler, which CXX may name ({error})") from error
    aoti_compile_and_package(program, package_path=str(path))


def _write_onnx(program: Any, images: Tensor, path: Path) -> None:
    try:
        import onnxscript  # noqa: F401  # torch's exporter needs it, and says so less plainly
    except ImportError as error:
        raise RuntimeError(f"writing ONNX needs: pip install 'thresholdnet[export]' ({error})") from error
    torch.onnx.export(
        program, (images,), str(path), opset_version=OPSET, dynamo=True, external_data=False, verbose=False,
        input_names=["images"], output_names=["logits"],
    )  # fmt: skip


def _pairs(module: nn.Module) -> list[tuple[str, str]]:
    """Names of convolutions and the BatchNorms that follow them at once, below a module."""
    if type(module).forward is nn.Sequential.forward:
        return list(itertools.pairwise(module._modules))  # all names: a module may stand in several places
    try:
        found: Found | None = recognise(module)
    except Unlike:
        return []
    if found is None or found.plan.unit != "bottleneck":
        return []
    return [(unit[1], unit[2]) for unit in found.units]
