"""Our networks in timm's registry: `import thresholdnet.timm`, then `timm.create_model("thresholdnet_v1", ...)`.

Registered are the names that timm has no model for. They take timm's num_classes, in_chans, global_pool, drop_rate,
features_only and out_indices, the arguments of `thresholdnet models`, and fused, backend, recompute (fused=True here);
the models have the methods of timm's DenseNet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .checks import integer, number, one_of
from .linked import LinkedBlock
from .models import Network, create_model, list_models
from .models._network import check_input, pyramid_levels, run_levels

try:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
    from timm.models import FeatureInfo, generate_default_cfgs, get_pretrained_cfg, is_model, register_model
    from timm.models._manipulate import MATCH_PREV_GROUP
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


POOLINGS = ("", "avg", "max", "avgmax", "catavgmax", "fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax")
"""timm's global poolings; with the empty one a model without a classifier returns its last map."""


class TimmNetwork(Network):
    """`Network` with timm's head, any of its global poolings, and the methods of its DenseNet."""

    global_pool: SelectAdaptivePool2d

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """The maps of `forward_intermediates`: their channels, reductions and modules."""
        return [
            {"num_chs": stage.out_channels, "reduction": stage.reduction, "module": f"stages.{i - 1}" if i else "stem"}
            for i, stage in pyramid_levels(self)
        ]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map [N, C, h, w] -> logits [N, num_classes], or pooled features where `pre_logits` is set."""
        x = self.drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for `num_classes` classes (0: none), behind another pooling if one is named."""
        integer("num_classes", num_classes, 0)
        self.global_pool = _pooling(self.global_pool.pool_type if global_pool is None else global_pool, num_classes)
        weight = next(self.stem.parameters())
        self.num_classes = num_classes
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.head_hidden_size, num_classes, device=weight.device, dtype=weight.dtype)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The last map, and those that `feature_info` lists, or of them `indices` (an integer: the last so many).

        `norm` has no effect; `stop_early` runs no stage behind the last map asked for; `intermediates_only` returns
        the list alone.
        """
        one_of("output_fmt", output_fmt, ("NCHW",))
        check_input(x, self.in_chans, self.min_size)
        ends = [position for position, _ in pyramid_levels(self)]
        taken = _taken(indices, len(ends))
        maps = run_levels([self.stem, *self.stages], ends[: taken[-1] + 1] if stop_early else ends, x, self.fused)
        found = [maps[i] for i in taken]
        return found if intermediates_only else (maps[-1], found)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last map that `indices` asks for, and the head; returns the indices."""
        levels = pyramid_levels(self)
        taken = _taken(indices, len(levels))
        position, stage = levels[taken[-1]]
        if position < len(self.stages) or prune_head:
            self.stages = self.stages[:position]
            self.num_features = stage.out_channels
            self.reset_classifier(0, "")
        return taken

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Make bottleneck outputs again in backward, as timm's DenseNet does: recompute="bottleneck".

        Raises:
            ValueError: no block of the network runs in the engine and has bottlenecks.
        """
        blocks = [m for m in self.modules() if isinstance(m, LinkedBlock) and m.fused and m.plan.unit == "bottleneck"]
        if enable and not blocks:
            raise ValueError(
                f"enable must be False for {vars(self)['config']['model']}, got {enable!r}: gradient checkpointing "
                "recomputes the bottlenecks of blocks with fused=True, and this network has none"
            )
        for block in blocks:
            block.recompute = "bottleneck" if enable else None

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters form a layer, for timm's layer decay: stages, or the layers of their blocks."""
        stage, layer = r"^stages\.(\d+)", r"^stages\.(\d+)\.block\.layers\.(\d+)"
        return {"stem": r"^stem", "blocks": stage if coarse else [(layer, None), (stage, MATCH_PREV_GROUP)]}


def _pooling(global_pool: str, num_classes: int) -> SelectAdaptivePool2d:
    one_of("global_pool", global_pool, POOLINGS)
    if num_classes and not global_pool:
        raise ValueError(
            f"global_pool must name a pooling for a model with a classifier, got {global_pool!r} with "
            f"num_classes={num_classes}"
        )
    return SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))


def _taken(indices: int | Sequence[int] | None, count: int) -> list[int]:
    """The maps asked for, ascending, as timm counts: all, the last so many, or by index, negative ones from the end."""
    if indices is None:
        return list(range(count))
    if not isinstance(indices, Sequence):
        return list(range(count - integer("indices", indices, 1, count), count))
    taken = sorted({integer("indices entry", i, -count, count - 1) % count for i in indices})
    if not taken:
        raise ValueError("indices must name at least one map, got none")
    return taken


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
        if arguments.get("spatial_dims", 2) != 2:
            raise ValueError(
                f"spatial_dims must be 2 in timm, which has no volumes and signals, got {arguments['spatial_dims']}: "
                "thresholdnet.create_model makes them"
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
        model.global_pool = _pooling(global_pool, num_classes)
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
