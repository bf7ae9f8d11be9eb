"""From times to figures: percentiles, and ratios paired by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def spread(values: Sequence[float]) -> dict[str, float]:
    """median, p20 and p80 (linear between neighbours). Raises ValueError for no values."""
    if not len(values):
        raise ValueError("spread needs at least one value, got none")
    low, middle, high = np.percentile(np.asarray(values, dtype=np.float64), (20, 50, 80))
    return {"median": float(middle), "p20": float(low), "p80": float(high)}


def paired_ratio(baseline: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Spread of baseline / ours over rounds: above 1, ours is faster.

    The ratio is taken inside each round, so that what slows a whole round (a clock, a neighbour) drops out.

    Raises:
        ValueError: not one time a round on both sides.
    """
    if len(baseline) != len(ours):
        raise ValueError(f"a paired ratio needs as many times on both sides, got {len(baseline)} and {len(ours)}")
    return spread([b / o for b, o in zip(baseline, ours, strict=True)])


def ratios(times: Mapping[str, Sequence[float]], of: str, baselines: Sequence[str]) -> dict[str, dict[str, float]]:
    """Paired ratios of one entrant against every baseline that ran beside it, but for itself."""
    return {name: paired_ratio(times[name], times[of]) for name in baselines if name in times and name != of}


def order(count: int, round_number: int) -> list[int]:
    """In which order a round's entrants run: each starts as often as the others, and neighbours swap sides.

    Rounds 2 r and 2 r + 1 start at entrant r; the odd one runs backwards.
    """
    first = (round_number // 2) % count
    turned = [*range(first, count), *range(first)]
    return turned[::-1] if round_number % 2 else turned
