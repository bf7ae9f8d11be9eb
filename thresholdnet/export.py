"""Models as files for other runtimes: ONNX, torch.export, AOTInductor, TorchScript.

What is exported is a copy in plain operations: blocks converted or fused go back to plain torch (`to_reference`), every
BatchNorm behind a convolution is folded into it, and the batch stays a free dimension.
"""

from __future__ import annotations

import copy
import itertools
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from .checks import integer, one_of
from .convert import to_reference
from .recognise import Unlike, recognise

FORMATS = {"onnx": ".onnx", "pt2": ".pt2", "torchscript": ".pt", "aoti": ".pt2"}
"""What a file's name ends in. Where it alone decides, .pt2 is a torch.export program."""
OPSET = 18
"""Of ONNX files: the oldest that torch's exporter writes without converting."""


def plain(model: nn.Module) -> nn.Module:
    """A copy of a model for inference: plain torch modules in eval mode, BatchNorms behind convolutions folded."""
    twin = to_reference(copy.deepcopy(model)).eval()
    for module in list(twin.modules()):
        for conv, norm in _pairs(module):
            first, second = module.get_submodule(conv), module.get_submodule(norm)
            if type(first) is nn.Conv2d and type(second) is nn.BatchNorm2d and second.running_mean is not None:
                module.set_submodule(conv, fuse_conv_bn_eval(first, second))
                module.set_submodule(norm, nn.Identity())
    return twin


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    to: str | None = None,
    *,
    image_size: int | tuple[int, int] = 224,
    channels: int = 3,
) -> Path:
    """Write a model for serving: images float32 [N, channels, H, W] -> its output, for any batch N.

    Args:
        model: any model of images; it is left alone.
        path: the file.
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
        TypeError, ValueError: an argument of the wrong type or out of range.
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
    twin = plain(model).float().cpu()
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
        names = [name for name, _ in module.named_children()]
        return list(itertools.pairwise(names))
    try:
        found = recognise(module)
    except Unlike:
        return []
    if found is None or found.plan.unit != "bottleneck":
        return []
    return [(unit[1], unit[2]) for unit in found.units]
