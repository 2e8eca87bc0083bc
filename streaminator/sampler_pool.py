# SPDX-License-Identifier: Apache-2.0
"""Sampling from Python, call after call, with weights that change in between: rollouts for RL.

    pool = SamplerPool(JobConfig(...))
    completions = pool.sample(prompts, seed=epoch)
    pool.update_weights(model.state_dict())

Invariants
- A completion is a function of weights, prompt, sampling parameters, seed, prompt id and sample
  index: earlier calls change speed only.
- Every (prompt, sample index) of a call is returned once, drawn or failed, whatever dies.
- A prompt belongs to the worker that a stable hash of its id names, which remembers it from call to
  call; in a call's tail others may take it over.

Used by: programs; `actors.sampler_pool` is the same with Ray workers.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from operator import index
from typing import TYPE_CHECKING, Protocol, Self

from streaminator.backlog import Work
from streaminator.config import JobConfig
from streaminator.dispatch import Dispatcher
from streaminator.engine.checkpoint import load_tokenizer
from streaminator.errors import ConfigError, DataError, InputError
from streaminator.pool import OneWorker, Workers
from streaminator.resident_session import Drawn, ResidentSession
from streaminator.sequence import Completion, FinishReason, Prompt, not_drawn
from streaminator.session import Part
from streaminator.unicode import half_a_pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptLike = str | Sequence[int] | Mapping[str, object]
"""Text, token ids, or {"prompt": either, "prompt_id": text}."""

_log = logging.getLogger("streaminator")


class ResidentWorkers(Workers, Protocol):
    """Workers that keep their model and their speculators from call to call."""

    def begin(self, *, seed: int, max_prompt_length: int) -> Mapping[int, int]:
        """Begin a call, see `ResidentSession.open`; returns the workers that are there, with their
        stream widths.

        Raises: InputError of a worker; WorkerDiedError when none is left.
        """
        ...

    def update_weights(self, weights: object) -> None:
        """Load other weights. Raises: ModelError; the old ones stay."""
        ...


class LocalWorkers(OneWorker):
    """A resident session in this process."""

    def __init__(self, config: JobConfig) -> None:
        """Load the model. Raises: InputError."""
        self._session = ResidentSession(config)
        super().__init__(self._session)

    def begin(self, *, seed: int, max_prompt_length: int) -> Mapping[int, int]:
        """Begin a call."""
        self._submitted = None  # of a call that was broken off
        opened = self._session.open(seed=seed, max_prompt_length=max_prompt_length)
        return {0: opened.stream_width}

    def update_weights(self, weights: object) -> None:
        """Load other weights."""
        self._session.update_weights(weights)


class SamplerPool:
    """A model on its workers, to be sampled again and again."""

    def __init__(
        self, config: JobConfig, make_workers: Callable[[JobConfig], ResidentWorkers] = LocalWorkers
    ) -> None:
        """Load the model in all workers; by default in this process.

        Args:
            config: `sampling`, `model`, `engine`, `speculator`, `data.num_completions` and
                `cluster.worker_timeout` count; prompts are not worded and answers not graded.
            make_workers: loads the model.

        Raises: InputError.
        """
        _refuse_settings(config)
        self._config = config
        self._tokenizer = load_tokenizer(config.model)
        self._busy = ""
        self._is_closed = False
        self._workers = make_workers(config)

    def sample(
        self, prompts: Iterable[PromptLike], *, seed: int | None = None
    ) -> list[list[Completion]]:
        """Draw `data.num_completions` completions of each prompt.

        Args:
            prompts: texts as the model is to see them, token ids, or {"prompt": either,
                "prompt_id": name}. Without a name it is a hash of the text or the ids, from its
                second occurrence in a call with the number of it.
            seed: of the sampling noise; default: that of the settings.

        Returns:
            Each prompt's completions, prompts and completions in order. A completion that could
            not be drawn has the finish reason "failed" and an `error`.

        Raises: InputError naming the prompt; WorkerDiedError when no worker is left.
        """
        sampling = self._config.sampling
        seed = sampling.seed if seed is None else replace(sampling, seed=seed).seed
        sample_indices = tuple(range(self._config.data.num_completions))
        known = list(self._read(prompts, sample_indices))
        if not known:
            return []
        draws = [_Draw.of(prompt, sample_indices) for prompt in known]
        with self._busy_with("sample"):
            longest = max(len(prompt.token_ids) for prompt in known)
            dispatcher = Dispatcher(
                self._workers,
                iter(draws),
                _Collector({p.prompt_id: (p, d) for p, d in zip(known, draws, strict=True)}),
                stream_width=self._config.engine.stream_width,
                worker_timeout=self._config.cluster.worker_timeout,
                ready=self._workers.begin(seed=seed, max_prompt_length=longest),
            )
            for _ in dispatcher.run():
                pass
        return [[draw.drawn[i] for i in sample_indices] for draw in draws]

    def update_weights(self, weights: object) -> None:
        """Let the following calls draw with other weights of the same architecture.

        Args:
            weights: a state dict with the model's own names (of tied weights one is enough), on any
                device and of any floating-point type, or the folder or hub name of a checkpoint.

        Raises: ModelError naming what does not fit; the old weights stay.
        """
        with self._busy_with("update_weights"):
            self._workers.update_weights(weights)

    def close(self) -> None:
        """Let the workers go. A call that another thread is in ends in an error with Ray workers, and
        returns what it has drawn in one process."""
        self._is_closed = True
        self._workers.shut_down()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _busy_with(self, what: str) -> Iterator[None]:
        # From another thread, say of a trainer: weights must not change under a completion.
        if self._is_closed:
            raise InputError(f"{what}: the pool is closed; make another one")
        if self._busy:
            raise InputError(f"{what} while {self._busy} is running: wait until it returns")
        self._busy = what
        try:
            yield
        except Exception as error:
            if not self._is_closed:
                raise
            raise InputError(f"{what}: the pool was closed meanwhile; make another one") from error
        finally:
            self._busy = ""

    def _read(
        self, prompts: Iterable[PromptLike], sample_indices: tuple[int, ...]
    ) -> Iterator[Prompt]:
        if isinstance(prompts, str | Mapping):
            raise DataError("prompts: got a single one; give a list of prompts")
        if not isinstance(prompts, Iterable):
            raise DataError(f"prompts: got a {type(prompts).__name__}; give a list of prompts")
        taken: dict[str, int] = {}
        num_of: dict[str, int] = {}
        for number, given in enumerate(prompts):
            prompt_id, content = _parts_of(given, number)
            text, token_ids = _tokens_of(content, self._tokenizer, number)
            if prompt_id is None:
                digest = blake2b(str(text or token_ids).encode(), digest_size=8).hexdigest()
                num_of[digest] = num_of.get(digest, 0) + 1
                prompt_id = digest if num_of[digest] == 1 else f"{digest}-{num_of[digest]}"
            if prompt_id in taken:
                raise DataError(
                    f"prompt {number}: prompt_id {prompt_id!r} is taken by prompt "
                    f"{taken[prompt_id]}; make ids unique in a call"
                )
            taken[prompt_id] = number
            yield Prompt(
                prompt_id=prompt_id,
                token_ids=token_ids,
                text=text,
                question=text,
                sample_indices=sample_indices,
            )


@dataclass(slots=True, eq=False)
class _Draw(Work):
    """A prompt on its way through one call."""

    drawn: dict[int, Completion] = field(default_factory=dict)

    def as_prompt(self) -> Prompt:
        """What a worker is to draw, with what another one has drawn in this call."""
        finished = tuple(tuple(self.drawn[i].token_ids) for i in sorted(self.drawn))
        return replace(Work.as_prompt(self), finished=finished, finished_parts=())


class _Collector:
    """Where a call's completions come together; a `dispatch.Output`."""

    def __init__(self, draws: Mapping[str, tuple[Prompt, _Draw]]) -> None:
        self._draws = draws

    def publish(self, part: Part) -> None:
        """Take in completions."""
        assert isinstance(part, Drawn)
        for completion in part.completions:
            self._add(completion)

    def record(
        self, kind: str, *, worker: int | None, detail: str, prompt_id: str | None = None
    ) -> None:
        """Tell of something out of the ordinary."""
        _log.warning("%s (worker %s): %s", kind, worker, detail)

    def fail(self, prompt: Prompt, why: str) -> None:
        """Take in failed completions."""
        for sample_index in prompt.sample_indices:
            self._add(not_drawn(prompt, sample_index, FinishReason.FAILED, why))

    def _add(self, completion: Completion) -> None:
        prompt, draw = self._draws[completion.prompt.prompt_id]
        assert completion.sample_index not in draw.drawn, "a completion came twice"
        # The prompt as it was given: of all its completions one object.
        draw.drawn[completion.sample_index] = replace(completion, prompt=prompt)


def _parts_of(given: PromptLike, number: int) -> tuple[str | None, object]:
    """(prompt id if there is one, text or token ids)."""
    if not isinstance(given, Mapping):
        return None, given
    unknown = sorted(map(str, given.keys() - {"prompt", "prompt_id"}))
    if unknown or "prompt" not in given:
        raise DataError(
            f"prompt {number}: has {', '.join(sorted(map(str, given))) or 'no keys'}; give "
            '{"prompt": text or token ids, "prompt_id": a name}'
        )
    prompt_id = given.get("prompt_id")
    if prompt_id is not None and (not isinstance(prompt_id, str) or not prompt_id):
        raise DataError(f"prompt {number}: prompt_id {prompt_id!r}: must be a non-empty text")
    return prompt_id, given["prompt"]


def _tokens_of(
    content: object, tokenizer: "PreTrainedTokenizerBase", number: int
) -> tuple[str, tuple[int, ...]]:
    if isinstance(content, str):
        if half_a_pair(content) is not None:
            raise DataError(f"prompt {number}: has half a surrogate pair; give text that is UTF-8")
        text, token_ids = content, tuple(tokenizer(content)["input_ids"])
    else:
        try:
            text, token_ids = "", _whole_numbers(content)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"prompt {number}: is a {type(content).__name__}; give text or a list of token ids"
            ) from error
    if not token_ids:
        raise DataError(f"prompt {number}: has no tokens; give at least one")
    return text, token_ids


def _whole_numbers(content: object) -> tuple[int, ...]:
    """Raises: TypeError."""
    if isinstance(content, bytes | bytearray):
        raise TypeError
    numbers = list(content)  # type: ignore[call-overload]
    if any(isinstance(number, bool) for number in numbers):
        raise TypeError
    return tuple(map(index, numbers))


def _refuse_settings(config: JobConfig) -> None:
    """Raises: ConfigError for settings of a job that would be ignored without a word."""
    for name, value in (
        ("warm_start", config.speculator.warm_start),
        ("stop_when_settled", config.data.stop_when_settled),
    ):
        if value is not None:
            raise ConfigError(f"--{name} {value}: a SamplerPool has no use for it; leave it out")
