# SPDX-License-Identifier: Apache-2.0
"""Packed linear layers: the same products, whatever else is in the batch."""

import copy

import pytest
import torch

from streaminator.engine import packed_linear
from streaminator.engine.model_runner import ModelRunner
from streaminator.engine.packed_linear import find_packable, pack_linear

SHAPES = [(16, 16), (64, 320), (100, 37), (576, 1536), (1536, 576), (4096, 64)]


def layers(dtype: torch.dtype) -> tuple[torch.nn.ModuleList, torch.nn.ModuleList]:
    """The same random layers, plain and packed; every other one has a bias."""
    torch.manual_seed(0)
    plain = torch.nn.ModuleList(
        torch.nn.Linear(num_in, num_out, bias=bool(index % 2), dtype=dtype)
        for index, (num_in, num_out) in enumerate(SHAPES)
    )
    packed = copy.deepcopy(plain)
    pack_linear(find_packable(packed))
    return plain, packed


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
@torch.inference_mode()
def test_a_packed_layer_computes_what_the_plain_one_does(
    dtype: torch.dtype, tolerance: float
) -> None:
    for plain, packed in zip(*layers(dtype), strict=True):
        rows = torch.randn(1, 24, plain.in_features, dtype=dtype)
        torch.testing.assert_close(packed(rows), plain(rows), rtol=tolerance, atol=tolerance)


@torch.inference_mode()
def test_a_row_is_the_same_in_any_batch() -> None:
    for layer in layers(torch.float32)[1]:
        rows = torch.randn(160, layer.in_features)
        all_rows = layer(rows)
        for start, num in ((0, 8), (8, 16), (16, 40), (56, 104)):
            part = layer(rows[start : start + num].contiguous())
            assert torch.equal(part, all_rows[start : start + num])


@torch.inference_mode()
def test_a_layer_whose_rows_would_depend_on_the_batch_stays_plain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    product = packed_linear._linear

    def depends(weight, bias, input):
        return product(weight, bias, input) + (1e-3 if len(input) > 100 else 0)

    monkeypatch.setattr(packed_linear, "_linear", depends)
    for plain, packed in zip(*layers(torch.float32), strict=True):
        rows = torch.randn(128, plain.in_features)
        assert torch.equal(packed(rows), plain(rows))


def test_types_without_packed_products_stay_plain() -> None:
    for layer in layers(torch.float64)[1]:
        assert "forward" not in vars(layer)


def test_new_weights_are_packed_again(llama: ModelRunner) -> None:
    llama.pack_weights()
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
