# SPDX-License-Identifier: Apache-2.0
"""Packed linear layers: the same products, whatever else is in the batch."""

import copy
import ctypes
from pathlib import Path

import pytest
import torch

from streaminator.engine import packed_linear
from streaminator.engine.compile_kernels import KernelsMissingError
from streaminator.engine.kernels import Kernels
from streaminator.engine.model_runner import ModelRunner
from streaminator.engine.packed_linear import Packer, find_packable, pack_linear

SHAPES = [(16, 16), (64, 320), (100, 37), (576, 1536), (1536, 576), (4096, 64)]


@pytest.fixture(params=[False, True], ids=["oneDNN", "own"])
def compiled(request: pytest.FixtureRequest) -> bool:
    """Whether the products are those of this project's kernels."""
    return request.param


def make_kernels(dtype: torch.dtype) -> Kernels:
    if dtype == torch.float16:
        pytest.skip("no kernels of float16")
    try:
        return Kernels(dtype)
    except KernelsMissingError as error:
        pytest.skip(f"no compiled kernels: {error}")


def layers(
    dtype: torch.dtype, compiled: bool = False
) -> tuple[torch.nn.ModuleList, torch.nn.ModuleList]:
    """The same random layers, plain and packed; every other one has a bias."""
    torch.manual_seed(0)
    plain = torch.nn.ModuleList(
        torch.nn.Linear(num_in, num_out, bias=bool(index % 2), dtype=dtype)
        for index, (num_in, num_out) in enumerate(SHAPES)
    )
    packed = copy.deepcopy(plain)
    packer = Packer(make_kernels(dtype) if compiled else None)
    pack_linear(find_packable(packed, packer), packer)
    return plain, packed


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
    ids=str,
)
@torch.inference_mode()
def test_a_packed_layer_computes_what_the_plain_one_does(
    dtype: torch.dtype, tolerance: float, compiled: bool
) -> None:
    for plain, packed in zip(*layers(dtype, compiled), strict=True):
        for num in (4, 24, 36, 72):
            rows = torch.randn(1, num, plain.in_features, dtype=dtype)
            torch.testing.assert_close(packed(rows), plain(rows), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str
)
@torch.inference_mode()
def test_a_residual_is_added_to_a_product(
    dtype: torch.dtype, tolerance: float, compiled: bool
) -> None:
    for plain, packed in zip(*layers(dtype, compiled), strict=True):
        if "forward" in vars(packed):
            rows = torch.randn(11, plain.in_features, dtype=dtype)
            residual = torch.randn(11, plain.out_features, dtype=dtype)
            added = packed.forward.add_to(residual, rows)
            expected = residual + plain(rows)
            torch.testing.assert_close(added, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_a_row_is_the_same_in_any_batch(dtype: torch.dtype, compiled: bool) -> None:
    for layer in layers(dtype, compiled)[1]:
        if "forward" not in vars(layer):
            continue
        rows = torch.randn(160, layer.in_features, dtype=dtype)
        all_rows = layer(rows)
        for start, num in ((0, 8), (8, 16), (16, 40), (56, 104)):
            part = layer(rows[start : start + num].contiguous())
            assert torch.equal(part, all_rows[start : start + num])


@torch.inference_mode()
def test_a_layer_whose_rows_would_depend_on_the_batch_stays_plain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Depends(packed_linear._OneDnnProduct):
        def __call__(self, x):
            return super().__call__(x) + (1e-3 if len(x) > 100 else 0)

    monkeypatch.setattr(packed_linear, "_OneDnnProduct", Depends)
    for plain, packed in zip(*layers(torch.float32), strict=True):
        rows = torch.randn(128, plain.in_features)
        assert torch.equal(packed(rows), plain(rows))


def test_types_without_packed_products_stay_plain() -> None:
    for layer in layers(torch.float64)[1]:
        assert "forward" not in vars(layer)


def test_new_weights_are_packed_again(llama: ModelRunner) -> None:
    llama.pack_weights(block_size=16)
    layer = llama.model.lm_head
    rows = torch.randn(8, layer.in_features)
    with torch.inference_mode():
        before = layer(rows)
        kept = layer.weight.clone()
        layer.weight.mul_(2)
        llama.repack_weights()
        doubled = layer(rows)
        layer.weight.copy_(kept)
        llama.repack_weights()
    assert torch.equal(doubled, 2 * before)
    assert torch.equal(layer(rows), before)


def test_where_there_is_amx_it_is_used() -> None:
    """Else products would be exact, and slower, and nobody would know."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        flags = ""
    if "amx_bf16" not in flags:
        pytest.skip("no AMX")
    # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), which sandboxes may refuse.
    if ctypes.CDLL(None).syscall(158, 0x1023, 18):
        pytest.skip("the system does not allow AMX")
    assert make_kernels(torch.bfloat16)._library.has_tiles()
