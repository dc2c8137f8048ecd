"""The bins of every histogram: fixed, so that counts of any two states add up.

Two bins an octave from 2^-16 to 2^20 on either side of 0, so an edge is 1 or 1.5 times a power of
two and the bin of a float32 can be read off its bits:

    0         x <= -2^20
    1 .. 72   negative, towards 0
    73        -2^-16 < x <= 0
    74        0 < x < 2^-16
    75 .. 146 positive, away from 0
    147       x >= 2^20

Bins of positive values include their lower end, those of negative values their upper.
"""

import numpy as np
from numpy.typing import NDArray

LOWEST_EXPONENT, HIGHEST_EXPONENT = -16, 20
PER_SIGN = 2 * (HIGHEST_EXPONENT - LOWEST_EXPONENT)
BINS = 2 * (PER_SIGN + 2)
FIRST_POSITIVE = BINS // 2

SHIFT = 22
"""Bits of a float32 below its exponent and the first bit of its mantissa."""
LOWEST_CODE = 2 * (127 + LOWEST_EXPONENT)
"""What the bits of 2^-16 are, shifted by that."""


def _edges() -> NDArray[np.float64]:
    exponents = np.arange(LOWEST_EXPONENT, HIGHEST_EXPONENT)
    positive = np.append(np.outer(2.0**exponents, (1.0, 1.5)), 2.0**HIGHEST_EXPONENT)
    return np.concatenate(([-np.inf], -positive[::-1], [0.0], positive, [np.inf]))


EDGES = _edges()
"""[BINS + 1], ascending; the first is -inf and the last inf."""
EDGES.flags.writeable = False


def of(values: NDArray[np.float32]) -> NDArray[np.intp]:
    """The bin of each value."""
    bits = values.astype(np.float32).view(np.int32)
    code = ((bits & 0x7FFFFFFF) >> SHIFT) - LOWEST_CODE + 1
    code = np.clip(code, 0, PER_SIGN + 1).astype(np.intp)
    found: NDArray[np.intp] = np.where(values > 0, FIRST_POSITIVE + code, FIRST_POSITIVE - 1 - code)
    return found
