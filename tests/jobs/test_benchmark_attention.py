# SPDX-License-Identifier: Apache-2.0
"""The attention benchmark, as far as it goes without a GPU."""

import pytest
import torch

from jobs import benchmark_attention
from streaminator.engine.attention import LayerCall
from streaminator.engine.kv_cache import LayerShape
from streaminator.engine.paged_attention import has_triton

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@CPU_ONLY
def test_without_a_gpu_it_says_so(capsys):
    assert benchmark_attention.main([]) == 0
    assert "no GPU" in capsys.readouterr().out


@CPU_ONLY
@pytest.mark.skipif(not has_triton(), reason="Triton is not installed")
def test_both_sides_compute_the_same(monkeypatch, interpreter):
    results = []
    monkeypatch.setattr(
        benchmark_attention, "_seconds", lambda calls: results.extend(call() for call in calls)
    )
    call = LayerCall(4, LayerShape(2, 16, 16), torch.float32, None, None, None)
    benchmark_attention._measure(call, 2, 300, 3, torch.device("cpu"))
    assert results[0].abs().max() > 0
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
