# SPDX-License-Identifier: Apache-2.0
# In compiled code the integers of Python and numpy are one.
# pyright: reportArgumentType=false, reportReturnType=false, reportAssignmentType=false
"""Compiled logarithms, exponentials and sums of lanes: loops of LANES turns and series that vectorise.

Used by: the memory's loops that judge candidates.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from streaminator.compiled import jit_inline

LANES = 16
"""Candidates at a time, those that are not there included.

Loops of floats over them run to an array's length: with a constant number of turns they are unrolled
before they could be vectorised, which takes six times as long.
"""

_ROOT_HALF, _MANTISSA = 0x3FE6A09E667F3BCD, 52
_LN2 = math.log(2)
_LEAST_EXPONENT = -700.0
_ROUNDING = 1.5 * 2.0**_MANTISSA  # added to a number, its low bits are the nearest integer
_ROUNDED = int(np.float64(_ROUNDING).view(np.int64))


def _bits_as(kind: Any, llvm_type: Callable) -> Any:
    """A compiled function that reads 64 bits as another type."""

    def bits_as(context: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], llvm_type())

        return kind(x), generate

    return intrinsic(bits_as)


_as_int: Any = _bits_as(types.int64, lambda: ir.IntType(64))
_as_float: Any = _bits_as(types.float64, ir.DoubleType)


@jit_inline
def log(x: float) -> float:
    """Logarithm of a positive normal number, to 13 digits: unlike the library's it vectorises."""
    bits = _as_int(x)
    exponent = (bits - _ROOT_HALF) >> _MANTISSA
    # Of what is between sqrt(1/2) and sqrt(2) the series of the area tangent is short.
    x = _as_float(bits - (exponent << _MANTISSA))
    t = (x - 1) / (x + 1)
    z = t * t
    series = 1 / 9 + z * (1 / 11 + z * (1 / 13 + z * (1 / 15)))
    series = 1 + z * (1 / 3 + z * (1 / 5 + z * (1 / 7 + z * series)))
    return exponent * _LN2 + 2 * t * series


@jit_inline
def exp(x: float) -> float:
    """Exponential to 8 digits, of what is below -700 as of -700; it vectorises, too."""
    x = max(x, _LEAST_EXPONENT)
    power = _as_int(x * (1 / _LN2) + _ROUNDING) - _ROUNDED
    x -= power * _LN2
    series = 1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040))))
    return (1 + x * (1 + x * (0.5 + x * series))) * _as_float((power + 1023) << _MANTISSA)


@jit_inline
def sum_of_lanes(x: NDArray) -> float:
    """Of LANES numbers, pairwise."""
    low = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]))
    return low + (((x[8] + x[9]) + (x[10] + x[11])) + ((x[12] + x[13]) + (x[14] + x[15])))


@jit_inline
def most_of_lanes(x: NDArray) -> float:
    """The greatest of LANES numbers."""
    first, second, third, fourth = x[0], x[1], x[2], x[3]
    for k in range(4, LANES, 4):
        first, second = max(first, x[k]), max(second, x[k + 1])
        third, fourth = max(third, x[k + 2]), max(fourth, x[k + 3])
    return max(max(first, second), max(third, fourth))
