"""Entry points of torch.hub: every model of the zoo by its name.

model = torch.hub.load("path/to/checkout", "thresholdnet_v1", source="local", num_classes=10)
"""

from collections.abc import Callable as _Callable

from torch import nn as _nn

import thresholdnet as _thresholdnet

dependencies = ["torch", "numpy"]


def _entry(name: str) -> _Callable[..., _nn.Module]:
    def entry(**arguments) -> _nn.Module:
        return _thresholdnet.create_model(name, **arguments)

    entry.__name__ = name
    entry.__doc__ = f"{name}: keyword arguments as thresholdnet.create_model takes them."
    return entry


globals().update({name: _entry(name) for name in _thresholdnet.list_models()})
