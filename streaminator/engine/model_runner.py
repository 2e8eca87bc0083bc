# SPDX-License-Identifier: Apache-2.0
"""Run packed batches through an unmodified Hugging Face causal model.

Used by: `engine.Engine`, `streaminator.session`.
"""

import logging
import math
import os
import time
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface

from streaminator.config import EngineConfig, ModelConfig
from streaminator.engine.attention import NAME, LayerCall, Stream, attention
from streaminator.engine.batch import ROW_MULTIPLE, Batch, Newest, pack
from streaminator.engine.checkpoint import load_model
from streaminator.engine.compile_kernels import KernelsMissingError
from streaminator.engine.device import resolve_device, resolve_dtype, with_index
from streaminator.engine.fused_model import FusedModel, fuse_model
from streaminator.engine.gpu_model import GpuModel, fuse_gpu_model
from streaminator.engine.gpu_sampling import GpuSampling
from streaminator.engine.kernels import Kernels
from streaminator.engine.kv_cache import KVCache, bytes_per_block
from streaminator.engine.llama_like import NotFusedError
from streaminator.engine.packed_linear import Packer, find_packable, pack_linear
from streaminator.engine.paged_trial import why_not_paged
from streaminator.engine.reproducible import separate_expert_rows
from streaminator.engine.sampler import SamplingKernels
from streaminator.engine.step_graphs import CudaCapture, StepGraphs
from streaminator.errors import ConfigError, DeviceError, ModelError, first_line
from streaminator.sequence import Sequence

AttentionInterface.register(NAME, attention)

_log = logging.getLogger("streaminator")


class ModelRunner:
    """A model on a device, with its KV cache."""

    def __init__(self, config: ModelConfig) -> None:
        """Load the weights.

        Raises:
            DeviceError: the device is not there, or too small.
            ModelError: not a causal model, or one whose attention cannot be replaced.
        """
        self.device = with_index(resolve_device(config.device))
        self.dtype = resolve_dtype(config.dtype, self.device)
        self.model: Any = load_model(config, self.dtype, NAME)
        try:
            self.model.to(self.device).eval()
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"{config.model_name} does not fit into the memory of {self.device} "
                f"({self.dtype}: {first_line(error)}); give a smaller model or another --device"
            ) from error
        if self.device.type == "cpu":
            separate_expert_rows(self.model)
        self._in_use = -math.inf, 0
        self._packs = config.packed_linear and self.device.type == "cpu"
        self._has_kernels = self._packs and config.compiled_kernels
        self.sampling_kernels: SamplingKernels | None = None
        """Draw tokens: a CPU's from `pack_weights` on, a GPU's from `make_cache`; None: PyTorch does."""
        self._packer: Packer | None = None
        self._packed: list[torch.nn.Linear] = []
        self._fused: FusedModel | None = None
        self._not_fused = ""
        self._pages = config.paged_attention and self.device.type == "cuda"
        self._use_paged: dict[int, bool] = {}
        self._fuses_on_gpu = config.compiled_kernels
        self._batch_invariant = config.batch_invariant
        self._gpu_model: GpuModel | None = None
        self._graphs: StepGraphs | None = None
        if self._pages and config.cuda_graphs:
            self._graphs = StepGraphs(partial(CudaCapture, self.device))
        self._calls = self._probe()
        self.shapes = {layer: call.shape for layer, call in self._calls.items()}

    @property
    def max_model_len(self) -> int | None:
        """Most tokens of prompt and completion together; None: no limit."""
        config = self.model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            # Beyond this, transformers switches the frequencies of the whole batch.
            short = rope.get("original_max_position_embeddings")
            return short or getattr(config, "original_max_position_embeddings", limit)
        return limit

    def total_length(self, num_prompt_tokens: int, max_length: int) -> int:
        """Most tokens of a prompt and its completion of up to `max_length`, as far as the context goes."""
        length = num_prompt_tokens + max_length
        return min(length, self.max_model_len or length)

    @property
    def device_name(self) -> str:
        """The accelerator's name, or "cpu"."""
        is_cuda = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if is_cuda else "cpu"

    @property
    def is_asynchronous(self) -> bool:
        """Whether `forward` comes back before it is computed."""
        return self.device.type == "cuda"

    @property
    def num_parameters(self) -> int:
        """Weights of the model, tied ones once."""
        return self.model.num_parameters()

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

    def pack_weights(self, block_size: int) -> None:
        """Pack the weights, the first time; the number of threads must stay from now on."""
        if self._packer is not None or not self._packs:
            return
        kernels = None
        if self._has_kernels:
            try:
                kernels = self.sampling_kernels = Kernels(self.dtype)
            except KernelsMissingError as error:
                self._not_fused = str(error)
        self._packer = Packer(kernels)
        if kernels:
            try:
                self._fused = fuse_model(
                    self.model, self._calls, block_size, self._packer, self.max_model_len
                )
            except NotFusedError as error:
                self._not_fused = str(error)
        fused = self._fused.linears if self._fused else ()
        self._packed = find_packable(self.model, self._packer, fused)
        pack_linear(self._packed, self._packer)

    def repack_weights(self) -> None:
        """The weights have changed: pack again what is packed."""
        if self._packer is not None:
            pack_linear(self._packed, self._packer)
        if self._fused:
            self._fused.pack()

    def make_cache(self, config: EngineConfig, max_length: int) -> KVCache:
        """Allocate the blocks: as many as a full stream can use, within the memory there is.

        Args:
            config: width, block size, and the number of blocks if given.
            max_length: most tokens of one sequence that the run expects.

        Raises: ConfigError when they do not fit, or one sequence does not fit into them.
        """
        self._try_paged(config.block_size)
        per_block = bytes_per_block(self.shapes, config.block_size, self.dtype)
        num_blocks = self.num_blocks(config, max_length)
        try:
            return KVCache(
                self.shapes,
                num_blocks=num_blocks,
                block_size=config.block_size,
                dtype=self.dtype,
                device=self.device,
            )
        except (RuntimeError, MemoryError, OSError, OverflowError) as error:
            raise ConfigError(
                f"--num_blocks {num_blocks}: the KV cache would take "
                f"{num_blocks * per_block / 2**20:.0f} MiB, more than there is; give fewer"
            ) from error

    def num_blocks(self, config: EngineConfig, max_length: int) -> int:
        """As many as a full stream can use, within the memory that is free now; see `make_cache`."""
        if config.num_blocks is not None:
            return config.num_blocks
        per_block = bytes_per_block(self.shapes, config.block_size, self.dtype)
        per_sequence = -(-max_length // config.block_size) + 1
        assert config.stream_width is not None
        # A full stream, and the prompts of as many idle ones.
        wanted = 2 * config.stream_width * per_sequence + 1
        room = self._room(config)
        if config.kv_memory is None:
            return max(per_sequence + 1, min(wanted, room))
        if room < per_sequence + 1:
            raise ConfigError(
                f"--kv_memory {config.kv_memory:g}: one completion ({max_length} tokens with its prompt) "
                f"needs {(per_sequence + 1) * per_block / 2**30:.2g} GiB; give as much, or lower --max_length"
            )
        return min(wanted, room)

    def num_fitting(self, config: EngineConfig, length: int) -> int:
        """Sequences of `length` tokens whose keys and values fit into the memory that is free now."""
        return (self._room(config) - 1) // -(-length // config.block_size)

    def _room(self, config: EngineConfig) -> int:
        """Blocks that may be there, however wide the stream."""
        if config.num_blocks is not None:
            return config.num_blocks
        per_block = bytes_per_block(self.shapes, config.block_size, self.dtype)
        if config.kv_memory is None:
            return _free_bytes(self.device) // per_block
        return int(config.kv_memory * 2**30) // per_block

    @property
    def row_multiple(self) -> int:
        """Packed rows are padded to this many."""
        return self._fused.row_multiple if self._fused else ROW_MULTIPLE

    @property
    def rows_at_once(self) -> int:
        """Packed rows for which a forward takes about as long as for fewer of them."""
        return self._fused.rows_at_once if self._fused else ROW_MULTIPLE

    def clear(self, cache: KVCache, blocks: list[int]) -> None:
        """See to it that nothing is left of the last owners of blocks that are handed out anew."""
        # Fused layers do it where they begin a block; paged attention reads what was written only.
        if blocks and not self._fused and not self._reads_blocks(cache.block_size):
            cache.clear(blocks)

    def pack(
        self, sequences: list[Sequence], block_size: int, newest: Newest | None = None
    ) -> Batch:
        """A step's work on the device, for `forward`."""
        return pack(
            sequences,
            block_size=block_size,
            device=self.device,
            row_multiple=self.row_multiple,
            pads=self._graphs is not None and self._reads_blocks(block_size),
            newest=newest,
        )

    def forward(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Logits [R, V] of the batch's sampled rows, until the next call; keys and values go to the
        cache. To be called in PyTorch's inference mode.
        """
        assert torch.is_inference_mode_enabled(), "autograd would keep every step's activations"
        if self._fused:
            logits = self._fused(batch, cache)
        elif self._graphs:
            logits = self._graphs.run(self._run_model, batch, cache)
        else:
            logits = self._run_model(batch, cache)
        return logits[: batch.num_sampled]

    @property
    def was_usual(self) -> bool:
        """Whether the newest forward took what others of its size will take."""
        return self._graphs is None or self._graphs.was_usual

    def _run_model(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        if self._gpu_model and self._reads_blocks(cache.block_size):
            return self._gpu_model(batch, cache)
        output = self.model(
            input_ids=batch.input_ids,
            position_ids=batch.positions,
            logits_to_keep=batch.sampled_rows,
            use_cache=False,
            stream=Stream(batch, cache, self._reads_blocks(cache.block_size)),
        )
        return output.logits[0]

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read next tells the truth."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def describe_memory(self, cache: KVCache) -> str:
        """What weights and cache take, in words."""
        weights = sum(tensor.nbytes for tensor in {*self.model.parameters(), *self.model.buffers()})
        packed = sum(layer.forward.nbytes for layer in self._packed)  # type: ignore[union-attr]
        packed += self._fused.nbytes if self._fused else 0
        per_block = bytes_per_block(self.shapes, cache.block_size, self.dtype)
        return (
            f"weights {(weights + packed) / 2**30:.2g} GiB; keys and values "
            f"{cache.num_blocks * per_block / 2**30:.2g} GiB, {cache.num_blocks:,} blocks of "
            f"{cache.block_size} tokens" + (f"; layers are {self.layers}" if self.layers else "")
        )

    @property
    def layers(self) -> str:
        """Whether they run fused, in words; "" where nothing fuses them."""
        if self._not_fused:
            return f"not fused: {self._not_fused}"
        return "fused" if self._fused or self._gpu_model else ""

    def memory_in_use(self) -> int:
        """Bytes: torch's on a GPU, this process's resident set on a CPU, as of 0.1 s ago at most."""
        read_at, num_bytes = self._in_use
        if time.monotonic() - read_at > 0.1:  # either takes a tenth of a millisecond
            is_cuda = self.device.type == "cuda"
            num_bytes = torch.cuda.memory_allocated(self.device) if is_cuda else _resident_bytes()
            self._in_use = time.monotonic(), num_bytes
        return num_bytes

    @property
    def is_paged(self) -> bool:
        """Whether attention reads the KV blocks where they lie."""
        return any(self._use_paged.values())

    def _reads_blocks(self, block_size: int) -> bool:
        return self._use_paged.get(block_size, False)

    def _try_paged(self, block_size: int) -> None:
        if not self._pages or block_size in self._use_paged:
            return
        reason = why_not_paged(set(self._calls.values()), block_size, self.device)
        self._use_paged[block_size] = reason is None
        if reason is not None:
            _log.warning("attention gathers its keys, which is slower: %s", reason)
        elif self._fuses_on_gpu:
            self._fuses_on_gpu = False  # tried once
            self._use_gpu_kernels(block_size)

    def _use_gpu_kernels(self, block_size: int) -> None:
        try:
            self._gpu_model = fuse_gpu_model(
                self.model, self._calls, block_size, batch_invariant=self._batch_invariant
            )
        except NotFusedError as error:
            self._not_fused = str(error)
        sampling = GpuSampling(self.dtype)
        reason = sampling.why_not(self.vocab_size, self.device)
        if reason is None:
            self.sampling_kernels = sampling
        else:
            _log.warning("PyTorch draws tokens, which is slower: %s", reason)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what the trials took, so that the KV cache can have it

    @torch.inference_mode()
    def _probe(self) -> dict[int, LayerCall]:
        """Run one token to learn what each layer stores, and how it attends."""
        zero = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        stream = Stream(None, None)  # type: ignore[arg-type]
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
                f"{name} does not run in the stream ({first_line(error)}); "
                "give another --dtype, or a decoder-only model of transformers"
            ) from error
        num_layers = self.model.config.get_text_config().num_hidden_layers
        if len(stream.calls) != num_layers:
            raise ModelError(
                f"{name} calls the registered attention in {len(stream.calls)} of its "
                f"{num_layers} layers; give a model that attends in every layer"
            )
        return stream.calls


def _resident_bytes() -> int:
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:  # not Linux
        return 0


def _free_bytes(device: torch.device) -> int:
    """Memory the KV cache may take: most of what is free on a GPU, a third on a CPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what PyTorch keeps for later is not free by its count
        return int(torch.cuda.mem_get_info(device)[0] * 0.85)
    name = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") // 3
