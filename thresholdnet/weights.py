"""Released weights: key maps between our state dicts and the authors' files (HarDNet, ThreshNet) and torchvision's.

A map pairs module prefixes, so parameters and buffers follow. Convolution weights keep their layout: input channels lie
in link order in all of these files, and in ours.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import Bottleneck
from .checks import file_path
from .models import Network

StateDict = dict[str, Tensor]
DEPTHWISE_LEAVES = {"point.conv": "layer1.conv", "point.norm": "layer1.norm",
                    "depth.dwconv": "layer2.dwconv", "depth.norm": "layer2.norm"}  # fmt: skip
# torchvision's oldest DenseNet files say norm.1 where its modules say norm1
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.)")


def released_prefixes(network: nn.Module) -> dict[str, str]:
    """Our module prefixes -> those of the released files that have this network's structure.

    DenseNet frames map to torchvision's names; HarDNet and ThresholdNet frames to the running number of the module in
    the authors' `base` list, where each of ThreshNet's bottleneck layers counts by itself.

    Args:
        network: one of our own models.

    Raises:
        TypeError: not one of our own models.
    """
    if not isinstance(network, Network):
        raise TypeError(f"network must be one of our own models, got {type(network).__name__}")
    if hasattr(network.stem, "norm"):  # DenseNet's single-convolution stem
        return dict(_torchvision_prefixes(network))
    return dict(_base_list_prefixes(network))


def load_released(
    network: nn.Module, source: str | os.PathLike[str] | Mapping[str, Any], *, head: bool | None = True
) -> nn.Module:
    """Load a released file (or a state dict with its key names) into one of our models, in place.

    Args:
        network: one of our own models, of the same structure.
        source: path of a .pth / .pt / .safetensors file, or a state dict; "state_dict" and "model" wrappers and the
            "module." prefix of DataParallel are taken off.
        head: False leaves the classifier as it is, for fine-tuning on other classes; None does so only where the
            file has another number of classes.

    Returns:
        The network.

    Raises:
        TypeError: not one of our own models, or no path.
        FileNotFoundError: no such file.
        ValueError: a cut or foreign file, missing or unknown keys, other shapes or another number of classes.
    """
    prefixes = released_prefixes(network)
    theirs = _unwrapped(source if isinstance(source, Mapping) else _read(file_path("source", source)))
    if head is None:
        bias = theirs.get(prefixes["head"] + ".bias")
        head = isinstance(bias, Tensor) and bias.shape == network.state_dict()["head.bias"].shape
    if not head:
        left_out = prefixes.pop("head") + "."
        theirs = {name: value for name, value in theirs.items() if not name.startswith(left_out)}
    ours: StateDict = {}
    for key, tensor in network.state_dict().items():
        prefix = _longest_prefix(key, prefixes)
        if prefix is None:
            ours[key] = tensor
            continue
        name = prefixes[prefix] + key[len(prefix) :]
        if name not in theirs:
            if key.endswith("num_batches_tracked"):  # older torch did not store it
                ours[key] = torch.zeros_like(tensor)
                continue
            raise ValueError(f"weights must hold {name!r} for our {key!r}, got {len(theirs)} other keys")
        _check_shape(key, name, tensor, theirs[name])
        ours[key] = theirs.pop(name)
    if theirs:
        raise ValueError(f"weights must fit the network, got {len(theirs)} unknown keys such as {next(iter(theirs))!r}")
    network.load_state_dict(ours)
    return network


def to_released(network: nn.Module) -> StateDict:
    """The network's state dict under the released key names: what the other project's model loads."""
    prefixes = released_prefixes(network)
    renamed: StateDict = {}
    for key, tensor in network.state_dict().items():
        prefix = _longest_prefix(key, prefixes)
        assert prefix is not None  # every module with state has an entry
        renamed[prefixes[prefix] + key[len(prefix) :]] = tensor
    return renamed


def _torchvision_prefixes(network: Network) -> Iterator[tuple[str, str]]:
    yield "stem.conv", "features.conv0"
    yield "stem.norm", "features.norm0"
    for s, stage in enumerate(network.stages):
        if s:
            yield f"stages.{s}.norm", f"features.transition{s}.norm"
            yield f"stages.{s}.conv", f"features.transition{s}.conv"
        for i, _ in enumerate(stage.get_submodule("block.layers").children()):
            yield f"stages.{s}.block.layers.{i}", f"features.denseblock{s + 1}.denselayer{i + 1}"
    yield f"stages.{len(network.stages) - 1}.last_norm", "features.norm5"
    yield "head", "classifier"


def _base_list_prefixes(network: Network) -> Iterator[tuple[str, str]]:
    yield "stem.conv1", "base.0"
    yield "stem.conv2", "base.1"
    position, threshnet = 2, False
    for s, stage in enumerate(network.stages):
        for name, module in stage.named_children():
            ours = f"stages.{s}.{name}"
            if name != "block":
                yield ours, f"base.{position}"
                position += 1
                continue
            layers = list(module.get_submodule("layers").children())
            if isinstance(layers[0], Bottleneck):
                threshnet = True
                for i in range(len(layers)):
                    yield f"{ours}.layers.{i}", f"base.{position + i}"
                position += len(layers)
                continue
            for i, layer in enumerate(layers):
                leaves = DEPTHWISE_LEAVES if hasattr(layer, "depth") else {"conv": "conv", "norm": "norm"}
                for leaf, released in leaves.items():
                    yield f"{ours}.layers.{i}.{leaf}", f"base.{position}.layers.{i}.{released}"
            position += 1
    # the last entry is a Sequential of pool, flatten, (HarDNet's dropout,) linear
    yield "head", f"base.{position}.{2 if threshnet else 3}"


def _longest_prefix(key: str, prefixes: Mapping[str, str]) -> str | None:
    parts = key.split(".")
    candidates = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
    return next((prefix for prefix in candidates if prefix in prefixes), None)


def _check_shape(key: str, name: str, ours: Tensor, theirs: Any) -> None:
    if not isinstance(theirs, Tensor):
        raise ValueError(f"weights must hold tensors, got {type(theirs).__name__} at {name!r}")
    if ours.shape == theirs.shape:
        return
    if key.startswith("head."):
        raise ValueError(
            f"num_classes must be the file's {theirs.shape[0]} (or pass head=False to keep a fresh head), "
            f"got a network with {ours.shape[0]}"
        )
    raise ValueError(f"{name!r} must have shape {tuple(ours.shape)} for our {key!r}, got {tuple(theirs.shape)}")


def _unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    for wrapper in ("state_dict", "model"):
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    stripped = {str(key).removeprefix("module."): value for key, value in state.items()}
    return {_OLD_DENSENET.sub(lambda m: m[1] + m[2], key): value for key, value in stripped.items()}


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"weights must be an existing file, got {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise RuntimeError(f"reading {path} needs safetensors: pip install 'thresholdnet[hub]' ({error})") from error
    except Exception as error:  # a cut or foreign file fails in many ways: zip, pickle, safetensors, plain ValueError
        raise ValueError(
            f"weights must be a whole file of tensors, got {path}: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(state, Mapping):
        raise ValueError(f"weights must be a state dict, got {type(state).__name__} in {path}")
    return state
