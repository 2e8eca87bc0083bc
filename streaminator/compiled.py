# SPDX-License-Identifier: Apache-2.0
"""Compile Python's loops over NumPy's arrays.

Used by: `engine.layout`, all compiled loops of the memory, `draft_choice`.
"""

from collections.abc import Callable
from typing import Any

import numba


def _compiled(function: Callable, **options: Any) -> Any:
    """Compile on first use; the result is kept on disk where a folder for it can be written."""
    options |= {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache is writable
        return numba.njit(**options)(function)


def jit_allocating(function: Callable) -> Any:
    """Compile a function that makes arrays."""
    return _compiled(function)


def jit(function: Callable) -> Any:
    """Compile a function that makes none. It does not count references to arrays.

    The caller holds all it sees, and counting takes longer than these loops' own work.
    """
    return _compiled(function, _nrt=False)


def jit_inline(function: Callable) -> Any:
    """The same for what is called in inner loops: passing arrays costs more than its work."""
    return _compiled(function, _nrt=False, forceinline=True)
