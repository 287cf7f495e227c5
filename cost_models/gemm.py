"""Time of a matrix product on a GPU: output tiles in waves over the multiprocessors.

A product is cut into tiles; each multiprocessor works on one tile at a time, so the last wave leaves
some of them idle. Libraries choose between large tiles, which reach the device's best rate, and smaller
ones or a split of the inner dimension, which fill more multiprocessors (NVIDIA, "Matrix Multiplication
Background User's Guide", sections on tile and wave quantization).
"""

import math
from functools import lru_cache
from itertools import product

from graphpar.catalogue import DeviceKind

TILES = (
    (256, 128, 1.0),
    (128, 256, 1.0),
    (128, 128, 0.95),
    (128, 64, 0.75),
    (64, 128, 0.75),
    (64, 64, 0.5),
)
"""Rows, columns and the share of the best rate that a tile's shape reaches: what it loads per operation
grows with its edge."""

SPLITS = (1, 2, 4)
"""Into how many parts the inner dimension may be cut; parts are added up afterwards."""

FILL_S = 0.5e-6
"""Filling one wave's pipelines with operands."""

RESULT_BYTES = 2

MIN_INNER = 256
"""Parts of the inner dimension shorter than this are not worth a split."""

POWER_BOUND = frozenset({"hopper", "blackwell-sm100", "blackwell-sm103"})
"""Families that steps of products in 16 bits bring to the limit of their power, where clocks fall: single
ones, by which rates were measured, are over before."""

AMPLE_POWER = 1e-12
"""Watts for each FLOP/s in 16 bits from which a device of these families stays below that limit: H20, an
H100 with fewer multiprocessors, has 2.7e-12 and reaches 0.96 of its peak; the others have no more than
0.71e-12."""


def is_power_bound(kind: DeviceKind) -> bool:
    """Whether steps of products in 16 bits run at the limit of a device's power.

    >>> from graphpar.catalogue import devices
    >>> [is_power_bound(devices()[name]) for name in ("h100-sxm-80gb", "h20-sxm-96gb", "a100-sxm-80gb")]
    [True, False, False]
    """
    watts = kind.power_w or 0.0
    return kind.family in POWER_BOUND and watts < AMPLE_POWER * kind.peak_flops_per_s["bfloat16"]


@lru_cache(maxsize=2**14)
def product_s(
    rows: float,
    columns: float,
    inner: float,
    count: float,
    *,
    flops_per_s: float,
    multiprocessors: int,
    bytes_per_s: float,
) -> float:
    """Time of `count` half-precision products of rows x inner by inner x columns.

    Args:
        rows, columns, inner, count: The shape; fractions (averages over devices) are allowed.
        flops_per_s: Rate of a product that fills the device evenly.
        multiprocessors: How many tiles run at once.
        bytes_per_s: Memory bandwidth, at which a wave's results are written.

    >>> a100 = {"flops_per_s": 259e12, "multiprocessors": 108, "bytes_per_s": 1.7e12}
    >>> wide = product_s(6144, 12288, 12288, 1, **a100)
    >>> round(2 * 6144 * 12288 * 12288 / wide / 1e12)  # measured on A100: 251 TFLOP/s
    250
    """
    each_flops_per_s = flops_per_s / multiprocessors
    found = math.inf
    for (high, wide, share), split in product(TILES, SPLITS):
        if split > 1 and inner / split < MIN_INNER:
            continue
        tiles = math.ceil(rows / high) * math.ceil(columns / wide) * count * split
        waves = math.ceil(tiles / multiprocessors)
        tile = 2.0 * high * wide * inner / split / (each_flops_per_s * share)
        written = high * wide * RESULT_BYTES * multiprocessors / bytes_per_s
        found = min(found, waves * (tile + written + FILL_S) + (split - 1) * written)
    return found
