"""thresholdnet: DenseNet-family networks with pruned links.

`tn.links` holds the link patterns, `tn.ThresholdBlock` the block, `tn.create_model` the networks. Training, tables and
pictures are behind the command `thresholdnet` (and in `thresholdnet.train` and its neighbours), imported when used.
"""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

try:
    import torch as _torch  # noqa: F401  # a missing torch gets a sentence here, not a traceback from the depths
except ImportError as error:
    raise ImportError(f"thresholdnet needs torch 2.11 or newer: pip install 'thresholdnet[torch]' ({error})") from error

from . import functional, links, memory, weights
from .backends import backends
from .blocks import ThresholdBlock
from .convert import convert, to_reference
from .graphs import graphed
from .models import create_model, from_pretrained, list_models, save_pretrained
from .packing import prepack
from .plan import BlockPlan, plan_block

_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "kernels" / "launch.py").is_file():  # a source checkout: the folder beside this one is
    __path__.append(str(_checkout))  # thresholdnet.kernels, which an installed package holds inside

try:
    __version__ = version("thresholdnet")
except PackageNotFoundError:  # a source checkout that was never installed
    __version__ = "0+source"

__all__ = [
    "BlockPlan", "ThresholdBlock", "backends", "convert", "create_model", "from_pretrained", "functional", "graphed",
    "links", "list_models", "memory", "plan_block", "prepack", "save_pretrained", "to_reference", "weights",
]  # fmt: skip
