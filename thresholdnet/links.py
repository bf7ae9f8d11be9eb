"""Link patterns: which earlier nodes each layer of a block reads.

Node 0 is the input of the block, node i the output of layer i, layers are 1..L. A pattern is a tuple of L tuples; entry
i-1 holds the sources of layer i in concatenation order, which is also the order of the input channels of its weight.
Dense and sparse-dense rows ascend; harmonic, even-log and log-dense rows list the nearest node first, as the released
networks do. Pure Python: nothing here needs torch.

Sources: DenseNet (arXiv 1608.06993), LogDenseNet (arXiv 1711.00002), SparseNet (arXiv 1804.05340), HarDNet
(arXiv 1909.00948) and ThresholdNet (arXiv 2108.12604, equations 1-3 and Tables I-III).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .checks import integer, one_of

MAX_LAYERS = 1024
"""Most layers a pattern may have: a dense one of this depth has half a million links."""


class Links(tuple[tuple[int, ...], ...]):
    """The sources of every layer; equal to (and hashing like) the plain tuple of tuples.

    Attributes:
        pattern: name of the rule that made it, "custom" for links given by hand.
        threshold: number of leading layers on the dense side of the threshold; 0 where there are none. The whole depth
            for `dense`, `log_dense` and `sparse_dense`, which know no harmonic side.
    """

    pattern: str
    threshold: int

    def __new__(cls, sources: Iterable[Iterable[int]], pattern: str = "custom", threshold: int = 0) -> Links:
        """Validate `sources` (see `custom`) and remember the pattern's name and threshold."""
        self = super().__new__(cls, _validated(sources))
        self.pattern = pattern
        self.threshold = threshold
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (tuple(self), self.pattern, self.threshold)

    def __repr__(self) -> str:
        return f"Links({self.pattern}, layers={len(self)}, threshold={self.threshold}, links={self.total})"

    @property
    def total(self) -> int:
        """Number of links, the figure that the paper sums up per table."""
        return sum(map(len, self))

    def rows(self) -> list[tuple[int, str]]:
        """(layer, "0-4-6-7") pairs with ascending sources, the notation of the paper's Tables I to III."""
        return [(i, "-".join(map(str, sorted(row)))) for i, row in enumerate(self, start=1)]


def custom(sources: Iterable[Iterable[int]]) -> Links:
    """Links given by hand; threshold 0.

    Raises:
        TypeError: `sources` is not an iterable of iterables of integers.
        ValueError: no layers, a layer without sources, a source that is repeated, negative, or not before its layer.
    """
    return sources if isinstance(sources, Links) else Links(sources)


def dense(layers: int) -> Links:
    """Layer i reads every earlier node, 0 .. i-1 (DenseNet)."""
    depth = _depth(layers)
    return Links((_dense(i) for i in range(1, depth + 1)), "dense", depth)


def log_dense(layers: int) -> Links:
    """Layer i reads i - 2^n for every 2^n <= i (LogDenseNet)."""
    depth = _depth(layers)
    return Links((_log(i) for i in range(1, depth + 1)), "log_dense", depth)


def sparse_dense(layers: int, n: int) -> Links:
    """Layer i reads the farthest nodes k <= n and the nearest k >= i - n (SparseNet; the paper's equation 1)."""
    depth, keep = _depth(layers), integer("n", n, 1)
    return Links((_sparse(i, keep) for i in range(1, depth + 1)), "sparse_dense", depth)


def harmonic(layers: int) -> Links:
    """Layer i reads i - 2^n for every 2^n that divides i (HarDNet)."""
    depth = _depth(layers)
    return Links((_harmonic(i) for i in range(1, depth + 1)), "harmonic", 0)


def even_log(layers: int) -> Links:
    """Odd layers read i - 1, even ones i - 2^n for every 2^n <= i: the paper's tables above the threshold."""
    depth = _depth(layers)
    return Links((_even_log(i) for i in range(1, depth + 1)), "even_log", 0)


def threshold_ab(layers: int, threshold: int, above: str = "even_log") -> Links:
    """Dense up to and with layer `threshold`, the rule `above` ("even_log" or "harmonic") after it (equation 2)."""
    return _threshold("threshold_ab", layers, threshold, _dense, above)


def threshold_bc(layers: int, threshold: int, above: str = "even_log") -> Links:
    """Sparse-dense with n = max(1, threshold // 4) up to the threshold, the rule `above` after it (equation 3)."""
    keep = max(1, integer("threshold", threshold, 0) // 4)
    return _threshold("threshold_bc", layers, threshold, lambda i: _sparse(i, keep), above)


PATTERNS: tuple[str, ...] = (
    "dense", "log_dense", "sparse_dense", "harmonic", "even_log", "threshold_ab", "threshold_bc",
)  # fmt: skip
"""Every named pattern, in the order of the paper's exposition."""


def make(pattern: str, layers: int, *, threshold: int = 0, above: str = "even_log", n: int | None = None) -> Links:
    """Build a pattern by its name; `threshold` and `above` serve the threshold patterns, `n` serves sparse_dense.

    Raises:
        ValueError: unknown pattern (the nearest names are given), or sparse_dense without `n`.
    """
    one_of("pattern", pattern, PATTERNS)
    if pattern == "threshold_ab":
        return threshold_ab(layers, threshold, above)
    if pattern == "threshold_bc":
        return threshold_bc(layers, threshold, above)
    if pattern == "sparse_dense":
        if n is None:
            raise ValueError(
                "n is required by the pattern sparse_dense: how many nodes to keep at either end, got None"
            )
        return sparse_dense(layers, n)
    simple: dict[str, Callable[[int], Links]] = {
        "dense": dense, "log_dense": log_dense, "harmonic": harmonic, "even_log": even_log,
    }  # fmt: skip
    return simple[pattern](layers)


def _dense(i: int) -> tuple[int, ...]:
    return tuple(range(i))


def _sparse(i: int, n: int) -> tuple[int, ...]:
    return tuple(k for k in range(i) if k <= n or k >= i - n)


def _powers(i: int) -> list[int]:
    return [1 << e for e in range(i.bit_length())]  # every power of two <= i


def _log(i: int) -> tuple[int, ...]:
    return tuple(i - p for p in _powers(i))


def _harmonic(i: int) -> tuple[int, ...]:
    return tuple(i - p for p in _powers(i) if i % p == 0)


def _even_log(i: int) -> tuple[int, ...]:
    return (i - 1,) if i % 2 else _log(i)


ABOVE: dict[str, Callable[[int], tuple[int, ...]]] = {"even_log": _even_log, "harmonic": _harmonic}
"""The rules that may stand above a threshold."""


def _threshold(name: str, layers: int, threshold: int, below: Callable[[int], tuple[int, ...]], above: str) -> Links:
    depth, last_dense = _depth(layers), integer("threshold", threshold, 0)
    sparse = ABOVE[one_of("above", above, ABOVE)]
    rows = (below(i) if i <= last_dense else sparse(i) for i in range(1, depth + 1))
    return Links(rows, name, last_dense)


def _depth(layers: int) -> int:
    return integer("layers", layers, 1, MAX_LAYERS)


def _validated(sources: Iterable[Iterable[int]]) -> tuple[tuple[int, ...], ...]:
    if isinstance(sources, str) or not isinstance(sources, Iterable):
        raise TypeError(f"links must be a sequence of source tuples, one a layer, got {type(sources).__name__}")
    rows: list[tuple[int, ...]] = []
    for i, row in enumerate(sources, start=1):
        if isinstance(row, str) or not isinstance(row, Iterable):
            raise TypeError(f"links of layer {i} must be a sequence of node numbers, got {row!r}")
        rows.append(_validated_row(i, list(row)))
    if not 1 <= len(rows) <= MAX_LAYERS:
        raise ValueError(f"links must hold from 1 to {MAX_LAYERS} layers, got {len(rows)}")
    return tuple(rows)


def _validated_row(i: int, row: Sequence[int]) -> tuple[int, ...]:
    if not row:
        raise ValueError(f"links of layer {i} must name at least one source node, got none")
    nodes = tuple(integer(f"source of layer {i}", k) for k in row)
    for k in nodes:
        if not 0 <= k < i:
            raise ValueError(f"source of layer {i} must be a node from 0 to {i - 1}, got {k}")
    if len(set(nodes)) < len(nodes):
        raise ValueError(f"links of layer {i} must name each source once, got {nodes}")
    return nodes
