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

from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    # Read when kernels are defined: they run on the CPU then. Not for programs that tests start.
    os.environ["TRITON_INTERPRET"] = "1"
    for name in ("paged_kernels", "gpu_kernels", "sampling_kernels"):
        importlib.import_module(f"streaminator.engine.{name}")
    del os.environ["TRITON_INTERPRET"]

from streaminator.engine.model_runner import ModelRunner
from tests.fakes import FREE, PROMPTS, TOKENIZER, Draws, draw, load_runner, save_model

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where tests run in several processes, a file is one's, and whatever starts a Ray is one's, too."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            name = "ray" if item.get_closest_marker("ray") else str(item.path)
            item.add_marker(pytest.mark.xdist_group(name))


SMALL_TRIALS = {
    "gpu_products._LOW_ROWS": 8,
    "gpu_products._HIGH_ROWS": 16,
    "gpu_products._FEW_TILES": 2,
    "gpu_sampling._TRIED_ROWS": 4,
    "llama_like._LENGTHS": (5, 18),
    "paged_attention.SPLIT": 256,
}


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run on the CPU where there is no card.

    Triton's interpreter multiplies the bits of bfloat16 as if they were integers (3.9). And numpy's
    products of float32 depend on how many rows there are, on some processors.
    """
    if torch.cuda.is_available() or not importlib.util.find_spec("triton"):
        return
    # Read again when a kernel runs.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    module = importlib.import_module("triton.runtime.interpreter")

    def widened(handle: Any) -> np.ndarray:
        if handle.dtype.scalar.name != "bf16":
            return handle.data.astype(np.float64)
        return (handle.data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)

    def product(builder: Any, a: Any, b: Any, base: Any, *options: Any) -> Any:
        result = np.matmul(widened(a), widened(b)).astype(base.data.dtype)
        return module.TensorHandle(result + base.data, base.dtype.scalar)

    monkeypatch.setattr(module.InterpreterBuilder, "create_dot", product)
    # It knows tiles of any height, and is slow.
    for name, number in SMALL_TRIALS.items():
        monkeypatch.setattr(f"streaminator.engine.{name}", number)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    """A tiny random Llama in float32. Whoever changes its weights puts them back."""
    folder = save_model(tmp_path_factory.mktemp("llama"), "Llama", dtype=torch.float32)
    return load_runner(folder, "float32")


@pytest.fixture(scope="session")
def free(llama: ModelRunner) -> Draws:
    """Completions that only their length ends, with their text."""
    return draw(llama, PROMPTS, sampling=FREE, tokenizer=TOKENIZER)


@pytest.fixture
def overlapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams take their steps in the order that they have on a GPU."""
    monkeypatch.setattr(ModelRunner, "is_asynchronous", True)
