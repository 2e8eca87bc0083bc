# SPDX-License-Identifier: Apache-2.0
"""Tests of memory in huge pages: what is handed out is whole, apart, and given back."""

import mmap

import pytest
import torch

from streaminator.engine.huge_pages import Pages, zeros


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3,), (7, 5, 11), (5, 600, 700)])
def test_zeros_are_zeros_of_the_shape_asked_for(shape, dtype):
    tensor = zeros(shape, dtype)
    assert (tensor.shape, tensor.dtype) == (shape, dtype)
    assert tensor.is_contiguous()
    assert torch.equal(tensor, torch.zeros(shape, dtype=dtype))
    tensor.fill_(1)
    assert tensor.double().sum() == tensor.numel()


def test_pieces_do_not_overlap_and_start_at_cache_lines():
    pages = Pages()
    # The last is larger than what is asked for at a time.
    sizes = [1, 3, 1000, 5 << 20, 6 << 20, 17, 70 << 20]
    pieces = [pages.empty_like(torch.empty(size, dtype=torch.uint8)) for size in sizes]
    for value, piece in enumerate(pieces):
        piece.fill_(value)
    for value, (size, piece) in enumerate(zip(sizes, pieces, strict=True)):
        assert piece.shape == (size,)
        assert piece.data_ptr() % 64 == 0
        assert bool((piece == value).all())


def test_what_is_dropped_piece_by_piece_is_given_back():
    pages = Pages()
    shape = torch.empty(4 << 20, dtype=torch.uint8)
    pieces = [pages.empty_like(shape).fill_(1) for _ in range(16)]
    before = resident_bytes()
    for _ in range(4):  # as weights are packed again
        for place in range(len(pieces)):
            pieces[place] = pages.empty_like(shape).fill_(2)
    # At most a chunk more than before.
    assert resident_bytes() - before < 48 << 20


def test_a_system_without_huge_pages_gives_small_ones(monkeypatch):
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1, raising=False)
    assert not zeros((1 << 20,), torch.float32).any()
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    assert not zeros((1 << 20,), torch.float32).any()


def test_too_much_is_a_memory_error():
    with pytest.raises(MemoryError, match="MiB of memory"):
        zeros((1 << 50,), torch.float32)
