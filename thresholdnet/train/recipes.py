"""Training recipes: every number that shapes a run, as frozen data.

`released` is what the authors' published code does (SPEC section 7); `modern` is the usual recipe for
small images today. Both are plain `Recipe` values, and any field can be replaced with
`make_recipe`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .. import checks

OPTIMIZERS = ("adam", "sgd")
SCHEDULES = ("constant", "steps", "cosine")


@dataclass(frozen=True)
class Recipe:
    """One way to train.

    Attributes:
        name: name shown in logs and stored in checkpoints.
        optimizer: `"adam"` or `"sgd"` (Nesterov momentum).
        lr: peak learning rate at a batch of `lr_batch` images.
        lr_batch: batch that `lr` is meant for; other batches scale it linearly. 0 leaves `lr` as it is.
        epochs: passes over the training set.
        batch_size: images per optimiser step, over all devices together.
        momentum: of SGD; unused by Adam.
        weight_decay: L2 coefficient, on every weight but norm parameters and biases.
        schedule: `"constant"`, `"steps"` (times `gamma` at each of `milestones`) or `"cosine"` (to
            0, per step).
        milestones: epochs (from 0) at which `"steps"` multiplies the rate by `gamma`.
        gamma: factor of `"steps"`.
        warmup: part of all steps with a linearly rising rate (cosine only).
        label_smoothing: of the cross entropy in training; test loss is never smoothed.
        flip: random horizontal flips, where a mirrored image keeps its class.
        crop_padding: zero pixels around the image before a random crop of its size; 0 means no crop. Image
            folders take a random resized crop instead when it is above 0.
        normalize: subtract the data set's mean and divide by its deviation, per channel.

    Raises:
        ValueError: a field out of its range.
    """

    name: str = "custom"
    optimizer: str = "sgd"
    lr: float = 0.1
    lr_batch: int = 0
    epochs: int = 200
    batch_size: int = 100
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "constant"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.5
    warmup: float = 0.0
    label_smoothing: float = 0.0
    flip: bool = True
    crop_padding: int = 0
    normalize: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.milestones, str) or not isinstance(self.milestones, Sequence):
            raise TypeError(f"milestones must be a list of epochs, got {self.milestones!r}")
        object.__setattr__(self, "milestones", tuple(checks.integer("milestones entry", m, 0) for m in self.milestones))
        checks.one_of("optimizer", self.optimizer, OPTIMIZERS)
        checks.one_of("schedule", self.schedule, SCHEDULES)
        for name in ("epochs", "batch_size"):
            checks.integer(name, getattr(self, name), 1)
        for name in ("lr_batch", "crop_padding"):
            checks.integer(name, getattr(self, name), 0)
        for name in ("momentum", "warmup", "label_smoothing", "gamma"):
            checks.number(name, getattr(self, name), 0, 1)
        for name in ("flip", "normalize"):
            checks.boolean(name, getattr(self, name))
        checks.number("weight_decay", self.weight_decay, 0, 1)
        if not 0 < checks.number("lr", self.lr) < math.inf:
            raise ValueError(f"lr must be a finite number above 0, got {self.lr}")

    def peak_lr(self) -> float:
        """Highest learning rate of the run, after scaling to `batch_size`."""
        return self.lr * self.batch_size / self.lr_batch if self.lr_batch else self.lr

    def lr_at(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of optimiser step `step` (from 0).

        A pure function of the step, so that a resumed run needs no scheduler state.
        """
        peak = self.peak_lr()
        if self.schedule == "constant":
            return peak
        if self.schedule == "steps":
            epoch = step // steps_per_epoch
            return peak * self.gamma ** sum(epoch >= milestone for milestone in self.milestones)
        total = self.epochs * steps_per_epoch
        # A handful of steps at least: the first steps from random weights are the ones that blow up.
        rise = min(max(5, round(self.warmup * total)), total // 2) if self.warmup else 0
        if step < rise:
            return peak * (step + 1) / rise
        return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / (total - rise)))

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain, JSON-ready values."""
        return asdict(self) | {"milestones": list(self.milestones)}


RECIPES: dict[str, Recipe] = {
    "released": Recipe(
        name="released",
        optimizer="adam",
        lr=1e-3,
        schedule="steps",
        milestones=(75, 150),
        gamma=0.5,
        normalize=False,
    ),
    "modern": Recipe(
        name="modern",
        optimizer="sgd",
        # Our networks start from torch's default weights, whose small filters make a step count several times what it
        # does in a ResNet: 0.015 learned faster than 0.03, and 0.1 stalled (v1, CIFAR-10, first epochs).
        lr=0.02,
        lr_batch=100,
        weight_decay=5e-4,
        schedule="cosine",
        warmup=0.05,
        label_smoothing=0.1,
        crop_padding=4,
    ),
}


def make_recipe(base: str | Recipe = "modern", /, **overrides: Any) -> Recipe:
    """A named recipe with some fields replaced.

    Args:
        base: a key of `RECIPES`, or a recipe.
        overrides: fields of `Recipe`; `None` means "as in the base". An `lr` given here is used as
            it is, without scaling to the batch.

    Raises:
        ValueError: unknown recipe or field (names the nearest), or a value out of range.
    """
    if isinstance(base, str):
        base = RECIPES[checks.one_of("recipe", base, RECIPES)]
    changes = {key: value for key, value in overrides.items() if value is not None}
    for key in changes:
        checks.one_of("recipe field", key, [field.name for field in fields(Recipe)])
    if "lr" in changes and "lr_batch" not in changes:
        changes["lr_batch"] = 0
    return replace(base, **changes)
