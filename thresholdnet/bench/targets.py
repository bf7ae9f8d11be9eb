"""What the project wants to reach on a CPU: float32, 224x224 pixels, batch 8, against eager in channels_last.

Each pair is (must, aim). Speeds are eager's time over ours; kept is our bytes between forward and backward over
eager's, `fused_recompute` with pairs of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BASE = "eager_channels_last"
OURS = (
    "fused", "fused_recompute", "fused_winograd", "fused_native", "fused_native_recompute", "fused_triton",
    "fused_triton_recompute",
)  # fmt: skip

_SETTING = {"image": 224, "batch": 8, "dtype": "fp32", "graph": False}
_SPEED = {
    ("thresholdnet_v1", "train"): (1.05, 1.15),
    ("hardnet68", "train"): (1.0, 1.25),
    ("densenet121", "train"): (1.06, 1.15),
    ("thresholdnet_v1", "infer"): (1.08, 1.2),
    ("hardnet68", "infer"): (1.03, 1.3),
    ("densenet121", "infer"): (1.15, 1.25),
}
_KEPT = {"thresholdnet_v1": (0.32, 0.29), "hardnet68": (0.33, 0.26), "densenet121": (0.27, 0.23)}
_KEPT_RECOMPUTED = {"thresholdnet_v1": (0.16, 0.13), "densenet121": (0.11, 0.083)}


@dataclass(frozen=True)
class Target:
    """Pairs of (must, aim); None where nothing was set."""

    speed: tuple[float, float] | None
    kept: tuple[float, float] | None


def target_of(row: Mapping[str, Any]) -> Target | None:
    """The target of a row of results, None for a rival or a case that has none."""
    native = row["provider"] in ("fused", "fused_native", "fused_winograd", "fused_recompute")
    if not native or row.get("device", "cpu") != "cpu" or not _SETTING.items() <= row.items():
        return None
    recomputed = row["provider"] == "fused_recompute"
    speed = None if recomputed else _SPEED.get((row["model"], row["mode"]))
    kept = None if row["mode"] == "infer" else (_KEPT_RECOMPUTED if recomputed else _KEPT).get(row["model"])
    return Target(speed, kept) if speed or kept else None
