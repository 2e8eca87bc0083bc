# SPDX-License-Identifier: Apache-2.0
"""Load an unmodified Hugging Face causal model and run packed batches through it.

Used by: `engine.Engine`, `streaminator.session`.
"""

import os
from hashlib import blake2b
from pathlib import Path
from typing import Any

# Read by MKL at its first call: products whose rows do not depend on how many rows there are,
# nor on the number of threads. Costs nothing from about 8 rows on.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import torch
import transformers
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from streaminator.config import EngineConfig, ModelConfig
from streaminator.engine.attention import NAME, Stream, attention
from streaminator.engine.batch import Batch
from streaminator.engine.kv_cache import KVCache, LayerShape, bytes_per_block
from streaminator.errors import ConfigError, DeviceError, ModelError

DEMO_MODEL = Path(__file__).parents[1] / "demo"

AttentionInterface.register(NAME, attention)


def resolve_device(name: str) -> torch.device:
    """The device meant by --device.

    Raises: DeviceError when it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"--device {name}: give cpu, cuda, cuda:N or auto")
    if device.type == "cuda":
        num = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= num:
            raise DeviceError(f"--device {name}: this machine has {num} CUDA devices; use cpu")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type meant by --dtype: auto is float32 on a CPU and bfloat16 on a GPU."""
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    return getattr(torch, name)


def load_tokenizer(config: ModelConfig) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of --tokenizer_name, or the model's own.

    Raises: ModelError when there is none.
    """
    source = _source(config.tokenizer_name or config.model_name)
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ModelError(
            f"no tokenizer in {source}: give one with --tokenizer_name ({_first_line(error)})"
        ) from error


def model_fingerprint(config: ModelConfig) -> str:
    """Hash of the checkpoint's files in a folder; of the name for a hub model."""
    source = Path(_source(config.model_name))
    digest = blake2b(digest_size=8)
    if not source.is_dir():
        digest.update(config.model_name.encode())
        return digest.hexdigest()
    names = ("config.json", "*.safetensors", "*.bin")
    for path in sorted(p for name in names for p in source.glob(name)):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            # Both ends of each file: a whole 100 GB checkpoint would take minutes.
            digest.update(file.read(1 << 20))
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read(1 << 20) + str(size).encode())
    return digest.hexdigest()


class ModelRunner:
    """A model on a device, with its KV cache."""

    def __init__(self, config: ModelConfig) -> None:
        """Load the weights.

        Raises:
            DeviceError: the device is not there.
            ModelError: not a causal model, or one whose attention cannot be replaced.
        """
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        self.model: Any = _load_model(config, self.dtype)
        self.model.to(self.device).eval()
        self.shapes = self._probe()
        self.cache: KVCache | None = None

    @property
    def max_model_len(self) -> int | None:
        """Most tokens of prompt and completion together; None: no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding."""
        return self.model.get_input_embeddings().num_embeddings

    @property
    def eos_token_ids(self) -> set[int]:
        """End-of-text tokens, as `generate` would use them."""
        for config in (self.model.generation_config, self.model.config.get_text_config()):
            ids = getattr(config, "eos_token_id", None)
            if ids is not None:
                return set(ids) if isinstance(ids, list | tuple) else {ids}
        return set()

    def make_cache(self, config: EngineConfig, max_length: int) -> KVCache:
        """Allocate the blocks: as many as a full stream can use, within the memory there is.

        Args:
            config: width, block size, and the number of blocks if given.
            max_length: most tokens of one sequence that the run expects.
        """
        per_block = bytes_per_block(self.shapes, config.block_size, self.dtype)
        num_blocks = config.num_blocks
        if num_blocks is None:
            per_sequence = -(-max_length // config.block_size) + 1
            # A full stream, and the prompts of as many idle ones.
            wanted = 2 * config.stream_width * per_sequence + 1
            num_blocks = max(per_sequence + 1, min(wanted, _free_bytes(self.device) // per_block))
        try:
            self.cache = KVCache(
                self.shapes,
                num_blocks=num_blocks,
                block_size=config.block_size,
                dtype=self.dtype,
                device=self.device,
            )
        except (RuntimeError, MemoryError) as error:
            raise ConfigError(
                f"--num_blocks {num_blocks}: the KV cache would take "
                f"{num_blocks * per_block / 2**20:.0f} MiB, more than there is; give fewer"
            ) from error
        return self.cache

    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits [R, V] of the batch's sampled rows; keys and values go to the cache."""
        return self._run(batch.input_ids, batch.positions, batch.sampled_rows, batch)

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read next tells the truth."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def memory_in_use(self) -> int:
        """Bytes: torch's on a GPU, this process's resident set on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    @torch.inference_mode()
    def _run(
        self, input_ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, batch: Batch
    ) -> torch.Tensor:
        return self.model(
            input_ids=input_ids,
            position_ids=positions,
            logits_to_keep=rows,
            use_cache=False,
            stream=Stream(batch, self.cache, {}),
        ).logits[0]

    @torch.inference_mode()
    def _probe(self) -> dict[int, LayerShape]:
        """Run one token to learn what each layer stores."""
        zero = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        stream = Stream(None, None, {})  # type: ignore[arg-type]
        name = type(self.model).__name__
        try:
            self.model(
                input_ids=zero,
                position_ids=zero,
                logits_to_keep=zero[0],
                use_cache=False,
                stream=stream,
            )
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
            raise ModelError(
                f"{name} does not run with packed sequences ({_first_line(error)}); "
                "give a decoder-only model of transformers"
            ) from error
        num_layers = self.model.config.get_text_config().num_hidden_layers
        if len(stream.shapes) != num_layers:
            raise ModelError(
                f"{name} calls the registered attention in {len(stream.shapes)} of its "
                f"{num_layers} layers; give a model that attends in every layer"
            )
        return stream.shapes


def _load_model(config: ModelConfig, dtype: torch.dtype) -> transformers.PreTrainedModel:
    source = _source(config.model_name)
    if config.model_name != "demo" and Path(source).exists():
        _check_folder(Path(source))
    try:
        return AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation=NAME,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"--model_name {source}: the checkpoint wants to run its own code; "
                "add --trust_remote_code if you trust it"
            ) from error
        raise ModelError(
            f"--model_name {source}: not a causal language model that can be loaded "
            f"({_first_line(error)})"
        ) from error


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError(f"--model_name {folder}: not a model folder (no config.json in it)")


def _source(name: str) -> str:
    return str(DEMO_MODEL) if name == "demo" else name


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def _free_bytes(device: torch.device) -> int:
    """Memory the KV cache may take: most of what is free on a GPU, a third on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.85)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 3
