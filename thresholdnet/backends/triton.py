"""The engine's verbs on Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batchnorm import NodeStatistics
from ..kernels import launch
from ..kernels.packed_affine import PackedAffine, pack_affine
from ..kernels.packed_weights import PackedWeight
from ..pixels import count
from ..plan import BlockPlan
from . import slotted
from .elementwise import Affine
from .native import Moments, Place
from .slotted import kept_like, needs_input, output_holds_features

__all__ = ["Verbs", "kept_like", "needs_input", "output_holds_features"]


MOST_TILES = 65535  # of pixels, in a launch: CUDA's limit of a grid's second dimension
MOST_PIXELS = MOST_TILES * 64  # the smallest tiles, but for fp64's of 16


class BatchNorm(NamedTuple):
    """What makes a BatchNorm's affine: `normalise` makes it on its way, which is one launch less."""

    gamma: Tensor
    beta: Tensor
    mean: Tensor
    variance: Tensor
    eps: float


class Verbs(slotted.Verbs):
    """See `slotted.Verbs`."""

    launch = launch

    def __init__(self, plan: BlockPlan | None, x: Tensor):
        super().__init__(plan, x)
        pixels = count(x)
        most = MOST_TILES * 16 if x.dtype == torch.float64 else MOST_PIXELS
        if pixels > most:
            raise ValueError(
                f"input of the block must have at most {most} pixels in all images together, got {pixels} from shape "
                f"{tuple(x.shape)}: use a smaller batch or backend='native'"
            )

    def affine(self, gamma: Tensor, beta: Tensor, moments: Moments, eps: float) -> Any:
        return BatchNorm(gamma, beta, *moments, eps)

    def affine_of_nodes(
        self, weight: Any, gamma: Tensor, beta: Tensor, statistics: NodeStatistics, nodes: tuple[int, ...], eps: float
    ) -> tuple[Any, Tensor]:
        """In one launch, where the weight is packed."""
        if isinstance(weight, PackedWeight):
            return pack_affine(weight, gamma, beta, statistics.values, statistics.starts(nodes), eps)
        return super().affine_of_nodes(weight, gamma, beta, statistics, nodes, eps)

    def conv(
        self, sources: Sequence[Tensor], weight: Any, *, affine: Affine | BatchNorm | PackedAffine | None = None,
        **others: Any,
    ) -> tuple[Tensor, Moments | None]:  # fmt: skip
        made = launch.batch_norm_affine(*affine) if isinstance(affine, BatchNorm) else affine
        return super().conv(sources, weight, affine=made, **others)

    def normalise(self, z: Tensor, affine: Affine | BatchNorm, activation: str, *, into: Place) -> Tensor:
        if not isinstance(affine, BatchNorm):
            return super().normalise(z, affine, activation, into=into)
        out = self._slot(into, z.shape[1])
        launch.normalise(z, affine.gamma, affine.beta, out, activation, statistics=affine[2:])
        return out

    def prepared(
        self, weights: Sequence[Any], read: Sequence[Sequence[int]] | None = None, affine: Sequence[bool] | None = None,
        dilations: Sequence[int] = (),
    ) -> Sequence[Any]:  # fmt: skip
        """Packed in few launches: a packed weight each, or in each list one for all of them."""
        if 0 in self.like.shape:
            return weights
        own = [[self._met(weight) for weight in each] for each in (weights if read is None else zip(weights))]
        made = launch.pack(own, self.like, widths=read, affine=affine, dilations=dilations)
        return made if read is not None else [[packed] for packed in made]
