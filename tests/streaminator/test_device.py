# SPDX-License-Identifier: Apache-2.0
"""Cards that are not here: which one is meant, and what is said of one that fails."""

import pytest
import torch

from streaminator.config import ModelConfig
from streaminator.engine import model_runner
from streaminator.engine.device import check_card, with_index
from streaminator.engine.model_runner import ModelRunner
from streaminator.errors import DeviceError
from tests.fakes import save_model


def test_cuda_is_the_card_that_is_current_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread, or this one later, has another current card."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert with_index(torch.device("cuda")) == torch.device("cuda:3")
    assert with_index(torch.device("cuda:1")) == torch.device("cuda:1")
    assert with_index(torch.device("cpu")) == torch.device("cpu")


def test_a_card_that_fails_since_a_kernel_was_tried_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    check_card(torch.device("cuda:0"))

    def fails(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access\nCompile with")

    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    with pytest.raises(DeviceError, match=r"illegal memory access\); give --no_paged_attention"):
        check_card(torch.device("cuda:0"))
    check_card(torch.device("cpu"))


def test_a_model_that_a_device_has_no_room_for_is_one_line(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path_factory.mktemp("model"), "Llama", dtype=torch.float32)
    load = model_runner.load_model

    def too_large(*args: object) -> torch.nn.Module:
        model = load(*args)  # type: ignore[arg-type]

        def fails(*_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.\nSee documentation")

        model.to = fails  # type: ignore[method-assign]
        return model

    monkeypatch.setattr(model_runner, "load_model", too_large)
    with pytest.raises(DeviceError, match=r"does not fit into the memory of cpu") as caught:
        ModelRunner(ModelConfig(model_name=str(folder), device="cpu"))
    assert "\n" not in str(caught.value)
