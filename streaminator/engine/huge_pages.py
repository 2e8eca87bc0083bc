# SPDX-License-Identifier: Apache-2.0
"""Memory in huge pages, where the system has them.

What every step reads from end to end, weights and keys, is spread over more small pages than a
processor has addresses for, and fetching ahead ends at a page's end.

Used by: `kv_cache`, `packed_linear`.
"""

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch

_PAGE = 2 << 20  # bytes, on x86 and on ARM with small pages of 4 KiB
_LINE = 64  # bytes
_CHUNK = 32 << 20
"""Bytes that are asked for at a time: a huge page of its own for each small tensor would waste most."""


def zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of zeros, whose memory is taken when it is first touched.

    Raises: MemoryError when there is not that much address space.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _PAGE:
        return torch.zeros(*shape, dtype=dtype)
    return _map(num_bytes)[:num_bytes].view(dtype).view(*shape)


class Pages:
    """Hands out pieces of huge pages; a chunk is given back when all pieces of it are gone."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous tensor of the same shape and type. Raises: MemoryError."""
        if self._used + tensor.nbytes > len(self._chunk):
            self._chunk = _map(max(tensor.nbytes, _CHUNK))
            self._used = 0
        piece = self._chunk[self._used : self._used + tensor.nbytes]
        self._used += -(-tensor.nbytes // _LINE) * _LINE
        return piece.view(tensor.dtype).view(tensor.shape)


def _map(num_bytes: int) -> torch.Tensor:
    """At least so many bytes, from a page's beginning."""
    try:
        memory = mmap.mmap(-1, num_bytes + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no {num_bytes / 2**20:.0f} MiB of memory") from error
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is not None:
        with suppress(OSError):  # a kernel without them
            memory.madvise(advice)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[-whole.data_ptr() % _PAGE :]
