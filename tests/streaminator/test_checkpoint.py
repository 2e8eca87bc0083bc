# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that would be sampled wrongly are refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from streaminator.config import ModelConfig
from streaminator.engine import checkpoint
from streaminator.engine.checkpoint import model_fingerprint
from streaminator.errors import ModelError
from tests.fakes import load_runner, save_model


def test_a_checkpoint_that_lacks_weights_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "Llama", dtype=torch.float32)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        load_runner(folder, "float32")


@pytest.mark.parametrize("size", [100_000, 1_000_000])
def test_weights_that_change_anywhere_in_a_file_are_other_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """A file that is read whole, and one that is sampled: a matrix in its middle is another."""
    monkeypatch.setattr(checkpoint, "_READ_WHOLE", 200_000)
    monkeypatch.setattr(checkpoint, "_SPACING", 20_000)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(size))
    config = ModelConfig(model_name=str(tmp_path))
    before = model_fingerprint(config)
    assert model_fingerprint(config) == before
    seen = {before}
    for start in range(0, size, size // 5):
        content = bytearray(size)
        content[start : start + size // 20] = b"x" * (size // 20)
        file.write_bytes(content)
        seen.add(model_fingerprint(config))
    assert len(seen) == 6
    file.write_bytes(bytes(size + 1))
    assert model_fingerprint(config) not in seen
