"""The model zoo: ThresholdNet v1, v2, -ab, -bc; HarDNet; DenseNet and its pruned forms; torchvision's baselines."""

import os
from typing import Any

from torch import nn

from . import _torchvision, densenet, hardnet, thresholdnet  # noqa: F401  # importing registers their models
from ._network import FeaturePyramid, Network
from ._registry import check_arguments, create_model, fuse_blocks, list_models, model_arguments

__all__ = [
    "FeaturePyramid", "Network", "check_arguments", "create_model", "from_pretrained", "fuse_blocks", "list_models",
    "model_arguments", "save_pretrained",
]  # fmt: skip


def save_pretrained(model: nn.Module, directory: str | os.PathLike[str], **options: Any) -> None:
    """Write config.json and model.safetensors to a folder, or push them to the Hub; see `thresholdnet.models._hub`.

    Raises:
        ValueError: the model was not made by `create_model`, or its weights do not fit its configuration any more.
        RuntimeError: huggingface_hub or safetensors is not installed.
    """
    _load_hub().save_pretrained(model, directory, **options)


def from_pretrained(source: str | os.PathLike[str], **options: Any) -> nn.Module:
    """Load what `save_pretrained` wrote, from a folder or a Hub repository, in eval mode.

    It comes with the dtype, fused and recompute that it had. Options dtype, fused, backend and recompute, as in
    `create_model`, go before what was saved; all others are huggingface_hub's.

    Raises:
        TypeError, ValueError: an option of the wrong type or unknown.
        ValueError: the source does not exist, or its files are missing, cut or foreign.
        RuntimeError: huggingface_hub or safetensors is not installed; a backend asked for by name cannot run here.
    """
    return _load_hub().from_pretrained(source, **options)


def _load_hub() -> Any:
    try:
        from . import _hub as hub  # imported when used: `import thresholdnet` needs torch and numpy alone
    except ImportError as error:
        raise RuntimeError(
            f"saving and loading pretrained models needs: pip install 'thresholdnet[hub]' ({error})"
        ) from error
    return hub
