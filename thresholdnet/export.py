"""Models as files for other runtimes: ONNX, or a torch.export program. Plain operations, BatchNorms folded.

What is exported is a copy: blocks converted or fused go back to plain torch (`to_reference`), every BatchNorm behind a
convolution is folded into it, and the batch stays a free dimension.
"""

from __future__ import annotations

import copy
import itertools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from .checks import integer, one_of
from .convert import to_reference
from .recognise import Unlike, recognise

FORMATS = {"onnx": ".onnx", "pt2": ".pt2"}
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
        to: "onnx" (opset 18; runs in onnxruntime, OpenCV, TensorRT) or "pt2" (torch.export; `torch.export.load`, and
            AOTInductor's `torch._inductor.aoti_compile_and_package`); by default what the path ends in.
        image_size: side, or height and width, in pixels.
        channels: of the images.

    Returns:
        The path.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.
        RuntimeError: ONNX without the packages for it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    path = Path(path)
    if to is None:
        suffixes = {suffix: name for name, suffix in FORMATS.items()}
        if path.suffix not in suffixes:
            raise ValueError(f"path must end in {' or '.join(suffixes)} where no format is given, got {str(path)!r}")
        to = suffixes[path.suffix]
    one_of("to", to, FORMATS)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    shape = (2, integer("channels", channels, 1), integer("height", height, 1), integer("width", width, 1))
    twin = plain(model).float().cpu()
    images = torch.zeros(shape)
    batch: Any = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(twin, (images,), dynamic_shapes=(batch,), strict=False)
    if to == "pt2":
        torch.export.save(program, path)
    else:
        _write_onnx(program, images, path)
    return path


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
