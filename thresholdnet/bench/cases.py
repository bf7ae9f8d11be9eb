"""Steps that are measured: of one model, or of one block, on images of one size, in one dtype and one mode; presets."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from ..checks import integer, key_values, one_of
from ..memory import DTYPES
from ..models import list_models, model_arguments

MODES = ("train", "infer")
SMALL_IMAGE = 64  # pixels: below, a network gets CIFAR-10's 10 classes, from there on ImageNet's 1000


@dataclass(frozen=True)
class Case:
    """One kind of step.

    Attributes:
        model: a name of the zoo, with its arguments behind a colon: "thresholdnet_ab:width_mult=0.25,threshold=4"; and
            behind a slash the stage whose block alone is meant: "thresholdnet_v1/stages.3".
        image: side of the network's images in pixels.
        batch: images a step.
        dtype: "fp32", "bf16", "fp16" or "fp64": of weights and images.
        mode: "train" (gradients set to None, forward, cross entropy, backward) or "infer" (eval, no_grad, forward). A
            block alone has no loss: a gradient comes from outside, and goes on to the block's input.
    """

    table: ClassVar[str] = "rows"
    """Where a file of results keeps its rows."""

    model: str
    image: int
    batch: int
    dtype: str
    mode: str

    def __post_init__(self) -> None:
        name, arguments = self.architecture()
        one_of("model", name, list_models())
        if self.stage is not None and not re.fullmatch(r"stages\.\d+", self.stage):
            raise ValueError(f"model must name its block as NAME/stages.NUMBER, got {self.model!r}")
        unknown = [key for key in arguments if key not in model_arguments(name)]
        if unknown:
            raise ValueError(f"model {name} takes {', '.join(model_arguments(name))}, got {unknown[0]!r}")
        integer("image", self.image, 1)
        integer("batch", self.batch, 1)
        one_of("dtype", self.dtype, DTYPES)
        one_of("mode", self.mode, MODES)

    def architecture(self) -> tuple[str, dict[str, Any]]:
        """The model's name and its arguments."""
        name, _, text = self.network.partition(":")
        pairs = filter(None, re.split(r",(?![^\[]*\])", text))  # not at the commas inside a list
        return name, key_values(pairs, "model must be NAME or NAME:KEY=VALUE,KEY=VALUE", self.model)

    @property
    def network(self) -> str:
        """`model` without the block."""
        return self.model.partition("/")[0]

    @property
    def stage(self) -> str | None:
        """The stage whose block alone is meant, None for the whole network."""
        return self.model.partition("/")[2] if "/" in self.model else None

    @property
    def classes(self) -> int:
        """Outputs of the head."""
        return 10 if self.image < SMALL_IMAGE else 1000

    @property
    def fields(self) -> dict[str, Any]:
        """What a row of the results says of its case."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.model} {self.batch}x{self.image}x{self.image} {self.dtype} {self.mode}"


@dataclass(frozen=True)
class Preset:
    """A list of cases by a name; every field is a list, `sizes` of (image, batch)."""

    models: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    dtypes: tuple[str, ...]
    modes: tuple[str, ...]
    providers: tuple[str, ...]


PRESETS = {
    "cpu": Preset(
        ("thresholdnet_v1", "hardnet68", "densenet121"),
        ((224, 8), (32, 100)),
        ("fp32",),
        MODES,
        (
            "eager", "eager_channels_last", "eager_folded", "compile", "compile_frozen", "checkpoint", "fused_native",
            "fused_native_recompute", "fused_native_prepacked", "fused_winograd",
        ),
    ),
    "gpu": Preset(
        ("thresholdnet_v1", "thresholdnet_v2", "hardnet68", "densenet121"),
        ((224, 128), (32, 100)),
        ("bf16",),
        MODES,
        (
            "eager", "eager_channels_last", "eager_cudnn_benchmark", "eager_padded8", "eager_folded", "compile",
            "compile_folded", "compile_max_autotune", "checkpoint", "fused_native", "fused_native_recompute",
            "fused_triton", "fused_triton_recompute",
        ),
    ),
    "quick": Preset(
        ("thresholdnet_ab:width_mult=0.25",),
        ((32, 2),),
        ("fp32",),
        MODES,
        (
            "eager", "eager_channels_last", "eager_padded8", "eager_folded", "checkpoint", "fused_native",
            "fused_native_recompute", "fused_winograd",
        ),
    ),
}  # fmt: skip
"""cpu and gpu: the cases of the project's targets, batch and image each; quick: a trial of some seconds."""
