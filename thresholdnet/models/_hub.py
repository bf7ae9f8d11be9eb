"""Saving and loading through huggingface_hub's mixin: folders or repositories of config.json and model.safetensors."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from ._registry import create_model


class HubModel(nn.Module, PyTorchModelHubMixin, library_name="thresholdnet", tags=["image-classification", "densenet"]):
    """A model of the zoo in the form that the mixin handles: every constructor argument fits into config.json."""

    def __init__(
        self,
        model: str,
        num_classes: int = 1000,
        in_chans: int = 3,
        arguments: dict[str, Any] | None = None,
        network: nn.Module | None = None,  # an existing model to save; never part of the config
    ):
        super().__init__()
        self.network = network or create_model(model, num_classes, in_chans, **(arguments or {}))

    def _save_pretrained(self, save_directory: Path) -> None:
        save_model(self.network, str(save_directory / "model.safetensors"))

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        load_model(model.network, model_file, strict=strict, device=map_location)
        return model


def save_pretrained(model: nn.Module, directory: str | os.PathLike[str], **options: Any) -> None:
    """Write config.json, model.safetensors and a model card; a failed write leaves earlier files as they were.

    Args:
        model: a model from `create_model`.
        directory: made where it does not exist.
        options: handed to huggingface_hub (push_to_hub=True, repo_id="user/name", ...).

    Raises:
        ValueError: the model was not made by `create_model`, or returns features only.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, dict) or config.get("features_only"):
        raise ValueError(f"model must be a classifier made by create_model, got {type(model).__name__}")
    kept = {key: config[key] for key in ("model", "num_classes", "in_chans", "arguments")}
    kept["num_classes"] = getattr(model, "num_classes", kept["num_classes"])  # reset_classifier may have changed it
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
    """Load a model that `save_pretrained` wrote, in eval mode.

    Args:
        source: a folder, or the id of a Hub repository.
        options: handed to huggingface_hub (revision, token, local_files_only, map_location, ...).

    Raises:
        ValueError: the source does not exist, or its files are missing, cut or foreign.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the mixin prints where it loads from
            hub = HubModel.from_pretrained(os.fspath(source), strict=True, **options)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"source must be a folder with config.json and model.safetensors or a Hub repository, "
            f"got {os.fspath(source)!r}: {reason}"
        ) from error
    return hub.network.eval()
