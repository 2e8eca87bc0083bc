# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what --model_name and --tokenizer_name mean, and what is wrong with them.

Used by: `engine.model_runner`, `streaminator.driver`, `streaminator.session`,
`streaminator.resident_session`.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from streaminator.config import ModelConfig
from streaminator.errors import ModelError, first_line

DEMO_MODEL = Path(__file__).parents[1] / "demo"
_READ_WHOLE = 64 << 20  # bytes of a checkpoint's file
_SAMPLE = 4096  # bytes at a time
_SPACING, _MOST_SAMPLES = 2 << 20, 4096  # of a larger one; few matrices have less than 2 MiB


def check_model(config: ModelConfig) -> None:
    """Refuse, before anything is loaded, a model that cannot be a causal language model.

    Raises: ModelError.
    """
    name = config.model_name
    source = _checked_source(name, "--model_name")
    with _one_line(f"--model_name {name}: cannot be loaded", config):
        found = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)
        if found.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or "AutoModelForCausalLM" in (
            getattr(found, "auto_map", None) or {}
        ):
            return
    raise ModelError(f"--model_name {name}: a {found.model_type} is not a causal language model")


def load_tokenizer(config: ModelConfig) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of --tokenizer_name, or the model's own.

    Raises: ModelError when there is none.
    """
    source = _source(config.tokenizer_name or config.model_name)
    with _one_line(f"no tokenizer in {source}: give one with --tokenizer_name", config):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code)


def model_fingerprint(config: ModelConfig) -> str:
    """Hash of the checkpoint's files in a folder, of large ones at many places; of name and commit for
    a hub model."""
    source = Path(_source(config.model_name))
    digest = blake2b(digest_size=8)
    if not source.is_dir():
        found = AutoConfig.from_pretrained(source, trust_remote_code=config.trust_remote_code)
        commit = getattr(found, "_commit_hash", None)
        digest.update(f"{config.model_name} {commit}".encode())
        return digest.hexdigest()
    names = ("*.json", "*.safetensors", "*.bin")
    for path in sorted(p for name in names for p in source.glob(name)):
        digest.update(path.name.encode())
        size = path.stat().st_size
        digest.update(str(size).encode())
        with path.open("rb") as file:
            for start in _sampled_places(size):
                file.seek(start)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def _sampled_places(size: int) -> range:
    """Where a file is read, `_SAMPLE` bytes each: all of it, or of a large one, which would take
    minutes, some of nearly every matrix.
    """
    spacing = _SAMPLE if size <= _READ_WHOLE else max(_SPACING, size // _MOST_SAMPLES)
    return range(0, size, spacing)


def load_model(
    config: ModelConfig, dtype: torch.dtype, attention: str
) -> transformers.PreTrainedModel:
    """The model in `dtype`, with the named attention function.

    Raises: ModelError when it is not a causal language model that can be loaded.
    """
    source = _source(config.model_name)
    return _load(source, f"--model_name {config.model_name}", config, dtype, attention)


def read_weights(name: str, config: ModelConfig, dtype: torch.dtype) -> Mapping[str, torch.Tensor]:
    """The weights of another checkpoint for the model of `config`, by the model's own names.

    Raises: ModelError when it cannot be loaded or lacks some.
    """
    source = _checked_source(name, "update_weights")
    return _load(source, f"update_weights {name}", config, dtype, None).state_dict()


def _load(
    source: str | Path, what: str, config: ModelConfig, dtype: torch.dtype, attention: str | None
) -> transformers.PreTrainedModel:
    # Late: the driver loads no model.
    from transformers import AutoModelForCausalLM

    with _one_line(f"{what}: cannot be loaded", config):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
        )
    model, found = loaded
    if found["missing_keys"]:
        # transformers fills them with random numbers.
        raise ModelError(
            f"{what}: {min(found['missing_keys'])} is missing; save all weights of the model"
        )
    return model


@contextmanager
def _one_line(what: str, config: ModelConfig) -> Iterator[None]:
    """Turn what transformers raises about a checkpoint into one line."""
    try:
        yield
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ImportError,
        RuntimeError,
        SafetensorError,
    ) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"--model_name {config.model_name}: the checkpoint wants to run its own code; "
                "add --trust_remote_code if you trust it"
            ) from error
        raise ModelError(f"{what} ({first_line(error)}); check the name and its files") from error


def _checked_source(name: str, flag: str) -> Path:
    source = Path(_source(name)).expanduser()
    if source.exists() and not (source / "config.json").is_file():
        raise ModelError(
            f"{flag} {name}: not a model folder (no config.json in it); check the path"
        )
    if not source.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ModelError(f"{flag} {name}: no such folder; check the path")
    return source


def _source(name: str) -> str:
    return str(DEMO_MODEL) if name == "demo" else os.path.expanduser(name)
