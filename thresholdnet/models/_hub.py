"""Saving and loading through huggingface_hub's mixin: folders or repositories of config.json and model.safetensors."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from .. import places
from ..checks import boolean, file_path, one_of
from ..linked import LinkedBlock
from ._registry import check_recompute, create_model, fuse_blocks

DTYPES = ("float32", "float64", "bfloat16", "float16")
OWN = ("dtype", "fused", "backend", "recompute")
"""Options of `from_pretrained` that are not huggingface_hub's."""


class HubModel(nn.Module, PyTorchModelHubMixin, library_name="thresholdnet", tags=["image-classification", "densenet"]):
    """A model of the zoo in the form that the mixin handles: every constructor argument fits into config.json."""

    def __init__(
        self,
        model: str,
        num_classes: int = 1000,
        in_chans: int = 3,
        arguments: dict[str, Any] | None = None,
        network: nn.Module | None = None,  # an existing model to save; never part of the config
        dtype: str = "float32",
        fused: bool = False,
        recompute: str | None = None,
    ):
        super().__init__()
        made = {"dtype": getattr(torch, one_of("dtype", dtype, DTYPES))}
        self.network = network or create_model(model, num_classes, in_chans, **made, **(arguments or {}))
        self.fused, self.recompute = boolean("fused", fused), recompute  # for whoever loads: the engine may refuse

    def _save_pretrained(self, save_directory: Path) -> None:
        save_model(self.network, str(save_directory / "model.safetensors"))

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        load_model(model.network, model_file, strict=strict, device=map_location)
        return model


def save_pretrained(model: nn.Module, directory: str | os.PathLike[str], **options: Any) -> None:
    """Write config.json, model.safetensors and a model card; a failed write leaves earlier files as they were.

    The configuration holds what `create_model` takes, and dtype, fused and recompute as they are now.

    Args:
        model: a model from `create_model`.
        directory: made where it does not exist.
        options: handed to huggingface_hub (push_to_hub=True, repo_id="user/name", ...).

    Raises:
        ValueError: the model was not made by `create_model`, returns features only, or was changed since, so that its
            weights do not fit what its configuration makes.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, dict) or config.get("features_only"):
        raise ValueError(f"model must be a classifier made by create_model, got {type(model).__name__}")
    kept = {key: config[key] for key in ("model", "num_classes", "in_chans", "arguments")}
    kept["num_classes"] = getattr(model, "num_classes", kept["num_classes"])  # reset_classifier may have changed it
    _check_state(model, kept)
    kept |= _settings(model)
    hub = HubModel(**kept, network=model)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        hub.save_pretrained(scratch, config=kept)
        for file in Path(scratch).iterdir():
            os.replace(file, folder / file.name)
    if options.pop("push_to_hub", False):
        hub.push_to_hub(options.pop("repo_id", folder.name), config=kept, **options)


def from_pretrained(source: str | os.PathLike[str], **options: Any) -> nn.Module:
    """Load a model that `save_pretrained` wrote, in eval mode, with the dtype, fused and recompute that it had.

    Args:
        source: a folder, or the id of a Hub repository.
        options: dtype, fused, backend, recompute as in `create_model`, in place of what was saved; all others are
            handed to huggingface_hub (revision, token, local_files_only, map_location, ...).

    Raises:
        TypeError, ValueError: an option of the wrong type or unknown.
        ValueError: the source does not exist, or its files are missing, cut or foreign.
        RuntimeError: a backend asked for by name that cannot run here.
    """
    own = {key: options.pop(key) for key in OWN if key in options}
    dtype = places.floating_dtype(own.get("dtype"), optional=True)
    file_path("source", source)
    fused = boolean("fused", own["fused"]) if "fused" in own else None
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the mixin prints where it loads from
            hub = HubModel.from_pretrained(os.fspath(source), strict=True, **options)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        reason = shorten(str(error), 600, placeholder=" ...") or type(error).__name__
        raise ValueError(
            f"source must be a folder with config.json and model.safetensors or a Hub repository, "
            f"got {os.fspath(source)!r}: {reason}"
        ) from error
    network = hub.network.to(dtype=dtype).eval()
    fused = hub.fused if fused is None else fused
    recompute = own.get("recompute", hub.recompute if fused else None)  # what was saved means nothing in plain torch
    check_recompute(vars(network)["config"]["model"], network, fused, recompute)
    fuse_blocks(network, fused, own.get("backend", "auto"), recompute)
    return network


def _settings(model: nn.Module) -> dict[str, Any]:
    """How the model runs now, as plain data."""
    blocks = [module for module in model.modules() if isinstance(module, LinkedBlock)]
    found = {tensor.dtype for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()}
    dtype = next(iter(found))
    for other in found:  # one that holds the values of all
        dtype = torch.promote_types(dtype, other)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "fused": any(block.fused for block in blocks),
        "recompute": next((b.recompute for b in blocks if b.recompute and b.plan.unit == "bottleneck"), None),
    }


def _check_state(model: nn.Module, config: dict[str, Any]) -> None:
    """Raise ValueError unless the model has the weights of its configuration, by name and shape."""
    made = create_model(
        config["model"], config["num_classes"], config["in_chans"], device="meta", **config["arguments"]
    )
    wanted = {key: tuple(tensor.shape) for key, tensor in made.state_dict().items()}
    given = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    for key in (*wanted, *given):
        if wanted.get(key) != given.get(key):
            now, then = given.get(key, "nothing"), wanted.get(key, "nothing")
            raise ValueError(
                f"model must have the weights of {config['model']} with num_classes={config['num_classes']} as it was "
                f"created, got {now} in place of {then} for {key}"
            )
    pooling = getattr(getattr(model, "global_pool", None), "pool_type", "avg")  # timm's
    if pooling != "avg":
        raise ValueError(f"model must pool averages to be saved, got global_pool={pooling!r}")
