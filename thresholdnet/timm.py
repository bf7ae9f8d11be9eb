"""Our networks in timm's registry: `import thresholdnet.timm`, then `timm.create_model("thresholdnet_v1", ...)`.

Registered are the names that timm has no model for. They take timm's num_classes, in_chans, global_pool, drop_rate,
features_only and out_indices, the arguments of `thresholdnet models`, and fused, backend, recompute (fused=True here).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .checks import integer, number
from .models import Network, create_model, list_models

try:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
    from timm.models import FeatureInfo, generate_default_cfgs, get_pretrained_cfg, is_model, register_model
except ImportError as error:
    raise ImportError(f"thresholdnet.timm needs: pip install timm ({error})") from error

NAMES = [name for name in list_models() if name.startswith(("thresholdnet", "hardnet", "log_", "sparse_"))]

default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": {
            "url": "", "num_classes": 1000, "input_size": (3, 224, 224), "pool_size": (7, 7), "crop_pct": 0.875,
            "interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
            "first_conv": "stem.conv1.conv", "classifier": "head",
        }
        for name in NAMES
    }
)  # fmt: skip


class TimmNetwork(Network):
    """`Network` with timm's head: any of its global poolings, and its classifier's methods."""

    global_pool: SelectAdaptivePool2d

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map [N, C, h, w] -> logits [N, num_classes], or pooled features where `pre_logits` is set."""
        x = self.drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for `num_classes` classes (0: none), behind another pooling if one is named."""
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=True)
        weight = next(self.stages.parameters())
        self.num_classes = integer("num_classes", num_classes, 0)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.head_hidden_size, num_classes, device=weight.device, dtype=weight.dtype)


def _entry(name: str) -> Callable[..., nn.Module]:
    def entry(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: Any = None,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
        **arguments: Any,
    ) -> nn.Module:
        if pretrained:
            raise RuntimeError(
                f"pretrained must be False for {name}, got True: timm has no weights of it; "
                "thresholdnet.weights.load_released reads its authors' files"
            )
        own = {"fused": True, **arguments}
        if features_only:
            pyramid = create_model(name, features_only=True, out_indices=out_indices, **own)
            levels = [
                {"num_chs": level["channels"], "reduction": level["reduction"], "module": "", "index": level["index"]}
                for level in pyramid.feature_info  # type: ignore[union-attr]  # a list of dicts
            ]
            vars(pyramid)["feature_info"] = FeatureInfo(levels, tuple(range(len(levels))))  # timm's kind of list
            return pyramid
        model = create_model(name, num_classes=num_classes, **own)
        assert isinstance(model, Network)
        model.drop.p = number("drop_rate", drop_rate, 0, 1)
        model.__class__ = TimmNetwork
        assert isinstance(model, TimmNetwork)
        model.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=True)
        if model.global_pool.feat_mult() != 1:
            model.reset_classifier(num_classes)
        config = get_pretrained_cfg(name)
        assert config is not None  # registered below
        vars(model).update(pretrained_cfg=config.to_dict(), default_cfg=config.to_dict())
        return model

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"{name}; see `thresholdnet.create_model`."
    return entry


for _name in NAMES:
    if not is_model(_name):  # importing twice, or a newer timm with a model of this name
        globals()[_name] = register_model(_entry(_name))
