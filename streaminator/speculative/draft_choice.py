# SPDX-License-Identifier: Apache-2.0
# In compiled code the integers of Python and numpy are one.
# pyright: reportArgumentType=false, reportReturnType=false
"""Compiled: which drafted tokens pay. After a forward, all that is not compiled has to be fetched anew.

Used by: `draft_budget`.
"""

import numpy as np
from numpy.typing import NDArray

from streaminator.compiled import jit, jit_allocating

Floats = NDArray[np.float64]


@jit
def _best_of(
    worth: Floats, num: int, speed: float, reach: Floats, rising: Floats, multiple: int, start: int
) -> tuple[int, float, float]:
    """Of how many the sum of falling worth exceeds the price most, the price of these, and the gain."""
    segment = 0
    best, most, total, first, price = 0, 0.0, 0.0, 0.0, 0.0
    for n in range(num + 1):
        size = (start + n + multiple - 1) // multiple * multiple
        while segment < len(reach) - 2 and reach[segment + 1] <= size:
            segment += 1
        cost = rising[segment]
        if size > reach[segment]:
            slope = (rising[segment + 1] - cost) / (reach[segment + 1] - reach[segment])
            cost += slope * (size - reach[segment])
        cost *= speed
        if n == 0:
            first, most = cost, -cost
            continue
        total += worth[n - 1]
        if total - cost > most:
            best, most, price = n, total - cost, cost - first
    return best, price, most + first


@jit_allocating
def choose(
    survival: NDArray[np.float32],
    trust: float,
    speed: float,
    reach: Floats,
    rising: Floats,
    multiple: int,
    num_tokens: int,
    max_tokens: int,
) -> tuple[NDArray[np.bool_], float, float, bool, float]:
    """Choose what to verify; see `draft_budget`.

    Args:
        survival: [n, 2, k] as in `DraftBudget.cut`.
        trust: what it is multiplied by.
        speed: tokens per second that a longer step is compared with.
        reach: see `StepCosts`.
        rising: see `StepCosts.prices`.
        multiple: see there.
        num_tokens: packed without drafts.
        max_tokens: most drafts.

    Returns:
        [n, 2, k] what pays; the sum of its survival; the least survival of it (if none pays, the
        greatest there is); whether all that there is pays; by how many tokens what it brings exceeds
        its price.
    """
    k = survival.shape[2]
    flat = survival.ravel()
    pays = np.zeros(flat.size, np.bool_)
    places = np.flatnonzero(flat)
    num = min(len(places), max_tokens)
    falling = np.empty(len(places))
    for index in range(len(places)):
        falling[index] = -trust * flat[places[index]]
    # Worth never rises along a chain nor from it to the side, and the sort is stable.
    order = np.argsort(falling, kind="mergesort")
    worth = -falling[order]
    best, price, gain = _best_of(worth, num, speed, reach, rising, multiple, num_tokens)
    if price > 0:
        # A second choice that is right is computed once more, in the next step.
        share = max(1 - price / best, 0.0)
        for index in range(len(places)):
            if places[index] // k & 1:
                falling[index] *= share
        order = np.argsort(falling, kind="mergesort")
        worth = -falling[order]
        best, price, gain = _best_of(worth, num, speed, reach, rising, multiple, num_tokens)
    expects = 0.0
    for index in range(best):
        place = places[order[index]]
        pays[place] = True
        expects += flat[place]
    least = 0.0
    if num:
        least = np.float64(flat[places[order[max(best - 1, 0)]]])
    return pays.reshape(survival.shape), expects, least, best == num, gain
