# SPDX-License-Identifier: Apache-2.0
"""Every setting, once: name, default, meaning, check. Flags and TOML keys are derived from here.

Invariants
- A default exists only here. No object is changed after it is built.
- `tokens=True` marks a setting that may change a token; all others change speed or place only,
  so a run may be resumed with other values for them.
- `auto=True` marks a number whose None is shown as "auto": the program chooses it.

Used by: `streaminator.cli_args` (flags), `streaminator.run_record` (what a run recorded).
"""

import math
import os
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields
from typing import Any

from streaminator.config_check import check_types, require
from streaminator.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
SPECULATORS = ("ngram", "memory")


def _option(
    default: Any, help: str, *, tokens: bool = False, choices: tuple = (), auto: bool = False
) -> Any:
    metadata = {"help": help, "tokens": tokens, "choices": choices, "auto": auto}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """What a completion is drawn with. Together with weights and prompt it decides every token."""

    temperature: float = _option(0.8, "softmax temperature; 0 is greedy", tokens=True)
    top_k: int = _option(0, "keep the k most likely tokens; 0 keeps all", tokens=True)
    top_p: float = _option(1.0, "keep the smallest set of tokens with this mass", tokens=True)
    min_p: float = _option(0.0, "drop tokens below this share of the top one", tokens=True)
    max_length: int = _option(256, "most tokens in one completion", tokens=True)
    seed: int = _option(0, "seed of the sampling noise", tokens=True)
    stop: tuple[str, ...] = _option((), "strings that end a completion", tokens=True)
    stop_token_ids: tuple[int, ...] = _option(
        (), "token ids that end a completion, besides the model's own", tokens=True
    )
    ignore_eos: bool = _option(False, "go on past the model's end-of-text token", tokens=True)

    def __post_init__(self) -> None:
        """Raises: ConfigError naming the setting and the allowed range."""
        check_types(self)
        require(
            self.temperature == 0 or 1e-4 <= self.temperature <= 1e4,
            "temperature",
            self.temperature,
            "0 (greedy), or between 0.0001 and 10000",
        )
        require(self.top_k >= 0, "top_k", self.top_k, "0 or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        require(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        require(self.max_length >= 1, "max_length", self.max_length, "1 or more")
        require(0 <= self.seed < 2**63, "seed", self.seed, "between 0 and 2**63 - 1")
        require(all(self.stop), "stop", "''", "a non-empty string")
        least = min(self.stop_token_ids, default=0)
        require(least >= 0, "stop_token_ids", least, "0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which weights, where and how they run."""

    model_name: str = _option(
        "demo", "hub name or folder of a causal model; 'demo' is the bundled one", tokens=True
    )
    tokenizer_name: str | None = _option(
        None, "hub name or folder of the tokenizer; default: the model's", tokens=True
    )
    dtype: str = _option(
        "auto",
        "auto is float32 on a CPU, bfloat16 on a GPU",
        tokens=True,
        choices=DTYPES,
    )
    device: str = _option("auto", "cpu, cuda, cuda:N, or auto: a GPU if there is one", tokens=True)
    trust_remote_code: bool = _option(False, "run code that comes with the checkpoint", tokens=True)
    packed_linear: bool = _option(
        True,
        "on a CPU: keep a second copy of linear layers' weights as its matrix kernels read them",
        tokens=True,
    )
    compiled_kernels: bool = _option(
        True,
        "compile kernels that fuse the layers of Llama-like models; on a CPU they need packed_linear, "
        "on a GPU paged_attention",
        tokens=True,
    )
    batch_invariant: bool = _option(
        True,
        "on a GPU: fused layers multiply by own kernels, so that a token's logits do not depend on "
        "its batch; else by PyTorch's",
        tokens=True,
    )
    paged_attention: bool = _option(
        True,
        "on a GPU: attention reads the KV blocks where they lie, by kernels of Triton",
        tokens=True,
    )
    cuda_graphs: bool = _option(
        True,
        "on a GPU: replay the forward of steps of a shape that was met before; needs paged_attention",
        tokens=True,
    )

    def __post_init__(self) -> None:
        """Raises: ConfigError naming the setting and what is allowed."""
        check_types(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Which prompts, how they are worded, how answers are graded."""

    dataset: str = _option(
        "demo",
        "hub name, or a .jsonl/.json/.csv/.parquet file; 'demo' is the bundled set",
        tokens=True,
    )
    dataset_config: str | None = _option(
        None, "configuration of a hub dataset (openai/gsm8k: main)", tokens=True
    )
    split: str = _option("test", "split of a hub dataset", tokens=True)
    num_samples: int | None = _option(None, "number of prompts to take; default: all", tokens=True)
    num_completions: int = _option(8, "completions per prompt", tokens=True)
    question_column: str | None = _option(
        None,
        "column of the question; default: question, problem, prompt, query, input or instruction",
        tokens=True,
    )
    answer_column: str | None = _option(
        None,
        "column of the reference answer; default: answer, solution, gold or target, if there",
        tokens=True,
    )
    id_column: str | None = _option(
        None, "column of a unique prompt id; default: a hash of question and answer", tokens=True
    )
    metadata_columns: tuple[str, ...] = _option((), "columns to copy into the output")
    chat_template: bool = _option(
        True, "use the tokenizer's chat template where it has one", tokens=True
    )
    prompt_template: str | None = _option(
        None, "prompt without a chat template; {question} is replaced", tokens=True
    )
    system_prompt: str | None = _option(None, "system message of the chat template", tokens=True)
    few_shot: str | None = _option(
        None, "file of worked examples to put before each question", tokens=True
    )
    num_few_shot: int = _option(8, "examples to take from --few_shot", tokens=True)
    grader: str | None = _option(
        None, "grader: gsm8k, boxed, none, or module:function; default: by the answers"
    )
    stop_when_settled: float | None = _option(
        None,
        "draw no more of a prompt once its most frequent answer leads with this chance, say 0.95",
        tokens=True,
    )

    def __post_init__(self) -> None:
        """Raises: ConfigError naming the setting and the allowed range."""
        check_types(self)
        require(
            self.num_samples is None or self.num_samples >= 1,
            "num_samples",
            self.num_samples,
            "1 or more",
        )
        require(
            1 <= self.num_completions <= 1_000_000,
            "num_completions",
            self.num_completions,
            "between 1 and 1000000",
        )
        require(self.num_few_shot >= 1, "num_few_shot", self.num_few_shot, "1 or more")
        settled = self.stop_when_settled
        require(
            settled is None or 0.5 <= settled < 1,
            "stop_when_settled",
            settled,
            "at least 0.5 and below 1",
        )
        if settled is not None and self.grader == "none":
            raise ConfigError(
                "--stop_when_settled with --grader none: there are no answers to count; choose "
                "another grader"
            )
        if self.prompt_template is not None and "{question}" not in self.prompt_template:
            raise ConfigError("--prompt_template: must contain {question}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The stream: its width and its memory. Changes speed, never a token; but for `block_size`, where
    it decides whether a CPU's layers can be fused."""

    stream_width: int | None = _option(
        None,
        "completions in flight at once (slots); auto, the default: each worker takes as many as raise "
        "its tokens per second",
        auto=True,
    )
    kv_cache: bool = _option(True, "keep keys and values between steps")
    continuous_batching: bool = _option(True, "refill a slot the moment its completion ends")
    overlap: bool = _option(
        True,
        "on a GPU: learn from a step, and write its completions, while the next one is computed, which "
        "without drafts is launched before the step's tokens are known",
    )
    max_batched_tokens: int = _option(512, "most prompt tokens computed in one step (chunking)")
    in_flight_per_prompt: int | None = _option(
        1,
        "completions of one prompt in flight at once: above 1, or auto, prompts take a second slot "
        "and more where slots would stay empty",
        auto=True,
    )
    block_size: int = _option(
        16, "tokens per KV block; on a CPU only 16 lets layers be fused", tokens=True
    )
    num_blocks: int | None = _option(None, "KV blocks; default: sized by width and free memory")
    kv_memory: float | None = _option(
        None,
        "most memory for keys and values, GiB; default: most of what is free on a GPU, else a third",
    )

    def __post_init__(self) -> None:
        """Raises: ConfigError naming the setting and the allowed range."""
        check_types(self)
        require(
            self.stream_width is None or 1 <= self.stream_width <= 65536,
            "stream_width",
            self.stream_width,
            "between 1 and 65536, or auto",
        )
        require(
            self.max_batched_tokens >= 1, "max_batched_tokens", self.max_batched_tokens, "1 or more"
        )
        require(
            self.in_flight_per_prompt is None or self.in_flight_per_prompt >= 1,
            "in_flight_per_prompt",
            self.in_flight_per_prompt,
            "1 or more, or auto",
        )
        require(
            self.block_size >= 16 and self.block_size % 16 == 0,
            "block_size",
            self.block_size,
            "a multiple of 16",
        )
        require(
            self.num_blocks is None or self.num_blocks >= 2,
            "num_blocks",
            self.num_blocks,
            "2 or more",
        )
        require(
            self.kv_memory is None or 0 < self.kv_memory < math.inf,
            "kv_memory",
            self.kv_memory,
            "more than 0 (GiB), and finite",
        )
        if self.kv_memory is not None and self.num_blocks is not None:
            raise ConfigError("--kv_memory with --num_blocks: both size the KV cache; give one")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculatorConfig:
    """What drafts are made of. Changes speed, never a token."""

    spec_decoding: bool = _option(True, "draft tokens and verify them (speculative decoding)")
    speculator: str = _option("memory", "kind of speculator", choices=SPECULATORS)
    num_speculative_tokens: int | None = _option(
        None,
        "most drafted tokens per completion and step; default: 16, of which the memory verifies "
        "what pays; ngram: 4",
    )
    shared_memory: bool = _option(True, "memory: prompts share a tier of short contexts")
    num_top_tokens: int = _option(
        8, "memory: the model's most likely tokens to learn from at each position; 0: none"
    )
    store_distributions: bool = _option(
        False, "write those tokens and their probabilities, with any speculator or without one"
    )
    draft_noise: bool = _option(True, "memory: draft with the sampler's own noise")
    ngram_order: int = _option(3, "order of the n-gram speculator (2: bigram)")
    prompt_training: bool = _option(True, "train each speculator on its prompt")
    generation_training: bool = _option(True, "train each speculator on its own completions")
    speculator_memory: int = _option(256, "most memory of all speculators together, MiB")
    warm_start: str | None = _option(
        None, "earlier run to learn from before drawing: its folder, URI, or run id in --output"
    )

    def __post_init__(self) -> None:
        """Raises: ConfigError naming the setting and the allowed range."""
        check_types(self)
        require(
            self.num_speculative_tokens is None or self.num_speculative_tokens >= 1,
            "num_speculative_tokens",
            self.num_speculative_tokens,
            "1 or more (--no_spec_decoding switches drafting off)",
        )
        require(
            0 <= self.num_top_tokens <= 64,
            "num_top_tokens",
            self.num_top_tokens,
            "between 0 and 64",
        )
        if self.store_distributions and not self.num_top_tokens:
            raise ConfigError(
                "--store_distributions with --num_top_tokens 0: there would be nothing to store; "
                "give 1 or more"
            )
        if self.warm_start is not None and not (self.spec_decoding and self.generation_training):
            raise ConfigError(
                "--warm_start without speculative decoding that learns completions: nothing would "
                "read it; leave it out, or --no_spec_decoding and --no_generation_training"
            )
        require(self.ngram_order >= 1, "ngram_order", self.ngram_order, "1 or more")
        require(
            1 <= self.speculator_memory <= 2**20,
            "speculator_memory",
            self.speculator_memory,
            "between 1 and 1048576 (MiB)",
        )

    @property
    def max_draft(self) -> int:
        """Most drafted tokens per completion and step."""
        if self.num_speculative_tokens is not None:
            return self.num_speculative_tokens
        return 16 if self.speculator == "memory" else 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """How many worker processes, and on which Ray."""

    num_workers: int | None = _option(
        None,
        "workers; 0 runs in this process without Ray; auto, the default: one per GPU, else 1",
        auto=True,
    )
    address: str | None = _option(None, "address of a running Ray; default: start a local one")
    gpus_per_worker: float | None = _option(
        None, "GPUs of a worker, at most 1; below 1 workers share one; default: 1 on GPUs"
    )
    cpus_per_worker: float | None = _option(
        None, "CPU cores of a worker; default: 1 on GPUs, else as many as there are"
    )
    worker_resources: tuple[str, ...] = _option((), "custom Ray resources of a worker, NAME=AMOUNT")
    worker_timeout: float = _option(
        300.0, "seconds without a step after which a worker counts as hung (its first step: 4 x)"
    )

    def __post_init__(self) -> None:
        """Raises: ConfigError naming the setting and the allowed range."""
        check_types(self)
        require(
            self.num_workers is None or self.num_workers >= 0,
            "num_workers",
            self.num_workers,
            "0 or more",
        )
        for name in ("gpus_per_worker", "cpus_per_worker"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "more than 0")
        require(
            self.worker_timeout > 0, "worker_timeout", self.worker_timeout, "more than 0 (seconds)"
        )
        if self.num_workers == 0 and self.address is not None:
            raise ConfigError("--address with --num_workers 0: without Ray there is no address")

    @property
    def ray_address(self) -> str | None:
        """Of the Ray that runs already: as given, or the one this job was submitted to; None: none."""
        if self.address is not None:
            return self.address
        return os.environ.get("RAY_ADDRESS") or None

    @property
    def resources(self) -> dict[str, float]:
        """Custom resources of a worker. Raises: ConfigError for one that is not NAME=AMOUNT."""
        return dict(map(_amount, self.worker_resources))


def _amount(text: str) -> tuple[str, float]:
    name, _, amount = text.partition("=")
    try:
        number = float(amount)
    except ValueError:
        number = 0.0
    if not name or number <= 0:
        raise ConfigError(f"--worker_resources {text}: must be NAME=AMOUNT with an amount above 0")
    return name, number


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Where results go and what is told on the way."""

    output: str = _option("results", "folder or URI under which the run's own folder is made")
    run_id: str | None = _option(
        None, "name of the run; default: made from the settings, so the same command resumes"
    )
    logprobs: bool = _option(
        False, "write the log-probability of every token, at temperature 1 and unfiltered"
    )
    profile: bool = _option(
        False, "write a trace of 20 steps of each worker into profile/, for Perfetto"
    )
    use_wandb: bool = _option(False, "log to Weights & Biases")
    wandb_project: str = _option("streaminator", "Weights & Biases project")

    def __post_init__(self) -> None:
        """Raises: ConfigError when the run id cannot be a folder name."""
        check_types(self)
        if self.run_id is not None and (
            not self.run_id
            or "/" in self.run_id
            or self.run_id.startswith(".")
            or len(self.run_id.encode()) > 200
        ):
            raise ConfigError(
                f"--run_id {self.run_id!r}: must be a plain folder name of at most 200 bytes"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """All settings of one sampling job."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    speculator: SpeculatorConfig = field(default_factory=SpeculatorConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        """Raises: ConfigError on settings that contradict each other."""
        spec = self.speculator
        if spec.spec_decoding and not (spec.prompt_training or spec.generation_training):
            raise ConfigError(
                "--no_prompt_training with --no_generation_training: the speculator would learn "
                "from nothing; add --no_spec_decoding to run without one"
            )
        if self.data.stop_when_settled is not None and self.engine.in_flight_per_prompt != 1:
            raise ConfigError(
                "--in_flight_per_prompt with --stop_when_settled: whether a completion is drawn "
                "depends on all before it; leave one of them out"
            )

    @classmethod
    def from_flat(cls, values: dict[str, Any]) -> "JobConfig":
        """Build from `{setting: value}`; settings left out keep their defaults.

        Raises: ConfigError for a value that is not allowed.
        """
        groups = {
            name: kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})
            for name, kind in _GROUPS.items()
        }
        return cls(**groups)

    def flat(self) -> dict[str, Any]:
        """`{setting: value}` of every setting, as JSON can hold it."""
        result = {}
        for group, setting in settings():
            value = getattr(getattr(self, group), setting.name)
            result[setting.name] = list(value) if isinstance(value, tuple) else value
        return result

    def shown(self) -> dict[str, Any]:
        """As `flat`, with "auto" in words, for people."""
        is_auto = {setting.name for _, setting in settings() if setting.metadata["auto"]}
        flat = self.flat()
        return flat | {name: "auto" for name in is_auto if flat[name] is None}


_GROUPS: dict[str, Any] = {
    "sampling": SamplingParams,
    "model": ModelConfig,
    "data": DataConfig,
    "engine": EngineConfig,
    "speculator": SpeculatorConfig,
    "cluster": ClusterConfig,
    "run": RunConfig,
}


def settings() -> Iterator[tuple[str, Field]]:
    """(group, field) of every setting, in the order of the help text."""
    for name, kind in _GROUPS.items():
        for setting in fields(kind):
            yield name, setting


def token_settings() -> set[str]:
    """Names of the settings that may change a token."""
    return {setting.name for _, setting in settings() if setting.metadata["tokens"]}
