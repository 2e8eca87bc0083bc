# SPDX-License-Identifier: Apache-2.0
"""Settings and models that the tests share."""

import importlib
import importlib.util
import os

# Read on import.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# As `main_program` sets it, which in the tests is called after the import.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Ray listens on loopback then, not on the machine's outer address.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
# Its workers would stand behind everything else on this machine, for minutes where that is busy.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - so spelled by Ray

import pytest
import torch

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    # Read when kernels are defined: they run on the CPU then. Not for programs that tests start.
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("streaminator.engine.paged_kernels")
    del os.environ["TRITON_INTERPRET"]

from streaminator.engine.model_runner import ModelRunner
from tests.fakes import FREE, PROMPTS, TOKENIZER, Draws, draw, load_runner, save_model

torch.set_num_threads(1)


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton reads it again when a kernel runs."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    """A tiny random Llama in float32. Whoever changes its weights puts them back."""
    folder = save_model(tmp_path_factory.mktemp("llama"), "Llama", dtype=torch.float32)
    return load_runner(folder, "float32")


@pytest.fixture(scope="session")
def free(llama: ModelRunner) -> Draws:
    """Completions that only their length ends, with their text."""
    return draw(llama, PROMPTS, sampling=FREE, tokenizer=TOKENIZER)
