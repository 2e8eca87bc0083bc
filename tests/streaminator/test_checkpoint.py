# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that would be sampled wrongly are refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from streaminator.errors import ModelError
from tests.fakes import load_runner, save_model


def test_a_checkpoint_that_lacks_weights_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "Llama", dtype=torch.float32)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        load_runner(folder, "float32")
