# SPDX-License-Identifier: Apache-2.0
"""A power law fitted to counts, and how well it fits beside a geometric distribution.

The exponent is the exact discrete maximum-likelihood estimate with x_min = 1, the maximum of
eq. 3.5 of Clauset, Shalizi & Newman, "Power-law distributions in empirical data", SIAM Review 51
(2009), found where its derivative is 0; not their approximation, eq. 3.7, which is poor at x_min = 1.
The standard error is eq. 3.6, the distance that of Kolmogorov and Smirnov.

Used by: `jobs.profiling_report`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_LEAST, _MOST = 1.001, 30.0
"""Exponents that are looked at: below 1 there is no such distribution, above all are ones."""
_NUM_SUMMED = 64
_SMALL = 1e-4


@dataclass(frozen=True, slots=True)
class Fit:
    """A distribution over 1, 2, 3, ... fitted to counts."""

    parameter: float
    standard_error: float
    log_likelihood: float
    """Mean per counted value, in nats."""
    distance: float
    """The largest between the cumulative distributions, of the fit and of the counts."""
    chances: list[float]
    """Of the values from 1 to the largest there is."""


def fit_power_law(counts: Mapping[int, int]) -> Fit | None:
    """Chance of x: x ** -parameter / zeta(parameter). None without a value above 1.

    Args:
        counts: how often each value occurs; values below 1 are left out.
    """
    values, weights, num = _arrays(counts)
    mean_log = float(weights @ np.log(values)) if num else 0.0
    if not mean_log:
        return None
    low, high = _LEAST, _MOST
    while high - low > 1e-9:
        middle = (low + high) / 2
        # The likelihood's derivative, over the number of values; it falls.
        low, high = (middle, high) if _slope(middle) + mean_log < 0 else (low, middle)
    exponent = (low + high) / 2
    step = min(1e-3, (exponent - 1) / 2)
    curvature = (_slope(exponent + step) - _slope(exponent - step)) / (2 * step)
    log_zeta = _log_zeta(exponent)
    return _fit(
        exponent,
        1 / math.sqrt(num * curvature),
        lambda x: -exponent * np.log(x) - log_zeta,
        values,
        weights,
    )


def fit_geometric(counts: Mapping[int, int]) -> Fit | None:
    """Chance of x: (1 - parameter) ** (x - 1) * parameter. None without a value above 1."""
    values, weights, num = _arrays(counts)
    mean = float(weights @ values) if num else 1.0
    if mean == 1:
        return None
    chance = 1 / mean
    return _fit(
        chance,
        chance * math.sqrt((1 - chance) / num),
        lambda x: (x - 1) * math.log1p(-chance) + math.log(chance),
        values,
        weights,
    )


def _arrays(counts: Mapping[int, int]) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """Values, their shares, and how many were counted."""
    kept = sorted((value, num) for value, num in counts.items() if value >= 1 and num)
    num = sum(num for _, num in kept)
    values = np.array([value for value, _ in kept], np.float64)
    return values, np.array([count / num for _, count in kept]), num


def _fit(
    parameter: float,
    standard_error: float,
    log_chance: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    values: NDArray[np.float64],
    weights: NDArray[np.float64],
) -> Fit:
    chances = np.exp(log_chance(np.arange(1.0, values[-1] + 1)))
    observed = np.zeros_like(chances)
    observed[values.astype(int) - 1] = weights
    return Fit(
        parameter,
        standard_error,
        float(weights @ log_chance(values)),
        float(np.abs(np.cumsum(chances) - np.cumsum(observed)).max()),
        chances.tolist(),
    )


def _slope(exponent: float) -> float:
    """Of log zeta."""
    step = min(_SMALL, (exponent - 1) / 2)
    return (_log_zeta(exponent + step) - _log_zeta(exponent - step)) / (2 * step)


def _log_zeta(exponent: float) -> float:
    """Of Riemann: the first terms, and Euler and Maclaurin's formula for the rest."""
    terms = np.arange(1.0, _NUM_SUMMED) ** -exponent
    rest = _NUM_SUMMED ** (1 - exponent) / (exponent - 1)
    rest += _NUM_SUMMED**-exponent * (0.5 + exponent / (12 * _NUM_SUMMED))
    # The small ones first; log1p keeps what they add to the first term, 1.
    return math.log1p(float(np.sort(terms[1:]).sum()) + rest)
